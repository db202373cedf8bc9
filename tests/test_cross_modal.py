"""Script 20: the captions, the losses, bugs of pairs, and who is shown what."""

import contextlib
import dataclasses
import hashlib
import io
import tempfile

import experiment
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import utils
from conftest import EXAMPLES, Watched, exhibit, gain_in_words, load, make_run, watch
from experiment import fingerprint
from flax import nnx

SCRIPT = "20_cross_modal_distillation.py"


@pytest.fixture(scope="module")
def cm():
    return load(EXAMPLES / SCRIPT)


def wording_of(text):
    """The text without adjectives."""
    return text.split(",")[0]


def wordings_of_digits(cm, held_out):
    """{text} of each digit."""
    return [{wording.text for wording in part} for part in cm.make_wordings(held_out)]


# %% Bugs, each of which a check finds


def small_data(count=96):
    data = utils.load_data("digits")
    return data._replace(train=data.train.take(slice(count)), test=data.test.take(slice(20)))


def weights(model):
    return [np.array(x) for x in jax.tree.leaves(nnx.state(model, nnx.Param))]


def training_captions(cm, data):
    texts, _ = cm.write_captions(data.train, cm.make_wordings(False), 0, 0.1, 0)
    return texts, cm.build_vocabulary(texts)


def pairs_shuffled(cm):
    """Through shuffled batches, every image keeps its own caption."""
    data = small_data()
    texts, vocabulary = training_captions(cm, data)
    tokens = cm.encode(texts, vocabulary)
    word_of_id = {number: word for word, number in vocabulary.items()}
    seen = []
    for batch in cm.batches(data.train, 32, 0, 1, tokens=tokens):
        for index, ids in zip(batch["index"], np.asarray(batch["tokens"]), strict=True):
            text = " ".join(word_of_id[i] for i in ids if i).replace(" ,", ",")
            assert text == texts[index]
            seen.append(int(index))
    assert len(seen) == 96


def train_student_on(cm, data, half):
    """A student of one half of the pairs, after three steps on random targets."""
    recipe = experiment.Recipe(0, 1, 32, 1e-2, "onecycle")
    answers = np.random.default_rng(0).dirichlet(np.ones(10), 96).astype(np.float32)
    texts, vocabulary = training_captions(cm, data)
    image_network, text_network = cm.make_networks(len(vocabulary) + 2, 10, 0)
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(folder, data)
        if half == "images":
            return cm.train_image_student("student", image_network, answers, data, recipe, run, 1.0)
        tokens = cm.encode(texts, vocabulary)
        test_tokens = np.zeros((len(data.test.label), 16), np.int32)
        return cm.train_text_student(
            "student", text_network, tokens, answers, test_tokens, data, recipe, run, 1.0
        )


def check_that_labels_play_no_part(cm, half):
    """Other labels in the data, the same targets: the same student, to the last bit."""
    data = small_data()
    captioned = data.train  # captions are of the true labels in both cases
    label = np.random.default_rng(0).permutation(data.train.label)
    other = data._replace(train=data.train._replace(label=label))
    write = cm.write_captions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cm, "write_captions", lambda _, *more: write(captioned, *more))
        one, two = (weights(train_student_on(cm, some, half)) for some in (data, other))
    assert all(np.array_equal(x, y) for x, y in zip(one, two, strict=True))


def labels_leak_into_the_image_student(cm):
    check_that_labels_play_no_part(cm, "images")


def labels_leak_into_the_text_student(cm):
    check_that_labels_play_no_part(cm, "captions")


def held_out_wordings_occur_in_training(cm):
    known = set().union(*wordings_of_digits(cm, False))
    held_out = set().union(*wordings_of_digits(cm, True))
    assert known
    assert held_out
    assert not known & held_out


def scored_on_wordings_of_training(cm):
    """No caption of the test has a wording that a caption of training has, whatever follows it."""
    config = cm.Config(noise=(0.0, 0.5))
    captions = cm.make_captions(small_data(600), config, 3)
    comma = 2  # sorted before all other words
    trained = [captions.clean, captions.shuffled, *captions.noisy.values(), *captions.prompts]

    def wordings(tokens):
        found = set()
        for row in tokens.tolist():
            row = [*row, 0]
            found.add(tuple(row[: min(row.index(end) for end in (0, comma) if end in row)]))
        return found

    assert len(wordings(np.concatenate(trained))) > 100
    assert not wordings(captions.test) & wordings(np.concatenate(trained))


def contrastive_loss_in_one_direction(cm):
    rng = np.random.default_rng(0)
    image, text = (rng.normal(size=(6, 4)).astype(np.float32) for _ in range(2))
    ours = cm.contrastive_loss(image, text)
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    logits = image @ text.T / 0.07
    both = [np.log(np.exp(x).sum(1)) - np.diag(x) for x in (logits, logits.T)]
    np.testing.assert_allclose(ours, np.mean(both), rtol=1e-5)


