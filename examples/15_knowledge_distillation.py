# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "numpy>=2.2,<3", "tqdm>=4.66,<5", "tyro>=1.0.8,<2", "typeguard>=4,<5", "filelock>=3.20,<5",
#   "matplotlib>=3.9,<4", "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""Knowledge distillation: a large teacher teaches a small student.

A teacher is trained on all labels. A student 17 times smaller learns from few images: from their
labels, and from the teacher's soft targets for them. How probable the teacher finds each wrong
digit says more than a label does. The same student without a teacher, with the same initial weights
and the same batches, shows what the teacher was worth.

    python examples/15_knowledge_distillation.py                # 1,000 labels: 2 to 7 minutes
    python examples/15_knowledge_distillation.py --labels all   # all 60,000:   3 to 8 minutes
    python examples/15_knowledge_distillation.py --seeds 5      # five pairs of students
    python examples/15_knowledge_distillation.py --quick        # a first look: about a minute
    python examples/15_knowledge_distillation.py --dataset fashion_mnist   # 10 to 25 minutes

Times are for 2 CPU cores, fast or slow; most is the teacher. Without MNIST and the internet, the
data are scikit-learn's digits: five pairs in 1 to 2 minutes. A second run in the same folder trains
only what is new, since checkpoints are kept; results, figure and weights are replaced.
Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.
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
from utils import (
    batches,
    check_batch_size,
    evaluate,
    mcnemar,
    predict,
    predict_by_index,
    take_labels,
)


@dataclasses.dataclass(frozen=True)
class Config(experiment.CommonFlags):
    output_dir: str = "runs/15_knowledge_distillation"
    """Folder for results, figure, weights and checkpoints."""
    seed: Seed = 42
    """Seed of the first pair of students: labelled images, initial weights, order of batches."""
    seeds: Annotated[int | None, Range(1, 100), OPEN] = None
    """Number of pairs of students, with seeds one after another (default: 1; digits 5)."""
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
    temperature: Annotated[float | None, Range(0.001, 10_000), OPEN] = None
    """Temperature T that softens the distributions of teacher and student in the soft loss
    (default: 3; fashion_mnist 4 with up to 10,000 labels, 2 with more)."""
    alpha: Annotated[float, Range(0, 1)] = 0.5
    """Weight of the labels in the loss; the teacher has 1 - alpha."""
    cache_teacher: bool = True
    """Whether the teacher's logits are computed once (default), or with this flag in every step."""
    teacher: Annotated[str | None, OPEN] = None
    """Output folder of a run whose teacher to take: of several, the one with --teacher-seed
    (default: train one)."""
    teacher_seed: Seed = 0
    """Seed of the teacher: initial weights, dropout, order of batches."""
    teacher_epochs: Annotated[int | None, Range(0, 10_000), OPEN] = None
    """Epochs of the teacher (default: 3; fashion_mnist 20; digits 8; quick 4)."""
    teacher_batch_size: Annotated[int | None, Range(1), OPEN] = None
    """Teacher's images in a batch (default: 128; digits and quick 32)."""
    teacher_learning_rate: Annotated[float | None, Range(0, low_excluded=True), OPEN] = None
    """Teacher's peak learning rate (default: 5e-3; fashion_mnist 2e-3; 1e-3 with a constant
    schedule)."""
    teacher_augmentation: Annotated[Literal["none", "shift", "shift_and_flip"] | None, OPEN] = None
    """Random changes of the teacher's images (default: none; fashion_mnist shift; quick none)."""


# %% Models
# The teacher has 946,954 parameters, the student 56,810. BatchNorm's statistics for inference
# follow fast (momentum 0.9), since the runs are short.


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
# Two parts: what the label says, and what the teacher says. Logits of low precision are taken to
# float32 first, where the teacher's small probabilities survive. For a project of your own, copy
# this cell and `train_student_step`: they need JAX, Flax and Optax alone. In a loss of your own:
#
#     teacher_logits = teacher(images, train=False)
#     total, hard, soft = distillation_loss(student(images, train=True), teacher_logits, labels)


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
# `train_step` learns from the labels alone: the teacher, and the student without a teacher.
# `train_student_step` distils. The teacher is frozen: by default its logits come from a table that
# `train_student_with_distillation` fills once; without one it runs here in inference mode, outside
# of what is differentiated. Gradients and `optimizer.update` are for the student alone.


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


