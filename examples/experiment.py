"""One run of a script: its flags, its output folder, trainings that can be stopped and go on,
results and summary.

To copy a script out of this repository, take this file, utils.py, fast.py and plots.py along.
"""

import contextlib
import dataclasses
import dis
import enum
import functools
import hashlib
import importlib.metadata
import inspect
import io
import json
import logging
import math
import os
import platform
import signal
import sys
import sysconfig
import tempfile
import time
import types
import typing
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import fast
import filelock
import flax
import jax
import numpy as np
import typeguard
import tyro
import utils
from flax import nnx
from tqdm import tqdm
from utils import UserError, require

# Scripts draw without a backend. A notebook hands its own on to what it starts, where matplotlib
# may not know it.
if not fast.in_notebook():
    os.environ.pop("MPLBACKEND", None)

# The steps are written for Flax's graph mode, its default, whatever NNX_GRAPH_MODE says.
flax.config.update("nnx_graph_mode", True)
flax.config.update("nnx_graph_updates", True)

# %% Flags


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a flag takes: `Annotated[float, Range(0, 1)]`."""

    low: float
    high: float = math.inf
    low_excluded: bool = False
    high_excluded: bool = False

    def __contains__(self, value):
        above = value > self.low if self.low_excluded else value >= self.low
        below = value < self.high if self.high_excluded else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self):
        low = f"above {self.low:,}" if self.low_excluded else f"{self.low:,} or more"
        if self.high == math.inf:
            return f"a finite number {low}" if self.low_excluded else low
        if self.low_excluded or self.high_excluded:
            return f"{low} and {'below' if self.high_excluded else 'at most'} {self.high:,}"
        return f"from {self.low:,} to {self.high:,}"


# Marks a flag that may be left open (None): --help then names no default but what the text says.
OPEN = tyro.conf.arg(help_behavior_hint="")
Seed = Annotated[int, Range(0, 2**32 - 1)]


@dataclasses.dataclass(frozen=True)
class CommonFlags:
    """The flags that all scripts have."""

    data_dir: Annotated[str | None, OPEN] = None
    """Folder with the dataset's four IDX files (default: <DATASET>_DATA_DIR, a system package, an
    earlier download, a download)."""
    dataset: Literal["mnist", "fashion_mnist", "kmnist", "digits"] = "mnist"
    """The dataset. The digits are embedded in scikit-learn and work offline."""
    holdout: Annotated[int, Range(0)] = 0
    """Score on this many images held out of training, and leave the test images alone."""
    quick: bool = False
    """Take a first look, in about a minute: fewer images and steps."""


class Recipe(NamedTuple):
    """How a network is trained."""

    seed: int  # of initial weights, order of the batches and dropout
    epochs: int
    batch_size: int
    learning_rate: float  # its peak, or constant
    schedule: str  # onecycle or constant
    augmentation: str = "none"  # of its images: see `utils.augment`


def check_flags(config):
    """Raises UserError for the first flag whose value is not what its annotation allows."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = "--" + field.name.replace("_", "-")
        require(not isinstance(value, (str, tuple)) or value, f"{flag}: must not be empty")
        several = isinstance(value, tuple)
        for one in value if several else (value,):
            _check_value(flag, one, hints[field.name])
        try:
            every_item = typeguard.CollectionCheckStrategy.ALL_ITEMS
            typeguard.check_type(value, hints[field.name], collection_check_strategy=every_item)
        except typeguard.TypeCheckError as error:
            raise UserError(f"{flag} {value!r}: is of a wrong type ({_brief(error)})") from None
        if several:  # as a number is printed, it names a network
            shown = {f"{x:.12g}" if isinstance(x, float) else x for x in value}
            require(len(shown) == len(value), f"{flag}: must not repeat a value")


def _check_value(flag, value, hint):
    ranges, choices = _allowed(hint)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        for numbers in ranges:
            words = [str(numbers), *map(str, choices)]
            require(value in numbers, f"{flag} {value}: must be {', or '.join(words)}")
    elif choices and value is not None:
        numbers = [str(x) for x in ranges]
        words = ", ".join([*numbers, *map(str, choices)])
        require(value in choices, f"{flag} {value}: must be one of {words}")


def _allowed(hint):
    """The Ranges and the literal choices that stand in an annotation."""
    ranges, choices = [], []
    if typing.get_origin(hint) is Literal:
        choices += typing.get_args(hint)
    elif typing.get_origin(hint) is Annotated:
        ranges += [x for x in hint.__metadata__ if isinstance(x, Range)]
    for inner in typing.get_args(hint):
        if typing.get_origin(inner) is not None:
            more_ranges, more_choices = _allowed(inner)
            ranges += more_ranges
            choices += more_choices
    return ranges, choices


