"""One run of a script: flags, trainings that go on, fingerprints, files, results and summary."""

import dataclasses
import enum
import functools
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Annotated, Literal

import experiment
import filelock
import jax
import jax.numpy as jnp
import numpy as np
import optax
import plots
import pytest
import utils
from conftest import EXAMPLES, ROOT, load, make_run, watch
from experiment import OPEN, Range, Recipe, Training, fingerprint
from fast import on_all_devices, place
from flax import nnx
from matplotlib.figure import Figure

# %% Flags


@dataclasses.dataclass(frozen=True)
class Config:
    """For the tests below."""

    learning_rate: Annotated[float, Range(0, low_excluded=True)] = 0.1
    """How fast."""
    epochs: Annotated[int | None, Range(0, 10_000), OPEN] = None
    """How long (default: by the weather)."""
    labels: Annotated[int | Literal["all"] | None, Range(10), OPEN] = None
    """How many."""
    alphas: tuple[Annotated[float, Range(0, 1)], ...] = (0.0, 0.5)
    """Weights of the labels."""
    schedule: Literal["onecycle", "constant"] = "onecycle"
    """In which way."""
    quick: bool = False
    """Whether to hurry."""
    cache: bool = True
    """Whether to keep."""


def test_flags(capsys):
    assert experiment.parse(Config, []) == Config()
    given = ["--learning-rate", "1e-3", "--epochs", "3", "--labels", "20", "--quick", "--no-cache"]
    want = Config(1e-3, 3, 20, quick=True, cache=False)
    assert experiment.parse(Config, given) == want
    assert experiment.parse(Config, ["--labels", "all"]).labels == "all"
    assert experiment.parse(Config, ["--alphas", "1", "0.25"]).alphas == (1.0, 0.25)
    with pytest.raises(SystemExit) as stopped:
        experiment.parse(Config, ["--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "How fast. (default: 0.1)" in shown
    assert "How long (default: by the weather)." in shown
    assert "None" not in shown
    for wrong in (["--epoch", "3"], ["--epochs", "x"], ["--unknown"], ["--schedule", "linear"]):
        with pytest.raises(SystemExit) as stopped:
            experiment.parse(Config, wrong)
        assert stopped.value.code == 2
        assert wrong[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rate": 0.0}, "--learning-rate 0.0: must be a finite number above 0"),
        ({"learning_rate": float("inf")}, "--learning-rate inf: must be a finite number above 0"),
        ({"learning_rate": float("nan")}, "--learning-rate nan: must be a finite number above 0"),
        ({"epochs": -1}, "--epochs -1: must be from 0 to 10,000"),
        ({"labels": 9}, "--labels 9: must be 10 or more, or all"),
        ({"labels": "many"}, "--labels many: must be one of 10 or more, all"),
        ({"alphas": (0.5, 2.0)}, "--alphas 2.0: must be from 0 to 1"),
        ({"alphas": (0.5, 0.5)}, "--alphas: must not repeat a value"),
        ({"schedule": "linear"}, "--schedule linear: must be one of onecycle, constant"),
        ({"schedule": ""}, "--schedule: must not be empty"),
        ({"alphas": ()}, "--alphas: must not be empty"),
    ],
)
def test_values_are_checked_from_other_code_too(wrong, message):
    with pytest.raises(utils.UserError) as refused:
        experiment.check_flags(Config(**wrong))
    assert str(refused.value) == message


def test_values_that_are_allowed():
    for right in ({"labels": 10}, {"labels": "all"}, {"epochs": 0}, {"alphas": (0.0, 1.0)}, {}):
        experiment.check_flags(Config(**right))


def test_with_defaults_fills_in_what_was_left_open():
    filled = experiment.with_defaults(Config(epochs=0), epochs=5, labels=30)
    assert (filled.epochs, filled.labels) == (0, 30)


@pytest.mark.parametrize(
    ("switch", "value"),
    [
        (jax.numpy_rank_promotion, "raise"),
        (jax.numpy_dtype_promotion, "strict"),
        (jax.transfer_guard, "disallow"),
    ],
)
def test_switches_of_jax_with_which_nothing_runs_are_refused(switch, value):
    experiment._check_switches()
    with switch(value), pytest.raises(utils.UserError, match=f"={value}: Flax does not run with"):
        experiment._check_switches()


# %% Fingerprints

SCRIPT = '''
import functools
import jax
import numpy as np
import optax
import utils
from flax import nnx
from package import losses
from utils import take_labels
import package.networks

WEIGHT = {"a": 1.0}
OTHER = {3, 1, 2}


class Net(nnx.Module):
    """A network."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.layer(x) * 2


def loss(x):
    """The loss."""
    # as in the paper
    return (x**2).mean() * WEIGHT["a"]


@nnx.jit
def step(model, x, kinds=("a", "b")):
    if x.shape in {(1,), (2,)}:
        return 0
    return nnx.grad(lambda model: loss(model(x)))(model)


@functools.cache
def rate(x=0.1):
    return x


def doubled(f):
    @functools.wraps(f)
    def wrapper(x):
        return 2 * f(x)

    return wrapper


@doubled
def penalty(x):
    return x + losses.weight_decay(x) + package.networks.width()


def unused():
    return 1


def train(images, rate_of=rate):
    model = Net(nnx.Rngs(0))
    utils.batches(take_labels(images, 3, 0), 2, 0, 1)
    jax.vmap(penalty, in_axes=0)(images)
    return step(model, images)
'''

PACKAGE = {
    "__init__.py": "",
    "losses.py": "def weight_decay(x):\n    return 0.1 * x\n\n\ndef unused(x):\n    return x\n",
    "networks.py": "from package import losses\n\n\ndef width():\n    return losses.unused(32)\n",
}


def code_of(text, tmp_path, monkeypatch, **package):
    """The fingerprint of `train`, beside a package of the user's."""
    (tmp_path / "package").mkdir(exist_ok=True)
    for file, content in (PACKAGE | package).items():
        (tmp_path / "package" / file).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "package"]:
        monkeypatch.delitem(sys.modules, name)
    shutil.rmtree(tmp_path / "package" / "__pycache__", ignore_errors=True)
    (tmp_path / "learner.py").touch()
    module = load(tmp_path / "learner.py", text, "learner")
    return fingerprint(module.train)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('    """The loss."""\n', ""),
        ('    """A network."""\n', '    """A small network."""\n'),
        ("    # as in the paper\n", ""),
        ("    # as in the paper\n", "\n\n    # but not quite\n"),
        ("return (x**2).mean() *", "return (\n        x ** 2\n    ).mean() *"),
        ("    return 1\n", "    return 2\n"),
        ("\nWEIGHT", "\n\n\nWEIGHT"),
    ],
)
def test_comments_formatting_and_what_is_not_used_do_not_count(tmp_path, monkeypatch, old, new):
    assert SCRIPT.count(old) == 1
    before = code_of(SCRIPT, tmp_path, monkeypatch)
    assert before == code_of(SCRIPT.replace(old, new), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x**2", "x**4"),  # a function that a jitted function uses
        ('"a": 1.0', '"a": 2.0'),  # a constant
        ("nnx.Linear(3, 2, rngs=rngs)", "nnx.Linear(3, 2, use_bias=False, rngs=rngs)"),
        ("self.layer(x) * 2", "self.layer(x) * 3"),  # a method
        ("x=0.1", "x=0.2"),  # a default value
        ("nnx.Rngs(0)", "nnx.Rngs(1)"),
        ("take_labels(images, 3, 0)", "take_labels(images, 3, 1)"),
        ("nnx.grad(lambda model: loss(model(x)))", "nnx.grad(lambda model: -loss(model(x)))"),
        ("{(1,), (2,)}", "{(1,), (3,)}"),
        ('kinds=("a", "b")', 'kinds=("a", "c")'),
        ("2 * f(x)", "3 * f(x)"),  # a decorator of the user's own
        ("x + losses.weight_decay", "x - losses.weight_decay"),  # what it decorates
        ("in_axes=0", "in_axes=1"),
    ],
)
def test_what_a_training_does_counts(tmp_path, monkeypatch, old, new):
    assert SCRIPT.count(old) == 1
    before = code_of(SCRIPT, tmp_path, monkeypatch)
    assert before != code_of(SCRIPT.replace(old, new), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("file", "old", "new", "same"),
    [
        ("losses.py", "0.1 * x", "0.2 * x", False),  # from package import losses
        ("networks.py", "unused(32)", "unused(64)", False),  # import package.networks
        ("losses.py", "return x", "return x + 1", False),  # of another module of the package
        ("losses.py", "0.1 * x", "0.1 * x  # a little", True),
        ("__init__.py", "", "VERSION = 2", True),
    ],
)
def test_an_edit_of_a_package_beside_counts(tmp_path, monkeypatch, file, old, new, same):
    before = code_of(SCRIPT, tmp_path, monkeypatch)
    edited = PACKAGE[file].replace(old, new) if old else new
    after = code_of(SCRIPT, tmp_path, monkeypatch, **{file: edited})
    assert (before == after) == same


