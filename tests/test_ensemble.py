"""Script 17, several teachers: what they say together, bugs around it, and who learns from whom."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import utils
from conftest import EXAMPLES, exhibit, load, make_run, watch
from experiment import Recipe, Training, fingerprint
from flax import nnx
from scipy.special import log_softmax, softmax

RNG = np.random.default_rng(0)
K = 8  # as many teachers as images, so that no shape gives a wrong axis away
STUDENT = RNG.normal(0, 3, (8, 10)).astype(np.float32)
TEACHERS = RNG.normal(0, 3, (K, 8, 10)).astype(np.float32)
LABELS = RNG.integers(0, 10, 8).astype(np.int32)
IMAGES = RNG.random((8, 28, 28, 1)).astype(np.float32)


def mean_in_numpy(teachers, t, average):
    if average == "probabilities":
        return softmax(np.asarray(teachers) / t, -1).mean(0)
    p = np.prod(softmax(np.asarray(teachers, np.float64) / t, -1), 0) ** (1 / len(teachers))
    return p / p.sum(-1, keepdims=True)


def soft_in_numpy(teachers, t, average):
    p = mean_in_numpy(teachers, t, average)
    return t**2 * (p * (np.log(p) - log_softmax(STUDENT / t, -1))).sum(-1).mean()


def check_ensemble(ens, t, **how):
    soft = ens.ensemble_distillation_loss(STUDENT, TEACHERS, LABELS, t, **how)[2]
    want = soft_in_numpy(TEACHERS, t, how.get("average", "probabilities"))
    np.testing.assert_allclose(soft, want, rtol=1e-4)


# %% For the museum


def logits_averaged_where_probabilities_were_meant(ens):
    check_ensemble(ens, 3.0)


def probabilities_averaged_where_logits_were_meant(ens):
    check_ensemble(ens, 3.0, average="logits")


def one_teacher_left_out(ens):
    whole = ens.mean_distribution(TEACHERS, 3.0)
    for k in range(K):
        other = TEACHERS.copy()
        other[k] = -other[k]
        assert np.abs(ens.mean_distribution(other, 3.0) - whole).max() > 1e-2, f"teacher {k}"


def mean_at_temperature_one_softened_afterwards(ens):
    check_ensemble(ens, 5.0)


def t_squared_missing(ens):
    check_ensemble(ens, 5.0)


def mean_over_images_instead_of_teachers(ens):
    """gnosis #17 took the images for the teachers, too."""
    student = ens.StudentCNN(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(student, optax.sgd(0.1), wrt=nnx.Param)
    batch = {"image": IMAGES, "label": LABELS}
    table = TEACHERS.swapaxes(0, 1)  # [B, K, C]
    logits = student(batch["image"], train=True)
    want = ens.ensemble_distillation_loss(logits, TEACHERS, LABELS, 3.0, 0.5)
    metrics = ens.ensemble_step(student, optimizer, batch | {"teacher_logits": table})
    found = [metrics[key] for key in ("loss", "hard_loss", "soft_loss")]
    np.testing.assert_allclose(found, want, rtol=1e-3)


def gradient_flows_into_a_teacher(ens):
    for average in ("probabilities", "logits"):
        grad = jax.grad(
            lambda v: ens.ensemble_distillation_loss(STUDENT, v, LABELS, average=average)[0]  # noqa: B023
        )(TEACHERS)
        assert np.abs(grad).max() == 0


def mean_of_the_teachers_in_low_precision(ens):
    low = jnp.asarray(TEACHERS, jnp.bfloat16)
    for average in ("probabilities", "logits"):
        want = mean_in_numpy(np.asarray(low, np.float32), 3.0, average)
        found = ens.mean_distribution(low, 3.0, average)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, want, atol=1e-5)


def teachers_of_one_image_broadcast(ens):
    for shape in ([K, 1, 10], [K, 8, 1], [K, 10], [8, 10]):
        message = None
        try:
            ens.ensemble_distillation_loss(STUDENT, np.zeros(shape, np.float32), LABELS)
        except ValueError as error:
            message = str(error)
        assert message is not None
        assert "(8, 10)" in message
        assert str(tuple(shape)) in message


