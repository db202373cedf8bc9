"""Fills the marked places in README.md and docs/*.md from docs/results/*.json and the scripts.

    python docs/render.py            # write
    python docs/render.py --check    # only say what is out of date, exit status 1

A block stands between `<!-- table: results -->` (or `code: FILE NAME`, `config: FILE`,
`output: speed`) and `<!-- end -->`; a number in a sentence between
`<!-- value: default.gain -->` and `<!-- end -->`.
"""

import ast
import hashlib
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from scipy import special, stats

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
EXPERIMENTS = {
    "default": "MNIST, 1,000 labels (default settings)",
    "all_labels": "MNIST, all 60,000 labels",
    "digits": "embedded digits, 300 labels (no network)",
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
    gain = distilled - baseline
    half = stats.t.ppf(0.975, len(gain) - 1) * stats.sem(gain)
    wins = [run["distilled"]["test_errors"] < run["baseline"]["test_errors"] for run in runs]
    return baseline, distilled, gain.mean(), (gain.mean() - half, gain.mean() + half), sum(wins)


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
    best = {
        (cell["labels"], kind): max(
            np.mean(c[kind]) for c in cells if c["labels"] == cell["labels"]
        )
        for cell in cells
        for kind in ("baseline", "distilled")
    }
    rows = []
    for cell in cells:
        labels = cell["labels"].replace("all", f"all {60_000 - tuning['holdout']:,}")
        row = [labels, cell["epochs"], f"{cell['learning_rate']:g}"]
        for kind in ("baseline", "distilled"):
            mean, bold = np.mean(cell[kind]), best[cell["labels"], kind]
            row.append(f"**{percent(mean)}**" if mean == bold else percent(mean))
        rows.append(row)
    count = {len(cell["baseline"]) for cell in cells}
    note = f"Mean accuracy on {tuning['holdout']:,} validation images, "
    note += f"{min(count)} or {max(count)} seeds, T = 3 and alpha = 0.5; the best of each in bold. "
    return markdown(header, rows) + f"\n\n{note}Measured by `{tuning['command']}`."


def table_teachers():
    tuning = read("tuning")
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


def table_speed():
    speed = read("speed")
    header = ["run", "seconds", "÷ the plain loop"]
    plain = speed["seconds"]["plain"]
    names = {"plain": "the plain loop, all labels", "default": "ours, the default run"}
    names["all_labels"] = "ours, `--labels all`"
    rows = [
        [title, f"{speed['seconds'][key]:.0f}", f"{speed['seconds'][key] / plain:.3f}"]
        for key, title in names.items()
    ]
    note = f"Measured by `{speed['command']}` on {speed['device']} ({speed['date']}); "
    note += f"of the plain loop: {speed['plain_loop']}."
    return markdown(header, rows) + "\n\n" + note


# %% Values, code, output


def value(key):
    """A number in words, such as `default.gain`."""
    name, what = key.split(".")
    if name == "params":
        teacher, student = read("default")["teacher"], read("default")["runs"][0]["distilled"]
        ratio = teacher["params"] / student["params"]
        counts = {"teacher": f"{teacher['params']:,}", "student": f"{student['params']:,}"}
        return (counts | {"ratio": f"{ratio:.1f}"})[what]
    if name == "tuning":
        cells = [c for c in read("tuning")["cells"] if c["labels"] == "1000"]
        best = max(cells, key=lambda c: np.mean(c[what]))
        return f"{best['epochs']} epochs and a peak learning rate of {best['learning_rate']:g}"
    if name == "speed":
        seconds = read("speed")["seconds"]
        return f"{seconds[what] / seconds['plain']:.3f}"
    experiment = read(name)
    baseline, distilled, gain, (low, high), wins = paired(experiment)
    seconds = [run["seconds"] for run in experiment["runs"]]
    total = seconds[0]["total"]  # of the first run, which trains its teacher itself
    if name in ("default", "all_labels"):
        total = read("speed")["seconds"][name]
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
    shown = re.sub(
        r"((?:Epoch.*\n){3})(?:Epoch.*\n){4,}((?:Epoch.*\n){2})", r"\1…\n\2", read(name)["output"]
    )
    return f"```text\n$ python examples/15_knowledge_distillation.py\n{shown.strip()}\n```"


def config(file):
    """The flags of a script, from the comments of its Config."""
    body = code(file, "Config")
    found = re.findall(r"^ {4}(\w+): .*? = (.+?)  # (.*)$", body, re.MULTILINE)
    rows = []
    for name, default, text in found:
        flag, switch = name.replace("_", "-"), {"True": "on", "False": "off"}.get(default)
        flag = f"`--{flag}`, `--no-{flag}`" if switch else f"`--{flag}`"
        rows.append([flag, switch or ("" if default == "None" else f"`{default}`"), text])
    return markdown(["flag", "default", "meaning"], rows)


def block(kind, argument):
    if kind == "table":
        return globals()[f"table_{argument}"]()
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
    sys.exit(main("--check" in sys.argv[1:]))
