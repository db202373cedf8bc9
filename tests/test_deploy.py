"""Script 23: pruning, rounding to int8, what is trained on what, and the files that are shipped."""

import os
import re
import sys

import experiment
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import utils
from conftest import EXAMPLES, ROOT, exhibit, load, make_run, refuse, watch
from flax import nnx
from tables import rows

SCRIPT = "23_compress_and_deploy.py"
SHAPE = (28, 28, 1)
RNG = np.random.default_rng(0)
IMAGES = RNG.random((6, *SHAPE)).astype(np.float32)

ONNX = pytest.mark.skipif(
    not load(EXAMPLES / SCRIPT).HAS_ONNX,
    reason="ONNX: python -m pip install -r examples/requirements-export.txt",
)


@pytest.fixture(scope="module")
def script():
    return load(EXAMPLES / SCRIPT)


@pytest.fixture(scope="module")
def labelled():
    """64 digits; an image's index is its row."""
    split = utils.load_data("digits").train.take(np.arange(64))
    return split._replace(index=np.arange(64, dtype=np.int32))


def make_student(script, seed=0):
    """A student with statistics and biases that are not those of a fresh one."""
    student = script.StudentCNN(rngs=nnx.Rngs(seed))
    for path, variable in nnx.to_flat_state(nnx.state(student, (nnx.Param, nnx.BatchStat))):
        if variable[...].ndim == 1:
            value = RNG.normal(1 if path[-1] in ("var", "scale") else 0, 0.1, variable.shape)
            variable[...] = jnp.asarray(value, jnp.float32)
    return student


def kernels_of(student):
    """All weights but biases and BatchNorm's, in one array."""
    params = jax.tree.leaves(nnx.state(student, nnx.Param))
    return np.concatenate([np.ravel(x) for x in params if x.ndim > 1])


def vectors_of(student):
    """The biases and BatchNorm's weights, in one array."""
    params = jax.tree.leaves(nnx.state(student, nnx.Param))
    return np.concatenate([np.ravel(x) for x in params if x.ndim == 1])


def answer(student, images=IMAGES, train=False):
    return np.asarray(student(images, train=train))


def make_batch(script, labelled, with_teacher=False):
    batch = {"image": labelled.image[:32] / np.float32(255), "label": labelled.label[:32]}
    if with_teacher:
        batch["teacher_logits"] = RNG.normal(0, 3, (32, 10)).astype(np.float32)
    return batch


# %% Museum


def pruned_weights_come_back(script):
    labelled = utils.load_data("digits").train.take(np.arange(32))
    recipe = experiment.Recipe(0, 1, 32, 1e-2, "constant")
    student = make_student(script)
    script.prune(student, 0.8)
    was_zero = kernels_of(student) == 0
    optimizer = script.make_compression_optimizer(student, recipe, 32)
    for _ in range(2):
        script.train_step(student, optimizer, make_batch(script, labelled))
    assert (kernels_of(student)[was_zero] == 0).all()


def a_layer_is_not_rounded_in_training(script):
    """Rounding twice is rounding once: weights on int8's grid give the same logits, to the bit."""
    student = nnx.clone(script.make_rounding_student(10))
    script.copy_weights(make_student(script), student)

    @nnx.jit
    def answer_in_training(student):
        # With a gradient: there the first layer has a faster form of its own.
        def loss(student):
            logits = student(IMAGES, train=True)
            return logits.sum(), logits

        (_, logits), gradient = nnx.value_and_grad(loss, has_aux=True)(student)
        return logits, gradient

    before, _ = answer_in_training(student)
    for layer in (student.conv1, student.conv2, student.dense1, student.dense2):
        kernel = np.asarray(layer.kernel[...])
        scale = np.abs(kernel).max(tuple(range(kernel.ndim - 1)), keepdims=True) / 127.5
        rounded = np.round(kernel / scale) * scale
        # The largest weights stay as they are, since they make the scale.
        layer.kernel[...] = jnp.asarray(np.where(np.abs(kernel) > 126 * scale, kernel, rounded))
    after, _ = answer_in_training(student)
    np.testing.assert_array_equal(after, before)


def labels_alone_have_a_teacher(script):
    labelled = utils.load_data("digits").train.take(np.arange(32))
    recipe = experiment.Recipe(0, 1, 32, 1e-2, "constant")
    lesson = script.Lesson(labelled, 10, None, 3.0, 0.5)
    [batch] = script.make_batches(lesson, recipe, 1)
    assert "teacher_logits" not in batch


