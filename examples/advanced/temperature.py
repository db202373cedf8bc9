# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "numpy>=2.2,<3", "tqdm>=4.66,<5", "tyro>=1.0.8,<2", "typeguard>=4,<5", "filelock>=3.20,<5",
#   "matplotlib>=3.9,<4", "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""What the temperature does: why the soft loss carries T², and where a high T leads.

Two claims of the paper are checked on a trained teacher and a student. The first: without its
factor T² the gradient of the soft loss falls as 1/T², with it it stays level. The second: as T
grows, the soft targets approach (1 + (z − mean z) / T) / C, so that matching them becomes matching
logits.

    python examples/advanced/temperature.py              # 2 to 4 minutes on 2 CPU cores
    python examples/advanced/temperature.py --seeds 5    # five students
    python examples/advanced/temperature.py --quick      # a first look: about a minute

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Annotated, Literal

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the shared modules lie one folder up

import experiment
import jax
import jax.numpy as jnp
import numpy as np
import optax
import plots
from experiment import OPEN, Range, Recipe, Seed, Training
from fast import compile_step, conv, max_pool  # same results as nnx's, faster on CPUs
from flax import nnx
from matplotlib.figure import Figure
from utils import batches, check_batch_size, evaluate, predict, take_labels


@dataclasses.dataclass(frozen=True)
class Config(experiment.CommonFlags):
    output_dir: str = "runs/advanced_temperature"
    """Folder for results, figure, weights and checkpoints."""
    temperatures: Annotated[tuple[float, ...], Range(0.001, 10_000)] = (1, 2, 3, 5, 8, 20, 50, 100)
    """Temperatures at which to measure."""
    seed: Seed = 42
    """Seed of the first student: labelled images, initial weights, order of batches."""
    seeds: Annotated[int | None, Range(1, 100), OPEN] = None
    """Number of students, with seeds one after another (default: 1)."""
    labels: Annotated[int | Literal["all"] | None, Range(10), OPEN] = None
    """Labelled images of a student, or all (default: 1000; digits and quick 100)."""
    epochs: Annotated[int | None, Range(0, 10_000), OPEN] = None
    """Epochs of each student (default: by the number of labels; digits and quick 120)."""
    batch_size: Annotated[int | None, Range(1), OPEN] = None
    """Students' images in a batch (default: 128, digits and quick 32, or all there are)."""
    learning_rate: Annotated[float | None, Range(0, low_excluded=True), OPEN] = None
    """Students' peak learning rate (default: by the number of labels; digits and quick 1e-2; 1e-3
    with a constant schedule)."""
    schedule: Literal["onecycle", "constant"] = "onecycle"
    """Course of the students' learning rate: rising and falling in one cycle, or constant."""
    teacher: Annotated[str | None, OPEN] = None
    """Output folder of a run whose teacher to take: of several, the one with --teacher-seed
    (default: train one)."""
    teacher_seed: Seed = 0
    """Seed of the teacher: initial weights, dropout, order of batches."""


# %% Models
# The teacher and the student of script 15.


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


# %% Losses and step
# Teacher and student are trained on the hard loss alone. The soft loss is not trained on here: its
# gradient is measured.


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


def soft_loss(student_logits, teacher_logits, temperature=3.0):
    """How far the student is from the teacher's soft targets; logits [B, C] of both.

    Raises ValueError where their shapes differ: they would broadcast to a wrong loss.
    """
    student_logits = at_least_float32(student_logits)
    teacher_logits = jax.lax.stop_gradient(at_least_float32(teacher_logits))
    if student_logits.shape != teacher_logits.shape:
        shapes = f"student_logits {student_logits.shape}, teacher_logits {teacher_logits.shape}"
        raise ValueError(f"{shapes}: must be of the same shape [B, C]")
    # soft = T² · KL(p_teacher ‖ p_student), both at temperature T, mean over the batch
    teacher_probs = jax.nn.softmax(teacher_logits / temperature)
    student_log_probs = jax.nn.log_softmax(student_logits / temperature)
    return temperature**2 * optax.losses.kl_divergence(student_log_probs, teacher_probs).mean()


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
# `Training` shows progress, keeps checkpoints and takes down what was measured. `compile_step`
# is `nnx.cached_partial`: it fills the networks in, and spreads the work over the CPU's cores.


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


# %% The gradient of the soft loss
# The first claim. The gradient is that of a step on up to 500 labelled images. The soft loss has
# the factor T², so its gradient divided by T² is the gradient without the factor.


