"""Times ours against the same job in plain Flax NNX, PyTorch and Keras 3, and against the machine.
Writes docs/results/compare.json.

    python -m pip install -r tests/benchmarks/requirements.txt    # beside the project's own
    python tests/benchmarks/compare.py DATA_DIR                   # both parts
    python tests/benchmarks/compare.py DATA_DIR --only steps --rounds 30
    python tests/benchmarks/compare.py DATA_DIR --only jobs --repeats 1 --add
    python tests/benchmarks/compare.py DATA_DIR --only jobs --without "Keras 3"

DATA_DIR holds the four MNIST files. *Steps*: one of training or of inference, batch 128 from
memory. Each peer waits in a process of its own and they take turns, so that a noisy machine is
noisy for all; a ratio is taken within each round. Where a process happens to have its buffers can
matter, so all are started five times, for a fifth of the rounds. All have our settings of malloc;
only ours has XLA's flag of `fast.tune_xla`.
*Jobs*: whole processes, cold, from the command to the last line, one after the other, as many times
as --repeats says, an hour each on a fast processor; --add adds them to those of an earlier run of
the same code, and --without leaves one out. Our scripts set malloc themselves; of the others
PyTorch with our recipe gets it.
Stopped, the same command goes on: a start of the steps or a job is measured again, no more.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import HERE, RESULTS, SCRIPT, Kept, check_data, environment, read_json, run, shuffled
from idx import parser

RESULT = RESULTS / "compare.json"
PEERS = {  # those whose steps are timed: the module beside this file, or None, and its flags
    "ours": (None, []),
    "plain Flax NNX": ("plain_loop", []),
    "PyTorch": ("pytorch_loop", []),
    "PyTorch, channels-last": ("pytorch_loop", ["--channels-last"]),
    "PyTorch, channels-last, torch.compile": ("pytorch_loop", ["--channels-last", "--compiled"]),
    "Keras 3": ("keras_loop", []),
    "machine": (None, []),
}
JOBS = {
    "ours": [SCRIPT, "--labels", "all", "--data-dir"],
    "ours, the default run": [SCRIPT, "--data-dir"],
    "plain Flax NNX": [HERE / "plain_loop.py"],
    "PyTorch": [HERE / "pytorch_loop.py"],
    "PyTorch, channels-last": [HERE / "pytorch_loop.py", "--channels-last"],
    "PyTorch, our recipe, channels-last": [HERE / "pytorch_loop.py", "--cached", "--channels-last"],
    "Keras 3": [HERE / "keras_loop.py"],
}
BATCH, SECONDS, STARTS = 128, 0.6, 5  # seconds of a turn, about
# Multiplications with additions of one image's way forward: outputs × inputs of each of them.
FORWARD = {
    "student": 26 * 26 * 16 * 9 + 11 * 11 * 32 * 9 * 16 + 800 * 64 + 64 * 10,
    "teacher": 28 * 28 * 64 * 9 + 14 * 14 * 128 * 9 * 64 + 7 * 7 * 128 * 9 * 128
    + 1152 * 512 + 512 * 256 + 256 * 10,
}  # fmt: skip
FIRST = {"student": 26 * 26 * 16 * 9, "teacher": 28 * 28 * 64 * 9}  # needs no gradient of images
PACKAGES = ("torch", "keras")  # beside those of the scripts
MATRIX = 2048
MEGABYTES = 256


# %% Steps


def ours(folder):
    """Script 15's steps, with batches as its training takes them."""
    import fast
    import jax
    import numpy as np
    import utils
    from experiment import Recipe
    from flax import nnx
    from measure import load

    fast.use_all_cores()
    kd, data = load(SCRIPT), utils.load_data("mnist", folder)
    images = data.train.take(slice(32 * BATCH))
    recipe = Recipe(0, 4, BATCH, 1e-3, "onecycle")
    frozen = kd.TeacherCNN(rngs=nnx.Rngs(1))
    table = np.zeros((32 * BATCH, 10), np.float32)

    def training(step, model, *more, how=(), **tables):
        optimizer = kd.make_optimizer(model, recipe, 60_000)
        step = fast.compile_step(step, model, *more, optimizer)

        def train(count):  # 32 at most
            batches = utils.batches(images, BATCH, 0, count, **tables)
            for batch in itertools.islice(batches, count):
                found = step(batch, *how)
            jax.block_until_ready(found)

        return train

    def inference(count):
        utils.predict(frozen, data.train.take(slice(BATCH * count)), BATCH)

    def student():  # each case its own: those of one case share its devices
        return kd.StudentCNN(rngs=nnx.Rngs(42))

    distil = functools.partial(training, kd.train_student_step, how=(3.0, 0.5))
    return {
        "student step": training(kd.train_step, student()),
        "teacher step": training(kd.train_step, kd.TeacherCNN(rngs=nnx.Rngs(0))),
        "teacher inference": inference,
        "distillation step": distil(student(), frozen),
        "distillation step, cached logits": distil(student(), None, teacher_logits=table),
    }


