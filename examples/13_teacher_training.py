# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.11", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "orbax-checkpoint>=0.12,<0.13", "numpy>=2.2,<3", "tqdm>=4.66,<5", "matplotlib>=3.9,<4",
#   "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""The teacher: a convolutional network with 946,954 parameters, trained on all labels.

Everything that a student will learn comes from here, so the teacher is to be as good as it can be
for its time: a learning rate that rises and falls in one cycle gets there in three epochs. Script
15 finds the checkpoint that this one leaves.

    python examples/13_teacher_training.py            # MNIST, 3 epochs: 2 to 7 minutes
    python examples/13_teacher_training.py --quick    # a first look: under a minute

Times are for 2 CPU cores, fast or slow.

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
    output_dir: str = "runs/13_teacher_training"  # for results, figure and checkpoints
    seed: int = 0  # of initial weights, batches and dropout
    epochs: int | None = None  # else 3, digits 20, quick 2
    batch_size: int = 128  # images
    learning_rate: float | None = None  # peak of the cycle (5e-3) or constant (1e-3)
    schedule: str = "onecycle"  # of the learning rate: onecycle or constant
    holdout: int = 0  # score on so many images held out of training, and leave the test set alone
    quick: bool = False  # a first look: 2,000 training and test images, 2 epochs


# %% Model


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


# %% Main


def main(config):
    data = utils.start(config)
    default = 2 if config.quick else 20 if data.name == "digits" else 3
    epochs = utils.given(config.epochs, default)
    rate = 1e-3 if config.schedule == "constant" else 5e-3
    rate = utils.given(config.learning_rate, rate)
    recipe = Recipe(config.seed, epochs, config.batch_size, rate, config.schedule)

    utils.banner(f"TEACHER: all {len(data.train.label):,} labels")
    teacher, phase = train_teacher(data, recipe, config.output_dir)
    print("✓ Teacher completed")

    _, logits = evaluate(teacher, data.test)
    rows = utils.rows({"teacher": (teacher, phase)}, {"teacher": logits}, data)
    figure, found = utils.draw(rows, data, logits)
    report = utils.write_results(config, data, rows, figure, found)
    utils.summary(report, data, {"Checkpoint": phase.folder})
    return report


if __name__ == "__main__":
    utils.run(main, Config)
