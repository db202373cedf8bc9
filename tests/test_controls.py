"""The controls: what each student is told, by whom, on which images, and what is reported."""

import contextlib
import dataclasses
import io
import json
from types import SimpleNamespace

import experiment
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import utils
from conftest import EXAMPLES, check_optimizer, load, t_interval, watch
from experiment import Recipe, fingerprint
from flax import nnx
from scipy.special import log_softmax, softmax

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (RNG.normal(0, 3, (8, 10)).astype(np.float32) for _ in range(2))
LABELS = RNG.integers(0, 10, 8).astype(np.int32)
IMAGES = RNG.random((8, 28, 28, 1)).astype(np.float32)

SEEDS = (7, 8)
FLAGS = {
    "dataset": "digits", "quick": True, "seed": 7, "seeds": 2, "labels": 60, "epochs": 2,
    "batch_size": 20, "temperature": 5.0, "alpha": 0.25, "teacher_seed": 3,
}  # fmt: skip
ON_LABELS = ("baseline", "twice the steps", "hard pseudo-labels")
ON_SOFT_TARGETS = (
    "distilled",
    "alpha 1",
    "permuted dark knowledge",
    "taught by the weak teacher",
    "taught by a blank teacher",
)
SMOOTHED = ("label smoothing 0.3", "label smoothing 0.05")
ON_ALL_IMAGES = ("hard pseudo-labels on all images", "soft targets on all images")
ALL = (*ON_LABELS, *ON_SOFT_TARGETS, *SMOOTHED, *ON_ALL_IMAGES)


@pytest.fixture(scope="module")
def controls():
    return load(EXAMPLES / "advanced/controls.py")


# %% Losses


def test_smoothed_labels(controls):
    q = np.full((8, 10), 0.02)
    q[np.arange(8), LABELS] += 0.8
    want = -(q * log_softmax(STUDENT, -1)).sum(-1).mean()
    found = controls.smoothed_loss(STUDENT, LABELS, 0.2)
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_labels_are_smoothed_over_as_many_classes_as_there_are_logits(controls):
    logits, labels = STUDENT[:, :4], LABELS % 4
    q = np.full((8, 4), 0.05)
    q[np.arange(8), labels] += 0.8
    want = -(q * log_softmax(logits, -1)).sum(-1).mean()
    np.testing.assert_allclose(controls.smoothed_loss(logits, labels, 0.2), want, rtol=1e-5)


def test_the_smoothed_loss_is_computed_in_float32(controls):
    low = jnp.asarray(STUDENT, jnp.bfloat16)
    found = controls.smoothed_loss(low, LABELS, 0.2)
    assert found.dtype == jnp.float32
    assert found == controls.smoothed_loss(np.asarray(low, np.float32), LABELS, 0.2)


@pytest.mark.parametrize("labels", [LABELS[:, None], LABELS[:1], LABELS[:4], np.int32(3)])
def test_shapes_that_would_broadcast_are_refused(controls, labels):
    with pytest.raises(ValueError, match=r"\(8, 10\)") as refused:
        jax.jit(controls.smoothed_loss).lower(STUDENT, labels, 0.2)
    assert str(np.shape(labels)) in str(refused.value)


def test_soft_targets_by_numpy(controls):
    p, q = softmax(TEACHER / 3, -1), log_softmax(STUDENT / 3, -1)
    want = 9 * (p * (np.log(p) - q)).sum(-1).mean()
    found = controls.distillation_loss(STUDENT, TEACHER, LABELS, 3.0, 0.0)[0]
    np.testing.assert_allclose(found, want, rtol=1e-4)


def test_with_alpha_1_the_gradient_is_that_of_the_labels_alone(controls):
    grad = jax.grad(lambda z: controls.distillation_loss(z, TEACHER, LABELS, 3.0, 1.0)[0])(STUDENT)
    labels_alone = jax.grad(lambda z: controls.hard_loss(z, LABELS))(STUDENT)
    np.testing.assert_array_equal(grad, labels_alone)


