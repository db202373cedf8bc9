"""What is fast: it gives what the plain code gives, and is set only where it should be."""

import functools
import os
import platform
import subprocess
import sys
import types
from importlib import metadata, util
from pathlib import Path

import fast
import jax
import numpy as np
import pytest
from experiment import Recipe
from fast import conv, depthwise_conv
from flax import nnx

ROUNDING = 3e-5  # of the greatest number: a weight's gradient sums 100,000 products


@pytest.fixture(autouse=True, scope="module")
def optimised():
    """Programs as a script's own process has them."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(2, 3, shape).astype(np.float32)


def found(layer, x):
    """The output, the gradients of a loss that weighs every number of it differently, and what the
    layer holds afterwards."""
    weights = draw(*nnx.eval_shape(lambda layer, x: layer(x), layer, x).shape, seed=1)

    @nnx.jit
    def gradients(layer, x):
        def loss(layer, x):
            y = layer(x)
            return (y * weights).sum(), y

        return nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

    (of_layer, of_x), y = gradients(layer, x)
    parts = {"y": y, "of x": of_x}
    for kind, state in (("gradient", of_layer), ("state", nnx.state(layer))):
        parts |= {(kind, *path): leaf[...] for path, leaf in nnx.to_flat_state(state)}
    return parts


def same(layer, other, x):
    a, b = found(layer, x), found(other, x)
    assert a.keys() == b.keys()
    for key, of in a.items():
        of, other = np.asarray(of), np.asarray(b[key])
        assert np.abs(of - other).max() <= ROUNDING * np.abs(other).max(), key


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((128, 28, 28, 1), {"padding": "SAME"}),  # the first layers of teacher and student
        ((128, 28, 28, 1), {"padding": "VALID"}),
        ((8, 6, 5, 8), {"padding": "SAME"}),
        ((7, 6, 5, 1), {"padding": "VALID"}),
        ((8, 6, 5, 1), {"padding": ((2, 1), (0, 3))}),
        ((8, 6, 5, 1), {"padding": "CIRCULAR"}),
        ((8, 9, 7, 1), {"padding": "SAME", "strides": 2}),
        ((8, 9, 7, 1), {"padding": "VALID", "kernel_dilation": 2}),
        ((8, 6, 5, 4), {"feature_group_count": 2}),
    ],
)
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4)])
def test_conv(shape, options, kernel):
    make = functools.partial(nnx.Conv, shape[-1], 6, kernel, **options)
    same(make(conv_general_dilated=conv, rngs=nnx.Rngs(0)), make(rngs=nnx.Rngs(0)), draw(*shape))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((8, 6, 5, 4), {"padding": "SAME"}),
        ((7, 9, 8, 3), {"padding": "VALID", "use_bias": False}),
        ((8, 9, 7, 4), {"padding": "SAME", "strides": 2}),
        ((8, 8, 8, 4), {"padding": "SAME", "strides": (2, 3)}),
        ((8, 9, 7, 4), {"padding": "VALID", "strides": 2}),
        ((8, 6, 5, 4), {"padding": ((2, 1), (0, 3))}),
        ((8, 9, 7, 4), {"padding": "VALID", "kernel_dilation": 2}),
        ((8, 6, 5, 1), {"padding": "SAME"}),
    ],
)
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4)])
def test_depthwise_conv(shape, options, kernel):
    channels = shape[-1]
    make = functools.partial(
        nnx.Conv, channels, channels, kernel, feature_group_count=channels, **options
    )
    own = make(conv_general_dilated=depthwise_conv, rngs=nnx.Rngs(0))
    same(own, make(rngs=nnx.Rngs(0)), draw(*shape))


@pytest.mark.parametrize("features", [4, 8])
def test_depthwise_conv_of_other_groups_is_the_built_in_one(features):
    """Two filters for each channel, or channels in groups."""
    make = functools.partial(nnx.Conv, 4, features, (3, 3), feature_group_count=8 // features * 2)
    own = make(conv_general_dilated=depthwise_conv, rngs=nnx.Rngs(0))
    same(own, make(rngs=nnx.Rngs(0)), draw(8, 6, 5, 4))


def test_depthwise_conv_is_no_convolution_on_a_cpu(monkeypatch):
    def count():
        def forward(x, kernel):
            numbers = ("NHWC", "HWIO", "NHWC")
            return depthwise_conv(
                x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=4
            )

        program = jax.jit(forward).lower(draw(8, 6, 6, 4), draw(3, 3, 1, 4)).compile()
        return program.as_text().count(" convolution(")

    assert count() == 0
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert count() == 1


def test_conv_of_images_smaller_than_the_kernel():
    kernel = draw(5, 5, 1, 6)
    step = jax.value_and_grad(lambda kernel: conv_of(kernel, draw(2, 3, 3, 1), "VALID").sum())
    value, gradient = step(kernel)
    assert value == 0
    assert not gradient.any()


def layers(channels, **options):
    own = {"conv_general_dilated": conv}, {}
    return [nnx.Conv(channels, 6, (3, 3), rngs=nnx.Rngs(0), **options, **each) for each in own]


def test_conv_of_a_shared_batch():
    """As a teacher is trained: the batch shared out over the devices, the weights on each."""
    pair = layers(1)
    for layer in pair:
        fast.place(layer, fast.on_all_devices())
    x = fast.share_out(draw(8 * jax.device_count(), 8, 8, 1))
    same(*pair, x)
    # The devices add up their gradients; no images go from one to another.
    gradient = jax.jit(jax.grad(lambda kernel, x: (conv_of(kernel, x) ** 2).sum()))
    program = gradient.lower(pair[0].kernel[...], x).compile().as_text()
    assert "all-gather" not in program
    assert "collective-permute" not in program
    assert "all-to-all" not in program


def conv_of(kernel, x, padding="SAME"):
    numbers = ("NHWC", "HWIO", "NHWC")
    return conv(x, kernel, (1, 1), padding, dimension_numbers=numbers)


def convolutions(channels, dtype="float32"):
    """How many there are in a training step of the layer."""
    kernel = draw(3, 3, channels, 6).astype(dtype)
    x = draw(8 * jax.device_count(), 6, 6, channels).astype(dtype)
    gradient = jax.grad(lambda kernel, x: (conv_of(kernel, x) ** 2).sum(), argnums=(0, 1))
    return jax.jit(gradient).lower(kernel, x).compile().as_text().count(" convolution(")


def test_what_makes_it_fast_is_there(monkeypatch):
    assert convolutions(channels=1) == 2, "the image is shifted"
    assert convolutions(channels=8) == 3, "as built in"
    assert convolutions(channels=1, dtype="float16") == 3, "as built in"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert convolutions(channels=1) == 3, "as built in"


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"precision": "highest"},
        {"preferred_element_type": "float64"},
    ],
)
def test_conv_of_another_precision_is_the_built_in_one(options):
    a, b = (found(layer, draw(8, 6, 6, 1)) for layer in layers(1, **options))
    for key, of in a.items():
        assert of.dtype == b[key].dtype, key
        np.testing.assert_array_equal(of, b[key])


def test_what_has_no_fixed_batch_can_be_exported():
    batch = jax.export.symbolic_shape("batch, 6, 6, 1")
    layer = layers(1)[0]
    exported = jax.export.export(jax.jit(lambda x: layer(x)))(
        jax.ShapeDtypeStruct(batch, np.float32)
    )
    x = draw(3, 6, 6, 1)
    np.testing.assert_allclose(exported.call(x), layer(x), rtol=ROUNDING)


def test_inference_is_that_of_the_built_in_one():
    x = draw(8, 6, 6, 1)
    a, b = (layer(x) for layer in layers(1))
    np.testing.assert_array_equal(a, b)


# %% Devices and settings of the process


def test_shards_give_what_one_device_gives(kd, images):
    """The batch shared out over the devices is the same batch: BatchNorm sees all of it."""
    student = kd.StudentCNN(rngs=nnx.Rngs(0))
    image = images.image[:64] / np.float32(255)
    alone = student(image, train=True)
    mean = np.array(student.bn1.mean[...])
    student = kd.StudentCNN(rngs=nnx.Rngs(0))
    fast.place(student, fast.on_all_devices())
    shared = nnx.jit(lambda model, x: model(x, train=True))(student, fast.share_out(image))
    np.testing.assert_allclose(shared, alone, atol=1e-4)
    np.testing.assert_allclose(student.bn1.mean[...], mean, atol=1e-5)


def test_xla_is_tuned_where_it_was_measured(monkeypatch):
    environment = {}
    monkeypatch.setattr(fast.os, "environ", environment)
    monkeypatch.setattr(fast.importlib.metadata, "version", lambda _: "0.10.2")
    monkeypatch.setattr(fast.importlib.util, "find_spec", lambda _: None)
    for system, machine in (("linux", "arm64"), ("darwin", "x86_64")):
        monkeypatch.setattr(fast.sys, "platform", system)
        monkeypatch.setattr(fast.platform, "machine", lambda machine=machine: machine)
        fast.tune_xla()
    monkeypatch.setattr(fast.sys, "platform", "linux")
    monkeypatch.setattr(fast.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(fast.importlib.metadata, "version", lambda _: "0.10.3")
    fast.tune_xla()
    monkeypatch.setattr(fast.importlib.metadata, "version", lambda _: "0.10.2")
    for plugin in ("jax_plugins", "libtpu"):
        monkeypatch.setattr(fast.importlib.util, "find_spec", plugin.__eq__)
        fast.tune_xla()
    assert not environment, "a processor, version or plugin that may not know the flag"
    monkeypatch.setattr(fast.importlib.util, "find_spec", lambda _: None)
    fast.tune_xla()
    assert environment["XLA_FLAGS"] == fast.XLA["0.10.2"]
    environment["XLA_FLAGS"] = "mine"
    fast.tune_xla()
    assert environment["XLA_FLAGS"] == "mine"


@pytest.mark.skipif(
    (metadata.version("jaxlib"), sys.platform, platform.machine()) != ("0.10.2", "linux", "x86_64")
    or any(map(util.find_spec, ("jax_plugins", "libtpu"))),
    reason="the flag is set only where it was measured",
)
def test_xla_takes_the_flag_after_jax_was_imported():
    """Without the flag YNNPACK takes this convolution, with it XLA's own."""
    program = """
import fast, jax, sys
if sys.argv[1] == "tuned":
    fast.use_all_cores()
x, k = jax.numpy.ones((32, 14, 14, 16)), jax.numpy.ones((3, 3, 16, 32))
conv = jax.jit(lambda x, k: jax.lax.conv_general_dilated(
    x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
print("ynn" in conv.lower(x, k).compile().as_text())
"""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(Path(fast.__file__).parent)
    for how, taken in (("tuned", "False"), ("not", "True")):
        command = [sys.executable, "-c", program, how]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == taken, done.stderr


