"""Runs the experiments whose results README and docs show, and writes docs/results/NAME.json.

    python docs/measure.py               # says what there is
    python docs/measure.py default       # one of them
    cog -r -P -I docs -p "from tables import *" README.md docs/*.md    # then the tables

An experiment is a list of commands. A search is one, too: its commands differ in a few flags and
score on validation images. Start a stopped command again: it continues. MNIST is found as the
scripts find it (MNIST_DATA_DIR, an earlier download, a download).
"""

import datetime
import hashlib
import importlib.util
import itertools
import json
import os
import shlex
import signal
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

# %% What there is: {name: commands}. Seeds are new to their script, but for script 25 and for the
# strength of smoothing (docs/provenance.md). --teacher takes the teacher of a command further up.

DISTIL = "examples/15_knowledge_distillation.py"
LIMITED = "examples/16_limited_labels.py"
ARCHITECTURES = "examples/22_architectures.py"
DEPLOY = "examples/23_compress_and_deploy.py"
BOTH = "--sparsities 0.8 0.95"
FEATURES = "examples/21_feature_distillation.py"
HINTON = "examples/25_hinton_2015.py"
PATIENT = "examples/26_patient_teacher.py"


def over_teachers(flags, first_seed, teachers=""):
    """Three pairs of students for each of five teachers. No two pairs share a seed."""
    return [
        f"{DISTIL} {flags} --teacher-seed {11 + k} --seed {first_seed + 3 * k} --seeds 3"
        + (f" --teacher {RUNS}/{teachers}/{k}" if teachers else "")
        for k in range(5)
    ]


EXPERIMENTS = {
    "default": over_teachers("--labels 1000", 120),
    "all_labels": over_teachers("--labels all", 120, teachers="default"),
    "digits": over_teachers("--dataset digits", 140),
    "grid": [
        "examples/advanced/knowledge_distillation.py --labels 250 1000 5000 --seed 70"
        " --teacher-seed 2"
    ],
    "temperature": ["examples/advanced/temperature.py --seed 70 --teacher-seed 2"],
    "ensemble": ["examples/17_ensemble_distillation.py --seed 70 --seeds 5 --teacher-seed 280"],
    "self": ["examples/18_self_distillation.py --seed 71 --seeds 5"],
    "online": ["examples/19_online_distillation.py --seed 71 --seeds 5"],
    "cross_modal": ["examples/20_cross_modal_distillation.py --seed 71 --seeds 5"],
    "limited_labels": [f"{LIMITED} --seed 80 --seeds 5 --teacher-seed 3"],
    "constant": [  # the same pairs with all labels, but at a constant rate
        f"{LIMITED} --labels all --schedule constant --epochs 10 --seed 80 --seeds 5"
        f" --teacher {RUNS}/limited_labels/0"
    ],
    "controls": ["examples/advanced/controls.py --seed 90 --seeds 5 --teacher-seed 3"],
    "hinton": [f"{HINTON} --seed 100 --seeds 5"],
}


def search(name, command, cells):
    """The commands of a search, from the flags of its cells. The first trains the teacher."""
    first, *others = [f"{command} {flags}" for flags in cells]
    return [first, *(f"{command} --teacher {RUNS}/{name}/0" for command in others)]


def cells(labels, epochs, rates, seeds):
    """The flags of a grid over epochs and peak learning rates."""
    return [
        f"--labels {labels} --epochs {e} --learning-rate {rate} --seed 1 --seeds {seeds}"
        for e, rate in itertools.product(epochs, rates)
    ]


