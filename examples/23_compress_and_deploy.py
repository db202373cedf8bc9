# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "qwix>=0.1.8,<0.2", "numpy>=2.2,<3", "tqdm>=4.66,<5", "tyro>=1.0.8,<2", "typeguard>=4,<5",
#   "filelock>=3.20,<5", "matplotlib>=3.9,<4", "scipy>=1.14,<2", "scikit-learn>=1.6,<2",
#   "importlib_resources>=6,<8", "tensorflow-datasets>=4.9.10,<5"]
# ///
"""A student is made to be shipped: how small does it get, and does the teacher help it there?

Students are pruned (the smallest weights become 0) and quantised (weights and activations become
int8, after training or in training), and both: a baseline that never has a teacher, and a distilled
student whose teacher stays or is left out meanwhile. Their files, StableHLO and ONNX, are checked
against the originals, weighed, and timed on one core beside the teacher's.

    python examples/23_compress_and_deploy.py               # one seed: 6 to 15 minutes
    python examples/23_compress_and_deploy.py --sparsities 0.5 0.8 0.9 0.95    # a longer curve
    python examples/23_compress_and_deploy.py --quick       # a first look: about a minute

Times are for 2 CPU cores, from fast to slow. ONNX needs packages of its own, without which there
is StableHLO alone: python -m pip install -r examples/requirements-export.txt
Zhu, Gupta: To Prune, or Not to Prune, 2017, arXiv:1710.01878. Jacob et al.: Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, 2018,
arXiv:1712.05877. Polino et al.: Model Compression via Distillation and Quantization, 2018,
arXiv:1802.05668.
"""

import contextlib
import dataclasses
import functools
import gzip
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
    """Number of seeds, one after another. Files and latencies are those of the first."""
    sparsities: Annotated[
        tuple[float, ...] | None, Range(0, 1, low_excluded=True, high_excluded=True), OPEN
    ] = None
    """Shares of the weights that are pruned (default: 0.8 0.95; quick 0.8)."""
    labels: Annotated[int | Literal["all"] | None, Range(10), OPEN] = None
    """Labelled images of the students, or all (default: all; digits and quick 100)."""
    epochs: Annotated[int | None, Range(0, 10_000), OPEN] = None
    """Epochs of the students before they are compressed (default: by the number of labels, 4 with
    all of MNIST; digits and quick 120)."""
    compression_epochs: Annotated[int | None, Range(1, 10_000), OPEN] = None
    """Epochs of each compression that trains (default: half as many)."""
    batch_size: Annotated[int | None, Range(1), OPEN] = None
    """Images in a batch (default: 128, digits and quick 32, or all there are)."""
    learning_rate: Annotated[float | None, Range(0, low_excluded=True), OPEN] = None
    """Students' peak learning rate (default: 4e-2 with less than 10,000 labels, 2e-2 with more;
    digits and quick 1e-2)."""
    compression_learning_rate: Annotated[float, Range(0, low_excluded=True)] = 5e-3
    """Peak learning rate of each compression that trains."""
    temperature: Annotated[float, Range(0.001, 10_000)] = 3.0
    """Temperature T that softens the distributions of teacher and student."""
    alpha: Annotated[float, Range(0, 1)] = 0.5
    """Weight of the labels in the loss; the teacher has 1 - alpha."""
    teacher: Annotated[str | None, OPEN] = None
    """Output folder of a run whose teacher to take: of several, the one with --teacher-seed
    (default: train one)."""
    teacher_seed: Seed = 0
    """Seed of the teacher: initial weights, dropout, order of batches."""


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
# Both steps also train a student that is being compressed.


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

PRUNE_EVERY = 20  # steps


def find_sparsity(progress, final_sparsity):
    """The share of weights to be pruned by now, at a progress from 0 to 1. It rises fast at first,
    when much can go, and reaches the final one in the middle of the training."""
    # s(t) = s_final · (1 − (1 − t)³), with t = 1 from the middle on
    ramp = min(1.0, 2 * progress)
    return final_sparsity * (1 - (1 - ramp) ** 3)


