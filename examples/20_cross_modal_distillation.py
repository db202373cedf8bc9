# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "numpy>=2.2,<3", "tqdm>=4.66,<5", "tyro>=1.0.8,<2", "typeguard>=4,<5", "filelock>=3.20,<5",
#   "matplotlib>=3.9,<4", "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""Cross-modal distillation: an image teacher for a text student, and the other way round.

A teacher reads one half of a pair of image and caption. The student learns the teacher's answer
from the other half and never sees a label. The captions are generated; some of the students' are
ambiguous or wrong. One more pair of students starts from encoders that were aligned on the pairs,
as in CLIP. Students of shuffled pairs are the control.

    python examples/20_cross_modal_distillation.py             # 4 to 5 minutes
    python examples/20_cross_modal_distillation.py --seeds 5   # five times: means and intervals
    python examples/20_cross_modal_distillation.py --quick     # a first look: about a minute

Times are for 2 CPU cores. Gupta, Hoffman, Malik: Cross Modal Distillation for Supervision Transfer,
2015, arXiv:1507.00448; the alignment is that of CLIP: Radford et al., 2021, arXiv:2103.00020.
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
    output_dir: str = "runs/20_cross_modal_distillation"
    """Folder for results, figure, weights and checkpoints."""
    seed: Seed = 42
    """First seed: captions, labelled captions, initial weights, order of batches."""
    seeds: Annotated[int, Range(1, 100)] = 1
    """Number of seeds, one after another; each repeats the whole experiment."""
    noise: Annotated[tuple[float, ...] | None, Range(0, 1), OPEN] = None
    """Shares of wrong captions; the first is that of the comparisons (default: 0 0.2 0.4 0.6 0.8;
    quick 0 0.8)."""
    ambiguous: Annotated[float, Range(0, 1)] = 0.1
    """Share of the training captions that fit several digits."""
    labels: Annotated[int | Literal["all"] | None, Range(10), OPEN] = None
    """Labelled captions of the text teacher, or all (default: 1000)."""
    epochs: Annotated[int | None, Range(0, 10_000), OPEN] = None
    """Epochs; the text teacher has 10 times as many (default: 4; digits 40; quick 4)."""
    batch_size: Annotated[int | None, Range(1), OPEN] = None
    """Pairs in a batch (default: 128; quick and digits 32). The text teacher's batches are no
    larger than its labelled captions are many."""
    learning_rate: Annotated[float, Range(0, low_excluded=True)] = 1e-3
    """Peak learning rate; that of text teacher and text students is 10 times as high."""
    temperature: Annotated[float, Range(0.001, 10_000)] = 1.0
    """Temperature T that softens the distributions of teachers and students."""


# %% The language of the captions
# The captions are generated, not written by people. A caption names its digit, or describes its
# shape by its parts, in one of six languages, and may say how the image looks. Two shapes can have
# the same parts: "stroke above loop" is a 6, "loop above stroke" a 9.


class Adjectives(NamedTuple):
    """How a language says what an image looks like."""

    thin: str
    thick: str
    slanted: str
    upright: str
    conjunction: str  # between two of the others


class Language(NamedTuple):
    """How to name the ten digits."""

    names: tuple[str, ...]  # of the digits 0 to 9
    adjectives: Adjectives
    templates: tuple[str, ...]  # what a name stands in; the last one is kept for the test


ENGLISH = Adjectives("thin", "thick", "slanted", "upright", "and")
FRENCH = Adjectives("fin", "gras", "penché", "droit", "et")
GERMAN = Adjectives("dünn", "dick", "schräg", "gerade", "und")

