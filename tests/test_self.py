"""A network as its own teacher: generations, controls and exits, and bugs of theirs."""

import contextlib
import io
import tempfile

import experiment
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import utils
from conftest import (
    EXAMPLES,
    check_optimizer,
    exhibit,
    gain_in_words,
    load,
    make_run,
    refuse,
    watch,
)
from flax import nnx

SCRIPT = "18_self_distillation.py"
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (3, 8, 10)).astype(np.float32)  # of three exits
LABELS = RNG.integers(0, 10, 8).astype(np.int32)


def untrained(script, generations=1, epochs=0):
    """What `train_all_students` gives after no epoch at all: the starts."""
    data = utils.load_data("digits")
    labelled = utils.take_labels(data.train, 20, 0)
    config = script.Config(dataset="digits", generations=generations)
    recipe = experiment.Recipe(3, epochs, 10, 1e-3, "constant")
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(folder, data, config)
        return script.train_all_students(labelled, 10, recipe, config, run)


# %% Museum


def generation_starts_from_its_teacher(script):
    networks, _ = untrained(script)
    start = {name: experiment.fingerprint(network) for name, network in networks.items()}
    assert start["generation 1"] == start["twin 1"]
    assert start["generation 1"] != start["baseline"]


def dark_knowledge_permuted_moves_the_largest_probability(script):
    logits = LOGITS[0]
    permuted = script.permute_dark_knowledge(logits, np.random.default_rng(1))
    assert (permuted.argmax(-1) == logits.argmax(-1)).all()
    assert np.array_equal(permuted.max(-1), logits.max(-1))


def last_exit_learns_from_the_early_ones(script):
    def loss(exit_logits):
        return script.exits_loss(exit_logits, LABELS, 1.0, 3.0, 0.5)

    with_others = jax.grad(loss)(LOGITS)[-1]
    alone = jax.grad(lambda logits: script.hard_loss(logits, LABELS))(LOGITS[-1])
    np.testing.assert_allclose(with_others, alone, atol=1e-7)


MUSEUM = {
    generation_starts_from_its_teacher: (
        "student = StudentCNN(classes, rngs=nnx.Rngs(recipe.seed))  # no weight comes from the",
        "student = nnx.clone(next(iter(run._trainings.values()))[0])  # the",
    ),
    dark_knowledge_permuted_moves_the_largest_probability: (
        "permuted[others] = shuffled.ravel()",
        "permuted = rng.permuted(logits, axis=1)",
    ),
    last_exit_learns_from_the_early_ones: (
        "jax.lax.stop_gradient(at_least_float32(teacher_logits))",
        "at_least_float32(teacher_logits)",
    ),
}


@pytest.mark.parametrize("check", MUSEUM, ids=lambda check: check.__name__)
def test_bug(check):
    exhibit(check, SCRIPT, SCRIPT, *MUSEUM[check])


# %% Losses and models


@pytest.fixture(scope="module")
def script():
    return load(EXAMPLES / SCRIPT)


def test_weighted_loss_weighs_images_within_the_batch(script):
    losses = -np.asarray(jax.nn.log_softmax(LOGITS[0]))[np.arange(8), LABELS]
    np.testing.assert_allclose(script.hard_loss(LOGITS[0], LABELS), losses.mean(), rtol=1e-5)
    weights = RNG.random(8).astype(np.float32)
    want = (weights * losses).sum() / weights.sum()
    for scale in (1, 7):  # only ratios count
        found = script.weighted_hard_loss(LOGITS[0], LABELS, scale * weights)
        np.testing.assert_allclose(found, want, rtol=1e-5)
    even = script.weighted_hard_loss(LOGITS[0], LABELS, np.ones(8))
    np.testing.assert_allclose(even, losses.mean(), rtol=1e-5)