HELD_OUT = "--holdout 10000"  # training images that neither students nor teacher see
EXPERIMENTS["tuning"] = search(
    "tuning",
    f"{DISTIL} {HELD_OUT}",
    cells(1000, (30, 60), ("1e-2", "2e-2", "4e-2", "8e-2"), 3)
    + cells("all", (3, 4, 6), ("1e-2", "2e-2", "4e-2"), 2),
)
# For few labels the epochs of script 15's rule, and twice as many.
RATES_OF_FEW = ("1e-2", "3e-2", "8e-2")
EXPERIMENTS["limited_tuning"] = search(
    "limited_tuning",
    f"{DISTIL} {HELD_OUT} --teacher-seed 3",
    cells(100, (274, 548), RATES_OF_FEW, 4)
    + cells(250, (150, 300), RATES_OF_FEW, 4)
    + cells(1000, (60, 120), RATES_OF_FEW, 2)
    + cells(5000, (21,), RATES_OF_FEW, 2),
)
RATES_OF_DIGITS = ("2.5e-3", "5e-3", "1e-2", "2e-2")
EXPERIMENTS["digits_tuning"] = search(
    "digits_tuning",
    f"{DISTIL} --dataset digits --holdout 297",
    [f"--batch-size 32 {flags}" for flags in cells(100, (30, 60, 120), RATES_OF_DIGITS, 8)]
    + [f"--batch-size 100 {flags}" for flags in cells(100, (180,), RATES_OF_DIGITS, 8)],
)
TEACHER = "examples/13_teacher_training.py --seeds 2"
EXPERIMENTS["teacher_tuning"] = [f"{TEACHER} {HELD_OUT} --epochs {n}" for n in (2, 3)]
EXPERIMENTS["digits_teacher_tuning"] = [
    f"{TEACHER} --dataset digits --holdout 297 --epochs {n}" for n in (4, 8, 16)
]

FASHION = "--dataset fashion_mnist"
EXPERIMENTS["fashion"] = [f"{LIMITED} {FASHION} --seed 300 --seeds 5 --teacher-seed 300"]
TAUGHT_BY_FASHION = f"--seeds 5 --teacher {RUNS}/fashion/0"
EXPERIMENTS["features"] = [f"{FEATURES} --seed 310 {TAUGHT_BY_FASHION}"]
EXPERIMENTS["architectures"] = [f"{ARCHITECTURES} --seed 330 --seeds 3 --teacher-seed 330"]
EXPERIMENTS["small_teachers"] = [
    f"{ARCHITECTURES} --teachers cnn_half cnn_quarter --students cnn_eighth mlp --seed 330"
    " --seeds 3 --teacher-seed 330"
]
EXPERIMENTS["patient"] = [f"{PATIENT} --seed 340 --seeds 3 --teacher-seed 340"]
EXPERIMENTS["mixup"] = [
    f"{PATIENT} --ways same mixup --epochs 120 --seed 345 --seeds 3 --teacher {RUNS}/patient/0"
]
EXPERIMENTS["deploy"] = [f"{DEPLOY} {BOTH} --seed 350 --seeds 5 --teacher-seed 350"]
EXPERIMENTS["deploy_few"] = [
    f"{DEPLOY} {BOTH} --labels 1000 --seed 355 --seeds 5 --teacher {RUNS}/deploy/0"
]
EXPERIMENTS["deploy_tuning"] = [
    f"{DEPLOY} {HELD_OUT} --labels {labels} --sparsities 0.95 --seed 1 --seeds {seeds}"
    f" --compression-learning-rate {rate} --teacher {RUNS}/teacher_tuning/1"
    for labels, seeds, rates in (
        ("all", 1, ("2e-3", "5e-3", "1e-2", "2e-2")),
        ("1000", 2, ("2e-3", "5e-3", "1e-2", "2e-2", "1e-3", "5e-4")),
    )
    for rate in rates
]
EXPERIMENTS["fashion_teacher_tuning"] = [
    f"examples/13_teacher_training.py {FASHION} {HELD_OUT} --epochs {epochs} --augmentation {how}"
    f" --learning-rate {rate}"
    for epochs, how, rate in (
        (10, "none", "2e-3"),
        (10, "shift", "2e-3"),
        (10, "shift_and_flip", "2e-3"),
        (10, "shift_and_flip", "5e-3"),
        (20, "shift", "2e-3"),
        (20, "shift_and_flip", "5e-3"),
    )
]

# What pages show of the first command of an experiment: {experiment: {picture: file of the run}}.
WITH_FIGURE = ("default", "grid", "temperature", "ensemble", "self", "online", "cross_modal")
WITH_FIGURE += ("limited_labels", "controls", "hinton", "fashion", "features", "patient")
WITH_FIGURE += ("architectures", "deploy")
FIGURES = {name: {f"{name}.png": "figure.png"} for name in WITH_FIGURE}
FIGURES["default"]["soft_targets.png"] = "soft_targets.png"

