# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "numpy>=2.2,<3", "tqdm>=4.66,<5", "tyro>=1.0.8,<2", "typeguard>=4,<5", "filelock>=3.20,<5",
#   "matplotlib>=3.9,<4", "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""A patient and consistent teacher: which image does it answer, and for how long?

A student sees its images shifted at random, each time another view. Its teacher is asked in three
ways: about the plain image, whatever the student sees; about a view drawn for the teacher alone; or
about the student's own view. Each way is tried at several lengths of training, beside a baseline
that sees the same views and has no teacher. The teacher is trained on all labels of Fashion-MNIST,
the students on 1,000.

    python examples/26_patient_teacher.py                   # one seed: 10 to 30 minutes
    python examples/26_patient_teacher.py --epochs 30 120   # these lengths alone
    python examples/26_patient_teacher.py --ways same mixup # mixed images, too
    python examples/26_patient_teacher.py --quick           # a first look: about a minute

Times are for 2 CPU cores, fast or slow; most is the teacher. Without Fashion-MNIST and the
internet, the data are scikit-learn's digits.
Beyer et al.: Knowledge Distillation: A Good Teacher Is Patient and Consistent, 2022,
arXiv:2106.05237. Zhang et al.: mixup, 2018, arXiv:1710.09412.
"""

import dataclasses
import functools
from typing import Annotated, Literal

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
from utils import batches, check_batch_size, evaluate, predict, require, take_labels


@dataclasses.dataclass(frozen=True)
class Config(experiment.CommonFlags):
    output_dir: str = "runs/26_patient_teacher"
    """Folder for results, figure, weights and checkpoints."""
    dataset: Literal["mnist", "fashion_mnist", "kmnist", "digits"] = "fashion_mnist"
    """The dataset. The digits are embedded in scikit-learn and work offline."""
    seed: Seed = 42
    """First seed of the students: labelled images, initial weights, order of batches, views."""
    seeds: Annotated[int, Range(1, 100)] = 1
    """Number of seeds, one after another."""
    ways: tuple[Literal["plain", "other", "same", "mixup"], ...] = ("plain", "other", "same")
    """What the teacher is asked about: the plain image, a view drawn for the teacher alone, the
    student's view, or mixed images, which bring a baseline of their own."""
    labels: Annotated[int | Literal["all"] | None, Range(10), OPEN] = None
    """Labelled images of the students, or all (default: 1000; digits and quick 100)."""
    epochs: Annotated[tuple[int, ...] | None, Range(1, 10_000), OPEN] = None
    """Lengths of training to compare (default: 30 60 120 240; quick 30 120)."""
    batch_size: Annotated[int | None, Range(1), OPEN] = None
    """Students' images in a batch (default: 128, digits and quick 32, or all there are)."""
    learning_rate: Annotated[float | None, Range(0, low_excluded=True), OPEN] = None
    """Students' peak learning rate, that of all (default: by student; digits and quick 1e-2)."""
    temperature: Annotated[float, Range(0.001, 10_000)] = 4.0
    """Temperature T that softens the distributions of teacher and student."""
    alpha: Annotated[float, Range(0, 1)] = 0.5
    """Weight of the labels in the loss; the teacher has 1 - alpha."""
    mixup: Annotated[float, Range(0, 1000, low_excluded=True)] = 1.0
    """Of mixed images: the share of the first comes from the distribution Beta(mixup, mixup), which
    at 1 is even, and nearer to 0 or 1 below."""
    teacher: Annotated[str | None, OPEN] = None
    """Output folder of a run whose teacher to take: of several, the one with --teacher-seed
    (default: train one)."""
    teacher_seed: Seed = 0
    """Seed of the teacher: initial weights, dropout, order of batches."""


# %% Models
# Teacher and student of script 15.


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


# %% Views
# A view of an image is the image, shifted by up to two pixels each way. That makes 25 views, so few
# that the teacher can be asked about all of them beforehand.

SHIFTS = 5  # up and down, and left and right: by −2, −1, 0, 1 or 2 pixels
VIEWS = SHIFTS * SHIFTS
PLAIN = VIEWS // 2  # the view that is not shifted


