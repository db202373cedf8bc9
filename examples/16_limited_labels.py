# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "numpy>=2.2,<3", "tqdm>=4.66,<5", "tyro>=1.0.8,<2", "typeguard>=4,<5", "filelock>=3.20,<5",
#   "matplotlib>=3.9,<4", "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""Limited labels: how much a teacher is worth, from 100 labelled images to all of them.

The teacher has learned from all labels. The students are short of them. For each number of labels
there are three: a baseline that learns from the labels alone, a distilled one that learns from the
teacher's soft targets too, and one that gets soft targets for images without labels as well, where
there are enough of those. Each is trained with several seeds. Baseline and distilled student have a
recipe of their own, that of the nearest number of labels for which one was searched, with equally
many trials; the third takes the distilled one's. They are compared by accuracy, by likeness to the
teacher and by calibration: is a student as sure as it is right?

    python examples/16_limited_labels.py                    # 3 seeds: 10 to 20 minutes
    python examples/16_limited_labels.py --labels 500 all   # these numbers of labels alone
    python examples/16_limited_labels.py --quick            # a first look: about a minute
    python examples/16_limited_labels.py --dataset fashion_mnist            # 15 to 35 minutes

Times are for 2 CPU cores, fast or slow.
Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531,
section 6. Stanton et al.: Does Knowledge Distillation Really Work?, 2021, arXiv:2106.05945. Guo et
al.: On Calibration of Modern Neural Networks, 2017, arXiv:1706.04599.
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
from utils import (
    batches,
    check_batch_size,
    evaluate,
    predict,
    predict_by_index,
    require,
    take_labels,
)


@dataclasses.dataclass(frozen=True)
class Config(experiment.CommonFlags):
    output_dir: str = "runs/16_limited_labels"
    """Folder for results, figure, weights and checkpoints."""
    seed: Seed = 42
    """First seed of the students: labelled images, initial weights, order of batches."""
    seeds: Annotated[int | None, Range(2, 100), OPEN] = None
    """Number of seeds, one after another, for each number of labels (default: 3; quick 2)."""
    labels: Annotated[tuple[int | Literal["all"], ...] | None, Range(10), OPEN] = None
    """Numbers of labelled images (default: 100 250 1000 5000 all; fashion_mnist 1000 10000 all;
    digits 50 100 300 all; quick 100 500)."""
    epochs: Annotated[int | None, Range(0, 10_000), OPEN] = None
    """Epochs of each student (default: by the number of labels; digits 120; quick 40)."""
    batch_size: Annotated[int | None, Range(1), OPEN] = None
    """Students' images in a batch (default: 128, digits and quick 32, or all there are)."""
    learning_rate: Annotated[float | None, Range(0, low_excluded=True), OPEN] = None
    """Students' peak learning rate (default: by the number of labels; digits and quick 1e-2; 1e-3
    with a constant schedule)."""
    schedule: Literal["onecycle", "constant"] = "onecycle"
    """Course of the students' learning rate: rising and falling in one cycle, or constant."""
    temperature: Annotated[float | None, Range(0.001, 10_000), OPEN] = None
    """Temperature T that softens the distributions of teacher and student (default: 3;
    fashion_mnist 4 with up to 10,000 labels, 2 with more)."""
    alpha: Annotated[float, Range(0, 1)] = 0.5
    """Weight of the labels in the loss; the teacher has 1 - alpha."""
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


# %% Loss
# `distillation_loss` is that of script 15: every image has a label and soft targets. In
# `transfer_loss` the first images alone have a label, and all have soft targets.


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


def transfer_loss(student_logits, teacher_logits, labels, temperature=3.0, alpha=0.5):
    """The loss where labels [L] are known of the first L images alone, from logits [B, C]: (total,
    hard, soft). With L = B it is `distillation_loss`.

    Raises ValueError where the shapes do not fit.
    """
    # hard = cross-entropy at T = 1, mean over the L labelled images
    hard = hard_loss(student_logits[: len(labels)], labels)
    # soft = T² · KL(p_teacher ‖ p_student), mean over all B images
    soft = soft_loss(student_logits, teacher_logits, temperature)
    # total = α · hard + (1 − α) · soft
    return alpha * hard + (1 - alpha) * soft, hard, soft


