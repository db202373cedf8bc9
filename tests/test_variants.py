"""The scripts after 15: bad input."""

import pytest
from conftest import EXAMPLES, load, refuse

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
# Of each script, beside these.
OWN = {
    "advanced/knowledge_distillation.py": [
        ["--temperatures", "0"], ["--temperatures"], ["--alphas", "0.5", "2"],
        ["--alphas", "1", "1"], ["--seeds", "1"], ["--test-seeds", "0"],
        ["--validation", "2000"], ["--validation", "0"], ["--teacher", "nowhere"],
    ],
    "advanced/temperature.py": [
        ["--temperatures", "0"], ["--holdout", "5000"], ["--teacher", "nowhere"],
    ],
    "16_limited_labels.py": [
        ["--temperature", "0"], ["--alpha", "2"], ["--seeds", "1"], ["--labels", "50", "50"],
        ["--labels", "1297", "all"], ["--batch-size", "1"], ["--holdout", "5000"],
        ["--teacher", "nowhere"], ["--schedule", "linear"],
    ],
    "21_feature_distillation.py": [
        ["--temperature", "0"], ["--alpha", "2"], ["--methods", "logits"],
        ["--methods", "hints", "hints"], ["--weight", "-1"], ["--holdout", "5000"],
        ["--teacher", "nowhere"], ["--schedule", "linear"],
    ],
    "22_architectures.py": [
        ["--temperature", "0"], ["--alpha", "2"], ["--teachers", "cnm"], ["--students"],
        ["--teachers", "mlp", "mlp"], ["--students", "mlp", "mlp"], ["--teacher-epochs", "-1"],
        ["--teacher-learning-rate", "0"], ["--holdout", "5000"],
    ],
    "23_compress_and_deploy.py": [
        ["--temperature", "0"], ["--alpha", "2"], ["--sparsities", "0"], ["--sparsities", "1"],
        ["--sparsities", "0.5", "0.5"], ["--sparsities"], ["--compression-epochs", "0"],
        ["--compression-learning-rate", "0"], ["--holdout", "5000"], ["--teacher", "nowhere"],
        ["--seeds", "0"],
    ],
    "26_patient_teacher.py": [
        ["--temperature", "0"], ["--alpha", "2"], ["--ways", "view"], ["--ways", "same", "same"],
        ["--epochs", "0"], ["--epochs", "5", "5"], ["--mixup", "0"], ["--holdout", "5000"],
        ["--teacher", "nowhere"], ["--ways"],
    ],
    "25_hinton_2015.py": [
        ["--temperature", "0"], ["--temperatures", "0"], ["--units", "0"], ["--alpha", "2"],
        ["--temperatures", "20", "20.0000000000001"],
        ["--teacher-epochs", "-1"], ["--teacher-learning-rate", "0"], ["--holdout", "5000"],
        ["--input-dropout", "1"], ["--dropout", "-0.1"], ["--max-norm", "0"],
        ["--baseline-learning-rate", "0"],
    ],
    "advanced/controls.py": [
        ["--temperature", "0"], ["--alpha", "2"], ["--seeds", "1"], ["--smoothings", "1"],
        ["--smoothings", "0.1", "0.1"], ["--validation", "2000"], ["--teacher", "nowhere"],
    ],
    "17_ensemble_distillation.py": [
        ["--temperature", "0"], ["--alpha", "2"], ["--teachers", "1"], ["--teacher-labels", "5"],
        ["--teacher-labels", "5000"], ["--teacher-epochs", "-1"], ["--holdout", "5000"],
    ],
    "18_self_distillation.py": [
        ["--temperature", "0"], ["--alpha", "2"], ["--generations", "0"], ["--generations", "11"],
        ["--holdout", "5000"], ["--schedule", "linear"],
    ],
    "19_online_distillation.py": [
        ["--temperature", "0"], ["--alpha", "2"], ["--mutual-temperature", "0"],
        ["--teacher-learning-rate", "0"], ["--holdout", "5000"],
    ],
    "20_cross_modal_distillation.py": [
        ["--noise", "2"], ["--noise", "-1"], ["--noise", "0.1", "0.1"], ["--ambiguous", "1.5"],
        ["--holdout", "5000"],
    ],
}  # fmt: skip
REFUSED = [(script, flags) for script, own in OWN.items() for flags in [*COMMON, *own]]


@pytest.mark.parametrize(
    ("script", "flags"), REFUSED, ids=lambda x: x if type(x) is str else " ".join(x)
)
def test_flag(script, flags, monkeypatch, capsys, tmp_path):
    """A line that names the flag, status 2, and nothing trained before."""
    module = load(EXAMPLES / script, name="refusing")
    base = [script, "--dataset", "digits", "--quick", "--output-dir", tmp_path / "out"]
    output = refuse(module, base + flags, monkeypatch, capsys)
    assert flags[0] in output.err
    assert "Epoch" not in output.out
