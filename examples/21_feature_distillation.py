# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "numpy>=2.2,<3", "tqdm>=4.66,<5", "tyro>=1.0.8,<2", "typeguard>=4,<5", "filelock>=3.20,<5",
#   "matplotlib>=3.9,<4", "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""Feature distillation: what can a student match besides logits?

A teacher has more to give than its logits: feature maps, an embedding, the relations of the images
in a batch. Four ways to match those, and one to split the loss of the logits in two, each of a few
lines, are compared with plain distillation and with labels alone. The teacher is trained on all
labels of Fashion-MNIST, the students on 10,000.

    python examples/21_feature_distillation.py              # one seed: 10 to 30 minutes
    python examples/21_feature_distillation.py --seeds 5    # five seeds, with intervals
    python examples/21_feature_distillation.py --quick      # a first look: about a minute

Times are for 2 CPU cores, fast or slow; most is the teacher. Without Fashion-MNIST and the
internet, the data are scikit-learn's digits.
Romero et al.: FitNets, 2015, arXiv:1412.6550. Zagoruyko, Komodakis: Attention Transfer, 2017,
arXiv:1612.03928. Park et al.: Relational Knowledge Distillation, 2019, arXiv:1904.05068. Tian,
Krishnan, Isola: Contrastive Representation Distillation, 2020, arXiv:1910.10699. Zhao et al.:
Decoupled Knowledge Distillation, 2022, arXiv:2203.08679.
"""

import dataclasses
import functools
from typing import Annotated, Literal, NamedTuple

import experiment
import jax
import jax.numpy as jnp
import numpy as np
import optax
import plots
from experiment import OPEN, Range, Recipe, Seed, Training
from fast import compile_step, conv, max_pool  # same results as nnx's, faster on CPUs
from flax import nnx
from utils import batches, check_batch_size, evaluate, predict, require, take_labels


@dataclasses.dataclass(frozen=True)
class Config(experiment.CommonFlags):
    output_dir: str = "runs/21_feature_distillation"
    """Folder for results, figure, weights and checkpoints."""
    dataset: Literal["mnist", "fashion_mnist", "kmnist", "digits"] = "fashion_mnist"
    """The dataset. The digits are embedded in scikit-learn and work offline."""
    seed: Seed = 42
    """First seed of the students: labelled images, initial weights, order of batches."""
    seeds: Annotated[int, Range(1, 100)] = 1
    """Number of seeds, one after another."""
    methods: Annotated[
        tuple[Literal["decoupled", "hints", "attention", "relations", "contrast"], ...] | None, OPEN
    ] = None
    """What students match, beside the baseline and plain distillation (default: all; quick
    decoupled hints)."""
    weight: Annotated[float | None, Range(0, 1e6), OPEN] = None
    """Weight of the method's loss; needs a single one in --methods (default: as was searched)."""
    labels: Annotated[int | Literal["all"] | None, Range(10), OPEN] = None
    """Labelled images of the students, or all (default: 10000; digits and quick 100)."""
    epochs: Annotated[int | None, Range(0, 10_000), OPEN] = None
    """Epochs of each student (default: by the number of labels; digits and quick 120)."""
    batch_size: Annotated[int | None, Range(1), OPEN] = None
    """Students' images in a batch (default: 128, digits and quick 32, or all there are)."""
    learning_rate: Annotated[float | None, Range(0, low_excluded=True), OPEN] = None
    """Students' peak learning rate (default: by the number of labels; digits and quick 1e-2; 1e-3
    with a constant schedule)."""
    schedule: Literal["onecycle", "constant"] = "onecycle"
    """Course of the students' learning rate: rising and falling in one cycle, or constant."""
    temperature: Annotated[float | None, Range(0.001, 10_000), OPEN] = None
    """Temperature T of the logits' loss, plain and decoupled (default: 4)."""
    alpha: Annotated[float | None, Range(0, 1), OPEN] = None
    """Weight of the labels where the logits have 1 - alpha (default: 0.5). Students without the
    logits have the labels at weight 1."""
    teacher: Annotated[str | None, OPEN] = None
    """Output folder of a run whose teacher to take: of several, the one with --teacher-seed
    (default: train one)."""
    teacher_seed: Seed = 0
    """Seed of the teacher: initial weights, dropout, order of batches."""


