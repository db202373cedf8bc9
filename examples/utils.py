"""What the scripts share and what would bore in them: command line, devices, data, scoring,
checkpoints, results. To copy a script out of this repository, take this file along."""

import argparse
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import http.client
import importlib.metadata
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import platform
import re
import signal
import sys
import threading
import time
import typing
import urllib.error
import urllib.request
import warnings
import zlib
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# A notebook hands its own on to what it starts, where matplotlib may not know it.
if os.environ.get("MPLBACKEND", "").startswith("module://") and "IPython" not in sys.modules:
    del os.environ["MPLBACKEND"]

START = time.perf_counter()
CLAIMED = []  # the lock file of the output folder
TIMES = {}  # "first_step": seconds from START to the end of the first training step


class UserError(Exception):
    """Something the user can mend. `run` prints it as one line and exits with status 2."""


def require(ok, message):
    """Raises UserError with the message unless `ok`."""
    if not ok:
        raise UserError(message)


# %% Command line

DATASETS = ("mnist", "fashion_mnist", "kmnist", "digits")
# What a flag may hold, by its name without a leading `teacher_`, and the same in words.
RULES = {
    "dataset": (lambda v: v in DATASETS, ", ".join(DATASETS)),
    "schedule": (lambda v: v in ("onecycle", "constant"), "onecycle or constant"),
    "seed": (lambda v: 0 <= v < 2**32, "from 0 to 2^32 - 1"),
    "epochs": (lambda v: 0 <= v <= 10_000, "from 0 to 10,000"),
    "batch_size": (lambda v: v >= 1, "1 or more"),
    "learning_rate": (lambda v: 0 < v < math.inf, "a number above 0"),
    "temperature": (lambda v: 1e-3 <= v <= 1e4, "from 0.001 to 10,000"),
    "alpha": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "labels": (lambda v: bool(re.fullmatch("all|[1-9][0-9]{1,8}", str(v))), "10 or more, or all"),
    "holdout": (lambda v: v >= 0, "0 or more"),
    "validation": (lambda v: v >= 1, "1 or more"),
    "seeds": (lambda v: 2 <= v <= 100, "from 2 to 100"),
    "test_seeds": (lambda v: 2 <= v <= 100, "from 2 to 100"),
    "teachers": (lambda v: 2 <= v <= 100, "from 2 to 100"),
    "generations": (lambda v: 1 <= v <= 10, "from 1 to 10"),
    "mutual_temperature": (lambda v: 1e-3 <= v <= 1e4, "from 0.001 to 10,000"),
    "noise": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "unit": (lambda v: 1 <= v <= 10_000, "from 1 to 10,000"),
    "dropout": (lambda v: 0 <= v < 1, "0 or more and below 1"),
    "max_norm": (lambda v: 1e-3 <= v <= 1e6, "from 0.001 to 1,000,000"),
    "smoothing": (lambda v: 0 < v < 1, "above 0 and below 1"),
    "ambiguous": (lambda v: 0 <= v <= 1, "from 0 to 1"),
}
RULE_OF = {f"{name}s": name for name in ("temperature", "alpha", "smoothing", "unit")}
RULE_OF |= {"input_dropout": "dropout", "baseline_learning_rate": "learning_rate"}


def parse(config_class, argv=None):
    """Flags from a dataclass: `learning_rate: float = 0.1  # help` makes `--learning-rate`."""
    text = inspect.getdoc(inspect.getmodule(config_class)) or ""
    parser = argparse.ArgumentParser(description=text.split("\n\n")[0], allow_abbrev=False)
    parser.error = lambda message: require(False, f"{message} (--help lists the flags)")
    source, hints = inspect.getsource(config_class), typing.get_type_hints(config_class)
    source = source.replace("%", "%%")  # argparse formats its help
    comments = dict(re.findall(r"^ +(\w+): .*?  # (.*)$", source, re.MULTILINE))
    for field in dataclasses.fields(config_class):
        hint, default = hints[field.name], field.default
        if type(None) in typing.get_args(hint):  # X | None
            hint = typing.get_args(hint)[0]
        several = typing.get_origin(hint) is tuple
        kind = typing.get_args(hint)[0] if several else hint
        how = {"type": kind, "metavar": kind.__name__.upper()}
        how |= {"nargs": "+"} if several else {}
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else how
        shown = " ".join(map(str, default)) if several and default else default
        note = "" if default is None or kind is bool else f" (default {shown})"
        how |= {"default": default, "help": comments.get(field.name, "") + note}
        parser.add_argument("--" + field.name.replace("_", "-"), **how)
    flags = vars(parser.parse_args(argv))
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in flags.items()})


def run(main, config_class):
    """Runs a script's `main(config)` from its command line."""
    for library in ("absl", "asyncio", "matplotlib"):  # Warnings of no use to who runs a script.
        logging.getLogger(library).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "overflow encountered in cast")  # the loss check says it
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the script
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")  # where the terminal knows no ✓
    signal.signal(signal.SIGINT, _stop)
    try:
        config = parse(config_class)
        tune_malloc()
        main(config)
    except BrokenPipeError:  # Whoever read the output, such as `head`, has gone.
        os._exit(1)
    except (UserError, OSError) as error:  # The latter: a full disk, a folder without permission.
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _stop(*_):
    """Ends the process at once: raised inside a callback of JAX, KeyboardInterrupt gets lost."""
    print("\nStopped. The same command goes on from the last checkpoint.", file=sys.stderr)
    os._exit(130)


