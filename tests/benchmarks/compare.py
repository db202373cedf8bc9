"""Times ours against the same job in plain Flax NNX, PyTorch and Keras 3, and against the machine.
Writes docs/results/compare.json.

    python -m pip install -r tests/benchmarks/requirements.txt    # beside the project's own
    python tests/benchmarks/compare.py DATA_DIR                   # both parts
    python tests/benchmarks/compare.py DATA_DIR --only steps --rounds 30
    python tests/benchmarks/compare.py DATA_DIR --only jobs --repeats 1 --add

DATA_DIR holds the four MNIST files. *Steps*: one of training or of inference, batch 128 from
memory. Each peer waits in a process of its own and they take turns, so that a noisy machine is
noisy for all; a ratio is taken within each round. Where a process happens to have its buffers can
matter, so all are started five times, for a fifth of the rounds. All have our settings of malloc;
only ours has XLA's flag of `utils.tune_xla`.
*Jobs*: whole processes, cold, from the command to the last line, one after the other, as many times
as --repeats says, an hour each; --add adds them to those of an earlier run. Our scripts set malloc
themselves; of the others PyTorch with our recipe gets it.
"""

import argparse
import contextlib
import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "docs")]
HERE = Path(__file__).resolve().parent
SCRIPT = ROOT / "examples" / "15_knowledge_distillation.py"
RESULT = ROOT / "docs" / "results" / "compare.json"
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
    import jax
    import numpy as np
    import utils
    from flax import nnx
    from measure import load

    utils.use_all_cores()
    kd, data = load(SCRIPT), utils.load_data("mnist", folder)
    images = data.train.take(slice(32 * BATCH))
    recipe = kd.Recipe(0, 4, BATCH, 1e-3, "onecycle")
    frozen = kd.TeacherCNN(rngs=nnx.Rngs(1))
    table = np.zeros((32 * BATCH, 10), np.float32)

    def training(step, model, *more, how=(), **tables):
        optimizer = kd.make_optimizer(model, recipe, 60_000)
        step = utils.bind(step, model, *more, optimizer)

        def run(count):
            while count > 0:
                batches = utils.batches(images, BATCH, 0, count, **tables)
                for batch, _ in zip(batches, range(count), strict=False):
                    utils.settle(found := step(batch, *how))  # as `utils.Phase.log` does
                jax.block_until_ready(found)
                count -= 32

        return run

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
        cases = importlib.import_module(module).cases(folder, flags)
    else:
        cases = ours(folder) if peer == "ours" else machine()
    print(json.dumps(list(cases)), file=answers, flush=True)
    for line in sys.stdin:
        case, count = json.loads(line)
        begun = time.perf_counter()
        cases[case](count)
        print(json.dumps(time.perf_counter() - begun), file=answers, flush=True)


def say(process, what):
    process.stdin.write(json.dumps(what) + "\n")
    process.stdin.flush()
    return listen(process)


def listen(process):
    line = process.stdout.readline()
    if not line:
        sys.exit(f"failed: {' '.join(process.args)}")
    return json.loads(line)