# %% Models
# Teacher and student of script 15, unchanged: `__call__` returns logits only.


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


# %% What a network computes on its way
# Here both forward passes are written out, layer by layer as in the classes above, and return what
# lies between. Whoever changes a class changes its function, too. All features are taken after
# ReLU, of student and teacher alike. For a project of your own, write such a function for each of
# your networks, and copy the loss that you want with the functions that it calls. Hints and
# contrast need adapters too, and an optimizer of both, as in `train_feature_step`.


class Features(NamedTuple):
    """What a network computes of images [B, 28, 28, 1]."""

    maps: list  # behind each block of convolution and pooling: [B, H, W, C]
    embedding: jax.Array  # the last hidden layer: [B, D]
    logits: jax.Array  # [B, classes]


def compute_student_features(student, images, train=False):
    """The forward pass of StudentCNN: maps [B, 13, 13, 16] and [B, 5, 5, 32], embedding [B, 64]."""
    x = student.bn1(student.conv1(images), use_running_average=not train)
    map_1 = max_pool(nnx.relu(x))
    x = student.bn2(student.conv2(map_1), use_running_average=not train)
    map_2 = max_pool(nnx.relu(x))
    embedding = nnx.relu(student.dense1(map_2.reshape(len(images), -1)))
    return Features([map_1, map_2], embedding, student.dense2(embedding))


def compute_teacher_features(teacher, images):
    """The forward pass of TeacherCNN in inference mode: maps [B, 14, 14, 64], [B, 7, 7, 128] and
    [B, 3, 3, 128], embedding [B, 256]."""
    x = teacher.bn1(teacher.conv1(images), use_running_average=True)
    map_1 = max_pool(nnx.relu(x))
    x = teacher.bn2(teacher.conv2(map_1), use_running_average=True)
    map_2 = max_pool(nnx.relu(x))
    x = teacher.bn3(teacher.conv3(map_2), use_running_average=True)
    map_3 = max_pool(nnx.relu(x))
    hidden = nnx.relu(teacher.dense1(map_3.reshape(len(images), -1)))
    embedding = nnx.relu(teacher.dense2(hidden))
    return Features([map_1, map_2, map_3], embedding, teacher.dense3(embedding))


class Adapters(nnx.Module):
    """Layers that some methods train beside the student, where the two networks' features differ in
    width. They are thrown away afterwards: a student computes its logits without them."""

    def __init__(self, *, rngs):
        self.hint_adapter = nnx.Conv(32, 128, (1, 1), rngs=rngs)  # the student's channels to 128
        self.student_projection = nnx.Linear(64, 128, rngs=rngs)  # both embeddings to one space
        self.teacher_projection = nnx.Linear(256, 128, rngs=rngs)


# %% Losses of the logits
# Those of script 15, and its soft loss split in two. In `soft_loss` the second part has the weight
# 1 − p[label], which is nearly nothing where the teacher is sure of the label.


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


def decoupled_loss(student_logits, teacher_logits, labels, temperature=3.0, non_target_weight=8.0):
    """Decoupled distillation (Zhao et al., 2022), from logits [B, C] of both and labels [B]: how
    sure a network is of the label, and how it shares out the rest among the other classes.

    With `non_target_weight` 1 − p[label] of the teacher, for each image and at temperature T, it
    would be `soft_loss`. Raises ValueError where the shapes do not fit: they would broadcast.
    """
    student_logits = at_least_float32(student_logits) / temperature
    teacher_logits = jax.lax.stop_gradient(at_least_float32(teacher_logits)) / temperature
    if student_logits.shape != teacher_logits.shape:
        shapes = f"student_logits {student_logits.shape}, teacher_logits {teacher_logits.shape}"
        raise ValueError(f"{shapes}: must be of the same shape [B, C]")
    if jnp.shape(labels) != student_logits.shape[:1]:
        raise ValueError(f"labels {jnp.shape(labels)}: must be [B], one for each row of logits")
    is_label = jax.nn.one_hot(labels, student_logits.shape[-1], dtype=bool)
    student_label, student_others, student_shares = split_log_probs(student_logits, is_label)
    teacher_label, teacher_others, teacher_shares = split_log_probs(teacher_logits, is_label)

    # target = KL of the two probabilities (p[label], 1 − p[label]), teacher ‖ student
    target = jnp.exp(teacher_label) * (teacher_label - student_label)
    target += jnp.exp(teacher_others) * (teacher_others - student_others)
    # non_target = KL of the other classes' shares of 1 − p[label], teacher ‖ student
    shares = jnp.where(is_label, 0.0, jnp.exp(teacher_shares))
    non_target = (shares * (teacher_shares - student_shares)).sum(axis=-1)
    # decoupled = T² · (target + β · non_target), mean over the batch
    return temperature**2 * (target + non_target_weight * non_target).mean()


