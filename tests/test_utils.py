"""The shared plumbing: data, batches, scoring, checkpoints, command line."""

import dataclasses
import functools
import gzip
import hashlib
import http.server
import json
import os
import platform
import subprocess
import sys
import threading
import time
import types
from importlib import metadata, util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import utils
from conftest import DATASET, ROOT
from flax import nnx


def write_idx(folder, train=60, test=20, compress=True):
    """Four small IDX files; returns their arrays."""
    rng, arrays = np.random.default_rng(0), {}
    folder.mkdir(exist_ok=True)
    for name in utils.FILES:
        count = train if name.startswith("train") else test
        shape = (count, 28, 28) if "images" in name else (count,)
        array = rng.integers(0, 256 if len(shape) == 3 else 10, shape).astype(np.uint8)
        raw = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes() + array.tobytes()
        path = folder / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(raw) if compress else raw)
        arrays[name] = array
    return arrays


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_idx_files(tmp_path, name, compress, monkeypatch):
    arrays = write_idx(tmp_path / "data", compress=compress)
    monkeypatch.setenv(f"{name.upper()}_DATA_DIR", str(tmp_path / "data"))
    data = utils.load_data(name)
    np.testing.assert_array_equal(data.train.image[..., 0], arrays[utils.FILES[0]])
    np.testing.assert_array_equal(data.test.label, arrays[utils.FILES[3]])
    assert (data.name, data.source, data.scored_on) == (name, "local files", "test")
    assert data.train.label.dtype == data.train.index.dtype == np.int32


def test_mnist_itself():
    if DATASET != "mnist":
        pytest.skip("needs the real MNIST: set MNIST_DATA_DIR to the folder of its four files")
    data = utils.load_data("mnist")
    assert data.train.image.shape == (60000, 28, 28, 1)
    assert np.bincount(data.test.label).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip


def test_embedded_digits(digits):
    assert len(digits.train.label) == 1297
    assert len(digits.test.label) == 500
    assert digits.train.image.max() > 200
    assert not digits.train.image[:, :4].any(), "the frame is empty"
    pooled = digits.test.image[:, 4:24, 4:24, 0].reshape(500, 20, 20)
    assert (pooled.std((1, 2)) > 20).all(), "every image shows something"
    both = np.concatenate([digits.train.image, digits.test.image]).reshape(1797, -1)
    assert len(np.unique(both, axis=0)) == 1797, "no test image is a training image"


def test_holdout_takes_the_place_of_the_test_set(digits):
    data = utils.load_data("digits", holdout=200)
    assert data.scored_on == "validation"
    np.testing.assert_array_equal(data.test.image, digits.train.image[-200:])
    np.testing.assert_array_equal(data.train.image, digits.train.image[:-200])
    assert len(utils.load_data("digits", holdout=1169).train.label) == 128
    with pytest.raises(utils.UserError, match="--holdout 1170: must be at most 1,169"):
        utils.load_data("digits", holdout=1170)


