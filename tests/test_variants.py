"""The scripts after 15: bad input, and runs that are killed and started again."""

import json
import signal
import subprocess
import sys

import pytest
from conftest import EXAMPLES, eager, load, refuse
from test_resume import weights

COMMON = [
    ["--labels", "9"],
    ["--labels", "5000"],
    ["--batch-size", "5000"],
    ["--epochs", "-1"],
    ["--learning-rate", "0"],
    ["--seed", "-1"],
    ["--dataset", "imagenet"],
    ["--no-such-flag"],
]
# Of each script: flags that must be refused, and flags of a short run to be killed.
OWN = {
    "advanced/knowledge_distillation.py": (
        [["--temperatures", "0"], ["--temperatures"], ["--alphas", "0.5", "2"],
         ["--alphas", "1", "1"], ["--seeds", "1"], ["--test-seeds", "0"],
         ["--validation", "2000"], ["--validation", "0"], ["--teacher", "nowhere"]],
        ["--epochs", "3", "--labels", "40", "--seeds", "2", "--test-seeds", "2"],
    ),
    "advanced/temperature.py": (
        [["--temperatures", "0"], ["--holdout", "5000"], ["--teacher", "nowhere"]],
        None,  # it trains as script 15 does
    ),
    "16_limited_labels.py": (
        [["--temperature", "0"], ["--alpha", "2"], ["--seeds", "1"], ["--labels", "50", "50"],
         ["--labels", "1297", "all"], ["--batch-size", "1"], ["--holdout", "5000"],
         ["--teacher", "nowhere"], ["--schedule", "linear"]],
        ["--epochs", "3", "--labels", "40"],
    ),
    "25_hinton_2015.py": (
        [["--temperature", "0"], ["--temperatures", "0"], ["--units", "0"], ["--alpha", "2"],
         ["--teacher-epochs", "-1"], ["--teacher-learning-rate", "0"], ["--holdout", "5000"],
         ["--input-dropout", "1"], ["--dropout", "-0.1"],
         ["--max-norm", "0"]],
        ["--epochs", "2", "--teacher-epochs", "2", "--temperatures", "4"],
    ),
    "advanced/controls.py": (
        [["--temperature", "0"], ["--alpha", "2"], ["--seeds", "1"], ["--smoothings", "1"],
         ["--smoothings", "0.1", "0.1"], ["--validation", "2000"], ["--teacher", "nowhere"]],
        ["--epochs", "2", "--labels", "40"],
    ),
    "17_ensemble_distillation.py": (
        [["--temperature", "0"], ["--alpha", "2"], ["--teachers", "1"], ["--teacher-labels", "5"],
         ["--teacher-labels", "5000"], ["--teacher-epochs", "-1"], ["--holdout", "5000"]],
        ["--epochs", "3", "--labels", "40", "--teacher-labels", "200", "--teacher-epochs", "2"],
    ),
    "18_self_distillation.py": (
        [["--temperature", "0"], ["--alpha", "2"], ["--generations", "0"], ["--generations", "11"],
         ["--holdout", "5000"], ["--schedule", "linear"]],
        ["--epochs", "3", "--labels", "40"],
    ),
    "19_online_distillation.py": (
        [["--temperature", "0"], ["--alpha", "2"], ["--mutual-temperature", "0"],
         ["--teacher-learning-rate", "0"], ["--holdout", "5000"]],
        ["--epochs", "3", "--labels", "40"],
    ),
    "20_cross_modal_distillation.py": (
        [["--noise", "2"], ["--noise", "-1"], ["--noise", "0.1", "0.1"], ["--ambiguous", "1.5"],
         ["--holdout", "5000"]],
        ["--epochs", "1", "--labels", "100", "--noise", "0", "0.5"],
    ),
}  # fmt: skip
REFUSED = [(script, flags) for script, (own, _) in OWN.items() for flags in [*COMMON, *own]]


@pytest.mark.parametrize(
    ("script", "flags"), REFUSED, ids=lambda x: x if type(x) is str else " ".join(x)
)
def test_flag(script, flags, monkeypatch, capsys, tmp_path):
    """One line that names the flag, status 2, and nothing trained before."""
    module = load(EXAMPLES / script, name="refusing")
    base = [script, "--dataset", "digits", "--quick", "--output-dir", tmp_path / "out"]
    output = refuse(module, base + flags, monkeypatch, capsys)
    assert flags[0] in output.err
    assert "Epoch" not in output.out


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


@pytest.mark.parametrize("script", [script for script, (_, short) in OWN.items() if short])
def test_killed_and_run_again(script, tmp_path):
    """Killed in the middle and started again, a run ends with the same bits."""
    command = [sys.executable, eager(tmp_path, script), "--dataset", "digits", "--quick"]
    command += OWN[script][1]

    def run(folder):
        done = subprocess.run(
            [*command, "--output-dir", folder], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    whole, killed = tmp_path / "a" / "out", tmp_path / "b" / "out"  # no teacher of each other's
    epochs = run(whole).count("\nEpoch ")
    with subprocess.Popen(
        [*command, "--output-dir", killed], stdout=subprocess.PIPE, text=True
    ) as process:
        lines = (line for line in process.stdout if line.startswith("Epoch "))
        for _ in range(epochs // 2):
            next(lines)
        process.send_signal(signal.SIGKILL)
    assert not (killed / "results.json").exists()
    again = run(killed)
    assert 0 < again.count("\nEpoch ") < epochs
    assert outcome(killed) == outcome(whole)
    want, got = weights(whole), weights(killed)
    assert want.keys() == got.keys()
    for key, leaf in want.items():
        assert leaf.tobytes() == got[key].tobytes(), key
