# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "numpy>=2.2,<3", "tqdm>=4.66,<5", "tyro>=1.0.8,<2", "typeguard>=4,<5", "filelock>=3.20,<5",
#   "matplotlib>=3.9,<4", "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""Ensemble distillation: several teachers teach one student.

Teachers that differ in initial weights, dropout and order of batches (with --subsets also in their
images) err on different images, so their mean usually errs less than each of them. They learn from
3,000 labels each, the students from 1,000 that another seed draws. One student learns from
the mean of their probabilities, one from the mean of their logits, one from the first teacher
alone, and one from a teacher drawn anew for each batch. A baseline learns from the labels alone.

    python examples/17_ensemble_distillation.py             # 4 teachers: 4 to 5 minutes on 2 cores
    python examples/17_ensemble_distillation.py --subsets   # each teacher draws its own images
    python examples/17_ensemble_distillation.py --seeds 5   # five repetitions, 20 teachers
    python examples/17_ensemble_distillation.py --quick     # 2 teachers: about a minute

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.
"""

import dataclasses
import functools
import time
from typing import Annotated, Literal, NamedTuple

import experiment
import jax
import jax.numpy as jnp
import numpy as np
import optax
import plots
from experiment import OPEN, Range, Recipe, Seed, Training
from fast import compile_step, conv, max_pool  # same results as nnx's, faster on CPUs
from flax import nnx
from utils import (
    Split,
    batches,
    check_batch_size,
    mcnemar,
    predict,
    predict_by_index,
    require,
    take_labels,
)


@dataclasses.dataclass(frozen=True)
class Config(experiment.CommonFlags):
    output_dir: str = "runs/17_ensemble_distillation"
    """Folder for results, figure, weights and checkpoints."""
    seed: Seed = 42
    """Seed of the first students: labelled images, initial weights, batches, drawn teachers."""
    seeds: Annotated[int | None, Range(1, 100), OPEN] = None
    """Number of repetitions, each with students and teachers of its own (default: 1)."""
    labels: Annotated[int | Literal["all"] | None, Range(10), OPEN] = None
    """Labelled images of the students, or all (default: 1000; digits and quick 100)."""
    epochs: Annotated[int | None, Range(0, 10_000), OPEN] = None
    """Epochs of each student (default: by the number of labels; digits and quick 120)."""
    batch_size: Annotated[int | None, Range(1), OPEN] = None
    """Students' images in a batch (default: 128, digits and quick 32, or all there are)."""
    learning_rate: Annotated[float | None, Range(0, low_excluded=True), OPEN] = None
    """Students' peak learning rate (default: by the number of labels; digits and quick 1e-2; 1e-3
    with a constant schedule)."""
    schedule: Literal["onecycle", "constant"] = "onecycle"
    """Course of all learning rates: rising and falling in one cycle, or constant."""
    temperature: Annotated[float, Range(0.001, 10_000)] = 3.0
    """Temperature T that softens the distributions of teachers and students."""
    alpha: Annotated[float, Range(0, 1)] = 0.5
    """Weight of the labels in the loss; the teachers have 1 - alpha."""
    teachers: Annotated[int | None, Range(2, 100), OPEN] = None
    """Number of teachers of a repetition (default: 4; quick 2)."""
    subsets: bool = False
    """Let each teacher draw its own images; otherwise all teachers have the same."""
    teacher_seed: Seed = 0
    """Seed of the first teacher: weights, dropout, batches, and the images of all (with subsets its
    own). The others follow, + 1 each."""
    teacher_labels: Annotated[int | Literal["all"] | None, Range(128), OPEN] = None
    """Labelled images of a teacher, or all (default: 3000, or all there are; with subsets at most
    half of them)."""
    teacher_epochs: Annotated[int | None, Range(0, 10_000), OPEN] = None
    """Epochs of each teacher (default: 15 for 3000 labels, fewer for more labels; digits 8; quick
    4)."""


