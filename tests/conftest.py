"""Fixtures. With MNIST_DATA_DIR set the tests run on MNIST, else on the embedded digits."""

import dataclasses
import importlib.util
import inspect
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

# `fast.tune_malloc` would start Python anew for this; in a test it must not.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
# What is tested is the same everywhere, also beside a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests run the same programs in processes of their own: each is compiled once.
COMPILED = tempfile.TemporaryDirectory()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", COMPILED.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import experiment  # noqa: E402
import fast  # noqa: E402
import jax  # noqa: E402
import utils  # noqa: E402

fast.use_all_cores()
# On one core, too, there is something to share a batch out over.
jax.config.update("jax_num_cpu_devices", max(2, jax.config.jax_num_cpu_devices))
# Most programs here run a few times only, and take longer to optimise than to run. Scripts that are
# run as processes of their own are optimised as a reader's are, and so is what test_fast.py holds.
jax.config.update("jax_disable_most_optimizations", True)

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = ("utils.py", "experiment.py", "fast.py", "plots.py")  # which all scripts share
SCRIPTS = sorted(
    p.relative_to(EXAMPLES).as_posix() for p in EXAMPLES.rglob("*.py") if p.name not in MODULES
)
SMALL = ["--dataset", "digits", "--quick", "--holdout", "1000"]  # leaves 297 images to train on
DATASET = "mnist" if os.environ.get("MNIST_DATA_DIR") else "digits"


def load(path, source=None, name=None):
    """A file as a module; `source` may take the place of its text."""
    name = name or path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    exec(compile(source or path.read_text(), str(path), "exec"), module.__dict__)
    return module


def refuse(module, arguments, monkeypatch, capsys):
    """Runs a script as from the command line, in this process: it ends with status 2 and says why,
    in one line or in the command-line library's box. Returns what it printed."""
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    with pytest.raises(SystemExit) as stopped:
        experiment.run_script(module.main, module.Config)
    assert stopped.value.code == 2
    output = capsys.readouterr()
    boxed = "For full helptext" in output.err
    assert output.err.count("\n") == 1 or boxed, output.err
    return output


def copy_script(folder, script, pause=None):
    """Copies a script and the modules that it needs into a folder. With a `pause` the copy waits
    so many seconds from one checkpoint to the next; with 0 there is one after every epoch."""
    for name in (script, *MODULES):
        shutil.copy(EXAMPLES / name, folder)
    if pause is not None:
        text = (EXAMPLES / "experiment.py").read_text()
        assert text.count("CHECKPOINT_PAUSE = 5 ") == 1
        text = text.replace("CHECKPOINT_PAUSE = 5 ", f"CHECKPOINT_PAUSE = {pause} ")
        (folder / "experiment.py").write_text(text)
    return folder / Path(script).name


def exhibit(check, script, file, right, wrong):
    """For the bug museum: `check(script)` passes, and fails when in `file`, the script itself or a
    module that it imports, the bug `wrong` stands in the place of `right`."""
    source = (EXAMPLES / file).read_text()
    assert source.count(right) == 1, "the line that the bug replaces is gone"
    for kind, text in (("right", source), ("wrong", source.replace(right, wrong))):
        own = text if file == script else None
        module = load(EXAMPLES / script, own, f"museum_{kind}_{Path(script).stem}")
        if file != script:  # what the script imports by name comes from the changed module
            changed = load(EXAMPLES / file, text, f"museum_{kind}_{Path(file).stem}")
            for name, value in vars(changed).items():
                if getattr(value, "__module__", None) == changed.__name__:
                    setattr(module, name, value)
        if kind == "right":
            check(module)
        else:
            with pytest.raises(AssertionError):
                check(module)


@dataclasses.dataclass
class Watched:
    """What one training of a script was given and shown."""

    name: str
    recipe: experiment.Recipe
    split: utils.Split  # the images that it was to be trained on
    given: dict  # the arguments of the training function
    start: str  # fingerprint of the weights at its start
    model: object
    optimizer: object
    batches: list  # of what `batches` made: dicts of arrays
    scored: list  # the arguments of each scoring

    def shown(self, key):
        """A column of all its batches in one array."""
        return np.concatenate([batch[key] for batch in self.batches])


def watch(module, data, config):
    """Runs a script's `main(config)` on `data`, and returns its report and a list of Watched, one a
    training, in order. For tests of what an experiment shows to whom. Nothing is timed: a latency
    is the batch size."""
    watched = []
    real_batches = module.batches

    class WatchedTraining(experiment.Training):
        __module__ = experiment.__name__  # so that the plumbing's code does not count

        def __init__(self, run, name, model, optimizer, recipe, split):
            caller = sys._getframe(1)
            super().__init__(run, name, model, optimizer, recipe, split, caller)
            start, values = experiment.fingerprint(model), inspect.getargvalues(caller)
            given = {argument: values.locals[argument] for argument in values.args}
            self.watched = Watched(name, recipe, split, given, start, model, optimizer, [], [])
            watched.append(self.watched)

        def score(self, scored_on, function, *arguments):
            self.watched.scored.append((scored_on, *arguments))
            super().score(scored_on, function, *arguments)

    class WatchedBatches:
        __wrapped__ = staticmethod(real_batches)  # so that its code counts, not this class's

        def __call__(self, split, *arguments, **tables):
            for batch in real_batches(split, *arguments, **tables):
                watched[-1].batches.append({key: np.array(x) for key, x in batch.items()})
                yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Training", WatchedTraining)
        patch.setattr(module, "batches", WatchedBatches())
        patch.setattr(utils, "load_data", lambda *_: data)
        patch.setattr(utils, "latency_ms", lambda _, batch_size: float(batch_size))
        report = module.main(config)
    return report, watched


def check_optimizer(module, training):
    """The optimizer of a Watched was made for its recipe: the rate, the schedule, all its steps."""
    recipe = training.recipe
    steps = recipe.epochs * (len(training.split.label) // recipe.batch_size)
    wanted = module.make_transform(recipe.learning_rate, recipe.schedule, steps)
    assert training.optimizer.tx is wanted, training.name  # `make_transform` is cached


def t_interval(gains):
    """The 95 % interval of Student's t for the mean gain of several seeds: (low, high). scipy's own
    is nan where all gain alike; then it is the mean itself."""
    half = stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains)
    return gains.mean() - half, gains.mean() + half


def gain_in_words(a, b):
    """What a summary says of the accuracies [seeds] of one network over those of another, from 0 to
    1."""
    gain = utils.paired_difference(100 * np.array(a), 100 * np.array(b))
    interval = f"95 %: {gain.low:+.2f} to {gain.high:+.2f}"
    return f"{gain.mean:+.2f} points ({interval}), {gain.wins} of {gain.pairs} seeds"


def make_run(folder, data, config=None):
    """A Run in a folder, for functions that take one."""
    for name in ("checkpoints", "weights"):
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
    return experiment.Run(config, data, Path(folder), started=0.0)


@pytest.fixture(scope="session")
def kd():
    return load(EXAMPLES / "15_knowledge_distillation.py")


@pytest.fixture(scope="session")
def digits():
    return utils.load_data("digits")


@pytest.fixture(scope="session")
def many(digits):
    """More images than those with which recipes are for few: stands for MNIST's 60,000."""
    return digits._replace(name="mnist", train=digits.train.take(np.zeros(12_000, int)))


@pytest.fixture
def images():
    """A split of 258 small pictures: one batch of 256 and two more."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (258, 28, 28, 1)).astype(np.uint8)
    return utils.Split(image, rng.integers(0, 10, 258).astype(np.int32), np.arange(258))
