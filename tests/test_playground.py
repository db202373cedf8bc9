"""The page to play with, docs/playground: built once, then used in a real browser without a window.

Without Playwright, a browser, npm, networks or results the browser's tests are skipped, and say so.
"""

import base64
import codecs
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import utils
from conftest import EXAMPLES, ROOT, load

PLAYGROUND = ROOT / "docs" / "playground"
RESULTS = ROOT / "docs" / "results" / "deploy.json"
NETWORKS = ["teacher", "student", "shipped"]  # the columns of the first panel's table
SHIPPED = "distilled, 80 % sparse int8"  # its row in the results
SAMPLE = {"label": 1, "pixels": "", "teacher_logits": [0, 1], "student_logits": [0, 1]}

# Digits as lines on the canvas, which is 280 wide and high: for each stroke, where the pen goes.
STROKES = {
    0: [[(140, 45), (95, 75), (80, 140), (95, 205), (140, 235), (185, 205), (200, 140), (185, 75),
         (140, 45)]],
    1: [[(145, 40), (135, 240)]],
    2: [[(85, 85), (105, 50), (150, 42), (185, 70), (180, 115), (130, 175), (85, 230), (200, 228)]],
    3: [[(85, 60), (130, 42), (180, 65), (172, 110), (125, 132), (180, 155), (190, 200), (145, 236),
         (85, 220)]],
    4: [[(95, 45), (80, 150), (200, 145)], [(185, 45), (175, 240)]],
    5: [[(190, 45), (100, 45), (90, 125), (150, 120), (190, 160), (175, 220), (125, 238),
         (80, 220)]],
    7: [[(75, 60), (200, 55), (120, 235)]],
}  # fmt: skip
# The 1, and how an arrow key's 17 steps draw it from where the pen starts.
KEYS_FOR_ONE = [" ", *["ArrowDown"] * 17, " "]


build = load(PLAYGROUND / "build.py", name="playground_build")
measure = load(PLAYGROUND / "measure.py", name="playground_measure")


def why_not():
    """What the browser's tests lack here, or None."""
    if importlib.util.find_spec("playwright") is None:
        return "no Playwright: python -m pip install -r docs/playground/requirements.txt"
    if measure.find_browser() is None:
        return "no browser: apt-get install chromium"
    if shutil.which("npm") is None:
        return "no npm: apt-get install npm"
    if not RESULTS.is_file():
        return f"no {RESULTS.relative_to(ROOT)}: python docs/measure.py deploy"
    return None


def run_build(folder, *flags, **environment):
    """Runs the build.py that lies in a folder."""
    command = [sys.executable, str(folder / "build.py"), *map(str, flags)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )


# %% Fixtures


@pytest.fixture(scope="session")
def dist(tmp_path_factory):
    """The built page. One process builds it, all use it."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    folder = shared / "playground"
    with filelock.FileLock(shared / "playground.lock"):
        if not folder.exists():
            done = run_build(PLAYGROUND, "--output", folder)
            assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def address(dist):
    with measure.serve(dist) as address:
        yield address


@pytest.fixture(scope="session")
def browser(dist):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = measure.launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """A function that opens the page. At the end no page may have met an error, nor have asked
    anybody else for anything."""
    contexts, errors, foreign = [], [], []

    def watch_request(request):
        if not request.url.startswith((address, "data:", "blob:")):
            foreign.append(request.url)

    def open_page(ready=True, **settings):
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", watch_request)
        page.goto(address)
        if ready:
            measure.wait_until_ready(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
    assert foreign == []


@pytest.fixture(scope="session")
def data(dist):
    """What the page shows."""
    return json.loads((dist / "data.json").read_text())


@pytest.fixture(scope="session")
def first_images():
    """The first 500 test images of MNIST."""
    if "MNIST_DATA_DIR" not in os.environ:
        pytest.skip("no MNIST: set MNIST_DATA_DIR")
    return utils.load_data("mnist").test.take(slice(500))


# %% What a reader does, and what the page then shows


def wait_for_answers(page):
    """Waits until all three networks have answered in words. Returns the words."""
    words = page.locator("#answer", has_text=re.compile(r"Teacher: \d.*Shipped student: \d"))
    words.wait_for()
    return words.inner_text()


def clear(page):
    page.get_by_role("button", name="Clear").click()
    page.locator("#answer", has_text="Draw a digit.").wait_for()


def draw_with_mouse(page, strokes):
    page.locator("#board").wait_for()
    area = page.locator("#board").bounding_box()
    scale = area["width"] / 280
    for stroke in strokes:
        places = [(area["x"] + scale * x, area["y"] + scale * y) for x, y in stroke]
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place, steps=5)
        page.mouse.up()


def draw_with_finger(page, strokes):
    session = page.context.new_cdp_session(page)
    area = page.locator("#board").bounding_box()
    scale = area["width"] / 280
    for stroke in strokes:
        kind = "touchStart"
        for x, y in stroke:
            place = {"x": area["x"] + scale * x, "y": area["y"] + scale * y}
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [place]})
            kind = "touchMove"
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def count_ink(page):
    """How many of the drawing's 280 × 280 pixels are white."""
    return page.evaluate(
        """async () => {
          await new Promise(requestAnimationFrame); // with it come the moves until now
          const context = document.getElementById("board").getContext("2d");
          const { data } = context.getImageData(0, 0, 280, 280);
          return data.filter((value, k) => k % 4 === 0 && value > 127).length;
        }"""
    )


