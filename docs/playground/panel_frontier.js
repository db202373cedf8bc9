// The third panel: size and errors of every network, as a chart of links and as a table.

import { byId, bytesInWords, countInWords, element, errorsInWords, svgElement } from "./page.js";

const HEIGHT = 420;
const MARGIN = { left: 56, right: 16, top: 24, bottom: 48 };
const LINE = 15; // height of a label, in pixels
const LETTER = 6.6; // width of a letter, in pixels

/** Starts the panel. `data.frontier` has a row for each network: name, key, test_accuracy, seeds,
 *  bytes and gzip_bytes (null where it was not exported), script. */
export function startFrontier(data) {
  const networks = data.frontier;
  const images = countInWords(data.test_images);
  byId("frontier-caption").textContent = `All networks. Errors on ${images} test images`;
  byId("command").textContent = data.command;
  for (const network of networks) {
    byId("frontier-rows").append(tableRow(network));
  }
  const draw = () => {
    const size = document.querySelector("input[name=size]:checked").value;
    drawFrontier(byId("frontier"), networks, size);
  };
  for (const choice of document.querySelectorAll("input[name=size]")) {
    choice.addEventListener("change", draw);
  }
  for (const line of document.querySelectorAll(".legend li")) {
    line.prepend(legendMarker(line.dataset.key));
  }
  // A phone says "resize" when its bars come and go, too: the chart stays, and what has the focus.
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) {
      width = window.innerWidth;
      draw();
    }
  });
  draw();
}

function errorsOf(network) {
  return 1 - network.test_accuracy;
}

function tableRow(network) {
  const link = element("a", { href: network.script }, network.name);
  const size = (bytes) => (bytes === null ? "–" : bytesInWords(bytes));
  return element(
    "tr",
    {},
    element("th", { scope: "row" }, legendMarker(network.key), link),
    element("td", {}, element("data", { value: errorsOf(network) }, errorsInWords(network.test_accuracy))),
    element("td", {}, size(network.bytes)),
    element("td", {}, size(network.gzip_bytes)),
    element("td", {}, String(network.seeds)),
  );
}

/** Those of the networks that no other beats in size without losing in errors, from small to large.
 *  `size` is "bytes" or "gzip_bytes". */
export function findFrontier(networks, size) {
  const sorted = [...networks].sort((a, b) => a[size] - b[size] || errorsOf(a) - errorsOf(b));
  const frontier = [];
  for (const network of sorted) {
    if (frontier.length === 0 || errorsOf(network) < errorsOf(frontier.at(-1))) {
      frontier.push(network);
    }
  }
  return frontier;
}