@pytest.mark.parametrize("smoothing", [0.05, 0.4])
def test_a_step_on_smoothed_labels_goes_down_the_smoothed_loss(controls, smoothing):
    student, other = (controls.StudentCNN(rngs=nnx.Rngs(0)) for _ in range(2))
    optimizer = nnx.Optimizer(student, optax.sgd(0.1), wrt=nnx.Param)
    batch = {"image": IMAGES, "label": LABELS}

    def loss_of(model):
        return controls.smoothed_loss(model(IMAGES, train=True), LABELS, smoothing)

    loss, grads = nnx.jit(nnx.value_and_grad(loss_of))(other)
    found = controls.train_smoothed_step(student, optimizer, batch, smoothing)
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
    want = other.dense2.kernel[...] - 0.1 * grads["dense2"]["kernel"][...]
    np.testing.assert_allclose(student.dense2.kernel[...], want, atol=1e-6)
    mean = student.bn1.mean[...]
    np.testing.assert_allclose(mean, other.bn1.mean[...], atol=1e-6)
    assert np.abs(mean).max() > 0, "in training mode"


# %% A watched run


@dataclasses.dataclass
class Seen:
    """A watched run: what is in its report, its trainings, its output and its figure."""

    config: object
    report: dict
    teacher: object
    others: dict  # (name, seed of the students): Watched
    order: list  # the names of all trainings
    steps: dict  # id of a model: (step, modules beside the model and the optimizer, arguments)
    printed: str
    figure: object

    def students(self, *names):
        """The trainings of these students, of all seeds."""
        return [self.others[name, seed] for name in names for seed in SEEDS]


@pytest.fixture(scope="module")
def few(digits):
    return digits._replace(train=digits.train.take(slice(400)), test=digits.test.take(slice(100)))


@pytest.fixture(scope="module")
def tuning(few):
    """Without the test images: a sixth of the training images, the last, choose the smoothing."""
    train, validation = few.train.take(slice(334)), few.train.take(slice(334, None))
    return few._replace(train=train, test=validation, scored_on="validation")


