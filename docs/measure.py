"""Runs the experiments whose results README and docs show, and writes docs/results/<name>.json.

    python docs/measure.py default all_labels digits    # the headline table: about half an hour
    python docs/measure.py                              # says what there is
    python docs/render.py                               # then the tables and figures

An experiment is a command, a search a list of commands that differ in a few flags and are scored on
validation images. Stopped, each goes on where it was. MNIST is found as the scripts find it
(MNIST_DATA_DIR, an earlier download, a download).
"""

import datetime
import hashlib
import importlib.util
import itertools
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
RUNS = Path("runs/measure")
sys.path.insert(0, str(ROOT / "examples"))

from experiment import write_whole  # noqa: E402
from utils import UserError, require  # noqa: E402

# No seed here had been run when the settings were fixed. Where a teacher is named, it is that of an
# experiment further up.
DISTIL = "examples/15_knowledge_distillation.py"
LIMITED = "examples/16_limited_labels.py"
HINTON = "examples/25_hinton_2015.py"
EXPERIMENTS = {
    "default": f"{DISTIL} --seed 62 --seeds 5 --teacher-seed 2",
    "all_labels": f"{DISTIL} --labels all --seed 62 --seeds 5 --teacher {RUNS}/default",
    "digits": f"{DISTIL} --dataset digits --seed 62 --seeds 8 --teacher-seed 2",
}
VARIANTS = {
    "grid": "examples/advanced/knowledge_distillation.py --labels 250 1000 5000 --seed 70"
    " --teacher-seed 2",
    "temperature": "examples/advanced/temperature.py --seed 70 --teacher-seed 2",
    "ensemble": "examples/17_ensemble_distillation.py --seed 70 --seeds 5 --teacher-seed 280",
    "self": "examples/18_self_distillation.py --seed 71 --seeds 5",
    "online": "examples/19_online_distillation.py --seed 71 --seeds 5",
    "cross_modal": "examples/20_cross_modal_distillation.py --seed 71 --seeds 5",
    "limited_labels": f"{LIMITED} --seed 80 --seeds 5 --teacher-seed 3",
    # The same pairs with all labels, but at a constant rate.
    "constant": f"{LIMITED} --labels all --schedule constant --epochs 10 --seed 80 --seeds 5"
    f" --teacher {RUNS}/limited_labels",
    "controls": "examples/advanced/controls.py --seed 90 --seeds 5 --teacher-seed 3",
    "hinton": f"{HINTON} --seed 100 --seeds 5",
}

# Of each search: the command, and the flags of its cells. What is scored are 10,000 training images
# that neither students nor teacher see. The teacher is trained by the first cell.
HOLDOUT = 10_000
HELD_OUT = f"--holdout {HOLDOUT}"
TUNING = [
    f"--labels {labels} --epochs {epochs} --learning-rate {rate} --seed 1 --seeds {seeds}"
    for labels, rates, epoch_choices, seeds in (
        (1000, ("1e-2", "2e-2", "4e-2", "8e-2"), (30, 60), 3),
        ("all", ("1e-2", "2e-2", "4e-2"), (3, 4, 6), 2),
    )
    for epochs, rate in itertools.product(epoch_choices, rates)
]
# For few labels the epochs of script 15's rule, and twice as many.
LIMITED_TUNING = [
    f"--labels {labels} --epochs {epochs} --learning-rate {rate} --seed 1 --seeds {seeds}"
    for labels, epoch_choices, seeds in (
        (100, (274, 548), 4),
        (250, (150, 300), 4),
        (1000, (60, 120), 2),
        (5000, (21,), 2),
    )
    for epochs, rate in itertools.product(epoch_choices, ("1e-2", "3e-2", "8e-2"))
]
SEARCHES = {
    "tuning": (f"{DISTIL} {HELD_OUT}", TUNING),
    "limited_tuning": (f"{DISTIL} {HELD_OUT} --teacher-seed 3", LIMITED_TUNING),
}


