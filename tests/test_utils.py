"""Data, batches, evaluation and statistics."""

import dataclasses
import functools
import gzip
import hashlib
import http.server
import shutil
import ssl
import threading
import time
import types
import urllib.error

import experiment
import jax
import numpy as np
import pytest
import utils
from conftest import DATASET
from fast import on_all_devices, place
from flax import nnx
from scipy import stats


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


def test_embedded_digits_are_the_same_with_64_bits(digits):
    with jax.enable_x64(True):
        found = utils.load_data("digits")
    np.testing.assert_array_equal(found.train.image, digits.train.image)


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
    for name in ("MNIST", "FASHION_MNIST"):
        monkeypatch.delenv(f"{name}_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hang = threading.Event()
    monkeypatch.setattr(utils.urllib.request, "urlopen", lambda *a, **k: hang.wait(60))
    begun = time.perf_counter()
    data = utils.load_data("mnist")
    assert time.perf_counter() - begun < 8
    hang.set()
    assert data.name == "digits"
    error = capsys.readouterr().err
    assert "no network (no answer within 4 seconds)" in error
    assert "embedded digits" in error
    monkeypatch.setattr(utils, "_why_unreachable", lambda url: "no network")
    monkeypatch.setattr(utils, "PACKAGED", {})
    with pytest.raises(utils.UserError, match="FASHION_MNIST_DATA_DIR"):
        utils.load_data("fashion_mnist", fall_back=False)
    assert utils.load_data("fashion_mnist").name == "digits"


@pytest.mark.parametrize(("dataset", "own"), [("mnist", "mnist"), ("mnist", "fashion_mnist")])
def test_only_a_script_s_own_dataset_falls_back(dataset, own, tmp_path, monkeypatch):
    """Whoever names another one would be surprised by digits."""
    monkeypatch.delenv("MNIST_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(utils, "_why_unreachable", lambda url: "no network")

    @dataclasses.dataclass(frozen=True)
    class Config(experiment.CommonFlags):
        dataset: str = own
        output_dir: str = "out"

    config = Config(dataset=dataset, output_dir=str(tmp_path / "out"))
    if dataset == own:
        assert experiment.start(config).data.name == "digits"
    else:
        with pytest.raises(utils.UserError, match="MNIST_DATA_DIR"):
            experiment.start(config)


def test_a_system_package_serves_where_no_folder_is_named(tmp_path, monkeypatch):
    arrays = write_idx(tmp_path / "package")
    monkeypatch.setattr(utils, "PACKAGED", {"fashion_mnist": tmp_path / "package"})
    monkeypatch.delenv("FASHION_MNIST_DATA_DIR", raising=False)
    data = utils.load_data("fashion_mnist")
    assert (data.name, data.source) == ("fashion_mnist", "system package")
    np.testing.assert_array_equal(data.train.image[..., 0], arrays[utils.FILES[0]])
    write_idx(tmp_path / "named")
    monkeypatch.setenv("FASHION_MNIST_DATA_DIR", str(tmp_path / "named"))
    assert utils.load_data("fashion_mnist").source == "local files"


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


def noise(count):
    """A split of noise: no two shifts of its images are alike."""
    rng = np.random.default_rng(0)
    image = rng.integers(1, 256, (count, 28, 28, 1)).astype(np.uint8)
    return utils.Split(image, np.zeros(count, np.int32), np.arange(count))


def test_a_view_is_its_image_shifted_by_at_most_two_pixels_and_half_of_them_mirrored():
    split = noise(400)
    views = utils.augment(split.image, "shift_and_flip", np.random.default_rng(0))
    assert views.dtype == np.uint8
    assert views.shape == split.image.shape
    found = []
    for image, view in zip(split.image[..., 0], views[..., 0], strict=True):
        padded = np.pad(image, 2)
        for flipped in (False, True):
            for y in range(5):
                for x in range(5):
                    shifted = padded[y : y + 28, x : x + 28]
                    if np.array_equal(shifted[:, ::-1] if flipped else shifted, view):
                        found.append((y, x, flipped))
    assert len(found) == 400  # each in one way
    assert {(y, x) for y, x, _ in found} == {(y, x) for y in range(5) for x in range(5)}
    assert 150 < sum(flipped for *_, flipped in found) < 250


def test_shift_mirrors_nothing_and_none_changes_nothing():
    split = noise(50)
    views = utils.augment(split.image, "shift", np.random.default_rng(0))
    for image, view in zip(split.image[..., 0], views[..., 0], strict=True):
        padded = np.pad(image, 2)
        shifts = [padded[y : y + 28, x : x + 28] for y in range(5) for x in range(5)]
        assert any(np.array_equal(view, shifted) for shifted in shifts)
    rng = np.random.default_rng(0)
    assert utils.augment(split.image, "none", rng) is split.image
    assert rng.random() == np.random.default_rng(0).random()  # draws nothing


def test_batches_of_views_differ_from_epoch_to_epoch_and_are_drawn_by_the_seed():
    def views(seed, epoch):
        batches = utils.batches(noise(64), 16, seed, epoch, "shift")
        return {
            int(i): image for x in batches for i, image in zip(x["index"], x["image"], strict=True)
        }

    one, same, other_epoch, other_seed = views(0, 1), views(0, 1), views(0, 2), views(1, 1)
    assert all(np.array_equal(one[i], same[i]) for i in one)
    for other in (other_epoch, other_seed):
        assert np.mean([np.array_equal(one[i], other[i]) for i in one]) < 0.3


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
    place(student, on_all_devices())
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
    place(student, on_all_devices())
    logits = utils.predict(student, images)
    assert logits.shape == (258, 10)
    assert utils.evaluate(student, images) == (logits.argmax(-1) == images.label).sum() / 258


def test_mcnemar():
    label = np.zeros(62, int)
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    a = np.array([right] * 10 + [wrong] * 2 + [right] * 50)
    b = np.array([wrong] * 10 + [right] * 2 + [right] * 50)
    # Two-sided exact binomial test of 10 against 2: 2 (1 + 12 + 66) / 2^12.
    assert utils.mcnemar(a, b, label) == pytest.approx(2 * 79 / 4096)
    assert utils.mcnemar(a, a, label) == 1.0


@pytest.mark.parametrize("pairs", [2, 5, 9])
def test_the_interval_of_a_paired_difference_is_student_s_95_percent(pairs):
    rng = np.random.default_rng(pairs)
    a, b = rng.normal(1, 1, pairs), rng.normal(0, 1, pairs)
    found = utils.paired_difference(a, b)
    # By the definition: mean ± t(0.975, n − 1) · s / √n
    difference = a - b
    quantile = {2: 12.7062, 5: 2.77645, 9: 2.30600}[pairs]  # from a table of Student's t
    half = quantile * difference.std(ddof=1) / np.sqrt(pairs)
    np.testing.assert_allclose(found.low, difference.mean() - half, rtol=1e-3)
    np.testing.assert_allclose(found.high, difference.mean() + half, rtol=1e-3)
    assert found.mean == pytest.approx(difference.mean())
    assert (found.wins, found.pairs) == ((a > b).sum(), pairs)
    # And as SciPy's paired test has it.
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), interval)


