# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "numpy>=2.2,<3", "tqdm>=4.66,<5", "tyro>=1.0.8,<2", "typeguard>=4,<5", "filelock>=3.20,<5",
#   "matplotlib>=3.9,<4", "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""The student's architecture is a choice: which network learns from which, and at what cost?

Three teachers, a convolutional network, a small ResNet and a small Vision Transformer, teach six
students: the course's StudentCNN, the convolutional teacher with 1/2, 1/4 and 1/8 of its filters, a
net of depthwise-separable convolutions and an MLP. Each pair is compared with the same student
trained on labels alone, by accuracy, parameters, FLOPs and latency. The teachers are trained on all
60,000 labels of Fashion-MNIST, the students on 5,000 of these images.

    python examples/22_architectures.py                     # one seed: 15 to 40 minutes
    python examples/22_architectures.py --teachers resnet --students separable    # one pair
    python examples/22_architectures.py --quick             # a first look: about a minute

Times are for 2 CPU cores, from fast to slow. Where Fashion-MNIST is not found and cannot be
downloaded, the data are scikit-learn's digits.
He et al.: Deep Residual Learning, 2016, arXiv:1512.03385. Dosovitskiy et al.: An Image is Worth
16x16 Words, 2021, arXiv:2010.11929. Howard et al.: MobileNets, 2017, arXiv:1704.04861. Cho,
Hariharan: On the Efficacy of Knowledge Distillation, 2019, arXiv:1910.01348.
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
from fast import compile_step, conv, depthwise_conv, max_pool  # nnx's results, faster on CPUs
from flax import nnx
from matplotlib.figure import Figure
from utils import batches, check_batch_size, predict, predict_by_index, require, take_labels

