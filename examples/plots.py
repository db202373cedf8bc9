"""Figures that several scripts share, and the project's colours."""

import jax
import numpy as np
from matplotlib.figure import Figure
from utils import paired_difference

# The same colour means the same network in every figure.
COLOURS = {"teacher": "0.45", "baseline": "tab:orange", "distilled": "tab:blue"}


def colour_of(name):
    """The colour of a network's name, such as "baseline, 100 labels"; None if it has none."""
    return COLOURS.get(name.split(",")[0])


def draw_run(rows, data, teacher_logits=None):
    """The figure of a run: curves, and below them the teacher's soft targets, if its logits [N, C]
    on data.test are given. Returns the figure, and {index of image: its logits} of those shown."""
    if teacher_logits is None:
        figure = Figure(figsize=(12, 5), layout="constrained")
        draw_curves(figure, rows, data)
        return figure, {}
    figure = Figure(figsize=(12, 11), layout="constrained")
    upper, lower = figure.subfigures(2, height_ratios=(2, 3))
    draw_curves(upper, rows, data)
    return figure, draw_soft_targets(lower, data, teacher_logits)


def draw_curves(figure, rows, data):
    """Losses over the epochs, hard and soft apart, and accuracies, of every seed; the teacher's
    accuracy as a line, unless it is alone."""
    losses, accuracies = figure.subplots(1, 2)
    key = f"{data.scored_on}_accuracy"
    alone = {row["name"] for row in rows} == {"teacher"}
    labelled = set()  # a name stands in the legend once
    for row in rows:
        name, colour = row["name"], colour_of(row["name"])
        if name == "teacher" and not alone:
            accuracies.axhline(row[key], color=colour, linestyle="--", label="teacher")
            continue
        history = row["history"]
        first = name not in labelled
        labelled.add(name)
        epochs = [record["epoch"] for record in history]
        parts = ("hard_loss", "soft_loss") if name == "distilled" else ("loss",)
        for part, style in zip(parts, ("-", ":"), strict=False):
            values = [record[part] for record in history]
            label = f"{name}, {part.replace('_', ' ')}" if first and epochs else None
            losses.plot(epochs, values, style, color=colour, label=label)
        scored = [record for record in history if key in record]
        points = [record["epoch"] for record in scored], [record[key] for record in scored]
        accuracies.plot(*points, ".-", color=colour, label=name if first else None)
    losses.set(xlabel="epoch", ylabel="training loss", yscale="log")
    accuracies.set(xlabel="epoch", ylabel=key.replace("_", " "))
    for axes in (losses, accuracies):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()


def draw_soft_targets(figure, data, logits):
    """Four images of which the teacher is right but least sure, and its soft targets for them from
    its logits [N, C]. Returns {index of image: its logits}."""
    split, classes = data.test, np.arange(logits.shape[-1])
    right = logits.argmax(-1) == split.label
    unsure = np.argsort(np.where(right, jax.nn.softmax(logits).max(-1), 2))[:4]
    for (picture, bars), i in zip(figure.subplots(2, 4).T, unsure, strict=False):
        picture.imshow(split.image[i, :, :, 0], cmap="gray_r")
        title = f"{data.scored_on} image {split.index[i]}, a {split.label[i]}"
        picture.set(title=title, xticks=[], yticks=[])
        for t, shift, grey in ((1, -0.2, "0.3"), (3, 0.2, "0.7")):  # the teacher's colour, twice
            soft_targets = jax.nn.softmax(logits[i] / t)
            bars.bar(classes + shift, soft_targets, 0.4, color=grey, label=f"T = {t}")
        bars.set(xticks=classes, ylim=(0, 1), ylabel="teacher's probability")
        bars.legend()
    return {int(split.index[i]): logits[i].tolist() for i in unsure}


def draw_gains(accuracies, baseline="baseline"):
    """The gains over a baseline, from {name: accuracies in percent of several seeds}: every seed as
    a point, the mean and its 95 % interval on top."""
    names = [name for name in accuracies if name != baseline]
    figure = Figure(figsize=(10, 1 + 0.45 * len(names)), layout="constrained")
    axes = figure.subplots()
    for y, name in enumerate(names):
        gain = paired_difference(accuracies[name], accuracies[baseline])
        each = np.subtract(accuracies[name], accuracies[baseline])
        axes.plot(each, [y] * len(each), "o", color="0.7")
        interval = [[gain.mean - gain.low], [gain.high - gain.mean]]
        axes.errorbar(gain.mean, y, xerr=interval, fmt="ko", capsize=4)
    axes.axvline(0, color="gray", linestyle="--")
    axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    axes.set(xlabel=f"gain over the {baseline}, points (grey: seeds; bars: 95 % intervals)")
    return figure