/** Draws the chart anew, as wide as its place. `size` is "bytes" or "gzip_bytes". */
function drawFrontier(place, networks, size) {
  const points = networks.filter((network) => network[size] !== null);
  const width = Math.max(280, place.clientWidth);
  const xDigits = width < 560 ? [1] : [1, 2, 5];
  const x = logScale(points.map((point) => point[size]), MARGIN.left, width - MARGIN.right, xDigits);
  const errors = points.map(errorsOf);
  // The fewer powers of ten there are, the more lines.
  const isShort = Math.max(...errors) < 5 * Math.min(...errors);
  const yDigits = isShort ? [1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9] : [1, 2, 5];
  const y = logScale(errors, HEIGHT - MARGIN.bottom, MARGIN.top, yDigits);

  const frontier = findFrontier(points, size);
  const names = frontier.map((point) => point.name).join("; ");
  const svg = svgElement("svg", {
    viewBox: `0 0 ${width} ${HEIGHT}`,
    role: "group",
    "aria-label":
      "Networks by size and errors. The table below has the same data. " +
      `On the frontier, from small to large: ${names}.`,
  });
  for (const bytes of x.ticks) {
    const place = x(bytes);
    svg.append(
      svgElement("line", { class: "grid", x1: place, x2: place, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }),
      svgElement("text", { x: place, y: HEIGHT - MARGIN.bottom + 18, "text-anchor": "middle" },
        tickInWords(bytes)),
    );
  }
  for (const tick of y.ticks) {
    const place = y(tick);
    svg.append(
      svgElement("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: place, y2: place }),
      svgElement("text", { x: MARGIN.left - 6, y: place + 4, "text-anchor": "end" },
        `${Number((100 * tick).toPrecision(2))} %`),
    );
  }
  const middle = (MARGIN.left + width) / 2;
  const axis = size === "bytes" ? "size of the ONNX file" : "size of the ONNX file, packed by gzip";
  svg.append(
    svgElement("text", { x: middle, y: HEIGHT - 8, "text-anchor": "middle" }, axis),
    svgElement("text", { x: 0, y: 13 }, "test errors"),
  );
  const line = frontier.map((point) => `${x(point[size])},${y(errorsOf(point))}`).join(" ");
  svg.append(svgElement("polyline", { class: "frontier-line", points: line }));

  const dots = points.map((point) => ({ point, x: x(point[size]), y: y(errorsOf(point)) }));
  const labels = placeLabels(dots, width);
  const raised = svgElement("g", { class: "raised", "aria-hidden": "true" });
  dots.forEach((dot, k) => {
    const link = dotLink(dot, labels[k], size);
    for (const event of ["pointerenter", "focus"]) {
      link.addEventListener(event, () => raiseDot(raised, dot, labels[k], width));
    }
    for (const event of ["pointerleave", "blur"]) {
      link.addEventListener(event, () => raised.replaceChildren());
    }
    svg.append(link);
  });
  svg.append(raised);
  place.replaceChildren(svg);
}

/** Shows a dot above all others, filled, with its name: where it stands already, else above the dot. */
function raiseDot(raised, { point, x, y }, label, width) {
  const length = point.name.length * LETTER;
  const above = { x: Math.max(0, Math.min(width - length, x - length / 2)), y: y - 16 };
  const place = label ?? above;
  raised.setAttribute("class", `raised ${point.key}`);
  raised.replaceChildren(
    marker(point.key, x, y),
    svgElement("text", { x: place.x, y: place.y }, point.name),
  );
}

function dotLink({ point, x, y }, label, size) {
  const text = `${point.name}: ${errorsInWords(point.test_accuracy)} errors, ${bytesInWords(point[size])}`;
  const link = svgElement("a", { href: point.script, "aria-label": text, class: point.key });
  link.append(svgElement("title", {}, text));
  if (label) {
    link.append(
      svgElement("text", { x: label.x, y: label.y, "aria-hidden": "true" }, point.name),
    );
  }
  link.append(marker(point.key, x, y));
  return link;
}

/** The marker of a kind of networks, for a line of text. */
function legendMarker(key) {
  const viewBox = "-12 -12 24 24";
  return svgElement("svg", { class: `sample ${key}`, viewBox, "aria-hidden": "true" }, marker(key, 0, 0));
}

/** Networks differ in shape, too, for those who do not see the colours apart. */
function marker(key, x, y) {
  if (key === "teacher") {
    return svgElement("rect", { class: "dot", x: x - 7, y: y - 7, width: 14, height: 14 });
  }
  if (key === "baseline") {
    const corners = `${x},${y - 9} ${x + 9},${y + 7} ${x - 9},${y + 7}`;
    return svgElement("polygon", { class: "dot", points: corners });
  }
  if (key === "alone") {
    const corners = `${x},${y - 9} ${x + 9},${y} ${x},${y + 9} ${x - 9},${y}`;
    return svgElement("polygon", { class: "dot", points: corners });
  }
  return svgElement("circle", { class: "dot", cx: x, cy: y, r: key === "shipped" ? 10 : 7 });
}

/**
 * A place for each name beside its dot, where it covers no other dot and no other name. A name that
 * finds none is left out: the dot says it when it is pointed at, and so does the table.
 */
function placeLabels(dots, width) {
  const taken = dots.map((dot) => ({ left: dot.x - 9, right: dot.x + 9, top: dot.y - 9, bottom: dot.y + 9 }));
  // The best known networks choose their places first.
  const isKnown = ({ point }) => point.key === "shipped" || !point.name.includes(",");
  const known = dots.filter(isKnown);
  const others = dots.filter((dot) => !isKnown(dot));
  const labels = new Map();
  for (const dot of [...known, ...others]) {
    labels.set(dot, placeLabel(dot, taken, width));
  }
  return dots.map((dot) => labels.get(dot));
}

/** The first place beside a dot where its name fits, {x, y, length}, or null. Adds it to `taken`. */
function placeLabel(dot, taken, width) {
  const length = dot.point.name.length * LETTER;
  const offsets = [
    { x: 13, y: 5 },
    { x: -16 - length, y: 5 },
    { x: 10, y: -11 },
    { x: 10, y: 21 },
    { x: -10 - length, y: -11 },
    { x: -10 - length, y: 21 },
    { x: -length / 2, y: -14 },
    { x: -length / 2, y: 24 },
  ];
  for (const offset of offsets) {
    const label = { x: dot.x + offset.x, y: dot.y + offset.y, length };
    const box = { left: label.x, right: label.x + length, top: label.y - LINE + 3, bottom: label.y + 3 };
    const isInside =
      box.left >= MARGIN.left &&
      box.right <= width &&
      box.top >= 0 &&
      box.bottom <= HEIGHT - MARGIN.bottom;
    if (isInside && !taken.some((other) => overlap(box, other))) {
      taken.push(box);
      return label;
    }
  }
  return null;
}

function overlap(a, b) {
  return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
}

/** A logarithmic scale with some room at both ends. Its `ticks` are the digits times powers of ten. */
function logScale(values, from, to, digits) {
  const low = Math.min(...values) / 1.15;
  const high = Math.max(...values) * 1.15;
  const scale = (value) => from + (Math.log(value / low) / Math.log(high / low)) * (to - from);
  scale.ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
    for (const digit of digits) {
      const tick = Number(`${digit}e${power}`);
      if (tick >= low && tick <= high) {
        scale.ticks.push(tick);
      }
    }
  }
  return scale;
}

/** 50000 → "50 kB". */
function tickInWords(bytes) {
  return bytes >= 1e6 ? `${bytes / 1e6} MB` : `${bytes / 1e3} kB`;
}