def split_log_probs(logits, is_label):
    """From logits [B, C]: log p[label] [B], log(1 − p[label]) [B], and the logarithms of the shares
    p[c] / (1 − p[label]) of the other classes c [B, C], with 0 in the label's place."""
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    log_sum_of_others = jax.nn.logsumexp(logits, axis=-1, where=~is_label)
    label_logit = jnp.where(is_label, logits, 0.0).sum(axis=-1)
    log_shares = jnp.where(is_label, 0.0, logits - log_sum_of_others[:, None])
    return label_logit - log_sum, log_sum_of_others - log_sum, log_shares


# %% Losses of features
# Each compares something of the student with the same thing of the teacher, through which no
# gradient flows. The contrast alone has a gradient on the teacher's side, for an adapter there.


def hint_loss(adapted_map, teacher_map):
    """Hints of FitNets (Romero et al., 2015), from feature maps of one shape [B, H, W, C]: the
    student's, as the adapter brings it to the teacher's width, and the teacher's. The paper matches
    hints before it distils; here both are done at once.

    Raises ValueError where the shapes differ: they would broadcast to a wrong loss.
    """
    if adapted_map.shape != teacher_map.shape:
        shapes = f"adapted_map {adapted_map.shape}, teacher_map {teacher_map.shape}"
        raise ValueError(f"{shapes}: must be of the same shape [B, H, W, C]")
    # hint = (r(f_student) − f_teacher)², r the adapter, mean over all entries
    return ((adapted_map - jax.lax.stop_gradient(teacher_map)) ** 2).mean()


def attend(feature_map):
    """Where a network looks, from a feature map [B, H, W, C]: attention [B, H · W] of length 1."""
    # a = e / ‖e‖, where e = Σ_c f_c² over the channels c
    energy = (at_least_float32(feature_map) ** 2).sum(axis=-1).reshape(len(feature_map), -1)
    return normalise(energy)


def attention_loss(student_attention, teacher_attention):
    """Attention transfer (Zagoruyko and Komodakis, 2017), from attentions [B, H · W] of both.

    Raises ValueError where the shapes differ: they would broadcast to a wrong loss.
    """
    if student_attention.shape != teacher_attention.shape:
        shapes = f"student {student_attention.shape}, teacher {teacher_attention.shape}"
        raise ValueError(f"attentions of {shapes}: must be of the same shape [B, H · W]")
    # attention = ‖a_student − a_teacher‖², mean over the batch
    difference = student_attention - jax.lax.stop_gradient(teacher_attention)
    return (difference**2).sum(axis=-1).mean()


def relation_loss(student_embedding, teacher_embedding):
    """Relational distillation (Park et al., 2019), from embeddings [B, D] of any two widths: how
    far the images of a batch are apart, and in which angles they see each other. Memory grows with
    B³.

    Raises ValueError where the numbers of images differ: they would broadcast to a wrong loss.
    """
    if len(student_embedding) != len(teacher_embedding):
        counts = f"{len(student_embedding)} and {len(teacher_embedding)} images"
        raise ValueError(f"embeddings of {counts}: must be of the same images")
    teacher_embedding = jax.lax.stop_gradient(teacher_embedding)
    # relations = Huber(d_student − d_teacher) + 2 · Huber(cos_student − cos_teacher), means
    huber = optax.losses.huber_loss
    distance = huber(measure_distances(student_embedding), measure_distances(teacher_embedding))
    angle = huber(measure_angles(student_embedding), measure_angles(teacher_embedding))
    return distance.mean() + 2 * angle.mean()


