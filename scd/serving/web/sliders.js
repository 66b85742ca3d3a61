// Steering of worlds whose action is a vector: a slider for each entry, the first two on keys.

import { element, shownName } from "./steering.js";

const KEYS = {
  ArrowLeft: [0, -1], KeyA: [0, -1], ArrowRight: [0, 1], KeyD: [0, 1],
  ArrowDown: [1, -1], KeyS: [1, -1], ArrowUp: [1, 1], KeyW: [1, 1],
};

export class Sliders {
  /** As Steering: `hold(action, time)` is told of every change, `press` of every press. */
  constructor(pad, hold, press) {
    Object.assign(this, { pad, hold, press });
    this.keeps = false;
    this.enabled = () => true;
    this.idle = null;
    this.names = [];
    this.inputs = [];
    this.down = new Map();
    window.addEventListener("blur", () => this.release());
  }

  get held() {
    return this.inputs.map((input) => Number(input.value));
  }

  /** Pairs of keys that move the first entries, [keys, words]. */
  get keys() {
    return ["A D", "S W"].slice(0, this.inputs.length).map((keys, entry) => [keys, this.name(entry)]);
  }

  get pulls() {
    return false;
  }

  name(entry) {
    return this.names[entry]?.replaceAll("_", " ") ?? `entry ${entry + 1}`;
  }

  show(names, size) {
    this.names = names;
    this.pad.replaceChildren();
    this.inputs = Array.from({ length: size }, (_, entry) => {
      const row = element("label", "entry", {}, this.name(entry));
      const input = element("input", "", { type: "range", min: -1, max: 1, step: 0.01, value: 0 });
      const told = element("output", "", {}, "0.00");
      row.append(input, told);
      this.pad.append(row);
      input.addEventListener("input", (event) => this._changed(event.timeStamp));
      input.addEventListener("change", (event) => {
        if (!this.keeps) this._back(input, event.timeStamp);
        this.press(this.held);
      });
      return input;
    });
  }

  obeyed(action) {
    this.inputs.forEach((input, entry) => {
      const value = Array.isArray(action) ? action[entry] : null;
      input.nextElementSibling.textContent = value === null ? "–" : value.toFixed(2);
    });
  }

  key(event, down) {
    const [entry, value] = KEYS[event.code] ?? [];
    if (entry === undefined || entry >= this.inputs.length) return false;
    if (event.repeat || (down && !this.enabled())) return true;
    if (down) this.down.set(event.code, [entry, value]);
    else this.down.delete(event.code);
    const last = [...this.down.values()].filter(([at]) => at === entry).at(-1);
    if (last !== undefined || !this.keeps) this.inputs[entry].value = last?.[1] ?? 0;
    this._changed(event.timeStamp);
    if (down) this.press(this.held);
    return true;
  }

  release() {
    this.down.clear();
    if (this.keeps || !this.inputs.length) return;
    for (const input of this.inputs) input.value = 0;
    this._changed(performance.now());
  }

  _back(input, time) {
    input.value = 0;
    this._changed(time);
  }

  _changed(time) {
    this.hold(this.held, time);
  }
}

/** An action of any kind in words. */
export function actionText(action, names) {
  if (Array.isArray(action)) return action.map((entry) => entry.toFixed(2)).join("  ");
  return action in names ? shownName(names[action]) : String(action);
}
