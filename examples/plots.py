"""Figures that several scripts share, and the project's colours."""

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import (
    AutoLocator,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    StrMethodFormatter,
)
from utils import paired_difference

WIDTH = 7.5  # of every figure, in inches: on a page of 700 pixels its letters are as large as text

# The same colour means the same network in every figure.
COLOURS = {"teacher": "0.45", "baseline": "tab:orange", "distilled": "tab:blue"}


def colour_of(name):
    """The colour of a network's name, such as "baseline, 100 labels". A name that is no teacher's
    and no baseline's has the colour of what is distilled."""
    for kind, colour in COLOURS.items():
        if name.startswith(kind):
            return colour
    return COLOURS["distilled"]


def find_difference(accuracies, other_accuracies):
    """The mean difference in points of accuracies in percent, paired by seed. None if 0 lies in its
    95 % interval, or if it rounds to 0.00. Of one seed it is the difference itself."""
    if len(accuracies) == 1:
        return accuracies[0] - other_accuracies[0]
    gain = paired_difference(accuracies, other_accuracies)
    if f"{abs(gain.mean):.2f}" == "0.00" or gain.low <= 0 <= gain.high:
        return None
    return gain.mean


def signed_points(difference):
    """A difference of accuracies in words: "+1.50 points"."""
    return f"{round(difference, 2) + 0.0:+.2f} points".replace("-", "−")  # no -0.00


def title_of_gain(names, others, accuracies, other_accuracies):
    """A figure's message: how much more accurate some networks are than others.

    Args:
      names, others: nouns in the plural, such as "Peers" and "students alone".
      accuracies, other_accuracies: of both, in percent, paired by seed.
    """
    difference = find_difference(accuracies, other_accuracies)
    if difference is None:
        return f"{names} and {others}: no difference found"
    if len(accuracies) == 1:
        return f"{names} − {others}: {signed_points(difference)} (one seed)"
    points = f"{abs(difference):.2f} points"
    if difference > 0:
        return f"{names} beat {others} by {points}"
    return f"{names} are {points} behind {others}"


def title_of_errors(names, others, accuracies, other_accuracies):
    """A figure's message, as `title_of_gain` has it, of errors: how many times fewer."""
    errors, other_errors = (100 - np.mean(x) for x in (accuracies, other_accuracies))
    if other_errors == 0 or find_difference(accuracies, other_accuracies) is None:
        return title_of_gain(names, others, accuracies, other_accuracies)
    change = 100 * (errors / other_errors - 1)  # in percent
    seed = " (one seed)" if len(accuracies) == 1 else ""
    words = f"{abs(change):.0f} % {'fewer' if change < 0 else 'more'} errors"
    return f"{names} make {words} than {others}{seed}"


def draw_row(axes, y, values, mean, colour):
    """A row of a figure, at height y: the seeds' values as points, the mean and its interval in
    black. `mean` is what `paired_difference` returned, or None without an interval."""
    axes.plot(values, np.full(len(values), y), "o", color=colour, alpha=0.5)
    if mean is not None:
        interval = [[mean.mean - mean.low], [mean.high - mean.mean]]
        axes.errorbar(mean.mean, y, xerr=interval, fmt="k|", markersize=10, capsize=3)


def subtract_baseline(accuracies):
    """The gains over the baseline, from {name: accuracies of several seeds} with the baseline's
    among them: {name: a gain for each seed}, without the baseline."""
    gains = {}
    for name in accuracies:
        if name != "baseline":
            gains[name] = np.subtract(accuracies[name], accuracies["baseline"])
    return gains