def check_flags(config):
    """Raises UserError for the first flag that does not hold what RULES say."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.removeprefix("teacher_")
        flag, several = "--" + field.name.replace("_", "-"), isinstance(value, tuple)
        rule = RULES.get(RULE_OF.get(name, name))
        require(value != "", f"{flag}: must not be empty")
        for one in value if several else (value,):
            if rule and one is not None:
                require(rule[0](one), f"{flag} {one}: must be {rule[1]}")
        if several:  # as a number is printed, it names a network
            shown = {f"{x:.12g}" if isinstance(x, float) else x for x in value}
            require(len(shown) == len(value), f"{flag}: must not repeat a value")


def start(config, share=True):
    """Checks flags, claims the cores (to share out a batch), loads the data and checks the output
    folder. Where a step is all matrix products, which XLA spreads over the cores itself, `share`
    costs more than it gains, and XLA's flag changes nothing."""
    check_flags(config)
    if share:
        use_all_cores()
    try:
        jax.devices()
    except RuntimeError as error:
        raise UserError(f"JAX_PLATFORMS {jax.config.jax_platforms}: {_brief(error)}") from None
    data = load_data(config.dataset, config.data_dir, getattr(config, "holdout", 0), config.quick)
    claim(config.output_dir)
    print(f"Data: {data}", flush=True)
    return data


