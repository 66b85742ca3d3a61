// The noise of a stream, as scd/streaming/noise.py draws it: BLAKE2b of seed, purpose and frame seeds
// a Mersenne Twister, whose draws become normal as those of torch.randn on a CPU do.

const MASK = (1n << 64n) - 1n;
const IV = [
  0x6a09e667f3bcc908n, 0xbb67ae8584caa73bn, 0x3c6ef372fe94f82bn, 0xa54ff53a5f1d36f1n,
  0x510e527fade682d1n, 0x9b05688c2b3e6c1fn, 0x1f83d9abfb41bd6bn, 0x5be0cd19137e2179n,
];
const ORDER = [
  [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
  [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
  [11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4],
  [7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8],
  [9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13],
  [2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9],
  [12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11],
  [13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10],
  [6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5],
  [10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0],
];
const COLUMNS = [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]];
const DIAGONALS = [[0, 5, 10, 15], [1, 6, 11, 12], [2, 7, 8, 13], [3, 4, 9, 14]];

const turned = (value, by) => ((value >> by) | (value << (64n - by))) & MASK;

/** The first 8 bytes, little-endian, of BLAKE2b (8 bytes) of a text of up to 128. */
export function blake2b(text) {
  const bytes = new TextEncoder().encode(text);
  if (bytes.length > 128) throw new RangeError("the text has more than 128 bytes");
  const block = new Uint8Array(128);
  block.set(bytes);
  const view = new DataView(block.buffer);
  const words = Array.from({ length: 16 }, (_, at) => view.getBigUint64(8 * at, true));
  const first = IV[0] ^ 0x01010000n ^ 8n;
  const v = [first, ...IV.slice(1), ...IV];
  v[12] ^= BigInt(bytes.length);
  v[14] ^= MASK;
  for (let round = 0; round < 12; round += 1) {
    const order = ORDER[round % 10];
    [...COLUMNS, ...DIAGONALS].forEach(([a, b, c, d], at) => {
      v[a] = (v[a] + v[b] + words[order[2 * at]]) & MASK;
      v[d] = turned(v[d] ^ v[a], 32n);
      v[c] = (v[c] + v[d]) & MASK;
      v[b] = turned(v[b] ^ v[c], 24n);
      v[a] = (v[a] + v[b] + words[order[2 * at + 1]]) & MASK;
      v[d] = turned(v[d] ^ v[a], 16n);
      v[c] = (v[c] + v[d]) & MASK;
      v[b] = turned(v[b] ^ v[c], 63n);
    });
  }
  return first ^ v[0] ^ v[8];
}

/** What a seed, a purpose and numbers seed: scd.common.runtime.derive_seed. */
export function deriveSeed(seed, purpose, ...numbers) {
  return blake2b([seed, purpose, ...numbers].join("/")) >> 1n;
}

/** Normal draws, one array after another. */
export class Normal {
  constructor(seed) {
    const state = new Uint32Array(624);
    state[0] = Number(seed & 0xffffffffn);
    for (let at = 1; at < 624; at += 1) {
      const before = state[at - 1] ^ (state[at - 1] >>> 30);
      state[at] = Math.imul(1812433253, before) + at;
    }
    this.state = state;
    this.next = 624;
  }

  _uniform() {
    if (this.next === 624) this._refill();
    let x = this.state[this.next++];
    x ^= x >>> 11;
    x ^= (x << 7) & 0x9d2c5680;
    x ^= (x << 15) & 0xefc60000;
    x ^= x >>> 18;
    return (x & 0xffffff) / 0x1000000;
  }

  _refill() {
    const { state } = this;
    for (let at = 0; at < 624; at += 1) {
      const mixed = (state[at] & 0x80000000) | (state[(at + 1) % 624] & 0x7fffffff);
      state[at] = state[(at + 397) % 624] ^ (mixed >>> 1) ^ (mixed & 1 ? 0x9908b0df : 0);
    }
    this.next = 0;
  }

  /** Draw `size` values, 16 or more: in groups of 16 by Box and Muller; the last 16 are drawn
   *  anew where the size is no multiple. */
  draw(size) {
    if (size < 16) throw new RangeError(`noise has 16 values or more, got ${size}`);
    const values = new Float32Array(size);
    for (let at = 0; at < size; at += 1) values[at] = this._uniform();
    for (let from = 0; from + 16 <= size; from += 16) this._normal(values, from);
    if (size % 16) {
      for (let at = size - 16; at < size; at += 1) values[at] = this._uniform();
      this._normal(values, size - 16);
    }
    return values;
  }

  _normal(values, from) {
    for (let at = from; at < from + 8; at += 1) {
      const radius = Math.sqrt(-2 * Math.log(1 - values[at]));
      const angle = 2 * Math.PI * values[at + 8];
      values[at] = radius * Math.cos(angle);
      values[at + 8] = radius * Math.sin(angle);
    }
  }
}

/** Noise of a frame: "frame" where its denoising starts, "context" that corrupts its context. */
export function frameNoise(seed, frame, use, size) {
  return new Normal(deriveSeed(seed, `noise of a ${use}`, frame)).draw(size);
}

/** Noises with which the first steps of a frame end. */
export function stepNoises(seed, frame, number, size) {
  if (!number) return [];
  const normal = new Normal(deriveSeed(seed, "noise of a step", frame));
  return Array.from({ length: number }, () => normal.draw(size));
}
