# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "numpy>=2.2,<3", "tqdm>=4.66,<5", "tyro>=1.0.8,<2", "typeguard>=4,<5", "filelock>=3.20,<5",
#   "matplotlib>=3.9,<4", "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""Controls: would a regulariser, a longer run or any other teacher have done the same?

Beside the baseline and the distilled student stand students that get something else: labels that
are smoothed evenly, as strongly as suits the validation images; twice the steps; the teacher's
answers as hard labels, on the labelled and on all images; its dark knowledge permuted; a weak
teacher, and a blank one. With alpha = 1 the distilled student must be the baseline to the last bit.

    python examples/advanced/controls.py           # 3 seeds: 4 to 8 minutes on 2 cores
    python examples/advanced/controls.py --quick   # a first look: about a minute

Label smoothing: Szegedy et al., 2016, arXiv:1512.00567. Permuted dark knowledge: Furlanello et al.,
2018, arXiv:1805.04770. Weak teachers: Yuan et al., 2020, arXiv:1909.11723.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the modules below lie one folder up

import experiment
import plots
from experiment import OPEN, Range, Recipe, Seed, Training
from fast import compile_step, conv, max_pool  # same results as nnx's, faster on CPUs
from utils import (
    batches,
    check_batch_size,
    evaluate,
    hold_out,
    predict,
    predict_by_index,
    take_labels,
)


@dataclasses.dataclass(frozen=True)
class Config(experiment.CommonFlags):
    output_dir: str = "runs/advanced_controls"
    """Folder for results, figure, weights and checkpoints."""
    seed: Seed = 42
    """Seed of the first students: labelled images, initial weights, order of batches."""
    seeds: Annotated[int | None, Range(2, 100), OPEN] = None
    """Number of students of each kind, with seeds one after another (default: 3; quick 2)."""
    labels: Annotated[int | Literal["all"] | None, Range(10), OPEN] = None
    """Labelled images of the students, or all (default: 1000; digits and quick 100)."""
    epochs: Annotated[int | None, Range(0, 10_000), OPEN] = None
    """Epochs of each student (default: by the number of labels; digits 120; quick 40)."""
    batch_size: Annotated[int | None, Range(1), OPEN] = None
    """Students' images in a batch (default: 128, digits and quick 32, or all there are)."""
    learning_rate: Annotated[float | None, Range(0, low_excluded=True), OPEN] = None
    """Students' peak learning rate (default: by the number of labels; digits and quick 1e-2; 1e-3
    with a constant schedule)."""
    schedule: Literal["onecycle", "constant"] = "onecycle"
    """Course of all learning rates: rising and falling in one cycle, or constant."""
    temperature: Annotated[float, Range(0.001, 10_000)] = 3.0
    """Temperature T that softens the distributions of teacher and student."""
    alpha: Annotated[float, Range(0, 1)] = 0.5
    """Weight of the labels in the loss; the teacher has 1 - alpha."""
    smoothings: Annotated[
        tuple[float, ...] | None, Range(0, 1, low_excluded=True, high_excluded=True), OPEN
    ] = None
    """Strengths of label smoothing to choose from (default: 0.05 0.1 0.2 0.4; quick 0.1)."""
    teacher: Annotated[str | None, OPEN] = None
    """Output folder of a run whose teacher to take: script 13 with --holdout, as many images as
    --validation; of several teachers, the one with --teacher-seed (default: train one)."""
    teacher_seed: Seed = 0
    """Seed of the teacher and of the weak teachers: initial weights, dropout, order of batches."""
    validation: Annotated[int | None, Range(1), OPEN] = None
    """Training images, the last, on which the strength of smoothing is chosen; no network is
    trained on them (default: a sixth of the training images)."""


# %% Models
# The teacher has 946,954 parameters, the student 56,810: the networks of script 15.


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


# %% Losses
# The distilled student's loss is that of script 15. Label smoothing softens the targets, too, but
# evenly over the classes and in the same way for every image: it knows nothing of the image.


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


def distillation_loss(student_logits, teacher_logits, labels, temperature=3.0, alpha=0.5):
    """The loss of Hinton et al. (2015), from logits [B, C] and labels [B]: (total, hard, soft)."""
    hard = hard_loss(student_logits, labels)
    soft = soft_loss(student_logits, teacher_logits, temperature)
    # total = α · hard + (1 − α) · soft
    return alpha * hard + (1 - alpha) * soft, hard, soft