def test_calibration():
    logits = np.log([[0.8, 0.2], [0.8, 0.2], [0.3, 0.7], [0.1, 0.9]]).astype(np.float32)
    found = utils.calibration(logits, np.array([0, 1, 1, 1]))
    # Two images at 0.8 of which one is right, one at 0.7 and one at 0.9 that are.
    np.testing.assert_allclose(found["ece"], 2 / 4 * 0.3 + 0.3 / 4 + 0.1 / 4, rtol=1e-5)
    np.testing.assert_allclose(found["nll"], -np.log([0.8, 0.2, 0.7, 0.9]).mean(), rtol=1e-5)
    sure = utils.calibration(np.float32([[100, 0], [0, 100]]), np.array([0, 1]))
    np.testing.assert_allclose(list(sure.values()), 0, atol=1e-6)


def test_fidelity_is_kl_from_the_teacher_and_agreement_with_it():
    student, teacher = np.random.default_rng(0).normal(0, 3, (2, 8, 10)).astype(np.float32)
    found = utils.fidelity(student, teacher)
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (teacher, student))
    np.testing.assert_allclose(found["kl"], (np.exp(p) * (p - q)).sum(-1).mean(), rtol=1e-4)
    assert found["agreement"] == (student.argmax(-1) == teacher.argmax(-1)).mean()