@pytest.mark.parametrize("weights", [(1,), (8, 1), (1, 8), (7,), ()])
def test_weights_that_would_broadcast_are_refused(script, weights):
    with pytest.raises(ValueError, match=r"\(8, 10\).*\(8,\)") as refused:
        script.weighted_hard_loss(LOGITS[0], LABELS, np.ones(weights))
    assert str(weights) in str(refused.value)
    with pytest.raises(ValueError, match=r"\(8, 10\).*\(8, 1\)"):
        script.weighted_hard_loss(LOGITS[0], LABELS[:, None], np.ones(8))


def test_exits_that_would_broadcast_are_refused(script):
    with pytest.raises(ValueError, match=r"\(10,\).*\(8,\)"):
        script.exits_loss(LOGITS[0], LABELS, 1.0, 3.0, 0.5)  # of one exit alone
    with pytest.raises(ValueError, match=r"\(8, 10\).*\(8, 1\)"):
        script.exits_loss(LOGITS, LABELS[:, None], 1.0, 3.0, 0.5)
    for mixed in ([LOGITS[0, :1], LOGITS[1]], [LOGITS[0], LOGITS[1, :, :1]]):
        with pytest.raises(ValueError, match="must be"):
            script.exits_loss(mixed, LABELS, 1.0, 3.0, 0.5)


def test_losses_of_low_precision_are_computed_in_float32(script):
    low = jnp.asarray(LOGITS, jnp.bfloat16)
    high = low.astype(jnp.float32)
    weights = jnp.asarray(RNG.random(8), jnp.bfloat16)
    found = script.weighted_hard_loss(low[0], LABELS, weights)
    want = script.weighted_hard_loss(high[0], LABELS, weights.astype(jnp.float32))
    assert found.dtype == jnp.float32
    assert found == want
    found = script.exits_loss(low, LABELS, 1.0, 3.0, 0.5)
    assert found.dtype == jnp.float32
    assert found == script.exits_loss(high, LABELS, 1.0, 3.0, 0.5)


def test_permuting_keeps_the_values_and_leaves_the_table_alone(script):
    table = np.concatenate([LOGITS[0], np.full((2, 10), np.nan, np.float32)])
    before = table.copy()
    permuted = script.permute_dark_knowledge(table, np.random.default_rng(1))
    assert np.array_equal(table, before, equal_nan=True)
    assert np.array_equal(np.sort(permuted), np.sort(table), equal_nan=True)
    assert (permuted[:8] != table[:8]).any(-1).all(), "every row is in another order"


def test_permuting_draws_anew_for_each_image(script):
    table = np.tile(np.arange(10, dtype=np.float32), (50, 1))
    permuted = script.permute_dark_knowledge(table, np.random.default_rng(1))
    assert len(np.unique(permuted, axis=0)) > 40


def test_exits_loss_by_hand(script):
    hard = [float(script.hard_loss(logits, LABELS)) for logits in LOGITS]
    on_labels = script.exits_loss(LOGITS, LABELS, 1.0, 3.0, 1.0)
    np.testing.assert_allclose(on_labels, sum(hard), rtol=1e-5)
    last_only = script.exits_loss(LOGITS, LABELS, 0.0, 3.0, 0.5)
    np.testing.assert_allclose(last_only, hard[-1], rtol=1e-5)
    soft = [float(script.soft_loss(logits, LOGITS[2], 3.0)) for logits in LOGITS[:2]]
    want = hard[2]
    for k in (0, 1):
        want += 0.7 * (0.25 * hard[k] + 0.75 * soft[k])
    found = script.exits_loss(LOGITS, LABELS, 0.7, 3.0, 0.25)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    early = jax.grad(lambda z: script.exits_loss(z, LABELS, 0.0, 3.0, 0.5))(LOGITS)[:2]
    assert np.abs(early).max() == 0, "without a weight the early exits learn nothing"


