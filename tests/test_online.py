"""Networks that learn together: whom they follow, and bugs of following."""

import jax
import numpy as np
import optax
import pytest
import utils
from conftest import EXAMPLES, exhibit, load
from flax import nnx

SCRIPT = "19_online_distillation.py"
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 10, 8).astype(np.int32)
IMAGES = RNG.random((8, 28, 28, 1)).astype(np.float32)


def batch(**more):
    return {"image": IMAGES, "label": LABELS} | more


def with_sgd(*models):
    """The models, and an optimizer for each that subtracts the gradient."""
    optimizers = [nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param) for model in models]
    return list(models), optimizers


def students(script, count):
    return with_sgd(*(script.StudentCNN(rngs=nnx.Rngs(seed)) for seed in range(count)))


def weights(model):
    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def assert_close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def own_gradient(peer, others, temperature=1.0):
    """Of CE + mean over others of T² · KL(p_other ‖ p_peer), with the others' logits as numbers."""

    def loss_fn(peer):
        z = peer(batch()["image"], train=True)
        log_p = jax.nn.log_softmax(z / temperature)
        loss = -jax.nn.log_softmax(z)[np.arange(8), LABELS].mean()
        for other in others:
            q = jax.nn.softmax(other / temperature)
            kl = (q * (jax.nn.log_softmax(other / temperature) - log_p)).sum(-1).mean()
            loss += temperature**2 * kl / len(others)
        return loss

    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.grad(loss_fn)(peer)))


def peers_not_detached_from_each_other(online, u):
    """Each peer moves by the gradient of its own loss: nobody learns through another's logits."""
    peers, optimizers = students(online, 3)
    logits = [np.array(peer(batch()["image"], train=True)) for peer in peers]
    before = [weights(peer) for peer in peers]
    grads = [own_gradient(peer, logits[:k] + logits[k + 1 :], 2.0) for k, peer in enumerate(peers)]
    online.mutual_learning_step(peers, optimizers, batch(), 2.0)
    for peer, start, grad in zip(peers, before, grads, strict=True):
        assert_close(weights(peer), jax.tree.map(lambda w, g: w - g, start, grad))


def online_teacher_learns_from_its_student(online, u):
    """The teacher moves as it would alone: same start, same dropout, same batch, no student."""
    alone, together = (online.TeacherCNN(rngs=nnx.Rngs(1)) for _ in range(2))
    [alone], optimizers = with_sgd(alone)
    online.mutual_learning_step([alone], optimizers, batch(), 1.0, (1.0, 0.0))
    pair, optimizers = with_sgd(together, online.StudentCNN(rngs=nnx.Rngs(0)))
    online.online_distillation_step(*pair, optimizers, batch(), 3.0, 0.5)
    assert_close(weights(pair[0]), weights(alone))


DETACHED = "jax.lax.stop_gradient(teacher_logits)"
MUSEUM = {
    peers_not_detached_from_each_other: (SCRIPT, DETACHED, "teacher_logits"),
    online_teacher_learns_from_its_student: (SCRIPT, DETACHED, "teacher_logits"),
}


@pytest.mark.parametrize("check", MUSEUM, ids=lambda check: check.__name__)
def test_bug(check):
    exhibit(check, SCRIPT, *MUSEUM[check])


# %% Unit tests


@pytest.fixture(scope="module")
def online():
    return load(EXAMPLES / SCRIPT)


def test_a_finished_teacher_is_offline_distillation(online, kd):
    """A group of one beside cached logits is script 15's step."""
    cached = RNG.normal(0, 3, (8, 10)).astype(np.float32)
    [here], optimizers = students(online, 1)
    metrics = online.mutual_learning_step(
        [here], optimizers, batch(teacher_logits=cached), 3.0, (0.3, 0.7)
    )
    [there], [optimizer] = students(kd, 1)
    want = kd.train_student_step(there, None, optimizer, batch(teacher_logits=cached), 3.0, 0.3)
    for key in ("loss", "hard_loss", "soft_loss"):
        np.testing.assert_allclose(metrics[key][0], want[key], rtol=1e-4)
    assert_close(weights(here), weights(there))


def test_apart_means_alone(online, kd):
    """With weights (1, 0), each of a group makes script 15's step on the labels."""
    peers, optimizers = students(online, 2)
    metrics = online.mutual_learning_step(peers, optimizers, batch(), 1.0, (1.0, 0.0))
    alone, optimizers = students(kd, 2)
    for k, (model, optimizer) in enumerate(zip(alone, optimizers, strict=True)):
        want = kd.train_step(model, optimizer, batch())
        np.testing.assert_allclose(metrics["loss"][k], want["loss"], rtol=1e-5)
        assert_close(weights(peers[k]), weights(model))
    assert metrics["soft_loss"].min() > 0, "what lies between them is measured all the same"


def test_the_online_student_follows_the_teacher_of_the_moment(online):
    """Its soft targets are the logits of the teacher's own forward pass, before the update."""
    pair, optimizers = with_sgd(
        online.TeacherCNN(rngs=nnx.Rngs(1)), online.StudentCNN(rngs=nnx.Rngs(0))
    )
    twin, twin_optimizers = with_sgd(
        online.TeacherCNN(rngs=nnx.Rngs(1)), online.StudentCNN(rngs=nnx.Rngs(0))
    )
    live = twin[0](batch()["image"], train=True)
    online.mutual_learning_step(
        [twin[1]], twin_optimizers[1:], batch(teacher_logits=live), 3.0, (0.5, 0.5)
    )
    online.online_distillation_step(*pair, optimizers, batch(), 3.0, 0.5)
    assert_close(weights(pair[1]), weights(twin[1]))


def test_peers_share_all_but_their_start(online):
    data = utils.load_data("digits")
    _, for_teacher, peers = online.plan(online.Config(seed=7), data)
    assert len({recipe.seed for recipe in peers}) == len(peers) == 4
    assert peers[0].seed == for_teacher.seed == 7
    assert len({recipe._replace(seed=0) for recipe in peers}) == 1