def test_an_edit_of_the_modules_beside_counts(tmp_path, monkeypatch):
    before = code_of(SCRIPT, tmp_path, monkeypatch)
    text = (EXAMPLES / "utils.py").read_text()
    changed = load(EXAMPLES / "utils.py", text.replace("[seed, 2, epoch]", "[seed, 3, epoch]"), "u")
    monkeypatch.setattr(utils, "batches", changed.batches)
    assert code_of(SCRIPT, tmp_path, monkeypatch) != before


def test_fingerprints_are_the_same_in_every_process():
    """Of the training functions of every script: otherwise nothing would ever be taken up again."""
    program = f"""
import sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(EXAMPLES)!r}]
import conftest, experiment
for script in conftest.SCRIPTS:
    module = conftest.load(conftest.EXAMPLES / script)
    for name, value in sorted(vars(module).items()):
        own = getattr(value, "__module__", "") == module.__name__
        if own and name.startswith(("train_", "align_")):
            print(script, name, experiment.fingerprint(value))
"""
    found = []
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
        )
        found.append(done.stdout.splitlines())
    assert len(found[0]) > 40
    assert found[0] == found[1]


def test_values_have_fingerprints_of_their_own():
    values = [
        1, 1.0, True, "1", None, [1], (1,), {"a": 1}, {"a": 2}, {"b": 1}, np.zeros(2),
        np.zeros(3), np.zeros(2, np.float32), np.zeros((2, 1)), np.ones(2), len, dict,
        functools.partial(int, base=2), functools.partial(int, base=3),
        nnx.Linear(1, 1, rngs=nnx.Rngs(0)), nnx.Linear(1, 1, rngs=nnx.Rngs(1)), 1e-3, 1e-4,
        optax.adam(1e-3), optax.adam(1e-2), optax.sgd(1e-3), range(3), range(4), slice(3), max, min,
    ]  # fmt: skip
    found = [fingerprint(value) for value in values]
    assert len(set(found)) == len(values)
    assert found == [fingerprint(value) for value in values]
    assert fingerprint(jnp.zeros(2)) == fingerprint(np.zeros(2, np.float32))