def paint_sample(page, sample):
    clear(page)
    doubtful = "doubtful " if sample["doubtful"] else ""
    name = f"Draw test image: a {doubtful}{sample['label']}"
    page.get_by_role("button", name=name, exact=True).click()
    return wait_for_answers(page)


def shown_digits(page):
    """The answers of the networks in the table."""
    return dict(zip(NETWORKS, page.locator("td.digit").all_inner_texts(), strict=True))


def shown_numbers(page, selector):
    """The exact values behind the numbers of a part of the page."""
    values = page.locator(f"{selector} data").evaluate_all("all => all.map(x => Number(x.value))")
    return np.array(values)


def shown_probabilities(page):
    """The probabilities in the first panel's table, [digits, networks]."""
    return shown_numbers(page, "#probabilities").reshape(10, 3)


def temperatures(page):
    """What the sliders of the temperature may be moved to."""
    return page.evaluate("import('./page.js').then((page) => page.TEMPERATURES)")


def move_temperature(page, slider, temperature):
    page.locator(slider).fill(str(temperatures(page).index(temperature)))


def softmax(logits, temperature):
    return np.array(jax.nn.softmax(jnp.array(logits) / temperature))


# %% Drawing


@pytest.mark.parametrize("digit", STROKES)
def test_a_drawn_digit_is_read(open_page, digit):
    page = open_page()
    draw_with_mouse(page, STROKES[digit])
    words = wait_for_answers(page)
    assert words.count(f": {digit}, ") == 3
    assert shown_digits(page) == dict.fromkeys(NETWORKS, str(digit))


def test_a_digit_is_drawn_by_finger(open_page):
    page = open_page(has_touch=True, viewport={"width": 360, "height": 700})
    page.locator("#board").scroll_into_view_if_needed()
    scrolled = page.evaluate("scrollY")
    draw_with_finger(page, STROKES[7])
    wait_for_answers(page)
    assert set(shown_digits(page).values()) == {"7"}
    assert page.evaluate("scrollY") == scrolled  # the finger draws and does not scroll


def test_a_second_finger_neither_draws_nor_ends_the_stroke(open_page):
    page = open_page(ready=False, has_touch=True, viewport={"width": 360, "height": 700})
    page.locator("#board").scroll_into_view_if_needed()
    session = page.context.new_cdp_session(page)
    area = page.locator("#board").bounding_box()

    def touch(kind, **fingers):
        points = [
            {"x": area["x"] + x, "y": area["y"] + y, "id": int(name.removeprefix("finger"))}
            for name, (x, y) in fingers.items()
        ]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        return count_ink(page)

    touch("touchStart", finger0=(50, 50))
    before = touch("touchMove", finger0=(50, 150))
    assert touch("touchStart", finger0=(50, 150), finger1=(200, 50)) == before
    assert touch("touchMove", finger0=(50, 150), finger1=(200, 150)) == before
    assert touch("touchEnd", finger1=(200, 150)) == before
    assert touch("touchMove", finger0=(50, 250)) > before
    before = touch("touchEnd", finger0=(50, 250))
    assert touch("touchStart", finger0=(200, 100)) > before  # a new stroke


def test_hovering_draws_nothing_where_the_release_was_missed(open_page):
    page = open_page(ready=False)
    # As when a dialogue took the event.
    page.evaluate(
        """() => window.addEventListener("pointerup", (event) => {
          event.stopImmediatePropagation();
        }, { capture: true })"""
    )
    # Then the capture is lost, too, without an event.
    page.evaluate(
        """() => window.addEventListener("lostpointercapture", (event) => {
          event.stopImmediatePropagation();
        }, { capture: true })"""
    )
    draw_with_mouse(page, STROKES[1])
    area = page.locator("#board").bounding_box()
    before = count_ink(page)
    page.mouse.move(area["x"] + 30, area["y"] + 30, steps=5)
    assert count_ink(page) == before


def test_a_lost_capture_ends_the_stroke(open_page):
    page = open_page()
    area = page.locator("#board").bounding_box()
    page.mouse.move(area["x"] + 140, area["y"] + 40)
    page.mouse.down()
    page.mouse.move(area["x"] + 135, area["y"] + 240, steps=5)
    page.evaluate("document.getElementById('board').releasePointerCapture(1)")
    page.mouse.move(area["x"] + 30, area["y"] + 240)  # this brings the event
    wait_for_answers(page)  # in words, which come at a stroke's end
    before = count_ink(page)
    page.mouse.move(area["x"] + 30, area["y"] + 30, steps=5)
    assert count_ink(page) == before


def test_a_digit_is_drawn_by_keyboard(open_page):
    page = open_page()
    page.locator("#board").focus()
    for key in KEYS_FOR_ONE:
        page.keyboard.press(key)
        if key == " " and "down" not in page.locator("#answer").inner_text():
            assert page.locator("#pen").is_visible()
    wait_for_answers(page)
    assert set(shown_digits(page).values()) == {"1"}

    page.keyboard.press("Delete")
    page.locator("#answer", has_text="Draw a digit.").wait_for()


