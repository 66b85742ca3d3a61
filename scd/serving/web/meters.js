// What a frame costs and where, as numbers and as columns of the last frames.

const SHOWN = 120;
const KEPT = 300;
export const PARTS = ["queue", "encoder", "decoder", "autoencoder", "network", "browser"];
const CHARTED = ["encoder", "decoder", "autoencoder", "browser"];

/** The value below which a share of the values lies. */
export function quantile(values, share) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

export class Meters {
  constructor(chart, table) {
    this.chart = chart;
    this.table = table;
    this.clear();
    new ResizeObserver(() => this.draw()).observe(chart);
  }

  clear() {
    this.frames = [];
    this.times = [];
    this.latencies = [];
    this.network = null;
    this.sent = new Map();
  }

  /** Note that an action was sent because of an input at `time`. */
  acted(sequence, time) {
    this.sent.set(sequence, time);
  }

  /** Forget the actions that no frame has answered, since none is being made. */
  paused() {
    this.sent.clear();
    this.times = [];
  }

  /** Note a frame that is drawn. */
  frame(header, arrived, drawn) {
    if (header.shown) return;
    this.times.push(drawn);
    while (this.times.length > 2 && drawn - this.times[0] > 2500) this.times.shift();
    this.frames.push({
      queue: header.queued_ms,
      encoder: header.encoder_ms,
      decoder: header.decoder_ms,
      autoencoder: header.autoencoder_ms,
      browser: drawn - arrived,
      steps: header.steps,
    });
    if (this.frames.length > KEPT) this.frames.shift();
    for (const [sequence, time] of this.sent) {
      if (sequence > header.sequence) break;
      this.sent.delete(sequence);
      // One that another action replaced before a frame began has led to nothing.
      if (sequence === header.sequence) this.latencies.push(drawn - time);
    }
    if (this.latencies.length > KEPT) this.latencies.shift();
  }

  get framesPerSecond() {
    const { times } = this;
    if (times.length < 3 || performance.now() - times.at(-1) > 1500) return null;
    return ((times.length - 1) * 1000) / (times.at(-1) - times[0]);
  }

  /** Medians of the parts over the last frames, in milliseconds. */
  get medians() {
    const last = this.frames.slice(-60);
    const medians = {};
    for (const part of PARTS)
      medians[part] =
        part === "network" ? this.network : quantile(last.map((frame) => frame[part]), 0.5);
    return medians;
  }

  /** Write the numbers and draw the columns. */
  draw() {
    const numbers = {
      fps: this.framesPerSecond,
      steps: this.frames.at(-1)?.steps ?? null,
      p50: quantile(this.latencies, 0.5),
      p99: quantile(this.latencies, 0.99),
      ...this.medians,
    };
    for (const cell of this.table.querySelectorAll("[data-number]")) {
      const value = numbers[cell.dataset.number];
      const digits = value >= 100 || cell.dataset.number === "steps" ? 0 : 1;
      const text = value === null || value === undefined ? "–" : value.toFixed(digits);
      if (cell.textContent !== text) cell.textContent = text;
    }
    this._columns();
  }

  _columns() {
    const { chart } = this;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [chart.clientWidth, chart.clientHeight];
    if (!width) return;
    chart.width = Math.round(width * ratio);
    chart.height = Math.round(height * ratio);
    const context = chart.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(chart);
    const frames = this.frames.slice(-SHOWN);
    const totals = frames.map((frame) => CHARTED.reduce((sum, part) => sum + frame[part], 0));
    const top = niceTop(quantile(totals, 0.98) ?? 10);
    const column = width / SHOWN;
    frames.forEach((frame, place) => {
      let y = height;
      for (const part of CHARTED) {
        const high = (frame[part] / top) * (height - 14);
        context.fillStyle = style.getPropertyValue(`--${part}`);
        context.fillRect(place * column, y - high, Math.max(1, column - 0.6), high);
        y -= high;
      }
    });
    context.fillStyle = style.getPropertyValue("--soft");
    context.font = "11px system-ui, sans-serif";
    context.fillText(`${top} ms`, 0, 10);
    context.globalAlpha = 0.25;
    context.fillRect(0, 13.5, width, 1);
  }
}

function niceTop(value) {
  for (let power = 1; power < 1e6; power *= 10)
    for (const step of [1, 2, 5]) if (step * power >= value) return step * power;
  return 1e6;
}