def prune(student, sparsity):
    """Sets a share of a student's weights to 0, those with the smallest magnitude over all layers.
    Biases and BatchNorm, few numbers, keep theirs."""
    params = nnx.state(student, nnx.Param)
    kernels = [x for x in jax.tree.leaves(params) if x.ndim > 1]
    magnitudes = np.sort(np.concatenate([np.abs(x).ravel() for x in kernels]))
    count = round(sparsity * len(magnitudes))
    if count == 0:
        return
    threshold = magnitudes[count - 1]

    def prune_array(x):
        if x.ndim == 1:
            return x
        return jnp.where(jnp.abs(x) <= threshold, 0, x)

    nnx.update(student, jax.tree.map(prune_array, params))


def measure_sparsity(student):
    """The share of a student's weights that are 0, without biases and BatchNorm."""
    kernels = [x for x in jax.tree.leaves(nnx.state(student, nnx.Param)) if x.ndim > 1]
    zeros = sum(int((x == 0).sum()) for x in kernels)
    return zeros / sum(x.size for x in kernels)


# For the end of an optimizer's chain: what was pruned, a weight of 0, is never changed again.
stay_pruned = optax.stateless_with_tree_map(
    lambda update, weight: jnp.where((weight == 0) & (weight.ndim > 1), 0, update)
)


# %% Quantisation
# int8 is the integers from −128 to 127. A weight w is kept as the integer next to w / s, with one
# scale s for each output channel, s = max|w| / 127.5; activations likewise, with one scale for each
# image. Post-training quantisation rounds once, at the end. Quantisation-aware training rounds in
# every step's forward pass, while the gradient passes through the rounding as if it were not there,
# so that the weights learn to bear it (Jacob et al., 2018). qwix does both to a Flax network.

INT8 = {"module_path": ".*", "weight_qtype": jnp.int8, "act_qtype": jnp.int8}


def quantize_after_training(student, images):
    """A copy of a student that computes with int8 weights and activations. What `images`
    [B, H, W, C] are does not matter: qwix wants to see the network at work."""
    return qwix.quantize_model(student, qwix.PtqProvider([qwix.QuantizationRule(**INT8)]), images)


@functools.cache  # qwix makes a new class each time; networks of one class share the compiled step
def make_rounding_student(classes, image_shape):
    """A student whose forward pass rounds weights and activations to int8, in training too."""
    student = StudentCNN(classes, image_shape, rngs=nnx.Rngs(0))
    # qwix rounds what goes into JAX's own convolution. Training would go round it with `fast.conv`.
    student.conv1.conv_general_dilated = jax.lax.conv_general_dilated
    images = np.zeros((1, *image_shape), np.float32)
    return qwix.quantize_model(student, qwix.QtProvider([qwix.QtRule(**INT8)]), images)


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


def make_step(student, optimizer, teacher_logits, temperature, alpha):
    """What trains a student, `step(batch)`: on labels alone if the teacher's logits are None."""
    if teacher_logits is None:
        return compile_step(train_step, student, optimizer)
    distil = compile_step(train_student_step, student, None, optimizer)
    return lambda batch: distil(batch, temperature, alpha)


def make_batches(labelled, recipe, epoch, teacher_logits):
    """An epoch's batches, with the teacher's logits [B, C] if there are any."""
    tables = {} if teacher_logits is None else {"teacher_logits": teacher_logits}
    return batches(labelled, recipe.batch_size, recipe.seed, epoch, **tables)


