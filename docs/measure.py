"""Runs the experiments whose results README and docs show, and writes docs/results/<name>.json.

    python docs/measure.py tuning default all_labels digits     # about 50 minutes
    python docs/measure.py grid temperature ensemble            # about 80 minutes
    python docs/measure.py self online cross_modal              # about an hour
    python docs/measure.py evidence                             # scripts 16, 25 and the controls
    python docs/render.py                                       # then the tables and figures

    python docs/measure.py again limited_labels 80 --labels 1000   # the same errors as committed?

`all_labels` needs the teacher of `default`. Stopped, each goes on where it was. MNIST is
found as the scripts find it (MNIST_DATA_DIR, an earlier download, a download). `again` repeats the
run that began with a seed, with further flags of the script, and compares its errors with
docs/results. It trains in a folder of its own, from nothing but a teacher that the run names.
"""

import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
sys.path.insert(0, str(ROOT / "examples"))

import utils  # noqa: E402

SCRIPT = "examples/15_knowledge_distillation.py"
# The teacher is the first run's; the students differ by the seed. No seed here had been run when
# the settings were fixed.
EXPERIMENTS = {
    "default": (["--teacher-seed", "2"], range(62, 67)),
    "all_labels": (["--teacher-seed", "2", "--labels", "all"], range(62, 67)),
    "digits": (["--teacher-seed", "2", "--dataset", "digits"], range(62, 70)),
}
# The variants: the script, its flags, and seeds that nobody had run when its settings were fixed.
VARIANTS = {
    "grid": (
        "examples/advanced/knowledge_distillation.py",
        ["--labels", "250", "1000", "5000", "--teacher-seed", "2"],
        [70],  # the first of three for the grid and five for the test
    ),
    "temperature": ("examples/advanced/temperature.py", ["--teacher-seed", "2"], [70]),
    # Four teachers of their own for each seed.
    "ensemble": ("examples/17_ensemble_distillation.py", ["--teacher-seed", "4N"], range(70, 75)),
    # Seed 70 had been run during the development of these.
    "self": ("examples/18_self_distillation.py", [], range(71, 76)),
    "online": ("examples/19_online_distillation.py", [], range(71, 76)),
    "limited_labels": (
        "examples/16_limited_labels.py",
        ["--seeds", "5", "--teacher-seed", "3"],
        [80],  # the first of five, which share a teacher
    ),
    # The same pairs with all labels, but at a constant rate.
    "constant": (
        "examples/16_limited_labels.py",
        ["--labels", "all", "--schedule", "constant", "--epochs", "10", "--seeds", "5",
         "--teacher-seed", "3", "--teacher", "runs/measure/limited_labels/80"],
        [80],
    ),
    "hinton": ("examples/25_hinton_2015.py", [], range(100, 105)),
    "controls": (
        "examples/advanced/controls.py",
        ["--seeds", "5", "--teacher-seed", "3", "--teacher", "runs/measure/limited_tuning/teacher"],
        [90],  # the first of five
    ),
    "cross_modal": ("examples/20_cross_modal_distillation.py", [], range(71, 76)),
}  # fmt: skip
GRID = {  # labels: (learning rates, epochs, seeds)
    "1000": ((1e-2, 2e-2, 4e-2, 8e-2), (30, 60), (1, 2, 3)),
    "all": ((1e-2, 2e-2, 4e-2), (3, 4, 6), (1, 2)),
}
# Of script 16: labels: epochs, those of script 15's rule and, for few labels, twice as many.
LIMITED_EPOCHS = {100: (274, 548), 250: (150, 300), 1000: (60, 120), 5000: (21,)}
LIMITED_RATES, LIMITED_SEEDS = (1e-2, 3e-2, 8e-2), {100: 4, 250: 4, 1000: 2, 5000: 2}
TEACHER_EPOCHS, TEACHER_SEEDS = (2, 3), (0, 1)
HOLDOUT = 10_000
# Of script 25's large net: dropout of inputs and of hidden units, peak rate, epochs. Then peak
# rate, epochs and alpha of its students: the first of them for all large nets, the others for the
# first one. And peak rate and epochs of the small net on labels alone.
HINTON_LARGE = (
    ((0.0, 0.1), 4e-3, 100),
    ((0.0, 0.2), 4e-3, 100),
    ((0.0, 0.1), 4e-3, 60),
    ((0.0, 0.2), 4e-3, 60),
    ((0.0, 0.3), 4e-3, 60),
    ((0.1, 0.2), 4e-3, 60),
    ((0.0, 0.2), 2e-3, 60),
    ((0.0, 0.2), 8e-3, 60),
)
HINTON_DISTILLED = (
    (8e-3, 20, 0.3),
    (6e-3, 20, 0.3),
    (4e-3, 20, 0.3),
    (8e-3, 20, 0.1),
    (8e-3, 20, 0.5),
    (8e-3, 60, 0.3),
)
HINTON_SEEDS = (0, 1, 2)  # of the students of each large net; of all others 0
HINTON_SMALL = ((8e-3, 20), (4e-3, 20), (2e-3, 20), (1e-3, 20), (8e-3, 40))
# In this order: one part takes over the teacher of another.
EVIDENCE = ("limited_tuning", "limited_labels", "constant", "controls", "hinton_tuning", "hinton")