@pytest.fixture(scope="module")
def seen(controls, few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    config = controls.Config(output_dir=str(folder), smoothings=(0.3, 0.05), **FLAGS)
    printed, steps, figures = io.StringIO(), {}, []
    compile_step, finish = controls.compile_step, experiment.Run.finish

    def watched_step(step, model, *modules):
        compiled, calls = compile_step(step, model, *modules), []
        steps[id(model)] = step, modules[:-1], calls

        def call(batch, *arguments):
            calls.append(arguments)
            return compiled(batch, *arguments)

        return call

    def watched_finish(self, figure, *arguments, **more):
        figures.append(figure)
        return finish(self, figure, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(controls, "compile_step", watched_step)
        patch.setattr(experiment.Run, "finish", watched_finish)
        report, (teacher, *trainings) = watch(controls, few, config)
    others = {}
    for training in trainings:
        name, seed = training.name, training.recipe.seed
        if name.startswith("weak"):
            name, seed = "weak teacher", int(name.split()[-1])
        assert (name, seed) not in others
        others[name, seed] = training
    order = [training.name for training in (teacher, *trainings)]
    return Seen(config, report, teacher, others, order, steps, printed.getvalue(), figures[0])


def logits_of(training, images):
    """The logits of a trained network in inference mode."""
    return utils.predict(training.model, images)


def test_every_kind_of_network_is_trained_once_a_seed(seen):
    want = {(name, seed) for name in ("weak teacher", *ALL) for seed in SEEDS}
    assert set(seen.others) == want
    assert len(seen.order) == 1 + len(want)
    assert seen.order[0] == "teacher", "one strong teacher, for all seeds"


def test_no_network_sees_validation_or_test_images(seen, tuning):
    for training in (seen.teacher, *seen.others.values()):
        index = training.shown("index")
        assert np.isin(index, tuning.train.index).all()
        shown = training.shown("image")
        np.testing.assert_array_equal(shown, tuning.train.image[index] / np.float32(255))
    assert not np.isin(tuning.train.index, tuning.test.index).any()


def test_the_teacher_learns_from_all_images_but_the_validation_images(seen, tuning):
    teacher = seen.teacher
    assert fingerprint(teacher.split) == fingerprint(tuning.train)
    assert teacher.recipe == Recipe(3, 4, 32, 5e-3, "onecycle")
    np.testing.assert_array_equal(teacher.shown("label"), few_labels(tuning, teacher))


def few_labels(tuning, training):
    """The true labels of what a training was shown."""
    return tuning.train.label[training.shown("index")]


@pytest.mark.parametrize("seed", SEEDS)
def test_weak_teachers_learn_for_one_epoch_from_the_labelled_images_alone(
    controls, seen, tuning, seed
):
    weak = seen.others["weak teacher", seed]
    assert isinstance(weak.model, controls.TeacherCNN)
    assert weak.start == seen.teacher.start, "the same network"
    assert weak.recipe == seen.teacher.recipe._replace(epochs=1, batch_size=20)
    labelled = utils.take_labels(tuning.train, 60, seed)
    assert fingerprint(weak.split) == fingerprint(labelled)
    np.testing.assert_array_equal(np.sort(weak.shown("index")), labelled.index)
    np.testing.assert_array_equal(weak.shown("label"), few_labels(tuning, weak))


@pytest.mark.parametrize("seed", SEEDS)
def test_students_of_a_seed_start_alike_and_share_their_batches(kd, seen, tuning, seed):
    labelled = utils.take_labels(tuning.train, 60, seed)
    baseline = seen.others["baseline", seed]
    recipe = kd.student_recipe(kd.Config(epochs=2, batch_size=20), tuning, seed, 60)
    epochs = {"twice the steps": 4}
    for name in ALL:
        student = seen.others[name, seed]
        assert student.start == baseline.start
        if name in ON_ALL_IMAGES:
            continue
        assert student.recipe == recipe._replace(epochs=epochs.get(name, 2))
        np.testing.assert_array_equal(student.split.index, labelled.index)
        np.testing.assert_array_equal(np.unique(student.shown("index")), labelled.index)
        count = len(baseline.shown("index"))
        for key in ("index", "image"):
            np.testing.assert_array_equal(student.shown(key)[:count], baseline.shown(key))
        assert len(student.shown("index")) == count * epochs.get(name, 2) // 2


def test_start_and_batches_are_those_of_the_seed(controls, seen):
    networks = [("TeacherCNN", seen.teacher), ("TeacherCNN", seen.students("weak teacher")[0])]
    networks += [("StudentCNN", student) for student in seen.students("baseline")]
    for network, training in networks:
        recipe = training.recipe
        fresh = getattr(controls, network)(rngs=nnx.Rngs(recipe.seed))
        assert training.start == fingerprint(fresh)
        index = []
        for epoch in range(1, recipe.epochs + 1):
            same = utils.batches(training.split, recipe.batch_size, recipe.seed, epoch)
            index += [batch["index"] for batch in same]
        np.testing.assert_array_equal(training.shown("index"), np.concatenate(index))


def test_students_of_two_seeds_differ_in_start_images_and_batches(seen):
    one, other = seen.students("baseline")
    assert one.start != other.start
    assert (one.split.index != other.split.index).any()


def test_students_see_true_labels_but_where_the_teacher_labels(seen, tuning):
    answers = logits_of(seen.teacher, tuning.train).argmax(-1)
    told = ("hard pseudo-labels", *ON_ALL_IMAGES)
    for name in ALL:
        for student in seen.students(name):
            want = few_labels(tuning, student)
            if name in told:
                assert (want != answers[student.shown("index")]).any(), "it can be told apart"
                want = answers[student.shown("index")]
            np.testing.assert_array_equal(student.shown("label"), want)


@pytest.mark.parametrize("seed", SEEDS)
def test_who_is_the_teacher_of_whom(seen, tuning, seed):
    """The logits in a batch are the right teacher's for these very images, in inference mode."""
    strong = logits_of(seen.teacher, tuning.train)
    weak = logits_of(seen.others["weak teacher", seed], tuning.train)
    assert np.abs(strong - weak).max() > 0.1
    tables = {
        "distilled": strong,
        "alpha 1": strong,
        "soft targets on all images": strong,
        "taught by the weak teacher": weak,
        "taught by a blank teacher": np.zeros_like(strong),
    }
    for name in ALL:
        student = seen.others[name, seed]
        assert ("teacher_logits" in student.batches[0]) == (
            name in tables or name == "permuted dark knowledge"
        ), "no other hears of a teacher"
        if name in tables:
            want = tables[name][student.shown("index")]
            np.testing.assert_allclose(student.shown("teacher_logits"), want, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_permuted_logits_keep_the_answer_and_how_sure_it_is(seen, tuning, seed):
    student = seen.others["permuted dark knowledge", seed]
    logits = logits_of(seen.teacher, tuning.train)[student.shown("index")]
    permuted = student.shown("teacher_logits")
    np.testing.assert_array_equal(permuted.argmax(-1), logits.argmax(-1))
    np.testing.assert_allclose(np.sort(permuted), np.sort(logits), atol=1e-5)
    moved = np.abs(permuted - logits) > 1e-4
    assert moved.any(-1).mean() > 0.9
    places = [tuple(np.argsort(np.argsort(row))) for row in permuted]
    assert len(set(places)) > 30, "each image by a permutation of its own"
    first, second = student.batches[:3], student.batches[3:]
    by_index = {}
    for batch in first:
        by_index |= dict(zip(batch["index"], batch["teacher_logits"], strict=True))
    for batch in second:
        for index, row in zip(batch["index"], batch["teacher_logits"], strict=True):
            np.testing.assert_array_equal(row, by_index[index], "the same in every epoch")


def test_permutations_are_drawn_by_the_students_seed(controls, seen):
    for student in seen.students("permuted dark knowledge"):
        distilled = seen.others["distilled", student.recipe.seed]
        rng = np.random.default_rng([student.recipe.seed, 18])
        want = controls.permute_dark_knowledge(distilled.given["teacher_logits"], rng)
        np.testing.assert_array_equal(student.given["teacher_logits"], want)


def test_every_step_is_given_its_temperature_alpha_and_smoothing(controls, seen):
    for name in ("weak teacher", *ALL):
        step, arguments, modules = controls.train_step, (), ()
        if name in ON_SOFT_TARGETS or name.startswith("soft"):
            alpha = {"alpha 1": 1.0, "soft targets on all images": 0.0}.get(name, 0.25)
            step, arguments, modules = controls.train_student_step, (5.0, alpha), (None,)
        if name in SMOOTHED:
            step, arguments = controls.train_smoothed_step, (float(name.split()[-1]),)
        for training in seen.students(name):
            found_step, found_modules, calls = seen.steps[id(training.model)]
            assert found_step is step
            assert found_modules == modules
            assert set(calls) == {arguments}, name
            assert len(calls) == len(training.batches)


@pytest.mark.parametrize("name", ON_ALL_IMAGES)
def test_students_of_all_images_see_ever_new_ones(seen, tuning, name):
    """In as many steps as the others take: 6, of 20 images."""
    for student in seen.students(name):
        index = student.shown("index")
        assert len(np.unique(index)) == len(index) == 6 * 20
        assert len(seen.others["baseline", student.recipe.seed].shown("index")) == 6 * 20
        assert set(index) == set(tuning.train.index[:120])
        other = seen.others["baseline", student.recipe.seed].recipe
        assert student.recipe == other._replace(epochs=1)


@pytest.mark.parametrize(
    ("epochs", "images", "through"),
    [(2, 120, 1), (5, 300, 1), (6, 334, 1), (17, 334, 3), (0, 20, 0)],
)
def test_all_images_are_gone_through_as_often_as_the_steps_ask_for(
    controls, tuning, monkeypatch, epochs, images, through
):
    taken = []

    def take(name, *arguments, **more):
        taken.append(arguments[-4:-2] if name.startswith("hard") else arguments[1:3])

    monkeypatch.setattr(controls, "train_control_on_labels", take)
    monkeypatch.setattr(controls, "train_control_on_soft_targets", take)
    logits = RNG.normal(0, 3, (334, 10)).astype(np.float32)
    labelled = utils.take_labels(tuning.train, 60, 7)
    recipe = Recipe(7, epochs, 20, 1e-2, "onecycle")
    config = controls.Config()
    controls.train_students_on_all_images(logits, labelled, recipe, tuning, config, None)
    for split, own in taken:
        np.testing.assert_array_equal(split.index, tuning.train.index[:images])
        np.testing.assert_array_equal(split.label, logits.argmax(-1)[:images])
        assert own == recipe._replace(epochs=through)
        once = len(split.label) // 20
        assert abs(through * once - 3 * epochs) <= max(1, once / 2), "as near as whole epochs allow"
    assert len(taken) == 2


def test_alpha_1_is_the_baseline_to_the_last_bit(seen):
    for alpha_1, baseline in zip(seen.students("alpha 1"), seen.students("baseline"), strict=True):
        assert fingerprint(alpha_1.model) == fingerprint(baseline.model)
        assert alpha_1.start != fingerprint(alpha_1.model)
    assert seen.report["alpha_1_is_baseline"] == [True, True]
    assert lines(seen)["alpha 1 is the baseline, bit for bit"] == "2 of 2 seeds"


def lines(seen):
    """The lines of the summary: {what: found}."""
    wide = len("hard pseudo-labels on all images − baseline")  # the longest
    summary = seen.printed.split(" SUMMARY ")[1].splitlines()
    return {line[:wide].strip(): line[wide:].strip() for line in summary}


# %% Scores


def test_in_training_networks_are_scored_on_validation_images(seen, tuning):
    for training in (seen.teacher, *seen.others.values()):
        for scored_on, model, split in training.scored:
            assert (scored_on, model) == ("validation", training.model)
            assert fingerprint(split) == fingerprint(tuning.test)
    for training in seen.students(*ALL):
        assert len(training.scored) == 1


def training_of(seen, row, place):
    """The training of the network in a row, the `place`-th of its name."""
    name = row["name"]
    if name == "teacher":
        return seen.teacher
    if name == "label smoothing":
        name = f"label smoothing {seen.report['smoothing']}"
    return seen.others[name, SEEDS[place]]


def rows_and_trainings(seen):
    for name in dict.fromkeys(row["name"] for row in seen.report["results"]):
        rows = [row for row in seen.report["results"] if row["name"] == name]
        for place, row in enumerate(rows):
            yield row, training_of(seen, row, place)


def test_rows_are_scored_on_all_test_images_after_the_last_epoch(seen, few, tuning):
    for row, training in rows_and_trainings(seen):
        errors = (logits_of(training, few.test).argmax(-1) != few.test.label).sum()
        assert row["test_errors"] == errors
        assert row["test_accuracy"] == 1 - errors / 100
        errors = (logits_of(training, tuning.test).argmax(-1) != tuning.test.label).sum()
        assert row["validation_errors"] == errors
        accuracy = row["history"][-1]["validation_accuracy"]
        assert accuracy == pytest.approx(1 - errors / len(tuning.test.label))


def test_at_temperature_1_a_blank_teacher_is_label_smoothing(controls):
    """alpha · label + (1 − alpha) · uniform: the same gradient as of smoothing by 1 − alpha."""

    def of_blank(z):
        return controls.distillation_loss(z, jnp.zeros_like(z), LABELS, 1.0, 0.7)[0]

    found = jax.grad(of_blank)(STUDENT)
    want = jax.grad(lambda z: controls.smoothed_loss(z, LABELS, 0.3))(STUDENT)
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_optimizers_are_made_for_the_recipes(controls, seen):
    for training in (seen.teacher, *seen.others.values()):
        check_optimizer(controls, training)


def test_rows_have_names_seeds_and_their_order(seen):
    names = [name for name in ALL if name not in SMOOTHED] + ["label smoothing"]
    rows = seen.report["results"]
    assert {row["name"] for row in rows} == {"teacher", "weak teacher", *names}
    for name in names:
        assert [row["seed"] for row in rows if row["name"] == name] == list(SEEDS)
    # A weak teacher starts as the teacher does, on the labelled images of the students.
    weak = [row for row in rows if row["name"] == "weak teacher"]
    assert [row["seed"] for row in weak] == list(SEEDS)
    assert [row["settings"]["seed"] for row in weak] == [3, 3]
    assert [row["name"] for row in rows[:4]] == ["teacher", "weak teacher", "baseline", "distilled"]


def test_fidelity_is_to_the_strong_teacher(seen, few):
    answers = logits_of(seen.teacher, few.test).argmax(-1)
    for row, training in rows_and_trainings(seen):
        own = logits_of(training, few.test).argmax(-1)
        assert row["agreement"] == pytest.approx((own == answers).mean())


def test_pseudo_labels_changed_counts_the_labels_that_the_teacher_contradicts(seen, tuning):
    answers = logits_of(seen.teacher, tuning.train).argmax(-1)
    want = []
    for seed in SEEDS:
        labelled = utils.take_labels(tuning.train, 60, seed)
        want.append((answers[labelled.index] != labelled.label).sum())
    assert seen.report["pseudo_labels_changed"] == want
    assert sum(want) > 0


# %% The choice of the smoothing


def test_validation_images_choose_the_smoothing_over_all_seeds(seen, tuning):
    errors = {}
    for name in SMOOTHED:
        errors[float(name.split()[-1])] = [
            (logits_of(student, tuning.test).argmax(-1) != tuning.test.label).sum()
            for student in seen.students(name)
        ]
    assert seen.report["validation"] == len(tuning.test.label) == 66
    assert seen.report["smoothing_errors"] == errors
    assert seen.report["smoothing"] == min(errors, key=lambda x: sum(errors[x]))
    text = (EXAMPLES / seen.config.output_dir / "results.json").read_text()
    assert json.loads(text)["smoothing_errors"].keys() == {"0.3", "0.05"}
    chosen = f"{seen.report['smoothing']:g}, chosen on 66 validation images"
    assert lines(seen)["Strength of label smoothing"] == chosen


@pytest.mark.parametrize(
    ("errors", "best"),
    [
        ({0.05: [5, 5], 0.1: [1, 8], 0.2: [8, 1]}, 0.1),  # the first of equals
        ({0.05: [1, 9], 0.1: [4, 4], 0.2: [9, 1]}, 0.1),
        ({0.05: [9, 9], 0.1: [4, 5], 0.2: [3, 5]}, 0.2),
    ],
)
def test_the_fewest_errors_of_all_seeds_win(controls, monkeypatch, errors, best):
    monkeypatch.setattr(controls, "count_validation_errors", lambda count, data: count)
    assert controls.choose_smoothing(errors, None) == (best, errors)


def test_what_main_makes_of_the_students(controls, few, tuning, monkeypatch, tmp_path):
    """Rows are those of the chosen strength, and bits are compared, seed by seed."""
    one, other = (controls.StudentCNN(rngs=nnx.Rngs(seed)) for seed in (0, 1))
    seeds, rows = [], []

    def train_one_seed(teacher_logits, labelled, recipe, for_weak_teacher, data, config, run):
        seeds.append(recipe.seed)
        baseline = one if recipe.seed == 8 else other
        smoothed = {0.1: f"0.1 of {recipe.seed}", 0.2: f"0.2 of {recipe.seed}"}
        return "weak", {"baseline": baseline, "alpha 1": one}, smoothed

    monkeypatch.setattr(controls, "train_controls_of_one_seed", train_one_seed)
    monkeypatch.setattr(controls, "train_teacher", lambda *_: one)
    monkeypatch.setattr(controls, "add_control_row", lambda *given, **_: rows.append(given[:2]))
    monkeypatch.setattr(controls, "report_controls", lambda run, measured: measured)
    wrong = {"0.1 of 7": 1, "0.1 of 8": 9, "0.2 of 7": 4, "0.2 of 8": 4}
    monkeypatch.setattr(controls, "count_validation_errors", lambda name, data: wrong[name])
    monkeypatch.setattr(utils, "load_data", lambda *_: few)
    config = controls.Config(output_dir=str(tmp_path), smoothings=(0.1, 0.2), **FLAGS)
    measured = controls.main(config)
    assert seeds == [7, 8]
    assert measured["alpha_1_is_baseline"] == [False, True]
    assert measured["smoothing"] == 0.2
    found = [network for name, network in rows if name == "label smoothing"]
    assert found == ["0.2 of 7", "0.2 of 8"]


def test_with_a_holdout_a_rows_validation_errors_are_those_it_is_scored_on(controls, few):
    row = {"validation_accuracy": 0.5, "validation_errors": 50}
    run = SimpleNamespace(data=few, add_row=lambda *_, **__: row)
    network = controls.StudentCNN(rngs=nnx.Rngs(0))
    controls.add_control_row("baseline", network, None, few, run)
    assert row == {"validation_accuracy": 0.5, "validation_errors": 50}


# %% Gains


def gains_of(seen, name):
    """The gains of a name's rows over the baseline's of the same seed, in points."""
    rows = seen.report["results"]
    accuracies = {(row["name"], row["seed"]): 100 * row["test_accuracy"] for row in rows}
    return np.array([accuracies[name, seed] - accuracies["baseline", seed] for seed in SEEDS])


def test_the_summary_gives_gains_over_the_baseline_with_their_95_percent_interval(seen):
    found, spread = lines(seen), 0
    for name in [*(name for name in ALL if name not in SMOOTHED), "label smoothing"]:
        if name == "baseline":
            continue
        gains = gains_of(seen, name)
        low, high = t_interval(gains)
        spread = max(spread, gains.std())
        mean, wins = gains.mean(), (gains > 1e-9).sum()
        interval = f"(95 %: {low:+.2f} to {high:+.2f})"
        want = f"{mean:+.2f} points {interval}, {wins} of 2 seeds"
        assert found[f"{name} − baseline"].replace("-0.00", "+0.00") == want.replace(
            "-0.00", "+0.00"
        )
    assert spread > 0.4, "another quantile would show"


def test_the_figure_has_every_seed_and_the_95_percent_interval(seen):
    [axes] = seen.figure.axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    rows = dict.fromkeys(row["name"] for row in seen.report["results"])
    assert set(names) == set(rows) - {"teacher", "weak teacher", "baseline"}
    means = [gains_of(seen, name).mean() for name in names]
    assert means == sorted(means, reverse=True)
    points = [
        line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata()) == 2
    ]
    bars = [bar.get_segments()[0] for bar in axes.collections]
    assert len(points) == len(bars) == len(names)
    for name, line, bar in zip(names, points, bars, strict=True):
        gains = gains_of(seen, name)
        np.testing.assert_allclose(line.get_xdata(), gains, atol=1e-9)
        np.testing.assert_allclose(bar[:, 0], t_interval(gains), atol=1e-9)


# %% Flags


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"validation": 273}, "--validation 273: must be at most 272"),
        ({"labels": 335}, "--labels 335: there are 334 training images"),
        ({"batch_size": 61}, "--batch-size 61"),
        ({"teacher": "nowhere"}, "--teacher nowhere"),
        ({"smoothings": ()}, "--smoothings"),
        ({"smoothings": (0.1, 1.0)}, "--smoothings 1.0"),
        ({"smoothings": (0.0,)}, "--smoothings 0.0"),
        ({"smoothings": (0.1, 0.1)}, "--smoothings: must not repeat"),
        ({"seeds": 1}, "--seeds 1"),
        ({"validation": 0}, "--validation 0"),
        ({"alpha": 1.5}, "--alpha 1.5"),
        ({"temperature": 0.0}, "--temperature 0.0"),
    ],
)
def test_flags_are_refused_before_anything_is_trained(
    controls, few, monkeypatch, tmp_path, flags, named
):
    monkeypatch.setattr(controls, "Training", None)
    monkeypatch.setattr(utils, "load_data", lambda *_: few)
    config = controls.Config(**{"output_dir": str(tmp_path), **FLAGS, **flags})
    with pytest.raises(utils.UserError) as refused:
        controls.main(config)
    assert str(refused.value).startswith(named)


