# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.11", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "orbax-checkpoint>=0.12,<0.13", "numpy>=2.2,<3", "tqdm>=4.66,<5", "matplotlib>=3.9,<4",
#   "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
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
from typing import NamedTuple

import optax
import utils
from fast import conv, max_pool  # those of nnx, faster to train on the CPU
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Config:
    data_dir: str | None = None  # folder with the four IDX files of the dataset
    dataset: str = "mnist"  # mnist, fashion_mnist, kmnist, or digits (embedded)
    output_dir: str = "runs/14_student_baseline"  # for results, figure and checkpoints
    seed: int = 42  # of labelled images, initial weights and batches
    labels: str | None = None  # labelled images, or all; else 1000, digits 300, quick 200
    epochs: int | None = None  # else what the labels need
    batch_size: int | None = None  # images; else 128, quick 32, or all labels if fewer
    learning_rate: float | None = None  # peak of the cycle (else by labels) or constant (1e-3)
    schedule: str = "onecycle"  # of the learning rate: onecycle or constant
    holdout: int = 0  # score on so many images held out of training, and leave the test set alone
    quick: bool = False  # a first look: 2,000 training and test images, 200 labels, few steps


# %% Model


class StudentCNN(nnx.Module):
    """Two blocks of convolution, then two dense layers: [B, 28, 28, 1] to logits [B, classes]."""

    def __init__(self, num_classes=10, *, rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), padding="VALID", conv_general_dilated=conv, rngs=rngs)
        self.bn1 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), padding="VALID", rngs=rngs)
        self.bn2 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.dense1 = nnx.Linear(32 * 5 * 5, 64, rngs=rngs)  # 28 → 26 → 13 → 11 → 5
        self.dense2 = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, x, train=False):
        x = max_pool(nnx.relu(self.bn1(self.conv1(x), use_running_average=not train)))
        x = max_pool(nnx.relu(self.bn2(self.conv2(x), use_running_average=not train)))
        x = x.reshape(len(x), -1)
        return self.dense2(nnx.relu(self.dense1(x)))


# %% Step


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


# %% Training
# `utils.Phase` shows progress, keeps checkpoints and records what was measured.


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


def train_student_baseline(data, labelled, recipe, output_dir):
    """Trains a student on the labels alone. Returns it and its `utils.Phase`."""
    student = StudentCNN(rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(student, recipe, len(labelled.label))
    phase = utils.Phase("baseline", output_dir, recipe, data, labels=len(labelled.label))
    step = utils.bind(train_step, student, optimizer)
    for epoch in phase.epochs(student, optimizer, lambda: evaluate(student, data.test)[0]):
        for batch in utils.batches(labelled, recipe.batch_size, recipe.seed, epoch):
            phase.log(step(batch))
    return student, phase


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


def main(config):
    data = utils.start(config)
    default = 200 if config.quick else 300 if data.name == "digits" else 1000
    labelled = utils.take_labels(data.train, config.labels or default, config.seed)
    images, labels = len(data.train.label), len(labelled.label)
    recipe = student_recipe(config, labels)

    utils.banner(f"BASELINE STUDENT: {labels:,} of {images:,} labels, no teacher")
    student, phase = train_student_baseline(data, labelled, recipe, config.output_dir)
    print("✓ Baseline completed")

    _, logits = evaluate(student, data.test)
    rows = utils.rows({"baseline": (student, phase)}, {"baseline": logits}, data)
    figure, _ = utils.draw(rows, data)
    report = utils.write_results(config, data, rows, figure)
    utils.summary(report, data, {"Labels": f"{labels:,}"})
    return report


if __name__ == "__main__":
    utils.run(main, Config)