MUSEUM = {
    pruned_weights_come_back: [
        (SCRIPT, "optax.chain(make_transform(learning_rate, schedule, steps), stay_pruned)",
         "make_transform(learning_rate, schedule, steps)"),
    ],
    a_layer_is_not_rounded_in_training: [
        # `fast.conv`, which qwix does not see in training
        (SCRIPT, "    student.conv1.conv_general_dilated = jax.lax.conv_general_dilated\n", ""),
    ],
    labels_alone_have_a_teacher: [
        (SCRIPT, "    tables = {}\n",
         "    tables = {'teacher_logits': np.zeros((1437, 10), np.float32)}\n"),
    ],
}  # fmt: skip
BUGS = [(check, *bug) for check, bugs in MUSEUM.items() for bug in bugs]


@pytest.mark.parametrize(
    ("check", "file", "right", "wrong"), BUGS, ids=lambda x: getattr(x, "__name__", "")
)
def test_bug(check, file, right, wrong):
    exhibit(check, SCRIPT, file, right, wrong)


# %% Pruning


def test_sparsity_rises_to_the_final_one_in_the_middle(script):
    shares = [script.find_sparsity(progress, 0.8) for progress in np.linspace(0, 1, 21)]
    assert shares[0] == 0
    assert shares[5] == pytest.approx(0.8 * (1 - 0.5**3))
    assert np.diff(shares[:11]).min() > 0
    assert set(shares[10:]) == {0.8}
    steps = np.diff(shares[:11])
    assert (np.diff(steps) < 0).all(), "fast at first"


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.99])
def test_pruning_takes_the_smallest_weights_of_all_layers(script, sparsity):
    student = make_student(script)
    before, vectors = kernels_of(student), vectors_of(student)
    script.prune(student, sparsity)
    after = kernels_of(student)
    count = round(sparsity * len(before))
    assert (after == 0).sum() == count
    assert script.measure_sparsity(student) == count / len(before)
    np.testing.assert_array_equal(vectors_of(student), vectors)
    kept = after != 0
    np.testing.assert_array_equal(after[kept], before[kept])
    if count:
        assert np.abs(before[~kept]).max() <= np.abs(before[kept]).min()


def test_pruning_more_keeps_what_was_pruned(script):
    student = make_student(script)
    script.prune(student, 0.5)
    was_zero = kernels_of(student) == 0
    script.prune(student, 0.8)
    assert (kernels_of(student)[was_zero] == 0).all()
    assert script.measure_sparsity(student) == pytest.approx(0.8, abs=1e-4)


def test_only_what_was_pruned_stands_still(script, labelled):
    """Also a bias that happens to be 0 goes on learning."""
    student = script.StudentCNN(rngs=nnx.Rngs(0))
    script.prune(student, 0.8)
    before, vectors = kernels_of(student), vectors_of(student)
    recipe = experiment.Recipe(0, 1, 32, 1e-2, "constant")
    optimizer = script.make_compression_optimizer(student, recipe, 64)
    script.train_step(student, optimizer, make_batch(script, labelled))
    moved = kernels_of(student) != before
    assert not moved[before == 0].any()
    assert moved[before != 0].mean() > 0.8
    assert (vectors_of(student) != vectors).mean() > 0.9


def test_a_compression_learns_by_script_15_s_optimizer(script):
    """But for what is pruned: Adam, with the recipe's rate and schedule over all its steps."""
    recipe = experiment.Recipe(0, 3, 32, 4e-3, "onecycle")
    student = make_student(script)
    chained = script.make_compression_optimizer(student, recipe, 64).tx
    plain = script.make_transform(4e-3, "onecycle", 6)
    weights = {"w": jnp.asarray([0.0, 1.0]), "kernel": jnp.asarray([[0.0, 2.0]])}
    gradients = jax.tree.map(jnp.ones_like, weights)
    states = [chained.init(weights), plain.init(weights)]
    for _ in range(4):
        found, states[0] = chained.update(gradients, states[0], weights)
        want, states[1] = plain.update(gradients, states[1], weights)
        np.testing.assert_array_equal(found["w"], want["w"])
        np.testing.assert_array_equal(found["kernel"], want["kernel"] * np.array([0, 1]))


# %% int8


def test_weights_after_training_are_int8_with_a_scale_for_each_output(script):
    student = make_student(script)
    int8 = script.quantize_after_training(student)
    for name in ("conv1", "conv2", "dense1", "dense2"):
        kernel = np.asarray(getattr(student, name).kernel[...])
        quantized = getattr(int8, name).kernel.array
        values, scale = (np.asarray(x[...]) for x in (quantized.qvalue, quantized.scale))
        assert values.dtype == np.int8
        axes = tuple(range(kernel.ndim - 1))
        np.testing.assert_allclose(
            scale, np.abs(kernel).max(axes, keepdims=True) / 127.5, rtol=1e-5
        )
        np.testing.assert_allclose(values, np.round(kernel / scale), atol=1)
        assert np.abs(values * scale - kernel).max() <= 0.51 * scale.max()
    assert kernels_of(student).dtype == np.float32, "the student itself is left alone"