def load(script):
    """A numbered script as a module."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BEGUN = {}  # when each part of this command began


def write(name, content):
    content = {"command": f"python docs/measure.py {name}", **content}
    content["date"] = datetime.date.today().isoformat()
    content["minutes"] = round((time.perf_counter() - BEGUN[name]) / 60)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    utils.write_whole(RESULTS / f"{name}.json", text.encode())


RUNNING = []  # the process that this one waits for


def started(command, **how):
    """The exit status of a command and, through a pipe, what it printed on stderr."""
    with subprocess.Popen(command, cwd=ROOT, **how) as process:
        RUNNING[:] = [process]
        errors = process.communicate()[1]
    RUNNING.clear()
    return process.returncode, errors


def stop(signal_number, _):
    """Ends at once, with what it runs: raised inside of JAX, an exception may get lost."""
    for process in RUNNING:
        process.kill()
    print("\nStopped. The same command goes on from the last checkpoint.", file=sys.stderr)
    os._exit(128 + signal_number)


def run(script, flags, seed, folder):
    """Runs a script with a seed, in a process of its own; the report that it left. `4N` among
    the flags stands for four times the seed. Raises UserError if the script fails."""
    flags = [str(4 * seed) if flag == "4N" else flag for flag in flags]
    command = [sys.executable, script, "--seed", str(seed), "--output-dir", folder, *flags]
    status, errors = started(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    utils.require(status == 0, f"{' '.join(command[1:])}: {errors}")
    return json.loads((ROOT / folder / "results.json").read_text())


def about(name, script, arguments, seeds, first):
    """What is said of all runs alike, from the first one's report; keeps its figure, too."""
    figure = RESULTS / f"{name}.png"
    shutil.copy(ROOT / first["config"]["output_dir"] / "figure.png", figure)
    own = ("data_dir", "output_dir")
    return {
        "each": " ".join(["python", script, *arguments, "--seed", "N"]),
        "seeds": list(seeds),
        "config": {k: v for k, v in first["config"].items() if k not in own},
        **{k: first[k] for k in ("dataset", "versions", "device")},
        "figure_sha256": hashlib.sha256(figure.read_bytes()).hexdigest(),
    }