def show_views(images, views):
    """Images [B, H, W, C], each in the view [B] that is asked for, from 0 to 24: shifted by
    view // 5 − 2 rows and view % 5 − 2 columns, where background, 0, comes in."""
    _, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    shifted = np.empty_like(images)
    for i, view in enumerate(views):
        row, column = divmod(int(view), SHIFTS)
        # What begins further up in the padded image stands further down in the view.
        top = SHIFTS - 1 - row
        left = SHIFTS - 1 - column
        shifted[i] = padded[i, top : top + height, left : left + width]
    return shifted


def tabulate_view_logits(teacher, split):
    """The teacher's logits for every view of every image of a split: [N, 25, C]."""
    batch_size = min(256, len(split.label))
    logits_of_views = []
    for view in range(VIEWS):
        views = np.full(len(split.label), view)
        shifted = split._replace(image=show_views(split.image, views))
        logits_of_views.append(predict(teacher, shifted, batch_size))
    return np.stack(logits_of_views, axis=1)


def choose_views(way, student_views, other_views):
    """The views [B] about which the teacher is asked. The student's are `student_views` [B], and
    `other_views` [B] are drawn independently."""
    if way == "plain":  # the image as it is on disk, whatever the student sees
        return np.full_like(student_views, PLAIN)
    if way == "other":  # drawn for the teacher alone
        return other_views
    if way == "same":
        return student_views
    raise ValueError(f"way {way!r}: is not known")


def batches_of_views(labelled, batch_size, seed, epoch, way=None, view_logits=None):
    """One epoch's batches as `batches` has them, each image in a random view. All students of a
    seed see the same views.

    With a way to ask the teacher, its logits come along: teacher_logits [B, C], from the table
    `view_logits` [N, 25, C], where an image's index is its row.
    """
    rng = np.random.default_rng([seed, 4, epoch])
    for batch in batches(labelled, batch_size, seed, epoch):
        student_views = rng.integers(VIEWS, size=batch_size)
        other_views = rng.integers(VIEWS, size=batch_size)
        batch["image"] = show_views(batch["image"], student_views)
        if way is not None:
            teacher_views = choose_views(way, student_views, other_views)
            batch["teacher_logits"] = view_logits[batch["index"], teacher_views]
        yield batch


def batches_of_mixed_views(labelled, batch_size, seed, epoch, mixup):
    """The batches of `batches_of_views`, in which each image is mixed with another of the batch
    (Zhang et al., 2018). The other's label comes along, partner_label [B], and the share of the
    first image, a scalar of the batch from the distribution Beta(mixup, mixup)."""
    rng = np.random.default_rng([seed, 5, epoch])
    for batch in batches_of_views(labelled, batch_size, seed, epoch):
        share = np.float32(rng.beta(mixup, mixup))
        partners = rng.permutation(batch_size)
        # x = λ · x_i + (1 − λ) · x_j
        batch["image"] = share * batch["image"] + (1 - share) * batch["image"][partners]
        batch["partner_label"] = batch["label"][partners]
        batch["share"] = share
        yield batch


# %% Loss
# `distillation_loss` is that of script 15.


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


def mixed_hard_loss(logits, labels, partner_labels, share):
    """Cross-entropy of logits [B, C] for mixed images, with the labels [B] of both and the share of
    the first, a scalar. Raises ValueError where the shapes do not fit."""
    # hard = λ · hard(label) + (1 − λ) · hard(partner's label)
    return share * hard_loss(logits, labels) + (1 - share) * hard_loss(logits, partner_labels)


# %% Steps
# The baseline, and the teacher, learn by `train_step`, those with a teacher by
# `train_student_step`: its logits come with the batch. Of mixed images there is no table, since no
# mix comes twice. There the teacher is asked in the step, about what the student sees.


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
def train_mixed_step(student, teacher, optimizer, batch, temperature=3.0, alpha=0.5):
    """One step on mixed images. Without a teacher (None) the labels alone are learned from.

    Returns the scalars loss, hard_loss and soft_loss.
    """
    teacher_logits = None
    if teacher is not None:
        # Outside of `loss_fn`, in inference mode: the teacher is frozen.
        teacher_logits = jax.lax.stop_gradient(teacher(batch["image"], train=False))

    def loss_fn(student):
        logits = student(batch["image"], train=True)
        hard = mixed_hard_loss(logits, batch["label"], batch["partner_label"], batch["share"])
        if teacher_logits is None:
            return hard, (hard, hard, jnp.zeros_like(hard))
        soft = soft_loss(logits, teacher_logits, temperature)
        # total = α · hard + (1 − α) · soft
        total = alpha * hard + (1 - alpha) * soft
        return total, (total, hard, soft)

    grads, (loss, hard, soft) = nnx.grad(loss_fn, has_aux=True)(student)
    optimizer.update(student, grads)
    return {"loss": loss, "hard_loss": hard, "soft_loss": soft}


