"""Script 16: what students are told of labelled and unlabelled images, and its recipes."""

import contextlib
import io
import itertools
import json
import re

import numpy as np
import optax
import pytest
import tables
import utils
from conftest import EXAMPLES, ROOT, exhibit, load, make_run, refuse, t_interval, watch
from experiment import Recipe, fingerprint
from flax import nnx
from scipy.special import log_softmax

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (RNG.normal(0, 3, (8, 10)).astype(np.float32) for _ in range(2))
LABELS = RNG.integers(0, 10, 8).astype(np.int32)
IMAGES = RNG.random((8, 28, 28, 1)).astype(np.float32)
SCRIPT = "16_limited_labels.py"


@pytest.fixture(scope="module")
def limited():
    return load(EXAMPLES / SCRIPT)


# %% The loss


def losses_in_numpy(student_logits, teacher_logits, labels, temperature, alpha):
    """(total, hard, soft): the labels are of the first images, the soft targets of all."""
    count = len(labels)
    hard = -log_softmax(student_logits[:count], -1)[np.arange(count), labels].mean()
    p = log_softmax(teacher_logits / temperature, -1)
    q = log_softmax(student_logits / temperature, -1)
    soft = temperature**2 * (np.exp(p) * (p - q)).sum(-1).mean()
    return alpha * hard + (1 - alpha) * soft, hard, soft


def check_loss(limited):
    found = limited.transfer_loss(STUDENT, TEACHER, LABELS[:3], 4.0, 0.3)
    want = losses_in_numpy(STUDENT, TEACHER, LABELS[:3], 4.0, 0.3)
    np.testing.assert_allclose(found, want, rtol=1e-4)


def labels_of_other_images(limited):
    check_loss(limited)


def images_without_labels_left_out_of_the_soft_loss(limited):
    check_loss(limited)


def alpha_weighs_the_teacher(limited):
    check_loss(limited)


def one_step(limited, labels_of_second):
    """The weights after a step on a labelled batch and one whose labels do not count."""
    student = limited.StudentCNN(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(student, optax.sgd(0.1), wrt=nnx.Param)
    first = {"image": IMAGES, "label": LABELS, "teacher_logits": TEACHER}
    second = {"image": 1 - IMAGES, "label": labels_of_second, "teacher_logits": STUDENT}
    limited.train_transfer_step(student, optimizer, first, second)
    return fingerprint(student)


def labels_of_the_transfer_set_leak(limited):
    assert one_step(limited, LABELS) == one_step(limited, 9 - LABELS)


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (
            labels_of_other_images,
            "hard_loss(student_logits[: len(labels)], labels)",
            "hard_loss(student_logits[-len(labels) :], labels)",
        ),
        (
            images_without_labels_left_out_of_the_soft_loss,
            "mean over all B images\n    soft = soft_loss(student_logits, teacher_logits, ",
            "mean over all B images\n    count = len(labels)\n"
            "    soft = soft_loss(student_logits[:count], teacher_logits[:count], ",
        ),
        (
            alpha_weighs_the_teacher,
            "mean over all B images",
            "mean over all B images\n    alpha = 1 - alpha",
        ),
        (
            labels_of_the_transfer_set_leak,
            'losses = transfer_loss(logits, teacher_logits, labelled["label"], temperature, alpha)',
            'both = jnp.concatenate([labelled["label"], unlabelled["label"]]); '
            "losses = transfer_loss(logits, teacher_logits, both, temperature, alpha)",
        ),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_museum(check, right, wrong):
    exhibit(check, SCRIPT, SCRIPT, right, wrong)


def test_with_all_labels_it_is_the_loss_of_script_15(limited, kd):
    for t, alpha in itertools.product((1.0, 3.0, 20.0), (0.0, 0.5, 1.0)):
        found = limited.transfer_loss(STUDENT, TEACHER, LABELS, t, alpha)
        want = kd.distillation_loss(STUDENT, TEACHER, LABELS, t, alpha)
        np.testing.assert_array_equal(found, want)


def test_logits_of_low_precision_are_computed_in_float32(limited):
    student, teacher = STUDENT.astype(np.float16), TEACHER.astype(np.float16)
    found = limited.transfer_loss(student, teacher, LABELS[:3], 4.0, 0.3)
    want = limited.transfer_loss(np.float32(student), np.float32(teacher), LABELS[:3], 4.0, 0.3)
    np.testing.assert_array_equal(found, want)
    assert {x.dtype for x in found} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("teacher_logits", "labels"),
    [
        (TEACHER[:, :1], LABELS[:3]),
        (TEACHER[:, None], LABELS[:3]),
        (TEACHER[:3], LABELS[:3]),
        (TEACHER, LABELS[:3, None]),
        (TEACHER, np.zeros(9, np.int32)),
    ],
    ids=["[B, 1]", "[B, 1, C]", "[L, C]", "labels [L, 1]", "labels [B + 1]"],
)
def test_shapes_that_do_not_fit_are_refused(limited, teacher_logits, labels):
    with pytest.raises(ValueError, match=r"must be .*\[B, C\]"):
        limited.transfer_loss(STUDENT, teacher_logits, labels)


