// The drawing area: white ink on black, by mouse, finger, pen or keyboard.

import { FIELD } from "./digit.js";

/** Width and height of the drawing, in its own pixels: ten for each of MNIST's. */
export const SIZE = 280;
/** Width of a stroke. Digits drawn to fill most of the area get strokes as thick as MNIST's. */
const STROKE = 24;
/** How far an arrow key moves the pen. */
const KEY_STEP = 10;

const ARROWS = {
  ArrowLeft: [-1, 0],
  ArrowRight: [1, 0],
  ArrowUp: [0, -1],
  ArrowDown: [0, 1],
};

export class Board {
  /**
   * @param {HTMLCanvasElement} canvas - SIZE × SIZE
   * @param {HTMLElement} pen - a mark that shows where the keyboard's pen is
   * @param {() => void} onInk - called whenever the ink has changed
   * @param {() => void} onStrokeEnd - called when a stroke has ended, or the area was cleared
   * @param {(text: string) => void} onPen - called with words when the keyboard's pen goes up or down
   */
  constructor(canvas, pen, { onInk, onStrokeEnd, onPen }) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.penMark = pen;
    this.onInk = onInk;
    this.onStrokeEnd = onStrokeEnd;
    this.onPen = onPen;
    this.pointer = null; // which mouse or finger draws, and where it is: {id, x, y}
    this.pen = { x: SIZE / 2, y: SIZE / 4 }; // where the keyboard's pen is
    this.penIsDown = false;
    this.wipe();
    this.movePenMark();

    canvas.addEventListener("pointerdown", (event) => this.startStroke(event));
    canvas.addEventListener("pointermove", (event) => this.continueStroke(event));
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) {
      canvas.addEventListener(end, (event) => this.endStroke(event));
    }
    canvas.addEventListener("keydown", (event) => this.pressKey(event));
    canvas.addEventListener("blur", () => this.liftPen());
  }

  /** The ink, SIZE × SIZE values from 0 to 1, row by row. */
  ink() {
    const { data } = this.context.getImageData(0, 0, SIZE, SIZE);
    const ink = new Float32Array(SIZE * SIZE);
    for (let k = 0; k < ink.length; k += 1) {
      ink[k] = data[4 * k] / 255; // red: the drawing is grey
    }
    return ink;
  }

  /** Takes all ink away. */
  clear() {
    this.liftPen();
    this.wipe();
    this.onInk();
    this.onStrokeEnd();
  }

  /** Puts a test image in the drawing's place, each of its pixels as a square of 10 × 10.
   *  @param {Uint8Array} pixels - 28 × 28 values from 0 to 255 */
  paint(pixels) {
    this.liftPen();
    this.wipe();
    const small = document.createElement("canvas");
    showImage(small, pixels);
    this.context.imageSmoothingEnabled = false;
    this.context.drawImage(small, 0, 0, SIZE, SIZE);
    this.onInk();
    this.onStrokeEnd();
  }

  wipe() {
    this.context.fillStyle = "black";
    this.context.fillRect(0, 0, SIZE, SIZE);
  }

  /** Draws a line with round ends; a dot where both ends are the same. */
  line(from, to) {
    this.context.strokeStyle = "white";
    this.context.fillStyle = "white";
    this.context.lineWidth = STROKE;
    this.context.lineCap = "round";
    this.context.beginPath();
    this.context.moveTo(from.x, from.y);
    this.context.lineTo(to.x, to.y);
    this.context.stroke();
    this.context.beginPath();
    this.context.arc(to.x, to.y, STROKE / 2, 0, 2 * Math.PI);
    this.context.fill();
    this.onInk();
  }

  // Mouse, finger and pen

  startStroke(event) {
    // A second finger is not primary.
    if (!event.isPrimary || event.button !== 0) {
      return;
    }
    this.canvas.setPointerCapture(event.pointerId);
    this.pointer = { id: event.pointerId, ...this.toDrawing(event) };
    this.line(this.pointer, this.pointer);
  }

  continueStroke(event) {
    if (event.pointerId !== this.pointer?.id) {
      return;
    }
    // No button is pressed any more, and nobody said so: it may have been released elsewhere.
    if (event.buttons === 0) {
      this.endStroke(event);
      return;
    }
    // Between two frames a pointer may have been at several places.
    const places = event.getCoalescedEvents?.() ?? [];
    for (const place of places.length > 0 ? places : [event]) {
      const next = { id: event.pointerId, ...this.toDrawing(place) };
      this.line(this.pointer, next);
      this.pointer = next;
    }
  }

  endStroke(event) {
    if (event.pointerId === this.pointer?.id) {
      this.pointer = null;
      this.onStrokeEnd();
    }
  }

  /** Where an event is, in pixels of the drawing. */
  toDrawing(event) {
    const area = this.canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - area.left) / area.width) * SIZE,
      y: ((event.clientY - area.top) / area.height) * SIZE,
    };
  }

  // Keyboard

  pressKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) {
      return;
    }
    if (event.key in ARROWS) {
      this.movePen(ARROWS[event.key]);
    } else if (event.key === " ") {
      this.togglePen(event.repeat);
    } else if (event.key === "Delete" || event.key === "Backspace") {
      this.clear();
    } else {
      return;
    }
    event.preventDefault(); // an arrow key or Space would scroll the page
  }

  movePen([right, down]) {
    const inside = (value) => Math.max(0, Math.min(SIZE, value));
    const next = {
      x: inside(this.pen.x + right * KEY_STEP),
      y: inside(this.pen.y + down * KEY_STEP),
    };
    if (this.penIsDown) {
      this.line(this.pen, next);
    }
    this.pen = next;
    this.movePenMark();
  }

  togglePen(isRepeated) {
    if (isRepeated) {
      return;
    }
    if (this.penIsDown) {
      this.liftPen();
      return;
    }
    this.penIsDown = true;
    this.line(this.pen, this.pen);
    this.movePenMark();
    this.onPen(`Pen down, at ${this.penPlace()}.`);
  }

  liftPen() {
    if (this.penIsDown) {
      this.penIsDown = false;
      this.movePenMark();
      this.onPen(`Pen up, at ${this.penPlace()}.`);
      this.onStrokeEnd();
    }
  }

  /** Where the pen is, in words: columns and rows from 1 to 28. */
  penPlace() {
    const count = (pixels) => Math.min(FIELD, Math.floor(pixels / KEY_STEP) + 1);
    return `column ${count(this.pen.x)} and row ${count(this.pen.y)} of ${FIELD}`;
  }

  movePenMark() {
    this.penMark.style.left = `${(100 * this.pen.x) / SIZE}%`;
    this.penMark.style.top = `${(100 * this.pen.y) / SIZE}%`;
    this.penMark.classList.toggle("down", this.penIsDown);
  }
}

/**
 * Shows an image on a canvas, which is made 28 × 28 for it.
 *
 * @param {HTMLCanvasElement} canvas
 * @param {Uint8Array} pixels - 28 × 28 values from 0 (black) to 255 (white)
 */
export function showImage(canvas, pixels) {
  canvas.width = FIELD;
  canvas.height = FIELD;
  const image = new ImageData(FIELD, FIELD);
  pixels.forEach((value, k) => image.data.set([value, value, value, 255], 4 * k));
  canvas.getContext("2d").putImageData(image, 0, 0);
}
