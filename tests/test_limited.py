"""Limited labels and the controls: the transfer set, fidelity, calibration and recipes."""

import itertools
import json

import jax
import numpy as np
import optax
import pytest
import utils
from conftest import EXAMPLES, ROOT, exhibit, load
from flax import nnx
from scipy.special import log_softmax, softmax

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (RNG.normal(0, 3, (8, 10)).astype(np.float32) for _ in range(2))
LABELS = RNG.integers(0, 10, 8).astype(np.int32)
IMAGES = RNG.random((8, 28, 28, 1)).astype(np.float32)
SCRIPT = "16_limited_labels.py"


@pytest.fixture(scope="module")
def limited():
    return load(EXAMPLES / SCRIPT)


@pytest.fixture(scope="module")
def controls():
    return load(EXAMPLES / "advanced/controls.py")


# %% The transfer set


def check_loss(limited, labels):
    total, hard, soft = limited.soft_loss(STUDENT, TEACHER, labels, 4.0, 0.3)
    count = len(labels)
    want_hard = -log_softmax(STUDENT[:count], -1)[np.arange(count), labels].mean()
    p, q = log_softmax(TEACHER / 4, -1), log_softmax(STUDENT / 4, -1)
    want_soft = 16 * (np.exp(p) * (p - q)).sum(-1).mean()
    np.testing.assert_allclose([hard, soft], [want_hard, want_soft], rtol=1e-4)
    np.testing.assert_allclose(total, 0.3 * want_hard + 0.7 * want_soft, rtol=1e-4)


def labels_of_other_images(limited, u):
    check_loss(limited, LABELS[:3])


def images_without_labels_left_out_of_the_soft_loss(limited, u):
    check_loss(limited, LABELS[:3])