def loss_in_low_precision(cm):
    """Logits of bfloat16 are taken to float32 before anything is computed."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(8, 10)) * 5, jnp.bfloat16)
    targets = np.asarray(jax.nn.softmax(logits.astype(jnp.float32)))
    loss = cm.soft_target_loss(logits, targets)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 0, atol=1e-6)


def shapes_that_broadcast(cm):
    logits = jnp.zeros((4, 10))
    try:
        cm.soft_target_loss(logits, jnp.ones((4, 1)))
        message = "no error"
    except ValueError as error:
        message = str(error)
    assert "(4, 10)" in message
    assert "(4, 1)" in message


MUSEUM = {
    pairs_shuffled: ("utils.py", "table[index]", "table[:batch_size]"),
    labels_leak_into_the_image_student: (
        SCRIPT,
        'seen = {"input": batch["image"], "soft_targets": batch["soft_targets"]}',
        'seen = {"input": batch["image"], "soft_targets": jax.nn.one_hot(batch["label"], 10)}',
    ),
    labels_leak_into_the_text_student: (
        SCRIPT,
        'seen = {"input": batch["tokens"], "soft_targets": batch["soft_targets"]}',
        'seen = {"input": batch["tokens"], "soft_targets": jax.nn.one_hot(batch["label"], 10)}',
    ),
    held_out_wordings_occur_in_training: (
        SCRIPT,
        "is_held_out(digit, language_number, template_number) == held_out",
        "is_held_out(digit, language_number, template_number) >= held_out",
    ),
    scored_on_wordings_of_training: (
        SCRIPT,
        "test_wordings = make_wordings(held_out=True)",
        "test_wordings = make_wordings(held_out=False)",
    ),
    contrastive_loss_in_one_direction: (
        SCRIPT,
        "jnp.diag(log_probs_of_texts) + jnp.diag(log_probs_of_images)",
        "jnp.diag(log_probs_of_texts) + jnp.diag(log_probs_of_texts)",
    ),
    loss_in_low_precision: (
        SCRIPT,
        "logits = at_least_float32(logits)\n    soft_targets = at_least_float32(soft_targets)",
        "soft_targets = jnp.asarray(soft_targets).astype(logits.dtype)",
    ),
    shapes_that_broadcast: (SCRIPT, "if logits.shape != soft_targets.shape:", "if False:"),
}


@pytest.mark.parametrize("check", MUSEUM, ids=lambda check: check.__name__)
def test_bug(check):
    exhibit(check, SCRIPT, *MUSEUM[check])


# %% Captions


def test_every_wording_determines_its_digit(cm):
    for held_out in (False, True):
        fits = {}
        for digit, texts in enumerate(wordings_of_digits(cm, held_out)):
            assert len(texts) > 3
            for text in texts:
                fits.setdefault(text, set()).add(digit)
        assert all(len(digits) == 1 for digits in fits.values())


def test_held_out_are_the_last_templates_and_a_quarter_of_the_other_pairs(cm):
    held_out, known = wordings_of_digits(cm, True), wordings_of_digits(cm, False)
    others, others_held_out = 0, 0
    for language in cm.LANGUAGES:
        assert len(language.names) == 10
        assert len(language.templates) == 4
        for digit, name in enumerate(language.names):
            *first, last = (template.format(name) for template in language.templates)
            assert last in held_out[digit]
            others += len(first)
            others_held_out += sum(text in held_out[digit] for text in first)
            assert all((text in held_out[digit]) != (text in known[digit]) for text in first)
    assert abs(others_held_out - others / 4) <= 1


def test_all_digits_can_be_described_ambiguously(cm):
    assert set().union(*cm.AMBIGUOUS.values()) == set(range(10))
    assert min(map(len, cm.AMBIGUOUS.values())) > 1
    for digit, wordings in enumerate(cm.make_ambiguous_wordings()):
        assert [wording.text for wording in wordings] == [
            text for text, digits in cm.AMBIGUOUS.items() if digit in digits
        ]


def test_captions_of_a_seed_never_change(cm, images):
    """Which wordings, adjectives and flaws a seed draws is part of all committed results."""
    first = [
        "c'est sept, gras",
        "drawn as one loop under another, thick",
        "die ziffer neun, gerade",
        "all straight, upright",
    ]
    texts, flaws = cm.write_captions(images, cm.make_wordings(False), 0.3, 0.2, [42, 10])
    assert texts[:4] == first
    found = hashlib.sha256("\n".join([*texts, *flaws]).encode()).hexdigest()
    assert found.startswith("3906b1a063d9778a4842354cc18141e6")
    texts, flaws = cm.write_captions(images, cm.make_wordings(True), 0.3, 0.2, [42, 10])
    found = hashlib.sha256("\n".join([*texts, *flaws]).encode()).hexdigest()
    assert found.startswith("2cb8ed78e699f2097e5e567a7846631a")


def test_shares_of_wrong_and_ambiguous_captions(cm, digits):
    known = wordings_of_digits(cm, False)
    texts, flaws = cm.write_captions(digits.train, cm.make_wordings(False), 0.3, 0.2, 1)
    assert len(texts) == len(flaws) == len(digits.train.label)
    assert abs((flaws == "wrong").mean() - 0.3) < 0.05
    assert abs((flaws == "ambiguous").mean() - 0.2 * 0.7) < 0.05
    for text, flaw, label in zip(texts, flaws, digits.train.label, strict=True):
        wording = wording_of(text)
        if not flaw:
            assert wording in known[label]
        if flaw == "wrong":
            assert wording not in known[label]
        if flaw == "ambiguous":
            assert label in cm.AMBIGUOUS[wording]
    assert cm.write_captions(digits.train, cm.make_wordings(False), 0.3, 0.2, 1)[0] == texts
    clean = cm.write_captions(digits.train, cm.make_wordings(False), 0, 0, 1)[1]
    assert not any(clean)


def test_a_wrong_caption_names_any_of_the_other_nine_digits(cm, digits):
    """All captions wrong, none ambiguous: never the digit itself, the others about as often."""
    texts, _ = cm.write_captions(digits.train, cm.make_wordings(False), 1, 0, 1)
    digit_of = {}
    for digit, of_digit in enumerate(wordings_of_digits(cm, False)):
        digit_of.update(dict.fromkeys(of_digit, digit))
    named = np.array([digit_of[wording_of(text)] for text in texts])
    counts = np.bincount((named - digits.train.label) % 10, minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 0.7 * len(texts) / 9


def test_more_noise_only_makes_right_captions_wrong(cm, digits):
    """Nothing else differs: a caption that stays right stays the same."""
    little, flaws = cm.write_captions(digits.train, cm.make_wordings(False), 0.2, 0.1, [0, 10])
    much, more_flaws = cm.write_captions(digits.train, cm.make_wordings(False), 0.6, 0.1, [0, 10])
    assert (more_flaws[flaws == "wrong"] == "wrong").all()
    same = [a == b for a, b in zip(little, much, strict=True)]
    became_wrong = (flaws != "wrong") & (more_flaws == "wrong")
    assert np.all(np.array(same) | became_wrong)


def test_the_adjectives_are_those_of_the_image(cm):
    """Three bars: leaning to the left, upright, and leaning to the right, each in three widths."""
    image = np.zeros((9, 28, 28, 1), np.uint8)
    for i, (lean, width) in enumerate((lean, width) for lean in (-1, 0, 1) for width in (1, 3, 5)):
        for row in range(4, 24):
            left = 12 + round(lean * (14 - row) / 4)
            image[i, row, left : left + width] = 255
    looks = cm.measure_looks(image)
    assert looks[:, 0].tolist() == [-1, 0, 1] * 3  # thin, in between, thick
    assert looks[:3, 1].tolist() == [1, 1, 1]  # upright: leaning least to the right
    assert looks[6:, 1].tolist() == [-1, -1, -1]  # slanted


def test_looks_in_words(cm):
    assert cm.describe_looks((0, 0), cm.ENGLISH) == ""
    assert cm.describe_looks((-1, 0), cm.ENGLISH) == "thin"
    assert cm.describe_looks((0, -1), cm.FRENCH) == "penché"
    assert cm.describe_looks((1, 1), cm.GERMAN) == "dick und gerade"


def test_captions_say_half_of_how_their_own_image_looks(cm, digits):
    """With one language: the adjectives of a caption fit its image, and half of them are said."""
    looks = cm.measure_looks(digits.train.image)
    words = [{-1: "thin", 1: "thick"}, {-1: "slanted", 1: "upright"}]
    wordings = [[cm.Wording(str(digit), cm.ENGLISH)] for digit in range(10)]
    texts, _ = cm.write_captions(digits.train, wordings, 0, 0, 1)
    possible, said = 0, 0
    for text, of_image in zip(texts, looks, strict=True):
        fitting = {words[k][look] for k, look in enumerate(of_image) if look}
        found = set(text.replace(",", "").split()[1:]) - {"and"}
        assert found <= fitting
        possible += len(fitting)
        said += len(found)
    assert abs(said / possible - 0.5) < 0.05


def test_words_that_training_never_showed_have_one_id(cm):
    vocabulary = {"seven": 2, "a": 3, ",": 4, "thin": 5}
    tokens = cm.encode(["a seven, thin", "a sieben", "a " * 30], vocabulary, 6)
    assert tokens.dtype == np.int32
    assert tokens[:2].tolist() == [[3, 2, 4, 5, 0, 0], [3, 1, 0, 0, 0, 0]]
    assert tokens.shape == (3, 6)


def test_a_vocabulary_numbers_words_from_2_on(cm):
    assert cm.build_vocabulary(["a six, thin", "a nine"]) == {
        ",": 2, "a": 3, "nine": 4, "six": 5, "thin": 6,
    }  # fmt: skip


# %% Networks and losses


def test_padding_says_nothing_and_order_matters(cm):
    network = cm.TextNet(9, rngs=nnx.Rngs(0))
    short, long = (np.array([[2, 3, 4] + [0] * n], np.int32) for n in (5, 13))
    np.testing.assert_allclose(network(short), network(long), atol=1e-6)
    swapped = np.array([[4, 3, 2] + [0] * 5], np.int32)
    assert np.abs(network(short) - network(swapped)).max() > 1e-4


def test_the_loss_is_that_of_labels_where_targets_are_labels(cm):
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(8, 10)).astype(np.float32), rng.integers(0, 10, 8)
    loss = cm.soft_target_loss(logits, np.eye(10, dtype=np.float32)[label])
    want = -jax.nn.log_softmax(logits)[np.arange(8), label].mean()
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    perfect = jax.nn.softmax(jnp.asarray(logits))
    np.testing.assert_allclose(cm.soft_target_loss(logits, perfect), 0, atol=1e-6)


def test_the_loss_is_the_divergence_from_the_targets_to_the_network(cm):
    """KL(targets ‖ network), not the other way round, and the mean over the batch."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 10)).astype(np.float32)
    targets = rng.dirichlet(np.ones(10), 8).astype(np.float32)
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    want = (targets * (np.log(targets) - log_probs)).sum(-1).mean()
    np.testing.assert_allclose(cm.soft_target_loss(logits, targets), want, rtol=1e-4)


