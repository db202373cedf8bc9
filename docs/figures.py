"""Draws the README's picture, docs/results/gains.png, from the results of the headline table.

python docs/figures.py
"""

import hashlib
import io

import tables
from experiment import write_whole
from matplotlib.figure import Figure
from plots import COLOURS, WIDTH, draw_row


def fingerprint_of_results():
    """A checksum of the headline table and of its pairs. It is saved in the picture, so that a test
    can tell when the picture is older than the results."""
    drawn = [tables.headline()]
    for name in tables.HEADLINE:
        drawn += [tables.accuracies(name, x).tolist() for x in tables.headline_pair(name)]
    return hashlib.sha256(repr(drawn).encode()).hexdigest()


def draw_headline():
    """Every pair of students a point; the mean and its 95 % interval on top."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    for y, name in enumerate(tables.HEADLINE):
        distilled, baseline = tables.headline_pair(name)
        gains = tables.accuracies(name, distilled) - tables.accuracies(name, baseline)
        gain = tables.headline_gain(name)
        draw_row(axes, y, gains, gain, COLOURS["distilled"])
        text = f"{tables.points(gain.mean)} points"
        axes.annotate(text, (gain.mean, y), (4, 9), textcoords="offset points")
    axes.axvline(0, color=COLOURS["baseline"], zorder=0)
    axes.annotate("without a teacher", (0.05, -0.55), color=COLOURS["baseline"])
    titles = list(tables.HEADLINE.values())
    axes.set(yticks=range(len(titles)), yticklabels=titles, ylim=(len(titles) - 0.5, -0.9))
    axes.set_xlabel(
        "gain over the baseline in points of accuracy\n(dots: pairs; black: mean and 95 % interval)"
    )
    figure.suptitle("Distillation pays where the baseline is behind its teacher", fontsize="large")
    png = io.BytesIO()
    figure.savefig(png, dpi=150, metadata={"Source": fingerprint_of_results()})
    write_whole(tables.RESULTS / "gains.png", png.getvalue())


if __name__ == "__main__":
    draw_headline()
