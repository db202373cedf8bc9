# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.11", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "orbax-checkpoint>=0.12,<0.13", "numpy>=2.2,<3", "tqdm>=4.66,<5", "matplotlib>=3.9,<4",
#   "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""Ensemble distillation: several teachers teach one student.

Teachers that differ in seed and order of batches (with --subsets also in their images) err on
different images, so their mean errs less than each. A student learns from that mean, of the
probabilities or of the logits; others learn from one teacher, or from one drawn for each batch.

    python examples/17_ensemble_distillation.py           # 4 teachers: 3 to 4 minutes on 2 cores
    python examples/17_ensemble_distillation.py --quick   # 2 teachers: about a minute

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.
"""

import dataclasses
import functools
import time
from typing import NamedTuple

import jax
import numpy as np
import optax
import utils
from fast import conv, max_pool  # those of nnx, faster to train on the CPU
from flax import nnx
from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Config:
    data_dir: str | None = None  # folder with the four IDX files of the dataset
    dataset: str = "mnist"  # mnist, fashion_mnist, kmnist, or digits (embedded)
    output_dir: str = "runs/17_ensemble_distillation"  # for results, figure and checkpoints
    seed: int = 42  # of the students: labelled images, initial weights, batches, drawn teachers
    labels: str | None = None  # a student's, or all; else 1000, digits 300, quick 200
    epochs: int | None = None  # of each student; else what the labels need
    batch_size: int | None = None  # of the students, images; else 128, quick 32, or all labels
    learning_rate: float | None = None  # of the students: peak (else by labels) or constant (1e-3)
    schedule: str = "onecycle"  # of every learning rate: onecycle or constant
    temperature: float = 3.0  # T: how far all distributions are softened
    alpha: float = 0.5  # weight of the labels; the teachers have 1 - alpha
    teachers: int | None = None  # how many; else 4, quick 2
    subsets: bool = False  # each teacher draws its own images; else all have the same
    teacher_seed: int = 0  # of the first teacher: images, weights, dropout, batches; then + 1, ...
    teacher_labels: str | None = None  # labelled images of a teacher, or all; else at most 3000
    teacher_epochs: int | None = None  # of each; else 15 for 3,000 labels, digits 20, quick 2
    holdout: int = 0  # score on so many images held out of training, and leave the test set alone
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


# %% Loss, step and training


def mean_distribution(teacher_logits, temperature=1.0, average="probabilities"):
    """What K teachers say together, [B, C]: from their logits, a list or array [K, B, C], the mean
    of the softened distributions, arithmetic ("probabilities") or geometric ("logits")."""
    if average not in ("probabilities", "logits") or len(teacher_logits) == 0:
        raise ValueError(f"average={average!r} of {len(teacher_logits)} teachers")
    softened = jax.lax.stop_gradient(jax.numpy.asarray(teacher_logits)) / temperature
    if average == "probabilities":
        # p = 1/K · Σ_k softmax(v_k / T): what one teacher finds likely stays likely
        return jax.nn.softmax(softened).mean(axis=0)
    # p = softmax(1/K · Σ_k v_k / T) ∝ (Π_k p_k)^(1/K): what one teacher rules out is ruled out
    return jax.nn.softmax(softened.mean(axis=0))


def ensemble_distillation_loss(
    student_logits, teacher_logits_list, labels, temperature=3.0, alpha=0.5, average="probabilities"
):
    """(total, hard, soft), from logits [B, C], labels [B] and K teachers' logits, [B, C] each."""
    # hard = −log p_student[label] at T = 1, mean over the batch
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(student_logits, labels).mean()
    # soft = T² · KL(mean of the teachers ‖ p_student), all at temperature T, mean over the batch
    teacher_probs = mean_distribution(teacher_logits_list, temperature, average)
    student_log_probs = jax.nn.log_softmax(student_logits / temperature)
    soft = temperature**2 * optax.losses.kl_divergence(student_log_probs, teacher_probs).mean()
    # total = α · hard + (1 − α) · soft
    return alpha * hard + (1 - alpha) * soft, hard, soft


