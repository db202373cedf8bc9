"""The tables of README and docs, from docs/results/*.json, and the numbers in their sentences.

    cog -r -P -I docs -p "from tables import *" README.md docs/*.md    # fill the tables in
    cog --check -P -I docs -p "from tables import *" README.md docs/*.md

A page has `<!-- [[[cog print(headline()) ]]] -->` above a table and `<!-- [[[end]]] -->` below.
Numbers in sentences are plain text; tests/test_claims.py holds them against the same functions.
"""

import ast
import functools
import itertools
import json
import re
from typing import NamedTuple

import measure  # which finds the scripts' modules
import numpy as np
from measure import RESULTS, ROOT
from scipy import special
from utils import paired_difference

# %% Numbers


@functools.cache
def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def names(name):
    """The names of the rows, each once, in their order."""
    return list(dict.fromkeys(row["name"] for row in read(name)["results"]))


def rows(name, row):
    """The rows of one name, in order of their runs and seeds."""
    rows_of_name = [x for x in read(name)["results"] if x["name"] == row]
    assert rows_of_name, f"docs/results/{name}.json has no row {row!r}"
    return rows_of_name


def values(name, row, key="test_accuracy"):
    """What the rows of one name hold under a key: an array, a number a seed."""
    return np.array([x[key] for x in rows(name, row)])


def mean(name, row, key="test_accuracy"):
    return float(np.mean(values(name, row, key)))


def accuracies(name, row):
    """Accuracies in percent, a number a seed. That of a group of networks is the mean of its
    members', that of "ensemble of GROUP" their ensemble's; "best of KIND" is the best of the rows
    KIND 1, KIND 2, ..., and "best of ROW and KIND" of one more."""
    if row.startswith("best of "):
        kinds = row.removeprefix("best of ").split(" and ")
        member = re.compile("|".join(rf"{re.escape(kind)}( \d+)?" for kind in kinds))
        members = [x for x in names(name) if member.fullmatch(x)]
        return np.max([accuracies(name, x) for x in members], axis=0)
    group = row.removeprefix("ensemble of ")
    if group in names(name) and "members" in rows(name, group)[0]:
        if group != row:
            return 100 * values(name, group, "ensemble")
        return 100 * values(name, group, "members").mean(axis=1)
    return 100 * values(name, row)


def seeds_of(name, row):
    """The runs and seeds of the rows of one name. Networks of one repetition have its seed."""
    return [(x["run"], x.get("repetition", x["seed"])) for x in rows(name, row)]


def gain(name, row, other="baseline"):
    """How much more accurate the rows of one name are than those of another, in points: mean, low,
    high (95 % interval), wins, pairs. They are paired by run and seed."""
    if {row, other} <= set(names(name)):  # else one is an ensemble or the best of several rows
        paired = seeds_of(name, row) == seeds_of(name, other)
        assert paired, f"docs/results/{name}.json: {row} and {other} are no pairs"
    return paired_difference(accuracies(name, row), accuracies(name, other))


def by_teacher(name, row):
    """The mean accuracy in percent of the students of each teacher."""
    of_run = {}
    for x in rows(name, row):
        of_run.setdefault(x["run"], []).append(100 * x["test_accuracy"])
    return [np.mean(of_run[run]) for run in sorted(of_run)]


def gain_over_teachers(name):
    """What distillation gains, in points. Students of one teacher have something in common, so the
    interval is that of the teachers' means."""
    return paired_difference(by_teacher(name, "distilled"), by_teacher(name, "baseline"))


def more_errors(name, row, other):
    """How many more test errors the rows of one name make than those of another: mean, lowest and
    highest."""
    errors = values(name, row, "test_errors") - values(name, other, "test_errors")
    return errors.mean(), errors.min(), errors.max()


# %% Words


def percent(share):
    return f"{100 * share:.2f} %"


def points(number):
    return f"{round(number, 2) + 0.0:+.2f}".replace("-", "−")  # no -0.00


def interval(gain):
    """The ends of an interval keep their sign: −0.00 says that 0 is inside."""
    return f"{gain.low:+.2f} to {gain.high:+.2f}".replace("-", "−")


def in_words(gain):
    return f"{points(gain.mean)} ({interval(gain)})"


def won(gain):
    return f"{gain.wins} of {gain.pairs}"


def table(header, lines, name=None, note=""):
    """A table in Markdown, with what is to be said below it and the command that measured it."""
    lines = ["| " + " | ".join(map(str, line)) + " |" for line in (header, *lines)]
    lines.insert(1, "|" + "---|" * len(header))
    if name:
        content = read(name)
        note += f" Measured by `{content['command']}` ({content['date']})."
    return "\n".join(lines) + (f"\n\n{note.strip()}" if note else "")


# %% Tables

HEADLINE = {
    "default": "MNIST, 1,000 labels (default)",
    "all_labels": "MNIST, all 60,000 labels",
    "fashion": "Fashion-MNIST, all 60,000 labels",
    "digits": "embedded digits, 100 labels (offline)",
}


