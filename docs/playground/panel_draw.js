// The first panel: a drawn digit, and what the networks answer.

import { Board, SIZE, showImage } from "./board.js";
import { FIELD, normaliseDigit } from "./digit.js";
import { argmax, softmax } from "./loss.js";
import {
  byId,
  bytesInWords,
  countInWords,
  element,
  errorsInWords,
  reportProblem,
  roundPercent,
  temperatureSlider,
} from "./page.js";
import { probabilityCells, showProbabilities } from "./probabilities.js";

/**
 * Starts the panel. Each network answers as soon as it is loaded.
 *
 * @param {object} data - what data.json holds
 * @param {object[]} samples - test images, with pixels, label and doubtful
 * @param {Map<string, Promise<Network>>} networks - by their keys in data.networks
 */
export function startDrawing(data, samples, networks) {
  const columns = data.networks.map(makeColumn);
  fillTable(columns);

  const temperature = temperatureSlider(
    byId("draw-temperature"),
    byId("draw-temperature-value"),
    1,
    () => columns.forEach(showColumn),
  );
  byId("draw-temperature").addEventListener("change", announce);

  function showColumn(column) {
    const probabilities = column.logits && softmax(column.logits, temperature());
    showProbabilities(column.cells, probabilities);
    const latency = column.network?.latency() ?? null;
    const noLatency = column.hasFailed ? "not loaded" : "–";
    const digit = probabilities ? argmax(probabilities) : "–";
    column.answer.textContent = digit;
    column.answerNow.textContent = digit;
    column.latency.textContent = latency === null ? noLatency : millisecondsInWords(latency);
  }

  /** Says all answers in words, after what the pen did. A screen reader reads them out. */
  function announce() {
    const sentences = [];
    for (const { about, logits } of columns) {
      if (logits) {
        const probabilities = softmax(logits, temperature());
        const digit = argmax(probabilities);
        sentences.push(`${about.name}: ${digit}, ${roundPercent(probabilities[digit])}.`);
      }
    }
    const answers = sentences.join(" ") || whyNoAnswer();
    byId("answer").textContent = `${penWords} ${answers}`.trim();
    penWords = "";
  }

  function whyNoAnswer() {
    if (!hasInk) {
      return "Draw a digit.";
    }
    if (columns.some(({ network, hasFailed }) => network === null && !hasFailed)) {
      return "The networks are still loading.";
    }
    return "No network answers: the top of the page says why.";
  }

  // One round of answers at a time. Ink that comes meanwhile is answered in the next round, and
  // only the newest of it.
  let isStale = false;
  let isRunning = false;
  let isStrokeOver = false;
  let hasInk = false;
  let penWords = ""; // where the keyboard's pen went down or up

  async function update() {
    isStale = true;
    if (isRunning) {
      return;
    }
    isRunning = true;
    try {
      while (isStale) {
        isStale = false;
        await answerOnce();
        await nextFrame();
      }
    } finally {
      isRunning = false; // whatever went wrong, the next ink is answered
    }
    if (isStrokeOver) {
      isStrokeOver = false;
      announce();
    }
  }

  async function answerOnce() {
    const image = normaliseDigit(board.ink(), SIZE, SIZE);
    hasInk = image !== null;
    showPreview(image);
    for (const column of columns) {
      column.logits = null;
      // Networks that are not loaded yet answer later.
      if (hasInk && column.network !== null) {
        try {
          column.logits = await column.network.answer(image);
        } catch (error) {
          reportProblem(`${column.about.name} did not answer: ${error.message}`);
        }
      }
      showColumn(column);
    }
  }

  const board = new Board(byId("board"), byId("pen"), {
    onInk: update,
    onStrokeEnd: () => {
      isStrokeOver = true;
      update();
    },
    onPen: (text) => {
      penWords = text;
      byId("answer").textContent = text;
    },
  });
  byId("clear").addEventListener("click", () => board.clear());
  for (const sample of samples) {
    byId("samples").append(sampleButton(sample, board));
  }

  for (const column of columns) {
    waitForNetwork(column);
  }

  async function waitForNetwork(column) {
    try {
      column.network = await networks.get(column.about.key);
    } catch {
      column.hasFailed = true; // main.js says why
    }
    isStrokeOver = true;
    update();
  }
}

/** What the page keeps of one network: what is known about it, its last answer, its cells. */
function makeColumn(about) {
  return {
    about,
    network: null,
    hasFailed: false,
    logits: null,
    cells: probabilityCells(about.key),
    answer: element("td", { class: "digit" }, "–"),
    answerNow: element("span", { class: "digit" }, "–"),
    latency: element("td", {}, "–"),
  };
}

function fillTable(columns) {
  for (const { about, answerNow } of columns) {
    const key = element("span", { class: `key ${about.key}` });
    byId("network-names").append(element("th", { scope: "col" }, key, about.name));
    // The answer once more, close to the finger.
    const name = element("span", {}, key.cloneNode(), about.name);
    byId("answers-now").append(element("div", {}, answerNow, name));
  }
  for (let digit = 0; digit < 10; digit += 1) {
    const cells = columns.map((column) => column.cells[digit]);
    byId("probabilities").append(row(digit, cells));
  }
  const texts = (say) => columns.map(({ about }) => element("td", {}, say(about)));
  byId("digits").append(row("Answer", columns.map((column) => column.answer)));
  byId("costs").append(
    row("Time", columns.map((column) => column.latency)),
    row("Size", texts((about) => bytesInWords(about.bytes))),
    row("Packed (gzip)", texts((about) => bytesInWords(about.gzip_bytes))),
    row("Parameters", texts((about) => countInWords(about.params))),
    row("Test errors of this file", texts((about) => errorsInWords(about.test_accuracy))),
  );
}

function row(heading, cells) {
  return element("tr", {}, element("th", { scope: "row" }, String(heading)), ...cells);
}

function showPreview(image) {
  const pixels = new Uint8Array(FIELD * FIELD);
  if (image !== null) {
    image.forEach((value, k) => {
      pixels[k] = Math.round(255 * value);
    });
  }
  showImage(byId("preview"), pixels);
}

function sampleButton(sample, board) {
  const doubtful = sample.doubtful ? "doubtful " : "";
  const name = `Draw test image: a ${doubtful}${sample.label}`;
  const button = element("button", { type: "button", "aria-label": name, title: name });
  const picture = element("canvas");
  showImage(picture, sample.pixels);
  button.append(picture);
  button.addEventListener("click", () => board.paint(sample.pixels));
  return button;
}

/** Browsers measure time in steps, of 0.1 ms or so: what takes less may seem to take none. */
function millisecondsInWords(milliseconds) {
  return milliseconds < 0.1 ? "< 0.1 ms" : `${milliseconds.toFixed(1)} ms`;
}

function nextFrame() {
  return new Promise((resolve) => {
    requestAnimationFrame(resolve);
  });
}
