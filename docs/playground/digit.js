// From ink on a canvas to the 28×28 numbers that the networks were trained on.
//
// MNIST's digits were scaled to fit a box of 20×20 pixels, aspect ratio kept, with anti-aliasing.
// Then each was moved by whole pixels, so that its centre of mass lies at the centre of the 28×28
// image. A drawn digit gets the same treatment here. Pure functions: no canvas, no document.

/** Height and width of an image, in pixels. */
export const FIELD = 28;
/** The longer side of a digit, in pixels. */
const BOX = 20;
/** MNIST's centre of mass lies between 13.5 and 14.5, counted from 0 at the first pixel's middle. */
const CENTRE = 14;
/** Ink weaker than this is not counted as part of the digit's box: a smoothed edge reaches too far. */
const THRESHOLD = 0.3;

/**
 * Brings ink to MNIST's form.
 *
 * @param {Float32Array} ink - height × width values row by row, from 0 (background) to 1 (ink)
 * @param {number} width - of the ink, in pixels
 * @param {number} height - of the ink, in pixels
 * @returns {Float32Array | null} 28 × 28 values row by row, from 0 to 1; null where there is no ink
 */
export function normaliseDigit(ink, width, height) {
  const box = boundingBox(ink, width, height);
  if (box === null) {
    return null;
  }
  // One pixel of the small image covers `step` pixels of the drawing. The box's top left corner
  // comes to (4, 4), so that the longer side fills the pixels from 4 to 23.
  const step = Math.max(box.right - box.left, box.bottom - box.top) / BOX;
  const margin = (FIELD - BOX) / 2;
  const columns = coverage(box.left - margin * step, step, width);
  const rows = coverage(box.top - margin * step, step, height);
  const scaled = areaAverage(ink, width, rows, columns);

  const centre = centreOfMass(scaled);
  const right = wholePixels(CENTRE - centre.x, margin, (box.right - box.left) / step);
  const down = wholePixels(CENTRE - centre.y, margin, (box.bottom - box.top) / step);
  return shift(scaled, right, down);
}

/**
 * The smallest box that holds all ink.
 *
 * @returns {{left: number, top: number, right: number, bottom: number} | null} in pixels, right and
 *   bottom being the first column and row outside; null where there is no ink
 */
function boundingBox(ink, width, height) {
  let left = width;
  let right = 0;
  let top = height;
  let bottom = 0;
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      if (ink[y * width + x] >= THRESHOLD) {
        left = Math.min(left, x);
        right = Math.max(right, x + 1);
        top = Math.min(top, y);
        bottom = Math.max(bottom, y + 1);
      }
    }
  }
  return right === 0 ? null : { left, top, right, bottom };
}

/**
 * Which pixels of the drawing lie under each of the small image's 28 pixels, along one axis.
 *
 * @param {number} start - where the first small pixel begins, in pixels of the drawing
 * @param {number} step - size of a small pixel, in pixels of the drawing
 * @param {number} size - of the drawing, in pixels
 * @returns {{index: number, share: number}[][]} for each small pixel, the pixels below and the share
 *   of the small pixel that each covers; the shares sum to 1 unless it lies partly outside
 */
function coverage(start, step, size) {
  const covered = [];
  for (let i = 0; i < FIELD; i += 1) {
    const from = start + i * step;
    const to = from + step;
    const parts = [];
    for (let index = Math.max(0, Math.floor(from)); index < Math.min(size, to); index += 1) {
      const overlap = Math.min(index + 1, to) - Math.max(index, from);
      parts.push({ index, share: overlap / step });
    }
    covered.push(parts);
  }
  return covered;
}

/** The mean of the ink under each of the 28 × 28 pixels. */
function areaAverage(ink, width, rows, columns) {
  const mean = new Float32Array(FIELD * FIELD);
  for (let r = 0; r < FIELD; r += 1) {
    for (let c = 0; c < FIELD; c += 1) {
      let sum = 0;
      for (const row of rows[r]) {
        for (const column of columns[c]) {
          sum += row.share * column.share * ink[row.index * width + column.index];
        }
      }
      mean[r * FIELD + c] = sum;
    }
  }
  return mean;
}

/** The centre of mass of 28 × 28 values, in pixels from the middle of the first one. */
function centreOfMass(pixels) {
  let mass = 0;
  let x = 0;
  let y = 0;
  for (let r = 0; r < FIELD; r += 1) {
    for (let c = 0; c < FIELD; c += 1) {
      const value = pixels[r * FIELD + c];
      mass += value;
      x += value * c;
      y += value * r;
    }
  }
  return { x: x / mass, y: y / mass };
}

/** How far to move a digit that begins at `first` and has this length, all in pixels: the distance in
 *  whole pixels, but not so far that it leaves the field. */
function wholePixels(distance, first, length) {
  const most = FIELD - first - Math.ceil(length);
  return Math.max(-first, Math.min(most, Math.round(distance)));
}

/** The image moved right and down by whole pixels. What is moved in is empty. */
function shift(pixels, right, down) {
  const moved = new Float32Array(FIELD * FIELD);
  for (let r = 0; r < FIELD; r += 1) {
    for (let c = 0; c < FIELD; c += 1) {
      const fromRow = r - down;
      const fromColumn = c - right;
      const inside = fromRow >= 0 && fromRow < FIELD && fromColumn >= 0 && fromColumn < FIELD;
      if (inside) {
        moved[r * FIELD + c] = pixels[fromRow * FIELD + fromColumn];
      }
    }
  }
  return moved;
}