def experiment(name):
    """The main job over several seeds."""
    arguments, seeds = EXPERIMENTS[name]
    teacher = "digits" if name == "digits" else "default"
    first_seed = EXPERIMENTS[teacher][1][0]
    reports, runs = [], []
    for seed in seeds:
        taken = ["--teacher", f"runs/measure/{teacher}/{first_seed}"]
        flags = [] if (teacher, first_seed) == (name, seed) else taken
        folder = f"runs/measure/{name}/{seed}"
        reports.append(run(SCRIPT, [*arguments, *flags], seed, folder))
        rows = {
            row["name"]: {k: v for k, v in row.items() if k not in ("name", "settings", "history")}
            for row in reports[-1]["results"]
        }
        runs.append({"seed": seed, "distilled": rows["distilled"], "baseline": rows["baseline"]})
        runs[-1] |= {key: reports[-1][key] for key in ("mcnemar_p", "seconds")}
        gain = rows["distilled"]["test_accuracy"] - rows["baseline"]["test_accuracy"]
        print(f"{name}, seed {seed}: {100 * gain:+.2f} points", flush=True)
    rows = {row["name"]: row for row in reports[0]["results"]}
    content = {
        **about(name, SCRIPT, arguments, seeds, reports[0]),
        "recipes": {k: v["settings"] for k, v in rows.items()},
        "cost_seconds": round(
            runs[0]["seconds"]["teacher"]
            + sum(r["seconds"]["distilled"] + r["seconds"]["baseline"] for r in runs)
        ),
        "teacher": {k: v for k, v in rows["teacher"].items() if k not in ("settings", "name")},
        "runs": runs,
        "soft_targets": reports[0]["soft_targets"],
    }
    write(name, content)


def variant(name):
    """One script over several seeds: of each row what a reader may ask for, and all else found."""
    script, arguments, seeds = VARIANTS[name]
    reports, runs = [], []
    for seed in seeds:
        # A seed's folder lies beside those of the others.
        reports.append(run(script, arguments, seed, f"runs/measure/{name}/{seed}"))
        left_out = ("settings", "history", "epoch_seconds")
        rows = [
            {k: v for k, v in row.items() if k not in left_out}
            | {k: row["settings"][k] for k in ("epochs", "learning_rate")}
            for row in reports[-1]["results"]
        ]
        known = ("script", "config", "dataset", "versions", "device", "results")
        more = {k: v for k, v in reports[-1].items() if k not in known}
        runs.append({"seed": seed, "rows": rows, **more})
        print(f"{name}, seed {seed}", flush=True)
    write(name, about(name, script, arguments, seeds, reports[0]) | {"runs": runs})


def again(name, seed, *flags):
    """Repeats a variant's run of one seed, if wanted with other flags (fewer labels), and compares
    the test errors of each row with those of the committed row of its name and seed. The same
    errors are to be expected with the same versions on the same kind of machine."""
    script, arguments, _ = VARIANTS[name]
    folder, committed = f"runs/again/{name}", json.loads((RESULTS / f"{name}.json").read_text())
    known = {str(row["seed"]) for x in committed["runs"] for row in x["rows"]}
    utils.require(seed in known, f"{seed}: no seed of docs/results/{name}.json")
    utils.claim(str(ROOT / folder))  # so that nobody is training in it
    shutil.rmtree(ROOT / folder)
    utils.CLAIMED.clear()
    report = run(script, [*arguments, *flags], int(seed), folder)
    before, now = {}, {}  # the errors of the rows of a name and a seed: weak teachers share both
    rows = itertools.chain.from_iterable(x["rows"] for x in committed["runs"])
    for found, those in ((before, rows), (now, report["results"])):
        for row in those:
            found.setdefault((row["name"], row["seed"]), []).append(row["test_errors"])
    both, same = sorted(now.keys() & before.keys()), 0
    if not both:
        sys.exit(f"nothing committed in docs/results/{name}.json has these settings")
    for key in both:
        if now[key] == before[key][: len(now[key])]:
            same += 1
        else:
            print(f"{key[0]}, seed {key[1]}: {now[key]} errors, committed are {before[key]}")
    print(f"{same} of {len(both)} have the test errors that are committed")
    return same < len(both)


def with_validation():
    """MNIST, to be scored on images held out of training. Raises UserError without MNIST."""
    data = utils.load_data("mnist", None, HOLDOUT)
    utils.require(data.name == "mnist", "a search needs MNIST, which cannot be downloaded")
    return data


