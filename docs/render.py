"""Fills the marked places in README.md and docs/*.md from docs/results/*.json and the scripts.

    python docs/render.py            # write
    python docs/render.py --check    # only say what is out of date, exit status 1

A block stands between `<!-- table: results -->` (or `code: FILE NAME`, `config: FILE`,
`output: compare`) and `<!-- end -->`; a number in a sentence between
`<!-- value: default.gain -->` and `<!-- end -->`.
"""

import argparse
import ast
import hashlib
import io
import json
import re
import sys
from pathlib import Path

import measure
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from scipy import special

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from utils import paired_difference  # noqa: E402

RESULTS = ROOT / "docs" / "results"
EXPERIMENTS = {
    "default": "MNIST, 1,000 labels (default settings)",
    "all_labels": "MNIST, all 60,000 labels",
    "digits": "embedded digits, 100 labels (no network)",
}


# The variants: what is compared with what, paired by the seed.
VARIANTS = {
    "grid": [],
    "temperature": [],
    "ensemble": [
        ("ensemble, probabilities", "best of teacher"),
        ("ensemble, logits", "ensemble, probabilities"),
        ("student of one teacher", "baseline"),
        ("student, mean probabilities", "student of one teacher"),
        ("student, mean logits", "student, mean probabilities"),
        ("student, random teacher", "student, mean probabilities"),
    ],
    "self": [
        ("self-distilled", "twin 1"),
        ("generation 1", "twin 1"),
        ("generation 2", "twin 2"),
        ("generation 3", "twin 3"),
        ("confidence-weighted", "twin 1"),
        ("permuted", "twin 1"),
        ("permuted", "generation 1"),
        ("ensemble of generations", "best of generation"),
        ("ensemble of generations", "ensemble of twins"),
        ("exits on labels: exit 2", "exits on labels: exit 3"),
        ("exits self-taught: exit 1", "exits on labels: exit 1"),
        ("exits self-taught: exit 2", "exits on labels: exit 2"),
        ("exits self-taught: exit 3", "exits on labels: exit 3"),
        ("exits self-taught: exit 3", "last exit only: exit 3"),
    ],
    "online": [
        ("longer baseline", "baseline"),
        ("offline student", "baseline"),
        ("online student", "baseline"),
        ("online student", "offline student"),
        ("members of 2 mutual peers", "members of 2 baselines apart"),
        ("members of 4 mutual peers", "members of 4 baselines apart"),
        ("members of 4 mutual peers", "members of 2 mutual peers"),
        ("members of 4 mutual peers", "offline student"),
        ("all of 4 mutual peers", "all of 4 baselines apart"),
        ("all of 4 baselines apart", "members of 4 mutual peers"),
    ],
    "limited_labels": [],
    "constant": [],
    "controls": [],
    "hinton": [],
    "cross_modal": [
        ("image student", "image teacher"),
        ("zero-shot", "image student"),
        ("image student, aligned", "image student"),
        ("text student, aligned", "text student"),
    ],
}


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def percent(x):
    return f"{100 * x:.2f} %"


def paired(experiment):
    """Baseline and distilled accuracy [seeds], the mean gain, its 95 % interval and the wins."""
    runs = experiment["runs"]
    distilled, baseline = (
        np.array([run[kind]["test_accuracy"] for run in runs]) for kind in ("distilled", "baseline")
    )
    return baseline, distilled, *difference(distilled, baseline)


def difference(a, b):
    """The mean difference of paired numbers, its 95 % interval and the wins."""
    found = paired_difference(a, b)
    return found.mean, (found.low, found.high), found.wins


def values(rows, name, key):
    """What the rows of one name hold under a key, in the order of the rows."""
    return [row[key] for row in rows if row["name"] == name]


def in_words(a, b):
    """Of paired accuracies [seeds]: the mean difference a − b and its 95 % interval, in points,
    and the wins."""
    gain, (low, high), wins = difference(a, b)
    gain, low, high = (round(100 * x, 2) + 0.0 for x in (gain, low, high))  # no -0.00
    return f"{gain:+.2f}", f"{low:+.2f} to {high:+.2f}", f"{wins} of {len(a)}"


def accuracies(name, row):
    """The test accuracy of a row in each run of a variant, [seeds]. "best of teacher" stands for
    the best of the rows teacher 1, teacher 2, ...; of a group's row, "members of" stands for the
    mean of its networks, "all of" for the ensemble of them."""
    runs = read(name)["runs"]
    if row.startswith("best of "):
        rows = [r["name"] for r in runs[0]["rows"]]
        numbered = re.compile(row.removeprefix("best of ") + r" \d+")
        return np.max([accuracies(name, x) for x in rows if numbered.fullmatch(x)], axis=0)
    key, group = "test_accuracy", row
    if row.startswith("members of "):
        key, group = "members", row.removeprefix("members of ")
    elif row.startswith("all of "):
        key, group = "ensemble", row.removeprefix("all of ")
    found = [[np.mean(r[key]) for r in run["rows"] if r["name"] == group] for run in runs]
    if not all(found):
        raise SystemExit(f"{name}: there is no row {row!r}")
    return np.array(found)[:, 0] if len(runs) > 1 else np.array(found)[0]