def draw_gains(gains, title, over="baseline", colours=None, over_colour=COLOURS["baseline"]):
    """Paired gains, the largest on top: every seed as a point, the mean and its 95 % interval.

    Args:
      gains: {name: gains of several seeds, in points of accuracy}.
      title: the figure's message.
      over: what the gains are over, the figure's zero.
      colours: {name: colour} of those that `colour_of` does not know.
      over_colour: the colour of the zero.
    """
    names = sorted(gains, key=lambda name: -np.mean(gains[name]))
    several = len(gains[names[0]]) > 1  # seeds

    figure = Figure(figsize=(WIDTH, 1.3 + 0.34 * len(names)), layout="constrained")
    axes = figure.subplots()
    for y, name in enumerate(names):
        colour = (colours or {}).get(name, colour_of(name))
        mean = paired_difference(gains[name], np.zeros(len(gains[name]))) if several else None
        draw_row(axes, y, gains[name], mean, colour)
    axes.axvline(0, color=over_colour, zorder=0)
    axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    black = "; black: mean and 95 % interval" if several else ""
    axes.set_xlabel(f"gain over the {over} in points of accuracy\n(dots: seeds{black})")
    figure.suptitle(title, fontsize="large")
    return figure


def to_errors(accuracies, data):
    """Errors in percent, for a logarithmic axis, from accuracies in percent. No error at all has no
    place there: it is drawn as half of one."""
    return np.maximum(100 - np.asarray(accuracies), 50 / len(data.test.label))


def draw_epochs(rows, data, title):
    """Errors in percent over the epochs, a line for every seed of every network. A teacher that is
    not alone is a dashed line at its last value. Returns the figure."""
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    axes = figure.subplots()
    key = f"{data.scored_on}_accuracy"
    alone = {row["name"] for row in rows} == {"teacher"}
    labelled = set()  # a name stands in the legend once
    for row in rows:
        name, colour = row["name"], colour_of(row["name"])
        label = None if name in labelled else name
        labelled.add(name)
        if name == "teacher" and not alone:
            axes.axhline(to_errors(100 * row[key], data), color=colour, linestyle="--", label=label)
            continue
        scored = [record for record in row["history"] if key in record]
        if not scored:  # untrained
            scored = [{"epoch": 0, key: row[key]}]
        epochs = [record["epoch"] for record in scored]
        errors = to_errors([100 * record[key] for record in scored], data)
        axes.plot(epochs, errors, ".-", color=colour, label=label)
    axes.set(xlabel="epoch", ylabel=f"{data.scored_on} errors, %", yscale="log", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    write_out_numbers(axes.yaxis)
    axes.legend()
    return figure


def write_out_numbers(axis):
    """On a logarithmic axis of few decades: 0.5, 1, 2, 5 in place of powers of ten."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else AutoLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw_soft_targets(data, logits):
    """Four images of which the teacher is right but least sure, and its soft targets for them from
    its logits [N, C]. Returns the figure, and {index of image: its logits} of those shown."""
    split, classes = data.test, np.arange(logits.shape[-1])
    right = logits.argmax(-1) == split.label
    confidence = jax.nn.softmax(logits).max(-1)
    unsure = np.argsort(np.where(right, confidence, np.inf))[: min(4, right.sum())]
    top = float(jax.nn.softmax(logits[unsure]).max(initial=0.5))  # the largest bar
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    panels = figure.subplots(2, 4, width_ratios=(2, 3, 2, 3)).reshape(4, 2)
    for (picture, bars), i in zip(panels, unsure, strict=False):
        picture.imshow(split.image[i, :, :, 0], cmap="gray_r")
        picture.set(title=f"label {split.label[i]}", xticks=[], yticks=[])
        picture.set_xlabel(f"{data.scored_on} image {split.index[i]}", fontsize="small")
        for t, shift, grey in ((1, -0.2, "0.3"), (3, 0.2, "0.7")):  # the teacher's colour, twice
            soft_targets = jax.nn.softmax(logits[i] / t)
            bars.bar(classes + shift, soft_targets, 0.4, color=grey, label=f"T = {t}")
        some = classes[:: 1 + (len(classes) - 1) // 12]  # of the numbers below the bars
        bars.set(xticks=some, ylim=(0, 1.3 * top), title="teacher's probabilities")
        bars.tick_params(labelsize="small")
        bars.legend(fontsize="small")
    for axes in panels[len(unsure) :].flat:
        axes.set_visible(False)
    figure.suptitle("Soft targets say what else the teacher sees in an image", fontsize="large")
    return figure, {int(split.index[i]): logits[i].tolist() for i in unsure}
