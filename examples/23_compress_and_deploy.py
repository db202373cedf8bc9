# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "qwix>=0.1.8,<0.2", "numpy>=2.2,<3", "tqdm>=4.66,<5", "tyro>=1.0.8,<2", "typeguard>=4,<5",
#   "filelock>=3.20,<5", "matplotlib>=3.9,<4", "scipy>=1.14,<2", "scikit-learn>=1.6,<2",
#   "importlib_resources>=6,<8", "tensorflow-datasets>=4.9.10,<5"]
# ///
"""A student is made to be shipped: how small does it get, and does the teacher help it there?

A teacher learns from all labels. Then two students are trained: a baseline that never has a
teacher, and a distilled student. Each is pruned (the smallest weights become 0), quantised (weights
and activations become int8, after training or in training), or both. For the distilled student this
is done twice: with its teacher, and with the teacher left out meanwhile. All are exported as
StableHLO and ONNX, and the files are weighed. Every ONNX file is compared with its network on all
test images. For the teacher, and for the first seed's students that kept it, the StableHLO file is
compared, too, and both are timed.

    python examples/23_compress_and_deploy.py               # one seed: 9 to 17 minutes
    python examples/23_compress_and_deploy.py --sparsities 0.8 0.95        # two sparsities
    python examples/23_compress_and_deploy.py --quick       # a first look: about 2 minutes

Times are for 2 CPU cores, from faster to slower ones. ONNX needs packages of its own, without
which there is StableHLO alone: python -m pip install -r examples/requirements-export.txt
Zhu, Gupta: To Prune, or Not to Prune, 2017, arXiv:1710.01878. Jacob et al.: Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, 2018,
arXiv:1712.05877. Polino et al.: Model Compression via Distillation and Quantization, 2018,
arXiv:1802.05668.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import experiment
import jax
import jax.numpy as jnp
import numpy as np
import optax
import plots
import qwix
from experiment import OPEN, Range, Recipe, Seed, Training
from fast import compile_step, conv, max_pool  # same results as nnx's, faster on CPUs
from flax import nnx
from matplotlib.figure import Figure
from utils import (
    Split,
    UserError,
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
    output_dir: str = "runs/23_compress_and_deploy"
    """Folder for results, figure, weights, exported files and checkpoints."""
    seed: Seed = 42
    """First seed of the students: initial weights, order of batches."""
    seeds: Annotated[int, Range(1, 100)] = 1
    """Number of seeds, one after another. Latencies are those of the first."""
    sparsities: Annotated[
        tuple[float, ...],
        Range(0, 1, low_excluded=True, high_excluded=True),
    ] = (0.8,)
    """Shares of the weights that are pruned. The figure's title is about the first."""
    labels: Annotated[int | Literal["all"] | None, Range(10), OPEN] = None
    """Labelled images of the students, or all (default: all; digits and quick 100)."""
    epochs: Annotated[int | None, Range(0, 10_000), OPEN] = None
    """Epochs of the students before they are compressed (default: by the number of labels, 4 with
    all of MNIST; digits 120, quick 60)."""
    compression_epochs: Annotated[int | None, Range(1, 10_000), OPEN] = None
    """Epochs of each compression that trains (default: half as many)."""
    batch_size: Annotated[int | None, Range(1), OPEN] = None
    """Images in a batch (default: 128, digits and quick 32, or all there are)."""
    learning_rate: Annotated[float | None, Range(0, low_excluded=True), OPEN] = None
    """Students' peak learning rate (default: 4e-2 with less than 10,000 labels, 2e-2 with more;
    digits and quick 1e-2)."""
    compression_learning_rate: Annotated[float | None, Range(0, low_excluded=True), OPEN] = None
    """Peak learning rate of each compression that trains (default: 5e-3; 1e-3 with less than 10,000
    labels where the teacher is left out)."""
    temperature: Annotated[float, Range(0.001, 10_000)] = 3.0
    """Temperature T that softens the distributions of teacher and student."""
    alpha: Annotated[float, Range(0, 1)] = 0.5
    """Weight of the labels in the loss; the teacher has 1 - alpha."""
    teacher: Annotated[str | None, OPEN] = None
    """Output folder of a run whose teacher to take: of several, the one with --teacher-seed
    (default: train one)."""
    teacher_seed: Seed = 0
    """Seed of the teacher: initial weights, dropout, order of batches."""
    quick: bool = False
    """Take a first look, in about 2 minutes: fewer images and steps."""