def measured(name):
    """The command and the seeds behind a variant's results."""
    content = read(name)
    seeds = content["seeds"]
    several = f"N = {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"N = {seeds[0]}"
    return f"Measured by `{content['each']}`, {several} ({content['date']})."


def after(first, name):
    """The command behind results of several seeds in one run, which need what another one left."""
    content = read(name)
    seeds = f"Means over {content['config']['seeds']} seeds"
    return f"{seeds}. Measured by `python docs/measure.py {first} {name}` ({content['date']})."


def markdown(header, rows):
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)


# %% Tables


def table_results():
    header = ["data, students' labels", "teacher", "baseline student", "distilled student"]
    header += ["paired gain, points (95 % interval)", "seeds won"]
    rows, commands = [], []
    for name, title in EXPERIMENTS.items():
        experiment = read(name)
        baseline, distilled, gain, (low, high), wins = paired(experiment)
        teacher = experiment["teacher"]["test_accuracy"]
        row = [title, percent(teacher), percent(baseline.mean()), percent(distilled.mean())]
        row.append(f"{100 * gain:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})")
        rows.append([*row, f"{wins} of {len(experiment['seeds'])}"])
        seeds = f"N = {experiment['seeds'][0]} to {experiment['seeds'][-1]}"
        commands.append(f"`{experiment['each']}`, {seeds} ({experiment['date']})")
    return markdown(header, rows) + "\n\nMeasured by " + "; ".join(commands) + "."


def table_seeds():
    """Every seed of every experiment."""
    header = ["", "seed", "baseline", "distilled", "gain, points", "McNemar's p"]
    rows = []
    for name in EXPERIMENTS:
        for run in read(name)["runs"]:
            baseline, distilled = (run[k]["test_accuracy"] for k in ("baseline", "distilled"))
            gain = f"{100 * (distilled - baseline):+.2f}"
            row = [name.replace("_", " "), run["seed"], percent(baseline), percent(distilled)]
            rows.append([*row, gain, f"{run['mcnemar_p']:.1g}"])
    return markdown(header, rows)


def table_tuning():
    header = ["labels", "epochs", "peak learning rate", "baseline", "distilled"]
    tuning = read("tuning")
    cells = tuning["cells"]
    best = {}
    for cell in cells:
        of = cell["labels"], cell["kind"]
        best[of] = max(best.get(of, 0.0), np.mean(cell["accuracy"]))
    rows = {}
    for cell in cells:
        labels = str(cell["labels"]).replace("all", f"all {60_000 - tuning['holdout']:,}")
        settings = labels, cell["epochs"], f"{cell['learning_rate']:g}"
        mean = np.mean(cell["accuracy"])
        bold = mean == best[cell["labels"], cell["kind"]]
        row = rows.setdefault(settings, {})
        row[cell["kind"]] = f"**{percent(mean)}**" if bold else percent(mean)
    rows = [[*settings, row["baseline"], row["distilled"]] for settings, row in rows.items()]
    count = {len(cell["accuracy"]) for cell in cells}
    note = f"Mean accuracy on {tuning['holdout']:,} validation images, "
    note += f"{min(count)} or {max(count)} seeds, T = 3 and alpha = 0.5; the best of each in bold. "
    return markdown(header, rows) + f"\n\n{note}Measured by `{tuning['command']}`."


def table_digits_tuning():
    header = ["batch size", "epochs", "peak learning rate", "baseline", "distilled", "mean"]
    tuning = read("digits_tuning")
    accuracies = {}
    for cell in tuning["cells"]:
        settings = cell["batch_size"], cell["epochs"], cell["learning_rate"]
        accuracies.setdefault(settings, {})[cell["kind"]] = np.mean(cell["accuracy"])
    means = {settings: np.mean(list(both.values())) for settings, both in accuracies.items()}
    best = max(means, key=means.get)
    rows = []
    for settings, both in accuracies.items():
        mean = percent(means[settings])
        if settings == best:
            mean = f"**{mean}**"
        batch_size, epochs, rate = settings
        row = [batch_size, epochs, f"{rate:g}", percent(both["baseline"])]
        rows.append([*row, percent(both["distilled"]), mean])
    seeds = len(tuning["cells"][0]["accuracy"])
    note = f"Mean accuracy of {seeds} seeds on {tuning['holdout']} validation images, "
    note += f"{tuning['cells'][0]['labels']} labels, T = 3 and alpha = 0.5. "
    return markdown(header, rows) + f"\n\n{note}Measured by `{tuning['command']}`."


def table_digits_teachers():
    return table_teachers("digits_teacher_tuning")


def table_teachers(name="teacher_tuning"):
    tuning = read(name)
    rows = [
        [row["epochs"], ", ".join(percent(x) for x in row["teacher"])] for row in tuning["teachers"]
    ]
    note = f"Accuracy on {tuning['holdout']:,} validation images, one figure a seed. "
    note += f"Measured by `{tuning['command']}`."
    return markdown(["epochs of the teacher", "teacher"], rows) + "\n\n" + note


def table_soft_targets():
    header = ["test image", "T", *range(10)]
    rows = []
    for index, logits in read("default")["soft_targets"].items():
        for t in (1, 3):
            probs = special.softmax(np.array(logits) / t)
            cells = [f"**{p:.3f}**" if p == probs.max() else f"{p:.3f}" for p in probs]
            rows.append([f"{index}, a {np.argmax(logits)}", t, *cells])
    return markdown(header, rows)


