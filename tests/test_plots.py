"""Figures show what was measured: every seed, mean and interval, and one message in the title."""

import json
import re
import types

import jax
import numpy as np
import plots
import pytest
import tables
import utils
from conftest import EXAMPLES, ROOT, load
from experiment import Run

SCRIPTS = {
    "limited_labels": "16_limited_labels.py",
    "ensemble": "17_ensemble_distillation.py",
    "self": "18_self_distillation.py",
    "online": "19_online_distillation.py",
    "cross_modal": "20_cross_modal_distillation.py",
    "hinton": "25_hinton_2015.py",
    "temperature": "advanced/temperature.py",
}


def labels_of(axes):
    return [text.get_text() for text in axes.get_yticklabels()]


def points_of(axes):
    """The seeds' points, in the order of drawing: lines of a marker without a line between."""
    return [
        np.array(line.get_xydata())
        for line in axes.lines
        if line.get_marker() == "o" and line.get_linestyle() == "None"
    ]


# %% What several scripts share


def test_the_message_of_a_gain():
    def title(*accuracies):
        return plots.title_of_gain("Peers", "students alone", *accuracies)

    assert title([97.5], [97.0]) == "Peers − students alone: +0.50 points (one seed)"
    assert title([97.5, 97.6], [97.0, 97.1]) == "Peers beat students alone by 0.50 points"
    assert title([97.0, 97.1], [97.5, 97.6]) == "Peers are 0.50 points behind students alone"
    assert title([97.5, 97.0], [97.0, 97.4]) == "Peers and students alone: no difference found"
    assert title([97.001, 97.101], [97.0, 97.1]) == "Peers and students alone: no difference found"
    assert title([97.0], [97.0]) == "Peers − students alone: +0.00 points (one seed)"
    assert title([97.0], [97.5]) == "Peers − students alone: −0.50 points (one seed)"


@pytest.mark.parametrize(
    ("accuracies", "other_accuracies", "title"),
    [
        ([97.0], [96.0], "Peers make 25 % fewer errors than loners (one seed)"),
        ([95.0], [96.0], "Peers make 25 % more errors than loners (one seed)"),
        ([97.0, 97.1], [96.0, 96.1], "Peers make 25 % fewer errors than loners"),
        ([97.0, 95.0], [96.0, 95.9], "Peers and loners: no difference found"),
        ([100.0], [100.0], "Peers − loners: +0.00 points (one seed)"),
        ([99.0, 99.1], [100.0, 100.0], "Peers are 0.95 points behind loners"),
    ],
)
def test_the_message_of_errors(accuracies, other_accuracies, title):
    assert plots.title_of_errors("Peers", "loners", accuracies, other_accuracies) == title


def test_gains_are_sorted_and_show_every_seed_and_the_interval():
    accuracies = {
        "teacher": [99.0, 99.5, 99.0],
        "baseline": [90.0, 91.0, 92.0],
        "worse": [89.0, 90.5, 90.0],
        "distilled": [92.0, 92.0, 94.0],
    }
    figure = plots.draw_gains(
        plots.subtract_baseline(accuracies), "A message", colours={"worse": "red"}
    )
    [axes] = figure.axes
    assert figure.get_suptitle() == "A message"
    assert labels_of(axes) == ["teacher", "distilled", "worse"]
    assert list(points_of(axes)[1][:, 0]) == [2.0, 1.0, 2.0]
    gain = utils.paired_difference(accuracies["distilled"], accuracies["baseline"])
    bars = [container[2][0] for container in axes.containers]
    np.testing.assert_allclose(bars[1].get_segments()[0][:, 0], [gain.low, gain.high])
    seeds = [line for line in axes.lines if line.get_marker() == "o"]
    wanted = [plots.COLOURS["teacher"], plots.COLOURS["distilled"], "red"]
    assert [line.get_color() for line in seeds] == wanted


def test_gains_of_one_seed_have_no_interval():
    gains = plots.subtract_baseline({"baseline": [90.0], "distilled": [92.0]})
    [axes] = plots.draw_gains(gains, "A message").axes
    assert not axes.containers
    assert "interval" not in axes.get_xlabel()