def test_the_pen_says_when_it_is_down(open_page):
    page = open_page()
    page.locator("#board").focus()
    page.keyboard.press(" ")
    page.locator("#answer", has_text="Pen down, at column 15 and row 8 of 28.").wait_for()
    page.keyboard.press("ArrowDown")
    page.keyboard.press(" ")
    page.locator("#answer", has_text="Pen up, at column 15 and row 9 of 28.").wait_for()
    assert wait_for_answers(page).startswith("Pen up, at")  # both can be heard

    # The last column and row.
    for key in ["ArrowRight"] * 20 + ["ArrowDown"] * 30 + [" "]:
        page.keyboard.press(key)
    page.locator("#answer", has_text="Pen down, at column 28 and row 28 of 28.").wait_for()
    page.keyboard.press(" ")

    page.locator("#answer", has_text="Pen up, at column 28 and row 28 of 28.").wait_for()
    clear(page)
    draw_with_mouse(page, STROKES[1])
    assert "Pen" not in wait_for_answers(page)


def test_answers_are_seen_while_a_digit_is_drawn(open_page):
    page = open_page(has_touch=True, viewport={"width": 360, "height": 640})
    page.locator("#board").evaluate("board => board.scrollIntoView({ block: 'start' })")
    page.evaluate(
        """() => {
          window.announced = 0;
          const observer = new MutationObserver(() => { window.announced += 1; });
          observer.observe(document.getElementById("answer"), { childList: true });
        }"""
    )
    area = page.locator("#board").bounding_box()
    page.mouse.move(area["x"] + 75, area["y"] + 60)
    page.mouse.down()
    for x, y in [(200, 55), (120, 235)]:
        page.mouse.move(area["x"] + x, area["y"] + y, steps=5)
    answers = page.locator("#answers-now")
    page.wait_for_function(
        """() => {
          const digits = document.querySelectorAll("#answers-now .digit");
          return Array.from(digits, (digit) => digit.textContent).join("") === "777";
        }"""
    )
    assert page.evaluate("window.announced") == 0  # a screen reader is told at the stroke's end
    box = answers.bounding_box()
    assert box["y"] > 0
    assert box["y"] + box["height"] <= 640
    assert answers.get_attribute("aria-hidden") == "true"
    page.mouse.up()
    wait_for_answers(page)


def test_sliders_speak_once(open_page):
    page = open_page(ready=False)
    page.locator("main").wait_for()
    outputs = page.locator("output")
    assert outputs.count() == 3
    for k in range(3):
        assert outputs.nth(k).get_attribute("aria-live") == "off"
        slider = page.locator(f"#{outputs.nth(k).get_attribute('for')}")
        assert slider.get_attribute("aria-valuetext") == outputs.nth(k).inner_text()


def test_an_empty_canvas_gets_no_answer(open_page):
    page = open_page()
    assert page.locator("#answer").inner_text() == "Draw a digit."
    draw_with_mouse(page, STROKES[1])
    wait_for_answers(page)
    clear(page)
    assert set(shown_digits(page).values()) == {"–"}
    assert set(page.locator("#probabilities data").all_inner_texts()) == {"–"}


def test_a_dot_is_answered(open_page):
    page = open_page()
    draw_with_mouse(page, [[(3, 3), (3, 3)]])
    wait_for_answers(page)
    assert all(digit in "0123456789" for digit in shown_digits(page).values())


def test_ink_from_before_the_networks_were_ready_is_answered(open_page):
    page = open_page(ready=False)
    draw_with_mouse(page, STROKES[7])
    wait_for_answers(page)
    assert set(shown_digits(page).values()) == {"7"}


# %% MNIST's form


def test_a_digit_looks_the_same_wherever_it_was_drawn(open_page, data):
    pixels = [np.frombuffer(base64.b64decode(x["pixels"]), np.uint8) for x in data["samples"]]
    images = np.stack(pixels).reshape(-1, 28, 28, 1)
    page = open_page()
    large = measure.paint(page, images, (280, 0, 0)).astype(float)
    for place in [(140, 5, 130), (140, 120, 10), (200, 70, 75)]:
        small = measure.paint(page, images, place).astype(float)
        assert np.abs(small - large).mean() < 0.02 * 255


def test_the_centre_of_mass_is_in_the_centre(open_page):
    page = open_page()
    rng = np.random.default_rng(0)
    images = np.zeros((20, 28, 28, 1), np.uint8)
    for image in images:  # rectangles, which are symmetric
        top, left = rng.integers(1, 8, 2)
        height, width = rng.integers(8, 20, 2)
        image[top : top + height, left : left + width] = 255
    seen = measure.paint(page, images, (280, 0, 0))[..., 0].astype(float)
    rows = (seen.sum(2) @ np.arange(28)) / seen.sum((1, 2))
    columns = (seen.sum(1) @ np.arange(28)) / seen.sum((1, 2))
    # MNIST's own test images are between 13.5 and 14.5 all.
    assert np.abs(rows - 14).max() < 0.51
    assert np.abs(columns - 14).max() < 0.51
    sides = [np.ptp(np.argwhere(image > 127), axis=0).max() + 1 for image in seen]
    assert set(sides) <= {19, 20}  # the smoothed edges take half a pixel at most


def test_a_test_image_comes_back_as_it_was(open_page, data):
    """Painted by its button it is not smoothed: the networks see the very image."""
    page = open_page()
    for sample in data["samples"][:6]:
        paint_sample(page, sample)
        seen = page.evaluate(
            """() => {
              const preview = document.getElementById("preview");
              const image = preview.getContext("2d").getImageData(0, 0, 28, 28);
              return Array.from(image.data).filter((_, k) => k % 4 === 0);
            }"""
        )
        original = np.frombuffer(base64.b64decode(sample["pixels"]), np.uint8)
        assert np.array_equal(seen, original)