def headline_pair(name):
    """The rows that a line of the headline table compares. Fashion-MNIST's are of script 16."""
    if name == "fashion":
        return "distilled, 60000 labels", "baseline, 60000 labels"
    return "distilled", "baseline"


def headline_gain(name):
    """What distillation gains, in points: the interval is over the teachers, or where there is one
    alone over the pairs."""
    if len(read(name)["runs"]) == 1:
        return gain(name, *headline_pair(name))
    return gain_over_teachers(name)


def headline():
    lines = []
    for name, title in HEADLINE.items():
        teacher = np.mean(by_teacher(name, "teacher"))
        distilled, baseline = (accuracies(name, x) for x in headline_pair(name))
        networks = [f"{x:.2f} %" for x in (teacher, baseline.mean(), distilled.mean())]
        wins = won(gain(name, *headline_pair(name)))
        lines.append([title, *networks, in_words(headline_gain(name)), wins])
    header = ["data, labels of the students", "teacher", "baseline", "distilled"]
    header += ["gain, points (95 % interval)", "pairs won"]
    commands = " ".join(HEADLINE)
    first_date, *_, last_date = sorted(read(name)["date"] for name in HEADLINE)
    note = (
        "Means over five teachers with three pairs of students each; the interval is over the "
        "teachers. Fashion-MNIST, by script 16: one teacher with five pairs, and the interval over "
        "these. Baseline: the student without a teacher. Gain: distilled minus baseline. Pairs "
        "won: those in which the distilled student is more accurate. "
        f"Measured by `python docs/measure.py {commands}` ({first_date} to {last_date})."
    )
    return table(header, lines, note=note)


def teachers(name):
    """Each teacher of the headline table with its three pairs."""
    lines = []
    columns = (by_teacher(name, x) for x in ("teacher", "baseline", "distilled"))
    for run, (teacher, baseline, distilled) in enumerate(zip(*columns, strict=True)):
        seed = read(name)["runs"][run]["config"]["teacher_seed"]
        accuracy = [f"{x:.2f} %" for x in (teacher, baseline, distilled)]
        lines.append([seed, *accuracy, points(distilled - baseline)])
    header = ["teacher's seed", "teacher", "baselines", "distilled", "gain, points"]
    return table(header, lines, name, "Means over three pairs.")


def soft_targets(name="default"):
    """What the teacher says of the four test images of which it is right but least sure."""
    lines = []
    for index, logits in read(name)["runs"][0]["soft_targets"].items():
        for t in (1, 3):
            probs = special.softmax(np.array(logits) / t)
            cells = [f"**{p:.3f}**" if p == probs.max() else f"{p:.3f}" for p in probs]
            digit = int(np.argmax(logits))
            lines.append([f"{index}, {'an' if digit == 8 else 'a'} {digit}", t, *cells])
    return table(["test image", "T", *range(10)], lines)


def networks(name, compared, more=None, note=""):
    """Networks with their accuracy and their gains over others, a line for each other: {network:
    other, list of others or None}. `more` are columns {header: what is shown of a network}."""
    lines = []
    for network, others in compared.items():
        of_seeds = accuracies(name, network)
        line = [network, f"{of_seeds.mean():.2f} %"]
        shown = [show(network) for show in (more or {}).values()]
        if others is None:
            lines.append([*line, "", "", "", *shown])
            continue
        for other in [others] if isinstance(others, str) else others:
            against = gain(name, network, other)
            lines.append([*line, other, in_words(against), won(against), *shown])
    header = ["network", "test accuracy", "against", "gain, points (95 % interval)", "seeds won"]
    note = f"Means over {len(of_seeds)} seeds. {note}".strip()
    return table([*header, *(more or {})], lines, name, note)


class Settings(NamedTuple):
    """What a search tries."""

    labels: int | str
    batch_size: int
    epochs: int
    learning_rate: float


def searched(name):
    """What a search found: {settings: {kind of network: its seeds' validation accuracies}}."""
    content = read(name)
    cells = {}
    for row in content["results"]:
        if row["name"] == "teacher" and "teacher" not in name:
            continue  # it teaches the students that are compared
        labels = content["runs"][row["run"]]["config"].get("labels", "all")
        settings = Settings(labels, row["batch_size"], row["epochs"], row["learning_rate"])
        of_kind = cells.setdefault(settings, {})
        of_kind.setdefault(row["name"], []).append(row["validation_accuracy"])
    return cells


def search(name):
    """A search over settings: accuracy on validation images, the best of each student in bold."""
    cells = searched(name)
    kinds = list(next(iter(cells.values())))
    best = {}  # {(labels, kind): accuracy}
    for settings, of_kind in cells.items():
        for kind in kinds:
            column = settings.labels, kind
            best[column] = max(best.get(column, 0), np.mean(of_kind[kind]))
    lines = []
    for settings, of_kind in cells.items():
        line = [*settings[:3], f"{settings.learning_rate:g}"]
        for kind in kinds:
            accuracy = np.mean(of_kind[kind])
            is_best = accuracy == best[settings.labels, kind]
            line.append(f"**{percent(accuracy)}**" if is_best else percent(accuracy))
        lines.append(line)
    seeds = sorted({len(accuracies) for x in cells.values() for accuracies in x.values()})
    note = f"Mean accuracy of {' or '.join(map(str, seeds))} seeds on"
    note += f" {read(name)['dataset']['validation']:,} validation images; bold: the best"
    note += " of its column with as many labels."
    return table(
        ["labels", "batch size", "epochs", "peak learning rate", *kinds], lines, name, note
    )


