"""Architectures: what each network computes and costs, who learns from whom, the frontier."""

import itertools
import tempfile

import experiment
import jax
import numpy as np
import pytest
import utils
from conftest import EXAMPLES, check_optimizer, exhibit, load, make_run, watch
from flax import nnx

SCRIPT = "22_architectures.py"
DIGITS = utils.load_data("digits")
IMAGES = DIGITS.train.image[:8] / np.float32(255)
PARAMS = {
    "cnn": 946_954, "resnet": 73_194, "vit": 105_418, "student_cnn": 56_810, "cnn_half": 237_962,
    "cnn_quarter": 60_106, "cnn_eighth": 15_338, "separable": 14_250, "mlp": 55_050,
}  # fmt: skip


@pytest.fixture(scope="module")
def script():
    return load(EXAMPLES / SCRIPT)


# %% Museum


def each_student_learns_from_its_own_teacher(script):
    data = DIGITS._replace(train=DIGITS.train.take(np.arange(64)))
    with tempfile.TemporaryDirectory() as folder:
        config = script.Config(
            dataset="digits", output_dir=folder, teachers=("cnn_eighth", "mlp"),
            students=("separable",), labels=64, epochs=0, teacher_epochs=0,
        )  # fmt: skip
        _, watched = watch(script, data, config)
    teachers = {x.name: x.model for x in watched}
    for teacher in ("cnn_eighth", "mlp"):
        answers = utils.predict_by_index(teachers[f"teacher {teacher}"], data.train)
        [student] = [x for x in watched if x.name == f"separable from {teacher}"]
        np.testing.assert_allclose(student.given["teacher_logits"], answers, atol=1e-3)


MUSEUM = {
    each_student_learns_from_its_own_teacher: [
        # with several teachers, the answers of the first are looked up for all
        (SCRIPT, "train_logits_of[teacher]", "train_logits_of[config.teachers[0]]"),
    ],
}
BUGS = [(check, *bug) for check, bugs in MUSEUM.items() for bug in bugs]


@pytest.mark.parametrize(
    ("check", "file", "right", "wrong"), BUGS, ids=lambda x: getattr(x, "__name__", "")
)
def test_bug(check, file, right, wrong):
    exhibit(check, SCRIPT, file, right, wrong)


# %% Networks


@pytest.mark.parametrize("architecture", PARAMS)
def test_a_network_gives_logits_and_has_the_parameters_that_the_page_says(script, architecture):
    network = script.make_network(architecture, 7, 0)
    assert nnx.eval_shape(lambda network: network(IMAGES), network).shape == (8, 7)
    assert utils.count_params(script.make_network(architecture, 10, 0)) == PARAMS[architecture]
    same, other = (script.make_network(architecture, 7, seed) for seed in (0, 1))
    first = script.make_network(architecture, 7, 0)
    assert experiment.fingerprint(same) == experiment.fingerprint(first)
    assert experiment.fingerprint(other) != experiment.fingerprint(first)


@pytest.mark.parametrize("architecture", PARAMS)
def test_weights_are_float32_whatever_jax_takes_for_its_default(script, architecture):
    with jax.enable_x64(True):
        network = script.make_network(architecture, 10, 0)
    for weights in jax.tree.leaves(nnx.state(network, (nnx.Param, nnx.BatchStat))):
        assert weights.dtype == np.float32


def test_an_unknown_architecture_is_refused(script):
    with pytest.raises(ValueError, match="'cnm'"):
        script.make_network("cnm", 10, 0)


def test_a_share_of_1_is_the_teacher_of_script_15(script, kd):
    for train in (False, True):
        whole, teacher = script.make_network("cnn", 10, 3), kd.TeacherCNN(rngs=nnx.Rngs(3))
        np.testing.assert_array_equal(whole(IMAGES, train), teacher(IMAGES, train))
    half = script.make_network("cnn_half", 10, 0)
    assert half.conv3.kernel.shape == (3, 3, 64, 64)
    assert half.dense2.kernel.shape == (256, 128)


def test_a_residual_block_that_has_learned_nothing_is_its_shortcut(script):
    """y = relu(F(x) + W x), where F is zero."""
    block = script.ResidualBlock(3, 5, rngs=nnx.Rngs(0))
    block.bn2.scale[...] = np.zeros(5, np.float32)
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
    weights = np.asarray(block.shortcut.kernel[...])[0, 0]
    want = np.maximum(x[:, ::2, ::2] @ weights, 0)
    np.testing.assert_allclose(block(x), want, atol=1e-5)
    block.bn2.scale[...] = np.ones(5, np.float32)
    assert not np.allclose(block(x), want, atol=1e-2)