# %% The experiment, watched

SEEDS = (7, 8)
TRANSFER = [(40, 7), (40, 8)]  # 40 labels and a seed
GROUPS = [*TRANSFER, (250, 7), (250, 8)]
DISTILLED = [(kind, *group) for group in TRANSFER for kind in ("distilled", "transfer")]
DISTILLED += [("distilled", 250, 7), ("distilled", 250, 8)]
TEMPERATURE, ALPHA = 5.0, 0.25


@pytest.fixture(scope="module")
def few(digits):
    return digits._replace(train=digits.train.take(slice(400)), test=digits.test.take(slice(100)))


class Watched:
    """A run of 40 and 250 labels of 400, with two seeds."""

    def __init__(self, limited, data, folder):
        self.folder = folder
        self.steps = {}  # of each model: (the step, its other modules, [(arguments, metrics)])
        self.transforms = []  # arguments of `make_transform`, one a training
        compile_step, make_transform = limited.compile_step, limited.make_transform

        def watched_compile_step(step, model, *modules):
            compiled, calls = compile_step(step, model, *modules), []
            self.steps[id(model)] = step, modules, calls

            def watched_step(*arguments):
                metrics = compiled(*arguments)
                calls.append((arguments, metrics))
                return metrics

            return watched_step

        def watched_make_transform(*arguments):
            self.transforms.append(arguments)
            return make_transform(*arguments)

        config = limited.Config(
            dataset="digits", output_dir=str(folder), quick=True, labels=(250, 40), epochs=4,
            seed=7, seeds=2, batch_size=20, temperature=TEMPERATURE, alpha=ALPHA, teacher_seed=3,
        )  # fmt: skip
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(limited, "compile_step", watched_compile_step)
            patch.setattr(limited, "make_transform", watched_make_transform)
            self.report, self.trainings = watch(limited, data, config)
        self.printed = printed.getvalue()
        self.teacher, *students = self.trainings
        self.students = {}  # by kind, number of labels and seed
        for student in students:
            kind = student.name.split(",")[0]
            self.students[kind, len(student.split.label), student.recipe.seed] = student

    def group(self, count, seed):
        """The students of one number of labels and one seed, by kind."""
        kinds = ("baseline", "distilled", "transfer")
        found = {kind: self.students.get((kind, count, seed)) for kind in kinds}
        return {kind: student for kind, student in found.items() if student}


@pytest.fixture(scope="module")
def watched(limited, few, tmp_path_factory):
    return Watched(limited, few, tmp_path_factory.mktemp("watched"))


def test_who_is_trained(watched):
    """For each number of labels, from few to many, and each seed: the same kinds of students; none
    on a transfer set where more than half of the images have labels."""
    names = [(training.name, training.recipe.seed) for training in watched.trainings]
    wanted = [("teacher", 3)]
    for seed in SEEDS:
        wanted += [(f"{kind}, 40 labels", seed) for kind in ("baseline", "distilled", "transfer")]
    for seed in SEEDS:
        wanted += [(f"{kind}, 250 labels", seed) for kind in ("baseline", "distilled")]
    assert names == wanted
    assert [(row["name"], row["seed"]) for row in watched.report["results"]] == wanted


def test_the_teacher_is_trained_on_all_labels_by_its_own_seed(watched, few):
    teacher = watched.teacher
    assert teacher.recipe == (3, 4, 32, 5e-3, "onecycle", "none")
    assert teacher.split is few.train
    assert len(teacher.batches) == 4 * 12
    for start in range(0, 4 * 12, 12):  # an epoch shows all but the rest of a batch
        epoch = teacher.batches[start : start + 12]
        assert len(np.unique([batch["index"] for batch in epoch])) == 384
    np.testing.assert_array_equal(teacher.shown("label"), few.train.label[teacher.shown("index")])
    assert "teacher_logits" not in teacher.batches[0]