# %% Models
# The teacher has 946,954 parameters, the student 56,810. All teachers are of one architecture; what
# makes them differ is their seed.


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


# %% Loss
# What do several teachers say together? Their distributions can be averaged in two ways, and the
# student learns from that one mean as it would from one teacher.


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


def mean_distribution(teacher_logits, temperature=1.0, average="probabilities"):
    """What K teachers say together, [B, C]: the mean of their softened distributions.

    Args:
      teacher_logits: an array [K, B, C], or a list of K arrays [B, C].
      temperature: T, which softens each distribution before the mean is taken.
      average: "probabilities" for the arithmetic mean, "logits" for the geometric one.

    Raises ValueError for another average, or without a teacher.
    """
    if average not in ("probabilities", "logits"):
        raise ValueError(f"average={average!r}: must be 'probabilities' or 'logits'")
    if len(teacher_logits) == 0:
        raise ValueError("0 teachers: a mean needs one or more")
    teacher_logits = jax.lax.stop_gradient(at_least_float32(teacher_logits))
    softened = teacher_logits / temperature
    if average == "probabilities":
        # p = 1/K · Σ_k softmax(v_k / T): what one teacher finds likely stays likely
        return jax.nn.softmax(softened).mean(axis=0)
    # p = softmax(1/K · Σ_k v_k / T) ∝ (Π_k p_k)^(1/K): what one teacher rules out is ruled out
    return jax.nn.softmax(softened.mean(axis=0))


def ensemble_soft_loss(student_logits, teacher_logits, temperature=3.0, average="probabilities"):
    """How far the student, logits [B, C], is from the mean of its teachers, logits [K, B, C].

    Raises ValueError where their shapes do not fit: they might broadcast to a wrong loss.
    """
    student_logits = at_least_float32(student_logits)
    teacher_probs = mean_distribution(teacher_logits, temperature, average)
    if student_logits.shape != teacher_probs.shape:
        teacher_shape = jnp.shape(teacher_logits)
        shapes = f"student_logits {student_logits.shape}, teacher_logits {teacher_shape}"
        raise ValueError(f"{shapes}: must be of the shapes [B, C], [K, B, C]")
    # soft = T² · KL(mean of the teachers ‖ p_student), all at temperature T, mean over the batch
    student_log_probs = jax.nn.log_softmax(student_logits / temperature)
    return temperature**2 * optax.losses.kl_divergence(student_log_probs, teacher_probs).mean()


def ensemble_distillation_loss(
    student_logits, teacher_logits, labels, temperature=3.0, alpha=0.5, average="probabilities"
):
    """The loss of a student of K teachers: (total, hard, soft), from its logits [B, C], their
    logits [K, B, C] and labels [B]."""
    hard = hard_loss(student_logits, labels)
    soft = ensemble_soft_loss(student_logits, teacher_logits, temperature, average)
    # total = α · hard + (1 − α) · soft
    return alpha * hard + (1 - alpha) * soft, hard, soft


# %% Steps
# `train_step` learns from the labels alone: each teacher, and the student without a teacher.
# `ensemble_step` distils. The teachers take no part in it but by their logits, which the batch
# brings.