def counts(name="limited_labels"):
    """The numbers of labels that a run of script 16 compares."""
    matches = [re.fullmatch(r"baseline, (\d+) labels", row) for row in names(name)]
    return [int(match[1]) for match in matches if match]


def limited_labels(name="limited_labels"):
    """Accuracy and gain of script 16's students, for each number of labels."""
    present = names(name)
    lines = []
    for count in counts(name):
        baseline = f"baseline, {count} labels"
        line = [f"{count:,}", percent(mean(name, baseline))]
        for student in (f"distilled, {count} labels", f"transfer, {count} labels"):
            line += ["", ""]
            if student in present:
                line[-2:] = percent(mean(name, student)), in_words(gain(name, student, baseline))
        lines.append(line)
    header = ["labels", "baseline", "distilled", "distilled − baseline, points (95 % interval)"]
    header += ["transfer: unlabelled images too", "transfer − baseline"]
    return table(header, lines, name, "Means over five seeds, on test images.")


def fidelity(name="limited_labels"):
    """How like the teacher script 16's students are, and how well calibrated."""
    lines = []
    for row in names(name):
        keys = ("agreement", "kl", "ece", "nll")
        agreement, kl, ece, nll = (mean(name, row, key) for key in keys)
        lines.append([row, percent(agreement), f"{abs(kl):.3f}", percent(ece), f"{nll:.3f}"])
    header = ["network", "same answer as the teacher", "KL(teacher ‖ student)", "calibration error"]
    return table([*header, "NLL"], lines, name, "Means over five seeds.")


def constant():
    """All labels: a constant rate against one cycle, in both students."""
    lines = []
    students = [f"{student}, 60000 labels" for student in ("baseline", "distilled")]
    for name, schedule in (("constant", "constant, 1e-3"), ("limited_labels", "one cycle")):
        epochs = [int(rows(name, row)[0]["epochs"]) for row in students]
        title = f"{schedule}, {' and '.join(map(str, dict.fromkeys(epochs)))} epochs"
        shown = [percent(mean(name, row)) for row in students]
        lines.append([title, *shown, in_words(gain(name, *reversed(students)))])
    header = ["schedule", "baseline", "distilled", "gain, points (95 % interval)"]
    note = "Means over five seeds. Of two numbers of epochs the first is the baseline's."
    return table(header, lines, "constant", note)


def grid(labels):
    """Accuracies of the grid in percent, on validation images: [seeds, temperatures, alphas]."""
    [run] = read("grid")["runs"]
    temperatures = dict.fromkeys(t for t, _ in run["cells"])
    errors = np.array(run["grids"][str(labels)]["errors"])
    return (100 - 100 * errors / run["validation"]).reshape(len(errors), len(temperatures), -1)


def grid_gain(labels, pair, other):
    """How much more accurate one pair (T, alpha) of the grid is than another, in points."""
    cells = read("grid")["runs"][0]["cells"]
    accuracy = grid(labels).reshape(-1, len(cells))
    return paired_difference(*(accuracy[:, cells.index(list(x))] for x in (pair, other)))


def chosen():
    """Script advanced/knowledge_distillation.py: the pair that was chosen, and the default."""
    lines = []
    for labels, cells in read("grid")["runs"][0]["grids"].items():
        compared = [f"{name}, {labels} labels" for name in ("baseline", "default", "chosen")]
        t, alpha = cells["chosen"]
        count = labels if labels == "all" else f"{int(labels):,}"
        line = [count, f"T = {t:g}, alpha = {alpha:g}"]
        line += [percent(mean("grid", name)) for name in compared]
        lines.append([*line, in_words(gain("grid", compared[2], compared[1]))])
    header = ["labels", "pair chosen on validation images"]
    header += [f"test accuracy: {x}" for x in ("baseline", "default pair", "chosen pair")]
    header.append("chosen − default, points (95 % interval)")
    note = "Means over five seeds. Default pair: T = 3, alpha = 0.5. Baseline: alpha = 1."
    return table(header, lines, "grid", note)


def controls():
    """Each alternative to distillation: over the baseline, and how far distillation is ahead."""
    lines = []
    for name in names("controls"):
        line = [name, percent(mean("controls", name))]
        of_student = name not in ("teacher", "weak teacher")
        for one, other in ((name, "baseline"), ("distilled", name)):
            compared = of_student and one != other
            line.append(in_words(gain("controls", one, other)) if compared else "")
        if name == "alpha 1" and all(read("controls")["runs"][0]["alpha_1_is_baseline"]):
            line[2] = "0: the same bits"
        line.append(percent(mean("controls", name, "ece")))
        lines.append(line)
    header = ["network", "test accuracy", "gain over the baseline", "distilled is ahead by"]
    note = "Gains in points with 95 % intervals, over five seeds."
    return table([*header, "calibration error"], lines, "controls", note)