@pytest.mark.parametrize(("count", "seed"), GROUPS)
def test_students_of_a_seed_share_labelled_images_and_start(watched, limited, few, count, seed):
    wanted = utils.take_labels(few.train, count, seed)
    fresh = fingerprint(limited.StudentCNN(few.classes, rngs=nnx.Rngs(seed)))
    for student in watched.group(count, seed).values():
        for found, want in zip(student.split, wanted, strict=True):
            np.testing.assert_array_equal(found, want)
        assert student.start == fresh
        assert student.recipe.seed == seed


def test_seeds_differ_in_labelled_images_and_start(watched):
    one, other = watched.students["baseline", 40, 7], watched.students["baseline", 40, 8]
    assert one.start != other.start
    assert (one.split.index != other.split.index).any()


@pytest.mark.parametrize(("count", "seed"), GROUPS)
def test_labels_are_drawn_evenly_from_the_classes(watched, few, count, seed):
    labels = watched.students["baseline", count, seed].split.label
    assert set(np.bincount(labels, minlength=few.classes)) == {count // few.classes}


@pytest.mark.parametrize(("count", "seed"), GROUPS)
def test_baseline_and_distilled_see_the_labelled_images_in_the_same_batches(watched, count, seed):
    """Shuffled by seed and epoch; nothing else differs but what the distilled one is told."""
    group = watched.group(count, seed)
    baseline, distilled = group["baseline"], group["distilled"]
    assert baseline.recipe[1:3] == distilled.recipe[1:3] == (4, 20)
    wanted = [
        batch["index"]
        for epoch in (1, 2, 3, 4)
        for batch in utils.batches(baseline.split, 20, seed, epoch)
    ]
    for student in (baseline, distilled):
        np.testing.assert_array_equal(student.shown("index"), np.concatenate(wanted))
    for key in ("image", "label"):
        np.testing.assert_array_equal(baseline.shown(key), distilled.shown(key))
    assert set(baseline.batches[0]) == {"image", "label", "index"}, "the baseline has no teacher"


@pytest.mark.parametrize(("count", "seed"), TRANSFER)
def test_half_of_each_batch_of_a_transfer_student_is_of_all_other_images(watched, few, count, seed):
    student = watched.students["transfer", count, seed]
    labelled = student.split.index
    others = np.setdiff1d(few.train.index, labelled)
    np.testing.assert_array_equal(student.given["labelled"].index, labelled)
    np.testing.assert_array_equal(student.given["unlabelled"].index, others)
    _, _, calls = watched.steps[id(student.model)]
    for (first, second, *_), _ in calls:
        assert len(first["index"]) == len(second["index"]) == 10
        assert np.isin(first["index"], labelled).all()
        assert np.isin(second["index"], others).all()
    seen = np.concatenate([arguments[1]["index"] for arguments, _ in calls])
    assert len(np.unique(seen)) > 40, "ever new ones in each epoch"


@pytest.mark.parametrize(("count", "seed"), TRANSFER)
def test_a_transfer_student_has_the_steps_of_the_distilled_one(watched, count, seed):
    """And batches of the same size, so that it sees each labelled image half as often."""
    transfer, distilled = (watched.students[x, count, seed] for x in ("transfer", "distilled"))
    times_seen = []
    for student in (transfer, distilled):
        assert len(watched.steps[id(student.model)][2]) == 8
        assert len(student.shown("index")) == 8 * 20
        index = student.shown("index")
        times_seen.append({(index == i).sum() for i in student.split.index})
    assert times_seen == [{2}, {4}]
    assert transfer.recipe[3:] == distilled.recipe[3:], "learning rate and schedule"


@pytest.mark.parametrize("student", DISTILLED)
def test_all_soft_targets_are_of_the_one_teacher_for_these_very_images(watched, few, student):
    """In inference mode."""
    student = watched.students[student]
    want = utils.predict(watched.teacher.model, few.train)
    place = np.searchsorted(few.train.index, student.shown("index"))
    np.testing.assert_allclose(student.shown("teacher_logits"), want[place], atol=1e-5)


@pytest.mark.parametrize(("kind", "count", "seed"), DISTILLED)
def test_the_first_step_of_a_student_by_numpy(watched, limited, few, kind, count, seed):
    """Temperature and alpha of the flags, the labels of the labelled images, the soft targets of
    all: the losses of a fresh student are these."""
    arguments, metrics = watched.steps[id(watched.students[kind, count, seed].model)][2][0]
    batches = [x for x in arguments if isinstance(x, dict)]
    assert len(batches) == (2 if kind == "transfer" else 1)
    image = np.concatenate([batch["image"] for batch in batches])
    teacher_logits = np.concatenate([batch["teacher_logits"] for batch in batches])
    student = limited.StudentCNN(few.classes, rngs=nnx.Rngs(seed))
    logits = np.asarray(student(image, train=True))
    labels = few.train.label[np.searchsorted(few.train.index, batches[0]["index"])]
    want = losses_in_numpy(logits, teacher_logits, labels, TEMPERATURE, ALPHA)
    found = [metrics[key] for key in ("loss", "hard_loss", "soft_loss")]
    np.testing.assert_allclose(found, want, rtol=1e-3)


def test_every_step_keeps_temperature_and_alpha(watched):
    for student in DISTILLED:
        calls = watched.steps[id(watched.students[student].model)][2]
        assert {arguments[-2:] for arguments, _ in calls} == {(TEMPERATURE, ALPHA)}


def test_students_learn_without_the_teacher_network(watched, limited):
    """Its logits are all that they get of it, and the baseline gets none."""
    steps = {"baseline": "train_step", "distilled": "train_student_step"}
    steps["transfer"] = "train_transfer_step"
    for (kind, _, _), student in watched.students.items():
        step, modules, _ = watched.steps[id(student.model)]
        assert step is getattr(limited, steps[kind])
        networks = [x for x in modules if not isinstance(x, nnx.Optimizer)]
        assert networks == ([None] if kind == "distilled" else [])


def test_every_learning_rate_ends_with_its_training(watched):
    """The schedule is of as many steps as are taken, at the recipe's rate."""
    assert len(watched.transforms) == len(watched.trainings)
    for training, transform in zip(watched.trainings, watched.transforms, strict=True):
        steps = len(watched.steps[id(training.model)][2])
        assert transform == (training.recipe.learning_rate, training.recipe.schedule, steps)


def test_learning_rates_are_those_of_the_recipes(watched, limited, many):
    """Of few images that of the digits; of many each kind's own, the transfer student's that of the
    distilled one."""
    for student in watched.students.values():
        assert student.recipe.learning_rate == 1e-2
    config = limited.Config()
    for count, searched in limited.RECIPES.items():
        for kind in ("baseline", "distilled", "transfer"):
            found = limited.limited_recipe(config, many, kind, 5, count)
            own = searched["baseline" if kind == "baseline" else "distilled"]
            assert found.learning_rate == own[0]


def test_labels_of_the_transfer_set_change_no_network(limited, few, watched, tmp_path):
    networks = set()
    for change in (0, 1):
        given = dict(watched.students["transfer", 40, 7].given)
        given["run"] = make_run(tmp_path / str(change), few)
        unlabelled = given["unlabelled"]
        label = (unlabelled.label + change) % few.classes
        given["unlabelled"] = unlabelled._replace(label=label)
        networks.add(fingerprint(limited.train_on_transfer_set(**given)))
    assert networks == {fingerprint(watched.students["transfer", 40, 7].model)}


# %% What is scored and reported


def test_every_network_is_scored_on_all_test_images(watched, few):
    """Students once, at the end."""
    for scored_on, model, split in watched.teacher.scored:
        assert (scored_on, model, split) == ("test", watched.teacher.model, few.test)
    assert not any(student.scored for student in watched.students.values())
    for row, training in zip(watched.report["results"], watched.trainings, strict=True):
        errors = (utils.predict(training.model, few.test).argmax(-1) != few.test.label).sum()
        assert row["test_errors"] == errors
        assert row["test_accuracy"] == 1 - errors / 100


def test_rows_have_fidelity_to_the_teacher_and_calibration(watched, few):
    teacher_logits = utils.predict(watched.teacher.model, few.test)
    for row, training in zip(watched.report["results"], watched.trainings, strict=True):
        logits = utils.predict(training.model, few.test)
        want = utils.fidelity(logits, teacher_logits) | utils.calibration(logits, few.test.label)
        for key in ("agreement", "kl", "ece", "nll"):
            assert row[key] == pytest.approx(want[key], rel=1e-4, abs=1e-6)
    assert watched.report["results"][0]["agreement"] == 1


def test_the_summary_has_gains_over_the_baseline_of_the_same_seeds(watched):
    accuracies = {}
    for row in watched.report["results"]:
        accuracies.setdefault(row["name"], []).append(100 * row["test_accuracy"])
    lines = re.findall(r"^(\w+) − baseline, (\d+) labels +(.*)$", watched.printed, re.MULTILINE)
    assert [(kind, count) for kind, count, _ in lines] == [
        ("distilled", "40"), ("transfer", "40"), ("distilled", "250"),
    ]  # fmt: skip
    for kind, count, gain in lines:
        baseline = accuracies[f"baseline, {count} labels"]
        gains = np.subtract(accuracies[f"{kind}, {count} labels"], baseline)
        low, high = t_interval(gains)
        words = f"{gains.mean():+.2f} points (95 %: {low:+.2f} to {high:+.2f})"
        assert gain == f"{words}, {(gains > 0).sum()} of 2 seeds"


def test_the_teacher_of_another_run(watched, limited, few, tmp_path):
    """--teacher: it teaches, no other is trained, and its row comes first."""
    config = limited.Config(
        dataset="digits", output_dir=str(tmp_path), labels=(40,), seeds=2, epochs=0,
        teacher=str(watched.folder), teacher_seed=99,
    )  # fmt: skip
    report, trainings = watch(limited, few, config)
    assert {training.name.split(",")[0] for training in trainings} == set(limited.KIND_COLOURS)
    teacher, *_ = report["results"]
    first = watched.report["results"][0]
    for key in ("name", "seed", "test_errors", "nll"):
        assert teacher[key] == first[key]
    want = utils.predict(watched.teacher.model, few.train)
    for training in trainings:
        if "baseline" not in training.name:
            np.testing.assert_allclose(training.given["teacher_logits"], want, atol=1e-5)


def test_held_out_images_teach_nobody(limited, few, tmp_path):
    """--holdout: they are scored on, and in no training; test images are left alone."""
    data = utils.hold_out(few, 16)
    config = limited.Config(
        dataset="digits",
        output_dir=str(tmp_path),
        quick=True,
        labels=(40, "all"),
        seeds=2,
        epochs=0,
    )
    report, trainings = watch(limited, data, config)
    teacher, *students = trainings
    assert teacher.split.index.max() < 384
    assert teacher.shown("index").max() < 384
    for scored_on, _, split in teacher.scored:
        assert (scored_on, split) == ("validation", data.test)
    for student in students:
        assert student.split.index.max() < 384
        if "transfer" in student.name:
            assert student.given["unlabelled"].index.max() < 384
    for row, training in zip(report["results"], trainings, strict=True):
        logits = utils.predict(training.model, few.train.take(slice(384, 400)))
        errors = (logits.argmax(-1) != few.train.label[384:]).sum()
        assert row["validation_errors"] == errors
        assert not any("test" in key for key in row)


def test_fidelity_and_calibration(digits, tmp_path):
    logits = np.log([[0.8, 0.2], [0.8, 0.2], [0.3, 0.7], [0.1, 0.9]]).astype(np.float32)
    label = np.array([0, 1, 1, 1])
    found = utils.calibration(logits, label)
    # Two images at 0.8 of which one is right, one at 0.7 and one at 0.9 that are.
    np.testing.assert_allclose(found["ece"], 2 / 4 * 0.3 + 0.3 / 4 + 0.1 / 4, rtol=1e-5)
    np.testing.assert_allclose(found["nll"], -np.log([0.8, 0.2, 0.7, 0.9]).mean(), rtol=1e-5)
    sure = utils.calibration(np.float32([[100, 0], [0, 100]]), np.array([0, 1]))
    np.testing.assert_allclose(list(sure.values()), 0, atol=1e-6)
    run = make_run(tmp_path, digits._replace(test=digits.test.take(slice(8))))
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    row = run.add_row("student", model, STUDENT, seed=0, teacher_logits=TEACHER)
    p, q = log_softmax(TEACHER, -1), log_softmax(STUDENT, -1)
    np.testing.assert_allclose(row["kl"], (np.exp(p) * (p - q)).sum(-1).mean(), rtol=1e-4)
    assert row["agreement"] == (STUDENT.argmax(-1) == TEACHER.argmax(-1)).mean()


# %% Recipes and settings


def test_recipes_are_the_best_of_the_searches(limited):
    """No number is typed by hand: each is the cell of the best mean on validation images."""
    cells = tables.searched("limited_tuning")
    for settings, accuracies in tables.searched("tuning").items():
        if settings.labels == "all":
            cells[settings._replace(labels=50_000)] = accuracies
    assert {settings.labels for settings in cells} == set(limited.RECIPES)
    for labels, kinds in limited.RECIPES.items():
        for kind, recipe in kinds.items():
            own = {x: np.mean(cells[x][kind]) for x in cells if x.labels == labels}
            best = max(own, key=own.get)
            assert recipe == (best.learning_rate, best.epochs)


def fashion_rows(kind, labels):
    """The rows of the search on Fashion-MNIST."""
    searched_for = labels if labels < 50_000 else "all"
    rows = tables.read("fashion_tuning")["results"]
    return [row for row in rows if (row["name"], row["labels"]) == (kind, searched_for)]


def test_recipes_of_fashion_mnist_are_the_best_of_their_search(limited, many):
    """And so are temperature and alpha."""
    clothes = many._replace(name="fashion_mnist")
    for labels, kinds in limited.FASHION_RECIPES.items():
        for kind, recipe in kinds.items():
            best = min(fashion_rows(kind, labels), key=lambda row: sum(row["errors"]))
            assert recipe == (best["learning_rate"], best["epochs"])
        softness = best["temperature"], best["alpha"]  # the distilled student's
        config = limited.Config()
        assert softness == (limited.choose_temperature(config, clothes, labels), config.alpha)


def test_the_temperature_is_that_of_the_flag_or_by_the_number_of_labels(limited, many):
    clothes = many._replace(name="fashion_mnist")
    for data, flags, labels, wanted in (
        (clothes, {}, 1000, 4.0),
        (clothes, {}, 10_000, 4.0),
        (clothes, {}, 10_001, 2.0),
        (clothes, {"temperature": 3.5}, 1000, 3.5),
        (many, {}, 1000, 3.0),
        (many, {"temperature": 1.0}, 60_000, 1.0),
    ):
        assert limited.choose_temperature(limited.Config(**flags), data, labels) == wanted


@pytest.mark.parametrize("name", ["limited_labels", "fashion"])
def test_the_results_are_of_these_recipes(limited, many, name):
    """Whoever changes RECIPES has to measure again."""
    results = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())
    many = many._replace(name=results["dataset"]["name"])
    rows = results["results"]
    assert rows[0]["name"] == "teacher"
    for row in rows[1:]:
        kind, labels = row["name"].removesuffix(" labels").split(", ")
        recipe = limited.limited_recipe(limited.Config(), many, kind, row["seed"], int(labels))
        assert (row["epochs"], row["learning_rate"]) == (recipe.epochs, recipe.learning_rate)