def smoothed_loss(logits, labels, smoothing):
    """Cross-entropy of logits [B, C] with labels [B] of which a part, `smoothing`, is spread evenly
    over all classes. The mean over the batch.

    Raises ValueError where the shapes do not fit.
    """
    logits = at_least_float32(logits)
    if jnp.shape(labels) != logits.shape[:-1]:
        raise ValueError(
            f"logits {logits.shape} and labels {jnp.shape(labels)} must be [B, C], [B]"
        )
    # t = (1 − ε) · one-hot(label) + ε / C
    one_hot = jax.nn.one_hot(labels, logits.shape[-1])
    targets = optax.smooth_labels(one_hot, smoothing)
    # loss = −Σ_c t_c · log q_c, q = softmax(logits), mean over the batch
    return optax.losses.softmax_cross_entropy(logits, targets).mean()


# %% Dark knowledge
# What the teacher finds probable beside its answer is its dark knowledge. Permuted, it says as much
# about how sure the teacher is, and nothing about which digits look alike.


def permute_dark_knowledge(logits, rng):
    """Shuffles each row of [N, C] but for its largest entry ("with permuted predictions")."""
    largest = logits.argmax(-1)
    others = np.arange(logits.shape[1]) != largest[:, None]  # [N, C]
    shuffled = rng.permuted(logits[others].reshape(len(logits), -1), axis=1)
    permuted = logits.copy()
    permuted[others] = shuffled.ravel()
    return permuted


# %% Steps
# `train_step` learns from labels, true ones or the teacher's answers. `train_student_step` distils.
# The teachers are frozen: their logits were computed once and come with the batch, and `teacher` is
# None in this script.