def test_the_page_s_examples_are_captions_of_training(cm):
    known = set().union(*wordings_of_digits(cm, False))
    assert {"a six", "c'est sept", "number 8"} <= known
    texts, _ = cm.write_captions(small_data(600).train, cm.make_wordings(False), 0, 0.1, 0)
    assert "somebody" not in cm.build_vocabulary(texts), "a word of the templates held out"


def test_the_share_of_ambiguous_captions_changes_no_other_draw(cm):
    data = small_data(300)
    some, more = (
        cm.write_captions(data.train, cm.make_wordings(False), 0.3, share, 5)
        for share in (0.1, 0.4)
    )
    pairs = zip(some[0], more[0], more[1], strict=True)
    alike = [a == b for a, b, flaw in pairs if flaw == ""]  # a wrong one may be ambiguous, too
    assert len(alike) > 80
    assert all(alike)


def test_sizes_of_networks(cm, watched):
    for seed in SEEDS:
        size = len(watched.vocabularies[seed]) + 2
        text = size * 32 + (96 * 64 + 64) + (64 * 64 + 64) + (64 * 10 + 10)
        for name, params in (("text teacher", text), ("image teacher", 56_810)):
            assert watched.row(name, seed)["params"] == params
        encoders = sum(utils.count_params(x) for x in cm.make_networks(size, 32, 0))
        assert watched.row("zero-shot", seed)["params"] == encoders


