"""README and docs say what is so: tables from the JSON, code from the scripts, sound commands."""

import hashlib
import json
import re
import shlex
import subprocess
import sys
import types
import urllib.parse
from pathlib import Path

import experiment
import figures
import measure
import numpy as np
import pytest
import tables
from conftest import PAGES, ROOT, SCRIPTS
from PIL import Image
from utils import Data, Split, UserError

SPLIT = Split(np.zeros((3, 28, 28, 1), np.uint8), np.array([1, 1, 2]), np.arange(3))
COG = ["-P", "-I", "docs", "-p", "from tables import *"]


def cog(*arguments):
    """The exit status of cog, run in the repository's root."""
    command = [sys.executable, "-m", "cogapp", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode


def test_tables_and_code_are_those_of_the_results_and_scripts():
    message = f"run cog -r {shlex.join(COG)} README.md docs/*.md"
    assert cog("--check", *COG, *map(str, PAGES)) == 0, message


def test_a_wrong_number_in_a_table_is_found(tmp_path):
    text = (ROOT / "README.md").read_text()
    block = re.search(r"\| MNIST, 1,000 labels.*", text)[0]
    wrong = tmp_path / "README.md"
    wrong.write_text(text.replace(block, block.replace("9", "8", 1)))
    assert cog("--check", *COG, str(wrong)) == 5  # cog's status for a file that would change
    assert cog("-r", *COG, str(wrong)) == 0
    assert wrong.read_text() == text


def test_no_table_stands_twice():
    blocks = []
    for page in PAGES:
        blocks += re.findall(r"\[\[\[cog\s+(.*?)\s*\]\]\]", page.read_text(), re.DOTALL)
    found = [" ".join(block.split()) for block in blocks if "code(" not in block]
    assert len(found) > 20
    assert len(found) == len(set(found))


def test_figures_are_those_of_the_results():
    gains = Image.open(tables.RESULTS / "gains.png")
    assert gains.info["Source"] == figures.fingerprint_of_results()
    of_results = {"gains.png"}
    for name, pictures in measure.FIGURES.items():
        of_results |= pictures.keys()
        assert tables.read(name)["figures"] == {
            picture: hashlib.sha256((tables.RESULTS / picture).read_bytes()).hexdigest()
            for picture in pictures
        }
    assert of_results == {path.name for path in tables.RESULTS.glob("*.png")}


def test_every_figure_stands_on_a_page_with_a_text_that_describes_it():
    text = "".join(page.read_text() for page in PAGES)
    shown = re.findall(r"!\[([^\]]*)\]\((?:docs/)?results/(\w+)\.png\)", text)
    assert {name for _, name in shown} == {path.stem for path in tables.RESULTS.glob("*.png")}
    assert min(len(alternative) for alternative, _ in shown) > 40


def test_readme_and_guide_stay_short():
    """Two screens, and a guide that is read in one sitting."""
    for page, most in (("README.md", 90), ("docs/knowledge_distillation.md", 1100)):
        assert (ROOT / page).read_text().count("\n") <= most


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_sentence_is_longer_than_40_words(page):
    for sentence in sentences(page.read_text()):
        assert len(sentence.split()) <= 40, sentence


def sentences(text):
    """The sentences of a page's prose: without code, tables, formulas and headings."""
    for pattern in (r"```.*?```", r"<!--.*?-->", r"!\[.*?\]\(.*?\)"):
        text = re.sub(pattern, "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    found = []
    for paragraph in re.split(r"\n\s*\n|\n *[-*] |\n *\d+\. ", text):
        lines = [
            line
            for line in paragraph.splitlines()
            if not re.match(r" *\||#|    |\*\*Contents", line)
        ]
        if lines and not paragraph.lstrip().startswith("**Contents"):
            found += re.split(r"(?<=[.!?:;])[\])*]*\s+", " ".join(lines))
    return found


def anchors(page):
    """The names that a link to a place in a page may have: those of headings, and its own."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    names = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return names | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = urllib.parse.unquote(target).partition("#")
        if not path.startswith("http"):
            path = page.parent / path if path else page
            assert path.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(path), f"{page.name} links to {target}"


def readme_commands():
    text = (ROOT / "README.md").read_text()
    return [line for line in text.splitlines() if line.startswith("python3 -m venv")]


def test_readme_s_two_commands():
    """Both make the same environment. The first's job runs below, and .ci/run runs the second."""
    job, tests = readme_commands()
    assert job.split(" && ")[:2] == tests.split(" && ")[:2]
    assert tests.split(" && ")[2] == ".venv/bin/python -m pytest"
    python, script = shlex.split(job.split(" && ")[2])
    assert python == ".venv/bin/python"
    assert script.removeprefix("examples/") in SCRIPTS


def test_readme_s_main_job_runs(tmp_path):
    _, script = shlex.split(readme_commands()[0].split(" && ")[2])
    flags = ["--quick", "--dataset", "digits", "--epochs", "1", "--teacher-epochs", "1"]
    flags += ["--output-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, script, *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "results.json").read_text())["dataset"]["name"] == "digits"


def test_readme_names_every_script():
    text = (ROOT / "README.md").read_text()
    for script in SCRIPTS:
        assert f"(examples/{script})" in text
        page = script.removesuffix(".py").replace("/", "_")
        assert (ROOT / "docs" / f"{page}.md").exists()


def test_what_can_be_measured_are_commands_that_the_scripts_understand():
    """And each teacher that is named was measured before."""
    measured = []
    modules = {}
    for name, commands in measure.EXPERIMENTS.items():
        for number, command in enumerate(commands):
            script, *flags = shlex.split(command)
            module = modules.setdefault(script, measure.load(script))
            config = experiment.parse(module.Config, flags)
            experiment.check_flags(config)
            teacher = getattr(config, "teacher", None)
            assert teacher is None or Path(teacher) in measured
            measured.append(measure.RUNS / name / str(number))
    assert len(measured) > 60


def test_a_search_goes_on_beyond_its_edge_or_towards_the_better_neighbour():
    for errors_of, wanted in (
        ({1.0: 5, 10.0: 7, 100.0: 9}, 0.1),
        ({1.0: 9, 10.0: 7, 100.0: 5}, 1000.0),
        ({100.0: 6, 1.0: 9, 10.0: 5}, 1000**0.5),
        ({1.0: 6, 10.0: 5, 100.0: 9}, 10**0.5),
    ):
        assert measure.choose_next(errors_of) == pytest.approx(wanted)


def test_the_headline_is_of_five_teachers_with_three_pairs_each_and_no_seed_twice():
    """That of Fashion-MNIST is of one teacher with five pairs."""
    for name in tables.HEADLINE:
        distilled, baseline = tables.headline_pair(name)
        seeds = [row["seed"] for row in tables.rows(name, distilled)]
        teachers, pairs = (1, 5) if name == "fashion" else (5, 15)
        assert len(seeds) == len(set(seeds)) == pairs
        assert seeds == [row["seed"] for row in tables.rows(name, baseline)]
        configs = [run["config"] for run in tables.read(name)["runs"]]
        assert len({config["teacher_seed"] for config in configs}) == teachers
    labels = [row["seed"] for row in tables.rows("all_labels", "distilled")]
    assert labels == [row["seed"] for row in tables.rows("default", "distilled")]


def test_measured_runs_become_a_result(tmp_path, monkeypatch):
    """The rows of all commands, without what no page shows."""
    (tmp_path / "docs/results").mkdir(parents=True)
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "docs/results")
    monkeypatch.setattr(measure, "EXPERIMENTS", {"some": ["a.py --seed 1", "a.py --seed 2"]})
    monkeypatch.setattr(measure, "FIGURES", {"some": {"shown.png": "figure.png"}})
    settings = {"epochs": 3, "batch_size": 8, "learning_rate": 0.1, "schedule": "onecycle"}

    def run(command, folder):
        seed = int(command[-1])
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "figure.png").write_bytes(f"png {seed}".encode())
        row = {"name": "net", "seed": seed, "test_accuracy": 0.5 + seed / 10}
        row |= {"history": [1], "epoch_seconds": [1], "settings": settings}
        return {
            "script": "a.py",
            "config": {"seeds": 1, "dataset": "d", "output_dir": "x", "data_dir": None},
            "dataset": {"name": "d"}, "versions": {}, "device": "a", "seconds": {"total": 9.0},
            "results": [row, {"name": "untrained", "seed": seed}], "soft_targets": {"1": [seed]},
        }  # fmt: skip

    monkeypatch.setattr(measure, "run", run)
    measure.measure("some")
    found = json.loads((tmp_path / "docs/results/some.json").read_text())
    assert [x["command"] for x in found["runs"]] == ["python a.py --seed 1", "python a.py --seed 2"]
    assert found["runs"][1]["soft_targets"] == {"1": [2]}
    assert found["runs"][0]["config"] == {"seeds": 1, "dataset": "d"}
    assert found["dataset"] == {"name": "d"}
    trained = {"epochs": 3, "batch_size": 8, "learning_rate": 0.1}
    assert found["results"] == [
        {"run": 0, "name": "net", "seed": 1, "test_accuracy": 0.6, **trained},
        {"run": 0, "name": "untrained", "seed": 1},
        {"run": 1, "name": "net", "seed": 2, "test_accuracy": 0.7, **trained},
        {"run": 1, "name": "untrained", "seed": 2},
    ]
    png = (tmp_path / "docs/results/shown.png").read_bytes()
    assert png == b"png 1"
    assert found["figures"] == {"shown.png": hashlib.sha256(png).hexdigest()}

    def on_other_data(command, folder):
        return run(command, folder / "again") | {"dataset": {"name": "digits"}}

    monkeypatch.setattr(measure, "run", on_other_data)
    with pytest.raises(UserError, match=r"a\.py --seed 1: d was not found"):
        measure.measure("some")


def test_what_cannot_be_measured_is_refused(capsys):
    assert measure.main(["nonsense"]) == 2
    assert measure.main([]) == 0
    assert "all_labels" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no_such_script.py: .*No such file"):
        measure.run("examples/no_such_script.py", "runs/x")


def test_an_experiment_asks_for_the_teachers_that_it_takes(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    measure.check_teachers("default")  # which has its own
    with pytest.raises(UserError, match=r"python docs/measure\.py limited_labels constant$"):
        measure.check_teachers("constant")
    folder = tmp_path / measure.RUNS / "limited_labels" / "0"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    measure.check_teachers("constant")
    measure.check_teachers("tuning")  # whose first command trains the teacher of the others


def test_the_tests_that_hold_the_statements_exist():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs/statements.md").read_text())
    assert len(named) > 200
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"


def test_the_search_of_script_25_pairs_students_with_their_large_net(tmp_path, monkeypatch):
    """A student of a large net has that net's logits; those further down have the first one's."""
    asked = []

    def start(config, share_batches):
        return types.SimpleNamespace(data=Data("d", "s", None, SPLIT, "validation"))

    def large(data, recipe, run, *dropout_and_norm):
        return ("large", *dropout_and_norm, *recipe)

    def distilled(name, units, teacher_logits, data, images, recipe, run, temperature, alpha):
        asked.append((teacher_logits[:3], recipe, alpha))
        return "student"

    script = types.SimpleNamespace(
        Config=lambda **given: types.SimpleNamespace(temperature=20.0, max_norm=2.0, **given),
        Recipe=lambda seed, epochs, batch_size, rate, schedule: (seed, rate, epochs),
        experiment=types.SimpleNamespace(start=start, versions=dict, device=str),
        train_large_net=large,
        train_distilled_net=distilled,
        train_small_net=lambda data, recipe, run: "small",
        predict=lambda network, split: np.eye(10)[[1, 2, 2]],
        predict_by_index=lambda network, split: network,
    )
    monkeypatch.setattr(measure, "load", lambda _: script)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    measure.search_hinton("found")
    rows = json.loads((tmp_path / "found.json").read_text())["results"]
    nets = len(measure.HINTON_LARGE)
    students = [row for row in rows if row["name"] == "distilled"]
    assert len(students) == nets + len(measure.HINTON_DISTILLED) - 1
    assert [row["errors"] for row in students[:nets]] == [[1, 1, 1]] * nets
    for k, (*dropout, _, _) in enumerate(measure.HINTON_LARGE):
        assert students[k]["dropout"] == dropout
        assert [x[0][1:3] for x in asked[3 * k : 3 * k + 3]] == [tuple(dropout)] * 3
        assert [x[1][0] for x in asked[3 * k : 3 * k + 3]] == [0, 1, 2]
    for (_, recipe, alpha), settings in zip(
        asked[3 * nets :], measure.HINTON_DISTILLED[1:], strict=True
    ):
        assert (*recipe[1:], alpha) == settings
    assert len([row for row in rows if row["name"] == "small net"]) == len(measure.HINTON_SMALL)
