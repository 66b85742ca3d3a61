// Few pixels made many, as a good scaler of photographs does: a browser's own way, between the four
// nearest pixels, leaves small frames blurred.

const REACH = 3; // pixels on either side that count
const MOST = 4; // enlarged by more than this no eye sees the difference to the browser's way
const ENOUGH = 80_000; // pixels of an enlarged frame: about two milliseconds

/** By how much frames of a size are enlarged before the browser does the rest; 1: not at all.
 *  `wanted` is how many screen pixels there are to a pixel. */
export function factorOf(width, height, wanted) {
  const most = Math.min(MOST, Math.floor(Math.sqrt(ENOUGH / (width * height))));
  return Math.max(1, Math.min(most, Math.ceil(wanted)));
}

/** Lanczos' kernel: the ideal low-pass, faded out at `REACH`. */
function kernel(x) {
  if (x === 0) return 1;
  if (Math.abs(x) >= REACH) return 0;
  const angle = Math.PI * x;
  return (REACH * Math.sin(angle) * Math.sin(angle / REACH)) / (angle * angle);
}

/** Where each of `size * factor` pixels takes its colour from: 2 * REACH places and their weights.
 *  Beyond an edge is nothing; what is there counts the more. */
function taps(size, factor) {
  const num = 2 * REACH;
  const places = new Int32Array(size * factor * num);
  const weights = new Float32Array(size * factor * num);
  for (let pixel = 0; pixel < size * factor; pixel++) {
    const centre = (pixel + 0.5) / factor - 0.5;
    const first = Math.floor(centre) - REACH + 1;
    let sum = 0;
    for (let tap = 0; tap < num; tap++) {
      const place = first + tap;
      if (place < 0 || place >= size) continue;
      const weight = kernel(place - centre);
      places[pixel * num + tap] = place;
      weights[pixel * num + tap] = weight;
      sum += weight;
    }
    for (let tap = 0; tap < num; tap++) weights[pixel * num + tap] /= sum;
  }
  return { places, weights };
}

/** Enlarges frames of one size. */
export class Enlarger {
  constructor(width, height, factor) {
    Object.assign(this, { width, height, factor });
    this.image = new ImageData(width * factor, height * factor);
    this.image.data.fill(255);
    this.across = taps(width, factor);
    this.down = taps(height, factor);
    this.rows = new Float32Array(width * factor * height * 3);
  }

  /** Return the picture of 8-bit RGBA values; it is overwritten by the next one. */
  enlarge(data) {
    const { width, height, factor, rows, image } = this;
    const num = 2 * REACH;
    const wide = width * factor;
    const { places, weights } = this.across;
    for (let row = 0; row < height; row++) {
      for (let column = 0; column < wide; column++) {
        let red = 0, green = 0, blue = 0;
        for (let tap = column * num; tap < (column + 1) * num; tap++) {
          const at = 4 * (row * width + places[tap]);
          const weight = weights[tap];
          red += weight * data[at];
          green += weight * data[at + 1];
          blue += weight * data[at + 2];
        }
        const to = 3 * (row * wide + column);
        rows[to] = red;
        rows[to + 1] = green;
        rows[to + 2] = blue;
      }
    }
    const out = image.data;
    for (let row = 0; row < height * factor; row++) {
      const [a, b, c, d, e, f] = this.down.weights.subarray(row * num, (row + 1) * num);
      const [ra, rb, rc, rd, re, rf] = this.down.places
        .subarray(row * num, (row + 1) * num).map((place) => 3 * place * wide);
      for (let entry = 0, to = 4 * row * wide; entry < 3 * wide; entry += 3, to += 4) {
        for (let colour = 0; colour < 3; colour++) {
          const at = entry + colour;
          // The array rounds and clips.
          out[to + colour] = a * rows[ra + at] + b * rows[rb + at] + c * rows[rc + at]
            + d * rows[rd + at] + e * rows[re + at] + f * rows[rf + at];
        }
      }
    }
    return image;
  }
}
