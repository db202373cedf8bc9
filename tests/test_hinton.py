"""Section 3 of the paper: the shifts, the biases, and what each network is shown."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import optax
import pytest
import utils
from conftest import EXAMPLES, ROOT, exhibit, load, make_run, watch
from experiment import Recipe, fingerprint
from flax import nnx
from tables import read

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


def jittered_images_are_moved(hinton):
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


def units_with_long_weights_are_scaled_down(hinton):
    params = {"kernel": RNG.normal(size=(9, 12)).astype(np.float32), "bias": np.ones(12)}
    grads = {"kernel": RNG.normal(size=(9, 12)).astype(np.float32), "bias": -9 * np.ones(12)}
    transform = hinton.constrain_weights(optax.sgd(1.0), 4.0)
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


def answers_with(logits, classes, bias):
    """The answers [N] once a bias is added to the logits [N, C] of some classes."""
    changed = logits.astype(np.float64)
    changed[:, list(classes)] += bias
    return changed.argmax(-1)


def the_share_of_the_answers_is_the_one_asked_for(hinton):
    logits = logits_of(1000)
    for classes, share in (((3,), 0.1), ((7, 8), 0.2), ((3,), 0.5)):
        bias = hinton.find_bias_for_share(logits, classes, share)
        answers = answers_with(logits, classes, bias)
        assert abs(np.isin(answers, classes).mean() - share) < 2e-3


def the_best_bias_is_the_best_of_all(hinton):
    for classes in ((3,), (7, 8)):
        logits, label = logits_of(300), RNG.integers(0, 10, 300)
        logits[np.arange(300), label] += 8
        logits[:, classes] -= 4  # as if they had been left out
        logits[:, 7] = logits[:, 8] + np.where(label == 7, 0.02, -0.02)  # hardly told apart
        best = hinton.find_best_bias(logits, classes, label)

        def errors(bias, logits=logits, classes=classes, label=label):
            return (answers_with(logits, classes, bias) != label).sum()

        assert errors(best) == min(errors(x) for x in np.linspace(-30, 30, 3001))
        assert errors(best) < errors(0)


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (jittered_images_are_moved, "padded[chosen, y : y + height, x : x + width]",
         "np.roll(image, (y - 2, x - 2), (1, 2))[chosen]"),
        (jittered_images_are_moved, "size=(len(image), 2))",
         "size=(1, 2)).repeat(len(image), 0)"),
        (units_with_long_weights_are_scaled_down,
         "jnp.linalg.norm(moved, axis=0)", "jnp.linalg.norm(moved)"),
        (units_with_long_weights_are_scaled_down, "moved = weights + update", "moved = weights"),
        (the_share_of_the_answers_is_the_one_asked_for,
         "logits[:, ~is_chosen].max(axis=1) - logits[:, is_chosen].max(axis=1)",
         "logits[:, ~is_chosen].max(axis=1) - logits[:, is_chosen].mean(axis=1)"),
        (the_share_of_the_answers_is_the_one_asked_for,
         "np.quantile(find_margins(logits, classes), share)",
         "-np.quantile(find_margins(logits, classes), share)"),
        (the_best_bias_is_the_best_of_all, "np.where(is_chosen, logits, -np.inf)",
         "(logits + np.float32(1e6) * is_chosen)"),
    ],
    ids=["wraps around", "one shift for all", "of all units together", "before the update",
         "mean of the classes", "lowered for raised", "close logits lost in a large sum"],
)  # fmt: skip
def test_museum(check, right, wrong):
    exhibit(check, SCRIPT, SCRIPT, right, wrong)


@pytest.mark.parametrize(("label", "wins"), [(3, True), (5, False)])
def test_best_bias_of_one_image(hinton, label, wins):
    logits = logits_of(1)
    logits[0, 5] = 20  # without a bias the answer is 5
    bias = hinton.find_best_bias(logits, (3,), np.array([label]))
    assert (answers_with(logits, (3,), bias) == 3).all() == wins


def test_what_is_added_to_the_biases_changes_no_other_class(hinton, few):
    network = hinton.DenseNet(20, rngs=nnx.Rngs(0))
    before = utils.predict(network, few.test)
    changed = utils.predict(hinton.add_to_biases(network, (7, 8), -2.5), few.test)
    np.testing.assert_allclose(changed[:, [7, 8]], before[:, [7, 8]] - 2.5, atol=1e-5)
    others = np.delete(np.arange(10), [7, 8])
    np.testing.assert_array_equal(changed[:, others], before[:, others])
    np.testing.assert_array_equal(utils.predict(network, few.test), before, "the network itself")


# %% Networks and settings


def test_networks_of_the_paper(hinton):
    large = hinton.DenseNet(1200, 10, 0.2, 0.5, rngs=nnx.Rngs(0))
    small = hinton.DenseNet(800, rngs=nnx.Rngs(0))
    assert utils.count_params(large) == 785 * 1200 + 1201 * 1200 + 1201 * 10
    assert utils.count_params(small) == 785 * 800 + 801 * 800 + 801 * 10
    image = RNG.random((4, 28, 28, 1)).astype(np.float32)
    a, b = (large(image, train=True) for _ in range(2))
    assert np.abs(a - b).max() > 0.1, "dropout"
    np.testing.assert_array_equal(large(image), large(image))
    np.testing.assert_array_equal(small(image, train=True), small(image, train=True))


def test_inputs_and_hidden_units_have_a_dropout_of_their_own(hinton):
    image = np.ones((4, 28, 28, 1), np.float32)
    inputs = hinton.DenseNet(50, 10, 0.5, 0.0, rngs=nnx.Rngs(0))
    hidden = hinton.DenseNet(50, 10, 0.0, 0.5, rngs=nnx.Rngs(0))
    for network, dropped in ((inputs, "input_dropout"), (hidden, "dropout")):
        getattr(network, dropped).rate = 0.0
        np.testing.assert_array_equal(network(image, train=True), network(image))


def test_weights_of_hidden_layers_start_small(hinton):
    network = hinton.DenseNet(800, rngs=nnx.Rngs(0))
    for layer in (network.dense1, network.dense2):
        assert np.std(layer.kernel[...]) == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize(
    ("dataset", "quick", "wanted"),
    [
        ("mnist", False, (20, 100, 256, (1.0, 2.5, 4.0, 8.0, 20.0, 40.0), (300, 30))),
        ("digits", False, (20, 100, 64, (1.0, 2.5, 4.0, 8.0, 20.0, 40.0), (300, 30))),
        ("mnist", True, (4, 4, 64, (1.0, 8.0), (30,))),
    ],
)
def test_what_is_left_open_is_filled_in(hinton, digits, dataset, quick, wanted):
    data = digits._replace(name=dataset)
    config = hinton.fill_in_defaults(hinton.Config(quick=quick), data)
    found = (
        config.epochs,
        config.teacher_epochs,
        config.batch_size,
        config.temperatures,
        config.units,
    )
    assert found == wanted


# %% What each network is shown

SEEDS = (7, 8)
SMALL_NETS = ["small net", "distilled", "no threes", "only 7s and 8s"]
UNITS = [f"{units} units at T = {t}" for units in (30, 20) for t in (4, 1.5)]
BIASED = {  # row: its network, and the classes whose biases are changed
    "no threes, bias of 3 raised": ("no threes", (3,)),
    "no threes, best bias in hindsight": ("no threes", (3,)),
    "only 7s and 8s, biases lowered": ("only 7s and 8s", (7, 8)),
    "only 7s and 8s, best bias in hindsight": ("only 7s and 8s", (7, 8)),
}
SETTINGS = {
    "dataset": "digits", "seed": 7, "seeds": 2, "epochs": 3, "teacher_epochs": 2, "batch_size": 32,
    "learning_rate": 9e-3, "baseline_learning_rate": 5e-3, "teacher_learning_rate": 3e-3,
    "input_dropout": 0.25, "dropout": 0.125, "max_norm": 0.5, "temperature": 5.0, "alpha": 0.375,
    "temperatures": (4.0, 1.5), "units": (30, 20),
}  # fmt: skip


@pytest.fixture(scope="module")
def few(digits):
    """Images whose index is not their place."""
    train, test = digits.train.take(slice(100, 500)), digits.test.take(slice(200))
    return digits._replace(train=train, test=test)


@dataclasses.dataclass
class Experiment:
    report: dict
    trainings: dict  # {(name, seed): Watched}, in order
    transforms: list  # what `make_transform` was given, a training
    weights: dict  # {id of a network: what each step was given beside the batch}

    def row(self, name, seed):
        [row] = [x for x in self.report["results"] if (x["name"], x["seed"]) == (name, seed)]
        return row


@pytest.fixture(scope="module")
def watched(hinton, few, tmp_path_factory):
    """A run of two seeds."""
    config = hinton.Config(output_dir=str(tmp_path_factory.mktemp("watched")), **SETTINGS)
    transforms, weights = [], {}
    make_transform, compile_step = hinton.make_transform, hinton.compile_step

    def watched_transform(*arguments):
        transforms.append(arguments)
        return make_transform(*arguments)

    def watched_compile(step, network, *modules):
        bound = compile_step(step, network, *modules)
        given = weights[id(network)] = []

        def call(batch, *more):
            given.append(more)
            return bound(batch, *more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hinton, "make_transform", watched_transform)
        patch.setattr(hinton, "compile_step", watched_compile)
        report, trainings = watch(hinton, few, config)
    by_name = {(x.name, x.recipe.seed): x for x in trainings}
    assert len(by_name) == len(trainings)
    return Experiment(report, by_name, transforms, weights)


def places_of(few, index):
    """Where images stand in the training split."""
    return np.searchsorted(few.train.index, index)


def test_every_seed_trains_all_networks(watched):
    wanted = [(name, seed) for seed in SEEDS for name in ["large net", *SMALL_NETS, *UNITS]]
    assert list(watched.trainings) == wanted


def test_recipes_and_the_steps_that_they_make(watched):
    for ((name, seed), training), transform in zip(
        watched.trainings.items(), watched.transforms, strict=True
    ):
        epochs = 2 if name == "large net" else 3
        rate = {"large net": 3e-3, "small net": 5e-3}.get(name, 9e-3)
        assert training.recipe == Recipe(seed, epochs, 32, rate, "onecycle")
        steps = epochs * (len(training.split.label) // 32)
        assert transform == (rate, "onecycle", steps)
        assert len(training.batches) == steps


@pytest.mark.parametrize("seed", SEEDS)
def test_networks_of_one_width_have_the_same_initial_weights(hinton, watched, seed):
    def fresh(*arguments):
        return fingerprint(hinton.DenseNet(*arguments, rngs=nnx.Rngs(seed)))

    starts = {name: watched.trainings[name, seed].start for name in [*SMALL_NETS, *UNITS]}
    assert {starts[name] for name in SMALL_NETS} == {fresh(800)}
    assert {starts[name] for name in UNITS[:2]} == {fresh(30)}
    assert {starts[name] for name in UNITS[2:]} == {fresh(20)}
    assert watched.trainings["large net", seed].start == fresh(1200)


def test_seeds_differ_in_start_batches_and_shifts(watched):
    for name in ("large net", "small net"):
        one, other = (watched.trainings[name, seed] for seed in SEEDS)
        assert one.start != other.start
        assert (one.shown("index") != other.shown("index")).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_only_the_large_net_has_dropout(watched, seed):
    for name in ["large net", *SMALL_NETS, *UNITS]:
        network = watched.trainings[name, seed].model
        rates = network.input_dropout.rate, network.dropout.rate
        assert rates == ((0.25, 0.125) if name == "large net" else (0, 0))


@pytest.mark.parametrize("seed", SEEDS)
def test_only_the_large_net_has_short_weights(watched, seed):
    def longest(name):
        network = watched.trainings[name, seed].model
        layers = network.dense1, network.dense2, network.dense3
        return max(np.linalg.norm(layer.kernel[...], axis=0).max() for layer in layers)

    assert longest("large net") < 0.5001
    assert min(longest(name) for name in [*SMALL_NETS, *UNITS]) > 0.6


@pytest.mark.parametrize("seed", SEEDS)
def test_the_large_net_is_shown_shifted_images_anew_in_each_epoch(hinton, watched, few, seed):
    training = watched.trainings["large net", seed]
    place, shown = places_of(few, training.shown("index")), training.shown("image")
    np.testing.assert_array_equal(training.shown("label"), few.train.label[place])
    steps = len(training.batches) // 2 * 32  # images of an epoch
    for epoch, part in ((1, slice(steps)), (2, slice(steps, None))):
        shifted = hinton.jitter(few.train.image, np.random.default_rng([seed, 25, epoch]))
        np.testing.assert_array_equal(shown[part], shifted[place[part]] / np.float32(255))
        assert len(np.unique(place[part])) == steps
    assert training.split is few.train


@pytest.mark.parametrize("seed", SEEDS)
def test_small_networks_never_see_a_shifted_image(watched, few, seed):
    for name in [*SMALL_NETS, *UNITS]:
        training = watched.trainings[name, seed]
        place = places_of(few, training.shown("index"))
        image = few.train.image[place] / np.float32(255)
        np.testing.assert_array_equal(training.shown("image"), image)
        np.testing.assert_array_equal(training.shown("label"), few.train.label[place])


@pytest.mark.parametrize("seed", SEEDS)
def test_transfer_sets_are_all_images_but_those_of_the_digits_left_out(watched, few, seed):
    for name in [*SMALL_NETS, *UNITS]:
        label = few.train.label
        kept = {"no threes": label != 3, "only 7s and 8s": (label == 7) | (label == 8)}
        wanted = few.train.take(kept.get(name, slice(None)))
        training = watched.trainings[name, seed]
        np.testing.assert_array_equal(training.split.index, wanted.index)
        assert np.isin(training.shown("index"), wanted.index).all()
        digits = {"no threes": set(range(10)) - {3}, "only 7s and 8s": {7, 8}}
        assert set(training.shown("label")) == digits.get(name, set(range(10)))


@pytest.mark.parametrize("seed", SEEDS)
def test_networks_shown_all_digits_have_the_same_batches(watched, seed):
    wanted = watched.trainings["small net", seed].shown("index")
    for name in ("distilled", *UNITS):
        np.testing.assert_array_equal(watched.trainings[name, seed].shown("index"), wanted)


@pytest.mark.parametrize("seed", SEEDS)
def test_students_learn_from_their_seed_s_large_net(watched, few, seed):
    """From its logits for the very images as they are, in inference mode."""
    large = watched.trainings["large net", seed].model
    logits = utils.predict(large, few.train)
    for name in ["large net", *SMALL_NETS, *UNITS]:
        training = watched.trainings[name, seed]
        taught = name not in ("large net", "small net")
        assert ("teacher_logits" in training.batches[0]) == taught
        if taught:
            wanted = logits[places_of(few, training.shown("index"))]
            np.testing.assert_allclose(training.shown("teacher_logits"), wanted, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_temperature_and_alpha_of_every_step(watched, seed):
    for name in ["large net", *SMALL_NETS, *UNITS]:
        training = watched.trainings[name, seed]
        wanted = (float(name.split(" = ")[1]) if name in UNITS else 5.0, 0.375)
        if name in ("large net", "small net"):
            wanted = ()
        assert set(watched.weights[id(training.model)]) == {wanted}
        for record in watched.row(name, seed)["history"] if wanted else ():
            parts = 0.375 * record["hard_loss"] + 0.625 * record["soft_loss"]
            assert record["loss"] == pytest.approx(parts, rel=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_first_loss_is_that_of_the_definition(watched, hinton, seed):
    """From the initial weights, with the temperature on both sides and squared as a factor."""
    for name, units in (("small net", 800), ("distilled", 800), ("30 units at T = 4", 30)):
        training = watched.trainings[name, seed]
        batch = training.batches[0]
        network = hinton.DenseNet(units, rngs=nnx.Rngs(seed))
        logits = np.asarray(network(batch["image"]), np.float64)
        loss = cross_entropy(logits, np.eye(10)[batch["label"]])
        if name != "small net":
            temperature = 5.0 if name == "distilled" else 4.0
            targets = softmax(batch["teacher_logits"] / temperature)
            soft = cross_entropy(logits / temperature, targets)
            soft -= cross_entropy(batch["teacher_logits"] / temperature, targets)
            loss = 0.375 * loss + 0.625 * temperature**2 * soft
        step = hinton.train_student_step if "teacher_logits" in batch else hinton.train_step
        optimizer = nnx.Optimizer(network, optax.sgd(0.0), wrt=nnx.Param)
        given = watched.weights[id(training.model)][0]
        modules = (network, None, optimizer) if given else (network, optimizer)
        assert step(*modules, batch, *given)["loss"] == pytest.approx(loss, rel=1e-4)


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def cross_entropy(logits, probs):
    return -(probs * np.log(softmax(np.asarray(logits, np.float64)))).sum(-1).mean()


# %% What is reported


@pytest.mark.parametrize("seed", SEEDS)
def test_biases_are_chosen_by_the_frequency_among_training_images(hinton, watched, few, seed):
    """One number for both of 7 and 8. Test images choose it in hindsight alone."""
    for name, (network_name, classes) in BIASED.items():
        network = watched.trainings[network_name, seed].model
        if name.endswith("in hindsight"):
            logits = utils.predict(network, few.test)
            wanted = hinton.find_best_bias(logits, classes, few.test.label)
        else:
            logits = utils.predict(network, few.train)
            share = sum(few.train.label == c for c in classes).mean()
            wanted = hinton.find_bias_for_share(logits, classes, share)
        assert watched.row(name, seed)["added_to_biases"] == pytest.approx(wanted, abs=1e-5)
    assert watched.row("no threes, bias of 3 raised", seed)["added_to_biases"] > 0
    assert watched.row("only 7s and 8s, biases lowered", seed)["added_to_biases"] < 0


@pytest.mark.parametrize("seed", SEEDS)
def test_every_row_is_scored_on_all_test_images(watched, few, seed):
    large_answers = utils.predict(watched.trainings["large net", seed].model, few.test).argmax(-1)
    for row in (row for row in watched.report["results"] if row["seed"] == seed):
        network_name, classes = BIASED.get(row["name"], (row["name"], ()))
        logits = utils.predict(watched.trainings[network_name, seed].model, few.test)
        answers = answers_with(logits, classes, row.get("added_to_biases", 0))
        wrong = answers != few.test.label
        assert row["test_errors"] == wrong.sum()
        assert row["errors_on_threes"] == wrong[few.test.label == 3].sum()
        assert row["agreement"] == pytest.approx((answers == large_answers).mean())
    for training in watched.trainings.values():
        for scored in training.scored:
            assert scored == ("test", training.model, few.test)


def test_the_last_epoch_is_reported_not_the_best(watched):
    for (name, seed), training in watched.trainings.items():
        row = watched.row(name, seed)
        assert row["history"][-1]["test_accuracy"] == pytest.approx(row["test_accuracy"])
        assert len(row["history"]) == training.recipe.epochs


def test_rows_are_in_the_order_of_the_seeds(watched):
    names = ["large net", "small net", "distilled"]
    names += ["no threes", *list(BIASED)[:2], "only 7s and 8s", *list(BIASED)[2:], *UNITS]
    found = [(row["name"], row["seed"]) for row in watched.report["results"]]
    assert found == [(name, seed) for seed in SEEDS for name in names]


@pytest.mark.parametrize("seed", SEEDS)
def test_another_bias_costs_no_training(watched, seed):
    """Its network's seconds would count twice."""
    for name, (network_name, _) in BIASED.items():
        row, network_row = watched.row(name, seed), watched.row(network_name, seed)
        assert row["seconds"] == 0
        assert "history" not in row
        assert row["params"] == network_row["params"]
        assert network_row["seconds"] > 0
        assert watched.report["seconds"][name] == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_no_other_bias_does_better_than_the_best_in_hindsight(watched, seed):
    for name, (network_name, _) in BIASED.items():
        best = watched.row(f"{network_name}, best bias in hindsight", seed)["test_errors"]
        assert best <= watched.row(name, seed)["test_errors"]
        assert best <= watched.row(network_name, seed)["test_errors"]


