// Controls -> the action that is held: keys together, axes, sliders, the keys on the page.

import { entriesOf, shownName } from "./parts.js";

const SIGNS = { up: "↑", left: "←", down: "↓", right: "→" };
const HALF = 0.3; // of an axis, from which on half of it counts as a key that is held
const MOST_BUTTONS = 12; // choices of an entry that have a button each

export class Steering {
  /** `hold(action, time, released)` is told whenever another action is held, `press(action)` of
   *  every press; `isWaiting()` says whether a frame has yet to obey what is held. */
  constructor(pad, hold, press, isWaiting) {
    Object.assign(this, { pad, hold, press, isWaiting });
    this.parts = [];
    this.keys = null;
    this.isVector = false;
    this.keeps = false;
    this.capture = null;
    this.base = [];
    this.vector = [];
    this._forget();
    window.addEventListener("blur", () => this.release());
  }

  _forget() {
    this.pressed = [];
    this.axes = new Map();
    this.moved = new Map();
    this.mouse = new Map();
  }

  /** Lay out the buttons and sliders of a world's parts. */
  show(parts, keymap, isVector) {
    Object.assign(this, { parts, keymap, isVector });
    this._forget();
    this.entries = parts.flatMap((part) =>
      Array.from({ length: part.size }, (_, at) => {
        const space = part.space;
        const least = space === "Box" ? Math.min(Math.max(0, part.low[at]), part.high[at]) : 0;
        // A choice without a name for nothing stays until another is made.
        return { part, at, idle: part.idle ?? least, stays: space === "Discrete" && part.idle === null };
      }),
    );
    this.base = this.entries.map((entry) => entry.idle);
    this.vector = [...this.base];
    this.pad.replaceChildren(...parts.map((part) => this._group(part)));
    this.relabel();
    this._mark();
  }

  /** The action that is held; null: nothing steers this world. */
  get held() {
    if (!this.vector.length) return null;
    return this.isVector ? [...this.vector] : this.vector[0];
  }

  /** Keys that this world has and what each does, [keys, words], directions first. */
  get hints() {
    const { keymap, parts } = this;
    const order = ["up", "left", "down", "right"];
    const ways = [];
    const others = [];
    for (const target of keymap.targets.filter((one) => one.space !== "Box")) {
      const part = parts.find((one) => one.name === target.part);
      const way = order.indexOf(keymap.wayOf(target));
      const key = keymap.keyOf(target);
      if (!key || (part.space === "Discrete" && target.value === part.idle)) continue;
      if (way >= 0) ways.push([way, [key, target.label]]);
      else others.push([key, target.label]);
    }
    const boxes = parts.filter((part) => part.space === "Box").flatMap((part) =>
      part.names.map((name, entry) => {
        const own = keymap.targets.filter((one) => one.part === part.name && one.entry === entry);
        const caps = own.filter((one) => !one.axis).map((one) => keymap.keyOf(one)).filter(Boolean);
        return [caps.join(" "), [part.name, name].filter((word) => word).map(shownName).join(" ")];
      }),
    );
    const told = [...ways.sort(([one], [other]) => one - other).map(([, hint]) => hint), ...boxes, ...others];
    return told.filter(([keys]) => keys);
  }

  /** Whether pulling on the picture steers. */
  get pulls() {
    return Boolean(this.keymap?.has(/^Stick/));
  }

  /** Whether pulling has but four ways: one choice is made at a time. */
  get hasFourWays() {
    const of = this.keymap.bindings.filter((one) => /^Stick/.test(one.control));
    return of.some((one) => this.parts.find((part) => part.name === one.part).space === "Discrete");
  }

  /** Whether a control is pressed. */
  isDown(name) {
    return this.pressed.some((one) => one.source === name);
  }

  /** A key or button goes down or up, or is pressed by a share; returns whether it is bound. */
  control(name, down, time, strength = 1) {
    if (this.capture) {
      if (down) this.capture(name);
      return true;
    }
    const bound = this.keymap?.of(name) ?? [];
    if (bound.length) this._press(name, down ? bound.map((one) => ({ ...one, strength })) : [], time);
    return bound.length > 0;
  }