def with_range(three, digits):
    """A median and, in brackets, the least and the greatest, if there are several."""
    middle, low, high = (f"{x:.{digits}f}" for x in three)
    return middle if three[1] == three[2] else f"{middle} ({low} to {high})"


def spread(numbers, digits):
    return with_range((np.median(numbers), min(numbers), max(numbers)), digits)


def timed(found, more=""):
    """The command behind the times of a machine."""
    return f"Measured by `{found['command']}` on {found['device']} ({found['date']}{more})"


def how_compared(part, name="compare"):
    found = read(name)[part]
    packages = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    rounds = found.get("rounds") or found["repeats"]
    count = f"medians of {rounds} rounds in turns, with the least and the greatest"
    return f"{timed(found, f'; {packages}')}; {count if rounds > 1 else 'one run of each'}"


def table_jobs(name="compare"):
    """Whole jobs: wall seconds, ours against each, and what they reach."""
    jobs, rows = read(name)["jobs"], []
    for who, job in jobs["runs"].items():
        ratio = jobs["ratios"].get(f"ours ÷ {who}")
        row = [who, spread(job["seconds"], 0), with_range(ratio, 2) if ratio else ""]
        row.append(f"{job['peak_memory_gb']:.1f} GB")
        nets = ("teacher", "distilled", "baseline")
        reached = (np.mean([run[net] for run in job["accuracy"]]) for net in nets)
        rows.append([*row, *map(percent, reached)])
    header = ["run", "seconds", "ours ÷ this", "peak memory", *nets]
    note = f"{how_compared('jobs', name)}. The seeds are fixed."
    return markdown(header, rows) + f"\n\n{note}"


def table_steps():
    """Milliseconds a step of each peer, and ours against them."""
    steps, rows = read("compare")["steps"], []
    for case, peers in steps["milliseconds"].items():
        for peer, times in peers.items():
            if peer != "machine":
                ratio = steps["ratios"].get(f"{case} ÷ {peer}")
                ratio = with_range(ratio, 2) if ratio else ""
                rows.append([case, peer, spread(times, 1), ratio])
    note = f"{how_compared('steps')}, also of the quotients within a round. Batch 128."
    header = ["", "", "milliseconds", "ours ÷ this"]
    return markdown(header, rows) + f"\n\n{note}"


def table_steps_elsewhere(name):
    """Ours against its peers on another processor: a row for each kind of step."""
    steps = read(name)["steps"]
    peers = [peer for peer in steps["milliseconds"]["student step"] if peer != "ours"]
    rows = []
    for case, times in steps["milliseconds"].items():
        if "ours" in times:
            ratios = (steps["ratios"].get(f"{case} ÷ {peer}") for peer in peers)
            ratios = [with_range(ratio, 2) if ratio else "" for ratio in ratios]
            rows.append([case, spread(times["ours"], 1), *ratios])
    peak = steps["machine"]["peak_gflops"]
    note = f"A product of two large matrices reaches {peak:.0f} GFLOP/s. "
    header = ["", "ours, milliseconds", *(f"ours ÷ {peer}" for peer in peers)]
    return markdown(header, rows) + f"\n\n{note}{how_compared('steps', name)}."


def table_machine():
    """Ours against what the machine can do."""
    machine, rows = read("compare")["steps"]["machine"], []
    for case, found in machine.items():
        if isinstance(found, dict):
            rows.append([case, f"{found['gflops']:.0f}", f"{100 * found['share']:.0f} %"])
    rows.append(["matrix product, 2,048 × 2,048", f"{machine['peak_gflops']:.0f}", "100 %"])
    header = ["", "GFLOP/s", "share of the matrix product's"]
    bandwidth, megabytes = machine["bandwidth_gb_per_second"], 128 * 28 * 28 * 64 * 4 / 1e6
    note = f"A copy in memory moves {bandwidth:.0f} GB/s, read and written together: to read and "
    note += f"write the {megabytes:.0f} MB that the teacher's first layer makes of a batch takes "
    note += f"{2 * megabytes / bandwidth:.1f} ms. {how_compared('steps')}."
    return markdown(header, rows) + f"\n\n{note}"


def table_parts():
    """Where the seconds of whole runs go."""
    found = read("breakdown")
    names = dict.fromkeys(part for run in found["parts"].values() for part in run)
    rows = [
        [part, *(f"{run[part]:.1f}" if part in run else "" for run in found["parts"].values())]
        for part in sorted(names, key=lambda x: x == "whole")
    ]
    return markdown(["", *found["parts"]], rows) + f"\n\nSeconds. {timed(found)}."


def table_growth(what):
    """A step's milliseconds by batch size, or an epoch's seconds by images."""
    found, rows = read("breakdown"), []
    head, unit, microseconds = {
        "batch_size": ("batch size", "ms a step", 1e3),
        "images": ("images", "s an epoch", 1e6),
    }[what]
    for network, sizes in found[what].items():
        for size, three in sizes.items():
            images = int(size) // 128 * 128 if what == "images" else int(size)  # full batches alone
            an_image = f"{microseconds * three[0] / images:.0f} µs"
            rows.append([network, f"{int(size):,}", with_range(three, 2), an_image])
    note = f"{timed(found)}: medians of several rounds in turns, with the least and the greatest."
    return markdown(["", head, unit, "an image"], rows) + f"\n\n{note}"