@nnx.jit
def soft_gradient_norm(student, teacher_logits, image, temperature):
    """The norm, over all weights, of the gradient of the soft loss, from images [B, 28, 28, 1] and
    the teacher's logits [B, C] for them."""

    def loss_fn(student):
        student_logits = student(image, train=True)  # as in a training step
        return soft_loss(student_logits, teacher_logits, temperature)

    return optax.tree.norm(nnx.grad(loss_fn)(student))


def measure_gradient(student, teacher, labelled, temperatures):
    """The norms with T² and without it, two lists [temperatures], on the first 500 images."""
    split = labelled.take(slice(500))
    image = jnp.array(split.image / np.float32(255))
    teacher_logits = predict(teacher, split)
    student = nnx.clone(student)  # a step changes BatchNorm's statistics
    with_t2 = []
    without_t2 = []
    for temperature in temperatures:
        norm = float(soft_gradient_norm(student, teacher_logits, image, float(temperature)))
        with_t2.append(norm)
        without_t2.append(norm / temperature**2)
    return with_t2, without_t2


# %% The limit of high temperatures
# The second claim, once for the soft targets themselves, and once for the soft loss's gradient with
# respect to the student's logits.


def distance_from_limit(logits, temperature):
    """How far the soft targets are from their limit, from logits [N, C]: the largest difference of
    each image in units of a uniform probability 1 / C, the mean over the images."""
    classes = logits.shape[-1]
    soft_targets = jax.nn.softmax(logits / temperature)
    # limit = (1 + (z − mean z) / T) / C
    limit = (1 + (logits - logits.mean(-1, keepdims=True)) / temperature) / classes
    return float(np.abs(soft_targets - limit).max(-1).mean() * classes)


def distance_from_matching(student_logits, teacher_logits, temperature):
    """How far the gradient of the soft loss without T² with respect to the student's logits [N, C]
    is from its limit, the gradient of matching centred logits: relative to the limit."""
    classes = student_logits.shape[-1]
    teacher_probs = jax.nn.softmax(teacher_logits / temperature)
    student_probs = jax.nn.softmax(student_logits / temperature)
    teacher_centred = teacher_logits - teacher_logits.mean(-1, keepdims=True)
    student_centred = student_logits - student_logits.mean(-1, keepdims=True)
    # gradient = (p_student − p_teacher) / T
    gradient = (student_probs - teacher_probs) / temperature
    # limit = (z_student − z_teacher) / (C · T²), both centred
    limit = (student_centred - teacher_centred) / (classes * temperature**2)
    return float(np.linalg.norm(gradient - limit) / np.linalg.norm(limit))


# %% What is measured of a student
# Of every student, at every temperature. The gradient over the weights is measured twice: with the
# initial weights, and with those at the end of the training.

MEASURES = {  # name in results.json: name in the summary
    "with_t2_start": "Gradient at start, with T²",
    "without_t2_start": "Gradient at start, without T²",
    "with_t2_end": "Gradient at end, with T²",
    "without_t2_end": "Gradient at end, without T²",
    "from_matching": "Gradient, from logit matching",
}


def measure_student(student, logits, teacher, teacher_logits, labelled, seed, temperatures):
    """The MEASURES of a trained student: dict of lists [temperatures].

    Args:
      logits, teacher_logits: of the student and the teacher on the test images, [N, C].
      labelled: the images that the student was trained on.
      seed: of the student's initial weights.
    """
    untrained = StudentCNN(logits.shape[-1], rngs=nnx.Rngs(seed))
    with_t2_start, without_t2_start = measure_gradient(untrained, teacher, labelled, temperatures)
    with_t2_end, without_t2_end = measure_gradient(student, teacher, labelled, temperatures)
    from_matching = [distance_from_matching(logits, teacher_logits, t) for t in temperatures]
    return {
        "with_t2_start": with_t2_start,
        "without_t2_start": without_t2_start,
        "with_t2_end": with_t2_end,
        "without_t2_end": without_t2_end,
        "from_matching": from_matching,
    }


# %% Settings
# What a flag leaves open is chosen here. Epochs and learning rates are those of script 15.


def fill_in_defaults(config, data):
    """The config with a value for every flag that was left open, but those of `student_recipe`."""
    config = experiment.with_defaults(config, seeds=1)
    few_images = config.quick or data.name == "digits"
    return experiment.with_defaults(config, labels=100 if few_images else 1000)