def with_defaults(config, **defaults):
    """The config with these values for what was left open, that is None."""
    missing = {k: v for k, v in defaults.items() if getattr(config, k) is None}
    return dataclasses.replace(config, **missing)


def parse(config_class, arguments=None):
    """The config from command-line flags, the process's own if None."""
    text = inspect.getdoc(inspect.getmodule(config_class)) or ""
    settings = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    return tyro.cli(
        config_class, description=text.split("\n\n")[0], args=arguments, config=settings
    )


def run_script(main, config_class):
    """Runs a script's `main(config)` with the flags of its command line. What the user can mend
    ends in one line on stderr and exit status 2. In a notebook cell, which has no flags, the
    config is the default one."""
    _quieten()
    try:
        if fast.owns_process():
            signal.signal(signal.SIGINT, _stop)
        module = sys.modules[config_class.__module__]
        config = parse(config_class) if hasattr(module, "__file__") else config_class()
        fast.tune_malloc()
        return main(config)
    except BrokenPipeError:  # Whoever read the output, such as `head`, has gone.
        os._exit(1)
    except (UserError, OSError) as error:  # The latter: a full disk, a folder without permission.
        script = Path(sys.argv[0]).name
        message = " ".join(str(error).split())
        if isinstance(error, OSError) and error.filename is None:
            places = f"standard output or the temporary folder {tempfile.gettempdir()}"
            message += f": {places}, in place of which TMPDIR may name another"
        print(f"{script}: error: {message}", file=sys.stderr)
        if not fast.in_notebook():
            sys.exit(2)


def _quieten():
    """No warnings that are of no use to who runs a script, and output that can be written."""
    for library in ("absl", "asyncio", "matplotlib"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "overflow encountered in cast")  # the loss check says it
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the script
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")  # where the terminal knows no ✓


def _stop(*_):
    """Ends the process at once: raised inside a callback of JAX, KeyboardInterrupt gets lost."""
    print("\nStopped. The same command goes on from the last checkpoint.", file=sys.stderr)
    os._exit(130)


# %% A run


def start(config, share_batches=True):
    """Checks the flags, loads the data and takes the output folder. Returns the Run.

    The CPU's cores become devices, over which the batches of large networks are shared out. Where a
    step is all matrix products, which XLA spreads over the cores itself, `share_batches=False` is
    faster.
    """
    started = time.perf_counter()
    check_flags(config)
    _check_switches()
    if share_batches:
        fast.use_all_cores()
    try:
        jax.devices()
    except RuntimeError as error:
        raise UserError(f"JAX_PLATFORMS {jax.config.jax_platforms}: {_brief(error)}") from None
    # Whoever names another dataset than the script's own wants that one or none.
    fall_back = config.dataset == type(config).dataset
    data = utils.load_data(config.dataset, config.data_dir, config.holdout, config.quick, fall_back)
    run = Run(config, data, _take_folder(config.output_dir), started)
    print(f"Data: {data}", flush=True)
    return run


# JAX's debugging switches that Flax and Optax, or arrays of NumPy, do not bear.
REFUSED_SWITCHES = {
    "jax_transfer_guard": ("disallow", "disallow_explicit"),
    "jax_transfer_guard_host_to_device": ("disallow", "disallow_explicit"),
    "jax_transfer_guard_device_to_host": ("disallow", "disallow_explicit"),
    "jax_numpy_rank_promotion": ("raise",),
    "jax_numpy_dtype_promotion": ("strict",),
}


def _check_switches():
    """Raises UserError for a switch of JAX with which no script runs."""
    for switch, refused in REFUSED_SWITCHES.items():
        value = getattr(jax.config, switch, None)
        unset = f"{switch.upper()}={value}: Flax does not run with it; unset it"
        require(value not in refused, unset)


LOCKS = {}  # of the output folders that this process has