def test_the_summary_has_means_over_the_seeds(hinton, watched, few, tmp_path):
    run = make_run(tmp_path, few)
    run.rows = watched.report["results"]
    lines = hinton.summarize(run)

    def mean(name, key):
        return np.mean([watched.row(name, seed)[key] for seed in SEEDS])

    for line, name, other in (
        ("Distilled above small net", "distilled", "small net"),
        ("Distilled above large net", "distilled", "large net"),
        ("Bias of 3 raised: gain", "no threes, bias of 3 raised", "no threes"),
        ("Biases of 7, 8 lowered: gain", "only 7s and 8s, biases lowered", "only 7s and 8s"),
    ):
        gain = 100 * (mean(name, "test_accuracy") - mean(other, "test_accuracy"))
        assert lines[line].startswith(f"{gain:+.2f} points (95 %")
    wrong = mean("no threes, bias of 3 raised", "errors_on_threes")
    threes = (few.test.label == 3).sum()
    assert lines["With bias of 3 raised, on threes"] == f"{wrong:.0f} of {threes} wrong"
    for line, (mended, best) in (
        ("Added to bias of 3", list(BIASED)[:2]),
        ("Added to biases of 7 and 8", list(BIASED)[2:]),
    ):
        biases = (mean(name, "added_to_biases") for name in (mended, best))
        assert lines[line] == "{:+.1f}; best in hindsight {:+.1f}".format(*biases)
    paper = {name: line for name, line in lines.items() if name.startswith("The paper, ")}
    assert len(paper) == len(hinton.PAPER)
    page = (ROOT / "docs" / "25_hinton_2015.md").read_text()
    for errors in hinton.PAPER.values():
        assert f"| {errors:,} |" in page, "the table of the paper's numbers"