# %% Training
# All students of one seed and one length start from the same weights and see the same views.


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


def name_of_length(student, epochs):
    """The name of a student, in the results and of its files."""
    return f"{student}, {epochs} epochs"


def train_baseline_on_views(labelled, classes, recipe, run):
    """Trains a student on the labels of random views, without a teacher."""
    student = StudentCNN(classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(student, recipe, len(labelled.label))
    step = compile_step(train_step, student, optimizer)

    name = name_of_length("baseline", recipe.epochs)
    training = Training(run, name, student, optimizer, recipe, labelled)
    for epoch in training.epochs():
        for batch in batches_of_views(labelled, recipe.batch_size, recipe.seed, epoch):
            training.log(step(batch))
    return student


def train_student_on_views(
    student_name, way, labelled, view_logits, recipe, run, temperature=3.0, alpha=0.5
):
    """Trains a student on labels and soft targets of random views.

    Args:
      way: which view the teacher is asked about: "plain", "other" or "same".
      labelled: the images; an image's index is its row in the table.
      view_logits: the teacher's logits for all views, [N, 25, C].
    """
    student = StudentCNN(view_logits.shape[-1], rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(student, recipe, len(labelled.label))
    step = compile_step(train_student_step, student, None, optimizer)  # no teacher: its logits

    name = name_of_length(student_name, recipe.epochs)
    training = Training(run, name, student, optimizer, recipe, labelled)
    for epoch in training.epochs():
        views = batches_of_views(labelled, recipe.batch_size, recipe.seed, epoch, way, view_logits)
        for batch in views:
            training.log(step(batch, temperature, alpha))
    return student


def train_student_on_mixed_views(
    student_name, teacher, labelled, classes, recipe, run, mixup, temperature=3.0, alpha=0.5
):
    """Trains a student on mixed views, without a teacher (None) on their labels alone."""
    student = StudentCNN(classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(student, recipe, len(labelled.label))
    step = compile_step(train_mixed_step, student, teacher, optimizer)

    name = name_of_length(student_name, recipe.epochs)
    training = Training(run, name, student, optimizer, recipe, labelled)
    for epoch in training.epochs():
        mixed_views = batches_of_mixed_views(labelled, recipe.batch_size, recipe.seed, epoch, mixup)
        for batch in mixed_views:
            training.log(step(batch, temperature, alpha))
    return student


# %% Settings
# What a flag leaves open is chosen here. Rates, temperature and alpha were searched on validation
# images (docs/provenance.md).

# Peak learning rates of baselines, and of students with a teacher.
BASELINE_RATE = 1e-2
DISTILLED_RATE = 4e-2


def fill_in_defaults(config, data):
    """The config with the labels and the lengths, where they were left open."""
    labels = 1000
    lengths = (30, 60, 120, 240)
    if data.name == "digits":
        labels = 100
    if config.quick:
        labels = 100
        lengths = (30, 120)
    return experiment.with_defaults(config, labels=labels, epochs=lengths)


def default_teacher_recipe(config, data):
    """How the teacher is trained, whatever the students' flags say."""
    epochs = 3
    rate = 5e-3
    augmentation = "none"
    if data.name == "fashion_mnist" and not config.quick:
        epochs = 20
        rate = 2e-3
        augmentation = "shift"
    if data.name == "digits":
        epochs = 8
    if config.quick:
        epochs = 4
    images = len(data.train.label)
    batch_size = 32 if images < 10_000 else 128
    too_few = f"{data.name}: {images} training images; a teacher needs {batch_size}"
    require(images >= batch_size, too_few)
    return Recipe(config.teacher_seed, epochs, batch_size, rate, "onecycle", augmentation)


def views_teacher_recipe(config, data):
    """How the teacher is trained: on the views about which it will be asked. On Fashion-MNIST for
    10 epochs, which teaches few labels as well as 20 do (docs/provenance.md)."""
    recipe = default_teacher_recipe(config, data)
    epochs = recipe.epochs
    if data.name == "fashion_mnist" and not config.quick:
        epochs = 10
    return recipe._replace(epochs=epochs, augmentation="shift")


def views_recipe(config, data, has_teacher, seed, labels, epochs):
    """How a student is trained on so many labels: as the flags say, or else as was searched."""
    rate = DISTILLED_RATE if has_teacher else BASELINE_RATE
    batch_size = 128
    if len(data.train.label) < 10_000:  # the digits, or --quick
        rate = 1e-2
        batch_size = 32
    if config.learning_rate is not None:
        rate = config.learning_rate
    batch_size = min(batch_size, labels)
    if config.batch_size is not None:
        batch_size = config.batch_size
    check_batch_size("--batch-size", batch_size, labels)
    return Recipe(seed, epochs, batch_size, rate, "onecycle")


# %% The students of one seed and one length

# What rows and figure call the ways to ask the teacher.
WAY_NAMES = {"plain": "plain image", "other": "other view", "same": "same view", "mixup": "mixup"}


def train_students_of_all_ways(teacher, view_logits, labelled, classes, recipes, config, run):
    """Trains the baseline and a student for each way to ask the teacher, with the recipes
    {"baseline", "distilled"}. Returns them by name."""
    seed = recipes["baseline"].seed
    epochs = recipes["baseline"].epochs
    about = f"{epochs} epochs, seed {seed}"
    students = {}

    experiment.print_heading(f"BASELINE: {about}, no teacher")
    students["baseline"] = train_baseline_on_views(labelled, classes, recipes["baseline"], run)

    for way in config.ways:
        name = WAY_NAMES[way]
        if way == "mixup":
            continue
        experiment.print_heading(f"{name.upper()}: {about}, teacher asked about it")
        students[name] = train_student_on_views(
            name, way, labelled, view_logits, recipes["distilled"], run,
            config.temperature, config.alpha,
        )  # fmt: skip

    if "mixup" in config.ways:
        experiment.print_heading(f"BASELINE WITH MIXUP: {about}, no teacher")
        students["baseline with mixup"] = train_student_on_mixed_views(
            "baseline with mixup", None, labelled, classes, recipes["baseline"], run, config.mixup
        )
        experiment.print_heading(f"MIXUP: {about}, teacher asked about the same mix")
        students["mixup"] = train_student_on_mixed_views(
            "mixup", teacher, labelled, classes, recipes["distilled"], run, config.mixup,
            config.temperature, config.alpha,
        )  # fmt: skip
    return students


# %% Figure
# The errors of each student over the length of its training, and the teacher's.

STUDENT_COLOURS = {
    "baseline": plots.COLOURS["baseline"],
    "plain image": "tab:red",
    "other view": "tab:green",
    "same view": plots.COLOURS["distilled"],
    "baseline with mixup": "tab:olive",
    "mixup": "tab:purple",
}


def draw(run, students, lengths):
    """Draws the figure of a run: a point for each seed, a line through the means, and a dashed line
    for the teacher."""
    figure = Figure(figsize=(plots.WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    for student in students:
        colour = STUDENT_COLOURS[student]
        means = []
        for epochs in lengths:
            accuracies = run.accuracies(name_of_length(student, epochs))
            errors = plots.to_errors(accuracies, run.data)
            axes.plot([epochs] * len(errors), errors, "o", color=colour, alpha=0.5)
            means.append(errors.mean())
        axes.plot(lengths, means, color=colour, label=student)
    [teacher_errors] = plots.to_errors(run.accuracies("teacher"), run.data)
    axes.axhline(teacher_errors, color=plots.COLOURS["teacher"], linestyle="--", label="teacher")

    axes.set(xlabel="epochs", ylabel=f"{run.data.scored_on} errors, %", xscale="log", yscale="log")
    axes.set_xticks(lengths, labels=[f"{epochs:,}" for epochs in lengths])
    axes.minorticks_off()
    plots.write_out_numbers(axes.yaxis)
    axes.set_title(say_what_patience_gains(run, students, lengths))
    axes.legend()
    return figure


def say_what_patience_gains(run, students, lengths):
    """The figure's message: the gain of the last way over the baseline, at the shortest and the
    longest training."""
    student = "same view" if "same view" in students else students[-1]
    baseline = "baseline with mixup" if student == "mixup" else "baseline"
    gains = []
    for epochs in dict.fromkeys((min(lengths), max(lengths))):
        accuracies = run.accuracies(name_of_length(student, epochs))
        baseline_accuracies = run.accuracies(name_of_length(baseline, epochs))
        difference = plots.find_difference(accuracies, baseline_accuracies)
        gain = "no difference found"
        if difference is not None:
            gain = plots.signed_points(difference)
        gains.append(f"{gain} at {epochs:,} epochs")
    seed = " (one seed)" if len(accuracies) == 1 else ""
    return f"{student.capitalize()} over {baseline}: {', '.join(gains)}{seed}"


# %% Main
# One teacher, trained on all labels. Then, for each seed and each length, students that share
# labelled images, initial weights and views.


def summarise(run, students, lengths):
    """The summary's lines: each way's gain over its baseline, and the same view's over the other
    ways."""
    lines = {}
    for student in students:
        if student.startswith("baseline"):
            continue
        baseline = "baseline with mixup" if student == "mixup" else "baseline"
        for epochs in lengths:
            name = name_of_length(student, epochs)
            line = f"{student} − {baseline}, {epochs:,} epochs"
            lines[line] = run.compare(name, name_of_length(baseline, epochs))
    for student in ("plain image", "other view"):
        for epochs in lengths:
            if {student, "same view"} <= set(students):
                same = name_of_length("same view", epochs)
                line = f"same view − {student}, {epochs:,} epochs"
                lines[line] = run.compare(same, name_of_length(student, epochs))
    return lines


def main(config):
    run = experiment.start(config)
    data = run.data
    config = fill_in_defaults(config, data)
    run.config = config
    lengths = sorted(config.epochs)
    teacher_recipe = views_teacher_recipe(config, data)
    students_to_train = []  # for each seed: labelled images, and the recipes of each length
    for seed in run.seeds(config.seeds):
        labelled = take_labels(data.train, config.labels, seed)
        labels = len(labelled.label)
        recipes_of_lengths = []
        for epochs in lengths:
            recipes = {
                "baseline": views_recipe(config, data, False, seed, labels, epochs),
                "distilled": views_recipe(config, data, True, seed, labels, epochs),
            }
            recipes_of_lengths.append(recipes)
        students_to_train.append((labelled, recipes_of_lengths))

    experiment.print_heading(f"TEACHER: all {len(data.train.label):,} labels")
    if config.teacher:
        fresh = TeacherCNN(data.classes, rngs=nnx.Rngs(0))
        teacher = run.take_teacher(fresh, data.train)
    else:
        teacher = train_teacher(data, teacher_recipe, run)
    teacher_logits = predict(teacher, data.test)
    run.add_row("teacher", teacher, teacher_logits, teacher_logits=teacher_logits)

    for labelled, recipes_of_lengths in students_to_train:
        view_logits = tabulate_view_logits(teacher, labelled)
        # The table has the labelled images alone, so an image's index becomes its row there.
        rows = np.arange(len(labelled.label), dtype=np.int32)
        labelled = labelled._replace(index=rows)
        for recipes in recipes_of_lengths:
            students = train_students_of_all_ways(
                teacher, view_logits, labelled, data.classes, recipes, config, run
            )
            for student_name, student in students.items():
                name = name_of_length(student_name, recipes["baseline"].epochs)
                logits = predict(student, data.test)
                run.add_row(name, student, logits, teacher_logits=teacher_logits)

    figure = draw(run, list(students), lengths)
    return run.finish(figure, summarise(run, list(students), lengths))


if __name__ == "__main__":
    experiment.run_script(main, Config)