Architecture = Literal[
    "cnn", "resnet", "vit", "student_cnn", "cnn_half", "cnn_quarter", "cnn_eighth",
    "separable", "mlp",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(experiment.CommonFlags):
    output_dir: str = "runs/22_architectures"
    """Folder for results, figure, weights and checkpoints."""
    dataset: Literal["mnist", "fashion_mnist", "kmnist", "digits"] = "fashion_mnist"
    """The dataset. The digits are embedded in scikit-learn and work offline."""
    seed: Seed = 42
    """First seed of baselines and students: labelled images, initial weights, order of batches."""
    seeds: Annotated[int, Range(1, 100)] = 1
    """Number of seeds, one after another."""
    teachers: Annotated[tuple[Architecture, ...] | None, OPEN] = None
    """Architectures of the teachers (default: cnn resnet vit; quick cnn). A network is no teacher
    of its own kind."""
    students: Annotated[tuple[Architecture, ...] | None, OPEN] = None
    """Architectures of the students (default: student_cnn cnn_half cnn_quarter cnn_eighth separable
    mlp; quick student_cnn mlp)."""
    labels: Annotated[int | Literal["all"] | None, Range(10), OPEN] = None
    """Labelled images of the students, or all (default: 5000; digits and quick 100)."""
    epochs: Annotated[int | None, Range(0, 10_000), OPEN] = None
    """Epochs of each baseline and student (default: by number of labels; digits and quick 120)."""
    batch_size: Annotated[int | None, Range(1), OPEN] = None
    """Students' images in a batch (default: 128, digits and quick 32, or all there are)."""
    learning_rate: Annotated[float | None, Range(0, low_excluded=True), OPEN] = None
    """One peak learning rate for all baselines and students (default: by architecture)."""
    temperature: Annotated[float, Range(0.001, 10_000)] = 4.0
    """Temperature T that softens the distributions of teacher and student."""
    alpha: Annotated[float, Range(0, 1)] = 0.5
    """Weight of the labels in the loss; the teacher has 1 - alpha."""
    teacher_epochs: Annotated[int | None, Range(0, 10_000), OPEN] = None
    """Epochs of each teacher (default: 3; digits 16; quick 5)."""
    teacher_learning_rate: Annotated[float | None, Range(0, low_excluded=True), OPEN] = None
    """One peak learning rate for all teachers (default: by architecture)."""
    teacher_seed: Seed = 0
    """Seed of the teachers: initial weights, dropout, order of batches."""


# %% Convolutional networks
# Those of script 15, the teacher also with fewer filters. In a project of your own leave
# `conv_general_dilated` out, and pool with `nnx.max_pool(x, (2, 2), (2, 2))`.


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


class ScaledCNN(nnx.Module):
    """Script 15's TeacherCNN with a share of its filters and hidden units, such as 1/4: images
    [B, 28, 28, 1] to [B, classes]. With a share of 1 it is that network. A layer of half as many
    inputs and outputs costs a quarter."""

    def __init__(self, share, num_classes=10, *, rngs):
        filters_1 = round(64 * share)
        filters_2 = round(128 * share)
        self.conv1 = nnx.Conv(1, filters_1, (3, 3), conv_general_dilated=conv, rngs=rngs)
        self.bn1 = nnx.BatchNorm(filters_1, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(filters_1, filters_2, (3, 3), rngs=rngs)
        self.bn2 = nnx.BatchNorm(filters_2, momentum=0.9, rngs=rngs)
        self.conv3 = nnx.Conv(filters_2, filters_2, (3, 3), rngs=rngs)
        self.bn3 = nnx.BatchNorm(filters_2, momentum=0.9, rngs=rngs)
        # Three poolings leave 3 × 3 pixels: 28 → 14 → 7 → 3.
        self.dense1 = nnx.Linear(9 * filters_2, round(512 * share), rngs=rngs)
        self.dense2 = nnx.Linear(round(512 * share), round(256 * share), rngs=rngs)
        self.dense3 = nnx.Linear(round(256 * share), num_classes, rngs=rngs)
        self.dropout = nnx.Dropout(0.5 * share, rngs=rngs)  # few units cannot spare half of them

    def __call__(self, x, train=False):
        x = max_pool(nnx.relu(self.bn1(self.conv1(x), use_running_average=not train)))
        x = max_pool(nnx.relu(self.bn2(self.conv2(x), use_running_average=not train)))
        x = max_pool(nnx.relu(self.bn3(self.conv3(x), use_running_average=not train)))
        x = x.reshape(x.shape[0], -1)
        x = self.dropout(nnx.relu(self.dense1(x)), deterministic=not train)
        x = self.dropout(nnx.relu(self.dense2(x)), deterministic=not train)
        return self.dense3(x)


# %% A residual network
# A block learns what to add to its input, which passes it by on a shortcut (He et al., 2016).


class ResidualBlock(nnx.Module):
    """Two convolutions beside a shortcut: [B, H, W, in] to half the size, [B, H/2, W/2, out]."""

    def __init__(self, channels_in, channels_out, *, rngs):
        self.conv1 = nnx.Conv(channels_in, channels_out, (3, 3), strides=2, rngs=rngs)
        self.bn1 = nnx.BatchNorm(channels_out, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(channels_out, channels_out, (3, 3), rngs=rngs)
        self.bn2 = nnx.BatchNorm(channels_out, momentum=0.9, rngs=rngs)
        self.shortcut = nnx.Conv(channels_in, channels_out, (1, 1), strides=2, rngs=rngs)

    def __call__(self, x, train=False):
        # y = relu(F(x) + W x), F the two convolutions, W the shortcut to half the size
        learned = nnx.relu(self.bn1(self.conv1(x), use_running_average=not train))
        learned = self.bn2(self.conv2(learned), use_running_average=not train)
        return nnx.relu(learned + self.shortcut(x))


class ResNet(nnx.Module):
    """A convolution, then two residual blocks: images [B, 28, 28, 1] to [B, classes]."""

    def __init__(self, num_classes=10, *, rngs):
        self.conv = nnx.Conv(1, 16, (3, 3), conv_general_dilated=conv, rngs=rngs)
        self.bn = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.block1 = ResidualBlock(16, 32, rngs=rngs)  # 28 → 14
        self.block2 = ResidualBlock(32, 64, rngs=rngs)  # 14 → 7
        self.dense = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, x, train=False):
        x = nnx.relu(self.bn(self.conv(x), use_running_average=not train))
        x = self.block1(x, train)
        x = self.block2(x, train)
        return self.dense(x.mean(axis=(1, 2)))


# %% A Vision Transformer
# The image is cut into patches, which look at each other (Dosovitskiy et al., 2021).


class TransformerBlock(nnx.Module):
    """Attention between the tokens, then the same dense layers for each: [B, tokens, features] to
    the same shape."""

    def __init__(self, features, heads, *, rngs):
        self.norm1 = nnx.LayerNorm(features, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, features, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(features, rngs=rngs)
        self.dense1 = nnx.Linear(features, 2 * features, rngs=rngs)
        self.dense2 = nnx.Linear(2 * features, features, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.dense2(nnx.gelu(self.dense1(self.norm2(x))))


class VisionTransformer(nnx.Module):
    """Three blocks of attention over 49 patches: images [B, 28, 28, 1] to [B, classes]."""

    def __init__(self, num_classes=10, *, rngs):
        features = 64
        self.embed = nnx.Linear(4 * 4, features, rngs=rngs)
        places = 0.02 * jax.random.normal(rngs.params(), (49, features), jnp.float32)
        self.positions = nnx.Param(places)
        self.block1 = TransformerBlock(features, 4, rngs=rngs)
        self.block2 = TransformerBlock(features, 4, rngs=rngs)
        self.block3 = TransformerBlock(features, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.dense = nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, x, train=False):  # the same in training: neither dropout nor BatchNorm
        rows = x.reshape(-1, 7, 4, 7, 4)  # 7 rows of patches, 4 pixels high, and 7 columns
        patches = rows.transpose(0, 1, 3, 2, 4).reshape(-1, 49, 4 * 4)
        x = self.embed(patches) + self.positions[...]
        x = self.block1(x)
        x = self.block2(x)
        x = self.block3(x)
        return self.dense(self.norm(x).mean(axis=1))  # over tokens; the paper adds a class token


# %% Small networks of other kinds


class SeparableConv(nnx.Module):
    """A depthwise convolution, a filter for each channel alone, then a pointwise one, which mixes
    the channels (Howard et al., 2017): [B, H, W, in] to [B, H / stride, W / stride, out]."""

    def __init__(self, channels_in, channels_out, stride, *, rngs):
        self.depthwise = nnx.Conv(
            channels_in, channels_in, (3, 3), stride, feature_group_count=channels_in,
            conv_general_dilated=depthwise_conv, rngs=rngs,
        )  # fmt: skip
        self.bn1 = nnx.BatchNorm(channels_in, momentum=0.9, rngs=rngs)
        self.pointwise = nnx.Conv(channels_in, channels_out, (1, 1), rngs=rngs)
        self.bn2 = nnx.BatchNorm(channels_out, momentum=0.9, rngs=rngs)

    def __call__(self, x, train=False):
        x = nnx.relu(self.bn1(self.depthwise(x), use_running_average=not train))
        return nnx.relu(self.bn2(self.pointwise(x), use_running_average=not train))


class SeparableCNN(nnx.Module):
    """A small MobileNet: images [B, 28, 28, 1] to [B, classes]."""

    def __init__(self, num_classes=10, *, rngs):
        self.conv = nnx.Conv(1, 16, (3, 3), conv_general_dilated=conv, rngs=rngs)
        self.bn = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.block1 = SeparableConv(16, 32, 1, rngs=rngs)  # behind pooling: 14
        self.block2 = SeparableConv(32, 64, 2, rngs=rngs)  # 14 → 7
        self.block3 = SeparableConv(64, 128, 1, rngs=rngs)
        self.dense = nnx.Linear(128, num_classes, rngs=rngs)

    def __call__(self, x, train=False):
        x = max_pool(nnx.relu(self.bn(self.conv(x), use_running_average=not train)))
        x = self.block1(x, train)
        x = self.block2(x, train)
        x = self.block3(x, train)
        return self.dense(x.mean(axis=(1, 2)))


class MLP(nnx.Module):
    """Two hidden layers over the pixels: images [B, 28, 28, 1] to [B, classes]. It has about as
    many parameters as StudentCNN."""

    def __init__(self, num_classes=10, *, rngs):
        self.dense1 = nnx.Linear(28 * 28, 64, rngs=rngs)
        self.dense2 = nnx.Linear(64, 64, rngs=rngs)
        self.dense3 = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, x, train=False):
        x = nnx.relu(self.dense1(x.reshape(x.shape[0], -1)))
        return self.dense3(nnx.relu(self.dense2(x)))


# Each takes (classes, rngs=...), and is called with (images, train=...). For one of your own add it
# here, its name to `Architecture`, and its learning rates to the settings below.
NETWORKS = {
    "cnn": functools.partial(ScaledCNN, 1),
    "resnet": ResNet,
    "vit": VisionTransformer,
    "student_cnn": StudentCNN,
    "cnn_half": functools.partial(ScaledCNN, 1 / 2),
    "cnn_quarter": functools.partial(ScaledCNN, 1 / 4),
    "cnn_eighth": functools.partial(ScaledCNN, 1 / 8),
    "separable": SeparableCNN,
    "mlp": MLP,
}


def make_network(architecture, classes, seed):
    """A fresh network by the name of its architecture. Raises ValueError if none has it."""
    if architecture not in NETWORKS:
        raise ValueError(f"architecture {architecture!r}: must be one of {', '.join(NETWORKS)}")
    return NETWORKS[architecture](classes, rngs=nnx.Rngs(seed))


def count_flops(network):
    """Floating-point operations for the logits of one image, as XLA's cost analysis counts them
    for this machine's program: a multiplication and an addition are two, an exponential none."""
    graphdef, state = nnx.split(network)

    def forward(state, image):
        return nnx.merge(graphdef, state)(image, train=False)

    image = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    return int(jax.jit(forward).lower(state, image).cost_analysis()["flops"])


# %% Loss
# That of script 15. It compares logits and does not look inside the networks, so any architecture
# may learn from any other that knows the same classes. T defaults to 3 in these functions, for
# those who copy them; `main` passes the flags' T and alpha.


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
# One step for those who learn from labels alone, teachers and baselines, and one for those who are
# taught. They take any network that is called with (images, train=...). Here no teacher is passed
# to the second: its logits come with the batch.


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


@functools.cache  # equal settings give the same object, so that a step is not compiled anew
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


def train_on_labels_alone(name, architecture, split, classes, recipe, run):
    """Trains a network, a teacher or a baseline, on the labels of a split."""
    network = make_network(architecture, classes, recipe.seed)
    optimizer = make_optimizer(network, recipe, len(split.label))
    step = compile_step(train_step, network, optimizer)

    training = Training(run, name, network, optimizer, recipe, split)
    for epoch in training.epochs():
        for batch in batches(split, recipe.batch_size, recipe.seed, epoch, recipe.augmentation):
            training.log(step(batch))
    return network


def train_on_teacher_logits(
    name, architecture, labelled, teacher_logits, recipe, run, temperature, alpha
):
    """Trains a student on the baseline's images, with their labels and soft targets, from the
    baseline's initial weights.

    `teacher_logits` [N, C] has a row for each of the N training images, looked up by an image's
    index. They are answers to the images as they are, so students see no augmented ones.
    """
    student = make_network(architecture, teacher_logits.shape[-1], recipe.seed)
    optimizer = make_optimizer(student, recipe, len(labelled.label))
    step = compile_step(train_student_step, student, None, optimizer)  # no teacher: its logits

    training = Training(run, name, student, optimizer, recipe, labelled)
    for epoch in training.epochs():
        labelled_batches = batches(
            labelled, recipe.batch_size, recipe.seed, epoch, teacher_logits=teacher_logits
        )
        for batch in labelled_batches:
            training.log(step(batch, temperature, alpha))
    return student


# %% Settings
# What a flag leaves open is chosen here.

TEACHERS = ("cnn", "resnet", "vit")
STUDENTS = ("student_cnn", "cnn_half", "cnn_quarter", "cnn_eighth", "separable", "mlp")

# Peak learning rates, each the best of its search on validation images of Fashion-MNIST, with as
# many trials for baselines as for students, whose teacher was a CNN (docs/provenance.md).
TEACHER_RATES = {"cnn": 2e-3, "resnet": 1e-2, "vit": 4e-3}
BASELINE_RATES = {
    "student_cnn": 4e-2,
    "cnn_half": 2e-2,
    "cnn_quarter": 1e-2,
    "cnn_eighth": 2e-2,
    "separable": 4e-2,
    "mlp": 2e-2,
}
DISTILLED_RATES = {
    "student_cnn": 4e-2,
    "cnn_half": 1e-2,
    "cnn_quarter": 4e-2,
    "cnn_eighth": 4e-2,
    "separable": 4e-2,
    "mlp": 2e-2,
}
OTHER_RATE = 5e-3  # of an architecture without an entry, such as an MLP as a teacher


def fill_in_defaults(config, data):
    """The config with teachers, students and labels, where they were left open."""
    if config.quick:
        config = experiment.with_defaults(
            config, teachers=("cnn",), students=("student_cnn", "mlp")
        )
    labels = 100 if config.quick or data.name == "digits" else 5000
    return experiment.with_defaults(config, teachers=TEACHERS, students=STUDENTS, labels=labels)


def recipe_of_teacher(config, data, architecture):
    """How a teacher is trained, whatever the students' flags say."""
    epochs = 3
    if data.name == "digits":
        epochs = 16
    if config.quick:
        epochs = 5
    if config.teacher_epochs is not None:
        epochs = config.teacher_epochs
    rate = TEACHER_RATES.get(architecture, OTHER_RATE)
    if config.teacher_learning_rate is not None:
        rate = config.teacher_learning_rate
    images = len(data.train.label)
    batch_size = 32 if images < 10_000 else 128
    too_few = f"{data.name}: {images} training images; a teacher needs {batch_size}"
    require(images >= batch_size, too_few)
    # Shifts need more epochs than the three of Fashion-MNIST.
    augmentation = "none" if data.name == "fashion_mnist" else "shift"
    return Recipe(config.teacher_seed, epochs, batch_size, rate, "onecycle", augmentation)


def recipe_of_student(config, data, architecture, seed, labels, rates):
    """How a baseline or a student is trained on so many labels, by the `rates` of its kind. Epochs
    are those of script 21: with more labels fewer."""
    epochs = round(60 * (1000 / labels) ** 0.66)
    batch_size = 128
    if data.name == "fashion_mnist":
        epochs = round(30 * (1000 / labels) ** 0.34)
    if len(data.train.label) < 10_000:  # the digits, or --quick
        epochs = 120
        batch_size = 32
    rate = rates.get(architecture, OTHER_RATE)
    if config.epochs is not None:
        epochs = config.epochs
    if config.learning_rate is not None:
        rate = config.learning_rate
    batch_size = min(batch_size, labels)
    if config.batch_size is not None:
        batch_size = config.batch_size
    check_batch_size("--batch-size", batch_size, labels)
    return Recipe(seed, epochs, batch_size, rate, "onecycle")


# %% Figure
# Errors of every network against its time for one image.


def name_of_teacher(architecture):
    """The name of a teacher, in the results and of its files."""
    return f"teacher {architecture}"


def name_of_baseline(architecture):
    """The name of a student that learns from labels alone."""
    return f"baseline {architecture}"


def name_of_pair(architecture, teacher_architecture):
    """The name of a student and its teacher: "mlp from vit" is an MLP that a ViT has taught."""
    return f"{architecture} from {teacher_architecture}"


def find_pairs(run, teachers, students):
    """The names (student and teacher, its baseline) of all pairs that were trained."""
    pairs = []
    for architecture in students:
        for teacher in teachers:
            name = name_of_pair(architecture, teacher)
            if run.accuracies(name):
                pairs.append((name, name_of_baseline(architecture)))
    return pairs


# Of the students that a network teaches.
TEACHER_MARKERS = {
    "cnn": "v", "resnet": "s", "vit": "^", "student_cnn": "D", "cnn_half": "<",
    "cnn_quarter": ">", "cnn_eighth": "p", "separable": "h", "mlp": "P",
}  # fmt: skip


def draw(run, teachers, students):
    """Draws the figure of a run: mean errors against the milliseconds for an image, and a grey line
    through the networks that no other beats in both."""
    figure = Figure(figsize=(plots.WIDTH, 4.8), layout="constrained")
    axes = figure.subplots()
    places = []  # (milliseconds, errors) of all networks

    def add_dot(name, milliseconds, marker, label):
        errors = float(plots.to_errors(run.accuracies(name), run.data).mean())
        places.append((milliseconds, errors))
        in_legend = label in axes.get_legend_handles_labels()[1]
        axes.plot(
            milliseconds, errors, marker, color=plots.colour_of(name),
            label=None if in_legend else label,
        )  # fmt: skip
        return errors

    for architecture in teachers:
        name = name_of_teacher(architecture)
        milliseconds = run.values(name, "latency_ms")[0]["1"]  # of a batch of 1
        errors = add_dot(name, milliseconds, "o", "teacher")
        write_below(axes, architecture, milliseconds, errors)
    for architecture in students:
        baseline = name_of_baseline(architecture)
        milliseconds = run.values(baseline, "latency_ms")[0]["1"]
        errors = [add_dot(baseline, milliseconds, "o", "baseline")]
        for teacher in teachers:
            name = name_of_pair(architecture, teacher)
            if run.accuracies(name):
                marker = TEACHER_MARKERS[teacher]
                errors.append(add_dot(name, milliseconds, marker, f"distilled from {teacher}"))
        axes.plot([milliseconds] * 2, [min(errors), max(errors)], color="0.9", zorder=0)
        write_below(axes, architecture, milliseconds, min(errors))

    frontier = find_frontier(places)
    if len(frontier) > 1:
        axes.plot(*zip(*frontier, strict=True), color="0.7", zorder=0, label="frontier")
    axes.margins(0.1, 0.15)
    axes.set(xscale="log", yscale="log", xlabel="milliseconds for one image, on one device")
    axes.set_ylabel(f"{run.data.scored_on} errors, %")
    plots.write_out_numbers(axes.xaxis)
    plots.write_out_numbers(axes.yaxis)
    axes.set_title(say_what_teachers_add(run, teachers, students))
    axes.legend(fontsize="small")
    return figure


def write_below(axes, text, x, y):
    """Writes the name of an architecture below its lowest dot."""
    axes.annotate(
        text, (x, y), xytext=(0, -14), textcoords="offset points", ha="center", fontsize="small"
    )


def find_frontier(places):
    """Those of the places (cost, errors) that no other beats in one without losing in the other,
    from cheap to dear. A cost may be milliseconds or bytes."""
    frontier = []
    for cost, errors in sorted(places):
        if not frontier or errors < frontier[-1][1]:
            frontier.append((cost, errors))
    return frontier


def say_what_teachers_add(run, teachers, students):
    """The figure's message: the smallest and the largest mean gain of a student over its
    baseline."""
    gains = []
    for name, baseline in find_pairs(run, teachers, students):
        gains.append(np.mean(np.subtract(run.accuracies(name), run.accuracies(baseline))))
    if not gains:
        return "Errors and time of each network"
    smallest, largest = plots.signed_points(min(gains)), plots.signed_points(max(gains))
    if len(gains) == 1:
        return f"Gain over the baseline: {smallest}"
    return f"Gains of {len(gains)} pairs over the baseline: {smallest} to {largest}"


# %% Main
# First all teachers. Then, for each seed and each student's architecture, a baseline and a student
# of every teacher.


def plan_students(config, run):
    """For each seed and architecture: (architecture, its labelled images, the baseline's recipe,
    the taught students' recipe)."""
    planned = []
    for seed in run.seeds(config.seeds):
        labelled = take_labels(run.data.train, config.labels, seed)
        for architecture in config.students:
            settings = (config, run.data, architecture, seed, len(labelled.label))
            baseline_recipe = recipe_of_student(*settings, BASELINE_RATES)
            distilled_recipe = recipe_of_student(*settings, DISTILLED_RATES)
            planned.append((architecture, labelled, baseline_recipe, distilled_recipe))
    return planned


def summarise_pairs(run, teachers, students):
    """The summary's lines: each pair against its baseline, then each network's FLOPs."""
    lines = {}
    for name, baseline in find_pairs(run, teachers, students):
        lines[f"{name} − {baseline}"] = run.compare(name, baseline)
    names = [name_of_teacher(x) for x in teachers] + [name_of_baseline(x) for x in students]
    for name in names:
        lines[f"FLOPs for an image, {name}"] = f"{run.values(name, 'flops')[0] / 1e6:.2f} million"
    return lines


def main(config):
    run = experiment.start(config)
    data = run.data
    config = fill_in_defaults(config, data)
    run.config = config
    # All recipes first: a flag that does not fit is found before anything is trained.
    teacher_recipes = {x: recipe_of_teacher(config, data, x) for x in config.teachers}
    students_to_train = plan_students(config, run)

    # Each teacher is trained once, on all labels. From then on it is only its logits.
    networks = {}  # by name, for the measurement of their times
    train_logits_of = {}  # by the teacher's architecture
    test_logits_of = {}
    for architecture, recipe in teacher_recipes.items():
        name = name_of_teacher(architecture)
        experiment.print_heading(f"{name.upper()}: all {len(data.train.label):,} labels")
        teacher = train_on_labels_alone(name, architecture, data.train, data.classes, recipe, run)
        train_logits_of[architecture] = predict_by_index(teacher, data.train)
        test_logits_of[architecture] = predict(teacher, data.test)
        flops = count_flops(teacher)
        run.add_row(name, teacher, test_logits_of[architecture], flops=flops)
        networks[name] = teacher

    for architecture, labelled, baseline_recipe, distilled_recipe in students_to_train:
        of_seed = f"seed {baseline_recipe.seed}, {len(labelled.label):,} labels"
        name = name_of_baseline(architecture)
        experiment.print_heading(f"{name.upper()}: {of_seed}, no teacher")
        baseline = train_on_labels_alone(
            name, architecture, labelled, data.classes, baseline_recipe, run
        )
        flops = count_flops(baseline)
        run.add_row(name, baseline, predict(baseline, data.test), flops=flops)
        networks[name] = baseline

        for teacher in config.teachers:
            if teacher == architecture:  # a network as its own teacher: see script 18
                continue
            name = name_of_pair(architecture, teacher)
            experiment.print_heading(f"{name.upper()}: {of_seed} and their soft targets")
            student = train_on_teacher_logits(
                name, architecture, labelled, train_logits_of[teacher], distilled_recipe, run,
                config.temperature, config.alpha,
            )  # fmt: skip
            run.add_row(
                name, student, predict(student, data.test),
                teacher_logits=test_logits_of[teacher], flops=flops,
            )  # fmt: skip

    # Teachers and baselines: a student computes what its baseline does, in the same time.
    for name, network in networks.items():
        run.measure_inference(name, network)
    figure = draw(run, config.teachers, config.students)
    return run.finish(figure, summarise_pairs(run, config.teachers, config.students))


if __name__ == "__main__":
    experiment.run_script(main, Config)
