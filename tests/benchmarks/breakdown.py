"""Says where the main job's time goes, and how a step's and an epoch's time grow. Writes
docs/results/breakdown.json.

    python tests/benchmarks/breakdown.py DATA_DIR    # about 20 minutes on 2 CPU cores

*Memory*, *conv* and *jax*: steps with each of our settings of malloc and without, with `fast.conv`
and without, and with XLA's own settings, on one device, on all or with `nnx.max_pool`, each in a
process of its own, in turns. *Parts*: script 15 cold, with a clock around what it calls; by
default, with all labels, and with --quick, also with JAX's persistent compilation cache, empty and
then filled. *Batch size* and *images*: steps of both networks at batches of 32 to 1,024, and a
student's epochs on 1,000 to 60,000 images. Stopped, the same command goes on from part to part.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import resource
import statistics
import sys
import tempfile
import time

BEGUN = time.perf_counter()

import common  # noqa: E402
import experiment  # noqa: E402
import fast  # noqa: E402
import jax  # noqa: E402
import plots  # noqa: E402
import utils  # noqa: E402
from flax import nnx  # noqa: E402
from idx import parser  # noqa: E402
from measure import load  # noqa: E402

BATCHES, IMAGES, ROUNDS = (32, 64, 128, 256, 512, 1024), (1000, 5000, 20_000, 60_000), 7
LONG = {"StudentCNN": 8192, "TeacherCNN": 2048}  # images of a turn, about half a second
TURNS = 3


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
            # The logits of the teacher are had by the function that scores, too.
            outer = {"evaluation": "teacher's logits"}.get(name)
            own = outer if any(x == outer for x, _ in self.running) else name
            with self.part(own):
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


def ask(task, folder, env, cwd=None, **how):
    """What one of the TASKS returns in a process of its own."""
    return common.ask(__file__, str(folder), "--task", json.dumps([task, how]), env=env, cwd=cwd)


# What a clock is put around, and the part that it belongs to.
CLOCKED = (
    (utils, "load_data", "data"),
    (utils, "predict", "evaluation"),  # within `evaluate`
    (utils, "latency_ms", "latency"),
    (plots, "draw_epochs", "figure"),
    (plots, "draw_soft_targets", "figure"),
    (experiment.Run, "save_figure", "figure"),
    (experiment.Run, "finish", "figure"),
    (experiment.Training, "_write", "checkpoints"),
    (experiment.Training, "_restore", "checkpoints"),
)
CLOCKED_OF_SCRIPT = (
    ("predict", "evaluation"),
    ("predict_by_index", "teacher's logits"),
    ("train_teacher", "teacher"),
    ("train_student_with_distillation", "distilled student"),
    ("train_student_baseline", "baseline student"),
)


def timed_job(folder, flags):
    """Script 15's main with a clock in it: the seconds of its parts."""
    clock, kd = Clock(), load(common.SCRIPT)
    clock.seconds["imports"] = time.perf_counter() - BEGUN
    jax.monitoring.register_event_duration_secs_listener(clock.compiled)
    for holder, attribute, part in CLOCKED:
        clock.around(holder, attribute, part)
    for attribute, part in CLOCKED_OF_SCRIPT:
        clock.around(kd, attribute, part)
    with clock.part("the rest"):
        kd.main(experiment.parse(kd.Config, ["--data-dir", str(folder), *flags]))
    return clock.seconds


def parts(folder):
    """Seconds of each part of whole runs."""
    found = {}
    with tempfile.TemporaryDirectory() as cwd:
        cache = {"JAX_COMPILATION_CACHE_DIR": f"{cwd}/cache"}
        cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        for name, flags, more in (
            ("default", [], {}),
            ("all labels", ["--labels", "all"], {}),
            ("quick", ["--quick"], {}),
            ("quick, compilation cache empty", ["--quick"], cache),
            ("quick, compilation cache filled", ["--quick"], cache),
        ):
            env, begun = common.environment(True) | more, time.perf_counter()
            own = [*flags, "--output-dir", f"{cwd}/{len(found)}/run"]
            seconds = ask("timed_job", folder, env, cwd, flags=own)
            whole = time.perf_counter() - begun
            seconds["start and end of Python"] = whole - sum(seconds.values())
            found[name] = {k: round(v, 2) for k, v in seconds.items()} | {"whole": round(whole, 2)}
            print(name, found[name], flush=True)
    return found


def training(kd, network, batch_size, built_in_conv=False):
    """Steps of a network as script 15 has it, or without `fast.conv`."""
    model = network(rngs=nnx.Rngs(0))
    if built_in_conv:
        model.conv1.conv_general_dilated = jax.lax.conv_general_dilated
    recipe = experiment.Recipe(0, 4, batch_size, 1e-3, "onecycle")
    optimizer = kd.make_optimizer(model, recipe, 60_000)
    return fast.compile_step(kd.train_step, model, optimizer)


def epoch(step, split, batch_size):
    for batch in utils.batches(split, batch_size, 0, 1):
        found = step(batch)
    jax.block_until_ready(found)


