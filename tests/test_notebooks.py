"""Scripts as guests: in a notebook, under a debugger, called by other code."""

import os
import subprocess
import sys

import pytest
from conftest import EXAMPLES
from jupyter_client.manager import KernelManager

SCRIPT = EXAMPLES / "14_student_baseline.py"
SOURCE = SCRIPT.read_text()
FLAGS = "--dataset digits --quick --labels 40 --epochs 2 --batch-size 20"
CONFIG = 'dataset="digits", quick=True, labels=40, epochs=2, batch_size=20'


class Notebook:
    """A kernel in the folder of the scripts."""

    def __init__(self):
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(EXAMPLES))
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, cell, on_text=None):
        """Runs a cell; returns its status and all that it shows."""
        shown = []

        def hook(message):
            content = message["content"]
            text = content.get("text", "") or "\n".join(content.get("traceback", []))
            shown.append(text)
            if on_text:
                on_text(text)

        reply = self.client.execute_interactive(cell, timeout=300, output_hook=hook)
        return reply["content"]["status"], "".join(shown)

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def notebook():
    notebook = Notebook()
    yield notebook
    notebook.close()


def test_run_magic(notebook, tmp_path):
    """`%run 14_….py --quick`: the kernel is not started anew, and ends in no traceback."""
    status, shown = notebook.run(f"%run {SCRIPT.name} {FLAGS} --output-dir {tmp_path}")
    assert status == "ok", shown
    assert "SUMMARY" in shown
    assert (tmp_path / "results.json").exists()
    status, shown = notebook.run(f"%run {SCRIPT.name} --dataset digits --labels 5")
    assert (status, shown.count("\n")) == ("ok", 1)
    assert "14_student_baseline.py: error: --labels 5: must be 10 or more, or all" in shown
    status, shown = notebook.run(f"%run {SCRIPT.name} --no-such-flag")
    assert "--no-such-flag" in shown
    assert notebook.run("6 * 7")[0] == "ok"


def test_cells_pasted_and_main_called(notebook, tmp_path):
    cells = SOURCE.split("\n# %%")
    cells[-1] = cells[-1].split("if __name__")[0]
    for cell in [cells[0], *(f"# %%{cell}" for cell in cells[1:])]:
        status, shown = notebook.run(cell)
        assert status == "ok", shown
    call = f"report = main(Config({CONFIG}, output_dir={str(tmp_path)!r}))"
    for trained in ("Epoch  2/2", "Trained before"):
        status, shown = notebook.run(call)
        assert status == "ok", shown
        assert trained in shown
    status, shown = notebook.run("print(report['script'], report['seconds']['total'] < 10)")
    assert shown == "notebook True\n", "the second main() has its own time"
    assert (tmp_path / "figure.png").exists()


def test_the_whole_file_in_one_cell(notebook, tmp_path):
    """It runs with its defaults, whatever flags the kernel was started with."""
    cell = SOURCE.replace('"runs/14_student_baseline"', repr(str(tmp_path)))
    for name, value in (("epochs", 1), ("labels", 40), ("batch_size", 20)):
        start = cell.index(f"    {name}: Annotated")
        end = cell.index("OPEN] = None", start)
        cell = cell[:end] + f"OPEN] = {value}" + cell[end + len("OPEN] = None") :]
    cell = cell.replace(
        "    output_dir: str", '    dataset: Literal["digits"] = "digits"\n    output_dir: str'
    )
    assert "ipykernel" in notebook.run("import sys; print(sys.argv)")[1]
    status, shown = notebook.run(cell)
    assert status == "ok", shown
    assert (tmp_path / "results.json").exists()


def test_an_interrupt_stops_the_run_and_not_the_kernel(notebook, tmp_path):
    notebook.run("kept = 41")

    def interrupt(text):
        if "Epoch" in text:
            notebook.manager.interrupt_kernel()

    flags = FLAGS.replace("--epochs 2", "--epochs 2000")
    _, shown = notebook.run(
        f"%run {SCRIPT.name} {flags} --output-dir {tmp_path}", on_text=interrupt
    )
    assert "KeyboardInterrupt" in shown
    assert "SUMMARY" not in shown
    assert notebook.run("print(kept + 1)") == ("ok", "42\n")


@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "pdb", "-c", "continue", "-c", "quit"],
        ["-m", "cProfile", "-o", os.devnull],
        ["-c", "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], "
         "run_name='__main__')"],
        ["-X", "dev", "-W", "ignore"],
        ["-i"],
    ],
    ids=["debugger", "profiler", "runpy", "options of Python", "interactive"],
)  # fmt: skip
def test_launchers(launcher, tmp_path):
    """Each is left in charge: the script does not start its process anew under it."""
    env = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    env["PYTHONPATH"] = str(EXAMPLES)
    command = [sys.executable, *launcher, SCRIPT, *FLAGS.split(), "--output-dir", tmp_path]
    done = subprocess.run(
        list(map(str, command)), env=env, input="", capture_output=True, text=True, check=False
    )
    assert "SUMMARY" in done.stdout, done.stderr
    assert done.stdout.count("Data: ") == 1
    assert (tmp_path / "results.json").exists()


def test_other_code_calls_main_twice(tmp_path):
    program = f"""
import importlib
script = importlib.import_module("14_student_baseline")
for name in "ab":
    report = script.main(script.Config({CONFIG}, output_dir={str(tmp_path)!r} + "/" + name))
    print("name:", report["script"], report["config"]["labels"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=EXAMPLES, capture_output=True, text=True, check=False
    )
    assert done.stdout.count("name: 14_student_baseline.py 40") == 2, done.stderr
