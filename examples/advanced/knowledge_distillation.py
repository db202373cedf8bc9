# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.11", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "orbax-checkpoint>=0.12,<0.13", "numpy>=2.2,<3", "tqdm>=4.66,<5", "matplotlib>=3.9,<4",
#   "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""Temperature and alpha, tuned: a whole grid of students, trained at once by one program.

A student for every pair of temperature and alpha, and for several seeds: one jitted step, over
their stacked weights, trains all of them, and each ends as it would alone. Validation images choose
the pair; test images then score it once, beside the default and the baseline.

    python examples/advanced/knowledge_distillation.py                           # 12 minutes
    python examples/advanced/knowledge_distillation.py --labels 250 1000 5000    # 40 minutes

On 2 CPU cores. Hinton, Vinyals, Dean: Distilling the Knowledge..., 2015, arXiv:1503.02531.
"""

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

sys.path.append(str(Path(__file__).resolve().parents[1]))  # utils.py lies one folder up

import utils
from fast import conv, max_pool  # those of nnx, faster to train on the CPU


@dataclasses.dataclass(frozen=True)
class Config:
    data_dir: str | None = None  # folder with the four IDX files of the dataset
    dataset: str = "mnist"  # mnist, fashion_mnist, kmnist, or digits (embedded)
    output_dir: str = "runs/advanced_knowledge_distillation"  # for results, figure and checkpoints
    temperatures: tuple[float, ...] | None = None  # of the grid; else 1 2 3 5 8 20, quick 1 3
    alphas: tuple[float, ...] | None = None  # of the grid; else 0 0.1 0.5 0.9 1, quick 0.5 1
    labels: tuple[str, ...] | None = None  # a grid for each; else 1000, digits 300, quick 200
    seed: int = 1  # first of the students' seeds: labelled images, initial weights, batches
    seeds: int = 3  # of the grid; students of one seed share start and batches
    test_seeds: int = 5  # further ones, for the comparison on test images
    epochs: int | None = None  # of each student; else what the labels need
    batch_size: int | None = None  # of the students, images; else 128, quick 32, or all labels
    learning_rate: float | None = None  # of the students: peak (else by labels) or constant (1e-3)
    schedule: str = "onecycle"  # of the students' learning rate: onecycle or constant
    teacher: str | None = None  # output folder of a run with this data whose teacher to use
    teacher_seed: int = 0  # of the teacher: initial weights, dropout, batches
    validation: int | None = None  # so many training images choose the pair; else a sixth
    quick: bool = False  # a first look: 2,000 training and test images, 200 labels, a small grid


# %% Models
# Those of script 15, the student in another form: stacked, `nnx.Conv` is slow on the CPU.


class TeacherCNN(nnx.Module):
    """Three blocks of convolution, then three dense layers: [B, 28, 28, 1] to [B, classes]."""

    def __init__(self, num_classes=10, *, rngs):
        self.conv1 = nnx.Conv(1, 64, (3, 3), conv_general_dilated=conv, rngs=rngs)  # "SAME" padding
        self.bn1 = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(64, 128, (3, 3), rngs=rngs)
        self.bn2 = nnx.BatchNorm(128, momentum=0.9, rngs=rngs)
        self.conv3 = nnx.Conv(128, 128, (3, 3), rngs=rngs)
        self.bn3 = nnx.BatchNorm(128, momentum=0.9, rngs=rngs)
        self.dense1 = nnx.Linear(128 * 3 * 3, 512, rngs=rngs)  # 28 → 14 → 7 → 3
        self.dense2 = nnx.Linear(512, 256, rngs=rngs)
        self.dense3 = nnx.Linear(256, num_classes, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, train=False):
        x = max_pool(nnx.relu(self.bn1(self.conv1(x), use_running_average=not train)))
        x = max_pool(nnx.relu(self.bn2(self.conv2(x), use_running_average=not train)))
        x = max_pool(nnx.relu(self.bn3(self.conv3(x), use_running_average=not train)))
        x = x.reshape(len(x), -1)
        x = self.dropout(nnx.relu(self.dense1(x)), deterministic=not train)
        x = self.dropout(nnx.relu(self.dense2(x)), deterministic=not train)
        return self.dense3(x)


def convolve(layer, x):
    """`layer(x)` for a 3×3 "VALID" convolution of [B, H, W, C], as a product of patches."""
    h, w = x.shape[1] - 2, x.shape[2] - 2
    patches = jnp.concatenate([x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], -1)
    return patches @ layer.kernel.reshape(-1, layer.out_features) + layer.bias


class StackableStudent(nnx.Module):
    """StudentCNN of script 15: the same parameters and, to float rounding, the same logits."""

    def __init__(self, num_classes=10, *, rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), padding="VALID", rngs=rngs)
        self.bn1 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), padding="VALID", rngs=rngs)
        self.bn2 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.dense1 = nnx.Linear(32 * 5 * 5, 64, rngs=rngs)  # 28 → 26 → 13 → 11 → 5
        self.dense2 = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, x, train=False):
        x = self.bn1(convolve(self.conv1, x), use_running_average=not train)
        x = self.bn2(convolve(self.conv2, max_pool(nnx.relu(x))), use_running_average=not train)
        x = max_pool(nnx.relu(x)).reshape(len(x), -1)
        return self.dense2(nnx.relu(self.dense1(x)))


class Students(nnx.Module):
    """A stack [seeds, cells] of StackableStudent; those of one seed all have the same start."""

    def __init__(self, seeds, cells):
        def make(key):
            return StackableStudent(rngs=nnx.Rngs(key))

        of_a_seed = nnx.vmap(make, in_axes=None, axis_size=cells)
        self.stack = nnx.vmap(of_a_seed)(jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32)))

    def __call__(self, x, train=False):
        """Images [B, 28, 28, 1] to logits [seeds, cells, B, C]."""
        of_a_seed = nnx.vmap(lambda student, x: student(x, train), in_axes=(0, None))
        return nnx.vmap(of_a_seed, in_axes=(0, None))(self.stack, x)


# %% Loss and steps


def distillation_loss(student_logits, teacher_logits, labels, temperature=3.0, alpha=0.5):
    """The loss of Hinton et al. (2015), from logits [B, C] and labels [B]: (total, hard, soft)."""
    # hard = −log p_student[label] at T = 1, mean over the batch
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(student_logits, labels).mean()
    # soft = T² · KL(p_teacher ‖ p_student), both at temperature T, mean over the batch
    teacher_probs = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    student_log_probs = jax.nn.log_softmax(student_logits / temperature)
    soft = temperature**2 * optax.losses.kl_divergence(student_log_probs, teacher_probs).mean()
    # total = α · hard + (1 − α) · soft
    return alpha * hard + (1 - alpha) * soft, hard, soft


@nnx.jit
def train_step(model, optimizer, batch):
    """One step on the labels alone. Returns the scalars loss and accuracy."""

    def loss_fn(model):
        logits = model(batch["image"], train=True)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), logits

    (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    return {"loss": loss, "accuracy": (logits.argmax(-1) == batch["label"]).mean()}


def student_loss(student, batch, temperature, alpha):
    """The loss of one student on a batch [B, ...], and its parts."""
    logits, targets = student(batch["image"], train=True), batch["teacher_logits"]
    loss, hard, soft = distillation_loss(logits, targets, batch["label"], temperature, alpha)
    return loss, {"loss": loss, "hard_loss": hard, "soft_loss": soft}


@nnx.jit
def students_step(students, optimizer, batch, temperatures, alphas):
    """One step of all students, on a batch [seeds, B, ...]. Returns their losses [seeds, cells]."""
    # On a CPU they take turns, as its caches hold what one of them needs; elsewhere all go at once.
    each = nnx.scan if jax.default_backend() == "cpu" else nnx.vmap
    gradients = nnx.grad(student_loss, has_aux=True)
    # The students of one seed share its batch; each has a temperature and an alpha of its own.
    of_a_seed = each(gradients, in_axes=(0, None, 0, 0), out_axes=0)
    of_all = each(of_a_seed, in_axes=(0, 0, None, None), out_axes=0)
    grads, losses = of_all(students.stack, batch, temperatures, alphas)
    optimizer.update(students, nnx.State({"stack": grads}))  # Adam treats each weight by itself
    return losses


# %% Training


class Recipe(NamedTuple):
    seed: int  # of initial weights, batches and dropout
    epochs: int
    batch_size: int
    learning_rate: float
    schedule: str


def make_optimizer(model, recipe, images):
    """Adam; its rate rises for 30 % of the steps and falls to nearly 0, or is constant."""
    rate = recipe.learning_rate
    if recipe.schedule == "onecycle":
        steps = recipe.epochs * (images // recipe.batch_size)
        rate = optax.cosine_onecycle_schedule(max(1, steps), rate)
    return nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)


def evaluate(model, split):
    """The accuracy over all images of a split, and the logits [N, C] behind it."""
    logits = utils.predict(model, split)
    return (logits.argmax(-1) == split.label).mean(), logits


def train_teacher(data, recipe, output_dir):
    """Trains the teacher on all labels. Returns it and its `utils.Phase`."""
    teacher = TeacherCNN(rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(teacher, recipe, len(data.train.label))
    phase = utils.Phase("teacher", output_dir, recipe, data)
    step = utils.bind(train_step, teacher, optimizer)
    for epoch in phase.epochs(teacher, optimizer, lambda: evaluate(teacher, data.test)[0]):
        for batch in utils.batches(data.train, recipe.batch_size, recipe.seed, epoch):
            phase.log(step(batch))
    return teacher, phase


def train_students(name, teacher, data, labels, seeds, cells, config):
    """Trains a student for each seed and (temperature, alpha) of cells: [seeds, cells]."""
    splits = [utils.take_labels(data.train, labels, seed) for seed in seeds]
    images = len(splits[0].label)
    recipe = student_recipe(config, images)._replace(seed=seeds[0])
    students = Students(seeds, len(cells))
    optimizer = make_optimizer(students, recipe, images)
    how = {"labels": images, "seeds": seeds, "cells": cells, "teacher": utils.digest(teacher)}
    phase = utils.Phase(name, config.output_dir, recipe, data, **how)
    seen = utils.Split(*map(np.concatenate, zip(*splits, strict=True)))
    tables = {"teacher_logits": utils.predict_by_index(teacher, seen)}
    temperatures, alphas = np.array(cells, np.float32).T
    step = utils.bind(students_step, students, optimizer, axis=1)
    for epoch in phase.epochs(students, optimizer, None):
        for batch in utils.stacked_batches(splits, recipe.batch_size, seeds, epoch, **tables):
            phase.log(step(batch, temperatures, alphas))
    return students, phase


# %% Main


def student_recipe(config, labels):
    """A student's recipe, from flags or else from the number of labels. 1,000 labels and nearly
    all were searched on validation images; a power law joins their epochs, 60 and 4."""
    epochs = utils.given(config.epochs, 20 if config.quick else round(60 * (1000 / labels) ** 0.66))
    rate = 1e-3 if config.schedule == "constant" else 4e-2 if labels < 10_000 else 2e-2
    rate = utils.given(config.learning_rate, rate)
    batch_size = utils.given(config.batch_size, min(32 if config.quick else 128, labels))
    utils.check_batch("--batch-size", batch_size, labels)
    return Recipe(config.seed, epochs, batch_size, rate, config.schedule)


def plan(config, data):
    """The teacher's recipe, the numbers of labels, all seeds, and the cells of the grid."""
    quick, digits = config.quick, data.name == "digits"
    recipe = Recipe(config.teacher_seed, 2 if quick else 20 if digits else 3, 128, 5e-3, "onecycle")
    budgets = config.labels or ("200" if quick else "300" if digits else "1000",)
    for labels in budgets:  # finds what cannot be before anything is trained
        student_recipe(config, len(utils.take_labels(data.train, labels, 0).label))
    seeds = [(config.seed + i) % 2**32 for i in range(config.seeds + config.test_seeds)]
    t, a = ((1, 3), (0.5, 1)) if quick else ((1, 2, 3, 5, 8, 20), (0, 0.1, 0.5, 0.9, 1))
    cells = itertools.product(config.temperatures or t, config.alphas or a)
    return recipe, budgets, (seeds[: config.seeds], seeds[config.seeds :]), list(cells)