# %% Refused before anything is trained


@pytest.mark.parametrize(
    ("flags", "labels", "message"),
    [
        ({}, (0, 1, 2, 4, 5, 6, 7, 8, 9), "classes 3, 7 and 8"),
        ({}, (0, 1, 2, 3, 4, 5, 6, 7, 9), "classes 3, 7 and 8"),
        ({"batch_size": 100}, range(10), "--batch-size 100: a training has only"),
        ({"temperatures": ()}, range(10), "--temperatures"),
        ({"units": ()}, range(10), "--units"),
    ],
    ids=["no threes", "no eights", "no batch of 7s and 8s", "no temperatures", "no units"],
)
def test_refused_before_training(hinton, few, tmp_path, monkeypatch, flags, labels, message):
    data = few._replace(train=few.train.take(np.isin(few.train.label, labels)))
    config = hinton.Config(output_dir=str(tmp_path), quick=True, **flags)
    monkeypatch.setattr(hinton, "Training", None)  # cannot be called
    monkeypatch.setattr(utils, "load_data", lambda *_: data)
    with pytest.raises(utils.UserError, match=message):
        hinton.main(config)


# %% Results


def test_the_results_are_of_these_settings(hinton, digits):
    """Whoever changes a default has to measure again."""
    [run] = read("hinton")["runs"]
    found = run["config"]
    filled_in = hinton.fill_in_defaults(hinton.Config(), digits._replace(name="mnist"))
    defaults = json.loads(json.dumps(dataclasses.asdict(filled_in)))
    assert found == {
        name: value for name, value in defaults.items() if name not in ("data_dir", "output_dir")
    } | {"seed": 100, "seeds": 5}


