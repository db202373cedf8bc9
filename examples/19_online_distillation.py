# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "numpy>=2.2,<3", "tqdm>=4.66,<5", "tyro>=1.0.8,<2", "typeguard>=4,<5", "filelock>=3.20,<5",
#   "matplotlib>=3.9,<4", "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""Online distillation: a teacher and its student, or a group of peers, learn at the same time.

Offline, a teacher is trained before its student can begin. Online, the student follows a teacher
that is still learning. In deep mutual learning there is no teacher: peers follow each other.

    python examples/19_online_distillation.py            # 1,000 labels: 3 to 5 minutes
    python examples/19_online_distillation.py --seeds 5  # everything five times
    python examples/19_online_distillation.py --quick    # a first look: about a minute

Times are for 2 CPU cores.
Zhang et al.: Deep Mutual Learning, CVPR 2018, arXiv:1706.00384.
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
    paired_difference,
    predict,
    predict_by_index,
    take_labels,
)


@dataclasses.dataclass(frozen=True)
class Config(experiment.CommonFlags):
    output_dir: str = "runs/19_online_distillation"
    """Folder for results, figure, weights and checkpoints."""
    seed: Seed = 42
    """Seed of all networks: labelled images, initial weights, order of batches, dropout. The seeds
    of further peers are drawn by it."""
    seeds: Annotated[int | None, Range(1, 100), OPEN] = None
    """Number of repetitions, with seeds one after another (default: 1)."""
    labels: Annotated[int | Literal["all"] | None, Range(10), OPEN] = None
    """Labelled images of every network, or all (default: 1000; digits and quick 100)."""
    epochs: Annotated[int | None, Range(0, 10_000), OPEN] = None
    """Epochs of each network (default: by the number of labels; digits 120; quick 40)."""
    batch_size: Annotated[int | None, Range(1), OPEN] = None
    """Images in a batch (default: 128, digits and quick 32, or all there are)."""
    learning_rate: Annotated[float | None, Range(0, low_excluded=True), OPEN] = None
    """Peak learning rate of students and peers (default: by the number of labels; digits and quick
    1e-2)."""
    teacher_learning_rate: Annotated[float, Range(0, low_excluded=True)] = 5e-3
    """Peak learning rate of teachers."""
    temperature: Annotated[float, Range(0.001, 10_000)] = 3.0
    """Temperature T between teacher and student."""
    alpha: Annotated[float, Range(0, 1)] = 0.5
    """Weight of the labels in a student's loss; the teacher has 1 - alpha."""
    mutual_temperature: Annotated[float, Range(0.001, 10_000)] = 1.0
    """Temperature T between peers; the paper's is 1."""


# %% Models
# The teacher has 946,954 parameters, the student 56,810. Peers are students: all members of a
# group have the student's architecture.


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
# Two parts: what the label says, and what another network says. The other network's logits are
# constants here (`stop_gradient`), so that nobody learns through another's answers.


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


# %% Steps of one network
# `train_step` learns from the labels alone. `train_student_step` distils offline: its teacher has
# finished learning and is frozen, since its logits come with the batch (`teacher` is None in this
# script).


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


# %% Steps of several networks
# First all networks answer, then all are updated. The gradient of the sum of their losses is each
# one's gradient of its own loss, because the losses take the other's logits as constants.


@nnx.jit
def online_distillation_step(student, teacher, optimizers, batch, temperature=3.0, alpha=0.5):
    """One step of a student, on the labels and a teacher, and of that teacher, on the labels.

    The soft targets are the logits from which the teacher learns in this very step: with dropout
    and the batch's statistics, and at no cost. Returns the student's loss, hard_loss and soft_loss,
    and teacher_loss: scalars.
    """

    def loss_fn(student, teacher):
        student_logits = student(batch["image"], train=True)
        teacher_logits = teacher(batch["image"], train=True)
        # `soft_loss` stops the gradient: the student's loss does not train the teacher.
        loss, hard, soft = distillation_loss(
            student_logits, teacher_logits, batch["label"], temperature, alpha
        )
        teacher_loss = hard_loss(teacher_logits, batch["label"])
        metrics = {"loss": loss, "hard_loss": hard, "soft_loss": soft, "teacher_loss": teacher_loss}
        return loss + teacher_loss, metrics

    grads, metrics = nnx.grad(loss_fn, argnums=(0, 1), has_aux=True)(student, teacher)
    for model, optimizer, grad in zip((student, teacher), optimizers, grads, strict=True):
        optimizer.update(model, grad)
    return metrics


