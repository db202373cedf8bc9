"""Scripts 13 to 15: what the teacher and the students of a pair are shown, and what is reported."""

import ast
import contextlib
import io
import types

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import utils
from conftest import EXAMPLES, check_optimizer, load, t_interval, watch
from experiment import fingerprint
from flax import nnx

SCRIPT = "15_knowledge_distillation.py"


@pytest.fixture(scope="module")
def few(digits):
    return digits._replace(train=digits.train.take(slice(400)), test=digits.test.take(slice(100)))


@pytest.fixture(scope="module")
def seen():
    """What the run of two pairs printed, and of each model its step and the step's arguments."""
    return types.SimpleNamespace(printed=io.StringIO(), calls={})


def line(printed, what):
    """What stands in a line of the summary."""
    [found] = [x for x in printed.splitlines() if x.startswith(f"{what} ")]
    return found.removeprefix(what).strip()


@pytest.fixture(scope="module")
def watched(kd, few, seen, tmp_path_factory):
    """A run of two pairs: the report, the teacher's training and the students' by (name, seed)."""
    compile_step = kd.compile_step

    def watched_compile_step(step, model, *modules):
        compiled, calls = compile_step(step, model, *modules), set()
        seen.calls[id(model)] = step, modules[:-1], calls

        def call(batch, *more):
            calls.add(more)
            return compiled(batch, *more)

        return call

    config = kd.Config(
        dataset="digits", output_dir=str(tmp_path_factory.mktemp("watched")),
        seed=7, seeds=2, labels=60, epochs=2, batch_size=60, teacher_epochs=1, teacher_seed=3,
        temperature=5.0, alpha=0.25,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(seen.printed):
        patch.setattr(kd, "compile_step", watched_compile_step)
        report, trainings = watch(kd, few, config)
    teacher, *students = trainings
    return report, teacher, {(x.name, x.recipe.seed): x for x in students}


def test_the_teacher_is_trained_on_all_labels_by_its_own_seed(watched, few):
    _, teacher, _ = watched
    assert teacher.name == "teacher"
    assert teacher.recipe.seed == 3
    assert teacher.split is few.train
    assert np.isin(teacher.shown("index"), few.train.index).all()
    np.testing.assert_array_equal(teacher.shown("label"), few.train.label[teacher.shown("index")])


@pytest.mark.parametrize("seed", [7, 8])
def test_students_of_a_pair_share_labelled_images_start_recipe_and_batches(watched, few, seed):
    _, _, students = watched
    distilled, baseline = students["distilled", seed], students["baseline", seed]
    wanted = utils.take_labels(few.train, 60, seed).index
    for student in (distilled, baseline):
        np.testing.assert_array_equal(np.unique(student.shown("index")), wanted)
    assert distilled.start == baseline.start
    assert distilled.recipe == baseline.recipe
    assert distilled.recipe.seed == seed
    for key in ("index", "image", "label"):
        np.testing.assert_array_equal(distilled.shown(key), baseline.shown(key))


def test_pairs_differ_in_images_and_start(watched):
    _, _, students = watched
    one, other = students["baseline", 7], students["baseline", 8]
    assert one.start != other.start
    assert (one.split.index != other.split.index).any()


def test_only_the_distilled_student_hears_of_the_teacher(watched):
    """The teacher's logits are those of the very images, in inference mode."""
    _, teacher, students = watched
    for (name, _), student in students.items():
        assert ("teacher_logits" in student.batches[0]) == (name == "distilled")
        if name == "distilled":
            want = utils.predict(teacher.model, student.split)
            place = np.searchsorted(student.split.index, student.shown("index"))
            np.testing.assert_allclose(student.shown("teacher_logits"), want[place], atol=1e-5)
            assert student.given["temperature"] == 5.0
            assert student.given["alpha"] == 0.25


def test_every_network_is_scored_on_all_test_images(watched, few):
    report, teacher, students = watched
    for training in (teacher, *students.values()):
        for scored_on, model, split in training.scored:
            assert (scored_on, model, split) == ("test", training.model, few.test)
    for row in report["results"]:
        training = teacher if row["name"] == "teacher" else students[row["name"], row["seed"]]
        errors = (utils.predict(training.model, few.test).argmax(-1) != few.test.label).sum()
        assert row["test_errors"] == errors
        assert row["test_accuracy"] == 1 - errors / 100


def test_the_last_epoch_is_reported_not_the_best(watched):
    report, _, _ = watched
    for row in report["results"]:
        assert row["history"][-1]["test_accuracy"] == pytest.approx(row["test_accuracy"])


def percents(report, name):
    return np.array([100 * x["test_accuracy"] for x in report["results"] if x["name"] == name])


def test_the_summary_compares_within_pairs_with_a_95_percent_interval(watched, seen):
    report, _, _ = watched
    gains = percents(report, "distilled") - percents(report, "baseline")
    low, high = t_interval(gains)
    words = f"{gains.mean():+.2f} points (95 %: {low:+.2f} to {high:+.2f}), "
    words += f"{(gains > 0).sum()} of 2 seeds"
    printed = seen.printed.getvalue()
    assert line(printed, "Improvement from distillation") == words
    behind = percents(report, "teacher").mean() - percents(report, "distilled").mean()
    assert line(printed, "Distilled student behind teacher") == f"{behind:.2f} points"
    assert line(printed, "Compression") == "16.7 times fewer parameters"
    assert line(printed, "Labels") == "400 for the teacher, 60 for the students"


def test_steps_are_given_temperature_and_alpha_and_no_teacher_but_its_logits(kd, watched, seen):
    _, teacher, students = watched
    assert seen.calls[id(teacher.model)] == (kd.train_step, (), {()})
    for (name, _), student in students.items():
        wanted = (kd.train_step, (), {()})
        if name == "distilled":
            wanted = (kd.train_student_step, (None,), {(5.0, 0.25)})
        assert seen.calls[id(student.model)] == wanted


def test_optimizers_are_made_for_the_recipes(kd, watched):
    _, teacher, students = watched
    for training in (teacher, *students.values()):
        check_optimizer(kd, training)


def test_mcnemar_s_p_is_of_the_students_of_a_pair(watched, few):
    report, _, students = watched
    for row in report["results"]:
        if row["name"] != "distilled":
            assert "mcnemar_p" not in row
            continue
        logits = [
            utils.predict(students[name, row["seed"]].model, few.test)
            for name in ("distilled", "baseline")
        ]
        assert row["mcnemar_p"] == utils.mcnemar(*logits, few.test.label)


def test_what_a_network_costs_in_use_is_its_own(watched):
    """The bytes of the file that has its weights."""
    report, _, _ = watched
    of_teacher, of_students = (
        {row["bytes"] for row in report["results"] if row["name"] == name}
        for name in ("teacher", "distilled")
    )
    assert min(of_teacher) > 3_700_000
    assert 200_000 < min(of_students) <= max(of_students) < 300_000
    assert "bytes" not in report["results"][-1], "of the baseline, which is no other network"


def test_with_one_pair_the_summary_says_what_chance_could_have_done(kd, few, tmp_path, capsys):
    """Here the teacher is asked in every step, and it is the flags' teacher."""
    config = kd.Config(
        dataset="digits", output_dir=str(tmp_path), seeds=1, labels=60, epochs=1, batch_size=60,
        teacher_epochs=1, teacher_batch_size=50, teacher_learning_rate=2e-3, cache_teacher=False,
    )  # fmt: skip
    report, trainings = watch(kd, few, config)
    teacher, distilled, _ = trainings
    assert teacher.recipe[1:] == (1, 50, 2e-3, "onecycle", "none")
    check_optimizer(kd, teacher)
    assert "teacher_logits" not in distilled.batches[0]
    assert distilled.given["cache_teacher"] is False
    assert distilled.given["teacher"] is teacher.model
    p_value = report["results"][1]["mcnemar_p"]
    found = line(capsys.readouterr().out, "Improvement from distillation")
    assert found.endswith(f"points (one seed), McNemar's p = {p_value:.1g}")


def test_the_constant_rate_is_adam_s_own(kd, digits):
    config = kd.fill_in_defaults(kd.Config(schedule="constant"), digits)
    assert kd.teacher_recipe(config, 1297)[3:] == (1e-3, "constant", "none")


def test_rows_are_in_the_order_of_the_seeds(watched):
    report, _, _ = watched
    names = [(row["name"], row["seed"]) for row in report["results"]]
    pairs = [(name, seed) for seed in (7, 8) for name in ("distilled", "baseline")]
    assert names == [("teacher", 3), *pairs]


def test_rows_have_fidelity_to_the_teacher(watched, few):
    report, teacher, students = watched
    answers = utils.predict(teacher.model, few.test).argmax(-1)
    for row in report["results"][1:]:
        own = utils.predict(students[row["name"], row["seed"]].model, few.test).argmax(-1)
        assert row["agreement"] == pytest.approx((own == answers).mean())


@pytest.mark.parametrize("script", ["13_teacher_training.py", "14_student_baseline.py"])
def test_the_scripts_before_train_the_same_networks(script, watched, few, tmp_path):
    """Script 13's teacher and script 14's baseline are those of script 15, to the last bit."""
    module = load(EXAMPLES / script)
    flags = {"seed": 3, "epochs": 1}
    if script.startswith("14"):
        flags = {"seed": 7, "seeds": 2, "epochs": 2, "labels": 60, "batch_size": 60}
    config = module.Config(dataset="digits", output_dir=str(tmp_path), **flags)
    _, trainings = watch(module, few, config)
    _, teacher, students = watched
    same = {("teacher", 3): teacher, **students}
    assert len(trainings) == flags.get("seeds", 1)
    for training in trainings:
        other = same[training.name, training.recipe.seed]
        assert fingerprint(training.model) == fingerprint(other.model)


# %% Settings


@pytest.fixture(scope="module")
def first_look(digits):
    """As many images as --quick leaves of MNIST, or so."""
    return digits._replace(name="mnist")


def test_what_a_flag_leaves_open(kd, digits, many, first_look):
    """Pairs, labels, and the teacher's epochs and batch size."""
    for data, flags, wanted in (
        (many, {}, (1, 1000, 3, 128)),
        (first_look, {"quick": True}, (1, 100, 4, 32)),
        (digits, {}, (5, 100, 8, 32)),
        (digits, {"quick": True}, (1, 100, 4, 32)),
        (digits, {"seeds": 2, "labels": "all", "teacher_epochs": 0}, (2, "all", 0, 32)),
        (many, {"teacher_batch_size": 7}, (1, 1000, 3, 7)),
    ):
        config = kd.fill_in_defaults(kd.Config(**flags), data)
        found = config.seeds, config.labels, config.teacher_epochs, config.teacher_batch_size
        assert found == wanted


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({}, (4.0, 20, "shift")),
        ({"labels": 10_000}, (4.0, 20, "shift")),
        ({"labels": "all"}, (2.0, 20, "shift")),
        ({"labels": 30_000}, (2.0, 20, "shift")),
        ({"quick": True}, (4.0, 4, "none")),
        ({"temperature": 3.0}, (3.0, 20, "shift")),
        ({"teacher_epochs": 5, "teacher_augmentation": "none"}, (4.0, 5, "none")),
    ],
)
def test_fashion_mnist_has_settings_of_its_own(kd, many, flags, wanted):
    config = kd.fill_in_defaults(kd.Config(**flags), many._replace(name="fashion_mnist"))
    found = config.temperature, config.teacher_epochs, config.teacher_augmentation
    assert found == wanted
    recipe = kd.teacher_recipe(config, 60_000)
    assert recipe.augmentation == wanted[-1]
    assert recipe.learning_rate == (5e-3 if flags == {"quick": True} else 2e-3)