def test_latency_is_of_a_batch_of_that_size(kd, monkeypatch):
    shapes = []
    forward = utils._inference

    def spy(model):
        answer = forward(model)

        def watched(image):
            shapes.append(image.shape)
            return answer(image)

        return watched

    monkeypatch.setattr(utils, "_inference", spy)
    assert 0 < utils.latency_ms(kd.StudentCNN(rngs=nnx.Rngs(0)), 3, turns=4) < 1000
    assert shapes == [(3, 28, 28, 1)] * 5


RENAMED = {
    "with dots": lambda name: name.replace("-idx", ".idx"),
    "of EMNIST": lambda name: "emnist-letters-" + name.replace("t10k", "test"),
    "in capitals": str.upper,
    "with underscores": lambda name: name.replace("-", "_"),
}


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("spelling", RENAMED)
def test_names_of_files_in_use(tmp_path, spelling, compress):
    arrays = write_idx(tmp_path, compress=compress)
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / RENAMED[spelling](path.name))
    data = utils.load_data("mnist", tmp_path)
    np.testing.assert_array_equal(data.train.image[..., 0], arrays[utils.FILES[0]])
    np.testing.assert_array_equal(data.test.label, arrays[utils.FILES[3]])


def test_files_of_several_datasets_in_one_folder_are_not_chosen_from(tmp_path):
    """But the plain names are those of the dataset."""
    write_idx(tmp_path / "a")
    for prefix in ("emnist-letters-", "emnist-digits-"):
        for path in (tmp_path / "a").iterdir():
            shutil.copy(path, tmp_path / (prefix + path.name))
    with pytest.raises(utils.UserError, match=r"several datasets; leave one of .*emnist-letters"):
        utils.load_data("mnist", tmp_path)
    arrays = write_idx(tmp_path)
    data = utils.load_data("mnist", tmp_path)
    np.testing.assert_array_equal(data.train.label, arrays[utils.FILES[1]])


def test_images_and_labels_of_two_datasets_are_not_put_together(tmp_path):
    """Their files may hold as many, so that nothing else would tell."""
    write_idx(tmp_path)
    for path in list(tmp_path.iterdir()):
        kind = "letters" if "images" in path.name else "digits"
        path.rename(tmp_path / f"emnist-{kind}-{path.name}")
    with pytest.raises(utils.UserError, match=r"train-images-idx3-ubyte\.gz: missing"):
        utils.load_data("mnist", tmp_path)


@pytest.mark.parametrize("case", ["--holdout 1000", "--quick"])
def test_files_sorted_by_label_are_refused_where_only_some_are_taken(monkeypatch, case):
    def data(label):
        split = utils.Split(np.zeros((5000, 28, 28, 1), np.uint8), label, np.arange(5000))
        return utils.Data("digits", "zeros", split, split, "test")

    options = {"quick": True} if case == "--quick" else {"holdout": 1000}
    labels = np.arange(5000, dtype=np.int32) % 10
    monkeypatch.setattr(utils, "_embedded_digits", lambda: data(labels))
    utils.load_data("digits", **options)
    monkeypatch.setattr(utils, "_embedded_digits", lambda: data(np.sort(labels)))
    with pytest.raises(utils.UserError, match=rf"{case}: the .* classes .* only, of 10; shuffle"):
        utils.load_data("digits", **options)
    utils.load_data("digits")  # all are taken


def test_the_calibration_error_has_15_bins_of_equal_width():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (500, 10)).astype(np.float32)
    probs = np.asarray(jax.nn.softmax(logits), np.float64)
    label = (probs.cumsum(1) < rng.random((500, 1))).sum(1).clip(0, 9)  # as probable as it says
    confidence, right = probs.max(1), probs.argmax(1) == label
    errors = {}
    for bins in (10, 15, 20):
        place = np.minimum((confidence * bins).astype(int), bins - 1)
        errors[bins] = 0.0
        for b in np.unique(place):
            own = place == b
            errors[bins] += own.mean() * abs(confidence[own].mean() - right[own].mean())
    assert utils.calibration(logits, label)["ece"] == pytest.approx(errors[15], rel=1e-6)
    assert len({round(x, 6) for x in errors.values()}) == 3


