"""All that exists for speed: convolutions and a pooling that train faster on the CPU, steps shared
out over the cores, the memory allocator, a flag of the compiler.

Of finite numbers, values and gradients are those of the plain code, to float32 rounding.
"""

import functools
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import sys

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# %% Layers


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
    unit_steps = set(strides) == {1}
    if not (is_plain(images, kernel, options) and images.shape[-1] == 1 and unit_steps):
        return built_in(images, kernel)

    def forwards(images, kernel):
        return shifted_sum(images, kernel, padding), (images, kernel)

    def backwards(kept, gradient):
        return jax.vjp(built_in, *kept)[1](gradient)

    convolve = jax.custom_vjp(built_in)  # inference
    convolve.defvjp(forwards, backwards)
    return convolve(images, kernel)


def depthwise_conv(images, kernel, strides, padding, *, dimension_numbers, **options):
    """For `nnx.Conv(..., feature_group_count=C, conv_general_dilated=depthwise_conv)`, a filter for
    each of C channels: on a CPU a faster `jax.lax.conv_general_dilated`, elsewhere that function
    itself. Takes images [B, H, W, C] and a kernel [h, w, 1, C]."""
    channels = images.shape[-1]
    depthwise = options.get("feature_group_count") == channels == kernel.shape[-1]
    if depthwise and is_plain(images, kernel, options):
        return shifted_sum(images, kernel, padding, strides)
    return lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=dimension_numbers, **options
    )


def is_plain(images, kernel, options):
    """Whether a convolution runs on the CPU, in float32, over images [B, H, W, C] of known size,
    and without dilation and other options."""
    special = map(options.get, ("precision", "preferred_element_type", "out_sharding"))
    usual = images.dtype == kernel.dtype == jnp.float32 and not any(special)
    dilated = {*options.get("lhs_dilation", ()), *options.get("rhs_dilation", ())} - {1}
    known = all(isinstance(n, int) for n in images.shape[1:])  # an export may leave one open
    return jax.default_backend() == "cpu" and usual and images.ndim == 4 and known and not dilated


def shifted_sum(images, kernel, padding, strides=(1, 1)):
    """A convolution of each channel alone, or of the only one with several filters, as a sum of
    shifted images times their weights. XLA fuses it with what stands beside it; one channel is too
    few for a product of matrices.

    Images are [B, H, W, C] and a kernel [h, w, 1, C], or [B, H, W, 1] and [h, w, 1, features].
    """
    rows, columns = kernel.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], (rows, columns), strides, padding)
    images = lax.pad(images, jnp.float32(0), [(0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)])
    ends = [max(0, n - k + 1) for n, k in zip(images.shape[1:3], (rows, columns), strict=True)]

    def shifted(i, j):
        return images[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]]

    places = itertools.product(range(rows), range(columns))
    return sum(shifted(i, j) * kernel[i, j, 0] for i, j in places)


def max_pool(x):
    """The same as `nnx.max_pool(x, (2, 2), (2, 2))` of finite [B, H, W, C], and its gradient, which
    is slow on the CPU when XLA derives it."""
    if not isinstance(x.shape[0], int):  # an export leaves it open, and knows pooling by its name
        return nnx.max_pool(x, window_shape=(2, 2), strides=(2, 2))
    batch, height, width, channels = x.shape
    h, w = height // 2, width // 2  # an odd last row or column has no partner
    x = x[:, : 2 * h, : 2 * w].reshape(batch, h, 2, w, 2, channels)
    top, bottom = (larger(x[:, :, i, :, 0], x[:, :, i, :, 1]) for i in (0, 1))
    return larger(top, bottom)


def larger(x, y):
    """The larger of each two, x if they are equal. The gradient of `max` goes to what equals it,
    and under `jit` XLA may compute x anew with other rounding: then it is lost. Not so here."""
    return lax.select(x < y, y, x)


# %% Steps and devices

# With fewer parameters, sharing out a batch of 128 over 2 cores costs a step more than it gains.
SMALL_NETWORK = 300_000


def compile_step(step, *modules, axis=None):
    """The step with its modules filled in: called with the rest, the batch first.

    It is `nnx.cached_partial`, which walks through the modules once instead of at every call; their
    structure must not change from then on. If the first module, which learns, has many parameters,
    all modules are copied to every device, and each device gets its part of every batch; otherwise
    all are put on the first device. With an `axis`, as for a stack of networks, the batch is shared
    out along that axis in any case.
    """
    params = sum(x.size for x in jax.tree.leaves(nnx.state(modules[0], nnx.Param)))
    if jax.device_count() == 1 or (axis is None and params < SMALL_NETWORK):
        return nnx.cached_partial(step, *place(modules, jax.devices()[0]))
    filled_in = nnx.cached_partial(step, *place(modules, on_all_devices()))

    def step_on_all_devices(batch, *more, **options):
        result = filled_in(share_out(batch, axis or 0), *more, **options)
        # With several such steps under way XLA's thread pool on the CPU can deadlock (seen in
        # jaxlib 0.10.2), and gains nothing.
        return jax.block_until_ready(result) if jax.default_backend() == "cpu" else result

    return step_on_all_devices


def place(modules, where):
    """Puts the state of a module, or of a tuple of modules, on a device or, by a sharding, on
    several. Returns the modules."""
    nnx.update(modules, jax.device_put(nnx.state(modules), where))
    return modules


@functools.cache
def on_all_devices(*axes):
    """The sharding that copies an array to every device, or splits it along the axis "batch"."""
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*axes))


def share_out(batch, axis=0):
    """Splits arrays over the devices along an axis; copies them if it does not divide."""
    sizes = [x.shape[axis] for x in jax.tree.leaves(batch)]
    if any(size % jax.device_count() for size in sizes):
        return jax.device_put(batch, on_all_devices())
    return jax.device_put(batch, on_all_devices(*[None] * axis, "batch"))


def use_all_cores():
    """Makes each CPU core a JAX device (a power of two, at most 8), to share a batch out over them:
    XLA runs most CPU work but convolutions and matrix products on one thread a device. GPUs are
    used as they are. Does nothing if JAX has started already."""
    tune_xla()
    if jax.config.jax_disable_jit or jax.config.jax_debug_nans or jax.config.jax_debug_infs:
        return  # operations one by one, shared out over several devices, deadlock XLA's thread pool
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = 2 ** min(3, cores.bit_length() - 1)
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # JAX has started, with the devices that it has.
        return


# %% Settings of the process


def in_notebook():
    """Whether IPython or a notebook runs this. (Flax imports IPython wherever it is installed.)"""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def owns_process():
    """Whether this process is a script's own, `python script.py --flags`: no notebook, debugger,
    profiler or interactive session, in which the script is a guest."""
    watched = sys.gettrace() or sys.getprofile() or sys.flags.interactive
    return sys.orig_argv[1:] == sys.argv and not watched and not in_notebook()


# glibc takes memory in huge pages, and keeps up to 4 GiB of what a step frees for the next one.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=0x100000000"
MALLOC += ":glibc.malloc.trim_threshold=0x100000000"


def tune_malloc():
    """Starts Python once more with these settings: the large arrays of a step then cost hardly any
    page faults, otherwise a good part of a teacher's step. Other systems ignore the variable.

    Only a process that is the script's own is replaced: a notebook would be lost.
    """
    if sys.platform == "linux" and owns_process() and "GLIBC_TUNABLES" not in os.environ:
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