def _take_folder(output_dir):
    """Makes the output folder and locks it until the process ends. Raises UserError if another
    process has it, or if it cannot be written."""
    folder, flag = utils.at_home(output_dir, "--output-dir"), f"--output-dir {output_dir!r}"
    try:
        output_dir.encode()
        for name in ("checkpoints", "weights"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name in ("results.json", "figure.png", "soft_targets.png"):
            require(not (folder / name).is_dir(), f"{flag}: {name} in it must not be a folder")
        (folder / ".lock").touch()
    except (OSError, UnicodeError) as error:
        raise UserError(f"{flag}: cannot write ({error})") from None
    # One lock a path in a process: a second main() in a notebook may use the same folder.
    lock = filelock.FileLock(folder.absolute() / ".lock", is_singleton=True)
    LOCKS[folder.absolute()] = lock  # which ends when nobody knows it
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(f"{flag}: another run is using it; name another folder") from None
    except (OSError, NotImplementedError):
        note = "its file system knows no locks; let no other run use it at the same time"
        print(f"{folder}: {note}", file=sys.stderr, flush=True)
    return folder


class Run:
    """One run of a script: its config, data and output folder, and the rows of its results."""

    def __init__(self, config, data, folder, started):
        self.config, self.data, self.folder = config, data, folder
        self.rows = []
        self._started = started  # on time.perf_counter()'s clock
        self._first_step = None  # seconds from then to the end of the first training step
        self._trainings = {}  # id of a model: the model, which so keeps its id, and its Training

    def seeds(self, count):
        """So many seeds, from --seed on."""
        return [(self.config.seed + i) % 2**32 for i in range(count)]

    def take_teacher(self, network, split):
        """Brings the teacher of another run, which --teacher names, into a fresh `network`: of
        several the one with --teacher-seed. Raises UserError if that folder has none, one of
        another shape, or one that was not trained on `split`."""
        flag = f"--teacher {self.config.teacher}"
        folder = utils.at_home(self.config.teacher, "--teacher") / "weights"
        files = {path.stem.split("-")[-1]: path for path in sorted(folder.glob("teacher-*.npz"))}
        require(files, f"{flag}: no finished run has left a teacher in {folder}")
        seed = str(self.config.teacher_seed) if len(files) > 1 else next(iter(files))
        several = f"{flag}: has several teachers; --teacher-seed must be one of {', '.join(files)}"
        require(seed in files, several)
        path = files[seed]
        training = Training.from_weights(path, network, flag)
        same = training.settings["images"] == fingerprint(split)
        other = f"{flag}: it was trained on other images than the {len(split.label):,} of this run"
        require(same, f"{other}; --dataset, --holdout, --quick and the like must be the same")
        print(f"Teacher: {path}", flush=True)
        self._remember(network, training)
        training.save_weights(self.folder, network)  # so that this run's folder has it, too
        return network

    def _remember(self, model, training):
        for one in model if isinstance(model, (list, tuple)) else (model,):
            self._trainings[id(one)] = one, training

    def training_of(self, model):
        """The Training in which a model, or the first of several, was trained; None if in none."""
        first = model[0] if isinstance(model, (list, tuple)) else model
        return self._trainings.get(id(first), (None, None))[1]

    def add_row(self, name, model, logits, *, seed=None, teacher_logits=None, **more):
        """Adds a row to the results: what a model answers to `data.test`, logits [N, C].

        With the teacher's logits it has fidelity too. `more` is what else was measured. The seed
        and the cost are those of the model's training; without one, give a seed.
        """
        label, scored_on = self.data.test.label, self.data.scored_on
        errors = int((logits.argmax(-1) != label).sum())
        training = self.training_of(model)
        row = {
            "name": name,
            "seed": training.settings["seed"] if seed is None else seed,
            "params": utils.count_params(model),
            f"{scored_on}_accuracy": 1 - errors / len(label),
            f"{scored_on}_errors": errors,
            **utils.calibration(logits, label),
        }
        if teacher_logits is not None:
            row |= utils.fidelity(logits, teacher_logits)
        row["seconds"] = training.seconds if training else 0.0
        if training:
            row |= training.notes
            row["epoch_seconds"] = [record["seconds"] for record in training.history]
            row["settings"], row["history"] = training.settings, training.history
        self.rows.append(row | more)
        return self.rows[-1]

    def measure_inference(self, name, model):
        """Adds to the rows of a name what a network costs in use: milliseconds for a batch of 1 and
        of 128, and the bytes of its file of weights."""
        training = self.training_of(model)
        path = training.weights_path(self.folder)
        found = {
            "latency_ms": {str(size): utils.latency_ms(model, size) for size in (1, 128)},
            "bytes": path.stat().st_size,
        }
        for row in self.rows:
            if row["name"] == name:
                row |= found

    def values(self, name, key):
        """What the rows of a name hold under a key, in order of the seeds."""
        return [row[key] for row in self.rows if row["name"] == name]

    def accuracies(self, name):
        """The accuracies of the rows of a name, in percent."""
        return [100 * x for x in self.values(name, f"{self.data.scored_on}_accuracy")]

    def compare(self, name, other):
        """In words: how much more accurate the rows of one name are than those of another."""
        a, b = self.accuracies(name), self.accuracies(other)
        if len(a) == 1:
            return f"{_points(a[0] - b[0])} points (one seed)"
        gain = utils.paired_difference(a, b)
        interval = f"95 %: {_points(gain.low)} to {_points(gain.high)}"
        return f"{_points(gain.mean)} points ({interval}), {gain.wins} of {gain.pairs} seeds"

    def finish(self, figure, summary, **more):
        """Writes results.json and figure.png, prints the summary and returns what results.json has.

        Args:
          figure: a matplotlib Figure.
          summary: {what: found}, lines below the table of the models.
          more: what else results.json is to hold.
        """
        report = {
            "script": _script_name(type(self.config)),
            "config": dataclasses.asdict(self.config),
            "dataset": {
                "name": self.data.name,
                "source": self.data.source,
                "train": len(self.data.train.label),
                self.data.scored_on: len(self.data.test.label),
            },
            "versions": versions(),
            "device": device(),
            "seconds": self._seconds(),
            **more,
            "results": self.rows,
        }
        text = json.dumps(report, indent=1, allow_nan=False) + "\n"
        self.save_figure(figure, "figure.png")
        write_whole(self.folder / "results.json", text.encode())
        self._print_summary(report, summary)
        return report

    def save_figure(self, figure, name):
        """Writes a matplotlib Figure to the run's folder, as a PNG of this name."""
        for axes in figure.axes:
            axes.title.set_wrap(True)  # a long title goes on in a second line
        png = io.BytesIO()
        figure.savefig(png, dpi=150)
        write_whole(self.folder / name, png.getvalue())

    def _seconds(self):
        """Seconds of each name's trainings, now or in an earlier run, and of this run in all."""
        seconds = {}
        for row in self.rows:
            seconds[row["name"]] = seconds.get(row["name"], 0.0) + row["seconds"]
        if self._first_step is not None:
            seconds["first_step"] = self._first_step
        return seconds | {"total": time.perf_counter() - self._started}

    def _print_summary(self, report, summary):
        print_heading("SUMMARY")
        scored_on, seconds = self.data.scored_on, report["seconds"]
        costs = [f"{x} {seconds[x]:.0f} s" for x in dict.fromkeys(r["name"] for r in self.rows)
                 if seconds[x]]  # fmt: skip
        lines = {
            **summary,
            "Time": f"{seconds['total']:.0f} s",
            "Training, now or before": ", ".join(costs),
            "Data": self.data,
            "Results, figure, weights": self.folder,
        }
        wide = max(30, *(len(row["name"]) for row in self.rows), *map(len, lines))
        measured = any("latency_ms" in row for row in self.rows)
        inference = "  on disk  batch of 1  batch of 128" if measured else ""
        print(f"{'':{wide}} parameters  {scored_on} accuracy  errors{inference}")
        for name in dict.fromkeys(row["name"] for row in self.rows):
            same = [row for row in self.rows if row["name"] == name]  # of several seeds: a mean
            accuracy = f"{np.mean(self.accuracies(name)):.2f} %"
            errors = np.mean(self.values(name, f"{scored_on}_errors"))
            columns = f"{same[0]['params']:>10,}{accuracy:>{len(scored_on) + 11}}{errors:>8,.0f}"
            if "latency_ms" in same[0]:
                one, many = same[0]["latency_ms"].values()
                columns += f"{same[0]['bytes'] / 1e6:>6.2f} MB{one:>10.2f} ms{many:>11.1f} ms"
            print(f"{name:{wide}} {columns}")
        for what, found in lines.items():
            print(f"{what:{wide}} {found}")
        sys.stdout.flush()


def _points(difference):
    return f"{round(difference, 2) + 0.0:+.2f}"  # no -0.00


def print_heading(text):
    print(f"\n{f' {text} ':=^80}", flush=True)


def versions():
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version()} | found