def tuning():
    """Learning rate and epochs of baseline and distilled student, and epochs of the teacher, each
    scored on validation images that neither students nor teacher saw; test images take no part."""
    utils.use_all_cores()
    kd = load(SCRIPT)
    data = with_validation()
    folder = ROOT / "runs/measure/tuning"
    teacher, _ = kd.train_teacher(data, kd.Recipe(0, 3, 128, 5e-3, "onecycle"), folder)
    cells, cost = [], 0.0
    for labels, (rates, epoch_choices, seeds) in GRID.items():
        for epochs in epoch_choices:
            for rate in rates:
                found = {"distilled": [], "baseline": []}
                for seed in seeds:
                    labelled = utils.take_labels(data.train, labels, seed)
                    recipe = kd.Recipe(seed, epochs, 128, rate, "onecycle")
                    runs = {
                        "distilled": kd.train_student_with_distillation(
                            teacher, data, labelled, recipe, folder
                        ),
                        "baseline": kd.train_student_baseline(data, labelled, recipe, folder),
                    }
                    for kind, (student, phase) in runs.items():
                        found[kind].append(float(kd.evaluate(student, data.test)[0]))
                        cost += phase.seconds
                cell = {"labels": labels, "epochs": epochs, "learning_rate": rate, **found}
                cells.append(cell)
                means = {k: round(statistics.mean(v), 4) for k, v in found.items()}
                print(labels, epochs, rate, means, flush=True)
    teachers = []
    for epochs in TEACHER_EPOCHS:
        recipes = [kd.Recipe(seed, epochs, 128, 5e-3, "onecycle") for seed in TEACHER_SEEDS]
        phases = [kd.train_teacher(data, recipe, folder)[1] for recipe in recipes]
        cost += sum(phase.seconds for phase in phases)
        accuracies = [phase.history[-1]["validation_accuracy"] for phase in phases]
        teachers.append({"epochs": epochs, "teacher": accuracies})
        print("teacher", epochs, accuracies, flush=True)
    content = {"holdout": HOLDOUT, "versions": utils.versions(), "device": utils.device()}
    content |= {"cost_seconds": round(cost), "cells": cells, "teachers": teachers}
    write("tuning", content)


def limited_tuning():
    """Learning rate and epochs of script 16's baseline and distilled student for few labels, each
    scored on validation images that neither students nor teacher saw. For all labels `tuning` has
    searched."""
    utils.use_all_cores()
    script = load("examples/16_limited_labels.py")
    data = with_validation()
    folder = "runs/measure/limited_tuning"
    recipe = script.Recipe(3, 3, 128, 5e-3, "onecycle")
    config = script.Config(output_dir=folder)
    for_teacher = dataclasses.replace(config, output_dir=f"{folder}/teacher")
    teacher, _ = script.train_limited("teacher", recipe, data, data.train, for_teacher)
    table = utils.predict_by_index(teacher, data.train)
    cells, cost = [], 0.0
    for labels, epoch_choices in LIMITED_EPOCHS.items():
        for kind, epochs, rate in itertools.product(
            ("baseline", "distilled"), epoch_choices, LIMITED_RATES
        ):
            found = []
            for seed in range(1, LIMITED_SEEDS[labels] + 1):
                labelled = utils.take_labels(data.train, labels, seed)
                recipe = script.Recipe(seed, epochs, min(128, labels), rate, "onecycle")
                known = None if kind == "baseline" else table
                student, phase = script.train_limited(kind, recipe, data, labelled, config, known)
                found.append(1 - utils.count_errors(student, data.test) / HOLDOUT)
                cost += phase.seconds
            cell = {"labels": labels, "kind": kind, "epochs": epochs, "learning_rate": rate}
            cells.append(cell | {"accuracy": found})
            print(*cell.values(), round(statistics.mean(found), 4), flush=True)
    content = {"holdout": HOLDOUT, "seeds": LIMITED_SEEDS, "versions": utils.versions()}
    content |= {"device": utils.device(), "cost_seconds": round(cost), "cells": cells}
    write("limited_tuning", content)