def train_dense(name, labelled, teacher_logits, classes, recipe, run, temperature=3.0, alpha=0.5):
    """Trains a student from fresh weights.

    Args:
      labelled: the images and labels that it learns from.
      teacher_logits: the teacher's for these images, looked up by index; without a teacher None.
    """
    student = StudentCNN(classes, rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer(student, recipe, len(labelled.label))
    step = make_step(student, optimizer, teacher_logits, temperature, alpha)

    training = Training(run, name, student, optimizer, recipe, labelled)
    for epoch in training.epochs():
        for batch in make_batches(labelled, recipe, epoch, teacher_logits):
            training.log(step(batch))
    return student


# %% Training what is compressed
# A compression goes on from a trained student, with an optimizer of its own that leaves pruned
# weights alone.


@functools.cache
def make_compression_transform(learning_rate, schedule, steps):
    """The optimizer of `make_transform`; a weight that is 0 stays 0."""
    return optax.chain(make_transform(learning_rate, schedule, steps), stay_pruned)


def make_compression_optimizer(student, recipe, images):
    """The optimizer for a compression, on so many images."""
    steps = recipe.epochs * (images // recipe.batch_size)
    transform = make_compression_transform(recipe.learning_rate, recipe.schedule, steps)
    return nnx.Optimizer(student, transform, wrt=nnx.Param)


def train_sparse(
    name, dense, sparsity, labelled, teacher_logits, recipe, run, temperature=3.0, alpha=0.5
):
    """Prunes a trained student `dense` step by step while it goes on learning."""
    student = nnx.clone(dense)
    optimizer = make_compression_optimizer(student, recipe, len(labelled.label))
    step = make_step(student, optimizer, teacher_logits, temperature, alpha)
    steps_an_epoch = len(labelled.label) // recipe.batch_size
    steps_in_all = recipe.epochs * steps_an_epoch

    training = Training(run, name, student, optimizer, recipe, labelled)
    for epoch in training.epochs():
        steps_before = (epoch - 1) * steps_an_epoch
        for number, batch in enumerate(make_batches(labelled, recipe, epoch, teacher_logits)):
            if number % PRUNE_EVERY == 0:
                progress = (steps_before + number) / steps_in_all
                prune(student, find_sparsity(progress, sparsity))
            training.log(step(batch))
        prune(student, find_sparsity(epoch / recipe.epochs, sparsity))
    return student


def train_int8(
    name, start, labelled, teacher_logits, classes, recipe, run, temperature=3.0, alpha=0.5
):
    """Trains a student to bear int8, from the weights of a trained one, `start`. Returns a student
    that rounds in its forward pass. What is pruned stays so."""
    student = nnx.clone(make_rounding_student(classes, labelled.image.shape[1:]))
    copy_weights(start, student)
    optimizer = make_compression_optimizer(student, recipe, len(labelled.label))
    step = make_step(student, optimizer, teacher_logits, temperature, alpha)

    training = Training(run, name, student, optimizer, recipe, labelled)
    for epoch in training.epochs():
        for batch in make_batches(labelled, recipe, epoch, teacher_logits):
            training.log(step(batch))
    return student


# %% Export
# StableHLO is what JAX itself hands to the compiler, in a file that needs JAX but none of this
# code. ONNX is for other runtimes, in browsers and phones too. The number of images in a batch is
# left free in both.

HAS_ONNX = all(importlib.util.find_spec(x) for x in ("jax2onnx", "onnx", "onnxruntime"))
HOW_TO_HAVE_ONNX = (
    "python -m pip install -r examples/requirements-export.txt, then the same command"
)


def to_function(network):
    """A function from images [B, H, W, C] to logits [B, classes], with the weights as constants."""
    graphdef, state = nnx.split(network)
    return lambda images: nnx.merge(graphdef, state)(images, train=False)


def export_stablehlo(network, image_shape):
    """A network as the bytes of a StableHLO file, for batches of any size."""
    [batch] = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    # Without the places in the code: they are of no use, and name folders of this computer.
    limit = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        return bytes(jax.export.export(jax.jit(to_function(network)))(images).serialize())
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


def load_stablehlo(content):
    """The function in a StableHLO file: float32 images [B, H, W, C] to logits [B, classes]."""
    answer = jax.jit(jax.export.deserialize(content).call)
    return lambda images: np.asarray(answer(images))


def export_onnx(network, image_shape):
    """A float32 network as the bytes of an ONNX file, for batches of any size."""
    from jax2onnx import to_onnx

    logging.disable(logging.WARNING)  # of what it makes of BatchNorm, which is right
    try:
        model = to_onnx(
            to_function(network), [("batch", *image_shape)],
            input_names=["images"], output_names=["logits"], model_name="network",
        )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    del model.graph.value_info[:]  # shapes in between, some of them wrong; runtimes find their own
    return model.SerializeToString()


def quantize_onnx(content, images):
    """The bytes of an ONNX file with int8 weights and activations, from those of a float32 one.

    Args:
      images: [N, H, W, C] float32, training images on which the range of each activation is found.
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
        original, prepared, int8 = (Path(folder) / x for x in ("float", "prepared", "int8"))
        original.write_bytes(content)
        quant_pre_process(original, prepared)  # BatchNorm becomes part of the convolutions
        quantization.quantize_static(
            prepared, int8, Images(),
            quant_format=quantization.QuantFormat.QOperator,  # the smaller of two forms
            activation_type=quantization.QuantType.QUInt8,
            per_channel=True,
            # Weights take 7 bits: in processors without VNNI sums of 8-bit products overflow.
            reduce_range=True,
        )  # fmt: skip
        return int8.read_bytes()


def load_onnx(content):
    """The function in an ONNX file, on one core: float32 images [B, H, W, C] to logits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options)
    return lambda images: session.run(["logits"], {"images": images})[0]


# %% What a file costs, and whether it is right


def weigh(content):
    """The size of a file in bytes, as it is and packed by gzip."""
    return {"bytes": len(content), "gzip_bytes": len(gzip.compress(content, mtime=0))}


def check_answers(answer, logits, split):
    """How a loaded file answers all images of a split: its accuracy, and against the original's
    logits [N, classes] the number of other answers and the largest difference of a logit."""
    chunks = np.split(split.image, range(500, len(split.image), 500))
    answers = np.concatenate([answer(chunk / np.float32(255)) for chunk in chunks])
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


def measure_latency(answer, image_shape, turns=30):
    """Milliseconds on one core for the answers to a batch of 1 and of 128: the median and the 95th
    percentile of some turns."""
    found = {}
    for batch_size in (1, 128):
        images = np.zeros((batch_size, *image_shape), np.float32)
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
# What a flag leaves open is chosen here. Rates, epochs, temperature and alpha were searched on
# validation images (docs/provenance.md).


def fill_in_defaults(config, data):
    """The config with labels and sparsities, where they were left open."""
    if len(data.train.label) < 10_000:  # the digits, or --quick
        config = experiment.with_defaults(config, labels=100)
    if config.quick:
        config = experiment.with_defaults(config, sparsities=(0.8,))
    return experiment.with_defaults(config, labels="all", sparsities=(0.8, 0.95))


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
    """How a student is trained on so many labels before it is compressed: as in script 15."""
    epochs = max(1, round(60 * (1000 / labels) ** 0.66))
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


def make_compression_recipe(config, recipe):
    """How a student is trained while it is compressed, from its recipe before."""
    epochs = config.compression_epochs or max(1, recipe.epochs // 2)
    return recipe._replace(epochs=epochs, learning_rate=config.compression_learning_rate)


# %% The students of one seed

# What rows call a distilled student whose teacher is left out when it is compressed.
LABELS_ALONE = ", labels alone"


class Student(NamedTuple):
    """A student, and how it is shipped."""

    name: str
    network: nnx.Module  # as it was trained
    is_int8: bool


def name_of_sparsity(sparsity):
    return f"{100 * sparsity:.12g} % sparse"


def compress(name, dense, labelled, teacher_logits, classes, recipe, config, run, ending=""):
    """Compresses a trained student `dense` in all ways that go on training it, on labels and the
    teacher's logits or, if they are None, on labels alone. Returns a list of Students, whose names
    begin with `name` and have the `ending`."""
    teaching = "labels alone" if teacher_logits is None else "labels and teacher"
    about = f"{name}, seed {recipe.seed}, {teaching}"

    name_int8 = f"{name}, int8 in training{ending}"
    experiment.print_heading(f"INT8 IN TRAINING: {about}")
    int8 = train_int8(
        name_int8, dense, labelled, teacher_logits, classes, recipe, run,
        config.temperature, config.alpha,
    )  # fmt: skip
    students = [Student(name_int8, int8, is_int8=True)]

    for sparsity in config.sparsities:
        amount = name_of_sparsity(sparsity)
        name_sparse = f"{name}, {amount}{ending}"
        experiment.print_heading(f"{amount.upper()}: {about}")
        sparse = train_sparse(
            name_sparse, dense, sparsity, labelled, teacher_logits, recipe, run,
            config.temperature, config.alpha,
        )  # fmt: skip

        name_both = f"{name}, {amount} int8{ending}"
        experiment.print_heading(f"{amount.upper()} INT8: {about}")
        sparse_int8 = train_int8(
            name_both, sparse, labelled, teacher_logits, classes, recipe, run,
            config.temperature, config.alpha,
        )  # fmt: skip
        students.append(Student(name_sparse, sparse, is_int8=False))
        students.append(Student(name_both, sparse_int8, is_int8=True))
    return students


def train_students(teacher, labelled, classes, recipe, config, run):
    """Trains and compresses the students of one seed: the baseline, which never has a teacher, and
    the distilled student, whose teacher stays or is left out while it is compressed. Returns a list
    of Students."""
    # The teacher never changes: its logits are computed once, and looked up by the images' index.
    teacher_logits = predict_by_index(teacher, labelled)
    compression_recipe = make_compression_recipe(config, recipe)
    about = f"seed {recipe.seed}, {len(labelled.label):,} labels"

    experiment.print_heading(f"BASELINE: {about}, no teacher")
    baseline = train_dense("baseline", labelled, None, classes, recipe, run)
    baselines = compress(
        "baseline", baseline, labelled, None, classes, compression_recipe, config, run
    )

    experiment.print_heading(f"DISTILLED: {about}, and the teacher")
    distilled = train_dense(
        "distilled", labelled, teacher_logits, classes, recipe, run,
        config.temperature, config.alpha,
    )  # fmt: skip
    with_teacher = compress(
        "distilled", distilled, labelled, teacher_logits, classes, compression_recipe, config, run
    )
    labels_alone = compress(
        "distilled", distilled, labelled, None, classes, compression_recipe, config, run,
        LABELS_ALONE,
    )  # fmt: skip

    # Rounded after training is a clone, since it has no training of its own.
    return [
        Student("baseline", baseline, is_int8=False),
        Student("baseline, int8 after training", nnx.clone(baseline), is_int8=True),
        *baselines,
        Student("distilled", distilled, is_int8=False),
        Student("distilled, int8 after training", nnx.clone(distilled), is_int8=True),
        *with_teacher,
        *labels_alone,
    ]


# %% Shipping

CALIBRATION_IMAGES = 1000  # on which onnxruntime finds the range of each activation


def ship(name, network, is_int8, run, seed, teacher_logits, in_full):
    """Exports a network, weighs and checks its files, and adds a row to the results.

    Args:
      network: the teacher or a student, as it was trained.
      is_int8: whether to ship it as int8.
      teacher_logits: of the test images, [N, C].
      in_full: whether to check the StableHLO file, and to measure latencies.
    """
    data = run.data
    image_shape = data.train.image.shape[1:]
    if is_int8:
        # The original is the student that was trained, without the rounding.
        fresh = StudentCNN(data.classes, image_shape, rngs=nnx.Rngs(0))
        original = copy_weights(network, fresh)
        shipped = quantize_after_training(original, data.train.image[:1] / np.float32(255))
    else:
        original = shipped = network
    logits = predict(shipped, data.test)

    contents = {"stablehlo": export_stablehlo(shipped, image_shape)}
    if HAS_ONNX:
        contents["onnx"] = export_onnx(original, image_shape)
        if is_int8:
            images = data.train.image[:CALIBRATION_IMAGES] / np.float32(255)
            contents["onnx"] = quantize_onnx(contents["onnx"], images)

    files = {}
    for kind, content in contents.items():
        experiment.write_whole(path_of_export(run.folder, name, seed, kind), content)
        files[kind] = weigh(content)
        if kind == "onnx" or in_full:  # JAX compiles what it checks, which takes seconds
            load = {"stablehlo": load_stablehlo, "onnx": load_onnx}[kind]
            answer = load(content)
            files[kind] |= check_answers(answer, logits, data.test)
        if in_full:
            with one_core():
                files[kind]["latency_ms"] = measure_latency(answer, image_shape)
    run.add_row(
        name, network, logits, seed=seed, teacher_logits=teacher_logits,
        sparsity=measure_sparsity(original), files=files,
    )  # fmt: skip


def path_of_export(folder, name, seed, kind):
    """Where a run's folder has the file of a network: exports/NAME-SEED.onnx, or .stablehlo."""
    return folder / "exports" / f"{experiment.slug(name)}-{seed}.{kind}"


# %% Figure, table and summary

MARKERS = {
    "int8 after training": "v",
    "int8 in training": "^",
    "sparse int8": "*",
    "sparse": "s",
    "float32": "o",
}
COLOURS = plots.COLOURS | {"distilled, labels alone": "tab:green"}


def kind_of(name):
    """How a network was compressed, by its name: a key of MARKERS."""
    for kind in MARKERS:
        if kind in name:
            return kind
    return "float32"


def owner_of(name):
    """Whose networks a name is one of: a key of COLOURS."""
    owner = name.split(",")[0]
    return owner + LABELS_ALONE if name.endswith(LABELS_ALONE) else owner


def draw(run, names):
    """Draws the frontier of size and errors: a small mark for each seed, a large one for the mean.
    The size is that of the first seed's file, packed: ONNX if it could be exported."""
    kind = "onnx" if HAS_ONNX else "stablehlo"
    figure = Figure(figsize=(plots.WIDTH, 4.6), layout="constrained")
    axes = figure.subplots()
    for name in names:
        kilobytes = run.values(name, "files")[0][kind]["gzip_bytes"] / 1000
        errors = plots.to_errors(run.accuracies(name), run.data)
        look = {"marker": MARKERS[kind_of(name)], "color": COLOURS[owner_of(name)]}
        axes.plot([kilobytes] * len(errors), errors, linestyle="", alpha=0.3, **look)
        axes.plot(kilobytes, errors.mean(), linestyle="", markersize=9, **look)
        if "sparse" in name and owner_of(name) == "distilled":
            share = name.removeprefix("distilled, ").split(" sparse")[0]
            place = (kilobytes, errors.mean())
            axes.annotate(share, place, (0, -12), textcoords="offset points", ha="center", va="top")

    for owner in dict.fromkeys(map(owner_of, names)):
        axes.plot([], [], "o", color=COLOURS[owner], label=owner)
    for marker_kind in dict.fromkeys(map(kind_of, names)):
        axes.plot([], [], MARKERS[marker_kind], color="0.2", label=marker_kind)
    axes.legend(ncols=2)
    axes.set(xscale="log", yscale="log", xlabel=f"size of the file, packed, in kilobytes ({kind})")
    axes.set_ylabel(f"{run.data.scored_on} errors, %")
    plots.write_out_numbers(axes.xaxis)
    plots.write_out_numbers(axes.yaxis)
    axes.set_title(say_what_is_saved(run, kind))
    return figure


def shipped_name(run):
    """The student with everything: distilled, pruned by the first sparsity, int8 in training."""
    return f"distilled, {name_of_sparsity(run.config.sparsities[0])} int8"


def count_times_fewer(run, name, kind, key):
    """How many times fewer bytes a network's file has than the teacher's. `key` is "bytes" or
    "gzip_bytes"."""
    teacher_bytes = run.values("teacher", "files")[0][kind][key]
    return teacher_bytes / run.values(name, "files")[0][kind][key]


def say_what_is_saved(run, kind):
    """The figure's message: how much smaller the shipped student is than its teacher, and how much
    less accurate than the distilled student in float32."""
    name = shipped_name(run)
    times = count_times_fewer(run, name, kind, "gzip_bytes")
    lost = np.mean(run.accuracies("distilled")) - np.mean(run.accuracies(name))
    seed = " (one seed)" if len(run.accuracies(name)) == 1 else ""
    points = plots.signed_points(-lost)
    return f"{times:.0f} times fewer bytes than the teacher, {points} against float32{seed}"


def print_files(run, names):
    """Prints what each network's files of the first seed weigh, and how long they take."""
    experiment.print_heading(f"FILES OF SEED {run.config.seed}")
    print(f"{'':42} {'':9}   on disk     packed  accuracy  batch of 1, 95 %    of 128, 95 %")
    for name in names:
        for kind, file in run.values(name, "files")[0].items():
            line = f"{name:42} {kind:9}"
            line += f"{file['bytes'] / 1000:7.1f} kB {file['gzip_bytes'] / 1000:7.1f} kB"
            if "accuracy" in file:
                line += f"{100 * file['accuracy']:8.2f} %"
            for times in file.get("latency_ms", {}).values():
                line += f"{times['median']:8.2f}, {times['p95']:6.2f} ms"
            print(line)


def summarise_compression(run, names):
    """The summary's lines: what each compression costs, what the teacher saves, and the files."""
    lines = {}
    for name in names:
        owner = name.split(",")[0]
        if name == owner:
            continue
        if name.endswith(LABELS_ALONE):
            taught = name.removesuffix(LABELS_ALONE)
            how = taught.removeprefix("distilled, ")
            lines[f"teacher kept − left out, {how}"] = run.compare(taught, name)
        else:
            lines[f"{name} − float32"] = run.compare(name, owner)

    kinds = run.rows[0]["files"]
    for kind in kinds:
        checked = [
            row["files"][kind] for row in run.rows
            if "int8" not in row["name"] and "accuracy" in row["files"][kind]
        ]  # fmt: skip
        different = sum(file["different_answers"] for file in checked)
        largest = max(file["largest_difference"] for file in checked)
        lines[f"{kind} of {len(checked)} float32 networks"] = (
            f"{different} answers differ from the original's, logits by {largest:.1g} at most"
        )
        name = shipped_name(run)
        packed = count_times_fewer(run, name, kind, "gzip_bytes")
        on_disk = count_times_fewer(run, name, kind, "bytes")
        lines[f"{kind}, {name}"] = (
            f"{packed:.0f} times fewer bytes than the teacher's, packed; {on_disk:.0f} on disk"
        )
    if "onnx" not in kinds:
        lines["onnx is not installed"] = HOW_TO_HAVE_ONNX
    return lines


# %% Main
# One teacher; then, for each seed, two students and what they are compressed to. All are shipped;
# those that kept their teacher are checked and timed in full, for the first seed.


def main(config):
    run = experiment.start(config)
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
    ship("teacher", teacher, False, run, teacher_seed, teacher_logits, in_full=True)

    for labelled, recipe in students_to_train:
        students = train_students(teacher, labelled, data.classes, recipe, config, run)
        for name, network, is_int8 in students:
            kept_teacher = name.startswith("distilled") and not name.endswith(LABELS_ALONE)
            in_full = kept_teacher and recipe.seed == config.seed
            ship(name, network, is_int8, run, recipe.seed, teacher_logits, in_full)

    names = list(dict.fromkeys(row["name"] for row in run.rows))
    print_files(run, names)
    return run.finish(draw(run, names), summarise_compression(run, names))


if __name__ == "__main__":
    experiment.run_script(main, Config)
