"""Fixtures. With MNIST_DATA_DIR set the tests run on MNIST, else on the embedded digits."""

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

# `utils.run` would start Python anew for this; in a test it must not.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
# What is tested is the same everywhere, also beside a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests run the same programs in processes of their own: each is compiled once.
COMPILED = tempfile.TemporaryDirectory()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", COMPILED.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import utils  # noqa: E402

utils.use_all_cores()
# On one core, too, there is something to share a batch out over.
jax.config.update("jax_num_cpu_devices", max(2, jax.config.jax_num_cpu_devices))

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
MODULES = ("utils.py", "fast.py")  # of all scripts, beside which they lie
SCRIPTS = sorted(
    p.relative_to(EXAMPLES).as_posix() for p in EXAMPLES.rglob("*.py") if p.name not in MODULES
)
DATASET = "mnist" if os.environ.get("MNIST_DATA_DIR") else "digits"


def load(path, source=None, name=None):
    """A file as a module; `source` may take the place of its text."""
    name = name or path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    exec(compile(source or path.read_text(), str(path), "exec"), module.__dict__)
    return module


def refuse(module, arguments, monkeypatch, capsys):
    """Runs a script as from the command line, in this process: it ends with status 2 and one line
    on stderr. Returns what it printed."""
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    with pytest.raises(SystemExit) as stopped:
        utils.run(module.main, module.Config)
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1, output.err
    return output


def eager(folder, script, pause=0):
    """A copy of a script beside a utils.py that waits so many seconds from one checkpoint to the
    next; with 0 there is one after every epoch, however short."""
    for name in (script, *MODULES):
        shutil.copy(EXAMPLES / name, folder)
    text = (EXAMPLES / "utils.py").read_text()
    assert text.count(" PAUSE = 5 ") == 1
    (folder / "utils.py").write_text(text.replace(" PAUSE = 5 ", f" PAUSE = {pause} "))
    return folder / Path(script).name


def exhibit(check, script, file, right, wrong, tmp_path=None):
    """For the bug museum: `check(script, utils)` passes, and fails when in `file`, which is one of
    the two or fast.py, the bug `wrong` stands in the place of `right`. A script gets its own
    `tmp_path`."""
    source = (EXAMPLES / file).read_text()
    assert source.count(right) == 1, "the line that the bug replaces is gone"
    for kind, text in (("right", source), ("wrong", source.replace(right, wrong))):
        # For bugs that need it.
        text = text.replace("import jax\n", "import jax\nimport jax.numpy as jnp\n", 1)
        pair = [
            load(EXAMPLES / name, text if name == file else None, f"museum_{kind}_{name[:5]}")
            for name in (script, "utils.py")
        ]
        if file == "fast.py":
            pair[0].max_pool = load(EXAMPLES / file, text, f"museum_{kind}_fast").max_pool
        pair[0].tmp_path = tmp_path and tmp_path / kind
        if kind == "right":
            check(*pair)
        else:
            with pytest.raises(AssertionError):
                check(*pair)


@pytest.fixture(scope="session")
def kd():
    return load(EXAMPLES / "15_knowledge_distillation.py")


@pytest.fixture(scope="session")
def digits():
    return utils.load_data("digits")


@pytest.fixture
def images():
    """A split of 258 small pictures: one batch of 256 and two more."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (258, 28, 28, 1)).astype(np.uint8)
    return utils.Split(image, rng.integers(0, 10, 258).astype(np.int32), np.arange(258))