def claim(output_dir):
    """Makes the output folder and locks it, until the process ends or claims another. Raises
    UserError if another process has it, or if it cannot be written."""
    folder, flag = Path(output_dir), f"--output-dir {output_dir!r}"
    try:
        output_dir.encode()
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for name in ("results.json", "figure.png"):
            require(not (folder / name).is_dir(), f"{flag}: {name} in it must not be a folder")
        CLAIMED[:] = [open(folder / ".lock", "w")]  # noqa: SIM115
        if fcntl:
            fcntl.flock(CLAIMED[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{flag}: another run is using it; name another folder") from None
    except (OSError, UnicodeError) as error:
        raise UserError(f"{flag}: cannot write ({error})") from None


def given(value, default):
    return default if value is None else value


# %% Devices


# glibc takes memory in huge pages, and keeps up to 4 GiB of what a step frees for the next one.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=0x100000000"
MALLOC += ":glibc.malloc.trim_threshold=0x100000000"


def tune_malloc():
    """Restarts Python with these settings: the large arrays of a step then cost hardly any page
    faults, otherwise a good part of a teacher's step. Other systems ignore the variable."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = MALLOC
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


# YNNPACK, a library in XLA, keeps products of matrices and sums. Convolutions and the rest, which
# jaxlib 0.10.2 hands to it as well, are faster without. Other versions may not know the name.
XLA = {
    "0.10.2": "--xla_cpu_experimental_ynn_fusion_type="
    "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
}


def tune_xla():
    """Sets XLA_FLAGS, unless it is set, before JAX starts: where measured, Linux on x86-64, and
    where no plugin for an accelerator reads it too, which may not know the flag."""
    flags = XLA.get(importlib.metadata.version("jaxlib"))
    plugins = any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
    if flags and not plugins and (sys.platform, platform.machine()) == ("linux", "x86_64"):
        os.environ.setdefault("XLA_FLAGS", flags)


def use_all_cores():
    """Makes each CPU core a JAX device (a power of two, at most 8), to share out a batch: XLA runs
    most CPU work but convolutions and matrix products on one thread a device. GPUs are used as they
    are."""
    tune_xla()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        jax.config.update("jax_num_cpu_devices", 2 ** min(3, int(math.log2(cores))))
    except RuntimeError:  # JAX has started already, with the devices it has.
        return


@functools.cache
def _sharding(*axes):
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*axes))


# Parameters: with fewer, sharing out a batch of 128 over 2 cores costs a step more than it gains.
FEW = 300_000


def bind(step, *modules, axis=None):
    """`nnx.cached_partial(step, *modules)`, on one device or on all. If the first module, which
    learns, has many parameters, all modules are copied to every device, which gets its part of each
    batch, the first argument of what is returned; otherwise all are put on one. With an `axis`, as
    for a stack of networks, the batch is shared out along that in any case. A step that was bound
    to one of the modules before has to be bound anew."""
    small = axis is None and count_params(modules[0]) < FEW
    if jax.device_count() == 1 or small:
        return nnx.cached_partial(step, *put(modules, jax.devices()[0]))
    replicate(modules)
    bound = nnx.cached_partial(step, *modules)
    return lambda batch, *more, **how: bound(shard(batch, axis or 0), *more, **how)


def put(modules, where):
    """Puts the state of a module, or of a tuple of modules, on a device or, by a sharding, on
    several; returns what it was given."""
    nnx.update(modules, jax.device_put(nnx.state(modules), where))
    return modules


def replicate(modules):
    """Puts a copy of the state of a module, or of a tuple of modules, on every device."""
    put(modules, _sharding())


def shard(batch, axis=0):
    """Shares arrays out over the devices along an axis; copies them if it does not divide."""
    divides = all(x.shape[axis] % jax.device_count() == 0 for x in jax.tree.leaves(batch))
    return jax.device_put(batch, _sharding(*[None] * axis, "batch") if divides else _sharding())


def settle(arrays):
    """On the CPU, waits for what a step returned if its batch was shared out: with several such
    steps under way XLA's thread pool can deadlock (seen in jaxlib 0.10.2), and gains nothing."""
    on_devices = (x for x in jax.tree.leaves(arrays) if isinstance(x, jax.Array))
    shared = any(len(x.sharding.device_set) > 1 for x in on_devices)
    if shared and jax.default_backend() == "cpu":
        jax.block_until_ready(arrays)


# %% Data

FILES = [
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]


class Split(typing.NamedTuple):
    image: np.ndarray  # [N, 28, 28, 1] uint8
    label: np.ndarray  # [N] int32
    index: np.ndarray  # [N] int32: the place of each image in the whole training (or test) set

    def take(self, places):
        return Split(*(x[places] for x in self))


class Data(typing.NamedTuple):
    name: str  # mnist, fashion_mnist, kmnist or digits
    source: str  # in words
    train: Split
    test: Split
    scored_on: str  # "test", or "validation": held out of the training images

    def __str__(self):
        train, test = len(self.train.label), len(self.test.label)
        return f"{self.name} ({self.source}), {train:,} training, {test:,} {self.scored_on} images"

    def digest(self):
        """Tells the images and labels of one run from those of another."""
        return digest(*self.train, *self.test)


def digest(*things):
    """A short fingerprint of arrays, and of the weights and statistics of modules."""
    sha = hashlib.sha256()
    for x in things:
        x = nnx.state(x, (nnx.Param, nnx.BatchStat)) if isinstance(x, nnx.Module) else x
        for array in jax.tree.leaves(x):
            sha.update(np.ascontiguousarray(array))
    return sha.hexdigest()[:16]


def _digest_of_json(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def load_data(name, data_dir=None, holdout=0, quick=False):
    """Loads a dataset from a folder, an earlier download, the network or, last, scikit-learn.

    Args:
      name: mnist, fashion_mnist or kmnist (four IDX files each), or digits (embedded).
      data_dir: a folder with the IDX files, plain or gzip; else <NAME>_DATA_DIR is looked up.
      holdout: so many training images, the last, take the place of the test images.
      quick: only the first 2,000 training images and the first 2,000 test images.

    Raises UserError where files are missing or wrong, or nothing can be had.
    """
    variable = f"{name.upper()}_DATA_DIR"
    folder = data_dir or os.environ.get(variable)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = Path(cache) / "mnist-distillation"
    if name != "digits" and folder:
        source, (train, test) = "local files", _read_folder(Path(folder))
    elif name != "digits" and _download(name, cache / name):
        source, (train, test) = "downloaded", _read_folder(cache / name)
    else:
        hint = f"{name}: no copy and no network; --data-dir or {variable} may name one"
        require(name in ("mnist", "digits"), hint)
        if name == "mnist":
            print(f"{hint}. Using embedded digits instead.", file=sys.stderr, flush=True)
        name, source, (train, test) = "digits", "embedded in scikit-learn", _embedded_digits()
    data = hold_out(Data(name, source, train, test, "test"), holdout)
    if quick:
        train, test = (split.take(slice(2000)) for split in (data.train, data.test))
        data = data._replace(train=train, test=test)
    return data


def hold_out(data, count, flag="--holdout"):
    """The data with its last `count` training images, unless 0, in place of the test images."""
    most = max(0, len(data.train.label) - 128)  # one batch of a teacher
    require(
        count <= most, f"{flag} {count}: must be at most {most:,}, to leave 128 training images"
    )
    train, held_out = data.train.take(slice(-count)), data.train.take(slice(-count, None))
    return data._replace(train=train, test=held_out, scored_on="validation") if count else data


def _read_folder(folder):
    """The training and the test split from the four IDX files of a folder."""
    hint = f"not a folder; --data-dir should name one that holds {FILES[0]}.gz and three more"
    require(folder.is_dir(), f"{str(folder)!r}: {hint}")
    splits = []
    for image_file, label_file in (FILES[:2], FILES[2:]):
        image, image_path = _read_idx(folder, image_file, 3)
        label, label_path = _read_idx(folder, label_file, 1)
        require(image.shape[1:] == (28, 28), f"{image_path}: images must be 28×28")
        counts = f"{len(label)} labels for {len(image)} images; both must be as many"
        require(len(image) == len(label), f"{label_path}: {counts}")
        require(label.max() <= 9, f"{label_path}: labels must be 0 to 9")
        splits.append(_split(image, label))
    return splits


def _read_idx(folder, name, dimensions):
    """One IDX file, plain or gzip, as an array of uint8, and its path."""
    path = folder / name if os.path.exists(folder / name) else folder / f"{name}.gz"
    require(os.path.lexists(path), f"{path}: missing; the folder must hold all four IDX files")
    require(os.path.isfile(path), f"{path}: must be a file")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged ({error}); get it again") from None
    except (OSError, MemoryError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    start = 4 + 4 * dimensions
    magic = f"wrong magic number; must be an IDX file of bytes in {dimensions} dimensions"
    require(raw[:4] == bytes([0, 0, 8, dimensions]) and len(raw) >= start, f"{path}: {magic}")
    shape = np.frombuffer(raw[4:start], ">u4").tolist()
    size = start + math.prod(shape)
    require(len(raw) == size, f"{path}: {len(raw)} bytes, but its header says {size}; get it again")
    require(size > start, f"{path}: holds nothing; get it again")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape), path


def _split(image, label):
    return Split(image[..., None], label.astype(np.int32), np.arange(len(label), dtype=np.int32))


def _download(name, folder):
    """Fetches the four files with TFDS's download manager, which checks their SHA-256; False with
    no network. (`tfds.load` itself needs TensorFlow to prepare MNIST.)"""
    if all((folder / f"{file}.gz").exists() for file in FILES):
        return True
    import tensorflow_datasets as tfds

    infos = tfds.builder(name).url_infos
    if not _reachable(next(iter(infos))):
        return False
    try:
        manager = tfds.download.DownloadManager(
            download_dir=folder / "downloads",
            url_infos=infos,
            dataset_name=name,
            force_checksums_validation=True,
        )
        paths = manager.download({info.filename: url for url, info in infos.items()})
    except Exception as error:  # The manager's, its HTTP library's or the system's.
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise UserError(f"{name}: the download failed ({reason}); see --data-dir") from None
    for file, path in paths.items():
        os.replace(path, folder / file)
    return True


def _reachable(url, seconds=4):
    """Whether a server answers within that time, by way of a proxy too."""
    answers = []

    def ask():
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            try:
                request = urllib.request.Request(url, method="HEAD")
                answers.append(urllib.request.urlopen(request, timeout=seconds))
            except urllib.error.HTTPError as refusal:  # an answer, too
                answers.append(refusal)

    # In a thread, since looking a name up knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def _embedded_digits():
    """scikit-learn's 1,797 digits of 8×8, brought to MNIST's form: 20×20 in a frame of 28×28."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    image = jax.image.resize(digits.images * (255 / 16), (len(digits.images), 20, 20), "bilinear")
    image = np.pad(np.rint(image).astype(np.uint8), ((0, 0), (4, 4), (4, 4)))
    order = np.random.default_rng(0).permutation(len(image))
    return [_split(image[part], digits.target[part]) for part in (order[500:], order[:500])]


def take_labels(split, count, seed):
    """A class-balanced subset of `count` images ("all": of all), drawn by `seed`."""
    total = len(split.label)
    count = total if count == "all" else int(count)
    require(count <= total, f"--labels {count}: there are {total} training images; or say all")
    order = np.random.default_rng([seed, 1]).permutation(total)
    # Each class's first image of the order, then each class's second, and so on.
    rank = np.empty(total, np.int64)  # of each image among those of its class
    for c in np.unique(split.label):
        rank[order[split.label[order] == c]] = np.arange((split.label == c).sum())
    return split.take(np.sort(np.lexsort((np.argsort(order), rank))[:count]))


def check_batch(flag, size, images):
    """Raises UserError if there are not enough images for one batch."""
    require(size <= images, f"{flag} {size}: a training has only {images:,} images")


def batches(split, batch_size, seed, epoch, **tables):
    """One epoch's batches, shuffled by seed and epoch, without the rest that fills no whole batch.

    Yields dicts: image [B, 28, 28, 1] float32 in [0, 1], label [B] int32, index [B] int32, and of
    each of `tables` [N, ...] the rows of these images, looked up by index.
    """
    total = len(split.label)
    check_batch("--batch-size", batch_size, total)
    order = np.random.default_rng([seed, 2, epoch]).permutation(total)
    steps = range(0, total - batch_size + 1, batch_size)
    for i in tqdm(steps, f"epoch {epoch}", leave=False, disable=not sys.stderr.isatty()):
        image, label, index = split.take(order[i : i + batch_size])
        batch = {"image": image / np.float32(255), "label": label, "index": index}
        yield batch | {name: table[index] for name, table in tables.items()}


def stacked_batches(splits, batch_size, seeds, epoch, **tables):
    """`batches` of several splits side by side, each with its seed: arrays [splits, B, ...]."""
    of_seeds = [
        batches(split, batch_size, seed, epoch, **tables)
        for split, seed in zip(splits, seeds, strict=True)
    ]
    for of_seed in zip(*of_seeds, strict=True):
        yield jax.tree.map(lambda *arrays: np.stack(arrays), *of_seed)


# %% Scoring


@nnx.jit
def _logits(model, image):
    return model(image, train=False)


def predict(model, split, batch_size=256):
    """The logits of every image of a split in inference mode, [N, classes] float32; of a stack of
    models, with leading axes. Raises UserError where they are not finite."""
    model = put(nnx.clone(model), jax.devices()[0])  # whose inference XLA spreads over the cores
    forward, parts, total = nnx.cached_partial(_logits, model), [], len(split.label)
    for i in range(0, total, batch_size):
        image = split.image[i : i + batch_size] / np.float32(255)
        # The last batch is filled up: another shape would be compiled anew.
        filled = np.pad(image, [(0, batch_size - len(image))] + [(0, 0)] * (image.ndim - 1))
        parts.append(forward(filled))
    logits = np.concatenate(jax.device_get(parts), axis=-2)[..., :total, :]
    hint = "the network trained last has gone astray; try a lower learning rate"
    require(np.isfinite(logits).all(), f"the logits are not finite: {hint}")
    return logits


def count_errors(model, split, batch_size=256):
    """The number of errors on a split; of a stack of models, an array."""
    return (predict(model, split, batch_size).argmax(-1) != split.label).sum(-1)


def predict_by_index(model, split):
    """The logits [N, classes] with each image's at its index; NaN at those not in the split."""
    logits = predict(model, split)
    table = np.full((split.index.max() + 1, logits.shape[1]), np.nan, np.float32)
    table[split.index] = logits
    return table


def count_params(model):
    """Trainable parameters of a module or a tuple of them: `nnx.Param` alone, not BatchNorm's
    statistics or random state."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def mcnemar(logits_a, logits_b, label):
    """The p-value of McNemar's exact test of two models on the same images: [N, C] twice, [N]."""
    from scipy.stats import binomtest

    right_a, right_b = logits_a.argmax(-1) == label, logits_b.argmax(-1) == label
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    p_value = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return max(float(p_value), sys.float_info.min)  # no p-value is 0


# %% Training that can be stopped


class Phase:
    """The plumbing of one training run: progress, checkpoints, going on, and a record.

    Its folder's name carries a digest of its settings: a run goes on only from its own kind, and
    never overwrites another. `history` holds a dict an epoch: epoch, seconds (of its steps alone),
    the mean of each metric of its steps and, where it was scored, test_accuracy (with a holdout:
    validation_accuracy). `seconds` is the cost of the whole run, `notes` takes more to keep.
    """

    KEPT = ("settings", "history", "seconds", "notes")
    PAUSE = 5  # seconds from one checkpoint to the next, which may take as long as a short epoch

    def __init__(self, name, output_dir, recipe, data, **more):
        self.settings = {"data": data.digest(), **recipe._asdict(), **more}
        self.name, self.history, self.seconds, self.notes = name, [], 0.0, {}
        self.scored_on = data.scored_on
        self.folder = Path(output_dir) / "checkpoints" / f"{name}-{_digest_of_json(self.settings)}"

    def epochs(self, model, optimizer, score):
        """Yields the epochs still to train, from 1 on; saves model and optimizer after the last and
        after each before it that ends `PAUSE` seconds or more after a checkpoint. Where several
        networks learn at once, both may be tuples.

        `score()`, unless None, gives the accuracy on `data.test`, about ten times in all. Raises
        UserError when a step's metrics were not finite, or a checkpoint cannot be written.
        """
        if self.restore(model=model, optimizer=optimizer):
            before = "Trained before with these settings" if self.finished else "Going on"
            print(f"{before}: epoch {len(self.history)} of {self.folder}", flush=True)
        saved, count = time.perf_counter(), self.settings["epochs"]
        begun = saved - self.seconds
        with self._manager() as manager:
            for epoch in range(len(self.history) + 1, count + 1):
                epoch_begun, self.steps = time.perf_counter(), []
                yield epoch
                record = {"epoch": epoch, **self._means(epoch)}
                weights = jax.tree.leaves(nnx.state(model, nnx.Param))
                finite = all(np.isfinite(x).all() for x in weights)
                require(finite, f"{self.name}, epoch {epoch}, last step: weights are not finite")
                record["seconds"] = time.perf_counter() - epoch_begun
                if score and (epoch % max(1, count // 10) == 0 or epoch == count):
                    record[f"{self.scored_on}_accuracy"] = float(score())
                self.history.append(record)
                self.seconds = time.perf_counter() - begun
                if epoch == count or time.perf_counter() - saved >= self.PAUSE:
                    self._save(manager, model=model, optimizer=optimizer)
                    saved = time.perf_counter()
                print(self._line(record), flush=True)

    def _save(self, manager, **modules):
        """Writes the checkpoint of the last epoch in `history`, whole or not at all."""
        states = {name: _host_state(module) for name, module in modules.items()}
        meta = {key: getattr(self, key) for key in self.KEPT}
        meta["digests"] = {name: digest(state) for name, state in states.items()}
        meta["digests"]["meta"] = _digest_of_json({key: meta[key] for key in self.KEPT})
        items = {name: ocp.args.StandardSave(state) for name, state in states.items()}
        args = ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items)
        try:
            with _silent_stderr():
                manager.save(len(self.history), args=args)
        except Exception as error:  # Orbax raises many kinds.
            hint = f"cannot write the checkpoint ({_brief(error)})"
            raise UserError(f"{self.folder}: {hint}") from None

    @contextlib.contextmanager
    def timed(self, note):
        """Notes the seconds that its block takes."""
        begun = time.perf_counter()
        yield
        self.notes[note] = time.perf_counter() - begun

    def log(self, metrics):
        """Takes the dict of metrics that a step returned: scalars, or arrays of them."""
        self.steps.append(metrics)
        settle(metrics)
        if not TIMES:
            jax.block_until_ready(metrics)
        TIMES.setdefault("first_step", time.perf_counter() - START)

    def _means(self, epoch):
        steps = jax.device_get(self.steps)
        for i, metrics in enumerate(steps, 1):
            finite = all(np.isfinite(v).all() for v in metrics.values())
            where = f"{self.name}, epoch {epoch}, step {i}"
            hint = "the loss is not finite; try a lower learning rate, or a temperature nearer to 1"
            require(finite, f"{where}: {hint}")
        return {k: np.mean([m[k] for m in steps], axis=0).tolist() for k in steps[0]}

    @property
    def finished(self):
        with self._manager() as manager:
            return (manager.latest_step() or 0) >= self.settings["epochs"]

    def _manager(self):
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        return ocp.CheckpointManager(self.folder.absolute(), options=options)

    def restore(self, **modules):
        """Brings the newest checkpoint back into `model=`, `optimizer=`; False if there is none."""
        with self._manager() as manager:
            if not manager.latest_step():
                return False
            like = {name: _host_state(module) for name, module in modules.items()}
            items = {name: ocp.args.StandardRestore(state) for name, state in like.items()}
            try:
                with _silent_stderr():
                    args = ocp.args.Composite(meta=ocp.args.JsonRestore(), **items)
                    saved = manager.restore(manager.latest_step(), args=args)
                    meta = {key: saved["meta"][key] for key in self.KEPT}
                    digests = {name: digest(saved[name]) for name in modules}
                    digests["meta"] = _digest_of_json(meta)
                    wanted = {name: saved["meta"]["digests"][name] for name in digests}
                    own = self.folder.name.endswith(_digest_of_json(meta["settings"]))
                    require(own and digests == wanted, "it does not hold what was written")
            except Exception as error:  # Orbax raises many kinds.
                hint = "the checkpoint is damaged or of another shape; move it away to train anew"
                raise UserError(f"{self.folder}: {hint} ({_brief(error)})") from None
        for name, module in modules.items():
            _update(module, saved[name])
        for key, value in meta.items():
            setattr(self, key, value)
        return True

    def _line(self, record):
        """What is printed of an epoch."""
        accuracy = record.get(f"{self.scored_on}_accuracy")
        accuracy = "" if accuracy is None else f" | {self.scored_on.title()} Acc: {accuracy:.4f}"
        mean = {key: np.mean(x) for key, x in record.items()}
        loss = f"Loss: {mean['loss']:.4f}"
        if "soft_loss" in record:
            soft = round(mean["soft_loss"], 4) + 0.0  # no -0.0000
            loss = f"Hard: {mean['hard_loss']:.4f} Soft: {soft:.4f}"
        epoch = f"Epoch {record['epoch']:2}/{self.settings['epochs']}"
        return f"{epoch}{accuracy} | {loss} | {record['seconds']:.1f} s"


def _is_key(x):
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _host_state(module):
    """The state of a module as a dict of numpy arrays, which Orbax writes in half the time that it
    takes for arrays on devices; random keys as their data."""
    state = nnx.to_pure_dict(nnx.state(module))
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if _is_key(x) else x), state)


def _update(module, arrays):
    """Puts what `_host_state` gave back into the module, on the devices that hold it."""
    state = nnx.state(module)

    def like(x, array):
        if _is_key(x):
            array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(x))
        return jax.device_put(array, x.sharding)

    nnx.replace_by_pure_dict(state, jax.tree.map(like, nnx.to_pure_dict(state), arrays))
    nnx.update(module, state)


def _brief(error):
    return " ".join(str(error).split())[:160]


@contextlib.contextmanager
def _silent_stderr():
    """For checkpoints: Orbax's threads print tracebacks of their own when something is wrong."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    except Exception:
        time.sleep(0.2)  # for the threads to end
        raise
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def find_run(name, model, recipe, data, config, **more):
    """Brings back into `model` what an earlier run trained: the one that `--<name>` points to,
    whatever its recipe, or one with these settings in any folder beside this run's output folder.
    Returns its Phase, or None if there is none."""
    path = getattr(config, name, None)
    phase = Phase(name, path or config.output_dir, recipe, data, **more)
    own, beside = Path(config.output_dir).resolve(), f"*/checkpoints/{phase.folder.name}"
    if path:
        found = sorted(phase.folder.parent.glob(f"{name}-*"), key=os.path.getmtime, reverse=True)
        require(found, f"--{name} {path}: there is no {phase.folder.parent}/{name}-*")
        # This run's own recipe first, then the newest that was trained to its end.
        candidates = sorted(found, key=lambda folder: folder != phase.folder)
    else:
        # The run's own is left to who calls: its training finds it, and goes on.
        found = sorted(Path(config.output_dir).parent.glob(beside))
        candidates = [folder for folder in found if own not in folder.resolve().parents]
    trained = False
    for folder in candidates:
        phase.folder = folder
        try:
            # With this run's recipe it can be told before: another process may be training it now.
            trained = (path or phase.finished) and phase.restore(model=model) and phase.finished
        except (UserError, OSError) as error:  # of a folder beside: as if it were not there
            hint = f"this script cannot use {folder}; name another run ({_brief(error)})"
            require(not path, f"--{name} {path}: {hint}")
        if trained:
            break
    if path:
        require(trained, f"--{name} {path}: it is not trained to its end; run its command again")
        same = phase.settings["data"] == data.digest()
        require(same, f"--{name} {path}: it was trained on other data than this run's")
    if trained:
        print(f"Taken from {phase.folder}", flush=True)
    return phase if trained else None


# %% Results


def banner(text):
    print(f"\n{f' {text} ':=^80}", flush=True)


def _score(errors, data):
    """What a row says of a number of errors on data.test."""
    accuracy = 1 - errors / len(data.test.label)
    return {f"{data.scored_on}_accuracy": accuracy, f"{data.scored_on}_errors": errors}


def _calibration(logits, label, bins=15):
    """Negative log-likelihood and expected calibration error of logits [N, C] and labels [N]."""
    nll = optax.losses.softmax_cross_entropy_with_integer_labels(logits, label).mean()
    # ECE = Σ_b n_b / N · |confidence_b − accuracy_b|, over bins of equal width of the confidence
    confidence = np.asarray(jax.nn.softmax(logits).max(-1), np.float64)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    excess = np.bincount(place, confidence - (logits.argmax(-1) == label))
    return {"nll": float(nll), "ece": float(np.abs(excess).sum() / len(label))}


def rows(runs, logits, data):
    """The rows of results.json, from {name: (model, Phase)} and {name: logits [N, C]} on data.test.

    Beside accuracy a row has calibration: the negative log-likelihood `nll` and the expected
    calibration error `ece` (Guo et al., 2017). Where one is called teacher, it has fidelity
    (Stanton et al., 2021): `agreement` is the share of images on which a model answers as the
    teacher does, `kl` the mean KL divergence of its distribution from the teacher's.
    """
    answers, found = {name: x.argmax(-1) for name, x in logits.items()}, []
    label = data.test.label
    teacher_probs = jax.nn.softmax(logits["teacher"]) if "teacher" in logits else None
    for name, (model, phase) in runs.items():
        errors = int((answers[name] != label).sum())
        row = {"name": name, "seed": phase.settings["seed"], "params": count_params(model)}
        row |= _score(errors, data) | _calibration(logits[name], label)
        if "teacher" in answers:
            row["agreement"] = float((answers[name] == answers["teacher"]).mean())
            kl = optax.losses.kl_divergence(jax.nn.log_softmax(logits[name]), teacher_probs)
            row["kl"] = float(kl.mean())
        row |= {"seconds": phase.seconds, **phase.notes}
        row["epoch_seconds"] = [record["seconds"] for record in phase.history]
        found.append(row | {"settings": phase.settings, "history": phase.history})
    return found


def stack_rows(names, seeds, students, phase, data):
    """The rows of results.json for a stack of students [seeds, names]."""
    errors = count_errors(students, data.test, 64)
    params = count_params(students) // errors.size
    found = []
    for j, name in enumerate(names):
        for i, seed in enumerate(seeds):
            row = {
                "name": name,
                "seed": seed,
                "params": params,
                **_score(errors[i, j].item(), data),
            }
            found.append(row | {"seconds": phase.seconds / errors.size, "settings": phase.settings})
    return found


def paired(a, b):
    """Of the differences a − b of paired numbers: mean, 95 % interval (Student's t) and wins."""
    from scipy import stats

    gain = np.asarray(a) - np.asarray(b)
    half = stats.t.ppf(0.975, len(gain) - 1) * stats.sem(gain)
    return gain.mean(), (gain.mean() - half, gain.mean() + half), int((gain > 0).sum())


def values(rows, name, key):
    """What the rows of one name hold under a key, in the order of the rows."""
    return [row[key] for row in rows if row["name"] == name]


def compare(rows, name, other, data):
    """In words: how much more accurate the rows of one name are than those of another, paired."""
    a, b = (values(rows, x, f"{data.scored_on}_accuracy") for x in (name, other))
    gain, (low, high), wins = paired(a, b)
    interval = f"(95 %: {100 * low:+.2f} to {100 * high:+.2f})"
    return f"{100 * gain:+.2f} points {interval}, {wins} of {len(a)} seeds"


def draw_grids(grids, cells, data):
    """Heat maps of grids {labels: {"errors" [seeds][cells], "last", "chosen"}}: mean accuracy, and
    the hard and the soft loss apart in the last epoch. A frame marks what was chosen."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    temperatures, alphas = (sorted(set(x)) for x in zip(*cells, strict=True))
    figure = Figure(figsize=(16, 4.2 * len(grids)), layout="constrained")
    for row, (labels, grid) in zip(
        figure.subplots(len(grids), 3, squeeze=False), grids.items(), strict=True
    ):
        accuracy = 100 - 100 * np.mean(grid["errors"], 0) / len(data.test.label)
        panels = {f"{data.scored_on} accuracy, %": (accuracy, "{:.2f}", "viridis")}
        for key in ("hard_loss", "soft_loss") if grid["last"] else ():
            title = f"training {key.replace('_', ' ')}, last epoch"
            panels[title] = (np.mean(grid["last"][0][key], 0), "{:.3f}", "magma_r")
        for axes, (title, (values, form, colours)) in zip(row, panels.items(), strict=False):
            table = np.full((len(alphas), len(temperatures)), np.nan)
            for (t, a), value in zip(cells, values, strict=True):
                table[alphas.index(a), temperatures.index(t)] = value
            # Losses differ by orders of magnitude, accuracies do not.
            norm = LogNorm() if "loss" in title else Normalize()
            image = axes.imshow(table, norm=norm, cmap=colours, origin="lower", aspect="auto")
            for (i, j), value in np.ndenumerate(table):
                dark = (norm(value) < 0.5) == (colours == "viridis")
                colour = "white" if dark else "black"
                axes.text(j, i, form.format(value), ha="center", va="center", color=colour)
            t, a = grid["chosen"]
            at = temperatures.index(t) - 0.5, alphas.index(a) - 0.5
            axes.add_patch(Rectangle(at, 1, 1, fill=False, edgecolor="red", linewidth=2.5))
            axes.set(title=f"{labels} labels: {title}", xlabel="temperature T", ylabel="alpha")
            axes.set(xticks=range(len(temperatures)), yticks=range(len(alphas)))
            axes.set(xticklabels=temperatures, yticklabels=alphas)
            figure.colorbar(image, ax=axes)
    return figure


def draw_labels(rows, kinds, budgets, data):
    """Over numbers of labels, of rows "kind, N labels" of several seeds: accuracy, gain over the
    first kind with its 95 % interval, agreement with the teacher (the first row), calibration."""
    from matplotlib.figure import Figure

    def found(kind, count, key):
        return [100 * x for x in values(rows, f"{kind}, {count} labels", key)]

    score = f"{data.scored_on}_accuracy"
    titles = {score: f"{data.scored_on} accuracy, %", "gain": f"gain over the {kinds[0]}, points"}
    titles |= {"agreement": "same answer as the teacher, %", "ece": "calibration error (ECE), %"}
    figure = Figure(figsize=(13, 9), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, titles.items(), strict=True):
        gain = key == "gain"
        for i, kind in list(enumerate(kinds))[gain:]:
            how = {"color": f"C{i}", "label": kind}
            counts = [n for n in budgets if found(kind, n, score)]  # a kind may lack some
            if gain and counts:
                gains = [paired(found(kind, n, score), found(kinds[0], n, score)) for n in counts]
                means, intervals, _ = zip(*gains, strict=True)
                bars = np.abs(np.transpose(intervals) - means)
                axes.errorbar(counts, means, bars, fmt="o-", capsize=3, **how)
            elif counts:
                axes.plot(counts, [np.mean(found(kind, n, key)) for n in counts], **how)
                for n in counts:
                    axes.plot([n] * len(found(kind, n, key)), found(kind, n, key), f"C{i}.")
        level, label = (0, None) if gain else (100 * rows[0][key], "teacher")
        axes.axhline(level, color="gray", linestyle="--", label=label)
        axes.set(title=title, xlabel="labels", xscale="log")
        axes.set_xticks(budgets, labels=[f"{count:,}" for count in budgets])
        axes.minorticks_off()
        axes.legend()
    return figure


def draw_gains(rows, names, data, baseline="baseline"):
    """The gain over the baseline of rows of several seeds: each seed, mean and 95 % interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1 + 0.45 * len(names)), layout="constrained")
    axes, score = figure.subplots(), f"{data.scored_on}_accuracy"
    for y, name in enumerate(names):
        a, b = (100 * np.array(values(rows, x, score)) for x in (name, baseline))
        gain, (low, high), _ = paired(a, b)
        axes.plot(np.subtract(a, b), [y] * len(a), "o", color="0.7")
        axes.errorbar(gain, y, xerr=[[gain - low], [high - gain]], fmt="ko", capsize=4)
    axes.axvline(0, color="gray", linestyle="--")
    axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    axes.set(xlabel=f"gain over the {baseline}, points (grey: seeds; bars: 95 % intervals)")
    return figure


