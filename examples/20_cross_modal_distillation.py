# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10.2,<0.11", "flax>=0.12.8,<0.13", "optax>=0.2.8,<0.3",
#   "orbax-checkpoint>=0.12,<0.13", "numpy>=2.2,<3", "tqdm>=4.66,<5", "matplotlib>=3.9,<4",
#   "scipy>=1.14,<2", "scikit-learn>=1.6,<2", "importlib_resources>=6,<8",
#   "tensorflow-datasets>=4.9.10,<5"]
# ///
"""Cross-modal distillation: an image teacher for a text student, and the other way round.

A teacher reads one half of a pair of image and caption; the student learns its answer from the
other half and never sees a label. The captions are generated, some are ambiguous or wrong. Both
encoders may be aligned on the pairs before, as in CLIP; from shuffled pairs nothing is learned.

    python examples/20_cross_modal_distillation.py           # 4 to 5 minutes
    python examples/20_cross_modal_distillation.py --quick   # a first look: under a minute

Times are for 2 CPU cores. Gupta, Hoffman, Malik: Cross Modal Distillation for Supervision Transfer,
2015, arXiv:1507.00448; the alignment is that of CLIP: Radford et al., 2021, arXiv:2103.00020.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
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
    output_dir: str = "runs/20_cross_modal_distillation"  # for results, figure and checkpoints
    seed: int = 42  # of captions, initial weights and batches
    noise: tuple[float, ...] | None = None  # wrong captions; else 0 0.2 0.4 0.6 0.8, quick 0 0.8
    ambiguous: float = 0.1  # share of the captions that fit several digits
    labels: str | None = None  # labelled captions of the text teacher, or all; else 1000
    epochs: int | None = None  # else 4, digits 40, quick 4; of the text teacher 10 times as many
    batch_size: int | None = None  # pairs; else 128, quick and digits 32
    learning_rate: float = 1e-3  # peak; of text teacher and text students 10 times as high
    holdout: int = 0  # score on so many images held out of training, and leave the test set alone
    quick: bool = False  # a first look: 2,000 training and test images, few steps, two noise levels


# %% Captions
# Generated, not written by people. Held out for the test: the last template of each row, and of the
# others a quarter of the pairs with a digit. What is ambiguous fits each of the digits before it.

SHAPES = "thin thick slanted upright and", "{}/it shows {}/drawn as {}/might be described as {}"
LANGUAGES = (  # names of 0 to 9; thin, thick, slanted, upright, and; templates
    ("zero/one/two/three/four/five/six/seven/eight/nine", "thin thick slanted upright and",
     "{}/a {}/the digit {}/somebody wrote {} here"),
    ("zéro/un/deux/trois/quatre/cinq/six/sept/huit/neuf", "fin gras penché droit et",
     "{}/c'est {}/le chiffre {}/on a tracé {} ici"),
    ("null/eins/zwei/drei/vier/fünf/sechs/sieben/acht/neun", "dünn dick schräg gerade und",
     "{}/eine {}/die ziffer {}/hier steht {}"),
    ("0/1/2/3/4/5/6/7/8/9", "thin thick slanted upright and", "{}/nr {}/number {}/here is {}"),
    ("one loop/one stroke/bow above bar/one bow above another/hook above stroke/bar above bow/"
     "stroke above loop/bar above stroke/one loop above another/loop above stroke", *SHAPES),
    ("only loop/only stroke/bar under bow/one bow under another/stroke under hook/bow under bar/"
     "loop under stroke/stroke under bar/one loop under another/stroke under loop", *SHAPES),
)  # fmt: skip
AMBIGUOUS = "69 loop and stroke/25 bow and bar/38 the same twice/0689 with a loop/147 all straight"


def wordings(held_out):
    """Of each digit every (text, language) of training captions, or of those held out."""
    found = [[] for _ in range(10)]
    for digit, language, place in np.ndindex(10, len(LANGUAGES), 4):
        names, _, templates = (column.split("/") for column in LANGUAGES[language])
        if held_out == (place == 3 or (digit + language + place) % 4 == 0):
            found[digit].append((templates[place].format(names[digit]), language))
    return found


def looks(image):
    """[N, 2] of -1, 0 or 1, a third of the images each: thin or thick, slanted or upright."""
    ink = image[..., 0] / np.float32(255) + 1e-6
    upper, lower = (x.sum(1) @ np.arange(28.0) / x.sum((1, 2)) for x in (ink[:, :14], ink[:, 14:]))
    measures = ink.sum((1, 2)), lower - upper
    return np.stack([np.searchsorted(np.quantile(x, (1 / 3, 2 / 3)), x) - 1 for x in measures], 1)


def captions(split, wordings, noise, ambiguous, seed):
    """A caption for each image, and its flaw: "", "ambiguous" (fits several digits) or "wrong"."""
    rng, texts, count = np.random.default_rng(seed), [], len(split.label)
    wrong, unclear = rng.random(count) < noise, rng.random(count) < ambiguous
    named = np.where(wrong, (split.label + rng.integers(1, 10, count)) % 10, split.label)
    seen = looks(split.image) * (rng.random((count, 2)) < 0.5)  # half of it goes unsaid
    for digit, look, lot, vague in zip(named, seen, rng.random(count), unclear, strict=True):
        fitting = [(x.lstrip("0123456789 "), 0) for x in AMBIGUOUS.split("/") if str(digit) in x]
        choice = fitting if vague else wordings[digit]
        text, language = choice[int(lot * len(choice))]
        words = LANGUAGES[language][1].split()
        said = f" {words[4]} ".join(words[2 * k + (x > 0)] for k, x in enumerate(look) if x)
        texts.append(f"{text}, {said}" if said else text)
    return texts, np.select([wrong, unclear], ["wrong", "ambiguous"], "")


def encode(texts, vocabulary, length=16):
    """Words as ids [N, length] int32, filled up with 0; 1 is a word not in the vocabulary."""
    rows = ([vocabulary.get(x, 1) for x in text.replace(",", " ,").split()] for text in texts)
    return np.array([(row + [0] * length)[:length] for row in rows], np.int32)


# %% Models


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


def answer(model, split, tokens=None, prompts=None):
    """The logits [N, classes] of images or, from a text network, of captions [N, L]. Two encoders
    compare images with the mean of the `prompts` [P, L] of each class, as CLIP does."""
    if isinstance(model, tuple):
        texts = np.stack([answer(model[1], split, captions).mean(0) for captions in prompts])
        return np.asarray(optax.losses.cosine_similarity(answer(model[0], split)[:, None], texts))
    if isinstance(model, TextNet):
        return np.concatenate([model(x) for x in np.array_split(tokens, 1 + len(tokens) // 4000)])
    return utils.predict(model, split)


# %% Losses and training


def pair_loss(model, batch):
    """The loss of a network that sees one half of the pairs, "image" or "tokens", from "target"
    [B, C]: what the teacher says of the other half. A teacher's own target is the one-hot label."""
    logits = model(batch["image"] if "image" in batch else batch["tokens"], train=True)
    # loss = KL(target ‖ p_model), mean over the batch
    return optax.losses.kl_divergence(jax.nn.log_softmax(logits), batch["target"]).mean()


