"""The scripts in advanced/: many students in one program, of which each ends as it would alone; who
is trained on what, what is measured on which images, and what chooses."""

import contextlib
import dataclasses
import io
import json
from unittest import mock

import experiment
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import utils
from conftest import EXAMPLES, load, make_run, refuse, watch
from experiment import fingerprint
from fast import compile_step
from flax import nnx

SEEDS, CELLS = [5, 9], [(1.0, 0.5), (3.0, 0.0), (20.0, 1.0), (3.0, 1.0)]
STEPS, BATCH = 6, 32


@pytest.fixture(scope="module")
def grid():
    return load(EXAMPLES / "advanced" / "knowledge_distillation.py", name="grid")


@pytest.fixture(scope="module")
def parts(digits):
    """For each seed a split of 64 images; and a table of teacher logits."""
    splits = [utils.take_labels(digits.train, 64, seed) for seed in SEEDS]
    table = np.random.default_rng(0).normal(0, 3, (len(digits.train.label), 10))
    return splits, table.astype(np.float32)


def recipe_of(seed=0):
    # At a higher rate Adam makes more of rounding than the tests below bear.
    return experiment.Recipe(seed, STEPS // 2, BATCH, 3e-3, "onecycle")


def train_stack(grid, parts, change=None, backend="cpu"):
    """The stack after a few steps, and the losses [steps, seeds, cells]. On a CPU the students take
    turns, elsewhere they are vectorised."""
    splits, table = parts
    students = grid.Students(SEEDS, len(CELLS))
    optimizer = grid.make_optimizer(students, recipe_of(), 64)
    step = nnx.jit(grid.students_step.__wrapped__)
    step = compile_step(step, students, optimizer, axis=1)
    cells, losses = np.array(CELLS, np.float32), []
    if change is not None:
        cells[change] = (7.0, 0.25)
    for epoch in range(1, STEPS // 2 + 1):
        for batch in grid.stacked_batches(splits, BATCH, SEEDS, epoch, teacher_logits=table):
            with mock.patch("jax.default_backend", return_value=backend):
                found = step(batch, *cells.T)
            losses.append(np.asarray(found["loss"]))
    return students, np.array(losses)


def train_alone(kd, parts, i, cell):
    """The student of script 15 with that seed, temperature and alpha."""
    splits, table = parts
    student = kd.StudentCNN(rngs=nnx.Rngs(SEEDS[i]))
    optimizer = kd.make_optimizer(student, recipe_of(), 64)
    losses = []
    for epoch in range(1, STEPS // 2 + 1):
        for batch in utils.batches(splits[i], BATCH, SEEDS[i], epoch, teacher_logits=table):
            found = kd.train_student_step(student, None, optimizer, batch, *cell)
            losses.append(float(found["loss"]))
    return student, losses


def weights(model, *place):
    return jax.tree.map(lambda x: np.asarray(x)[place], nnx.state(model, nnx.Param))


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def stack(request, grid, parts):
    return *train_stack(grid, parts, backend=request.param), request.param


@pytest.mark.parametrize("i", range(len(SEEDS)))
@pytest.mark.parametrize("j", range(len(CELLS)))
def test_each_student_ends_as_it_would_alone(kd, parts, stack, digits, i, j):
    students, losses, _ = stack
    alone, alone_losses = train_alone(kd, parts, i, CELLS[j])
    np.testing.assert_allclose(losses[:, i, j], alone_losses, rtol=1e-4)
    image = digits.test.image[:40] / np.float32(255)
    together = students(jnp.array(image))[i, j]
    np.testing.assert_allclose(together, alone(jnp.array(image)), atol=0.01)


def test_students_of_a_seed_share_their_start(kd, grid):
    students = grid.Students(SEEDS, 3)
    for i, seed in enumerate(SEEDS):
        want = jax.tree.leaves(nnx.state(kd.StudentCNN(rngs=nnx.Rngs(seed)), nnx.Param))
        for j in range(3):
            got = jax.tree.leaves(weights(students.stack, i, j))
            assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_stack_has_as_many_logits_as_the_data_has_classes(grid):
    def answer(images):
        return grid.Students(SEEDS, 3, 4)(images)

    logits = nnx.eval_shape(answer, jax.ShapeDtypeStruct((5, 28, 28, 1), jnp.float32))
    assert logits.shape == (2, 3, 5, 4)


def test_stackable_student_gives_the_logits_of_script_15(kd, grid):
    image = np.random.default_rng(0).random((8, 28, 28, 1), np.float32)
    for train in (False, True):
        a = kd.StudentCNN(rngs=nnx.Rngs(3))(image, train)
        b = grid.StackableStudent(rngs=nnx.Rngs(3))(image, train)
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_students_do_not_leak_into_one_another(grid, parts, stack):
    """Another temperature and alpha for one cell change its students, and no other's a bit."""
    students, _, backend = stack
    changed, _ = train_stack(grid, parts, change=1, backend=backend)
    for i in range(len(SEEDS)):
        for j in range(len(CELLS)):
            a, b = (jax.tree.leaves(weights(x.stack, i, j)) for x in (students, changed))
            same = all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
            assert same == (j != 1), (i, j)


def test_without_a_teacher_temperature_does_nothing(stack):
    """At alpha = 1 the soft loss has no weight: T = 20 and T = 3 end alike."""
    students, *_ = stack
    a, b = (jax.tree.leaves(weights(students.stack, 0, j)) for j in (2, 3))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# %% The grid: its settings and its choice


def test_a_quick_run_heeds_the_flags(grid, digits):
    own = grid.Config(quick=True, temperatures=(2.0, 8.0), alphas=(0.2,))
    filled = grid.fill_in_defaults(own, digits)
    assert (filled.temperatures, filled.alphas, filled.labels) == ((2.0, 8.0), (0.2,), (100,))
    quick = grid.fill_in_defaults(grid.Config(quick=True), digits)
    assert (quick.temperatures, quick.alphas, quick.labels) == ((1, 3), (0.5, 1), (100,))


def test_defaults_of_the_grid(grid, digits):
    filled = grid.fill_in_defaults(grid.Config(), digits)
    assert filled.labels == (100,)
    assert filled.validation == len(digits.train.label) // 6
    filled = grid.fill_in_defaults(grid.Config(), digits._replace(name="mnist"))
    assert filled.labels == (1000,)
    assert filled.temperatures == (1, 2, 3, 5, 8, 20)
    assert filled.alphas == (0, 0.1, 0.5, 0.9, 1)
    assert (filled.seeds, filled.test_seeds) == (3, 5)


def test_the_pair_with_the_fewest_errors_is_chosen_mean_over_the_seeds(
    grid, few, tmp_path, monkeypatch
):
    """Here the first seed, the second one and the best single student would choose others."""
    errors = np.array([[10, 20, 40, 90], [60, 30, 12, 11]])  # 35, 25, 26, 50.5 in the mean
    config = grid.fill_in_defaults(grid.Config(quick=True, labels=(30,)), few)
    run = make_run(tmp_path, few, config)
    monkeypatch.setattr(run, "training_of", lambda _: mock.Mock(history=[{"epoch": 1}]))
    monkeypatch.setattr(grid, "train_stack", lambda *_: None)
    monkeypatch.setattr(grid, "count_errors", lambda *_: errors)
    found = grid.search_grid(30, CELLS, SEEDS, None, few, config, run)
    assert found == {"chosen": CELLS[1], "errors": errors.tolist(), "last": [{"epoch": 1}]}
    errors[:, 2] = 25  # a tie: the first is chosen
    assert grid.search_grid(30, CELLS, SEEDS, None, few, config, run)["chosen"] == CELLS[1]


def test_the_teachers_of_both_scripts_are_trained_as_script_15_s(grid, heat, kd, digits, many):
    first_look = digits._replace(name="mnist")
    for data, quick in ((many, False), (first_look, True), (digits, False), (digits, True)):
        config = kd.fill_in_defaults(kd.Config(quick=quick, teacher_seed=3), data)
        wanted = kd.teacher_recipe(config, len(data.train.label))
        for module in (grid, heat):
            config = module.Config(quick=quick, teacher_seed=3)
            assert module.fixed_teacher_recipe(config, data) == wanted


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperatures"],
        ["--alphas"],
        ["--labels"],
        ["--labels", "30", "9"],
        ["--labels", "30", "1200"],  # with a sixth set aside there are 1,081
        ["--batch-size", "31", "--labels", "40", "30"],
        ["--validation", "1200"],
        ["--seeds", "1"],
        ["--test-seeds", "1"],
        ["--teacher", "nowhere"],
    ],
    ids=" ".join,
)
def test_grid_refuses_a_flag_before_anything_is_trained(grid, flags, monkeypatch, capsys, tmp_path):
    base = ["grid", "--dataset", "digits", "--output-dir", tmp_path / "out"]
    output = refuse(grid, base + flags, monkeypatch, capsys)
    assert flags[0] in output.err
    assert "Epoch" not in output.out
    assert not list(tmp_path.glob("out/weights/*"))


# %% The grid: who is trained on what
# A run on 320 digits, of which the last 53 are validation images, with two numbers of labels.

LABELS = (32, 40)
GRID_SEEDS, TEST_SEEDS = [7, 8], [9, 10, 11]
GRID_CELLS = [(2.0, 0.2), (2.0, 0.9), (8.0, 0.2), (8.0, 0.9)]
VALIDATION = 320 // 6


@pytest.fixture(scope="module")
def few(digits):
    return digits._replace(train=digits.train.take(slice(320)), test=digits.test.take(slice(100)))


def grid_config(grid, folder, labels=LABELS, **more):
    return grid.Config(
        dataset="digits", output_dir=str(folder), quick=True, labels=labels,
        temperatures=(2.0, 8.0), alphas=(0.2, 0.9), seed=7, seeds=2, test_seeds=3,
        epochs=2, batch_size=16, teacher_seed=3, **more,
    )  # fmt: skip


class Watched:
    """A run of a script: its report and trainings, what each step was called with, on which splits
    errors were counted, and what was printed."""

    def __init__(self, module, data, config):
        self.steps = []  # of each training: the modules of its step, and the calls of it
        self.scored = []  # (stack, split)

        def watched_compile_step(step, *modules, axis=None):
            compiled = compile_step(step, *modules, axis=axis)
            calls = []
            self.steps.append((step, modules, calls))

            def call(batch, *more):
                calls.append(({key: np.array(x) for key, x in batch.items()}, *more))
                return compiled(batch, *more)

            return call

        with pytest.MonkeyPatch.context() as patch, io.StringIO() as printed:
            patch.setattr(module, "compile_step", watched_compile_step)
            if hasattr(module, "count_errors"):
                count_errors = module.count_errors

                def watched_count_errors(students, split):
                    self.scored.append((students, split))
                    return count_errors(students, split)

                patch.setattr(module, "count_errors", watched_count_errors)
            with contextlib.redirect_stdout(printed):
                self.report, self.trainings = watch(module, data, config)
            self.printed = printed.getvalue()

    def training(self, name):
        [place] = [i for i, training in enumerate(self.trainings) if training.name == name]
        return self.trainings[place]

    def calls(self, name):
        """What the step of a training was called with: (batch, ...) of every step."""
        [place] = [i for i, training in enumerate(self.trainings) if training.name == name]
        return self.steps[place][2]


@pytest.fixture(scope="module")
def tuned(grid, few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    run = Watched(grid, few, grid_config(grid, folder))
    run.folder = folder
    return run


def stacks(labels):
    """The names of the two stacks of a number of labels, with their seeds."""
    return {f"grid, {labels} labels": GRID_SEEDS, f"final, {labels} labels": TEST_SEEDS}


ALL_STACKS = [(name, labels) for labels in LABELS for name in stacks(labels)]


def same(split, other):
    return all(np.array_equal(a, b) for a, b in zip(split, other, strict=True))


def test_the_trainings_are_a_teacher_and_two_stacks_for_each_number_of_labels(tuned):
    names = [training.name for training in tuned.trainings]
    assert names == ["teacher", *(name for name, _ in ALL_STACKS)]
    assert len(tuned.steps) == len(names)


def test_the_last_sixth_of_the_training_images_is_shown_to_nobody(tuned):
    assert tuned.report["validation"] == VALIDATION
    for training in tuned.trainings:
        assert training.shown("index").max() < 320 - VALIDATION, training.name


def check_trained_on_labels(run, place, step, start, split, recipe):
    """The training at that place started with the weights of `start`, and its step was called with
    the batches of a split, and with nothing of a teacher."""
    training = run.trainings[place]
    found_step, modules, calls = run.steps[place]
    assert found_step is step
    assert modules[0] is training.model
    assert training.recipe == recipe
    assert training.start == fingerprint(start)
    assert same(training.split, split)
    wanted = []
    for epoch in range(1, recipe.epochs + 1):
        wanted += utils.batches(split, recipe.batch_size, recipe.seed, epoch)
    assert len(calls) == len(wanted) > 0
    for (batch,), wanted_batch in zip(calls, wanted, strict=True):
        assert batch.keys() == wanted_batch.keys() == {"image", "label", "index"}
        assert all(np.array_equal(batch[key], wanted_batch[key]) for key in batch)


TEACHER_RECIPE = experiment.Recipe(3, 4, 32, 5e-3, "onecycle")


def test_the_teacher_of_the_grid_is_trained_on_all_other_labels_by_its_own_seed(grid, tuned, few):
    rest = few.train.take(slice(-VALIDATION))
    start = grid.TeacherCNN(rngs=nnx.Rngs(3))
    check_trained_on_labels(tuned, 0, grid.train_step, start, rest, TEACHER_RECIPE)


def test_the_teacher_of_the_grid_is_scored_on_validation_images(tuned, few):
    teacher = tuned.training("teacher")
    for scored_on, model, split in teacher.scored:
        assert scored_on == "validation"
        assert model is teacher.model
        assert same(split, few.train.take(slice(-VALIDATION, None)))
    assert len(teacher.scored) == 4


@pytest.mark.parametrize(("name", "labels"), ALL_STACKS)
def test_students_of_a_seed_share_labelled_images_and_batches(grid, tuned, few, name, labels):
    """They are those that a single student of that seed would have. None is a validation image."""
    rest = few.train.take(slice(-VALIDATION))
    seeds = stacks(labels)[name]
    assert tuned.training(name).given["seeds"] == seeds
    for i, seed in enumerate(seeds):
        split = utils.take_labels(rest, labels, seed)
        want = [batch for epoch in (1, 2) for batch in utils.batches(split, 16, seed, epoch)]
        calls = tuned.calls(name)
        assert len(calls) == len(want) == 4
        for (batch, *_), wanted in zip(calls, want, strict=True):
            assert len(batch["index"]) == len(seeds)
            for key in ("index", "image", "label"):
                np.testing.assert_array_equal(batch[key][i], wanted[key])


@pytest.mark.parametrize(("name", "labels"), ALL_STACKS)
def test_students_of_a_seed_share_start_and_recipe(grid, tuned, few, name, labels):
    """One recipe for all pairs and seeds, but for what the seed decides."""
    training = tuned.training(name)
    seeds, cells = stacks(labels)[name], training.given["cells"]
    assert training.start == fingerprint(grid.Students(seeds, len(cells)))
    config = grid_config(grid, "")
    assert training.recipe == grid.student_recipe(config, few, seeds[0], labels)
    assert training.recipe[1:] == tuned.training(f"grid, {LABELS[0]} labels").recipe[1:]


@pytest.mark.parametrize(("name", "labels"), ALL_STACKS)
def test_students_of_the_grid_hear_the_teacher_on_their_own_images(tuned, few, name, labels):
    """The teacher is this run's, trained to its end, in inference mode."""
    teacher = tuned.training("teacher").model
    answers = utils.predict(teacher, few.train)
    for batch, *_ in tuned.calls(name):
        np.testing.assert_allclose(batch["teacher_logits"], answers[batch["index"]], atol=1e-5)


@pytest.mark.parametrize("labels", LABELS)
def test_the_grid_has_a_student_for_every_temperature_and_alpha(grid, tuned, labels):
    name = f"grid, {labels} labels"
    assert tuned.report["cells"] == GRID_CELLS
    for _, temperatures, alphas in tuned.calls(name):
        np.testing.assert_array_equal(temperatures, np.float32([2, 2, 8, 8]))
        np.testing.assert_array_equal(alphas, np.float32([0.2, 0.9, 0.2, 0.9]))


@pytest.mark.parametrize("labels", LABELS)
def test_validation_images_choose_the_pair(tuned, few, labels):
    found = tuned.report["grids"][str(labels)]
    validation = few.train.take(slice(-VALIDATION, None))
    logits = utils.predict(tuned.training(f"grid, {labels} labels").model, validation)
    errors = (logits.argmax(-1) != validation.label).sum(-1)
    np.testing.assert_array_equal(found["errors"], errors)
    assert errors.shape == (2, 4)
    assert found["chosen"] == GRID_CELLS[errors.sum(0).argmin()]


def test_test_images_score_only_what_was_chosen_before(tuned, few):
    """In turns the grid on validation images, and the students of other seeds on test images."""
    validation = few.train.take(slice(-VALIDATION, None))
    wanted = []
    for labels in LABELS:
        wanted.append((tuned.training(f"grid, {labels} labels").model, validation))
        wanted.append((tuned.training(f"final, {labels} labels").model, few.test))
    assert len(tuned.scored) == len(wanted)
    for (model, split), (wanted_model, wanted_split) in zip(tuned.scored, wanted, strict=True):
        assert model is wanted_model
        assert same(split, wanted_split)


@pytest.mark.parametrize("labels", LABELS)
def test_the_comparison_is_of_chosen_default_and_baseline(tuned, labels):
    chosen = tuned.report["grids"][str(labels)]["chosen"]
    for _, temperatures, alphas in tuned.calls(f"final, {labels} labels"):
        np.testing.assert_array_equal(temperatures, np.float32([chosen[0], 3, 1]))
        np.testing.assert_array_equal(alphas, np.float32([chosen[1], 0.5, 1]))


def test_seeds_of_the_comparison_took_no_part_in_the_choice(tuned):
    for labels in LABELS:
        grid = tuned.training(f"grid, {labels} labels").given["seeds"]
        final = tuned.training(f"final, {labels} labels").given["seeds"]
        assert (grid, final) == (GRID_SEEDS, TEST_SEEDS)
        assert not set(grid) & set(final)


def test_rows_of_the_stack_are_its_students_on_all_test_images(tuned, few):
    rows = iter(tuned.report["results"])
    for labels in LABELS:
        training = tuned.training(f"final, {labels} labels")
        logits = utils.predict(training.model, few.test)
        cells = {"chosen": tuned.report["grids"][str(labels)]["chosen"]}
        cells |= {"default": (3, 0.5), "baseline": (1, 1)}
        for j, (name, (temperature, alpha)) in enumerate(cells.items()):
            for i, seed in enumerate(TEST_SEEDS):
                row = next(rows)
                errors = (logits[i, j].argmax(-1) != few.test.label).sum()
                assert (row["name"], row["seed"]) == (f"{name}, {labels} labels", seed)
                assert row["test_errors"] == errors
                assert row["test_accuracy"] == 1 - errors / 100
                assert row["params"] == 56_810
                wanted = {"seed": seed, "temperature": temperature, "alpha": alpha, "epochs": 2}
                assert row["settings"].items() >= wanted.items()
    assert next(rows, None) is None


def test_errors_of_a_stack_differ(tuned):
    """So that another student's errors in a row would be seen."""
    for labels in LABELS:
        rows = [r for r in tuned.report["results"] if r["name"].endswith(f" {labels} labels")]
        errors = np.array([row["test_errors"] for row in rows]).reshape(3, 3)
        assert len(np.unique(errors)) >= 6
        assert (errors != errors.T).any()


def test_students_of_a_stack_share_its_seconds(tuned):
    rows = tuned.report["results"]
    for labels in LABELS:
        of_stack = [r["seconds"] for r in rows if r["name"].endswith(f" {labels} labels")]
        record = np.load(tuned.folder / "weights" / f"final_{labels}_labels-9.npz")["record"]
        assert sum(of_stack) == pytest.approx(json.loads(record.tobytes())["seconds"])
        assert len(set(of_stack)) == 1


def test_the_summary_compares_the_chosen_pair_with_default_and_baseline(tuned):
    rows = tuned.report["results"]

    def accuracies(name, labels):
        name = f"{name}, {labels} labels"
        return [100 * row["test_accuracy"] for row in rows if row["name"] == name]

    for labels in LABELS:
        t, alpha = tuned.report["grids"][str(labels)]["chosen"]
        for other in ("default", "baseline"):
            gain = utils.paired_difference(accuracies("chosen", labels), accuracies(other, labels))
            [line] = [
                line
                for line in tuned.printed.splitlines()
                if line.startswith(f"T = {t:g}, alpha = {alpha:g} − {other}, {labels} labels")
            ]
            found = f"{gain.mean:+.2f} points (95 %: {gain.low:+.2f} to {gain.high:+.2f})"
            assert line.endswith(f"{found}, {gain.wins} of 3 seeds")


def test_the_losses_in_the_figure_are_those_of_the_last_epoch(tuned):
    for labels in LABELS:
        [last] = tuned.report["grids"][str(labels)]["last"]
        assert last["epoch"] == 2
        hard, soft = np.array(last["hard_loss"]), np.array(last["soft_loss"])
        assert hard.shape == soft.shape == (2, 4)
        # total = α · hard + (1 − α) · soft
        alphas = np.array([alpha for _, alpha in GRID_CELLS])
        np.testing.assert_allclose(last["loss"], alphas * hard + (1 - alphas) * soft, rtol=1e-5)


def test_a_grid_that_is_there_is_not_trained_again(grid, few, tmp_path, monkeypatch, capsys):
    """Nor is it when its own teacher is named: that is the same teacher, and the same students."""
    monkeypatch.setattr(utils, "load_data", lambda *_: few)
    config = grid_config(grid, tmp_path, labels=(32,))
    first = grid.main(config)
    assert "Epoch" in capsys.readouterr().out
    for teacher, trainings in ((None, 3), (str(tmp_path), 2)):
        again = grid.main(dataclasses.replace(config, teacher=teacher))
        printed = capsys.readouterr().out
        assert printed.count("Trained before") == trainings
        assert "Epoch" not in printed
        assert again["results"] == first["results"]
        assert again["grids"] == first["grids"]


def test_a_teacher_that_saw_validation_images_is_refused(grid, tuned, few, tmp_path):
    """One trained on all but the last 53 images has seen some of the last 100."""
    config = grid_config(grid, tmp_path, teacher=str(tuned.folder), validation=100)
    with pytest.raises(utils.UserError, match=r"--teacher .* other images"):
        watch(grid, few, config)


def test_images_of_a_holdout_do_not_choose_the_pair(grid, few, tmp_path):
    """They stand in place of the test images. Of the other training images the last choose."""
    held = utils.hold_out(few, 40)
    run = Watched(grid, held, grid_config(grid, tmp_path, validation=20, labels=(32,)))
    wanted = [few.train.take(slice(260, 280)), few.train.take(slice(280, 320))]
    for (_, split), wanted_split in zip(run.scored, wanted, strict=True):
        assert same(split, wanted_split)
    assert all(training.shown("index").max() < 260 for training in run.trainings)
    logits = utils.predict(run.training("final, 32 labels").model, held.test)
    errors = (logits.argmax(-1) != held.test.label).sum(-1)
    found = [row["validation_errors"] for row in run.report["results"]]
    np.testing.assert_array_equal(found, errors.T.flat)


# %% Temperature
# A run on 511 digits: two students on 504 labels, of which the first 500 are measured.

T = (1.0, 4.0, 16.0)


@pytest.fixture(scope="module")
def heat():
    return load(EXAMPLES / "advanced" / "temperature.py", name="heat")


@pytest.fixture(scope="module")
def own_gradient_norm(kd):
    """The norm of the soft loss's gradient over a student's weights, in another way."""

    @nnx.jit
    def gradient(student, image, teacher_logits, t):
        def soft_loss(student):
            logits = student(image, train=True)
            label = jnp.zeros(len(image), int)
            return kd.distillation_loss(logits, teacher_logits, label, t, 0.0)[0]

        return nnx.grad(soft_loss)(student)

    def norm(*arguments):
        leaves = jax.tree.leaves(gradient(*arguments))
        return sum(float(jnp.square(x).sum()) for x in leaves) ** 0.5

    return norm


def test_gradient_norm_is_that_of_the_soft_loss(heat, own_gradient_norm):
    rng = np.random.default_rng(0)
    student = heat.StudentCNN(rngs=nnx.Rngs(0))
    image = rng.random((6, 28, 28, 1), np.float32)
    teacher_logits = rng.normal(0, 3, (6, 10)).astype(np.float32)
    wanted = own_gradient_norm(student, image, teacher_logits, 4.0)
    got = heat.soft_gradient_norm(student, teacher_logits, image, 4.0)
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


def test_gradient_is_measured_of_a_copy(heat, kd, few):
    """Though it is a training step's, the student's statistics of BatchNorm stay as they are."""
    student, teacher = heat.StudentCNN(rngs=nnx.Rngs(0)), heat.StudentCNN(rngs=nnx.Rngs(1))
    before = fingerprint(student)
    heat.measure_gradient(student, teacher, few.train.take(slice(20)), (1.0,))
    assert fingerprint(student) == before


def test_soft_gradient_refuses_shapes_that_would_broadcast(heat):
    student, image = heat.StudentCNN(rngs=nnx.Rngs(0)), np.zeros((6, 28, 28, 1), np.float32)
    with pytest.raises(ValueError, match=r"\(6, 10\).*\(6, 1\)"):
        heat.soft_gradient_norm(student, np.zeros((6, 1), np.float32), image, 4.0)


def test_high_temperatures_reach_their_limits(heat):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(1, 3, (2, 50, 10))
    for t in (1e2, 1e3):  # the errors of both limits fall as 1/T or faster
        assert heat.distance_from_limit(teacher, t) < 200 / t**2
        assert heat.distance_from_matching(student, teacher, t) < 20 / t
    assert heat.distance_from_matching(student, teacher, 1.0) > 0.5


def test_defaults_of_temperature(heat, digits):
    mnist = digits._replace(name="mnist")
    filled = heat.fill_in_defaults(heat.Config(), mnist)
    assert (filled.labels, filled.seeds, filled.seed) == (1000, 1, 42)
    assert heat.fill_in_defaults(heat.Config(), digits).labels == 100
    assert heat.fill_in_defaults(heat.Config(quick=True), mnist).labels == 100
    assert filled.temperatures == (1, 2, 3, 5, 8, 20, 50, 100)


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperatures"],
        ["--temperatures", "3", "3"],
        ["--labels", "1298"],
        ["--batch-size", "301"],
        ["--seeds", "0"],
        ["--teacher", "nowhere"],
    ],
    ids=" ".join,
)
def test_temperature_refuses_a_flag_before_anything_is_trained(
    heat, flags, monkeypatch, capsys, tmp_path
):
    base = ["heat", "--dataset", "digits", "--output-dir", tmp_path / "out"]
    output = refuse(heat, base + flags, monkeypatch, capsys)
    assert flags[0] in output.err
    assert "Epoch" not in output.out
    assert not list(tmp_path.glob("out/weights/*"))