def test_a_constant_rate_is_the_same_on_fashion_mnist(kd, many):
    clothes = many._replace(name="fashion_mnist")
    config = kd.fill_in_defaults(kd.Config(schedule="constant"), clothes)
    assert kd.teacher_recipe(config, 60_000)[3:] == (1e-3, "constant", "shift")


def test_all_other_data_have_temperature_3_and_a_teacher_of_plain_images(kd, many, digits):
    for data in (many, digits, many._replace(name="kmnist")):
        config = kd.fill_in_defaults(kd.Config(), data)
        assert (config.temperature, config.teacher_augmentation) == (3, "none")


@pytest.mark.parametrize("script", ["14_student_baseline.py", SCRIPT])
def test_the_recipes_of_students(script, digits, many, first_look):
    module = load(EXAMPLES / script)
    for data, flags, labels, wanted in (
        (many, {}, 1000, (60, 128, 4e-2, "onecycle")),
        (many, {}, 60_000, (4, 128, 2e-2, "onecycle")),
        (many, {}, 100, (274, 100, 4e-2, "onecycle")),
        (many, {"schedule": "constant"}, 1000, (60, 128, 1e-3, "constant")),
        (many, {"schedule": "constant", "learning_rate": 0.5}, 1000, (60, 128, 0.5, "constant")),
        (digits, {}, 100, (120, 32, 1e-2, "onecycle")),
        (digits, {}, 20, (120, 20, 1e-2, "onecycle")),
        (first_look, {}, 100, (120, 32, 1e-2, "onecycle")),
        (many._replace(name="fashion_mnist"), {}, 1000, (30, 128, 2e-2, "onecycle")),
        (many._replace(name="fashion_mnist"), {}, 60_000, (7, 128, 2e-2, "onecycle")),
        (digits, {"epochs": 0, "batch_size": 9, "learning_rate": 1.0}, 10, (0, 9, 1.0, "onecycle")),
    ):
        recipe = module.student_recipe(module.Config(**flags), data, 7, labels)
        assert recipe == module.Recipe(7, *wanted)