# %% Trainings


def few(data, count=128):
    return data._replace(train=data.train.take(slice(count)), test=data.test.take(slice(20)))


def train(kd, run, recipe, stop_in=None, train_step=None, temperature=1.0):
    """A student of few steps, and its Training. Its code is the same for every call."""
    data = run.data
    model = kd.StudentCNN(rngs=nnx.Rngs(recipe.seed))
    optimizer = kd.make_optimizer(model, recipe, len(data.train.label))
    training = Training(run, "student", model, optimizer, recipe, data.train)
    for epoch in training.epochs():
        if epoch == stop_in:
            break
        for batch in utils.batches(data.train, recipe.batch_size, recipe.seed, epoch):
            training.log((train_step or kd.train_step)(model, optimizer, batch))
    return model, training


def test_short_epochs_have_no_checkpoint(tmp_path, kd, digits, monkeypatch):
    """Of 5 epochs of which the last 3 end sooner than a pause: checkpoints after epochs 1, 2 and 5.
    Stopped in epoch 4, it goes on after epoch 2, to the same bits."""
    recipe = Recipe(0, 5, 64, 1e-3, "constant")
    saved, seen, save = [], [], Training._save
    monkeypatch.setattr(
        Training, "_save", lambda self: (saved.append(len(self.history)), save(self))
    )
    begin = Training._begin_epoch

    def spy(training, epoch):
        seen.append(epoch)
        monkeypatch.setattr(experiment, "CHECKPOINT_PAUSE", 0 if epoch <= 2 else 1e9)
        begin(training, epoch)

    monkeypatch.setattr(Training, "_begin_epoch", spy)
    data = few(digits, 64)
    whole, _ = train(kd, make_run(tmp_path / "a", data), recipe)
    assert (seen, saved) == ([1, 2, 3, 4, 5], [1, 2, 5])
    train(kd, make_run(tmp_path / "b", data), recipe, stop_in=4)
    # The argument stop_in is not the same: so is the checkpoint's name. It is brought to mind.
    monkeypatch.setattr(Training, "_begin_epoch", begin)
    [path] = (tmp_path / "b" / "checkpoints").glob("*.npz")
    wanted = Training
    seen.clear()
    run = make_run(tmp_path / "b", data)

    class Renamed(wanted):
        def __init__(self, *arguments):
            super().__init__(*arguments, sys._getframe(1))
            path.rename(self.path)

    monkeypatch.setitem(globals(), "Training", Renamed)
    monkeypatch.setattr(Training, "_begin_epoch", spy)
    stopped, training = train(kd, run, recipe)
    assert seen == [3, 4, 5]
    assert [record["epoch"] for record in training.history] == [1, 2, 3, 4, 5]
    assert fingerprint(stopped) == fingerprint(whole)