def smoothing():
    """The amounts of label smoothing that were tried."""
    [run] = read("controls")["runs"]
    lines = []
    for amount, errors in run["smoothing_errors"].items():
        errors_mean = f"{np.mean(errors):.0f}"
        if float(amount) == run["smoothing"]:
            errors_mean = f"**{errors_mean}**"
        lines.append([amount, errors_mean, ", ".join(map(str, errors))])
    note = f"Errors on {run['validation']:,} validation images; the chosen amount in bold."
    return table(["smoothing", "mean", "each seed"], lines, "controls", note)


def taught_by(teacher, labels):
    """The mean errors of a teacher's students in the search of Fashion-MNIST's teacher."""
    [errors] = [
        row["errors"]
        for row in read("fashion_teaching")["results"]
        if (row["teacher"], row["labels"]) == (teacher, labels)
    ]
    return np.mean(errors)


def fashion_teachers():
    """The teachers that were tried for Fashion-MNIST, and how well they teach; the best in bold."""
    search = read("fashion_teacher_tuning")
    columns = []  # of numbers: the teacher's errors and its students'
    for row in search["results"]:
        students = [taught_by(row["run"], labels) for labels in (10_000, "all")]
        columns.append([row["validation_errors"], *students])
    lines = []
    for row, errors in zip(search["results"], columns, strict=True):
        config = search["runs"][row["run"]]["config"]
        line = [config["epochs"], config["augmentation"], f"{config['learning_rate']:g}"]
        for column, number in enumerate(errors):
            is_best = number == min(numbers[column] for numbers in columns)
            line.append(f"**{number:.0f}**" if is_best else f"{number:.0f}")
        lines.append(line)
    note = (
        f"Errors on {search['dataset']['validation']:,} validation images: of one teacher, and the "
        "mean of two of its students. Bold: the best of its column."
    )
    header = ["epochs", "augmentation", "peak rate", "teacher"]
    header += ["students, 10,000 labels", "students, all labels"]
    return table(header, lines, "fashion_teaching", note)


def fashion_search():
    """The settings that were tried for Fashion-MNIST: mean errors on validation images, the best of
    each student in bold."""
    search = read("fashion_tuning")
    best = {}  # {(labels, student): mean errors}
    baselines = {}  # {(labels, epochs, rate): mean errors}, those that are not shown yet
    for row in search["results"]:
        errors = np.mean(row["errors"])
        column = row["labels"], row["name"]
        best[column] = min(best.get(column, errors), errors)
        if row["name"] == "baseline":
            baselines[row["labels"], row["epochs"], row["learning_rate"]] = errors

    def bold_if_best(labels, student, errors):
        return f"**{errors:.0f}**" if errors == best[labels, student] else f"{errors:.0f}"

    lines = []
    for row in search["results"]:
        cell = labels, epochs, rate = row["labels"], row["epochs"], row["learning_rate"]
        line = [labels if labels == "all" else f"{labels:,}", epochs, f"{rate:g}", "", "", ""]
        if row["name"] == "distilled":
            softness = f"{row['temperature']:g}, {row['alpha']:g}"
            line[4:] = softness, bold_if_best(labels, "distilled", np.mean(row["errors"]))
        elif any(
            other["name"] == "distilled" and is_cell(other, cell) for other in search["results"]
        ):
            continue  # it stands beside the first distilled student of its epochs and rate
        if cell in baselines:
            line[3] = bold_if_best(labels, "baseline", baselines.pop(cell))
        lines.append(line)
    note = (
        f"Mean errors on {search['dataset']['validation']:,} validation images over two seeds; "
        "bold: the best of its column with as many labels."
    )
    header = ["labels", "epochs", "peak rate", "baseline", "T, alpha", "distilled"]
    return table(header, lines, "fashion_tuning", note)


def is_cell(row, cell):
    return (row["labels"], row["epochs"], row["learning_rate"]) == cell


def features():
    """Script 21: what a student matches, and what that gains over the baseline and over plain
    distillation."""
    students = [x for x in names("features") if x not in ("teacher", "baseline", "distilled")]
    students.sort(key=lambda x: -mean("features", x))
    lines = [["teacher", percent(mean("features", "teacher")), "", "", "", ""]]
    for name in ("distilled", *students, "baseline"):
        line = [name, percent(mean("features", name)), "", "", ""]
        if name != "baseline":
            line[2] = in_words(gain("features", name, "baseline"))
        if name != "distilled":
            over_distilled = gain("features", name, "distilled")
            line[3:] = in_words(over_distilled), won(over_distilled)
        lines.append([*line, percent(mean("features", name, "agreement"))])
    header = ["network", "test accuracy", "gain over the baseline", "gain over distilled"]
    header += ["seeds ahead of distilled", "same answer as the teacher"]
    note = (
        "Means over five seeds of the students, with one teacher. Gains in points, 95 % interval."
    )
    return table(header, lines, "features", note)


def mark_best(tried):
    """Settings with their mean errors, in words, from [(setting, errors)]; the best in bold."""
    best = min(sum(errors) for _, errors in tried)
    texts = []
    for setting, errors in tried:
        text = f"{setting:g}: {np.mean(errors):.0f}"
        texts.append(f"**{text}**" if sum(errors) == best else text)
    return ", ".join(texts)


