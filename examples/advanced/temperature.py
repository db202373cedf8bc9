# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.11", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "orbax-checkpoint>=0.12,<0.13", "numpy>=2.2,<3", "tqdm>=4.66,<5", "matplotlib>=3.9,<4",
#   "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""What the temperature does: why the soft loss carries T², and where a high T leads.

Two claims of the paper are checked on a trained teacher and a student. The gradient of the soft
loss falls as 1/T², and the factor T² keeps it level. And as T grows, the soft targets approach
(1 + (z − mean z) / T) / C, so that matching them becomes matching logits.

    python examples/advanced/temperature.py            # about 3 minutes on 2 CPU cores
    python examples/advanced/temperature.py --quick    # a first look: under a minute

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.
"""

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parents[1]))  # utils.py lies one folder up

import utils
from fast import conv, max_pool  # those of nnx, faster to train on the CPU


@dataclasses.dataclass(frozen=True)
class Config:
    data_dir: str | None = None  # folder with the four IDX files of the dataset
    dataset: str = "mnist"  # mnist, fashion_mnist, kmnist, or digits (embedded)
    output_dir: str = "runs/advanced_temperature"  # for results, figure and checkpoints
    temperatures: tuple[float, ...] = (1, 2, 3, 5, 8, 20, 50, 100)  # T at which to measure
    seed: int = 42  # of the student: labelled images, initial weights, batches
    labels: str | None = None  # the student's, or all; else 1000, digits 300, quick 200
    epochs: int | None = None  # of the student; else what the labels need
    batch_size: int | None = None  # of the student, images; else 128, quick 32, or all labels
    learning_rate: float | None = None  # of the student: peak (else by labels) or constant (1e-3)
    schedule: str = "onecycle"  # of the student's learning rate: onecycle or constant
    teacher: str | None = None  # output folder of a run whose teacher to use
    teacher_seed: int = 0  # of the teacher: initial weights, dropout, batches
    holdout: int = 0  # score on so many images held out of training, and leave the test set alone
    quick: bool = False  # a first look: 2,000 training and test images, 200 labels, few steps


# %% Models


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


# %% Loss and step


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


def student_recipe(config, labels):
    """A student's recipe, from flags or else from the number of labels. 1,000 labels and nearly
    all were searched on validation images; a power law joins their epochs, 60 and 4."""
    epochs = utils.given(config.epochs, 20 if config.quick else round(60 * (1000 / labels) ** 0.66))
    rate = 1e-3 if config.schedule == "constant" else 4e-2 if labels < 10_000 else 2e-2
    rate = utils.given(config.learning_rate, rate)
    batch_size = utils.given(config.batch_size, min(32 if config.quick else 128, labels))
    utils.check_batch("--batch-size", batch_size, labels)
    return Recipe(config.seed, epochs, batch_size, rate, config.schedule)


# %% The gradient of the soft loss


@nnx.jit
def gradient_norm(student, teacher_logits, batch, temperature):
    """The norm, over all weights, of the gradient of the soft loss with its factor T²."""

    def soft_loss(student):
        logits = student(batch["image"], train=True)  # as in a training step
        return distillation_loss(logits, teacher_logits, batch["label"], temperature)[2]

    return optax.tree.norm(nnx.grad(soft_loss)(student))


def gradient_norms(student, teacher, split, temperatures):
    """{with_t2, without_t2: [temperatures]} on the first 500 images of a split."""
    split = split.take(slice(500))
    batch = {"image": jnp.array(split.image / np.float32(255)), "label": jnp.array(split.label)}
    logits = utils.predict(teacher, split)
    norms = [float(gradient_norm(student, logits, batch, float(t))) for t in temperatures]
    without = [norm / t**2 for norm, t in zip(norms, temperatures, strict=True)]
    return {"with_t2": norms, "without_t2": without}


# %% The limit of high temperatures


def distance_from_limit(logits, temperature):
    """How far the soft targets [N, C] are from their limit: the mean of max |p − limit| · C."""
    soft_targets = jax.nn.softmax(logits / temperature)
    # limit = (1 + (z − mean z) / T) / C
    limit = (1 + (logits - logits.mean(-1, keepdims=True)) / temperature) / logits.shape[-1]
    return float(np.abs(soft_targets - limit).max(-1).mean() * logits.shape[-1])


def distance_from_matching(student_logits, teacher_logits, temperature):
    """How far the soft loss's gradient with respect to the logits [N, C], without T², is from its
    limit, the gradient of matching centred logits: relative to the limit."""
    p, q = (jax.nn.softmax(z / temperature) for z in (teacher_logits, student_logits))
    v, z = (x - x.mean(-1, keepdims=True) for x in (teacher_logits, student_logits))
    # gradient = (q − p) / T, limit = (z − v) / (C · T²)
    gradient, limit = (q - p) / temperature, (z - v) / (z.shape[-1] * temperature**2)
    return float(np.linalg.norm(gradient - limit) / np.linalg.norm(limit))


# %% Main


def draw(found, logits):
    """Gradient norms over T; one image's soft targets on their way to the limit; the distances."""
    figure = Figure(figsize=(15, 8), layout="constrained")
    grid, temperatures = figure.subplots(2, 3), found["temperatures"]
    for axes, when in zip(grid[0], ("start", "end"), strict=False):
        for name, label in (("with_t2", "soft, with T²"), ("without_t2", "soft, without T²")):
            axes.plot(temperatures, found[f"{name}_{when}"], "o-", label=label)
        axes.set(title=f"student at the {when} of its training", xscale="log", yscale="log")
        axes.set(xlabel="temperature T", ylabel="norm of the loss's gradient")
    for name, label in (("from_limit", "soft targets"), ("from_matching", "gradient")):
        grid[0, 2].plot(temperatures, found[name], "o-", label=f"{label}, from the limit")
    grid[0, 2].set(title="distance from the limit T → ∞", xlabel="temperature T")
    grid[0, 2].set(xscale="log", yscale="log", ylabel="relative distance")
    z = logits[0]
    for axes, t in zip(grid[1], (1, 5, 50), strict=True):
        axes.bar(range(10), jax.nn.softmax(z / t), label=f"T = {t}")
        axes.plot(range(10), (1 + (z - z.mean()) / t) / 10, "k_", ms=22, mew=2, label="limit")
        axes.set(xticks=range(10), title="the first image's soft targets", xlabel="class")
    for axes in grid.flat:
        axes.legend()
    return figure


