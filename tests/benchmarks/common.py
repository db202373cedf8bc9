"""What the benchmarks share: where they run, what a result says of itself, how they end."""

import datetime
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

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "docs")]

# A module that imports JAX is imported where it is used: the peers' processes do without.


def run(main):
    """Runs a benchmark's main: stopped, it takes along what it runs, and says so in one line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped.")
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


def environment(tuned, platforms="cpu"):
    """With our settings of malloc or as glibc comes, on the CPU, and without what would make a run
    of one warm or of another slow."""
    from utils import MALLOC

    unwanted = ("JAX_COMPILATION_CACHE_DIR", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "GLIBC_TUNABLES")
    unwanted += ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    kept = {name: x for name, x in os.environ.items() if name not in unwanted}
    kept["JAX_PLATFORMS"] = platforms
    return kept | ({"GLIBC_TUNABLES": MALLOC} if tuned else {})


def in_environment(wanted):
    """Starts this process again, unless it has the wanted environment."""
    if os.environ != wanted:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


def check_data(parser, folder):
    """Ends with the parser's error if the four files do not hold MNIST."""
    import utils

    try:
        utils.load_data("mnist", folder)
    except utils.UserError as error:
        parser.error(str(error))


def shuffled(things, turn):
    """In another order each turn, the same in each run: who comes first gains or loses nothing."""
    return random.Random(turn).sample(list(things), len(things))


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


def write(name, content):
    """Writes docs/results/<name>.json, whole or not at all."""
    from utils import write_whole

    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(RESULTS / f"{name}.json", text.encode())