def test_rounding_costs_little_and_something(script):
    student = make_student(script)
    int8 = script.quantize_after_training(student)
    difference = np.abs(answer(int8) - answer(student)).max()
    assert 0 < difference < 0.1 * np.abs(answer(student)).max()


def test_each_image_has_scales_of_its_own(script):
    """A bright image beside it does not change an answer."""
    int8 = script.quantize_after_training(make_student(script))
    together = np.concatenate([IMAGES[:1], 50 * IMAGES[1:]])
    np.testing.assert_allclose(answer(int8, together)[0], answer(int8, IMAGES[:1])[0], atol=1e-4)


def test_what_rounds_in_training_answers_like_int8_after_it(script):
    student = make_student(script)
    rounding = nnx.clone(script.make_rounding_student(10))
    script.copy_weights(student, rounding)
    int8 = script.quantize_after_training(student)
    np.testing.assert_allclose(answer(rounding), answer(int8), atol=1e-3)
    assert np.abs(answer(rounding) - answer(student)).max() > 1e-3


def test_the_gradient_passes_through_the_rounding(script, labelled):
    student = nnx.clone(script.make_rounding_student(10))
    script.copy_weights(make_student(script), student)
    before = kernels_of(student)
    optimizer = nnx.Optimizer(student, optax.sgd(0.1), wrt=nnx.Param)
    script.train_step(student, optimizer, make_batch(script, labelled))
    assert (kernels_of(student) != before).mean() > 0.5


def test_copies_of_the_rounding_student_share_nothing_but_their_class(script):
    template = script.make_rounding_student(10)
    before = experiment.fingerprint(template)
    one, other = nnx.clone(template), nnx.clone(template)
    script.copy_weights(make_student(script, 1), one)
    script.copy_weights(make_student(script, 2), other)
    assert experiment.fingerprint(template) == before
    assert type(one) is type(other)
    assert np.abs(kernels_of(one) - kernels_of(other)).max() > 0


# %% Training


def test_with_teacher_or_without_a_step_is_script_15_s(script, labelled, kd):
    """The step of a compression is the plain one: labels alone, or labels and teacher."""
    for with_teacher in (False, True):
        batch = make_batch(script, labelled, with_teacher)
        states = []
        for module in (script, kd):
            student = module.StudentCNN(rngs=nnx.Rngs(3))
            optimizer = nnx.Optimizer(student, optax.sgd(0.1), wrt=nnx.Param)
            if module is script:
                lesson = script.Lesson(labelled, 10, batch.get("teacher_logits"), 2.0, 0.3)
                script.make_step(student, optimizer, lesson)(batch)
            elif with_teacher:
                kd.train_student_step(student, None, optimizer, batch, 2.0, 0.3)
            else:
                kd.train_step(student, optimizer, batch)
            states.append(kernels_of(student))
        np.testing.assert_allclose(*states, atol=1e-6)


def test_a_sparse_student_ends_sparse_and_leaves_the_dense_one_alone(script, labelled, tmp_path):
    dense = make_student(script)
    before = experiment.fingerprint(dense)
    recipe = experiment.Recipe(0, 2, 32, 1e-3, "onecycle")
    run = make_run(tmp_path, utils.load_data("digits"))
    lesson = script.Lesson(labelled, 10, None, 3.0, 0.5)
    sparse = script.train_sparse("x", dense, 0.9, lesson, recipe, run)
    assert experiment.fingerprint(dense) == before
    assert script.measure_sparsity(sparse) == pytest.approx(0.9, abs=1e-4)
    kept = kernels_of(sparse) != 0
    assert np.abs(kernels_of(dense)[kept]).mean() > 2 * np.abs(kernels_of(dense)[~kept]).mean()
    both = script.train_int8("y", sparse, lesson, recipe, run)
    np.testing.assert_array_equal(kernels_of(both) == 0, ~kept)
    assert (kernels_of(both)[kept] != kernels_of(sparse)[kept]).mean() > 0.5
    weights = experiment.load_network(tmp_path, "x", script.StudentCNN(rngs=nnx.Rngs(1)))
    assert script.measure_sparsity(weights) == script.measure_sparsity(sparse)


# %% Files


