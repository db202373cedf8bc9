"""README and docs say what is so: tables from the JSON, code from the scripts, sound commands."""

import json
import re
import shlex
import subprocess
import sys
import urllib.parse

import measure
import pytest
import render
from conftest import EXAMPLES, ROOT, SCRIPTS

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


def test_scripts_are_short():
    for script in SCRIPTS:
        assert len((EXAMPLES / script).read_text().splitlines()) <= 300, script


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


def test_each_search_gets_devices_of_its_own(monkeypatch):
    commands, ran = [], []
    monkeypatch.chdir(ROOT)

    def started(command):
        commands.append(command[2:])
        return (0 if len(commands) < 2 else 130), None

    monkeypatch.setattr(measure, "started", started)
    monkeypatch.setattr(measure, "variant", ran.append)
    with pytest.raises(SystemExit, match="130"):
        measure.main(["limited_tuning", "controls", "hinton_tuning", "hinton"])
    assert commands == [["limited_tuning"], ["hinton_tuning"]]
    assert ran == ["controls"], "and nothing goes on after a search that failed"


def test_a_run_again_is_compared_with_what_is_committed(tmp_path, monkeypatch, capsys):
    rows = [{"name": "weak", "seed": 3, "test_errors": errors} for errors in (7, 8)]
    (tmp_path / "controls.json").write_text(json.dumps({"runs": [{"rows": rows}]}))
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    for now, wrong in (([7, 8], False), ([7], False), ([7, 9], True)):
        results = [rows[0] | {"test_errors": errors} for errors in now]
        monkeypatch.setattr(measure, "run", lambda *_, results=results: {"results": results})
        assert measure.again("controls", "3") == wrong
        said = "[7, 9] errors, committed are [7, 8]" in capsys.readouterr().out
        assert said == wrong
    monkeypatch.setattr(measure, "run", lambda *_: {"results": []})
    with pytest.raises(SystemExit, match="nothing committed"):
        measure.again("controls", "3")
    kept = tmp_path / "runs/again/controls/kept"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.touch()
    for seed in ("90", "abc"):
        with pytest.raises(measure.utils.UserError, match=f"{seed}: no seed of"):
            measure.again("controls", seed)
    assert kept.exists(), "nothing is deleted for a run that is refused"
