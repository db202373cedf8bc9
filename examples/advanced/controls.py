# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.11", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "orbax-checkpoint>=0.12,<0.13", "numpy>=2.2,<3", "tqdm>=4.66,<5", "matplotlib>=3.9,<4",
#   "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""Controls: would a regulariser, a longer run or any other teacher have done the same?

Beside baseline and distilled student: label smoothing, tuned on validation images; twice the steps;
the teacher's answers as hard labels, on the labelled and on all images; its dark knowledge
permuted; a weak and a blank teacher; and alpha = 1, which must be the baseline to the last bit.

    python examples/advanced/controls.py           # 3 seeds: 7 to 27 minutes on 2 cores
    python examples/advanced/controls.py --quick   # a first look

Label smoothing: Szegedy et al., 2016, arXiv:1512.00567. Permuted dark knowledge: Furlanello et al.,
2018, arXiv:1805.04770. Weak teachers: Yuan et al., 2020, arXiv:1909.11723.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

sys.path.append(str(Path(__file__).resolve().parents[1]))  # utils.py lies one folder up

import utils
from fast import conv, max_pool  # those of nnx, faster to train on the CPU


@dataclasses.dataclass(frozen=True)
class Config:
    data_dir: str | None = None  # folder with the four IDX files of the dataset
    dataset: str = "mnist"  # mnist, fashion_mnist, kmnist, or digits (embedded)
    output_dir: str = "runs/advanced_controls"  # for results, figure and checkpoints
    seed: int = 42  # of the first students: labelled images, initial weights, batches
    seeds: int | None = None  # so many of each student, of seeds one after another; else 3, quick 2
    labels: str | None = None  # a student's, or all; else 1000, digits 300, quick 200
    epochs: int | None = None  # of each student; else what the labels need
    batch_size: int | None = None  # of the students, images; else 128, quick 32, or all labels
    learning_rate: float | None = None  # of the students: peak (else by labels) or constant (1e-3)
    schedule: str = "onecycle"  # of every learning rate: onecycle or constant
    temperature: float = 3.0  # T: how far both distributions are softened
    alpha: float = 0.5  # weight of the labels; the teacher has 1 - alpha
    smoothings: tuple[float, ...] | None = None  # to choose from; else 0.05 0.1 0.2 0.4, quick 0.1
    teacher: str | None = None  # output folder of script 13 with --holdout, whose teacher to use
    teacher_seed: int = 0  # of both teachers: initial weights, dropout, batches
    validation: int | None = None  # so many training images choose the smoothing; else a sixth
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


# %% Losses and step


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


def hard_loss(logits, batch):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def smoothed_loss(logits, batch, smoothing):
    """Labels smoothed over all classes, evenly and the same for every image."""
    # q = (1 − ε) · one-hot(label) + ε / C
    targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], logits.shape[-1]), smoothing)
    return optax.losses.softmax_cross_entropy(logits, targets).mean()


def teacher_loss(logits, batch, temperature, alpha):
    return distillation_loss(logits, batch["teacher_logits"], batch["label"], temperature, alpha)[0]


@nnx.jit(static_argnums=3)
def loss_step(model, optimizer, batch, loss, weights):
    """One step of any network on `loss(logits, batch, **weights)`. Returns that scalar."""
    score = nnx.value_and_grad(lambda net: loss(net(batch["image"], train=True), batch, **weights))
    value, grads = score(model)
    optimizer.update(model, grads)
    return {"loss": value}


def permute_dark_knowledge(logits, rng):
    """Shuffles each row of [N, C] but for its largest entry ("with permuted predictions")."""
    others = np.arange(logits.shape[1]) != logits.argmax(-1)[:, None]
    permuted = logits.copy()
    permuted[others] = rng.permuted(logits[others].reshape(len(logits), -1), axis=1).ravel()
    return permuted


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


