"""Times many students in one program against as many single runs of script 15's student, in one
process. Writes docs/results/stacked.json.

    python tests/benchmarks/stacked.py    # about 20 minutes on 2 CPU cores

The step alone on random images, for stacks of 1 to 64, in turns; and whole runs of 16 students on
1,000 images, with batches and checkpoints, and a clock around what they call. The single runs are
timed twice: as script 15 has them, scored ten times on 10,000 images, and on one image only, since
the stack is never scored. They take turns, three times. Stopped, the same command goes on from part
to part.
"""

import argparse
import contextlib
import functools
import os
import sys
import tempfile
import time
from unittest import mock

import common
import jax
import numpy as np
import utils
from breakdown import Clock
from flax import nnx
from measure import load

SEEDS, CELLS = list(range(4)), [(1.0, 0.1), (3.0, 0.5), (8.0, 0.1), (1.0, 1.0)]
LABELS, ROUNDS, TURNS = 1000, 9, 3


def random_data(images):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (images, 28, 28, 1)).astype(np.uint8)
    label = (np.arange(images) % 10).astype(np.int32)
    split = utils.Split(image, label, np.arange(images, dtype=np.int32))
    return utils.Data("random", "drawn", split, split, "test")


def alone(kd, recipe, batch, device):
    """The step of script 15's student on a device."""
    student = kd.StudentCNN(rngs=nnx.Rngs(0))
    modules = student, None, kd.make_optimizer(student, recipe, LABELS)
    step = nnx.cached_partial(kd.train_student_step, *utils.put(modules, device))
    return lambda: step(jax.device_put(batch, device), 3.0, 0.5)


def steps(kd, tuning, data):
    """Milliseconds a step and student of each round, of one alone, of one on each device at a time
    and of stacks, all in turns. Those of a stack take turns as well, as on a CPU they do; one stack
    is vectorised, as elsewhere."""
    recipe = kd.Recipe(0, 60, 128, 1e-3, "onecycle")
    table = np.zeros((LABELS, 10), np.float32)
    batch = next(utils.batches(data.train, 128, 0, 1, teacher_logits=table))
    first, *others = [alone(kd, recipe, batch, device) for device in jax.devices()]
    todo = {"single": (1, first)}
    if others:
        several = [first, *others]
        name = f"{len(several)} singles at a time, a device each"
        todo[name] = (len(several), lambda: [step() for step in several])
    for seeds, cells, vectorised in (
        *((seeds, cells, False) for seeds, cells in ((1, 1), (1, 4), (4, 4), (4, 8), (4, 16))),
        (4, 4, True),
    ):
        stack = tuning.Students(list(range(seeds)), cells)
        optimizer = tuning.make_optimizer(stack, recipe, LABELS)
        splits = [data.train] * seeds
        stacked = next(utils.stacked_batches(splits, 128, range(seeds), 1, teacher_logits=table))
        how = stacked, np.full(cells, 3, np.float32), np.full(cells, 0.5, np.float32)
        one = utils.bind(nnx.jit(tuning.students_step.__wrapped__), stack, optimizer, axis=1)
        elsewhere = mock.patch("jax.default_backend", return_value="gpu")
        with elsewhere if vectorised else contextlib.nullcontext():
            one(*how)  # compiles, once and for all: the shapes stay
        name = f"stack of {seeds * cells}{', vectorised' if vectorised else ''}"
        todo[name] = (seeds * cells, lambda one=one, how=how: one(*how))
    times = {name: [] for name in todo}
    for turn in range(ROUNDS + 1):
        for name, (count, step) in common.shuffled(todo.items(), turn):
            repeats = max(1, 16 // count)
            jax.block_until_ready(step())  # another stack has left its data in the caches
            begun = time.perf_counter()
            for _ in range(repeats):
                utils.settle(found := step())  # as `utils.Phase.log` does
            jax.block_until_ready(found)
            if turn:  # the first compiles
                times[name].append(1e3 * (time.perf_counter() - begun) / count / repeats)
    return {name: [round(x, 3) for x in of] for name, of in times.items()}


def whole_runs(kd, tuning, data, folder):
    """Seconds of each part in each turn, of 16 single runs, one after the other, and of one program
    with all 16."""
    teacher = tuning.TeacherCNN(rngs=nnx.Rngs(0))
    config = kd.Config()
    recipe = kd.student_recipe(config, LABELS)
    scored = data._replace(test=random_data(10_000).test)
    hardly = data._replace(test=data.test.take(slice(1)))
    clock, found = Clock(), {}
    jax.monitoring.register_event_duration_secs_listener(clock.compiled)
    clock.around(utils, "predict", "inference")
    for name in ("_save", "restore"):
        clock.around(utils.Phase, name, "checkpoints")

    @contextlib.contextmanager
    def timed(name):
        clock.seconds = {}
        with clock.part("steps and batches"):
            yield
        clock.seconds["whole"] = sum(clock.seconds.values())
        for part, seconds in clock.seconds.items():
            found.setdefault(name, {}).setdefault(part, []).append(seconds)

    def singles(name, own, turn):
        for seed in SEEDS:
            for cell in CELLS:
                how = recipe._replace(seed=seed), f"{folder}/{turn}/{name}"
                kd.train_student_with_distillation(teacher, own, data.train, *how, *cell)

    def together(name, turn):
        config = tuning.Config(output_dir=f"{folder}/{turn}/{name}")
        tuning.train_students("grid", teacher, data, str(LABELS), SEEDS, CELLS, config)

    todo = {
        "single": functools.partial(singles, own=hardly),
        "single_scored": functools.partial(singles, own=scored),
        "stack": together,
    }
    for turn in range(TURNS):
        for name, train in common.rotated(todo.items(), turn):
            # An epoch's line each, some 3,000 of them.
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), timed(name):
                train(name, turn=turn)
        print(f"turn {turn + 1} of {TURNS}", flush=True)
    return {
        name: {part: [round(x, 2) for x in seconds] for part, seconds in found[name].items()}
        for name in todo
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.parse_args()
    wanted = common.environment(True)
    if os.environ != wanted:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)
    utils.use_all_cores()
    kept = common.Kept("stacked")
    kd, tuning, data = load(common.SCRIPT), load(common.TUNING), random_data(LABELS)
    found = kept.measure("steps", steps, kd, tuning, data)
    with tempfile.TemporaryDirectory() as folder:
        whole = kept.measure("runs", whole_runs, kd, tuning, data, folder)
    kept.write("python tests/benchmarks/stacked.py", {"steps": found, "runs": whole})
    for name, each in found.items():
        print(f"{name:50} {np.median(each):6.1f} ms a step and student")
    for name, parts in whole.items():
        print(f"16 students, {name:37} {np.median(parts['whole']):6.1f} s")


if __name__ == "__main__":
    common.run(main)