@pytest.mark.parametrize("is_int8", [False, True])
def test_stablehlo_answers_like_the_network_for_batches_of_any_size(script, is_int8):
    network = make_student(script)
    if is_int8:
        network = script.quantize_after_training(network)
    content = script.export_stablehlo(network)
    load_again = script.load_stablehlo(content)
    for images in (IMAGES[:1], IMAGES):
        np.testing.assert_allclose(load_again(images), answer(network, images), atol=2e-3)
    weights = len(kernels_of(make_student(script)))
    assert weights < len(content) < 1.25 * weights if is_int8 else len(content) > 4 * weights


@ONNX
def test_onnx_answers_like_the_network_for_batches_of_any_size(script):
    for network in (make_student(script), script.TeacherCNN(rngs=nnx.Rngs(0))):
        content = script.export_onnx(network)
        load_again = script.load_onnx(content)
        for images in (IMAGES[:1], IMAGES):
            np.testing.assert_allclose(load_again(images), answer(network, images), atol=1e-4)


@ONNX
def test_copied_functions_export_another_network(tmp_path):
    """Those that the page shows, with what it says of the network."""
    page = (EXAMPLES.parent / "docs/23_compress_and_deploy.md").read_text()
    shown = page[page.index("### Files") : page.index("For a project of your own")]
    source = (EXAMPLES / SCRIPT).read_text()
    functions = re.findall(r"^def .*?(?=^```|^def )", shown, re.MULTILINE | re.DOTALL)
    functions += re.findall(r"^def to_function.*?(?=^def )", source, re.MULTILINE | re.DOTALL)
    imports = """
import logging, tempfile
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
IMAGE_SHAPE = (28, 28, 1)
"""
    assert len(functions) == 6
    text = imports + "\n".join(functions)
    copied = load(tmp_path / "copied_functions.py", text)

    class Network(nnx.Module):
        def __init__(self, pool, rngs):
            self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
            self.dense = nnx.Linear(14 * 14 * 8, 10, rngs=rngs)
            self.pool = pool

        def __call__(self, x, train):
            x = self.pool(nnx.relu(self.conv(x)))
            return self.dense(x.reshape(x.shape[0], -1))

    network = Network(
        lambda x: nnx.max_pool(x, window_shape=(2, 2), strides=(2, 2)), rngs=nnx.Rngs(0)
    )
    onnx = copied.export_onnx(network)
    int8 = copied.quantize_onnx(onnx, IMAGES)
    stablehlo = copied.load_stablehlo(copied.export_stablehlo(network))
    np.testing.assert_allclose(stablehlo(IMAGES), answer(network), atol=1e-4)
    np.testing.assert_allclose(copied.load_onnx(onnx)(IMAGES), answer(network), atol=1e-4)
    np.testing.assert_allclose(copied.load_onnx(int8)(IMAGES), answer(network), atol=0.1)

    unnamed = Network(lambda x: nnx.max_pool(x, (2, 2), (2, 2)), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="positional"):
        copied.export_onnx(unnamed)


@ONNX
def test_onnx_keeps_pooling_whole(script):
    """As an operation of its own, which runtimes know to be fast."""
    import onnx

    model = onnx.load_from_string(script.export_onnx(make_student(script)))
    operations = [node.op_type for node in model.graph.node]
    assert operations.count("MaxPool") == operations.count("Conv") == 2
    assert not {"Less", "Where", "GatherND"} & set(operations)
    [images], [logits] = model.graph.input, model.graph.output
    assert (images.name, logits.name) == ("images", "logits")


@ONNX
def test_int8_onnx_is_small_right_and_safe_from_overflow(script, digits):
    import onnx
    from onnx import numpy_helper

    student = make_student(script)
    script.prune(student, 0.8)
    original = script.export_onnx(student)
    content = script.quantize_onnx(original, digits.train.image[:200] / np.float32(255))
    assert len(content) < 0.3 * len(original)
    model = onnx.load_from_string(content)
    operations = [node.op_type for node in model.graph.node]
    assert operations.count("QLinearConv") == operations.count("QGemm") == 2
    initializers = model.graph.initializer
    weights = [numpy_helper.to_array(x) for x in initializers if len(x.dims) > 1]
    weights = [x for x in weights if x.dtype == np.int8]
    assert len(weights) == 4
    for x in weights:
        assert 60 <= np.abs(x.astype(int)).max() <= 64, "7 bits: sums of two products fit in 16"
    zeros = sum((x == 0).sum() for x in weights) / sum(x.size for x in weights)
    assert zeros >= 0.8, "what is pruned stays 0"

    images = digits.test.image[:100] / np.float32(255)
    want = script.load_onnx(original)(images)
    found = script.load_onnx(content)(images)
    assert np.abs(found - want).mean() < 0.05 * np.abs(want).max()