# %% Running them

RUNNING = []  # the process that this one waits for


def stop(signal_number, _):
    """Kills the script that runs, and ends this process. An exception would not do: raised while
    JAX runs, it may get lost."""
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
    if process.returncode < 0:
        errors += f"ended with signal {-process.returncode}"
    require(process.returncode == 0, f"{command}: {errors}")
    return json.loads((ROOT / folder / "results.json").read_text())


def load(script):
    """A numbered script as a module."""
    if str(ROOT / "examples") not in sys.path:  # cog takes back what a page has put there
        sys.path.insert(0, str(ROOT / "examples"))
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_teachers(name):
    """Raises UserError if an experiment takes the teachers of another that was not run yet."""
    for command in EXPERIMENTS[name]:
        words = command.split()
        if "--teacher" in words:
            folder = Path(words[words.index("--teacher") + 1])
            other = folder.parent.name
            there = other == name or (ROOT / folder / "results.json").exists()
            first = f"python docs/measure.py {other} {name}"
            require(there, f"{name} takes the teachers of {other}, which is not in {RUNS}: {first}")


def measure(name):
    """Runs the commands of an experiment. Writes one JSON with what stands in their reports: the
    rows in `results`, each with the place of its command in `runs`, where the rest is."""
    check_teachers(name)
    runs, results = [], []
    shared = None  # by all commands
    for number, command in enumerate(EXPERIMENTS[name]):
        report = run(command, RUNS / name / str(number))
        for row in report.pop("results"):
            settings = row.pop("settings", {})
            for key in ("epochs", "batch_size", "learning_rate"):
                if key in settings:
                    row[key] = settings[key]
            row = {k: v for k, v in row.items() if k not in ("history", "epoch_seconds")}
            results.append({"run": number, **row})
        config = report["config"]
        data, asked = report["dataset"]["name"], config.get("dataset", "mnist")
        require(
            data == asked, f"{command}: {asked} was not found; name its folder in the environment"
        )
        report["config"] = {k: config[k] for k in config if k not in ("data_dir", "output_dir")}
        own = {key: report.pop(key) for key in ("dataset", "versions", "device")}
        found = "its commands ran on other data, versions or devices; remove the older runs"
        require(shared in (None, own), f"{RUNS / name}: {found}")
        shared = own
        del report["script"]
        runs.append({"command": f"python {command}", **report})
        print(f"{number + 1} of {len(EXPERIMENTS[name])}: {command}", flush=True)
    write(name, {**shared, "runs": runs, "results": results})


def write(name, content):
    """Writes the JSON, and keeps the pictures that belong to it beside it."""
    head = {"command": f"python docs/measure.py {name}", "date": str(datetime.date.today())}
    folder = ROOT / RUNS / name / "0"
    pictures = {new: (folder / file).read_bytes() for new, file in FIGURES.get(name, {}).items()}
    for picture, png in pictures.items():
        write_whole(RESULTS / picture, png)
        head.setdefault("figures", {})[picture] = hashlib.sha256(png).hexdigest()
    text = json.dumps(head | content, indent=1, ensure_ascii=False) + "\n"
    write_whole(RESULTS / f"{name}.json", text.encode())


# %% The search for script 25, whose cells are networks rather than commands

# Of its large net: dropout of inputs and of hidden units, peak rate, epochs. Then peak rate, epochs
# and alpha of its students: the first of them for all large nets, with three seeds, the others for
# the first one. And peak rate and epochs of the small net on labels alone.
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


def count_errors(script, network, data):
    """The errors of one network on the images that are scored."""
    answers = script.predict(network, data.test).argmax(-1)
    return int((answers != data.test.label).sum())


