"""Times the main job, by default and with `--labels all`, against the plain loop: whole processes,
cold, one after the other on the same machine. Writes docs/results/speed.json.

    python tests/benchmarks/main_job.py DATA_DIR [--whole]    # 11 minutes; --whole: 20

DATA_DIR holds the four MNIST files. Without --whole the plain loop runs two epochs of each network,
and the rest of its epochs is reckoned by the second.
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


def measure(command, folder, env=None):
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


def main(data_dir, *whole):
    data_dir = Path(data_dir).resolve()
    plain = [ROOT / "tests" / "benchmarks" / "plain_loop.py", data_dir, *whole]
    ours = [SCRIPT, "--data-dir", data_dir]
    runs = {"default": ours, "plain": plain, "all_labels": [*ours, "--labels", "all"]}
    measured, reports = {}, {}
    for name, command in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            measured[name] = measure(command, folder)
            if name != "plain":
                found = Path(folder) / "runs" / SCRIPT.stem / "results.json"
                reports[name] = json.loads(found.read_text())
    seconds = {name: wall for name, (wall, _, _) in measured.items()}
    seconds["plain"] = float(measured["plain"][2].split()[-1])
    rows = {row["name"]: row for row in reports["all_labels"]["results"]}
    epochs = {name: row["epoch_seconds"] for name, row in rows.items()}
    # The first epoch holds the compilation.
    middle = {name: statistics.median(seconds[1:]) for name, seconds in epochs.items()}
    with_cache = sum(epochs["distilled"]) + rows["distilled"]["cache_seconds"]
    result = {
        "command": "python tests/benchmarks/main_job.py DATA_DIR",
        "date": datetime.date.today().isoformat(),
        "device": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "versions": reports["default"]["versions"],
        "seconds": seconds,
        "plain_loop": "whole" if whole else "2 epochs of each network, the rest reckoned",
        "peak_memory_gb": {name: memory for name, (_, memory, _) in measured.items()},
        "first_step_seconds": round(reports["default"]["seconds"]["first_step"], 1),
        "distilled_epoch_over_baseline_epoch": round(middle["distilled"] / middle["baseline"], 3),
        "distilled_run_with_cache_over_baseline_run": round(
            with_cache / sum(epochs["baseline"]), 3
        ),
        "accuracy": {
            name: {row["name"]: row["test_accuracy"] for row in report["results"]}
            for name, report in reports.items()
        },
        "output": measured["default"][2],
    }
    text = json.dumps(result, indent=1) + "\n"
    (ROOT / "docs" / "results" / "speed.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