SCRIPT = "17_ensemble_distillation.py"
ARITHMETIC = "jax.nn.softmax(softened).mean(axis=0)"
GEOMETRIC = "jax.nn.softmax(softened.mean(axis=0))"
MEAN_AT_ONE = "jnp.log(jax.nn.softmax(softened * temperature).mean(0))"
DETACHED = "jax.lax.stop_gradient(at_least_float32(teacher_logits))"
MUSEUM = {
    logits_averaged_where_probabilities_were_meant: (ARITHMETIC, GEOMETRIC),
    probabilities_averaged_where_logits_were_meant: (GEOMETRIC, ARITHMETIC),
    one_teacher_left_out: (DETACHED, DETACHED.replace("logits", "logits[1:]")),
    mean_at_temperature_one_softened_afterwards: (
        ARITHMETIC,
        f"jax.nn.softmax({MEAN_AT_ONE} / temperature)",
    ),
    t_squared_missing: ("temperature**2 * optax", "optax"),
    mean_over_images_instead_of_teachers: (
        'batch["teacher_logits"].swapaxes(0, 1)',
        'batch["teacher_logits"]',
    ),
    gradient_flows_into_a_teacher: (DETACHED, "at_least_float32(teacher_logits)"),
    mean_of_the_teachers_in_low_precision: (
        DETACHED,
        "jax.lax.stop_gradient(jnp.asarray(teacher_logits))",
    ),
    teachers_of_one_image_broadcast: ("student_logits.shape != teacher_probs.shape", "False"),
}


@pytest.mark.parametrize("check", MUSEUM, ids=lambda check: check.__name__)
def test_bug(check):
    exhibit(check, SCRIPT, SCRIPT, *MUSEUM[check])


# %% The loss


@pytest.fixture(scope="module")
def ens():
    return load(EXAMPLES / SCRIPT)


