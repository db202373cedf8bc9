"""Every script as a reader runs it: copied out beside its modules, with --quick, as a process."""

import ast
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import experiment
import filelock
import numpy as np
import pytest
import utils
from conftest import DATASET, EXAMPLES, MODULES, ROOT, SCRIPTS, SMALL, copy_script, load
from test_resume import check_same_end

# What may differ between scripts of the same name; all else is identical to the letter.
OWN = {"Config", "main", "fill_in_defaults", "draw"}
# Script 15 is killed in test_resume.py; 13, 14 and temperature train as it does.
KILLED = [x for x in SCRIPTS if x >= "16" and not x.endswith("temperature.py")]
# These take the teacher that script 13 left, which is trained once for all of them. Of the others
# with --teacher the teacher must not have seen all training images.
TAUGHT = ["16_limited_labels.py", "21_feature_distillation.py", "23_compress_and_deploy.py"]
TAUGHT += ["26_patient_teacher.py", "advanced/temperature.py"]
FEWER = {  # less than what is quick, where that takes long
    "16_limited_labels.py": "--labels 100",
    "17_ensemble_distillation.py": "--epochs 10 --teacher-epochs 1",
    "18_self_distillation.py": "--epochs 10",
    "19_online_distillation.py": "--epochs 10",
    "21_feature_distillation.py": "--epochs 20",
    "22_architectures.py": "--epochs 20 --teacher-epochs 2",
    "23_compress_and_deploy.py": "--epochs 10 --compression-epochs 3",
    "26_patient_teacher.py": "--epochs 5 20",
    "advanced/controls.py": "--epochs 5",
    "advanced/knowledge_distillation.py": "--epochs 10 --seeds 2 --test-seeds 2",
}
STRICT = {"PYTHONWARNINGS": "error::DeprecationWarning:__main__"}


@pytest.fixture(scope="module", autouse=True)
def fewer_images(tmp_path_factory):
    """MNIST's first 1,000 training and 500 test images, in the place of all: fewer than --quick
    takes, so that the scripts are run whole in less time."""
    if DATASET != "mnist":
        yield
        return
    folder = tmp_path_factory.mktemp("mnist")
    data = utils.load_data("mnist")
    for name in utils.FILES:
        split, count = (data.train, 1000) if name.startswith("train") else (data.test, 500)
        array = (split.image[..., 0] if "images" in name else split.label)[:count].astype(np.uint8)
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (folder / name).write_bytes(header + array.tobytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MNIST_DATA_DIR", str(folder))
        yield


def run(folder, *command, env=None):
    env = os.environ | STRICT | (env or {})
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip


def run_with_copies(folder, out, *command):
    """The same as `run`, and keeps what a kill after 2, 3, 4, 6, 9, … epochs, each half as many
    again as the last, would have left in `out`."""
    lines, epochs, next_copy = [], 0, 2
    command = [sys.executable, *map(str, command)]
    with (
        open(folder / "stderr.txt", "w+") as errors,
        subprocess.Popen(
            command, cwd=folder, env=os.environ | STRICT,
            stdout=subprocess.PIPE, stderr=errors, text=True,
        ) as process,
    ):  # fmt: skip
        for line in process.stdout:
            lines.append(line)
            epochs += line.startswith("Epoch ")
            if epochs == next_copy:
                next_copy = epochs * 3 // 2
                process.send_signal(signal.SIGSTOP)
                os.waitpid(process.pid, os.WUNTRACED)
                # Each in a folder of its own: with no teacher beside it.
                shutil.copytree(out, folder / f"killed_{epochs}" / "out")
                process.send_signal(signal.SIGCONT)
        process.wait()
        errors.seek(0)
        return subprocess.CompletedProcess(
            command, process.returncode, "".join(lines), errors.read()
        )


def check_quick_run(script, folder, done):
    """What a quick run prints, and leaves in its folder."""
    name = Path(script).name
    assert done.returncode == 0, done.stderr
    assert "SUMMARY" in done.stdout
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / "results.json").read_text())
    assert report["script"] == name
    assert report["dataset"]["name"] == DATASET
    assert {"config", "versions", "device", "seconds", "results"} <= set(report)
    assert report["dataset"]["test"] == 500
    for row in report["results"]:
        assert row["test_errors"] == round((1 - row["test_accuracy"]) * 500)
        if "shuffled" in row["name"]:
            assert row["test_accuracy"] < 0.3, "there is nothing to learn"
        elif not re.search("noise|weak teacher$|only 7s", row["name"]):
            assert row["test_accuracy"] > 0.3, "it learned something"
        if script < "16":  # the others have networks, ensembles and stacks of their own
            assert row["params"] == {"teacher": 946_954}.get(row["name"], 56_810)
            assert len(row["epoch_seconds"]) == len(row["history"]) > 0
    if script.endswith("controls.py"):
        assert all(report["alpha_1_is_baseline"])
        assert report["smoothing_errors"].keys() == {"0.1"}
    if script.startswith("15"):
        assert [row["name"] for row in report["results"]] == ["teacher", "distilled", "baseline"]
        assert report["results"][1]["cache_seconds"] > 0
        assert 0 <= report["results"][1]["mcnemar_p"] <= 1


