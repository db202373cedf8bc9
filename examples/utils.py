"""Data, batches, evaluation and the few statistics that the scripts share.

To copy a script out of this repository, take this file along.
"""

import contextlib
import functools
import gzip
import http.client
import math
import os
import re
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import nnx


class UserError(Exception):
    """Something that the user can mend: one line that names the flag or file and the cure."""


def require(condition, message):
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def at_home(folder, flag):
    """A folder as a Path, with the home directory in the place of `~`. Raises UserError if there is
    no such home."""
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise UserError(f"{flag} {str(folder)!r}: {error}") from None


# %% Data


class Split(NamedTuple):
    """Images with their labels. `index` is the place of each in the whole training or test set."""

    image: np.ndarray  # [N, 28, 28, 1] uint8
    label: np.ndarray  # [N] int32
    index: np.ndarray  # [N] int32

    def take(self, places):
        """The part of a split at some places: an array of indices, a mask or a slice."""
        return Split(self.image[places], self.label[places], self.index[places])


class Data(NamedTuple):
    """A dataset. `test` is what networks are scored on: test images, or held-out training images
    ("validation")."""

    name: str  # mnist, fashion_mnist, kmnist or digits
    source: str  # where it came from, in words
    train: Split
    test: Split
    scored_on: str  # "test" or "validation"

    @property
    def classes(self):
        """The number of classes: labels are 0 to classes - 1."""
        return int(max(self.train.label.max(), self.test.label.max())) + 1

    def __str__(self):
        train, test = len(self.train.label), len(self.test.label)
        return f"{self.name} ({self.source}), {train:,} training, {test:,} {self.scored_on} images"


def load_data(name, data_dir=None, holdout=0, quick=False, fall_back=True):
    """Loads a dataset from a folder, a system package, an earlier download, the network or, last,
    scikit-learn.

    Args:
      name: mnist, fashion_mnist or kmnist (four IDX files each), or digits (embedded).
      data_dir: a folder with the IDX files, plain or gzip; else <NAME>_DATA_DIR is looked up.
      holdout: so many training images, the last, take the place of the test images.
      quick: only the first 2,000 training images and the first 2,000 test images.
      fall_back: without network, take the embedded digits instead of raising an error.

    Raises UserError where files are missing or wrong, or nothing can be had.
    """
    variable = f"{name.upper()}_DATA_DIR"
    folder = data_dir or os.environ.get(variable)
    packaged = PACKAGED.get(name)
    if name == "digits":
        data = _embedded_digits()
    elif folder:
        data = _read_folder(name, "local files", at_home(folder, "--data-dir"))
    elif packaged and packaged.is_dir():
        data = _read_folder(name, "system package", packaged)
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        cache = at_home(cache, "XDG_CACHE_HOME") / "mnist-distillation" / name
        trouble = _download(name, cache)
        if not trouble:
            data = _read_folder(name, "downloaded", cache)
        else:
            message = (
                f"{name}: {trouble}; --data-dir or {variable} may name a folder with its files"
            )
            require(fall_back, message)
            print(f"{message}. Using embedded digits instead.", file=sys.stderr, flush=True)
            data = _embedded_digits()
    data = hold_out(data, holdout)
    if quick:
        first = slice(2000)
        classes = data.classes  # of all images
        data = data._replace(train=data.train.take(first), test=data.test.take(first))
        _check_mixed(classes, data.train, "--quick: the first training images")
        _check_mixed(classes, data.test, "--quick: the first test images")
    return data


def hold_out(data, count, flag="--holdout"):
    """The data with its last `count` training images, unless 0, in place of the test images."""
    if count == 0:
        return data
    most = max(0, len(data.train.label) - 128)  # one batch of a teacher
    require(
        count <= most, f"{flag} {count}: must be at most {most:,}, to leave 128 training images"
    )
    train, held_out = data.train.take(slice(-count)), data.train.take(slice(-count, None))
    _check_mixed(data.classes, held_out, f"{flag} {count}: the last training images")
    return data._replace(train=train, test=held_out, scored_on="validation")


def _check_mixed(classes, split, which):
    """Raises UserError if images that stand side by side are of a few classes only: their files
    are sorted by label."""
    present = np.unique(split.label)
    labels = ", ".join(map(str, present[:5]))
    sorted_files = f"{which} are of classes {labels} only, of {classes}; shuffle the files' images"
    enough = len(split.label) >= 10 * classes
    require(len(present) > classes / 2 or not enough, sorted_files)