# %% Models
# Teacher and student of script 15.


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
# `distillation_loss` is that of script 15.


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
# A student learns by `train_step` from the labels alone, by `train_student_step` from labels and
# teacher. The teacher is frozen: its logits come with the batch, from a table that is filled once.
# Both steps also train a student that is being compressed. They are those of script 15, and could
# have a teacher instead of the table, too.


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


# %% Pruning
# The weights with the smallest magnitude contribute least, and become 0. Pruned all at once, a
# network loses much; a little at a time, the rest learns to do without (Zhu and Gupta, 2017).

PRUNINGS = 50  # in a training, evenly spaced


def find_sparsity(progress, final_sparsity):
    """The share of weights to be pruned by now, at a progress of the training from 0 to 1. It rises
    fast at first, when much can go, and is the final one from the middle on."""
    # s(t) = s_final · (1 − (1 − t)³), with t from 0 to 1 in the first half
    t = min(1.0, 2 * progress)
    return final_sparsity * (1 - (1 - t) ** 3)


def prune(student, sparsity):
    """Sets a share of a student's weights to 0, those with the smallest magnitude over all layers
    together. Biases and BatchNorm, few numbers, keep theirs."""
    params = nnx.state(student, nnx.Param)
    kernels = [x for x in jax.tree.leaves(params) if x.ndim > 1]
    count = round(sparsity * sum(x.size for x in kernels))
    if count == 0:
        return
    magnitudes = np.sort(np.concatenate([np.abs(x).ravel() for x in kernels]))
    threshold = magnitudes[count - 1]

    def prune_array(x):
        if x.ndim <= 1:
            return x
        return jnp.where(np.abs(x) <= threshold, 0, x)

    nnx.update(student, jax.tree.map(prune_array, params))


def measure_sparsity(student):
    """The share of a student's weights that are 0, without biases and BatchNorm."""
    kernels = [x for x in jax.tree.leaves(nnx.state(student, nnx.Param)) if x.ndim > 1]
    zeros = sum(int((np.asarray(x) == 0).sum()) for x in kernels)
    return zeros / sum(x.size for x in kernels)


# Last in an optimizer's chain: a weight of 0, which was pruned, gets no update.
stay_pruned = optax.stateless_with_tree_map(
    lambda update, weight: jnp.where((weight == 0) & (weight.ndim > 1), 0, update)
)


# %% Quantisation
# int8 is the integers from −128 to 127. A weight w is kept as the integer nearest to w / s, with
# one scale s for each output channel, s = max|w| / 127.5. Activations are rounded likewise, with a
# scale for each image, found as it comes in. Post-training quantisation rounds once, at the end.
# Quantisation-aware training rounds in every step's forward pass, while the gradient passes through
# the rounding as if it were not there: the weights learn to tolerate it (Jacob et al., 2018). qwix
# does both to a Flax network. ONNX files are rounded by onnxruntime, which does it in another way.

INT8 = {"module_path": ".*", "weight_qtype": jnp.int8, "act_qtype": jnp.int8}
ONE_IMAGE = np.zeros((1, 28, 28, 1), np.float32)  # with which qwix finds its way through a network


# Each call of qwix makes a new class, for which everything would be compiled anew. `nnx.jit` and
# `functools.cache` see to it that there is one class after training, and one in training.


@nnx.jit
def quantize_after_training(student):
    """A copy of a student that computes with int8 weights and activations, in all four layers."""
    student = use_plain_conv(nnx.clone(student))
    provider = qwix.PtqProvider([qwix.QuantizationRule(**INT8)])
    return qwix.quantize_model(student, provider, ONE_IMAGE)


@functools.cache
def make_rounding_student(classes):
    """A student whose forward pass rounds weights and activations to int8, in training too."""
    student = use_plain_conv(StudentCNN(classes, rngs=nnx.Rngs(0)))
    provider = qwix.QtProvider([qwix.QtRule(**INT8)])
    # qwix need not see an image: in training there are no weights to be stored as int8.
    return qwix.quantize_model(student, provider, skip_nnx_init=True)


def use_plain_conv(student):
    """The student with JAX's own convolution. That is what qwix replaces: `fast.conv` would stay as
    it is. (`max_pool` only compares numbers, so there is nothing to round.)"""
    student.conv1.conv_general_dilated = jax.lax.conv_general_dilated
    return student


def copy_weights(source, target):
    """Copies weights and BatchNorm's statistics from one student to another. Returns the latter."""
    nnx.update(target, nnx.state(source, (nnx.Param, nnx.BatchStat)))
    return target


# %% Training
# Teacher and students first, as in script 15. Both students of a seed have the same initial weights
# and the same batches.


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