def test_the_summary_says_what_minus_what(watched):
    def accuracies(name):
        return [watched.row(name, seed)["test_accuracy"] for seed in SEEDS]

    for name, other in (
        ("image student", "image teacher"),
        ("text student", "text teacher"),
        ("zero-shot", "image student"),
        ("image student, aligned", "image student"),
        ("text student, aligned", "text student"),
    ):
        words = gain_in_words(accuracies(name), accuracies(other))
        [line] = [x for x in watched.printed.splitlines() if x.startswith(f"{name} − {other} ")]
        assert line.removeprefix(f"{name} − {other}").strip() == words


def test_the_step_has_the_loss_at_its_temperature_in_training_mode(cm):
    student = cm.StudentCNN(rngs=nnx.Rngs(0))
    image = np.random.default_rng(0).random((8, 28, 28, 1)).astype(np.float32)
    targets = cm.to_soft_targets(np.eye(10, dtype=np.float32)[:8] * 5, 4.0)
    logits = nnx.clone(student)(image, train=True)
    optimizer = cm.make_optimizer(student, experiment.Recipe(0, 1, 8, 1e-3, "constant"), 8)
    found = cm.soft_target_step(student, optimizer, {"input": image, "soft_targets": targets}, 4.0)
    want = cm.soft_target_loss(logits, targets, 4.0)
    np.testing.assert_allclose(found["loss"], want, rtol=1e-4)
    assert np.abs(student.bn1.mean[...]).max() > 0, "its statistics have moved"


def test_the_contrastive_step_has_clip_s_loss_in_training_mode(cm):
    encoders = cm.make_networks(30, 32, 0)
    rng = np.random.default_rng(0)
    image = rng.random((8, 28, 28, 1)).astype(np.float32)
    tokens = rng.integers(2, 30, (8, 16)).astype(np.int32)
    image_encoder, text_encoder = nnx.clone(encoders)
    want = cm.contrastive_loss(image_encoder(image, train=True), text_encoder(tokens))
    optimizer = cm.make_optimizer(encoders, experiment.Recipe(0, 1, 8, 1e-3, "constant"), 8)
    found = cm.contrastive_step(encoders, optimizer, {"image": image, "tokens": tokens})
    np.testing.assert_allclose(found["loss"], want, rtol=1e-4)
    assert np.abs(encoders[0].bn1.mean[...]).max() > 0, "its statistics have moved"


def test_the_loss_at_a_temperature_has_its_square(cm):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 10)).astype(np.float32)
    teacher_logits = rng.normal(size=(8, 10)).astype(np.float32)
    targets = cm.to_soft_targets(teacher_logits, 4.0)
    log_probs = np.asarray(jax.nn.log_softmax(logits / 4))
    want = 16 * (targets * (np.log(targets) - log_probs)).sum(-1).mean()
    np.testing.assert_allclose(cm.soft_target_loss(logits, targets, 4.0), want, rtol=1e-4)


def test_embeddings_of_different_shapes_are_refused(cm):
    with pytest.raises(ValueError, match=r"\(4, 8\).*\(1, 8\)"):
        cm.contrastive_loss(jnp.ones((4, 8)), jnp.ones((1, 8)))


def test_two_encoders_name_the_class_whose_prompts_are_nearest(cm, digits):
    images = digits.test.take(slice(4))
    encoders = cm.StudentCNN(8, rngs=nnx.Rngs(0)), cm.TextNet(30, 8, rngs=nnx.Rngs(0))
    prompts = [np.array([[k + 2, 0, 0], [k + 2, 1, 0]], np.int32) for k in range(3)]
    cosines = cm.predict_zero_shot(encoders, images, prompts)
    assert cosines.shape == (4, 3)
    embeddings = utils.predict(encoders[0], images)
    for k in range(3):
        mean = np.asarray(encoders[1](prompts[k])).mean(0)
        norms = np.linalg.norm(embeddings, axis=1) * np.linalg.norm(mean)
        np.testing.assert_allclose(cosines[:, k], embeddings @ mean / norms, rtol=1e-4)
    answers = images._replace(label=cosines.argmax(-1))
    assert cm.evaluate_zero_shot(encoders, answers, prompts) == 1


