"""Says what each measure for speed is worth to a step. Writes docs/results/breakdown.json.

    python tests/benchmarks/breakdown.py DATA_DIR    # about 10 minutes on 2 CPU cores

Steps of both networks, with each measure and without, each case in a process of its own, in turns.
What else runs on a shared machine can make every step of some seconds twice as slow, so that the
fastest epoch counts. Stopped, the same command goes on from part to part.
"""

import argparse
import functools
import json
import math
import os
import resource
import time

import common
import experiment
import fast
import jax
import utils
from flax import nnx
from idx import parser
from measure import load

TURNS, EPOCHS = 3, {"StudentCNN": 12, "TeacherCNN": 4}
STEPS, BATCH = 16, 128  # steps of an epoch, images of a step

# What `in_turns` is to compare: settings of malloc, the first layer, and the rest.
MALLOC = {
    "as glibc comes": "",
    "huge pages, and what is freed is kept": fast.MALLOC,
}
CONV = {"as built in": {"built_in_conv": True}, "`conv`": {}}
JAX = {
    "as script 15": {},
    "on one device": {"on_one_device": True},
    "`nnx.max_pool`": {"built_in_pool": True},
    "XLA's own settings": {"built_in_xla": True},
}


def training(kd, network, built_in_conv=False):
    """Steps of a network as script 15 has it, or without `fast.conv`."""
    model = network(rngs=nnx.Rngs(0))
    if built_in_conv:
        model.conv1.conv_general_dilated = jax.lax.conv_general_dilated
    recipe = experiment.Recipe(0, 4, BATCH, 1e-3, "onecycle")
    optimizer = kd.make_optimizer(model, recipe, 60_000)
    return fast.compile_step(kd.train_step, model, optimizer)


def epoch(step, split):
    for batch in utils.batches(split, BATCH, 0, 1):
        found = step(batch)
    jax.block_until_ready(found)


def timed_steps(
    folder, on_one_device=False, built_in_conv=False, built_in_pool=False, built_in_xla=False
):
    """Milliseconds and page faults of a step of each network, in its fastest epoch."""
    if built_in_xla:
        os.environ["XLA_FLAGS"] = ""
    fast.use_all_cores()
    if on_one_device:
        fast.SMALL_NETWORK = math.inf
    kd, data, found = load(common.SCRIPT), utils.load_data("mnist", folder), {}
    if built_in_pool:
        kd.max_pool = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
    for network in (kd.StudentCNN, kd.TeacherCNN):
        step, few = training(kd, network, built_in_conv), data.train.take(slice(STEPS * BATCH))
        for _ in range(3):  # the first compiles; memory settles
            epoch(step, few)
        epochs = []
        for _ in range(EPOCHS[network.__name__]):
            begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            epoch(step, few)
            milliseconds = 1e3 * (time.perf_counter() - begun) / STEPS
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
            epochs.append((round(milliseconds, 2), faults // STEPS))
        found[network.__name__] = min(epochs)
    return found


def in_turns(folder, cases):
    """Milliseconds and page faults of a step, one process a turn and case: {network: {case:
    [[milliseconds, faults] of each turn]}}. A case is malloc's setting and `timed_steps`' flags."""
    found = {}
    for turn in range(TURNS):
        for name, (setting, how) in common.rotated(cases.items(), turn):
            env = common.environment(False) | {"GLIBC_TUNABLES": setting}
            case = json.dumps(how)
            answer = common.ask(__file__, str(folder), "--case", case, env=env)
            for network, measured in answer.items():
                of = found.setdefault(network, {case: [] for case in cases})
                of[name].append(measured)
        print(f"turn {turn + 1} of {TURNS}: {', '.join(cases)}", flush=True)
    return found


def main():
    line = parser(__doc__)
    line.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    flags = line.parse_args()
    folder = flags.data_dir
    if flags.case is not None:
        print(json.dumps(timed_steps(folder, **flags.case)))
        return
    common.check_data(line, folder)
    malloc = {name: (setting, {}) for name, setting in MALLOC.items()}
    rest = {
        part: {name: (fast.MALLOC, how) for name, how in those.items()}
        for part, those in (("conv", CONV), ("jax", JAX))
    }
    kept, cases = common.Kept("breakdown"), {"memory": malloc} | rest
    content = {name: kept.measure(name, in_turns, folder, of) for name, of in cases.items()}
    kept.write("python tests/benchmarks/breakdown.py DATA_DIR", content)
    kept.forget()
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    common.run(main)