# Debian and Ubuntu have Fashion-MNIST as a package: apt-get install dataset-fashion-mnist.
PACKAGED = {"fashion_mnist": Path("/usr/share/datasets/fashion-mnist")}

# The four files as MNIST's authors name them.
FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]


def _read_folder(name, source, folder):
    """A dataset from the four IDX files of a folder, or of one folder below it."""
    hint = f"not a folder; --data-dir should name one that holds {FILES[0]}.gz and three more"
    require(folder.is_dir(), f"{str(folder)!r}: {hint}")
    paths = _find_files(folder)
    splits = []
    for image_path, label_path in (paths[:2], paths[2:]):
        image = _read_idx(image_path, 3)
        label = _read_idx(label_path, 1)
        require(image.shape[1:] == (28, 28), f"{image_path}: images must be 28×28")
        counts = f"{len(label)} labels for {len(image)} images; both must be as many"
        require(len(image) == len(label), f"{label_path}: {counts}")
        splits.append(_split(image, label))
    train, test = splits
    most = train.label.max()
    known = f"a test label is {test.label.max()}, but the training labels end at {most}"
    require(test.label.max() <= most, f"{paths[3]}: {known}")
    return Data(name, source, train, test, "test")


def _find_files(folder):
    """The paths of the four files in a folder. Where it holds none of them, one folder below it,
    at most two levels down, may hold them, as in torchvision's MNIST/raw."""
    here = _datasets_in(folder)
    if here:
        return _only_dataset(folder, here)
    below = [path for path in (*folder.glob("*/"), *folder.glob("*/*/")) if path.is_dir()]
    found = {place: _datasets_in(place) for place in sorted(below)}
    complete = [place for place in found if any(len(x) == 4 for x in found[place].values())]
    require(complete, f"{folder / FILES[0]}.gz: missing; the folder must hold all four IDX files")
    several = ", ".join(map(str, complete))
    require(len(complete) == 1, f"{folder}: holds several datasets; name one of {several}")
    return _only_dataset(complete[0], found[complete[0]])


def _datasets_in(folder):
    """The IDX files of a folder, under any of the names in use: {dataset: {name in FILES: path}}.

    A dataset is told by what its files' names begin with. Among the names are
    train-images-idx3-ubyte.gz, train-images.idx3-ubyte and emnist-letters-test-images-idx3-ubyte,
    of the dataset "emnist-letters-".
    """
    pattern = re.compile(
        r"(.*[-_.])?(train|t10k|test)[-_.](images[-_.]idx3|labels[-_.]idx1)[-_.]ubyte(\.gz)?",
        re.IGNORECASE,
    )
    datasets = {}
    with contextlib.suppress(OSError):  # a folder that may not be read
        for path in sorted(folder.iterdir()):  # unpacked before packed
            match = pattern.fullmatch(path.name)
            if match and not path.is_dir():  # a folder of that name, as some unpackers make
                part = match[2].lower().replace("test", "t10k")
                name = f"{part}-{re.sub('[_.]', '-', match[3].lower())}-ubyte"
                datasets.setdefault(match[1] or "", {}).setdefault(name, path)
    return datasets


def _only_dataset(folder, datasets):
    """The paths of a folder's only dataset, or of the one whose names have nothing before them."""
    complete = {dataset: paths for dataset, paths in datasets.items() if len(paths) == 4}
    if not complete:
        most = max(datasets.values(), key=len)
        missing = next(name for name in FILES if name not in most)
        raise UserError(f"{folder / missing}.gz: missing; the folder must hold all four IDX files")
    if "" not in complete:
        names = ", ".join(paths[FILES[0]].name for paths in complete.values())
        require(len(complete) == 1, f"{folder}: several datasets; leave one of {names}")
    paths = complete.get("") or next(iter(complete.values()))
    return [paths[name] for name in FILES]


def _read_idx(path, dimensions):
    """One IDX file as an array of uint8. Its content says whether it is packed, not its name."""
    require(path.is_file(), f"{path}: must be a file")
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
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
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _split(image, label):
    return Split(image[..., None], label.astype(np.int32), np.arange(len(label), dtype=np.int32))


def _download(name, folder):
    """Fetches the four files with TFDS's download manager, which checks their SHA-256. Returns
    None, or in words why there is no network. (`tfds.load` itself needs TensorFlow.)"""
    if all((folder / f"{file}.gz").exists() for file in FILES):
        return None
    import tensorflow_datasets as tfds

    infos = tfds.builder(name).url_infos
    trouble = _why_unreachable(next(iter(infos)))
    if trouble:
        return trouble
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
    return None


