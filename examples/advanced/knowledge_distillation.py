# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "numpy>=2.2,<3", "tqdm>=4.66,<5", "tyro>=1.0.8,<2", "typeguard>=4,<5", "filelock>=3.20,<5",
#   "matplotlib>=3.9,<4", "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""Temperature and alpha, tuned: a whole grid of students, trained at once by one program.

There is a student for every pair of temperature and alpha, and for several seeds. One jitted step
trains all of them, over their stacked weights, and each ends as it would alone. Validation images
choose the pair; the test images then score it once, beside the default and the baseline.

    python examples/advanced/knowledge_distillation.py                           # 12 minutes
    python examples/advanced/knowledge_distillation.py --labels 250 1000 5000    # 40 minutes
    python examples/advanced/knowledge_distillation.py --quick                   # a first look

Times are for 2 CPU cores.
Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.
"""

import dataclasses
import functools
import itertools
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
from matplotlib.patches import Rectangle
from utils import (
    Split,
    batches,
    check_batch_size,
    count_params,
    evaluate,
    hold_out,
    predict,
    predict_by_index,
    take_labels,
)


@dataclasses.dataclass(frozen=True)
class Config(experiment.CommonFlags):
    output_dir: str = "runs/advanced_knowledge_distillation"
    """Folder for results, figure, weights and checkpoints."""
    temperatures: Annotated[tuple[float, ...] | None, Range(0.001, 10_000), OPEN] = None
    """Temperatures of the grid (default: 1 2 3 5 8 20; quick 1 3)."""
    alphas: Annotated[tuple[float, ...] | None, Range(0, 1), OPEN] = None
    """Alphas of the grid: weights of the labels in the loss (default: 0 0.1 0.5 0.9 1; quick 0.5
    1)."""
    labels: Annotated[tuple[int | Literal["all"], ...] | None, Range(10), OPEN] = None
    """Labelled images of a student, or all; several numbers for a grid each (default: 1000; digits
    and quick 100)."""
    seed: Seed = 1
    """First seed of the students: labelled images, initial weights, order of batches."""
    seeds: Annotated[int, Range(2, 100)] = 3
    """Number of seeds in the grid, one after another."""
    test_seeds: Annotated[int, Range(2, 100)] = 5
    """Number of the seeds after those, for the comparison on test images."""
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
    """Output folder of a run whose teacher to take: script 13 with --holdout, as many images as
    --validation, and without --quick; of several teachers, the one with --teacher-seed (default:
    train one)."""
    teacher_seed: Seed = 0
    """Seed of the teacher: initial weights, dropout, order of batches."""
    validation: Annotated[int | None, Range(1), OPEN] = None
    """Training images that are set aside to choose the pair (default: a sixth of them)."""


# %% Models
# The teacher is that of script 15. The students have the parameters of script 15's student, but
# compute the convolutions in another way: inside a loop, or stacked, `nnx.Conv` is slow on CPUs.


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


def convolve(layer, x):
    """`layer(x)` for a 3×3 "VALID" convolution of [B, H, W, C], as a product of patches."""
    h, w = x.shape[1] - 2, x.shape[2] - 2
    patches = jnp.concatenate([x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], -1)
    return patches @ layer.kernel.reshape(-1, layer.out_features) + layer.bias


class StackableStudent(nnx.Module):
    """StudentCNN of script 15: the same parameters and, to float rounding, the same logits."""

    def __init__(self, num_classes=10, *, rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), padding="VALID", rngs=rngs)
        self.bn1 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), padding="VALID", rngs=rngs)
        self.bn2 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.dense1 = nnx.Linear(32 * 5 * 5, 64, rngs=rngs)  # 28 → 26 → 13 → 11 → 5
        self.dense2 = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, x, train=False):
        x = self.bn1(convolve(self.conv1, x), use_running_average=not train)
        x = max_pool(nnx.relu(x))
        x = self.bn2(convolve(self.conv2, x), use_running_average=not train)
        x = max_pool(nnx.relu(x))
        x = x.reshape(x.shape[0], -1)
        return self.dense2(nnx.relu(self.dense1(x)))


# %% A stack of students
# Many students are one module, whose arrays have two more axes in front: [seeds, cells]. A cell is
# a pair of temperature and alpha. Students of one seed start with the same weights.


class Students(nnx.Module):
    """A stack [seeds, cells] of StackableStudent; those of one seed all have the same start."""

    def __init__(self, seeds, cells, num_classes=10):
        def make_student(key):
            return StackableStudent(num_classes, rngs=nnx.Rngs(key))

        make_cells = nnx.vmap(make_student, in_axes=None, axis_size=cells)
        make_stack = nnx.vmap(make_cells)
        keys = jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32))
        self.stack = make_stack(keys)

    def __call__(self, x, train=False):
        """Images [B, 28, 28, 1] to logits [seeds, cells, B, C]."""

        def answer(student, x):
            return student(x, train)

        answers_of_cells = nnx.vmap(answer, in_axes=(0, None))
        answers_of_seeds = nnx.vmap(answers_of_cells, in_axes=(0, None))
        return answers_of_seeds(self.stack, x)


def stacked_batches(splits, batch_size, seeds, epoch, **tables):
    """`batches` of several splits side by side, each shuffled by its own seed: dicts of arrays
    [splits, B, ...]."""
    epochs = []
    for split, seed in zip(splits, seeds, strict=True):
        epochs.append(batches(split, batch_size, seed, epoch, **tables))
    for side_by_side in zip(*epochs, strict=True):
        yield {key: np.stack([batch[key] for batch in side_by_side]) for key in side_by_side[0]}


def join(splits):
    """The images of several splits in one."""
    return Split(
        np.concatenate([split.image for split in splits]),
        np.concatenate([split.label for split in splits]),
        np.concatenate([split.index for split in splits]),
    )


def count_errors(students, split):
    """The errors of each student of a stack on a split: integers [seeds, cells]."""
    logits = predict(students, split, batch_size=64)  # [seeds, cells, N, C]
    return (logits.argmax(-1) != split.label).sum(-1)


# %% Loss
# Two parts: what the label says, and what the teacher says. Logits of low precision are taken to
# float32 first, where the teacher's small probabilities survive.


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


# %% Steps
# `train_step` trains the teacher on the labels. `students_step` trains all students: it takes the
# gradient of one student's loss along both axes of the stack, and updates all weights at once.


@nnx.jit
def train_step(model, optimizer, batch):
    """One step on the labels alone. Returns the scalars loss and accuracy."""

    def loss_fn(model):
        logits = model(batch["image"], train=True)
        return hard_loss(logits, batch["label"]), logits

    (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    return {"loss": loss, "accuracy": (logits.argmax(-1) == batch["label"]).mean()}


def student_loss(student, batch, temperature, alpha):
    """The loss of one student on a batch [B, ...], and its parts."""
    logits = student(batch["image"], train=True)
    loss, hard, soft = distillation_loss(
        logits, batch["teacher_logits"], batch["label"], temperature, alpha
    )
    return loss, {"loss": loss, "hard_loss": hard, "soft_loss": soft}


@nnx.jit
def students_step(students, optimizer, batch, temperatures, alphas):
    """One step of all students, on a batch [seeds, B, ...]. Returns their losses [seeds, cells]."""
    # On a CPU they take turns, as its caches hold what one of them needs; elsewhere all go at once.
    for_each = nnx.scan if jax.default_backend() == "cpu" else nnx.vmap
    gradient = nnx.grad(student_loss, has_aux=True)
    # The students of one seed share its batch; each has a temperature and an alpha of its own.
    for_each_cell = for_each(gradient, in_axes=(0, None, 0, 0), out_axes=0)
    for_each_seed = for_each(for_each_cell, in_axes=(0, 0, None, None), out_axes=0)
    grads, losses = for_each_seed(students.stack, batch, temperatures, alphas)
    optimizer.update(students, nnx.State({"stack": grads}))  # Adam treats each weight by itself
    return losses


# %% Training
# `Training` shows progress, keeps checkpoints and takes down what was measured. `compile_step`
# is `nnx.cached_partial`: it fills the networks in, and spreads the work over the CPU's cores.
# The teacher is scored on the validation images. The stack is scored once, after its training.


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


def train_stack(name, teacher, splits, seeds, cells, recipe, num_classes, run):
    """Trains a student for each seed and each cell, all at once. Returns the Students.

    Args:
      name: of this training, such as "grid, 1000 labels".
      splits: for each seed the labelled images of its students.
      cells: pairs (temperature, alpha).
      recipe: how each student is trained. Its seed is the first of `seeds`.
    """
    students = Students(seeds, len(cells), num_classes)
    images = len(splits[0].label)
    optimizer = make_optimizer(students, recipe, images)
    # A step of the stack takes a batch of every seed, so an epoch has the steps of one split.
    training = Training(run, name, students, optimizer, recipe, splits[0])

    # The teacher's logits are computed once for the images of all seeds, and looked up by index.
    tables = {}
    if not training.finished:
        tables["teacher_logits"] = predict_by_index(teacher, join(splits))
    step = compile_step(students_step, students, optimizer, axis=1)  # axis 0 is that of the seeds
    temperatures = np.array([temperature for temperature, _ in cells], np.float32)
    alphas = np.array([alpha for _, alpha in cells], np.float32)

    for epoch in training.epochs():
        for batch in stacked_batches(splits, recipe.batch_size, seeds, epoch, **tables):
            training.log(step(batch, temperatures, alphas))
    return students


# %% Settings
# What a flag leaves open is chosen here. The learning rate and the epochs of the students are those
# that were searched for T = 3 and alpha = 0.5: they are the same for all pairs.


def fill_in_defaults(config, data):
    """The config with a value for every flag that was left open, but those of `student_recipe`."""
    config = experiment.with_defaults(config, validation=len(data.train.label) // 6)
    if config.quick:
        config = experiment.with_defaults(
            config, labels=(100,), temperatures=(1.0, 3.0), alphas=(0.5, 1.0)
        )
    if data.name == "digits":
        config = experiment.with_defaults(config, labels=(100,))
    return experiment.with_defaults(
        config,
        labels=(1000,),
        temperatures=(1.0, 2.0, 3.0, 5.0, 8.0, 20.0),
        alphas=(0.0, 0.1, 0.5, 0.9, 1.0),
    )


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


def check_settings(config, data):
    """Raises UserError for settings with which no student can be trained."""
    for labels in config.labels:
        labelled = take_labels(data.train, labels, config.seed)
        student_recipe(config, data, config.seed, len(labelled.label))


# %% Choice and comparison
# The choice sees the validation images only. The comparison has students of other seeds, which took
# no part in the choice, and is the only one that sees the test images.


def search_grid(labels, cells, seeds, teacher, tuning, config, run):
    """Trains students of all cells on so many labels, and chooses the cell that does best.

    Returns a dict: the chosen cell, the errors on the validation images [seeds][cells], and the
    losses of the last epoch (a list of one, or of none if there was no epoch).
    """
    heading = f"{labels} LABELS: {len(cells)} pairs of T and alpha, {len(seeds)} seeds"
    experiment.print_heading(heading)
    splits = [take_labels(tuning.train, labels, seed) for seed in seeds]
    recipe = student_recipe(config, tuning, seeds[0], len(splits[0].label))
    students = train_stack(
        f"grid, {labels} labels", teacher, splits, seeds, cells, recipe, tuning.classes, run
    )
    errors = count_errors(students, tuning.test)
    chosen = cells[errors.mean(axis=0).argmin()]  # the first, if several are best
    history = run.training_of(students).history
    return {"chosen": chosen, "errors": errors.tolist(), "last": history[-1:]}


def compare_on_test_images(labels, chosen, seeds, teacher, tuning, config, run):
    """Trains students of the chosen cell, the default cell and the baseline on so many labels, and
    adds their rows to the results. Returns lines for the summary."""
    temperature, alpha = chosen
    title = f"T = {temperature:g}, alpha = {alpha:g}"
    experiment.print_heading(f"{labels} LABELS: {title} on {run.data.scored_on} images")
    cells = {
        f"chosen, {labels} labels": chosen,
        f"default, {labels} labels": (3.0, 0.5),
        f"baseline, {labels} labels": (1.0, 1.0),  # alpha = 1: the teacher has no weight
    }
    splits = [take_labels(tuning.train, labels, seed) for seed in seeds]
    recipe = student_recipe(config, tuning, seeds[0], len(splits[0].label))
    students = train_stack(
        f"final, {labels} labels", teacher, splits, seeds, list(cells.values()), recipe,
        tuning.classes, run,
    )  # fmt: skip
    add_rows_of_stack(cells, seeds, students, run)
    chosen_name, *other_names = cells
    return {f"{title} − {other}": run.compare(chosen_name, other) for other in other_names}


def add_rows_of_stack(cells, seeds, students, run):
    """Adds a row to the results for each student of a stack, from {name: (temperature, alpha)}."""
    training, split, scored_on = run.training_of(students), run.data.test, run.data.scored_on
    errors = count_errors(students, split)  # [seeds, cells]
    for j, (name, (temperature, alpha)) in enumerate(cells.items()):
        for i, seed in enumerate(seeds):
            own = {"seed": seed, "temperature": temperature, "alpha": alpha}
            row = {
                "name": name,
                "seed": seed,
                "params": count_params(students) // errors.size,
                f"{scored_on}_accuracy": 1 - int(errors[i, j]) / len(split.label),
                f"{scored_on}_errors": int(errors[i, j]),
                "seconds": training.seconds / errors.size,  # its share of the whole stack's
                "settings": {**training.settings, **own},
            }
            run.rows.append(row)


# %% Figure
# The validation accuracy of every pair of temperature and alpha, with a frame around the
# chosen one.


def draw(grids, cells, tuning):
    """The figure of what `search_grid` returned for each number of labels."""
    figure = Figure(figsize=(plots.WIDTH, 0.4 + 2.4 * len(grids)), layout="constrained")
    rows = figure.subplots(len(grids), squeeze=False)[:, 0]
    for axes, (labels, grid) in zip(rows, grids.items(), strict=True):
        temperature, alpha = grid["chosen"]
        accuracies = 100 - 100 * np.mean(grid["errors"], axis=0) / len(tuning.test.label)
        draw_heat_map(axes, accuracies, cells, grid["chosen"])
        count = labels if labels == "all" else f"{int(labels):,}"
        axes.set_title(f"{count} labels: T = {temperature:g} and alpha = {alpha:g} are chosen")
    figure.suptitle(f"{tuning.scored_on.capitalize()} accuracy, %", fontsize="large")
    return figure


def draw_heat_map(axes, values, cells, chosen):
    """A heat map of the values [cells], with a frame around the chosen cell."""
    temperatures = sorted({temperature for temperature, _ in cells})
    alphas = sorted({alpha for _, alpha in cells})
    table = np.full((len(alphas), len(temperatures)), np.nan)
    for (temperature, alpha), value in zip(cells, values, strict=True):
        table[alphas.index(alpha), temperatures.index(temperature)] = value
    image = axes.imshow(table, cmap="Blues", origin="lower", aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        brightness = np.mean(image.cmap(image.norm(value))[:3])
        colour = "white" if brightness < 0.5 else "black"
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour)
    corner = temperatures.index(chosen[0]) - 0.5, alphas.index(chosen[1]) - 0.5
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2.5))
    axes.set(xlabel="temperature T", ylabel="alpha")
    axes.set_xticks(range(len(temperatures)), [f"{x:g}" for x in temperatures])
    axes.set_yticks(range(len(alphas)), [f"{x:g}" for x in alphas])


# %% Main
# One teacher, then for each number of labels the grid, and the comparison of the pair that it
# chose. Neither the teacher nor any student is trained on a validation image.


def main(config):
    run = experiment.start(config)
    data = run.data
    config = fill_in_defaults(config, data)
    run.config = config
    # The last training images become validation images, which stand in place of the test images.
    tuning = hold_out(data, config.validation, "--validation")
    check_settings(config, tuning)
    cells = list(itertools.product(config.temperatures, config.alphas))
    all_seeds = run.seeds(config.seeds + config.test_seeds)
    grid_seeds = all_seeds[: config.seeds]
    test_seeds = all_seeds[config.seeds :]

    experiment.print_heading(f"TEACHER: {len(tuning.train.label):,} labels")
    if config.teacher:
        fresh = TeacherCNN(tuning.classes, rngs=nnx.Rngs(0))
        teacher = run.take_teacher(fresh, tuning.train)
    else:
        teacher = train_teacher(tuning, fixed_teacher_recipe(config, tuning), run)

    grids = {}
    summary = {}
    for labels in config.labels:
        grid = search_grid(labels, cells, grid_seeds, teacher, tuning, config, run)
        lines = compare_on_test_images(
            labels, grid["chosen"], test_seeds, teacher, tuning, config, run
        )
        grids[str(labels)] = grid
        summary.update(lines)

    figure = draw(grids, cells, tuning)
    return run.finish(figure, summary, cells=cells, grids=grids, validation=config.validation)


if __name__ == "__main__":
    experiment.run_script(main, Config)