def table_in_turns(what):
    """A step's milliseconds and page faults in several cases; the first is what others are to."""
    found, rows = read("breakdown"), []
    for network, cases in found[what].items():
        base = np.array(next(iter(cases.values())))[:, 0]
        for case, measured in cases.items():
            milliseconds, faults = np.array(measured).T
            row = [network, case, spread(milliseconds, 1), f"{np.median(faults):,.0f}"]
            rows.append([*row, spread(milliseconds / base, 2)])
    note = f"{timed(found)}: medians of {len(base)} processes, in turns, with the least and the "
    note += "greatest."
    header = ["", "", "ms a step", "page faults a step", "÷ the first row"]
    return markdown(header, rows) + f"\n\n{note}"


def table_stacked(what):
    """A step of many students in one program against one of script 15's, or whole runs of 16."""
    stacked = read("stacked")
    found = stacked[what]
    note = f"{timed(stacked)}: medians of {{}} in turns, with the least and the greatest"
    if what == "steps":
        single, rows = np.array(found["single"]), []
        for name, each in found.items():
            rows.append([name, spread(each, 1), spread(each / single, 2)])
        header = ["", "ms a student's step", "÷ single"]
        note = note.format(f"{len(single)} rounds")
        return markdown(header, rows) + f"\n\n{note}, also of the quotients within a round."
    single, rows = np.array(found["single"]["whole"]), []
    for name, title in (
        ("single", "16 single runs, scored on one image"),
        ("single_scored", "16 single runs, scored as script 15 does"),
        ("stack", "one run of 16 students, never scored"),
    ):
        whole = np.array(found[name]["whole"])
        *seconds, _ = (f"{np.median(found[name][part]):.1f}" for part in found["single"])
        rows.append([title, *seconds, spread(whole, 1), spread(whole / single, 2)])
    header = ["", *found["single"], "÷ single"]
    return markdown(header, rows) + f"\n\nSeconds. {note.format(f'{len(single)} runs')}."


def table_variant(name):
    """Mean accuracy of each network, and the paired differences."""
    rows = []
    for row in read(name)["runs"][0]["rows"]:
        shown = {row["name"]: 1}
        if members := row.get("members"):
            shown = {f"members of {row['name']}": 1, f"all of {row['name']}": len(members)}
        for title, count in shown.items():
            found = accuracies(name, title)
            spread = f"{percent(found.min())} to {percent(found.max())}"
            rows.append([title, f"{count * row['params']:,}", percent(found.mean()), spread])
    text = markdown(["network", "parameters", "test accuracy, mean", "lowest to highest"], rows)
    rows = []
    for a, b in VARIANTS[name]:
        rows.append([f"{a} − {b}", *in_words(accuracies(name, a), accuracies(name, b))])
    header = ["difference", "points", "95 % interval", "seeds won"]
    return f"{text}\n\n{markdown(header, rows)}\n\n{measured(name)}"


def table_grid(labels):
    """The mean validation accuracy for each temperature and alpha."""
    [run] = read("grid")["runs"]
    grid = run["grids"][labels]
    count = run["validation"]
    accuracy = 1 - np.mean(grid["errors"], 0) / count
    temperatures, alphas = (list(dict.fromkeys(x)) for x in zip(*run["cells"], strict=True))
    header = ["alpha", *(f"T = {t:g}" for t in temperatures)]
    table = dict(zip(map(tuple, run["cells"]), accuracy, strict=True))
    rows = []
    for alpha in alphas:
        cells = [table[t, alpha] for t in temperatures]
        chosen = [[t, alpha] == grid["chosen"] for t in temperatures]
        both = zip(cells, chosen, strict=True)
        rows.append([f"{alpha:g}", *(f"**{percent(x)}**" if c else percent(x) for x, c in both)])
    seeds = len(grid["errors"])
    note = f"{int(labels):,} labels: mean accuracy of {seeds} students on {count:,} validation "
    return markdown(header, rows) + f"\n\n{note}images; the chosen pair in bold."


def table_chosen():
    """The chosen pair, the default and the baseline on test images, for each number of labels."""
    [run] = read("grid")["runs"]
    rows = []
    for labels, grid in run["grids"].items():
        names = [f"{name}, {labels} labels" for name in ("chosen", "default", "baseline")]
        chosen, default, baseline = (accuracies("grid", name) for name in names)
        row = [f"{int(labels):,}", f"T = {grid['chosen'][0]:g}, alpha = {grid['chosen'][1]:g}"]
        row += [percent(x.mean()) for x in (chosen, default, baseline)]
        points, interval, wins = in_words(chosen, default)
        rows.append([*row, f"{points} ({interval})", wins])
    header = ["labels", "chosen on validation images", "chosen", "default (T = 3, alpha = 0.5)"]
    header += ["baseline", "chosen − default, points (95 % interval)", "seeds won"]
    return markdown(header, rows) + "\n\n" + measured("grid")