def main(config):
    data = utils.start(config)
    count = utils.given(config.validation, len(data.train.label) // 6)
    tuning = utils.hold_out(data, count, "--validation")  # the teacher does without them, too
    for_teacher, budgets, (seeds, test_seeds), cells = plan(config, tuning)
    utils.banner(f"TEACHER: {len(tuning.train.label):,} labels")
    teacher = TeacherCNN(rngs=nnx.Rngs(0))
    if not utils.find_run("teacher", teacher, for_teacher, tuning, config):
        teacher, _ = train_teacher(tuning, for_teacher, config.output_dir)
    grids, rows, lines = {}, [], {}
    for labels in budgets:
        utils.banner(f"{labels} LABELS: {len(cells)} pairs of T and alpha, {len(seeds)} seeds")
        students, phase = train_students("grid", teacher, tuning, labels, seeds, cells, config)
        errors = utils.count_errors(students, tuning.test, 64)
        t, a = chosen = cells[errors.mean(0).argmin()]
        grids[labels] = {"chosen": chosen, "errors": errors.tolist(), "last": phase.history[-1:]}
        utils.banner(f"{labels} LABELS: T = {t:g}, alpha = {a:g} on test images")
        how = labels, test_seeds, [chosen, (3.0, 0.5), (1.0, 1.0)], config
        students, phase = train_students("final", teacher, tuning, *how)
        names = [f"{name}, {labels} labels" for name in ("chosen", "default", "baseline")]
        rows += utils.stack_rows(names, test_seeds, students, phase, data)
        for x in names[1:]:
            lines[f"T = {t:g}, alpha = {a:g} − {x}"] = utils.compare(rows, names[0], x, data)
    figure, more = utils.draw_grids(grids, cells, tuning), {"cells": cells, "grids": grids}
    report = utils.write_results(config, data, rows, figure, more | {"validation": count})
    utils.summary(report, data, lines)
    return report


if __name__ == "__main__":
    utils.run(main, Config)