def machine():
    """What the machine can do: products of square matrices, and reading and writing memory."""
    import jax
    import jax.numpy as jnp

    matrix = jnp.ones((MATRIX, MATRIX), jnp.float32)
    product, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)
    long = jnp.ones(MEGABYTES * 2**18, jnp.float32)

    def repeat(function, x, count):
        for _ in range(count):
            jax.block_until_ready(function(x))

    cases = {"matrix product": (product, matrix), "copy": (copy, long)}
    return {name: functools.partial(repeat, *how) for name, how in cases.items()}


def worker(peer, folder):
    """Answers each line `[case, count]` on stdin with the seconds that so many steps took."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    module, flags = PEERS[peer]
    if module:
        cases = importlib.import_module(module).cases(folder, *flags)
    else:
        cases = ours(folder) if peer == "ours" else machine()
    print(json.dumps(list(cases)), file=answers, flush=True)
    for line in sys.stdin:
        case, count = json.loads(line)
        begun = time.perf_counter()
        cases[case](count)
        print(json.dumps(time.perf_counter() - begun), file=answers, flush=True)


def say(process, what):
    with contextlib.suppress(BrokenPipeError):  # it has ended: `listen` says so
        process.stdin.write(json.dumps(what) + "\n")
        process.stdin.flush()
    return listen(process)


def listen(process):
    line = process.stdout.readline()
    if not line:
        raise OSError(f"this has ended: {' '.join(process.args)}")
    return json.loads(line)


def time_steps(kept, folder, rounds):
    """Milliseconds a step, {case: {peer: [of each round]}}."""
    times, each = {}, rounds // STARTS
    for start in range(STARTS):
        print(f"start {start + 1} of {STARTS}", flush=True)
        turns = range(start * each, (start + 1) * each)
        key = f"steps, rounds {turns[0] + 1} to {turns[-1] + 1}"
        for case, peers in kept.measure(key, time_steps_of_one_start, folder, turns).items():
            for peer, milliseconds in peers.items():
                times.setdefault(case, {}).setdefault(peer, []).extend(milliseconds)
    return times


def time_steps_of_one_start(folder, turns):
    with contextlib.ExitStack() as stack:
        waiting, counts, times = {}, {}, {}
        for peer in PEERS:
            waiting[peer] = started(stack, peer, folder)
            for case in listen(waiting[peer]):
                say(waiting[peer], (case, 2))  # compiles
                each = say(waiting[peer], (case, 8)) / 8
                counts[case, peer] = max(2, min(32, round(SECONDS / each)))
                times.setdefault(case, {})[peer] = []
            print(f"{peer} is ready", flush=True)
        for turn in turns:
            for (case, peer), count in shuffled(sorted(counts.items()), turn):
                say(waiting[peer], (case, 1))  # another has left its data in the caches
                seconds = say(waiting[peer], (case, count))
                times[case][peer].append(round(1e3 * seconds / count, 3))
            print(f"round {turn + 1}", flush=True)
    return times


def started(stack, peer, folder):
    """A worker, killed at the end of the stack. Its own session: Ctrl+C is for the parent."""
    command = [sys.executable, __file__, str(folder), "--worker", peer]
    process = subprocess.Popen(
        command,
        env=environment(True),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    stack.enter_context(process)
    stack.callback(process.kill)
    return process


def ratio(a, b):
    """Median, least and greatest of paired quotients."""
    found = [x / y for x, y in zip(a, b, strict=True)]
    return [round(x, 3) for x in (statistics.median(found), min(found), max(found))]


def against_the_machine(times):
    """Of ours: the share of the matrix product's rate, {case: [achieved GFLOP/s, share]}."""
    peak = [2 * MATRIX**3 / 1e6 / ms for ms in times["matrix product"]["machine"]]
    found = {"peak_gflops": round(statistics.median(peak))}
    speed = [2 * MEGABYTES * 2**20 / 1e6 / ms for ms in times["copy"]["machine"]]
    found["bandwidth_gb_per_second"] = round(statistics.median(speed), 1)
    for net in ("student", "teacher"):
        work = {f"{net} step": 3 * FORWARD[net] - FIRST[net]}
        work |= {"teacher inference": FORWARD[net]} if net == "teacher" else {}
        for case, products in work.items():
            rates = [2 * BATCH * products / 1e6 / ms for ms in times[case]["ours"]]
            share = statistics.median(a / b for a, b in zip(rates, peak, strict=True))
            found[case] = {"gflops": round(statistics.median(rates)), "share": round(share, 3)}
    return found


