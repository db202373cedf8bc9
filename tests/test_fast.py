"""The fast convolution: parameters, values and gradients of the one that it stands for."""

import functools

import jax
import numpy as np
import pytest
import utils
from fast import conv
from flax import nnx

ROUNDING = 3e-5  # of the greatest number: a weight's gradient sums 100,000 products


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
        utils.replicate(layer)
    x = utils.shard(draw(8 * jax.device_count(), 8, 8, 1))
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