@nnx.jit
def train_step(model, optimizer, batch):
    """One step on the labels alone. Returns the scalars loss and accuracy."""

    def loss_fn(model):
        logits = model(batch["image"], train=True)
        return hard_loss(logits, batch["label"]), logits

    (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    return {"loss": loss, "accuracy": (logits.argmax(-1) == batch["label"]).mean()}


@nnx.jit
def train_student_step(student, teacher, optimizer, batch, temperature=3.0, alpha=0.5):
    """One step of distillation. `teacher` may be None if the batch brings "teacher_logits" [B, C].

    Returns the scalars loss, hard_loss, soft_loss and accuracy.
    """
    teacher_logits = batch.get("teacher_logits")
    if teacher_logits is None:
        teacher_logits = jax.lax.stop_gradient(teacher(batch["image"], train=False))

    def loss_fn(student):
        logits = student(batch["image"], train=True)
        losses = distillation_loss(logits, teacher_logits, batch["label"], temperature, alpha)
        return losses[0], (*losses, logits)

    (_, (loss, hard, soft, logits)), grads = nnx.value_and_grad(loss_fn, has_aux=True)(student)
    optimizer.update(student, grads)
    accuracy = (logits.argmax(-1) == batch["label"]).mean()
    return {"loss": loss, "hard_loss": hard, "soft_loss": soft, "accuracy": accuracy}


@nnx.jit
def train_smoothed_step(student, optimizer, batch, smoothing):
    """One step on smoothed labels. Returns the scalars loss and accuracy."""

    def loss_fn(student):
        logits = student(batch["image"], train=True)
        return smoothed_loss(logits, batch["label"], smoothing), logits

    (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(student)
    optimizer.update(student, grads)
    return {"loss": loss, "accuracy": (logits.argmax(-1) == batch["label"]).mean()}


# %% Training the teachers
# In the functions that train, `data.train` are the images to learn from and `data.test` is the
# validation images. The test images, `run.data.test`, serve for the rows of the results alone.


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


def train_weak_teacher(labelled, recipe, student_seed, data, run):
    """Trains the teacher's network on the labels of the `labelled` images alone, those that the
    students of one seed have."""
    teacher = TeacherCNN(data.classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(teacher, recipe, len(labelled.label))
    step = compile_step(train_step, teacher, optimizer)

    # All weak teachers start from the same seed. The name tells their labelled images apart.
    name = f"weak teacher, labels of seed {student_seed}"
    training = Training(run, name, teacher, optimizer, recipe, labelled)
    for epoch in training.epochs():
        for batch in batches(labelled, recipe.batch_size, recipe.seed, epoch):
            training.log(step(batch))
        training.score(data.scored_on, evaluate, teacher, data.test)
    return teacher


# %% Training the students
# A student learns in one of three ways: from labels, from a teacher's soft targets too, or from
# smoothed labels. All students of a seed start from the same weights. They are many, so each is
# scored only once, at the end of its training.


def train_control_on_labels(name, images, recipe, data, run):
    """Trains a student on images and their labels, which may be the teacher's answers."""
    experiment.print_heading(f"SEED {recipe.seed}: {name}")
    student = StudentCNN(data.classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(student, recipe, len(images.label))
    step = compile_step(train_step, student, optimizer)

    training = Training(run, name, student, optimizer, recipe, images)
    for epoch in training.epochs():
        for batch in batches(images, recipe.batch_size, recipe.seed, epoch):
            training.log(step(batch))
        if epoch == recipe.epochs:
            training.score(data.scored_on, evaluate, student, data.test)
    return student


def train_control_on_soft_targets(
    name, teacher_logits, images, recipe, data, run, temperature, alpha
):
    """Trains a student on images, their labels and a teacher's logits [N, C], each image's at its
    index."""
    experiment.print_heading(f"SEED {recipe.seed}: {name}")
    student = StudentCNN(data.classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(student, recipe, len(images.label))
    step = compile_step(train_student_step, student, None, optimizer)

    training = Training(run, name, student, optimizer, recipe, images)
    for epoch in training.epochs():
        for batch in batches(
            images, recipe.batch_size, recipe.seed, epoch, teacher_logits=teacher_logits
        ):
            training.log(step(batch, temperature, alpha))
        if epoch == recipe.epochs:
            training.score(data.scored_on, evaluate, student, data.test)
    return student


def train_control_on_smoothed_labels(images, recipe, data, run, smoothing):
    """Trains a student on images and their labels, smoothed."""
    name = f"label smoothing {smoothing:.12g}"
    experiment.print_heading(f"SEED {recipe.seed}: {name}")
    student = StudentCNN(data.classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(student, recipe, len(images.label))
    step = compile_step(train_smoothed_step, student, optimizer)

    training = Training(run, name, student, optimizer, recipe, images)
    for epoch in training.epochs():
        for batch in batches(images, recipe.batch_size, recipe.seed, epoch):
            training.log(step(batch, smoothing))
        if epoch == recipe.epochs:
            training.score(data.scored_on, evaluate, student, data.test)
    return student


# %% The controls
# Who learns what: first the students of the labelled images, then those of all images. Both
# functions return {name: student}.


def train_students_on_labelled_images(
    teacher_logits, weak_teacher_logits, labelled, recipe, data, config, run
):
    """Trains one seed's students that see the labelled images alone. The logits [N, C] hold each
    image's at its index."""
    temperature, alpha = config.temperature, config.alpha
    students = {}

    # The pair of script 15.
    students["baseline"] = train_control_on_labels("baseline", labelled, recipe, data, run)
    students["distilled"] = train_control_on_soft_targets(
        "distilled", teacher_logits, labelled, recipe, data, run, temperature, alpha
    )

    # The distilled student's program with no weight on the teacher must give the baseline.
    students["alpha 1"] = train_control_on_soft_targets(
        "alpha 1", teacher_logits, labelled, recipe, data, run, temperature, alpha=1.0
    )

    # Would the baseline have got there by itself?
    longer = recipe._replace(epochs=2 * recipe.epochs)
    students["twice the steps"] = train_control_on_labels(
        "twice the steps", labelled, longer, data, run
    )

    # The teacher's answers in the place of the labels: its knowledge without the softness.
    students["hard pseudo-labels"] = train_control_on_labels(
        "hard pseudo-labels", label_by_teacher(labelled, teacher_logits), recipe, data, run
    )

    # The softness without the knowledge: first without which digits look alike, then from a teacher
    # that has learned little, then from one that finds every class equally probable.
    rng = np.random.default_rng([recipe.seed, 18])
    permuted_logits = permute_dark_knowledge(teacher_logits, rng)
    students["permuted dark knowledge"] = train_control_on_soft_targets(
        "permuted dark knowledge", permuted_logits, labelled, recipe, data, run, temperature, alpha
    )
    students["taught by the weak teacher"] = train_control_on_soft_targets(
        "taught by the weak teacher",
        weak_teacher_logits, labelled, recipe, data, run, temperature, alpha,
    )  # fmt: skip
    blank_logits = np.zeros_like(teacher_logits)
    students["taught by a blank teacher"] = train_control_on_soft_targets(
        "taught by a blank teacher", blank_logits, labelled, recipe, data, run, temperature, alpha
    )
    return students


def train_students_on_all_images(teacher_logits, labelled, recipe, data, config, run):
    """Trains one seed's students that see other images than the labelled ones too, and no true
    label. They take about as many steps as the others, which is about one pass through MNIST. Is it
    the softness, or the images?"""
    steps = recipe.epochs * (len(labelled.label) // recipe.batch_size)
    images = data.train.take(slice(max(1, steps) * recipe.batch_size))  # or all there are
    steps_of_an_epoch = len(images.label) // recipe.batch_size
    epochs = round(steps / steps_of_an_epoch)
    if recipe.epochs > 0:
        epochs = max(1, epochs)
    recipe = recipe._replace(epochs=epochs)
    images = label_by_teacher(images, teacher_logits)

    students = {}
    students["hard pseudo-labels on all images"] = train_control_on_labels(
        "hard pseudo-labels on all images", images, recipe, data, run
    )
    students["soft targets on all images"] = train_control_on_soft_targets(
        "soft targets on all images",
        teacher_logits, images, recipe, data, run, config.temperature, alpha=0.0,
    )  # fmt: skip
    return students


def label_by_teacher(images, teacher_logits):
    """The images with the teacher's answers in the place of their labels."""
    answers = teacher_logits.argmax(-1).astype(np.int32)
    return images._replace(label=answers[images.index])


# %% Settings
# What a flag leaves open is chosen here. All students have the recipe of script 15, but for epochs
# where that is said: one that was searched for both students of a pair, not for each control.


def fill_in_defaults(config, data):
    """The config with a value for every flag that was left open, but those of `student_recipe`."""
    config = experiment.with_defaults(config, validation=len(data.train.label) // 6)
    if config.quick:  # fewer epochs than in script 15, since there are many students
        config = experiment.with_defaults(config, seeds=2, labels=100, epochs=40, smoothings=(0.1,))
    if data.name == "digits":
        config = experiment.with_defaults(config, labels=100)
    return experiment.with_defaults(config, seeds=3, labels=1000, smoothings=(0.05, 0.1, 0.2, 0.4))


def strong_teacher_recipe(config, data):
    """How the teacher is trained: as in script 15."""
    epochs = 3
    if data.name == "digits":
        epochs = 8
    if config.quick:
        epochs = 4
    batch_size = 32 if len(data.train.label) < 10_000 else 128
    rate = 1e-3 if config.schedule == "constant" else 5e-3
    return Recipe(config.teacher_seed, epochs, batch_size, rate, config.schedule)


def weak_teacher_recipe(strong, student):
    """How a weak teacher is trained: a single epoch, in batches of the students' size, since there
    are as few images as they have."""
    return strong._replace(epochs=1, batch_size=student.batch_size)


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


# %% One seed
# The strength of the label smoothing is chosen over all seeds, so each seed has a student of every
# strength.


def train_controls_of_one_seed(
    teacher_logits, labelled, recipe, for_weak_teacher, data, config, run
):
    """Trains a weak teacher and the students of one seed. Returns three things: the weak teacher,
    the students by name, and the students on smoothed labels by strength."""
    experiment.print_heading(f"SEED {recipe.seed}: weak teacher")
    weak_teacher = train_weak_teacher(labelled, for_weak_teacher, recipe.seed, data, run)
    weak_teacher_logits = predict_by_index(weak_teacher, data.train)

    students = train_students_on_labelled_images(
        teacher_logits, weak_teacher_logits, labelled, recipe, data, config, run
    )
    students |= train_students_on_all_images(teacher_logits, labelled, recipe, data, config, run)

    smoothed = {}
    for smoothing in config.smoothings:
        smoothed[smoothing] = train_control_on_smoothed_labels(
            labelled, recipe, data, run, smoothing
        )
    return weak_teacher, students, smoothed


# %% Results
# Test images score the students, and choose nothing.


def count_validation_errors(network, data):
    """The number of validation images that a network gets wrong."""
    answers = predict(network, data.test).argmax(-1)
    return int((answers != data.test.label).sum())


def choose_smoothing(smoothed_students, data):
    """Chooses the strength of label smoothing, from {strength: students of all seeds}: the one with
    the fewest errors on the validation images in all. Returns it and {strength: errors}."""
    errors = {}
    for smoothing, students in smoothed_students.items():
        errors[smoothing] = [count_validation_errors(student, data) for student in students]
    best = min(errors, key=lambda smoothing: sum(errors[smoothing]))
    return best, errors


def add_control_row(name, network, teacher_test_logits, data, run, seed=None):
    """Scores a network on the test images, and counts its errors on the validation images. The seed
    is that of its training, unless another is given."""
    logits = predict(network, run.data.test)
    row = run.add_row(name, network, logits, seed=seed, teacher_logits=teacher_test_logits)
    # With --holdout the row is scored on held-out images, and this key is taken.
    row.setdefault("validation_errors", count_validation_errors(network, data))


def report_controls(run, measured):
    """Draws and prints each student's gain over the baseline. Returns the report."""
    names = list(dict.fromkeys(row["name"] for row in run.rows))
    students = [name for name in names if name not in ("teacher", "weak teacher")]
    accuracies = {name: run.accuracies(name) for name in students}
    title = plots.title_of_gain(
        "Distilled students", "those with permuted dark knowledge",
        accuracies["distilled"], accuracies["permuted dark knowledge"],
    )  # fmt: skip
    # These learned from labels alone, as the baseline did.
    on_labels = ("alpha 1", "twice the steps", "label smoothing")
    colours = dict.fromkeys(on_labels, plots.COLOURS["baseline"])
    figure = plots.draw_gains(plots.subtract_baseline(accuracies), title, colours=colours)
    summary = {}
    for name in students:
        if name != "baseline":
            summary[f"{name} − baseline"] = run.compare(name, "baseline")
    same = measured["alpha_1_is_baseline"]
    summary["alpha 1 is the baseline, bit for bit"] = f"{sum(same)} of {len(same)} seeds"
    chosen = f"{measured['smoothing']:g}, chosen on {measured['validation']:,} validation images"
    summary["Strength of label smoothing"] = chosen
    return run.finish(figure, summary, **measured)


# %% Main
# One strong teacher, then the students of each seed, then the strength of the label smoothing.


def main(config):
    run = experiment.start(config)
    config = fill_in_defaults(config, run.data)
    run.config = config
    # The last training images become validation images. No network is trained on them.
    tuning = hold_out(run.data, config.validation, "--validation")
    for_teacher = strong_teacher_recipe(config, tuning)
    settings = []
    for seed in run.seeds(config.seeds):
        labelled = take_labels(tuning.train, config.labels, seed)
        settings.append((labelled, student_recipe(config, tuning, seed, len(labelled.label))))

    experiment.print_heading(f"TEACHER: {len(tuning.train.label):,} labels")
    if config.teacher:
        fresh = TeacherCNN(tuning.classes, rngs=nnx.Rngs(0))
        teacher = run.take_teacher(fresh, tuning.train)
    else:
        teacher = train_teacher(tuning, for_teacher, run)
    teacher_logits = predict_by_index(teacher, tuning.train)
    teacher_test_logits = predict(teacher, run.data.test)
    add_control_row("teacher", teacher, teacher_test_logits, tuning, run)

    same_bits = []  # whether alpha 1 is the baseline
    changed = []  # how many of the labels the teacher contradicts
    smoothed_students = {smoothing: [] for smoothing in config.smoothings}
    for labelled, recipe in settings:
        for_weak_teacher = weak_teacher_recipe(for_teacher, recipe)
        weak_teacher, students, smoothed = train_controls_of_one_seed(
            teacher_logits, labelled, recipe, for_weak_teacher, tuning, config, run
        )
        # It starts as the strong teacher does; the seed of its row is that of its images.
        add_control_row(
            "weak teacher", weak_teacher, teacher_test_logits, tuning, run, seed=recipe.seed
        )
        for name, student in students.items():
            add_control_row(name, student, teacher_test_logits, tuning, run)
        for smoothing, student in smoothed.items():
            smoothed_students[smoothing].append(student)

        alpha_1 = experiment.fingerprint(students["alpha 1"])
        baseline = experiment.fingerprint(students["baseline"])
        same_bits.append(alpha_1 == baseline)
        pseudo_labels = label_by_teacher(labelled, teacher_logits).label
        changed.append(int((pseudo_labels != labelled.label).sum()))

    # Validation images choose the strength. The students of the other strengths never meet a test
    # image, and get no row.
    smoothing, smoothing_errors = choose_smoothing(smoothed_students, tuning)
    for student in smoothed_students[smoothing]:
        add_control_row("label smoothing", student, teacher_test_logits, tuning, run)

    measured = {
        "validation": config.validation,
        "smoothing": smoothing,
        "smoothing_errors": smoothing_errors,
        "alpha_1_is_baseline": same_bits,
        "pseudo_labels_changed": changed,
    }
    return report_controls(run, measured)


if __name__ == "__main__":
    experiment.run_script(main, Config)
