"""README and docs say what is so: tables from the JSON, code from the scripts, sound commands."""

import json
import re
import shlex
import subprocess
import sys
import urllib.parse
from pathlib import Path

import experiment
import measure
import pytest
import render
from conftest import ROOT, SCRIPTS
from utils import UserError

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_text_and_results_agree(page):
    assert render.render(page.read_text()) == page.read_text(), "run python docs/render.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_begins_with_a_value(page):
    """Markdown would take such a line for HTML, and break the paragraph."""
    assert not re.findall(r"^<!-- value.*", page.read_text(), re.MULTILINE)


def test_a_wrong_number_is_found():
    text = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- table: results -->\n.*?<!-- end -->", text, re.DOTALL)[0]
    wrong = text.replace(block, block.replace("points", "apples"))
    assert wrong != text
    assert render.render(wrong) == text


def test_figures_are_those_of_the_results():
    from PIL import Image

    assert Image.open(render.RESULTS / "gains.png").info["Source"] == render.gains_source()
    for name in (*render.EXPERIMENTS, *render.VARIANTS):
        png = (render.RESULTS / f"{name}.png").read_bytes()
        assert render.hashlib.sha256(png).hexdigest() == render.read(name)["figure_sha256"]


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


@pytest.mark.parametrize(
    "name", [path.stem for path in sorted((render.RESULTS / "again").glob("*.json"))]
)
def test_the_second_run_has_the_settings_of_the_first(name):
    first, second = (render.read(f"{place}{name}") for place in ("", "again/"))
    for key in ("each", "seeds", "device", "holdout", "temperature", "batch_size", "max_norm"):
        assert first.get(key) == second.get(key), key
    configs = (run.get("config", {}).items() for run in (first, second))
    given, again = ({k: v for k, v in config if v is not None} for config in configs)
    assert given == again
    measured = ("accuracy", "errors")
    cells, others = (
        [{k: v for k, v in cell.items() if k not in measured} for cell in run.get("cells", [])]
        for run in (first, second)
    )
    assert cells == others
    assert second["minutes"] <= 60, "the part's target"


def test_what_can_be_measured_are_commands_that_the_scripts_understand(monkeypatch):
    """Every experiment and every cell of a search parses, and names a teacher measured before."""
    searched = [
        f"{script} {flags}" for script, cells in measure.SEARCHES.values() for flags in cells
    ]
    commands = {**measure.EXPERIMENTS, **measure.VARIANTS}
    known = []
    modules = {}
    for name, command in [*commands.items(), *(("a search", command) for command in searched)]:
        script, *flags = shlex.split(command)
        module = modules.setdefault(script, measure.load(script))
        config = experiment.parse(module.Config, flags)
        experiment.check_flags(config)
        teacher = getattr(config, "teacher", None)
        assert teacher is None or Path(teacher).name in known
        known.append(name)


def test_a_measured_run_becomes_a_result(tmp_path, monkeypatch):
    """The rows of one results.json, grouped by seed, without what no page shows."""
    (tmp_path / "docs/results").mkdir(parents=True)
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "docs/results")
    monkeypatch.setattr(measure, "EXPERIMENTS", {"some": "script.py --seeds 2"})
    settings = {"epochs": 3, "learning_rate": 0.1}

    def row(name, seed, accuracy, **more):
        common = {"seconds": 1.0, "history": [], "settings": settings, "epoch_seconds": []}
        return {"name": name, "seed": seed, "test_accuracy": accuracy, **common, **more}

    rows = [row("teacher", 0, 0.99)]
    for seed in (5, 6):
        rows += [row("distilled", seed, 0.9, mcnemar_p=0.25), row("baseline", seed, 0.8)]
    report = {
        "script": "script.py", "config": {"seeds": 2, "output_dir": "x", "data_dir": None},
        "dataset": {}, "versions": {}, "device": "a", "seconds": {"total": 9.0}, "results": rows,
        "soft_targets": {"1": [0.0]},
    }  # fmt: skip

    def run(command, folder):
        assert command == "script.py --seeds 2"
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "figure.png").write_bytes(b"png")
        return json.loads(json.dumps(report))

    monkeypatch.setattr(measure, "run", run)
    measure.measure_pairs("some")
    found = json.loads((tmp_path / "docs/results/some.json").read_text())
    assert [x["seed"] for x in found["runs"]] == found["seeds"] == [5, 6]
    assert found["runs"][0]["distilled"]["test_accuracy"] == 0.9
    assert found["runs"][1]["mcnemar_p"] == 0.25
    assert found["config"] == {"seeds": 2}
    assert found["cost_seconds"] == 5
    assert found["recipes"]["baseline"] == settings
    assert (tmp_path / "docs/results/some.png").read_bytes() == b"png"


def test_what_cannot_be_measured_is_refused(capsys):
    assert measure.main(["nonsense"]) == 2
    assert measure.main([]) == 0
    assert "all_labels" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no_such_script.py: .*No such file"):
        measure.run("examples/no_such_script.py", "runs/x")


def test_the_tests_that_hold_the_statements_exist():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs/statements.md").read_text())
    assert len(named) > 200
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"