LANGUAGES = (
    Language(
        names=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        adjectives=ENGLISH,
        templates=("{}", "a {}", "the digit {}", "somebody wrote {} here"),
    ),
    Language(
        names=("zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf"),
        adjectives=FRENCH,
        templates=("{}", "c'est {}", "le chiffre {}", "on a tracé {} ici"),
    ),
    Language(
        names=("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"),
        adjectives=GERMAN,
        templates=("{}", "eine {}", "die ziffer {}", "hier steht {}"),
    ),
    Language(
        names=("0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
        adjectives=ENGLISH,
        templates=("{}", "nr {}", "number {}", "here is {}"),
    ),
    Language(  # the parts of a digit's shape, from above
        names=(
            "one loop",
            "one stroke",
            "bow above bar",
            "one bow above another",
            "hook above stroke",
            "bar above bow",
            "stroke above loop",
            "bar above stroke",
            "one loop above another",
            "loop above stroke",
        ),
        adjectives=ENGLISH,
        templates=("{}", "it shows {}", "drawn as {}", "might be described as {}"),
    ),
    Language(  # the parts of a digit's shape, from below
        names=(
            "only loop",
            "only stroke",
            "bar under bow",
            "one bow under another",
            "stroke under hook",
            "bow under bar",
            "loop under stroke",
            "stroke under bar",
            "one loop under another",
            "stroke under loop",
        ),
        adjectives=ENGLISH,
        templates=("{}", "it shows {}", "drawn as {}", "might be described as {}"),
    ),
)

AMBIGUOUS = {  # what fits several digits, and which
    "loop and stroke": (6, 9),
    "bow and bar": (2, 5),
    "the same twice": (3, 8),
    "with a loop": (0, 6, 8, 9),
    "all straight": (1, 4, 7),
}


# %% Wordings of training, and wordings of the test
# No wording of the test occurs in training. Held out are the last template of each language, and of
# its other templates a quarter of the pairs of template and digit.


class Wording(NamedTuple):
    """A text that says which digit it is, and the adjectives that go with it."""

    text: str
    adjectives: Adjectives


def is_held_out(digit, language_number, template_number):
    """Whether a digit's name in this template is kept for the test."""
    if template_number == 3:  # the last of four
        return True
    return (digit + language_number + template_number) % 4 == 0


def make_wordings(held_out):
    """Lists for each digit the Wordings that are held out for the test, or all the others."""
    wordings = []
    for digit in range(10):
        wordings_of_digit = []
        for language_number, language in enumerate(LANGUAGES):
            for template_number, template in enumerate(language.templates):
                if is_held_out(digit, language_number, template_number) == held_out:
                    text = template.format(language.names[digit])
                    wordings_of_digit.append(Wording(text, language.adjectives))
        wordings.append(wordings_of_digit)
    return wordings


def make_ambiguous_wordings():
    """Lists for each digit the Wordings that fit it, and other digits too."""
    wordings = []
    for digit in range(10):
        texts = [text for text, digits in AMBIGUOUS.items() if digit in digits]
        wordings.append([Wording(text, ENGLISH) for text in texts])
    return wordings


# %% How an image looks
# The adjectives are measured in the image itself, so that a caption is one of this image.


def measure_looks(images):
    """Says how images [N, 28, 28, 1] look, compared with one another: [N, 2] of −1, 0 or 1.

    The first is −1 for the thinnest third of the images and 1 for the thickest. The second is −1
    for the third that leans most to the right, and 1 for the third that leans least.
    """
    ink = images[..., 0] / np.float32(255) + 1e-6
    amount_of_ink = ink.sum((1, 2))
    # The upper half of an upright digit lies above the lower half, that of a slanted one further to
    # the right.
    upper_half = ink[:, :14]
    lower_half = ink[:, 14:]
    uprightness = find_centre(lower_half) - find_centre(upper_half)
    return np.stack([divide_into_thirds(amount_of_ink), divide_into_thirds(uprightness)], axis=1)


def find_centre(ink):
    """The mean column of the ink of images [N, rows, 28]: [N]."""
    ink_of_columns = ink.sum(1)
    return ink_of_columns @ np.arange(28.0) / ink.sum((1, 2))


def divide_into_thirds(values):
    """−1 for the lowest third of some values [N], 1 for the highest, 0 for those in between."""
    limits = np.quantile(values, (1 / 3, 2 / 3))
    return np.searchsorted(limits, values) - 1


def describe_looks(looks, adjectives):
    """The looks of one image, (−1 to 1, −1 to 1), in words, such as "thin and upright"."""
    thickness, uprightness = looks
    words = []
    if thickness == -1:
        words.append(adjectives.thin)
    if thickness == 1:
        words.append(adjectives.thick)
    if uprightness == -1:
        words.append(adjectives.slanted)
    if uprightness == 1:
        words.append(adjectives.upright)
    return f" {adjectives.conjunction} ".join(words)


# %% Captions
# Some captions name a wrong digit, drawn from the other nine. Some are ambiguous. Where both
# happen, the caption is ambiguous about the wrong digit.


def write_captions(split, wordings, noise, ambiguous, seed):
    """Writes a caption for each image of a split.

    Args:
      wordings: for each digit the Wordings to choose from.
      noise: the share of captions that name a wrong digit.
      ambiguous: the share of captions that fit several digits.
      seed: of all that is drawn. The draws are the same for every `noise` and `ambiguous`.

    Returns a list of texts, and their flaws [N]: "", "ambiguous" or "wrong".
    """
    count = len(split.label)
    rng = np.random.default_rng(seed)
    is_wrong = rng.random(count) < noise
    is_ambiguous = rng.random(count) < ambiguous
    other_digit = (split.label + rng.integers(1, 10, count)) % 10
    named_digit = np.where(is_wrong, other_digit, split.label)
    is_said = rng.random((count, 2)) < 0.5  # half of what an image looks like goes unsaid
    looks = measure_looks(split.image) * is_said
    lots = rng.random(count)  # which of the wordings it is

    ambiguous_wordings = make_ambiguous_wordings()
    texts = []
    for i, digit in enumerate(named_digit):
        choices = ambiguous_wordings[digit] if is_ambiguous[i] else wordings[digit]
        wording = choices[int(lots[i] * len(choices))]
        description = describe_looks(looks[i], wording.adjectives)
        if description:
            texts.append(f"{wording.text}, {description}")
        else:
            texts.append(wording.text)
    flaws = np.select([is_wrong, is_ambiguous], ["wrong", "ambiguous"], "")
    return texts, flaws


def split_into_words(text):
    """The words of a text; a comma is one of them."""
    return text.replace(",", " ,").split()


def build_vocabulary(texts):
    """Numbers the words of some texts from 2 on: {word: id}."""
    words = set()
    for text in texts:
        words.update(split_into_words(text))
    return {word: number for number, word in enumerate(sorted(words), 2)}


def encode(texts, vocabulary, length=16):
    """The ids of the words of texts, [N, length] int32. Short texts are filled up with 0; a word
    that is not in the vocabulary is 1."""
    tokens = np.zeros((len(texts), length), np.int32)
    for i, text in enumerate(texts):
        ids = [vocabulary.get(word, 1) for word in split_into_words(text)]
        ids = ids[:length]
        tokens[i, : len(ids)] = ids
    return tokens


# %% The captions of one experiment
# Every training image has a caption for each share of wrong ones. Every test image has one caption:
# in a wording that is held out, right and not ambiguous.


class Captions(NamedTuple):
    """Captions as ids of words. Row i of [N, L] belongs to training image i."""

    vocabulary_size: int  # with padding and unknown words
    clean: np.ndarray  # [N, L]: none is wrong, some are ambiguous
    noisy: dict[float, np.ndarray]  # [N, L] for each share of wrong captions
    shuffled: np.ndarray  # [N, L]: the first of `noisy`, in random order
    test: np.ndarray  # [test images, L]
    prompts: list[np.ndarray]  # of each digit all wordings of training, [P, L]


def caption_training_images(data, noise, config, seed):
    """The texts and flaws of the training images' captions, with this share of wrong ones."""
    wordings = make_wordings(held_out=False)
    return write_captions(data.train, wordings, noise, config.ambiguous, [seed, 10])


def make_captions(data, config, seed):
    """Makes all Captions of one seed."""
    clean_texts, _ = caption_training_images(data, 0, config, seed)
    vocabulary = build_vocabulary(clean_texts)
    noisy = {}
    for noise in config.noise:
        texts, _ = caption_training_images(data, noise, config, seed)
        noisy[noise] = encode(texts, vocabulary)

    # Shuffled are the captions alone, so that an image no longer has its own.
    shuffled = np.random.default_rng([seed, 12]).permutation(noisy[config.noise[0]])

    test_wordings = make_wordings(held_out=True)
    test_texts, _ = write_captions(data.test, test_wordings, 0, 0, [seed, 11])

    prompts = []
    for wordings_of_digit in make_wordings(held_out=False):
        texts = [wording.text for wording in wordings_of_digit]
        prompts.append(encode(texts, vocabulary))

    return Captions(
        vocabulary_size=len(vocabulary) + 2,
        clean=encode(clean_texts, vocabulary),
        noisy=noisy,
        shuffled=shuffled,
        test=encode(test_texts, vocabulary),
        prompts=prompts,
    )


# %% Models
# A network for images, 56,810 parameters, and one for captions, 13,770. As encoders they have 32
# outputs instead of ten.


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


class TextNet(nnx.Module):
    """Windows of three words, max-pooled, then two dense layers: [B, L] to logits [B, classes]."""

    def __init__(self, words, num_classes=10, *, rngs):
        self.embed = nnx.Embed(words, 32, rngs=rngs)
        self.window = nnx.Linear(3 * 32, 64, rngs=rngs)
        self.dense1 = nnx.Linear(64, 64, rngs=rngs)
        self.dense2 = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, tokens, train=False):
        x = self.embed(tokens) * (tokens > 1)[..., None]  # padding and unknown words say nothing
        x = jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], -1)  # windows of three words
        x = nnx.max_pool(nnx.relu(self.window(x)), (x.shape[1],))[:, 0]
        return self.dense2(nnx.relu(self.dense1(x)))


