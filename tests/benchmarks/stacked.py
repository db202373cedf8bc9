"""Times many students in one program against as many single runs of script 15's student. Writes
docs/results/stacked.json.

    python tests/benchmarks/stacked.py    # about 20 minutes on 2 CPU cores

The step alone on random images, for stacks of 1 to 64, in turns; and whole runs of 16 students on
1,000 images, with batches and checkpoints, and a clock around what they call, each in a process of
its own, three times in turns. The single runs are timed twice: as script 15 has them, scored ten
times on 10,000 images, and on one image only, since the stack is never scored. Stopped, the same
command goes on from turn to turn.
"""

import argparse
import contextlib
import functools
import json
import os
import tempfile
import time
from unittest import mock

import common
import experiment
import fast
import idx
import jax
import numpy as np
import utils
from experiment import Recipe
from flax import nnx
from measure import load

SEEDS, CELLS = list(range(4)), [(1.0, 0.1), (3.0, 0.5), (8.0, 0.1), (1.0, 1.0)]
LABELS, ROUNDS, TURNS = 1000, 9, 3
OTHERS = 16  # recipes that a step has been compiled for before
KINDS = ("single", "single_scored", "stack")
PARTS = ("compilation", "inference", "checkpoints", "steps and batches")


class Clock:
    """Seconds by part; what runs inside of another part is taken off that one."""

    def __init__(self):
        self.seconds, self.running, self.compiling = {}, [], []

    def add(self, name, seconds, inside=0.0):
        """Adds to a part what it took beyond what ran inside of it, and takes it off the outer."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds - inside
        if self.running:
            self.running[-1][1] += seconds

    @contextlib.contextmanager
    def part(self, name):
        begun, self.running = time.perf_counter(), [*self.running, [name, 0.0]]
        try:
            yield
        finally:
            *self.running, (_, inside) = self.running
            self.add(name, time.perf_counter() - begun, inside)

    def around(self, holder, attribute, name):
        """Puts the clock around a function or method."""
        function = getattr(holder, attribute)

        @functools.wraps(function)
        def timed(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        setattr(holder, attribute, timed)

    def compiled(self, event, seconds, **_):
        """Takes what JAX says of tracing, lowering and compiling; one may hold others."""
        if not event.startswith("/jax/core/compile/"):
            return
        end, within = time.perf_counter(), 0.0
        while self.compiling and self.compiling[-1][0] >= end - seconds:
            within += self.compiling.pop()[1]
        self.compiling.append((end - seconds, seconds))
        self.add("compilation", max(0.0, seconds - within))


def random_data(images):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (images, 28, 28, 1)).astype(np.uint8)
    label = (np.arange(images) % 10).astype(np.int32)
    split = utils.Split(image, label, np.arange(images, dtype=np.int32))
    return utils.Data("random", "drawn", split, split, "test")


def alone(kd, recipe, batch, device, jitted=None):
    """The step of script 15's student on a device."""
    student = kd.StudentCNN(rngs=nnx.Rngs(0))
    modules = student, None, kd.make_optimizer(student, recipe, LABELS)
    step = nnx.cached_partial(jitted or kd.train_student_step, *fast.place(modules, device))
    return lambda: step(jax.device_put(batch, device), 3.0, 0.5)


def steps(kd, tuning, data):
    """Milliseconds a step and student of each round, of one alone, of one on each device at a time
    and of stacks, all in turns. Those of a stack take turns as well, as on a CPU they do; one stack
    is vectorised, as elsewhere."""
    recipe = Recipe(0, 60, 128, 1e-3, "onecycle")
    table = np.zeros((LABELS, 10), np.float32)
    batch = next(utils.batches(data.train, 128, 0, 1, teacher_logits=table))
    first, *others = [alone(kd, recipe, batch, device) for device in jax.devices()]
    todo = {"single": (1, first)}
    if others:
        several = [first, *others]
        name = f"{len(several)} singles at a time, a device each"
        todo[name] = (len(several), lambda: [step() for step in several])
    jitted = nnx.jit(kd.train_student_step.__wrapped__)
    for _ in range(OTHERS + 1):
        kd.make_transform.cache_clear()  # else equal recipes share one, and the compiled step
        last = alone(kd, recipe, batch, jax.devices()[0], jitted)
        last()  # compiles, for an optimizer of its own
    todo[f"single, after {OTHERS} others with optimizers of their own"] = (1, last)
    for seeds, cells, vectorised in (
        *((seeds, cells, False) for seeds, cells in ((1, 1), (1, 4), (4, 4), (4, 8), (4, 16))),
        (4, 4, True),
    ):
        stack = tuning.Students(list(range(seeds)), cells)
        optimizer = tuning.make_optimizer(stack, recipe, LABELS)
        splits = [data.train] * seeds
        stacked = next(tuning.stacked_batches(splits, 128, range(seeds), 1, teacher_logits=table))
        how = stacked, np.full(cells, 3, np.float32), np.full(cells, 0.5, np.float32)
        one = fast.compile_step(nnx.jit(tuning.students_step.__wrapped__), stack, optimizer, axis=1)
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
                found = step()
            jax.block_until_ready(found)
            if turn:  # the first compiles
                times[name].append(1e3 * (time.perf_counter() - begun) / count / repeats)
    return {name: [round(x, 3) for x in of] for name, of in times.items()}


