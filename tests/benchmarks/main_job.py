"""Times the main job, by default and with `--labels all`, against the plain loop: whole processes,
cold, one after the other on the same machine. Writes docs/results/speed.json.

    python tests/benchmarks/main_job.py DATA_DIR      # the four MNIST files; about 20 minutes
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "15_knowledge_distillation.py"


def measure(command):
    """Wall seconds and peak memory in GB of a command."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    if status:
        sys.exit(f"failed: {command}")
    print(f"{seconds:7.1f} s  {usage.ru_maxrss / 1e6:.2f} GB  {command[0]}", flush=True)
    return round(seconds, 1), round(usage.ru_maxrss / 1e6, 2)


def main(data_dir):
    with tempfile.TemporaryDirectory() as folder:
        ours = [SCRIPT, "--data-dir", data_dir, "--output-dir"]
        runs = {
            "default": [*ours, Path(folder) / "default"],
            "plain": [ROOT / "tests" / "benchmarks" / "plain_loop.py", data_dir],
            "all_labels": [*ours, Path(folder) / "all_labels", "--labels", "all"],
        }
        measured = {name: measure(command) for name, command in runs.items()}
        reports = {
            name: json.loads((Path(folder) / name / "results.json").read_text())
            for name in ("default", "all_labels")
        }
    rows = {row["name"]: row for row in reports["all_labels"]["results"]}
    epochs = {name: row["epoch_seconds"] for name, row in rows.items()}
    # The first epoch holds the compilation.
    middle = {name: statistics.median(seconds[1:]) for name, seconds in epochs.items()}
    whole = sum(epochs["distilled"]) + rows["distilled"]["cache_seconds"]
    result = {
        "command": "python tests/benchmarks/main_job.py DATA_DIR",
        "date": datetime.date.today().isoformat(),
        "device": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "versions": reports["default"]["versions"],
        "seconds": {name: seconds for name, (seconds, _) in measured.items()},
        "peak_memory_gb": {name: memory for name, (_, memory) in measured.items()},
        "first_step_seconds": round(reports["default"]["seconds"]["first_step"], 1),
        "distilled_epoch_over_baseline_epoch": round(middle["distilled"] / middle["baseline"], 3),
        "distilled_run_with_cache_over_baseline_run": round(whole / sum(epochs["baseline"]), 3),
        "accuracy": {
            name: {row["name"]: row["test_accuracy"] for row in report["results"]}
            for name, report in reports.items()
        },
    }
    text = json.dumps(result, indent=1) + "\n"
    (ROOT / "docs" / "results" / "speed.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1])