def make_networks(vocabulary_size, outputs, seed):
    """An image network and a text network. Equal arguments give equal initial weights."""
    rngs = nnx.Rngs(seed)
    image_network = StudentCNN(outputs, rngs=rngs)
    text_network = TextNet(vocabulary_size, outputs, rngs=rngs)
    return image_network, text_network


# %% Losses
# Teachers and students have the same loss. A student's target is what the teacher answers to the
# other half of the pair, as probabilities at temperature T. A teacher's own target is the label, as
# 0 and 1, at T = 1: there the loss is the cross-entropy.

CONTRASTIVE_TEMPERATURE = 0.07  # CLIP's τ at its start; CLIP learns it


def at_least_float32(logits):
    """The logits in float32, or in float64 if that is what they are."""
    logits = jnp.asarray(logits)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def soft_target_loss(logits, soft_targets, temperature=1.0):
    """How far the logits [B, C] are from soft targets [B, C]: probabilities, not logits, that
    `to_soft_targets` has softened by the same temperature.

    Raises ValueError where their shapes differ: they would broadcast to a wrong loss.
    """
    logits = at_least_float32(logits)
    soft_targets = at_least_float32(soft_targets)
    if logits.shape != soft_targets.shape:
        shapes = f"logits {logits.shape}, soft_targets {soft_targets.shape}"
        raise ValueError(f"{shapes}: must be of the same shape [B, C]")
    # loss = T² · KL(soft targets ‖ q), q = softmax(logits / T), mean over the batch
    log_probs = jax.nn.log_softmax(logits / temperature)
    return temperature**2 * optax.losses.kl_divergence(log_probs, soft_targets).mean()