@pytest.fixture
def trained(tmp_path, kd, digits):
    """A student of one epoch, its Training, and the function that trains it again."""
    recipe = Recipe(0, 1, 64, 1e-3, "constant")
    again = functools.partial(train, kd, make_run(tmp_path, few(digits)), recipe)
    return *again(), again


def test_changed_bytes_do_not_load(trained):
    """Wherever a byte of a checkpoint changes, it is refused, or loads as it was written."""
    model, training, again = trained
    before, refused = fingerprint(model), 0
    content = training.path.read_bytes()
    for place_ in np.random.default_rng(0).integers(0, len(content), 60):
        changed = bytearray(content)
        changed[place_] ^= 1
        training.path.write_bytes(bytes(changed))
        try:
            other, _ = again()
        except utils.UserError:
            refused += 1
        else:
            assert fingerprint(other) == before
    assert refused > 40
    for cut in (0, 1, len(content) // 2, len(content) - 1):
        training.path.write_bytes(content[:cut])
        with pytest.raises(utils.UserError, match=r"damaged.*move it away to train anew"):
            again()


def test_a_long_title_is_not_cut_off(tmp_path, digits):
    figure = Figure(figsize=(plots.WIDTH, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title("Same view over baseline: " + ", ".join(["no difference found"] * 5))
    make_run(tmp_path, digits).save_figure(figure, "figure.png")
    title = axes.title.get_window_extent()
    assert figure.bbox.x0 <= title.x0 < title.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= title.y0 < title.y1 <= figure.bbox.y1


def test_a_changed_record_does_not_load(trained):
    """A file's record has a checksum, as everything in it."""
    _, training, again = trained
    content = training.path.read_bytes()
    at = content.index(b'"history"')
    training.path.write_bytes(content[:at] + b'"histery"' + content[at + 9 :])
    with pytest.raises(utils.UserError, match="damaged"):
        again()


def test_other_settings_images_or_teachers_are_other_trainings(tmp_path, kd, digits):
    data, recipe = few(digits), Recipe(0, 1, 64, 1e-3, "constant")
    other_images = data._replace(train=digits.train.take(slice(100, 228)))
    paths = set()
    for data_, recipe_, more in (
        (data, recipe, {}),
        (data, recipe._replace(seed=1), {}),
        (data, recipe._replace(learning_rate=2e-3), {}),
        (data, recipe, {"temperature": 2.0}),
        (other_images, recipe, {}),
    ):
        run = make_run(tmp_path, data_)
        paths.add(train(kd, run, recipe_, **more)[1].path)
    assert len(paths) == 5
    teachers = [kd.TeacherCNN(rngs=nnx.Rngs(seed)) for seed in (0, 1)]
    labelled = data.train
    found = set()
    for teacher in teachers:
        run = make_run(tmp_path, data)
        student = kd.train_student_with_distillation(
            teacher, data, labelled, recipe._replace(epochs=0), run
        )
        found.add(run.training_of(student).path)
    assert len(found) == 2


def test_a_training_in_float64_is_another_one(tmp_path, kd, digits):
    recipe = Recipe(0, 0, 64, 1e-3, "constant")
    paths = set()
    for x64 in (False, True):
        with jax.enable_x64(x64):
            paths.add(train(kd, make_run(tmp_path, few(digits)), recipe)[1].path)
    assert len(paths) == 2


def test_edited_code_is_trained_anew_and_says_so(tmp_path, kd, digits, capsys):
    """Change the loss, run again in the same folder: the old numbers are not those of the new
    code. A changed comment changes nothing, and the teacher, whose code is the same, is kept."""
    source = (EXAMPLES / "15_knowledge_distillation.py").read_text()
    config = kd.Config(
        dataset="digits", output_dir=str(tmp_path), seeds=1, labels=40, epochs=1,
        teacher_epochs=1, batch_size=20,
    )  # fmt: skip
    edits = {
        "as it was": ("", ""),
        "comment": ("# total = α · hard", "# the total = α · hard"),
        "loss": ("return alpha * hard", "return 2 * alpha * hard"),
    }
    names = {}
    for edit, (old, new) in edits.items():
        assert not old or source.count(old) == 1
        module = load(EXAMPLES / "15_knowledge_distillation.py", source.replace(old, new), "edited")
        capsys.readouterr()
        _, trainings = watch(module, few(digits), config)
        printed = capsys.readouterr().out
        names[edit] = [x.name for x in trainings if x.batches]
        assert ("has changed since" in printed) == (edit == "loss")
        assert printed.count("Trained before") == {"as it was": 0, "comment": 3, "loss": 2}[edit]
    assert names["as it was"] == ["teacher", "distilled", "baseline"]
    assert names["comment"] == []
    assert names["loss"] == ["distilled"]


def test_a_checkpoint_comes_back_to_the_devices_of_its_network(kd, digits, tmp_path):
    recipe = Recipe(0, 1, 16, 1e-3, "constant")
    data = few(digits, 16)

    def devices(model):
        leaves = [x for x in nnx.to_flat_state(nnx.state(model)).leaves]
        return {len(x[...].sharding.device_set) for x in leaves}

    first, again = (kd.train_teacher(data, recipe, make_run(tmp_path, data)) for _ in range(2))
    assert fingerprint(first) == fingerprint(again)
    assert devices(first) == devices(again)
    assert devices(again) != {1}
    for _ in range(2):
        student = kd.train_student_baseline(data, data.train, recipe, make_run(tmp_path, data))
        assert devices(student) == {1}


def test_networks_trained_together_share_a_checkpoint(tmp_path, kd, digits, monkeypatch):
    """Two networks, a metric for each, no score: stopped after one epoch, the run goes on."""
    data = few(digits)
    monkeypatch.setattr(experiment, "CHECKPOINT_PAUSE", 0)

    def train_both(folder, stop_after):
        run = make_run(tmp_path / folder, data)
        run.stop_after = stop_after  # what is read from the run does not count
        return train_two(run)

    def train_two(run):
        models = tuple(kd.StudentCNN(rngs=nnx.Rngs(i)) for i in range(2))
        recipe = Recipe(0, 2, 64, 1e-3, "constant")
        optimizers = tuple(kd.make_optimizer(model, recipe, 128) for model in models)
        training = Training(run, "both", models, optimizers, recipe, data.train)
        for epoch in training.epochs():
            if epoch > run.stop_after:
                break
            for batch in utils.batches(data.train, 64, 0, epoch):
                both = [kd.train_step(*pair, batch) for pair in zip(models, optimizers)]  # noqa: B905
                training.log({"loss": jnp.stack([x["loss"] for x in both])})
        return [fingerprint(model) for model in models], training.history

    whole, history = train_both("whole", 2)
    train_both("stopped", 1)
    [path] = (tmp_path / "stopped" / "checkpoints").iterdir()
    again, history_again = train_both("stopped", 2)
    assert [path] == list((tmp_path / "stopped" / "checkpoints").iterdir())
    assert again == whole
    assert [r["loss"] for r in history_again] == [r["loss"] for r in history]
    assert len(history[0]["loss"]) == 2
    assert "test_accuracy" not in history[-1]


def test_about_ten_lines_and_scores_a_training(tmp_path, kd, digits, capsys):
    data = few(digits, 20)
    run = make_run(tmp_path, data)
    recipe = Recipe(0, 60, 20, 1e-3, "constant")
    scored = []

    def score():
        scored.append(len(scored))
        return 0.5

    def train_and_score():
        model = kd.StudentCNN(rngs=nnx.Rngs(0))
        optimizer = kd.make_optimizer(model, recipe, 20)
        training = Training(run, "student", model, optimizer, recipe, data.train)
        for epoch in training.epochs():
            for batch in utils.batches(data.train, 20, 0, epoch):
                training.log(kd.train_step(model, optimizer, batch))
            training.score("test", score)
        return training

    training = train_and_score()
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("Epoch")]
    assert len(lines) == len(scored) == 10
    assert lines[-1].startswith("Epoch 60/60 | Test Acc: 0.5000 | Loss: ")
    assert len(training.history) == 60
    assert sum("test_accuracy" in record for record in training.history) == 10


@pytest.mark.parametrize("classes", [3, 10])
def test_labels_without_a_logit_are_named(tmp_path, kd, digits, classes):
    """Not the learning rate: it has nothing to do with them."""
    data = few(digits)
    label = np.where(data.train.label == 0, 1, data.train.label) if classes == 3 else 0
    data = data._replace(train=data.train._replace(label=label + np.zeros(128, np.int32)))
    run, recipe = make_run(tmp_path, data), Recipe(0, 1, 64, 1e-3, "constant")
    network = types.SimpleNamespace(
        StudentCNN=functools.partial(kd.StudentCNN, classes), make_optimizer=kd.make_optimizer,
        train_step=kd.train_step,
    )  # fmt: skip
    if classes == 3:
        with pytest.raises(utils.UserError, match="labels 1 to 9 came, but 3 logits fit 0 to 2"):
            train(network, run, recipe)
        return
    with pytest.raises(utils.UserError, match="try a lower learning rate"):
        train(network, run, recipe._replace(learning_rate=1e30, epochs=2))


# %% Runs


def test_cached_teacher_logits_give_the_same_student(tmp_path, digits, kd):
    """Ten steps with the logits looked up, and with the teacher in the step."""
    teacher = place(kd.TeacherCNN(rngs=nnx.Rngs(1)), on_all_devices())
    labelled = utils.take_labels(digits.train, 80, 0)
    recipe = Recipe(3, 2, 16, 1e-4, "constant")
    results = []
    for cache in (True, False):
        run = make_run(tmp_path / str(cache), digits)
        student = kd.train_student_with_distillation(
            teacher, digits, labelled, recipe, run, cache_teacher=cache
        )
        results.append(utils.predict(student, digits.test))
        assert ("cache_seconds" in run.training_of(student).notes) == cache
    np.testing.assert_allclose(results[0], results[1], atol=2e-3)
    assert (results[0].argmax(-1) == results[1].argmax(-1)).mean() > 0.99


def test_alpha_1_is_the_baseline(tmp_path, digits, kd):
    """With alpha = 1 the teacher has no say: the distilled student is the baseline."""
    teacher = place(kd.TeacherCNN(rngs=nnx.Rngs(1)), on_all_devices())
    labelled = utils.take_labels(digits.train, 80, 0)
    recipe = Recipe(3, 2, 16, 1e-3, "onecycle")
    run = make_run(tmp_path, digits)
    distilled = kd.train_student_with_distillation(
        teacher, digits, labelled, recipe, run, alpha=1.0
    )
    baseline = kd.train_student_baseline(digits, labelled, recipe, run)
    logits = [utils.predict(model, digits.test) for model in (distilled, baseline)]
    np.testing.assert_allclose(*logits, atol=1e-3)


@pytest.fixture(scope="module")
def finished(kd, digits, tmp_path_factory):
    """A finished run of script 15: its folder, data and report."""
    folder = tmp_path_factory.mktemp("finished")
    config = kd.Config(
        dataset="digits", output_dir=str(folder), labels=40, epochs=1, teacher_epochs=1,
        batch_size=20, seeds=2,
    )  # fmt: skip
    data = few(digits, 200)
    report, trainings = watch(kd, data, config)
    return folder, data, report, {(x.name, x.recipe.seed): x.model for x in trainings}


def test_a_reader_can_use_the_student(kd, finished):
    folder, data, _, models = finished
    for seed in (42, 43):
        student = kd.StudentCNN(rngs=nnx.Rngs(5))
        loaded = experiment.load_network(folder, "distilled", student, seed=seed)
        assert loaded is student
        want = utils.predict(models["distilled", seed], data.test)
        np.testing.assert_array_equal(utils.predict(student, data.test), want)
        image = data.test.image[:3] / np.float32(255)
        np.testing.assert_allclose(student(image), want[:3], atol=1e-4)
    newest = experiment.load_network(folder, "distilled", kd.StudentCNN(rngs=nnx.Rngs(5)))
    np.testing.assert_array_equal(utils.predict(newest, data.test), want)


def test_networks_that_cannot_be_loaded(kd, finished, tmp_path):
    folder, *_ = finished
    fresh = kd.StudentCNN(rngs=nnx.Rngs(0))
    with pytest.raises(utils.UserError, match="has no weights of 'student'; it has baseline-42"):
        experiment.load_network(folder, "student", fresh)
    with pytest.raises(utils.UserError, match="has no weights of 'distilled'; it has none"):
        experiment.load_network(tmp_path / "nowhere", "distilled", fresh)
    with pytest.raises(utils.UserError, match=r"teacher-0\.npz: of another shape"):
        experiment.load_network(folder, "teacher", fresh)
    with pytest.raises(utils.UserError, match=r"distilled-43\.npz: of another shape"):
        experiment.load_network(folder, "distilled", kd.StudentCNN(5, rngs=nnx.Rngs(0)))


def test_the_summary_has_latency_and_size_of_teacher_and_student(finished):
    folder, _, report, _ = finished
    rows = {row["name"]: row for row in report["results"]}
    for name in ("teacher", "distilled"):
        assert rows[name]["latency_ms"].keys() == {"1", "128"}
        assert min(rows[name]["latency_ms"].values()) > 0
    assert rows["teacher"]["bytes"] == (folder / "weights" / "teacher-0.npz").stat().st_size
    # Four bytes a weight, and some for names, statistics and the record of the training.
    for name in ("teacher", "distilled"):
        assert 1 < rows[name]["bytes"] / (4 * rows[name]["params"]) < 1.1


def test_a_run_that_took_its_teacher_has_it_too(kd, finished, tmp_path):
    """--teacher runs/B, where B had taken its teacher from A."""
    folder, data, report, _ = finished
    config = kd.Config(dataset="digits", labels=40, epochs=0, batch_size=20)
    b = dataclasses.replace(config, output_dir=str(tmp_path / "b"), teacher=str(folder))
    c = dataclasses.replace(config, output_dir=str(tmp_path / "c"), teacher=str(tmp_path / "b"))
    want = report["results"][0]
    for config in (b, c):
        found, trainings = watch(kd, data, config)
        assert "teacher" not in [x.name for x in trainings]
        row = found["results"][0]
        for key in ("name", "seed", "test_errors", "settings", "history", "seconds"):
            assert row[key] == want[key]


@pytest.mark.parametrize(
    "case", ["nothing", "unfinished", "other data", "another shape", "damaged", "one array"]
)
def test_teachers_that_cannot_be_taken(kd, finished, tmp_path, case):
    folder, data, *_ = finished
    weights = tmp_path / "a" / "weights"
    if case != "nothing":
        weights.mkdir(parents=True)
    if case in ("other data", "damaged"):
        content = (folder / "weights" / "teacher-0.npz").read_bytes()
        content = content[: len(content) // 2] if case == "damaged" else content
        (weights / "teacher-0.npz").write_bytes(content)
    if case == "another shape":
        (weights / "teacher-0.npz").write_bytes((folder / "weights/baseline-42.npz").read_bytes())
    if case == "one array":  # as numpy.save writes it
        with open(weights / "teacher-0.npz", "wb") as file:
            np.save(file, np.zeros(3))
    config = kd.Config(teacher=str(tmp_path / "a"))
    run = make_run(tmp_path / "b", data, config)
    split = data.train.take(slice(100)) if case == "other data" else data.train
    with pytest.raises(utils.UserError) as refused:
        run.take_teacher(kd.TeacherCNN(rngs=nnx.Rngs(0)), split)
    assert {
        "nothing": "no finished run has left a teacher in",
        "unfinished": "no finished run has left a teacher in",
        "other data": "it was trained on other images than the 100 of this run",
        "another shape": "of another shape",
        "damaged": "damaged",
        "one array": "damaged",
    }[case] in str(refused.value)
    assert str(tmp_path / "a") in str(refused.value)


def test_of_several_teachers_the_seed_chooses(kd, digits, tmp_path):
    """Not their age: seed 3 is the newest here."""
    data = few(digits)
    teachers = {}
    for seed in (5, 3):
        run = make_run(tmp_path / "a", data)
        teacher = kd.train_teacher(data, Recipe(seed, 1, 128, 1e-3, "constant"), run)
        teachers[seed] = utils.predict(teacher, data.test)

    def taken(teacher_seed):
        config = kd.Config(teacher=str(tmp_path / "a"), teacher_seed=teacher_seed)
        run = make_run(tmp_path / "b", data, config)
        teacher = run.take_teacher(kd.TeacherCNN(rngs=nnx.Rngs(0)), data.train)
        return utils.predict(teacher, data.test)

    for seed, logits in teachers.items():
        np.testing.assert_array_equal(taken(seed), logits)
    with pytest.raises(utils.UserError, match="--teacher-seed must be one of 3, 5"):
        taken(0)
    (tmp_path / "a" / "weights" / "teacher-3.npz").unlink()
    np.testing.assert_array_equal(taken(0), teachers[5])  # the only one, whatever its seed


def test_seconds_of_an_epoch_are_those_of_its_steps(kd, digits, tmp_path, monkeypatch):
    """Scoring and what follows is not in them, but in the seconds of the training."""
    now = [0.0]
    monkeypatch.setattr(experiment.time, "perf_counter", lambda: now[0])
    data, recipe = few(digits, 32), Recipe(0, 3, 16, 1e-3, "constant")
    run = make_run(tmp_path, data)
    model = kd.StudentCNN(rngs=nnx.Rngs(0))
    optimizer = kd.make_optimizer(model, recipe, 32)

    def score():
        now[0] += 100
        return 0.5

    def train(recipe):
        training = experiment.Training(run, "x", model, optimizer, recipe, data.train)
        for _ in training.epochs():
            for _ in range(2):
                now[0] += 1
                training.log({"loss": jnp.float32(1)})
            training.score("test", score)
        return training

    training = train(recipe)
    assert [record["seconds"] for record in training.history] == [2, 2, 2]
    assert training.seconds == 3 * 102


def test_a_second_main_in_one_process_reports_its_own_time(kd, finished, monkeypatch):
    _, data, report, _ = finished
    now = [1000.0]
    run = make_run(Path(report["config"]["output_dir"]), data)
    run._started = now[0]
    monkeypatch.setattr(experiment.time, "perf_counter", lambda: now[0] + 7)
    assert run._seconds()["total"] == 7
    assert "first_step" not in run._seconds(), "no step was made"


def test_the_folder_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = experiment._take_folder("~/runs/a")
    assert folder == tmp_path / "runs" / "a"
    assert (folder / "weights").is_dir()
    experiment._take_folder("~/runs/a")  # again, in the same process

    def no_locks(*_, **__):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
    experiment._take_folder("~/runs/b")
    assert "knows no locks" in capsys.readouterr().err


def test_write_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    experiment.write_whole(path, b"old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(experiment.os, "fsync", fail)
    with pytest.raises(utils.UserError, match=r"results\.json: cannot be written \(disk full\)"):
        experiment.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]


def test_committed_results_hold_no_path():
    for path in (ROOT / "docs" / "results").rglob("*.json"):
        text = path.read_text()
        assert "/" not in json.loads(text).get("config", {}).get("output_dir", ""), path
        assert "/home/" not in text
        assert "/tmp/" not in text


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("temperature", "3"),
        ("seeds", 2.5),
        ("epochs", 2.5),
        ("labels", 12.7),
        ("quick", "no"),
        ("output_dir", Path("out")),
        ("seed", np.int64(3)),
        ("alpha", np.float32(0.5)),
    ],
)
def test_a_value_of_a_wrong_type_is_refused(kd, flag, value):
    with pytest.raises(utils.UserError, match=f"--{flag.replace('_', '-')} ") as refused:
        experiment.check_flags(kd.Config(**{flag: value}))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("labels", [(100, None), (100, 2.5), ("all", "few")])
def test_a_later_value_of_a_wrong_type_is_refused(labels):
    limited = load(EXAMPLES / "16_limited_labels.py")
    with pytest.raises(utils.UserError, match="--labels "):
        experiment.check_flags(limited.Config(labels=labels))


def test_values_of_numpy_that_are_python_s_too_are_taken(kd):
    experiment.check_flags(kd.Config(alpha=np.float64(0.5)))


class Augment:
    """Something of the user's, with an attribute."""

    def __init__(self, strength):
        self.strength = strength


class Mode(enum.Enum):
    A = 1
    B = 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Augment(0.1), Augment(0.5)),
        (Mode.A, Mode.B),
        (np.add, np.subtract),
        (np.array([None, 1], object), np.array([None, 2], object)),
    ],
)
def test_values_of_one_type_are_told_apart(one, other):
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(one)


