"""Section 3 of the paper: the jitter, the biases, and what each network is shown."""

import dataclasses
import itertools

import numpy as np
import optax
import pytest
import utils
from conftest import EXAMPLES, exhibit, load
from flax import nnx
from render import read

SCRIPT = "25_hinton_2015.py"
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def hinton():
    return load(EXAMPLES / SCRIPT)


# %% Jitter


def shifts(image):
    """All 25 shifts of an image [28, 28, 1] by up to two pixels, by another way."""
    for y, x in itertools.product(range(-2, 3), repeat=2):
        moved = np.roll(image, (y, x), (0, 1))
        moved[: max(0, y)] = 0
        moved[28 + min(0, y) :] = 0
        moved[:, : max(0, x)] = 0
        moved[:, 28 + min(0, x) :] = 0
        yield moved


def jittered_images_are_moved(hinton, u):
    image = RNG.integers(1, 256, (400, 28, 28, 1)).astype(np.uint8)
    before, count = image.copy(), np.zeros(25)
    for old, new in zip(image, hinton.jitter(image, np.random.default_rng(1)), strict=True):
        places = [i for i, moved in enumerate(shifts(old)) if np.array_equal(moved, new)]
        assert len(places) == 1, "one of the 25 shifts, the rest filled with 0"
        count[places] += 1
    assert count.min() > 0, "all 25 of them"
    assert count.max() < 40, "about equally often"
    np.testing.assert_array_equal(image, before)


# %% The constraint on the weights


def units_with_long_weights_are_scaled_down(hinton, u):
    params = {"kernel": RNG.normal(size=(9, 12)).astype(np.float32), "bias": np.ones(12)}
    grads = {"kernel": RNG.normal(size=(9, 12)).astype(np.float32), "bias": -9 * np.ones(12)}
    transform = hinton.constrained(optax.sgd(1.0), 4.0)
    updates, _ = transform.update(grads, transform.init(params), params)
    found = optax.apply_updates(params, updates)
    free = params["kernel"] - grads["kernel"]
    length = np.sqrt((free**2).sum(0))
    assert 0 < (length > 4).sum() < 12, "some are too long, some are not"
    np.testing.assert_allclose(found["kernel"], free * np.minimum(1, 4 / length), atol=1e-5)
    np.testing.assert_allclose(found["bias"], 10, err_msg="biases are free")


# %% Biases


def logits_of(count):
    return RNG.normal(0, 3, (count, 10)).astype(np.float32)


def the_share_of_the_answers_is_the_one_asked_for(hinton, u):
    logits = logits_of(1000)
    for classes, share in (((3,), 0.1), ((7, 8), 0.2), ((3,), 0.5)):
        bias = hinton.bias_for_share(logits, classes, share)
        answers = hinton.add(logits, classes, bias).argmax(-1)
        assert abs(np.isin(answers, classes).mean() - share) < 2e-3


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (jittered_images_are_moved, "padded[chosen, y : y + 28, x : x + 28]",
         "np.roll(image, (y - 2, x - 2), (1, 2))[chosen]"),
        (jittered_images_are_moved, "size=(len(image), 2))",
         "size=(1, 2)).repeat(len(image), 0)"),
        (units_with_long_weights_are_scaled_down,
         "jnp.linalg.norm(moved, axis=0)", "jnp.linalg.norm(moved)"),
        (units_with_long_weights_are_scaled_down, "moved = param + update", "moved = param"),
        (the_share_of_the_answers_is_the_one_asked_for,
         "logits[:, ~among].max(axis=1) - logits[:, among].max(axis=1)",
         "logits[:, ~among].max(axis=1) - logits[:, among].mean(axis=1)"),
        (the_share_of_the_answers_is_the_one_asked_for,
         "np.quantile(margins(logits, classes), share)",
         "-np.quantile(margins(logits, classes), share)"),
    ],
    ids=["wraps around", "one shift for all", "of all units together", "before the update",
         "mean of the classes", "lowered for raised"],
)  # fmt: skip
def test_museum(check, right, wrong):
    exhibit(check, SCRIPT, SCRIPT, right, wrong)


def test_best_bias_is_the_best_of_all(hinton):
    logits, label = logits_of(300), RNG.integers(0, 10, 300)
    logits[np.arange(300), label] += 8
    logits[:, 3] -= 4  # as if threes had been left out
    best = hinton.best_bias(logits, (3,), label)

    def errors(bias):
        return (hinton.add(logits, (3,), bias).argmax(-1) != label).sum()

    assert errors(best) == min(errors(x) for x in np.linspace(-30, 30, 3001))
    assert errors(best) < errors(0)
    for one, wins in ((3, True), (5, False)):  # of one image, too
        bias = hinton.best_bias(logits[:1], (3,), np.array([one]))
        assert (hinton.add(logits[:1], (3,), bias).argmax(-1) == 3) == wins