def contrastive_loss(encoders, batch):
    """CLIP's, of "image" and "tokens": which caption of the batch belongs to which image? Pairs of
    the same digit count as wrong answers too, since no label says otherwise."""
    image, text = encoders[0](batch["image"], train=True), encoders[1](batch["tokens"], train=True)
    # loss = −½ (log softmax_j(cos(uᵢ, vⱼ) / τ)[i] + log softmax_j(cos(uⱼ, vᵢ) / τ)[i]), mean over i
    logits = optax.losses.cosine_similarity(image[:, None], text) / 0.07
    by_image, by_text = jax.nn.log_softmax(logits, 1), jax.nn.log_softmax(logits, 0)
    return -(jnp.diag(by_image) + jnp.diag(by_text)).mean() / 2


@nnx.jit
def pair_step(model, optimizer, batch):
    """One step of a network, or of two encoders, on what they see. Returns the scalar loss."""
    loss = contrastive_loss if isinstance(model, tuple) else pair_loss
    value, grads = nnx.value_and_grad(loss)(model, batch)
    optimizer.update(model, grads)
    return {"loss": value}


class Recipe(NamedTuple):
    seed: int  # of initial weights, batches and dropout
    epochs: int
    batch_size: int
    learning_rate: float
    schedule: str


@functools.cache  # so that equal recipes share a compiled step
def onecycle_adam(learning_rate, steps):
    return optax.adam(optax.cosine_onecycle_schedule(max(1, steps), learning_rate))


