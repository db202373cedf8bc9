"""What the benchmarks share: where they run, what they keep, how they end."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "docs" / "results"
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "docs")]

# A module that imports JAX is imported where it is used: the peers' processes do without.

SCRIPT = ROOT / "examples" / "15_knowledge_distillation.py"
TUNING = ROOT / "examples" / "advanced" / "knowledge_distillation.py"
MNIST = "bab833be44432887"  # the beginning of SHA-256 over its images and labels


def run(main):
    """Runs a benchmark's main: stopped, it takes along what it runs, and says so in one line."""

    def stop(signal_number, _):
        print("Stopped. The same command goes on with what it has measured.", file=sys.stderr)
        sys.exit(128 + signal_number)

    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, stop)
    try:
        main()
    except Exception as error:
        from utils import UserError

        known = UserError, OSError, json.JSONDecodeError, subprocess.CalledProcessError
        if not isinstance(error, known):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}")


def ask(script, *arguments, env, cwd=None):
    """The JSON in the last line that a script prints, in a process of its own. Stopped, this one
    ends it; there an exception raised by a signal would get lost inside of JAX."""
    command = [sys.executable, script, *arguments]
    own = {"start_new_session": True}  # Ctrl+C is for the parent, which ends it
    done = subprocess.run(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, text=True, check=True, **own
    )
    return json.loads(done.stdout.splitlines()[-1])


def read_json(path):
    """What a file of results holds, a dict; {} if there is none. Raises UserError if it is
    damaged."""
    from utils import require

    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        found = None
    require(isinstance(found, dict), f"{path}: is damaged; move it away to measure anew")
    return found


def environment(tuned):
    """With our settings of malloc or as glibc comes, on the CPU, and without what would make a run
    of one warm or of another slow."""
    from fast import MALLOC

    unwanted = ("GLIBC_TUNABLES", "LD_PRELOAD", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "XLA_FLAGS")
    kept = {k: x for k, x in os.environ.items() if k not in unwanted and not k.startswith("JAX_")}
    kept["JAX_PLATFORMS"] = "cpu"
    return kept | ({"GLIBC_TUNABLES": MALLOC} if tuned else {})


def check_data(parser, folder):
    """Ends with the parser's error if the four files do not hold MNIST."""
    import utils

    try:
        data = utils.load_data("mnist", folder)
        sha = hashlib.sha256()
        for part in (data.train.image, data.train.label, data.test.image, data.test.label):
            sha.update(part.tobytes())
        whole = sha.hexdigest().startswith(MNIST)
        utils.require(whole, f"{folder}: must hold MNIST itself, whole")
    except utils.UserError as error:
        parser.error(str(error))


def shuffled(things, turn):
    """In another order each turn, the same in each run: who comes first gains or loses nothing."""
    return random.Random(turn).sample(list(things), len(things))


def rotated(things, turn):
    """For few things and turns: each comes first as often as the others."""
    things = list(things)
    first = turn % len(things)
    return things[first:] + things[:first]


def about(command, packages=()):
    """What every result here says of itself."""
    from experiment import versions

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind, info = platform.machine(), Path("/proc/cpuinfo")
    if info.exists() and (named := re.search(r"model name\s*: (.*)", text := info.read_text())):
        kind = re.sub(r"\((R|TM)\)|CPU |@.*", "", named[1]).strip()
        # A virtual machine may hide the model, but not how much it computes at once.
        vectors = {"avx512f": ", AVX-512", "avx2": ", AVX2"}
        kind += next((vectors[flag] for flag in vectors if flag in text.split()), "")
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": f"{cores} CPU cores ({kind})",
        "versions": versions() | {name: importlib.metadata.version(name) for name in packages},
    }


def code():
    """A fingerprint of what is measured, and of what measures it."""
    modules = [ROOT / "examples" / f"{name}.py" for name in ("utils", "experiment", "fast")]
    shared = (*modules, SCRIPT, TUNING)
    sha = hashlib.sha256()
    for path in (*shared, *sorted(HERE.glob("*.py"))):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:16]


class Kept:
    """What a benchmark has measured, in runs/benchmarks/<name>.json. Stopped, it goes on from there
    with the same code, versions and machine; `write` makes a result of it, and `forget` ends it."""

    def __init__(self, name, packages=()):
        self.name, self.packages = name, packages
        self.path, self.code = ROOT / "runs" / "benchmarks" / f"{name}.json", code()
        now = about("", packages) | {"code": self.code}
        self.of = {key: now[key] for key in ("device", "versions", "code")}
        found = read_json(self.path)
        same = found.get("of") == self.of
        self.found = found.get("found", {}) if same else {}
        if found and not same:
            print(f"{self.path}: of other code, versions or another machine; measured anew")
        RESULTS.mkdir(parents=True, exist_ok=True)  # told now if that cannot be
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def measure(self, key, task, *args):
        """What was measured as `key` before or, now, by the task: things that JSON can hold."""
        if key in self.found:
            print(f"{key}: measured before", flush=True)
        else:
            self.found[key] = task(*args)
            self._keep()
        return self.found[key]

    def _keep(self):
        from experiment import write_whole

        write_whole(self.path, json.dumps({"of": self.of, "found": self.found}).encode())

    def forget(self, part=""):
        """Ends what has been written: what was measured under keys that begin with `part`."""
        self.found = {key: of for key, of in self.found.items() if not key.startswith(part)}
        if self.found:
            self._keep()
        else:
            self.path.unlink(missing_ok=True)

    def write(self, command, content, part=None):
        """Writes docs/results/<name>.json, or a part of it beside the others."""
        from experiment import write_whole

        path = RESULTS / f"{self.name}.json"
        result = about(command, self.packages) | {"code": self.code} | content
        if part:
            result = read_json(path) | {part: result}
        text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
        write_whole(path, text.encode())
