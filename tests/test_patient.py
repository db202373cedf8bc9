"""The patient teacher: views, which of them the teacher is asked about, mixed images, trainings."""

import experiment
import jax
import numpy as np
import optax
import pytest
import utils
from conftest import EXAMPLES, check_optimizer, exhibit, load, make_run, watch
from flax import nnx

SCRIPT = "26_patient_teacher.py"
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (8, 10)).astype(np.float32)
LABELS = np.arange(8, dtype=np.int32)


@pytest.fixture(scope="module")
def script():
    return load(EXAMPLES / SCRIPT)


@pytest.fixture(scope="module")
def labelled():
    """96 digits; an image's index is its row."""
    split = utils.load_data("digits").train.take(np.arange(96))
    return split._replace(index=np.arange(96, dtype=np.int32))


def ask(teacher, image):
    return np.asarray(teacher(image, train=False))


# %% Museum


def teacher_answers_another_view(script):
    labelled = utils.load_data("digits").train.take(np.arange(32))
    labelled = labelled._replace(index=np.arange(32, dtype=np.int32))
    teacher = script.TeacherCNN(rngs=nnx.Rngs(1))
    view_logits = script.tabulate_view_logits(teacher, labelled)
    [batch] = script.batches_of_views(labelled, 32, 0, 1, "same", view_logits)
    np.testing.assert_allclose(batch["teacher_logits"], ask(teacher, batch["image"]), atol=1e-3)