def test_a_method_of_a_tuple_s_class_counts():
    def split_with(body):
        names = {}
        exec(f"class Split(tuple):\n    def take(self): return {body}", names)
        names["Split"].__module__ = "__main__"
        return names["Split"]((1, 2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "_is_of_user", lambda value: True)
        assert fingerprint(split_with("self")) == fingerprint(split_with("self"))
        assert fingerprint(split_with("self")) != fingerprint(split_with("self[0]"))


def test_arguments_of_every_kind_tell_trainings_apart(kd, digits, tmp_path):
    data, recipe = few(digits, 32), Recipe(0, 1, 16, 1e-3, "constant")
    run = make_run(tmp_path, data)
    model = kd.StudentCNN(rngs=nnx.Rngs(0))

    def by_keyword(recipe, **options):
        return experiment.Training(run, "x", model, None, recipe, data.train).path

    def by_place(recipe, *options):
        return experiment.Training(run, "x", model, None, recipe, data.train).path

    def enclosed(alpha):
        def train(recipe):
            assert alpha
            return experiment.Training(run, "x", model, None, recipe, data.train).path

        return train(recipe)

    assert by_keyword(recipe, alpha=0.1) != by_keyword(recipe, alpha=0.9)
    assert by_place(recipe, 0.1) != by_place(recipe, 0.9)
    assert enclosed(0.1) != enclosed(0.9)
    assert by_place(recipe, 0.1) == by_place(recipe, 0.1)