# %% Steps
# One for each kind of student. The baseline, and the teacher, learn by `train_step`, the distilled
# student by `train_student_step`, the transfer student by `train_transfer_step`.


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
def train_transfer_step(student, optimizer, labelled, unlabelled, temperature=3.0, alpha=0.5):
    """One step on a labelled and an unlabelled batch, both with "teacher_logits" [B, C]. Labels of
    the unlabelled batch are not looked at.

    Returns the scalars loss, hard_loss and soft_loss.
    """
    image = jnp.concatenate([labelled["image"], unlabelled["image"]])
    teacher_logits = jnp.concatenate([labelled["teacher_logits"], unlabelled["teacher_logits"]])

    def loss_fn(student):
        logits = student(image, train=True)
        losses = transfer_loss(logits, teacher_logits, labelled["label"], temperature, alpha)
        return losses[0], losses

    (_, (loss, hard, soft)), grads = nnx.value_and_grad(loss_fn, has_aux=True)(student)
    optimizer.update(student, grads)
    return {"loss": loss, "hard_loss": hard, "soft_loss": soft}


# %% Training
# One function for the teacher and one for each kind of student, with its loop in full. To save
# time, students are scored once, at the end. A teacher never changes, so its logits for the
# training images are computed once, and looked up by the images' index: `teacher_logits` [N, C].


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


def name_of(kind, labels):
    """The name of a student, in the results and of its files."""
    return f"{kind}, {labels} labels"


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