def test_other_numbers_of_labels_take_the_nearest_recipe(limited, many):
    config = limited.Config()
    for labels, count in ((1000, 1000), (900, 1000), (40_000, 50_000), (20, 100)):
        rate, epochs = limited.RECIPES[count]["distilled"]
        found = limited.limited_recipe(config, many, "distilled", 5, labels)
        want = round(epochs * (count / labels) ** 0.66)
        assert found == limited.Recipe(5, want, min(128, labels), rate, "onecycle")


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({"schedule": "constant"}, (5, 120, 128, 1e-3, "constant")),
        ({"schedule": "constant", "learning_rate": 0.5}, (5, 120, 128, 0.5, "constant")),
        ({"epochs": 3, "batch_size": 50}, (5, 3, 50, 3e-2, "onecycle")),
    ],
)
def test_flags_take_the_place_of_the_recipe(limited, many, flags, wanted):
    found = limited.limited_recipe(limited.Config(**flags), many, "baseline", 5, 1000)
    assert found == limited.Recipe(*wanted)


@pytest.mark.parametrize(
    ("flags", "labels", "wanted"),
    [
        ({}, 100, (5, 120, 32, 1e-2, "onecycle")),
        ({}, 20, (5, 120, 20, 1e-2, "onecycle")),
        ({"schedule": "constant"}, 100, (5, 120, 32, 1e-3, "constant")),
        ({"epochs": 0, "batch_size": 1}, 100, (5, 0, 1, 1e-2, "onecycle")),
    ],
)
def test_where_images_are_few_the_recipe_is_that_of_the_digits(limited, few, flags, labels, wanted):
    for kind in ("baseline", "distilled"):
        found = limited.limited_recipe(limited.Config(**flags), few, kind, 5, labels)
        assert found == limited.Recipe(*wanted)