def test_exits_and_what_each_of_them_costs(script):
    network, image = script.ExitCNN(rngs=nnx.Rngs(0)), jnp.ones((4, 28, 28, 1))
    assert network(image).shape == (3, 4, 10)
    graph, state = nnx.split(network)
    flops = []
    for k in range(3):
        up_to = jax.jit(lambda state, x, k=k: nnx.merge(graph, state)(x)[k])
        flops.append(up_to.lower(state, image).compile().cost_analysis()["flops"])
    assert flops[0] < 0.5 * flops[1], "compiled, an exit leaves out what lies behind it"
    assert flops[1] < 0.9 * flops[2]


def test_every_exit_sees_a_grid_of_3x3(script):
    network = script.ExitCNN(num_classes=7, rngs=nnx.Rngs(0))
    for channels, classifier in zip((16, 32, 64), network.exits, strict=True):
        assert classifier.layers[0].kernel.shape == (channels * 3 * 3, 64)
        assert classifier.layers[2].kernel.shape == (64, 7)


def test_time_is_measured_of_each_exit(script, images):
    network = script.ExitCNN(rngs=nnx.Rngs(0))
    few = images.image[:4] / np.float32(255)
    for k in range(3):
        found = script.compute_exit(network, few, k)
        np.testing.assert_allclose(found, network(few)[k], rtol=1e-4, atol=1e-5)
    milliseconds = script.measure_exits(network, images, turns=1)
    assert milliseconds.shape == (3,)
    assert (milliseconds > 0).all()


def test_soft_voting_is_the_mean_of_probabilities(script):
    log_probs = script.average_log_probs([*LOGITS])
    np.testing.assert_allclose(np.exp(log_probs), jax.nn.softmax(LOGITS).mean(0), rtol=1e-4)
    sure = np.float32([[[500, 0, -500]], [[500, 0, -500]]])
    assert np.isfinite(script.average_log_probs([*sure])).all()


# %% Checkpoints and flags


def test_another_teacher_is_another_training(script, digits, tmp_path):
    """Only the same training, with the same teacher, temperature and weights, takes up what a
    stopped run has left."""
    run = make_run(tmp_path, digits)
    labelled = utils.take_labels(digits.train, 20, 0)
    recipe = experiment.Recipe(3, 0, 10, 1e-3, "constant")
    table = RNG.normal(0, 1, (len(digits.train.label), 10)).astype(np.float32)
    trained = labelled, 10, recipe, run

    def file_of(train, *arguments):
        return run.training_of(train(*arguments)).path

    born_again = [
        file_of(script.train_born_again, "one", table, *trained, 3.0, 0.5),
        file_of(script.train_born_again, "one", -table, *trained, 3.0, 0.5),
        file_of(script.train_born_again, "one", table, *trained, 1.0, 0.5),
        file_of(script.train_born_again, "one", table, *trained, 3.0, 0.4),
    ]
    assert len({*born_again}) == 4
    again = file_of(script.train_born_again, "one", table, *trained, 3.0, 0.5)
    assert again == born_again[0]

    weighted = [
        file_of(script.train_confidence_weighted, "two", table[:, 0], *trained),
        file_of(script.train_confidence_weighted, "two", table[:, 1], *trained),
    ]
    assert len({*weighted}) == 2

    exits = [
        file_of(script.train_exits, "three", *trained, 1.0, 3.0, 0.5),
        file_of(script.train_exits, "three", *trained, 0.0, 3.0, 0.5),
        file_of(script.train_exits, "three", *trained, 1.0, 1.0, 0.5),
        file_of(script.train_exits, "three", *trained, 1.0, 3.0, 1.0),
    ]
    assert len({*exits}) == 4