def table_limited_tuning():
    """For each number of labels and each student: accuracy on validation images over the grid."""
    tuning = read("limited_tuning")
    cells, rates = tuning["cells"], list(dict.fromkeys(c["learning_rate"] for c in tuning["cells"]))
    rows = []
    for labels, kind in dict.fromkeys((cell["labels"], cell["kind"]) for cell in cells):
        own = [c for c in cells if (c["labels"], c["kind"]) == (labels, kind)]
        best = max(np.mean(cell["accuracy"]) for cell in own)
        for epochs in dict.fromkeys(cell["epochs"] for cell in own):
            row = [np.mean(cell["accuracy"]) for cell in own if cell["epochs"] == epochs]
            shown = [f"**{percent(x)}**" if x == best else percent(x) for x in row]
            rows.append([f"{labels:,}", kind, epochs, *shown])
    header = ["labels", "student", "epochs", *(f"peak rate {rate:g}" for rate in rates)]
    counts = {cell["labels"]: len(cell["accuracy"]) for cell in cells}
    seeds = ", ".join(map(str, counts.values()))
    note = f"Mean accuracy of {seeds} seeds on {tuning['holdout']:,} validation "
    note += f"images; the best of each student in bold. Measured by `{tuning['command']}`. For all "
    note += "labels the [first search](knowledge_distillation.md#hyperparameters) serves."
    return markdown(header, rows) + "\n\n" + note


def budgets(name):
    """The kinds of student in the rows "kind, N labels" of a run, and the numbers of labels."""
    rows = [row["name"] for row in read(name)["runs"][0]["rows"]]
    found = [re.fullmatch(r"(\w+), (\d+) labels", row) for row in rows]
    pairs = [(m[1], int(m[2])) for m in found if m]
    return tuple(list(dict.fromkeys(x)) for x in zip(*pairs, strict=True))


def table_limited_labels():
    """Accuracy and gain of each student, for each number of labels."""
    (baseline, *kinds), counts = budgets("limited_labels")
    present = {row["name"] for row in read("limited_labels")["runs"][0]["rows"]}
    rows, header = [], ["labels", baseline]
    for kind in kinds:
        header += [kind, "gain over the baseline, points (95 % interval), seeds won"]
    for count in counts:
        base = accuracies("limited_labels", f"{baseline}, {count} labels")
        rows.append([f"{count:,}", percent(base.mean())])
        for name in (f"{kind}, {count} labels" for kind in kinds):
            if name not in present:
                rows[-1] += ["–", "–"]
                continue
            found = accuracies("limited_labels", name)
            points, interval, wins = in_words(found, base)
            rows[-1] += [percent(found.mean()), f"{points} ({interval}), {wins}"]
    return markdown(header, rows) + "\n\n" + measured("limited_labels")


def table_fidelity():
    """Likeness to the teacher and calibration of each network of script 16."""
    [run] = read("limited_labels")["runs"]
    rows = []
    for name in dict.fromkeys(row["name"] for row in run["rows"]):
        agreement, kl, ece, nll = (
            np.mean(values(run["rows"], name, key)) for key in ("agreement", "kl", "ece", "nll")
        )
        kl = round(kl, 3) + 0.0  # no -0.000
        rows.append([name, percent(agreement), f"{kl:.3f}", percent(ece), f"{nll:.3f}"])
    header = ["network", "same answer as the teacher", "KL to it", "ECE", "NLL"]
    return markdown(header, rows) + "\n\nMeans over the seeds of the table above."


def table_constant():
    """With all labels: a constant rate, a cycle, and the second minus the first, by the seed."""
    pairs, rows = [], []
    names = [f"{kind}, 60000 labels" for kind in ("baseline", "distilled")]
    for name in ("constant", "limited_labels"):
        baseline, distilled = (accuracies(name, row) for row in names)
        content = read(name)
        [run], schedule = content["runs"], content["config"]["schedule"]
        epochs, rates = (
            [values(run["rows"], row, key)[0] for row in names]
            for key in ("epochs", "learning_rate")
        )
        title = f"{schedule}, {' and '.join(f'{x:g}' for x in dict.fromkeys(rates))}"
        title += f", {' and '.join(map(str, dict.fromkeys(epochs)))} epochs"
        points, interval, wins = in_words(distilled, baseline)
        pairs.append((baseline, distilled, distilled - baseline))
        gain = f"{points} ({interval}), {wins}"
        rows.append([title, percent(baseline.mean()), percent(distilled.mean()), gain])
    differences = ["the second minus the first, points"]
    for one, other in zip(*pairs, strict=True):
        points, interval, _ = in_words(other, one)
        differences.append(f"{points} ({interval})")
    header = ["schedule, rate or peak", "baseline", "distilled"]
    header += ["gain, points (95 % interval), seeds won"]
    return f"{markdown(header, [*rows, differences])}\n\n{after('limited_labels', 'constant')}"


def table_controls():
    """Each control against the baseline, and the distilled student against each control."""
    [run] = read("controls")["runs"]
    rows, distilled = [], accuracies("controls", "distilled")
    baseline, same = accuracies("controls", "baseline"), run["alpha_1_is_baseline"]
    for name in dict.fromkeys(row["name"] for row in run["rows"]):
        found, differences = accuracies("controls", name), []
        for a, b in ((found, baseline), (distilled, found)):
            points, interval, wins = in_words(a, b) if len(found) == len(baseline) else [""] * 3
            differences += [f"{points} ({interval}), {wins}"]
        if name == "alpha 1" and all(same):
            differences[0] = f"the same bits, {len(same)} of {len(same)}"
        if "teacher" in name.split()[:2]:
            differences = ["–", "–"]
        hidden = {"baseline": 0, "distilled": 1}.get(name)
        if hidden is not None:
            differences[hidden] = "–"
        shares = (np.mean(values(run["rows"], name, key)) for key in ("agreement", "ece"))
        rows.append([name, percent(found.mean()), *differences, *map(percent, shares)])
    gain = "gain over the baseline, points (95 % interval), seeds won"
    header = ["network", "test accuracy", gain, "distilled minus this"]
    header += ["same answer as the teacher", "ECE"]
    return f"{markdown(header, rows)}\n\n{after('limited_tuning', 'controls')}"


