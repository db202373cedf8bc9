"""Several teachers: what they say together, bugs around it, and the students that learn it."""

import jax
import numpy as np
import optax
import pytest
import utils
from conftest import EXAMPLES, exhibit, load
from flax import nnx
from scipy.special import log_softmax, softmax

RNG = np.random.default_rng(0)
K = 8  # as many teachers as images, so that no shape gives a wrong axis away
STUDENT = RNG.normal(0, 3, (8, 10)).astype(np.float32)
TEACHERS = RNG.normal(0, 3, (K, 8, 10)).astype(np.float32)
LABELS = RNG.integers(0, 10, 8).astype(np.int32)
IMAGES = RNG.random((8, 28, 28, 1)).astype(np.float32)


def mean_in_numpy(teachers, t, average):
    if average == "probabilities":
        return softmax(np.asarray(teachers) / t, -1).mean(0)
    p = np.prod(softmax(np.asarray(teachers, np.float64) / t, -1), 0) ** (1 / len(teachers))
    return p / p.sum(-1, keepdims=True)


def soft_in_numpy(teachers, t, average):
    p = mean_in_numpy(teachers, t, average)
    return t**2 * (p * (np.log(p) - log_softmax(STUDENT / t, -1))).sum(-1).mean()


def check_ensemble(ens, t, **how):
    soft = ens.ensemble_distillation_loss(STUDENT, TEACHERS, LABELS, t, **how)[2]
    want = soft_in_numpy(TEACHERS, t, how.get("average", "probabilities"))
    np.testing.assert_allclose(soft, want, rtol=1e-4)


# %% For the museum


def logits_averaged_where_probabilities_were_meant(ens, u):
    check_ensemble(ens, 3.0)


def probabilities_averaged_where_logits_were_meant(ens, u):
    check_ensemble(ens, 3.0, average="logits")


def one_teacher_left_out(ens, u):
    whole = ens.mean_distribution(TEACHERS, 3.0)
    for k in range(K):
        other = TEACHERS.copy()
        other[k] = -other[k]
        assert np.abs(ens.mean_distribution(other, 3.0) - whole).max() > 1e-2, f"teacher {k}"


def mean_at_temperature_one_softened_afterwards(ens, u):
    check_ensemble(ens, 5.0)


def mean_over_images_instead_of_teachers(ens, u):
    """gnosis #17 took the images for the teachers, too."""
    student = ens.StudentCNN(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(student, optax.sgd(0.1), wrt=nnx.Param)
    batch = {"image": IMAGES, "label": LABELS}
    table = TEACHERS.swapaxes(0, 1)  # [B, K, C]
    logits = student(batch["image"], train=True)
    want = ens.ensemble_distillation_loss(logits, TEACHERS, LABELS, 3.0, 0.5)[0]
    metrics = ens.ensemble_step(student, optimizer, batch | {"teacher_logits": table})
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-3)


def gradient_flows_into_a_teacher(ens, u):
    for average in ("probabilities", "logits"):
        grad = jax.grad(
            lambda v: ens.ensemble_distillation_loss(STUDENT, v, LABELS, average=average)[0]  # noqa: B023
        )(TEACHERS)
        assert np.abs(grad).max() == 0