def on_devices(*modules):
    return {len(x.sharding.device_set) for x in jax.tree.leaves(nnx.state(modules))}


def test_compile_step_shares_out_the_batch_of_large_networks_alone(kd, images):
    several = jax.device_count()
    assert several > 1
    batch = {"image": images.image[:32] / np.float32(255), "label": images.label[:32]}
    for network, count in ((kd.StudentCNN, 1), (kd.TeacherCNN, several)):
        model = network(rngs=nnx.Rngs(0))
        optimizer = kd.make_optimizer(model, Recipe(0, 1, 32, 1e-3, "constant"), 64)
        step = fast.compile_step(kd.train_step, model, optimizer)
        first = float(step(batch)["loss"])
        assert first != float(step(batch)["loss"])
        assert on_devices(model, optimizer) == {count}
    student, frozen = kd.StudentCNN(rngs=nnx.Rngs(0)), kd.TeacherCNN(rngs=nnx.Rngs(1))
    optimizer = kd.make_optimizer(student, Recipe(0, 1, 32, 1e-3, "constant"), 64)
    step = fast.compile_step(kd.train_student_step, student, frozen, optimizer)
    assert np.isfinite(step(batch, 3.0, 0.5)["loss"])
    assert on_devices(student, frozen, optimizer) == {1}, "the teacher does not learn"


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_compile_step_gives_each_device_its_part_of_a_batch(kd, axis):
    several, shape = jax.device_count(), [4, 6]
    shape[axis or 0] *= several
    small = 1 if axis is None else several
    for network, parts in ((kd.StudentCNN, small), (kd.TeacherCNN, several)):
        step = fast.compile_step(
            nnx.jit(lambda _, batch: batch), network(rngs=nnx.Rngs(0)), axis=axis
        )
        found = step({"image": np.ones(shape, np.float32)})["image"]
        want = [n // parts if i == (axis or 0) else n for i, n in enumerate(shape)]
        assert found.addressable_shards[0].data.shape == tuple(want)


def test_share_out():
    several = jax.device_count()
    for shape, axis, part in (
        ((8, 3), 0, (8 // several, 3)),
        ((3, 8), 1, (3, 8 // several)),
        ((7, 3), 0, (7, 3)),
    ):
        parts = fast.share_out({"x": np.ones(shape)}, axis)["x"].addressable_shards
        assert [x.data.shape for x in parts] == [part] * several


def test_only_a_shared_batch_is_waited_for(kd, images, monkeypatch):
    waited, wait = [], jax.block_until_ready

    def spy(arrays):
        waited.append(arrays)
        return wait(arrays)

    monkeypatch.setattr(jax, "block_until_ready", spy)
    batch = {"image": images.image[:32] / np.float32(255), "label": images.label[:32]}
    for network, count in ((kd.StudentCNN, 0), (kd.TeacherCNN, 1)):
        model = network(rngs=nnx.Rngs(0))
        optimizer = kd.make_optimizer(model, Recipe(0, 1, 32, 1e-3, "constant"), 64)
        fast.compile_step(kd.train_step, model, optimizer)(batch)
        assert len(waited) == count


SWITCHES = ("jax_disable_jit", "jax_debug_nans", "jax_debug_infs")


@pytest.mark.parametrize("switch", SWITCHES)
def test_operations_one_by_one_get_one_device(switch, monkeypatch):
    """Shared out over several, they deadlock XLA's thread pool."""
    updates = []
    monkeypatch.setattr(jax.config, "update", lambda *change: updates.append(change))
    monkeypatch.setattr(fast, "tune_xla", lambda: None)
    values = {name: name == switch for name in SWITCHES}
    monkeypatch.setattr(fast.jax, "config", types.SimpleNamespace(**values, update=print))
    fast.use_all_cores()
    assert updates == []


@pytest.mark.parametrize(
    ("interpreter", "arguments", "own"),
    [
        (["python", "script.py", "--quick"], ["script.py", "--quick"], True),
        (["python", "-m", "pdb", "script.py"], ["script.py"], False),
        (["python", "-m", "cProfile", "script.py"], ["script.py"], False),
        (["python", "-m", "ipykernel_launcher", "-f", "x.json"], ["ipykernel_launcher.py"], False),
        (["python", "-i", "script.py"], ["script.py"], False),
        (["python", "-c", "import script"], ["-c"], False),
        (["python"], [""], False),
    ],
)
def test_only_a_script_s_own_process_is_started_anew(interpreter, arguments, own, monkeypatch):
    started = []
    monkeypatch.setattr(fast.sys, "orig_argv", interpreter)
    monkeypatch.setattr(fast.sys, "argv", arguments)
    monkeypatch.setattr(fast.sys, "platform", "linux")
    monkeypatch.setattr(fast, "in_notebook", lambda: False)
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr(fast.os, "execv", lambda *command: started.append(command))
    monkeypatch.setattr(fast.sys, "gettrace", lambda: None)
    fast.tune_malloc()
    assert bool(started) == own
    if own:
        assert started == [(sys.executable, [sys.executable, *arguments])]
        assert fast.os.environ["GLIBC_TUNABLES"] == fast.MALLOC
        fast.tune_malloc()
        assert len(started) == 1, "once is enough"


@pytest.mark.parametrize(("shell", "wanted"), [(None, False), (object(), True)])
def test_ipython_is_a_notebook_only_where_it_runs(shell, wanted, monkeypatch):
    """Flax imports it wherever it is installed."""
    ipython = types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(fast.sys.modules, "IPython", ipython)
    assert fast.in_notebook() == wanted
    monkeypatch.delitem(fast.sys.modules, "IPython")
    assert not fast.in_notebook()