def time_steps(folder, rounds):
    """Milliseconds a step, {case: {peer: [of each round]}}."""
    times = {}
    for start in range(STARTS):
        print(f"start {start + 1} of {STARTS}", flush=True)
        for case, peers in time_steps_of_one_start(folder, rounds // STARTS).items():
            for peer, milliseconds in peers.items():
                times.setdefault(case, {}).setdefault(peer, []).extend(milliseconds)
    return times


def time_steps_of_one_start(folder, rounds):
    with contextlib.ExitStack() as stack:
        waiting, counts, times = {}, {}, {}
        for peer in PEERS:
            command = [sys.executable, __file__, str(folder), "--worker", peer]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            waiting[peer] = stack.enter_context(
                subprocess.Popen(command, env=environment(True), **pipes)
            )
            for case in listen(waiting[peer]):
                say(waiting[peer], (case, 2))  # compiles
                each = say(waiting[peer], (case, 8)) / 8
                counts[case, peer] = max(2, min(32, round(SECONDS / each)))
                times.setdefault(case, {})[peer] = []
            print(f"{peer} is ready", flush=True)
        for turn in range(rounds):
            for (case, peer), count in sorted(counts.items()):
                say(waiting[peer], (case, 1))  # another has left its data in the caches
                seconds = say(waiting[peer], (case, count))
                times[case][peer].append(round(1e3 * seconds / count, 3))
            print(f"round {turn + 1} of {rounds}", flush=True)
    return times


def environment(tuned):
    """With our settings of malloc or as glibc comes, on the CPU, and without what would make a run
    of one warm or of another slow."""
    from utils import MALLOC

    unwanted = ("JAX_COMPILATION_CACHE_DIR", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "GLIBC_TUNABLES")
    unwanted += ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    kept = {name: x for name, x in os.environ.items() if name not in unwanted}
    kept["JAX_PLATFORMS"] = "cpu"
    return kept | ({"GLIBC_TUNABLES": MALLOC} if tuned else {})


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


def steps(folder, rounds):
    times = time_steps(folder, rounds)
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
        process = subprocess.Popen(command, stdout=output, cwd=folder, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        output.seek(0)
        text = output.read()
    if status:
        sys.exit(f"failed: {command}")
    print(f"{seconds:7.1f} s  {usage.ru_maxrss / 1e6:.2f} GB  {command[1]}", flush=True)
    return round(seconds, 1), round(usage.ru_maxrss / 1e6, 2), text


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
                    accuracy[net] = float(line.split()[2].strip(","))
                elif line in ("teacher", "distilled", "baseline"):
                    net = line
    print(name, accuracy, flush=True)
    return seconds, memory, accuracy, text


def jobs(folder, repeats, add=False):
    found = {name: {"seconds": [], "peak_memory_gb": 0, "accuracy": []} for name in JOBS}
    if add:
        kept, now = json.loads(RESULT.read_text())["jobs"], about("", PACKAGES)
        alike = all(kept[key] == now[key] for key in ("device", "versions"))
        if not alike or kept["runs"].keys() != found.keys():
            sys.exit(
                f"--add: {RESULT.name} has other jobs, versions or another device; leave it out"
            )
        found = kept["runs"]
    before = len(found["ours"]["seconds"])
    for turn in range(before, before + repeats):
        for name, of in found.items():
            seconds, memory, accuracy, text = run_job(name, folder)
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
        # Kept after each turn, so that a stopped run has lost only the last one.
        keep("jobs", {"repeats": turn + 1, "runs": found, "ratios": ratios, "output": output})


# %% Main


def about(command, packages=()):
    """What every result here says of itself."""
    from utils import versions

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind, info = platform.machine(), Path("/proc/cpuinfo")
    if info.exists() and (named := re.search(r"model name\s*: (.*)", info.read_text())):
        kind = re.sub(r"\((R|TM)\)|CPU |@.*", "", named[1]).strip()
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": f"{cores} CPU cores ({kind})",
        "versions": versions() | {name: importlib.metadata.version(name) for name in packages},
    }


def keep(part, content):
    """Writes a part of the result, beside what the other part's last run has left there."""
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    from utils import write_whole

    count = {"steps": "rounds", "jobs": "repeats"}[part]
    command = (
        f"python tests/benchmarks/compare.py DATA_DIR --only {part} --{count} {content[count]}"
    )
    text = (
        json.dumps(
            result | {part: about(command, PACKAGES) | content}, indent=1, ensure_ascii=False
        )
        + "\n"
    )
    write_whole(RESULT, text.encode())
    for title, (middle, low, high) in content["ratios"].items():
        print(f"{title:80} {middle:7.3f}  ({low:.3f} to {high:.3f})")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data_dir", type=Path, help="folder with the four MNIST files")
    parser.add_argument("--only", choices=("steps", "jobs"), help="one of the two parts")
    parser.add_argument("--rounds", type=int, default=15, help="of the steps, a multiple of 5")
    parser.add_argument("--repeats", type=int, default=3, help="of the jobs")
    parser.add_argument("--add", action="store_true", help="the jobs to those of an earlier run")
    parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    folder = flags.data_dir.resolve()
    if flags.worker:
        return worker(flags.worker, folder)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        if not (folder / f"{name}-ubyte.gz").exists():
            parser.error(f"{folder}: must hold {name}-ubyte.gz")
    if flags.rounds < STARTS or flags.rounds % STARTS:
        parser.error(f"--rounds {flags.rounds}: must be a multiple of {STARTS}")
    if flags.repeats < 1:
        parser.error(f"--repeats {flags.repeats}: must be 1 or more")
    for package in PACKAGES:
        if not importlib.util.find_spec(package):
            parser.error(f"needs {package}: pip install -r tests/benchmarks/requirements.txt")
    if flags.only != "jobs":
        keep("steps", steps(folder, flags.rounds))
    if flags.only != "steps":
        jobs(folder, flags.repeats, flags.add)
    return None


if __name__ == "__main__":
    main()