@pytest.mark.parametrize("scored_on", ["test", "validation"])
def test_errors_over_the_epochs(digits, scored_on):
    accuracy = f"{scored_on}_accuracy"

    def row(name, accuracies):
        history = [{"epoch": k, accuracy: x} for k, x in enumerate(accuracies, 1)]
        history.insert(1, {"epoch": 1.5})  # not every epoch is scored
        return {"name": name, "history": history, accuracy: accuracies[-1]}

    rows = [row("teacher", [0.9, 0.95]), row("distilled", [0.8, 0.9])]
    rows += [row("baseline", [0.7, 0.8]), row("baseline", [0.6, 1.0])]
    data = digits._replace(scored_on=scored_on)
    [axes] = plots.draw_epochs(rows, data, "A message").axes
    assert axes.get_title() == "A message"
    assert axes.get_ylabel() == f"{scored_on} errors, %"
    assert axes.get_yscale() == "log"
    curves = [line.get_ydata() for line in axes.lines]
    # No error at all is drawn as half of one image of 500.
    wanted = [[5, 5], [20, 10], [30, 20], [40, 0.1]]
    for curve, errors in zip(curves, wanted, strict=True):
        np.testing.assert_allclose(curve, errors)
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["teacher", "distilled", "baseline"]
    alone = plots.draw_epochs(rows[:1], data, "A message").axes[0].lines[0]
    np.testing.assert_allclose(alone.get_ydata(), [10, 5])
    untrained = [{"name": "baseline", "history": [], accuracy: 0.1}]
    [line] = plots.draw_epochs(untrained, data, "A message").axes[0].lines
    np.testing.assert_allclose(line.get_xydata(), [[0, 90]])


@pytest.mark.parametrize("errors", [(1.47, 0.65), (11.0, 9.5), (40.0, 0.6)])
def test_an_axis_of_errors_has_three_numbers(digits, errors):
    """Of one decade and of less, where 1, 2 and 5 would be too few."""
    history = [{"epoch": k, "test_accuracy": 1 - x / 100} for k, x in enumerate(errors, 1)]
    rows = [{"name": "baseline", "history": history, "test_accuracy": 0.9}]
    figure = plots.draw_epochs(rows, digits, "A message")
    figure.canvas.draw()
    [axes] = figure.axes
    low, high = axes.get_ylim()
    assert len([y for y in axes.get_yticks() if low <= y <= high]) >= 3
    assert all(float(x).is_integer() for x in axes.get_xticks())


@pytest.mark.parametrize("classes", [10, 12])
def test_soft_targets_are_shown_of_images_that_the_teacher_has_right_but_is_least_sure_of(
    digits, classes
):
    data = digits._replace(test=digits.test.take(slice(7)))
    sure = np.array([9.0, 1.0, 2.0, 3.0, 4.0, 0.5, 8.0])
    answers = data.test.label.copy()
    answers[5] = (answers[5] + 1) % 10  # the least sure one is wrong
    logits = np.zeros((7, classes), np.float32)
    logits[np.arange(7), answers] = sure
    figure, found = plots.draw_soft_targets(data, logits)
    assert list(found) == [int(data.test.index[i]) for i in (1, 2, 3, 4)]
    pictures, bars = figure.axes[::2], figure.axes[1::2]
    assert len(pictures) == len(bars) == 4
    for axes, i in zip(pictures, (1, 2, 3, 4), strict=True):
        assert axes.get_title() == f"label {data.test.label[i]}"
        np.testing.assert_array_equal(axes.images[0].get_array(), data.test.image[i, :, :, 0])
    assert len(bars[0].get_xticks()) == classes
    for container, temperature in zip(bars[0].containers, (1, 3), strict=True):
        heights = [bar.get_height() for bar in container]
        np.testing.assert_allclose(heights, jax.nn.softmax(logits[1] / temperature), rtol=1e-5)


def test_an_image_that_the_teacher_has_wrong_is_not_shown(digits):
    logits = np.zeros((500, 10), np.float32)
    wrong = (digits.test.label + 1) % 10
    logits[np.arange(500), wrong] = 5.0
    logits[7] = np.eye(10)[digits.test.label[7]]
    figure, found = plots.draw_soft_targets(digits, logits)
    assert list(found) == [int(digits.test.index[7])]
    assert [axes.get_visible() for axes in figure.axes] == [True, True] + 6 * [False]


# %% The figures of scripts, drawn from the committed results


def committed(name, digits, tmp_path):
    """The script of an experiment, a run that has its committed rows, and its config."""
    report = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())
    run = Run(None, digits, tmp_path, started=0.0)
    run.rows = report["results"]
    config = report["runs"][0]["config"]
    return load(EXAMPLES / SCRIPTS[name]), run, types.SimpleNamespace(**config)


def check_gains(figure, gains):
    """Every one of {name: gains} has its points in a figure of gains."""
    [axes] = figure.axes
    points = dict(zip(labels_of(axes), points_of(axes), strict=True))
    assert points.keys() == gains.keys()
    for name, found in points.items():
        np.testing.assert_allclose(found[:, 0], gains[name], atol=1e-9)