  /** An axis stands at -1 .. 1; returns whether it is bound, in whole or by half. */
  axis(name, value, time) {
    if (this.capture) {
      if (Math.abs(value) > 0.6) this.capture(`${name}${value < 0 ? "-" : "+"}`, name);
      return true;
    }
    let bound = false;
    for (const [half, sign] of [["-", -1], ["+", 1]]) {
      const does = this.keymap?.of(name + half) ?? [];
      const isDown = value * sign > HALF;
      bound ||= does.length > 0;
      if (does.length && isDown !== this.pressed.some((one) => one.source === name + half))
        this._press(name + half, isDown ? does.map((one) => ({ ...one, strength: 1 })) : [], time);
    }
    if (!this.keymap?.of(name).length) return bound;
    if ((this.axes.get(name) ?? 0) !== value) {
      this.axes.set(name, value);
      this._smoothly(time);
    }
    return true;
  }

  /** The mouse moves, in pixels. It counts for one frame. */
  move(across, down, time) {
    for (const [name, by] of [["MouseX", across], ["MouseY", down]])
      this.moved.set(name, (this.moved.get(name) ?? 0) + by);
    this._smoothly(time);
  }

  /** A frame has been drawn that obeyed what is held: take over how far mouse and axes went. */
  frame(time) {
    this.mouse = this.moved;
    this.moved = new Map();
    this._update(time, false);
  }

  /** While a stream is paused, how far the mouse moves adds up until the next frame. */
  _smoothly(time) {
    if (!this.isWaiting()) {
      for (const [name, by] of this.moved) this.mouse.set(name, (this.mouse.get(name) ?? 0) + by);
      this.moved = new Map();
      this._update(time, false);
    }
  }

  /** Let go of everything. */
  release() {
    this._forget();
    if (!this.keeps) this.base = this.entries?.map((entry, at) => (entry.stays ? this.base[at] : entry.idle)) ?? [];
    this._update(performance.now(), true);
  }

  /** A source presses what it is bound to; nothing: it lets go. */
  _press(source, does, time) {
    const before = this.pressed.filter((one) => one.source === source);
    this.pressed = this.pressed.filter((one) => one.source !== source);
    for (const one of does) {
      const { part, stays } = this.entries[one.at];
      // Where keys are kept, one that is on already goes off.
      if (this.keeps && part.space === "MultiBinary" && this.base[one.at] && !before.length) {
        this.base[one.at] = 0;
        continue;
      }
      this.pressed.push({ ...one, source });
      if (stays || this.keeps) this.base[one.at] = one.value;
    }
    this._update(time, !does.length);
    if (does.length && !before.length) this.press(this.held);
  }

  _update(time, released) {
    const vector = this.entries?.map((entry, at) => this._valueOf(entry, at)) ?? [];
    if (vector.every((value, at) => value === this.vector[at])) return;
    this.vector = vector;
    this._mark();
    this.hold(this.held, time, released);
  }

  _valueOf({ part, at: place, idle }, at) {
    const last = this.pressed.filter((one) => one.at === at).at(-1);
    let value = this.base[at];
    if (last !== undefined) {
      value = part.space === "Box" ? idle + (last.value - idle) * last.strength : last.value;
    } else if (part.space === "Box") {
      const by = this._deflection(at);
      if (by) value = idle + by;
    }
    if (part.space !== "Box") return value;
    value = Math.min(part.high[place], Math.max(part.low[place], value));
    // -0 would be another value than 0.
    return (part.whole ? Math.round(value) : value) || 0;
  }

  _deflection(at) {
    let sum = 0;
    for (const from of [this.axes, this.mouse])
      for (const [name, by] of from)
        for (const one of this.keymap.of(name)) if (one.at === at) sum += by * one.value;
    return sum;
  }

  // --- the keys on the page ---

  _group(part) {
    const group = element("div", "part", { role: "group", "data-part": part.name });
    if (part.name && this.parts.length > 1) {
      group.append(element("p", "of", {}, shownName(part.name)));
      group.setAttribute("aria-label", shownName(part.name));
    }
    if (part.space === "Box") group.append(...part.names.map((name, at) => this._slider(part, name, at)));
    else if (part.space === "MultiDiscrete")
      group.append(...part.names.map((name, at) => this._dial(part, name, at)));
    else group.append(...this._buttons(part));
    return group;
  }