SCRIPT = "17_ensemble_distillation.py"
ARITHMETIC = "jax.nn.softmax(softened).mean(axis=0)"
GEOMETRIC = "jax.nn.softmax(softened.mean(axis=0))"
MEAN_AT_ONE = "jax.numpy.log(jax.nn.softmax(softened * temperature).mean(0))"
MUSEUM = {
    logits_averaged_where_probabilities_were_meant: (SCRIPT, ARITHMETIC, GEOMETRIC),
    probabilities_averaged_where_logits_were_meant: (SCRIPT, GEOMETRIC, ARITHMETIC),
    one_teacher_left_out: (
        SCRIPT,
        "jax.numpy.asarray(teacher_logits)",
        "jax.numpy.asarray(teacher_logits[1:])",
    ),
    mean_at_temperature_one_softened_afterwards: (
        SCRIPT,
        ARITHMETIC,
        f"jax.nn.softmax({MEAN_AT_ONE} / temperature)",
    ),
    mean_over_images_instead_of_teachers: (
        SCRIPT,
        'batch["teacher_logits"].swapaxes(0, 1)',
        'batch["teacher_logits"]',
    ),
    gradient_flows_into_a_teacher: (
        SCRIPT,
        "jax.lax.stop_gradient(jax.numpy.asarray(teacher_logits))",
        "jax.numpy.asarray(teacher_logits)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("check", MUSEUM, ids=lambda check: check.__name__)
def test_bug(check):
    exhibit(check, SCRIPT, *MUSEUM[check])


# %% Unit tests


@pytest.fixture(scope="module")
def ens():
    return load(EXAMPLES / SCRIPT)


@pytest.mark.parametrize("t", [0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_definition(ens, t, average):
    want = mean_in_numpy(TEACHERS, t, average)
    np.testing.assert_allclose(ens.mean_distribution(TEACHERS, t, average), want, atol=1e-5)
    loss = ens.ensemble_distillation_loss(STUDENT, TEACHERS, LABELS, t, 0.3, average)
    hard = -log_softmax(STUDENT, -1)[np.arange(8), LABELS].mean()
    soft = soft_in_numpy(TEACHERS, t, average)
    np.testing.assert_allclose(loss, (0.3 * hard + 0.7 * soft, hard, soft), rtol=1e-4)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_one_teacher_and_equal_teachers_give_distillation_loss(ens, kd, average):
    want = kd.distillation_loss(STUDENT, TEACHERS[0], LABELS, 3.0, 0.5)
    one = ens.ensemble_distillation_loss(STUDENT, TEACHERS[:1], LABELS, average=average)
    np.testing.assert_allclose(one, want, rtol=1e-6)
    three = ens.ensemble_distillation_loss(STUDENT, [TEACHERS[0]] * 3, LABELS, average=average)
    np.testing.assert_allclose(three, want, rtol=1e-5)


def test_list_array_and_order(ens):
    want = ens.ensemble_distillation_loss(STUDENT, TEACHERS, LABELS)
    as_list = ens.ensemble_distillation_loss(STUDENT, list(TEACHERS), LABELS)
    np.testing.assert_array_equal(as_list, want)
    turned = ens.ensemble_distillation_loss(STUDENT, TEACHERS[::-1], LABELS)
    np.testing.assert_allclose(turned, want, rtol=1e-5)


def test_wrong_arguments(ens):
    with pytest.raises(ValueError, match="average='geometric'"):
        ens.ensemble_distillation_loss(STUDENT, TEACHERS, LABELS, average="geometric")
    with pytest.raises(ValueError, match="0 teachers"):
        ens.ensemble_distillation_loss(STUDENT, [], LABELS)


def test_mean_of_the_losses_has_the_gradient_of_the_mean(ens, kd):
    """1/K · Σ KL(p_k ‖ q) = KL(mean p ‖ q) + what does not depend on the student."""
    grads = [
        jax.grad(lambda z: kd.distillation_loss(z, v, LABELS, 3.0, 0.0)[0])(STUDENT)  # noqa: B023
        for v in TEACHERS
    ]
    grad = jax.grad(lambda z: ens.ensemble_distillation_loss(z, TEACHERS, LABELS, 3.0, 0.0)[0])
    np.testing.assert_allclose(grad(STUDENT), np.mean(grads, 0), atol=1e-6)


def test_both_means_meet_at_high_temperature(ens):
    def gap(t):
        means = (ens.mean_distribution(TEACHERS, t, a) for a in ("probabilities", "logits"))
        return float(np.abs(np.subtract(*map(np.asarray, means))).max())

    assert gap(100) < gap(10) / 20 < gap(1) / 20


@pytest.mark.parametrize("flags", [{}, {"subsets": True}])
def test_teachers_differ_in_seed_and_with_subsets_in_images(ens, digits, flags):
    config = ens.Config(dataset="digits", teacher_labels="600", teacher_seed=2**32 - 1, **flags)
    teachers, recipe, labelled = ens.plan(config, digits)
    assert [r.seed for r, _ in teachers] == [2**32 - 1, 0, 1, 2]
    drawn = {tuple(own.train.index) for _, own in teachers}
    assert {len(index) for index in drawn} == {600}
    assert len(drawn) == (4 if flags else 1)
    assert recipe.seed == 42
    assert len(labelled.train.label) == 300
    for _, own in teachers:
        assert own.test is digits.test


@pytest.mark.parametrize(
    "flags",
    [
        {"teacher_labels": "5000"},
        {"teacher_labels": "100"},
        {"subsets": True, "teacher_labels": "all"},
    ],
)
def test_flags_are_checked_before_training(ens, digits, flags):
    flag = "--" + list(flags)[-1].replace("_", "-")
    with pytest.raises(utils.UserError, match=flag):
        ens.plan(ens.Config(dataset="digits", **flags), digits)


def tiny(ens, digits, folder, epochs, name="student, random teacher"):
    """A student of few steps on 60 images, whose teachers' logits are random."""
    data = digits._replace(train=utils.take_labels(digits.train, 60, 0))
    table = np.random.default_rng(1).normal(0, 3, (1297, 3, 10)).astype(np.float32)
    recipe = ens.Recipe(3, epochs, 20, 1e-3, "constant")
    config = ens.Config(output_dir=str(folder / "out"))
    how = {"table": table, "temperature": 3.0, "alpha": 0.5, "random": "random" in name}
    return ens.train_network(name, ens.StudentCNN, recipe, data, config, **how)


def test_random_teacher_is_drawn_by_the_seed_alone(ens, digits, tmp_path):
    first, again = (tiny(ens, digits, tmp_path / x, 2)[0] for x in "ab")
    all_teachers, _ = tiny(ens, digits, tmp_path / "c", 2, "student, mean probabilities")
    assert utils.digest(first) == utils.digest(again)
    assert utils.digest(first) != utils.digest(all_teachers)


def test_random_teacher_draws_the_same_when_a_run_goes_on(ens, digits, tmp_path, monkeypatch):
    whole, _ = tiny(ens, digits, tmp_path / "whole", 3)
    save, saved = utils.Phase._save, []

    def save_and_die(phase, *arguments, **modules):
        save(phase, *arguments, **modules)
        saved.append(phase)
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(utils.Phase, "_save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        tiny(ens, digits, tmp_path / "cut", 3)
    gone_on, phase = tiny(ens, digits, tmp_path / "cut", 3)
    assert len(phase.history) == 3
    assert utils.digest(whole) == utils.digest(gone_on)


def test_a_table_s_teachers_are_part_of_the_settings(ens, digits, tmp_path):
    _, phase = tiny(ens, digits, tmp_path, 1)
    assert {"teacher_logits", "temperature", "alpha", "seed", "data"} <= set(phase.settings)