@pytest.mark.parametrize("place", measure.PLACES.values(), ids=measure.PLACES)
def test_repainted_test_images_are_read_as_well(open_page, first_images, place):
    page = open_page()
    painted = measure.paint(page, first_images.image, place)
    labels = first_images.label
    accuracy = (measure.predict(page, "student", painted).argmax(-1) == labels).mean()
    plain = (measure.predict(page, "student", first_images.image).argmax(-1) == labels).mean()
    assert plain > 0.97
    assert abs(accuracy - plain) <= 0.01


# %% Probabilities and temperature


def test_probabilities_agree_with_jax(open_page, data):
    page = open_page()
    for sample in data["samples"]:
        paint_sample(page, sample)
        shown = shown_probabilities(page)
        for column, network in enumerate(["teacher", "student"]):
            expected = softmax(sample[f"{network}_logits"], 1.0)
            assert np.abs(shown[:, column] - expected).max() < 1e-3


def test_the_temperature_softens_and_changes_no_answer(open_page, data):
    page = open_page()
    sample = next(x for x in data["samples"] if x["doubtful"])
    paint_sample(page, sample)
    before = shown_digits(page)
    largest = []
    for temperature in (0.5, 1, 3, 20):
        move_temperature(page, "#draw-temperature", temperature)
        assert page.locator("#draw-temperature-value").inner_text() == f"T = {temperature}"
        shown = shown_probabilities(page)
        for column, network in enumerate(["teacher", "student"]):
            expected = softmax(sample[f"{network}_logits"], temperature)
            assert np.abs(shown[:, column] - expected).max() < 1e-3
        assert shown_digits(page) == before
        assert [str(digit) for digit in shown.argmax(0)] == list(before.values())
        largest.append(shown.max(0))
    assert (np.diff(largest, axis=0) < 0).all()


def test_the_slider_is_moved_by_keyboard(open_page):
    page = open_page()
    slider = page.get_by_role("slider", name="Temperature").first
    slider.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "T = 1.2"
    slider.press("End")
    assert slider.get_attribute("aria-valuetext") == "T = 20"
    slider.press("Home")
    assert slider.get_attribute("aria-valuetext") == "T = 0.5"


def test_sizes_are_those_of_the_files(dist, data):
    for network in data["networks"]:
        content = (dist / "models" / f"{network['key']}.onnx").read_bytes()
        assert network["bytes"] == len(content)
        assert network["gzip_bytes"] < len(content)


# %% The loss


def test_the_loss_is_that_of_script_15(open_page, data, kd):
    page = open_page(ready=False)
    settings = [(0.5, 0.3), (1, 0.5), (3, 0), (3, 0.5), (3, 1), (20, 0.3)]
    samples = [x for x in data["samples"] if x["label"] in (2, 9)]
    for sample, (temperature, alpha) in itertools.product(samples, settings):
        doubtful = "doubtful " if sample["doubtful"] else ""
        name = f"Test image: a {doubtful}{sample['label']}"
        page.get_by_role("radio", name=name, exact=True).check()
        move_temperature(page, "#loss-temperature", temperature)
        page.locator("#loss-alpha").fill(str(alpha))

        teacher = jnp.array([sample["teacher_logits"]])
        student = jnp.array([sample["student_logits"]])
        label = jnp.array([sample["label"]])

        rest = (teacher, label, temperature, alpha)
        total, hard, soft = kd.distillation_loss(student, *rest)
        # The gradients of the three with respect to the student's logits [1, 10].
        gradients = jax.jacobian(kd.distillation_loss)(student, *rest)
        norms = [jnp.linalg.norm(gradient) for gradient in gradients]
        expected = {
            "hard-loss": hard,
            "soft-loss": soft,
            "total-loss": total,
            "hard-weight": alpha,
            "soft-weight": 1 - alpha,
            "hard-norm": alpha * norms[1],
            "soft-norm": (1 - alpha) * norms[2],
            "total-norm": norms[0],
        }
        for place, value in expected.items():
            [shown] = shown_numbers(page, f"#{place}")
            assert shown == pytest.approx(float(value), rel=1e-3, abs=1e-5), place

        shown = shown_numbers(page, "#loss-probabilities").reshape(10, 2)
        targets = np.stack([softmax(teacher[0], temperature), softmax(student[0], temperature)], 1)
        assert np.abs(shown - targets).max() < 1e-5


def test_the_soft_loss_is_never_negative(open_page, data):
    page = open_page(ready=False)
    least = page.evaluate(
        """async (samples) => {
          const { softLoss } = await import("./loss.js");
          const { TEMPERATURES } = await import("./page.js");
          const losses = samples.flatMap(({ teacher_logits: logits }) => {
            const others = logits.map((logit, k) => logit + 1e-9 * k);
            return TEMPERATURES.map((T) => softLoss(others, logits, T));
          });
          return Math.min(...losses);
        }""",
        data["samples"],
    )
    assert least >= 0


# %% Size and accuracy