def test_a_file_is_checked_on_every_image(script, digits):
    split = digits.test.take(np.arange(139))  # one batch of 128, and 11 images
    original = np.eye(10, dtype=np.float32)[split.label]  # all right
    shown = []

    def load_again(images):
        begin = sum(map(len, shown))
        shown.append(images)
        logits = np.full((len(images), 10), 100, np.float32)  # of what fills up a batch
        logits[: 139 - begin] = original[begin : begin + len(images)]
        if begin + len(images) >= 139:  # the last answer is another, by 3 points of a logit
            logits[138 - begin, split.label[-1]] += 0.5
            logits[138 - begin, (split.label[-1] + 1) % 10] += 3
        return logits

    found = script.check_answers(load_again, original, split)
    assert found["accuracy"] == pytest.approx(138 / 139)
    assert found["different_answers"] == 1
    assert found["largest_difference"] == 3
    np.testing.assert_allclose(np.concatenate(shown)[:139] * 255, split.image, atol=1e-3)
    assert {len(images) for images in shown} == {128}, "another size would be compiled anew"


def test_a_file_is_weighed_as_it_is_and_packed(script):
    content = bytes(1000) + RNG.bytes(500)
    found = script.weigh(content)
    assert found["bytes"] == 1500
    assert 500 < found["gzip_bytes"] < 600
    assert script.weigh(content) == found, "no date in it"
    assert script.weigh(content[::-1])["sha256"] != found["sha256"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system keeps no cores")
def test_all_threads_are_kept_on_one_core_and_let_go_again(script):
    threads = os.listdir("/proc/self/task")
    before = {thread: os.sched_getaffinity(int(thread)) for thread in threads}

    def cores():
        return {
            thread: os.sched_getaffinity(int(thread))
            for thread in before
            if os.path.exists(f"/proc/self/task/{thread}")
        }

    with script.one_core():
        assert {len(x) for x in cores().values()} == {1}
    assert cores() == {thread: before[thread] for thread in cores()}

    def fail():
        with script.one_core():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert cores() == {thread: before[thread] for thread in cores()}


def test_latency_is_the_median_and_the_95th_percentile(script, monkeypatch):
    """Of one turn in ten that takes 9 ms, the others 2 ms; the first, which compiles, is left
    out."""
    clock, sizes = [0.0], []

    def load_again(images):
        sizes.append(images.shape)
        turn = len([size for size in sizes if size == images.shape])
        slow = 0.009 if turn % 10 == 2 else 0.002
        clock[0] += 5.0 if turn == 1 else slow

    monkeypatch.setattr(script.time, "perf_counter", lambda: clock[0])
    found = script.measure_latency(load_again, turns=30)
    for size in ("1", "128"):
        assert found[size]["median"] == pytest.approx(2)
        assert found[size]["p95"] == pytest.approx(9)
    assert sizes == [(1, *SHAPE)] * 31 + [(128, *SHAPE)] * 31


# %% The whole script


@pytest.fixture(scope="module")
def watched(script, digits, tmp_path_factory):
    """A small run: its report, its trainings by name, its folder."""
    folder = tmp_path_factory.mktemp("deploy")
    config = script.Config(
        dataset="digits", quick=True, labels=64, epochs=2, compression_epochs=1,
        sparsities=(0.9,), seeds=1, seed=7, teacher_seed=3, temperature=2.0, alpha=0.25,
        output_dir=str(folder),
    )  # fmt: skip
    data = digits._replace(
        train=digits.train.take(np.arange(256)), test=digits.test.take(np.arange(100))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "measure_latency", lambda *_: {"1": TIMES, "128": TIMES})
        report, trainings = watch(script, data, config)
    return report, {training.name: training for training in trainings}, folder


TIMES = {"median": 1.0, "p95": 2.0}
GROUPS = ("baseline", "distilled", "distilled, teacher left out")
COMPRESSIONS = ("trained on", "int8 in training", "90 % sparse", "90 % sparse int8")


def test_what_is_trained(watched):
    _, trainings, _ = watched
    of_students = [f"{owner}, {how}" for owner in ("baseline", "distilled") for how in COMPRESSIONS]
    without = [f"distilled, teacher left out, {how}" for how in COMPRESSIONS]
    assert set(trainings) == {"teacher", "baseline", "distilled", *of_students, *without}


def test_only_distilled_students_are_shown_the_teacher(watched):
    _, trainings, _ = watched
    for name, training in trainings.items():
        has_teacher = name.startswith("distilled") and "left out" not in name
        for batch in training.batches:
            assert ("teacher_logits" in batch) == has_teacher, name
            if has_teacher:
                lesson = training.given["lesson"]
                assert (lesson.temperature, lesson.alpha) == (2.0, 0.25)
                want = lesson.teacher_logits[batch["index"]]
                np.testing.assert_array_equal(batch["teacher_logits"], want)


def test_the_teacher_is_frozen_and_its_logits_are_of_the_batch(watched):
    _, trainings, _ = watched
    teacher = trainings["teacher"]
    labelled = trainings["distilled"].split
    want = utils.predict(teacher.model, labelled)
    table = trainings["distilled, 90 % sparse int8"].given["lesson"].teacher_logits
    np.testing.assert_allclose(table[labelled.index], want, atol=1e-3)


def test_both_students_start_alike_and_see_the_same_batches(watched):
    _, trainings, _ = watched
    baseline, distilled = trainings["baseline"], trainings["distilled"]
    assert baseline.start == distilled.start
    np.testing.assert_array_equal(baseline.shown("index"), distilled.shown("index"))
    assert len(baseline.split.label) == 64
    for how in COMPRESSIONS:
        shown = [trainings[f"{group}, {how}"].shown("index") for group in GROUPS]
        np.testing.assert_array_equal(shown[0], shown[1])
        np.testing.assert_array_equal(shown[0], shown[2])


def test_a_compression_starts_from_the_student_that_is_named(watched, script):
    _, trainings, _ = watched
    for group in GROUPS:
        dense = trainings[group.split(",")[0]].model
        sparse = trainings[f"{group}, 90 % sparse"].model
        for how in COMPRESSIONS:
            wanted = sparse if how == "90 % sparse int8" else dense
            assert trainings[f"{group}, {how}"].given["start"] is wanted
        assert trainings[f"{group}, 90 % sparse"].given["sparsity"] == 0.9
        assert trainings[f"{group}, trained on"].given["sparsity"] == 0


def test_the_recipes(watched):
    _, trainings, _ = watched
    dense = trainings["distilled"].recipe
    assert dense == trainings["baseline"].recipe
    assert (dense.seed, dense.epochs, dense.batch_size) == (7, 2, 32)
    for name, training in trainings.items():
        if "," in name:
            rate = 1e-3 if "left out" in name else 5e-3  # there are few labels
            assert training.recipe == dense._replace(epochs=1, learning_rate=rate), name
    assert trainings["teacher"].recipe.seed == 3


def test_the_rate_is_lower_where_few_labels_teach_without_the_teacher(script):
    recipe = experiment.Recipe(0, 4, 128, 2e-2, "onecycle")

    def rate(labels, left_out, **flags):
        config = script.Config(**flags)
        return script.compression_recipe(config, recipe, labels, left_out).learning_rate

    assert [rate(9_999, True), rate(10_000, True), rate(9_999, False)] == [1e-3, 5e-3, 5e-3]
    assert rate(100, True, compression_learning_rate=0.3) == 0.3
    assert script.compression_recipe(script.Config(), recipe, 100).epochs == 2


def test_the_results_say_what_rounded_and_what_exported(watched, script):
    """And a training that another qwix has rounded is not taken up."""
    report, _, _ = watched
    for row in report["results"]:
        by_qwix = row["compression"] in ("int8 in training", "sparse int8")
        assert row.get("rounded_by") == (script.ROUNDED_BY if by_qwix else None)
    assert re.fullmatch(r"qwix \d+\.\d+\.\d+", script.ROUNDED_BY)
    assert set(report["exporters"]) == (set(script.EXPORTERS) if script.HAS_ONNX else set())
    before = experiment.fingerprint(script.train_int8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "ROUNDED_BY", "qwix 9.9.9")
        assert experiment.fingerprint(script.train_int8) != before


def test_rows_are_of_what_is_shipped(watched, script, digits):
    """An int8 row is scored with int8 weights, a sparse one says how sparse it is."""
    report, trainings, folder = watched
    rows = {row["name"]: row for row in report["results"]}
    assert len(rows) == len(report["results"]) == len(trainings) + 2  # int8 after training
    for name, row in rows.items():
        share = 0.9 if "90 %" in name else 0.0
        assert row["sparsity"] == share
        assert row["zeros"] == pytest.approx(share, abs=1e-3), name
        assert row["params"] == (946_954 if name == "teacher" else 56_810)
        assert row["seed"] == (3 if name == "teacher" else 7)
    test = digits.test.take(np.arange(100))
    for name in ("baseline", "distilled, int8 after training", "distilled, 90 % sparse int8"):
        owner = name.removesuffix(", int8 after training")
        network = script.StudentCNN(rngs=nnx.Rngs(9))
        network = experiment.load_network(folder, owner, network)
        if "int8" in name:
            network = script.quantize_after_training(network)
        logits = utils.predict(network, test)
        assert rows[name]["test_errors"] == (logits.argmax(-1) != test.label).sum()
    after = rows["distilled, int8 after training"]
    assert after["seconds"] == 0
    assert rows["distilled, int8 in training"]["seconds"] > 0


def test_files_are_there_and_as_the_rows_say(watched, script, digits):
    report, _, folder = watched
    kinds = ["stablehlo", "onnx"] if script.HAS_ONNX else ["stablehlo"]
    for row in report["results"]:
        assert list(row["files"]) == kinds
        in_full = row["group"] in ("teacher", "distilled")
        for kind, file in row["files"].items():
            path = script.path_of_export(folder, row["name"], row["seed"], kind)
            assert file["bytes"] == len(path.read_bytes())
            assert " " not in path.name
            assert "%" not in path.name
            assert str(EXAMPLES).encode() not in path.read_bytes(), "a folder of this computer"
            assert file.get("latency_ms") == ({"1": TIMES, "128": TIMES} if in_full else None)
            assert ("accuracy" in file) == (kind == "onnx" or in_full)
            if "int8" not in row["name"] and "accuracy" in file:
                assert file["different_answers"] == 0
                assert file["accuracy"] == pytest.approx(row["test_accuracy"])
                assert file["largest_difference"] < 1e-3


def test_the_columns_of_the_printed_table_stand_below_one_another(script, tmp_path, capsys):
    """Under the longest name, too."""
    run = make_run(tmp_path, None, script.Config())
    file = {"bytes": 1000, "gzip_bytes": 500, "accuracy": 0.5}
    file["latency_ms"] = {"1": TIMES, "128": TIMES}
    long_name = script.name_of_student(script.LEFT_OUT, "sparse int8", 0.99999)
    for name in ("teacher", long_name):
        run.rows.append({"name": name, "files": {"stablehlo": file, "onnx": file}})
    script.print_files(run)
    header, *lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 4
    for title, value in {"on disk": "1.0 kB", "packed": "0.5 kB", "accuracy": "50.00 %"}.items():
        end = header.index(title) + len(title)
        assert all(line[:end].endswith(f" {value}") for line in lines)


def test_zeros_are_worth_nothing_until_they_are_packed(watched):
    report, _, _ = watched
    files = {row["name"]: row["files"]["stablehlo"] for row in report["results"]}
    dense, sparse = files["distilled"], files["distilled, 90 % sparse"]
    assert sparse["bytes"] == pytest.approx(dense["bytes"], rel=0.001)
    assert sparse["gzip_bytes"] < 0.2 * dense["gzip_bytes"]
    int8 = files["distilled, int8 in training"]
    assert int8["bytes"] < 0.3 * dense["bytes"]


def test_without_onnx_there_is_stablehlo_and_the_summary_says_how_to_have_it(
    script, digits, tmp_path, monkeypatch
):
    monkeypatch.setattr(script, "HAS_ONNX", False)
    run = make_run(tmp_path, digits, script.Config(sparsities=(0.5,)))
    (tmp_path / "exports").mkdir()
    network = make_student(script)
    logits = utils.predict(network, digits.test)
    monkeypatch.setattr(script, "measure_latency", lambda *_: {"1": TIMES, "128": TIMES})
    for group, compression in (("teacher", "float32"), ("distilled", "float32"),
                               ("distilled", "sparse int8")):  # fmt: skip
        sparsity = 0.5 if compression == "sparse int8" else 0.0
        student = script.Student(group, compression, sparsity, network)
        script.ship(student, run, 0, logits, is_timed=True)
    assert all(list(row["files"]) == ["stablehlo"] for row in run.rows)
    assert {path.suffix for path in tmp_path.glob("exports/*")} == {".stablehlo"}
    lines = script.summarise_compression(run)
    [hint] = [line for what, line in lines.items() if "not installed" in what]
    assert "pip install -r examples/requirements-export.txt" in hint
    assert script.draw(run)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "jax2onnx"])