def test_what_is_added_changes_no_other_class(hinton):
    logits = logits_of(5)
    added = hinton.add(logits, (7, 8), -2.5)
    np.testing.assert_array_equal(added[:, [7, 8]], logits[:, [7, 8]] - np.float32(2.5))
    others = np.delete(np.arange(10), [7, 8])
    np.testing.assert_array_equal(added[:, others], logits[:, others])


# %% Networks


def test_networks_of_the_paper(hinton):
    large, small = (hinton.DenseNet(*how, rngs=nnx.Rngs(0)) for how in ((1200, (0.2, 0.5)), (800,)))
    assert utils.count_params(large) == 785 * 1200 + 1201 * 1200 + 1201 * 10
    assert utils.count_params(small) == 785 * 800 + 801 * 800 + 801 * 10
    image = RNG.random((4, 28, 28, 1)).astype(np.float32)
    a, b = (large(image, train=True) for _ in range(2))
    assert np.abs(a - b).max() > 0.1, "dropout"
    np.testing.assert_array_equal(large(image), large(image))
    np.testing.assert_array_equal(small(image, train=True), small(image, train=True))


def test_what_each_network_is_shown(hinton, digits, monkeypatch, tmp_path):
    """Only the large one sees jittered images, and no digit that is left out is ever shown."""
    data = digits._replace(train=digits.train.take(slice(400)))
    shown, train = {}, hinton.train_dense

    def spy(name, network, recipe, data, split, config, **how):
        seen = shown[name] = []
        batches = utils.batches

        def record(split, *arguments, **tables):
            for batch in batches(split, *arguments, **tables):
                seen.append({k: np.array(v) for k, v in batch.items()})
                yield batch

        with monkeypatch.context() as patch:
            patch.setattr(utils, "batches", record)
            return train(name, network, recipe, data, split, config, **how)

    monkeypatch.setattr(hinton, "train_dense", spy)
    monkeypatch.setattr(utils, "start", lambda config, share: data)
    config = hinton.Config(
        output_dir=str(tmp_path),
        quick=True,
        epochs=1,
        teacher_epochs=1,
        temperatures=(4.0,),
    )
    report = hinton.main(config)
    names = ["large net", "small net", "distilled", "no threes", "only 7s and 8s"]
    assert list(shown) == [*names, "30 units at T = 4"]
    for name, seen in shown.items():
        index, image, label = (
            np.concatenate([b[k] for b in seen]) for k in ("index", "image", "label")
        )
        same = (image == data.train.image[index] / np.float32(255)).all((1, 2, 3))
        assert same.all() == (name != "large net")
        np.testing.assert_array_equal(label, data.train.label[index])
        digits_seen = {"no threes": set(range(10)) - {3}, "only 7s and 8s": {7, 8}}
        assert set(label) == digits_seen.get(name, set(range(10)))
        assert ("teacher_logits" in seen[0]) == (name not in ("large net", "small net"))
    [kept] = (tmp_path / "checkpoints").glob("large_net-*")
    assert kept.exists()
    rows = {row["name"]: row for row in report["results"]}
    for name, mended in (("no threes", "bias of 3 raised"), ("only 7s and 8s", "biases lowered")):
        hindsight = rows[f"{name}, best bias in hindsight"]["test_errors"]
        assert hindsight <= min(rows[name]["test_errors"], rows[f"{name}, {mended}"]["test_errors"])
    assert all(0 <= row["errors_on_threes"] <= row["test_errors"] for row in rows.values())


# %% Results


def test_the_results_are_of_these_settings(hinton):
    """Whoever changes a default has to measure again."""
    found = read("hinton")["config"]
    defaults = dataclasses.asdict(hinton.Config())
    for own in ("data_dir", "output_dir", "seed"):
        found.pop(own, None)
        del defaults[own]
    assert found == defaults


def test_the_search_tried_these_settings(hinton, digits):
    """The large net's and its student's come first; the small net's are the best of those tried."""
    config, search = hinton.Config(), read("hinton_tuning")
    cells = search["cells"]
    assert (search["temperature"], search["max_norm"]) == (config.temperature, config.max_norm)
    large, student, *_ = hinton.plan(config, digits)
    assert cells[0]["dropout"] == [config.input_dropout, config.dropout]
    for cell, recipe in zip(cells, (large, student), strict=False):
        assert (cell["learning_rate"], cell["epochs"]) == (recipe.learning_rate, recipe.epochs)
    assert cells[1]["alpha"] == config.alpha
    small = [cell for cell in cells if cell["kind"] == "small net"]
    best = min(small, key=lambda cell: np.mean(cell["errors"]))
    assert best["learning_rate"] == config.baseline_learning_rate
    assert best["epochs"] == student.epochs