def test_the_frontier_shows_the_results_and_leads_to_the_scripts(open_page, dist):
    rows = {}
    for row in json.loads(RESULTS.read_text())["results"]:
        rows.setdefault(row["name"], []).append(row)

    page = open_page(ready=False)
    lines = page.locator("#frontier-rows tr")
    shown = {}
    for k in range(lines.count()):
        name = lines.nth(k).locator("a").inner_text()
        shown[name] = lines.nth(k)
    assert list(shown) == list(rows)
    for name, row in shown.items():
        accuracy = np.mean([seed["test_accuracy"] for seed in rows[name]])
        [errors] = row.locator("data").evaluate_all("all => all.map(x => Number(x.value))")
        assert errors == pytest.approx(1 - accuracy)
        cells = row.locator("td").all_inner_texts()
        assert cells[0] == f"{100 * (1 - accuracy):.2f}\u00a0%"
        assert int(cells[-1]) == len(rows[name])
        script = row.locator("a").get_attribute("href")
        original = EXAMPLES / Path(script).name.removesuffix(".txt")
        assert (dist / script).read_bytes() == codecs.BOM_UTF8 + original.read_bytes()


def test_every_point_is_a_link_with_a_name(open_page, dist, data):
    page = open_page(ready=False)
    for size in ("on disk", "packed by gzip"):
        page.get_by_label(size).check()
        points = page.locator("#frontier a")
        exported = [network for network in data["frontier"] if network["bytes"] is not None]
        assert points.count() == len(exported) > 0
        for k, network in enumerate(exported):
            assert points.nth(k).get_attribute("aria-label").startswith(f"{network['name']}: ")
            assert (dist / points.nth(k).get_attribute("href")).is_file()
    page.get_by_label("on disk").focus()
    page.keyboard.press("Tab")
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused == points.first.get_attribute("aria-label")


def test_a_script_is_shown_as_utf_8(browser, address, dist):
    """The test's server states no charset."""
    page = browser.new_page()
    for path in sorted((dist / "scripts").iterdir()):
        page.goto(f"{address}scripts/{path.name}")
        assert page.evaluate("document.characterSet") == "UTF-8"
    page.close()


def test_the_line_joins_what_no_other_network_beats(open_page, data):
    script = load(EXAMPLES / "23_compress_and_deploy.py")
    page = open_page(ready=False)
    networks = [network for network in data["frontier"] if network["bytes"] is not None]
    for size in ("bytes", "gzip_bytes"):
        places = [(network[size], 1 - network["test_accuracy"]) for network in networks]
        expected = script.find_frontier(places)
        found = page.evaluate(
            """async ([networks, size]) => {
              const { findFrontier } = await import("./panel_frontier.js");
              return findFrontier(networks, size);
            }""",
            [networks, size],
        )
        assert [(network[size], 1 - network["test_accuracy"]) for network in found] == expected
    names = "; ".join(network["name"] for network in found)  # packed, which is shown first
    chart = page.locator("#frontier svg")
    assert chart.get_attribute("aria-label").endswith(f"from small to large: {names}.")
    corners = page.locator(".frontier-line").get_attribute("points").split()
    assert len(corners) == len(found)


def test_a_point_comes_to_the_front_with_its_name(open_page):
    page = open_page(ready=False, viewport={"width": 360, "height": 800})
    points = page.locator("#frontier a")
    raised = page.locator("#frontier .raised")
    for k in range(points.count()):
        points.nth(k).focus()
        name = raised.locator("text").text_content()
        assert points.nth(k).get_attribute("aria-label").startswith(f"{name}: ")
        text = raised.locator("text").bounding_box()
        assert text["x"] >= 0
        assert text["x"] + text["width"] <= 360
    points.last.blur()
    assert raised.locator("*").count() == 0
    points.first.hover()
    assert raised.locator(".dot").count() == 1


def test_the_legend_has_the_shapes_of_the_chart(open_page, data):
    page = open_page(ready=False)
    lines = page.locator(".legend li")
    shape_of = "dot => [dot.tagName, dot.points?.length]"
    shapes = {}
    for k in range(lines.count()):
        key = lines.nth(k).get_attribute("data-key")
        shapes[key] = lines.nth(k).locator(".dot").evaluate(shape_of)
    assert set(shapes) == {network["key"] for network in data["frontier"]}
    for key, shape in shapes.items():
        dot = page.locator(f"#frontier a.{key} .dot").first
        assert dot.evaluate(shape_of) == shape


# %% For everybody


