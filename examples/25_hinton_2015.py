# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "numpy>=2.2,<3", "tqdm>=4.66,<5", "tyro>=1.0.8,<2", "typeguard>=4,<5", "filelock>=3.20,<5",
#   "matplotlib>=3.9,<4", "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""Hinton, Vinyals and Dean (2015), Section 3: the MNIST experiments of the paper.

A large network learns from shifted images and with dropout, and teaches a small one, which sees
neither, at a high temperature. Then digits are taken out of the transfer set, the images that the
student learns from: a student that has never seen a 3 still knows most of them. It knows more of
them when it is told how frequent they are.

    python examples/25_hinton_2015.py             # one seed: about 10 minutes on 2 CPU cores
    python examples/25_hinton_2015.py --seeds 5   # five seeds, each with a large net of its own
    python examples/25_hinton_2015.py --quick     # a first look: about a minute

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531.
"""

import dataclasses
import functools
from typing import Annotated

import experiment
import jax
import jax.numpy as jnp
import numpy as np
import optax
import plots
from experiment import OPEN, Range, Recipe, Seed, Training
from fast import compile_step
from flax import nnx
from matplotlib.figure import Figure
from utils import (
    batches,
    check_batch_size,
    evaluate,
    paired_difference,
    predict,
    predict_by_index,
    require,
)


@dataclasses.dataclass(frozen=True)
class Config(experiment.CommonFlags):
    output_dir: str = "runs/25_hinton_2015"
    """Folder for results, figure, weights and checkpoints."""
    seed: Seed = 42
    """First seed: initial weights, order of batches, dropout and shifts, of all networks."""
    seeds: Annotated[int, Range(1, 100)] = 1
    """Number of repetitions, with seeds one after another, each with a large net of its own."""
    epochs: Annotated[int | None, Range(0, 10_000), OPEN] = None
    """Epochs of the small networks (default: 20; quick 4)."""
    batch_size: Annotated[int | None, Range(1), OPEN] = None
    """Images in a batch (default: 256; digits and quick 64)."""
    learning_rate: Annotated[float, Range(0, low_excluded=True)] = 8e-3
    """Peak learning rate of the networks that learn from the large one."""
    baseline_learning_rate: Annotated[float, Range(0, low_excluded=True)] = 2e-3
    """Peak learning rate of the small network on labels alone."""
    teacher_epochs: Annotated[int | None, Range(0, 10_000), OPEN] = None
    """Epochs of the large network (default: 100; quick 4)."""
    teacher_learning_rate: Annotated[float, Range(0, low_excluded=True)] = 4e-3
    """Peak learning rate of the large network."""
    input_dropout: Annotated[float, Range(0, 1, high_excluded=True)] = 0.0
    """Share of its inputs that the large network drops."""
    dropout: Annotated[float, Range(0, 1, high_excluded=True)] = 0.1
    """Share of its hidden units that the large network drops."""
    max_norm: Annotated[float, Range(0.001, 1_000_000)] = 2.0
    """Greatest length of the weights into one unit of the large network."""
    temperature: Annotated[float, Range(0.001, 10_000)] = 20.0
    """Temperature T of all distilled networks of 800 units."""
    alpha: Annotated[float, Range(0, 1)] = 0.3
    """Weight of the labels in the loss; the large network has 1 - alpha."""
    temperatures: Annotated[tuple[float, ...] | None, Range(0.001, 10_000), OPEN] = None
    """Temperatures of the distilled networks of 300 and 30 units, one after another (default: 1 2.5
    4 8 20 40; quick 1 8)."""
    units: Annotated[tuple[int, ...] | None, Range(1, 10_000), OPEN] = None
    """Units a layer of the networks that compare --temperatures (default: 300 30; quick 30)."""


PAPER = {  # what it reports, in errors on the 10,000 test images of MNIST
    "large net": 67,
    "small net": 146,
    "distilled": 74,
    "no threes": 206,
    "no threes, best bias in hindsight": 109,  # the paper's, too, was chosen on test images
    "only 7s and 8s": 4730,
    "only 7s and 8s, best bias in hindsight": 1320,
}


# %% Model
# All networks are of one class. The large net has 1,200 units a layer and dropout, the small ones
# have 800, 300 or 30 and no dropout.


class DenseNet(nnx.Module):
    """Two hidden layers of rectified linear units: [B, 28, 28, 1] to logits [B, classes]."""

    def __init__(self, units, num_classes=10, input_dropout=0.0, dropout=0.0, *, rngs):
        # Small, since the weights of pixels that are never lit stay as they are.
        small = nnx.initializers.normal(0.01)
        self.dense1 = nnx.Linear(28 * 28, units, kernel_init=small, rngs=rngs)
        self.dense2 = nnx.Linear(units, units, kernel_init=small, rngs=rngs)
        self.dense3 = nnx.Linear(units, num_classes, rngs=rngs)
        self.input_dropout = nnx.Dropout(input_dropout, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x, train=False):
        x = x.reshape(x.shape[0], -1)
        x = self.input_dropout(x, deterministic=not train)
        x = self.dropout(nnx.relu(self.dense1(x)), deterministic=not train)
        x = self.dropout(nnx.relu(self.dense2(x)), deterministic=not train)
        return self.dense3(x)


# %% Jitter
# The large net sees every image at another place in every epoch. What it learns from that can
# reach the small ones only through its answers: they never see a shifted image.


def jitter(image, rng, pixels=2):
    """Shifts each of the images [N, H, W, 1] by up to so many pixels, down or up and right or left.

    All shifts are equally probable, and what comes in at the edge is background, 0.
    """
    height, width = image.shape[1:3]
    padded = np.pad(image, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    corner = rng.integers(2 * pixels + 1, size=(len(image), 2))  # of what is kept, in `padded`
    shifted = np.empty_like(image)
    for y, x in np.ndindex(2 * pixels + 1, 2 * pixels + 1):
        chosen = (corner == (y, x)).all(axis=1)
        shifted[chosen] = padded[chosen, y : y + height, x : x + width]
    return shifted


# %% Loss
# Two parts: what the label says, and what the large net says. Logits of low precision are taken to
# float32 first, where its small probabilities survive.


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
# `train_step` learns from the labels alone: the large net, and the small net without a teacher.
# `train_student_step` distils. The large net is frozen: its logits come with the batch, and
# `teacher` is None in this script.


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


# %% Optimizers
# All networks are trained by Adam. The weights of the large net are also kept from growing, which
# Hinton et al. (2012, arXiv:1207.0580) do together with dropout.


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


@functools.cache
def constrain_weights(transform, max_norm):
    """The same updates, but the weights that come into a unit are scaled down to the length
    `max_norm` where they would be longer. Kernels are [inputs, units]; biases are free."""

    def shorten(update, weights):
        if weights.ndim != 2:
            return update
        # w ← w · min(1, max_norm / ‖w‖), for the weights w into each unit
        moved = weights + update
        shorter = moved * jnp.minimum(1, max_norm / jnp.linalg.norm(moved, axis=0))
        return shorter - weights

    return optax.chain(transform, optax.stateless_with_tree_map(shorten))


# %% Training
# Three ways to train: the large net on shifted images and their labels, the small net on labels
# alone, and a net of any width on labels and the large net's answers. `Training` shows progress,
# keeps checkpoints and takes down what was measured. `compile_step` is `nnx.cached_partial`: it
# fills network and optimizer in, so that `step(batch)` is `train_step(network, optimizer, batch)`.


def train_large_net(data, recipe, run, input_dropout, dropout, max_norm):
    """Trains the net of 1,200 units on labels, with dropout, shifted images and short weights."""
    network = DenseNet(1200, data.classes, input_dropout, dropout, rngs=nnx.Rngs(recipe.seed))
    steps = recipe.epochs * (len(data.train.label) // recipe.batch_size)
    transform = make_transform(recipe.learning_rate, recipe.schedule, steps)
    optimizer = nnx.Optimizer(network, constrain_weights(transform, max_norm), wrt=nnx.Param)
    step = compile_step(train_step, network, optimizer)

    training = Training(run, "large net", network, optimizer, recipe, data.train)
    for epoch in training.epochs():
        rng = np.random.default_rng([recipe.seed, 25, epoch])
        shifted = data.train._replace(image=jitter(data.train.image, rng))
        for batch in batches(shifted, recipe.batch_size, recipe.seed, epoch):
            training.log(step(batch))
        training.score(data.scored_on, evaluate, network, data.test)
    return network


def train_small_net(data, recipe, run):
    """Trains the net of 800 units on the labels of all training images, not regularised."""
    network = DenseNet(800, data.classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(network, recipe, len(data.train.label))
    step = compile_step(train_step, network, optimizer)

    training = Training(run, "small net", network, optimizer, recipe, data.train)
    for epoch in training.epochs():
        for batch in batches(data.train, recipe.batch_size, recipe.seed, epoch):
            training.log(step(batch))
        training.score(data.scored_on, evaluate, network, data.test)
    return network


def train_distilled_net(
    name, units, teacher_logits, data, transfer_set, recipe, run, temperature, alpha
):
    """Trains a net on the labels of the images of `transfer_set`, and on the large net's logits for
    them: the rows of `teacher_logits` [N, C] at the images' indices."""
    network = DenseNet(units, data.classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(network, recipe, len(transfer_set.label))
    step = compile_step(train_student_step, network, None, optimizer)
    tables = {"teacher_logits": teacher_logits}

    training = Training(run, name, network, optimizer, recipe, transfer_set)
    for epoch in training.epochs():
        for batch in batches(transfer_set, recipe.batch_size, recipe.seed, epoch, **tables):
            training.log(step(batch, temperature, alpha))
        training.score(data.scored_on, evaluate, network, data.test)
    return network


# %% Biases
# A class that the transfer set lacks is too rarely the answer. One number, added to its bias, mends
# much of that. The paper chose the number on the test images. Here the class becomes as frequent
# among the answers to the training images as among their labels: the labels are counted, not
# matched to the images.


def find_margins(logits, classes):
    """What would have to be added to the logits of `classes` for the largest of them to be the
    answer: [N] from logits [N, C]."""
    is_chosen = np.isin(np.arange(logits.shape[1]), classes)
    return logits[:, ~is_chosen].max(axis=1) - logits[:, is_chosen].max(axis=1)


def find_bias_for_share(logits, classes, share):
    """What to add to the biases of `classes` for them to be this share of all answers, from 0 to 1,
    to the images that logits [N, C] are of."""
    # An answer is among the classes if its margin is below the bias.
    return float(np.quantile(find_margins(logits, classes), share))


def find_best_bias(logits, classes, labels):
    """What to add to the biases of `classes` for the fewest errors against the labels [N] of the
    images that logits [N, C] are of."""
    is_chosen = np.isin(np.arange(logits.shape[1]), classes)
    answer_among = np.where(is_chosen, logits, -np.inf).argmax(axis=1)
    answer_outside = np.where(is_chosen, -np.inf, logits).argmax(axis=1)
    # Errors that an image adds when its answer comes to be among the classes: -1, 0 or 1.
    added_errors = (answer_among != labels).astype(int) - (answer_outside != labels)

    # From a very low bias up, the answers come to be among the classes in order of their margins.
    margins = find_margins(logits, classes)
    order = np.argsort(margins)
    errors = np.cumsum([0, *added_errors[order]])  # [N + 1], but for a constant
    edges = np.concatenate([[margins.min() - 1], margins[order], [margins.max() + 1]])
    best = errors.argmin()  # any bias between these two edges has as few
    return float(edges[best : best + 2].mean())


def add_to_biases(network, classes, amount):
    """A copy of a network, with `amount` added to its biases of `classes`."""
    changed = nnx.clone(network)
    bias = changed.dense3.bias
    bias[...] = bias[...].at[np.array(classes)].add(amount)
    return changed


# %% Settings
# What a flag leaves open is chosen here. Dropout, learning rates, epochs and alpha were searched on
# validation images. The search of the small net's rate began because of its test errors
# (docs/provenance.md).


def fill_in_defaults(config, data):
    """The config with a value for every flag that was left open."""
    if config.quick:
        config = experiment.with_defaults(
            config, epochs=4, teacher_epochs=4, batch_size=64, temperatures=(1.0, 8.0), units=(30,)
        )
    if data.name == "digits":
        config = experiment.with_defaults(config, batch_size=64)
    config = experiment.with_defaults(config, epochs=20, teacher_epochs=100, batch_size=256)
    temperatures = (1.0, 2.5, 4.0, 8.0, 20.0, 40.0)
    return experiment.with_defaults(config, temperatures=temperatures, units=(300, 30))


def large_net_recipe(config, seed):
    """How the large net is trained."""
    rate = config.teacher_learning_rate
    return Recipe(seed, config.teacher_epochs, config.batch_size, rate, "onecycle")


def small_net_recipe(config, seed):
    """How the small net is trained on labels alone, with a learning rate that suits it."""
    rate = config.baseline_learning_rate
    return Recipe(seed, config.epochs, config.batch_size, rate, "onecycle")


def distilled_net_recipe(config, seed):
    """How all networks are trained that learn from the large net."""
    return Recipe(seed, config.epochs, config.batch_size, config.learning_rate, "onecycle")


# %% One seed
# A large net, the small net with and without its help, students that some digits were never
# shown, and students of several temperatures. All small nets of one width have the same initial
# weights. All students of a seed are taught by that seed's large net.


def run_one_seed(run, config, seed):
    """Trains all networks of a seed, and adds their rows to the results."""
    data = run.data
    images = f"seed {seed}, {len(data.train.label):,} images"
    experiment.print_heading(f"LARGE NET: {images}")
    large_net = train_large_net(
        data, large_net_recipe(config, seed), run,
        config.input_dropout, config.dropout, config.max_norm,
    )  # fmt: skip
    # Its answers to the training images as they are, in inference mode: they never change.
    teacher_logits = predict_by_index(large_net, data.train)
    # Its answers to the test images, with which those of the others are compared.
    teacher_test_logits = predict(large_net, data.test)
    add_scores(run, "large net", large_net, teacher_test_logits, seed)

    experiment.print_heading(f"SMALL NET: {images}, no teacher")
    small_net = train_small_net(data, small_net_recipe(config, seed), run)
    add_scores(run, "small net", small_net, teacher_test_logits, seed)

    experiment.print_heading(f"DISTILLED: {images}")
    distilled = train_distilled_net(
        "distilled", 800, teacher_logits, data, data.train,
        distilled_net_recipe(config, seed), run, config.temperature, config.alpha,
    )  # fmt: skip
    add_scores(run, "distilled", distilled, teacher_test_logits, seed)

    leave_out_threes(run, config, seed, teacher_logits, teacher_test_logits)
    leave_only_sevens_and_eights(run, config, seed, teacher_logits, teacher_test_logits)
    compare_temperatures(run, config, seed, teacher_logits, teacher_test_logits)


def leave_out_threes(run, config, seed, teacher_logits, teacher_test_logits):
    """Distils with no 3 in the transfer set, then makes 3 a more frequent answer."""
    data = run.data
    transfer_set = data.train.take(data.train.label != 3)
    experiment.print_heading(f"NO THREES: seed {seed}, {len(transfer_set.label):,} images")
    network = train_distilled_net(
        "no threes", 800, teacher_logits, data, transfer_set,
        distilled_net_recipe(config, seed), run, config.temperature, config.alpha,
    )  # fmt: skip
    add_scores(run, "no threes", network, teacher_test_logits, seed)

    bias, best_bias = choose_biases(network, data, (3,))
    mended = add_to_biases(network, (3,), bias)
    best = add_to_biases(network, (3,), best_bias)
    name, best_name = "no threes, bias of 3 raised", "no threes, best bias in hindsight"
    add_scores(run, name, mended, teacher_test_logits, seed, added_to_biases=bias)
    add_scores(run, best_name, best, teacher_test_logits, seed, added_to_biases=best_bias)


def leave_only_sevens_and_eights(run, config, seed, teacher_logits, teacher_test_logits):
    """Distils with nothing but 7s and 8s in the transfer set, then makes them rarer answers."""
    data = run.data
    transfer_set = data.train.take(np.isin(data.train.label, (7, 8)))
    experiment.print_heading(f"ONLY 7S AND 8S: seed {seed}, {len(transfer_set.label):,} images")
    network = train_distilled_net(
        "only 7s and 8s", 800, teacher_logits, data, transfer_set,
        distilled_net_recipe(config, seed), run, config.temperature, config.alpha,
    )  # fmt: skip
    add_scores(run, "only 7s and 8s", network, teacher_test_logits, seed)

    bias, best_bias = choose_biases(network, data, (7, 8))  # one number for both, as in the paper
    mended = add_to_biases(network, (7, 8), bias)
    best = add_to_biases(network, (7, 8), best_bias)
    name, best_name = "only 7s and 8s, biases lowered", "only 7s and 8s, best bias in hindsight"
    add_scores(run, name, mended, teacher_test_logits, seed, added_to_biases=bias)
    add_scores(run, best_name, best, teacher_test_logits, seed, added_to_biases=best_bias)


def compare_temperatures(run, config, seed, teacher_logits, teacher_test_logits):
    """Distils into smaller networks, at several temperatures."""
    data = run.data
    for units in config.units:
        for temperature in config.temperatures:
            name = name_at_temperature(units, temperature)
            experiment.print_heading(f"{name.upper()}: seed {seed}")
            network = train_distilled_net(
                name, units, teacher_logits, data, data.train,
                distilled_net_recipe(config, seed), run, temperature, config.alpha,
            )  # fmt: skip
            add_scores(run, name, network, teacher_test_logits, seed)


def name_at_temperature(units, temperature):
    return f"{units} units at T = {temperature:.12g}"


def choose_biases(network, data, classes):
    """What to add to a network's biases of `classes`: for the frequency that they have among the
    training images and, in hindsight, for the fewest errors on the test images."""
    share = np.isin(data.train.label, classes).mean()
    bias = find_bias_for_share(predict(network, data.train), classes, share)
    best_bias = find_best_bias(predict(network, data.test), classes, data.test.label)
    return bias, best_bias


def add_scores(run, name, network, teacher_test_logits, seed, added_to_biases=0.0):
    """Adds a row to the results: how a network does on the test images, and on threes of them."""
    test = run.data.test
    logits = predict(network, test)
    is_three = test.label == 3
    errors_on_threes = int((logits[is_three].argmax(axis=1) != 3).sum())
    run.add_row(
        name, network, logits, seed=seed, teacher_logits=teacher_test_logits,
        errors_on_threes=errors_on_threes, added_to_biases=added_to_biases,
    )  # fmt: skip


# %% Main
# Everything is repeated for every seed. The figure and the summary show the results beside those of
# the paper.


def main(config):
    run = experiment.start(config, share_batches=False)
    data = run.data
    config = fill_in_defaults(config, data)
    run.config = config
    has_digits = np.isin((3, 7, 8), data.train.label).all()
    need = "this experiment needs images of the classes 3, 7 and 8"
    require(has_digits, f"--dataset {config.dataset}: {need}")
    smallest = int(np.isin(data.train.label, (7, 8)).sum())  # of all transfer sets
    check_batch_size("--batch-size", config.batch_size, smallest)

    for seed in run.seeds(config.seeds):
        run_one_seed(run, config, seed)
    return run.finish(draw(run), summarize(run))


def summarize(run):
    """The lines of the summary: what distillation and the biases were worth, and the paper's."""
    threes = int((run.data.test.label == 3).sum())
    wrong_threes = np.mean(run.values("no threes, bias of 3 raised", "errors_on_threes"))
    lines = {
        "Distilled above small net": run.compare("distilled", "small net"),
        "Distilled above large net": run.compare("distilled", "large net"),
        "Bias of 3 raised: gain": run.compare("no threes, bias of 3 raised", "no threes"),
        "Biases of 7, 8 lowered: gain": run.compare(
            "only 7s and 8s, biases lowered", "only 7s and 8s"
        ),
        "With bias of 3 raised, on threes": f"{wrong_threes:,.0f} of {threes:,} wrong",
        "Added to bias of 3": describe_biases(run, "no threes", "bias of 3 raised"),
        "Added to biases of 7 and 8": describe_biases(run, "only 7s and 8s", "biases lowered"),
    }
    for name, errors in PAPER.items():
        lines[f"The paper, {name}"] = f"{errors:>6,} wrong of MNIST's 10,000 test images"
    return lines


def describe_biases(run, name, mended):
    """In words: what was added to the biases, and what would have been best; means over seeds."""
    bias = np.mean(run.values(f"{name}, {mended}", "added_to_biases"))
    best_bias = np.mean(run.values(f"{name}, best bias in hindsight", "added_to_biases"))
    return f"{bias:+.1f}; best in hindsight {best_bias:+.1f}"


def draw(run):
    """Errors in percent of every seed, the mean and its 95 % interval, beside the paper's."""
    names = list(dict.fromkeys(row["name"] for row in run.rows if "units" not in row["name"]))
    errors = {name: plots.to_errors(run.accuracies(name), run.data) for name in names}
    names.sort(key=lambda name: errors[name].mean())
    colours = {"large net": plots.COLOURS["teacher"], "small net": plots.COLOURS["baseline"]}

    figure = Figure(figsize=(plots.WIDTH, 4.4), layout="constrained")
    axes = figure.subplots()
    for y, name in enumerate(names):
        colour = colours.get(name, plots.COLOURS["distilled"])
        mean = None
        if len(errors[name]) > 1:
            # Of the logarithms, as the axis has them: an interval that cannot pass below 0.
            log = paired_difference(np.log(errors[name]), np.zeros(len(errors[name])))
            mean = log._replace(mean=np.exp(log.mean), low=np.exp(log.low), high=np.exp(log.high))
        plots.draw_row(axes, y, errors[name], mean, colour)
    paper = np.array(list(PAPER.values())) / 100  # of 10,000 images, in percent
    places = [names.index(name) for name in PAPER]
    axes.plot(paper, places, "kD", fillstyle="none", label="the paper, on MNIST")
    black = "; black: geometric mean and 95 % interval"
    axes.set_xlabel(f"{run.data.scored_on} errors, %\n(dots: seeds{black})")
    axes.set_xscale("log")
    plots.write_out_numbers(axes.xaxis)
    axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    axes.legend()
    title = plots.title_of_gain(
        "Distilled nets", "small nets", run.accuracies("distilled"), run.accuracies("small net")
    )
    figure.suptitle(title, fontsize="large")
    return figure


if __name__ == "__main__":
    experiment.run_script(main, Config)
