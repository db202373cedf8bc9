"""Takes what the page needs from a finished run of script 23: networks, and test images.

    python docs/measure.py deploy
    python docs/playground/collect.py runs/measure/deploy/0

Writes models/*.onnx and samples.json, which are committed. The samples are two test images of each
digit, one that the teacher is surest of and one that it is least sure of, with the logits that JAX
computes for them.
"""

import argparse
import base64
import json
import sys
from pathlib import Path

import numpy as np

PLAYGROUND = Path(__file__).resolve().parent
ROOT = PLAYGROUND.parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "docs")]

import experiment  # noqa: E402
import jax  # noqa: E402
import utils  # noqa: E402
from flax import nnx  # noqa: E402
from measure import DEPLOY, load  # noqa: E402

# File in models/, and the name of the network in the run.
NETWORKS = {
    "teacher": "teacher",
    "student": "distilled",
    "shipped": "distilled, 80 % sparse int8",
}


def load_networks(folder, script, seeds):
    """The networks of a run as they are in JAX, by their names in NETWORKS."""
    networks = {}
    for key, name in NETWORKS.items():
        kind = script.TeacherCNN if key == "teacher" else script.StudentCNN
        network = experiment.load_network(folder, name, kind(rngs=nnx.Rngs(0)), seeds[key])
        if name.endswith("int8"):
            network = script.quantize_after_training(network)
        networks[key] = network
    return networks


def choose_samples(test, logits):
    """Two test images of each digit, with their logits. `logits` are those of all test images,
    {key: [N, 10]}."""
    confidence = np.asarray(jax.nn.softmax(logits["teacher"])).max(axis=1)
    samples = []
    for digit in range(10):
        of_digit = np.flatnonzero(test.label == digit)
        surest = of_digit[confidence[of_digit].argmax()]
        least_sure = of_digit[confidence[of_digit].argmin()]
        for index in (surest, least_sure):
            sample = {
                "index": int(test.index[index]),
                "label": digit,
                "pixels": base64.b64encode(test.image[index].tobytes()).decode(),
            }
            for key in NETWORKS:
                sample[f"{key}_logits"] = [round(float(x), 5) for x in logits[key][index]]
            samples.append(sample)
    return samples


def collect(folder):
    """Copies the networks of a run, and writes the samples."""
    results = folder / "results.json"
    utils.require(results.is_file(), f"{folder}: holds no finished run of script 23")
    report = json.loads(results.read_text())
    config = report["config"]
    seeds = {"teacher": config["teacher_seed"], "student": config["seed"]}
    seeds["shipped"] = config["seed"]

    script = load(DEPLOY)
    for key, name in NETWORKS.items():
        path = script.path_of_export(folder, name, seeds[key], "onnx")
        utils.require(path.is_file(), f"{path} is missing: {script.HOW_TO_HAVE_ONNX}")
        (PLAYGROUND / "models").mkdir(exist_ok=True)
        experiment.write_whole(PLAYGROUND / "models" / f"{key}.onnx", path.read_bytes())

    data = utils.load_data("mnist", fall_back=False)
    networks = load_networks(folder, script, seeds)
    logits = {key: utils.predict(network, data.test) for key, network in networks.items()}
    text = json.dumps(choose_samples(data.test, logits), indent=1) + "\n"
    experiment.write_whole(PLAYGROUND / "samples.json", text.encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder of the run")
    try:
        collect(parser.parse_args().folder)
    except utils.UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