def test_an_exporter_that_cannot_be_imported_is_named_before_a_training(
    script, package, tmp_path, monkeypatch, capsys
):
    """Whatever it raises: a library that is missing below it, a version that does not fit."""

    class Importlib:
        @staticmethod
        def import_module(name):
            if name.split(".")[0] == package:
                raise RuntimeError("compiled for another NumPy")

    monkeypatch.setattr(script, "HAS_ONNX", True)
    monkeypatch.setattr(script, "importlib", Importlib)
    arguments = [SCRIPT, "--dataset", "digits", "--quick", "--output-dir", tmp_path]
    output = refuse(script, arguments, monkeypatch, capsys)
    why = f"{package}: cannot be imported (RuntimeError: compiled for another NumPy); mend it by"
    assert why in output.err
    assert "requirements-export.txt" in output.err
    assert "TEACHER" not in output.out


def test_jax_platforms_without_the_cpu_is_refused_before_a_training(
    script, tmp_path, monkeypatch, capsys
):
    """As JAX_PLATFORMS=cuda beside a GPU. Files are checked and timed on the CPU."""
    real_devices = jax.local_devices

    def local_devices(*, backend=None):
        if backend == "cpu":
            raise RuntimeError("Unknown backend cpu")
        return real_devices(backend=backend)

    monkeypatch.setattr(jax, "local_devices", local_devices)
    arguments = [SCRIPT, "--dataset", "digits", "--quick", "--output-dir", tmp_path]
    output = refuse(script, arguments, monkeypatch, capsys)
    assert f"say JAX_PLATFORMS={jax.config.jax_platforms},cpu" in output.err
    assert "TEACHER" not in output.out