def whole(kd, tuning, data, kind):
    """Seconds of each part: of 16 single runs, one after the other, or of one program with all 16.
    Their checkpoints lie where it is called."""
    teacher = tuning.TeacherCNN(rngs=nnx.Rngs(0))
    scored = data._replace(test=random_data(10_000).test)
    hardly = data._replace(test=data.test.take(slice(1)))
    # The recipe for 1,000 labels of MNIST, though there are no other images here.
    config = kd.Config(epochs=60, batch_size=128, learning_rate=4e-2)
    clock = Clock()
    jax.monitoring.register_event_duration_secs_listener(clock.compiled)
    for module in (utils, kd, tuning):
        clock.around(module, "predict", "inference")
    for name in ("_write", "_restore"):
        clock.around(experiment.Training, name, "checkpoints")

    def run_on(own):
        folder = experiment._take_folder("run")
        return experiment.Run(kd.Config(), own, folder, time.perf_counter())

    def singles(own):
        run = run_on(own)
        for seed in SEEDS:
            recipe = kd.student_recipe(config, own, seed, LABELS)
            for cell in CELLS:
                kd.train_student_with_distillation(teacher, own, data.train, recipe, run, *cell)

    def together():
        recipe = kd.student_recipe(config, data, SEEDS[0], LABELS)
        splits, classes = [data.train] * len(SEEDS), data.classes
        tuning.train_stack("grid", teacher, splits, SEEDS, CELLS, recipe, classes, run_on(data))

    train = {
        "single": functools.partial(singles, hardly),
        "single_scored": functools.partial(singles, scored),
        "stack": together,
    }[kind]
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),  # an epoch's line each, some 1,000 of them
        clock.part("steps and batches"),
    ):
        train()
    parts = {name: round(clock.seconds.get(name, 0.0), 2) for name in PARTS}
    return parts | {"whole": round(sum(parts.values()), 2)}


def ask(*task):
    """What a task returns in a process and a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        how = {"env": common.environment(True), "cwd": folder}
        return common.ask(__file__, "--task", *task, **how)


def whole_runs(kept):
    """Of each kind the seconds of each part in each turn."""
    found = {kind: {part: [] for part in (*PARTS, "whole")} for kind in KINDS}
    for turn in range(TURNS):
        for kind in common.rotated(KINDS, turn):
            for part, seconds in kept.measure(f"{kind}, turn {turn + 1}", ask, kind).items():
                found[kind][part].append(seconds)
        print(f"turn {turn + 1} of {TURNS}", flush=True)
    return found


def main():
    line = idx.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    line.add_argument("--task", choices=("steps", *KINDS), help=argparse.SUPPRESS)
    if task := line.parse_args().task:
        fast.use_all_cores()
        given = load(common.SCRIPT), load(common.TUNING), random_data(LABELS)
        print(json.dumps(steps(*given) if task == "steps" else whole(*given, task)))
        return
    kept = common.Kept("stacked")
    found, runs = kept.measure("steps", ask, "steps"), whole_runs(kept)
    kept.write("python tests/benchmarks/stacked.py", {"steps": found, "runs": runs})
    kept.forget()
    for name, each in found.items():
        print(f"{name:50} {np.median(each):6.1f} ms a step and student")
    for kind, parts in runs.items():
        print(f"16 students, {kind:37} {np.median(parts['whole']):6.1f} s")


if __name__ == "__main__":
    common.run(main)
