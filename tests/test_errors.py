"""Bad input: a line on stderr that names the flag or file, exit status 2, nothing harmed."""

import errno
import gzip
import os
import signal
import subprocess
import sys
import tempfile

import experiment
import numpy as np
import pytest
import utils
from conftest import EXAMPLES, load, refuse
from test_utils import write_idx

SCRIPT = EXAMPLES / "15_knowledge_distillation.py"


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs script 15 as from the command line, in this process; returns the line of its error."""
    kd = load(SCRIPT)

    def run(*arguments):
        base = [SCRIPT, "--dataset", "digits", "--quick", "--output-dir", tmp_path / "out"]
        error = refuse(kd, [*base, *arguments], monkeypatch, capsys).err
        # One line of ours, or the command line's own box for what it cannot parse.
        own = error.startswith("15_knowledge_distillation.py: error: ")
        assert own or "For full helptext" in error
        assert not (tmp_path / "out" / "results.json").exists()
        return error

    return run


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", "0"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--temperature", "inf"],
        ["--temperature", "1e300"],
        ["--alpha", "-0.1"],
        ["--alpha", "1.5"],
        ["--batch-size", "0"],
        ["--batch-size", "5000"],
        ["--teacher-batch-size", "5000"],
        ["--labels", "9"],
        ["--labels", "5000"],
        ["--labels", "many"],
        ["--labels", "-5"],
        ["--labels", "²³"],
        ["--data-dir", ""],
        ["--epochs", "-1"],
        ["--teacher-epochs", "-1"],
        ["--teacher-epochs", "1000000000"],
        ["--learning-rate", "0"],
        ["--learning-rate", "fast"],
        ["--seed", "-1"],
        ["--schedule", "linear"],
        ["--dataset", "imagenet"],
        ["--holdout", "5000"],
        ["--holdout", "-1"],
        ["--teacher", "nowhere"],
        ["--no-such-flag"],
    ],
    ids=" ".join,
)
def test_flag(call, flags):
    assert flags[0] in call(*flags)


def test_output_dir_that_cannot_be_written(call, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "--output-dir" in call("--output-dir", tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"
    assert "--output-dir" in call("--output-dir", tmp_path / ("long" * 100))


def test_data_dir_with_too_long_a_name(call, tmp_path):
    assert "long" in call("--dataset", "mnist", "--data-dir", tmp_path / ("long" * 100))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["results.json", "figure.png"])
def test_output_dir_with_a_folder_in_the_way(call, tmp_path, name):
    (tmp_path / "mine" / name).mkdir(parents=True)
    assert "--output-dir" in call("--output-dir", tmp_path / "mine")


def test_output_dir_of_another_run(call, tmp_path):
    folder = tmp_path / "shared"
    script = "import sys, experiment; experiment._take_folder(sys.argv[1]); print(flush=True)"
    script += "; input()"
    with subprocess.Popen(
        [sys.executable, "-c", script, folder], cwd=EXAMPLES, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        other.stdout.readline()
        assert "another run is using it" in call("--output-dir", folder)
        other.communicate(b"\n")
    experiment._take_folder(str(folder))


def damage(folder, case):
    image, label = (folder / f"{name}.gz" for name in utils.FILES[:2])
    raw_image, raw_label = (gzip.decompress(path.read_bytes()) for path in (image, label))
    if case == "missing":
        label.unlink()
        return label
    if case == "truncated gzip":
        image.write_bytes(image.read_bytes()[:-100])
    elif case == "corrupt gzip":
        content = bytearray(image.read_bytes())
        content[len(content) // 2] ^= 0xFF
        image.write_bytes(bytes(content))
    elif case == "not gzip":
        image.write_bytes(b"<html>not found</html>")
    elif case == "wrong magic number":
        image.write_bytes(gzip.compress(raw_label))
    elif case == "truncated inside":
        image.write_bytes(gzip.compress(raw_image[:-7]))
    elif case == "sizes that overflow":
        huge = np.array([2**31, 2**31, 4], ">u4").tobytes()
        image.write_bytes(gzip.compress(raw_image[:4] + huge))
    elif case == "sizes that hold nothing":
        nothing = np.array([0, 2**32 - 1, 2**32 - 1], ">u4").tobytes()
        image.write_bytes(gzip.compress(raw_image[:4] + nothing))
    elif case == "a pipe":
        image.unlink()
        os.mkfifo(image)
    elif case == "a folder":
        image.unlink()
        image.mkdir()
    elif case == "a broken link":
        image.unlink()
        image.symlink_to("nowhere")
    elif case == "header only":
        image.write_bytes(gzip.compress(raw_image[:6]))
    elif case == "counts differ":
        shape = np.array([10], ">u4").tobytes()
        label.write_bytes(gzip.compress(raw_label[:4] + shape + raw_label[8:18]))
        return label
    elif case == "a test label that training has not":
        label = folder / f"{utils.FILES[3]}.gz"
        raw_label = gzip.decompress(label.read_bytes())
        label.write_bytes(gzip.compress(raw_label[:-1] + bytes([10])))
        return label
    return image


@pytest.mark.parametrize(
    "case",
    [
        "missing",
        "truncated gzip",
        "corrupt gzip",
        "not gzip",
        "wrong magic number",
        "truncated inside",
        "header only",
        "sizes that overflow",
        "sizes that hold nothing",
        "a pipe",
        "a folder",
        "a broken link",
        "counts differ",
        "a test label that training has not",
    ],
)
def test_data(call, tmp_path, case):
    write_idx(tmp_path / "data", train=200, test=50)
    path = damage(tmp_path / "data", case)
    assert str(path) in call("--dataset", "mnist", "--data-dir", tmp_path / "data")


def test_data_dir_that_is_a_file(call, tmp_path):
    (tmp_path / "data").write_text("x")
    assert str(tmp_path / "data") in call("--dataset", "mnist", "--data-dir", tmp_path / "data")


def test_loss_that_is_not_finite(call):
    error = call("--schedule", "constant", "--teacher-learning-rate", "1e30")
    assert "teacher, epoch 1, step" in error


def test_weights_that_are_not_finite(call):
    """One step whose loss is finite, and whose update is not."""
    flags = ["--schedule", "constant", "--epochs", "1", "--teacher-epochs", "1", "--labels", "50"]
    assert "distilled, epoch 1" in call(*flags, "--learning-rate", "1e39")


def test_no_epochs_at_all(tmp_path):
    """Zero is no error: the summary is then that of the initial weights."""
    kd = load(SCRIPT)
    config = kd.Config(
        dataset="digits", seeds=1, epochs=0, teacher_epochs=0, output_dir=str(tmp_path)
    )
    assert [row["epoch_seconds"] for row in kd.main(config)["results"]] == [[], [], []]
    assert (tmp_path / "figure.png").exists()


@pytest.mark.parametrize("named", [True, False])
def test_a_full_disk_is_named(named, monkeypatch, capsys):
    """A file of its own by its name; else it was the output or a temporary file of a library."""

    def main(_):
        raise OSError(errno.ENOSPC, "No space left on device", *(["/a/file"] if named else []))

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit):
        experiment.run_script(main, experiment.CommonFlags)
    error = capsys.readouterr().err
    assert error.startswith("script.py: error: [Errno 28] No space left on device")
    assert error.count("\n") == 1
    assert ("'/a/file'" in error) == named
    assert ("TMPDIR" in error and tempfile.gettempdir() in error) != named


def test_full_disk(tmp_path):
    """No file may grow beyond 100 kB, as on a full disk: one line, and no half a checkpoint."""
    script = EXAMPLES / "14_student_baseline.py"
    script = f"{sys.executable} '{script}' --dataset digits --quick --output-dir '{tmp_path}'"
    done = subprocess.run(
        f"ulimit -f 100; {script}", shell=True, capture_output=True, text=True, check=False,
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"},  # it would complain, too
    )  # fmt: skip
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "cannot be written (File too large)" in line
    assert str(tmp_path / "checkpoints" / "baseline-") in line
    assert not (tmp_path / "results.json").exists()
    again = subprocess.run(script, shell=True, capture_output=True, text=True, check=True)
    assert "Going on" not in again.stdout


@pytest.mark.parametrize("line", ["Data: ", "Epoch 12/"])
def test_interrupt(tmp_path, line):
    script = EXAMPLES / "14_student_baseline.py"
    command = [sys.executable, script, "--dataset", "digits", "--quick", "--output-dir", tmp_path]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        next(printed for printed in process.stdout if printed.startswith(line))
        process.send_signal(signal.SIGINT)
        error = process.stderr.read()
    assert process.returncode == 130
    assert error == "\nStopped. The same command goes on from the last checkpoint.\n"


def test_closed_standard_streams_in_a_notebook(tmp_path):
    script = f"{sys.executable} '{EXAMPLES / '14_student_baseline.py'}' --dataset digits --quick"
    done = subprocess.run(
        f"exec {script} --epochs 1 --output-dir '{tmp_path}' <&- >&- 2>&-", shell=True, check=False,
        env=os.environ | {"MPLBACKEND": "module://of_a_notebook"},  # as if started there
    )  # fmt: skip
    assert done.returncode == 0
    assert (tmp_path / "results.json").exists()


def test_a_platform_that_jax_does_not_know(tmp_path):
    command = [sys.executable, SCRIPT, "--dataset", "digits", "--output-dir", tmp_path / "out"]
    env = os.environ | {"JAX_PLATFORMS": "abacus"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "JAX_PLATFORMS abacus: " in line


def test_a_real_process(tmp_path):
    """From the shell: the same line and status, and no traceback. Nothing is drawn on a screen, so
    a backend that matplotlib does not know is none of it."""
    command = [sys.executable, SCRIPT, "--alpha", "2", "--output-dir", tmp_path / "out"]
    env = os.environ | {"MPLBACKEND": "nonsense"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2
    want = "15_knowledge_distillation.py: error: --alpha 2.0: must be from 0 to 1\n"
    assert done.stderr == want
    assert not (tmp_path / "out").exists()