@pytest.mark.parametrize("width", [1100, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(open_page, scheme, width):
    # axe is added to the page, which the page itself forbids to foreign scripts.
    view = {"width": width, "height": 800}
    page = open_page(color_scheme=scheme, viewport=view, bypass_csp=True)
    draw_with_mouse(page, STROKES[7])
    wait_for_answers(page)
    page.add_script_tag(path=PLAYGROUND / "node_modules" / "axe-core" / "axe.min.js")
    violations = page.evaluate("axe.run().then((results) => results.violations)")
    serious = [x for x in violations if x["impact"] in ("serious", "critical")]
    assert [(x["id"], [node["html"] for node in x["nodes"]]) for x in serious] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    bars = page.locator("#probabilities .top .bar")
    assert bars.count() == 3
    for k in range(3):
        bar = bars.nth(k).bounding_box()
        assert bar["width"] > 40
        assert bar["height"] > 8


def test_forced_colours_keep_what_colours_say(open_page):
    page = open_page(forced_colors="active")
    draw_with_mouse(page, STROKES[7])
    wait_for_answers(page)

    def style(selector, key):
        element = page.locator(selector).first
        return element.evaluate("(element, key) => getComputedStyle(element)[key]", key)

    backgrounds = [style(f".bar.{network}", "backgroundColor") for network in NETWORKS]
    backgrounds.append(style(".track", "backgroundColor"))
    assert len(set(backgrounds)) == 4
    assert style(".key.teacher", "backgroundColor") == backgrounds[0]
    assert style("#loss-samples input:checked + canvas", "outlineStyle") == "solid"
    strokes = [style(f".legend .{key} .dot", "stroke") for key in ("teacher", "baseline")]
    assert len(set(strokes)) == 2


# %% When something is missing


@pytest.fixture
def open_broken_page(browser, address):
    """A function that opens the page as a server gives it that has other contents, or None for no
    content, in the place of some files: {path: content}."""
    contexts = []

    def open_broken_page(files):
        def answer(route):
            content = files[route.request.url.removeprefix(address)]
            if content is None:
                route.fulfill(status=404)
            else:
                route.fulfill(body=content, content_type="text/html" if "<" in content else None)

        context = browser.new_context()
        contexts.append(context)
        for path in files:
            context.route(f"{address}{path}", answer)
        page = context.new_page()
        page.goto(address)
        return page

    yield open_broken_page
    for context in contexts:
        context.close()


def read_problem(page):
    """What the top of the page says is wrong: a line that ends with one full stop."""
    status = page.locator("#status.error")
    status.wait_for()
    text = status.inner_text()
    assert re.fullmatch(r"[^\n]*[^.]\.", text)
    return text


@pytest.mark.parametrize("missing", NETWORKS)
def test_without_one_network_the_others_answer(open_broken_page, data, missing):
    page = open_broken_page({f"models/{missing}.onnx": None})
    names = {network["key"]: network["name"] for network in data["networks"]}
    others = [names[key] for key in NETWORKS if key != missing]
    assert read_problem(page) == (
        f"Not loaded: {names[missing]}. models/{missing}.onnx: the server says 404. "
        f"Ready: {', '.join(others)}."
    )
    draw_with_mouse(page, STROKES[7])
    page.locator("#answer", has_text=re.compile(rf"^{others[0]}: 7.*{others[1]}: 7")).wait_for()
    expected = {key: "7" for key in NETWORKS} | {missing: "–"}
    assert shown_digits(page) == expected
    latencies = page.locator("#costs tr").first.locator("td").all_inner_texts()
    assert latencies.index("not loaded") == NETWORKS.index(missing)


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("onnxruntime/ort-wasm-simd-threaded.wasm", None, r"onnxruntime/.*\.wasm: .* 404"),
        ("onnxruntime/ort.wasm.bundle.min.mjs", None, r"onnxruntime/.*\.mjs cannot be loaded"),
        ("index.html", "no WebAssembly", "This browser does not run WebAssembly, or .*"),
    ],
)
def test_without_a_runtime_the_page_says_so(open_broken_page, dist, path, content, message):
    if content is not None:
        path = ""  # index.html, with a stricter rule
        content = (dist / "index.html").read_text().replace(" 'wasm-unsafe-eval'", "")
    page = open_broken_page({path: content})
    expected = f"Not loaded: Teacher, Student, Shipped student. {message}."
    assert re.fullmatch(expected, read_problem(page))
    draw_with_mouse(page, STROKES[7])
    page.locator("#answer", has_text="No network answers: the top of the page").wait_for()


def test_a_spoiled_network_is_named(open_broken_page):
    page = open_broken_page({"models/student.onnx": "spoiled"})
    problem = read_problem(page)
    assert problem.startswith("Not loaded: Student. models/student.onnx: ")
    assert problem.endswith("Ready: Teacher, Shipped student.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "data.json: the server says 404."),
        ("spoiled", "data.json does not hold what build.py writes."),
        ("{}", "data.json does not hold what build.py writes."),
    ],
)
def test_without_data_the_page_says_so(open_broken_page, content, message):
    page = open_broken_page({"data.json": content})
    assert read_problem(page) == message
    assert page.locator("main").is_hidden()  # nothing there would work


def test_a_missing_script_is_said(open_broken_page):
    page = open_broken_page({"digit.js": None})
    assert read_problem(page) == "A script of this page could not be loaded."
    assert page.locator("main").is_hidden()


def test_a_failed_answer_is_said_and_the_next_one_comes(open_page):
    page = open_page()
    page.evaluate(
        """async () => {
          const { Network } = await import("./models.js");
          window.predict = Network.prototype.predict;
          Network.prototype.predict = async () => { throw new Error("out of memory"); };
        }"""
    )
    draw_with_mouse(page, STROKES[7])
    page.locator("#answer", has_text="No network answers").wait_for()
    assert read_problem(page).startswith("Teacher did not answer: out of memory. ")
    page.evaluate(
        """async () => {
          const { Network } = await import("./models.js");
          Network.prototype.predict = window.predict;
        }"""
    )
    clear(page)
    draw_with_mouse(page, STROKES[7])
    wait_for_answers(page)


