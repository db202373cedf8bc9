"""The convolution of `nnx.Conv`, with a gradient that XLA runs faster on the CPU.

Values and gradients are the same, to float32 rounding.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

GROUPS = 4  # of images, in a convolution's gradient of its kernel


def conv(images, kernel, strides, padding, **options):
    """`jax.lax.conv_general_dilated` of images [B, H, W, C] and a kernel [h, w, C, features].

    On other devices than CPUs it is the built-in function itself. On a CPU `jax.jvp` raises a
    TypeError: what brings its own gradient can be differentiated backwards only.
    """
    built_in = functools.partial(
        lax.conv_general_dilated, window_strides=strides, padding=padding, **options
    )
    if jax.default_backend() != "cpu":
        return built_in(images, kernel)
    steps = {*strides, *options.get("lhs_dilation", ()), *options.get("rhs_dilation", ())}
    shifts = images.ndim == 4 and images.shape[-1] == 1 and steps == {1}
    # As a convolution with B·H·W inputs to each output the gradient of the kernel does not fit into
    # the caches. That of a few images at a time does. Groups take turns, image by image, for each
    # device to have its part of every group.
    groups = GROUPS if len(images) % (GROUPS * jax.device_count()) == 0 else 1

    def forwards(images, kernel):
        y = shifted_sum(images, kernel, padding) if shifts else built_in(images, kernel)
        return y, (images, kernel)

    def backwards(kept, gradient):
        images, kernel = kept
        (of_images,) = jax.vjp(lambda images: built_in(images, kernel), images)[1](gradient)
        parts = [x.reshape(-1, groups, *x.shape[1:]) for x in (images, gradient)]
        of_kernel = 0
        for i in range(groups):
            few, gradient_of_few = (x[:, i] for x in parts)
            product = jax.vjp(functools.partial(built_in, few), kernel)[1]
            of_kernel += product(gradient_of_few)[0]
        return of_images, of_kernel

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
    images = jnp.pad(images, [(0, 0), *padding, (0, 0)])
    h, w = images.shape[1] - rows + 1, images.shape[2] - columns + 1
    places = itertools.product(range(rows), range(columns))
    return sum(images[:, i : i + h, j : j + w] * kernel[i, j, 0] for i, j in places)
