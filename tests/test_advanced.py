"""Many students in one program: each ends as it would alone."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import utils
from conftest import EXAMPLES, load
from flax import nnx

SEEDS, CELLS = [5, 9], [(1.0, 0.5), (3.0, 0.0), (20.0, 1.0), (3.0, 1.0)]
STEPS, BATCH = 6, 32


@pytest.fixture(scope="module")
def tuning():
    return load(EXAMPLES / "advanced" / "knowledge_distillation.py", name="tuning")


@pytest.fixture(scope="module")
def parts(digits):
    """For each seed a split of 64 images; and a table of teacher logits."""
    splits = [utils.take_labels(digits.train, 64, seed) for seed in SEEDS]
    table = np.random.default_rng(0).normal(0, 3, (len(digits.train.label), 10))
    return splits, table.astype(np.float32)


def recipe_of(module, seed=0):
    # At a higher rate Adam makes more of rounding than the tests below bear.
    return module.Recipe(seed, STEPS // 2, BATCH, 3e-3, "onecycle")


def train_stack(tuning, parts, change=None, backend="cpu"):
    """The stack after a few steps, and the losses [steps, seeds, cells]. On a CPU the students take
    turns, elsewhere they are vectorised."""
    splits, table = parts
    students = tuning.Students(SEEDS, len(CELLS))
    optimizer = tuning.make_optimizer(students, recipe_of(tuning), 64)
    step = nnx.jit(tuning.students_step.__wrapped__)
    step = utils.bind(step, students, optimizer, axis=1)
    cells, losses = np.array(CELLS, np.float32), []
    if change is not None:
        cells[change] = (7.0, 0.25)
    for epoch in range(1, STEPS // 2 + 1):
        for batch in utils.stacked_batches(splits, BATCH, SEEDS, epoch, teacher_logits=table):
            with mock.patch("jax.default_backend", return_value=backend):
                found = step(batch, *cells.T)
            losses.append(np.asarray(found["loss"]))
    return students, np.array(losses)


def train_alone(kd, parts, i, cell):
    """The student of script 15 with that seed, temperature and alpha."""
    splits, table = parts
    student = kd.StudentCNN(rngs=nnx.Rngs(SEEDS[i]))
    optimizer = kd.make_optimizer(student, recipe_of(kd), 64)
    losses = []
    for epoch in range(1, STEPS // 2 + 1):
        for batch in utils.batches(splits[i], BATCH, SEEDS[i], epoch, teacher_logits=table):
            found = kd.train_student_step(student, None, optimizer, batch, *cell)
            losses.append(float(found["loss"]))
    return student, losses


def weights(model, *place):
    return jax.tree.map(lambda x: np.asarray(x)[place], nnx.state(model, nnx.Param))


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def stack(request, tuning, parts):
    return *train_stack(tuning, parts, backend=request.param), request.param


@pytest.mark.parametrize("i", range(len(SEEDS)))
@pytest.mark.parametrize("j", range(len(CELLS)))
def test_each_student_ends_as_it_would_alone(kd, parts, stack, digits, i, j):
    students, losses, _ = stack
    alone, alone_losses = train_alone(kd, parts, i, CELLS[j])
    np.testing.assert_allclose(losses[:, i, j], alone_losses, rtol=1e-4)
    image = digits.test.image[:40] / np.float32(255)
    together = students(jnp.array(image))[i, j]
    np.testing.assert_allclose(together, alone(jnp.array(image)), atol=0.01)


def test_students_of_a_seed_share_their_start(kd, tuning):
    students = tuning.Students(SEEDS, 3)
    for i, seed in enumerate(SEEDS):
        want = jax.tree.leaves(nnx.state(kd.StudentCNN(rngs=nnx.Rngs(seed)), nnx.Param))
        for j in range(3):
            got = jax.tree.leaves(weights(students.stack, i, j))
            assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_quick_run_heeds_the_flags(tuning):
    data = utils.load_data("digits")
    own = tuning.Config(dataset="digits", quick=True, temperatures=(2.0, 8.0), alphas=(0.2,))
    assert tuning.plan(own, data)[-1] == [(2.0, 0.2), (8.0, 0.2)]
    assert len(tuning.plan(tuning.Config(dataset="digits", quick=True), data)[-1]) == 4


def test_stackable_student_gives_the_logits_of_script_15(kd, tuning):
    image = np.random.default_rng(0).random((8, 28, 28, 1), np.float32)
    for train in (False, True):
        a = kd.StudentCNN(rngs=nnx.Rngs(3))(image, train)
        b = tuning.StackableStudent(rngs=nnx.Rngs(3))(image, train)
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_students_do_not_leak_into_one_another(tuning, parts, stack):
    """Another temperature and alpha for one cell change its students, and no other's a bit."""
    students, _, backend = stack
    changed, _ = train_stack(tuning, parts, change=1, backend=backend)
    for i in range(len(SEEDS)):
        for j in range(len(CELLS)):
            a, b = (jax.tree.leaves(weights(x.stack, i, j)) for x in (students, changed))
            same = all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
            assert same == (j != 1), (i, j)


def test_without_a_teacher_temperature_does_nothing(stack):
    """At alpha = 1 the soft loss has no weight: T = 20 and T = 3 end alike."""
    students, *_ = stack
    a, b = (jax.tree.leaves(weights(students.stack, 0, j)) for j in (2, 3))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# %% Temperature


@pytest.fixture(scope="module")
def heat():
    return load(EXAMPLES / "advanced" / "temperature.py", name="heat")


def test_gradient_norm_is_that_of_the_soft_loss(heat, kd):
    rng = np.random.default_rng(0)
    student = heat.StudentCNN(rngs=nnx.Rngs(0))
    image, label = rng.random((6, 28, 28, 1), np.float32), np.zeros(6, np.int32)
    teacher_logits = rng.normal(0, 3, (6, 10)).astype(np.float32)

    def soft_loss(student):
        return kd.distillation_loss(student(image, train=True), teacher_logits, label, 4.0, 0.0)[0]

    squares = [jnp.square(x).sum() for x in jax.tree.leaves(nnx.grad(soft_loss)(student))]
    batch = {"image": image, "label": label}
    got = heat.gradient_norm(student, teacher_logits, batch, 4.0)
    np.testing.assert_allclose(got, sum(squares) ** 0.5, rtol=1e-4)


def test_high_temperatures_reach_their_limits(heat):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(1, 3, (2, 50, 10))
    for t in (1e2, 1e3):  # the errors of both limits fall as 1/T or faster
        assert heat.distance_from_limit(teacher, t) < 200 / t**2
        assert heat.distance_from_matching(student, teacher, t) < 20 / t
    assert heat.distance_from_matching(student, teacher, 1.0) > 0.5