def teacher_learns_from_mixed_images(script):
    student, teacher = script.StudentCNN(rngs=nnx.Rngs(0)), script.TeacherCNN(rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(student, optax.sgd(0.1), wrt=nnx.Param)
    before = experiment.fingerprint(teacher)
    script.train_mixed_step(student, teacher, optimizer, mixed_batch(script))
    assert experiment.fingerprint(teacher) == before


MUSEUM = {
    teacher_answers_another_view: [
        # logits of the plain image, kept
        (SCRIPT, 'batch["index"], teacher_views]', 'batch["index"], PLAIN]'),
        # a view drawn for the teacher alone
        (SCRIPT, "        return student_views\n", "        return other_views\n"),
    ],
    teacher_learns_from_mixed_images: [
        (SCRIPT, 'jax.lax.stop_gradient(teacher(batch["image"], train=False))\n\n    def loss_fn'
         '(student):\n        logits = student(batch["image"], train=True)\n        hard = mixed',
         'jax.lax.stop_gradient(teacher(batch["image"], train=True))\n\n    def loss_fn'
         '(student):\n        logits = student(batch["image"], train=True)\n        hard = mixed'),
    ],
}  # fmt: skip
BUGS = [(check, *bug) for check, bugs in MUSEUM.items() for bug in bugs]


@pytest.mark.parametrize(
    ("check", "file", "right", "wrong"), BUGS, ids=lambda x: getattr(x, "__name__", "")
)
def test_bug(check, file, right, wrong):
    exhibit(check, SCRIPT, file, right, wrong)


# %% Views


def test_a_view_is_the_image_shifted(script):
    """By −2 to 2 rows and columns; what leaves the image is lost, and background comes in."""
    image = RNG.integers(1, 256, (1, 28, 28, 1)).astype(np.uint8)
    for view in range(25):
        down, right = view // 5 - 2, view % 5 - 2
        want = np.zeros_like(image)
        for y in range(28):
            for x in range(28):
                if 0 <= y - down < 28 and 0 <= x - right < 28:
                    want[0, y, x] = image[0, y - down, x - right]
        shown = script.show_views(image, np.array([view]))
        np.testing.assert_array_equal(shown, want)
    assert (script.VIEWS, script.PLAIN) == (25, 12)
    np.testing.assert_array_equal(script.show_views(image, np.array([script.PLAIN])), image)


def test_views_are_those_that_the_teacher_was_trained_on(script, labelled):
    """A shift of `utils.augment` is one of the 25 views."""
    images = labelled.image[:40]
    shifted = utils.augment(images, "shift", np.random.default_rng(0))
    for i in range(len(images)):
        repeated = np.repeat(images[i : i + 1], 25, axis=0)
        views = script.show_views(repeated, np.arange(25))
        assert any(np.array_equal(view, shifted[i]) for view in views)


def test_the_table_has_the_teacher_s_logits_for_every_view(script, labelled):
    teacher = script.TeacherCNN(rngs=nnx.Rngs(1))
    before = experiment.fingerprint(teacher)
    few = labelled.take(np.arange(6))
    table = script.tabulate_view_logits(teacher, few)
    assert table.shape == (6, 25, 10)
    assert experiment.fingerprint(teacher) == before
    for view in (0, 7, 12, 24):
        images = script.show_views(few.image, np.full(6, view)) / np.float32(255)
        np.testing.assert_allclose(table[:, view], ask(teacher, images), atol=1e-3)


def all_batches(script, labelled, way=None, table=None, seed=3, epoch=2):
    return list(script.batches_of_views(labelled, 32, seed, epoch, way, table))


def test_all_students_see_the_same_views_which_change_from_epoch_to_epoch(script, labelled):
    table = np.zeros((96, 25, 10), np.float32)
    alone = all_batches(script, labelled)
    plain = list(utils.batches(labelled, 32, 3, 2))
    assert len(alone) == len(plain) == 3
    for way in ("plain", "other", "same"):
        for batch, other in zip(all_batches(script, labelled, way, table), alone, strict=True):
            np.testing.assert_array_equal(batch["image"], other["image"])
            np.testing.assert_array_equal(batch["label"], other["label"])
    for batch, unshifted in zip(alone, plain, strict=True):
        np.testing.assert_array_equal(batch["index"], unshifted["index"])
        assert not np.array_equal(batch["image"], unshifted["image"])
        assert "teacher_logits" not in batch
    first, again = (
        np.concatenate([batch["image"][np.argsort(batch["index"])] for batch in batches])
        for batches in (alone, all_batches(script, labelled, epoch=3))
    )
    assert not np.array_equal(first, again)


def test_each_way_asks_about_its_view(script, labelled):
    """The table holds the number of the image and of the view in the place of logits."""
    images, views = np.meshgrid(np.arange(96), np.arange(25), indexing="ij")
    table = np.stack([images, views], axis=-1)
    asked = {}
    for way in ("plain", "other", "same"):
        shown = []
        for batch in all_batches(script, labelled, way, table):
            np.testing.assert_array_equal(batch["teacher_logits"][:, 0], batch["index"])
            shown.append(batch["teacher_logits"][:, 1])
        asked[way] = np.concatenate(shown)
    assert set(asked["plain"]) == {12}
    student_views = []
    for batch in all_batches(script, labelled):
        for image, index in zip(batch["image"], batch["index"], strict=True):
            repeated = np.repeat(labelled.image[index : index + 1], 25, axis=0)
            of_image = script.show_views(repeated, np.arange(25)) / np.float32(255)
            matching = [v for v in range(25) if np.array_equal(of_image[v], image)]
            student_views.append(matching)
    matches = zip(asked["same"], student_views, strict=True)
    assert all(view in matching for view, matching in matches)
    assert (asked["other"] == asked["same"]).mean() < 0.2  # 1 of 25 by chance
    assert len(set(asked["other"])) > 15
    with pytest.raises(ValueError, match="'sane'"):
        all_batches(script, labelled, "sane", table)


# %% Mixed images


def mixed_batch(script, mixup=1.0):
    labelled = utils.load_data("digits").train.take(np.arange(32))
    [batch] = script.batches_of_mixed_views(labelled, 32, 0, 1, mixup)
    return batch


def test_a_mixed_image_is_the_weighted_sum_of_two_views(script, labelled):
    views = all_batches(script, labelled)
    mixed = list(script.batches_of_mixed_views(labelled, 32, 3, 2, 1.0))
    shares = []
    for batch, before in zip(mixed, views, strict=True):
        share = batch["share"]
        shares.append(float(share))
        np.testing.assert_array_equal(batch["label"], before["label"])
        rest = (batch["image"] - share * before["image"]) / (1 - share)
        partners = [
            int(np.argmin(np.abs(before["image"] - image).sum(axis=(1, 2, 3)))) for image in rest
        ]
        assert sorted(partners) == list(range(32))
        np.testing.assert_allclose(rest, before["image"][partners], atol=1e-3)
        np.testing.assert_array_equal(batch["partner_label"], before["label"][partners])
    assert len(set(shares)) == 3
    assert all(0 < share < 1 for share in shares)


def test_a_small_mixup_leaves_most_images_nearly_alone(script, labelled):
    shares = []
    for epoch in range(20):
        for batch in script.batches_of_mixed_views(labelled, 32, 0, epoch, 0.05):
            shares.append(float(batch["share"]))
    near_the_ends = np.minimum(shares, 1 - np.array(shares)) < 0.05
    assert near_the_ends.mean() > 0.7


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_hard_loss_of_a_mix_is_the_cross_entropy_with_mixed_labels(script, share):
    partner_labels = LABELS[::-1].copy()
    targets = share * np.eye(10)[LABELS] + (1 - share) * np.eye(10)[partner_labels]
    want = optax.losses.softmax_cross_entropy(LOGITS, targets).mean()
    found = script.mixed_hard_loss(LOGITS, LABELS, partner_labels, share)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    gradient = jax.grad(script.mixed_hard_loss)(LOGITS, LABELS, partner_labels, share)
    np.testing.assert_allclose(gradient, (jax.nn.softmax(LOGITS) - targets) / 8, atol=1e-6)
    with pytest.raises(ValueError, match="must be"):
        script.mixed_hard_loss(LOGITS, LABELS, partner_labels[:1], share)


def test_a_mixed_step_learns_from_labels_and_from_the_teacher_s_answer_to_the_mix(script):
    student, teacher = script.StudentCNN(rngs=nnx.Rngs(0)), script.TeacherCNN(rngs=nnx.Rngs(1))
    batch = mixed_batch(script)
    logits = script.StudentCNN(rngs=nnx.Rngs(0))(batch["image"], train=True)
    hard = script.mixed_hard_loss(logits, batch["label"], batch["partner_label"], batch["share"])
    soft = script.soft_loss(logits, ask(teacher, batch["image"]), 2.0)
    optimizer = nnx.Optimizer(student, optax.sgd(0.1), wrt=nnx.Param)
    found = script.train_mixed_step(student, teacher, optimizer, batch, 2.0, 0.25)
    np.testing.assert_allclose(found["hard_loss"], hard, rtol=1e-4)
    np.testing.assert_allclose(found["soft_loss"], soft, rtol=1e-3)
    np.testing.assert_allclose(found["loss"], 0.25 * hard + 0.75 * soft, rtol=1e-3)

    baseline = script.StudentCNN(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(baseline, optax.sgd(0.1), wrt=nnx.Param)
    found = script.train_mixed_step(baseline, None, optimizer, batch, 2.0, 0.25)
    np.testing.assert_allclose(found["loss"], hard, rtol=1e-4)
    assert experiment.fingerprint(baseline) != experiment.fingerprint(student)


# %% The experiment


@pytest.fixture(scope="module")
def experiment_on_digits(script, digits, tmp_path_factory):
    """A run with two seeds and two lengths, of one and of two epochs."""
    data = digits._replace(train=digits.train.take(np.arange(300)))
    config = script.Config(
        dataset="digits", output_dir=str(tmp_path_factory.mktemp("out")), seeds=2, labels=64,
        epochs=(2, 1), ways=("plain", "other", "same", "mixup"), temperature=2.0, alpha=0.25,
        mixup=0.7, learning_rate=3e-3,
    )  # fmt: skip
    recipe = script.Recipe(9, 1, 50, 1e-3, "onecycle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "default_teacher_recipe", lambda *_: recipe)
        report, watched = watch(script, data, config)
    return data, report, watched


STUDENTS = [
    "baseline", "plain image", "other view", "same view", "baseline with mixup", "mixup",
]  # fmt: skip


def test_who_is_trained_in_which_order(experiment_on_digits):
    _, report, watched = experiment_on_digits
    of_a_seed = [f"{name}, {epochs} epochs" for epochs in (1, 2) for name in STUDENTS]
    assert [x.name for x in watched] == ["teacher", *of_a_seed, *of_a_seed]
    assert [row["name"] for row in report["results"]] == ["teacher", *of_a_seed, *of_a_seed]
    for row in report["results"][1:]:
        assert row["params"] == 56_810
        assert {"agreement", "kl", "test_errors"} <= set(row)


def test_the_teacher_is_trained_on_views(script, many, experiment_on_digits):
    assert experiment_on_digits[2][0].recipe.augmentation == "shift"
    clothes = many._replace(name="fashion_mnist")
    recipe = script.views_teacher_recipe(script.Config(teacher_seed=7), clothes)
    assert recipe == script.Recipe(7, 10, 128, 2e-3, "onecycle", "shift")


def test_students_of_a_seed_share_images_and_start_and_have_all_their_epochs(
    script, experiment_on_digits
):
    data, _, watched = experiment_on_digits
    for seed, students in ((42, watched[1:13]), (43, watched[13:])):
        images = utils.take_labels(data.train, 64, seed).image
        for place, student in enumerate(students):
            assert student.recipe == script.Recipe(seed, 1 + place // 6, 32, 3e-3, "onecycle")
            assert student.start == students[0].start
            np.testing.assert_array_equal(student.split.image, images)
            check_optimizer(script, student)


def test_each_student_has_its_way_temperature_and_alpha(experiment_on_digits):
    _, _, watched = experiment_on_digits
    ways = {"plain image": "plain", "other view": "other", "same view": "same"}
    teacher = watched[0].model
    for student in watched[1:]:
        name, given = student.name.split(",")[0], student.given
        if name in ways:
            assert given["way"] == ways[name]
            assert given["view_logits"].shape == (64, 25, 10)
        if name in ways or name == "mixup":
            assert (given["temperature"], given["alpha"]) == (2.0, 0.25)
        if name.endswith("mixup"):
            assert given["mixup"] == 0.7
            assert given["teacher"] is (teacher if name == "mixup" else None)


def test_trainings_show_views_of_each_epoch(script, labelled, tmp_path, monkeypatch):
    """Each loop asks for the views of its seed and epoch, in its way."""
    real, calls = script.batches_of_views, []

    def watched_views(split, batch_size, seed, epoch, *way_and_table):
        calls.append((seed, epoch, *way_and_table[:1]))
        yield from real(split, batch_size, seed, epoch, *way_and_table)

    monkeypatch.setattr(script, "batches_of_views", watched_views)
    run = make_run(tmp_path, utils.load_data("digits"))
    recipe = script.Recipe(5, 2, 32, 1e-3, "onecycle")
    table = np.zeros((96, 25, 10), np.float32)
    script.train_baseline_on_views(labelled, 10, recipe, run)
    script.train_student_on_views("other view", "other", labelled, table, recipe, run)
    script.train_student_on_mixed_views("mixup", None, labelled, 10, recipe, run, 1.0)
    assert calls == [(5, 1), (5, 2), (5, 1, "other"), (5, 2, "other"), (5, 1), (5, 2)]


@pytest.mark.parametrize(
    ("ways", "compared"),
    [
        (("same",), "Same view over baseline"),
        (("plain", "other"), "Other view over baseline"),
        (("mixup",), "Mixup over baseline with mixup"),
    ],
)
def test_summary_and_figure_speak_of_the_ways_that_were_tried(
    script, digits, tmp_path, ways, compared
):
    run = make_run(tmp_path, digits)
    students = ["baseline", *(script.WAY_NAMES[way] for way in ways if way != "mixup")]
    if "mixup" in ways:
        students += ["baseline with mixup", "mixup"]
    for place, student in enumerate(students):
        for epochs in (5, 20):
            name = script.name_of_length(student, epochs)
            row = {"name": name, "test_accuracy": 0.8 + 0.01 * place + 0.001 * epochs}
            run.rows.append(row)
    title = script.say_what_patience_gains(run, students, [5, 20])
    assert title.startswith(f"{compared}: +")
    assert title.endswith("(one seed)")
    lines = script.summarise(run, students, [5, 20])
    for way in ways:
        baseline = "baseline with mixup" if way == "mixup" else "baseline"
        assert f"{script.WAY_NAMES[way]} − {baseline}, 20 epochs" in lines
    assert not [line for line in lines if line.startswith("same view − same")]