def train_control(name, network, recipe, data, split, folder, loss=hard_loss, table=None, **how):
    """Trains a network on a split and a loss; a table [N, C] holds a teacher's logits by the
    images' index. Returns it and its `utils.Phase`."""
    model, tables = network(rngs=nnx.Rngs(recipe.seed)), {}
    steps = recipe.epochs * (len(split.label) // recipe.batch_size)
    transform = make_transform(recipe.learning_rate, recipe.schedule, steps)
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    more = how | ({} if split is data.train else {"split": utils.digest(*split)})
    if table is not None:
        tables, more = {"teacher_logits": table}, more | {"teacher": utils.digest(table)}
    phase = utils.Phase(name, folder, recipe, data, **more)
    step = utils.bind(loss_step, model, optimizer)
    for epoch in phase.epochs(model, optimizer, None):  # scored once, at the end, to save time
        for batch in utils.batches(split, recipe.batch_size, recipe.seed, epoch, **tables):
            phase.log(step(batch, loss, how))
    phase.notes["validation_errors"] = int(utils.count_errors(model, data.test))
    return model, phase


def controls(labelled, recipe, table, weak, data, config):
    """What there is to train from one labelled split: {name: (recipe, split, how)}. The tables
    [N, C] hold the logits of the teacher and of the weak teacher by the images' index."""
    soft = {"loss": teacher_loss, "temperature": config.temperature, "alpha": config.alpha}
    steps = recipe.epochs * (len(labelled.label) // recipe.batch_size)
    everything = data.train.take(slice(max(1, steps) * recipe.batch_size))  # or all there are
    epochs = max(1, round(steps / (len(everything.label) // recipe.batch_size)))
    through, twice = recipe._replace(epochs=epochs), recipe._replace(epochs=2 * recipe.epochs)
    permuted = permute_dark_knowledge(table, np.random.default_rng([recipe.seed, 18]))
    answers = table.argmax(-1).astype(np.int32)  # of the teacher, in the place of labels:
    told, all_told = (x._replace(label=answers[x.index]) for x in (labelled, everything))
    return {
        "baseline": (recipe, labelled, {}),
        "distilled": (recipe, labelled, soft | {"table": table}),
        "alpha 1": (recipe, labelled, soft | {"table": table, "alpha": 1.0}),
        "twice the steps": (twice, labelled, {}),
        "hard pseudo-labels": (recipe, told, {}),
        "permuted dark knowledge": (recipe, labelled, soft | {"table": permuted}),
        "taught by the weak teacher": (recipe, labelled, soft | {"table": weak}),
        "taught by a blank teacher": (recipe, labelled, soft | {"table": 0 * table}),
        "hard pseudo-labels on all images": (through, all_told, {}),
        "soft targets on all images": (through, everything, soft | {"table": table, "alpha": 0.0}),
    } | {
        f"label smoothing {x:.12g}": (recipe, labelled, {"loss": smoothed_loss, "smoothing": x})
        for x in config.smoothings
    }


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
    """The teacher's recipe, and labelled images and recipe of each seed."""
    quick, digits = config.quick, data.name == "digits"
    rate = 1e-3 if config.schedule == "constant" else 5e-3
    epochs, count = 2 if quick else 20 if digits else 3, config.seeds or (2 if quick else 3)
    for_teacher = Recipe(config.teacher_seed, epochs, 128, rate, config.schedule)
    labels, students = config.labels or (200 if quick else 300 if digits else 1000), []
    for i in range(count):
        labelled = utils.take_labels(data.train, labels, seed := (config.seed + i) % 2**32)
        recipe = student_recipe(config, len(labelled.label))._replace(seed=seed)
        shorter = {"epochs": utils.given(config.epochs, 10)} if quick else {}  # there are many
        students.append((labelled, recipe._replace(**shorter)))
    return for_teacher, students


def main(config):
    smoothings = (0.1,) if config.quick else (0.05, 0.1, 0.2, 0.4)
    config = dataclasses.replace(config, smoothings=config.smoothings or smoothings)
    data = utils.start(config)
    count = utils.given(config.validation, len(data.train.label) // 6)
    tuning = utils.hold_out(data, count, "--validation")  # the teacher does without them, too
    recipe, students = plan(config, tuning)
    utils.banner(f"TEACHER: {len(tuning.train.label):,} labels")
    teacher, folder, runs = TeacherCNN(rngs=nnx.Rngs(0)), config.output_dir, {}
    phase = utils.find_run("teacher", teacher, recipe, tuning, config)
    if not phase:
        teacher, phase = train_control("teacher", TeacherCNN, recipe, tuning, tuning.train, folder)
    answers = utils.predict(teacher, data.test)
    table = utils.predict_by_index(teacher, tuning.train)
    rows = utils.rows({"teacher": (teacher, phase)}, {"teacher": answers}, data)
    for labelled, base in students:
        utils.banner(f"SEED {base.seed}")
        one_epoch = recipe._replace(epochs=1, batch_size=base.batch_size)
        weak = train_control("weak_teacher", TeacherCNN, one_epoch, tuning, labelled, folder)
        runs.setdefault("weak teacher", []).append(weak)
        tables = table, utils.predict_by_index(weak[0], tuning.train)
        for name, (each, split, how) in controls(labelled, base, *tables, tuning, config).items():
            arguments = name.replace(" ", "_"), StudentCNN, each, tuning, split, folder
            runs.setdefault(name, []).append(train_control(*arguments, **how))
    smoothed = {x: runs.pop(f"label smoothing {x:.12g}") for x in config.smoothings}
    errors = {x: [run.notes["validation_errors"] for _, run in smoothed[x]] for x in smoothed}
    best = min(errors, key=lambda x: sum(errors[x]))
    runs["label smoothing"] = smoothed[best]
    for name, run in ((x, run) for x, of_seeds in runs.items() for run in of_seeds):
        logits = {"teacher": answers, name: utils.predict(run[0], data.test)}
        rows += utils.rows({name: run}, logits, data)
    pairs = zip(runs["alpha 1"], runs["baseline"], strict=True)
    same = [utils.digest(one) == utils.digest(other) for (one, _), (other, _) in pairs]
    changed = [int((table[x.index].argmax(-1) != x.label).sum()) for x, _ in students]
    names = [x for x in runs if x not in ("baseline", "weak teacher")]
    more = {"validation": count, "smoothing": best, "smoothing_errors": errors}
    more |= {"alpha_1_is_baseline": same, "pseudo_labels_changed": changed}
    report = utils.write_results(config, data, rows, utils.draw_gains(rows, names, data), more)
    lines = {name: utils.compare(rows, name, "baseline", data) for name in names}
    lines["alpha 1 is the baseline, bit for bit"] = f"{sum(same)} of {len(same)} seeds"
    lines["Label smoothing"] = f"{best:g}, chosen on {count:,} validation images"
    utils.summary(report, data, lines)
    return report


if __name__ == "__main__":
    utils.run(main, Config)