@pytest.mark.parametrize("count", ["0", "11", "-1"])
def test_generations_that_make_no_sense(script, count, tmp_path, monkeypatch, capsys):
    flags = ["--dataset", "digits", "--generations", count, "--output-dir", tmp_path]
    output = refuse(script, [SCRIPT, *flags], monkeypatch, capsys)
    assert f"--generations {count}: must be from 1 to 10" in output.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--labels", "1298"], "--labels 1298: there are 1297"),
        (["--labels", "20", "--batch-size", "21"], "--batch-size 21"),
        (["--labels", "9"], "--labels 9: must be 10 or more, or all"),
        (["--temperature", "0"], "--temperature"),
        (["--alpha", "1.5"], "--alpha"),
        (["--seeds", "0"], "--seeds"),
    ],
)
def test_flags_are_refused_before_anything_is_trained(
    script, flags, words, tmp_path, monkeypatch, capsys
):
    flags = ["--dataset", "digits", *flags, "--output-dir", tmp_path]
    output = refuse(script, [SCRIPT, *flags], monkeypatch, capsys)
    assert words in output.err
    assert "SEED" not in output.out
    assert not [*tmp_path.glob("*/*.npz")]


@pytest.mark.parametrize(
    ("flags", "name", "labels", "generations"),
    [
        ({}, "mnist", 1000, 3),
        ({"quick": True}, "mnist", 100, 1),
        ({}, "digits", 100, 3),
        ({"quick": True}, "digits", 100, 1),
        ({"quick": True, "labels": "all", "generations": 2}, "mnist", "all", 2),
    ],
)
def test_what_a_flag_leaves_open(script, digits, flags, name, labels, generations):
    config = script.fill_in_defaults(script.Config(**flags), digits._replace(name=name))
    assert (config.labels, config.generations, config.seeds) == (labels, generations, 1)


# %% The experiment
# One run of two repetitions, of a few digits and three steps a network. A training's one batch is
# all that it has, so the loss of its first epoch is that of the weights that it started with.

SEEDS = [7, 8]
STUDENTS = ["baseline", "self-distilled", "generation 1", "twin 1", "generation 2", "twin 2",
            "confidence-weighted", "permuted"]  # fmt: skip
EXIT_NETWORKS = ["last exit only", "exits on labels", "exits self-taught"]
GENERATION = {"baseline": 0, "generation 2": 2, "twin 2": 2} | dict.fromkeys(EXIT_NETWORKS, 0)
# Who is whose teacher, and at what temperature.
TAUGHT = {
    "self-distilled": ("baseline", 5.0),
    "generation 1": ("baseline", 1.0),
    "generation 2": ("generation 1", 1.0),
}


@pytest.fixture(scope="module")
def few(digits):
    return digits._replace(train=digits.train.take(slice(400)), test=digits.test.take(slice(100)))