def contrastive_loss(image_embeddings, text_embeddings, temperature=CONTRASTIVE_TEMPERATURE):
    """The loss of CLIP, of embeddings [B, D] of images and of their captions: which caption of the
    batch belongs to which image?

    Pairs of the same digit count as wrong answers too, since no label says otherwise. Raises
    ValueError where the shapes differ.
    """
    image_embeddings = at_least_float32(image_embeddings)
    text_embeddings = at_least_float32(text_embeddings)
    if image_embeddings.shape != text_embeddings.shape:
        shapes = (
            f"image_embeddings {image_embeddings.shape}, text_embeddings {text_embeddings.shape}"
        )
        raise ValueError(f"{shapes}: must be of the same shape [B, D]")
    # logits[i, j] = cos(image i, text j) / τ
    cosines = optax.losses.cosine_similarity(image_embeddings[:, None], text_embeddings)
    logits = cosines / temperature
    # loss = −½ (log p[text i | image i] + log p[image i | text i]), mean over the pairs i
    log_probs_of_texts = jax.nn.log_softmax(logits, axis=1)
    log_probs_of_images = jax.nn.log_softmax(logits, axis=0)
    return -(jnp.diag(log_probs_of_texts) + jnp.diag(log_probs_of_images)).mean() / 2


# %% Steps
# `soft_target_step` is that of teachers and students. Its batch has two entries: "input" is the one
# half of the pairs that the network reads. `contrastive_step` aligns two encoders.


