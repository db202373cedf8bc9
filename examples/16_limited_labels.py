# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.11", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "orbax-checkpoint>=0.12,<0.13", "numpy>=2.2,<3", "tqdm>=4.66,<5", "matplotlib>=3.9,<4",
#   "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""Limited labels: how the gain from distillation depends on the number of labelled images.

A baseline and a distilled student for each number of labels, over several seeds, each with a recipe
that was searched for it; and a student that learns from the teacher on images without labels, too.
How accurate are they, how much like their teacher, and are they as sure as they may be?

    python examples/16_limited_labels.py           # 3 seeds: 10 to 45 minutes
    python examples/16_limited_labels.py --quick   # a first look: about a minute

On 2 CPU cores, fast or slow, from runs of 5 seeds. Hinton, Vinyals, Dean: Distilling the Knowledge
in a Neural Network, 2015, arXiv:1503.02531, section 6. Stanton et al.: Does Knowledge Distillation
Really Work?, 2021, arXiv:2106.05945. Guo et al.: On Calibration of Modern Neural Networks, 2017,
arXiv:1706.04599.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import utils
from fast import conv, max_pool  # those of nnx, faster to train on the CPU
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Config:
    data_dir: str | None = None  # folder with the four IDX files of the dataset
    dataset: str = "mnist"  # mnist, fashion_mnist, kmnist, or digits (embedded)
    output_dir: str = "runs/16_limited_labels"  # for results, figure and checkpoints
    seed: int = 42  # of the first pair of students: labelled images, initial weights, batches
    seeds: int | None = None  # so many pairs, of seeds one after another; else 3, quick 2
    labels: tuple[str, ...] | None = None  # else 100 250 1000 5000 all; quick and digits: fewer
    epochs: int | None = None  # of each student; else as in RECIPES
    batch_size: int | None = None  # of the students, images; else 128, quick 32, or all labels
    learning_rate: float | None = None  # of the students: peak (else as in RECIPES), constant 1e-3
    schedule: str = "onecycle"  # of the students' learning rate: onecycle or constant
    temperature: float = 3.0  # T: how far both distributions are softened
    alpha: float = 0.5  # weight of the labels; the teacher has 1 - alpha
    teacher: str | None = None  # output folder of a run whose teacher to use
    teacher_seed: int = 0  # of the teacher: initial weights, dropout, batches
    holdout: int = 0  # score on so many images held out of training, and leave the test set alone
    quick: bool = False  # a first look: 2,000 training and test images, fewer labels and steps


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


# %% Loss and steps


def soft_loss(student_logits, teacher_logits, labels, temperature=3.0, alpha=0.5):
    """(total, hard, soft), from logits [B, C] and the labels [L] of the first L images. With L = B
    it is the loss of script 15; the other B − L images have no label, and need none."""
    # hard = −log p_student[label] at T = 1, mean over the labelled images
    labelled = student_logits[: len(labels)]
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(labelled, labels).mean()
    # soft = T² · KL(p_teacher ‖ p_student), both at temperature T, mean over all images
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


@nnx.jit
def soft_step(student, optimizer, batch, unlabelled=None, temperature=3.0, alpha=0.5):
    """One step on a labelled batch and, unless None, on a second one whose labels are not looked
    at. Both bring "teacher_logits" [B, C]. Returns the scalars loss, hard_loss and soft_loss."""
    image, teacher_logits = batch["image"], batch["teacher_logits"]
    if unlabelled is not None:
        image = jnp.concatenate([image, unlabelled["image"]])
        teacher_logits = jnp.concatenate([teacher_logits, unlabelled["teacher_logits"]])

    def loss_fn(student):
        logits = student(image, train=True)
        losses = soft_loss(logits, teacher_logits, batch["label"], temperature, alpha)
        return losses[0], losses

    (_, (loss, hard, soft)), grads = nnx.value_and_grad(loss_fn, has_aux=True)(student)
    optimizer.update(student, grads)
    return {"loss": loss, "hard_loss": hard, "soft_loss": soft}


# %% Training


class Recipe(NamedTuple):
    seed: int  # of initial weights, batches and dropout
    epochs: int
    batch_size: int
    learning_rate: float
    schedule: str


@functools.cache  # so that equal recipes share a compiled step
def make_transform(learning_rate, schedule, steps):
    """Adam; its rate rises for 30 % of the steps and falls to nearly 0, or is constant."""
    if schedule == "onecycle":
        learning_rate = optax.cosine_onecycle_schedule(max(1, steps), learning_rate)
    return optax.adam(learning_rate)