def steps(kept, folder, rounds):
    times = time_steps(kept, folder, rounds)
    ratios = {
        f"{case} ÷ {peer}": ratio(times[case]["ours"], those)
        for case, of in times.items()
        for peer, those in of.items()
        if peer not in ("ours", "machine") and "ours" in of
    }
    cached = times["distillation step, cached logits"]["ours"]
    ratios["distillation step, cached logits ÷ student step"] = ratio(
        cached, times["student step"]["ours"]
    )
    for peer, those in times["distillation step"].items():
        if peer != "ours":
            ratios[f"distillation step, cached logits ÷ distillation step, {peer}"] = ratio(
                cached, those
            )
    return {
        "rounds": rounds,
        "milliseconds": times,
        "ratios": ratios,
        "machine": against_the_machine(times),
    }


# %% Jobs


def measure(command, folder, env):
    """Wall seconds, peak memory in GB and output of a command run in a folder."""
    begun = time.perf_counter()
    with open(Path(folder) / "output.txt", "w+") as output:
        command = [sys.executable, *map(str, command)]
        process = subprocess.Popen(
            command, stdout=output, cwd=folder, env=env, start_new_session=True
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - begun
        output.seek(0)
        text = output.read()
    if status:
        raise OSError(f"this has failed: {' '.join(command)}")
    memory = usage.ru_maxrss * 1024 / 1e9
    print(f"{seconds:7.1f} s  {memory:.2f} GB  {command[1]}", flush=True)
    return round(seconds, 1), round(memory, 2), text


def run_job(name, folder):
    """Of a whole process: wall seconds, peak memory in GB, each network's last test accuracy, and
    what it printed."""
    script, *flags = map(str, JOBS[name])
    # Each in a new folder, and its data last: no earlier run's checkpoint or teacher is taken over.
    flags = [*flags, str(folder)] if "--data-dir" in flags else [str(folder), *flags]
    with tempfile.TemporaryDirectory() as cwd:
        seconds, memory, text = measure([script, *flags], cwd, environment("our recipe" in name))
        found = Path(cwd) / "runs" / SCRIPT.stem / "results.json"
        if found.exists():
            rows = json.loads(found.read_text())["results"]
            accuracy = {row["name"]: row["test_accuracy"] for row in rows}
        else:
            accuracy, net = {}, None
            for line in text.splitlines():
                if line.startswith("epoch"):
                    accuracy[net] = float(line.split()[2])
                elif line in ("teacher", "distilled", "baseline"):
                    net = line
    print(name, accuracy, flush=True)
    return seconds, memory, accuracy, text


def earlier_jobs(kept, names):
    """The runs of an earlier command, to add to; none if they cannot be compared."""
    found = read_json(RESULT).get("jobs", {})
    alike = all(found.get(key) == of for key, of in kept.of.items())
    return found["runs"] if alike and list(found["runs"]) == names else None


def jobs(kept, folder, repeats, names, found=None):
    """Wall time and accuracy of the named whole jobs, beside those already `found`."""
    found = found or {name: {"seconds": [], "peak_memory_gb": 0, "accuracy": []} for name in names}
    before = len(found["ours"]["seconds"])
    for turn in range(before, before + repeats):
        for name in shuffled(found, turn):
            of, key = found[name], f"jobs, {turn + 1}: {name}"
            seconds, memory, accuracy, text = kept.measure(key, run_job, name, folder)
            of["seconds"].append(seconds)
            of["peak_memory_gb"] = max(of["peak_memory_gb"], memory)
            of["accuracy"].append(accuracy)
            if name == "ours, the default run":
                output = text
    own = found["ours"]["seconds"]
    ratios = {
        f"ours ÷ {name}": ratio(own, of["seconds"])
        for name, of in found.items()
        if not name.startswith("ours")
    }
    return {"repeats": before + repeats, "runs": found, "ratios": ratios, "output": output}


# %% Main


def write(kept, part, content):
    count = {"steps": "rounds", "jobs": "repeats"}[part]
    flags = f"--only {part} --{count} {content[count]}"
    if part == "jobs":
        flags += "".join(f' --without "{name}"' for name in JOBS if name not in content["runs"])
    kept.write(f"python tests/benchmarks/compare.py DATA_DIR {flags}", content, part)
    for title, (middle, low, high) in content["ratios"].items():
        print(f"{title:80} {middle:7.3f}  ({low:.3f} to {high:.3f})")


def main():
    line = parser(__doc__)
    line.add_argument("--only", choices=("steps", "jobs"), help="one of the two parts; else both")
    line.add_argument("--rounds", type=int, default=15, help="of steps, a multiple of 5; else 15")
    line.add_argument("--repeats", type=int, default=3, help="of each job; else 3")
    others = [name for name in JOBS if not name.startswith("ours")]
    line.add_argument(
        "--without", action="append", default=[], choices=others, metavar="JOB",
        help=f"a job to leave out, quoted; may be given several times: {'; '.join(others)}",
    )  # fmt: skip
    line.add_argument(
        "--add", action="store_true", help="add new jobs to the kept ones, with the same --without"
    )
    line.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    flags = line.parse_args()
    folder, found = flags.data_dir, None
    if flags.worker:
        return worker(flags.worker, folder)
    if flags.rounds < STARTS or flags.rounds % STARTS:
        line.error(f"--rounds {flags.rounds}: must be a multiple of {STARTS}")
    if flags.repeats < 1:
        line.error(f"--repeats {flags.repeats}: must be 1 or more")
    if flags.only == "steps" and (flags.add or flags.without):
        flag = "--add" if flags.add else "--without"
        line.error(f"{flag}: is for the jobs; leave out --only steps")
    for package in PACKAGES:
        if not importlib.util.find_spec(package):
            line.error(f"needs {package}: pip install -r tests/benchmarks/requirements.txt")
    check_data(line, folder)
    kept = Kept("compare", PACKAGES)
    names = [name for name in JOBS if name not in flags.without]
    if flags.add and not (found := earlier_jobs(kept, names)):
        line.error(f"--add: {RESULT.name} has no run of these jobs, code, machine and versions")
    if flags.only != "jobs":
        write(kept, "steps", steps(kept, folder, flags.rounds))
    if flags.only != "steps":
        write(kept, "jobs", jobs(kept, folder, flags.repeats, names, found))
    # Not before both are written: a command for both, stopped in the jobs, has its steps.
    kept.forget(flags.only or "")
    return None


if __name__ == "__main__":
    run(main)