def hinton_tuning():
    """Dropout, rate and epochs of script 25's large net, each with the student it teaches, then
    the students' rate, epochs and alpha; errors on validation images that none of them saw."""
    script, data = load(VARIANTS["hinton"][0]), with_validation()
    config = script.Config(output_dir="runs/measure/hinton_tuning")
    large, *_ = script.plan(config, data)
    cells, cost, tables = [], 0.0, []

    def train(kind, network, rate, epochs, dropout, seeds=(0,), **how):
        nonlocal cost
        errors = []
        for seed in seeds:
            recipe = large._replace(seed=seed, epochs=epochs, learning_rate=rate)
            common = network, recipe, data, data.train, config
            model, phase = script.train_dense(kind, *common, **how)
            cost += phase.seconds
            errors.append(int(utils.count_errors(model, data.test)))
        cell = {"kind": kind, "dropout": dropout, "learning_rate": rate, "epochs": epochs}
        cells.append(cell | {"alpha": how.get("alpha"), "errors": errors})
        print(*cells[-1].values(), flush=True)
        return model

    def distil(table, dropout, rate, epochs, alpha, **seeds):
        how = {"table": table, "alpha": alpha, "temperature": config.temperature}
        train("distilled", small, rate, epochs, dropout, **how, **seeds)

    small = functools.partial(script.DenseNet, 800)
    for dropout, rate, epochs in HINTON_LARGE:
        network = functools.partial(script.DenseNet, 1200, dropout)
        teacher = train("large net", network, rate, epochs, dropout, regularised=True)
        tables.append(utils.predict_by_index(teacher, data.train))
        distil(tables[-1], dropout, *HINTON_DISTILLED[0], seeds=HINTON_SEEDS)
    for how in HINTON_DISTILLED[1:]:
        distil(tables[0], HINTON_LARGE[0][0], *how)
    for rate, epochs in HINTON_SMALL:
        train("small net", small, rate, epochs, None)
    content = {"holdout": HOLDOUT, "versions": utils.versions(), "device": utils.device()}
    content |= {"batch_size": large.batch_size, "schedule": large.schedule}
    content |= {"temperature": config.temperature, "max_norm": config.max_norm}
    write("hinton_tuning", content | {"cost_seconds": round(cost), "cells": cells})


def main(arguments):
    if {"-h", "--help"} & set(arguments[:1]):
        return print(__doc__.strip())
    os.chdir(ROOT)
    RESULTS.mkdir(exist_ok=True)
    if len(arguments) > 2 and arguments[0] == "again" and arguments[1] in VARIANTS:
        sys.exit(again(*arguments[1:]))
    names = [x for name in arguments for x in (EVIDENCE if name == "evidence" else [name])]
    searches = {search.__name__: search for search in (tuning, limited_tuning, hinton_tuning)}
    known = searches | {name: functools.partial(experiment, name) for name in EXPERIMENTS}
    known |= {name: functools.partial(variant, name) for name in VARIANTS}
    if not names or not set(names) <= set(known):
        usage = f"usage: python docs/measure.py [evidence|{'|'.join(known)}] ..."
        usage += f" or: python docs/measure.py again [{'|'.join(VARIANTS)}] SEED ..."
        raise utils.UserError(usage)
    for wanted in names:
        if wanted in searches and len(names) > 1:
            # In a process of its own: JAX takes its devices once, and searches differ in them.
            command = [sys.executable, str(ROOT / "docs" / "measure.py"), wanted]
            status, _ = started(command)
            if status:
                sys.exit(status)
            continue
        BEGUN[wanted] = time.perf_counter()
        known[wanted]()
        print(f"{wanted}: {(time.perf_counter() - BEGUN[wanted]) / 60:.0f} minutes", flush=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    utils.tune_malloc()
    try:
        main(sys.argv[1:])
    except (utils.UserError, OSError) as error:
        print(f"measure.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