@pytest.mark.parametrize("schedule", ["onecycle", "constant"])
@pytest.mark.parametrize(
    ("name", "quick", "epochs"), [("mnist", 0, 3), ("digits", 0, 8), ("digits", 1, 4)]
)
def test_students_flags_do_not_change_the_teacher(
    limited, few, many, schedule, name, quick, epochs
):
    config = limited.Config(
        schedule=schedule,
        quick=bool(quick),
        epochs=7,
        batch_size=9,
        learning_rate=1.0,
        teacher_seed=4,
    )
    data = many if name == "mnist" else few
    recipe = limited.default_teacher_recipe(config, data)
    assert recipe == (4, epochs, 128 if name == "mnist" else 32, 5e-3, "onecycle", "none")


@pytest.mark.parametrize(
    ("labels", "recipe", "epochs", "batch_size"),
    [(1000, (9, 120, 128), 56, 64), (100, (9, 10, 32), 5, 16), (33, (9, 6, 33), 3, 16),
     (100, (9, 1, 32), 1, 16), (100, (9, 0, 32), 0, 16)],
)  # fmt: skip
def test_half_batches_take_about_as_many_steps(limited, labels, recipe, epochs, batch_size):
    recipe = Recipe(*recipe, 1e-2, "onecycle")
    found = limited.halve_batches(recipe, labels)
    assert found == recipe._replace(epochs=epochs, batch_size=batch_size)


