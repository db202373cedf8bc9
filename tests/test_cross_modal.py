"""Captions and pairs: the grammar, the losses, and bugs of pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import utils
from conftest import EXAMPLES, exhibit, load
from flax import nnx

SCRIPT_20 = "20_cross_modal_distillation.py"


def small_data(count=96):
    data = utils.load_data("digits")
    return data._replace(train=data.train.take(slice(count)), test=data.test.take(slice(20)))


def trained(cm, data, tokens, target, model, name="student"):
    """A network after one epoch of three steps."""
    recipe = cm.Recipe(0, 1, 32, 1e-2, "onecycle")
    test = data.test, np.zeros((len(data.test.label), 16), np.int32), None
    how = None, data.train, data, test, recipe, cm.tmp_path / str(utils.digest(data.train.label))
    return cm.train_on_pairs(name, model, tokens, target, *how)[0]


def weights(model):
    return [np.array(x) for x in jax.tree.leaves(nnx.state(model, nnx.Param))]


def training_captions(cm, data):
    texts, _ = cm.captions(data.train, cm.wordings(False), 0, 0.1, 0)
    words = sorted({word for text in texts for word in text.replace(",", " ,").split()})
    return texts, {word: i for i, word in enumerate(words, 2)}


def pairs_shuffled(cm, u):
    """Through shuffled batches, every image keeps its own caption."""
    data = small_data()
    texts, vocabulary = training_captions(cm, data)
    tokens = cm.encode(texts, vocabulary)
    words = dict(map(reversed, vocabulary.items()))
    seen = []
    for batch in u.batches(data.train, 32, 0, 1, tokens=tokens):
        for index, ids in zip(batch["index"], np.asarray(batch["tokens"]), strict=True):
            text = " ".join(words[i] for i in ids if i).replace(" ,", ",")
            assert text == texts[index]
            seen.append(int(index))
    assert len(seen) == 96


def labels_leak_into_the_student(cm, u):
    """Other labels in the data, the same targets: the same student, to the last bit."""
    data = small_data()
    texts, vocabulary = training_captions(cm, data)
    tokens, rng = cm.encode(texts, vocabulary), np.random.default_rng(0)
    target = rng.dirichlet(np.ones(10), 96).astype(np.float32)
    other = data._replace(train=data.train._replace(label=rng.permutation(data.train.label)))
    a, b = (
        trained(cm, some, tokens, target, cm.StudentCNN(rngs=nnx.Rngs(0))) for some in (data, other)
    )
    assert all(np.array_equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def held_out_wordings_occur_in_training(cm, u):
    known, held_out = (
        {text for of_digit in cm.wordings(kind) for text, _ in of_digit} for kind in (False, True)
    )
    assert known
    assert held_out
    assert not known & held_out


def contrastive_loss_in_one_direction(cm, u):
    rng = np.random.default_rng(0)
    image, text = (rng.normal(size=(6, 4)).astype(np.float32) for _ in range(2))
    encoders = tuple(lambda x, train: x for _ in range(2))
    ours = cm.contrastive_loss(encoders, {"image": image, "tokens": text})
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    logits = image @ text.T / 0.07
    both = [np.log(np.exp(x).sum(1)) - np.diag(x) for x in (logits, logits.T)]
    np.testing.assert_allclose(ours, np.mean(both), rtol=1e-5)


MUSEUM = {
    pairs_shuffled: ("utils.py", "table[index]", "table[:batch_size]"),
    labels_leak_into_the_student: (
        SCRIPT_20,
        "step({key: batch[key] for key in sees})",
        'step(batch | {"target": jax.nn.one_hot(batch["label"], 10)})',
    ),
    held_out_wordings_occur_in_training: (
        SCRIPT_20,
        "if held_out == (place == 3 or",
        "if not held_out or (place == 3 or",
    ),
    contrastive_loss_in_one_direction: (
        SCRIPT_20,
        "jnp.diag(by_image) + jnp.diag(by_text)",
        "jnp.diag(by_image) + jnp.diag(by_image)",
    ),
}


@pytest.mark.parametrize("check", MUSEUM, ids=lambda check: check.__name__)
def test_bug(check, tmp_path):
    exhibit(check, SCRIPT_20, *MUSEUM[check], tmp_path)


# %% Unit tests


@pytest.fixture(scope="module")
def cm():
    return load(EXAMPLES / SCRIPT_20)


def test_every_wording_determines_its_digit(cm):
    for kind in (False, True):
        fits = {}
        for digit, of_digit in enumerate(cm.wordings(kind)):
            assert len(of_digit) > 3
            for text, _ in of_digit:
                fits.setdefault(text, set()).add(digit)
        assert all(len(digits) == 1 for digits in fits.values())


def test_all_digits_can_be_described_ambiguously(cm):
    groups = [text.split(" ")[0] for text in cm.AMBIGUOUS.split("/")]
    assert set("".join(groups)) == set("0123456789")
    assert min(map(len, groups)) > 1


def test_shares_of_wrong_and_ambiguous_captions(cm):
    digits = utils.load_data("digits")
    texts, flaws = cm.captions(digits.train, cm.wordings(False), 0.3, 0.2, 1)
    assert len(texts) == len(flaws) == len(digits.train.label)
    assert abs((flaws == "wrong").mean() - 0.3) < 0.05
    assert abs((flaws == "ambiguous").mean() - 0.2 * 0.7) < 0.05
    known = [{text for text, _ in of_digit} for of_digit in cm.wordings(False)]
    for text, flaw, label in zip(texts, flaws, digits.train.label, strict=True):
        wording = text.split(",")[0]
        if not flaw:
            assert wording in known[label]
        if flaw == "wrong":
            assert wording not in known[label]
        if flaw == "ambiguous":
            [group] = [x for x in cm.AMBIGUOUS.split("/") if x.endswith(wording)]
            assert str(label) in group
    assert cm.captions(digits.train, cm.wordings(False), 0.3, 0.2, 1)[0] == texts
    clean = cm.captions(digits.train, cm.wordings(False), 0, 0, 1)[1]
    assert not any(clean)


def test_the_adjectives_are_those_of_the_image(cm):
    """Three bars: leaning to the left, upright, and leaning to the right, each in three widths."""
    image = np.zeros((9, 28, 28, 1), np.uint8)
    for i, (lean, width) in enumerate((lean, width) for lean in (-1, 0, 1) for width in (1, 3, 5)):
        for row in range(4, 24):
            left = 12 + round(lean * (14 - row) / 4)
            image[i, row, left : left + width] = 255
    seen = cm.looks(image)
    assert seen[:, 0].tolist() == [-1, 0, 1] * 3  # thin, in between, thick
    assert seen[:3, 1].tolist() == [1, 1, 1]  # upright: leaning least to the right
    assert seen[6:, 1].tolist() == [-1, -1, -1]  # slanted


def test_words_that_training_never_showed_have_one_id(cm):
    vocabulary = {"seven": 2, "a": 3, ",": 4, "thin": 5}
    tokens = cm.encode(["a seven, thin", "a sieben", "a " * 30], vocabulary, 6)
    assert tokens.dtype == np.int32
    assert tokens[:2].tolist() == [[3, 2, 4, 5, 0, 0], [3, 1, 0, 0, 0, 0]]
    assert tokens.shape == (3, 6)


def test_padding_says_nothing_and_order_matters(cm):
    network = cm.TextNet(9, rngs=nnx.Rngs(0))
    short, long = (np.array([[2, 3, 4] + [0] * n], np.int32) for n in (5, 13))
    np.testing.assert_allclose(network(short), network(long), atol=1e-6)
    swapped = np.array([[4, 3, 2] + [0] * 5], np.int32)
    assert np.abs(network(short) - network(swapped)).max() > 1e-4


def test_the_loss_is_that_of_labels_where_targets_are_labels(cm):
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(8, 10)).astype(np.float32), rng.integers(0, 10, 8)
    batch = {"image": logits, "target": np.eye(10, dtype=np.float32)[label]}
    loss = cm.pair_loss(lambda x, train: x, batch)
    want = -jax.nn.log_softmax(logits)[np.arange(8), label].mean()
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    perfect = {"tokens": logits, "target": jax.nn.softmax(jnp.asarray(logits))}
    np.testing.assert_allclose(cm.pair_loss(lambda x, train: x, perfect), 0, atol=1e-6)


def test_two_encoders_name_the_class_whose_prompts_are_nearest(cm):
    images = utils.load_data("digits").test.take(slice(4))
    encoders = cm.StudentCNN(8, rngs=nnx.Rngs(0)), cm.TextNet(30, 8, rngs=nnx.Rngs(0))
    prompts = [np.array([[k + 2, 0, 0], [k + 2, 1, 0]], np.int32) for k in range(3)]
    cosines = cm.answer(encoders, images, None, prompts)
    assert cosines.shape == (4, 3)
    assert np.abs(cosines).max() <= 1 + 1e-6


def test_few_labels_make_small_batches_of_the_text_teacher_alone(cm):
    data = utils.load_data("digits")
    labelled, images, text, teacher = cm.plan(cm.Config(dataset="digits", labels="10"), data)
    assert len(labelled.label) == teacher.batch_size == 10
    assert images.batch_size == text.batch_size == 32
    assert text.learning_rate == teacher.learning_rate == 10 * images.learning_rate