def over_the_baseline(accuracies):
    """{name: gains} of {name: accuracies}."""
    baseline = np.array(accuracies["baseline"])
    return {name: np.array(x) - baseline for name, x in accuracies.items() if name != "baseline"}


def names_of(run):
    return dict.fromkeys(row["name"] for row in run.rows)


def test_of_an_ensemble(digits, tmp_path):
    script, run, config = committed("ensemble", digits, tmp_path)
    figure = script.draw(run, config.teachers)
    check_gains(figure, over_the_baseline({name: run.accuracies(name) for name in names_of(run)}))
    gain = run.compare("student, mean probabilities", "student of one teacher")
    found = "no difference found" if " -" in gain else " beat "
    assert figure.get_suptitle().startswith("Students of 4 teachers ")
    assert found in figure.get_suptitle()


def test_of_self_distillation(digits, tmp_path):
    script, run, config = committed("self", digits, tmp_path)
    figure = script.draw(run, config.generations)
    pairs = [(name, twin) for name, twin in script.list_comparisons(3) if "exit" not in name]
    assert ("generation 2", "twin 2") in pairs
    gains = {
        f"{name} − {twin}": np.subtract(run.accuracies(name), run.accuracies(twin))
        for name, twin in pairs
    }
    check_gains(figure, gains)
    gain = utils.paired_difference(run.accuracies("self-distilled"), run.accuracies("twin 1"))
    assert gain.low > 0
    wanted = f"Self-distilled copies beat twins by {gain.mean:.2f} points"
    assert figure.get_suptitle() == wanted
    assert "over the twin in points" in figure.axes[0].get_xlabel()


def test_of_groups(digits, tmp_path):
    script, run, _ = committed("online", digits, tmp_path)
    accuracies = {name: run.accuracies(name) for name in names_of(run)}
    for group in [name for name in accuracies if name[0] in "24"]:
        accuracies[group] = [100 * np.mean(members) for members in run.values(group, "members")]
        accuracies[f"ensemble of {group}"] = 100 * np.array(run.values(group, "ensemble"))
    figure = script.draw(run)
    check_gains(figure, over_the_baseline(accuracies))
    assert figure.get_suptitle().startswith("2 mutual peers beat 2 baselines apart by ")
    [axes] = figure.axes
    seeds = [line for line in axes.lines if line.get_marker() == "o"]
    colours = {x: line.get_color() for x, line in zip(labels_of(axes), seeds, strict=True)}
    for name, kind in (
        ("online teacher", "teacher"), ("offline student", "distilled"),
        ("2 mutual peers", "distilled"), ("longer baseline", "baseline"),
        ("ensemble of 2 baselines apart", "baseline"),
    ):  # fmt: skip
        assert colours[name] == plots.COLOURS[kind], name


def test_of_few_labels(digits, tmp_path):
    script, run, _ = committed("limited_labels", digits, tmp_path)
    counts = tables.counts()
    figure = script.draw(run, counts)
    [axes] = figure.axes
    kinds = [text.get_text() for text in axes.get_legend().get_texts()]
    assert kinds == ["baseline", "distilled", "transfer", "teacher"]
    [means] = [line for line in axes.lines if line.get_label() == "distilled"]
    wanted = [100 - np.mean(run.accuracies(f"distilled, {x} labels")) for x in counts]
    np.testing.assert_allclose(means.get_xydata(), np.transpose([counts, wanted]))
    assert sum(map(len, points_of(axes))) == len(run.rows) - 1
    words = []
    for count in (counts[0], counts[-1]):
        accuracies = [run.accuracies(f"{kind}, {count} labels") for kind in kinds[:2]]
        gain = utils.paired_difference(*reversed(accuracies))
        found = tables.points(gain.mean) + " points"
        if gain.low <= 0 <= gain.high:
            found = "no difference found"
        words.append(f"{found} with {count:,} labels")
    assert axes.get_title() == f"Distillation: {', '.join(words)}"
    run.rows = [row for row in run.rows if row["seed"] in (3, 80)]
    title = script.draw(run, counts[1:2]).axes[0].get_title()
    [distilled] = run.accuracies(f"distilled, {counts[1]} labels")
    [baseline] = run.accuracies(f"baseline, {counts[1]} labels")
    gain = tables.points(distilled - baseline)
    assert title == f"Distillation: {gain} points with {counts[1]:,} labels (one seed)"


