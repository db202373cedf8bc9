"""Killed with SIGKILL in any phase and run again, a run ends with the same bits."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import SMALL, copy_script

SCRIPT = "15_knowledge_distillation.py"
FLAGS = [*SMALL, "--teacher-epochs", "3", "--epochs", "6", "--labels", "100"]
PHASES = ["TEACHER", "DISTILLED", "BASELINE"]


def command(folder):
    script = copy_script(folder.parent, SCRIPT, pause=0)
    return [sys.executable, script, *FLAGS, "--output-dir", folder]


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

    def is_of_time(key):
        words = ("seconds", "clock", "latency", "milliseconds", "bytes")
        return any(word in key for word in words)

    def timeless(x):
        if isinstance(x, dict):
            return {key: timeless(value) for key, value in x.items() if not is_of_time(key)}
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
    """All arrays in every training's last checkpoint and file of weights, as NumPy reads them."""
    found = {}
    for path in sorted(folder.rglob("*.npz")):
        with np.load(path) as file:
            for name in file.files:
                if name != "record":  # which has times
                    found[path.name, name] = file[name]
    return found


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
    assert f"Going on after epoch {epoch}: " in run(folder)
    assert len(weights(uninterrupted)) > 60
    check_same_end(folder, uninterrupted)


def test_run_again_when_finished(uninterrupted):
    before = outcome(uninterrupted)
    text = run(uninterrupted)
    assert text.count("Trained before: ") == 3
    assert "Epoch" not in text
    assert outcome(uninterrupted) == before