def train_on_pairs(name, model, tokens, target, teacher, split, data, test, recipe, output_dir):
    """Trains a network on targets [N, C], or two encoders contrastively, on captions [N, L]. The
    step is given what it may see of a batch, never a label. Returns also the `utils.Phase`."""
    text, pair = isinstance(model, TextNet), isinstance(model, tuple)
    sees = ("image", "tokens") if pair else ("tokens" if text else "image", "target")
    steps = recipe.epochs * (len(split.label) // recipe.batch_size)
    optimizer = nnx.Optimizer(model, onecycle_adam(recipe.learning_rate, steps), wrt=nnx.Param)
    made_of = utils.digest(tokens[split.index], teacher, *(model if pair else [model]))
    phase = utils.Phase(name, output_dir, recipe, data, made_of=made_of)
    step, tables = utils.bind(pair_step, model, optimizer), {"tokens": tokens, "target": target}
    for epoch in phase.epochs(
        model, optimizer, lambda: (answer(model, *test).argmax(-1) == data.test.label).mean()
    ):
        for batch in utils.batches(split, recipe.batch_size, recipe.seed, epoch, **tables):
            phase.log(step({key: batch[key] for key in sees}))
    return model, phase


# %% Main


def plan(config, data):
    """The labelled captions, and the recipes of image networks, text students and text teacher."""
    epochs = utils.given(config.epochs, 40 if data.name == "digits" and not config.quick else 4)
    batch_size = utils.given(config.batch_size, 32 if len(data.train.label) < 10_000 else 128)
    labels = config.labels or min(1000, len(data.train.label))
    labelled = utils.take_labels(data.train, labels, config.seed)
    utils.check_batch("--batch-size", batch_size, len(data.train.label))
    fewer = min(batch_size, len(labelled.label))
    recipe = Recipe(config.seed, epochs, batch_size, config.learning_rate, "onecycle")
    text = recipe._replace(learning_rate=10 * recipe.learning_rate)
    return labelled, recipe, text, text._replace(epochs=10 * epochs, batch_size=fewer)


def draw(data, texts, flaws, cosines, noise, rows):
    """Captions of each kind, the aligned encoders' cosines by digit, accuracies by noise."""
    figure = Figure(figsize=(15, 12), layout="constrained")
    upper, lower = figure.subfigures(2)
    for flaw, axes in zip(("", "ambiguous", "wrong"), upper.subplots(3, 4), strict=True):
        for i, ax in zip(np.flatnonzero(flaws == flaw), axes, strict=False):
            ax.imshow(data.train.image[i, :, :, 0], cmap="gray_r")
            ax.set(title=f"{texts[i]}\n{flaw}", xticks=[], yticks=[])
    heat, curve = lower.subplots(1, 2)
    cosines = [cosines[data.test.label == digit].mean(0) for digit in range(10)]
    lower.colorbar(heat.imshow(cosines), ax=heat, label="mean cosine of the aligned encoders")
    heat.set(xlabel="captions of a", ylabel="images of a", xticks=range(10), yticks=range(10))
    for name in ("image student", "text student"):
        found = [row for row in rows if row["name"].split(", noise")[0] == name]
        curve.plot(noise, [row[f"{data.scored_on}_accuracy"] for row in found], "o-", label=name)
    curve.set(xlabel="share of wrong captions", ylabel=f"{data.scored_on} accuracy", ylim=(0, 1))
    curve.legend()
    return figure


def main(config):
    data, seed, known, runs = utils.start(config), config.seed, wordings(False), {}
    labelled, recipe, for_text, longer = plan(config, data)
    noise = utils.given(config.noise, (0, 0.8) if config.quick else (0, 0.2, 0.4, 0.6, 0.8))
    made = [captions(data.train, known, x, config.ambiguous, [seed, 10]) for x in (0, *noise)]
    words = {word for text in made[0][0] for word in text.replace(",", " ,").split()}
    vocabulary = {word: i for i, word in enumerate(sorted(words), 2)}
    clean, *noisy = (encode(texts, vocabulary) for texts, _ in made)
    tested = encode(captions(data.test, wordings(True), 0, 0, [seed, 11])[0], vocabulary)
    test = data.test, tested, [encode([text for text, _ in x], vocabulary) for x in known]

    def new(classes=10):
        rngs = nnx.Rngs(seed)
        return StudentCNN(classes, rngs=rngs), TextNet(len(words) + 2, classes, rngs=rngs)

    def run(name, model, *how, split=data.train, recipe=recipe):
        utils.banner(name)
        runs[name] = train_on_pairs(name, model, *how, split, data, test, recipe, config.output_dir)
        return model

    label = np.eye(10, dtype=np.float32)[data.train.label]
    image_teacher = run("image teacher", new()[0], clean, label, None)
    text_teacher = run("text teacher", new()[1], clean, label, None, split=labelled, recipe=longer)
    encoders = run("zero-shot", new(32), noisy[0], label, None)
    from_image = np.asarray(jax.nn.softmax(answer(image_teacher, data.train)))
    shuffled = np.random.default_rng([seed, 12]).permutation(noisy[0])  # of the captions alone
    seen = dict(zip(["", *(f", noise {x}" for x in noise[1:])], noisy, strict=True))
    seen |= {", aligned": noisy[0], ", shuffled": shuffled}
    for end, tokens in seen.items():
        image, text = map(nnx.clone, encoders) if end == ", aligned" else new()
        image.dense2, text.dense2 = (fresh.dense2 for fresh in new())  # aligned: a new last layer
        run(f"text student{end}", text, tokens, from_image, image_teacher, recipe=for_text)
        from_text = np.asarray(jax.nn.softmax(answer(text_teacher, None, tokens)))
        run(f"image student{end}", image, tokens, from_text, text_teacher)
    logits = {name: answer(model, *test) for name, (model, _) in runs.items()}
    rows = utils.rows(runs, logits, data)
    figure = draw(data, *made[min(2, len(noisy))], logits["zero-shot"], noise, rows)
    report = utils.write_results(config, data, rows, figure)
    utils.summary(report, data, {"Ambiguous captions": f"{config.ambiguous:.0%}"})
    return report


if __name__ == "__main__":
    utils.run(main, Config)