def table_smoothing():
    """The amounts of label smoothing that were tried, and what they came to."""
    [run], rows = read("controls")["runs"], []
    base = np.mean(values(run["rows"], "baseline", "validation_errors"))
    for amount, errors in run["smoothing_errors"].items():
        mean = f"{np.mean(errors):.0f}"
        mean = f"**{mean}**" if float(amount) == run["smoothing"] else mean
        rows.append([amount, mean, ", ".join(map(str, errors))])
    header = ["smoothing", f"errors on {run['validation']:,} validation images, mean", "each seed"]
    note = f"The chosen amount in bold; the baseline has {base:.0f}."
    return f"{markdown(header, rows)}\n\n{note} {after('limited_tuning', 'controls')}"


def of_row(name, row, key):
    """What the row of a name holds under a key, in each run of a variant: [seeds]."""
    found = [values(run["rows"], row, key) for run in read(name)["runs"]]
    return np.array(found)[:, 0]


def table_hinton_tuning():
    """Errors on validation images of the networks of script 25 over their settings."""
    tuning, rows = read("hinton_tuning"), []
    for cell in tuning["cells"]:
        dropout = " and ".join(f"{x:g}" for x in cell["dropout"] or ())
        alpha = "" if cell["alpha"] is None else f"{cell['alpha']:g}"
        settings = [dropout, f"{cell['learning_rate']:g}", cell["epochs"], alpha]
        errors = ", ".join(map(str, cell["errors"]))
        rows.append([cell["kind"], *settings, errors])
    note = f"Errors on {tuning['holdout']:,} validation images, one figure a seed. A student is "
    note += "taught by the large net above it or, of those further down, by the first. "
    note += f"Measured by `{tuning['command']}`."
    header = ["network", "dropout of the large net: inputs and hidden units", "peak rate", "epochs"]
    return f"{markdown([*header, 'alpha', 'errors'], rows)}\n\n{note}"


def table_hinton():
    """Test errors beside those of the paper, with their spread over the seeds."""
    paper = measure.load(measure.HINTON).PAPER
    runs, rows = read("hinton")["runs"], []
    for name in (row["name"] for row in runs[0]["rows"] if "units" not in row["name"]):
        errors, threes = (of_row("hinton", name, x) for x in ("test_errors", "errors_on_threes"))
        row = [name, f"{paper[name]:,}" if name in paper else ""]
        digits = 0 if errors.mean() > 1000 else 1
        row.append(f"{errors.mean():,.{digits}f} ± {errors.std(ddof=1):.{digits}f}")
        row += [f"{errors.min():,} to {errors.max():,}", f"{threes.mean():.1f}"]
        split, _, mended = name.partition(", ")
        key = "best_bias" if "best" in mended else "bias"
        biases = [run[split][key] for run in runs] if mended else []
        row.append(f"{min(biases):+.1f} to {max(biases):+.1f}" if biases else "")
        rows.append(row)
    header = ["network", "errors in the paper", "errors here, mean ± sd", "lowest to highest"]
    header += ["of them on threes, mean", "added to the biases"]
    return f"{markdown(header, rows)}\n\n{measured('hinton')}"


def table_hinton_temperatures():
    """Mean test errors of the smaller networks for each temperature."""
    first, *_ = read("hinton")["runs"]
    found = {}
    for row in first["rows"]:
        if match := re.fullmatch(r"(\d+) units at T = (\S+)", row["name"]):
            errors = of_row("hinton", row["name"], "test_errors")
            found.setdefault(match[1], {})[match[2]] = errors
    rows = []
    for units, by_temperature in found.items():
        cells = [f"{x.mean():.1f} ± {x.std(ddof=1):.1f}" for x in by_temperature.values()]
        rows.append([f"{units} units a layer", *cells])
    header = ["test errors, mean ± sd", *(f"T = {t}" for t in next(iter(found.values())))]
    return f"{markdown(header, rows)}\n\n{measured('hinton')}"


def table_again():
    """What script 16 and the controls found, and what a second run from nothing found."""
    titles = {"limited_labels": "", "constant": "constant rate: ", "controls": "controls: "}
    rows = []
    for name, title in titles.items():
        for row in dict.fromkeys(row["name"] for row in read(name)["runs"][0]["rows"]):
            student, *labels = row.split(", ")
            if student in ("teacher", "weak teacher", "baseline", "alpha 1"):
                continue
            pair = row, ", ".join(["baseline", *labels])
            rows.append([f"{title}{row}"])
            for place in ("", "again/"):
                found = (accuracies(place + name, x) for x in pair)
                rows[-1].append("{} ({})".format(*in_words(*found)))
    again = [read(f"again/{name}") for name in ("limited_tuning", *titles)]
    note = "Gains over the baseline in points, with 95 % intervals. Second run "
    note += f"({again[-1]['date']}): "
    note += ", ".join(f"`{part['command']}` {part['minutes']} minutes" for part in again)
    return markdown(["", "first run", "second run"], rows) + f"\n\n{note}."


