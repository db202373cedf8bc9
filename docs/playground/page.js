// What the three panels share: elements, problems, numbers in words, the slider of the temperature.

/**
 * Makes an element, of HTML or, with `svgElement`, of SVG.
 *
 * @param {string} name - such as "td"
 * @param {object} attributes - such as { scope: "row" }
 * @param {...(Node | string)} children
 */
export function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function svgElement(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

/** The element of the page with an id. */
export function byId(id) {
  return document.getElementById(id);
}

const problems = new Set();

/** Says at the top of the page, in a sentence, what went wrong. The same is said once. */
export function reportProblem(text) {
  problems.add(text.endsWith(".") ? text : `${text}.`);
  byId("status").classList.add("error");
  byId("status").textContent = [...problems].join(" ");
}

const SPACE = "\u00a0"; // keeps a number and its unit in one line

/** 3795493 → "3.80 MB"; 62122 → "62.1 kB". */
export function bytesInWords(bytes) {
  if (bytes >= 1e6) {
    return `${(bytes / 1e6).toFixed(2)}${SPACE}MB`;
  }
  return `${(bytes / 1e3).toPrecision(3)}${SPACE}kB`;
}

/** 0.98765 → "98.8 %". What rounds to nothing, or to all, is said to be less. */
export function percentInWords(share) {
  const percent = 100 * share;
  if (percent > 0 && percent < 0.05) {
    return `<${SPACE}0.1${SPACE}%`;
  }
  if (percent < 100 && percent > 99.95) {
    return `>${SPACE}99.9${SPACE}%`;
  }
  return `${percent.toFixed(1)}${SPACE}%`;
}

/** 0.98765 → "99 %": for what is read aloud. */
export function roundPercent(share) {
  const percent = Math.round(100 * share);
  return percent === 100 && share < 1 ? `over 99${SPACE}%` : `${percent}${SPACE}%`;
}

/** An accuracy from 0 to 1 as errors: 0.9917 → "0.83 %". */
export function errorsInWords(accuracy) {
  return `${(100 * (1 - accuracy)).toFixed(2)}${SPACE}%`;
}

/** 56714 → "56,714". */
export function countInWords(count) {
  return count.toLocaleString("en");
}

/** 0.0012345 → "0.00123". What is tiny is said to be less. */
export function numberInWords(value) {
  if (value > 0 && value < 1e-4) {
    return `<${SPACE}0.0001`;
  }
  return String(Number(value.toPrecision(3)));
}

/** The temperatures on a slider: each about an eighth above the one before. */
export const TEMPERATURES = [
  0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.4, 1.6, 1.8, 2, 2.3, 2.6, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9, 10,
  12, 14, 16, 18, 20,
];

/**
 * Makes a range input choose one of TEMPERATURES.
 *
 * @param {HTMLInputElement} slider
 * @param {HTMLOutputElement} output - shows the temperature
 * @param {number} start - one of TEMPERATURES
 * @param {(temperature: number) => void} onMove - called for every move
 * @returns {() => number} what says the temperature
 */
export function temperatureSlider(slider, output, start, onMove) {
  const temperature = () => TEMPERATURES[Number(slider.value)];
  const show = () => {
    output.value = `T = ${temperature()}`;
    slider.setAttribute("aria-valuetext", output.value);
  };
  slider.min = 0;
  slider.max = TEMPERATURES.length - 1;
  slider.step = 1;
  slider.value = TEMPERATURES.indexOf(start);
  show();
  slider.addEventListener("input", () => {
    show();
    onMove(temperature());
  });
  return temperature;
}