@nnx.jit
def mutual_learning_step(peers, optimizers, batch, temperature=1.0, peers_weight=1.0):
    """One step of a list of K peers, two or more (Zhang et al., 2018): each learns from the labels
    and from all others.

    The labels have weight 1, the other peers `peers_weight`; with 0 all learn apart. Returns loss,
    hard_loss and soft_loss of each peer: arrays [K].
    """

    def loss_fn(peers):
        logits = [peer(batch["image"], train=True) for peer in peers]
        hard_losses = []
        soft_losses = []
        for k, own_logits in enumerate(logits):
            # hard_k = CE(label, p_k)
            hard_losses.append(hard_loss(own_logits, batch["label"]))
            # soft_k = T² · KL(p_l ‖ p_k), mean over all other peers l
            other_peers = logits[:k] + logits[k + 1 :]
            from_others = [soft_loss(own_logits, other, temperature) for other in other_peers]
            soft_losses.append(jnp.array(from_others).mean())
        hard = jnp.array(hard_losses)
        soft = jnp.array(soft_losses)
        # loss_k = hard_k + weight · soft_k
        loss = hard + peers_weight * soft
        return loss.sum(), {"loss": loss, "hard_loss": hard, "soft_loss": soft}

    grads, metrics = nnx.grad(loss_fn, has_aux=True)(peers)
    for peer, optimizer, grad in zip(peers, optimizers, grads, strict=True):
        optimizer.update(peer, grad)
    return metrics


# %% Training
# `Training` shows progress, keeps checkpoints and takes down what was measured. `compile_step` is
# `nnx.cached_partial`: it fills networks and optimizers in, so that `step(batch)` is
# `train_step(student, optimizer, batch)`. Equal recipes share a compiled step, which would spare
# some trainings the time of compiling it; since this script compares times, `compile_anew` makes
# each of them pay.


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


def compile_anew():
    """Lets what is trained next compile its step itself, as it would in a run of its own: a new
    transform is a new part of the step."""
    make_transform.cache_clear()


# %% Trainings of one network
# The offline teacher, its student, and students on the labels alone. Every network of this script
# is trained on the same labelled images, the teachers too.


