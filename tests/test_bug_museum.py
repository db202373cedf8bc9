"""Bugs found in published distillation code. Each check passes on our code, and it must
fail when its bug is put in: a line of the source is replaced, and the check is run again."""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import utils
from conftest import exhibit, make_run
from flax import nnx

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (RNG.normal(0, 3, (8, 10)).astype(np.float32) for _ in range(2))
LABELS = RNG.integers(0, 10, 8).astype(np.int32)
IMAGES = RNG.random((8, 28, 28, 1)).astype(np.float32)
RECIPE = (3, 1, 8, 1e-3, "constant")


def soft_in_numpy(t):
    p, q = (np.asarray(jax.nn.log_softmax(z / t)) for z in (TEACHER, STUDENT))
    return t**2 * (np.exp(p) * (p - q)).sum(-1).mean()


def check_soft(kd, t):
    soft = kd.distillation_loss(STUDENT, TEACHER, LABELS, t)[2]
    np.testing.assert_allclose(soft, soft_in_numpy(t), rtol=1e-4)


def batch(**more):
    return {"image": IMAGES, "label": LABELS} | more


def pair(kd):
    """A student, a teacher and an optimizer."""
    student, teacher = kd.StudentCNN(rngs=nnx.Rngs(0)), kd.TeacherCNN(rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(student, optax.sgd(0.1), wrt=nnx.Param)
    return student, teacher, optimizer


def everything(model):
    return [np.array(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
            for x in jax.tree.leaves(nnx.state(model))]  # fmt: skip


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def t_squared_missing(kd):
    check_soft(kd, 20.0)


def teacher_and_student_swapped(kd):
    check_soft(kd, 1.0)


def kl_of_teacher_with_itself(kd):
    grad = jax.grad(lambda z: kd.distillation_loss(z, TEACHER, LABELS, alpha=0.0)[0])(STUDENT)
    assert np.abs(grad).max() > 1e-3


def cached_logits_do_not_match_shuffled_images(kd):
    data = utils.load_data("digits")
    split = kd.take_labels(data.train, 100, 0)
    student = pair(kd)[0]
    table = kd.predict_by_index(student, split)
    for part in kd.batches(split, 50, 0, 1, teacher_logits=table):
        live = student(part["image"], train=False)
        np.testing.assert_allclose(part["teacher_logits"], live, atol=1e-4)


def cached_logits_with_augmented_images(kd):
    student, teacher, optimizer = pair(kd)
    flipped = np.ascontiguousarray(IMAGES[:, :, ::-1])
    want = kd.distillation_loss(student(flipped, train=True), teacher(flipped), LABELS)
    metrics = kd.train_student_step(student, teacher, optimizer, batch(image=flipped))
    np.testing.assert_allclose(metrics["soft_loss"], want[2], rtol=1e-3)


def mean_over_elements(kd):
    check_soft(kd, 3.0)


def teacher_in_training_mode(kd):
    student, teacher, optimizer = pair(kd)
    before = everything(teacher)
    kd.train_student_step(student, teacher, optimizer, batch())
    assert same(before, everything(teacher))


def gradient_flows_into_the_teacher(kd):
    grad = jax.grad(lambda z: kd.distillation_loss(STUDENT, z, LABELS)[0])(TEACHER)
    assert np.abs(grad).max() == 0


def student_left_in_evaluation_mode(kd):
    student, teacher, optimizer = pair(kd)
    kd.evaluate(student, utils.Split(IMAGES, LABELS, np.arange(8)))
    before = np.array(student.bn1.mean[...])
    kd.train_student_step(student, teacher, optimizer, batch())
    assert not np.array_equal(before, student.bn1.mean[...])


def kl_the_wrong_way_round(kd):
    check_soft(kd, 2.0)


def log_probabilities_passed_as_probabilities(kd):
    assert kd.distillation_loss(STUDENT, TEACHER, LABELS)[2] >= 0
    check_soft(kd, 3.0)


def students_do_not_share_their_start(kd):
    data = utils.load_data("digits")
    labelled = utils.take_labels(data.train, 10, 0)
    recipe = kd.Recipe(3, 0, 8, 1e-3, "constant")
    teacher = pair(kd)[1]
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(folder, data)
        distilled = kd.train_student_with_distillation(teacher, data, labelled, recipe, run)
        baseline = kd.train_student_baseline(data, labelled, recipe, run)
    assert same(everything(distilled), everything(baseline))


def last_partial_test_batch_dropped(kd):
    student = pair(kd)[0]
    image = RNG.integers(0, 256, (258, 28, 28, 1)).astype(np.uint8)
    logits = kd.predict(student, utils.Split(image, np.zeros(258, int), np.arange(258)), 128)
    assert len(logits) == 258
    last = student(image[256:] / np.float32(255), train=False)
    np.testing.assert_allclose(logits[256:], last, atol=1e-4)


def nan_at_low_temperature(kd):
    extreme = np.array([[60.0, 0, -60] + [0.0] * 7] * 8, np.float32)
    loss, grad = jax.value_and_grad(
        lambda z: kd.distillation_loss(z, -extreme, LABELS, 0.05, 0.0)[0]
    )(extreme)
    assert np.isfinite(loss)
    assert np.isfinite(grad).all()


def statistics_counted_as_parameters(kd):
    assert kd.count_params(kd.TeacherCNN(rngs=nnx.Rngs(0))) == 946_954
    assert kd.count_params(kd.StudentCNN(rngs=nnx.Rngs(0))) == 56_810


def loss_computed_in_low_precision(kd):
    """At T = 10 bfloat16 gives a negative KL and a gradient that is wrong by half."""
    for dtype in (jnp.bfloat16, jnp.float16):
        student, teacher = (jnp.asarray(x, dtype) for x in (STUDENT, TEACHER))
        exact = [np.asarray(x, np.float64) for x in (student, teacher)]
        for t in (3.0, 10.0):
            p, q = (np.exp(z / t) / np.exp(z / t).sum(-1, keepdims=True) for z in exact[::-1])
            want = t**2 * (p * np.log(p / q)).sum(-1).mean()
            soft = kd.distillation_loss(student, teacher, LABELS, t)[2]
            np.testing.assert_allclose(soft, want, rtol=1e-3)
            grad = jax.grad(lambda z: kd.soft_loss(z, teacher, t))(student)  # noqa: B023
            error = np.linalg.norm(np.asarray(grad, np.float64) - t * (q - p) / len(LABELS))
            assert error < 0.01 * np.linalg.norm(t * (q - p) / len(LABELS))
        hard = -np.log(np.exp(exact[0])[np.arange(8), LABELS] / np.exp(exact[0]).sum(-1)).mean()
        np.testing.assert_allclose(kd.hard_loss(student, LABELS), hard, rtol=1e-3)


def shapes_that_broadcast(kd):
    for shape in ((8, 1), (8, 1, 10), (1, 10), (10,)):
        message = ""
        try:
            jax.eval_shape(kd.distillation_loss, STUDENT, np.zeros(shape, np.float32), LABELS)
        except ValueError as error:
            message = str(error)
        assert "(8, 10)" in message
        assert str(shape) in message


def labels_that_broadcast(kd):
    for shape in ((8, 1), (1,), ()):
        message = ""
        try:
            jax.eval_shape(kd.hard_loss, STUDENT, np.zeros(shape, np.int32))
        except ValueError as error:
            message = str(error)
        assert str(shape) in message


# check: (file, what stands there, the bug)
SCRIPT, UTILS = "15_knowledge_distillation.py", "utils.py"
KL = "optax.losses.kl_divergence(student_log_probs, teacher_probs).mean()"


def gradient_of_the_maximum_lost_in_jit(kd):
    for network in (kd.StudentCNN, kd.TeacherCNN):
        found = []
        for transform in (nnx.jit, lambda function: function):
            model = network(rngs=nnx.Rngs(0))
            gradient = transform(nnx.grad(lambda model: (model(IMAGES, train=True) ** 2).mean()))
            found.append(nnx.to_pure_dict(nnx.state(gradient(model))))
        for name in ("conv1", "conv2", "dense1"):
            jitted, eager = (x[name]["kernel"] for x in found)
            error = np.linalg.norm(jitted - eager) / np.linalg.norm(eager)
            assert error < 0.02, (network.__name__, name)


MUSEUM = {
    loss_computed_in_low_precision: (
        SCRIPT,
        "    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))",
        "    return logits",
    ),
    shapes_that_broadcast: (
        SCRIPT,
        "if student_logits.shape != teacher_logits.shape:",
        "if False:",
    ),
    labels_that_broadcast: (SCRIPT, "if jnp.shape(labels) != logits.shape[:-1]:", "if False:"),
    gradient_of_the_maximum_lost_in_jit: (
        "fast.py",
        "    top, bottom = ",
        "    return x.max(axis=(2, 4))\n    top, bottom = ",
    ),
    t_squared_missing: (SCRIPT, "return temperature**2 * optax", "return optax"),
    teacher_and_student_swapped: (
        SCRIPT,
        "    # soft = T²",
        "    student_logits, teacher_logits = teacher_logits, student_logits\n    # soft = T²",
    ),
    kl_of_teacher_with_itself: (
        SCRIPT,
        "log_softmax(student_logits / temperature)",
        "log_softmax(teacher_logits / temperature)",
    ),
    cached_logits_do_not_match_shuffled_images: (UTILS, "table[index]", "table[:batch_size]"),
    cached_logits_with_augmented_images: (
        SCRIPT,
        'teacher(batch["image"], train=False)',
        'teacher(batch["image"][:, :, ::-1], train=False)',
    ),
    mean_over_elements: (SCRIPT, KL, KL.replace(".mean()", ".mean() / 10")),
    teacher_in_training_mode: (
        SCRIPT,
        'teacher(batch["image"], train=False)',
        'teacher(batch["image"], train=True)',
    ),
    gradient_flows_into_the_teacher: (
        SCRIPT,
        "jax.lax.stop_gradient(at_least_float32(teacher_logits))",
        "at_least_float32(teacher_logits)",
    ),
    student_left_in_evaluation_mode: (
        SCRIPT,
        'student(batch["image"], train=True)',
        'student(batch["image"], train=False)',
    ),
    kl_the_wrong_way_round: (
        SCRIPT,
        "kl_divergence(student_log_probs, teacher_probs)",
        "kl_divergence(jnp.log(teacher_probs), jnp.exp(student_log_probs))",
    ),
    log_probabilities_passed_as_probabilities: (
        SCRIPT,
        "jax.nn.softmax(teacher_logits",
        "jax.nn.log_softmax(teacher_logits",
    ),
    students_do_not_share_their_start: (
        SCRIPT,
        'and on its batches."""\n',
        'and on its batches."""\n    recipe = recipe._replace(seed=4)\n',
    ),
    last_partial_test_batch_dropped: (
        UTILS,
        "range(0, total, batch_size)",
        "range(0, total - batch_size + 1, batch_size)",
    ),
    nan_at_low_temperature: (
        SCRIPT,
        "jax.nn.log_softmax(student_logits / temperature)",
        "jnp.log(jax.nn.softmax(student_logits / temperature))",
    ),
    statistics_counted_as_parameters: (
        UTILS,
        "sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))",
        "sum(x.size for x in jax.tree.leaves(nnx.state(model)))",
    ),
}  # fmt: skip


@pytest.mark.parametrize("check", MUSEUM, ids=lambda check: check.__name__)
def test_bug(check):
    exhibit(check, SCRIPT, *MUSEUM[check])