def test_the_recipe_of_the_teacher(kd, digits):
    teacher = kd.fill_in_defaults(kd.Config(teacher_seed=3), digits)
    assert kd.teacher_recipe(teacher, 1297) == (3, 8, 32, 5e-3, "onecycle", "none")


def test_13_and_14_have_the_defaults_of_15(kd, digits, many, first_look):
    teachers = load(EXAMPLES / "13_teacher_training.py")
    baselines = load(EXAMPLES / "14_student_baseline.py")
    clothes = many._replace(name="fashion_mnist")
    for data, quick, epochs, batch_size, labels in (
        (many, False, 3, 128, 1000), (first_look, True, 4, 32, 100), (digits, False, 8, 32, 100),
        (clothes, False, 20, 128, 1000), (clothes, True, 4, 128, 100),
    ):  # fmt: skip
        config = teachers.fill_in_defaults(teachers.Config(quick=quick), data)
        assert (config.epochs, config.batch_size) == (epochs, batch_size)
        of_15 = kd.fill_in_defaults(kd.Config(quick=quick), data)
        assert config.learning_rate == of_15.teacher_learning_rate
        assert config.augmentation == of_15.teacher_augmentation
        config = baselines.fill_in_defaults(baselines.Config(quick=quick), data)
        assert config.labels == labels


