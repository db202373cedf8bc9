"""What is faster to train on the CPU: the convolution of `nnx.Conv` where images have one channel,
and the pooling of `nnx.max_pool`. Of finite numbers, values and gradients are the same, to float32
rounding."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax


def conv(images, kernel, strides, padding, *, dimension_numbers, **options):
    """For `nnx.Conv(..., conv_general_dilated=conv)` in a first layer: in training on a CPU a
    faster `jax.lax.conv_general_dilated`, elsewhere that function itself.

    Takes what `nnx.Conv` hands on: images [B, H, W, 1] and a kernel [h, w, 1, features]. What
    brings its own gradient can be differentiated backwards only: `jax.jvp` raises a TypeError.
    """
    built_in = functools.partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        dimension_numbers=dimension_numbers,
        **options,
    )
    special = map(options.get, ("precision", "preferred_element_type", "out_sharding"))
    usual = images.dtype == kernel.dtype == jnp.float32 and not any(special)
    steps = {*strides, *options.get("lhs_dilation", ()), *options.get("rhs_dilation", ())}
    shifts = images.ndim == 4 and images.shape[-1] == 1 and steps == {1}
    known = all(isinstance(n, int) for n in images.shape[1:])  # an export may leave one open
    if jax.default_backend() != "cpu" or not (usual and shifts and known):
        return built_in(images, kernel)

    def forwards(images, kernel):
        return shifted_sum(images, kernel, padding), (images, kernel)

    def backwards(kept, gradient):
        return jax.vjp(built_in, *kept)[1](gradient)

    convolve = jax.custom_vjp(built_in)  # inference
    convolve.defvjp(forwards, backwards)
    return convolve(images, kernel)


def shifted_sum(images, kernel, padding):
    """The convolution of images [B, H, W, 1] as a sum of shifted images times their weights, which
    XLA fuses with the sums of BatchNorm in training. One channel is too few for a product of
    matrices."""
    rows, columns = kernel.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], (rows, columns), (1, 1), padding)
    images = lax.pad(images, jnp.float32(0), [(0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)])
    h, w = max(0, images.shape[1] - rows + 1), max(0, images.shape[2] - columns + 1)
    places = itertools.product(range(rows), range(columns))
    return sum(images[:, i : i + h, j : j + w] * kernel[i, j, 0] for i, j in places)


def max_pool(x):
    """The same as `nnx.max_pool(x, (2, 2), (2, 2))` of finite [B, H, W, C], and its gradient, which
    is slow on the CPU when XLA derives it."""
    batch, height, width, channels = x.shape
    h, w = height // 2, width // 2  # an odd last row or column has no partner
    x = x[:, : 2 * h, : 2 * w].reshape(batch, h, 2, w, 2, channels)
    top, bottom = (larger(x[:, :, i, :, 0], x[:, :, i, :, 1]) for i in (0, 1))
    return larger(top, bottom)


def larger(x, y):
    """The larger of each two, x if they are equal. The gradient of `max` goes to what equals it,
    and under `jit` XLA may compute x anew with other rounding: then it is lost. Not so here."""
    return lax.select(x < y, y, x)