@nnx.jit
def train_step(model, optimizer, batch):
    """One step on the labels alone. Returns the scalars loss and accuracy."""

    def loss_fn(model):
        logits = model(batch["image"], train=True)
        return hard_loss(logits, batch["label"]), logits

    (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    return {"loss": loss, "accuracy": (logits.argmax(-1) == batch["label"]).mean()}


@nnx.jit(static_argnames="average")
def ensemble_step(student, optimizer, batch, temperature=3.0, alpha=0.5, average="probabilities"):
    """One step of a student on labels and on the batch's "teacher_logits" [B, K, C].

    Returns the scalars loss, hard_loss, soft_loss and accuracy.
    """
    teacher_logits = batch["teacher_logits"].swapaxes(0, 1)  # [K, B, C]

    def loss_fn(student):
        logits = student(batch["image"], train=True)
        losses = ensemble_distillation_loss(
            logits, teacher_logits, batch["label"], temperature, alpha, average
        )
        return losses[0], (*losses, logits)

    (_, (loss, hard, soft, logits)), grads = nnx.value_and_grad(loss_fn, has_aux=True)(student)
    optimizer.update(student, grads)
    accuracy = (logits.argmax(-1) == batch["label"]).mean()
    return {"loss": loss, "hard_loss": hard, "soft_loss": soft, "accuracy": accuracy}


# %% Training
# Three loops: a teacher, the student without a teacher, and a student of several teachers. The
# networks are scored at the end of their trainings alone, to save time.


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


def train_ensemble_member(name, images, classes, recipe, run):
    """Trains a teacher on the labels of its own images."""
    teacher = TeacherCNN(classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(teacher, recipe, len(images.label))
    step = compile_step(train_step, teacher, optimizer)

    training = Training(run, name, teacher, optimizer, recipe, images)
    for epoch in training.epochs():
        for batch in batches(images, recipe.batch_size, recipe.seed, epoch):
            training.log(step(batch))
    return teacher


def train_student_on_labels(name, labelled, classes, recipe, run):
    """Trains a student on the labels of the `labelled` images alone."""
    student = StudentCNN(classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(student, recipe, len(labelled.label))
    step = compile_step(train_step, student, optimizer)

    training = Training(run, name, student, optimizer, recipe, labelled)
    for epoch in training.epochs():
        for batch in batches(labelled, recipe.batch_size, recipe.seed, epoch):
            training.log(step(batch))
    return student


def train_ensemble_student(
    name, labelled, teacher_logits, classes, recipe, run,
    temperature=3.0, alpha=0.5, average="probabilities", random_teacher=False,
):  # fmt: skip
    """Trains a student on the labels and its teachers' answers, with the baseline's initial weights
    and on its batches.

    Args:
      teacher_logits: [N, K, C], each image's at its index.
      average: "probabilities" or "logits", of which the mean is taken.
      random_teacher: learn each batch from one teacher, drawn anew, instead of from the mean.
    """
    student = StudentCNN(classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(student, recipe, len(labelled.label))
    step = compile_step(ensemble_step, student, optimizer)

    training = Training(run, name, student, optimizer, recipe, labelled)
    for epoch in training.epochs():
        # Seeded by the epoch, so that a training that was stopped goes on with the same draws.
        rng = np.random.default_rng([recipe.seed, 17, epoch])
        for batch in batches(
            labelled, recipe.batch_size, recipe.seed, epoch, teacher_logits=teacher_logits
        ):
            if random_teacher:
                k = rng.integers(teacher_logits.shape[1])
                batch["teacher_logits"] = batch["teacher_logits"][:, k : k + 1]
            training.log(step(batch, temperature=temperature, alpha=alpha, average=average))
    return student


# %% Settings
# What a flag leaves open is chosen here. Of MNIST the teachers see 3,000 labels: with many more
# they make so few errors that there is little left to average away.

TEACHER_BATCH_SIZE = 128


def fill_in_defaults(config, data):
    """The config with a value for every flag that was left open, but those of `student_recipe`."""
    config = experiment.with_defaults(config, seeds=1)
    if config.quick:
        config = experiment.with_defaults(config, labels=100, teachers=2, teacher_epochs=4)
    if data.name == "digits":
        config = experiment.with_defaults(config, labels=100, teacher_epochs=8)
    config = experiment.with_defaults(config, labels=1000, teachers=4)

    images = len(data.train.label)
    if config.teacher_labels == "all":
        config = dataclasses.replace(config, teacher_labels=images)
    if config.subsets:  # of all images, two teachers could not draw different ones
        config = experiment.with_defaults(config, teacher_labels=min(3000, images // 2))
    config = experiment.with_defaults(config, teacher_labels=min(3000, images))
    epochs = max(3, round(15 * (3000 / config.teacher_labels) ** 0.75))
    return experiment.with_defaults(config, teacher_epochs=epochs)


def check_teacher_labels(config, data):
    """Raises UserError if a teacher cannot have so many images."""
    flag = f"--teacher-labels {config.teacher_labels}"
    images = len(data.train.label)
    one_batch = f"{flag}: must be {TEACHER_BATCH_SIZE} or more"
    require(config.teacher_labels >= TEACHER_BATCH_SIZE, one_batch)
    require(config.teacher_labels <= images, f"{flag}: there are {images:,} training images")
    if config.subsets:
        part = f"{flag}: must be below {images:,}, since --subsets draws a part of the images"
        require(config.teacher_labels < images, part)


def ensemble_teacher_recipe(config, data, seed):
    """How one of the teachers is trained."""
    batch_size = 32 if len(data.train.label) < 10_000 else TEACHER_BATCH_SIZE
    rate = 1e-3 if config.schedule == "constant" else 5e-3
    return Recipe(seed, config.teacher_epochs, batch_size, rate, config.schedule)


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


class Repetition(NamedTuple):
    """What the teachers and students of one repetition are trained on, and how."""

    teacher_images: list  # a Split for each teacher
    teacher_recipes: list  # a Recipe for each teacher
    labelled: Split  # the images of all students
    student_recipe: Recipe  # of all students


def plan_repetition(config, data, number, seed):
    """The repetition of this number, from 0 on, whose students have this seed. Each repetition has
    teachers of its own: no two of them share a seed. The images of teachers and of students are
    drawn independently, whatever the seeds."""
    first_seed = config.teacher_seed + number * config.teachers
    teacher_images = []
    teacher_recipes = []
    for k in range(config.teachers):
        teacher_seed = (first_seed + k) % 2**32
        images_seed = teacher_seed if config.subsets else first_seed % 2**32
        images = take_labels(data.train, config.teacher_labels, images_seed, stream=3)
        teacher_images.append(images)
        teacher_recipes.append(ensemble_teacher_recipe(config, data, teacher_seed))
    labelled = take_labels(data.train, config.labels, seed)
    recipe = student_recipe(config, data, seed, len(labelled.label))
    return Repetition(teacher_images, teacher_recipes, labelled, recipe)


# %% Teachers and students of one repetition
# The teachers come first. Their logits for the students' images are computed once, since neither
# they nor the images change. Then five students learn, whose targets alone differ.


def train_teachers(repetition, data, run):
    """Trains the teachers one after the other. Returns them in a list."""
    teachers = []
    count = len(repetition.teacher_recipes)
    for k in range(count):
        images = repetition.teacher_images[k]
        recipe = repetition.teacher_recipes[k]
        heading = f"seed {recipe.seed}, {len(images.label):,} labels"
        experiment.print_heading(f"TEACHER {k + 1} OF {count}: {heading}")
        teacher = train_ensemble_member(f"teacher {k + 1}", images, data.classes, recipe, run)
        teachers.append(teacher)
    return teachers


def train_five_students(repetition, teacher_logits, data, config, run):
    """Trains five students with the same initial weights on the same batches, from the teachers'
    logits [N, K, C] by the images' index. Returns {name: student}."""
    labelled = repetition.labelled
    recipe = repetition.student_recipe
    classes = data.classes
    temperature = config.temperature
    alpha = config.alpha
    heading = f"seed {recipe.seed}, {len(labelled.label):,} labels"
    students = {}

    experiment.print_heading(f"BASELINE: {heading}, no teacher")
    students["baseline"] = train_student_on_labels("baseline", labelled, classes, recipe, run)

    # Its teacher is the first one, which was fixed before anything was scored.
    experiment.print_heading(f"STUDENT OF ONE TEACHER: {heading}")
    students["student of one teacher"] = train_ensemble_student(
        "student of one teacher", labelled, teacher_logits[:, :1], classes, recipe, run,
        temperature, alpha,
    )  # fmt: skip

    experiment.print_heading(f"STUDENT, MEAN PROBABILITIES: {heading}")
    students["student, mean probabilities"] = train_ensemble_student(
        "student, mean probabilities", labelled, teacher_logits, classes, recipe, run,
        temperature, alpha, average="probabilities",
    )  # fmt: skip

    experiment.print_heading(f"STUDENT, MEAN LOGITS: {heading}")
    students["student, mean logits"] = train_ensemble_student(
        "student, mean logits", labelled, teacher_logits, classes, recipe, run,
        temperature, alpha, average="logits",
    )  # fmt: skip

    experiment.print_heading(f"STUDENT, RANDOM TEACHER: {heading}")
    students["student, random teacher"] = train_ensemble_student(
        "student, random teacher", labelled, teacher_logits, classes, recipe, run,
        temperature, alpha, random_teacher=True,
    )  # fmt: skip
    return students


# %% What is measured
# An ensemble gains from teachers that err on different images, so that is measured too. What it
# costs shows in use: every member has to answer, where the student answers alone.


def measure_disagreement(answers):
    """The share of images on which two teachers answer differently, of answers [K, N]: the mean
    over all pairs of teachers."""
    first, second = np.triu_indices(len(answers), 1)
    return float((answers[first] != answers[second]).mean())


def measure_common_errors(answers, labels):
    """Of the images on which at least one teacher errs the share on which all do, of answers [K, N]
    and labels [N]."""
    wrong = answers != labels
    return float(wrong.all(axis=0).sum() / max(1, wrong.any(axis=0).sum()))


def measure_inference_seconds(networks, split, images):
    """Seconds for 1,000 images of {name: models whose mean answers}, measured on so many images of
    a split: the median of five turns."""
    split = split.take(np.arange(images) % len(split.label))
    seconds = {name: [] for name in networks}
    for _ in range(5):  # in turns, so that a busy moment of the machine meets all
        for name, models in networks.items():
            begun = time.perf_counter()
            mean_distribution([predict(model, split) for model in models])
            seconds[name].append((time.perf_counter() - begun) * 1000 / images)
    return {name: float(np.median(turns)) for name, turns in seconds.items()}


def add_teacher_rows(repetition, teachers, teacher_logits, run):
    """Adds the rows of the teachers and of both their means, from their logits [K, N, C] on the
    scored images. Returns the logits [N, C] of the mean probabilities: all rows are compared with
    those."""
    mean_logits = {}
    for average in ("probabilities", "logits"):
        probs = np.asarray(mean_distribution(teacher_logits, 1.0, average))
        # v = log p are logits of the distribution p: softmax(v) = p
        mean_logits[average] = np.log(probs + 1e-30)
    ensemble_logits = mean_logits["probabilities"]

    for k, teacher in enumerate(teachers):
        run.add_row(f"teacher {k + 1}", teacher, teacher_logits[k], teacher_logits=ensemble_logits)

    answers = teacher_logits.argmax(-1)
    disagreement = measure_disagreement(answers)
    common_errors = measure_common_errors(answers, run.data.test.label)
    for average, logits in mean_logits.items():
        # An ensemble was not trained: its history is empty, its cost stands in its teachers' rows,
        # and its settings are those of the first of them.
        run.add_row(
            f"ensemble, {average}", tuple(teachers), logits,
            seed=repetition.teacher_recipes[0].seed, teacher_logits=ensemble_logits,
            seconds=0.0, epoch_seconds=[], history=[],
            disagreement=disagreement, common_errors=common_errors,
        )  # fmt: skip
    return ensemble_logits


def add_student_rows(students, ensemble_logits, run):
    """Adds the rows of {name: student}, each compared with the ensemble's logits [N, C]."""
    student_logits = {name: predict(student, run.data.test) for name, student in students.items()}
    of_mean = student_logits["student, mean probabilities"]
    of_one = student_logits["student of one teacher"]
    p_value = mcnemar(of_mean, of_one, run.data.test.label)
    for name, student in students.items():
        row = run.add_row(name, student, student_logits[name], teacher_logits=ensemble_logits)
        if name == "student, mean probabilities":
            row["mcnemar_p"] = p_value


def draw(run, teachers):
    """The gains of students, teachers and their ensembles over the baseline."""
    names = list(dict.fromkeys(row["name"] for row in run.rows))
    of_all, of_one = "student, mean probabilities", "student of one teacher"
    title = plots.title_of_gain(
        f"Students of {teachers} teachers", "students of one",
        run.accuracies(of_all), run.accuracies(of_one),
    )  # fmt: skip
    colours = {name: plots.COLOURS["teacher"] for name in names if name.startswith("ensemble")}
    gains = plots.subtract_baseline({name: run.accuracies(name) for name in names})
    return plots.draw_gains(gains, title, colours=colours)


def summarize_ensembles(run, config, inference_seconds):
    """The lines of the summary, {what: found}."""
    members = [run.accuracies(f"teacher {k + 1}") for k in range(config.teachers)]
    best_member = np.max(members, axis=0)  # of each repetition
    over_best = np.mean(run.accuracies("ensemble, probabilities") - best_member)
    disagreement = np.mean(run.values("ensemble, probabilities", "disagreement"))
    over_one = run.compare("student, mean probabilities", "student of one teacher")
    if config.seeds == 1:  # what chance could have done, on these test images
        p_value = run.values("student, mean probabilities", "mcnemar_p")[0]
        over_one = f"{over_one}, McNemar's p = {p_value:.1g}"
    times = [f"{name} {1000 * seconds:.0f} ms" for name, seconds in inference_seconds.items()]
    return {
        "Two teachers differ on": f"{100 * disagreement:.2f} % of the images",
        "Ensemble − best teacher, in hindsight": f"{over_best:+.2f} points",
        "Student of one teacher − baseline": run.compare("student of one teacher", "baseline"),
        "Mean probabilities − one teacher": over_one,
        "Mean logits − mean probabilities": run.compare(
            "student, mean logits", "student, mean probabilities"
        ),
        "Random teacher − mean probabilities": run.compare(
            "student, random teacher", "student, mean probabilities"
        ),
        "Inference, 1,000 images": ", ".join(times),
    }


# %% Main
# In each repetition the teachers are trained first, then the students. With several repetitions the
# seconds of inference are those of the last.


def main(config):
    run = experiment.start(config)
    data = run.data
    config = fill_in_defaults(config, data)
    run.config = config
    check_teacher_labels(config, data)
    repetitions = []
    for number, seed in enumerate(run.seeds(config.seeds)):
        repetitions.append(plan_repetition(config, data, number, seed))

    for repetition in repetitions:
        teachers = train_teachers(repetition, data, run)
        tables = [predict_by_index(teacher, repetition.labelled) for teacher in teachers]
        # [N, K, C]: the image first, so that `batches` can look rows up by the images' index
        teacher_logits = np.stack(tables, axis=1)
        students = train_five_students(repetition, teacher_logits, data, config, run)

        test_logits = np.stack([predict(teacher, data.test) for teacher in teachers])  # [K, N, C]
        ensemble_logits = add_teacher_rows(repetition, teachers, test_logits, run)
        add_student_rows(students, ensemble_logits, run)

    networks = {
        "student": [students["student, mean probabilities"]],
        "teacher": teachers[:1],
        "ensemble": teachers,
    }
    images = 250 if config.quick else 1000
    inference_seconds = measure_inference_seconds(networks, data.test, images)
    figure = draw(run, config.teachers)
    summary = summarize_ensembles(run, config, inference_seconds)
    return run.finish(figure, summary, inference_seconds=inference_seconds)


if __name__ == "__main__":
    experiment.run_script(main, Config)