def _why_unreachable(url, seconds=4):
    """None if a server answers within that time, by way of a proxy too; else the reason."""
    reasons = [f"no network (no answer within {seconds} seconds)"]

    def ask():
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=seconds)
            reasons.append(None)
        except urllib.error.HTTPError:
            reasons.append(None)  # an answer, too
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            # The server is there. The download brings its own certificates, and says what is wrong.
            certificate = isinstance(reason, ssl.SSLCertVerificationError)
            reasons.append(None if certificate else f"no network ({reason})")

    # In a thread, since looking up a name knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return reasons[-1]


def _embedded_digits():
    """scikit-learn's 1,797 digits of 8×8, brought to MNIST's form: 20×20 in a frame of 28×28."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    image = digits.images * (255 / 16)
    with jax.enable_x64(False):  # the same pixels, whatever JAX_ENABLE_X64 says
        image = jax.image.resize(image, (len(image), 20, 20), "bilinear")
    image = np.pad(np.rint(image).astype(np.uint8), ((0, 0), (4, 4), (4, 4)))
    order = np.random.default_rng(0).permutation(len(image))
    train, test = order[500:], order[:500]
    return Data(
        "digits",
        "embedded in scikit-learn",
        _split(image[train], digits.target[train]),
        _split(image[test], digits.target[test]),
        "test",
    )


def take_labels(split, count, seed, stream=1):
    """A class-balanced subset of `count` images ("all": of all), drawn by `seed`. Another `stream`
    of random numbers draws other images by the same seed."""
    total = len(split.label)
    count = total if count == "all" else int(count)
    require(count <= total, f"--labels {count}: there are {total} training images; or say all")
    order = np.random.default_rng([seed, stream]).permutation(total)
    # Each class's first image of the order, then each class's second, and so on.
    rank = np.empty(total, np.int64)  # of each image among those of its class
    for c in np.unique(split.label):
        rank[order[split.label[order] == c]] = np.arange((split.label == c).sum())
    return split.take(np.sort(np.lexsort((np.argsort(order), rank))[:count]))


# %% Batches


def check_batch_size(flag, batch_size, images):
    """Raises UserError if there are not enough images for one batch."""
    require(batch_size <= images, f"{flag} {batch_size}: a training has only {images:,} images")


def batches(split, batch_size, seed, epoch, augmentation="none", **tables):
    """One epoch's batches, shuffled by seed and epoch, without the rest that fills no whole batch.

    Yields dicts: image [B, 28, 28, 1] float32 in [0, 1], label [B] int32, index [B] int32, and of
    each of `tables` [N, ...] the rows of these images, looked up by index. With an augmentation
    (see `augment`) an image is another in each epoch.
    """
    total = len(split.label)
    check_batch_size("--batch-size", batch_size, total)
    order = np.random.default_rng([seed, 2, epoch]).permutation(total)
    rng = np.random.default_rng([seed, 3, epoch])
    for start in range(0, total - batch_size + 1, batch_size):
        image, label, index = split.take(order[start : start + batch_size])
        image = augment(image, augmentation, rng)
        batch = {"image": image / np.float32(255), "label": label, "index": index}
        for name, table in tables.items():
            batch[name] = table[index]
        yield batch


def augment(image, augmentation, rng):
    """Images [N, H, W, C] as they might have been, too.

    Args:
      augmentation: "none"; "shift" for a shift by up to two pixels each way, where background, 0,
        comes in; "shift_and_flip" to mirror half of the images left to right, too.
      rng: what draws shifts and flips, a `numpy.random.Generator`.
    """
    if augmentation == "none":
        return image
    count, height, width, _ = image.shape
    padded = np.pad(image, ((0, 0), (2, 2), (2, 2), (0, 0)))
    corners = rng.integers(5, size=(count, 2))
    flipped = rng.random(count) < (0.5 if augmentation == "shift_and_flip" else 0)
    augmented = np.empty_like(image)
    for i, (y, x) in enumerate(corners):
        shifted = padded[i, y : y + height, x : x + width]
        augmented[i] = shifted[:, ::-1] if flipped[i] else shifted
    return augmented


# %% Evaluation


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, image):
    return nnx.merge(graphdef, state)(image, train=False)


def _inference(model):
    """A compiled function from images to the logits of a model as it is now, in inference mode."""
    graphdef, state = nnx.split(model)
    # On one device, since XLA spreads inference over the cores by itself.
    state = jax.device_put(state, jax.devices()[0])
    return functools.partial(_logits, graphdef, state)


def predict(model, split, batch_size=256):
    """The logits of every image of a split in inference mode: [N, classes] float32, and of a stack
    of models with leading axes. Raises UserError where they are not finite."""
    forward = _inference(model)
    parts, total = [], len(split.label)
    for start in range(0, total, batch_size):
        image = split.image[start : start + batch_size] / np.float32(255)
        # The last batch is filled up: another shape would be compiled anew.
        filled = np.pad(image, [(0, batch_size - len(image))] + [(0, 0)] * (image.ndim - 1))
        parts.append(forward(filled))
    logits = np.concatenate(jax.device_get(parts), axis=-2)[..., :total, :]
    hint = "the network trained last has gone astray; try a lower learning rate"
    require(np.isfinite(logits).all(), f"the logits are not finite: {hint}")
    return logits


def predict_by_index(model, split):
    """The logits [N, classes] with each image's at its index; NaN at those not in the split."""
    logits = predict(model, split)
    table = np.full((split.index.max() + 1, logits.shape[1]), np.nan, np.float32)
    table[split.index] = logits
    return table