class Lesson(NamedTuple):
    """What a student learns from."""

    labelled: Split  # the images and their labels
    classes: int
    teacher_logits: np.ndarray | None  # looked up by an image's index; None: from labels alone
    temperature: float
    alpha: float


def make_step(student, optimizer, lesson):
    """What trains a student, `step(batch)`: on labels and teacher, or on labels alone."""
    if lesson.teacher_logits is None:
        return compile_step(train_step, student, optimizer)
    distil = compile_step(train_student_step, student, None, optimizer)  # no teacher: its logits
    return lambda batch: distil(batch, lesson.temperature, lesson.alpha)


def make_batches(lesson, recipe, epoch):
    """An epoch's batches, with the teacher's logits [B, C] if there are any."""
    tables = {}
    if lesson.teacher_logits is not None:
        tables["teacher_logits"] = lesson.teacher_logits
    return batches(lesson.labelled, recipe.batch_size, recipe.seed, epoch, **tables)


def train_dense(name, lesson, recipe, run):
    """Trains a student from fresh weights."""
    student = StudentCNN(lesson.classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(student, recipe, len(lesson.labelled.label))
    step = make_step(student, optimizer, lesson)

    training = Training(run, name, student, optimizer, recipe, lesson.labelled)
    for epoch in training.epochs():
        for batch in make_batches(lesson, recipe, epoch):
            training.log(step(batch))
    return student


# %% Training what is compressed
# A compression goes on from a trained student, with an optimizer of its own that leaves pruned
# weights alone. The steps are those of any training.


@functools.cache
def make_compression_transform(learning_rate, schedule, steps):
    """The optimizer of `make_transform`; a weight that is 0 stays 0."""
    return optax.chain(make_transform(learning_rate, schedule, steps), stay_pruned)


def make_compression_optimizer(student, recipe, images):
    """The optimizer for a compression, on so many images."""
    steps = recipe.epochs * (images // recipe.batch_size)
    transform = make_compression_transform(recipe.learning_rate, recipe.schedule, steps)
    return nnx.Optimizer(student, transform, wrt=nnx.Param)


def train_sparse(name, start, sparsity, lesson, recipe, run):
    """Prunes a trained student `start` little by little while it goes on learning. With a sparsity
    of 0 it only goes on learning."""
    student = nnx.clone(start)
    images = len(lesson.labelled.label)
    optimizer = make_compression_optimizer(student, recipe, images)
    step = make_step(student, optimizer, lesson)
    steps_an_epoch = images // recipe.batch_size
    steps_in_all = recipe.epochs * steps_an_epoch
    prune_every = max(1, steps_in_all // PRUNINGS)

    training = Training(run, name, student, optimizer, recipe, lesson.labelled)
    for epoch in training.epochs():
        steps_done = (epoch - 1) * steps_an_epoch
        for batch in make_batches(lesson, recipe, epoch):
            if steps_done % prune_every == 0:
                prune(student, find_sparsity(steps_done / steps_in_all, sparsity))
            training.log(step(batch))
            steps_done += 1
        # However few steps there were: what is kept after an epoch is pruned, the last one in full.
        prune(student, find_sparsity(epoch / recipe.epochs, sparsity))
    return student


# Part of what a checkpoint is known by: one of another qwix is not gone on with.
ROUNDED_BY = f"qwix {importlib.metadata.version('qwix')}"


def train_int8(name, start, lesson, recipe, run):
    """Trains a student to tolerate int8, from the weights of a trained one, `start`. Returns a
    student that rounds in its forward pass. What is pruned stays so."""
    student = nnx.clone(make_rounding_student(lesson.classes))
    copy_weights(start, student)
    optimizer = make_compression_optimizer(student, recipe, len(lesson.labelled.label))
    step = make_step(student, optimizer, lesson)

    training = Training(run, name, student, optimizer, recipe, lesson.labelled)
    training.notes["rounded_by"] = ROUNDED_BY
    for epoch in training.epochs():
        for batch in make_batches(lesson, recipe, epoch):
            training.log(step(batch))
    return student


# %% Export
# StableHLO is what JAX hands to its compiler. `jax.export` keeps it in a file, with the weights:
# whoever loads it needs JAX, but none of this code. ONNX is for other runtimes, in browsers and
# phones too. In both the number of images in a batch is left free; images are [B, 28, 28, 1], from
# 0 to 1, as in training.

EXPORTERS = ("jax2onnx", "onnx", "onnxruntime")
HAS_ONNX = all(importlib.util.find_spec(name) for name in EXPORTERS)
HOW_TO_HAVE_ONNX = (
    "python -m pip install -r examples/requirements-export.txt, then the same command"
)
IMAGE_SHAPE = (28, 28, 1)


def check_exporters():
    """Raises UserError, before anything is trained, if files could not be run on the CPU, or if a
    package for ONNX is installed, but cannot be imported."""
    try:
        jax.local_devices(backend="cpu")
    except RuntimeError:
        platforms = jax.config.jax_platforms
        cure = f"files are checked on the CPU; say JAX_PLATFORMS={platforms},cpu"
        raise UserError(f"JAX_PLATFORMS {platforms}: {cure}") from None
    if not HAS_ONNX:
        return
    for module in ("onnx", "onnxruntime.quantization.shape_inference", "jax2onnx"):
        try:
            importlib.import_module(module)
        except Exception as error:  # where versions do not fit it may be of any kind
            package = module.split(".")[0]
            broken = f"{package}: cannot be imported ({type(error).__name__}: {error})"
            cure = f"mend it by {HOW_TO_HAVE_ONNX}; or uninstall it, to have StableHLO alone"
            raise UserError(f"{broken}; {cure}") from None


def to_function(network):
    """A function from images [B, 28, 28, 1] to logits [B, C], with the weights as constants."""
    graphdef, state = nnx.split(network)
    return lambda images: nnx.merge(graphdef, state)(images, train=False)


def export_stablehlo(network):
    """A network as the bytes of a file for CPUs and GPUs, and batches of any size."""
    [batch] = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *IMAGE_SHAPE), jnp.float32)
    # Without the places in the code: they are of no use, and name folders of this computer.
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        export = jax.export.export(jax.jit(to_function(network)), platforms=("cpu", "cuda"))
        return bytes(export(images).serialize())
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


def load_stablehlo(content):
    """The function in such a file, on the CPU: float32 images [B, 28, 28, 1] to logits [B, C]."""
    answer = jax.jit(jax.export.deserialize(bytearray(content)).call)
    cpu = jax.local_devices(backend="cpu")[0]

    def answer_on_cpu(images):
        with jax.default_device(cpu):
            return np.asarray(answer(images))

    return answer_on_cpu


def export_onnx(network):
    """A float32 network as the bytes of an ONNX file, for batches of any size."""
    from jax2onnx import to_onnx

    logging.disable(logging.WARNING)  # jax2onnx's about BatchNorm: `check_answers` finds it right
    try:
        model = to_onnx(
            to_function(network), [("batch", *IMAGE_SHAPE)],
            input_names=["images"], output_names=["logits"], model_name="network",
        )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    del model.graph.value_info[:]  # shapes in between, some of them wrong; runtimes find their own
    return model.SerializeToString()


def quantize_onnx(content, images):
    """The bytes of an ONNX file with int8 weights and activations, from those of a float32 one.

    onnxruntime rounds in a way of its own: the activations of a layer have one range, which is
    found on `images` [N, 28, 28, 1], training images from 0 to 1.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(quantization.CalibrationDataReader):
        def __init__(self):
            self.chunks = iter(np.split(images, range(100, len(images), 100)))

        def get_next(self):
            chunk = next(self.chunks, None)
            return None if chunk is None else {"images": chunk}

    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder, "original.onnx")
        prepared = Path(folder, "prepared.onnx")
        quantized = Path(folder, "quantized.onnx")
        original.write_bytes(content)
        quant_pre_process(original, prepared)  # BatchNorm becomes part of the convolutions
        quantization.quantize_static(
            prepared, quantized, Images(),
            quant_format=quantization.QuantFormat.QOperator,  # the smaller of two forms
            activation_type=quantization.QuantType.QUInt8,
            per_channel=True,
            # Weights take 7 bits. With 8, x86 processors without VNNI saturate: wrong answers.
            reduce_range=True,
        )  # fmt: skip
        return quantized.read_bytes()


def load_onnx(content):
    """The function in an ONNX file, on one core: float32 images [B, 28, 28, 1] to logits [B, C]."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options)
    return lambda images: session.run(["logits"], {"images": images})[0]


# %% What a file costs, and whether it is right


def weigh(content):
    """The size of a file in bytes, as it is and packed by gzip, and its checksum."""
    return {
        "bytes": len(content),
        "gzip_bytes": len(gzip.compress(content, mtime=0)),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def check_answers(answer, logits, split):
    """How a loaded file answers all images of a split: its accuracy, and against the network's own
    logits [N, C] the number of other answers and the largest difference of a logit."""
    answers = []
    for start in range(0, len(split.image), 128):
        images = split.image[start : start + 128] / np.float32(255)
        # The last batch is filled up: another size would be compiled anew.
        filled = np.concatenate([images, np.zeros((128 - len(images), *IMAGE_SHAPE), np.float32)])
        answers.append(answer(filled)[: len(images)])
    answers = np.concatenate(answers)
    return {
        "accuracy": float((answers.argmax(-1) == split.label).mean()),
        "different_answers": int((answers.argmax(-1) != logits.argmax(-1)).sum()),
        "largest_difference": float(np.abs(answers - logits).max()),
    }


@contextlib.contextmanager
def one_core():
    """Keeps all threads of this process on one core, where the system lets it: on Linux."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    try:
        _keep_threads_on({min(cores)})
        yield
    finally:
        _keep_threads_on(cores)


def _keep_threads_on(cores):
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread), cores)


def measure_latency(answer, turns):
    """Milliseconds on one core for the answers to a batch of 1 and of 128: the median and the 95th
    percentile of some turns."""
    found = {}
    for batch_size in (1, 128):
        images = np.zeros((batch_size, *IMAGE_SHAPE), np.float32)
        answer(images)  # compiles
        times = []
        for _ in range(turns):
            begun = time.perf_counter()
            answer(images)
            times.append(1000 * (time.perf_counter() - begun))
        found[str(batch_size)] = {
            "median": float(np.median(times)),
            "p95": float(np.percentile(times, 95)),
        }
    return found


# %% Settings
# What a flag leaves open is chosen here. The students are trained as in script 15 before they are
# compressed, and then for half as many epochs, at rates that were searched on validation images.


def fill_in_defaults(config, data):
    """The config with the number of labels, where it was left open."""
    few = len(data.train.label) < 10_000  # the digits, or --quick
    return experiment.with_defaults(config, labels=100 if few else "all")


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


def dense_recipe(config, data, seed, labels):
    """How a student is trained on so many labels before it is compressed: as in script 15, whose
    epochs fall by a power law from 60 with 1,000 labels to 4 with 60,000."""
    epochs = max(1, round(60 * (1000 / labels) ** 0.66))
    rate = 4e-2 if labels < 10_000 else 2e-2
    batch_size = 128
    if len(data.train.label) < 10_000:  # the digits, or --quick
        epochs = 120
        rate = 1e-2
        batch_size = 32
    if config.quick:
        epochs = 60
    if config.epochs is not None:
        epochs = config.epochs
    if config.learning_rate is not None:
        rate = config.learning_rate
    batch_size = min(batch_size, labels)
    if config.batch_size is not None:
        batch_size = config.batch_size
    check_batch_size("--batch-size", batch_size, labels)
    return Recipe(seed, epochs, batch_size, rate, "onecycle")


def compression_recipe(config, recipe, labels, teacher_left_out=False):
    """How a student is trained on so many labels while it is compressed, from its recipe before.
    5e-3 was best in a search. But with few labels, and its teacher left out, a student forgets what
    it was taught, and a lower rate is best: it forgets less."""
    epochs = config.compression_epochs or max(1, recipe.epochs // 2)
    rate = config.compression_learning_rate
    if rate is None:
        rate = 1e-3 if teacher_left_out and labels < 10_000 else 5e-3
    return recipe._replace(epochs=epochs, learning_rate=rate)


# %% The students of one seed


class Student(NamedTuple):
    """A trained student, and how it is shipped."""

    group: str  # baseline, distilled, or distilled with its teacher left out meanwhile
    compression: str  # a key of MARKERS
    sparsity: float
    network: nnx.Module

    @property
    def name(self):
        return name_of_student(self.group, self.compression, self.sparsity)

    @property
    def is_int8(self):
        return "int8" in self.compression


LEFT_OUT = "distilled, teacher left out"


def name_of_student(group, compression, sparsity=0.0):
    """What results and files call a student: "distilled, 80 % sparse int8"."""
    if compression == "float32":
        return group
    if sparsity:
        return f"{group}, {100 * sparsity:.12g} % {compression}"
    return f"{group}, {compression}"


def compress(group, start, lesson, recipe, sparsities, run):
    """Compresses a trained student in all ways that go on training it. Returns Students."""
    teaching = "labels alone" if lesson.teacher_logits is None else "labels and teacher"
    about = f"seed {recipe.seed}, {teaching}"
    students = []

    # What the further epochs do by themselves.
    name = name_of_student(group, "trained on")
    experiment.print_heading(f"{name.upper()}: {about}")
    network = train_sparse(name, start, 0.0, lesson, recipe, run)
    students.append(Student(group, "trained on", 0.0, network))

    name = name_of_student(group, "int8 in training")
    experiment.print_heading(f"{name.upper()}: {about}")
    network = train_int8(name, start, lesson, recipe, run)
    students.append(Student(group, "int8 in training", 0.0, network))

    for sparsity in sparsities:
        name = name_of_student(group, "sparse", sparsity)
        experiment.print_heading(f"{name.upper()}: {about}")
        sparse = train_sparse(name, start, sparsity, lesson, recipe, run)
        students.append(Student(group, "sparse", sparsity, sparse))

        name = name_of_student(group, "sparse int8", sparsity)
        experiment.print_heading(f"{name.upper()}: {about}")
        network = train_int8(name, sparse, lesson, recipe, run)
        students.append(Student(group, "sparse int8", sparsity, network))
    return students


def round_after_training(group, network):
    """The Student that is rounded to int8 at the end. It is a clone, so that the training is not
    counted twice in the results."""
    return Student(group, "int8 after training", 0.0, nnx.clone(network))


def train_students(teacher, labelled, classes, recipe, config, run):
    """Trains and compresses the students of one seed: the baseline, which never has a teacher, and
    the distilled student, whose teacher is kept or left out while it is compressed. Returns
    Students."""
    # The teacher never changes: its logits are computed once, and looked up by the images' index.
    teacher_logits = predict_by_index(teacher, labelled)
    alone = Lesson(labelled, classes, None, config.temperature, config.alpha)
    with_teacher = alone._replace(teacher_logits=teacher_logits)
    labels = len(labelled.label)
    further = compression_recipe(config, recipe, labels)
    without = compression_recipe(config, recipe, labels, teacher_left_out=True)
    about = f"seed {recipe.seed}, {labels:,} labels"

    experiment.print_heading(f"BASELINE: {about}, no teacher")
    baseline = train_dense("baseline", alone, recipe, run)
    experiment.print_heading(f"DISTILLED: {about}, and the teacher")
    distilled = train_dense("distilled", with_teacher, recipe, run)

    return [
        Student("baseline", "float32", 0.0, baseline),
        round_after_training("baseline", baseline),
        *compress("baseline", baseline, alone, further, config.sparsities, run),
        Student("distilled", "float32", 0.0, distilled),
        round_after_training("distilled", distilled),
        *compress("distilled", distilled, with_teacher, further, config.sparsities, run),
        *compress(LEFT_OUT, distilled, alone, without, config.sparsities, run),
    ]


# %% Shipping

CALIBRATION_IMAGES = 1000  # on which onnxruntime finds the range of each activation


def export_all(network, is_int8, data):
    """What is to be shipped of a trained network: the network as it is in JAX, int8 or not, and its
    files, {"stablehlo": bytes, "onnx": bytes}, the latter if it can be exported."""
    original = network
    shipped = network
    if is_int8:  # the same weights in a student that does not round, for the quantisers to round
        original = copy_weights(network, StudentCNN(data.classes, rngs=nnx.Rngs(0)))
        shipped = quantize_after_training(original)

    contents = {"stablehlo": export_stablehlo(shipped)}
    if HAS_ONNX:
        contents["onnx"] = export_onnx(original)
    if HAS_ONNX and is_int8:
        images = data.train.image[:CALIBRATION_IMAGES] / np.float32(255)
        contents["onnx"] = quantize_onnx(contents["onnx"], images)
    return shipped, contents


def ship(student, run, seed, teacher_logits, is_timed):
    """Exports a Student, weighs and checks its files, and adds a row to the results.

    Args:
      teacher_logits: of the test images, [N, C].
      is_timed: whether to measure latencies, too, and to check the StableHLO file, which takes
        compiling. An ONNX file is always checked.
    """
    shipped, contents = export_all(student.network, student.is_int8, run.data)
    logits = predict(shipped, run.data.test)
    files = {}
    for kind, content in contents.items():
        experiment.write_whole(path_of_export(run.folder, student.name, seed, kind), content)
        file = weigh(content)
        answer = load_stablehlo(content) if kind == "stablehlo" else load_onnx(content)
        if is_timed or kind == "onnx":
            file |= check_answers(answer, logits, run.data.test)
        if is_timed:
            with one_core():
                file["latency_ms"] = measure_latency(answer, 10 if run.config.quick else 30)
        files[kind] = file
    run.add_row(
        student.name, student.network, logits, seed=seed, teacher_logits=teacher_logits,
        group=student.group, compression=student.compression, sparsity=student.sparsity,
        zeros=measure_sparsity(student.network), files=files,
    )  # fmt: skip


def path_of_export(folder, name, seed, kind):
    """Where a run's folder has the file of a network: exports/NAME-SEED.onnx, or .stablehlo."""
    return folder / "exports" / f"{experiment.slug(name)}-{seed}.{kind}"


# %% Figure, table and summary

MARKERS = {
    "float32": "o",
    "trained on": "P",
    "int8 after training": "v",
    "int8 in training": "^",
    "sparse": "s",
    "sparse int8": "*",
}
COLOURS = plots.COLOURS | {LEFT_OUT: "tab:green"}


def accuracies_of_files(run, name, kind):
    """The accuracies in percent of a network's files, one a seed. Where a file was not checked, it
    is StableHLO, which computes what the network itself does."""
    accuracies = []
    for files, accuracy in zip(run.values(name, "files"), run.accuracies(name), strict=True):
        checked = "accuracy" in files[kind]
        accuracies.append(100 * files[kind]["accuracy"] if checked else accuracy)
    return accuracies


def find_frontier(places):
    """Those of the places (cost, errors) that no other beats in one without losing in the other,
    from cheap to dear. A cost may be milliseconds or bytes."""
    frontier = []
    for cost, errors in sorted(places):
        if not frontier or errors < frontier[-1][1]:
            frontier.append((cost, errors))
    return frontier


def draw(run):
    """Draws size and errors of the files, a small mark for each seed, a large one for the mean, and
    a grey line through the files that no other beats in both. The size is that of the first seed's
    file: ONNX if it could be exported."""
    kind = "onnx" if HAS_ONNX else "stablehlo"
    figure = Figure(figsize=(plots.WIDTH, 4.8), layout="constrained")
    axes = figure.subplots()
    places = []  # (kilobytes, errors) of all networks
    first_rows = {}  # of each name
    for row in run.rows:
        first_rows.setdefault(row["name"], row)
    for name, row in first_rows.items():
        kilobytes = round(row["files"][kind]["gzip_bytes"] / 1000, 1)  # some differ by few bytes
        errors = plots.to_errors(accuracies_of_files(run, name, kind), run.data)
        places.append((kilobytes, errors.mean()))
        look = {"marker": MARKERS[row["compression"]], "color": COLOURS[row["group"]]}
        axes.plot([kilobytes] * len(errors), errors, linestyle="", alpha=0.3, **look)
        axes.plot(kilobytes, errors.mean(), linestyle="", markersize=9, **look)
        if row["sparsity"] and row["group"] == "distilled":
            share = f"{100 * row['sparsity']:.12g} %"
            axes.annotate(share, places[-1], (9, 0), textcoords="offset points", va="center")

    frontier = find_frontier(places)
    axes.plot(*zip(*frontier, strict=True), color="0.7", zorder=0)
    for group in dict.fromkeys(row["group"] for row in run.rows):
        axes.plot([], [], "o", color=COLOURS[group], label=group)
    for compression in dict.fromkeys(row["compression"] for row in run.rows):
        axes.plot([], [], MARKERS[compression], color="0.2", label=compression)
    axes.legend(ncols=2, fontsize="small")
    axes.set(xscale="log", yscale="log", xlabel=f"kilobytes of the {kind} file, packed by gzip")
    axes.set_ylabel(f"{run.data.scored_on} errors, %")
    plots.write_out_numbers(axes.xaxis)
    plots.write_out_numbers(axes.yaxis)
    axes.set_title(say_what_is_saved(run, kind))
    return figure


def shipped_student(run):
    """The name of the student that is shipped: distilled, pruned by the first sparsity, int8."""
    return name_of_student("distilled", "sparse int8", run.config.sparsities[0])


def times_smaller(run, name, kind, key):
    """How many times fewer bytes than the teacher's a network's file has. `key` is "bytes" or
    "gzip_bytes"."""
    teacher_bytes = run.values("teacher", "files")[0][kind][key]
    return teacher_bytes / run.values(name, "files")[0][kind][key]


def say_what_is_saved(run, kind):
    """The figure's message: how much smaller than its teacher the shipped student is, and how
    accurate beside the distilled student in float32."""
    name = shipped_student(run)
    times = times_smaller(run, name, kind, "gzip_bytes")
    accuracies = accuracies_of_files(run, name, kind)
    change = np.mean(accuracies) - np.mean(accuracies_of_files(run, "distilled", kind))
    seed = " (one seed)" if len(accuracies) == 1 else ""
    points = plots.signed_points(change)
    return f"Shipped: {times:.0f} times smaller than the teacher, {points} against float32{seed}"


def print_files(run):
    """Prints what each network's files of the first seed weigh, and how long their answers take. A
    file that was not checked has no accuracy, one that was not timed no milliseconds."""
    experiment.print_heading(
        "FILES OF THE FIRST SEED; MILLISECONDS ON ONE CORE: MEDIAN, 95TH PERCENTILE"
    )
    names = list(dict.fromkeys(row["name"] for row in run.rows))
    wide = max(map(len, names))
    print(f"{'':{wide}} {'':9}   on disk     packed  accuracy      a batch of 1           of 128")
    for name in names:
        for kind, file in run.values(name, "files")[0].items():
            line = f"{name:{wide}} {kind:9}"
            line += f"{file['bytes'] / 1000:7.1f} kB {file['gzip_bytes'] / 1000:7.1f} kB"
            if "accuracy" in file:
                line += f"{100 * file['accuracy']:8.2f} %"
            for times in file.get("latency_ms", {}).values():
                line += f"{times['median']:8.2f}, {times['p95']:6.2f}  "
            print(line)


def summarise_compression(run):
    """The summary's lines: what each compression costs, what the teacher is worth meanwhile, and
    what the files are."""
    lines = {}
    for row in run.rows:
        name, group, compression = row["name"], row["group"], row["compression"]
        if compression == "float32":
            continue
        if group == LEFT_OUT:
            kept = name_of_student("distilled", compression, row["sparsity"])
            how = kept.removeprefix("distilled, ")
            lines[f"teacher kept − left out, {how}"] = run.compare(kept, name)
            rates = [run.values(x, "settings")[0]["learning_rate"] for x in (kept, name)]
            lines["peak rate, teacher kept and left out"] = "{:g} and {:g}".format(*rates)
        else:
            lines[f"{name} − float32"] = run.compare(name, group)

    kinds = run.rows[0]["files"]
    for kind in kinds:
        for precision in ("float32", "int8"):
            checked = [
                row["files"][kind] for row in run.rows
                if "accuracy" in row["files"][kind]
                and ("int8" in row["compression"]) == (precision == "int8")
            ]  # fmt: skip
            different = max(file["different_answers"] for file in checked)
            largest = max(file["largest_difference"] for file in checked)
            lines[f"{kind}, {len(checked)} {precision} networks"] = (
                f"at most {different} answers differ from the network's, logits by {largest:.2g}"
            )
        name = shipped_student(run)
        packed = times_smaller(run, name, kind, "gzip_bytes")
        on_disk = times_smaller(run, name, kind, "bytes")
        lines[f"{kind}, {name}"] = (
            f"{packed:.0f} times smaller than the teacher, packed; {on_disk:.0f} times on disk"
        )
    if "onnx" not in kinds:
        lines["onnx is not installed"] = HOW_TO_HAVE_ONNX
    return lines


# %% Main
# One teacher; then, for each seed, two students and what they are compressed to: with one sparsity
# 14 trainings. All are exported. Of the first seed the distilled students that kept their teacher
# are timed, beside the teacher.


def main(config):
    run = experiment.start(config)
    check_exporters()
    data = run.data
    config = fill_in_defaults(config, data)
    run.config = config
    teacher_recipe = default_teacher_recipe(config, data)
    students_to_train = []
    for seed in run.seeds(config.seeds):
        labelled = take_labels(data.train, config.labels, seed)
        recipe = dense_recipe(config, data, seed, len(labelled.label))
        students_to_train.append((labelled, recipe))
    (run.folder / "exports").mkdir(exist_ok=True)

    experiment.print_heading(f"TEACHER: all {len(data.train.label):,} labels")
    if config.teacher:
        fresh = TeacherCNN(data.classes, rngs=nnx.Rngs(0))
        teacher = run.take_teacher(fresh, data.train)
    else:
        teacher = train_teacher(data, teacher_recipe, run)
    teacher_logits = predict(teacher, data.test)
    teacher_seed = run.training_of(teacher).seed
    as_it_is = Student("teacher", "float32", 0.0, teacher)
    ship(as_it_is, run, teacher_seed, teacher_logits, is_timed=True)

    for labelled, recipe in students_to_train:
        for student in train_students(teacher, labelled, data.classes, recipe, config, run):
            is_timed = recipe.seed == config.seed and student.group == "distilled"
            ship(student, run, recipe.seed, teacher_logits, is_timed)

    print_files(run)
    exporters = {name: importlib.metadata.version(name) for name in EXPORTERS if HAS_ONNX}
    return run.finish(draw(run), summarise_compression(run), exporters=exporters)


if __name__ == "__main__":
    experiment.run_script(main, Config)