@pytest.fixture(scope="module")
def some(digits):
    return digits._replace(train=digits.train.take(slice(511)), test=digits.test.take(slice(100)))


@pytest.fixture(scope="module")
def heated(heat, some, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heat")
    config = heat.Config(
        dataset="digits", output_dir=str(folder), quick=True, temperatures=T,
        seed=7, seeds=2, labels=504, epochs=2, teacher_seed=3,
    )  # fmt: skip
    run = Watched(heat, some, config)
    run.folder, run.config = folder, config
    return run


def of_heated(heated, some):
    """Of each student of the run: its seed, its row, its labelled images and its model."""
    rows = heated.report["results"][1:]
    for seed, row, training in zip((7, 8), rows, heated.trainings[1:], strict=True):
        yield seed, row, utils.take_labels(some.train, 504, seed), training.model


def test_the_teacher_of_temperature_is_trained_on_all_labels_by_its_own_seed(heat, heated, some):
    start = heat.TeacherCNN(rngs=nnx.Rngs(3))
    check_trained_on_labels(heated, 0, heat.train_step, start, some.train, TEACHER_RECIPE)


def test_students_of_temperature_learn_from_labels_alone(heat, heated, some):
    """Each has labelled images, a start and batches of its own seed; there is no teacher."""
    assert [training.name for training in heated.trainings] == ["teacher", "baseline", "baseline"]
    for place, seed in ((1, 7), (2, 8)):
        labelled = utils.take_labels(some.train, 504, seed)
        start = heat.StudentCNN(rngs=nnx.Rngs(seed))
        recipe = heat.student_recipe(heated.config, some, seed, 504)
        assert recipe.seed == seed
        check_trained_on_labels(heated, place, heat.train_step, start, labelled, recipe)


def test_networks_of_temperature_are_scored_on_all_test_images(heated, some):
    rows = heated.report["results"]
    assert [(row["name"], row["seed"]) for row in rows] == [
        ("teacher", 3), ("baseline", 7), ("baseline", 8)
    ]  # fmt: skip
    answers = utils.predict(heated.trainings[0].model, some.test).argmax(-1)
    for row, training in zip(rows, heated.trainings, strict=True):
        assert all(found == ("test", training.model, some.test) for found in training.scored)
        own = utils.predict(training.model, some.test).argmax(-1)
        assert row["test_errors"] == (own != some.test.label).sum()
        assert row["agreement"] == pytest.approx((own == answers).mean())


@pytest.mark.parametrize("moment", ["start", "end"])
def test_gradients_are_of_a_step_on_500_labelled_images(
    heat, own_gradient_norm, heated, some, moment
):
    """Of the student's own first 500, with its initial weights and with its last."""
    teacher = heated.trainings[0].model
    for seed, row, labelled, trained in of_heated(heated, some):
        split = labelled.take(slice(500))
        image, teacher_logits = split.image / np.float32(255), utils.predict(teacher, split)
        untrained = heat.StudentCNN(rngs=nnx.Rngs(seed))
        student = {"start": untrained, "end": nnx.clone(trained)}[moment]
        wanted = [own_gradient_norm(student, image, teacher_logits, t) for t in T]
        np.testing.assert_allclose(row[f"with_t2_{moment}"], wanted, rtol=1e-3)


def test_without_the_factor_the_gradient_is_divided_by_it(heated):
    for row in heated.report["results"][1:]:
        for moment in ("start", "end"):
            with_t2, without_t2 = row[f"with_t2_{moment}"], row[f"without_t2_{moment}"]
            np.testing.assert_allclose(without_t2, np.array(with_t2) / np.square(T))


def test_soft_targets_are_the_teachers_on_test_images(heated, some):
    logits = utils.predict(heated.trainings[0].model, some.test).astype(np.float64)
    wanted = []
    for t in T:
        soft_targets = np.exp(logits / t) / np.exp(logits / t).sum(1, keepdims=True)
        limit = 0.1 + (logits - logits.mean(1, keepdims=True)) / (10 * t)
        wanted.append(10 * np.abs(soft_targets - limit).max(1).mean())
    np.testing.assert_allclose(heated.report["from_limit"], wanted, rtol=1e-3)
    assert heated.report["results"][0]["from_limit"] == heated.report["from_limit"]


def test_matching_is_of_the_trained_student_on_test_images(kd, heated, some):
    """The gradient is what JAX makes of the soft loss, of the sum over the images."""
    teacher_logits = utils.predict(heated.trainings[0].model, some.test)
    for _, row, _, trained in of_heated(heated, some):
        logits = utils.predict(trained, some.test)
        difference = logits - teacher_logits
        for t, distance in zip(T, row["from_matching"], strict=True):

            def without_t2(logits, t=t):
                return 100 * kd.soft_loss(logits, teacher_logits, t) / t**2

            limit = (difference - difference.mean(1, keepdims=True)) / (10 * t**2)
            gradient = jax.grad(without_t2)(logits)
            wanted = np.linalg.norm(gradient - limit) / np.linalg.norm(limit)
            assert distance == pytest.approx(wanted, rel=1e-3)


def test_what_is_reported_of_temperatures_are_means_over_the_students(heat, heated):
    assert heated.report["temperatures"] == T
    one, other = heated.report["results"][1:]
    for key, title in heat.MEASURES.items():
        assert one[key] != other[key]
        mean = np.mean([one[key], other[key]], axis=0)
        np.testing.assert_allclose(heated.report[key], mean)
        [line] = [x for x in heated.printed.splitlines() if x.startswith(title + " ")]
        np.testing.assert_allclose([float(x) for x in line.split()[-3:]], mean, rtol=5e-3)


def test_measuring_leaves_the_students_as_they_were_trained(heat, heated):
    for seed, training in zip((7, 8), heated.trainings[1:], strict=True):
        fresh = heat.StudentCNN(rngs=nnx.Rngs(0))
        kept = experiment.load_network(heated.folder, "baseline", fresh, seed)
        assert fingerprint(kept) == fingerprint(training.model)