def search_hinton(name="hinton_tuning"):
    """Each large net with the students that it teaches, then the students' settings, then the small
    net's; errors on validation images that none has seen."""
    script = load(HINTON)
    config = script.Config(holdout=10_000, output_dir=str(RUNS / name), batch_size=256)
    run = script.experiment.start(config, share_batches=False)
    data, results = run.data, []

    def recipe(seed, rate, epochs):
        return script.Recipe(seed, epochs, config.batch_size, rate, "onecycle")

    def add_row(network, networks, dropout, rate, epochs, alpha):
        """A row of the results: the errors of networks that differ in their seed alone."""
        errors = [count_errors(script, one, data) for one in networks]
        row = {"name": network, "dropout": dropout, "learning_rate": rate, "epochs": epochs}
        results.append({**row, "alpha": alpha, "errors": errors})
        print(*results[-1].values(), flush=True)

    def distil(teacher_logits, seed, rate, epochs, alpha):
        return script.train_distilled_net(
            "distilled", 800, teacher_logits, data, data.train,
            recipe(seed, rate, epochs), run, config.temperature, alpha,
        )  # fmt: skip

    first_rate, first_epochs, first_alpha = HINTON_DISTILLED[0]
    logits_of_nets = []
    for input_dropout, hidden_dropout, rate, epochs in HINTON_LARGE:
        dropout = [input_dropout, hidden_dropout]
        teacher = script.train_large_net(
            data, recipe(0, rate, epochs), run, *dropout, config.max_norm
        )
        add_row("large net", [teacher], dropout, rate, epochs, None)
        teacher_logits = script.predict_by_index(teacher, data.train)
        logits_of_nets.append(teacher_logits)
        students = []
        for seed in (0, 1, 2):
            students.append(distil(teacher_logits, seed, first_rate, first_epochs, first_alpha))
        add_row("distilled", students, dropout, first_rate, first_epochs, first_alpha)
    for rate, epochs, alpha in HINTON_DISTILLED[1:]:
        student = distil(logits_of_nets[0], 0, rate, epochs, alpha)
        add_row("distilled", [student], list(HINTON_LARGE[0][:2]), rate, epochs, alpha)
    for rate, epochs in HINTON_SMALL:
        small_net = script.train_small_net(data, recipe(0, rate, epochs), run)
        add_row("small net", [small_net], None, rate, epochs, None)

    keys = ("holdout", "batch_size", "temperature", "max_norm")
    about = {
        "versions": script.experiment.versions(),
        "device": script.experiment.device(),
        "config": {key: getattr(config, key) for key in keys},
    }
    write(name, {**about, "results": results})


# %% The searches on Fashion-MNIST, whose cells are trainings rather than commands

FASHION_TEACHER = f"{RUNS}/fashion_teacher_tuning/4"  # the best of that search


def start_search(script, name, teacher=FASHION_TEACHER):
    """Returns a run of a script on Fashion-MNIST with validation images, its config with a value
    for every flag, and the teacher that was trained there."""
    config = script.Config(
        dataset="fashion_mnist", holdout=10_000, teacher=teacher, output_dir=str(RUNS / name)
    )
    run = script.experiment.start(config)
    fresh = script.TeacherCNN(run.data.classes, rngs=script.nnx.Rngs(0))
    teacher = run.take_teacher(fresh, run.data.train)
    return run, script.fill_in_defaults(config, run.data), teacher


def print_cell(row):
    print("Cell:", *row.values(), flush=True)


def write_search(name, script, run, results):
    about = {
        "dataset": {"name": run.data.name, "validation": len(run.data.test.label)},
        "versions": script.experiment.versions(),
        "device": script.experiment.device(),
    }
    write(name, {**about, "results": results})


def choose_next(errors_of):
    """Where a search over one setting should go on, from {setting: errors}: beyond its best, where
    that is the largest or the smallest so far, or else half-way to the better neighbour."""
    settings = sorted(errors_of)
    best = settings.index(min(settings, key=errors_of.get))
    if best == 0:
        return settings[0] ** 2 / settings[1]
    if best == len(settings) - 1:
        return settings[-1] ** 2 / settings[-2]
    neighbour = min(settings[best - 1], settings[best + 1], key=errors_of.get)
    return (settings[best] * neighbour) ** 0.5