def train_limited(kind, recipe, data, labelled, config, table=None):
    """Trains a teacher or a student: on labels alone; with a table [N, C] of the teacher's logits
    by the images' index on both (distilled); or with half of each batch drawn from the training
    images that have no label (transfer). Returns it and its `utils.Phase`."""
    model = (TeacherCNN if kind == "teacher" else StudentCNN)(rngs=nnx.Rngs(recipe.seed))
    function, how, tables = train_step, {}, {}
    more = {} if kind == "teacher" else {"labels": len(labelled.label)}
    if table is not None:
        function, tables = soft_step, {"teacher_logits": table}
        how = {"temperature": config.temperature, "alpha": config.alpha}
        more |= how | {"teacher": utils.digest(table)}
    steps = recipe.epochs * (len(labelled.label) // recipe.batch_size)
    transform = make_transform(recipe.learning_rate, recipe.schedule, steps)
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    phase = utils.Phase(kind, config.output_dir, recipe, data, **more)
    if kind == "transfer":
        rest = data.train.take(~np.isin(data.train.index, labelled.index))
    step = utils.bind(function, model, optimizer)
    for epoch in phase.epochs(model, optimizer, None):  # scored once, at the end, to save time
        draws = recipe.batch_size, recipe.seed, epoch
        sources = [utils.batches(labelled, *draws, **tables)]
        if kind == "transfer":
            sources.append(utils.batches(rest, *draws, **tables))
        for batches in zip(*sources, strict=False):  # the rest is larger
            phase.log(step(*batches, **how))
    return model, phase


# %% Main

KINDS = ("baseline", "distilled", "transfer")
# With so many labels: peak learning rate and epochs of each kind, found on validation images by
# searches of equal budgets (`docs/measure.py tuning limited_tuning`). Transfer follows distilled.
RECIPES = {
    100: {"baseline": (8e-2, 548), "distilled": (3e-2, 548)},
    250: {"baseline": (8e-2, 300), "distilled": (8e-2, 300)},
    1_000: {"baseline": (3e-2, 120), "distilled": (8e-2, 120)},
    5_000: {"baseline": (1e-2, 21), "distilled": (3e-2, 21)},
    50_000: {"baseline": (2e-2, 4), "distilled": (4e-2, 6)},
}


def recipe_for(kind, labels, seed, config):
    """A student's recipe, from flags or else from the nearest of RECIPES."""
    nearest = min(RECIPES, key=lambda count: abs(np.log(count / labels)))
    rate, epochs = RECIPES[nearest]["baseline" if kind == "baseline" else "distilled"]
    epochs = 10 if config.quick else round(epochs * (nearest / labels) ** 0.66)
    rate = 1e-3 if config.schedule == "constant" else rate
    epochs, rate = utils.given(config.epochs, epochs), utils.given(config.learning_rate, rate)
    size = utils.given(config.batch_size, min(32 if config.quick else 128, labels))
    utils.check_batch("--batch-size", size, labels)
    if kind == "transfer":  # half of a batch has labels, and the steps are about as many
        utils.require(size > 1, f"--batch-size {size}: must be 2 or more, half of them labelled")
        fewer = round(epochs * (labels // size) / (labels // (size // 2)))
        epochs, size = max(min(1, epochs), fewer), size // 2
    return Recipe(seed, epochs, size, rate, config.schedule)


def plan(config, data):
    """The teacher's recipe, the numbers of labels, and of each student kind, images and recipe."""
    quick, digits, total = config.quick, data.name == "digits", len(data.train.label)
    epochs = 2 if quick else 20 if digits else 3
    for_teacher = Recipe(config.teacher_seed, epochs, 128, 5e-3, "onecycle")
    budgets = ("50", "100", "300", "all") if digits else ("100", "250", "1000", "5000", "all")
    budgets = ("100", "500") if quick else budgets
    budgets = config.labels or [n for n in budgets if n == "all" or int(n) < total]
    budgets = sorted(len(utils.take_labels(data.train, count, 0).label) for count in budgets)
    utils.require(len(set(budgets)) == len(budgets), "--labels: must not repeat a number")
    students = []
    for labels in budgets:
        for i in range(utils.given(config.seeds, 2 if quick else 3)):
            seed = (config.seed + i) % 2**32
            labelled = utils.take_labels(data.train, labels, seed)
            for kind in KINDS if labels <= total // 2 else KINDS[:2]:
                students.append((kind, labelled, recipe_for(kind, labels, seed, config)))
    return for_teacher, budgets, students


def main(config):
    data = utils.start(config)
    for_teacher, budgets, students = plan(config, data)
    utils.banner(f"TEACHER: {len(data.train.label):,} labels")
    teacher = TeacherCNN(rngs=nnx.Rngs(0))
    phase = utils.find_run("teacher", teacher, for_teacher, data, config)
    if not phase:
        teacher, phase = train_limited("teacher", for_teacher, data, data.train, config)
    answers = utils.predict(teacher, data.test)
    rows = utils.rows({"teacher": (teacher, phase)}, {"teacher": answers}, data)
    table, lines = utils.predict_by_index(teacher, data.train), {}
    for kind, labelled, recipe in students:
        name = f"{kind}, {len(labelled.label)} labels"
        utils.banner(f"{name}, seed {recipe.seed}".upper())
        known = None if kind == "baseline" else table
        run = train_limited(kind, recipe, data, labelled, config, known)
        logits = utils.predict(run[0], data.test)
        rows += utils.rows({name: run}, {name: logits, "teacher": answers}, data)
    names = [row["name"] for row in rows]
    for count in budgets:
        for name in (f"{kind}, {count} labels" for kind in KINDS[1:]):
            if name in names:
                baseline = f"baseline, {count} labels"
                lines[f"{name}: gain"] = utils.compare(rows, name, baseline, data)
    report = utils.write_results(config, data, rows, utils.draw_labels(rows, KINDS, budgets, data))
    utils.summary(report, data, lines)
    return report


if __name__ == "__main__":
    utils.run(main, Config)