def draw(rows, data, teacher_logits=None):
    """The figure of a run: curves, and with the teacher's logits on data.test its soft targets.
    Returns the figure and, for results.json, {"soft_targets": {index: logits}}."""
    from matplotlib.figure import Figure

    if teacher_logits is None:
        figure = Figure(figsize=(12, 5), layout="constrained")
        _draw_curves(figure, rows, data)
        return figure, {}
    figure = Figure(figsize=(12, 11), layout="constrained")
    upper, lower = figure.subfigures(2, height_ratios=(2, 3))
    _draw_curves(upper, rows, data)
    return figure, {"soft_targets": _draw_soft_targets(lower, data, teacher_logits)}


def _draw_curves(figure, rows, data):
    """Losses over the epochs, hard and soft apart, and accuracies; the teacher's as a line."""
    losses, accuracies = figure.subplots(1, 2)
    accuracy = f"{data.scored_on}_accuracy"
    for row in rows:
        epochs = [record["epoch"] for record in row["history"]]
        scored = [record for record in row["history"] if accuracy in record]
        if row["name"] == "teacher" and len(rows) > 1:
            accuracies.axhline(row[accuracy], color="gray", linestyle="--", label="teacher")
            continue
        parts = ("hard_loss", "soft_loss") if row["name"] == "distilled" else ("loss",)
        for key in parts if epochs else ():
            label = f"{row['name']}, {key.replace('_', ' ')}"
            losses.plot(epochs, [record[key] for record in row["history"]], label=label)
        points = [r["epoch"] for r in scored], [r[accuracy] for r in scored]
        accuracies.plot(*points, ".-", label=row["name"])
    losses.set(xlabel="epoch", ylabel="training loss", yscale="log")
    accuracies.set(xlabel="epoch", ylabel=accuracy.replace("_", " "))
    for axes in (losses, accuracies):
        if axes.lines:
            axes.legend()


