"""A network as its own teacher: generations, controls and exits, and bugs of theirs."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import utils
from conftest import EXAMPLES, ROOT, exhibit, load
from flax import nnx

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (3, 8, 10)).astype(np.float32)  # of three exits
LABELS = RNG.integers(0, 10, 8).astype(np.int32)
BATCH = {"label": LABELS}


def everything(model):
    return [np.array(x) for x in jax.tree.leaves(nnx.state(model, (nnx.Param, nnx.BatchStat)))]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def untrained(script, folder, count=1):
    """What `train_all` gives after no epoch at all: the starts."""
    data = utils.load_data("digits")
    data = data._replace(train=utils.take_labels(data.train, 20, 0))
    config = script.Config(output_dir=str(folder), dataset="digits")
    return script.train_all(config, count, script.Recipe(3, 0, 10, 1e-3, "constant"), data)


# %% Museum


def generation_starts_from_its_teacher(script, u):
    runs, _ = untrained(script, script.tmp_path)
    baseline, born, twin = (
        everything(runs[name][0]) for name in ("baseline", "generation 1", "twin 1")
    )
    assert same(born, twin)
    assert not same(born, baseline)


def dark_knowledge_permuted_moves_the_largest_probability(script, u):
    logits = LOGITS[0]
    permuted = script.permute_dark_knowledge(logits, np.random.default_rng(1))
    assert (permuted.argmax(-1) == logits.argmax(-1)).all()
    assert np.array_equal(permuted.max(-1), logits.max(-1))


def last_exit_learns_from_the_early_ones(script, u):
    with_others = jax.grad(lambda z: script.exits_loss(z, BATCH, 1.0, 3.0, 0.5))(LOGITS)[-1]
    alone = jax.grad(lambda z: script.label_loss(z, BATCH))(LOGITS[-1])
    np.testing.assert_allclose(with_others, alone, atol=1e-7)


SELF = "18_self_distillation.py"
MUSEUM = {
    generation_starts_from_its_teacher: (
        SELF,
        "runs[name] = train_fresh(name, network, loss",
        "copy = (lambda rngs: nnx.clone(runs['baseline'][0])) if says else network\n"
        "        runs[name] = train_fresh(name, copy, loss",
    ),
    dark_knowledge_permuted_moves_the_largest_probability: (
        SELF,
        "permuted[others] = rng.permuted(logits[others].reshape(len(logits), -1), axis=1).ravel()",
        "permuted = rng.permuted(logits, axis=1)",
    ),
    last_exit_learns_from_the_early_ones: (
        SELF,
        "jax.lax.stop_gradient(teacher_logits)",
        "teacher_logits",
    ),
}


@pytest.mark.parametrize("check", MUSEUM, ids=lambda check: check.__name__)
def test_bug(check, tmp_path):
    exhibit(check, SELF, *MUSEUM[check], tmp_path)


# %% Unit tests


@pytest.fixture(scope="module")
def script():
    return load(EXAMPLES / SELF)


def test_label_loss_weighs_images_within_the_batch(script):
    losses = -np.asarray(jax.nn.log_softmax(LOGITS[0]))[np.arange(8), LABELS]
    weight = RNG.random(8).astype(np.float32)
    np.testing.assert_allclose(script.label_loss(LOGITS[0], BATCH), losses.mean(), rtol=1e-5)
    for scale in (1, 7):  # only ratios count
        found = script.label_loss(LOGITS[0], BATCH | {"weight": scale * weight})
        np.testing.assert_allclose(found, (weight * losses).sum() / weight.sum(), rtol=1e-5)


def test_permuting_keeps_the_values_and_leaves_the_table_alone(script):
    table = np.concatenate([LOGITS[0], np.full((2, 10), np.nan, np.float32)])
    before = table.copy()
    permuted = script.permute_dark_knowledge(table, np.random.default_rng(1))
    assert np.array_equal(table, before, equal_nan=True)
    assert np.array_equal(np.sort(permuted), np.sort(table), equal_nan=True)
    assert (permuted[:8] != table[:8]).any(-1).all(), "every row is in another order"


def test_exits_loss_by_hand(script):
    hard = [float(script.label_loss(z, BATCH)) for z in LOGITS]
    args = LOGITS, BATCH
    np.testing.assert_allclose(script.exits_loss(*args, 1.0, 3.0, 1.0), sum(hard), rtol=1e-5)
    np.testing.assert_allclose(script.exits_loss(*args, 0.0, 3.0, 0.5), hard[-1], rtol=1e-5)
    soft = [script.distillation_loss(z, LOGITS[2], LABELS, 3.0, 0.0)[0] for z in LOGITS[:2]]
    want = hard[2] + sum(0.5 * h + 0.5 * s for h, s in zip(hard[:2], soft, strict=True))
    np.testing.assert_allclose(script.exits_loss(*args, 1.0, 3.0, 0.5), want, rtol=1e-5)
    early = jax.grad(lambda z: script.exits_loss(z, BATCH, 0.0, 3.0, 0.5))(LOGITS)[:2]
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


def test_starts_and_who_shares_them(script, tmp_path):
    runs, logits = untrained(script, tmp_path, count=2)
    start = {name: everything(model) for name, (model, _) in runs.items()}
    for name in ("self-distilled", "confidence-weighted", "permuted", "generation 1"):
        assert same(start[name], start["twin 1"]), name
        assert runs[name][1].settings["seed"] == runs["twin 1"][1].settings["seed"]
    assert same(start["generation 2"], start["twin 2"])
    assert not same(start["twin 1"], start["twin 2"])
    assert same(start["last exit only"], start["exits self-taught"])
    assert same(start["baseline"], everything(script.StudentCNN(rngs=nnx.Rngs(3))))
    assert [*logits] == ["baseline", "generation 1", "generation 2", "permuted"]


def test_settings_name_the_teacher(script, tmp_path):
    """Another teacher, temperature or alpha is another run; its checkpoint is not taken."""
    runs, _ = untrained(script, tmp_path, count=2)
    settings = {name: phase.settings for name, (_, phase) in runs.items()}
    assert settings["generation 1"]["temperature"] == 1
    assert settings["self-distilled"]["temperature"] == 3
    teachers = [settings[f"generation {k}"]["teacher_logits"] for k in (1, 2)]
    assert teachers[0] == settings["self-distilled"]["teacher_logits"]
    assert len({*teachers, settings["permuted"]["teacher_logits"]}) == 3
    assert "weight" in settings["confidence-weighted"]
    assert "teacher_logits" not in settings["twin 1"]


@pytest.mark.parametrize("count", ["0", "11", "-1"])
def test_generations_that_make_no_sense(count, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / SELF, "--dataset", "digits", "--generations", count],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"--generations {count}: must be from 1 to 10" in done.stderr