def growth(folder):
    """Milliseconds of a step by batch size, and seconds of a student's epoch by images: medians
    over rounds in which all take turns, with the least and the greatest."""
    fast.use_all_cores()
    kd, data = load(common.SCRIPT), utils.load_data("mnist", folder)
    found, todo = {}, {}
    for size in BATCHES:
        for network in (kd.StudentCNN, kd.TeacherCNN):
            step = training(kd, network, size)
            few = data.train.take(slice(LONG[network.__name__]))
            each = functools.partial(epoch, step, few, size)
            todo["batch_size", network.__name__, size] = each, 1e3 * size / len(few.label)
    step = training(kd, kd.StudentCNN, 128)
    for count in IMAGES:
        few = data.train.take(slice(count))
        todo["images", "StudentCNN", count] = functools.partial(epoch, step, few, 128), 1
    times = {key: [] for key in todo}
    for turn in range(ROUNDS + 1):
        for key, (train, unit) in common.shuffled(todo.items(), turn):
            train()  # the first one compiles; another has left its data in the caches
            begun = time.perf_counter()
            train()
            if turn:
                times[key].append(unit * (time.perf_counter() - begun))
        print(f"round {turn} of {ROUNDS}", file=sys.stderr, flush=True)
    for (what, network, size), seconds in times.items():
        three = statistics.median(seconds), min(seconds), max(seconds)
        found.setdefault(what, {}).setdefault(network, {})[size] = [round(x, 3) for x in three]
    return found


# What `in_turns` is to compare: settings of malloc, the first layer, and the rest.
MALLOC = {
    "as glibc comes": "",
    "huge pages": fast.MALLOC.partition(":")[0],
    "huge pages, and what is freed is kept": fast.MALLOC,
}
CONV = {"as built in": {"built_in_conv": True}, "`conv`": {}}
JAX = {
    "as script 15": {},
    "on one device": {"devices": "one"},
    "on a device for each core": {"devices": "all"},
    "`nnx.max_pool`": {"built_in_pool": True},
    "XLA's own settings": {"built_in_xla": True},
    "one device, `nnx.max_pool`, XLA's own settings": {
        "devices": "one",
        "built_in_pool": True,
        "built_in_xla": True,
    },
}


def timed_steps(folder, devices=None, built_in_conv=False, built_in_pool=False, built_in_xla=False):
    """Milliseconds and page faults of a step of each network."""
    if built_in_xla:
        os.environ["XLA_FLAGS"] = ""
    fast.use_all_cores()
    small = fast.SMALL_NETWORK
    fast.SMALL_NETWORK = {None: small, "one": math.inf, "all": 0}[devices]
    kd, data, found = load(common.SCRIPT), utils.load_data("mnist", folder), {}
    if built_in_pool:
        kd.max_pool = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
    for network in (kd.StudentCNN, kd.TeacherCNN):
        step, few = training(kd, network, 128, built_in_conv), data.train.take(slice(16 * 128))
        for _ in range(3):  # the first compiles; memory settles
            epoch(step, few, 128)
        begun, faults = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(3):
            epoch(step, few, 128)
        milliseconds = 1e3 * (time.perf_counter() - begun) / 48
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        found[network.__name__] = round(milliseconds, 2), faults // 48
    return found


TASKS = {task.__name__: task for task in (timed_job, timed_steps, growth)}


def in_turns(folder, cases):
    """Milliseconds and page faults of a step, one process a turn and case: {network: {case:
    [[milliseconds, faults] of each turn]}}. A case is malloc's setting and `timed_steps`' flags."""
    found = {}
    for turn in range(TURNS):
        for name, (setting, how) in common.rotated(cases.items(), turn):
            env = common.environment(False) | {"GLIBC_TUNABLES": setting}
            for network, measured in ask("timed_steps", folder, env, **how).items():
                of = found.setdefault(network, {case: [] for case in cases})
                of[name].append(measured)
        print(f"turn {turn + 1} of {TURNS}: {', '.join(cases)}", flush=True)
    return found


def main():
    line = parser(__doc__)
    line.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    flags = line.parse_args()
    folder = flags.data_dir
    if flags.task:
        task, how = flags.task
        print(json.dumps(TASKS[task](folder, **how)))
        return
    common.check_data(line, folder)
    malloc = {name: (setting, {}) for name, setting in MALLOC.items()}
    rest = {
        part: {name: (fast.MALLOC, how) for name, how in those.items()}
        for part, those in (("conv", CONV), ("jax", JAX))
    }
    kept, cases = common.Kept("breakdown"), {"memory": malloc} | rest
    content = {name: kept.measure(name, in_turns, folder, of) for name, of in cases.items()}
    content["parts"] = kept.measure("parts", parts, folder)
    content |= kept.measure("growth", ask, "growth", folder, common.environment(True))
    kept.write("python tests/benchmarks/breakdown.py DATA_DIR", content)
    kept.forget()
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    common.run(main)
