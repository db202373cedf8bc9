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
    "digits": f"{DISTIL} --dataset digits --seed 110 --seeds 8 --teacher-seed 5",
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
DIGITS_HELD_OUT = "--dataset digits --holdout 297"
DIGITS_TUNING = [
    f"--labels 100 --batch-size {batch_size} --epochs {epochs} --learning-rate {rate} --seed 1"
    " --seeds 8"
    for batch_size, epoch_choices in ((32, (30, 60, 120)), (100, (180,)))
    for epochs, rate in itertools.product(epoch_choices, ("2.5e-3", "5e-3", "1e-2", "2e-2"))
]
SEARCHES = {
    "tuning": (f"{DISTIL} {HELD_OUT}", TUNING),
    "limited_tuning": (f"{DISTIL} {HELD_OUT} --teacher-seed 3", LIMITED_TUNING),
    "digits_tuning": (f"{DISTIL} {DIGITS_HELD_OUT}", DIGITS_TUNING),
}
TEACHER = "examples/13_teacher_training.py --seeds 2"
TEACHER_SEARCHES = {
    "teacher_tuning": (f"{TEACHER} {HELD_OUT}", (2, 3)),
    "digits_teacher_tuning": (f"{TEACHER} {DIGITS_HELD_OUT}", (4, 8, 16)),
}
# Of script 25's large net: dropout of inputs and of hidden units, peak rate, epochs. Then peak
# rate, epochs and alpha of its students: the first of them for all large nets, with three seeds,
# the others for the first one. And peak rate and epochs of the small net on labels alone.
HINTON_LARGE = (
    (0.0, 0.1, 4e-3, 100),
    (0.0, 0.2, 4e-3, 100),
    (0.0, 0.1, 4e-3, 60),
    (0.0, 0.2, 4e-3, 60),
    (0.0, 0.3, 4e-3, 60),
    (0.1, 0.2, 4e-3, 60),
    (0.0, 0.2, 2e-3, 60),
    (0.0, 0.2, 8e-3, 60),
)
HINTON_DISTILLED = (
    (8e-3, 20, 0.3),
    (6e-3, 20, 0.3),
    (4e-3, 20, 0.3),
    (8e-3, 20, 0.1),
    (8e-3, 20, 0.5),
    (8e-3, 60, 0.3),
)
HINTON_SMALL = ((8e-3, 20), (4e-3, 20), (2e-3, 20), (1e-3, 20), (8e-3, 40))


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
        by_seed.setdefault(row.get("repetition", row["seed"]), []).append(kept)
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
    """A search over flags: the accuracies of both students on validation images, in every cell."""
    script, cells = SEARCHES[name]
    found, cost = [], 0.0
    for number, flags in enumerate(cells):
        command = f"{script} {flags}"
        if number:  # the teacher of the first cell
            command += f" --teacher {RUNS}/{name}/0"
        report = run(command, RUNS / name / str(number))
        students = [row for row in report["results"] if row["name"] != "teacher"]
        for kind in ("baseline", "distilled"):
            rows = [row for row in students if row["name"] == kind]
            accuracies = [row["validation_accuracy"] for row in rows]
            keys = ("batch_size", "epochs", "learning_rate")
            settings = {key: rows[0]["settings"][key] for key in keys}
            cell = {"labels": report["config"]["labels"], "kind": kind, **settings}
            found.append({**cell, "accuracy": accuracies})
            print(*cell.values(), round(statistics.mean(accuracies), 4), flush=True)
        cost += sum(row["seconds"] for row in students)
    write(name, {**about_search(name, report), "cost_seconds": round(cost), "cells": found})


def search_teachers(name):
    """How many epochs the teacher needs: its accuracy on validation images."""
    command, epoch_choices = TEACHER_SEARCHES[name]
    found = []
    for epochs in epoch_choices:
        report = run(f"{command} --epochs {epochs}", RUNS / name / str(epochs))
        accuracies = [row["validation_accuracy"] for row in report["results"]]
        found.append({"epochs": epochs, "teacher": accuracies})
    write(name, {**about_search(name, report), "teachers": found})


def search_hinton(name):
    """Dropout, rate and epochs of script 25's large net, each with the students that it teaches,
    then the students' rate, epochs and alpha; errors on validation images that none has seen."""
    script = load(HINTON)
    config = script.Config(holdout=HOLDOUT, output_dir=str(RUNS / name), batch_size=256)
    this = script.experiment.start(config, share_batches=False)
    data, cells = this.data, []

    def recipe(seed, rate, epochs):
        return script.Recipe(seed, epochs, config.batch_size, rate, "onecycle")

    def add(kind, networks, dropout, rate, epochs, alpha=None):
        wrong = [script.predict(x, data.test).argmax(-1) != data.test.label for x in networks]
        cell = {"kind": kind, "dropout": dropout, "learning_rate": rate, "epochs": epochs}
        cells.append({**cell, "alpha": alpha, "errors": [int(x.sum()) for x in wrong]})
        print(*cells[-1].values(), flush=True)

    def distil(teacher_logits, dropout, rate, epochs, alpha, seeds=(0,)):
        students = []
        for seed in seeds:
            student = script.train_distilled_net(
                "distilled", 800, teacher_logits, data, data.train,
                recipe(seed, rate, epochs), this, config.temperature, alpha,
            )  # fmt: skip
            students.append(student)
        add("distilled", students, dropout, rate, epochs, alpha)

    tables = []
    for *dropout, rate, epochs in HINTON_LARGE:
        large = recipe(0, rate, epochs)
        teacher = script.train_large_net(data, large, this, *dropout, config.max_norm)
        add("large net", [teacher], dropout, rate, epochs)
        tables.append(script.predict_by_index(teacher, data.train))
        distil(tables[-1], dropout, *HINTON_DISTILLED[0], seeds=(0, 1, 2))
    for settings in HINTON_DISTILLED[1:]:
        distil(tables[0], list(HINTON_LARGE[0][:2]), *settings)
    for rate, epochs in HINTON_SMALL:
        small = script.train_small_net(data, recipe(0, rate, epochs), this)
        add("small net", [small], None, rate, epochs)
    report = {
        "config": vars(config),
        "versions": script.experiment.versions(),
        "device": script.experiment.device(),
    }
    settings = {"batch_size": config.batch_size, "schedule": "onecycle"}
    settings |= {"temperature": config.temperature, "max_norm": config.max_norm}
    write(name, {**about_search(name, report), **settings, "cells": cells})


def about_search(name, report):
    return {
        "command": f"python docs/measure.py {name}",
        "holdout": report["config"]["holdout"],
        "versions": report["versions"],
        "device": report["device"],
        "date": datetime.date.today().isoformat(),
    }


def main(arguments):
    known = dict.fromkeys(EXPERIMENTS, measure_pairs)
    known |= dict.fromkeys(VARIANTS, measure_variant)
    known |= dict.fromkeys(SEARCHES, search)
    known |= dict.fromkeys(TEACHER_SEARCHES, search_teachers)
    known["hinton_tuning"] = search_hinton
    if not arguments or not set(arguments) <= set(known):
        print(f"{__doc__.strip()}\n\nThere is: {', '.join(known)}.")
        return 0 if not arguments or set(arguments) & {"-h", "--help"} else 2
    os.chdir(ROOT)
    for name in arguments:
        begun = time.perf_counter()
        known[name](name)
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
