"""The distillation loss against its definition, written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from scipy.special import log_softmax, softmax

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (RNG.normal(0, 3, (7, 10)).astype(np.float32) for _ in range(2))
LABELS = RNG.integers(0, 10, 7)


def kl(p_logits, q_logits):
    p = log_softmax(p_logits, -1)
    return (np.exp(p) * (p - log_softmax(q_logits, -1))).sum(-1).mean()


@pytest.mark.parametrize("t", [0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_definition(kd, t, alpha):
    total, hard, soft = kd.distillation_loss(STUDENT, TEACHER, LABELS, t, alpha)
    want_hard = -log_softmax(STUDENT, -1)[np.arange(7), LABELS].mean()
    want_soft = t**2 * kl(TEACHER / t, STUDENT / t)
    np.testing.assert_allclose(hard, want_hard, rtol=1e-5)
    np.testing.assert_allclose(soft, want_soft, rtol=1e-4)
    np.testing.assert_allclose(total, alpha * want_hard + (1 - alpha) * want_soft, rtol=1e-4)


def test_gradient(kd):
    """∂soft/∂z = T (q − p) / B, for each logit of the student."""
    t = 4.0
    grad = jax.grad(lambda z: kd.distillation_loss(z, TEACHER, LABELS, t, 0.0)[0])(STUDENT)
    want = t * (softmax(STUDENT / t, -1) - softmax(TEACHER / t, -1)) / len(LABELS)
    np.testing.assert_allclose(grad, want, atol=1e-6)


def test_large_temperature_matches_logits(kd):
    """T → ∞: the soft loss becomes half the mean square of the difference of centred logits."""
    soft = kd.distillation_loss(STUDENT, TEACHER, LABELS, 300.0)[2]
    difference = TEACHER - STUDENT
    difference -= difference.mean(-1, keepdims=True)
    np.testing.assert_allclose(soft, (difference**2).mean(-1).mean() / 2, rtol=0.05)


def test_zero_when_student_is_teacher(kd):
    assert abs(kd.distillation_loss(TEACHER, TEACHER, LABELS, 3.0)[2]) < 1e-5


def test_shift_of_logits_changes_nothing(kd):
    shifted = kd.distillation_loss(STUDENT + 100, TEACHER - 50, LABELS)
    np.testing.assert_allclose(shifted, kd.distillation_loss(STUDENT, TEACHER, LABELS), rtol=1e-3)


def test_defaults_and_jit(kd):
    plain = kd.distillation_loss(STUDENT, TEACHER, LABELS)
    assert plain == kd.distillation_loss(STUDENT, TEACHER, LABELS, 3.0, 0.5)
    traced = jax.jit(kd.distillation_loss)(STUDENT, TEACHER, LABELS, 3.0, 0.5)
    np.testing.assert_allclose(traced, plain, rtol=1e-5)


def test_max_pool_is_flax_s(kd):
    from flax import nnx

    x = jnp.asarray(RNG.integers(1, 9, (2, 11, 8, 3)), jnp.float32)  # windows with equal maxima
    want = nnx.max_pool(x, (2, 2), strides=(2, 2))
    np.testing.assert_array_equal(kd.max_pool(x), want)
    ours = jax.grad(lambda x: (kd.max_pool(x) ** 3).sum())(x)
    flax = jax.grad(lambda x: (nnx.max_pool(x, (2, 2), strides=(2, 2)) ** 3).sum())(x)
    np.testing.assert_allclose(ours, flax, rtol=1e-6)


def test_the_guide_s_check_for_a_missing_t_squared(kd):
    """At T = 20 the soft loss of these logits is 1.031, and without the factor 0.0026."""
    student, teacher = np.array([[2.0, 3.0, 1.0]]), np.array([[5.0, 3.0, 1.0]])
    assert float(kd.soft_loss(student, teacher, 20.0)) == pytest.approx(1.031, abs=5e-4)
    assert f"{float(kd.soft_loss(student, teacher, 20.0)) / 20**2:.4f}" == "0.0026"
    guide = (ROOT / "docs" / "knowledge_distillation.md").read_text()
    check = "[2, 3, 1] and teacher logits [5, 3, 1] must be 1.031; without T² it is 0.0026"
    assert check in guide