def train_on_labels_and_soft_targets(
    labelled, teacher_logits, recipe, run, temperature=3.0, alpha=0.5
):
    """Trains the distilled student: the baseline's images with their labels and soft targets."""
    student = StudentCNN(teacher_logits.shape[-1], rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(student, recipe, len(labelled.label))
    step = compile_step(train_student_step, student, None, optimizer)  # no teacher: its logits

    name = name_of("distilled", len(labelled.label))
    training = Training(run, name, student, optimizer, recipe, labelled)
    for epoch in training.epochs():
        labelled_batches = batches(
            labelled, recipe.batch_size, recipe.seed, epoch, teacher_logits=teacher_logits
        )
        for batch in labelled_batches:
            training.log(step(batch, temperature, alpha))
    return student


def train_on_transfer_set(
    labelled, unlabelled, teacher_logits, recipe, run, temperature=3.0, alpha=0.5
):
    """Trains the transfer student: a step sees as many labelled images as unlabelled ones, all with
    soft targets. The recipe's batch size is that of either half."""
    student = StudentCNN(teacher_logits.shape[-1], rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(student, recipe, len(labelled.label))
    step = compile_step(train_transfer_step, student, optimizer)

    name = name_of("transfer", len(labelled.label))
    training = Training(run, name, student, optimizer, recipe, labelled)
    for epoch in training.epochs():
        labelled_batches = batches(
            labelled, recipe.batch_size, recipe.seed, epoch, teacher_logits=teacher_logits
        )
        unlabelled_batches = batches(
            unlabelled, recipe.batch_size, recipe.seed, epoch, teacher_logits=teacher_logits
        )
        # An epoch ends with the labelled images. Of the others each epoch sees some.
        pairs = zip(labelled_batches, unlabelled_batches, strict=False)
        for labelled_batch, unlabelled_batch in pairs:
            training.log(step(labelled_batch, unlabelled_batch, temperature, alpha))
    return student


# %% Settings
# What a flag leaves open is chosen here. Learning rates and epochs were searched on validation
# images, for these numbers of labels, with equally many trials for baseline and distilled student.

# {labels: {student: (peak learning rate, epochs)}}, for all data but Fashion-MNIST, and for that.
# 50,000 images are what the validation images of the search left. A transfer student follows the
# distilled one.
RECIPES = {
    100: {"baseline": (8e-2, 548), "distilled": (3e-2, 548)},
    250: {"baseline": (8e-2, 300), "distilled": (8e-2, 300)},
    1_000: {"baseline": (3e-2, 120), "distilled": (8e-2, 120)},
    5_000: {"baseline": (1e-2, 21), "distilled": (3e-2, 21)},
    50_000: {"baseline": (2e-2, 4), "distilled": (4e-2, 6)},
}
FASHION_RECIPES = {
    1_000: {"baseline": (1e-2, 15), "distilled": (4e-2, 240)},
    10_000: {"baseline": (2e-2, 7), "distilled": (4e-2, 20)},
    50_000: {"baseline": (1e-2, 8), "distilled": (1e-2, 16)},
}


def fill_in_defaults(config, data):
    """The config with the numbers of labels and of seeds, where they were left open."""
    numbers = (100, 250, 1000, 5000, "all")
    if data.name == "fashion_mnist":
        numbers = (1000, 10_000, "all")
    if data.name == "digits":
        numbers = (50, 100, 300, "all")
    if config.quick:  # fewer epochs than in script 15, since there are many students
        numbers = (100, 500)
        config = experiment.with_defaults(config, epochs=40)
    images = len(data.train.label)
    possible = tuple(n for n in numbers if n == "all" or n < images)
    return experiment.with_defaults(config, labels=possible, seeds=2 if config.quick else 3)


def count_labels(config, data):
    """The numbers of labels, from few to many, with "all" as a number.

    Raises UserError where there are not so many images.
    """
    counts = []
    for number in config.labels:
        labelled = take_labels(data.train, number, config.seed)
        counts.append(len(labelled.label))
    require(len(set(counts)) == len(counts), "--labels: must not repeat a number")
    return sorted(counts)


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


def limited_recipe(config, data, kind, seed, labels):
    """How a student is trained: as the flags say, or else as the nearest of the searched recipes,
    its epochs scaled by a power law (MNIST's). With few images, rate and batch size are script
    15's."""
    recipes = FASHION_RECIPES if data.name == "fashion_mnist" else RECIPES
    nearest = min(recipes, key=lambda count: abs(np.log(count / labels)))
    searched = "baseline" if kind == "baseline" else "distilled"
    rate, epochs = recipes[nearest][searched]
    epochs = round(epochs * (nearest / labels) ** 0.66)
    batch_size = 128
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
    recipe = Recipe(seed, epochs, batch_size, rate, config.schedule)
    if kind == "transfer":
        recipe = halve_batches(recipe, labels)
    return recipe


def choose_temperature(config, data, labels):
    """The temperature for so many labels: as the flag says, or else as was searched."""
    if config.temperature is not None:
        return config.temperature
    if data.name == "fashion_mnist":
        return 4.0 if labels <= 10_000 else 2.0
    return 3.0


def halve_batches(recipe, labels):
    """The recipe with half of a batch labelled, for about as many steps: an epoch of half batches
    has about twice as many, so there are half as many epochs."""
    size = recipe.batch_size
    require(size > 1, f"--batch-size {size}: must be 2 or more, half of them labelled")
    steps_before = labels // size  # in an epoch
    steps_after = labels // (size // 2)
    epochs = round(recipe.epochs * steps_before / steps_after)
    if recipe.epochs > 0:
        epochs = max(1, epochs)
    return recipe._replace(epochs=epochs, batch_size=size // 2)


def make_plan(config, data, run):
    """Who is to be trained on what: for each number of labels and each seed the labelled images,
    and the recipes of their students by kind."""
    plan = []
    for count in count_labels(config, data):
        kinds = ["baseline", "distilled"]
        if count <= len(data.train.label) // 2:  # else there are too few images without a label
            kinds.append("transfer")
        for seed in run.seeds(config.seeds):
            labelled = take_labels(data.train, count, seed)
            recipes = {kind: limited_recipe(config, data, kind, seed, count) for kind in kinds}
            plan.append((labelled, recipes))
    return plan


# %% Figure
# The errors of each kind of student over the number of labels, and the teacher's.

KIND_COLOURS = {
    "baseline": plots.COLOURS["baseline"],
    "distilled": plots.COLOURS["distilled"],
    "transfer": "tab:green",
}


def draw(run, counts):
    """Draws the figure of a run with these numbers of labels: a point for each seed, a line through
    the means, and a dashed line for the teacher."""
    figure = Figure(figsize=(plots.WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    for kind, colour in KIND_COLOURS.items():
        known = [count for count in counts if run.accuracies(name_of(kind, count))]
        means = []
        for count in known:
            errors = plots.to_errors(run.accuracies(name_of(kind, count)), run.data)
            axes.plot([count] * len(errors), errors, "o", color=colour, alpha=0.5)
            means.append(errors.mean())
        if known:
            axes.plot(known, means, color=colour, label=kind)
    [teacher_errors] = plots.to_errors(run.accuracies("teacher"), run.data)
    axes.axhline(teacher_errors, color=plots.COLOURS["teacher"], linestyle="--", label="teacher")

    axes.set(xlabel="labels", ylabel=f"{run.data.scored_on} errors, %", xscale="log", yscale="log")
    axes.set_xticks(counts, labels=[f"{count:,}" for count in counts])
    axes.minorticks_off()
    plots.write_out_numbers(axes.yaxis)
    axes.set_title(say_where_distillation_pays(run, counts))
    axes.legend()
    return figure


def say_where_distillation_pays(run, counts):
    """The figure's message: what distillation gains with the fewest labels and with the most."""
    gains = []
    for count in dict.fromkeys((min(counts), max(counts))):
        distilled = run.accuracies(name_of("distilled", count))
        baseline = run.accuracies(name_of("baseline", count))
        difference = plots.find_difference(distilled, baseline)
        gain = "no difference found"
        if difference is not None:
            gain = plots.signed_points(difference)
        gains.append(f"{gain} with {count:,} labels")
    seed = " (one seed)" if len(distilled) == 1 else ""
    return f"Distillation: {', '.join(gains)}{seed}"


# %% Main
# One teacher, trained on all labels. Then, for each number of labels and each seed, students that
# share labelled images and initial weights. Where recipes were searched, each kind has the one that
# suits it: best against best.


def train_all_kinds(labelled, recipes, teacher_logits, data, run, temperature, alpha):
    """Trains the two or three students of one number of labels and one seed, of the kinds that have
    a recipe. Returns {kind: student}."""
    labels = f"{len(labelled.label):,} labels"
    seed = recipes["baseline"].seed
    students = {}

    experiment.print_heading(f"BASELINE: {labels}, seed {seed}, no teacher")
    name = name_of("baseline", len(labelled.label))
    students["baseline"] = train_student_on_labels(
        name, labelled, data.classes, recipes["baseline"], run
    )

    experiment.print_heading(f"DISTILLED: {labels}, seed {seed}, and their soft targets")
    students["distilled"] = train_on_labels_and_soft_targets(
        labelled, teacher_logits, recipes["distilled"], run, temperature, alpha
    )

    if "transfer" in recipes:
        experiment.print_heading(
            f"TRANSFER: {labels}, seed {seed}, soft targets of these and others"
        )
        unlabelled = data.train.take(~np.isin(data.train.index, labelled.index))
        students["transfer"] = train_on_transfer_set(
            labelled, unlabelled, teacher_logits, recipes["transfer"], run,
            temperature, alpha,
        )  # fmt: skip
    return students


def main(config):
    run = experiment.start(config)
    data = run.data
    config = fill_in_defaults(config, data)
    run.config = config
    for_teacher = default_teacher_recipe(config, data)
    plan = make_plan(config, data, run)

    experiment.print_heading(f"TEACHER: all {len(data.train.label):,} labels")
    if config.teacher:
        fresh_teacher = TeacherCNN(data.classes, rngs=nnx.Rngs(0))
        teacher = run.take_teacher(fresh_teacher, data.train)
    else:
        teacher = train_teacher(data, for_teacher, run)
    teacher_answers = predict(teacher, data.test)
    run.add_row("teacher", teacher, teacher_answers, teacher_logits=teacher_answers)

    # All students have this teacher. What it says of the training images is computed once.
    teacher_logits = predict_by_index(teacher, data.train)
    for labelled, recipes in plan:
        temperature = choose_temperature(config, data, len(labelled.label))
        students = train_all_kinds(
            labelled, recipes, teacher_logits, data, run, temperature, config.alpha
        )
        for kind, student in students.items():
            name = name_of(kind, len(labelled.label))
            logits = predict(student, data.test)
            run.add_row(name, student, logits, teacher_logits=teacher_answers)

    counts = count_labels(config, data)
    gains = {}
    for count in counts:
        baseline = name_of("baseline", count)
        for kind in ("distilled", "transfer"):
            name = name_of(kind, count)
            if run.accuracies(name):
                gains[f"{kind} − baseline, {count:,} labels"] = run.compare(name, baseline)
    return run.finish(draw(run, counts), gains)


if __name__ == "__main__":
    experiment.run_script(main, Config)