@pytest.fixture(scope="module")
def watched(script, few, tmp_path_factory):
    """The report, {seed: {name: Watched}}, the arguments of `measure_exits`, and the output."""
    config = script.Config(
        dataset="digits", output_dir=str(tmp_path_factory.mktemp("watched")), seed=7, seeds=2,
        labels=60, epochs=3, batch_size=60, generations=2, temperature=5.0, alpha=0.25,
    )  # fmt: skip
    measured = []

    def measure(*arguments):
        measured.append(arguments)
        return np.array([1.0, 2.0, 3.0])

    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(script, "measure_exits", measure)
        report, trainings = watch(script, few, config)
    names = [training.name for training in trainings]
    assert names == 2 * [*STUDENTS, *EXIT_NETWORKS]
    of_seed = {7: trainings[: len(names) // 2], 8: trainings[len(names) // 2 :]}
    of_seed = {seed: {x.name: x for x in some} for seed, some in of_seed.items()}
    return report, of_seed, measured, output.getvalue()


@pytest.fixture(params=SEEDS)
def seed(request):
    return request.param


@pytest.fixture
def trainings(watched, seed):
    return watched[1][seed]


@pytest.fixture
def rows(watched, seed):
    """{name: row} of one repetition."""
    rows = watched[0]["results"]
    half = len(rows) // 2
    return {row["name"]: row for row in (rows[:half] if seed == 7 else rows[half:])}


def logits_shown(training, table):
    """The rows of a table [60, C] of the labelled images, in the order of what was shown."""
    return table[np.searchsorted(training.split.index, training.shown("index"))]


def test_every_network_sees_the_same_labelled_images_and_nothing_else(trainings, few, seed):
    wanted = utils.take_labels(few.train, 60, seed)
    for training in trainings.values():
        np.testing.assert_array_equal(training.split.index, wanted.index)
        np.testing.assert_array_equal(np.unique(training.shown("index")), wanted.index)
        index = training.shown("index")
        place = np.searchsorted(few.train.index, index)
        np.testing.assert_array_equal(training.shown("label"), few.train.label[place])
        image = few.train.image[place] / np.float32(255)
        np.testing.assert_array_equal(training.shown("image"), image)
        assert len(index) == 3 * 60, "each epoch shows all of them"


def test_each_generation_has_a_seed_of_its_own(trainings, seed):
    for name, training in trainings.items():
        generation = GENERATION.get(name, 1)
        assert training.recipe.seed == seed + 1_000_003 * generation, name
        others = training.recipe._replace(seed=seed)
        assert others == trainings["baseline"].recipe, "the recipe is otherwise the same"


def test_generation_seeds_wrap_around(script):
    recipe = experiment.Recipe(2**32 - 1, 1, 1, 1.0, "constant")
    assert script.recipe_of_generation(recipe, 0) == recipe
    assert script.recipe_of_generation(recipe, 2).seed == 2 * 1_000_003 - 1


def test_starts_and_batches_and_who_shares_them(script, trainings, seed):
    for name in STUDENTS:
        generation = GENERATION.get(name, 1)
        same = trainings[f"twin {generation}" if generation else "baseline"]
        fresh = script.StudentCNN(10, rngs=nnx.Rngs(seed + 1_000_003 * generation))
        assert trainings[name].start == same.start == experiment.fingerprint(fresh), name
        np.testing.assert_array_equal(trainings[name].shown("index"), same.shown("index"))
    fresh = script.ExitCNN(10, rngs=nnx.Rngs(seed))
    for name in EXIT_NETWORKS:
        assert trainings[name].start == experiment.fingerprint(fresh), name
        baseline = trainings["baseline"].shown("index")
        np.testing.assert_array_equal(trainings[name].shown("index"), baseline)
    own = [trainings[name] for name in ("baseline", "generation 1", "generation 2")]
    assert len({training.start for training in own}) == 3
    assert len({training.shown("index").tobytes() for training in own}) == 3


def test_repetitions_share_neither_images_nor_starts_nor_permutation(watched):
    one, other = watched[1][7], watched[1][8]
    for name in one:
        assert one[name].start != other[name].start
        assert (one[name].split.index != other[name].split.index).any()


def test_labels_alone_teach_baseline_and_twins_and_exits(trainings):
    for name, training in trainings.items():
        extras = {*training.batches[0]} - {"image", "label", "index"}
        if name in TAUGHT or name == "permuted":
            assert extras == {"teacher_logits"}, name
        elif name == "confidence-weighted":
            assert extras == {"weight"}
        else:
            assert not extras, name


@pytest.mark.parametrize("name", TAUGHT)
def test_who_teaches_whom(trainings, name):
    """The teacher's logits are those of the very images, in inference mode, in every epoch."""
    training = trainings[name]
    teacher, _ = TAUGHT[name]
    said = utils.predict(trainings[teacher].model, training.split)
    want = logits_shown(training, said)
    np.testing.assert_allclose(training.shown("teacher_logits"), want, atol=1e-5)


def test_the_weights_are_the_baselines_confidence(trainings):
    training = trainings["confidence-weighted"]
    said = utils.predict(trainings["baseline"].model, training.split)
    confidence = np.asarray(jax.nn.softmax(said).max(-1))
    want = logits_shown(training, confidence)
    np.testing.assert_allclose(training.shown("weight"), want, rtol=1e-4)
    assert np.ptp(want) > 0.01, "this run can tell them from weights of 1"


def test_permuted_is_the_baselines_word_with_all_but_the_largest_shuffled(trainings, seed):
    training = trainings["permuted"]
    said = utils.predict(trainings["baseline"].model, training.split)
    want, shown = logits_shown(training, said), training.shown("teacher_logits")
    np.testing.assert_allclose(np.sort(shown), np.sort(want), atol=1e-5)
    np.testing.assert_array_equal(shown.argmax(-1), want.argmax(-1))
    assert (np.abs(shown - want) > 1e-4).any(-1).all()


def test_the_permutation_is_drawn_once_and_by_the_seed(script, trainings, seed):
    training = trainings["permuted"]
    table = utils.predict_by_index(trainings["baseline"].model, training.split)
    table = script.permute_dark_knowledge(table, np.random.default_rng([seed, 10]))
    for batch in training.batches:
        np.testing.assert_allclose(batch["teacher_logits"], table[batch["index"]], atol=1e-5)


def first_loss(script, training, compute_loss):
    """The loss of a training's first batch by the weights that it started with."""
    generation = training.recipe.seed
    network = type(training.model)(10, rngs=nnx.Rngs(generation))
    batch = training.batches[0]
    return compute_loss(network(batch["image"], train=True), batch)


def test_students_with_a_teacher_learn_by_temperature_and_alpha(script, trainings, rows):
    """The copy has the temperature of the flags, generations and permuted T = 1. Everywhere the
    labels have the weight alpha."""
    temperatures = {name: temperature for name, (_, temperature) in TAUGHT.items()}
    for name, temperature in {**temperatures, "permuted": 1.0}.items():

        def losses(logits, batch, temperature=temperature):
            hard = script.hard_loss(logits, batch["label"])
            soft = script.soft_loss(logits, batch["teacher_logits"], temperature)
            return hard, soft, 0.25 * hard + 0.75 * soft

        hard, soft, total = first_loss(script, trainings[name], losses)
        record = rows[name]["history"][0]
        np.testing.assert_allclose(record["hard_loss"], hard, rtol=1e-3)
        np.testing.assert_allclose(record["soft_loss"], soft, rtol=1e-3)
        np.testing.assert_allclose(record["loss"], total, rtol=1e-3)


def test_students_without_a_teacher_learn_by_the_labels(script, trainings, rows):
    for name in ("baseline", "twin 1", "twin 2"):

        def loss(logits, batch):
            return script.hard_loss(logits, batch["label"])

        want = first_loss(script, trainings[name], loss)
        np.testing.assert_allclose(rows[name]["history"][0]["loss"], want, rtol=1e-3)


def test_confidence_weighs_the_labels(script, trainings, rows):
    def loss(logits, batch):
        return script.weighted_hard_loss(logits, batch["label"], batch["weight"])

    want = first_loss(script, trainings["confidence-weighted"], loss)
    found = rows["confidence-weighted"]["history"][0]["loss"]
    np.testing.assert_allclose(found, want, rtol=1e-5)
    even = first_loss(script, trainings["confidence-weighted"], lambda logits, batch:
                      script.hard_loss(logits, batch["label"]))  # fmt: skip
    assert abs(even - want) > 1e-4 * want, "this run can tell them from weights of 1"


def test_exits_learn_in_three_ways(script, trainings, rows):
    def losses(exit_logits, batch):
        hard = [script.hard_loss(logits, batch["label"]) for logits in exit_logits]
        soft = [script.soft_loss(logits, exit_logits[2], 5.0) for logits in exit_logits[:2]]
        return {
            "last exit only": hard[2],
            "exits on labels": sum(hard),
            "exits self-taught": hard[2] + 0.25 * (hard[0] + hard[1]) + 0.75 * sum(soft),
        }

    for name in EXIT_NETWORKS:
        want = first_loss(script, trainings[name], losses)[name]
        found = rows[f"{name}: exit 3"]["history"][0]["loss"]
        np.testing.assert_allclose(found, want, rtol=1e-3)


def test_early_exits_that_learn_nothing_keep_their_weights(trainings, script, seed):
    fresh = script.ExitCNN(10, rngs=nnx.Rngs(seed))
    for name in EXIT_NETWORKS:
        for k in (0, 1):
            trained = nnx.state(trainings[name].model.exits[k], nnx.Param)
            same = experiment.fingerprint(jax.tree.leaves(trained)) == experiment.fingerprint(
                jax.tree.leaves(nnx.state(fresh.exits[k], nnx.Param))
            )
            assert same == (name == "last exit only")


# %% What is reported


def test_every_row_is_of_its_own_network_on_all_test_images(trainings, rows, few, seed):
    label = few.test.label
    for name in STUDENTS:
        logits = utils.predict(trainings[name].model, few.test)
        check_row(rows[name], logits, label, trainings[name].recipe.seed)
        assert rows[name]["params"] == utils.count_params(trainings[name].model)
    for name in EXIT_NETWORKS:
        exit_logits = utils.predict(trainings[name].model, few.test)
        for k in (1, 2, 3):
            row = rows.get(f"{name}: exit {k}")
            if name == "last exit only" and k < 3:
                assert row is None, "an exit that was not trained is not scored"
            else:
                check_row(row, exit_logits[k - 1], label, seed)


def check_row(row, logits, label, seed):
    errors = int((logits.argmax(-1) != label).sum())
    assert row["test_errors"] == errors
    assert row["test_accuracy"] == 1 - errors / len(label)
    assert row["nll"] == pytest.approx(utils.calibration(logits, label)["nll"], rel=1e-5)
    assert row["seed"] == seed


def test_ensembles_are_of_the_baseline_and_all_of_a_kind(trainings, rows, few, seed):
    label = few.test.label
    for kind in ("generation", "twin"):
        members = [trainings[name].model for name in ("baseline", f"{kind} 1", f"{kind} 2")]
        logits = np.stack([utils.predict(model, few.test) for model in members])
        probs = np.asarray(jax.nn.softmax(logits)).mean(0)  # of probabilities, not of logits
        row = rows[f"ensemble of {kind}s"]
        assert row["test_errors"] == (probs.argmax(-1) != label).sum()
        nll = -np.log(probs[np.arange(len(label)), label]).mean()
        assert row["nll"] == pytest.approx(nll, rel=1e-4)
        assert row["params"] == sum(map(utils.count_params, members))
        assert row["seed"] == seed
        assert row["seconds"] == 0, "what its members cost counts once"


def test_an_exits_parameters_are_those_needed_to_compute_it(trainings, rows):
    network = trainings["exits self-taught"].model
    for k in (1, 2, 3):
        needed = [*network.blocks[:k], network.exits[k - 1]]
        want = sum(map(utils.count_params, needed))
        assert rows[f"exits self-taught: exit {k}"]["params"] == want
        assert rows[f"exits on labels: exit {k}"]["params"] == want
    assert rows["last exit only: exit 3"]["params"] == want
    assert want < utils.count_params(network)


def test_the_cost_of_a_network_with_exits_stands_at_its_last_exit(rows):
    for name in EXIT_NETWORKS:
        assert rows[f"{name}: exit 3"]["seconds"] > 0
        assert len(rows[f"{name}: exit 3"]["history"]) == 3
        for k in (1, 2) if name != "last exit only" else ():
            assert rows[f"{name}: exit {k}"]["seconds"] == 0


PAIRS = [
    ("self-distilled", "twin 1"),
    ("ensemble of generations", "ensemble of twins"),
    ("generation 1", "twin 1"),
    ("generation 2", "twin 2"),
    ("confidence-weighted", "twin 1"),
    ("permuted", "twin 1"),
    ("exits self-taught: exit 1", "exits on labels: exit 1"),
    ("exits self-taught: exit 2", "exits on labels: exit 2"),
    ("exits self-taught: exit 3", "exits on labels: exit 3"),
]


def test_each_network_is_compared_with_the_one_that_differs_in_teaching_alone(watched):
    report, _, _, output = watched
    assert [*report["differences"]] == [f"{name} - {other}" for name, other in PAIRS]
    for name, other in PAIRS:
        accuracies = [
            np.array([row["test_accuracy"] for row in report["results"] if row["name"] == x])
            for x in (name, other)
        ]
        points = 100 * (accuracies[0] - accuracies[1]).mean()
        assert report["differences"][f"{name} - {other}"] == pytest.approx(points)
        words = gain_in_words(*accuracies)
        (line,) = [x for x in output.splitlines() if x.startswith(f"{name} − {other} ")]
        assert line.removeprefix(f"{name} − {other}").strip() == words


def test_networks_are_scored_only_when_all_are_trained(watched):
    _, trainings, *_ = watched
    assert not [x for of_seed in trainings.values() for x in of_seed.values() if x.scored]


def test_each_block_learns_from_every_exit_behind_it(script):
    """With `early_weight` 1 the first block's gradient has a part of each exit."""
    network = script.ExitCNN(rngs=nnx.Rngs(0))
    image = np.random.default_rng(0).random((8, 28, 28, 1)).astype(np.float32)
    label = np.arange(8)

    def norm(block, exit_number):
        def loss_fn(network):
            return script.hard_loss(network(image, train=True)[exit_number], label)

        grads = nnx.grad(loss_fn)(network)
        return sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(grads["blocks"][block]))

    for block in range(3):
        for exit_number in range(3):
            assert (norm(block, exit_number) > 0) == (exit_number >= block)


def test_optimizers_are_made_for_the_recipes(script, watched):
    _, trainings, *_ = watched
    for of_seed in trainings.values():
        for training in of_seed.values():
            check_optimizer(script, training)


def test_each_row_names_its_repetition(watched):
    """Of generations and their twins the seed is another."""
    report, *_ = watched
    rows = report["results"]
    names = [row["name"] for row in rows if row["repetition"] == SEEDS[0]]
    assert names == [row["name"] for row in rows if row["repetition"] == SEEDS[1]]
    assert len(rows) == 2 * len(names) == 2 * len(set(names))
    for row in rows:
        same = row["name"] == "baseline" or row["name"].startswith(("ensemble", "last", "exits"))
        assert (row["seed"] == row["repetition"]) == same


def test_the_teachers_confidence_is_that_in_the_labelled_images(watched):
    report, trainings, _, _ = watched
    found = report["teacher_confidence"]
    assert [*found] == ["baseline", "generation 1", "generation 2", "permuted"]
    for name in ("baseline", "generation 1", "generation 2"):
        want = []
        for seed in SEEDS:
            training = trainings[seed][name]
            probs = jax.nn.softmax(utils.predict(training.model, training.split))
            want.append(probs.max(-1).mean())
        assert found[name] == pytest.approx(np.mean(want), rel=1e-4)
    assert found["permuted"] == pytest.approx(found["baseline"], rel=1e-5)


def test_time_is_that_of_the_self_taught_network_on_images_to_score(watched, few):
    report, trainings, measured, _ = watched
    ((network, split),) = measured
    assert network is trainings[8]["exits self-taught"].model
    assert split is few.test
    assert report["exit_milliseconds"] == [1.0, 2.0, 3.0]


def test_rows_are_in_the_order_of_the_seeds(watched):
    ensembles = ["ensemble of generations", "ensemble of twins"]
    exits = ["last exit only: exit 3"]
    exits += [f"{name}: exit {k}" for name in EXIT_NETWORKS[1:] for k in (1, 2, 3)]
    names = [row["name"] for row in watched[0]["results"]]
    assert names == 2 * [*STUDENTS, *ensembles, *exits]