def test_the_figure_shows_the_accuracy_of_the_file_on_its_axis(script, tmp_path, digits):
    """Of an int8 network onnxruntime's, which rounds in its own way."""
    run = make_run(tmp_path, digits)
    files = {"onnx": {"accuracy": 0.5}, "stablehlo": {}}
    run.rows.append({"name": "x", "test_accuracy": 0.75, "files": files})
    assert script.accuracies_of_files(run, "x", "onnx") == [50.0]
    assert script.accuracies_of_files(run, "x", "stablehlo") == [75.0]


def test_names_tell_group_compression_and_share(script):
    assert script.name_of_student("distilled", "float32") == "distilled"
    assert script.name_of_student("baseline", "sparse int8", 0.8) == "baseline, 80 % sparse int8"
    assert script.name_of_student(script.LEFT_OUT, "sparse", 0.975) == (
        "distilled, teacher left out, 97.5 % sparse"
    )
    assert script.name_of_student("distilled", "trained on") == "distilled, trained on"


def test_the_exporters_are_needed_by_nothing_else(script):
    """They are imported where they are used, not when the script starts."""
    assert "jax2onnx" not in sys.modules or script.HAS_ONNX
    text = (EXAMPLES / SCRIPT).read_text()
    for package in ("jax2onnx", "onnxruntime"):
        assert f"\nimport {package}" not in text
        assert f"\nfrom {package}" not in text


