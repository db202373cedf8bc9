# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "numpy>=2.2,<3", "tqdm>=4.66,<5", "tyro>=1.0.8,<2", "typeguard>=4,<5", "filelock>=3.20,<5",
#   "matplotlib>=3.9,<4", "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""Self-distillation: a network as its own teacher.

A trained network teaches a freshly initialised one of the same kind, and that the next ("born
again"). Inside of one network the last exit teaches the earlier ones. Twins with the same start and
the same batches, but without a teacher, tell what the teaching was worth.

    python examples/18_self_distillation.py             # 1,000 labels: 1 to 2 minutes
    python examples/18_self_distillation.py --seeds 5   # five repetitions: 5 to 10 minutes
    python examples/18_self_distillation.py --quick     # a first look: about a minute

Times are for 2 CPU cores.
Furlanello et al.: Born-Again Neural Networks, 2018, arXiv:1805.04770.
Zhang et al.: Be Your Own Teacher, 2019, arXiv:1905.08094.
"""

import collections
import dataclasses
import functools
import time
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
from utils import batches, check_batch_size, count_params, predict, predict_by_index, take_labels


@dataclasses.dataclass(frozen=True)
class Config(experiment.CommonFlags):
    output_dir: str = "runs/18_self_distillation"
    """Folder for results, figure, weights and checkpoints."""
    seed: Seed = 42
    """Seed of the first repetition: labelled images, initial weights, order of batches. Seeds of
    generations and twins derive from it."""
    seeds: Annotated[int | None, Range(1, 100), OPEN] = None
    """Number of repetitions, with seeds one after another (default: 1)."""
    labels: Annotated[int | Literal["all"] | None, Range(10), OPEN] = None
    """Labelled images, or all (default: 1000; digits and quick 100)."""
    epochs: Annotated[int | None, Range(0, 10_000), OPEN] = None
    """Epochs of each network (default: by the number of labels; digits and quick 120)."""
    batch_size: Annotated[int | None, Range(1), OPEN] = None
    """Images in a batch (default: 128, digits and quick 32, or all there are)."""
    learning_rate: Annotated[float | None, Range(0, low_excluded=True), OPEN] = None
    """Peak learning rate (default: by the number of labels; digits and quick 1e-2; 1e-3
    with a constant schedule)."""
    schedule: Literal["onecycle", "constant"] = "onecycle"
    """Course of the learning rate: rising and falling in one cycle, or constant."""
    generations: Annotated[int | None, Range(1, 10), OPEN] = None
    """Number of generations born again after the baseline (default: 3; quick 1)."""
    temperature: Annotated[float, Range(0.001, 10_000)] = 3.0
    """Temperature T of the self-distilled copy and of the exits. Generations have T = 1."""
    alpha: Annotated[float, Range(0, 1)] = 0.5
    """Weight of the labels wherever there is a teacher; the teacher has 1 - alpha."""


# %% Models
# `StudentCNN`, 56,810 parameters, is the baseline, each generation, each twin and each control.
# `ExitCNN` has a small classifier, an exit, behind each of its three blocks. An answer of the first
# exit costs the first block only.


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


class ExitCNN(nnx.Module):
    """Three blocks, a small classifier (exit) behind each: [B, 28, 28, 1] to [3, B, classes]."""

    def __init__(self, num_classes=10, *, rngs):
        self.blocks = nnx.List()
        self.exits = nnx.List()
        for channels_in, channels_out in ((1, 16), (16, 32), (32, 64)):
            norm = nnx.BatchNorm(channels_out, momentum=0.9, rngs=rngs)
            layer = nnx.Conv(channels_in, channels_out, (3, 3), rngs=rngs)
            self.blocks.append(nnx.List([layer, norm]))
            dense1 = nnx.Linear(channels_out * 3 * 3, 64, rngs=rngs)
            dense2 = nnx.Linear(64, num_classes, rngs=rngs)
            self.exits.append(nnx.Sequential(dense1, nnx.relu, dense2))

    def __call__(self, x, train=False):
        logits = []
        for (layer, norm), classifier in zip(self.blocks, self.exits, strict=True):
            x = max_pool(nnx.relu(norm(layer(x), use_running_average=not train)))
            small = x
            while small.shape[1] > 3:  # every exit sees 3×3
                small = max_pool(small)
            logits.append(classifier(small.reshape(x.shape[0], -1)))
        return jnp.stack(logits)


# %% Losses of one student
# `distillation_loss` is the loss of script 15, here with a teacher of the student's own shape. At
# T = 1 it is what Furlanello et al. (2018) call "BAN+L", born again with labels.


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


# %% Two controls
# Where does a gain come from? One control keeps only how sure the teacher is of each image. The
# other keeps the shape of its doubt, but no longer says to which classes the doubt goes.


def weighted_hard_loss(logits, labels, weights):
    """Cross-entropy of logits [B, C] with labels [B], the mean weighted by weights [B].

    With the teacher's confidence as weights it is "confidence weighted by teacher max" of
    Furlanello et al. (2018). Raises ValueError where the shapes do not fit.
    """
    logits = at_least_float32(logits)
    weights = at_least_float32(weights)
    if not jnp.shape(labels) == weights.shape == logits.shape[:-1]:
        shapes = f"logits {logits.shape}, labels {jnp.shape(labels)} and weights {weights.shape}"
        raise ValueError(f"{shapes} must be [B, C], [B], [B]")
    # Σ wᵢ · −log pᵢ[labelᵢ] / Σ wᵢ
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.average(losses, weights=weights)


def permute_dark_knowledge(logits, rng):
    """Shuffles each row of [N, C] but for its largest entry ("with permuted predictions")."""
    largest = logits.argmax(-1)
    others = np.arange(logits.shape[1]) != largest[:, None]  # [N, C]
    shuffled = rng.permuted(logits[others].reshape(len(logits), -1), axis=1)
    permuted = logits.copy()
    permuted[others] = shuffled.ravel()
    return permuted


# %% Loss of a network with exits
# The last exit learns from the labels alone and teaches the others. Its logits are a constant in
# what they learn (`soft_loss` stops the gradient), so no gradient reaches it through its soft
# targets. Each block learns from every exit behind it.


def exits_loss(exit_logits, labels, early_weight, temperature, alpha):
    """The loss of Zhang et al. (2019), from logits [E, B, C] of E exits and labels [B], without
    their third term, which draws the features of the early blocks to those of the last.

    With alpha = 1 no exit teaches. With early_weight = 0 the early exits do not learn at all.
    """
    *early_logits, last_logits = exit_logits  # [B, C] each
    loss = hard_loss(last_logits, labels)
    for logits in early_logits:
        # early · (α · −log p_k[label] + (1 − α) · T² · KL(p_last ‖ p_k)), p_last as a constant
        early_loss, _, _ = distillation_loss(logits, last_logits, labels, temperature, alpha)
        loss += early_weight * early_loss
    return loss


# %% Steps
# The first two are those of script 15: on labels alone, and on labels and a teacher, who is frozen:
# its logits, or its confidence, come with the batch, since it was asked once (`teacher` is None in
# this script). Only within a network with exits does the teacher, its last exit, go on learning.


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
def train_weighted_step(model, optimizer, batch):
    """One step on the labels, each image with its "weight". Returns the scalar loss."""

    def loss_fn(model):
        logits = model(batch["image"], train=True)
        return weighted_hard_loss(logits, batch["label"], batch["weight"])

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return {"loss": loss}


@nnx.jit
def train_exits_step(network, optimizer, batch, early_weight, temperature, alpha):
    """One step of a network with exits. Returns the scalar loss."""

    def loss_fn(network):
        exit_logits = network(batch["image"], train=True)
        return exits_loss(exit_logits, batch["label"], early_weight, temperature, alpha)

    loss, grads = nnx.value_and_grad(loss_fn)(network)
    optimizer.update(network, grads)
    return {"loss": loss}


# %% Training
# Four ways to train, and each begins with fresh weights: nothing but answers comes from a teacher.
# To save time, these many networks are scored only once, when all of them are trained.


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


def train_born_again(name, teacher_logits, labelled, classes, recipe, run, temperature, alpha):
    """Trains a fresh student on labels and a teacher, whose logits are a table by image index."""
    experiment.print_heading(f"{name.upper()}: labels and a teacher, T = {temperature:g}")
    student = StudentCNN(classes, rngs=nnx.Rngs(recipe.seed))  # no weight comes from the teacher
    optimizer = make_optimizer(student, recipe, len(labelled.label))
    step = compile_step(train_student_step, student, None, optimizer)

    training = Training(run, name, student, optimizer, recipe, labelled)
    for epoch in training.epochs():
        for batch in batches(
            labelled, recipe.batch_size, recipe.seed, epoch, teacher_logits=teacher_logits
        ):
            training.log(step(batch, temperature, alpha))
    return student


def train_confidence_weighted(name, confidence, labelled, classes, recipe, run):
    """Trains a student on labels. A teacher's confidence, a table by index, weights the images."""
    experiment.print_heading(f"{name.upper()}: labels, weighted by the teacher's confidence")
    student = StudentCNN(classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(student, recipe, len(labelled.label))
    step = compile_step(train_weighted_step, student, optimizer)

    training = Training(run, name, student, optimizer, recipe, labelled)
    for epoch in training.epochs():
        for batch in batches(labelled, recipe.batch_size, recipe.seed, epoch, weight=confidence):
            training.log(step(batch))
    return student


def train_exits(name, labelled, classes, recipe, run, early_weight, temperature, alpha):
    """Trains a network with three exits. With alpha = 1 the labels alone teach them."""
    experiment.print_heading(f"{name.upper()}: one network with three exits")
    network = ExitCNN(classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(network, recipe, len(labelled.label))
    step = compile_step(train_exits_step, network, optimizer)

    training = Training(run, name, network, optimizer, recipe, labelled)
    for epoch in training.epochs():
        for batch in batches(labelled, recipe.batch_size, recipe.seed, epoch):
            training.log(step(batch, early_weight, temperature, alpha))
    return network


# %% Settings
# What a flag leaves open is chosen here. Epochs and learning rates are those of script 15's
# students, searched on validation images, though not for networks with exits
# (docs/provenance.md).


def fill_in_defaults(config, data):
    """The config with a value for every flag that was left open, but those of `student_recipe`."""
    config = experiment.with_defaults(config, seeds=1)
    if config.quick:
        config = experiment.with_defaults(config, labels=100, generations=1)
    if data.name == "digits":
        config = experiment.with_defaults(config, labels=100)
    return experiment.with_defaults(config, labels=1000, generations=3)


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


def recipe_of_generation(recipe, generation):
    """The same recipe with a seed of its own. The baseline is generation 0."""
    # Far from the seeds that anyone would choose for another run.
    seed = (recipe.seed + 1_000_003 * generation) % 2**32
    return recipe._replace(seed=seed)


# %% The networks of one repetition
# All see the same labelled images. A twin has the start and the batches of the generation of its
# number, but no teacher. The self-distilled copy and both controls have those of generation 1.


def train_all_students(labelled, classes, recipe, config, run):
    """Trains all students of one repetition. Returns them by name, and by name as well what their
    teachers say: tables of logits, by image index."""
    networks = {}
    teacher_logits = {}

    experiment.print_heading("BASELINE: labels alone")
    networks["baseline"] = train_student_on_labels("baseline", labelled, classes, recipe, run)
    baseline_logits = predict_by_index(networks["baseline"], labelled)
    teacher_logits["baseline"] = baseline_logits

    # Like generation 1, but with T = --temperature instead of 1.
    recipe_1 = recipe_of_generation(recipe, 1)
    networks["self-distilled"] = train_born_again(
        "self-distilled", baseline_logits, labelled, classes, recipe_1, run,
        temperature=config.temperature, alpha=config.alpha,
    )  # fmt: skip

    # Each generation is the teacher of the next one.
    previous_logits = baseline_logits
    for k in range(1, config.generations + 1):
        recipe_k = recipe_of_generation(recipe, k)
        generation = f"generation {k}"
        networks[generation] = train_born_again(
            generation, previous_logits, labelled, classes, recipe_k, run,
            temperature=1.0, alpha=config.alpha,
        )  # fmt: skip
        twin = f"twin {k}"
        experiment.print_heading(f"{twin.upper()}: labels alone")
        networks[twin] = train_student_on_labels(twin, labelled, classes, recipe_k, run)
        previous_logits = predict_by_index(networks[generation], labelled)
        teacher_logits[generation] = previous_logits

    # Two controls of generation 1, with the baseline as their teacher.
    confidence = np.asarray(jax.nn.softmax(baseline_logits).max(-1))
    networks["confidence-weighted"] = train_confidence_weighted(
        "confidence-weighted", confidence, labelled, classes, recipe_1, run
    )
    rng = np.random.default_rng([recipe.seed, 10])
    permuted_logits = permute_dark_knowledge(baseline_logits, rng)
    networks["permuted"] = train_born_again(
        "permuted", permuted_logits, labelled, classes, recipe_1, run,
        temperature=1.0, alpha=config.alpha,
    )  # fmt: skip
    teacher_logits["permuted"] = permuted_logits
    return networks, teacher_logits


def train_networks_with_exits(labelled, classes, recipe, config, run):
    """Trains a network with exits in three ways, from one start and on the same batches. Returns
    them by name."""
    networks = {}
    networks["last exit only"] = train_exits(
        "last exit only", labelled, classes, recipe, run,
        early_weight=0.0, temperature=1.0, alpha=1.0,
    )  # fmt: skip
    networks["exits on labels"] = train_exits(
        "exits on labels", labelled, classes, recipe, run,
        early_weight=1.0, temperature=1.0, alpha=1.0,
    )  # fmt: skip
    networks["exits self-taught"] = train_exits(
        "exits self-taught", labelled, classes, recipe, run,
        early_weight=1.0, temperature=config.temperature, alpha=config.alpha,
    )  # fmt: skip
    return networks


# %% Results
# A row for each student, for two ensembles of as many students, and for each exit that was trained.
# Generations have seeds of their own, so a row also has its "repetition", the seed of the baseline.
# An ensemble of twins is what an ensemble of generations has to beat: any networks gain together.


def add_rows_of_students(networks, recipe, config, run):
    """Scores the students, and two ensembles: the baseline with all generations, or all twins."""
    test_logits = {name: predict(network, run.data.test) for name, network in networks.items()}
    for name, network in networks.items():
        run.add_row(name, network, test_logits[name], repetition=recipe.seed)
    for kind in ("generation", "twin"):
        members = ["baseline"]
        for k in range(1, config.generations + 1):
            members.append(f"{kind} {k}")
        # As one module the ensemble counts as a network that had no training of its own.
        ensemble = nnx.List([networks[name] for name in members])
        log_probs = average_log_probs([test_logits[name] for name in members])
        run.add_row(
            f"ensemble of {kind}s", ensemble, log_probs, seed=recipe.seed, repetition=recipe.seed
        )


def average_log_probs(logits_of_members):
    """The logarithm of the members' mean probabilities (soft voting), from logits [M, N, C]."""
    log_probs = jax.nn.log_softmax(np.stack(logits_of_members))
    # log 1/M Σ p_m, without the underflow of a tiny probability
    return np.asarray(jax.nn.logsumexp(log_probs, axis=0) - np.log(len(log_probs)))


def add_rows_of_exits(networks, recipe, run):
    """Scores each exit that was trained. The last one's row has the cost of the whole training."""
    for name, network in networks.items():
        exit_logits = predict(network, run.data.test)  # [3, N, C]
        last = len(exit_logits)
        trained = [last] if name == "last exit only" else range(1, last + 1)
        for k in trained:
            needed = (*network.blocks[:k], network.exits[k - 1])  # to compute exit k
            row_name = f"{name}: exit {k}"
            logits = exit_logits[k - 1]
            repetition = recipe.seed
            if k == last:
                params = count_params(needed)
                run.add_row(row_name, network, logits, params=params, repetition=repetition)
            else:
                run.add_row(row_name, needed, logits, seed=recipe.seed, repetition=repetition)


def mean_confidence(logits):
    """How sure a teacher is, the mean of its largest probabilities, from its logits [N, C]."""
    return float(np.asarray(jax.nn.softmax(logits).max(-1)).mean())


def list_comparisons(generations):
    """The names to compare: a network, and one that differs from it in nothing but the teaching."""
    pairs = [("self-distilled", "twin 1"), ("ensemble of generations", "ensemble of twins")]
    for k in range(1, generations + 1):
        pairs.append((f"generation {k}", f"twin {k}"))
    pairs.append(("confidence-weighted", "twin 1"))
    pairs.append(("permuted", "twin 1"))
    for k in (1, 2, 3):
        pairs.append((f"exits self-taught: exit {k}", f"exits on labels: exit {k}"))
    return pairs


@nnx.jit(static_argnums=2)
def compute_exit(network, images, k):
    """The logits of exit k, from 0 on. Compiled, it leaves out what lies behind that exit."""
    return network(images)[k]


def measure_exits(network, split, turns=30):
    """Milliseconds for 1,000 images up to each exit, medians over some turns."""
    images = jnp.array(np.resize(split.image, (1000, 28, 28, 1)) / np.float32(255))
    compute = nnx.cached_partial(compute_exit, network)
    seconds = np.empty((turns + 1, len(network.exits)))
    for turn in range(turns + 1):
        for k in range(len(network.exits)):  # one after another: a busy moment meets all
            begun = time.perf_counter()
            jax.block_until_ready(compute(images, k))
            seconds[turn, k] = time.perf_counter() - begun
    return 1000 * np.median(seconds[1:], axis=0)  # the first turn compiles


# %% Figure
# Every network that was taught, and the ensemble of such, against its twin. Exits are left out.


def draw(run, generations):
    """The gains over the twins."""
    gains = {}
    for name, twin in list_comparisons(generations):
        if "exit" not in name:
            gains[f"{name} − {twin}"] = np.subtract(run.accuracies(name), run.accuracies(twin))
    title = plots.title_of_gain(
        "Self-distilled copies", "twins",
        run.accuracies("self-distilled"), run.accuracies("twin 1"),
    )  # fmt: skip
    return plots.draw_gains(gains, title, over="twin")


# %% Main
# Each repetition draws labelled images of its own, and trains all networks on them. Its networks
# are then compared in pairs that differ in nothing but the teaching.


def main(config):
    run = experiment.start(config)
    data = run.data
    config = fill_in_defaults(config, data)
    run.config = config
    repetitions = []
    for seed in run.seeds(config.seeds):
        labelled = take_labels(data.train, config.labels, seed)
        repetitions.append((labelled, student_recipe(config, data, seed, len(labelled.label))))

    confidences = collections.defaultdict(list)
    for labelled, recipe in repetitions:
        experiment.print_heading(f"SEED {recipe.seed}, {len(labelled.label):,} LABELS")
        students, teacher_logits = train_all_students(labelled, data.classes, recipe, config, run)
        exit_networks = train_networks_with_exits(labelled, data.classes, recipe, config, run)
        add_rows_of_students(students, recipe, config, run)
        add_rows_of_exits(exit_networks, recipe, run)
        for name, logits in teacher_logits.items():
            confidences[name].append(mean_confidence(logits[labelled.index]))

    summary = {}
    differences = {}  # points, means over the seeds
    for name, other in list_comparisons(config.generations):
        summary[f"{name} − {other}"] = run.compare(name, other)
        points = np.mean(run.accuracies(name)) - np.mean(run.accuracies(other))
        differences[f"{name} - {other}"] = float(points)
    exit_milliseconds = measure_exits(exit_networks["exits self-taught"], data.test)
    times = [f"exit {k} {x:.1f} ms" for k, x in enumerate(exit_milliseconds, 1)]
    summary["Inference of self-taught exits, 1,000 images"] = ", ".join(times)

    figure = draw(run, config.generations)
    return run.finish(
        figure,
        summary,
        differences=differences,
        exit_milliseconds=exit_milliseconds.tolist(),
        teacher_confidence={name: float(np.mean(values)) for name, values in confidences.items()},
    )


if __name__ == "__main__":
    experiment.run_script(main, Config)