def test_a_folder_of_a_file_s_name_is_passed_over(tmp_path):
    """Some unpackers put each file into a folder of its own, beside the files."""
    arrays = write_idx(tmp_path, compress=False)
    for name in utils.FILES:
        (tmp_path / name).rename(tmp_path / name.replace("-idx", ".idx"))
        (tmp_path / name).mkdir()
    data = utils.load_data("mnist", tmp_path)
    np.testing.assert_array_equal(data.train.label, arrays[utils.FILES[1]])


def test_a_home_that_does_not_exist_is_said():
    with pytest.raises(utils.UserError, match="--data-dir '~nobody-of-that-name/data'"):
        utils.load_data("mnist", "~nobody-of-that-name/data")


def test_quick_takes_the_first_images_after_the_holdout(monkeypatch):
    label = np.arange(5000, dtype=np.int32) % 10
    split = utils.Split(np.zeros((5000, 28, 28, 1), np.uint8), label, np.arange(5000))
    many = utils.Data("digits", "zeros", split, split, "test")
    monkeypatch.setattr(utils, "_embedded_digits", lambda: many)
    for holdout, tested, scored_on in ((0, 0, "test"), (2500, 2500, "validation")):
        data = utils.load_data("digits", holdout=holdout, quick=True)
        np.testing.assert_array_equal(data.train.index, np.arange(2000))
        np.testing.assert_array_equal(data.test.index, np.arange(tested, tested + 2000))
        assert data.scored_on == scored_on


def test_the_content_says_whether_a_file_is_packed(tmp_path):
    """A browser may unpack a download and keep its name, or the other way round."""
    arrays = write_idx(tmp_path / "plain", compress=False)
    for path in list((tmp_path / "plain").iterdir()):
        path.rename(f"{path}.gz")
    write_idx(tmp_path / "packed")
    for path in list((tmp_path / "packed").iterdir()):
        path.rename(str(path).removesuffix(".gz"))
    for folder in ("plain", "packed"):
        data = utils.load_data("mnist", tmp_path / folder)
        np.testing.assert_array_equal(data.train.label, arrays[utils.FILES[1]])


@pytest.mark.parametrize("below", ["raw", "MNIST/raw"])
def test_the_folder_above_the_files_will_do(tmp_path, below):
    (tmp_path / below).parent.mkdir(exist_ok=True)
    arrays = write_idx(tmp_path / below)
    data = utils.load_data("mnist", tmp_path)
    np.testing.assert_array_equal(data.train.label, arrays[utils.FILES[1]])
    write_idx(tmp_path / "other")
    with pytest.raises(utils.UserError, match=r"holds several datasets; name one of .*other"):
        utils.load_data("mnist", tmp_path)
    shutil.copytree(tmp_path / "other", tmp_path, dirs_exist_ok=True)
    assert utils.load_data("mnist", tmp_path).name == "mnist", "its own files come first"


def test_home_is_understood_in_the_name_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_idx(tmp_path / "data")
    assert len(utils.load_data("mnist", "~/data").train.label) == 60
    monkeypatch.setenv("MNIST_DATA_DIR", "~/data")
    assert len(utils.load_data("mnist").train.label) == 60


def test_a_certificate_that_cannot_be_verified_is_no_missing_network(monkeypatch):
    """The server is there: the download goes on with certificates of its own."""
    reason = ssl.SSLCertVerificationError("self-signed certificate")

    def refuse(*_, **__):
        raise urllib.error.URLError(reason)

    monkeypatch.setattr(utils.urllib.request, "urlopen", refuse)
    assert utils._why_unreachable("https://example.org") is None


@pytest.mark.parametrize("reason", [OSError("Connection refused"), OSError("Name not known")])
def test_the_reason_is_said_why_there_is_no_network(monkeypatch, reason, tmp_path, capsys):
    def refuse(*_, **__):
        raise urllib.error.URLError(reason)

    monkeypatch.delenv("MNIST_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(utils.urllib.request, "urlopen", refuse)
    assert utils.load_data("mnist").name == "digits"
    assert str(reason) in capsys.readouterr().err


def test_data_knows_its_classes(tmp_path, digits):
    assert digits.classes == 10
    write_idx(tmp_path)
    label = gzip.decompress((tmp_path / "train-labels-idx1-ubyte.gz").read_bytes())
    more = label[:-1] + bytes([11])
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(more))
    assert utils.load_data("mnist", tmp_path).classes == 12