def search_teaching(name="fashion_teaching"):
    """How well each teacher of the search teaches: the errors of its students of script 15, with
    10,000 labels and with all. Epochs, rate and temperature are those of the first search."""
    script = load(DISTIL)
    results = []
    for number, command in enumerate(EXPERIMENTS["fashion_teacher_tuning"]):
        folder = f"{RUNS}/fashion_teacher_tuning/{number}"
        run, _, teacher = start_search(script, f"{name}/{number}", folder)
        for labels, epochs, alpha in ((10_000, 20, 0.1), ("all", 16, 0.5)):
            errors = []
            for seed in (0, 1):
                labelled = script.take_labels(run.data.train, labels, seed)
                recipe = script.Recipe(seed, epochs, 128, 2e-2, "onecycle")
                student = script.train_student_with_distillation(
                    teacher, run.data, labelled, recipe, run, 2.0, alpha
                )
                errors.append(count_errors(script, student, run.data))
            row = {"teacher": number, "labels": labels, "errors": errors}
            results.append(row)
            print_cell(row | {"command": command})
    write_search(name, script, run, results)


# {labels: epochs} of baselines and of distilled students, with each peak rate and two seeds.
FASHION_EPOCHS = {1_000: (30, 60, 120), 10_000: (10, 20, 40), "all": (8, 16)}
FASHION_RATES = (5e-3, 1e-2, 2e-2)
# Then a distilled student tries each temperature with each alpha, where it had the first ones.
FASHION_TEMPERATURES = (2.0, 4.0, 1.0)
FASHION_ALPHAS = (0.1, 0.5, 0.0)
# The best of these stood at the edge of their grid, so the search went on beyond it. Both students
# have as many further trials, a distilled one with the temperature and alpha of the scripts.
FASHION_BEYOND = {
    1_000: {
        "baseline": ((7, 1e-2), (7, 2e-2), (7, 4e-2)),
        "distilled": ((240, 2e-2), (120, 4e-2), (240, 4e-2)),
    },
    10_000: {
        "baseline": ((7, 2e-2), (14, 1e-2), (14, 2e-2)),
        "distilled": ((40, 2e-2), (20, 4e-2), (40, 4e-2)),
    },
    "all": {
        "baseline": ((6, 1e-2), (12, 1e-2), (12, 2e-2)),
        "distilled": ((32, 5e-3), (32, 1e-2), (32, 2e-2)),
    },
}