def test_the_search_tried_these_settings(hinton, digits):
    """The large net's and its student's come first; the small net's are the best of those tried."""
    search = read("hinton_tuning")
    cells, searched = search["results"], search["config"]
    config = hinton.fill_in_defaults(hinton.Config(), digits._replace(name="mnist"))
    assert (searched["temperature"], searched["max_norm"]) == (config.temperature, config.max_norm)
    large, student = hinton.large_net_recipe(config, 0), hinton.distilled_net_recipe(config, 0)
    assert (searched["batch_size"], "onecycle") == (large.batch_size, large.schedule)
    assert cells[0]["dropout"] == [config.input_dropout, config.dropout]
    for cell, recipe in zip(cells, (large, student), strict=False):
        assert (cell["learning_rate"], cell["epochs"]) == (recipe.learning_rate, recipe.epochs)
    assert cells[1]["alpha"] == config.alpha
    small = [cell for cell in cells if cell["name"] == "small net"]
    best = min(small, key=lambda cell: np.mean(cell["errors"]))
    recipe = hinton.small_net_recipe(config, 0)
    assert (best["learning_rate"], best["epochs"]) == (recipe.learning_rate, recipe.epochs)


def test_the_seed_decides_the_large_net_s_dropout(hinton):
    keys = []
    for seed in (0, 1):
        network = hinton.DenseNet(20, dropout=0.5, rngs=nnx.Rngs(seed))
        found = jax.tree.leaves(nnx.state(network, nnx.RngKey))
        keys.append([jax.random.key_data(key).tolist() for key in found])
    assert keys[0]
    assert keys[0] != keys[1]