def test_of_few_labels_that_do_harm(digits, tmp_path):
    script, run, _ = committed("limited_labels", digits, tmp_path)
    for row in run.rows:
        row["name"] = row["name"].replace("baseline", "x").replace("distilled", "baseline")
        row["name"] = row["name"].replace("x", "distilled")
    behind = script.draw(run, [1000, 250]).axes[0].get_title()
    assert re.fullmatch(
        r"Distillation: −4\S+ points with 250 labels, −1\S+ .* with 1,000 .*", behind
    )
    for row in run.rows:  # as accurate as each other, but for chance
        if row["name"] == "baseline, 250 labels":
            row["test_accuracy"] = 0.95 + 0.001 * (row["seed"] % 2)
        if row["name"] == "distilled, 250 labels":
            row["test_accuracy"] = 0.9505
    neither = script.draw(run, [250]).axes[0].get_title()
    assert neither == "Distillation: no difference found with 250 labels"


def test_of_a_grid(digits):
    grid = load(EXAMPLES / "advanced" / "knowledge_distillation.py")
    cells = [(1.0, 0.5), (1.0, 1.0), (3.0, 0.5), (3.0, 1.0)]
    grids = {
        "1000": {"chosen": [3.0, 0.5], "errors": [[10, 20, 5, 20], [10, 20, 15, 20]]},
        "all": {"chosen": [1.0, 1.0], "errors": [[0, 0, 0, 0]]},
    }
    figure = grid.draw(grids, cells, digits)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "1,000 labels: T = 3 and alpha = 0.5 are chosen",
        "all labels: T = 1 and alpha = 1 are chosen",
    ]
    found = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    # x is T, y is alpha; of 500 images 10 on average are wrong.
    assert found == {(0, 0): "98.00", (0, 1): "96.00", (1, 0): "98.00", (1, 1): "96.00"}
    [frame] = figure.axes[0].patches
    assert frame.get_xy() == (0.5, -0.5)


def test_of_wrong_captions(digits, tmp_path):
    script, run, _ = committed("cross_modal", digits, tmp_path)
    names = [name for name in names_of(run) if name.startswith("image student, noise ")]
    config = types.SimpleNamespace(noise=[0.0, *(float(name.split()[-1]) for name in names)])
    [axes] = script.draw(run, config).axes
    for kind in ("image", "text"):
        [means] = [line for line in axes.lines if line.get_label() == f"{kind} student"]
        first, last = means.get_xydata()[[0, -1]]
        errors = np.maximum(100 - np.array(run.accuracies(f"{kind} student")), 0.1)  # of 500
        np.testing.assert_allclose(first, [0, errors.mean()])
        accuracies = run.accuracies(f"{kind} student, noise {config.noise[-1]}")
        np.testing.assert_allclose(last, [100 * config.noise[-1], 100 - np.mean(accuracies)])
    borne = 100 - np.mean(run.accuracies("image student, noise 0.6"))
    title = f"With 60 % wrong captions image students make {borne:.1f} % errors"
    assert axes.get_title() == title
    for row in run.rows:
        row["test_accuracy"] = 0.5
    title = script.draw(run, config).axes[0].get_title()
    assert title.startswith("Image students make more than 10 % errors")


def test_of_the_nets_of_2015(digits, tmp_path):
    script, run, _ = committed("hinton", digits, tmp_path)
    figure = script.draw(run)
    [axes] = figure.axes
    names = [name for name in names_of(run) if "units" not in name]
    assert set(labels_of(axes)) == set(names)
    for name, points in zip(labels_of(axes), points_of(axes), strict=True):
        np.testing.assert_allclose(points[:, 0], 100 - np.array(run.accuracies(name)))
    [paper] = [line for line in axes.lines if line.get_label() == "the paper, on MNIST"]
    found = {labels_of(axes)[int(y)]: 100 * x for x, y in paper.get_xydata()}
    assert found == pytest.approx(script.PAPER)
    assert figure.get_suptitle().startswith("Distilled nets beat small nets by ")


def test_of_the_gradients(digits, tmp_path):
    script, run, config = committed("temperature", digits, tmp_path)
    [axes] = script.draw(run, config.temperatures).axes
    for factor in ("with", "without"):
        [line] = [x for x in axes.lines if x.get_label() == f"{factor} T², untrained student"]
        wanted = np.mean(run.values("baseline", f"{factor}_t2_start"), axis=0)
        np.testing.assert_allclose(line.get_xydata(), np.transpose([config.temperatures, wanted]))
    for moment, words in (("start", "an untrained student"), ("end", "a trained one")):
        norms = np.mean(run.values("baseline", f"with_t2_{moment}"), axis=0)
        change = norms.max() / norms.min()
        [shown] = re.findall(rf"of ([\d.,]+) for {words}", axes.get_title())
        assert float(shown.replace(",", "")) == pytest.approx(change, rel=0.05)