def test_a_teacher_is_taken_if_it_was_trained_without_the_validation_images(
    controls, few, tuning, seen, monkeypatch, tmp_path
):
    taken = []

    def stop(model, split):
        taken.append((fingerprint(model), fingerprint(split)))
        raise InterruptedError

    monkeypatch.setattr(controls, "Training", None)
    monkeypatch.setattr(controls, "predict_by_index", stop)
    monkeypatch.setattr(utils, "load_data", lambda *_: few)
    flags = {**FLAGS, "output_dir": str(tmp_path), "teacher": seen.config.output_dir}
    with pytest.raises(InterruptedError):
        controls.main(controls.Config(**flags))
    assert taken == [(fingerprint(seen.teacher.model), fingerprint(tuning.train))]
    with pytest.raises(utils.UserError, match="trained on other images"):
        controls.main(controls.Config(**flags, validation=65))


def test_what_is_left_open(controls, digits, many):
    first_look = digits._replace(name="mnist")
    smoothings = (0.05, 0.1, 0.2, 0.4)
    for data, quick, labels, seeds, some, teacher in (
        (many, False, 1000, 3, smoothings, (3, 128)),
        (digits, False, 100, 3, smoothings, (8, 32)),
        (first_look, True, 100, 2, (0.1,), (4, 32)),
        (digits, True, 100, 2, (0.1,), (4, 32)),
    ):
        config = controls.fill_in_defaults(controls.Config(quick=quick), data)
        found = config.labels, config.epochs, config.seeds, config.smoothings, config.validation
        assert found == (labels, 40 if quick else None, seeds, some, len(data.train.label) // 6)
        recipe = controls.strong_teacher_recipe(config, data)
        assert recipe == Recipe(0, *teacher, 5e-3, "onecycle")
    constant = controls.Config(schedule="constant", teacher_seed=4)
    recipe = controls.strong_teacher_recipe(constant, many)
    assert recipe == Recipe(4, 3, 128, 1e-3, "constant")
    own = controls.Config(seeds=4, labels=50, epochs=6, smoothings=(0.3,), validation=9, quick=True)
    assert controls.fill_in_defaults(own, many) == own