def test_defaults(limited, few, many):
    for data, quick, labels, seeds in (
        (many, False, (100, 250, 1000, 5000, "all"), 3),
        (many, True, (100, 500), 2),
        (many._replace(name="fashion_mnist"), False, (1000, 10_000, "all"), 3),
        (few, False, (50, 100, 300, "all"), 3),
        (few._replace(name="mnist"), False, (100, 250, "all"), 3),
        (few, True, (100,), 2),
    ):
        config = limited.fill_in_defaults(limited.Config(quick=quick), data)
        found = config.labels, config.seeds, config.epochs
        assert found == (labels, seeds, 40 if quick else None)
    config = limited.Config(quick=True, labels=("all", 70), seeds=5, epochs=3)
    assert limited.fill_in_defaults(config, few) == config


def test_a_transfer_set_is_at_least_as_large_as_the_labelled_one(limited, few, tmp_path):
    """And seeds come one after another."""
    config = limited.Config(labels=("all", 201, 200), seeds=3, seed=11)
    plan = limited.make_plan(config, few, make_run(tmp_path, few, config))
    kinds = [(len(labelled.label), list(recipes)) for labelled, recipes in plan]
    pair = ["baseline", "distilled"]
    groups = [(200, [*pair, "transfer"]), (201, pair), (400, pair)]
    assert kinds == [group for group in groups for _ in range(3)]
    seeds = [{recipe.seed for recipe in recipes.values()} for _, recipes in plan]
    assert seeds == [{11}, {12}, {13}] * 3


@pytest.mark.parametrize(
    "flags",
    [
        ["--labels", "1297", "all"],
        ["--labels", "50", "50"],
        ["--labels", "50", "5000"],
        ["--labels", "all", "9"],
        ["--labels"],
        ["--batch-size", "1"],
        ["--batch-size", "60", "--labels", "50", "100"],
        ["--batch-size", "1298"],
        ["--seeds", "1"],
        ["--alpha", "1.1"],
        ["--temperature", "0"],
        ["--teacher", "nowhere"],
    ],
    ids=" ".join,
)
def test_flags_are_refused_before_anything_is_trained(
    limited, flags, monkeypatch, capsys, tmp_path
):
    def train(*_):
        raise AssertionError("a training began")

    monkeypatch.setattr(limited, "Training", train)
    base = [SCRIPT, "--dataset", "digits", "--output-dir", tmp_path]
    assert flags[0] in refuse(limited, [*base, *flags], monkeypatch, capsys).err