# %% Networks for the page to play with


def test_networks_of_a_run_are_collected_as_jax_has_them(watched, script, digits, monkeypatch):
    report, _, folder = watched
    collect = load(ROOT / "docs/playground/collect.py", name="collect")
    monkeypatch.setitem(collect.NETWORKS, "shipped", "distilled, 90 % sparse int8")
    seeds = {"teacher": 3, "student": 7, "shipped": 7}
    networks = collect.load_networks(folder, script, seeds)
    test = digits.test.take(np.arange(100))
    errors = {row["name"]: row["test_errors"] for row in report["results"]}
    for key, name in collect.NETWORKS.items():
        answers = utils.predict(networks[key], test).argmax(axis=1)
        assert (answers != test.label).sum() == errors[name]


@pytest.mark.parametrize(
    ("file", "name"),
    [("teacher", "teacher"), ("student", "distilled"), ("shipped", "distilled, 80 % sparse int8")],
)
def test_committed_networks_are_as_accurate_as_the_results_say(script, file, name):
    """Another processor may round one image's logits to the other side."""
    pytest.importorskip("onnxruntime", reason=script.HOW_TO_HAVE_ONNX)
    if "MNIST_DATA_DIR" not in os.environ:
        pytest.skip("no MNIST: set MNIST_DATA_DIR")
    test = utils.load_data("mnist").test
    answer = script.load_onnx((ROOT / f"docs/playground/models/{file}.onnx").read_bytes())
    chunks = np.split(np.float32(test.image) / 255, 100)
    answers = np.concatenate([answer(chunk).argmax(1) for chunk in chunks])
    accuracy = (answers == test.label).mean()
    assert accuracy == pytest.approx(rows("deploy", name)[0]["files"]["onnx"]["accuracy"], abs=2e-4)