def _draw_soft_targets(figure, data, logits):
    """Four images of which the teacher is right but least sure, and its soft targets for them."""
    split = data.test
    right = logits.argmax(-1) == split.label
    unsure = np.argsort(np.where(right, jax.nn.softmax(logits).max(-1), 2))[:4]
    for (picture, bars), i in zip(figure.subplots(2, 4).T, unsure, strict=False):
        picture.imshow(split.image[i, :, :, 0], cmap="gray_r")
        title = f"{data.scored_on} image {split.index[i]}, a {split.label[i]}"
        picture.set(title=title, xticks=[], yticks=[])
        for t, shift in ((1, -0.2), (3, 0.2)):
            bars.bar(np.arange(10) + shift, jax.nn.softmax(logits[i] / t), 0.4, label=f"T = {t}")
        bars.set(xticks=range(10), ylim=(0, 1), ylabel="teacher's probability")
        bars.legend()
    return {int(split.index[i]): logits[i].tolist() for i in unsure}


def write_whole(path, content):
    """Writes bytes to a file, whole or not at all."""
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


def versions():
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version()} | found


def device():
    return f"{jax.device_count()} × {jax.devices()[0].device_kind} ({platform.machine()})"


def write_results(config, data, rows, figure, more=None):
    """Writes results.json and figure.png to the output folder; returns what the former holds."""
    report = {
        "script": Path(inspect.getfile(type(config))).name,
        "config": dataclasses.asdict(config),
        "dataset": {
            "name": data.name,
            "source": data.source,
            "train": len(data.train.label),
            data.scored_on: len(data.test.label),
        },
        "versions": versions(),
        "device": device(),
        "seconds": {row["name"]: row["seconds"] for row in rows} | TIMES,
        **(more or {}),
        "results": rows,
    }
    report["seconds"]["total"] = time.perf_counter() - START
    png = io.BytesIO()
    figure.savefig(png, dpi=100)
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    write_whole(Path(config.output_dir) / "figure.png", png.getvalue())
    write_whole(Path(config.output_dir) / "results.json", text.encode())
    return report


def summary(report, data, lines):
    """Prints the table of the models and the lines {what: found} below it."""
    banner("SUMMARY")
    names, costs = dict.fromkeys(row["name"] for row in report["results"]), {}
    wide = max(30, *map(len, names), *map(len, lines))
    print(f"{'':{wide}} parameters  {data.scored_on} accuracy  errors")
    for name in names:
        same = [row for row in report["results"] if row["name"] == name]  # of several seeds: a mean
        accuracy = np.mean([row[f"{data.scored_on}_accuracy"] for row in same])
        errors = np.mean([row[f"{data.scored_on}_errors"] for row in same])
        width, found = len(f"  {data.scored_on} accuracy"), f"{100 * accuracy:.2f} %"
        print(f"{name:{wide}} {same[0]['params']:>10,}{found:>{width}}{errors:>8,.0f}")
        costs[name] = sum(row["seconds"] for row in same)
    costs = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in costs.items() if seconds)
    lines |= {"Time": f"{report['seconds']['total']:.0f} s", "Training, now or before": costs}
    lines["Data"] = data
    lines["Results and figure"] = report["config"]["output_dir"]
    for what, found in lines.items():
        print(f"{what:{wide}} {found}")
    sys.stdout.flush()