def test_no_network_falls_back_within_seconds(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MNIST_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hang = threading.Event()
    monkeypatch.setattr(utils.urllib.request, "urlopen", lambda *a, **k: hang.wait(60))
    begun = time.perf_counter()
    data = utils.load_data("mnist")
    assert time.perf_counter() - begun < 8
    hang.set()
    assert data.name == "digits"
    assert "embedded digits" in capsys.readouterr().err
    monkeypatch.setattr(utils, "_reachable", lambda url: False)
    with pytest.raises(utils.UserError, match="FASHION_MNIST_DATA_DIR"):
        utils.load_data("fashion_mnist")


@pytest.mark.parametrize("damaged", [False, True])
def test_download(tmp_path, monkeypatch, damaged):
    """Through TFDS's manager, from a server on this machine; a wrong checksum is an error."""
    monkeypatch.delenv("MNIST_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    import tensorflow_datasets as tfds

    arrays = write_idx(tmp_path / "server")
    handler = functools.partial(QuietHandler, directory=tmp_path / "server")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    infos = {}
    for name in utils.FILES:
        content = (tmp_path / "server" / f"{name}.gz").read_bytes()
        checksum = hashlib.sha256(content + b"!" * damaged).hexdigest()
        url = f"http://127.0.0.1:{server.server_port}/{name}.gz"
        infos[url] = tfds.download.checksums.UrlInfo(len(content), checksum, f"{name}.gz")
    monkeypatch.setattr(tfds, "builder", lambda name: types.SimpleNamespace(url_infos=infos))
    if damaged:  # The server stays, since the manager's other threads still ask it.
        with pytest.raises(utils.UserError, match="download failed"):
            utils.load_data("mnist")
        assert not list((tmp_path / "cache").rglob("mnist/*.gz"))
        return
    assert utils.load_data("mnist").source == "downloaded"
    server.shutdown()
    server.server_close()
    # What the earlier run cached serves without it.
    data = utils.load_data("mnist")
    np.testing.assert_array_equal(data.train.image[..., 0], arrays[utils.FILES[0]])


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_batches(images):
    epochs = [[jax.device_get(b) for b in utils.batches(images, 32, 7, e)] for e in (1, 1, 2)]
    for batch in epochs[0]:
        assert batch["image"].shape == (32, 28, 28, 1)
        assert batch["image"].dtype == np.float32
        np.testing.assert_array_equal(batch["label"], images.label[batch["index"]])
        np.testing.assert_array_equal(
            batch["image"], images.image[batch["index"]] / np.float32(255)
        )
    orders = [np.concatenate([b["index"] for b in epoch]) for epoch in epochs]
    assert len(np.unique(orders[0])) == 256, "no image twice in an epoch"
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any(), "each epoch has an order of its own"
    other = next(iter(utils.batches(images, 32, 8, 1)))
    assert (other["index"] != epochs[0][0]["index"]).any(), "each seed too"


def test_index_is_the_place_in_the_training_set(digits):
    part = utils.take_labels(digits.train, 50, 3)
    np.testing.assert_array_equal(part.image, digits.train.image[part.index])
    for batch in utils.batches(part, 10, 0, 1, table=np.arange(1297)):
        np.testing.assert_array_equal(batch["table"], batch["index"])


@pytest.mark.parametrize("count", [10, 100, 1003, "all"])
def test_take_labels(digits, count):
    part = utils.take_labels(digits.train, count, 5)
    total = 1297 if count == "all" else count
    assert len(np.unique(part.index)) == total
    per_class = np.bincount(part.label, minlength=10)
    if count != "all":
        assert per_class.max() - per_class.min() <= 1
        assert (utils.take_labels(digits.train, count, 6).index != part.index).any()
    np.testing.assert_array_equal(utils.take_labels(digits.train, count, 5).index, part.index)


def test_predict_by_index(kd, digits):
    student = kd.StudentCNN(rngs=nnx.Rngs(0))
    utils.replicate(student)
    part = utils.take_labels(digits.train, 30, 1)
    table = utils.predict_by_index(student, part)
    np.testing.assert_allclose(table[part.index], utils.predict(student, part), atol=1e-5)
    assert np.isnan(table).all(-1).sum() == len(table) - 30


def test_logits_that_are_not_finite(kd, digits):
    student = kd.StudentCNN(rngs=nnx.Rngs(0))
    student.dense2.bias[...] = np.full(10, np.inf)
    with pytest.raises(utils.UserError, match="not finite"):
        utils.predict(student, digits.test.take(slice(3)))


def test_evaluate_scores_every_image(kd, images):
    student = kd.StudentCNN(rngs=nnx.Rngs(0))
    utils.replicate(student)
    accuracy, logits = kd.evaluate(student, images)
    assert logits.shape == (258, 10)
    assert accuracy == (logits.argmax(-1) == images.label).sum() / 258


def test_mcnemar():
    label = np.zeros(62, int)
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    a = np.array([right] * 10 + [wrong] * 2 + [right] * 50)
    b = np.array([wrong] * 10 + [right] * 2 + [right] * 50)
    # Two-sided exact binomial test of 10 against 2: 2 (1 + 12 + 66) / 2^12.
    assert utils.mcnemar(a, b, label) == pytest.approx(2 * 79 / 4096)
    assert utils.mcnemar(a, a, label) == 1.0


def test_shards_give_what_one_device_gives(kd, images):
    """The batch shared out over the devices is the same batch: BatchNorm sees all of it."""
    student = kd.StudentCNN(rngs=nnx.Rngs(0))
    image = images.image[:64] / np.float32(255)
    alone = student(image, train=True)
    mean = np.array(student.bn1.mean[...])
    student = kd.StudentCNN(rngs=nnx.Rngs(0))
    utils.replicate(student)
    shared = nnx.jit(lambda model, x: model(x, train=True))(student, utils.shard(image))
    np.testing.assert_allclose(shared, alone, atol=1e-4)
    np.testing.assert_allclose(student.bn1.mean[...], mean, atol=1e-5)


def test_xla_is_tuned_where_it_was_measured(monkeypatch):
    environment = {}
    monkeypatch.setattr(utils.os, "environ", environment)
    monkeypatch.setattr(utils.importlib.metadata, "version", lambda _: "0.10.2")
    monkeypatch.setattr(utils.importlib.util, "find_spec", lambda _: None)
    for system, machine in (("linux", "arm64"), ("darwin", "x86_64")):
        monkeypatch.setattr(utils.sys, "platform", system)
        monkeypatch.setattr(utils.platform, "machine", lambda machine=machine: machine)
        utils.tune_xla()
    monkeypatch.setattr(utils.sys, "platform", "linux")
    monkeypatch.setattr(utils.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(utils.importlib.metadata, "version", lambda _: "0.10.3")
    utils.tune_xla()
    monkeypatch.setattr(utils.importlib.metadata, "version", lambda _: "0.10.2")
    for plugin in ("jax_plugins", "libtpu"):
        monkeypatch.setattr(utils.importlib.util, "find_spec", plugin.__eq__)
        utils.tune_xla()
    assert not environment, "a processor, version or plugin that may not know the flag"
    monkeypatch.setattr(utils.importlib.util, "find_spec", lambda _: None)
    utils.tune_xla()
    assert environment["XLA_FLAGS"] == utils.XLA["0.10.2"]
    environment["XLA_FLAGS"] = "mine"
    utils.tune_xla()
    assert environment["XLA_FLAGS"] == "mine"


@pytest.mark.skipif(
    (metadata.version("jaxlib"), sys.platform, platform.machine()) != ("0.10.2", "linux", "x86_64")
    or any(map(util.find_spec, ("jax_plugins", "libtpu"))),
    reason="the flag is set only where it was measured",
)
def test_xla_takes_the_flag_after_jax_was_imported():
    """Without the flag YNNPACK takes this convolution, with it XLA's own."""
    program = """
import jax, sys, utils
if sys.argv[1] == "tuned":
    utils.use_all_cores()
x, k = jax.numpy.ones((32, 14, 14, 16)), jax.numpy.ones((3, 3, 16, 32))
conv = jax.jit(lambda x, k: jax.lax.conv_general_dilated(
    x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
print("ynn" in conv.lower(x, k).compile().as_text())
"""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(Path(utils.__file__).parent)
    for how, taken in (("tuned", "False"), ("not", "True")):
        command = [sys.executable, "-c", program, how]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == taken, done.stderr


def on_devices(*modules):
    return {len(x.sharding.device_set) for x in jax.tree.leaves(nnx.state(modules))}


def test_bind_shares_out_the_batch_of_large_networks_alone(kd, images):
    several = jax.device_count()
    assert several > 1
    batch = {"image": images.image[:32] / np.float32(255), "label": images.label[:32]}
    for network, count in ((kd.StudentCNN, 1), (kd.TeacherCNN, several)):
        model = network(rngs=nnx.Rngs(0))
        optimizer = kd.make_optimizer(model, kd.Recipe(0, 1, 32, 1e-3, "constant"), 64)
        step = utils.bind(kd.train_step, model, optimizer)
        first = float(step(batch)["loss"])
        assert first != float(step(batch)["loss"])
        assert on_devices(model, optimizer) == {count}
    student, frozen = kd.StudentCNN(rngs=nnx.Rngs(0)), kd.TeacherCNN(rngs=nnx.Rngs(1))
    optimizer = kd.make_optimizer(student, kd.Recipe(0, 1, 32, 1e-3, "constant"), 64)
    step = utils.bind(kd.train_student_step, student, frozen, optimizer)
    assert np.isfinite(step(batch, 3.0, 0.5)["loss"])
    assert on_devices(student, frozen, optimizer) == {1}, "the teacher does not learn"


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_bind_gives_each_device_its_part_of_a_batch(kd, axis):
    several, shape = jax.device_count(), [4, 6]
    shape[axis or 0] *= several
    small = 1 if axis is None else several
    for network, parts in ((kd.StudentCNN, small), (kd.TeacherCNN, several)):
        step = utils.bind(nnx.jit(lambda _, batch: batch), network(rngs=nnx.Rngs(0)), axis=axis)
        found = step({"image": np.ones(shape, np.float32)})["image"]
        want = [n // parts if i == (axis or 0) else n for i, n in enumerate(shape)]
        assert found.addressable_shards[0].data.shape == tuple(want)


def test_shard():
    several = jax.device_count()
    for shape, axis, part in (
        ((8, 3), 0, (8 // several, 3)),
        ((3, 8), 1, (3, 8 // several)),
        ((7, 3), 0, (7, 3)),
    ):
        parts = utils.shard({"x": np.ones(shape)}, axis)["x"].addressable_shards
        assert [x.data.shape for x in parts] == [part] * several


def test_a_checkpoint_comes_back_to_the_devices_of_its_network(kd, digits, tmp_path):
    recipe = kd.Recipe(0, 1, 16, 1e-3, "constant")
    few = digits._replace(train=digits.train.take(slice(16)), test=digits.test.take(slice(16)))
    kept, _ = kd.train_teacher(few, recipe, tmp_path)
    kd.train_student_baseline(few, few.train, recipe, tmp_path)
    again, _ = kd.train_teacher(few, recipe, tmp_path)
    assert utils.digest(again) == utils.digest(kept)
    assert on_devices(again) == {jax.device_count()}
    assert on_devices(kd.train_student_baseline(few, few.train, recipe, tmp_path)[0]) == {1}


def test_only_a_shared_batch_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    utils.settle({"loss": jax.numpy.ones(2), "a number": 0.5})
    assert not waited
    utils.settle({"loss": utils.shard(np.ones(2 * jax.device_count()))})
    assert len(waited) == 1


def test_write_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    utils.write_whole(path, b"old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(utils.os, "fsync", fail)
    with pytest.raises(utils.UserError, match=r"results\.json: cannot be written \(disk full\)"):
        utils.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]


@dataclasses.dataclass(frozen=True)
class Config:
    learning_rate: float = 0.1  # how fast
    epochs: int | None = None  # how long
    name: str = "x"  # what
    fast: bool = False  # whether


def test_flags(capsys):
    assert utils.parse(Config, []) == Config()
    given = ["--learning-rate", "1e-3", "--epochs", "3", "--name", "y", "--fast"]
    assert utils.parse(Config, given) == Config(1e-3, 3, "y", True)
    assert utils.parse(Config, ["--no-fast"]).fast is False
    with pytest.raises(SystemExit):
        utils.parse(Config, ["--help"])
    assert "how fast (default 0.1)" in " ".join(capsys.readouterr().out.split())
    for wrong in (["--epoch", "3"], ["--epochs", "x"], ["--unknown"]):
        with pytest.raises(utils.UserError, match=wrong[0]):
            utils.parse(Config, wrong)


@pytest.fixture
def teacher(kd):
    teacher = kd.TeacherCNN(rngs=nnx.Rngs(1))
    utils.replicate(teacher)
    return teacher


def test_cached_teacher_logits_give_the_same_student(tmp_path, digits, kd, teacher):
    """Ten steps with the logits looked up, and with the teacher in the step."""
    labelled = utils.take_labels(digits.train, 80, 0)
    recipe = kd.Recipe(3, 2, 16, 1e-4, "constant")
    results = []
    for cache in (True, False):
        student, phase = kd.train_student_with_distillation(
            teacher, digits, labelled, recipe, tmp_path / str(cache), cache_teacher=cache
        )
        results.append(utils.predict(student, digits.test))
        assert ("cache_seconds" in phase.notes) == cache
    np.testing.assert_allclose(results[0], results[1], atol=2e-3)
    assert (results[0].argmax(-1) == results[1].argmax(-1)).mean() > 0.99


def test_alpha_1_is_the_baseline(tmp_path, digits, kd, teacher):
    """With alpha = 1 the teacher has no say: the distilled student is the baseline."""
    labelled = utils.take_labels(digits.train, 80, 0)
    recipe = kd.Recipe(3, 2, 16, 1e-3, "onecycle")
    distilled, _ = kd.train_student_with_distillation(
        teacher, digits, labelled, recipe, tmp_path, alpha=1.0
    )
    baseline, _ = kd.train_student_baseline(digits, labelled, recipe, tmp_path)
    logits = [utils.predict(model, digits.test) for model in (distilled, baseline)]
    np.testing.assert_allclose(*logits, atol=1e-3)


def test_committed_results_hold_no_path():
    for path in (ROOT / "docs" / "results").rglob("*.json"):
        text = path.read_text()
        assert "/" not in json.loads(text).get("config", {}).get("output_dir", ""), path
        assert "/home/" not in text
        assert "/tmp/" not in text


@pytest.mark.parametrize("scored_on", ["test", "validation"])
def test_the_figure_shows_what_was_measured(digits, scored_on):
    accuracy = f"{scored_on}_accuracy"

    def row(name, losses, last):
        history = [
            {"epoch": epoch, "hard_loss": 0.1, **{k: v / epoch for k, v in losses.items()}}
            for epoch in (1, 2, 3)
        ]
        history[2][accuracy] = last
        return {"name": name, "history": history, accuracy: last}

    rows = [
        row("teacher", {"loss": 1.0}, 0.95),
        row("distilled", {"loss": 2.0, "soft_loss": 3.0}, 0.9),
        row("baseline", {"loss": 4.0}, 0.8),
    ]
    logits = np.random.default_rng(0).normal(size=(500, 10)).astype(np.float32)
    figure, more = utils.draw(rows, digits._replace(scored_on=scored_on), logits)
    losses, accuracies = figure.subfigs[0].axes
    curves = {line.get_label(): list(line.get_ydata()) for line in losses.lines}
    assert curves.keys() == {"distilled, hard loss", "distilled, soft loss", "baseline, loss"}
    assert curves["baseline, loss"] == [4, 2, 4 / 3]
    assert accuracies.get_ylabel() == f"{scored_on} accuracy"
    points = {line.get_label(): list(line.get_ydata()) for line in accuracies.lines}
    assert points == {"teacher": [0.95, 0.95], "distilled": [0.9], "baseline": [0.8]}
    assert len(more["soft_targets"]) == len(figure.subfigs[1].axes) / 2 == 4
    assert scored_on in figure.subfigs[1].axes[0].get_title()


def test_flags_of_several_values():
    @dataclasses.dataclass(frozen=True)
    class Config:
        alphas: tuple[float, ...] = (0, 0.5)  # weights of the labels
        labels: tuple[str, ...] | None = None  # numbers of them

    assert utils.parse(Config, []).alphas == (0, 0.5)
    assert utils.parse(Config, ["--alphas", "1", "0.25"]).alphas == (1.0, 0.25)
    assert utils.parse(Config, ["--labels", "10", "all"]).labels == ("10", "all")
    assert utils.parse(Config, []).labels is None
    with pytest.raises(utils.UserError, match=r"--alphas 2\.0: must be from 0 to 1"):
        utils.check_flags(Config(alphas=(0.5, 2.0)))
    with pytest.raises(utils.UserError, match="--alphas: must not repeat"):
        utils.check_flags(Config(alphas=(0.5, 0.5)))


def test_networks_trained_together_share_a_checkpoint(tmp_path, kd, digits):
    """Two networks, a metric for each, no score: stopped after one epoch, the run goes on."""
    split = digits.train.take(slice(128))

    def train(folder, epochs):
        models = tuple(kd.StudentCNN(rngs=nnx.Rngs(i)) for i in range(2))
        recipe = kd.Recipe(0, 2, 64, 1e-3, "constant")
        optimizers = tuple(kd.make_optimizer(model, recipe, 128) for model in models)
        phase = utils.Phase("both", folder, recipe, digits)
        for epoch in phase.epochs(models, optimizers, None):
            if epoch > epochs:
                break
            for batch in utils.batches(split, 64, 0, epoch):
                both = [kd.train_step(*pair, batch) for pair in zip(models, optimizers)]  # noqa: B905
                phase.log({"loss": jnp.stack([x["loss"] for x in both])})
        return [utils.digest(model) for model in models], phase.history

    whole, history = train(tmp_path / "whole", 2)
    train(tmp_path / "stopped", 1)
    again, history_again = train(tmp_path / "stopped", 2)
    assert again == whole
    assert [r["loss"] for r in history_again] == [r["loss"] for r in history]
    assert len(history[0]["loss"]) == 2
    assert "test_accuracy" not in history[-1]