def fixed_teacher_recipe(config, data):
    """How the teacher is trained, whatever the students' flags say."""
    epochs = 3
    if data.name == "digits":
        epochs = 8
    if config.quick:
        epochs = 4
    batch_size = 32 if len(data.train.label) < 10_000 else 128
    return Recipe(config.teacher_seed, epochs, batch_size, 5e-3, "onecycle")


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


# %% Figure
# The norms of the soft loss's gradient over T, with the factor T² and without it.


def draw(run, temperatures):
    """The figure, from the rows of a run: a point for each student, a line through the means."""
    figure = Figure(figsize=(plots.WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    order = np.argsort(temperatures)
    for factor, colour in (("with", "tab:purple"), ("without", "tab:red")):
        for moment, style in (("start", "-"), ("end", "--")):
            values = np.array(run.values("baseline", f"{factor}_t2_{moment}"))  # [students, T]
            axes.plot(temperatures, values.T, ".", color=colour, alpha=0.5)
            means = values.mean(axis=0)[order]
            trained = "untrained" if moment == "start" else "trained"
            label = f"{factor} T², {trained} student"
            axes.plot(np.array(temperatures)[order], means, style, color=colour, label=label)
    axes.set(xlabel="temperature T", ylabel="norm of the soft loss's gradient")
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(temperatures, labels=[f"{x:g}" for x in temperatures])
    axes.minorticks_off()
    axes.set_title(say_how_the_norm_changes(run))
    axes.legend()
    return figure


def say_how_the_norm_changes(run):
    """The figure's message: the largest norm with T² divided by the smallest."""
    changes = []
    for moment in ("start", "end"):
        norms = np.mean(run.values("baseline", f"with_t2_{moment}"), axis=0)
        if norms.min() == 0 or len(norms) == 1:
            return "Norms of the soft loss's gradient"
        change = float(f"{norms.max() / norms.min():.2g}")  # two digits
        changes.append(f"{change:,g}")
    return (
        f"With T² the norm changes by a factor of {changes[0]} for an untrained student,\n"
        f"and of {changes[1]} for a trained one"
    )


# %% Main
# One teacher, and students that learn from labels alone, so that each still differs from the
# teacher.


def main(config):
    run = experiment.start(config)
    data = run.data
    config = fill_in_defaults(config, data)
    run.config = config
    students = []
    for seed in run.seeds(config.seeds):
        labelled = take_labels(data.train, config.labels, seed)
        students.append((labelled, student_recipe(config, data, seed, len(labelled.label))))

    experiment.print_heading(f"TEACHER: all {len(data.train.label):,} labels")
    if config.teacher:
        fresh = TeacherCNN(data.classes, rngs=nnx.Rngs(0))
        teacher = run.take_teacher(fresh, data.train)
    else:
        teacher = train_teacher(data, fixed_teacher_recipe(config, data), run)
    teacher_logits = predict(teacher, data.test)
    from_limit = [distance_from_limit(teacher_logits, t) for t in config.temperatures]
    run.add_row(
        "teacher", teacher, teacher_logits, teacher_logits=teacher_logits, from_limit=from_limit
    )

    for labelled, recipe in students:
        heading = f"STUDENT: seed {recipe.seed}, {len(labelled.label):,} labels, no teacher"
        experiment.print_heading(heading)
        student = train_student_baseline(data, labelled, recipe, run)
        logits = predict(student, data.test)
        measures = measure_student(
            student, logits, teacher, teacher_logits, labelled, recipe.seed, config.temperatures
        )
        run.add_row("baseline", student, logits, teacher_logits=teacher_logits, **measures)

    # Means over the students; their rows have the values of each.
    found = {key: np.mean(run.values("baseline", key), axis=0).tolist() for key in MEASURES}
    found["from_limit"] = from_limit
    summary = {"Temperature": in_columns(config.temperatures)}
    for key, title in MEASURES.items():
        summary[title] = in_columns(found[key])
    summary["Soft targets, from their limit"] = in_columns(from_limit)
    figure = draw(run, config.temperatures)
    return run.finish(figure, summary, temperatures=config.temperatures, **found)


def in_columns(values):
    """Numbers side by side, for the summary."""
    return " ".join(f"{x:8.3g}" for x in values)


if __name__ == "__main__":
    experiment.run_script(main, Config)