def table_temperature():
    """Gradient norms with and without T², and the distances from the limit of high T."""
    [run] = read("temperature")["runs"]
    names = {
        "with_t2_start": "gradient norm, untrained student, with T²",
        "without_t2_start": "the same without T²",
        "with_t2_end": "gradient norm, trained student, with T²",
        "without_t2_end": "the same without T²",
        "from_limit": "distance of the soft targets from their limit",
        "from_matching": "distance of the gradient from logit matching",
    }
    header = ["", *(f"T = {t:g}" for t in run["temperatures"])]
    rows = [[title, *(f"{x:.3g}" for x in run[key])] for key, title in names.items()]
    return markdown(header, rows) + "\n\n" + measured("temperature")


# %% Values, code, output


def value(key):
    """A number in words, such as `default.gain`."""
    name, what = key.split(".", 1)
    if name == "params":
        teacher, student = read("default")["teacher"], read("default")["runs"][0]["distilled"]
        ratio = teacher["params"] / student["params"]
        counts = {"teacher": f"{teacher['params']:,}", "student": f"{student['params']:,}"}
        return (counts | {"ratio": f"{ratio:.1f}"})[what]
    if name == "tuning":
        cells = [c for c in read("tuning")["cells"] if (c["labels"], c["kind"]) == (1000, what)]
        best = max(cells, key=lambda c: np.mean(c["accuracy"]))
        return f"{best['epochs']} epochs and a peak learning rate of {best['learning_rate']:g}"
    if name.removeprefix("avx2/") == "compare":
        part, title = what.split(".", 1)
        return f"{read(name)[part]['ratios'][title][0]:.2f}"
    if name == "stacked":
        steps, runs = read(name)["steps"], read(name)["runs"]
        a, b = {
            "step_ratio_16": (steps["stack of 16"], steps["single"]),
            "step_ratio_16_vectorised": (steps["stack of 16, vectorised"], steps["stack of 16"]),
            "run_ratio_16": (runs["stack"]["whole"], runs["single"]["whole"]),
            "run_ratio_16_scored": (runs["stack"]["whole"], runs["single_scored"]["whole"]),
        }[what]
        return f"{np.median(np.array(a) / b):.2f}"
    if name.removeprefix("before/") in VARIANTS:
        return value_of_variant(name, what)
    experiment = read(name)
    baseline, distilled, gain, (low, high), wins = paired(experiment)
    seconds = [run["seconds"] for run in experiment["runs"]]
    total = seconds[0]["total"]  # of the first run, which trains its teacher itself
    jobs = {"default": "ours, the default run", "all_labels": "ours"}
    if name in jobs:
        total = np.median(read("compare")["jobs"]["runs"][jobs[name]]["seconds"])
    seed = experiment["seeds"][0]
    agreement = {
        kind: np.mean([run[kind]["agreement"] for run in experiment["runs"]])
        for kind in ("distilled", "baseline")
    }
    return {
        "teacher": percent(experiment["teacher"]["test_accuracy"]),
        "baseline": percent(baseline.mean()),
        "distilled": percent(distilled.mean()),
        "gain": f"{100 * gain:+.2f} points",
        "interval": f"{100 * low:+.2f} to {100 * high:+.2f}",
        "wins": f"{wins} of {len(seconds)}",
        "seeds": f"{len(seconds)}",
        "first_run": f"`--seed {seed} --teacher-seed {experiment['config']['teacher_seed']}`",
        "agreement_distilled": percent(agreement["distilled"]),
        "agreement_baseline": percent(agreement["baseline"]),
        "minutes": f"{total / 60:.1f} minutes",
    }[what]


def value_of_variant(name, what):
    """`accuracy(row)`, `gain(row | other)`, `interval(row | other)`, `wins(row | other)`, `minutes`
    (of the first run), `labels_at(student | percent)` (how many labels an accuracy takes), and
    means over the runs of a row's `errors(row)`, of `more_errors(row | than another)` with the
    lowest and the highest, and of what else they report, by the names of its keys, a row's name
    among them:
    `number(key | key)`, `seconds(...)`, `share(...)` and, divided, `ratio(key / key)`."""
    runs = read(name)["runs"]
    kind, argument = re.fullmatch(r"(\w+)(?:\((.*)\))?", what).groups()

    def mean(keys):
        first, *others = (key.strip() for key in keys.split("|"))
        found = []
        for run in runs:
            nodes = [row for row in run["rows"] if row["name"] == first] or [run[first]]
            for node in nodes:  # a row's name stands for each of that name
                for key in others:
                    node = node[int(key) if isinstance(node, list) else key]
                found.append(node)
        return np.mean(found)

    if kind == "minutes":
        return f"{runs[0]['seconds']['total'] / 60:.0f} minutes"
    if kind == "errors":
        found = of_row(name, argument, "test_errors").mean()
        return f"{found:.1f}" if found < 1000 else f"{found:,.0f}"
    if kind == "more_errors":
        a, b = (of_row(name, row.strip(), "test_errors") for row in argument.split("|"))
        return f"{(a - b).mean():.1f} ({(a - b).min()} to {(a - b).max()})"
    if kind == "number":
        return f"{mean(argument):.3g}"
    if kind == "seconds":
        return f"{mean(argument):.0f} seconds"
    if kind == "share":
        return percent(mean(argument))
    if kind == "ratio":
        over, under = argument.split(" / ")
        found = mean(over) / mean(under)
        return f"{found:.1f}" if found < 10 else f"{found:,.0f}"
    if kind == "labels_at":
        student, accuracy = argument.split("|")
        _, counts = budgets(name)
        reached = [accuracies(name, f"{student.strip()}, {n} labels").mean() for n in counts]
        # Between two numbers of labels, along a straight line over their logarithms.
        count = np.exp(np.interp(float(accuracy) / 100, reached, np.log(counts)))
        return f"{float(f'{count:.2g}'):,.0f}"
    rows = [accuracies(name, row.strip()) for row in argument.split("|")]
    if kind == "accuracy":
        return percent(rows[0].mean())
    points, interval, wins = in_words(*rows)
    return {"gain": f"{points} points", "interval": interval, "wins": wins}[kind]