@nnx.jit
def soft_target_step(model, optimizer, batch, temperature):
    """One step on "input", images or captions, and "soft_targets" [B, C]. Returns the loss."""

    def loss_fn(model):
        logits = model(batch["input"], train=True)
        return soft_target_loss(logits, batch["soft_targets"], temperature)

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return {"loss": loss}


@nnx.jit
def contrastive_step(encoders, optimizer, batch):
    """One step of an image and a text encoder on "image" and "tokens". Returns the loss."""

    def loss_fn(encoders):
        image_encoder, text_encoder = encoders
        image_embeddings = image_encoder(batch["image"], train=True)
        text_embeddings = text_encoder(batch["tokens"], train=True)
        return contrastive_loss(image_embeddings, text_embeddings)

    loss, grads = nnx.value_and_grad(loss_fn)(encoders)
    optimizer.update(encoders, grads)
    return {"loss": loss}


# %% Answers
# `predict` of utils.py is for images. These are its counterparts for captions, and for two encoders
# that classify images without having been trained on any class.


def predict_captions(text_network, tokens):
    """The logits [N, classes] of captions [N, L]."""
    parts = np.array_split(tokens, 1 + len(tokens) // 4000)
    return np.concatenate([text_network(part) for part in parts])


def evaluate_captions(text_network, tokens, labels):
    """The accuracy on captions [N, L] whose digits are `labels` [N], from 0 to 1."""
    return float((predict_captions(text_network, tokens).argmax(-1) == labels).mean())


def predict_zero_shot(encoders, split, prompts):
    """The cosines [N, classes] of images with each class, which is the mean of its `prompts`, as in
    CLIP. The largest is the answer."""
    image_encoder, text_encoder = encoders
    image_embeddings = predict(image_encoder, split)
    class_embeddings = []
    for prompts_of_class in prompts:
        class_embeddings.append(predict_captions(text_encoder, prompts_of_class).mean(0))
    class_embeddings = np.stack(class_embeddings)
    cosines = optax.losses.cosine_similarity(image_embeddings[:, None], class_embeddings)
    return np.asarray(cosines)


def evaluate_zero_shot(encoders, split, prompts):
    """The accuracy of two encoders on the images of a split, from 0 to 1."""
    return float((predict_zero_shot(encoders, split, prompts).argmax(-1) == split.label).mean())


def to_soft_targets(logits, temperature):
    """The probabilities [N, C] that logits [N, C] stand for at a temperature."""
    return np.asarray(jax.nn.softmax(logits / temperature))


# %% Training the teachers
# `Training` shows progress, keeps checkpoints and takes down what was measured. `compile_step` is
# `nnx.cached_partial`: it binds model and optimizer, which are updated in place, to the step.


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


def train_image_teacher(teacher, data, recipe, run):
    """Trains an image network on the labels of all training images."""
    optimizer = make_optimizer(teacher, recipe, len(data.train.label))
    step = compile_step(soft_target_step, teacher, optimizer)
    one_hot = np.eye(data.classes, dtype=np.float32)

    training = Training(run, "image teacher", teacher, optimizer, recipe, data.train)
    for epoch in training.epochs():
        for batch in batches(data.train, recipe.batch_size, recipe.seed, epoch):
            seen = {"input": batch["image"], "soft_targets": one_hot[batch["label"]]}
            training.log(step(seen, 1.0))
        training.score(data.scored_on, evaluate, teacher, data.test)
    return teacher


def train_text_teacher(teacher, tokens, labelled, test_tokens, data, recipe, run):
    """Trains a text network on the captions, from `tokens` [N, L], and labels of the `labelled`
    pairs alone."""
    optimizer = make_optimizer(teacher, recipe, len(labelled.label))
    step = compile_step(soft_target_step, teacher, optimizer)
    one_hot = np.eye(data.classes, dtype=np.float32)

    training = Training(run, "text teacher", teacher, optimizer, recipe, labelled)
    for epoch in training.epochs():
        for batch in batches(labelled, recipe.batch_size, recipe.seed, epoch, tokens=tokens):
            seen = {"input": batch["tokens"], "soft_targets": one_hot[batch["label"]]}
            training.log(step(seen, 1.0))
        training.score(data.scored_on, evaluate_captions, teacher, test_tokens, data.test.label)
    return teacher


# %% Training the students
# A step is given the student's half of the pairs and the teacher's answers, never a label. The
# teacher does not change, so its answers are computed once and looked up by the pairs' index.


def train_text_student(
    name, student, tokens, image_answers, test_tokens, data, recipe, run, temperature
):
    """Trains a text network on captions, from `tokens` [N, L]. Its targets are what the image
    teacher answers to their images, the probabilities `image_answers` [N, C] at that temperature.
    """
    optimizer = make_optimizer(student, recipe, len(data.train.label))
    step = compile_step(soft_target_step, student, optimizer)
    tables = {"tokens": tokens, "soft_targets": image_answers}

    training = Training(run, name, student, optimizer, recipe, data.train)
    for epoch in training.epochs():
        for batch in batches(data.train, recipe.batch_size, recipe.seed, epoch, **tables):
            seen = {"input": batch["tokens"], "soft_targets": batch["soft_targets"]}
            training.log(step(seen, temperature))
        training.score(data.scored_on, evaluate_captions, student, test_tokens, data.test.label)
    return student


def train_image_student(name, student, text_answers, data, recipe, run, temperature):
    """Trains an image network. Its targets are what the text teacher answers to the images'
    captions, the probabilities `text_answers` [N, C] at that temperature."""
    optimizer = make_optimizer(student, recipe, len(data.train.label))
    step = compile_step(soft_target_step, student, optimizer)
    tables = {"soft_targets": text_answers}

    training = Training(run, name, student, optimizer, recipe, data.train)
    for epoch in training.epochs():
        for batch in batches(data.train, recipe.batch_size, recipe.seed, epoch, **tables):
            seen = {"input": batch["image"], "soft_targets": batch["soft_targets"]}
            training.log(step(seen, temperature))
        training.score(data.scored_on, evaluate, student, data.test)
    return student


# %% Aligning two encoders
# There is no teacher and no label: images and captions alone say what belongs together.


def align_encoders(encoders, tokens, prompts, data, recipe, run):
    """Trains an image and a text encoder on the pairs of images and captions, `tokens` [N, L]."""
    optimizer = make_optimizer(encoders, recipe, len(data.train.label))
    step = compile_step(contrastive_step, encoders, optimizer)

    training = Training(run, "zero-shot", encoders, optimizer, recipe, data.train)
    for epoch in training.epochs():
        for batch in batches(data.train, recipe.batch_size, recipe.seed, epoch, tokens=tokens):
            seen = {"image": batch["image"], "tokens": batch["tokens"]}
            training.log(step(seen))
        training.score(data.scored_on, evaluate_zero_shot, encoders, data.test, prompts)
    return encoders


# %% Settings
# What a flag leaves open is chosen here. Rates were chosen on validation images; test images chose
# nothing.


def fill_in_defaults(config, data):
    """The config with a value for every flag that was left open."""
    pairs = len(data.train.label)
    config = experiment.with_defaults(config, labels=min(1000, pairs))
    if config.quick:
        config = experiment.with_defaults(config, noise=(0, 0.8), epochs=4)
    if data.name == "digits":
        config = experiment.with_defaults(config, epochs=40)
    if pairs < 10_000:
        config = experiment.with_defaults(config, batch_size=32)
    config = experiment.with_defaults(
        config, noise=(0, 0.2, 0.4, 0.6, 0.8), epochs=4, batch_size=128
    )
    check_batch_size("--batch-size", config.batch_size, pairs)
    return config


def image_recipe(config, seed):
    """How the image teacher, the image students and the two encoders are trained."""
    return Recipe(seed, config.epochs, config.batch_size, config.learning_rate, "onecycle")


def text_student_recipe(config, seed):
    """How the text students are trained."""
    return Recipe(seed, config.epochs, config.batch_size, 10 * config.learning_rate, "onecycle")


def text_teacher_recipe(config, seed, labels):
    """How the text teacher is trained, on so many labelled captions."""
    epochs = 10 * config.epochs
    batch_size = min(config.batch_size, labels)
    return Recipe(seed, epochs, batch_size, 10 * config.learning_rate, "onecycle")


# %% Figure
# How much wrong captions cost the students of both kinds.


def draw(run, config):
    """The students' errors over the share of wrong captions: a point for each seed, a line through
    the means, and a dashed line for the teacher of each kind."""
    figure = Figure(figsize=(plots.WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    shares = sorted(config.noise)
    colours = {"image": plots.COLOURS["distilled"], "text": "tab:green"}
    for kind, colour in colours.items():
        means = []
        for noise in shares:
            accuracies = run.accuracies(f"{kind} student{name_ending(noise, config)}")
            errors = plots.to_errors(accuracies, run.data)
            axes.plot([100 * noise] * len(errors), errors, "o", color=colour, alpha=0.5)
            means.append(errors.mean())
        axes.plot(
            [100 * noise for noise in shares], means, "-", color=colour, label=f"{kind} student"
        )
    for kind, style in (("image", "--"), ("text", ":")):
        errors = plots.to_errors(np.mean(run.accuracies(f"{kind} teacher")), run.data)
        axes.axhline(
            errors, color=plots.COLOURS["teacher"], linestyle=style, label=f"{kind} teacher"
        )
    axes.set(xlabel="wrong captions, %", ylabel=f"{run.data.scored_on} errors, %", yscale="log")
    plots.write_out_numbers(axes.yaxis)
    axes.set_title(say_what_image_students_bear(run, config))
    axes.legend()
    return figure


def say_what_image_students_bear(run, config):
    """The figure's message: how many errors the image students make with the most wrong captions
    that leave nine of ten answers right."""
    borne = {}  # {share of wrong captions: errors in percent}
    for noise in config.noise:
        errors = 100 - np.mean(run.accuracies(f"image student{name_ending(noise, config)}"))
        errors = round(abs(errors), 1)
        if errors < 10:
            borne[noise] = errors
    if not borne:
        return "Image students make more than 10 % errors with every share of wrong captions"
    most = max(borne)
    return f"With {100 * most:g} % wrong captions image students make {borne[most]} % errors"


# %% Main
# For each seed: two teachers, two encoders, then students in pairs, an image and a text student.
# Image teacher and image students have the same initial weights and the same batches: their targets
# alone differ. Only the aligned students start from other weights.


class StudentPair(NamedTuple):
    """Two students before their training, and the captions that go with the training images."""

    ending: str  # of their names
    image_student: StudentCNN
    text_student: TextNet
    tokens: np.ndarray  # [N, L]


def name_ending(noise, config):
    """What the names of students end with. Those of the first share of wrong captions have none."""
    return "" if noise == config.noise[0] else f", noise {noise}"


def prepare_students(captions, encoders, classes, config, seed):
    """The pairs of students to be trained: what they start from, and what captions they get."""
    size = captions.vocabulary_size
    pairs = []
    for noise in config.noise:
        image_student, text_student = make_networks(size, classes, seed)
        ending = name_ending(noise, config)
        pairs.append(StudentPair(ending, image_student, text_student, captions.noisy[noise]))

    # Aligned: each starts from its encoder, with the last layer of the other students.
    image_student, text_student = nnx.clone(encoders)
    fresh_image_network, fresh_text_network = make_networks(size, classes, seed)
    image_student.dense2 = fresh_image_network.dense2
    text_student.dense2 = fresh_text_network.dense2
    first = captions.noisy[config.noise[0]]
    pairs.append(StudentPair(", aligned", image_student, text_student, first))

    # Shuffled, the control: only the pairing of images and captions is gone.
    image_student, text_student = make_networks(size, classes, seed)
    pairs.append(StudentPair(", shuffled", image_student, text_student, captions.shuffled))
    return pairs


def run_both_directions(run, config, seed, labelled):
    """Trains and scores all networks of one seed."""
    data = run.data
    captions = make_captions(data, config, seed)
    size = captions.vocabulary_size
    for_images = image_recipe(config, seed)
    for_text_students = text_student_recipe(config, seed)
    for_text_teacher = text_teacher_recipe(config, seed, len(labelled.label))

    experiment.print_heading(f"seed {seed}: IMAGE TEACHER, {len(data.train.label):,} labels")
    image_network, text_network = make_networks(size, data.classes, seed)
    image_teacher = train_image_teacher(image_network, data, for_images, run)
    run.add_row("image teacher", image_teacher, predict(image_teacher, data.test))

    experiment.print_heading(f"seed {seed}: TEXT TEACHER, {len(labelled.label):,} labels")
    text_teacher = train_text_teacher(
        text_network, captions.clean, labelled, captions.test, data, for_text_teacher, run
    )
    run.add_row("text teacher", text_teacher, predict_captions(text_teacher, captions.test))

    experiment.print_heading(f"seed {seed}: ENCODERS, aligned on the pairs, no label")
    encoders = make_networks(size, 32, seed)
    first = captions.noisy[config.noise[0]]
    align_encoders(encoders, first, captions.prompts, data, for_images, run)
    cosines = predict_zero_shot(encoders, data.test, captions.prompts)
    run.add_row("zero-shot", encoders, cosines / CONTRASTIVE_TEMPERATURE)

    temperature = config.temperature
    image_answers = to_soft_targets(predict_by_index(image_teacher, data.train), temperature)
    for pair in prepare_students(captions, encoders, data.classes, config, seed):
        name = f"text student{pair.ending}"
        experiment.print_heading(f"seed {seed}: {name}, taught by the image teacher")
        text_student = train_text_student(
            name, pair.text_student, pair.tokens, image_answers,
            captions.test, data, for_text_students, run, temperature,
        )  # fmt: skip
        run.add_row(name, text_student, predict_captions(text_student, captions.test))

        name = f"image student{pair.ending}"
        experiment.print_heading(f"seed {seed}: {name}, taught by the text teacher")
        text_logits = predict_captions(text_teacher, pair.tokens)
        text_answers = to_soft_targets(text_logits, temperature)
        image_student = train_image_student(
            name, pair.image_student, text_answers, data, for_images, run, temperature
        )
        run.add_row(name, image_student, predict(image_student, data.test))


def main(config):
    run = experiment.start(config)
    data = run.data
    found = f"--dataset {data.name} ({data.source}): has {data.classes} classes"
    require(data.classes == 10, f"{found}; the captions know ten, the digits 0 to 9")
    config = fill_in_defaults(config, data)
    run.config = config
    seeds = run.seeds(config.seeds)
    labelled_of_seeds = [take_labels(data.train, config.labels, seed) for seed in seeds]

    for seed, labelled in zip(seeds, labelled_of_seeds, strict=True):
        run_both_directions(run, config, seed, labelled)

    figure = draw(run, config)
    image_labels = f"{len(data.train.label):,} for the image teacher"
    text_labels = f"{len(labelled_of_seeds[0].label):,} for the text teacher"
    # The image networks differ in the target alone. The text teacher has few captions, the text
    # students have all.
    image_gap = run.compare("image student", "image teacher")
    text_gap = run.compare("text student", "text teacher")
    # Aligned students are trained longer, by the epochs of the encoders.
    image_gain = run.compare("image student, aligned", "image student")
    text_gain = run.compare("text student, aligned", "text student")
    summary = {
        "Labels": f"{image_labels}, {text_labels}, none for all others",
        "Ambiguous captions": f"{config.ambiguous:.0%}",
        "Scored on": "text networks on captions, all others on images",
        "image student − image teacher": image_gap,
        "text student − text teacher": text_gap,
        "zero-shot − image student": run.compare("zero-shot", "image student"),
        "image student, aligned − image student": image_gain,
        "text student, aligned − text student": text_gain,
    }
    return run.finish(figure, summary)


if __name__ == "__main__":
    experiment.run_script(main, Config)