def main(config):
    data, quick, temperatures = utils.start(config), config.quick, config.temperatures
    default, epochs = (200, 2) if quick else (300, 20) if data.name == "digits" else (1000, 3)
    for_teacher = Recipe(config.teacher_seed, epochs, 128, 5e-3, "onecycle")
    labelled = utils.take_labels(data.train, config.labels or default, config.seed)
    recipe = student_recipe(config, len(labelled.label))
    utils.banner(f"TEACHER: all {len(data.train.label):,} labels")
    teacher = TeacherCNN(rngs=nnx.Rngs(0))
    phase = utils.find_run("teacher", teacher, for_teacher, data, config)
    if not phase:
        teacher, phase = train_teacher(data, for_teacher, config.output_dir)
    utils.banner(f"STUDENT: {len(labelled.label):,} labels, no teacher")
    student, student_phase = train_student_baseline(data, labelled, recipe, config.output_dir)
    runs = {"teacher": (teacher, phase), "baseline": (student, student_phase)}
    logits = {name: evaluate(model, data.test)[1] for name, (model, _) in runs.items()}
    found = {"temperatures": temperatures}
    for when, model in (("start", StudentCNN(rngs=nnx.Rngs(recipe.seed))), ("end", student)):
        norms = gradient_norms(model, teacher, labelled, temperatures)
        found |= {f"{name}_{when}": values for name, values in norms.items()}
    both = logits["baseline"], logits["teacher"]
    found["from_limit"] = [distance_from_limit(both[1], t) for t in temperatures]
    found["from_matching"] = [distance_from_matching(*both, t) for t in temperatures]
    rows, figure = utils.rows(runs, logits, data), draw(found, logits["teacher"])
    report = utils.write_results(config, data, rows, figure, found)
    lines = {name: " ".join(f"{x:8.3g}" for x in values) for name, values in found.items()}
    utils.summary(report, data, lines)
    return report


if __name__ == "__main__":
    utils.run(main, Config)