def feature_weights():
    """The weights that were tried for script 21."""
    by_cell = {}  # {what is matched: [(weight, errors)]}
    for row in read("features_tuning")["results"]:
        matched = row["name"]
        if row["alpha"] < 1:
            matched += " and logits"
        by_cell.setdefault(matched, []).append((row["weight"], row["errors"]))
    lines = [[matched, mark_best(tried)] for matched, tried in by_cell.items()]
    note = "Mean of two seeds on 10,000 validation images; bold: the best of its line."
    return table(["matched", "weight: errors"], lines, "features_tuning", note)


def architectures():
    """Script 22: what each network costs, and its accuracy without a teacher."""
    script = measure.load(measure.ARCHITECTURES)
    shown = [f"teacher {x}" for x in script.TEACHERS] + [f"baseline {x}" for x in script.STUDENTS]
    lines = []
    for name in shown:
        row = rows("architectures", name)[0]
        line = [name, f"{row['params']:,}", f"{row['flops'] / 1e6:.2f} M"]
        line += [f"{row['latency_ms'][size]:.2f}" for size in ("1", "128")]
        lines.append([*line, percent(mean("architectures", name))])
    header = ["network", "parameters", "FLOPs an image"]
    header += ["ms, 1 image", "ms, batch of 128", "test accuracy"]
    note = (
        "Teachers: one training each, on all labels. Baselines: means over three seeds, with 5,000 "
        "labels. Times on 2 CPU cores, in one run."
    )
    return table(header, lines, "architectures", note)


def pairs():
    """Script 22: what each student gains from each teacher."""
    script = measure.load(measure.ARCHITECTURES)
    lines = []
    for student in script.STUDENTS:
        baseline = f"baseline {student}"
        for teacher in script.TEACHERS:
            name = f"{student} from {teacher}"
            found = gain("architectures", name, baseline)
            params = [
                values("architectures", x, "params")[0] for x in (baseline, f"teacher {teacher}")
            ]
            share = f"{100 * params[0] / params[1]:.1f} %"
            line = [student, teacher, share, percent(mean("architectures", name))]
            agreement = percent(mean("architectures", name, "agreement"))
            lines.append([*line, in_words(found), won(found), agreement])
    header = ["student", "teacher", "student's share of the teacher's parameters"]
    header += ["test accuracy", "gain over the baseline", "seeds won", "agreement"]
    note = (
        "Means over three seeds; gains in points, with 95 % intervals. Seeds won: those in which "
        "the student makes fewer errors than its baseline. Agreement: the share of "
        "test images for which student and teacher name the same class."
    )
    return table(header, lines, "architectures", note)


def small_teachers():
    """Script 22: what two small students gain from the large teacher and from smaller ones."""
    students = ("cnn_eighth", "mlp")
    lines = []
    for teacher in ("cnn", "cnn_half", "cnn_quarter"):
        name = "architectures" if teacher == "cnn" else "small_teachers"
        row = f"teacher {teacher}"
        line = [teacher, f"{rows(name, row)[0]['params']:,}", percent(mean(name, row))]
        for student in students:
            line.append(in_words(gain(name, f"{student} from {teacher}", f"baseline {student}")))
        lines.append(line)
    header = ["teacher", "parameters", "its test accuracy"]
    header += [f"gain of {student}" for student in students]
    note = "Means over the same three seeds; the first line is that of the tables above."
    return table(header, lines, "small_teachers", note)


def architectures_search():
    """The peak rates that were tried for script 22: errors, the best of each network in bold."""
    tried = {}  # {network: {rate: errors}}
    for row in read("architectures_tuning")["results"]:
        network = f"{row['name']} {row['architecture']}"
        tried.setdefault(network, {})[row["learning_rate"]] = row["errors"]
    lines = [[network, mark_best(errors_of.items())] for network, errors_of in tried.items()]
    note = "One seed, 10,000 validation images; bold: the best of its line."
    return table(["network", "peak rate: errors"], lines, "architectures_tuning", note)


PATIENT_EPOCHS = (30, 60, 120, 240)  # lengths of training that script 26 compares
PATIENT_WAYS = ("plain image", "other view", "same view")


def patience():
    """Script 26: what each way to ask the teacher gains over the baseline, by length."""
    lines = []
    for epochs in PATIENT_EPOCHS:
        baseline = f"baseline, {epochs} epochs"
        line = [epochs, percent(mean("patient", baseline))]
        for way in PATIENT_WAYS:
            line.append(in_words(gain("patient", f"{way}, {epochs} epochs", baseline)))
        lines.append(line)
    header = ["epochs", "baseline", *(f"{way} − baseline" for way in PATIENT_WAYS)]
    note = "Accuracy and gains in points, with 95 % intervals: means over three seeds, one teacher."
    return table(header, lines, "patient", note)