def load(script):
    """A numbered script as a module."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUNNING = []  # the process that this one waits for


def stop(signal_number, _):
    """Ends at once, with what it runs: raised inside of JAX, an exception may get lost."""
    for process in RUNNING:
        process.kill()
    print("\nStopped. The same command goes on from the last checkpoint.", file=sys.stderr)
    os._exit(128 + signal_number)


def run(command, folder):
    """Runs a script's command, with its output in a folder. Returns its report. Raises UserError if
    the script fails."""
    words = [sys.executable, *shlex.split(command), "--output-dir", str(folder)]
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    RUNNING[:] = [process]
    errors = process.communicate()[1]
    RUNNING.clear()
    require(process.returncode == 0, f"{command}: {errors}")
    return json.loads((ROOT / folder / "results.json").read_text())


def about(command, report):
    """What is said of every result: how it was made, with what, and of which data."""
    config = {k: v for k, v in report["config"].items() if k not in ("data_dir", "output_dir")}
    return {
        "each": f"python {command}",
        "config": config,
        **{key: report[key] for key in ("dataset", "versions", "device")},
        "date": datetime.date.today().isoformat(),
    }


def keep_figure(name):
    """Copies the figure of a run to docs/results; returns its fingerprint."""
    figure = RESULTS / f"{name}.png"
    shutil.copy(ROOT / RUNS / name / "figure.png", figure)
    return hashlib.sha256(figure.read_bytes()).hexdigest()


def write(name, content):
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(RESULTS / f"{name}.json", text.encode())


def without(row, *keys):
    return {key: value for key, value in row.items() if key not in keys}


def measure_pairs(name):
    """The main job over several seeds: a teacher, and in `runs` the two students of each seed."""
    report = run(EXPERIMENTS[name], RUNS / name)
    rows = report["results"]
    teacher = next(row for row in rows if row["name"] == "teacher")
    by_seed = {}
    for row in rows:
        if row["name"] != "teacher":
            kept = without(row, "name", "settings", "history")
            by_seed.setdefault(row["seed"], {})[row["name"]] = kept
    runs = []
    for seed, pair in by_seed.items():
        p_value = pair["distilled"].pop("mcnemar_p")
        runs.append({"seed": seed, **pair, "mcnemar_p": p_value, "seconds": report["seconds"]})
    content = {
        **about(EXPERIMENTS[name], report),
        "command": f"python docs/measure.py {name}",
        "seeds": list(by_seed),
        "recipes": {row["name"]: row["settings"] for row in rows},
        "cost_seconds": round(sum(row["seconds"] for row in rows)),
        "teacher": without(teacher, "name", "settings"),
        "runs": runs,
        "soft_targets": report["soft_targets"],
        "figure_sha256": keep_figure(name),
    }
    write(name, content)


def measure_variant(name):
    """Another script over several seeds: in `runs` the rows of each seed."""
    report = run(VARIANTS[name], RUNS / name)
    by_seed = {}
    for row in report["results"]:
        kept = without(row, "settings", "history", "epoch_seconds")
        for key in ("epochs", "learning_rate"):
            if key in row.get("settings", {}):
                kept[key] = row["settings"][key]
        by_seed.setdefault(row["seed"], []).append(kept)
    more = without(report, "script", "config", "dataset", "versions", "device", "results")
    content = {
        **about(VARIANTS[name], report),
        "command": f"python docs/measure.py {name}",
        "seeds": list(by_seed),
        "runs": [{"seed": seed, "rows": rows} for seed, rows in by_seed.items()],
        **more,
        "figure_sha256": keep_figure(name),
    }
    write(name, content)


def search(name):
    """A search over flags: the accuracies of every cell's students on validation images."""
    script, cells = SEARCHES[name]
    found, cost, teacher = [], 0.0, []
    for number, flags in enumerate(cells):
        if number:
            teacher = ["--teacher", f"{RUNS}/{name}/0"]
        report = run(
            shlex.join([*shlex.split(f"{script} {flags}"), *teacher]), RUNS / name / str(number)
        )
        rows = [row for row in report["results"] if row["name"] != "teacher"]
        cost += sum(row["seconds"] for row in rows)
        cell = {key: report["config"][key] for key in ("labels", "epochs", "learning_rate")}
        for row in rows:
            cell.setdefault(row["name"], []).append(row["validation_accuracy"])
        found.append(cell)
        means = {kind: round(statistics.mean(cell[kind]), 4) for kind in ("baseline", "distilled")}
        print(flags, means, flush=True)
    content = {
        "command": f"python docs/measure.py {name}",
        "holdout": HOLDOUT,
        "versions": report["versions"],
        "device": report["device"],
        "date": datetime.date.today().isoformat(),
        "cost_seconds": round(cost),
        "cells": found,
    }
    write(name, content)


def main(arguments):
    known = {**EXPERIMENTS, **VARIANTS, **SEARCHES}
    if not arguments or not set(arguments) <= set(known):
        print(f"{__doc__.strip()}\n\nThere is: {', '.join(known)}.")
        return 0 if not arguments or set(arguments) & {"-h", "--help"} else 2
    os.chdir(ROOT)
    for name in arguments:
        begun = time.perf_counter()
        if name in EXPERIMENTS:
            measure_pairs(name)
        elif name in VARIANTS:
            measure_variant(name)
        else:
            search(name)
        print(f"{name}: {(time.perf_counter() - begun) / 60:.0f} minutes", flush=True)
    return 0


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, OSError) as error:
        print(f"measure.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
