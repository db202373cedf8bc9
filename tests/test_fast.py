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
        ((16, 6, 5, 8), {"padding": "SAME"}),
        ((7, 6, 5, 8), {"padding": "VALID"}),  # does not divide into groups
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


def test_conv_of_a_shared_batch():
    """As it is trained: the batch shared out over the devices, the weights on each."""
    options = {"conv_general_dilated": conv}, {}
    layers = [nnx.Conv(1, 6, (3, 3), rngs=nnx.Rngs(0), **each) for each in options]
    for layer in layers:
        utils.replicate(layer)
    same(*layers, utils.shard(draw(32, 8, 8, 1)))


def test_elsewhere_conv_is_the_built_in_one(monkeypatch):
    """On an accelerator, whose convolutions are its own."""
    layer = nnx.Conv(1, 6, (3, 3), conv_general_dilated=conv, rngs=nnx.Rngs(0))
    x = draw(8, 6, 6, 1)

    def has_its_own_gradient():
        return "custom_vjp" in str(jax.make_jaxpr(lambda x: layer(x))(x))

    assert has_its_own_gradient()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not has_its_own_gradient()
