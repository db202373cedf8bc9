# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "numpy>=2.2,<3", "tqdm>=4.66,<5", "tyro>=1.0.8,<2", "typeguard>=4,<5", "filelock>=3.20,<5",
#   "matplotlib>=3.9,<4", "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""The baseline: the student on its own, without a teacher.

What distillation is worth is measured against this run, so it gets the same care as the distilled
student: the same initial weights, batches and number of steps, and a learning rate that suits it
on validation images. A neglected baseline makes any method look good.

    python examples/14_student_baseline.py                # 1,000 labels: 20 seconds
    python examples/14_student_baseline.py --labels all   # all 60,000:   a minute
    python examples/14_student_baseline.py --quick        # a first look

Times are for 2 CPU cores.

Ioffe, Szegedy: Batch Normalization, 2015, arXiv:1502.03167. Smith, Topin: Super-Convergence
(the one-cycle schedule), 2017, arXiv:1708.07120.
"""

import dataclasses
import functools
from typing import Annotated, Literal

import experiment
import jax.numpy as jnp
import numpy as np
import optax
import plots
from experiment import OPEN, Range, Recipe, Seed, Training
from fast import compile_step, conv, max_pool  # same results as nnx's, faster on CPUs
from flax import nnx
from utils import batches, check_batch_size, evaluate, predict, take_labels


@dataclasses.dataclass(frozen=True)
class Config(experiment.CommonFlags):
    output_dir: str = "runs/14_student_baseline"
    """Folder for results, figure, weights and checkpoints."""
    seed: Seed = 42
    """Seed of the first student: labelled images, initial weights, order of batches."""
    seeds: Annotated[int, Range(1, 100)] = 1
    """Number of students, with seeds one after another."""
    labels: Annotated[int | Literal["all"] | None, Range(10), OPEN] = None
    """Labelled images, or all (default: 1000; digits and quick 100)."""
    epochs: Annotated[int | None, Range(0, 10_000), OPEN] = None
    """Epochs of each student (default: by the number of labels; digits and quick 120)."""
    batch_size: Annotated[int | None, Range(1), OPEN] = None
    """Images in a batch (default: 128, digits and quick 32, or all there are)."""
    learning_rate: Annotated[float | None, Range(0, low_excluded=True), OPEN] = None
    """Peak learning rate (default: by the number of labels; digits and quick 1e-2; 1e-3
    with a constant schedule)."""
    schedule: Literal["onecycle", "constant"] = "onecycle"
    """Course of the learning rate: rising and falling in one cycle, or constant."""


# %% Model
# 56,810 parameters, 17 times fewer than the teacher's. BatchNorm's statistics for inference follow
# fast (momentum 0.9), since the runs are short.


class StudentCNN(nnx.Module):
    """Two blocks of convolution, then two dense layers: images [B, H, W, C] to [B, classes]."""

    def __init__(self, num_classes=10, image_shape=(28, 28, 1), *, rngs):
        height, width, channels = image_shape
        self.conv1 = nnx.Conv(
            channels, 16, (3, 3), padding="VALID", conv_general_dilated=conv, rngs=rngs
        )
        self.bn1 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), padding="VALID", rngs=rngs)
        self.bn2 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        # Padding "VALID" takes two pixels off, pooling halves the rest: 28 → 26 → 13 → 11 → 5.
        height, width = (((pixels - 2) // 2 - 2) // 2 for pixels in (height, width))
        self.dense1 = nnx.Linear(32 * height * width, 64, rngs=rngs)
        self.dense2 = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, x, train=False):
        x = max_pool(nnx.relu(self.bn1(self.conv1(x), use_running_average=not train)))
        x = max_pool(nnx.relu(self.bn2(self.conv2(x), use_running_average=not train)))
        x = x.reshape(x.shape[0], -1)
        return self.dense2(nnx.relu(self.dense1(x)))


# %% Loss and step
# Logits of low precision are taken to float32 first.


def at_least_float32(logits):
    """The logits in float32, or in float64 if that is what they are."""
    logits = jnp.asarray(logits)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def hard_loss(logits, labels):
    """Cross-entropy of logits [B, C] with labels [B], the mean over the batch.

    Raises ValueError where their shapes do not fit.
    """
    logits = at_least_float32(logits)
    if jnp.shape(labels) != logits.shape[:-1]:
        raise ValueError(
            f"logits {logits.shape} and labels {jnp.shape(labels)} must be [B, C], [B]"
        )
    # hard = −log p[label] at T = 1, mean over the batch
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def train_step(model, optimizer, batch):
    """One step on the labels alone. Returns the scalars loss and accuracy."""

    def loss_fn(model):
        logits = model(batch["image"], train=True)
        return hard_loss(logits, batch["label"]), logits

    (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    return {"loss": loss, "accuracy": (logits.argmax(-1) == batch["label"]).mean()}


# %% Training
# `Training` shows progress, keeps checkpoints and takes down what was measured. `compile_step` is
# `nnx.cached_partial`: it fills in model and optimizer, which are updated in place, so that
# `step(batch)` is `train_step(model, optimizer, batch)`. It also shares the batches of a large
# network out over the processor's cores.


@functools.cache  # networks of equal recipes share it, and with it the compiled step
def make_transform(learning_rate, schedule, steps):
    """Adam; its rate rises for 30 % of the steps and falls to nearly 0, or is constant."""
    if schedule == "onecycle":
        learning_rate = optax.cosine_onecycle_schedule(max(1, steps), learning_rate)
    return optax.adam(learning_rate)


def make_optimizer(model, recipe, images):
    """The optimizer for a training on so many images."""
    steps = recipe.epochs * (images // recipe.batch_size)
    transform = make_transform(recipe.learning_rate, recipe.schedule, steps)
    return nnx.Optimizer(model, transform, wrt=nnx.Param)


def train_student_baseline(data, labelled, recipe, run):
    """Trains a student on the labels of the `labelled` images alone."""
    student = StudentCNN(data.classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(student, recipe, len(labelled.label))
    step = compile_step(train_step, student, optimizer)

    training = Training(run, "baseline", student, optimizer, recipe, labelled)
    for epoch in training.epochs():
        for batch in batches(labelled, recipe.batch_size, recipe.seed, epoch):
            training.log(step(batch))
        training.score(data.scored_on, evaluate, student, data.test)
    return student


# %% Settings
# What a flag leaves open is chosen here.


def fill_in_defaults(config, data):
    """The config with a number of labels; `student_recipe` chooses the rest by it."""
    few_images = config.quick or data.name == "digits"
    return experiment.with_defaults(config, labels=100 if few_images else 1000)


def student_recipe(config, data, seed, labels):
    """How a student is trained on so many labels: as the flags say, or else as was searched. Epochs
    fall by a power law: on MNIST from 60 with 1,000 labels to 4 with 60,000, on Fashion-MNIST from
    30 to 7. The digits have 120, and so has --quick."""
    epochs = round(60 * (1000 / labels) ** 0.66)
    rate = 4e-2 if labels < 10_000 else 2e-2
    batch_size = 128
    if data.name == "fashion_mnist":
        epochs = round(30 * (1000 / labels) ** 0.34)
        rate = 2e-2
    if len(data.train.label) < 10_000:  # the digits, or --quick
        epochs = 120
        rate = 1e-2
        batch_size = 32
    if config.schedule == "constant":
        rate = 1e-3
    if config.epochs is not None:
        epochs = config.epochs
    if config.learning_rate is not None:
        rate = config.learning_rate
    batch_size = min(batch_size, labels)
    if config.batch_size is not None:
        batch_size = config.batch_size
    check_batch_size("--batch-size", batch_size, labels)
    return Recipe(seed, epochs, batch_size, rate, config.schedule)


# %% Main
# Each seed draws its labelled images, initial weights and batches, as in script 15.


def main(config):
    run = experiment.start(config)
    data = run.data
    config = fill_in_defaults(config, data)
    run.config = config
    students = []
    for seed in run.seeds(config.seeds):
        labelled = take_labels(data.train, config.labels, seed)
        students.append((labelled, student_recipe(config, data, seed, len(labelled.label))))

    for labelled, recipe in students:
        labels = f"{len(labelled.label):,} of {len(data.train.label):,} labels"
        experiment.print_heading(f"BASELINE STUDENT: seed {recipe.seed}, {labels}, no teacher")
        student = train_student_baseline(data, labelled, recipe, run)
        run.add_row("baseline", student, predict(student, data.test))

    run.measure_inference("baseline", student)
    errors = 100 - np.mean(run.accuracies("baseline"))
    title = f"On labels alone the student ends with {errors:.2f} % {data.scored_on} errors"
    figure = plots.draw_epochs(run.rows, data, title)
    return run.finish(figure, {"Labels": labels})


if __name__ == "__main__":
    experiment.run_script(main, Config)
