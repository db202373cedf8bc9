"""The convolution of `nnx.Conv`, faster to train on the CPU.

Values and gradients are the same, to float32 rounding.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

GROUPS = 8  # of images, in the gradient of a kernel: fast at a batch of 128, shared out or not


def conv(images, kernel, strides, padding, *, dimension_numbers, **options):
    """For `nnx.Conv(..., conv_general_dilated=conv)`: in training on a CPU a faster
    `jax.lax.conv_general_dilated`, elsewhere that function itself.

    Takes what `nnx.Conv` hands on: images [B, H, W, C] and a kernel [h, w, C, features]. What
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
    known = all(isinstance(n, int) and n for n in images.shape)  # an export may leave one open
    if jax.default_backend() != "cpu" or not (usual and known):
        return built_in(images, kernel)
    steps = {*strides, *options.get("lhs_dilation", ()), *options.get("rhs_dilation", ())}
    shifts = images.ndim == 4 and images.shape[-1] == 1 and steps == {1}
    # The gradient of a kernel is slow as the one convolution with a window as large as an image
    # that XLA makes of it, and faster as a sum over groups of images. Image i goes to group
    # i % groups: so each device has its part of every group.
    groups = GROUPS if len(images) % (GROUPS * jax.device_count()) == 0 else 1

    def forwards(images, kernel):
        y = shifted_sum(images, kernel, padding) if shifts else built_in(images, kernel)
        return y, (images, kernel)

    def backwards(kept, gradient):
        images, kernel = kept
        of_images = jax.linear_transpose(lambda images: built_in(images, kernel), images)
        parts = [x.reshape(-1, groups, *x.shape[1:]) for x in (images, gradient)]
        of_kernel = 0
        for i in range(groups):
            few, gradient_of_few = (x[:, i] for x in parts)
            transposed = jax.linear_transpose(functools.partial(built_in, few), kernel)
            of_kernel += transposed(gradient_of_few)[0]
        return *of_images(gradient), of_kernel

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
    h, w = images.shape[1] - rows + 1, images.shape[2] - columns + 1
    places = itertools.product(range(rows), range(columns))
    return sum(images[:, i : i + h, j : j + w] * kernel[i, j, 0] for i, j in places)