def own_folder(script, tmp_path):
    return tmp_path / "runs" / script.removesuffix(".py").replace("/", "_")


@pytest.fixture(scope="module")
def run_of_13(fewer_images, tmp_path_factory):
    """The folder of a quick run of script 13, the same for all of pytest's processes."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    script = "13_teacher_training.py"
    folder = own_folder(script, shared)
    with filelock.FileLock(shared / "13.lock"):
        if not (folder / "results.json").exists():
            copy_script(shared, script)
            done = run(shared, script, "--quick", "--dataset", DATASET)
            check_quick_run(script, folder, done)
    return folder


def test_quick_run_of_13_leaves_a_teacher(run_of_13):
    assert (run_of_13 / "weights" / "teacher-0.npz").exists()


def named_teacher(script, request):
    """The flag for a teacher that is there already, where a script has one."""
    return ["--teacher", request.getfixturevalue("run_of_13")] if script in TAUGHT else []


WHOLE = [x for x in SCRIPTS if x not in KILLED and not x.startswith("13")]


@pytest.mark.parametrize("script", WHOLE)
def test_quick_run_copied_out(script, tmp_path, request):
    copy_script(tmp_path, script)
    command = [Path(script).name, "--quick", "--dataset", DATASET, *named_teacher(script, request)]
    check_quick_run(script, own_folder(script, tmp_path), run(tmp_path, *command))


@pytest.mark.parametrize("script", KILLED)
def test_quick_run_copied_out_killed_and_run_again(script, tmp_path, request):
    """What a kill in the middle leaves, run again, ends with the same bits."""
    command = [copy_script(tmp_path, script, pause=0.5), "--quick", "--dataset", DATASET]
    command += [*FEWER.get(script, "").split(), *named_teacher(script, request)]
    whole = own_folder(script, tmp_path)
    done = run_with_copies(tmp_path, whole, *command)
    check_quick_run(script, whole, done)
    epochs = done.stdout.count("\nEpoch ")
    kept = (int(path.name.removeprefix("killed_")) for path in tmp_path.glob("killed_*"))
    killed = tmp_path / f"killed_{max(count for count in kept if count < 0.8 * epochs)}" / "out"
    assert not (killed / "results.json").exists()
    again = run(tmp_path, *command, "--output-dir", killed)
    assert again.returncode == 0, again.stderr
    assert 0 < again.stdout.count("\nEpoch ") < epochs
    check_same_end(killed, whole)


def test_a_run_does_not_mind_flax_tree_mode(tmp_path):
    small = [*SMALL, "--epochs", "1", "--teacher-epochs", "1"]
    results = []
    for mode in ({}, {"NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false"}):
        folder = tmp_path / str(len(results))
        command = [EXAMPLES / "15_knowledge_distillation.py", *small, "--output-dir", folder]
        done = run(tmp_path, *command, env=mode)
        assert done.returncode == 0, done.stderr
        report = json.loads((folder / "results.json").read_text())
        results.append([row["validation_errors"] for row in report["results"]])
    assert results[0] == results[1]


def test_15_takes_the_teacher_that_13_left(run_of_13, tmp_path):
    command = ["--quick", "--dataset", DATASET, "--epochs", "1", "--teacher", run_of_13]
    taken = run(tmp_path, EXAMPLES / "15_knowledge_distillation.py", *command)
    assert f"Teacher: {run_of_13}/weights/teacher-0.npz" in taken.stdout, taken.stderr
    assert "TEACHER" in taken.stdout
    one, other = (
        json.loads((folder / "results.json").read_text())["results"][0]
        for folder in (run_of_13, tmp_path / "runs/15_knowledge_distillation")
    )
    for key in ("name", "seed", "test_errors", "history", "settings"):
        assert one[key] == other[key]


def test_a_named_teacher_is_one_that_was_trained_to_its_end(tmp_path):
    """Of two recipes in one folder, the newer one was stopped before its end."""
    script = copy_script(tmp_path, "13_teacher_training.py", pause=0)
    flags = [*SMALL, "--output-dir", "teachers"]
    assert run(tmp_path, script, *flags, "--epochs", "1").returncode == 0
    command = [sys.executable, script, *flags, "--epochs", "2", "--seed", "1"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if line.startswith("Epoch"))
        process.kill()
    assert len(list((tmp_path / "teachers/checkpoints").glob("teacher-*"))) == 2
    small = [*SMALL, "--epochs", "1", "--teacher", "teachers"]
    done = run(tmp_path, EXAMPLES / "15_knowledge_distillation.py", *small)
    assert done.returncode == 0, done.stderr
    assert "Teacher: teachers/weights/teacher-0.npz" in done.stdout


def test_held_out_images_are_not_called_test_images(tmp_path):
    flags = ["--dataset", "digits", "--quick", "--holdout", "300", "--output-dir", "out"]
    done = run(tmp_path, EXAMPLES / "14_student_baseline.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "Validation Acc" in done.stdout
    assert "test" not in done.stdout.lower()
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["dataset"]["validation"] == 300
    assert "validation_accuracy" in report["results"][0]
    assert "test_" not in json.dumps(report)


def sources():
    """{name: {script: source}} of all top-level functions and classes."""
    found = {}
    for script in SCRIPTS:
        text = (EXAMPLES / script).read_text()
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in OWN:
                found.setdefault(node.name, {})[script] = ast.get_source_segment(text, node)
    return found


SHARED = {name: copies for name, copies in sources().items() if len(copies) > 1}


@pytest.mark.parametrize("name", SHARED)
def test_copies_are_identical(name):
    assert len(set(SHARED[name].values())) == 1, f"{name} differs between {list(SHARED[name])}"


def test_the_names_that_people_copy_are_there():
    names = set(sources())
    assert {
        "TeacherCNN",
        "StudentCNN",
        "distillation_loss",
        "train_step",
        "train_student_step",
    } <= names
    assert {"train_teacher", "train_student_with_distillation", "train_student_baseline"} <= names
    assert {"TeacherCNN", "StudentCNN", "train_step", "distillation_loss"} <= set(SHARED)


@pytest.mark.parametrize("script", SCRIPTS)
def test_inline_metadata_is_of_the_requirements(script):
    """PEP 723: `uv run` installs what requirements.txt names, in the same bounds."""
    text = (EXAMPLES / script).read_text()
    block = re.search(r"(?m)^# /// script$\n((?:#.*\n)+?)# ///$", text)[1]
    metadata = tomllib.loads("".join(line[2:] or "\n" for line in block.splitlines(keepends=True)))
    required = set((ROOT / "requirements.txt").read_text().splitlines())
    # What a script goes on without, and says how to install.
    optional = (EXAMPLES / "requirements-export.txt").read_text()
    assert set(metadata["dependencies"]) <= required
    assert metadata["requires-python"] == ">=3.11"
    imported = set()
    for source in (text, *((EXAMPLES / name).read_text() for name in MODULES)):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    modules = {name.removesuffix(".py") for name in MODULES}
    names = {"sklearn": "scikit-learn"}
    for package in imported - set(sys.stdlib_module_names) - modules:
        name = names.get(package, package).replace("_", "-")
        if re.search(rf"(?m)^{name}>=", optional) and script.startswith("23"):
            continue
        assert any(d.startswith(name) for d in metadata["dependencies"]), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    module = load(EXAMPLES / script, name="helping")
    with pytest.raises(SystemExit) as stopped:
        experiment.run_script(module.main, module.Config)
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--output-dir" in shown
    hints = typing.get_type_hints(module.Config)
    text = " ".join(shown.replace("│", " ").split())
    for field in dataclasses.fields(module.Config):
        flag = "--" + field.name.replace("_", "-")
        flag = flag.replace("--", "--no-", 1) if field.default is True else flag
        # After the flag and what it takes comes a sentence.
        takes = r"(?:[^a-z]|all|\{[a-z_, ]+\})*"
        assert re.search(rf"{flag} {takes}[A-Z][a-z' ]", text)
        assert field.name in hints
