// The second panel: soft targets, the two parts of the loss, and their gradients, for one image.

import { showImage } from "./board.js";
import { distillationLoss, norm, softLossGradient, softmax } from "./loss.js";
import {
  TEMPERATURES,
  byId,
  element,
  numberInWords,
  svgElement,
  temperatureSlider,
} from "./page.js";
import { probabilityCells, showProbabilities } from "./probabilities.js";

/** Starts the panel. Each sample has pixels, label, doubtful, teacher_logits and student_logits. */
export function startLoss(samples) {
  const teacherCells = probabilityCells("teacher");
  const studentCells = probabilityCells("student");
  for (let digit = 0; digit < 10; digit += 1) {
    const heading = element("th", { scope: "row" }, String(digit));
    const cells = [teacherCells[digit], studentCells[digit]];
    byId("loss-probabilities").append(element("tr", {}, heading, ...cells));
  }

  let chosen = samples.find((sample) => sample.doubtful) ?? samples[0];
  for (const sample of samples) {
    byId("loss-samples").append(
      sampleChoice(sample, sample === chosen, () => {
        chosen = sample;
        show();
      }),
    );
  }
  const slider = byId("loss-temperature");
  const temperature = temperatureSlider(slider, byId("loss-temperature-value"), 3, show);
  byId("loss-alpha").addEventListener("input", show);
  window.addEventListener("resize", show);
  show();

  function show() {
    const { label, teacher_logits: teacherLogits, student_logits: studentLogits } = chosen;
    const T = temperature();
    const alpha = Number(byId("loss-alpha").value);
    const loss = distillationLoss(studentLogits, teacherLogits, label, T, alpha);

    byId("loss-alpha-value").value = `alpha = ${alpha}`;
    byId("loss-alpha").setAttribute("aria-valuetext", `alpha = ${alpha}`);
    byId("loss-caption").textContent = `Label ${label}. Probabilities at T = ${T}`;
    showProbabilities(teacherCells, softmax(teacherLogits, T));
    showProbabilities(studentCells, softmax(studentLogits, T));
    showNumber("hard-loss", loss.hard);
    showNumber("soft-loss", loss.soft);
    showNumber("total-loss", loss.total);
    showNumber("hard-weight", alpha);
    showNumber("soft-weight", 1 - alpha);
    showNumber("hard-norm", loss.hardNorm);
    showNumber("soft-norm", loss.softNorm);
    showNumber("total-norm", loss.totalNorm);
    drawNorms(byId("norms"), studentLogits, teacherLogits, T);
  }
}

function showNumber(id, value) {
  byId(id).replaceChildren(element("data", { value }, numberInWords(value)));
}

function sampleChoice(sample, isChosen, onChoice) {
  const doubtful = sample.doubtful ? "doubtful " : "";
  const name = `Test image: a ${doubtful}${sample.label}`;
  const input = element("input", { type: "radio", name: "sample", "aria-label": name, title: name });
  input.checked = isChosen;
  input.addEventListener("change", onChoice);
  const picture = element("canvas", { "aria-hidden": "true" });
  showImage(picture, sample.pixels);
  return element("label", {}, input, picture);
}

/** Draws the norm of the soft loss's gradient over T, with the factor T² and without it. */
function drawNorms(place, studentLogits, teacherLogits, temperature) {
  const norms = TEMPERATURES.map((T) => norm(softLossGradient(studentLogits, teacherLogits, T)));
  const normsWithout = norms.map((value, k) => value / TEMPERATURES[k] ** 2);

  const width = Math.max(280, Math.min(480, place.clientWidth));
  const height = 200;
  const left = 48;
  const right = 8;
  const top = 26;
  const bottom = 44;
  const largest = Math.max(...norms, ...normsWithout);
  const x = (T) => {
    const share = Math.log(T / TEMPERATURES[0]) / Math.log(TEMPERATURES.at(-1) / TEMPERATURES[0]);
    return left + share * (width - left - right);
  };
  const y = (value) => top + (1 - value / largest) * (height - top - bottom);
  const path = (values) =>
    values.map((value, k) => `${k === 0 ? "M" : "L"}${x(TEMPERATURES[k])},${y(value)}`).join("");

  const now = norms[TEMPERATURES.indexOf(temperature)];
  const svg = svgElement("svg", {
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label":
      `At T = ${temperature} the norm is ${numberInWords(now)}, ` +
      `without T² it would be ${numberInWords(now / temperature ** 2)}.`,
  });
  for (const value of [0, largest / 2, largest]) {
    svg.append(
      svgElement("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      svgElement("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, shortNumber(value)),
    );
  }
  for (const T of [0.5, 1, 2, 5, 10, 20]) {
    const label = { x: x(T), y: height - bottom + 18, "text-anchor": T === 20 ? "end" : "middle" };
    svg.append(svgElement("text", label, String(T)));
  }
  svg.append(
    svgElement("text", { x: (left + width) / 2, y: height - 6, "text-anchor": "middle" },
      "temperature T"),
    svgElement("text", { x: 0, y: 13 }, "norm of the gradient"),
    svgElement("line", { class: "now", x1: x(temperature), x2: x(temperature), y1: top, y2: y(0) }),
    svgElement("path", { class: "curve without", d: path(normsWithout) }),
    svgElement("path", { class: "curve", d: path(norms) }),
  );
  place.replaceChildren(svg);
}

function shortNumber(value) {
  return String(Number(value.toPrecision(2)));
}