def test_captions_are_answered_in_order_whatever_their_number(cm):
    """More than one part, of different sizes."""
    network = cm.TextNet(30, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(2, 30, (9001, 5)).astype(np.int32)
    logits = cm.predict_captions(network, tokens)
    assert logits.shape == (9001, 10)
    np.testing.assert_allclose(logits[8990:], network(tokens[8990:]), atol=1e-5)
    answers = logits.argmax(-1)
    answers[:9] = (answers[:9] + 1) % 10
    assert cm.evaluate_captions(network, tokens, answers) == pytest.approx(1 - 9 / 9001)


# %% Settings


def test_few_labels_make_small_batches_of_the_text_teacher_alone(cm, digits):
    config = cm.fill_in_defaults(cm.Config(dataset="digits", labels=10), digits)
    teacher = cm.text_teacher_recipe(config, 0, 10)
    image, text = cm.image_recipe(config, 0), cm.text_student_recipe(config, 0)
    assert teacher.batch_size == 10
    assert image.batch_size == text.batch_size == 32
    assert text.learning_rate == teacher.learning_rate == 10 * image.learning_rate


def test_defaults(cm, digits):
    def filled(data, **flags):
        config = cm.fill_in_defaults(cm.Config(**flags), data)
        return config.noise, config.labels, config.epochs, config.batch_size

    shares = (0, 0.2, 0.4, 0.6, 0.8)
    assert filled(digits) == (shares, 1000, 40, 32)
    assert filled(digits, quick=True) == ((0, 0.8), 1000, 4, 32)
    assert filled(digits._replace(train=digits.train.take(slice(500)))) == (shares, 500, 40, 32)
    many = digits._replace(name="mnist", train=digits.train.take(np.arange(10_000) % 1000))
    assert filled(many) == (shares, 1000, 4, 128)
    given = {"noise": (0.5,), "labels": "all", "epochs": 0, "batch_size": 7, "quick": True}
    assert filled(many, **given) == ((0.5,), "all", 0, 7)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"noise": ()}, "--noise"),
        ({"batch_size": 400}, "--batch-size 400"),
        ({"labels": 400}, "--labels 400"),
        ({"noise": (0, 1.5)}, "--noise 1.5"),
    ],
)
def test_bad_flags_are_found_before_anything_is_trained(cm, few, flags, named, tmp_path):
    def train(*_):
        raise AssertionError("something was trained")

    config = cm.Config(dataset="digits", output_dir=str(tmp_path), **flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cm, "train_image_teacher", train)
        patch.setattr(utils, "load_data", lambda *_: few)
        with pytest.raises(utils.UserError, match=named) as raised:
            cm.main(config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("classes", [9, 26])
def test_only_ten_classes_are_taken(cm, few, classes, tmp_path):
    label = np.arange(len(few.train.label), dtype=np.int32) % classes
    data = few._replace(
        train=few.train._replace(label=label),
        test=few.test._replace(label=few.test.label % 9),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "load_data", lambda *_: data)
        with pytest.raises(utils.UserError, match=f"{classes} classes.*ten") as raised:
            cm.main(cm.Config(dataset="digits", output_dir=str(tmp_path)))
    assert "\n" not in str(raised.value)


# %% The wiring of the experiment
# One run on few digits, watched: two seeds, two shares of wrong captions. Neither of them is 0, so
# that right captions and those of the comparison differ.

SEEDS = (5, 6)
NOISE = (0.2, 0.6)
AMBIGUOUS = 0.25
TEMPERATURE = 2.0
LABELS = 40
ENDINGS = ("", ", noise 0.6", ", aligned", ", shuffled")


@pytest.fixture(scope="module")
def few(digits):
    return digits._replace(train=digits.train.take(slice(320)), test=digits.test.take(slice(80)))


@dataclasses.dataclass
class Experiment:
    """A watched run."""

    printed: str
    report: dict
    trainings: dict[tuple[str, int], Watched]  # by name and seed
    seen: dict[tuple[str, int], list]  # what the steps were given, a dict of arrays each
    vocabularies: dict[int, dict]  # by seed
    temperatures: dict  # of each training, those that its steps were given
    traces: int  # how often a step on soft targets was made ready for compilation
    zero_shot: list[tuple]  # the arguments of each zero-shot classification

    def shown(self, name, seed, key):
        """A column of all that the steps of a training were given, in one array."""
        return np.concatenate([batch[key] for batch in self.seen[name, seed]])

    def row(self, name, seed):
        [row] = [x for x in self.report["results"] if (x["name"], x["seed"]) == (name, seed)]
        return row

    def decode(self, tokens, seed):
        """Rows of ids as texts."""
        words = {number: word for word, number in self.vocabularies[seed].items()}
        words[1] = "?"
        texts = []
        for row in np.asarray(tokens).tolist():
            texts.append(" ".join(words[i] for i in row if i).replace(" ,", ","))
        return texts


class Recorder:
    """Stands in for a function, and keeps what it was given and what it returned."""

    def __init__(self, function):
        self.function = self.__wrapped__ = function  # so that its code counts, not this class's
        self.given = []
        self.returned = []

    def __call__(self, *arguments):
        self.given.append(arguments)
        self.returned.append(self.function(*arguments))
        return self.returned[-1]


class StepRecorder:
    """Stands in for `compile_step`, and keeps of each model what its steps were given."""

    def __init__(self, compile_step):
        self.compile_step = compile_step
        self.batches = {}  # by the id of the model
        self.temperatures = {}

    def __call__(self, step, model, *more):
        compiled = self.compile_step(step, model, *more)
        seen = self.batches.setdefault(id(model), [])

        def recorded_step(batch, *temperature):
            seen.append({key: np.array(x) for key, x in batch.items()})
            self.temperatures.setdefault(id(model), set()).update(temperature)
            return compiled(batch, *temperature)

        return recorded_step


@pytest.fixture(scope="module")
def watched(cm, few, tmp_path_factory):
    config = cm.Config(
        dataset="digits", output_dir=str(tmp_path_factory.mktemp("watched")),
        seed=5, seeds=2, noise=NOISE, ambiguous=AMBIGUOUS, labels=LABELS, epochs=1, batch_size=32,
        learning_rate=2e-3, temperature=TEMPERATURE,
    )  # fmt: skip
    steps = StepRecorder(cm.compile_step)
    vocabularies = Recorder(cm.build_vocabulary)
    losses = Recorder(cm.soft_target_loss)
    zero_shot = Recorder(cm.predict_zero_shot)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cm, "compile_step", steps)
        patch.setattr(cm, "build_vocabulary", vocabularies)
        patch.setattr(cm, "soft_target_loss", losses)
        patch.setattr(cm, "predict_zero_shot", zero_shot)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            report, found = watch(cm, few, config)
    trainings = {(x.name, x.recipe.seed): x for x in found}
    assert len(trainings) == len(found)
    return Experiment(
        printed=printed.getvalue(),
        report=report,
        trainings=trainings,
        seen={key: steps.batches[id(training.model)] for key, training in trainings.items()},
        temperatures={
            key: steps.temperatures[id(training.model)] for key, training in trainings.items()
        },
        vocabularies=dict(zip(SEEDS, vocabularies.returned, strict=True)),
        traces=len(losses.given),
        zero_shot=zero_shot.given,
    )


