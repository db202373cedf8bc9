"""Builds the page to play with: a folder of static files that needs no network.

    python docs/playground/build.py                   # writes docs/playground/dist
    python docs/playground/build.py --output FOLDER
    python -m http.server --bind 127.0.0.1 -d docs/playground/dist 8000

Needs Node with npm, which fetches what package-lock.json pins. The networks are those of
docs/playground/models, the numbers those of docs/results/deploy.json; script 23 makes both, and
collect.py takes the networks and some test images from it.
"""

import argparse
import codecs
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PLAYGROUND = Path(__file__).resolve().parent
ROOT = PLAYGROUND.parent.parent
MODELS = PLAYGROUND / "models"
SAMPLES = PLAYGROUND / "samples.json"
RESULTS = ROOT / "docs" / "results" / "deploy.json"

PAGE = [
    "index.html",
    "style.css",
    "icon.svg",
    *sorted(path.name for path in PLAYGROUND.glob("*.js")),
]
# Of onnxruntime-web's many variants: the one for WebAssembly alone.
RUNTIME = ["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"]

# The networks that answer: file in models/, name on the page, name of their row in the results.
NETWORKS = [
    ("teacher", "Teacher", "teacher"),
    ("student", "Student", "distilled"),
    ("shipped", "Shipped student", "distilled, 80 % sparse int8"),
]
# The groups of the results, and the colours that their networks have on the page.
COLOURS = {
    "teacher": "teacher",
    "baseline": "baseline",
    "distilled": "distilled",
    "distilled, teacher left out": "alone",
}
# The scripts that explain the networks which are not compressed. All others: the last one.
SCRIPTS = {
    "teacher": "13_teacher_training.py",
    "baseline": "14_student_baseline.py",
    "distilled": "15_knowledge_distillation.py",
}
COMPRESSION_SCRIPT = "23_compress_and_deploy.py"
MEASURE = "python docs/measure.py deploy"
COLLECT = "python docs/playground/collect.py runs/measure/deploy/0"


class BuildError(Exception):
    """What is missing, and what to do about it, in one line."""


# %% What the page shows