def test_13_trains_as_many_teachers_as_seeds_are_asked_for(few, tmp_path):
    module = load(EXAMPLES / "13_teacher_training.py")
    config = module.Config(
        dataset="digits", output_dir=str(tmp_path), seed=3, seeds=2, epochs=2, batch_size=100,
        schedule="constant",
    )  # fmt: skip
    report, trainings = watch(module, few, config)
    assert [x.recipe for x in trainings] == [(s, 2, 100, 1e-3, "constant", "none") for s in (3, 4)]
    for row, training in zip(report["results"], trainings, strict=True):
        check_optimizer(module, training)
        assert training.split is few.train
        seed = training.recipe.seed
        wanted = [batch for epoch in (1, 2) for batch in utils.batches(few.train, 100, seed, epoch)]
        for shown, want in zip(training.batches, wanted, strict=True):
            np.testing.assert_array_equal(shown["index"], want["index"])
        for scored_on, model, split in training.scored:
            assert (scored_on, model, split) == ("test", training.model, few.test)
        errors = (utils.predict(training.model, few.test).argmax(-1) != few.test.label).sum()
        assert (row["name"], row["seed"]) == ("teacher", training.recipe.seed)
        assert row["test_errors"] == errors


def test_14_reports_the_student_on_all_test_images(few, tmp_path):
    module = load(EXAMPLES / "14_student_baseline.py")
    config = module.Config(
        dataset="digits", output_dir=str(tmp_path), seed=7, labels=60, epochs=2, batch_size=20
    )
    report, [training] = watch(module, few, config)
    [row] = report["results"]
    errors = (utils.predict(training.model, few.test).argmax(-1) != few.test.label).sum()
    assert (row["name"], row["test_errors"]) == ("baseline", errors)
    check_optimizer(module, training)
    for scored_on, model, split in training.scored:
        assert (scored_on, model, split) == ("test", training.model, few.test)
    labelled = utils.take_labels(few.train, 60, 7)
    assert fingerprint(training.split) == fingerprint(labelled)
    wanted = [batch for epoch in (1, 2) for batch in utils.batches(labelled, 20, 7, epoch)]
    for shown, want in zip(training.batches, wanted, strict=True):
        np.testing.assert_array_equal(shown["index"], want["index"])