def mixup():
    """Script 26: mixed images, with a teacher and without."""
    students = ("same view", "baseline with mixup", "mixup")
    compared = {"baseline, 120 epochs": None}
    for student in students:
        compared[f"{student}, 120 epochs"] = ["baseline, 120 epochs"]
    compared["mixup, 120 epochs"] += ["baseline with mixup, 120 epochs", "same view, 120 epochs"]
    return networks("mixup", compared, note="The teacher is that of the tables above.")


def consistency():
    """Script 26: the same view against the other ways, and how often each student answers as the
    teacher does."""
    lines = []
    for epochs in PATIENT_EPOCHS:
        same = f"same view, {epochs} epochs"
        line = [epochs]
        for way in ("plain image", "other view"):
            line.append(in_words(gain("patient", same, f"{way}, {epochs} epochs")))
        for student in ("baseline", *PATIENT_WAYS):
            agreement = mean("patient", f"{student}, {epochs} epochs", "agreement")
            line.append(percent(agreement))
        lines.append(line)
    header = ["epochs", "same view − plain image", "same view − other view"]
    header += [f"agreement: {x}" for x in ("baseline", *PATIENT_WAYS)]
    note = (
        "Of the same students. Agreement: the share of test images, not shifted, for which student "
        "and teacher name the same class."
    )
    return table(header, lines, "patient", note)


def patience_search():
    """The settings that were tried for script 26: mean errors, the best of each student in bold."""
    rows = read("patient_tuning")["results"]
    best = {}  # {(student, epochs): mean errors}
    for row in rows:
        column = row["name"], row["epochs"]
        errors = np.mean(row["errors"])
        best[column] = min(best.get(column, errors), errors)
    lines = []
    for row in rows:
        errors = np.mean(row["errors"])
        text = f"{errors:.0f}"
        if errors == best[row["name"], row["epochs"]]:
            text = f"**{text}**"
        softness = ""
        if row["temperature"] is not None:
            softness = f"{row['temperature']:g}, {row['alpha']:g}"
        lines.append([row["name"], row["epochs"], f"{row['learning_rate']:g}", softness, text])
    header = ["student", "epochs", "peak rate", "T, alpha", "errors"]
    note = (
        "Mean of two seeds on 10,000 validation images; bold: the best of a student with as many "
        "epochs."
    )
    return table(header, lines, "patient_tuning", note)


COMPRESSIONS = ("trained on", "int8 after training", "int8 in training")
COMPRESSIONS += ("80 % sparse", "80 % sparse int8", "95 % sparse", "95 % sparse int8")


def has_labels_alone(compression):
    """Whether a distilled student was compressed without its teacher, too: in training only."""
    return compression != "int8 after training"


def compressions(name):
    """Script 23: the accuracy of the students in float32, and what each compression costs."""
    first = [percent(mean(name, "baseline")), percent(mean(name, "distilled"))]
    lines = [["float32", first[0], first[1], first[1], ""]]
    for how in COMPRESSIONS:
        baseline, distilled = f"baseline, {how}", f"distilled, {how}"
        costs = [in_words(gain(name, baseline, "baseline")), "", "", ""]
        costs[2] = in_words(gain(name, distilled, "distilled"))
        if has_labels_alone(how):
            alone = f"distilled, teacher left out, {how}"
            costs[1] = in_words(gain(name, alone, "distilled"))
            costs[3] = in_words(gain(name, distilled, alone))
        lines.append([how, *costs])
    header = ["", "baseline, never a teacher", "distilled, teacher left out"]
    header += ["distilled, teacher kept", "teacher kept − left out"]
    seeds = len(values(name, "baseline"))
    note = (
        "First line: test accuracy, in JAX. Below: points of accuracy against the same student in "
        f"float32, with 95 % intervals. Means over {seeds} pairs of students, one teacher."
    )
    return table(header, lines, name, note)


def file_of(row, kind, name="deploy"):
    """What there is to say of the file of the first seed, "stablehlo" or "onnx"."""
    return rows(name, row)[0]["files"][kind]


def kilobytes(count):
    return f"{count / 1000:,.1f} kB"


DEPLOYED = ("teacher", "distilled", *(f"distilled, {how}" for how in COMPRESSIONS))


def deployed_sizes():
    """Script 23: what the files weigh, and what they answer."""
    lines = []
    for row in DEPLOYED:
        line = [row]
        for kind in ("stablehlo", "onnx"):
            file = file_of(row, kind)
            line += [kilobytes(file["bytes"]), kilobytes(file["gzip_bytes"])]
        line += [percent(file_of(row, kind)["accuracy"]) for kind in ("stablehlo", "onnx")]
        lines.append(line)
    header = ["network", "StableHLO", "packed", "ONNX", "packed"]
    header += ["accuracy, StableHLO", "accuracy, ONNX"]
    note = "Files of the first seed, their sizes on disk and packed by gzip. 1 kB is 1,000 bytes."
    return table(header, lines, "deploy", note)