def train_student_with_distillation(
    teacher, data, labelled, recipe, run, temperature=3.0, alpha=0.5, cache_teacher=True
):
    """Trains a student on the labels and the teacher's answers, with the baseline's initial weights
    and on its batches."""
    student = StudentCNN(data.classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(student, recipe, len(labelled.label))
    training = Training(run, "distilled", student, optimizer, recipe, labelled)

    # The teacher never changes, so its logits are computed once and looked up by the images' index.
    # With augmentation that is wrong: it must see what the student sees, in every step. Where an
    # earlier run has trained the student to its end, no step will look anything up.
    tables = {}
    if cache_teacher and not training.finished:
        with training.timed("cache_seconds"):
            tables["teacher_logits"] = predict_by_index(teacher, labelled)
    step = compile_step(train_student_step, student, None if tables else teacher, optimizer)

    for epoch in training.epochs():
        for batch in batches(labelled, recipe.batch_size, recipe.seed, epoch, **tables):
            training.log(step(batch, temperature, alpha))
        training.score(data.scored_on, evaluate, student, data.test)
    return student


# %% Settings
# What a flag leaves open is chosen here. Epochs and learning rates were searched on validation
# images, with the same budget for both students; docs/provenance.md says what was not searched.
# Both students have one recipe, so that they differ in nothing but the teacher. (Script 16 gives
# each its own.)


def fill_in_defaults(config, data):
    """The config with a value for every flag that was left open, but those of `student_recipe`."""
    if config.quick:
        config = experiment.with_defaults(
            config, seeds=1, labels=100, teacher_epochs=4, teacher_augmentation="none"
        )
    if data.name == "digits":
        config = experiment.with_defaults(config, seeds=5, labels=100, teacher_epochs=8)
    if data.name == "fashion_mnist":
        few_labels = config.labels != "all" and (config.labels or 1000) <= 10_000
        config = experiment.with_defaults(
            config,
            temperature=4.0 if few_labels else 2.0,
            teacher_epochs=20,
            teacher_augmentation="shift",
        )
    if len(data.train.label) < 10_000:
        config = experiment.with_defaults(config, teacher_batch_size=32)
    teacher_rate = 5e-3
    if data.name == "fashion_mnist" and not config.quick:
        teacher_rate = 2e-3
    if config.schedule == "constant":
        teacher_rate = 1e-3
    return experiment.with_defaults(
        config,
        seeds=1,
        labels=1000,
        temperature=3.0,
        teacher_epochs=3,
        teacher_batch_size=128,
        teacher_learning_rate=teacher_rate,
        teacher_augmentation="none",
    )


def teacher_recipe(config, images):
    """How the teacher is trained."""
    check_batch_size("--teacher-batch-size", config.teacher_batch_size, images)
    return Recipe(
        config.teacher_seed, config.teacher_epochs, config.teacher_batch_size,
        config.teacher_learning_rate, config.schedule, config.teacher_augmentation,
    )  # fmt: skip


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


# %% Main
# One teacher, then pairs of students that differ in nothing but the teacher's answers.


def main(config):
    run = experiment.start(config)
    data = run.data
    config = fill_in_defaults(config, data)
    run.config = config
    for_teacher = teacher_recipe(config, len(data.train.label))
    pairs = []
    for seed in run.seeds(config.seeds):
        labelled = take_labels(data.train, config.labels, seed)
        pairs.append((labelled, student_recipe(config, data, seed, len(labelled.label))))
    images, labels = f"{len(data.train.label):,}", f"{len(labelled.label):,}"

    experiment.print_heading(f"TEACHER: all {images} labels")
    if config.teacher:
        fresh = TeacherCNN(data.classes, rngs=nnx.Rngs(0))
        teacher = run.take_teacher(fresh, data.train)
    else:
        teacher = train_teacher(data, for_teacher, run)
    teacher_logits = predict(teacher, data.test)
    run.add_row("teacher", teacher, teacher_logits, teacher_logits=teacher_logits)

    for labelled, recipe in pairs:
        heading = f"seed {recipe.seed}, {labels} of {images} labels"
        experiment.print_heading(f"DISTILLED STUDENT: {heading}, and the teacher")
        distilled = train_student_with_distillation(
            teacher, data, labelled, recipe, run,
            config.temperature, config.alpha, config.cache_teacher,
        )  # fmt: skip
        experiment.print_heading(f"BASELINE STUDENT: {heading}, no teacher")
        baseline = train_student_baseline(data, labelled, recipe, run)

        distilled_logits = predict(distilled, data.test)
        baseline_logits = predict(baseline, data.test)
        p_value = mcnemar(distilled_logits, baseline_logits, data.test.label)
        run.add_row(
            "distilled", distilled, distilled_logits,
            teacher_logits=teacher_logits, mcnemar_p=p_value,
        )  # fmt: skip
        run.add_row("baseline", baseline, baseline_logits, teacher_logits=teacher_logits)

    run.measure_inference("teacher", teacher)
    run.measure_inference("distilled", distilled)
    soft_figure, soft_targets = plots.draw_soft_targets(data, teacher_logits)
    run.save_figure(soft_figure, "soft_targets.png")
    title = plots.title_of_errors(
        "Distilled students", "baselines", run.accuracies("distilled"), run.accuracies("baseline")
    )
    figure = plots.draw_epochs(run.rows, data, title)
    gain = run.compare("distilled", "baseline")
    if config.seeds == 1:  # could this pair's difference be chance, on these images?
        gain = f"{gain}, McNemar's p = {p_value:.1g}"
    teacher_params = run.values("teacher", "params")[0]
    student_params = run.values("distilled", "params")[0]
    behind = np.mean(run.accuracies("teacher")) - np.mean(run.accuracies("distilled"))
    summary = {
        "Labels": f"{images} for the teacher, {labels} for the students",
        "Improvement from distillation": gain,
        "Distilled student behind teacher": f"{behind:.2f} points",
        "Compression": f"{teacher_params / student_params:.1f} times fewer parameters",
    }
    return run.finish(figure, summary, soft_targets=soft_targets)


if __name__ == "__main__":
    experiment.run_script(main, Config)