def read_json(path, how):
    """What a JSON file holds. `how` says how to make it."""
    if not path.is_file():
        raise BuildError(f"{path} is missing: make it with {how}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BuildError(f"{path} is no JSON file: make it again with {how}") from error


def require_keys(entry, keys, what, how):
    """Raises BuildError, about `what`, unless `entry` is a dict with these keys."""
    for key in keys:
        if not isinstance(entry, dict) or key not in entry:
            raise BuildError(f"{what} has no {key!r}: make it again with {how}")


def read_results():
    """The results of script 23: rows under "results", and beside them what was measured how."""
    results = read_json(RESULTS, MEASURE)
    if not isinstance(results, dict) or not results.get("results"):
        raise BuildError(f"{RESULTS} holds no results of script 23: make it again with {MEASURE}")
    require_keys(results, ["command", "dataset"], RESULTS, MEASURE)
    require_keys(results["dataset"], ["test"], f"{RESULTS}, dataset", MEASURE)
    for k, row in enumerate(results["results"]):
        what = f"{RESULTS}, row {k}"
        require_keys(row, ["name", "params", "test_accuracy"], what, MEASURE)
        if "onnx" in row.get("files", {}):
            file = row["files"]["onnx"]
            require_keys(
                file, ["bytes", "gzip_bytes", "sha256", "accuracy"], f"{what}, ONNX file", MEASURE
            )
    return results


def read_samples():
    """The test images: dicts with index, label, pixels in base64, and logits of each network."""
    samples = read_json(SAMPLES, COLLECT)
    if not isinstance(samples, list) or not samples:
        raise BuildError(f"{SAMPLES} holds no test images: make it again with {COLLECT}")
    for k, sample in enumerate(samples):
        keys = ["label", "pixels", "teacher_logits", "student_logits"]
        require_keys(sample, keys, f"{SAMPLES}, image {k}", COLLECT)
    return samples


def read_model(key):
    """The bytes of an exported network."""
    path = MODELS / f"{key}.onnx"
    if not path.is_file():
        raise BuildError(f"{path} is missing: make it with {COLLECT}")
    content = path.read_bytes()
    if not content:
        raise BuildError(f"{path} is empty: make it again with {COLLECT}")
    return content


def rows_by_name(results):
    """The rows of the results: {name: rows, one a seed}."""
    rows = {}
    for row in results["results"]:
        rows.setdefault(row["name"], []).append(row)
    return rows


def first_file(rows):
    """What the results say of the ONNX file of the first seed that has one, or None."""
    for row in rows:
        if "onnx" in row.get("files", {}):
            return row["files"]["onnx"]
    return None


def describe_network(key, name, row_name, rows, content):
    """What the first panel says of a network that answers."""
    if row_name not in rows:
        raise BuildError(f"{RESULTS} has no row {row_name!r}: make it again with {MEASURE}")
    file = first_file(rows[row_name])
    if file is None:
        raise BuildError(f"{RESULTS}, {row_name}: has no ONNX file; make it again with {MEASURE}")

    # The accuracy is the results', so they must be about this very file.
    if hashlib.sha256(content).hexdigest() != file["sha256"]:
        raise BuildError(
            f"{MODELS / key}.onnx is not the file of which {RESULTS} tells: take the networks of "
            f"the measured run with {COLLECT}"
        )
    return {
        "key": key,
        "name": name,
        "params": rows[row_name][0]["params"],
        "bytes": file["bytes"],
        "gzip_bytes": file["gzip_bytes"],
        "test_accuracy": file["accuracy"],
    }


def group_of(row):
    """Which networks a row belongs to: a key of COLOURS. Older results say it in the name alone,
    "GROUP, COMPRESSION"."""
    name = row["name"]
    group = row.get("group") or name.rpartition(", ")[0] or name
    if group not in COLOURS:
        raise BuildError(f"{RESULTS} has a row of an unknown group: {name!r}")
    return group


def is_compressed(row):
    """Whether a network was compressed, or trained on as those are."""
    if "compression" in row:
        return row["compression"] != "float32"
    return row["name"] != group_of(row)


def describe_point(name, rows):
    """What the third panel says of a network: its seeds' mean accuracy, the first one's size."""
    file = first_file(rows)
    group = group_of(rows[0])
    [*_, (_, _, shipped)] = NETWORKS
    script = COMPRESSION_SCRIPT if is_compressed(rows[0]) else SCRIPTS[group]
    return {
        "name": name,
        "key": "shipped" if name == shipped else COLOURS[group],
        "seeds": len(rows),
        "test_accuracy": sum(row["test_accuracy"] for row in rows) / len(rows),
        "bytes": file["bytes"] if file else None,
        "gzip_bytes": file["gzip_bytes"] if file else None,
        "script": f"scripts/{script}.txt",
    }


def mark_doubtful(samples):
    """The samples, and of each digit's the one that the teacher is less sure of as `doubtful`."""

    def lead(sample):
        # How far the largest logit is from the second: small where the teacher is unsure.
        second, first = sorted(sample["teacher_logits"])[-2:]
        return first - second

    marked = []
    for sample in sorted(samples, key=lambda sample: (sample["label"], -lead(sample))):
        others = [other for other in samples if other["label"] == sample["label"]]
        is_doubtful = len(others) > 1 and sample is min(others, key=lead)
        marked.append({**sample, "doubtful": is_doubtful})
    return marked


def describe_all(results, samples, models):
    """What data.json holds. `models` are the exported networks, {key: bytes}."""
    rows = rows_by_name(results)
    networks = [describe_network(*about, rows, models[about[0]]) for about in NETWORKS]
    return {
        "networks": networks,
        "frontier": [describe_point(name, rows[name]) for name in rows],
        "samples": mark_doubtful(samples),
        "test_images": results["dataset"]["test"],
        "command": results["command"],
    }


# %% Files


def is_installed(packages):
    """Whether a folder holds what package-lock.json pins. npm writes there what it installed."""
    installed = packages / ".package-lock.json"
    runtime = [packages / "onnxruntime-web" / "dist" / name for name in RUNTIME]
    if not all(path.is_file() for path in [installed, *runtime]):
        return False
    wanted = json.loads((PLAYGROUND / "package-lock.json").read_text())["packages"]
    del wanted[""]  # the page itself
    return json.loads(installed.read_text())["packages"] == wanted


def fetch_packages():
    """Installs in node_modules what package-lock.json pins. Returns that folder. Where all is
    installed already, as after an earlier build, no network is needed."""
    packages = PLAYGROUND / "node_modules"
    if is_installed(packages):
        return packages
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise BuildError("npm is missing: install Node, for example with apt-get install npm")
    done = subprocess.run([npm, "ci"], cwd=PLAYGROUND, capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        errors = [line for line in lines if line.startswith("npm error")]  # after the warnings
        message = (errors or lines)[0]
        raise BuildError(f"npm ci in {PLAYGROUND} failed, is there a network? {message}")
    return packages


def write_page(folder, data, models, packages):
    """Writes all files of the page into an empty folder."""
    for name in PAGE:
        shutil.copy(PLAYGROUND / name, folder)

    (folder / "onnxruntime").mkdir()
    for name in RUNTIME:
        shutil.copy(packages / "onnxruntime-web" / "dist" / name, folder / "onnxruntime")

    (folder / "models").mkdir()
    for key, content in models.items():
        (folder / "models" / f"{key}.onnx").write_bytes(content)

    # As text, so that every server has a browser show them. The mark at the start says that it is
    # UTF-8, which not every server does.
    (folder / "scripts").mkdir()
    for name in (*SCRIPTS.values(), COMPRESSION_SCRIPT):
        script = ROOT / "examples" / name
        if not script.is_file():
            raise BuildError(f"{script} is missing: the page links to it")
        text = codecs.BOM_UTF8 + script.read_bytes()
        (folder / "scripts" / f"{name}.txt").write_bytes(text)

    (folder / "data.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def files_of_page():
    """All files that a build writes, as paths in the folder of the page."""
    return [
        *PAGE,
        "data.json",
        *(f"onnxruntime/{name}" for name in RUNTIME),
        *(f"models/{key}.onnx" for key, _, _ in NETWORKS),
        *(f"scripts/{name}.txt" for name in (*SCRIPTS.values(), COMPRESSION_SCRIPT)),
    ]


def check_output(output):
    """Raises BuildError if a folder holds anything but an earlier build: it would be deleted."""
    if not output.exists():
        return
    if not output.is_dir():
        raise BuildError(f"--output {output} is a file: name a folder")
    if not any(output.iterdir()):
        return
    is_earlier_build = (output / "data.json").is_file() and (output / "onnxruntime").is_dir()
    if not is_earlier_build:
        raise BuildError(f"--output {output} holds other files: name a new or an empty folder")

    ours = set(files_of_page())
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if name not in ours and not path.is_dir():
            raise BuildError(
                f"--output {output} holds {name}, which is no part of the page: "
                "move it away, or name another folder"
            )


def swap(fresh, output, old):
    """Puts the folder `fresh` in the place of `output`, and what was there in the place of `old`.
    The page is back where it was if that fails or is interrupted."""
    try:
        if output.exists():
            output.rename(old)
        fresh.rename(output)
    except BaseException:  # Ctrl-C, too
        if old.exists() and not output.exists():
            old.rename(output)
        raise


def build(output):
    """Writes the page into the folder `output`, whole or not at all."""
    check_output(output)
    results = read_results()
    models = {key: read_model(key) for key, _, _ in NETWORKS}
    data = describe_all(results, read_samples(), models)
    packages = fetch_packages()

    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that it is moved there in one step.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".building-") as temporary:
        fresh = Path(temporary) / "fresh"
        fresh.mkdir()
        write_page(fresh, data, models, packages)
        swap(fresh, output, Path(temporary) / "old")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=PLAYGROUND / "dist", help="folder to write")
    output = parser.parse_args().output.resolve()
    try:
        build(output)
    except (BuildError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted: nothing was changed.", file=sys.stderr)
        sys.exit(130)
    print(f"{output} is built. Look at it on localhost:")
    print(f"python -m http.server --bind 127.0.0.1 -d {output} 8000")


if __name__ == "__main__":
    main()