def deployed_latencies():
    """Script 23: milliseconds on one core, in JAX and in onnxruntime."""
    lines = []
    for row in DEPLOYED:
        line = [row]
        for kind in ("stablehlo", "onnx"):
            for batch_size, digits in (("1", 2), ("128", 1)):
                times = file_of(row, kind)["latency_ms"][batch_size]
                line.append(f"{times['median']:.{digits}f} ({times['p95']:.{digits}f})")
        lines.append(line)
    header = ["network", "JAX, batch of 1", "JAX, batch of 128"]
    header += ["onnxruntime, batch of 1", "onnxruntime, batch of 128"]
    device = read("deploy")["device"]
    note = (
        "Milliseconds on one core for black images: the median of 30 answers, and the 95th "
        f"percentile, on a machine with {device}."
    )
    return table(header, lines, "deploy", note)


def errors_of_rates():
    """What the search of script 23's rate found, of all students whose weights a compression trains
    further: {(labels, student): {rate: validation errors}}."""
    content = read("deploy_tuning")
    tried = {}
    for row in content["results"]:
        if row["compression"] in ("int8 in training", "sparse", "sparse int8"):
            labels = content["runs"][row["run"]]["config"]["labels"]
            for student in (row["group"], "all three"):
                rates = tried.setdefault((labels, student), {})
                rates.setdefault(row["learning_rate"], []).append(row["validation_errors"])
    return tried


def deploy_search():
    """The peak rates of compressions that were tried: validation errors, the best in bold."""
    tried = errors_of_rates()
    lines = []
    students = ("baseline", "distilled", "distilled, teacher left out")
    for labels, group in (
        *(("all", group) for group in (*students, "all three")),
        *((1000, group) for group in students),  # each has a rate of its own
    ):
        lines.append([labels, group, mark_best(sorted(tried[labels, group].items()))])
    note = (
        "Mean errors of int8 in training, sparse, and sparse int8, with a sparsity of 0.95, on "
        "10,000 validation images: with all labels one seed, 1,000 two. Bold: best of its line."
    )
    return table(["labels", "student", "peak rate: errors"], lines, "deploy_tuning", note)


def hinton():
    """Test errors beside the paper's."""
    paper = measure.load(measure.HINTON).PAPER
    lines = []
    for name in names("hinton"):
        if "units" not in name:
            errors = values("hinton", name, "test_errors")
            added = values("hinton", name, "added_to_biases")
            line = [name, f"{paper[name]:,}" if name in paper else ""]
            line += [f"{errors.mean():,.0f}", f"{errors.min():,} to {errors.max():,}"]
            line += [f"{mean('hinton', name, 'errors_on_threes'):.0f}"]
            shown = f"{added.min():+.1f} to {added.max():+.1f}".replace("-", "−")
            line.append(shown if added.any() else "")
            lines.append(line)
    header = ["network", "errors in the paper", "errors here, mean", "lowest to highest"]
    header += ["of them on threes", "added to the biases"]
    return table(header, lines, "hinton", "Of 10,000 test images, over five seeds.")


def hinton_temperatures():
    """Test errors of smaller students by temperature."""
    errors_of = {}  # {units: {temperature: text}}
    for name in names("hinton"):
        if match := re.fullmatch(r"(\d+) units at T = (\S+)", name):
            units, t = match.groups()
            errors = values("hinton", name, "test_errors")
            text = f"{errors.mean():.0f} ± {errors.std(ddof=1):.0f}"
            errors_of.setdefault(units, {})[t] = text
    header = ["errors, mean ± sd", *(f"T = {t}" for t in next(iter(errors_of.values())))]
    lines = [[f"{units} units a layer", *texts.values()] for units, texts in errors_of.items()]
    return table(header, lines, "hinton")


def hinton_search():
    """The settings that were tried for script 25."""
    lines = []
    for row in read("hinton_tuning")["results"]:
        dropout = " and ".join(f"{x:g}" for x in row["dropout"] or ())
        alpha = "" if row["alpha"] is None else f"{row['alpha']:g}"
        settings = [dropout, f"{row['learning_rate']:g}", row["epochs"], alpha]
        lines.append([row["name"], *settings, ", ".join(map(str, row["errors"]))])
    header = ["network", "dropout of the large net: inputs and hidden units", "peak rate", "epochs"]
    note = (
        "Errors on 10,000 validation images, one number a seed. A student is taught by the large "
        "net above it or, of those further down, by the first."
    )
    return table([*header, "alpha", "errors"], lines, "hinton_tuning", note)


def temperature():
    """Gradient norms with and without T², and the distances from the limit of high T."""
    [run] = read("temperature")["runs"]
    titles = {
        "with_t2_start": "gradient norm, untrained student, with T²",
        "without_t2_start": "the same without T²",
        "with_t2_end": "gradient norm, trained student, with T²",
        "without_t2_end": "the same without T²",
        "from_limit": "distance of the soft targets from their limit",
        "from_matching": "distance of the gradient from logit matching",
    }
    header = ["", *(f"T = {t:g}" for t in run["temperatures"])]
    lines = [[title, *(f"{x:.3g}" for x in run[key])] for key, title in titles.items()]
    return table(header, lines, "temperature")


# %% Code and flags


def code(file, *names):
    """Top-level functions or classes of a file, with their decorators."""
    source = (ROOT / file).read_text()
    pieces = []
    for name in names:
        [node] = [x for x in ast.parse(source).body if getattr(x, "name", None) == name]
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        pieces.append("\n".join(source.splitlines()[first - 1 : node.end_lineno]))
    return "```python\n" + "\n\n\n".join(pieces) + "\n```"


