"""Killed with SIGKILL in any phase and run again, a run ends with the same bits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import utils
from conftest import eager
from flax import nnx

SCRIPT = "15_knowledge_distillation.py"
FLAGS = ["--dataset", "digits", "--quick", "--teacher-epochs", "3", "--epochs", "6"]
FLAGS += ["--labels", "100"]
PHASES = ["TEACHER", "DISTILLED", "BASELINE"]


def command(folder):
    return [sys.executable, eager(folder.parent, SCRIPT), *FLAGS, "--output-dir", folder]


def run(folder):
    done = subprocess.run(command(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_until(folder, phase, epoch):
    """Starts the run and kills it just as it prints that epoch of that phase."""
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command(folder), stdout=subprocess.PIPE, text=True, env=env)
    inside = False
    for line in process.stdout:
        inside = inside or phase in line
        if inside and line.startswith(f"Epoch  {epoch}/"):
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL


def outcome(folder):
    """What a run left, without what is a matter of time."""

    def timeless(x):
        if isinstance(x, dict):
            untimed = {k: v for k, v in x.items() if "seconds" not in k and k != "clock"}
            return {k: timeless(v) for k, v in untimed.items()}
        return [timeless(y) for y in x] if isinstance(x, list) else x

    report = json.loads((folder / "results.json").read_text())
    del report["config"]["output_dir"]
    return timeless(report)


def check_same_end(killed, whole):
    """Both runs left the same results, and checkpoints with the same bits."""
    assert outcome(killed) == outcome(whole)
    want, got = weights(whole), weights(killed)
    assert want.keys() == got.keys()
    for key, leaf in want.items():
        assert leaf.tobytes() == got[key].tobytes(), key


def weights(folder):
    """The bytes of every model's and optimizer's last state, read back with Orbax."""
    import orbax.checkpoint as ocp

    found = {}
    for phase in sorted((folder / "checkpoints").iterdir()):
        with ocp.CheckpointManager(phase) as manager:
            names = {k: ocp.args.StandardRestore() for k in ("model", "optimizer")}
            state = manager.restore(manager.latest_step(), args=ocp.args.Composite(**names))
        for part in ("model", "optimizer"):
            for path, leaf in sorted(flat(state[part]).items()):
                found[phase.name, part, path] = leaf
    return found


def flat(tree, path=()):
    if isinstance(tree, dict):
        return {k: v for key in tree for k, v in flat(tree[key], (*path, str(key))).items()}
    if isinstance(tree, (list, tuple)):
        return {k: v for i, x in enumerate(tree) for k, v in flat(x, (*path, str(i))).items()}
    import jax

    is_key = hasattr(tree, "dtype") and jax.dtypes.issubdtype(tree.dtype, jax.dtypes.prng_key)
    return {path: np.asarray(jax.random.key_data(tree) if is_key else tree)}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    run(folder)
    return folder


@pytest.mark.parametrize("phase", PHASES)
def test_killed_and_run_again(uninterrupted, tmp_path, phase):
    folder = tmp_path / "out"  # where no other test's teacher lies beside it
    epoch = 2 if phase == "TEACHER" else 3
    run_until(folder, phase, epoch)
    assert not (folder / "results.json").exists()
    assert f"epoch {epoch} of" in run(folder)
    assert len(weights(uninterrupted)) > 60
    check_same_end(folder, uninterrupted)


def test_run_again_when_finished(uninterrupted):
    before = outcome(uninterrupted)
    text = run(uninterrupted)
    assert text.count("Trained before with these settings") == 3
    assert "Epoch" not in text
    assert outcome(uninterrupted) == before


@pytest.fixture
def trained(tmp_path, kd, digits):
    """A student of one epoch, its recipe and its Phase."""
    model = kd.StudentCNN(rngs=nnx.Rngs(0))
    recipe = kd.Recipe(0, 1, 64, 1e-3, "constant")
    optimizer = kd.make_optimizer(model, recipe, 128)
    phase = utils.Phase("baseline", tmp_path, recipe, digits)
    split = digits.train.take(slice(128))
    for epoch in phase.epochs(model, optimizer, lambda: 0.0):
        for batch in utils.batches(split, 64, 0, epoch):
            phase.log(kd.train_step(model, optimizer, batch))
    return model, recipe, phase


def test_short_epochs_have_no_checkpoint(tmp_path, kd, digits, monkeypatch):
    """Of 5 epochs of which the last 3 end sooner than a pause: checkpoints after epochs 1, 2 and 5.
    Stopped in epoch 4, it goes on after epoch 2, to the same bits."""
    recipe, split = kd.Recipe(0, 5, 64, 1e-3, "constant"), digits.train.take(slice(64))
    saved, save = [], utils.Phase._save

    def spy(phase, *arguments, **modules):
        saved.append(len(phase.history))
        save(phase, *arguments, **modules)

    monkeypatch.setattr(utils.Phase, "_save", spy)

    def train(folder, stop_in):
        model = kd.StudentCNN(rngs=nnx.Rngs(0))
        optimizer = kd.make_optimizer(model, recipe, 64)
        phase, seen = utils.Phase("student", folder, recipe, digits), []
        for epoch in phase.epochs(model, optimizer, None):
            seen.append(epoch)
            monkeypatch.setattr(utils.Phase, "PAUSE", 0 if epoch <= 2 else 1e9)
            if epoch == stop_in:
                break
            for batch in utils.batches(split, 64, 0, epoch):
                phase.log(kd.train_step(model, optimizer, batch))
        return model, phase, seen

    whole, _, seen = train(tmp_path / "a", None)
    assert (seen, saved) == ([1, 2, 3, 4, 5], [1, 2, 5])
    train(tmp_path / "b", 4)
    stopped, phase, seen = train(tmp_path / "b", None)
    assert seen == [3, 4, 5]
    assert [record["epoch"] for record in phase.history] == [1, 2, 3, 4, 5]
    assert utils.digest(stopped) == utils.digest(whole)


def test_changed_bytes_do_not_load(tmp_path, kd, digits, trained):
    """Wherever a byte of a checkpoint changes, it is refused, or loads as it was written."""
    model, recipe, phase = trained
    before, refused = utils.digest(model), 0
    data = [p for p in phase.folder.rglob("*") if p.is_file() and p.parent.name == "d"]
    rng = np.random.default_rng(0)
    for path in data:
        content = path.read_bytes()
        for place in rng.integers(0, len(content), 4):
            changed = bytearray(content)
            changed[place] ^= 1
            path.write_bytes(bytes(changed))
            other = kd.StudentCNN(rngs=nnx.Rngs(1))
            try:
                utils.Phase("baseline", tmp_path, recipe, digits).restore(model=other)
            except utils.UserError:
                refused += 1
            else:
                assert utils.digest(other) == before
            path.write_bytes(content)
    assert refused > 0


@pytest.mark.parametrize(
    ("key", "value"),
    [("settings", {}), ("history", []), ("seconds", "fast"), ("seconds", 0.5), ("notes", None)],
)
def test_a_changed_record_does_not_load(tmp_path, digits, trained, key, value):
    model, recipe, phase = trained
    [path] = phase.folder.glob("*/meta/metadata")
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {key: value}))
    with pytest.raises(utils.UserError, match="damaged"):
        utils.Phase("baseline", tmp_path, recipe, digits).restore(model=model)


def test_a_checkpoint_of_other_settings_does_not_load(tmp_path, digits, trained):
    model, recipe, phase = trained
    other = utils.Phase("baseline", tmp_path, recipe._replace(seed=1), digits)
    shutil.copytree(phase.folder, other.folder)
    with pytest.raises(utils.UserError, match="does not hold what was written"):
        other.restore(model=model)


def test_a_run_beside_that_cannot_be_used(tmp_path, kd, digits, trained):
    """Is passed over; but where a flag points to it, one line names the flag."""
    model, recipe, _ = trained
    shutil.move(tmp_path / "checkpoints", tmp_path / "a" / "checkpoints")
    beside = types.SimpleNamespace(output_dir=str(tmp_path / "b"))
    named = types.SimpleNamespace(baseline=str(tmp_path / "a"), output_dir=beside.output_dir)
    how = recipe, digits
    for config in (beside, named):
        found = kd.StudentCNN(rngs=nnx.Rngs(1))
        assert utils.find_run("baseline", found, *how, config)
        assert utils.digest(found) == utils.digest(model)
    with pytest.raises(utils.UserError, match=r"--baseline .*a: this script cannot use"):
        utils.find_run("baseline", kd.TeacherCNN(rngs=nnx.Rngs(0)), *how, named)
    [weights] = (tmp_path / "a").rglob("1/model")
    shutil.rmtree(weights)
    assert utils.find_run("baseline", kd.StudentCNN(rngs=nnx.Rngs(1)), *how, beside) is None
    with pytest.raises(utils.UserError, match=r"--baseline .*a: this script cannot use"):
        utils.find_run("baseline", kd.StudentCNN(rngs=nnx.Rngs(1)), *how, named)