def train_offline_teacher(data, labelled, recipe, run):
    """Trains a teacher on the labels alone. It is scored when it has finished."""
    teacher = TeacherCNN(data.classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(teacher, recipe, len(labelled.label))
    step = compile_step(train_step, teacher, optimizer)

    training = Training(run, "offline teacher", teacher, optimizer, recipe, labelled)
    for epoch in training.epochs():
        for batch in batches(labelled, recipe.batch_size, recipe.seed, epoch):
            training.log(step(batch))
    return teacher


def train_offline_student(teacher, data, labelled, recipe, run, temperature=3.0, alpha=0.5):
    """Trains a student on the labels and on the answers of a teacher that has finished learning."""
    student = StudentCNN(data.classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(student, recipe, len(labelled.label))
    training = Training(run, "offline student", student, optimizer, recipe, labelled)

    # The teacher never changes, so its logits are computed once and looked up by the images' index.
    tables = {}
    if not training.finished:
        with training.timed("cache_seconds"):
            tables["teacher_logits"] = predict_by_index(teacher, labelled)
    step = compile_step(train_student_step, student, None, optimizer)

    for epoch in training.epochs():
        for batch in batches(labelled, recipe.batch_size, recipe.seed, epoch, **tables):
            training.log(step(batch, temperature, alpha))
        training.score(data.scored_on, evaluate, student, data.test)
    return student


def train_student_alone(name, data, labelled, recipe, run):
    """Trains a student on the labels alone: the baseline, and the longer baseline."""
    student = StudentCNN(data.classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(student, recipe, len(labelled.label))
    step = compile_step(train_step, student, optimizer)

    training = Training(run, name, student, optimizer, recipe, labelled)
    for epoch in training.epochs():
        for batch in batches(labelled, recipe.batch_size, recipe.seed, epoch):
            training.log(step(batch))
        training.score(data.scored_on, evaluate, student, data.test)
    return student


# %% Trainings of several networks
# One loop, one step and one checkpoint for all networks that learn together. Of the pair the
# student is scored on the way, of a group the first peer.


def train_online_pair(data, labelled, for_teacher, recipe, run, temperature=3.0, alpha=0.5):
    """Trains a student and its teacher at once, on the same batches. `recipe` is the student's.
    Returns both."""
    student = StudentCNN(data.classes, rngs=nnx.Rngs(recipe.seed))
    teacher = TeacherCNN(data.classes, rngs=nnx.Rngs(for_teacher.seed))
    models = (student, teacher)
    optimizers = (
        make_optimizer(student, recipe, len(labelled.label)),
        make_optimizer(teacher, for_teacher, len(labelled.label)),
    )
    step = compile_step(online_distillation_step, student, teacher, optimizers)

    training = Training(run, "online", models, optimizers, recipe, labelled)
    for epoch in training.epochs():
        for batch in batches(labelled, recipe.batch_size, recipe.seed, epoch):
            training.log(step(batch, temperature, alpha))
        training.score(data.scored_on, evaluate, student, data.test)
    return student, teacher


def train_group(name, data, labelled, recipe, peer_seeds, run, temperature=1.0, peers_weight=1.0):
    """Trains a group of students at once, on the same batches. They differ in nothing but their
    initial weights, which `peer_seeds` draw. With `peers_weight` 0 nobody follows anybody.
    Returns the list of them."""
    peers = [StudentCNN(data.classes, rngs=nnx.Rngs(seed)) for seed in peer_seeds]
    optimizers = [make_optimizer(peer, recipe, len(labelled.label)) for peer in peers]
    step = compile_step(mutual_learning_step, peers, optimizers)

    training = Training(run, name, peers, optimizers, recipe, labelled)
    for epoch in training.epochs():
        for batch in batches(labelled, recipe.batch_size, recipe.seed, epoch):
            training.log(step(batch, temperature, peers_weight))
        training.score(data.scored_on, evaluate, peers[0], data.test)
    return peers


# %% Settings
# What a flag leaves open is chosen here. All networks share the recipe, but for the teachers'
# learning rate and the longer baseline's epochs.


def fill_in_defaults(config, data):
    """The config with a value for every flag that was left open, but those of `shared_recipe`."""
    config = experiment.with_defaults(config, seeds=1)
    if config.quick:  # fewer epochs than in script 15, since there are many networks
        config = experiment.with_defaults(config, epochs=40)
    few_images = config.quick or data.name == "digits"
    return experiment.with_defaults(config, labels=100 if few_images else 1000)


def shared_recipe(config, data, seed, labels):
    """How students and peers of one seed are trained on so many labels: as the flags say, or else
    as script 15's students."""
    epochs = round(60 * (1000 / labels) ** 0.66)
    rate = 4e-2 if labels < 10_000 else 2e-2
    batch_size = 128
    if len(data.train.label) < 10_000:  # the digits, or --quick
        epochs = 120
        rate = 1e-2
        batch_size = 32
    if config.epochs is not None:
        epochs = config.epochs
    if config.learning_rate is not None:
        rate = config.learning_rate
    batch_size = min(batch_size, labels)
    if config.batch_size is not None:
        batch_size = config.batch_size
    check_batch_size("--batch-size", batch_size, labels)
    return Recipe(seed, epochs, batch_size, rate, "onecycle")


def sizes_of_groups(config):
    """How many peers the groups have."""
    return [2] if config.quick else [2, 4]


def draw_peer_seeds(seed, count):
    """The seeds of the peers' initial weights. The first peer starts as the baseline does."""
    more_seeds = np.random.default_rng([seed, 10]).integers(2**31, size=count - 1)
    return [seed, *more_seeds.tolist()]


# %% Results
# Each network has a row, and each group: that of its first peer, with the accuracies of all
# members and of their ensemble. A student's row says when which accuracy was reached.


def add_pair_rows(student, teacher, for_teacher, run):
    """Adds the rows of a student and a teacher that learned at once. What that cost stands in the
    student's."""
    data = run.data
    training = run.training_of(student)
    # Their training has the student's learning rate and accuracies. The teacher's row has its own
    # rate, and no accuracies on the way.
    settings = {**training.settings, "learning_rate": for_teacher.learning_rate}
    history = []
    for record in training.history:
        record = dict(record)
        record.pop(f"{data.scored_on}_accuracy", None)
        history.append(record)
    teacher_logits = predict(teacher, data.test)
    run.add_row(
        "online teacher", teacher, teacher_logits,
        seconds=0.0, settings=settings, history=history,
    )  # fmt: skip
    run.add_row("online student", student, predict(student, data.test))


def add_group_row(name, peers, peer_seeds, run):
    """Adds the row of a group."""
    data = run.data
    logits_of_peers = [predict(peer, data.test) for peer in peers]
    accuracies = []
    for logits in logits_of_peers:
        accuracies.append(float((logits.argmax(-1) == data.test.label).mean()))
    # p_ensemble = mean over the members k of p_k
    mean_probs = np.mean([jax.nn.softmax(logits) for logits in logits_of_peers], axis=0)
    ensemble = float((mean_probs.argmax(-1) == data.test.label).mean())
    run.add_row(
        name, peers[0], logits_of_peers[0],
        members=accuracies, ensemble=ensemble, peer_seeds=peer_seeds,
    )  # fmt: skip


def add_clocks(rows, scored_on):
    """Adds to the rows of one seed the seconds of training steps: `seconds_to_end`, `clock` (pairs
    of seconds and accuracy), and `seconds_to_baseline`, None where its accuracy was not reached."""
    row_of = {row["name"]: row for row in rows}
    # The offline student begins when its teacher has been trained and has answered.
    teacher_seconds = sum(row_of["offline teacher"]["epoch_seconds"])
    teacher_seconds += row_of["offline student"].get("cache_seconds", 0.0)
    for row in rows:
        begin = teacher_seconds if row["name"] == "offline student" else 0.0
        seconds = np.cumsum([begin, *row["epoch_seconds"]]).tolist()
        row["seconds_to_end"] = seconds[-1]
        row["clock"] = []
        for record in row["history"]:
            if f"{scored_on}_accuracy" in record:
                accuracy = record[f"{scored_on}_accuracy"]
                row["clock"].append((seconds[record["epoch"]], accuracy))

    baseline_accuracies = [accuracy for _, accuracy in row_of["baseline"]["clock"]]
    for row in rows:
        row["seconds_to_baseline"] = None
        for seconds, accuracy in row["clock"]:
            if accuracy >= baseline_accuracies[-1]:
                row["seconds_to_baseline"] = seconds
                break


def member_means(name, run):
    """A group's accuracy in percent for each seed: the mean over its members, since which peer is
    the first is chance."""
    return [100 * np.mean(members) for members in run.values(name, "members")]


def compare_groups(name, other, run):
    """In words: how much more accurate the members of one group are than those of another."""
    accuracies, other_accuracies = member_means(name, run), member_means(other, run)
    if len(accuracies) == 1:
        return f"{accuracies[0] - other_accuracies[0]:+.2f} points (one seed)"
    gain = paired_difference(accuracies, other_accuracies)
    interval = f"95 %: {gain.low:+.2f} to {gain.high:+.2f}"
    return f"{gain.mean:+.2f} points ({interval}), {gain.wins} of {gain.pairs} seeds"


# %% Figure
# Every network and every group against the baseline. What learned from labels alone has its colour.


def draw(run):
    """The gains over the baseline, a group's as the mean over its members and as their ensemble."""
    accuracies = {}
    colours = {}
    for name in dict.fromkeys(row["name"] for row in run.rows):
        accuracies[name] = run.accuracies(name)
        colours[name] = plots.colour_of(name.split()[-1])  # "online teacher": as a teacher
        if "peers" in name or "apart" in name:
            accuracies[name] = member_means(name, run)
            ensemble = f"ensemble of {name}"
            accuracies[ensemble] = 100 * np.array(run.values(name, "ensemble"))
        if "baseline" in name:
            colours[name] = plots.COLOURS["baseline"]
            colours[f"ensemble of {name}"] = plots.COLOURS["baseline"]
    mutual, apart = "2 mutual peers", "2 baselines apart"
    title = plots.title_of_gain(mutual, apart, accuracies[mutual], accuracies[apart])
    return plots.draw_gains(plots.subtract_baseline(accuracies), title, colours=colours)


# %% Main
# For each seed, on the same labelled images: a student online against one offline, whose teacher
# has finished and runs without dropout; a student alone, and one for more epochs; peers against
# networks that learn apart.


def compare_online_with_offline(config, labelled, recipe, run):
    """Trains a teacher and then its student. Then trains both at once, from the same initial
    weights on the same batches. The teacher learns the same in both; what differs is whether the
    student hears it in training mode while it learns, or in inference mode when it has finished."""
    data = run.data
    for_teacher = recipe._replace(learning_rate=config.teacher_learning_rate)
    heading = f"seed {recipe.seed}, {len(labelled.label):,} labels"

    experiment.print_heading(f"OFFLINE TEACHER: {heading}")
    teacher = train_offline_teacher(data, labelled, for_teacher, run)
    run.add_row("offline teacher", teacher, predict(teacher, data.test))

    experiment.print_heading(f"OFFLINE STUDENT: {heading}, and the finished teacher")
    student = train_offline_student(
        teacher, data, labelled, recipe, run, config.temperature, config.alpha
    )
    run.add_row("offline student", student, predict(student, data.test))

    experiment.print_heading(f"ONLINE TEACHER AND STUDENT: {heading}")
    student, teacher = train_online_pair(
        data, labelled, for_teacher, recipe, run, config.temperature, config.alpha
    )
    add_pair_rows(student, teacher, for_teacher, run)


def train_baselines(config, labelled, recipe, run):
    """Trains a student on the labels alone, and again for as many steps as the largest group takes
    in all."""
    data = run.data
    heading = f"seed {recipe.seed}, {len(labelled.label):,} labels"

    experiment.print_heading(f"BASELINE: {heading}")
    baseline = train_student_alone("baseline", data, labelled, recipe, run)
    run.add_row("baseline", baseline, predict(baseline, data.test))

    times = max(sizes_of_groups(config))
    longer_recipe = recipe._replace(epochs=times * recipe.epochs)
    experiment.print_heading(f"LONGER BASELINE: {heading}, {times} times the epochs")
    longer = train_student_alone("longer baseline", data, labelled, longer_recipe, run)
    run.add_row("longer baseline", longer, predict(longer, data.test))


def compare_peers_with_baselines_apart(config, labelled, recipe, run):
    """Trains groups of students twice from the same initial weights: apart, then as peers."""
    data = run.data
    temperature = config.mutual_temperature
    heading = f"seed {recipe.seed}, {len(labelled.label):,} labels"
    all_peer_seeds = draw_peer_seeds(recipe.seed, max(sizes_of_groups(config)))
    for size in sizes_of_groups(config):
        peer_seeds = all_peer_seeds[:size]

        apart = f"{size} baselines apart"
        experiment.print_heading(f"{apart.upper()}: {heading}")
        baselines = train_group(
            apart, data, labelled, recipe, peer_seeds, run, temperature, peers_weight=0.0
        )
        add_group_row(apart, baselines, peer_seeds, run)

        compile_anew()  # the step is that of the baselines apart
        mutual = f"{size} mutual peers"
        experiment.print_heading(f"{mutual.upper()}: {heading}")
        peers = train_group(
            mutual, data, labelled, recipe, peer_seeds, run, temperature, peers_weight=1.0
        )
        add_group_row(mutual, peers, peer_seeds, run)


def main(config):
    run = experiment.start(config)
    data = run.data
    config = fill_in_defaults(config, data)
    run.config = config
    repetitions = []
    for seed in run.seeds(config.seeds):
        labelled = take_labels(data.train, config.labels, seed)
        repetitions.append((labelled, shared_recipe(config, data, seed, len(labelled.label))))

    for labelled, recipe in repetitions:
        compile_anew()
        compare_online_with_offline(config, labelled, recipe, run)
        train_baselines(config, labelled, recipe, run)
        compare_peers_with_baselines_apart(config, labelled, recipe, run)
        rows_of_seed = [row for row in run.rows if row["seed"] == recipe.seed]
        add_clocks(rows_of_seed, data.scored_on)

    summary = {
        "Labels": f"{len(labelled.label):,} of {len(data.train.label):,}, for all networks",
        "Rows of groups": "of the first peer; compared below are means over all members",
        "Online student over offline": run.compare("online student", "offline student"),
        "Online student over baseline": run.compare("online student", "baseline"),
        "Offline student over baseline": run.compare("offline student", "baseline"),
        "Longer baseline over baseline": run.compare("longer baseline", "baseline"),
    }
    for size in sizes_of_groups(config):
        mutual, apart = f"{size} mutual peers", f"{size} baselines apart"
        summary[f"{mutual} over apart"] = compare_groups(mutual, apart, run)
    for size in sizes_of_groups(config):
        for name in (f"{size} baselines apart", f"{size} mutual peers"):
            accuracy = 100 * np.mean(run.values(name, "ensemble"))
            summary[f"Ensemble of {name}"] = f"{accuracy:.2f} %"
    return run.finish(draw(run), summary)


if __name__ == "__main__":
    experiment.run_script(main, Config)
