// Table cells with a bar and a number, for the probabilities of the ten digits.

import { argmax } from "./loss.js";
import { element, percentInWords } from "./page.js";

/** Ten empty table cells. `key` is a network's: its colour stands in style.css. */
export function probabilityCells(key) {
  return Array.from({ length: 10 }, () => {
    const bar = element("span", { class: `bar ${key}` });
    const track = element("span", { class: "track", "aria-hidden": "true" }, bar);
    const number = element("data", { value: "" }, "–");
    return element("td", {}, element("div", { class: "probability" }, track, number));
  });
}

/** Shows ten probabilities in their cells; with null, none. */
export function showProbabilities(cells, probabilities) {
  const top = probabilities && argmax(probabilities);
  cells.forEach((cell, digit) => {
    const bar = cell.querySelector(".bar");
    const number = cell.querySelector("data");
    cell.classList.toggle("top", digit === top);
    bar.style.width = probabilities ? `${100 * probabilities[digit]}%` : "0";
    number.value = probabilities ? probabilities[digit] : "";
    number.textContent = probabilities ? percentInWords(probabilities[digit]) : "–";
  });
}