def device():
    return f"{jax.device_count()} × {jax.devices()[0].device_kind} ({platform.machine()})"


def _script_name(config_class):
    try:
        return Path(inspect.getfile(config_class)).name
    except (OSError, TypeError):
        return "notebook"


# %% A training that can be stopped

CHECKPOINT_PAUSE = 5  # seconds at least from one checkpoint to the next


class Training:
    """One training: its progress, its checkpoints and a record of it.

        training = Training(run, "teacher", model, optimizer, recipe, data.train)
        for epoch in training.epochs():
            for batch in ...:
                training.log(step(batch))
            training.score("test", evaluate, model, data.test)

    Stopped and started again, `epochs` yields the epochs that are left. A checkpoint is taken up
    only by the same training: the function that makes the Training has the same arguments and the
    same code, with all functions and classes that it uses. Comments and docstrings do not count,
    nor does what that function reads from `run`: whatever matters has to be an argument.

    `history` has a dict an epoch: epoch, seconds of its steps, the mean of each metric and, where
    it was scored, test_accuracy (validation_accuracy with a holdout). `seconds` is the cost of all,
    `notes` what else results.json is to say.
    """

    KEPT = ("name", "seed", "settings", "history", "seconds", "notes")

    def __init__(self, run, name, model, optimizer, recipe, split, caller=None):
        self.run, self.name, self.seed, self.epochs_in_all = run, name, recipe.seed, recipe.epochs
        self.model, self.optimizer, self._label = model, optimizer, split.label
        self.history, self.seconds, self.notes = [], 0.0, {}
        self._steps_in_all = recipe.epochs * (len(split.label) // recipe.batch_size)
        caller = caller or inspect.currentframe().f_back  # the frame of the training function
        names = inspect.getargvalues(caller)
        # Arguments of every kind, and what a function within another takes from that one.
        given = [*names.args, names.varargs, names.keywords, *caller.f_code.co_freevars]
        given = {name: names.locals[name] for name in given if name in names.locals}
        given = {argument: x for argument, x in given.items() if not isinstance(x, Run)}
        self.settings = {"images": fingerprint(split), **recipe._asdict()}
        for argument, value in given.items():
            if value is None or isinstance(value, (bool, int, float, str)):
                self.settings[argument] = value
        # The file's name says what went in, and which code made it.
        self._inputs = fingerprint([name, self.settings, given])[:10]
        made_by = [_Code(caller.f_code, caller.f_globals), versions()]
        if jax.config.jax_enable_x64:
            made_by.append("float64")
        code = fingerprint(made_by)[:10]
        file = f"{slug(name)}-{self.seed}-{self._inputs}-{code}.npz"
        self.path = run.folder / "checkpoints" / file
        run._remember(model, self)

    def epochs(self):
        """Yields the epochs still to train, from 1 on. Saves model and optimizer after the last one
        and, before that, every few seconds. Raises UserError when a step's metrics or the weights
        are not finite, or a checkpoint cannot be written."""
        self._go_on()
        begun = saved = time.perf_counter()
        begun -= self.seconds
        done = len(self.history)
        steps_done = self._steps_in_all * done // max(1, self.epochs_in_all)
        with tqdm(
            total=self._steps_in_all, initial=steps_done, desc=self.name, unit=" steps",
            leave=False, disable=not sys.stderr.isatty(),
        ) as self._bar:  # fmt: skip
            for epoch in range(done + 1, self.epochs_in_all + 1):
                self._begin_epoch(epoch)
                yield epoch
                self._end_steps()
                self.history.append(self._record)
                self.seconds = time.perf_counter() - begun
                last = epoch == self.epochs_in_all
                if last or time.perf_counter() - saved >= CHECKPOINT_PAUSE:
                    self._save()
                    saved = time.perf_counter()
                if self._is_one_of_ten(epoch):
                    self._bar.write(self._line(self._record), file=sys.stdout)
                    sys.stdout.flush()
        self.save_weights(self.run.folder, self.model)

    def log(self, metrics):
        """Takes the dict of metrics that a step returned: scalars, or arrays of them."""
        self._metrics.append(metrics)
        self._bar.update()
        if self.run._first_step is None:
            jax.block_until_ready(metrics)
            self.run._first_step = time.perf_counter() - self.run._started

    def score(self, scored_on, function, *arguments):
        """At the end of about ten epochs in all, notes the accuracy that `function(*arguments)`
        gives; `scored_on` is "test" or "validation"."""
        if self._is_one_of_ten(self._record["epoch"]):
            self._end_steps()
            self._record[f"{scored_on}_accuracy"] = float(function(*arguments))

    @contextlib.contextmanager
    def timed(self, note):
        """Notes the seconds that its block takes."""
        begun = time.perf_counter()
        yield
        self.notes[note] = time.perf_counter() - begun

    @functools.cached_property
    def finished(self):
        """Whether an earlier run has trained it to its end."""
        if not self.path.exists():
            return self.epochs_in_all == 0
        return len(_read_npz(self.path)[0]["history"]) >= self.epochs_in_all

    def _is_one_of_ten(self, epoch):
        return epoch % max(1, self.epochs_in_all // 10) == 0 or epoch == self.epochs_in_all

    def _begin_epoch(self, epoch):
        self._record = {"epoch": epoch}
        self._metrics = []
        self._epoch_begun = time.perf_counter()

    def _end_steps(self):
        """Closes the account of an epoch's steps, once: means, finiteness, time."""
        if "seconds" in self._record:
            return
        metrics = jax.device_get(self._metrics)
        require(metrics, f"{self.name}: no step was logged in an epoch; call `log` after each")
        for step, found in enumerate(metrics, 1):
            if not all(np.isfinite(x).all() for x in found.values()):
                where = f"{self.name}, epoch {self._record['epoch']}, step {step}"
                raise UserError(f"{where}: the loss is not finite; {self._why_not_finite()}")
        for key in metrics[0]:
            self._record[key] = np.mean([found[key] for found in metrics], axis=0).tolist()
        weights = jax.tree.leaves(nnx.state(self.model, nnx.Param))
        if not all(np.isfinite(x).all() for x in weights):
            where = f"{self.name}, epoch {self._record['epoch']}, last step"
            raise UserError(f"{where}: weights are not finite; {self._why_not_finite()}")
        self._record["seconds"] = time.perf_counter() - self._epoch_begun

    def _why_not_finite(self):
        """The most likely reason: labels that the logits have no place for, or too large steps."""
        with contextlib.suppress(Exception):  # networks that take no images
            image = jax.ShapeDtypeStruct((1, *self.run.data.train.image.shape[1:]), np.float32)
            classes = nnx.eval_shape(lambda m, x: m(x), self.model, image).shape[-1]
            low, high = self._label.min(), self._label.max()
            if low < 0 or high >= classes:
                return f"labels {low} to {high} came, but {classes} logits fit 0 to {classes - 1}"
        return "try a lower learning rate, or a temperature nearer to 1"

    def _line(self, record):
        """What is printed of an epoch."""
        line = f"Epoch {record['epoch']:2}/{self.epochs_in_all}"
        for scored_on in ("test", "validation"):
            if f"{scored_on}_accuracy" in record:
                line += f" | {scored_on.title()} Acc: {record[f'{scored_on}_accuracy']:.4f}"
        if "soft_loss" in record:
            soft = round(np.mean(record["soft_loss"]), 4) + 0.0  # no -0.0000
            line += f" | Hard: {np.mean(record['hard_loss']):.4f} Soft: {soft:.4f}"
            if "feature_loss" in record:
                line += f" Feature: {record['feature_loss']:.4f}"
        else:
            line += f" | Loss: {np.mean(record['loss']):.4f}"
        return f"{line} | {record['seconds']:.1f} s"

    # Files. The state of a model or optimizer is kept as arrays, named by their places in it.

    def _go_on(self):
        """Brings the checkpoint of an earlier run back, if there is one, and says so."""
        if self.path.exists():
            parts = {"model": self.model, "optimizer": self.optimizer}
            self._restore(self.path, parts, hint="move it away to train anew")
            done = len(self.history)
            before = (
                "Trained before" if done >= self.epochs_in_all else f"Going on after epoch {done}"
            )
            print(f"{before}: {self.path}", flush=True)
            return
        others = self.path.parent.glob(f"{slug(self.name)}-{self.seed}-{self._inputs}-*.npz")
        if any(others):
            changed = "the code, or a library's version, has changed since"
            print(f"{self.name}: {changed}; training anew", flush=True)

    def _save(self):
        """Writes a checkpoint, whole or not at all."""
        parts = {"model": self.model, "optimizer": self.optimizer}
        self._write(self.path, parts)

    def weights_path(self, folder):
        return folder / "weights" / f"{slug(self.name)}-{self.seed}.npz"

    def save_weights(self, folder, model):
        """Writes what inference needs: the weights and BatchNorm's statistics."""
        self._write(
            self.weights_path(folder), {"model": nnx.state(model, (nnx.Param, nnx.BatchStat))}
        )

    @classmethod
    def from_weights(cls, path, model, flag):
        """Brings back what `save_weights` wrote, into a model. Returns the record of its training,
        which has ended: it has no epochs."""
        training = cls.__new__(cls)
        state = nnx.state(model, (nnx.Param, nnx.BatchStat))
        training._restore(path, {"model": state}, f"{flag} needs another")
        nnx.update(model, state)
        return training

    def _write(self, path, parts):
        record = {key: getattr(self, key) for key in self.KEPT}
        arrays = {"record": np.frombuffer(json.dumps(record).encode(), np.uint8)}
        for part, module in parts.items():
            for place, leaf in _leaves(module):
                arrays[part + place] = np.asarray(
                    jax.random.key_data(leaf) if _is_key(leaf) else leaf
                )
        content = io.BytesIO()
        np.savez(content, **arrays)
        write_whole(path, content.getvalue())

    def _restore(self, path, parts, hint):
        record, arrays = _read_npz(path, hint)
        for part, module in parts.items():
            present = {part + place: leaf for place, leaf in _leaves(module)}
            saved = {place for place in arrays if place.startswith(part)}
            shapes = f"{path}: of another shape; {hint}"
            require(present.keys() == saved, shapes)
            leaves = []
            for place, leaf in present.items():
                array = arrays[place]
                if _is_key(leaf):
                    array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
                require(array.shape == leaf.shape, shapes)
                leaves.append(jax.device_put(array, leaf.sharding))
            state = module if isinstance(module, nnx.State) else nnx.state(module)
            restored = jax.tree.unflatten(jax.tree.structure(state), leaves)
            nnx.update(module, restored) if module is not state else module.update(restored)
        for key in self.KEPT:
            setattr(self, key, record[key])


def slug(name):
    """A name as part of a file's name."""
    return name.replace(",", "").replace(" %", "").replace(" ", "_")


def _leaves(module):
    """(place, array) of all that a module, tuple of modules or state holds, in a fixed order."""
    state = module if isinstance(module, nnx.State) else nnx.state(module)
    found, _ = jax.tree.flatten_with_path(state)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in found]


def _is_key(x):
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _read_npz(path, hint="move it away to train anew"):
    """The record and the arrays of a file. Its format has checksums. Raises UserError if it is
    damaged."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        record = json.loads(arrays.pop("record").tobytes())
        return {key: record[key] for key in Training.KEPT}, arrays
    except (OSError, EOFError, ValueError, KeyError, AttributeError, TypeError, zipfile.BadZipFile,
            zlib.error, NotImplementedError) as error:  # fmt: skip
        raise UserError(f"{path}: damaged ({_brief(error)}); {hint}") from None


def load_network(folder, name, network, seed=None):
    """Brings the weights of a network of a finished run into a fresh one, and returns it.

        student = StudentCNN(rngs=nnx.Rngs(0))
        load_network("runs/15_knowledge_distillation", "distilled", student)
        logits = student(images)  # [B, 28, 28, 1] from 0 to 1, to [B, 10]

    Args:
      folder: the output folder of the run.
      name: the name of a training, such as "distilled": mostly that of a row of the summary.
      network: a fresh network of the class that was trained.
      seed: of several networks of that name the one with this seed; the last written if None.

    Raises UserError if there is none, or one of another shape.
    """
    folder = utils.at_home(folder, "folder")
    files = (folder / "weights").glob(f"{slug(name)}-{'*' if seed is None else seed}.npz")
    files = sorted(files, key=os.path.getmtime)
    known = ", ".join(sorted(path.stem for path in (folder / "weights").glob("*.npz")))
    require(files, f"{folder}: has no weights of {name!r}; it has {known or 'none'}")
    Training.from_weights(files[-1], network, "the network")
    return network


def write_whole(path, content):
    """Writes bytes to a file, whole or not at all. Raises UserError if that cannot be."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def _brief(error):
    return " ".join(str(error).split())[:160]


# %% Fingerprints
# What a training was given, and what its code does. The latter is read from Python's bytecode,
# which knows neither comments nor formatting, and which is there in a notebook too.


class _Code(NamedTuple):
    """The code of a function, and the names that it can see."""

    code: types.CodeType
    namespace: dict


_EMPTY_CELL = types.CellType()


def fingerprint(value):
    """A hash of a value: numbers, arrays, modules, functions with all that they use."""
    sha = hashlib.sha256()
    _describe(value, sha.update, set())
    return sha.hexdigest()[:16]


def _describe(value, write, seen):
    """Hands `write` the bytes that tell a value from others. `seen` are functions and classes."""
    if isinstance(value, jax.core.Tracer):
        write(b"a value within a compiled function")
    elif isinstance(value, (np.ndarray, np.generic, jax.Array)):
        value = jax.random.key_data(value) if _is_key(value) else value
        array = np.ascontiguousarray(value)
        if array.dtype.hasobject:
            return _describe([array.shape, *array.ravel().tolist()], write, seen)
        write(f"array {array.dtype} {array.shape}".encode())
        write(array.view(np.uint8).data if array.size else b"")
    elif isinstance(value, nnx.Module):
        _describe(jax.tree.leaves(nnx.state(value, (nnx.Param, nnx.BatchStat))), write, seen)
    elif isinstance(value, dict):
        _describe([part for key in value for part in (key, value[key])], write, seen)
    elif isinstance(value, (set, frozenset)):
        _describe(sorted(map(repr, value)), write, seen)
    elif isinstance(value, _Code):
        _describe_code(value.code, value.namespace, write, seen)
    elif isinstance(value, enum.Enum):
        _describe([type(value), value.name], write, seen)
    elif isinstance(value, (list, tuple)):
        write(f"{type(value).__name__} of {len(value)}".encode())
        if type(value) not in (list, tuple):
            _describe(type(value), write, seen)  # its methods
        for part in value:
            _describe(part, write, seen)
    elif isinstance(value, functools.partial):
        _describe([value.func, value.args, value.keywords], write, seen)
    elif hasattr(value, "__wrapped__") and not isinstance(value, types.FunctionType):
        _describe(value.__wrapped__, write, seen)  # by nnx.jit, functools.cache, ...
    elif isinstance(value, types.BuiltinFunctionType):
        write(value.__qualname__.encode())
    elif isinstance(value, types.MethodType):
        _describe([value.__func__, value.__self__], write, seen)
    elif isinstance(value, (types.FunctionType, type)):
        write(value.__qualname__.encode())
        if value not in seen:
            seen.add(value)
            _describe_definition(value, write, seen)
    elif isinstance(value, np.ufunc):
        write(value.__name__.encode())
    elif dataclasses.is_dataclass(value) or _is_of_user(type(value)):
        if id(value) not in seen:
            seen.add(id(value))
            _describe([type(value), getattr(value, "__dict__", {})], write, seen)
    elif isinstance(value, types.ModuleType):
        write(value.__name__.encode())
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, range, slice)):
        write(f"{type(value).__name__} {value!r}".encode())
    else:
        write(f"{type(value).__module__}.{type(value).__qualname__}".encode())


