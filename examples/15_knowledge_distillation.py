# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.11", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "orbax-checkpoint>=0.12,<0.13", "numpy>=2.2,<3", "tqdm>=4.66,<5", "matplotlib>=3.9,<4",
#   "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""Knowledge distillation: a large teacher teaches a small student.

A teacher is trained on all labels. A student 17 times smaller learns from few labels and from the
teacher's soft targets: how probable it finds each wrong digit says more than a label does. The
same student without a teacher, of the same start and batches, shows what the teacher was worth.

    python examples/15_knowledge_distillation.py                # 1,000 labels: 2 to 8 minutes
    python examples/15_knowledge_distillation.py --labels all   # all 60,000:   3 to 9 minutes
    python examples/15_knowledge_distillation.py --quick        # a first look: under a minute

Times are for 2 CPU cores, fast or slow; most is the teacher, which later runs take over.
Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.
"""

import dataclasses
from typing import NamedTuple

import jax
import optax
import utils
from fast import conv, max_pool  # those of nnx, faster to train on the CPU
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Config:
    data_dir: str | None = None  # folder with the four IDX files of the dataset
    dataset: str = "mnist"  # mnist, fashion_mnist, kmnist, or digits (embedded)
    output_dir: str = "runs/15_knowledge_distillation"  # for results, figure and checkpoints
    seed: int = 42  # of the students: labelled images, initial weights, batches
    labels: str | None = None  # a student's, or all; else 1000, digits 300, quick 200
    epochs: int | None = None  # of each student; else what the labels need
    batch_size: int | None = None  # of the students, images; else 128, quick 32, or all labels
    learning_rate: float | None = None  # of the students: peak (else by labels) or constant (1e-3)
    schedule: str = "onecycle"  # of every learning rate: onecycle or constant
    temperature: float = 3.0  # T: how far both distributions are softened
    alpha: float = 0.5  # weight of the labels; the teacher has 1 - alpha
    cache_teacher: bool = True  # compute the teacher's logits once, not in every step
    teacher: str | None = None  # output folder of a run whose teacher to use
    teacher_seed: int = 0  # of the teacher: initial weights, dropout, batches
    teacher_epochs: int | None = None  # of the teacher; else 3, digits 20, quick 2
    teacher_batch_size: int = 128  # of the teacher, images
    teacher_learning_rate: float | None = None  # of the teacher: peak (5e-3) or constant (1e-3)
    holdout: int = 0  # score on so many images held out of training, and leave the test set alone
    quick: bool = False  # a first look: 2,000 training and test images, 200 labels, few steps


# %% Models
# BatchNorm's statistics for inference follow fast (momentum 0.9), since the runs are short.


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


# %% Loss


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


# %% Steps
# The teacher is frozen: in inference mode, and outside of what is differentiated.


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


def train_student_with_distillation(
    teacher, data, labelled, recipe, output_dir, temperature=3.0, alpha=0.5, cache_teacher=True
):
    """Trains a student on labels and teacher, from the baseline's start, on its batches."""
    student = StudentCNN(rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(student, recipe, len(labelled.label))
    how = {"temperature": temperature, "alpha": alpha, "cache_teacher": cache_teacher}
    how |= {"labels": len(labelled.label), "teacher": utils.digest(teacher)}
    phase = utils.Phase("distilled", output_dir, recipe, data, **how)
    tables = {}
    if cache_teacher and not phase.finished:
        # The teacher never changes, so its logits are computed once and looked up by the images'
        # index. With augmentation that is wrong: it must see what the student sees, in every step.
        with phase.timed("cache_seconds"):
            tables["teacher_logits"] = utils.predict_by_index(teacher, labelled)
    step = utils.bind(train_student_step, student, None if tables else teacher, optimizer)
    for epoch in phase.epochs(student, optimizer, lambda: evaluate(student, data.test)[0]):
        for batch in utils.batches(labelled, recipe.batch_size, recipe.seed, epoch, **tables):
            phase.log(step(batch, temperature, alpha))
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


def plan(config, data):
    """The labelled images and the recipes of teacher and student, from flags and defaults."""
    quick, digits = config.quick, data.name == "digits"
    epochs = utils.given(config.teacher_epochs, 2 if quick else 20 if digits else 3)
    rate = 1e-3 if config.schedule == "constant" else 5e-3
    rate, batch_size = utils.given(config.teacher_learning_rate, rate), config.teacher_batch_size
    utils.check_batch("--teacher-batch-size", batch_size, len(data.train.label))
    for_teacher = Recipe(config.teacher_seed, epochs, batch_size, rate, config.schedule)
    default = 200 if quick else 300 if digits else 1000
    labelled = utils.take_labels(data.train, config.labels or default, config.seed)
    return labelled, for_teacher, student_recipe(config, len(labelled.label))


def main(config):
    data = utils.start(config)
    labelled, for_teacher, for_student = plan(config, data)
    images, labels = len(data.train.label), len(labelled.label)
    utils.banner(f"1/3 TEACHER: all {images:,} labels")
    teacher = TeacherCNN(rngs=nnx.Rngs(0))
    phase = utils.find_run("teacher", teacher, for_teacher, data, config)
    if not phase:
        teacher, phase = train_teacher(data, for_teacher, config.output_dir)
    print("✓ Teacher completed")
    utils.banner(f"2/3 DISTILLED STUDENT: {labels:,} of {images:,} labels, and the teacher")
    distilled = train_student_with_distillation(
        teacher, data, labelled, for_student, config.output_dir,
        config.temperature, config.alpha, config.cache_teacher,
    )  # fmt: skip
    print("✓ Distillation completed")
    utils.banner(f"3/3 BASELINE STUDENT: the same {labels:,} labels, no teacher")
    baseline = train_student_baseline(data, labelled, for_student, config.output_dir)
    print("✓ Baseline completed")
    runs = {"teacher": (teacher, phase), "distilled": distilled, "baseline": baseline}
    logits = {name: evaluate(model, data.test)[1] for name, (model, _) in runs.items()}
    rows = utils.rows(runs, logits, data)
    figure, found = utils.draw(rows, data, logits["teacher"])
    p_value = utils.mcnemar(logits["distilled"], logits["baseline"], data.test.label)
    report = utils.write_results(config, data, rows, figure, found | {"mcnemar_p": p_value})
    percent = {row["name"]: 100 * row[f"{data.scored_on}_accuracy"] for row in rows}
    gain = percent["distilled"] - percent["baseline"]
    utils.summary(report, data, {
        "Labels": f"{images:,} for the teacher, {labels:,} for the students",
        "Improvement from distillation": f"{gain:+.2f} points (McNemar's p = {p_value:.1g})",
        "Compression": f"{rows[0]['params'] / rows[1]['params']:.1f} times fewer parameters",
        "Loss against the teacher": f"{percent['teacher'] - percent['distilled']:.2f} points",
    })  # fmt: skip
    return report


if __name__ == "__main__":
    utils.run(main, Config)
