"""Measures the page in a headless browser, and prints the figures as JSON.

    python docs/playground/build.py
    MNIST_DATA_DIR=... python docs/playground/measure.py

A test image is painted as soon as the page has a button for it. `first_answer_s` is the time from
opening the page until the first network has answered, `all_answers_s` until all have (medians of
five loads). `..._ms` are the medians of answers to a drawn digit. The accuracies are those of the
student on the first 500 test images: as they are, and painted onto the canvas with smoothed edges
in several sizes and places, from which the page brings them to MNIST's form.
"""

import argparse
import base64
import contextlib
import functools
import http.server
import json
import os
import shutil
import statistics
import sys
import threading
from pathlib import Path

import numpy as np

PLAYGROUND = Path(__file__).resolve().parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Where the test images are painted: width and height, left, top, in pixels of the canvas.
PLACES = {"full size": (280, 0, 0), "smaller, in a corner": (180, 96, 4), "half": (140, 5, 130)}

# Paints images [N, 784] onto the canvas, and brings the ink to MNIST's form. Takes and returns
# bytes, in base64.
PAINT = """async ([base64, size, left, top]) => {
  const { normaliseDigit } = await import("./digit.js");
  const { showImage } = await import("./board.js");
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const context = document.getElementById("board").getContext("2d");
  const small = document.createElement("canvas");
  let text = "";
  for (let start = 0; start < bytes.length; start += 784) {
    showImage(small, bytes.subarray(start, start + 784));
    context.fillStyle = "black";
    context.fillRect(0, 0, 280, 280);
    context.imageSmoothingEnabled = true;
    context.drawImage(small, left, top, size, size);
    const { data } = context.getImageData(0, 0, 280, 280);
    const ink = Float32Array.from({ length: 280 * 280 }, (_, k) => data[4 * k] / 255);
    for (const value of normaliseDigit(ink, 280, 280)) {
      text += String.fromCharCode(Math.round(255 * value));
    }
  }
  return btoa(text);
}"""

# The logits of a network in models/ for images [N, 784], given as bytes.
PREDICT = """async ([key, base64]) => {
  const { Network } = await import("./models.js");
  const network = await Network.load(`models/${key}.onnx`);
  const pixels = Float32Array.from(atob(base64), (letter) => letter.charCodeAt(0) / 255);
  const logits = [];
  for (let start = 0; start < pixels.length; start += 784 * 100) {
    const images = pixels.slice(start, start + 784 * 100);
    logits.push(...(await network.predict(images, images.length / 784)));
  }
  return logits;
}"""


# %% Server and browser


@contextlib.contextmanager
def serve(folder):
    """Serves a folder on localhost meanwhile. Gives the address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def find_browser():
    """The system's Chromium or Chrome, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def launch(playwright):
    """Starts the system's browser without a window."""
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    arguments = ["--no-sandbox"] if is_root else []
    return playwright.chromium.launch(executable_path=find_browser(), args=arguments)


def wait_until_ready(page):
    page.get_by_text("The networks are ready.").wait_for()


# %% What the page makes of images


def to_base64(images):
    return base64.b64encode(np.ascontiguousarray(images, np.uint8).tobytes()).decode()


def paint(page, images, place):
    """Paints images [N, 28, 28, 1] of bytes at a place. Returns what the networks see of them, in
    the same shape."""
    content = page.evaluate(PAINT, [to_base64(images), *place])
    return np.frombuffer(base64.b64decode(content), np.uint8).reshape(images.shape)


def predict(page, key, images):
    """The logits [N, 10] of a network for images [N, 28, 28, 1] of bytes."""
    logits = page.evaluate(PREDICT, [key, to_base64(images)])
    return np.array(logits).reshape(len(images), 10)


# %% Figures


def time_first_answers(browser, address):
    """Opens the page anew, and paints a test image at once. Returns the seconds until the first
    network has answered, and until all have."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(address, wait_until="commit")
    page.get_by_role("button", name="Draw test image: a 3", exact=True).click()
    seconds = []
    for answers in (1, 3):
        is_enough = page.locator("td.digit", has_text="3").nth(answers - 1)
        is_enough.wait_for()
        seconds.append(page.evaluate("performance.now()") / 1000)
    context.close()
    return seconds


def time_answers(page):
    """Draws a digit, and returns what the page says of each network's latency, as text."""
    area = page.locator("#board").bounding_box()
    page.mouse.move(area["x"] + 140, area["y"] + 50)
    page.mouse.down()
    for step in range(60):
        page.mouse.move(area["x"] + 140, area["y"] + 50 + 3 * step)
        page.wait_for_timeout(20)
    page.mouse.up()
    page.wait_for_timeout(500)
    [_, *texts] = page.locator("#costs tr").first.locator("th, td").all_inner_texts()
    return texts


def measure(folder, test):
    """All figures of a built page. `test` has 500 images [N, 28, 28, 1] and their labels."""
    from playwright.sync_api import sync_playwright

    figures = {}
    with serve(folder) as address, sync_playwright() as playwright:
        browser = launch(playwright)
        loads = [time_first_answers(browser, address) for _ in range(5)]
        figures["first_answer_s"] = round(statistics.median(first for first, _ in loads), 2)
        figures["all_answers_s"] = round(statistics.median(last for _, last in loads), 2)

        page = browser.new_page()
        page.goto(address)
        wait_until_ready(page)
        for key, text in zip(("teacher", "student", "shipped"), time_answers(page), strict=True):
            figures[f"{key}_ms"] = float(text.split()[-2])  # "0.4 ms" or "< 0.1 ms"

        def accuracy(images):
            return float((predict(page, "student", images).argmax(-1) == test.label).mean())

        figures["accuracy"] = accuracy(test.image)
        for name, place in PLACES.items():
            figures[f"accuracy painted, {name}"] = accuracy(paint(page, test.image, place))
        browser.close()
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=PLAYGROUND / "dist", help="what build.py wrote"
    )
    folder = parser.parse_args().folder
    sys.path.insert(0, str(PLAYGROUND.parent.parent / "examples"))
    import utils

    try:
        utils.require((folder / "data.json").is_file(), f"{folder}: build it first, with build.py")
        utils.require(find_browser(), f"none of {', '.join(BROWSERS)} is installed")
        test = utils.load_data("mnist", fall_back=False).test.take(slice(500))
        figures = measure(folder, test)
    except ModuleNotFoundError as error:
        sys.exit(f"{error}: python -m pip install -r docs/playground/requirements.txt")
    except utils.UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