def evaluate(model, split):
    """The accuracy of a model over all images of a split, from 0 to 1."""
    return float((predict(model, split).argmax(-1) == split.label).mean())


def latency_ms(model, batch_size, turns=20):
    """Milliseconds for the answers to so many images [28, 28, 1], on one device: the median of some
    turns, after one that compiles."""
    image = jax.device_put(np.zeros((batch_size, 28, 28, 1), np.float32), jax.devices()[0])
    forward = _inference(model)
    times = []
    for _ in range(turns + 1):
        begun = time.perf_counter()
        jax.block_until_ready(forward(image))
        times.append(time.perf_counter() - begun)
    return 1000 * float(np.median(times[1:]))


def count_params(model):
    """Trainable parameters of a module or a tuple of them: `nnx.Param` alone, not BatchNorm's
    statistics or random state."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


# %% Statistics


def calibration(logits, label, bins=15):
    """Negative log-likelihood and expected calibration error of logits [N, C] and labels [N] (Guo
    et al., 2017, arXiv:1706.04599)."""
    nll = optax.losses.softmax_cross_entropy_with_integer_labels(logits, label).mean()
    # ECE = Σ_b n_b / N · |confidence_b − accuracy_b|, over bins of equal width of the confidence
    confidence = np.asarray(jax.nn.softmax(logits).max(-1), np.float64)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    excess = np.bincount(place, confidence - (logits.argmax(-1) == label))
    return {"nll": float(nll), "ece": float(np.abs(excess).sum() / len(label))}


def fidelity(logits, teacher_logits):
    """How much like its teacher a student answers, from logits [N, C] of both (Stanton et al.,
    2021, arXiv:2106.05945): `agreement` is the share of images with the same answer, `kl` the mean
    KL divergence from the student's distribution to the teacher's, KL(p_teacher ‖ p_student)."""
    agreement = float((logits.argmax(-1) == teacher_logits.argmax(-1)).mean())
    teacher_probs = jax.nn.softmax(teacher_logits)
    kl = optax.losses.kl_divergence(jax.nn.log_softmax(logits), teacher_probs).mean()
    return {"agreement": agreement, "kl": float(kl)}


def mcnemar(logits_a, logits_b, label):
    """The p-value of McNemar's exact test of two models on the same images: [N, C] twice, [N]."""
    from scipy.stats import binomtest

    right_a, right_b = logits_a.argmax(-1) == label, logits_b.argmax(-1) == label
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    p_value = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return max(float(p_value), sys.float_info.min)  # no p-value is 0


class PairedDifference(NamedTuple):
    """The mean of paired differences a − b, its 95 % interval and how often a was larger."""

    mean: float
    low: float
    high: float
    wins: int
    pairs: int


def paired_difference(a, b):
    """Compares paired numbers, such as the accuracies of two students over several seeds, with the
    95 % interval of Student's t. Two pairs at least."""
    from scipy import stats

    difference = np.asarray(a, float) - np.asarray(b, float)
    half = stats.t.ppf(0.975, len(difference) - 1) * stats.sem(difference)
    mean, wins = float(difference.mean()), int((difference > 0).sum())
    return PairedDifference(mean, mean - float(half), mean + float(half), wins, len(difference))