@pytest.mark.parametrize("t", [0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_definition(ens, t, average):
    want = mean_in_numpy(TEACHERS, t, average)
    np.testing.assert_allclose(ens.mean_distribution(TEACHERS, t, average), want, atol=1e-5)
    loss = ens.ensemble_distillation_loss(STUDENT, TEACHERS, LABELS, t, 0.3, average)
    hard = -log_softmax(STUDENT, -1)[np.arange(8), LABELS].mean()
    soft = soft_in_numpy(TEACHERS, t, average)
    np.testing.assert_allclose(loss, (0.3 * hard + 0.7 * soft, hard, soft), rtol=1e-4)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_one_teacher_and_equal_teachers_give_distillation_loss(ens, kd, average):
    want = kd.distillation_loss(STUDENT, TEACHERS[0], LABELS, 3.0, 0.5)
    one = ens.ensemble_distillation_loss(STUDENT, TEACHERS[:1], LABELS, average=average)
    np.testing.assert_allclose(one, want, rtol=1e-6)
    three = ens.ensemble_distillation_loss(STUDENT, [TEACHERS[0]] * 3, LABELS, average=average)
    np.testing.assert_allclose(three, want, rtol=1e-5)


def test_list_array_and_order(ens):
    want = ens.ensemble_distillation_loss(STUDENT, TEACHERS, LABELS)
    as_list = ens.ensemble_distillation_loss(STUDENT, list(TEACHERS), LABELS)
    np.testing.assert_array_equal(as_list, want)
    turned = ens.ensemble_distillation_loss(STUDENT, TEACHERS[::-1], LABELS)
    np.testing.assert_allclose(turned, want, rtol=1e-5)


def test_wrong_arguments(ens):
    with pytest.raises(ValueError, match="average='geometric'"):
        ens.ensemble_distillation_loss(STUDENT, TEACHERS, LABELS, average="geometric")
    with pytest.raises(ValueError, match="0 teachers"):
        ens.ensemble_distillation_loss(STUDENT, [], LABELS)
    with pytest.raises(ValueError, match=r"\(8, 10\) and labels \(8, 1\)"):
        ens.ensemble_distillation_loss(STUDENT, TEACHERS, LABELS[:, None])


def test_mean_of_the_losses_has_the_gradient_of_the_mean(ens, kd):
    """1/K · Σ KL(p_k ‖ q) = KL(mean p ‖ q) + what does not depend on the student."""
    grads = [
        jax.grad(lambda z: kd.distillation_loss(z, v, LABELS, 3.0, 0.0)[0])(STUDENT)  # noqa: B023
        for v in TEACHERS
    ]
    grad = jax.grad(lambda z: ens.ensemble_distillation_loss(z, TEACHERS, LABELS, 3.0, 0.0)[0])
    np.testing.assert_allclose(grad(STUDENT), np.mean(grads, 0), atol=1e-6)


def test_both_means_meet_at_high_temperature(ens):
    def gap(t):
        means = (ens.mean_distribution(TEACHERS, t, a) for a in ("probabilities", "logits"))
        return float(np.abs(np.subtract(*map(np.asarray, means))).max())

    assert gap(100) < gap(10) / 20 < gap(1) / 20


# %% The plan of a run


@pytest.mark.parametrize("flags", [{}, {"subsets": True}])
def test_teachers_differ_in_seed_and_with_subsets_in_images(ens, digits, flags):
    config = ens.Config(dataset="digits", teacher_labels=600, teacher_seed=2**32 - 1, **flags)
    config = ens.fill_in_defaults(config, digits)
    repetition = ens.plan_repetition(config, digits, 0, 42)
    seeds = [2**32 - 1, 0, 1, 2]
    assert [recipe.seed for recipe in repetition.teacher_recipes] == seeds
    for seed, split in zip(seeds, repetition.teacher_images, strict=True):
        drawn_by = seed if flags else seeds[0]
        wanted = utils.take_labels(digits.train, 600, drawn_by, stream=3).index
        np.testing.assert_array_equal(split.index, wanted)
    drawn = {tuple(split.index) for split in repetition.teacher_images}
    assert len(drawn) == (4 if flags else 1)
    assert repetition.student_recipe.seed == 42
    assert len(repetition.labelled.label) == 100


def test_no_two_repetitions_share_a_teacher_or_its_images(ens, digits):
    config = ens.Config(dataset="digits", teacher_labels=600, teacher_seed=5, teachers=3)
    config = ens.fill_in_defaults(config, digits)
    for number in (0, 1, 2):
        repetition = ens.plan_repetition(config, digits, number, 42 + number)
        first = 5 + 3 * number
        seeds = [recipe.seed for recipe in repetition.teacher_recipes]
        assert seeds == [first, first + 1, first + 2]
        wanted = utils.take_labels(digits.train, 600, first, stream=3).index
        for split in repetition.teacher_images:
            np.testing.assert_array_equal(split.index, wanted)


@pytest.mark.parametrize("flags", [{}, {"subsets": True}])
def test_teachers_and_students_of_one_seed_draw_images_independently(ens, many, flags):
    """Otherwise the teachers would have seen all of the students' images, and no others as well."""
    config = ens.Config(teacher_labels=3000, labels=1000, teacher_seed=42, **flags)
    config = ens.fill_in_defaults(config, many)
    data = many._replace(train=many.train._replace(index=np.arange(len(many.train.label))))
    repetition = ens.plan_repetition(config, data, 0, 42)
    seen = np.isin(repetition.labelled.index, repetition.teacher_images[0].index).mean()
    chance = 3000 / len(data.train.label)
    assert chance - 0.06 < seen < chance + 0.06


def test_each_network_is_trained_by_adam_of_one_cycle_unless_constant(ens, digits):
    for schedule in ("onecycle", "constant"):
        config = ens.Config(dataset="digits", schedule=schedule)
        config = ens.fill_in_defaults(config, digits)
        repetition = ens.plan_repetition(config, digits, 0, 42)
        peaks = (5e-3, 1e-2) if schedule == "onecycle" else (1e-3, 1e-3)
        for recipe in repetition.teacher_recipes:
            wanted = (8, 32, peaks[0], schedule)
            assert recipe == ens.Recipe(recipe.seed, *wanted)
        assert repetition.student_recipe[3:5] == (peaks[1], schedule)


@pytest.mark.parametrize("flags", [{"quick": True}, {"dataset": "digits"}])
def test_where_images_are_few_the_teachers_have_all_those_of_the_students(ens, digits, flags):
    data = digits if "dataset" in flags else digits._replace(name="mnist")
    config = ens.fill_in_defaults(ens.Config(**flags), data)
    repetition = ens.plan_repetition(config, data, 0, 42)
    for split in repetition.teacher_images:
        assert np.isin(repetition.labelled.index, split.index).all()


@pytest.mark.parametrize(
    ("name", "images", "flags", "wanted"),
    [
        ("mnist", 60_000, {}, (1000, 4, 3000, 15)),
        ("mnist", 60_000, {"subsets": True}, (1000, 4, 3000, 15)),
        ("mnist", 60_000, {"teacher_labels": 1000}, (1000, 4, 1000, 34)),
        ("mnist", 60_000, {"teacher_labels": "all"}, (1000, 4, 60_000, 3)),
        ("mnist", 60_000, {"labels": "all", "teacher_epochs": 1}, ("all", 4, 3000, 1)),
        ("mnist", 2000, {"quick": True}, (100, 2, 2000, 4)),
        ("mnist", 2000, {"quick": True, "subsets": True}, (100, 2, 1000, 4)),
        ("mnist", 2000, {"quick": True, "teachers": 3}, (100, 3, 2000, 4)),
        ("digits", 1297, {}, (100, 4, 1297, 8)),
        ("digits", 1297, {"subsets": True}, (100, 4, 648, 8)),
        ("digits", 1297, {"quick": True}, (100, 2, 1297, 4)),
    ],
)
def test_defaults(ens, digits, name, images, flags, wanted):
    split = utils.Split(*np.zeros((3, images), np.int32))
    config = ens.fill_in_defaults(ens.Config(**flags), digits._replace(name=name, train=split))
    found = (config.labels, config.teachers, config.teacher_labels, config.teacher_epochs)
    assert found == wanted
    assert config.seeds == 1


@pytest.mark.parametrize(
    "flags",
    [
        {"teacher_labels": 5000},
        {"teacher_labels": 100},
        {"teacher_labels": 1298},
        {"subsets": True, "teacher_labels": "all"},
        {"subsets": True, "teacher_labels": 1297},
        {"teachers": 1},
        {"labels": 1298},
        {"labels": 100, "batch_size": 101},
    ],
)
def test_flags_are_checked_before_training(ens, digits, flags, monkeypatch, tmp_path):
    def train(*_):
        raise AssertionError("something was trained")

    monkeypatch.setattr(utils, "load_data", lambda *_: digits)
    monkeypatch.setattr(ens, "Training", train)
    flag = "--" + list(flags)[-1].replace("_", "-")
    with pytest.raises(utils.UserError, match=flag):
        ens.main(ens.Config(dataset="digits", output_dir=str(tmp_path), **flags))


# %% What each network of a run is shown


class Recorder:
    """Takes the place of `compile_step`, and takes down what each training's steps are given."""

    def __init__(self, compile_step):
        self.compile_step = compile_step
        self.trainings = []  # of each: its step function, and the (batch, options) of its steps

    def __call__(self, step, *modules):
        compiled, given = self.compile_step(step, *modules), []
        self.trainings.append((step, given))

        def recorded_step(batch, **options):
            given.append((dict(batch), options))
            return compiled(batch, **options)

        return recorded_step


SEEDS = {7: [3, 4, 5], 8: [6, 7, 8]}  # of the students: those of their teachers
DISTILLED = (
    "student of one teacher",
    "student, mean probabilities",
    "student, mean logits",
    "student, random teacher",
)
STUDENTS = ("baseline", *DISTILLED)
TIMES = {"student": 0.01, "teacher": 0.02, "ensemble": 0.03}


@pytest.fixture(scope="module")
def few(digits):
    return digits._replace(train=digits.train.take(slice(400)), test=digits.test.take(slice(100)))


@pytest.fixture(scope="module")
def watched(ens, few, tmp_path_factory):
    """A run of two repetitions, each with three teachers: its report, its trainings and their
    steps by (name, seed), the lines of its summary, and what was timed."""
    config = ens.Config(
        dataset="digits", output_dir=str(tmp_path_factory.mktemp("watched")),
        seed=7, seeds=2, labels=60, epochs=2, batch_size=20, temperature=5.0, alpha=0.25,
        teachers=3, teacher_seed=3, teacher_labels=150, teacher_epochs=2, subsets=True,
    )  # fmt: skip
    recorder, timed, lines = Recorder(ens.compile_step), [], {}
    summarize = ens.summarize_ensembles

    def keep_summary(*arguments):
        lines.update(summarize(*arguments))
        return lines

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ens, "compile_step", recorder)
        patch.setattr(ens, "summarize_ensembles", keep_summary)
        patch.setattr(ens, "measure_inference_seconds", lambda *x: timed.append(x) or TIMES)
        report, trainings = watch(ens, few, config)
    assert len(trainings) == len(recorder.trainings)
    names = [(training.name, training.recipe.seed) for training in trainings]
    return types.SimpleNamespace(
        report=report,
        order=names,
        training=dict(zip(names, trainings, strict=True)),
        steps=dict(zip(names, recorder.trainings, strict=True)),
        lines=lines,
        timed=timed,
        answers={},  # of `answers_of_teachers`
    )


def teachers_of(watched, seed):
    """The teachers' trainings in the repetition whose students have this seed."""
    return [watched.training[f"teacher {k}", s] for k, s in enumerate(SEEDS[seed], 1)]


def answers_of_teachers(watched, seed, split):
    """The logits [K, N, C] of a repetition's trained teachers in inference mode."""
    key = (seed, len(split.label))
    if key not in watched.answers:
        answers = [utils.predict(teacher.model, split) for teacher in teachers_of(watched, seed)]
        watched.answers[key] = np.stack(answers)
    return watched.answers[key]


def test_teachers_come_first_then_five_students_in_each_repetition(watched):
    wanted = []
    for seed, teacher_seeds in SEEDS.items():
        wanted += [(f"teacher {k}", s) for k, s in enumerate(teacher_seeds, 1)]
        wanted += [(name, seed) for name in STUDENTS]
    assert watched.order == wanted


def test_a_teacher_s_seed_decides_its_start_its_images_and_their_order(ens, watched, few):
    for seed in SEEDS:
        for teacher in teachers_of(watched, seed):
            own_seed = teacher.recipe.seed
            fresh = ens.TeacherCNN(few.classes, rngs=nnx.Rngs(own_seed))
            assert teacher.start == fingerprint(fresh)
            own_images = utils.take_labels(few.train, 150, own_seed, stream=3)
            np.testing.assert_array_equal(teacher.split.index, own_images.index)
            shown = [
                batch["index"]
                for epoch in (1, 2)
                for batch in utils.batches(own_images, 128, own_seed, epoch)
            ]
            np.testing.assert_array_equal(teacher.shown("index"), np.concatenate(shown))


def test_a_teacher_s_seed_decides_its_dropout(ens, watched):
    """The key of dropout comes from the same nnx.Rngs as the weights."""
    for seed in SEEDS:
        for teacher in teachers_of(watched, seed):
            fresh = ens.TeacherCNN(rngs=nnx.Rngs(teacher.recipe.seed))
            keys = [
                np.asarray(jax.random.key_data(model.dropout.rngs.key[...]))
                for model in (fresh, teacher.model)
            ]
            np.testing.assert_array_equal(*keys)


def test_teachers_learn_from_labels_alone(ens, watched, few):
    for seed in SEEDS:
        for teacher in teachers_of(watched, seed):
            step, given = watched.steps[teacher.name, teacher.recipe.seed]
            assert step is ens.train_step
            assert all(batch.keys() == {"image", "label", "index"} for batch, _ in given)
            labels = few.train.label[teacher.shown("index")]
            np.testing.assert_array_equal(teacher.shown("label"), labels)


@pytest.mark.parametrize("seed", SEEDS)
def test_students_share_labelled_images_start_recipe_and_batches(ens, watched, few, seed):
    labelled = utils.take_labels(few.train, 60, seed)
    fresh = ens.StudentCNN(few.classes, rngs=nnx.Rngs(seed))
    for name in STUDENTS:
        student, baseline = watched.training[name, seed], watched.training["baseline", seed]
        assert isinstance(student.model, ens.StudentCNN)
        assert student.start == fingerprint(fresh)
        assert student.recipe == baseline.recipe == Recipe(seed, 2, 20, 1e-2, "onecycle")
        np.testing.assert_array_equal(student.split.index, labelled.index)
        np.testing.assert_array_equal(np.unique(student.shown("index")), labelled.index)
        for key in ("image", "label", "index"):
            np.testing.assert_array_equal(student.shown(key), baseline.shown(key))
    wanted = [batch for epoch in (1, 2) for batch in utils.batches(labelled, 20, seed, epoch)]
    for shown, want in zip(watched.training["baseline", seed].batches, wanted, strict=True):
        np.testing.assert_array_equal(shown["index"], want["index"])


def test_repetitions_differ_in_labelled_images_and_start(watched):
    one, other = (watched.training["baseline", seed] for seed in SEEDS)
    assert one.start != other.start
    assert (one.split.index != other.split.index).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_baseline_hears_of_no_teacher(ens, watched, seed):
    step, given = watched.steps["baseline", seed]
    assert step is ens.train_step
    for batch, options in given:
        assert "teacher_logits" not in batch
        assert options == {}


@pytest.mark.parametrize("seed", SEEDS)
def test_distilled_students_take_temperature_and_alpha_from_the_flags(ens, watched, seed):
    for name in DISTILLED:
        step, given = watched.steps[name, seed]
        assert step is ens.ensemble_step
        assert len(given) == 6
        average = "logits" if name == "student, mean logits" else "probabilities"
        for _, options in given:
            assert options == {"temperature": 5.0, "alpha": 0.25, "average": average}


def logits_of_all_teachers(watched, seed, index):
    """[B, K, C] of the labelled images at these indices."""
    split = watched.training["baseline", seed].split
    place = np.searchsorted(split.index, index)
    return answers_of_teachers(watched, seed, split)[:, place].swapaxes(0, 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_students_learn_from_the_teachers_they_are_named_after(watched, seed):
    """The logits are those of the very images, of this repetition's teachers, in their order."""
    for name in DISTILLED[:3]:
        for batch, _ in watched.steps[name, seed][1]:
            wanted = logits_of_all_teachers(watched, seed, batch["index"])
            if name == "student of one teacher":
                wanted = wanted[:, :1]
            np.testing.assert_allclose(batch["teacher_logits"], wanted, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_random_teacher_is_drawn_anew_for_every_batch_by_seed_and_epoch(watched, seed):
    drawn = []
    for batch, _ in watched.steps["student, random teacher", seed][1]:
        of_all = logits_of_all_teachers(watched, seed, batch["index"])
        assert batch["teacher_logits"].shape == (20, 1, 10)
        distances = np.abs(of_all - batch["teacher_logits"]).max(axis=(0, 2))
        drawn.append(int(distances.argmin()))
        assert distances.min() < 1e-5
    wanted = [
        np.random.default_rng([seed, 17, epoch]).integers(3, size=3).tolist() for epoch in (1, 2)
    ]
    assert drawn == wanted[0] + wanted[1]
    assert len(set(drawn)) > 1
    assert wanted[0] != wanted[1]


# %% What is reported


def test_rows_are_in_the_order_of_the_repetitions(watched):
    wanted = []
    for seed, teacher_seeds in SEEDS.items():
        wanted += [(f"teacher {k}", s) for k, s in enumerate(teacher_seeds, 1)]
        ensembles = ("ensemble, probabilities", "ensemble, logits")
        wanted += [(name, teacher_seeds[0]) for name in ensembles]
        wanted += [(name, seed) for name in STUDENTS]
    assert [(row["name"], row["seed"]) for row in watched.report["results"]] == wanted


def rows_of(watched, seed):
    """The rows of the repetition whose students have this seed, {name: row}."""
    rows = watched.report["results"]
    rows = rows[:10] if seed == 7 else rows[10:]
    return {row["name"]: row for row in rows}


@pytest.mark.parametrize("seed", SEEDS)
def test_every_network_is_scored_on_all_test_images_at_its_end_alone(watched, few, seed):
    trainings = [*teachers_of(watched, seed), *(watched.training[x, seed] for x in STUDENTS)]
    for training in trainings:
        row = rows_of(watched, seed)[training.name]
        assert (
            row["test_errors"]
            == (utils.predict(training.model, few.test).argmax(-1) != few.test.label).sum()
        )
        assert row["test_accuracy"] == 1 - row["test_errors"] / 100
        assert training.scored == []
        assert len(row["history"]) == 2
        assert not any("test_accuracy" in record for record in row["history"])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_an_ensemble_s_row_is_of_the_mean_of_all_its_teachers_at_temperature_1(
    ens, watched, few, seed, average
):
    row = rows_of(watched, seed)[f"ensemble, {average}"]
    probs = mean_in_numpy(answers_of_teachers(watched, seed, few.test), 1.0, average)
    assert row["test_errors"] == (probs.argmax(-1) != few.test.label).sum()
    nll = -np.log(probs[np.arange(100), few.test.label]).mean()
    assert row["nll"] == pytest.approx(nll, rel=1e-4)
    teacher = ens.TeacherCNN(rngs=nnx.Rngs(0))
    assert row["params"] == 3 * utils.count_params(teacher) == 3 * 946_954


@pytest.mark.parametrize("seed", SEEDS)
def test_an_ensemble_was_not_trained_and_its_cost_is_that_of_its_teachers(watched, seed):
    """Its settings are those of teacher 1."""
    rows = rows_of(watched, seed)
    for average in ("probabilities", "logits"):
        row = rows[f"ensemble, {average}"]
        assert row["seconds"] == 0
        assert row["history"] == row["epoch_seconds"] == []
        assert row["settings"] == rows["teacher 1"]["settings"]
        assert watched.report["seconds"][f"ensemble, {average}"] == 0
    for k in (1, 2, 3):
        assert rows[f"teacher {k}"]["seconds"] > 0
        assert len(rows[f"teacher {k}"]["history"]) == 2


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_have_fidelity_to_the_ensemble_of_mean_probabilities(watched, few, seed):
    answers = answers_of_teachers(watched, seed, few.test)
    p = mean_in_numpy(answers, 1.0, "probabilities")
    logits = {f"teacher {k}": x for k, x in enumerate(answers, 1)}
    for name in STUDENTS:
        logits[name] = utils.predict(watched.training[name, seed].model, few.test)
    logits["ensemble, probabilities"] = np.log(p)
    logits["ensemble, logits"] = np.log(mean_in_numpy(answers, 1.0, "logits"))
    rows = rows_of(watched, seed)
    assert rows.keys() == logits.keys()
    for name, row in rows.items():
        assert row["agreement"] == (logits[name].argmax(-1) == p.argmax(-1)).mean()
        kl = (p * (np.log(p) - log_softmax(logits[name], -1))).sum(-1).mean()
        assert row["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_teachers_are_compared_in_pairs_and_by_their_errors(watched, few, seed):
    """Of the images on which at least one errs, `common_errors` is the share on which all do."""
    answers = answers_of_teachers(watched, seed, few.test).argmax(-1)
    pairs = [(answers[i] != answers[j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))]
    wrong = answers != few.test.label
    for average in ("probabilities", "logits"):
        row = rows_of(watched, seed)[f"ensemble, {average}"]
        assert row["disagreement"] == pytest.approx(np.mean(pairs))
        assert row["common_errors"] == pytest.approx(
            (wrong.sum(0) == 3).sum() / (wrong.sum(0) > 0).sum()
        )


def test_disagreement_and_common_errors(ens):
    answers = np.array([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 0, 6]])
    assert ens.measure_disagreement(answers) == pytest.approx((1 / 4 + 2 / 4 + 2 / 4) / 3)
    assert ens.measure_common_errors(answers, np.array([1, 9, 3, 4])) == pytest.approx(1 / 3)
    assert ens.measure_common_errors(answers[:, :2], np.array([1, 2])) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_mcnemar_s_p_is_of_the_ensemble_s_student_against_that_of_one_teacher(watched, few, seed):
    of_mean, of_one = (
        utils.predict(watched.training[name, seed].model, few.test)
        for name in ("student, mean probabilities", "student of one teacher")
    )
    for name, row in rows_of(watched, seed).items():
        if name == "student, mean probabilities":
            assert row["mcnemar_p"] == utils.mcnemar(of_mean, of_one, few.test.label)
        else:
            assert "mcnemar_p" not in row


def percents(watched, name):
    rows = watched.report["results"]
    return np.array([100 * row["test_accuracy"] for row in rows if row["name"] == name])


@pytest.mark.parametrize(
    ("line", "name", "other"),
    [
        ("Student of one teacher − baseline", "student of one teacher", "baseline"),
        (
            "Mean probabilities − one teacher",
            "student, mean probabilities",
            "student of one teacher",
        ),
        ("Mean logits − mean probabilities", "student, mean logits", "student, mean probabilities"),
        (
            "Random teacher − mean probabilities",
            "student, random teacher",
            "student, mean probabilities",
        ),
    ],
)
def test_the_summary_compares_students_within_repetitions(watched, line, name, other):
    gain = utils.paired_difference(percents(watched, name), percents(watched, other))
    words = f"{gain.mean:+.2f} points (95 %: {gain.low:+.2f} to {gain.high:+.2f})"
    assert watched.lines[line] == f"{words}, {gain.wins} of 2 seeds"


def test_the_summary_compares_the_ensemble_with_the_best_member_of_each_repetition(watched):
    best = np.max([percents(watched, f"teacher {k}") for k in (1, 2, 3)], axis=0)
    gain = (percents(watched, "ensemble, probabilities") - best).mean()
    assert watched.lines["Ensemble − best teacher, in hindsight"] == f"{gain:+.2f} points"
    shares = [rows_of(watched, seed)["ensemble, probabilities"]["disagreement"] for seed in SEEDS]
    share = f"{100 * np.mean(shares):.2f} % of the images"
    assert watched.lines["Two teachers differ on"] == share


def test_the_best_member_may_be_another_in_each_repetition(ens, few, tmp_path):
    run = make_run(tmp_path, few)
    accuracies = {
        "teacher 1": (0.90, 0.80),
        "teacher 2": (0.80, 0.92),
        "ensemble, probabilities": (0.93, 0.93),
        **dict.fromkeys(STUDENTS, (0.5, 0.6)),
    }
    for name, of_seeds in accuracies.items():
        run.rows += [{"name": name, "test_accuracy": x, "disagreement": x} for x in of_seeds]
    lines = ens.summarize_ensembles(run, ens.Config(teachers=2, seeds=2), TIMES)
    assert lines["Ensemble − best teacher, in hindsight"] == "+2.00 points"
    assert lines["Two teachers differ on"] == "93.00 % of the images"
    assert lines["Inference, 1,000 images"] == "student 10 ms, teacher 20 ms, ensemble 30 ms"


def test_with_one_repetition_the_summary_says_what_chance_could_have_done(ens, few, tmp_path):
    run = make_run(tmp_path, few)
    for name in ("teacher 1", "teacher 2", "ensemble, probabilities", *STUDENTS):
        run.rows.append(
            {"name": name, "test_accuracy": 0.5, "disagreement": 0.1, "mcnemar_p": 0.03}
        )
    lines = ens.summarize_ensembles(run, ens.Config(teachers=2, seeds=1), TIMES)
    wanted = "+0.00 points (one seed), McNemar's p = 0.03"
    assert lines["Mean probabilities − one teacher"] == wanted


def test_inference_is_timed_of_the_student_of_one_teacher_and_of_all(watched, few):
    [(networks, split, images)] = watched.timed
    teachers = [teacher.model for teacher in teachers_of(watched, 8)]
    assert networks["teacher"] == teachers[:1]
    assert networks["ensemble"] == teachers
    assert networks["student"] == [watched.training["student, mean probabilities", 8].model]
    assert split is few.test
    assert images == 1000
    assert watched.report["inference_seconds"] == TIMES


def test_inference_is_timed_in_turns_and_the_median_of_five_counts(ens, few, monkeypatch):
    clock, asked = [0.0], []
    durations = {"student": iter([1, 1, 2, 9, 9]), "a": iter([9, 1, 1, 9, 3]), "b": iter([1] * 5)}

    def predict(model, split):
        clock[0] += next(durations[model])
        asked.append((model, len(split.label)))
        return np.zeros((len(split.label), 10), np.float32)

    monkeypatch.setattr(ens, "predict", predict)
    monkeypatch.setattr(ens, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    networks = {"student": ["student"], "ensemble": ["a", "b"]}
    seconds = ens.measure_inference_seconds(networks, few.test, 250)
    assert asked == [("student", 250), ("a", 250), ("b", 250)] * 5
    assert seconds == {"student": 2 * 4, "ensemble": (3 + 1) * 4}


# %% A training that is stopped


def train_tiny(ens, digits, folder, name="student, random teacher", table_seed=1):
    """A student of few steps on 60 images, whose teachers' logits are random."""
    labelled = utils.take_labels(digits.train, 60, 0)
    table = np.random.default_rng(table_seed).normal(0, 3, (1297, 3, 10)).astype(np.float32)
    recipe = Recipe(3, 3, 20, 1e-3, "constant")
    folder.mkdir(exist_ok=True)
    run = make_run(folder, digits)
    student = ens.train_ensemble_student(
        name, labelled, table, 10, recipe, run, 3.0, 0.5, random_teacher="random" in name
    )
    return student, run.training_of(student)


def test_random_teacher_is_drawn_by_the_seed_alone(ens, digits, tmp_path):
    first, again = (train_tiny(ens, digits, tmp_path / x)[0] for x in "ab")
    all_teachers, _ = train_tiny(ens, digits, tmp_path / "c", "student, mean probabilities")
    assert fingerprint(first) == fingerprint(again)
    assert fingerprint(first) != fingerprint(all_teachers)


def test_random_teacher_draws_the_same_when_a_run_goes_on(ens, digits, tmp_path, monkeypatch):
    whole, _ = train_tiny(ens, digits, tmp_path / "whole")
    save, saved = Training._save, []

    def save_and_die(training):
        save(training)
        saved.append(training)
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "_save", save_and_die)
    monkeypatch.setattr("experiment.CHECKPOINT_PAUSE", 0)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(ens, digits, tmp_path / "cut")
    assert len(saved[0].history) == 1
    gone_on, training = train_tiny(ens, digits, tmp_path / "cut")
    assert len(training.history) == 3
    assert fingerprint(whole) == fingerprint(gone_on)


def test_what_a_student_is_taught_is_part_of_its_training(ens, digits, tmp_path):
    """Another student's checkpoint is not taken up, the same student's is."""
    _, training = train_tiny(ens, digits, tmp_path)
    told = {"temperature", "alpha", "average", "random_teacher", "seed", "images"}
    assert told <= set(training.settings)
    _, again = train_tiny(ens, digits, tmp_path)
    assert again.path == training.path
    assert again.seconds == training.seconds
    _, of_other_teachers = train_tiny(ens, digits, tmp_path, table_seed=2)
    assert of_other_teachers.path != training.path