@nnx.jit(static_argnames="average")
def ensemble_step(model, optimizer, batch, temperature=3.0, alpha=0.5, average="probabilities"):
    """One step on labels and, where the batch brings "teacher_logits" [B, K, C], on K teachers."""

    def loss_fn(model):
        logits, labels = model(batch["image"], train=True), batch["label"]
        if "teacher_logits" not in batch:
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        teachers = batch["teacher_logits"].swapaxes(0, 1)  # [K, B, C]
        return ensemble_distillation_loss(logits, teachers, labels, temperature, alpha, average)[0]

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return {"loss": loss}


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


def train_network(name, network, recipe, data, config, table=None, random=False, **how):
    """Trains a teacher on labels, or a student on labels and a table [N, K, C] of its teachers'
    logits by the images' index (`random`: on one of them a step). Returns it and its Phase."""
    model, name = network(rngs=nnx.Rngs(recipe.seed)), name.replace(",", "").replace(" ", "_")
    tables = {} if table is None else {"teacher_logits": table}
    more = how | {key: utils.digest(value) for key, value in tables.items()}
    more |= {"random": True} if random else {}
    if phase := utils.find_run(name, model, recipe, data, config, **more):
        return model, phase
    steps = recipe.epochs * (len(data.train.label) // recipe.batch_size)
    transform = make_transform(recipe.learning_rate, recipe.schedule, steps)
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    phase = utils.Phase(name, config.output_dir, recipe, data, **more)
    step = utils.bind(ensemble_step, model, optimizer)
    for epoch in phase.epochs(model, optimizer, None):  # scored once, at the end, to save time
        draw = np.random.default_rng([recipe.seed, 17, epoch])  # a run that goes on draws the same
        for batch in utils.batches(data.train, recipe.batch_size, recipe.seed, epoch, **tables):
            if random:
                k = draw.integers(table.shape[1])
                batch["teacher_logits"] = batch["teacher_logits"][:, k : k + 1]
            phase.log(step(batch, **how))
    return model, phase


# %% Main


def inference_seconds(networks, split, count):
    """Seconds for 1,000 images of {name: models whose mean answers}, median of 5 turns of all, from
    `count` images of a split."""
    seconds = {name: [] for name in networks}
    split = split.take(np.arange(count) % len(split.label))
    for name in [*networks] * 5:  # in turns, so that a busy moment of the machine meets all
        begun = time.perf_counter()
        mean_distribution([utils.predict(model, split) for model in networks[name]])
        seconds[name].append((time.perf_counter() - begun) * 1000 / count)
    return {name: float(np.median(turns)) for name, turns in seconds.items()}


def draw(percent, data, logits, temperature):
    """The image on which the means of the teachers, logits [K, N, C], differ most; accuracies."""
    means = {a: mean_distribution(logits, temperature, a) for a in ("probabilities", "logits")}
    i = int(np.abs(means["probabilities"] - means["logits"]).sum(-1).argmax())
    figure = Figure(figsize=(15, 5), layout="constrained")
    picture, bars, dots = figure.subplots(1, 3, width_ratios=(3, 6, 5))
    picture.imshow(data.test.image[i, :, :, 0], cmap="gray_r")
    picture.set(title=f"image {data.test.index[i]}, a {data.test.label[i]}", xticks=[], yticks=[])
    for x, (average, mean) in zip((-0.2, 0.2), means.items(), strict=True):
        bars.bar(np.arange(10) + x, mean[i], 0.4, color=f"{0.6 - x}", label=f"mean {average}")
    for k, p in enumerate(jax.nn.softmax(logits[:, i] / temperature), 1):
        bars.plot(p, "_", markersize=22, markeredgewidth=2, label=f"teacher {k}")
    bars.set(xlabel=f"class (T = {temperature:g})", ylabel="probability", xticks=range(10))
    bars.legend(title="soft targets of")
    dots.plot([*percent.values()], [*percent], "o")
    dots.set(title=f"{data.scored_on} accuracy, %", ylim=(len(percent) - 0.5, -0.5))
    return figure


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
    """Recipe and data of each teacher, then the students' recipe and data."""
    quick, digits, total = config.quick, data.name == "digits", len(data.train.label)
    images, most = min(3_000, total // 2 if config.subsets else total), total - int(config.subsets)
    images = total if config.teacher_labels == "all" else int(config.teacher_labels or images)
    utils.require(128 <= images <= most, f"--teacher-labels {images}: must be from 128 to {most}")
    epochs = 2 if quick else 20 if digits else max(3, round(15 * (3000 / images) ** 0.75))
    rate = 1e-3 if config.schedule == "constant" else 5e-3
    how = utils.given(config.teacher_epochs, epochs), 128, rate, config.schedule
    teachers, first = [], config.teacher_seed
    for seed in range(first, first + utils.given(config.teachers, 2 if quick else 4)):
        split = utils.take_labels(data.train, images, seed if config.subsets else first)
        teachers.append((Recipe(seed % 2**32, *how), data._replace(train=split)))
    labels = config.labels or (200 if quick else 300 if digits else 1000)
    labelled = data._replace(train=utils.take_labels(data.train, labels, config.seed))
    return teachers, student_recipe(config, len(labelled.train.label)), labelled


def main(config):
    data, runs, logits = utils.start(config), {}, {}
    for_teachers, for_students, labelled = plan(config, data)
    for k, (recipe, own) in enumerate(for_teachers, 1):
        utils.banner(f"TEACHER {k} OF {len(for_teachers)}: {len(own.train.label):,} labels")
        runs[f"teacher {k}"] = train_network("teacher", TeacherCNN, recipe, own, config)
        logits[f"teacher {k}"] = utils.predict(runs[f"teacher {k}"][0], data.test)
    teachers, stack = tuple(model for model, _ in runs.values()), np.stack([*logits.values()])
    for average in ("probabilities", "logits"):
        name, mean = f"ensemble, {average}", mean_distribution(stack, 1.0, average)
        runs[name] = teachers, utils.Phase("ensemble", config.output_dir, for_teachers[0][0], data)
        logits[name] = np.log(mean + 1e-30)
    table = np.stack([utils.predict_by_index(x, labelled.train) for x in teachers], axis=1)
    how = {"table": table, "temperature": config.temperature, "alpha": config.alpha}
    students = {
        "baseline": {}, "student of one teacher": how | {"table": table[:, :1]},
        "student, mean probabilities": how, "student, mean logits": how | {"average": "logits"},
        "student, random teacher": how | {"random": True},
    }  # fmt: skip
    for name, how in students.items():
        utils.banner(f"{name.upper()}: {len(labelled.train.label):,} labels")
        runs[name] = train_network(name, StudentCNN, for_students, labelled, config, **how)
        logits[name] = utils.predict(runs[name][0], data.test)
    ensemble, mean = logits["ensemble, probabilities"], "student, mean probabilities"
    rows = utils.rows(runs, logits | {"teacher": ensemble}, data)  # agreement is with the ensemble
    answers, networks = stack.argmax(-1), {"student": [runs[mean][0]], "teacher": teachers[:1]}
    wrong, pairs = answers != data.test.label, answers[np.stack(np.triu_indices(len(teachers), 1))]
    count = 250 if config.quick else 1000
    seconds = inference_seconds(networks | {"ensemble": teachers}, data.test, count)
    percent = {row["name"]: 100 * row[f"{data.scored_on}_accuracy"] for row in rows}
    figure = draw(percent, data, stack, config.temperature)
    report = utils.write_results(config, data, rows, figure, {
        "disagreement": float((pairs[0] != pairs[1]).mean()),  # of two teachers
        "common_errors": float(wrong.all(0).sum() / max(1, wrong.any(0).sum())),
        "mcnemar_p": utils.mcnemar(logits[mean], logits["student of one teacher"], data.test.label),
        "inference_seconds": seconds,
    })  # fmt: skip
    over_best = percent["ensemble, probabilities"] - max([*percent.values()][: len(teachers)])
    gain, p_value = percent[mean] - percent["student of one teacher"], report["mcnemar_p"]
    utils.summary(report, data, {
        "Two teachers differ on": f"{100 * report['disagreement']:.2f} % of the images",
        "Ensemble over its best member": f"{over_best:+.2f} points",
        "Its student over one teacher's": f"{gain:+.2f} points (McNemar's p = {p_value:.1g})",
        "Inference, 1,000 images": ", ".join(f"{k} {1e3 * s:.0f} ms" for k, s in seconds.items()),
    })  # fmt: skip
    return report


if __name__ == "__main__":
    utils.run(main, Config)