def _describe_definition(value, write, seen):
    if isinstance(value, types.FunctionType):
        # A library's function, too, may have been made with numbers, as `optax.adam(1e-3)` and
        # `jax.vmap(f, in_axes=1)` are, and it may call one of the user's.
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY_CELL]
        wrapped = getattr(value, "__wrapped__", None)
        _describe([value.__defaults__, value.__kwdefaults__, cells, wrapped], write, seen)
        if _is_of_user(value):
            _describe_code(value.__code__, value.__globals__, write, seen)
        return
    if not _is_of_user(value):
        return
    _describe(list(value.__bases__), write, seen)
    for name, member in sorted(vars(value).items()):
        own = not name.startswith("__") or isinstance(member, types.FunctionType)
        if own or name == "__annotations__":
            member = getattr(member, "__func__", member)  # of a class or static method
            member = member.fget if isinstance(member, property) else member
            member = member.func if isinstance(member, functools.cached_property) else member
            _describe([name, member], write, seen)


def _describe_code(code, namespace, write, seen):
    """The instructions of a function, and all that they name: its own module's functions, classes
    and constants, and those of the modules beside it."""
    codes = [code]
    for part in codes:
        codes += [x for x in part.co_consts if isinstance(x, types.CodeType)]
        for instruction in dis.get_instructions(part):
            argument = instruction.argval
            if isinstance(argument, types.CodeType):
                argument = "code"  # it is among `codes`
            if isinstance(argument, frozenset):
                argument = sorted(map(repr, argument))  # its own order differs from run to run
            write(f"{instruction.opname} {argument!r}".encode())
    names = sorted({name for part in codes for name in part.co_names})
    for name in names:
        if name in namespace:
            _describe_name(name, namespace[name], names, write, seen)


def _describe_name(name, value, names, write, seen):
    """A name and what it stands for; of a module of the user's what the code names of it."""
    if not isinstance(value, types.ModuleType):
        _describe([name, value], write, seen)
    elif _is_of_user(value):
        write(value.__name__.encode())
        for attribute in names:
            module_and_name = value.__name__, attribute
            if hasattr(value, attribute) and module_and_name not in seen:
                seen.add(module_and_name)
                _describe_name(attribute, getattr(value, attribute), names, write, seen)


def _is_of_user(value):
    """Whether a function, class or module is the script's, or of a module beside it. This module
    and plots.py do not count: they change no result."""
    if isinstance(value, types.FunctionType):  # functools.wraps sets __module__ to another's
        module = sys.modules.get(value.__globals__.get("__name__"))
    else:
        module = value if isinstance(value, types.ModuleType) else sys.modules.get(value.__module__)
    file = getattr(module, "__file__", None)
    if file is None:  # a notebook; or built into Python
        return getattr(module, "__name__", None) == "__main__"
    installed = {"site-packages", "dist-packages"} & set(Path(file).parts)
    library = installed or Path(file).is_relative_to(sysconfig.get_path("stdlib"))
    return not library and module.__name__ not in (__name__, "plots")