def expected_texts(cm, few, noise, seed):
    """The captions that training images should have."""
    return cm.write_captions(few.train, cm.make_wordings(False), noise, AMBIGUOUS, [seed, 10])


def expected_tokens(cm, watched, few, ending, seed):
    """The captions as ids that a pair of students should learn from, [N, L]."""
    noise = 0.6 if ending == ", noise 0.6" else 0.2
    texts, _ = expected_texts(cm, few, noise, seed)
    tokens = cm.encode(texts, watched.vocabularies[seed])
    if ending == ", shuffled":
        tokens = np.random.default_rng([seed, 12]).permutation(tokens)
    return tokens


def expected_test_tokens(cm, watched, few, seed):
    texts, _ = cm.write_captions(few.test, cm.make_wordings(True), 0, 0, [seed, 11])
    return cm.encode(texts, watched.vocabularies[seed])


def all_of(names=("image", "text"), endings=ENDINGS):
    """The names of students."""
    return [f"{half} student{ending}" for ending in endings for half in names]


@pytest.mark.parametrize("seed", SEEDS)
def test_no_network_is_tested_on_a_wording_that_training_showed(cm, watched, few, seed):
    """Of all captions that any network of a seed was trained on, and of all it was scored on."""
    trained, tested = set(), set()
    for (name, of_seed), training in watched.trainings.items():
        if of_seed != seed:
            continue
        for key in ("input", "tokens"):
            for batch in watched.seen[name, seed]:
                if key in batch and batch[key].dtype == np.int32:
                    trained.update(map(wording_of, watched.decode(batch[key], seed)))
        if name.startswith("text"):
            for scored_on, model, tokens, label in training.scored:
                assert (scored_on, model) == ("test", training.model)
                np.testing.assert_array_equal(label, few.test.label)
                tested.update(map(wording_of, watched.decode(tokens, seed)))
    # Words that only wrong captions have are not in the vocabulary, and say nothing.
    trained = {wording for wording in trained if "?" not in wording}
    assert len(trained) > 80
    assert len(tested) > 30
    assert not trained & tested
    known = set().union(*wordings_of_digits(cm, False), cm.AMBIGUOUS)
    assert trained <= known


