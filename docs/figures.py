"""Draws the README's picture, docs/results/gains.png, from the results of the headline table.

python docs/figures.py
"""

import hashlib
import io

import numpy as np
import tables
from experiment import write_whole
from matplotlib.figure import Figure
from plots import COLOURS


def source():
    """What tells one picture from another."""
    return hashlib.sha256(tables.headline().encode()).hexdigest()


def draw_gains():
    """Every pair of students a point; the mean and its 95 % interval over the teachers on top."""
    figure = Figure(figsize=(7.5, 2.8), layout="constrained")
    axes = figure.subplots()
    titles = list(tables.HEADLINE.values())
    for y, name in enumerate(tables.HEADLINE):
        each = tables.accuracies(name, "distilled") - tables.accuracies(name, "baseline")
        gain = tables.gain_over_teachers(name)
        axes.plot(each, np.full(len(each), y), "o", color=COLOURS["distilled"], alpha=0.35)
        interval = [[gain.mean - gain.low], [gain.high - gain.mean]]
        axes.errorbar(gain.mean, y, xerr=interval, fmt="ko", capsize=4)
        text = f"{tables.points(gain.mean)} points"
        axes.annotate(text, (gain.mean, y), (4, 9), textcoords="offset points")
    axes.axvline(0, color=COLOURS["baseline"], zorder=0)
    axes.annotate("without a teacher", (0.05, -0.45), color=COLOURS["baseline"])
    axes.set(yticks=range(len(titles)), yticklabels=titles, ylim=(len(titles) - 0.5, -0.7))
    axes.set(xlabel="gain over the baseline, points of test accuracy")
    axes.set_title("Distillation pays where labels are few", loc="left")
    png = io.BytesIO()
    figure.savefig(png, dpi=150, metadata={"Source": source()})
    write_whole(tables.RESULTS / "gains.png", png.getvalue())


if __name__ == "__main__":
    draw_gains()