def flags(file):
    """The flags of a script, from the sentences below the fields of its Config."""
    lines = []
    shown_flags = set()
    for path, name in ((file, "Config"), ("examples/experiment.py", "CommonFlags")):
        source = (ROOT / path).read_text()
        [config] = [x for x in ast.parse(source).body if getattr(x, "name", None) == name]
        for field, sentence in itertools.pairwise(config.body):
            # A script may have a common flag with a default of its own.
            if isinstance(field, ast.AnnAssign) and field.target.id not in shown_flags:
                shown_flags.add(field.target.id)
                default = ast.get_source_segment(source, field.value)
                if isinstance(field.value, ast.Tuple):
                    default = " ".join(str(x) for x in ast.literal_eval(field.value))
                flag = field.target.id.replace("_", "-")
                flag = f"`--no-{flag}`" if default == "True" else f"`--{flag}`"
                shown = {"True": "off", "False": "off", "None": ""}.get(default, f"`{default}`")
                text = " ".join(sentence.value.value.split()).replace("<", "&lt;")
                lines.append([flag, shown, text])
    return table(["flag", "default", "meaning"], lines)


# %% Speed


def measured_on(benchmark):
    command, device, date = (benchmark[key] for key in ("command", "device", "date"))
    return f"Measured by `{command}` on {device} ({date})."


def jobs():
    """Whole jobs: seconds, ours against each, and what they reach."""
    benchmark, lines = read("compare")["jobs"], []
    for who, job in benchmark["runs"].items():
        ratio = benchmark["ratios"].get(f"ours ÷ {who}")
        line = [who, f"{np.median(job['seconds']):.0f}", f"{ratio[0]:.2f}" if ratio else ""]
        line.append(f"{job['peak_memory_gb']:.1f} GB")
        for network in ("teacher", "distilled", "baseline"):
            line.append(percent(np.mean([run[network] for run in job["accuracy"]])))
        lines.append(line)
    header = ["run", "seconds", "ours ÷ this", "peak memory"]
    header += [f"test accuracy: {network}" for network in ("teacher", "distilled", "baseline")]
    return table(header, lines, note=measured_on(benchmark))


def steps():
    """A step of ours in milliseconds, and against each peer: medians."""
    benchmark = read("compare")["steps"]
    peers = [x for x in benchmark["milliseconds"]["student step"] if x != "ours"]
    lines = []
    for case, times in benchmark["milliseconds"].items():
        if "ours" in times:
            ratios = [benchmark["ratios"].get(f"{case} ÷ {peer}") for peer in peers]
            line = [case, f"{np.median(times['ours']):.1f}"]
            lines.append(line + [f"{ratio[0]:.2f}" if ratio else "" for ratio in ratios])
    header = ["batch of 128", "ours, milliseconds", *(f"ours ÷ {peer}" for peer in peers)]
    note = f"Medians of {benchmark['rounds']} rounds in turns."
    return table(header, lines, note=f"{note} {measured_on(benchmark)}")


def slower_without(part, without, with_measure):
    """How many times as long a step takes in one case as in another: {network: quotient of the
    fastest}."""
    slower = {}
    for network, cases in read("breakdown")[part].items():
        milliseconds = min(of_turn for of_turn, _ in cases[without])
        faster_milliseconds = min(of_turn for of_turn, _ in cases[with_measure])
        slower[network] = milliseconds / faster_milliseconds
    return slower


MEASURES = {  # {measure: part of the benchmark, case without it, case with it}
    "memory in huge pages, kept": (
        "memory",
        "as glibc comes",
        "huge pages, and what is freed is kept",
    ),
    "`conv` in the first layer": ("conv", "as built in", "`conv`"),
    "`max_pool`": ("jax", "`nnx.max_pool`", "as script 15"),
    "the flag of XLA": ("jax", "XLA's own settings", "as script 15"),
    "a device for each core": ("jax", "on one device", "as script 15"),
}


def measures():
    """How many times as long a step takes without each measure."""
    lines = []
    for title, case in MEASURES.items():
        slower = slower_without(*case)
        lines.append([title, *(f"{slower[x]:.2f}" for x in ("StudentCNN", "TeacherCNN"))])
    header = ["without", "student's step takes", "teacher's step takes"]
    note = "Times as long, the fastest epochs of three processes in turns."
    return table(header, lines, note=f"{note} {measured_on(read('breakdown'))}")


def stacked():
    """A student's step in a stack of students, against one alone."""
    benchmark = read("stacked")
    single = np.array(benchmark["steps"]["single"])
    lines = []
    for name, each in benchmark["steps"].items():
        ratio = np.median(np.array(each) / single)
        lines.append([name, f"{np.median(each):.1f}", f"{ratio:.2f}"])
    note = f"Medians of {len(single)} rounds in turns, also of the quotients."
    note = f"{note} {measured_on(benchmark)}"
    return table(["", "ms a student's step", "÷ single"], lines, note=note)