@pytest.mark.parametrize("seed", SEEDS)
def test_every_test_image_has_one_right_caption_in_a_held_out_wording(cm, watched, few, seed):
    texts, flaws = cm.write_captions(few.test, cm.make_wordings(True), 0, 0, [seed, 11])
    assert not flaws.any()
    held_out = wordings_of_digits(cm, True)
    for text, label in zip(texts, few.test.label, strict=True):
        assert wording_of(text) in held_out[label]
    wanted = cm.encode(texts, watched.vocabularies[seed])
    for name in ("text teacher", *all_of(["text"])):
        training = watched.trainings[name, seed]
        assert training.scored
        for _, _, tokens, label in training.scored:
            np.testing.assert_array_equal(tokens, wanted)
            np.testing.assert_array_equal(label, few.test.label)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_vocabulary_is_that_of_training_captions_none_of_them_wrong(cm, watched, few, seed):
    texts, _ = expected_texts(cm, few, 0, seed)
    assert watched.vocabularies[seed] == cm.build_vocabulary(texts)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_image_teacher_learns_all_labels(watched, few, seed):
    teacher = watched.trainings["image teacher", seed]
    assert teacher.split is few.train
    label = few.train.label[teacher.shown("index")]
    np.testing.assert_array_equal(
        watched.shown("image teacher", seed, "soft_targets"), np.eye(10)[label]
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_the_text_teacher_learns_labelled_captions_none_of_them_wrong(cm, watched, few, seed):
    teacher = watched.trainings["text teacher", seed]
    labelled = utils.take_labels(few.train, LABELS, seed)
    index = teacher.shown("index")
    np.testing.assert_array_equal(np.unique(index), labelled.index[: len(np.unique(index))])
    assert set(index) <= set(labelled.index)
    assert len(set(index)) == LABELS

    texts, flaws = expected_texts(cm, few, 0, seed)
    assert set(flaws) == {"", "ambiguous"}
    tokens = cm.encode(texts, watched.vocabularies[seed])
    np.testing.assert_array_equal(watched.shown("text teacher", seed, "input"), tokens[index])
    label = np.eye(10)[few.train.label[index]]
    np.testing.assert_array_equal(watched.shown("text teacher", seed, "soft_targets"), label)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_text_student_learns_what_the_image_teacher_says_of_the_images(
    cm, watched, few, seed, ending
):
    """It reads the captions, and its targets are the teacher's answers in inference mode."""
    name = f"text student{ending}"
    student = watched.trainings[name, seed]
    index = student.shown("index")
    tokens = expected_tokens(cm, watched, few, ending, seed)
    np.testing.assert_array_equal(watched.shown(name, seed, "input"), tokens[index])
    logits = utils.predict(watched.trainings["image teacher", seed].model, few.train)
    answers = np.asarray(jax.nn.softmax(logits / TEMPERATURE))
    np.testing.assert_allclose(watched.shown(name, seed, "soft_targets"), answers[index], atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_an_image_student_learns_what_the_text_teacher_says_of_the_captions(
    cm, watched, few, seed, ending
):
    name = f"image student{ending}"
    student = watched.trainings[name, seed]
    index = student.shown("index")
    image = few.train.image[index] / np.float32(255)
    np.testing.assert_array_equal(watched.shown(name, seed, "input"), image)
    tokens = expected_tokens(cm, watched, few, ending, seed)
    logits = watched.trainings["text teacher", seed].model(tokens)
    answers = np.asarray(jax.nn.softmax(logits / TEMPERATURE))
    np.testing.assert_allclose(watched.shown(name, seed, "soft_targets"), answers[index], atol=1e-5)


def test_the_temperature_is_that_of_the_students(watched):
    """Labels, which the teachers learn, are at T = 1."""
    for (name, _), temperatures in watched.temperatures.items():
        wanted = {1.0} if name.endswith("teacher") else {TEMPERATURE}
        assert temperatures == (set() if name == "zero-shot" else wanted)


def test_students_and_encoders_are_shown_no_label(watched):
    """Nor anything else but what they are to see."""
    for (name, _), batches in watched.seen.items():
        wanted = {"image", "tokens"} if name == "zero-shot" else {"input", "soft_targets"}
        assert batches
        assert all(set(batch) == wanted for batch in batches)


def test_each_half_is_read_by_its_own_networks(watched):
    for (name, seed), batches in watched.seen.items():
        if name == "zero-shot":
            assert batches[0]["image"].shape == (32, 28, 28, 1)
            assert batches[0]["tokens"].shape == (32, 16)
        elif name.startswith("image"):
            assert watched.shown(name, seed, "input").shape[1:] == (28, 28, 1)
        else:
            assert watched.shown(name, seed, "input").shape[1:] == (16,)


@pytest.mark.parametrize("seed", SEEDS)
def test_image_teacher_and_image_students_differ_in_the_target_alone(watched, seed):
    """The aligned student differs in its start, too."""
    teacher = watched.trainings["image teacher", seed]
    for name in all_of(["image"]):
        student = watched.trainings[name, seed]
        assert (student.start == teacher.start) == (name != "image student, aligned")
        assert student.recipe == teacher.recipe
        assert student.split is teacher.split
        np.testing.assert_array_equal(student.shown("index"), teacher.shown("index"))
        np.testing.assert_array_equal(
            watched.shown(name, seed, "input"), watched.shown("image teacher", seed, "input")
        )
        assert (
            watched.shown(name, seed, "soft_targets")
            != watched.shown("image teacher", seed, "soft_targets")
        ).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_text_students_differ_in_captions_alone(cm, watched, seed):
    """The aligned student differs in its start instead."""
    plain = watched.trainings["text student", seed]
    assert plain.start == watched.trainings["text teacher", seed].start
    for name in all_of(["text"]):
        student = watched.trainings[name, seed]
        assert (student.start == plain.start) == (name != "text student, aligned")
        assert student.recipe == plain.recipe
        np.testing.assert_array_equal(student.shown("index"), plain.shown("index"))
        np.testing.assert_array_equal(
            watched.shown(name, seed, "soft_targets"),
            watched.shown("text student", seed, "soft_targets"),
        )
        same = watched.shown(name, seed, "input") == watched.shown("text student", seed, "input")
        assert same.all() == (name in ("text student", "text student, aligned"))


@pytest.mark.parametrize("seed", SEEDS)
def test_encoders_are_aligned_on_the_students_pairs(cm, watched, few, seed):
    training = watched.trainings["zero-shot", seed]
    assert training.split is few.train
    index = training.shown("index")
    tokens = expected_tokens(cm, watched, few, "", seed)
    np.testing.assert_array_equal(watched.shown("zero-shot", seed, "tokens"), tokens[index])
    image = few.train.image[index] / np.float32(255)
    np.testing.assert_array_equal(watched.shown("zero-shot", seed, "image"), image)
    plain = watched.trainings["image student", seed]
    np.testing.assert_array_equal(index, plain.shown("index"))
    fresh = cm.make_networks(len(watched.vocabularies[seed]) + 2, 32, seed)
    assert training.start == fingerprint(fresh)


@pytest.mark.parametrize("seed", SEEDS)
def test_zero_shot_an_image_is_compared_with_the_wordings_of_training(cm, watched, few, seed):
    """An image of the test gets the digit whose training wordings are nearest on average."""
    training = watched.trainings["zero-shot", seed]
    known = cm.make_wordings(held_out=False)
    for scored_on, encoders, split, prompts in training.scored:
        assert (scored_on, encoders, split) == ("test", training.model, few.test)
        assert len(prompts) == 10
        for digit, tokens in enumerate(prompts):
            decoded = watched.decode(tokens, seed)
            for text, wording in zip(decoded, known[digit], strict=True):
                words = zip(text.split(), wording.text.split(), strict=True)
                assert all(found in (word, "?") for found, word in words)
    cosines = cm.predict_zero_shot(training.model, few.test, prompts)
    errors = int((cosines.argmax(-1) != few.test.label).sum())
    row = watched.row("zero-shot", seed)
    assert row["test_errors"] == errors
    # As probabilities, they are those of the contrastive loss.
    calibration = utils.calibration(cosines / 0.07, few.test.label)
    assert row["nll"] == pytest.approx(calibration["nll"], rel=1e-4)


def test_zero_shot_takes_the_test_images(watched, few):
    assert watched.zero_shot
    assert all(split is few.test for _, split, _ in watched.zero_shot)


@pytest.mark.parametrize("seed", SEEDS)
def test_aligned_students_start_from_their_encoder_with_a_new_last_layer(cm, watched, seed):
    encoders = watched.trainings["zero-shot", seed].model
    fresh = cm.make_networks(len(watched.vocabularies[seed]) + 2, 10, seed)
    names = ("image student, aligned", "text student, aligned")
    for name, encoder, network in zip(names, encoders, fresh, strict=True):
        start = nnx.clone(encoder)
        start.dense2 = network.dense2
        assert watched.trainings[name, seed].start == fingerprint(start)


@pytest.mark.parametrize("seed", SEEDS)
def test_students_leave_the_encoders_as_they_are(cm, watched, few, seed):
    """The aligned students are copies: the row of the encoders is of what the run has kept."""
    folder = watched.report["config"]["output_dir"]
    size = len(watched.vocabularies[seed]) + 2
    fresh = cm.make_networks(size, 32, seed + 1)
    kept = experiment.load_network(folder, "zero-shot", fresh, seed)
    assert fingerprint(kept) == fingerprint(watched.trainings["zero-shot", seed].model)


@pytest.mark.parametrize("seed", SEEDS)
def test_shuffled_captions_are_the_same_captions_at_other_images(cm, watched, few, seed):
    """At both students: only the pairing is gone."""
    own = expected_tokens(cm, watched, few, "", seed)
    name = "text student, shuffled"
    shown = np.zeros_like(own)
    shown[watched.trainings[name, seed].shown("index")] = watched.shown(name, seed, "input")
    assert sorted(map(tuple, shown)) == sorted(map(tuple, own))
    assert (shown == own).all(axis=1).mean() < 0.1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("ending", "noise"), [("", 0.2), (", noise 0.6", 0.6)])
def test_so_many_captions_are_wrong(cm, watched, few, seed, ending, noise):
    """Counted in what the text student read: the first share is that of the comparisons."""
    name = f"text student{ending}"
    known = wordings_of_digits(cm, False)
    label = few.train.label[watched.trainings[name, seed].shown("index")]
    wrong = 0
    for text, digit in zip(
        watched.decode(watched.shown(name, seed, "input"), seed), label, strict=True
    ):
        wording = wording_of(text)
        fits = digit in cm.AMBIGUOUS[wording] if wording in cm.AMBIGUOUS else None
        wrong += wording not in known[digit] if fits is None else not fits
    assert abs(wrong / len(label) - noise) < 0.12


@pytest.mark.parametrize("seed", SEEDS)
def test_recipes(watched, seed):
    """Text teacher and text students at ten times the rate, the teacher for ten times the epochs;
    the encoders at the rate of the image networks."""
    recipe = {name: x.recipe for (name, of_seed), x in watched.trainings.items() if of_seed == seed}
    image = experiment.Recipe(seed, 1, 32, 2e-3, "onecycle")
    assert recipe.pop("image teacher") == image
    assert recipe.pop("zero-shot") == image
    assert recipe.pop("text teacher") == experiment.Recipe(seed, 10, 32, 2e-2, "onecycle")
    for name, found in recipe.items():
        text = image._replace(learning_rate=2e-2)
        assert found == (text if name.startswith("text") else image)


def test_seeds_differ_in_captions_labelled_pairs_start_and_order(watched):
    for name in ("image teacher", "text teacher", "zero-shot", *all_of()):
        one, other = (watched.trainings[name, seed] for seed in SEEDS)
        assert one.start != other.start
        assert (one.shown("index") != other.shown("index")).any()
    labelled = [set(watched.trainings["text teacher", x].split.index) for x in SEEDS]
    assert labelled[0] != labelled[1]
    texts = []
    for seed in SEEDS:
        tokens = np.zeros((320, 16), np.int32)
        index = watched.trainings["text student", seed].shown("index")
        tokens[index] = watched.shown("text student", seed, "input")
        texts.append(watched.decode(tokens, seed))
    assert np.mean([a == b for a, b in zip(*texts, strict=True)]) < 0.2
    tests = [watched.trainings["text student", x].scored[0][2] for x in SEEDS]
    decoded = [watched.decode(tokens, x) for tokens, x in zip(tests, SEEDS, strict=True)]
    assert np.mean([a == b for a, b in zip(*decoded, strict=True)]) < 0.5


def test_all_networks_are_trained_and_reported_in_order(watched):
    names = ["image teacher", "text teacher", "zero-shot", *all_of(["text", "image"])]
    wanted = [(name, seed) for seed in SEEDS for name in names]
    assert list(watched.trainings) == wanted
    assert [(row["name"], row["seed"]) for row in watched.report["results"]] == wanted


def test_every_network_is_scored_on_all_test_images_or_their_captions(cm, watched, few):
    for (name, seed), training in watched.trainings.items():
        if name == "zero-shot":
            continue
        if name.startswith("image"):
            for scored in training.scored:
                assert scored == ("test", training.model, few.test)
            logits = utils.predict(training.model, few.test)
        else:
            tokens = expected_test_tokens(cm, watched, few, seed)
            assert len(tokens) == len(few.test.label)
            logits = training.model(tokens)
        row = watched.row(name, seed)
        errors = int((logits.argmax(-1) != few.test.label).sum())
        assert row["test_errors"] == errors
        assert row["test_accuracy"] == 1 - errors / 80


def test_the_last_epoch_is_reported_not_the_best(watched):
    for row in watched.report["results"]:
        assert row["history"][-1]["test_accuracy"] == pytest.approx(row["test_accuracy"])


def test_equal_recipes_share_a_compiled_step(watched):
    """Steps on soft targets are traced for the image networks, and for text teacher and text
    students of each size of the vocabulary: never for each of the 20 trainings."""
    sizes = {len(vocabulary) for vocabulary in watched.vocabularies.values()}
    assert 1 <= watched.traces <= 1 + 2 * len(sizes)


def test_the_same_training_is_taken_up_and_another_is_not(cm, few, tmp_path):
    """What counts are the start, the captions and the teacher's answers."""
    recipe = experiment.Recipe(0, 1, 32, 1e-2, "onecycle")
    answers = np.full((320, 10), 0.1, np.float32)
    tokens = np.full((320, 16), 2, np.int32)
    test_tokens = np.full((80, 16), 2, np.int32)

    def path_with(seed=0, tokens=tokens, answers=answers, temperature=1.0):
        _, network = cm.make_networks(30, 10, seed)
        run = make_run(tmp_path, few)
        student = cm.train_text_student(
            "student", network, tokens, answers, test_tokens, few, recipe, run, temperature
        )
        return run.training_of(student).path

    first = path_with()
    assert path_with() == first
    others = [
        path_with(seed=1),
        path_with(tokens=tokens + 1),
        path_with(answers=np.eye(10, dtype=np.float32)[few.train.label]),
        path_with(temperature=2.0),
    ]
    assert len({first, *others}) == 5