def shuffle_patches(images, order):
    """Images [B, 28, 28, 1] whose 49 patches of 4 by 4 pixels stand in another order."""
    shuffled = np.empty_like(images)
    for place, source in enumerate(order):
        (down, right), (y, x) = divmod(place, 7), divmod(int(source), 7)
        patch = images[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        shuffled[:, 4 * down : 4 * down + 4, 4 * right : 4 * right + 4] = patch
    return shuffled


def test_a_vision_transformer_knows_the_order_of_patches_by_their_places_alone(script):
    """Attention and the mean do not mind the order (Vaswani et al., 2017)."""
    vit = script.make_network("vit", 10, 0)
    shuffled = shuffle_patches(IMAGES, np.random.default_rng(0).permutation(49))
    assert not np.allclose(vit(IMAGES), vit(shuffled), atol=1e-3)
    vit.positions[...] = np.zeros((49, 64), np.float32)
    np.testing.assert_allclose(vit(IMAGES), vit(shuffled), atol=1e-4)
    # It is the patches whose order does not count, not the pixels'.
    assert not np.allclose(vit(IMAGES), vit(IMAGES[:, ::-1]), atol=1e-3)


def test_a_depthwise_convolution_does_not_mix_channels(script):
    block = script.SeparableConv(4, 6, 2, rngs=nnx.Rngs(0))
    assert block.depthwise.kernel.shape == (3, 3, 1, 4)
    assert block.pointwise.kernel.shape == (1, 1, 4, 6)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    assert block(x).shape == (2, 4, 4, 6)
    changed = x.copy()
    changed[..., 2] += 1
    before, after = np.asarray(block.depthwise(x)), np.asarray(block.depthwise(changed))
    np.testing.assert_array_equal(before[..., [0, 1, 3]], after[..., [0, 1, 3]])
    assert not np.allclose(before[..., 2], after[..., 2])


def test_flops_are_two_for_each_weight_that_is_used(script):
    """Of dense layers; what comes on top, sums with biases and ReLU, is a few percent."""
    products = 784 * 64 + 64 * 64 + 64 * 10
    flops = script.count_flops(script.make_network("mlp", 10, 0))
    assert 2 * products <= flops <= 2.05 * products
    # A 3×3 convolution with padding "VALID" is used at 26·26 and at 11·11 places.
    products = 26 * 26 * 9 * 16 + 11 * 11 * 9 * 16 * 32 + 800 * 64 + 640
    flops = script.count_flops(script.make_network("student_cnn", 10, 0))
    assert 2 * products <= flops <= 2.15 * products


# %% The experiment


@pytest.fixture(scope="module")
def experiment_on_digits(script, tmp_path_factory):
    """A run with two seeds, of two teachers and of two students, one of which is a teacher, too."""
    config = script.Config(
        dataset="digits", output_dir=str(tmp_path_factory.mktemp("out")), seeds=2, labels=64,
        teachers=("cnn_eighth", "mlp"), students=("mlp", "separable"), epochs=2,
        teacher_epochs=1, temperature=2.0, alpha=0.25, teacher_seed=9,
    )  # fmt: skip
    data = DIGITS._replace(train=DIGITS.train.take(np.arange(300)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(script.BASELINE_RATES, "mlp", 3e-3)
        patch.setitem(script.DISTILLED_RATES, "mlp", 7e-3)
        report, watched = watch(script, data, config)
    return data, report, watched


OF_A_SEED = [
    "baseline mlp", "mlp from cnn_eighth",
    "baseline separable", "separable from cnn_eighth", "separable from mlp",
]  # fmt: skip


def test_who_is_trained_in_which_order(experiment_on_digits):
    _, report, watched = experiment_on_digits
    names = ["teacher cnn_eighth", "teacher mlp", *OF_A_SEED, *OF_A_SEED]
    assert [x.name for x in watched] == [row["name"] for row in report["results"]] == names
    assert [row["seed"] for row in report["results"]] == [9, 9, *[42] * 5, *[43] * 5]
    for row in report["results"]:
        architecture = row["name"].removeprefix("baseline ").removeprefix("teacher ")
        assert row["params"] == PARAMS[architecture.split(" from ")[0]]
        assert ("latency_ms" in row) == (" from " not in row["name"])
        assert ("agreement" in row) == (" from " in row["name"])
        assert row["flops"] > 10_000


def test_a_student_agrees_with_its_own_teacher(experiment_on_digits):
    data, report, watched = experiment_on_digits
    teachers = {x.name: x.model for x in watched[:2]}
    for row, student in zip(report["results"], watched, strict=True):
        if " from " in row["name"]:
            teacher = teachers[f"teacher {row['name'].split(' from ')[1]}"]
            answers = [utils.predict(x, data.test).argmax(-1) for x in (teacher, student.model)]
            assert row["agreement"] == pytest.approx(np.mean(answers[0] == answers[1]))


def test_teachers_learn_from_all_labels_and_students_from_few(script, experiment_on_digits):
    data, _, watched = experiment_on_digits
    for teacher in watched[:2]:
        assert teacher.recipe == script.Recipe(9, 1, 32, script.OTHER_RATE, "onecycle", "shift")
        assert len(teacher.split.label) == 300
        check_optimizer(script, teacher)
    for seed, students in ((42, watched[2:7]), (43, watched[7:])):
        images = utils.take_labels(data.train, 64, seed).image
        for student in students:
            assert (student.recipe.seed, student.recipe.epochs) == (seed, 2)
            np.testing.assert_array_equal(student.split.image, images)
            check_optimizer(script, student)


def test_students_of_an_architecture_start_alike_see_the_same_and_have_rates_of_their_own(
    experiment_on_digits,
):
    _, _, watched = experiment_on_digits
    for students in (watched[2:4], watched[4:7], watched[7:9], watched[9:]):
        for student in students[1:]:
            assert student.start == students[0].start
            for batch, other in zip(student.batches, students[0].batches, strict=True):
                np.testing.assert_array_equal(batch["image"], other["image"])
                np.testing.assert_array_equal(batch["label"], other["label"])
                assert "teacher_logits" in batch
                assert "teacher_logits" not in other
    assert [x.recipe.learning_rate for x in watched[2:4]] == [3e-3, 7e-3]


def test_soft_targets_are_those_of_the_teacher_for_each_image(experiment_on_digits):
    data, _, watched = experiment_on_digits
    teachers = {x.name: x.model for x in watched[:2]}
    for student in watched[2:7]:
        if " from " in student.name:
            teacher = teachers[f"teacher {student.name.split(' from ')[1]}"]
            answers = utils.predict_by_index(teacher, data.train)
            shown = student.shown("teacher_logits")
            np.testing.assert_allclose(shown, answers[student.shown("index")], atol=1e-3)
            assert (student.given["temperature"], student.given["alpha"]) == (2.0, 0.25)


def test_the_recipe_of_all_students_but_for_the_rate_is_one(script, many):
    clothes = many._replace(name="fashion_mnist")
    config = script.fill_in_defaults(script.Config(), clothes)
    assert (config.labels, config.teachers, config.students) == (
        5000, ("cnn", "resnet", "vit"),
        ("student_cnn", "cnn_half", "cnn_quarter", "cnn_eighth", "separable", "mlp"),
    )  # fmt: skip
    for rates in (script.BASELINE_RATES, script.DISTILLED_RATES):
        assert rates.keys() == set(config.students)
        for architecture, rate in rates.items():
            recipe = script.recipe_of_student(config, clothes, architecture, 7, 5000, rates)
            assert recipe == script.Recipe(7, 17, 128, rate, "onecycle")
    flags = script.Config(epochs=3, learning_rate=0.5, batch_size=16)
    recipe = script.recipe_of_student(flags, clothes, "mlp", 7, 5000, script.BASELINE_RATES)
    assert recipe == script.Recipe(7, 3, 16, 0.5, "onecycle")
    flags = script.Config(teacher_epochs=4, teacher_learning_rate=0.25, teacher_seed=3)
    for architecture in config.teachers:
        recipe = script.recipe_of_teacher(flags, clothes, architecture)
        assert recipe == script.Recipe(3, 4, 128, 0.25, "onecycle", "none")


# %% Figure


@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_is_what_nothing_beats(script, seed):
    places = [tuple(x) for x in np.random.default_rng(seed).integers(0, 9, (12, 2)).tolist()]
    frontier = script.find_frontier(places)
    for place in places:
        beaten = any(
            other != place and other[0] <= place[0] and other[1] <= place[1] for other in places
        )
        assert (place in frontier) == (not beaten)
    assert len(frontier) == len(set(frontier))
    for (time, errors), (later, fewer) in itertools.pairwise(frontier):
        assert time < later
        assert errors > fewer


def test_the_title_names_the_smallest_and_the_largest_mean_gain(script, tmp_path):
    run = make_run(tmp_path, DIGITS)
    rows = {
        "baseline mlp": (0.80, 0.80), "mlp from cnn": (0.82, 0.81), "mlp from vit": (0.83, 0.79),
        "baseline separable": (0.90, 0.90), "separable from cnn": (0.91, 0.91),
    }  # fmt: skip
    for name, accuracies in rows.items():
        run.rows += [{"name": name, "test_accuracy": accuracy} for accuracy in accuracies]
    title = script.say_what_teachers_add(run, ("cnn", "vit"), ("mlp", "separable"))
    assert title == "Gains of 3 pairs over the baseline: +1.00 points to +1.50 points"
    title = script.say_what_teachers_add(run, ("vit",), ("mlp",))
    assert title == "Gain over the baseline: +1.00 points"
    title = script.say_what_teachers_add(run, ("resnet",), ("mlp",))
    assert title == "Errors and time of each network"


def test_the_figure_has_a_dot_for_each_network(experiment_on_digits, script, tmp_path):
    data, report, _ = experiment_on_digits
    run = make_run(tmp_path, data)
    run.rows += report["results"]
    figure = script.draw(run, ("cnn_eighth", "mlp"), ("mlp", "separable"))
    [axes] = figure.axes
    dots = [line for line in axes.lines if line.get_marker() != "None"]
    assert len(dots) == 2 + len(OF_A_SEED)
    errors = 100 - np.mean(run.accuracies("separable from mlp"))
    assert any(np.isclose(dot.get_ydata()[0], errors) for dot in dots)
    taught = [dot.get_marker() for dot in dots if dot.get_label().startswith("distilled")]
    assert len(set(taught)) == len(taught) == 2, "a marker for each teacher"
