"""What the benchmarks count on: the same networks, the work counted right, a clock that adds up."""

import gzip
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time

import breakdown
import common
import compare
import idx
import jax.numpy as jnp
import numpy as np
import plain_loop
import pytest
import stacked
import tables
import utils
from flax import nnx

SPLIT = utils.Split(*(np.zeros(1, np.uint8) for _ in range(3)))

# Says which process it is, and does nothing.
SLEEPER = "import os, sys, time; print(os.getpid(), file=sys.stderr, flush=True); time.sleep(60)"


def test_the_plain_loop_has_the_same_networks(kd):
    image = np.random.default_rng(0).random((4, 28, 28, 1), np.float32)
    for plain, ours in (
        (plain_loop.Teacher(nnx.Rngs(0)), kd.TeacherCNN(rngs=nnx.Rngs(1))),
        (plain_loop.Student(nnx.Rngs(0)), kd.StudentCNN(rngs=nnx.Rngs(1))),
    ):
        nnx.update(ours, nnx.state(plain, nnx.Param))
        plain.eval()
        np.testing.assert_allclose(plain(image), ours(image), rtol=1e-4, atol=1e-4)


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
    clock = stacked.Clock()
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


def test_turns_differ():
    orders = [tuple(common.shuffled(range(30), turn)) for turn in range(15)]
    assert len(set(orders)) == 15
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(30))}
    assert [common.rotated("abc", turn)[0] for turn in range(4)] == ["a", "b", "c", "a"]


def test_the_environment_is_the_same_for_whoever_calls(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    for tuned in (False, True):
        found = common.environment(tuned)
        assert {k for k in found if k.startswith(("JAX_", "XLA_"))} == {"JAX_PLATFORMS"}
        assert ("GLIBC_TUNABLES" in found) == tuned


@pytest.fixture
def folder(tmp_path):
    """Four files that gzip can read, but that are no MNIST."""
    for name in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (tmp_path / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(b"not MNIST" * 9))
    return tmp_path


def test_a_folder_without_mnist_is_refused_in_one_line(folder, capsys):
    (folder / "t10k-labels-idx1-ubyte.gz").rename(folder / "elsewhere")
    for name in (str(folder), "x" * 10_000):
        with pytest.raises(SystemExit):
            idx.parser("text").parse_args([name])
        found = capsys.readouterr().err.splitlines()[-1]
        assert re.search(r"must be a folder with (t10k-labels|train-images)-idx", found)


def test_files_that_are_not_mnist_are_refused_in_one_line(folder, capsys):
    with pytest.raises(SystemExit, match=r"the MNIST files of train cannot be read \("):
        idx.read(folder, "train")
    with pytest.raises(SystemExit):
        common.check_data(idx.parser("text"), folder)
    assert "train-images-idx3-ubyte" in capsys.readouterr().err.splitlines()[-1]


def test_other_images_than_those_of_mnist_are_refused(monkeypatch, capsys, folder):
    monkeypatch.setattr(utils, "load_data", lambda *_: utils.Data(*"ab", *[SPLIT] * 2, "test"))
    with pytest.raises(SystemExit):
        common.check_data(idx.parser("text"), folder)
    assert "must hold MNIST itself" in capsys.readouterr().err


def test_mnist_itself_is_taken():
    folder = os.environ.get("MNIST_DATA_DIR")
    if not folder:
        pytest.skip("needs the real MNIST: set MNIST_DATA_DIR to the folder of its four files")
    common.check_data(idx.parser("text"), folder)


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """Where a benchmark keeps what it measures: in an empty folder."""
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "docs" / "results")
    monkeypatch.setattr(common, "code", lambda: "this")
    return lambda: common.Kept("some")


def test_a_stopped_benchmark_goes_on(kept, monkeypatch):
    assert kept().measure("one", lambda: 1) == 1
    assert kept().measure("one", lambda: pytest.fail("measured again")) == 1
    monkeypatch.setattr(common, "code", lambda: "other")
    assert kept().measure("one", lambda: 2) == 2


def test_a_part_is_written_beside_the_other(kept):
    for part in ("steps", "jobs"):
        some = kept()
        assert some.measure("one", lambda: 1) == 1
        some.write("command", {"rounds": 3}, part)
    found = json.loads((common.RESULTS / "some.json").read_text())
    assert {part: found[part]["rounds"] for part in found} == {"steps": 3, "jobs": 3}


def test_what_is_written_is_forgotten_and_the_rest_kept(kept):
    some = kept()
    for key in ("steps, 1", "jobs, 1"):
        some.measure(key, lambda: 1)
    some.forget("steps")
    assert kept().found == {"jobs, 1": 1}
    some.forget()
    assert not some.path.exists()


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff"])
def test_a_damaged_file_is_named(kept, text):
    path = kept().path
    path.write_bytes(text)
    with pytest.raises(utils.UserError, match=re.escape(f"{path}: is damaged")):
        kept()