  _buttons(part) {
    const cross = element("div", "cross");
    const others = element("div", "others");
    for (const target of this.keymap.targets.filter((one) => one.part === part.name)) {
      const way = this.keymap.wayOf(target);
      const button = this._button(part.first + target.entry, target.value, target);
      button.dataset.action = part.space === "Discrete" ? target.value : target.entry;
      button.append(element("span", "sign", {}, way ? SIGNS[way] : target.label));
      if (way) {
        button.append(element("span", "name", {}, target.label));
        button.dataset.way = way;
      } else if (part.space === "Discrete" && target.value === part.idle) {
        button.title = "what happens while nothing is held";
      }
      button.append(element("kbd", "", { "aria-hidden": "true" }));
      (way ? cross : others).append(button);
    }
    return [cross, others].filter((box) => box.children.length);
  }

  _dial(part, name, at) {
    const choices = part.choices[at];
    if (choices > MOST_BUTTONS) return this._slider(part, name, at, choices - 1);
    const row = element("div", "dial");
    row.append(element("span", "of", {}, shownName(name)));
    for (let value = 0; value < choices; value += 1) {
      const target = { part: part.name, entry: at, value, space: part.space, label: `${shownName(name)} ${value}` };
      const button = this._button(part.first + at, value, target);
      button.dataset.action = value;
      button.append(element("span", "sign", {}, String(value)), element("kbd", "", { "aria-hidden": "true" }));
      row.append(button);
    }
    return row;
  }

  _button(at, value, target) {
    const button = element("button", "key", { type: "button", "aria-pressed": "false" });
    button.target = target;
    button.at = at;
    this._watchButton(button, `button ${at} ${value}`, { at, value, strength: 1 });
    return button;
  }

  _slider(part, name, place, most = null) {
    const at = part.first + place;
    const row = element("label", "entry", {}, shownName(name));
    const [min, max] = most === null ? [part.low[place], part.high[place]] : [0, most];
    const step = part.whole ? 1 : (max - min) / 200;
    const input = element("input", "", { type: "range", min, max, step, value: this.base[at] });
    row.append(input, element("output", "", {}, "–"));
    input.at = at;
    input.addEventListener("input", (event) => {
      this.base[at] = Number(input.value);
      this._update(event.timeStamp, false);
    });
    input.addEventListener("change", (event) => {
      this.press(this.held);
      if (this.keeps) return;
      this.base[at] = this.entries[at].idle;
      this._update(event.timeStamp, true);
    });
    return row;
  }

  /** Write on the keys which controls they have now. */
  relabel() {
    for (const button of this.pad.querySelectorAll(".key")) {
      const key = this.keymap.keyOf(button.target);
      const cap = button.querySelector("kbd");
      cap.textContent = key;
      cap.hidden = !key;
      cap.classList.toggle("long", key.length > 2);
      const { label } = button.target;
      button.setAttribute("aria-label", key ? `${label}, key ${key}` : label);
    }
  }

  /** Show which action led to the frame that is drawn. */
  obeyed(action) {
    const values = action === null ? null : this.parts.flatMap((part) => entriesOf(part, action));
    for (const button of this.pad.querySelectorAll(".key"))
      button.classList.toggle("obeyed", values !== null && values[button.at] === button.target.value);
    for (const input of this.pad.querySelectorAll("input")) {
      const digits = this.entries[input.at].part.whole ? 0 : 2;
      input.nextElementSibling.textContent = values === null ? "–" : values[input.at].toFixed(digits);
    }
  }

  _mark() {
    for (const button of this.pad.querySelectorAll(".key")) {
      const on = this.vector[button.at] === button.target.value;
      button.classList.toggle("held", on);
      button.setAttribute("aria-pressed", String(on));
    }
    for (const input of this.pad.querySelectorAll("input")) input.value = this.vector[input.at];
  }

  _watchButton(button, source, does) {
    const down = (event) => this._press(source, [does], event.timeStamp);
    const up = (event) => {
      if (this.pressed.some((one) => one.source === source)) this._press(source, [], event.timeStamp);
    };
    button.addEventListener("pointerdown", (event) => {
      button.setPointerCapture(event.pointerId);
      down(event);
    });
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"])
      button.addEventListener(name, up);
    button.addEventListener("contextmenu", (event) => event.preventDefault());
    button.addEventListener("keydown", (event) => {
      if (event.code !== "Space" && event.code !== "Enter") return;
      event.preventDefault();
      if (!event.repeat) down(event);
    });
    button.addEventListener("keyup", (event) => {
      if (event.code === "Space" || event.code === "Enter") up(event);
    });
  }
}

/** Make an element. */
export function element(tag, names = "", attributes = {}, text = "") {
  const made = document.createElement(tag);
  if (names) made.className = names;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  return made;
}