# %% Copied out

PASTED = [
    "TeacherCNN", "StudentCNN", "at_least_float32", "hard_loss", "soft_loss", "distillation_loss",
    "train_step", "train_student_step",
]  # fmt: skip


class InBfloat16(nnx.Module):
    """A network whose logits are of low precision."""

    def __init__(self, network):
        self.network = network

    def __call__(self, x, train=False):
        return self.network(x, train=train).astype(jnp.bfloat16)


@pytest.fixture(scope="module")
def pasted(tmp_path_factory):
    """Models, losses and steps of script 15 in an otherwise empty file."""
    source = (EXAMPLES / SCRIPT).read_text()
    parts = ["import jax\nimport jax.numpy as jnp\nimport optax\nfrom flax import nnx"]
    parts += ["from fast import conv, max_pool"]
    for node in ast.parse(source).body:
        if getattr(node, "name", None) in PASTED:
            first = min([node.lineno, *(x.lineno for x in node.decorator_list)])
            parts.append("\n".join(source.splitlines()[first - 1 : node.end_lineno]))
    path = tmp_path_factory.mktemp("pasted") / "mine.py"
    path.write_text("\n\n\n".join(parts))
    return load(path)


def test_models_losses_and_steps_work_on_other_images(pasted):
    """32×32 pixels in colour, 5 classes, labels of uint8 and logits of bfloat16."""
    rng = np.random.default_rng(0)
    label = np.arange(20, dtype=np.uint8) % 5
    image = rng.random((20, 32, 32, 3)).astype(np.float32) + label[:, None, None, None]
    batch = {"image": image, "label": label}
    how = {"num_classes": 5, "image_shape": (32, 32, 3)}
    teacher = InBfloat16(pasted.TeacherCNN(**how, rngs=nnx.Rngs(0)))
    student = InBfloat16(pasted.StudentCNN(**how, rngs=nnx.Rngs(1)))
    p, q = (np.asarray(x(image, train=x is student), np.float64) for x in (teacher, student))
    hard = -(q - np.log(np.exp(q).sum(-1, keepdims=True)))[np.arange(20), label].mean()
    p, q = (np.exp(z / 4) / np.exp(z / 4).sum(-1, keepdims=True) for z in (p, q))
    soft = 16 * (p * np.log(p / q)).sum(-1).mean()

    optimizer = nnx.Optimizer(student, optax.adam(1e-3), wrt=nnx.Param)
    losses = [pasted.train_student_step(student, teacher, optimizer, batch, 4.0, 0.3)]
    np.testing.assert_allclose(losses[0]["hard_loss"], hard, rtol=1e-3)
    np.testing.assert_allclose(losses[0]["soft_loss"], soft, rtol=1e-3)
    np.testing.assert_allclose(losses[0]["loss"], 0.3 * hard + 0.7 * soft, rtol=1e-3)
    for _ in range(30):
        losses.append(pasted.train_student_step(student, teacher, optimizer, batch, 4.0, 0.3))
    assert losses[-1]["loss"] < 0.7 * losses[0]["loss"]
    optimizer = nnx.Optimizer(teacher, optax.adam(1e-3), wrt=nnx.Param)
    losses = [pasted.train_step(teacher, optimizer, batch)["loss"] for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]
