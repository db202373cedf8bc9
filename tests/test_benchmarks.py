"""What the benchmarks count on: the same networks, the work counted right, a clock that adds up."""

import gzip
import json
import os
import subprocess
import sys
import time

import breakdown
import compare
import idx
import jax.numpy as jnp
import plain_loop
import pytest
from flax import nnx


def test_the_plain_loop_has_the_same_networks(kd):
    for plain, ours in (
        (plain_loop.Teacher(nnx.Rngs(0)), kd.TeacherCNN(rngs=nnx.Rngs(0))),
        (plain_loop.Student(nnx.Rngs(0)), kd.StudentCNN(rngs=nnx.Rngs(0))),
    ):
        shapes, others = (
            {path: x.shape for path, x in nnx.to_flat_state(nnx.state(net, nnx.Param))}
            for net in (plain, ours)
        )
        assert shapes == others


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_products_are_counted_right(kd, name, monkeypatch):
    counted = []

    def counting(layer):
        call = layer.__call__

        def count(self, x):
            y = call(self, x)
            # Each output is a product with all that leads to one channel.
            counted.append(y[0].size * self.kernel[...].size // y.shape[-1])
            return y

        monkeypatch.setattr(layer, "__call__", count)

    counting(nnx.Conv)
    counting(nnx.Linear)
    network = {"student": kd.StudentCNN, "teacher": kd.TeacherCNN}[name]
    network(rngs=nnx.Rngs(0))(jnp.zeros((1, 28, 28, 1)))
    assert counted[0] == compare.FIRST[name]
    assert sum(counted) == compare.FORWARD[name]


def test_a_ratio_is_taken_within_each_round():
    assert compare.ratio([1, 20, 3], [2, 10, 3]) == [1, 0.5, 2]


def test_parts_add_up_to_the_whole(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = breakdown.Clock()
    with clock.part("run"):
        now[0] += 1
        with clock.part("training"):
            now[0] += 10
            clock.compiled("/jax/core/compile/inner", 2)
            now[0] += 1
            clock.compiled("/jax/core/compile/outer", 4)  # holds the inner one
            clock.compiled("/jax/some/other/event", 5)
        now[0] += 3
    assert clock.seconds == {"compilation": 4, "training": 7, "run": 4}


@pytest.fixture
def folder(tmp_path):
    """Four files that gzip can read, but that are no MNIST."""
    for name in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (tmp_path / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(b"not MNIST" * 9))
    return tmp_path


def test_a_folder_without_mnist_is_refused_in_one_line(folder, capsys):
    (folder / "t10k-labels-idx1-ubyte.gz").rename(folder / "elsewhere")
    with pytest.raises(SystemExit):
        idx.parser("text").parse_args([str(folder)])
    assert "must hold t10k-labels-idx1-ubyte.gz" in capsys.readouterr().err.splitlines()[-1]


def test_files_that_are_not_mnist_are_refused_in_one_line(folder, capsys):
    with pytest.raises(SystemExit, match=r"the MNIST files of train cannot be read \("):
        idx.read(folder, "train")
    with pytest.raises(SystemExit):
        compare.check_data(idx.parser("text"), folder)
    assert "train-images-idx3-ubyte" in capsys.readouterr().err.splitlines()[-1]


def test_jobs_are_added_to_those_of_the_same_code(monkeypatch, tmp_path):
    result, runs = tmp_path / "compare.json", {name: {} for name in compare.JOBS}
    monkeypatch.setattr(compare, "RESULT", result)
    monkeypatch.setattr(compare, "PACKAGES", ())  # not installed for the tests
    assert compare.earlier_jobs() is None
    content = compare.about("", ()) | {"runs": runs, "code": compare.code()}
    result.write_text(json.dumps({"jobs": content}))
    assert compare.earlier_jobs() == runs
    result.write_text(json.dumps({"jobs": content | {"code": "other"}}))
    assert compare.earlier_jobs() is None


def test_a_stopped_job_ends_what_it_ran(tmp_path):
    """Killed, compare.py takes the process along whose time it takes."""
    job = "import os, sys, time; print(os.getpid(), file=sys.stderr, flush=True); time.sleep(60)"
    script = f"compare.measure(['-c', {job!r}], {str(tmp_path)!r}, None)"
    command = [sys.executable, "-c", f"import common, compare; common.run(lambda: {script})"]
    env = {"PYTHONPATH": str(compare.HERE)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as benchmark:
        pid = int(benchmark.stderr.readline())
        benchmark.terminate()
        assert benchmark.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