def test_what_another_version_measured_is_refused_aloud(kept, monkeypatch, capsys):
    kept().measure("one", lambda: 1)
    monkeypatch.setattr(common, "code", lambda: "other")
    assert kept().found == {}
    assert "measured anew" in capsys.readouterr().out


def test_jobs_are_added_to_those_of_the_same_code(kept, monkeypatch):
    names = list(compare.JOBS)
    runs = {name: {} for name in names}
    monkeypatch.setattr(compare, "RESULT", common.RESULTS / "some.json")
    assert compare.earlier_jobs(kept(), names) is None
    kept().write("command", {"runs": runs}, "jobs")
    assert compare.earlier_jobs(kept(), names) == runs
    assert compare.earlier_jobs(kept(), names[:-1]) is None
    runs.popitem()
    kept().write("command", {"runs": runs}, "jobs")
    assert compare.earlier_jobs(kept(), names) is None
    assert compare.earlier_jobs(kept(), names[:-1]) == runs
    monkeypatch.setattr(common, "code", lambda: "other")
    assert compare.earlier_jobs(kept(), names[:-1]) is None


def test_jobs_can_be_left_out(kept, folder, monkeypatch, capsys):
    """And the command beside the result says so."""
    monkeypatch.setattr(compare, "run_job", lambda name, folder: (8.0, 1, {}, name))
    monkeypatch.setattr(compare, "Kept", lambda *args: kept())
    monkeypatch.setattr(compare, "check_data", lambda *args: None)
    monkeypatch.setattr(compare, "PACKAGES", ())
    flags = ["--without", "Keras 3", "--without", "PyTorch"]
    command = ["compare.py", str(folder), "--repeats", "1", *flags, "--only"]
    monkeypatch.setattr(sys, "argv", [*command, "jobs"])
    compare.main()
    found = json.loads((common.RESULTS / "some.json").read_text())["jobs"]
    assert list(found["runs"]) == [name for name in compare.JOBS if name not in flags]
    assert found["ratios"].keys() == {f"ours ÷ {name}" for name in list(found["runs"])[2:]}
    assert found["command"].endswith('--repeats 1 --without "PyTorch" --without "Keras 3"')
    monkeypatch.setattr(sys, "argv", [*command, "steps"])
    with pytest.raises(SystemExit):
        compare.main()
    assert "--without: is for the jobs" in capsys.readouterr().err


def test_a_stopped_job_ends_what_it_ran(tmp_path):
    ends_what_it_started(f"compare.measure(['-c', {SLEEPER!r}], {str(tmp_path)!r}, None)")


def test_a_stopped_comparison_ends_its_workers(tmp_path):
    """Even one that does not listen."""
    (tmp_path / "deaf.py").write_text(SLEEPER)
    compare_with = f"setattr(compare, '__file__', {str(tmp_path / 'deaf.py')!r})"
    ends_what_it_started(f"({compare_with}, compare.listen(compare.started(stack, 'ours', '.')))")


def test_a_stopped_task_ends(tmp_path):
    (tmp_path / "task.py").write_text(SLEEPER)
    ends_what_it_started(f"common.ask({str(tmp_path / 'task.py')!r}, env=None)", signal.SIGHUP)


def ends_what_it_started(what, signal_number=signal.SIGTERM):
    """A process that does this and is stopped says so, and what it had started is gone."""
    script = f"""
import contextlib
import common, compare
def main():
    with contextlib.ExitStack() as stack:
        {what}
common.run(main)
"""
    env = {"PYTHONPATH": str(compare.HERE)}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as benchmark:
        pid = int(benchmark.stderr.readline())
        time.sleep(0.5)  # until it waits for what it has started
        benchmark.send_signal(signal_number)
        assert benchmark.wait(30) == 128 + signal_number
        assert benchmark.stderr.read().splitlines()[-1].startswith("Stopped.")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_table_of_measures_has_the_cases_that_are_timed():
    timed = {"memory": breakdown.MALLOC, "conv": breakdown.CONV, "jax": breakdown.JAX}
    shown = set()
    for part, without, with_measure in tables.MEASURES.values():
        assert {without, with_measure} <= set(timed[part])
        shown |= {(part, without), (part, with_measure)}
    assert shown == {(part, case) for part, cases in timed.items() for case in cases}
    for how in (*breakdown.CONV.values(), *breakdown.JAX.values()):
        inspect.signature(breakdown.timed_steps).bind("folder", **how)