def measure_distances(embedding):
    """The distances of each two images of a batch in units of their mean: [B, D] to [B, B]."""
    squares = square_distances(embedding)
    apart = squares > 0  # the square root has no gradient at 0
    distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0)
    # d_ij = ‖x_i − x_j‖ / μ, where μ is the mean over all pairs that are apart
    mean = distance.sum() / jnp.maximum(apart.sum(), 1)
    return distance / (mean + 1e-8)


def measure_angles(embedding):
    """The cosines of the angles at image j between images i and k: [B, D] to [B, B, B], in the
    order j, i, k."""
    embedding = at_least_float32(embedding)
    embedding = embedding - embedding.mean(axis=0)  # no angle changes, and less is rounded off
    products = embedding @ embedding.T
    # ⟨x_i − x_j, x_k − x_j⟩ = ⟨x_i, x_k⟩ − ⟨x_j, x_i⟩ − ⟨x_j, x_k⟩ + ⟨x_j, x_j⟩
    of_j = jnp.diagonal(products)[:, None, None]
    dots = products - products[:, :, None] - products[:, None, :] + of_j
    # cos ∠ijk = ⟨x_i − x_j, x_k − x_j⟩ / (‖x_i − x_j‖ · ‖x_k − x_j‖)
    squares = square_distances(embedding)
    apart = squares > 0
    scale = jnp.where(apart, 1 / jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0)
    return dots * scale[:, :, None] * scale[:, None, :]


def square_distances(embedding):
    """The squared distances of each two images of a batch: [B, D] to [B, B]."""
    embedding = at_least_float32(embedding)
    return ((embedding[:, None] - embedding[None]) ** 2).sum(axis=-1)


def contrast_loss(student_projection, teacher_projection, labels, tau=0.1):
    """Contrastive representation distillation (Tian et al., 2020), from projections [B, D] of both
    embeddings and labels [B].

    A critic tells whether a student's and a teacher's projection are of the same image: h is its
    probability that they are. Images of the same label make no pair. The gradient is for both
    projections: it trains the adapters of student and teacher. Where the paper has a memory of the
    training set, here the batch has the other images.

    Raises ValueError where the shapes do not fit: they would broadcast to a wrong loss.
    """
    shapes = [jnp.shape(x) for x in (student_projection, teacher_projection, labels)]
    if shapes[0] != shapes[1] or shapes[2] != shapes[0][:1]:
        raise ValueError(f"projections and labels {shapes}: must be [B, D], [B, D], [B]")
    other_label = labels[:, None] != labels[None]  # [B, B]
    negatives = jnp.maximum(other_label.sum(axis=1, keepdims=True), 1)
    # s_ij = cos(student's image i, teacher's image j) / τ
    scores = normalise(student_projection) @ normalise(teacher_projection).T / tau
    # h = e^s / (e^s + N), with N pairs of two images to each pair of one
    log_odds = scores - jnp.log(negatives)
    log_prob_same = jax.nn.log_sigmoid(jnp.diagonal(log_odds))
    log_prob_different = jnp.where(other_label, jax.nn.log_sigmoid(-log_odds), 0.0)
    # contrast = −log h_ii − Σ_j log(1 − h_ij) over all j of another label, mean over i
    return -(log_prob_same + log_prob_different.sum(axis=1)).mean()


def normalise(vectors):
    """Vectors [B, D] brought to length 1; a vector of zeros stays, and has a finite gradient."""
    vectors = at_least_float32(vectors)
    return vectors / jnp.sqrt((vectors**2).sum(axis=-1, keepdims=True) + 1e-12)


# %% Steps
# `train_step` is the teacher's and the baseline's, on labels alone. `train_feature_step` is that of
# all other students. The teacher is frozen and not part of the step: what it says of an image was
# computed once and comes with the batch. The gradient is for student and adapters, and one
# optimizer changes both.