def test_without_scripts_no_control_is_shown(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert page.locator("noscript").is_visible()
    assert page.locator("noscript").inner_text() == "This page needs JavaScript."
    controls = page.locator("canvas, button, input, #server-hint")
    assert not any(controls.nth(k).is_visible() for k in range(controls.count()))
    assert "Loading" not in page.locator("body").inner_text()
    context.close()


def test_a_page_opened_as_a_file_asks_for_a_server(browser, dist):
    page = browser.new_page()
    page.goto((dist / "index.html").as_uri())
    page.get_by_text("This page needs a server").wait_for()
    assert page.locator("main").is_hidden()
    assert page.locator("#status").is_hidden()
    page.close()


def test_a_served_page_asks_for_no_server(open_page):
    page = open_page()
    assert page.get_by_text("This page needs a server").is_hidden()


# %% The build, without a browser


@pytest.fixture
def copy(tmp_path):
    """The folder of the page in a repository that has nothing else, with empty networks."""
    folder = tmp_path / "docs" / "playground"
    ignore = shutil.ignore_patterns("node_modules", "dist", "models")
    shutil.copytree(PLAYGROUND, folder, ignore=ignore)
    (folder / "models").mkdir(exist_ok=True)
    for key in NETWORKS:
        (folder / "models" / f"{key}.onnx").write_bytes(bytes(1000))
    digest = hashlib.sha256(bytes(1000)).hexdigest()
    file = {"bytes": 1000, "gzip_bytes": 29, "sha256": digest, "accuracy": 0.9}
    rows = [
        {"name": name, "params": 10, "test_accuracy": 0.9, "files": {"onnx": file}}
        for name in ("teacher", "distilled", SHIPPED)
    ]
    (folder / "samples.json").write_text(json.dumps([SAMPLE]))
    (tmp_path / "docs" / "results").mkdir()
    path = tmp_path / "docs" / "results" / "deploy.json"
    path.write_text(json.dumps({"command": "", "dataset": {"test": 10_000}, "results": rows}))
    return folder


def refuse(copy, message, *flags, **environment):
    """The build ends with status 2, says why in one line, and leaves nothing behind."""
    done = run_build(copy, *flags, **environment)
    assert done.returncode == 2
    assert re.fullmatch(f"[^\n]*{message}[^\n]*\n", done.stderr), done.stderr
    assert not (copy / "dist").exists()
    assert not list(copy.glob(".building*"))


def test_a_build_without_results_says_so(copy):
    (copy.parent / "results" / "deploy.json").unlink()
    refuse(copy, r"deploy\.json is missing: make it with python docs/measure\.py deploy")


def test_a_build_with_spoiled_results_says_so(copy):
    path = copy.parent / "results" / "deploy.json"
    path.write_text("{")
    refuse(copy, r"deploy\.json is no JSON file")
    path.write_text("[]")
    refuse(copy, r"deploy\.json holds no results")


def test_a_build_without_samples_says_so(copy):
    path = copy / "samples.json"
    path.write_text("[]")
    refuse(copy, r"samples\.json holds no test images")
    path.unlink()
    refuse(copy, r"samples\.json is missing: make it with .*collect\.py")


def test_a_build_without_a_network_says_so(copy):
    (copy / "models" / "student.onnx").unlink()
    refuse(copy, r"student\.onnx is missing: make it with .*collect\.py")


def test_a_build_with_an_empty_network_says_so(copy):
    (copy / "models" / "student.onnx").write_bytes(b"")
    refuse(copy, r"student\.onnx is empty: make it again with .*collect\.py")


def test_a_build_with_networks_of_another_run_says_so(copy):
    (copy / "models" / "shipped.onnx").write_bytes(b"another")
    refuse(copy, r"shipped\.onnx is not the file of which .*: take .*collect")


def test_a_build_with_an_unknown_group_says_so(copy):
    path = copy.parent / "results" / "deploy.json"
    results = json.loads(path.read_text())
    results["results"].append({"name": "cousin, pruned", "params": 1, "test_accuracy": 0.9})
    path.write_text(json.dumps(results))
    refuse(copy, "deploy.json has a row of an unknown group: 'cousin, pruned'")


@pytest.mark.parametrize(
    ("name", "group", "key", "script"),
    [
        ("teacher", "teacher", "teacher", "13_teacher_training.py"),
        ("distilled", "distilled", "distilled", "15_knowledge_distillation.py"),
        ("baseline, trained on", "baseline", "baseline", "23_compress_and_deploy.py"),
        (SHIPPED, "distilled", "shipped", "23_compress_and_deploy.py"),
        (
            "distilled, teacher left out, 95 % sparse int8",
            "distilled, teacher left out",
            "alone",
            "23_compress_and_deploy.py",
        ),
    ],
)
def test_a_point_has_the_colour_and_the_script_of_its_group(name, group, key, script):
    older = {"name": name, "test_accuracy": 0.9}  # that says the group in its name alone
    compression = "float32" if name == group else "a way to compress"
    for row in (older, {**older, "group": group, "compression": compression}):
        point = build.describe_point(name, [row])
        assert point["key"] == key
        assert point["script"] == f"scripts/{script}.txt"


def test_a_build_with_results_without_onnx_says_so(copy):
    path = copy.parent / "results" / "deploy.json"
    results = json.loads(path.read_text())
    del results["results"][0]["files"]
    path.write_text(json.dumps(results))
    refuse(copy, r"deploy\.json, teacher: has no ONNX file")


@pytest.mark.parametrize("key", ["name", "params", "test_accuracy"])
def test_a_build_names_what_a_row_of_the_results_lacks(copy, key):
    path = copy.parent / "results" / "deploy.json"
    results = json.loads(path.read_text())
    del results["results"][1][key]
    path.write_text(json.dumps(results))
    refuse(copy, rf"deploy\.json, row 1 has no '{key}': make it again with .*measure\.py deploy")


def test_a_build_names_what_the_results_lack(copy):
    path = copy.parent / "results" / "deploy.json"
    results = json.loads(path.read_text())
    del results["results"][2]["files"]["onnx"]["gzip_bytes"]
    path.write_text(json.dumps(results))
    refuse(copy, r"deploy\.json, row 2, ONNX file has no 'gzip_bytes'")
    del results["dataset"]
    path.write_text(json.dumps(results))
    refuse(copy, r"deploy\.json has no 'dataset'")


def test_a_build_names_what_a_test_image_lacks(copy):
    samples = [SAMPLE, {key: SAMPLE[key] for key in SAMPLE if key != "student_logits"}]
    (copy / "samples.json").write_text(json.dumps(samples))
    refuse(copy, r"samples\.json, image 1 has no 'student_logits'")


def write_program(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)


def test_a_build_without_npm_says_so(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(copy, "npm is missing: install Node", PATH=str(tmp_path / "empty"))


@pytest.mark.skipif(os.name == "nt", reason="the programs are scripts")
def test_the_first_error_of_npm_is_shown(copy, tmp_path):
    output = "npm warn old lock file\nnpm error code E1\nnpm error more"
    write_program(tmp_path / "bin" / "npm", f"raise SystemExit({output!r})\n")
    write_program(tmp_path / "bin" / "node", "")
    refuse(copy, "is there a network. npm error code E1", PATH=str(tmp_path / "bin"))


def test_a_second_build_needs_no_npm(copy, tmp_path):
    packages = copy / "node_modules"
    runtime = packages / "onnxruntime-web" / "dist"
    runtime.mkdir(parents=True)
    for name in build.RUNTIME:
        (runtime / name).touch()
    lock = json.loads((copy / "package-lock.json").read_text())
    del lock["packages"][""]
    installed = packages / ".package-lock.json"
    installed.write_text(json.dumps(lock))
    for name in build.files_of_page():
        if name.startswith("scripts/"):
            script = tmp_path / "examples" / Path(name).name.removesuffix(".txt")
            script.parent.mkdir(exist_ok=True)
            script.touch()
    (tmp_path / "empty").mkdir()
    done = run_build(copy, PATH=str(tmp_path / "empty"))
    assert done.returncode == 0, done.stderr
    shutil.rmtree(copy / "dist")

    lock["packages"]["node_modules/onnxruntime-web"]["version"] = "1.0.0"
    installed.write_text(json.dumps(lock))
    refuse(copy, "npm is missing", PATH=str(tmp_path / "empty"))


def test_a_build_overwrites_nothing_but_a_build(copy, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    refuse(copy, "holds other files: name a new or an empty folder", "--output", other)
    assert (other / "letter.txt").read_text() == "mine"


@pytest.fixture
def earlier(tmp_path):
    """A folder that holds what a build writes, each file empty."""
    folder = tmp_path / "site"
    for name in build.files_of_page():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


@pytest.mark.parametrize("foreign", ["CNAME", ".git/HEAD", "models/mine.onnx"])
def test_a_build_deletes_no_file_that_was_added_to_an_earlier_one(copy, earlier, foreign):
    build.check_output(earlier)  # an earlier build alone is replaced
    path = earlier / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    refuse(copy, f"holds {foreign}, which is no part of the page", "--output", earlier)
    assert path.read_text() == "mine"


def test_a_build_writes_what_it_says(dist):
    build.check_output(dist)
    assert all((dist / name).is_file() for name in build.files_of_page())


def test_a_build_into_a_file_says_so(copy, tmp_path):
    path = tmp_path / "letter.txt"
    path.write_text("mine")
    refuse(copy, r"letter\.txt is a file: name a folder", "--output", path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("interrupted", [1, 2])
def test_an_interrupted_swap_leaves_the_old_page(tmp_path, monkeypatch, interrupted):
    fresh, output, old = (tmp_path / name for name in ("fresh", "output", "old"))
    for folder in (fresh, output):
        folder.mkdir()
        (folder / "index.html").write_text(folder.name)
    rename = Path.rename
    calls = itertools.count(1)

    def rename_until_interrupted(path, target):
        if next(calls) == interrupted:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        build.swap(fresh, output, old)
    assert (output / "index.html").read_text() == "output"


def test_a_swap_replaces_the_old_page(tmp_path):
    fresh, output, old = (tmp_path / name for name in ("fresh", "output", "old"))
    for folder in (fresh, output):
        folder.mkdir()
        (folder / "index.html").write_text(folder.name)
    build.swap(fresh, output, old)
    assert (output / "index.html").read_text() == "fresh"
    assert (old / "index.html").read_text() == "output"


def test_an_interrupted_build_ends_in_one_line(monkeypatch, capsys, tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "build", interrupt)
    monkeypatch.setattr(sys, "argv", ["build.py", "--output", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as end:
        build.main()
    assert end.value.code == 130
    assert capsys.readouterr().err == "Interrupted: nothing was changed.\n"


def test_the_lock_file_names_no_address():
    text = (PLAYGROUND / "package-lock.json").read_text()
    assert "://" not in text
    assert '"resolved"' not in text
    packages = json.loads(text)["packages"]
    assert all("integrity" in about for name, about in packages.items() if name)
    wanted = json.loads((PLAYGROUND / "package.json").read_text())
    for name, version in {**wanted["dependencies"], **wanted["devDependencies"]}.items():
        assert packages[f"node_modules/{name}"]["version"] == version


def test_the_page_asks_nobody_else():
    for path in [*PLAYGROUND.glob("*.js"), *PLAYGROUND.glob("*.css"), PLAYGROUND / "index.html"]:
        addresses = re.findall(r"https?://[^\s\"'`)]+", path.read_text())
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}, path
    assert "default-src 'none'" in (PLAYGROUND / "index.html").read_text()