def choose_further_baselines(epochs):
    """As many further epochs and rates for a baseline, which has neither temperature nor alpha."""
    shorter = itertools.product([epochs[0] // 2], (*FASHION_RATES, 4e-2))
    return [*shorter, *itertools.product(epochs[:2], (2.5e-3, 4e-2))]


def search_fashion(name="fashion_tuning"):
    """For three numbers of labels the epochs and rates of both students of script 15, then
    temperature and alpha at the best of them, then longer trainings of the distilled student."""
    script = load(DISTIL)
    run, _, teacher = start_search(script, name)
    data, results = run.data, []

    def add_row(labels, epochs, rate, temperature=None, alpha=None):
        """Trains two students, without temperature and alpha baselines."""
        errors = []
        for seed in (0, 1):
            labelled = script.take_labels(data.train, labels, seed)
            recipe = script.Recipe(seed, epochs, 128, rate, "onecycle")
            if temperature is None:
                student = script.train_student_baseline(data, labelled, recipe, run)
            else:
                student = script.train_student_with_distillation(
                    teacher, data, labelled, recipe, run, temperature, alpha
                )
            errors.append(count_errors(script, student, data))
        row = {
            "name": "baseline" if temperature is None else "distilled",
            "labels": labels,
            "epochs": epochs,
            "learning_rate": rate,
            "temperature": temperature,
            "alpha": alpha,
            "errors": errors,
        }
        results.append(row)
        print_cell(row)
        return row

    first, *others = itertools.product(FASHION_TEMPERATURES, FASHION_ALPHAS)
    for labels, lengths in FASHION_EPOCHS.items():
        distilled = []
        for epochs, rate in itertools.product(lengths, FASHION_RATES):
            add_row(labels, epochs, rate)
            distilled.append(add_row(labels, epochs, rate, *first))
        best = min(distilled, key=lambda row: sum(row["errors"]))
        for temperature, alpha in others:
            add_row(labels, best["epochs"], best["learning_rate"], temperature, alpha)
        for epochs, rate in choose_further_baselines(lengths):
            add_row(labels, epochs, rate)
    for labels, further in FASHION_BEYOND.items():
        for epochs, rate in further["baseline"]:
            add_row(labels, epochs, rate)
        for epochs, rate in further["distilled"]:
            add_row(labels, epochs, rate, 2.0 if labels == "all" else 4.0, 0.5)
    write_search(name, script, run, results)


FEATURE_WEIGHTS = {
    "decoupled": (0.3, 1.0, 3.0),
    "hints": (1.0, 10.0, 100.0),
    "attention": (10.0, 100.0, 1000.0),
    "relations": (1.0, 10.0, 100.0),
    "contrast": (0.03, 0.1, 0.3),
}


def search_features(name="features_tuning"):
    """The weight of each method of script 21, alone and beside the logits: three, then a fourth
    where they point."""
    script = load(FEATURES)
    run, config, teacher = start_search(script, name)
    results, of_seeds = [], []
    for seed in (0, 1):
        labelled = script.take_labels(run.data.train, config.labels, seed)
        targets = script.tabulate_targets(teacher, labelled)
        rows = script.np.arange(len(labelled.label), dtype="int32")
        recipe = script.student_recipe(config, run.data, seed, len(rows))
        of_seeds.append((labelled._replace(index=rows), targets, recipe))

    def add_row(method, alpha, weight):
        errors = []
        for labelled, targets, recipe in of_seeds:
            needed = {x: targets[x] for x in ("teacher_logits", *script.NEEDED[method])}
            student = script.train_student_on_features(
                method, labelled, needed, run.data.classes, recipe, run,
                method, weight, config.temperature, alpha,
            )  # fmt: skip
            errors.append(count_errors(script, student, run.data))
        row = {"name": method, "alpha": alpha, "weight": weight, "errors": errors}
        results.append(row)
        print_cell(row)
        return sum(errors)

    for method, weights in FEATURE_WEIGHTS.items():
        for alpha in (1.0,) if method == "decoupled" else (1.0, config.alpha):
            errors_of = {weight: add_row(method, alpha, weight) for weight in weights}
            add_row(method, alpha, float(f"{choose_next(errors_of):.1g}"))
    write_search(name, script, run, results)


# Peak rates of the teachers of script 22, and of both students of each architecture.
ARCHITECTURE_TEACHER_RATES = {"resnet": (5e-3, 1e-2), "vit": (2e-3, 4e-3)}
ARCHITECTURE_RATES = (5e-3, 1e-2, 2e-2)


def search_architectures(name="architectures_tuning"):
    """Peak rates for each student of script 22, without a teacher and with the convolutional one:
    three, then a fourth where they point. Then those of the other teachers."""
    script = load(ARCHITECTURES)
    config = script.Config(
        dataset="fashion_mnist", holdout=10_000, seed=0, output_dir=str(RUNS / name)
    )
    run = script.experiment.start(config)
    data, results = run.data, []
    config = script.fill_in_defaults(config, data)
    teacher = script.make_network("cnn", data.classes, 0)
    script.experiment.load_network(PATIENT_TEACHER, "teacher", teacher)
    teacher_logits = script.predict_by_index(teacher, data.train)
    labelled = script.take_labels(data.train, config.labels, 0)

    def add_row(role, architecture, rate):
        training = f"{role} {architecture}"
        settings = (config, data, architecture)
        if role == "teacher":
            split = data.train
            recipe = script.recipe_of_teacher(*settings)._replace(learning_rate=rate)
        else:
            split = labelled
            recipe = script.recipe_of_student(*settings, 0, config.labels, {architecture: rate})
        if role == "distilled":
            network = script.train_on_teacher_logits(
                training, architecture, split, teacher_logits, recipe, run,
                config.temperature, config.alpha,
            )  # fmt: skip
        else:
            network = script.train_on_labels_alone(
                training, architecture, split, data.classes, recipe, run
            )
        errors = count_errors(script, network, data)
        row = {"name": role, "architecture": architecture, "learning_rate": rate}
        results.append(row | {"epochs": recipe.epochs, "errors": [errors]})
        print_cell(results[-1])
        return errors

    for architecture in config.students:
        for role in ("baseline", "distilled"):
            errors_of = {rate: add_row(role, architecture, rate) for rate in ARCHITECTURE_RATES}
            add_row(role, architecture, float(f"{choose_next(errors_of):.1g}"))
    for architecture, rates in ARCHITECTURE_TEACHER_RATES.items():
        for rate in rates:
            add_row("teacher", architecture, rate)
    write_search(name, script, run, results)


# Peak rates of both students of script 26, after 60 epochs. Then the distilled one tries each
# temperature with each alpha, where it had the first ones, and the baseline as often the same rates
# after fewer and after more epochs.
PATIENT_TEACHER = f"{RUNS}/fashion_teacher_tuning/1"  # of 10 epochs
PATIENT_EPOCHS = 60
PATIENT_RATES = (5e-3, 1e-2, 2e-2, 4e-2)
PATIENT_TEMPERATURES = (4.0, 2.0, 8.0)
PATIENT_ALPHAS = (0.5, 0.1, 0.0)
PATIENT_OTHER_EPOCHS = (30, 120)  # of the baseline


def search_patience(name="patient_tuning"):
    """Rates, temperature and alpha of the students of script 26 that see random views; the teacher
    is asked about the same view."""
    script = load(PATIENT)
    run, config, teacher = start_search(script, name, PATIENT_TEACHER)
    results, of_seeds = [], []
    for seed in (0, 1):
        labelled = script.take_labels(run.data.train, config.labels, seed)
        view_logits = script.tabulate_view_logits(teacher, labelled)
        rows = script.np.arange(len(labelled.label), dtype="int32")
        of_seeds.append((seed, labelled._replace(index=rows), view_logits))

    def add_row(epochs, rate, temperature=None, alpha=None):
        """Trains two students, without temperature and alpha baselines."""
        errors = []
        for seed, labelled, view_logits in of_seeds:
            recipe = script.Recipe(seed, epochs, 128, rate, "onecycle")
            if temperature is None:
                classes = run.data.classes
                student = script.train_baseline_on_views(labelled, classes, recipe, run)
            else:
                student = script.train_student_on_views(
                    "same view", "same", labelled, view_logits, recipe, run, temperature, alpha
                )
            errors.append(count_errors(script, student, run.data))
        row = {
            "name": "baseline" if temperature is None else "same view",
            "epochs": epochs,
            "learning_rate": rate,
            "temperature": temperature,
            "alpha": alpha,
            "errors": errors,
        }
        results.append(row)
        print_cell(row)
        return sum(errors)

    first, *others = itertools.product(PATIENT_TEMPERATURES, PATIENT_ALPHAS)
    errors_of = {}
    for rate in PATIENT_RATES:
        add_row(PATIENT_EPOCHS, rate)
        errors_of[rate] = add_row(PATIENT_EPOCHS, rate, *first)
    best_rate = min(errors_of, key=errors_of.get)
    for temperature, alpha in others:
        add_row(PATIENT_EPOCHS, best_rate, temperature, alpha)
    for epochs, rate in itertools.product(PATIENT_OTHER_EPOCHS, PATIENT_RATES):
        add_row(epochs, rate)
    write_search(name, script, run, results)


# %% What the command line does

OTHER_SEARCHES = {
    "hinton_tuning": search_hinton,
    "fashion_teaching": search_teaching,
    "fashion_tuning": search_fashion,
    "features_tuning": search_features,
    "architectures_tuning": search_architectures,
    "patient_tuning": search_patience,
}


def main(names):
    known = [*EXPERIMENTS, *OTHER_SEARCHES]
    if not names or not set(names) <= set(known):
        print(f"{__doc__.strip()}\n\nThere is: {', '.join(known)}.")
        return 0 if not names or set(names) & {"-h", "--help"} else 2
    os.chdir(ROOT)
    require(os.access(RESULTS, os.W_OK), f"{RESULTS}: cannot be written")
    for name in names:
        begun = time.perf_counter()
        if name in EXPERIMENTS:
            measure(name)
        else:
            OTHER_SEARCHES[name]()
        print(f"{name}: {(time.perf_counter() - begun) / 60:.0f} minutes", flush=True)
    return 0


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, OSError) as error:
        print(f"measure.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
