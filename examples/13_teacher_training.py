# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "numpy>=2.2,<3", "tqdm>=4.66,<5", "tyro>=1.0.8,<2", "typeguard>=4,<5", "filelock>=3.20,<5",
#   "matplotlib>=3.9,<4", "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""The teacher: a convolutional network with 946,954 parameters, trained on all labels.

Everything that a student will learn comes from here, so the teacher is to be as good as it can be
for its time: a learning rate that rises and falls in one cycle gets there in three epochs.

    python examples/13_teacher_training.py            # MNIST, 3 epochs: 1 to 4 minutes
    python examples/13_teacher_training.py --quick    # a first look: about a minute
    python examples/13_teacher_training.py --dataset fashion_mnist    # 20 epochs: 10 to 25 minutes

Times are for 2 CPU cores, fast or slow. Script 15 takes the teacher over:

    python examples/15_knowledge_distillation.py --teacher runs/13_teacher_training

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
from utils import batches, check_batch_size, evaluate, predict


@dataclasses.dataclass(frozen=True)
class Config(experiment.CommonFlags):
    output_dir: str = "runs/13_teacher_training"
    """Folder for results, figure, weights and checkpoints."""
    seed: Seed = 0
    """Seed of the first teacher: initial weights, dropout, order of batches."""
    seeds: Annotated[int, Range(1, 100)] = 1
    """Number of teachers, with seeds one after another."""
    epochs: Annotated[int | None, Range(0, 10_000), OPEN] = None
    """Epochs of each teacher (default: 3; fashion_mnist 20; digits 8; quick 4)."""
    batch_size: Annotated[int | None, Range(1), OPEN] = None
    """Images in a batch (default: 128; digits and quick 32)."""
    learning_rate: Annotated[float | None, Range(0, low_excluded=True), OPEN] = None
    """Peak learning rate (default: 5e-3; fashion_mnist 2e-3; 1e-3 with a constant schedule)."""
    schedule: Literal["onecycle", "constant"] = "onecycle"
    """Course of the learning rate: rising and falling in one cycle, or constant."""
    augmentation: Annotated[Literal["none", "shift", "shift_and_flip"] | None, OPEN] = None
    """Random changes of the images in training (default: none; fashion_mnist shift; quick none)."""


# %% Model
# 28×28 pixels become 14×14, 7×7 and 3×3 while the channels grow. BatchNorm's statistics for
# inference follow fast (momentum 0.9), since the runs are short.


class TeacherCNN(nnx.Module):
    """Three blocks of convolution, then three dense layers: images [B, H, W, C] to [B, classes]."""

    def __init__(self, num_classes=10, image_shape=(28, 28, 1), *, rngs):
        height, width, channels = image_shape
        # Padding "SAME", so that only pooling makes an image smaller: 28 → 14 → 7 → 3.
        self.conv1 = nnx.Conv(channels, 64, (3, 3), conv_general_dilated=conv, rngs=rngs)
        self.bn1 = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(64, 128, (3, 3), rngs=rngs)
        self.bn2 = nnx.BatchNorm(128, momentum=0.9, rngs=rngs)
        self.conv3 = nnx.Conv(128, 128, (3, 3), rngs=rngs)
        self.bn3 = nnx.BatchNorm(128, momentum=0.9, rngs=rngs)
        self.dense1 = nnx.Linear(128 * (height // 8) * (width // 8), 512, rngs=rngs)
        self.dense2 = nnx.Linear(512, 256, rngs=rngs)
        self.dense3 = nnx.Linear(256, num_classes, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, train=False):
        x = max_pool(nnx.relu(self.bn1(self.conv1(x), use_running_average=not train)))
        x = max_pool(nnx.relu(self.bn2(self.conv2(x), use_running_average=not train)))
        x = max_pool(nnx.relu(self.bn3(self.conv3(x), use_running_average=not train)))
        x = x.reshape(x.shape[0], -1)
        x = self.dropout(nnx.relu(self.dense1(x)), deterministic=not train)
        x = self.dropout(nnx.relu(self.dense2(x)), deterministic=not train)
        return self.dense3(x)


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


def train_teacher(data, recipe, run):
    """Trains the teacher on the labels of all training images."""
    teacher = TeacherCNN(data.classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(teacher, recipe, len(data.train.label))
    step = compile_step(train_step, teacher, optimizer)

    training = Training(run, "teacher", teacher, optimizer, recipe, data.train)
    for epoch in training.epochs():
        for batch in batches(
            data.train, recipe.batch_size, recipe.seed, epoch, recipe.augmentation
        ):
            training.log(step(batch))
        training.score(data.scored_on, evaluate, teacher, data.test)
    return teacher


# %% Main
# With several seeds, how far do teachers of one recipe differ?


def fill_in_defaults(config, data):
    """The config with a value for every flag that was left open."""
    if config.quick:
        config = experiment.with_defaults(config, epochs=4, augmentation="none")
    if data.name == "digits":
        config = experiment.with_defaults(config, epochs=8)
    if len(data.train.label) < 10_000:
        config = experiment.with_defaults(config, batch_size=32)
    if data.name == "fashion_mnist":
        config = experiment.with_defaults(config, epochs=20, augmentation="shift")
    rate = 5e-3
    if data.name == "fashion_mnist" and not config.quick:
        rate = 2e-3
    if config.schedule == "constant":
        rate = 1e-3
    return experiment.with_defaults(
        config, epochs=3, batch_size=128, learning_rate=rate, augmentation="none"
    )


def main(config):
    run = experiment.start(config)
    data = run.data
    config = fill_in_defaults(config, data)
    run.config = config
    check_batch_size("--batch-size", config.batch_size, len(data.train.label))

    for seed in run.seeds(config.seeds):
        experiment.print_heading(f"TEACHER: seed {seed}, all {len(data.train.label):,} labels")
        recipe = Recipe(
            seed, config.epochs, config.batch_size, config.learning_rate, config.schedule,
            config.augmentation,
        )  # fmt: skip
        teacher = train_teacher(data, recipe, run)
        logits = predict(teacher, data.test)
        run.add_row("teacher", teacher, logits)

    run.measure_inference("teacher", teacher)
    soft_figure, soft_targets = plots.draw_soft_targets(data, logits)
    run.save_figure(soft_figure, "soft_targets.png")
    errors = 100 - np.mean(run.accuracies("teacher"))
    title = f"The teacher ends with {errors:.2f} % {data.scored_on} errors"
    figure = plots.draw_epochs(run.rows, data, title)
    summary = {"To take it over": f"--teacher {config.output_dir}"}
    return run.finish(figure, summary, soft_targets=soft_targets)


if __name__ == "__main__":
    experiment.run_script(main, Config)