@nnx.jit
def train_step(model, optimizer, batch):
    """One step on the labels alone. Returns the scalars loss and accuracy."""

    def loss_fn(model):
        logits = model(batch["image"], train=True)
        return hard_loss(logits, batch["label"]), logits

    (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    return {"loss": loss, "accuracy": (logits.argmax(-1) == batch["label"]).mean()}


def feature_loss(method, student_features, adapters, batch, temperature):
    """The loss of what a student is to match: a scalar. Raises ValueError for an unknown method."""
    if method == "logits":  # which are in the loss already
        return 0.0
    if method == "decoupled":
        return decoupled_loss(
            student_features.logits, batch["teacher_logits"], batch["label"], temperature
        )
    if method == "hints":
        adapted_map = adapters.hint_adapter(student_features.maps[1])
        return hint_loss(adapted_map, batch["teacher_map"])
    if method == "attention":
        map_1, map_2 = student_features.maps
        loss_1 = attention_loss(attend(map_1), batch["teacher_attention_1"])
        loss_2 = attention_loss(attend(map_2), batch["teacher_attention_2"])
        return loss_1 + loss_2
    if method == "relations":
        return relation_loss(student_features.embedding, batch["teacher_embedding"])
    if method == "contrast":
        student_projection = adapters.student_projection(student_features.embedding)
        # A teacher that ran in the step would get no gradient, its adapter does.
        teacher_embedding = jax.lax.stop_gradient(batch["teacher_embedding"])
        teacher_projection = adapters.teacher_projection(teacher_embedding)
        return contrast_loss(student_projection, teacher_projection, batch["label"])
    raise ValueError(f"method {method!r}: is not known")


@nnx.jit(static_argnames="method")
def train_feature_step(
    student, adapters, optimizer, batch, method, weight, temperature=3.0, alpha=0.5
):
    """One step of a student on labels, on logits and on what the method matches. Alpha = 1 turns
    the logits off, weight = 0 the method.

    Returns the scalars loss, hard_loss, soft_loss, feature_loss and accuracy.
    """

    def loss_fn(networks):
        student, adapters = networks
        features = compute_student_features(student, batch["image"], train=True)
        loss, hard, soft = distillation_loss(
            features.logits, batch["teacher_logits"], batch["label"], temperature, alpha
        )
        matched = feature_loss(method, features, adapters, batch, temperature)
        # total = α · hard + (1 − α) · soft + weight · feature
        total = loss + weight * matched
        metrics = {"loss": total, "hard_loss": hard, "soft_loss": soft, "feature_loss": matched}
        accuracy = (features.logits.argmax(-1) == batch["label"]).mean()
        return total, metrics | {"accuracy": accuracy}

    networks = (student, adapters)
    grads, metrics = nnx.grad(loss_fn, has_aux=True)(networks)
    optimizer.update(networks, grads)
    return metrics


# %% The teacher's targets
# They are computed once, for all images of the students. The student's convolutions have no padding
# and lose the border of an image, so the teacher's maps are cut to as many places: each lies one
# pixel further down and to the right than the student's, which is as near as strides of two allow.


@nnx.jit
def compute_targets(teacher, images):
    """What a student may match of a teacher, from images [B, 28, 28, 1]: {name: array [B, ...]}."""
    features = compute_teacher_features(teacher, images)
    map_1, map_2, _ = features.maps
    map_1 = map_1[:, 1:, 1:]  # 14 × 14 to 13 × 13
    map_2 = map_2[:, 1:6, 1:6]  # 7 × 7 to 5 × 5
    return {
        "teacher_logits": features.logits,
        "teacher_embedding": features.embedding,
        "teacher_map": map_2,
        "teacher_attention_1": attend(map_1),
        "teacher_attention_2": attend(map_2),
    }


def tabulate_targets(teacher, split, batch_size=256):
    """The teacher's targets for all images of a split, in their order: {name: array [N, ...]}."""
    parts = []
    for start in range(0, len(split.label), batch_size):
        images = split.image[start : start + batch_size] / np.float32(255)
        # The last batch is filled up: another shape would be compiled anew.
        filled = np.pad(images, [(0, batch_size - len(images)), (0, 0), (0, 0), (0, 0)])
        targets = jax.device_get(compute_targets(teacher, filled))
        parts.append({name: rows[: len(images)] for name, rows in targets.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


# What each method needs, beside the logits.
NEEDED = {
    "decoupled": (),
    "hints": ("teacher_map",),
    "attention": ("teacher_attention_1", "teacher_attention_2"),
    "relations": ("teacher_embedding",),
    "contrast": ("teacher_embedding",),
}


# %% Training


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


def train_student_on_features(
    name, labelled, targets, classes, recipe, run, method, weight, temperature=3.0, alpha=0.5
):
    """Trains a student with the baseline's initial weights and on its batches.

    Args:
      labelled: the images; an image's index is its row in the tables.
      targets: the tables of what the method needs, {name: array [N, ...]}.
      method: what to match, as in `feature_loss`.
      weight: that of the method in the loss.
    """
    student = StudentCNN(classes, rngs=nnx.Rngs(recipe.seed))
    # Made once, before the training: adapters that are made anew in each step learn nothing.
    adapters = Adapters(rngs=nnx.Rngs(recipe.seed))
    optimizer = make_optimizer((student, adapters), recipe, len(labelled.label))
    step = compile_step(train_feature_step, student, adapters, optimizer)

    # The adapters are kept in the checkpoint, and do not belong to the student's weights.
    training = Training(run, name, student, (adapters, optimizer), recipe, labelled)
    for epoch in training.epochs():
        for batch in batches(labelled, recipe.batch_size, recipe.seed, epoch, **targets):
            metrics = step(
                batch, method=method, weight=weight, temperature=temperature, alpha=alpha
            )
            training.log(metrics)
    return student


# %% Settings
# What a flag leaves open is chosen here. Epochs, rates, temperature, alpha and the weight of each
# method were searched on validation images (docs/provenance.md).

# Weight of each method in the loss, beside the labels.
WEIGHTS = {
    "decoupled": 0.09,
    "hints": 10.0,
    "attention": 1.0,
    "relations": 100.0,
    "contrast": 0.9,
}
# The same beside labels and logits.
WEIGHTS_WITH_LOGITS = {"hints": 1.0, "attention": 1.0, "relations": 3.0, "contrast": 0.3}


def fill_in_defaults(config, data):
    """The config with a value for every flag that was left open, but those of `student_recipe`."""
    if config.quick:
        config = experiment.with_defaults(config, methods=("decoupled", "hints"))
    if config.quick or data.name == "digits":
        config = experiment.with_defaults(config, labels=100)
    config = experiment.with_defaults(
        config, methods=tuple(WEIGHTS), labels=10_000, temperature=4.0, alpha=0.5
    )
    one_method = config.weight is None or len(config.methods) == 1
    require(one_method, "--weight: is that of one method; name it with --methods")
    return config


def check_relations(config, batch_size):
    """Raises UserError where a batch has too few images to compare, or more triples than memory."""
    flag = f"--batch-size {batch_size}"
    if "relations" in config.methods or "contrast" in config.methods:
        too_few = f"{flag}: relations and contrast compare the images of a batch; at least 3"
        require(batch_size >= 3, too_few)
    if "relations" in config.methods:
        too_many = f"{flag}: relations compares all triples of a batch; at most 512"
        require(batch_size <= 512, too_many)


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


# %% The students of one seed
# All have the same labelled images, the same initial weights and the same batches. What they are to
# match is all that differs.


def train_students_of_all_methods(labelled, targets, classes, recipe, config, run):
    """Trains the students of one seed. Returns them by name."""
    students = {}
    experiment.print_heading(f"BASELINE: seed {recipe.seed}, labels alone")
    students["baseline"] = train_student_on_labels("baseline", labelled, classes, recipe, run)

    experiment.print_heading(f"DISTILLED: seed {recipe.seed}, labels and logits")
    logits_alone = {"teacher_logits": targets["teacher_logits"]}
    students["distilled"] = train_student_on_features(
        "distilled", labelled, logits_alone, classes, recipe, run,
        "logits", 0.0, config.temperature, config.alpha,
    )  # fmt: skip

    for method in config.methods:
        needed = {name: targets[name] for name in ("teacher_logits", *NEEDED[method])}
        weight = WEIGHTS[method]
        if config.weight is not None:
            weight = config.weight
        experiment.print_heading(f"{method.upper()}: seed {recipe.seed}, labels and {method}")
        students[method] = train_student_on_features(
            method, labelled, needed, classes, recipe, run,
            method, weight, config.temperature, alpha=1.0,
        )  # fmt: skip

        if method == "decoupled":  # which is the loss of the logits in another form
            continue
        weight = WEIGHTS_WITH_LOGITS[method]
        if config.weight is not None:
            weight = config.weight
        name = f"{method} and logits"
        heading = f"{name.upper()}: seed {recipe.seed}, labels, logits and {method}"
        experiment.print_heading(heading)
        students[name] = train_student_on_features(
            name, labelled, needed, classes, recipe, run,
            method, weight, config.temperature, config.alpha,
        )  # fmt: skip
    return students


# %% Figure


def draw(run, names):
    """Each student's gain over the plainly distilled one."""
    distilled = run.accuracies("distilled")
    gains = {}
    for name in names:
        if name != "distilled":
            gains[name] = np.subtract(run.accuracies(name), distilled)
    return plots.draw_gains(
        gains,
        say_how_many_gain(run, names),
        over="distilled student",
        over_colour=plots.COLOURS["distilled"],
    )


def say_how_many_gain(run, names):
    """The figure's message: how many students are ahead of plain distillation, how many behind."""
    ahead = 0
    behind = 0
    methods = [name for name in names if name not in ("baseline", "distilled")]
    for name in methods:
        difference = plots.find_difference(run.accuracies(name), run.accuracies("distilled"))
        if difference is not None and difference > 0:
            ahead += 1
        if difference is not None and difference < 0:
            behind += 1
    seed = " (one seed)" if len(run.accuracies("distilled")) == 1 else ""
    counted = f"{ahead or 'None'} of {len(methods)} ways"
    return f"{counted} ahead of plain distillation, {behind or 'none'} behind it{seed}"


# %% Main
# One teacher, then all students of each seed.


def main(config):
    run = experiment.start(config)
    data = run.data
    config = fill_in_defaults(config, data)
    run.config = config
    teacher_recipe = default_teacher_recipe(config, data)
    students_to_train = []  # for each seed: labelled images, and the students' recipe
    for seed in run.seeds(config.seeds):
        labelled = take_labels(data.train, config.labels, seed)
        recipe = student_recipe(config, data, seed, len(labelled.label))
        check_relations(config, recipe.batch_size)
        students_to_train.append((labelled, recipe))

    experiment.print_heading(f"TEACHER: all {len(data.train.label):,} labels")
    if config.teacher:
        fresh = TeacherCNN(data.classes, rngs=nnx.Rngs(0))
        teacher = run.take_teacher(fresh, data.train)
    else:
        teacher = train_teacher(data, teacher_recipe, run)
    teacher_logits = predict(teacher, data.test)
    run.add_row("teacher", teacher, teacher_logits, teacher_logits=teacher_logits)

    for labelled, recipe in students_to_train:
        targets = tabulate_targets(teacher, labelled)
        # These tables have the labelled images alone, so an image's index becomes its row there.
        rows = np.arange(len(labelled.label), dtype=np.int32)
        labelled = labelled._replace(index=rows)
        students = train_students_of_all_methods(
            labelled, targets, data.classes, recipe, config, run
        )
        for name, student in students.items():
            logits = predict(student, data.test)
            run.add_row(name, student, logits, teacher_logits=teacher_logits)

    summary = {}
    summary["distilled − baseline"] = run.compare("distilled", "baseline")
    for name in students:
        if name not in ("baseline", "distilled"):
            summary[f"{name} − distilled"] = run.compare(name, "distilled")
    return run.finish(draw(run, list(students)), summary)


if __name__ == "__main__":
    experiment.run_script(main, Config)