def code(file, name):
    """A top-level function or class of a file, with its decorators."""
    source = (ROOT / file).read_text()
    for node in ast.parse(source).body:
        if getattr(node, "name", None) == name:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            lines = source.splitlines()[first - 1 : node.end_lineno]
            return "```python\n" + "\n".join(lines) + "\n```"
    raise SystemExit(f"{file}: there is no {name}")


def output(name):
    """What the run printed; of many epoch lines in a row the first and last few."""
    whole = read(name)["jobs"]["output"]
    shown = re.sub(r"((?:Epoch.*\n){3})(?:Epoch.*\n){4,}((?:Epoch.*\n){2})", r"\1…\n\2", whole)
    return f"```text\n$ python examples/15_knowledge_distillation.py\n{shown.strip()}\n```"


def config(file):
    """The flags of a script, from the sentences below the fields of its Config."""
    common, own = code("examples/experiment.py", "CommonFlags"), code(file, "Config")
    pattern = r'^ {4}(\w+): [^\n]*? = ([^\n]+)\n {4}"""(.*?)"""'
    rows = []
    for name, default, text in re.findall(pattern, own + "\n" + common, re.MULTILINE | re.DOTALL):
        flag, switch = name.replace("_", "-"), {"True": "on", "False": "off"}.get(default)
        flag = f"--no-{flag}" if default == "True" else f"--{flag}"
        shown = switch or ("" if default == "None" else f"`{default}`")
        rows.append([f"`{flag}`", shown, " ".join(text.split()).replace("<", "&lt;")])
    return markdown(["flag", "default", "meaning"], rows)


def block(kind, argument):
    if kind == "table":
        name, *arguments = argument.split()
        return globals()[f"table_{name}"](*arguments)
    return {"code": code, "output": output, "config": config}[kind](*argument.split())


def render(text):
    """The text with all its marked places filled in."""
    text = re.sub(
        r"(<!-- (table|code|output|config): (.*?) -->\n)(?:.*?\n)??(<!-- end -->)",
        lambda m: f"{m[1]}{block(m[2], m[3])}\n{m[4]}",
        text,
        flags=re.DOTALL,
    )
    return re.sub(
        r"(<!-- value: (.*?) -->).*?(<!-- end -->)", lambda m: m[1] + value(m[2]) + m[3], text
    )


# %% The figure of all pairs


def gains_source():
    """What tells one figure of the pairs from another."""
    return hashlib.sha256(table_seeds().encode()).hexdigest()


def draw_gains():
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, 3), EXPERIMENTS.items(), strict=True):
        experiment = read(name)
        baseline, distilled, gain, (low, high), _ = paired(experiment)
        for pair in zip(100 * baseline, 100 * distilled, strict=True):
            axes.plot([0, 1], pair, "o-", color="tab:blue", alpha=0.7)
        teacher = 100 * experiment["teacher"]["test_accuracy"]
        axes.axhline(teacher, color="gray", linestyle="--", label="teacher")
        axes.set(xticks=[0, 1], xlim=(-0.3, 1.3), xticklabels=["baseline", "distilled"])
        numbers = f"{100 * gain:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f})"
        axes.set_title(f"{title}\n{numbers}", fontsize=9)
        axes.legend()
    figure.axes[0].set_ylabel("test accuracy, %")
    png = io.BytesIO()
    figure.savefig(png, dpi=100, metadata={"Source": gains_source()})
    return png.getvalue()


def main(check=False):
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = path.read_text()
        new = render(old)
        if new != old:
            stale.append(path.name)
            if not check:
                path.write_text(new)
    gains = RESULTS / "gains.png"
    if not gains.exists() or Image.open(gains).info.get("Source") != gains_source():
        stale.append(gains.name)
        if not check:
            gains.write_bytes(draw_gains())
    print(f"{'out of date' if check else 'written'}: {', '.join(stale) or 'nothing'}")
    return bool(stale and check)


if __name__ == "__main__":
    line = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    line.add_argument("--check", action="store_true", help="only say what is out of date")
    sys.exit(main(line.parse_args().check))