def one_step(limited, labels_of_second):
    """The weights after a step on a labelled batch and one whose labels do not count."""
    student = limited.StudentCNN(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(student, optax.sgd(0.1), wrt=nnx.Param)
    first = {"image": IMAGES, "label": LABELS, "teacher_logits": TEACHER}
    second = {"image": 1 - IMAGES, "label": labels_of_second, "teacher_logits": STUDENT}
    limited.soft_step(student, optimizer, first, second)
    return utils.digest(student)


def labels_of_the_transfer_set_leak(limited, u):
    assert one_step(limited, LABELS) == one_step(limited, 9 - LABELS)


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (
            labels_of_other_images,
            "labelled = student_logits[: len(labels)]",
            "labelled = student_logits[-len(labels) :]",
        ),
        (
            images_without_labels_left_out_of_the_soft_loss,
            "optax.losses.kl_divergence(student_log_probs, teacher_probs).mean()",
            "optax.losses.kl_divergence(student_log_probs, teacher_probs)[: len(labels)].mean()",
        ),
        (
            labels_of_the_transfer_set_leak,
            'losses = soft_loss(logits, teacher_logits, batch["label"], temperature, alpha)',
            'both = jnp.concatenate([batch["label"], unlabelled["label"]]); '
            "losses = soft_loss(logits, teacher_logits, both, temperature, alpha)",
        ),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_museum(check, right, wrong):
    exhibit(check, SCRIPT, SCRIPT, right, wrong)


def test_with_all_labels_it_is_the_loss_of_script_15(limited, kd):
    for t, alpha in itertools.product((1.0, 3.0, 20.0), (0.0, 0.5, 1.0)):
        a, b = (
            f(STUDENT, TEACHER, LABELS, t, alpha) for f in (limited.soft_loss, kd.distillation_loss)
        )
        np.testing.assert_array_equal(a, b)


def test_second_batches_hold_no_labelled_image(limited, digits, monkeypatch, tmp_path):
    """And the steps of all students are as many."""
    labelled, seen, steps = utils.take_labels(digits.train, 100, 0), [], {}
    batches, table = utils.batches, np.zeros((len(digits.train.label), 10), np.float32)

    def spy(split, *arguments, **tables):
        for batch in batches(split, *arguments, **tables):
            seen.append(np.array(batch["index"]))
            yield batch

    monkeypatch.setattr(utils, "batches", spy)
    config = limited.Config(output_dir=str(tmp_path), epochs=2, batch_size=20)
    for kind in limited.KINDS:
        seen.clear()
        recipe = limited.recipe_for(kind, 100, 0, config)
        known = None if kind == "baseline" else table
        _, phase = limited.train_limited(kind, recipe, digits, labelled, config, known)
        own = np.isin(np.concatenate(seen), labelled.index)
        assert own.mean() == (0.5 if kind == "transfer" else 1)
        steps[kind] = sum(len(x) for x in seen)
        assert len(phase.history) == recipe.epochs
    assert len(set(steps.values())) == 1, "as many images in all"


# %% Fidelity and calibration


def test_fidelity_and_calibration(limited, digits):
    logits = np.log([[0.8, 0.2], [0.8, 0.2], [0.3, 0.7], [0.1, 0.9]]).astype(np.float32)
    label = np.array([0, 1, 1, 1])
    found = utils._calibration(logits, label)
    # Two images at 0.8 of which one is right, one at 0.7 and one at 0.9 that are.
    np.testing.assert_allclose(found["ece"], 2 / 4 * 0.3 + 0.3 / 4 + 0.1 / 4, rtol=1e-5)
    np.testing.assert_allclose(found["nll"], -np.log([0.8, 0.2, 0.7, 0.9]).mean(), rtol=1e-5)
    sure = utils._calibration(np.float32([[100, 0], [0, 100]]), np.array([0, 1]))
    np.testing.assert_allclose(list(sure.values()), 0, atol=1e-6)
    data = digits._replace(test=digits.test.take(slice(8)))
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    phase = utils.Phase("x", "unused", limited.Recipe(0, 1, 1, 1.0, "constant"), data)
    runs, logits = {"student": (model, phase)}, {"student": STUDENT, "teacher": TEACHER}
    [row] = utils.rows(runs, logits, data)
    p, q = log_softmax(TEACHER, -1), log_softmax(STUDENT, -1)
    np.testing.assert_allclose(row["kl"], (np.exp(p) * (p - q)).sum(-1).mean(), rtol=1e-4)
    assert row["agreement"] == (STUDENT.argmax(-1) == TEACHER.argmax(-1)).mean()


# %% Recipes


def test_recipes_are_the_best_of_the_searches(limited):
    """No number is typed by hand: each is the cell of the best mean on validation images."""
    results = ROOT / "docs" / "results"
    cells = json.loads((results / "limited_tuning.json").read_text())["cells"]
    for cell in json.loads((results / "tuning.json").read_text())["cells"]:
        if cell["labels"] == "all":
            for kind in ("baseline", "distilled"):
                cells.append(cell | {"labels": 50_000, "kind": kind, "accuracy": cell[kind]})
    assert {cell["labels"] for cell in cells} == set(limited.RECIPES)
    for labels, kinds in limited.RECIPES.items():
        for kind, recipe in kinds.items():
            own = [c for c in cells if c["labels"] == labels and c["kind"] == kind]
            best = max(own, key=lambda cell: np.mean(cell["accuracy"]))
            assert recipe == (best["learning_rate"], best["epochs"])


def test_the_results_are_of_these_recipes(limited):
    """Whoever changes RECIPES has to measure again."""
    results = json.loads((ROOT / "docs" / "results" / "limited_labels.json").read_text())
    rows = results["runs"][0]["rows"]
    assert rows[0]["name"] == "teacher"
    for row in rows[1:]:
        kind, labels = row["name"].removesuffix(" labels").split(", ")
        recipe = limited.recipe_for(kind, int(labels), row["seed"], limited.Config())
        assert (row["epochs"], row["learning_rate"]) == (recipe.epochs, recipe.learning_rate)


def test_other_numbers_of_labels_take_the_nearest_recipe(limited):
    config = limited.Config()
    for labels, count in ((1000, 1000), (900, 1000), (40_000, 50_000), (20, 100)):
        rate, epochs = limited.RECIPES[count]["distilled"]
        found = limited.recipe_for("distilled", labels, 5, config)
        want = round(epochs * (count / labels) ** 0.66)
        assert found == (5, want, min(128, labels), rate, "onecycle")


# %% Controls


def test_smoothed_labels(controls):
    q = np.full((8, 10), 0.02)
    q[np.arange(8), LABELS] += 0.8
    want = -(q * log_softmax(STUDENT, -1)).sum(-1).mean()
    found = controls.smoothed_loss(STUDENT, {"label": LABELS}, 0.2)
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_what_the_controls_are_told(controls, digits):
    labelled = utils.take_labels(digits.train, 100, 3)
    table = RNG.normal(0, 3, (len(digits.train.label), 10)).astype(np.float32)
    recipe = controls.Recipe(3, 20, 32, 1e-2, "onecycle")
    config = controls.Config(smoothings=(0.1,))
    found = controls.controls(labelled, recipe, table, -table, digits, config)
    own, everything = found["hard pseudo-labels"], found["hard pseudo-labels on all images"]
    for _, split, how in (own, everything):
        np.testing.assert_array_equal(split.label, table[split.index].argmax(-1))
        assert not how, "labels alone"
    assert len(own[1].label) == 100
    assert len(everything[1].label) == len(digits.train.label)
    assert found["twice the steps"][0] == recipe._replace(epochs=40)
    np.testing.assert_array_equal(found["taught by the weak teacher"][2]["table"], -table)
    np.testing.assert_array_equal(found["taught by a blank teacher"][2]["table"], 0 * table)
    assert found["soft targets on all images"][2]["alpha"] == 0
    permuted = found["permuted dark knowledge"][2]["table"]
    np.testing.assert_array_equal(permuted.argmax(-1), table.argmax(-1))
    np.testing.assert_array_equal(np.sort(permuted), np.sort(table))
    assert (permuted != table).any(-1).mean() > 0.9
    for name in ("baseline", "distilled", "alpha 1", "permuted dark knowledge"):
        assert found[name][0] == recipe
        assert found[name][1] is labelled
    steps = recipe.epochs * (100 // 32)
    once = everything[0].epochs * (len(digits.train.label) // 32)
    assert abs(once - steps) <= len(digits.train.label) // 32, "as near as whole epochs allow"


def test_soft_targets_by_numpy(controls):
    batch = {"label": LABELS, "teacher_logits": TEACHER}
    p, q = softmax(TEACHER / 3, -1), log_softmax(STUDENT / 3, -1)
    want = 9 * (p * (np.log(p) - q)).sum(-1).mean()
    found = controls.teacher_loss(STUDENT, batch, 3.0, 0.0)
    np.testing.assert_allclose(found, want, rtol=1e-4)
    grad = jax.grad(lambda z: controls.teacher_loss(z, batch, 3.0, 1.0))(STUDENT)
    labels_alone = jax.grad(lambda z: controls.hard_loss(z, batch))(STUDENT)
    np.testing.assert_array_equal(grad, labels_alone)
