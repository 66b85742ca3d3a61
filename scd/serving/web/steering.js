// Keys, buttons and the picture as a stick -> the one action that is held.

const MEANINGS = [
  ["up", ["forward", "up", "north", "jump"]],
  ["left", ["left", "west", "turn_left"]],
  ["down", ["back", "backward", "down", "south"]],
  ["right", ["right", "east", "turn_right"]],
];
const IDLE = ["none", "noop", "idle", "nothing", "stay", "wait", "still", "stop"];
const KEYS = {
  ArrowUp: "up", KeyW: "up", ArrowLeft: "left", KeyA: "left",
  ArrowDown: "down", KeyS: "down", ArrowRight: "right", KeyD: "right",
};
const SIGNS = { up: "↑", left: "←", down: "↓", right: "→" };
const LETTERS = { up: "W", left: "A", down: "S", right: "D" };

/** The directions that a world's action names offer: {up: number, ...}, and its idle action. */
export function directionsOf(names) {
  const plain = names.map((name) => name.toLowerCase().replace(/[\s-]/g, "_"));
  const directions = {};
  for (const [direction, words] of MEANINGS) {
    const exact = plain.findIndex((name) => words.includes(name));
    const near = plain.findIndex((name) => words.some((word) => name.split("_").includes(word)));
    const found = exact >= 0 ? exact : near;
    if (found >= 0 && !Object.values(directions).includes(found)) directions[direction] = found;
  }
  const idle = plain.findIndex((name) => IDLE.includes(name));
  return { directions, idle: idle >= 0 ? idle : null };
}

/** The name of an action as people see it. */
export function shownName(name) {
  const plain = name.toLowerCase();
  return IDLE.includes(plain) ? "do nothing" : name.replaceAll("_", " ");
}

export class Steering {
  /** `hold(action, time)` is told whenever another action is held, `press` of every press. */
  constructor(pad, view, stick, hold, press) {
    this.pad = pad;
    this.view = view;
    this.stick = stick;
    this.hold = hold;
    this.press = press;
    this.pressed = [];
    this.held = null;
    this.keeps = false;
    this.enabled = () => true;
    this.names = [];
    this.directions = {};
    this.idle = null;
    window.addEventListener("blur", () => this.release());
    this._watchView();
  }

  /** Lay out the buttons for a world's actions. */
  show(names) {
    this.names = names;
    Object.assign(this, directionsOf(names));
    this.pressed = [];
    this.held = this.idle;
    this.pad.replaceChildren();
    const placed = new Map(Object.entries(this.directions).map(([way, number]) => [number, way]));
    const cross = element("div", "cross");
    const others = element("div", "others");
    names.forEach((name, number) => {
      const way = placed.get(number);
      const button = element("button", "key", { type: "button" });
      button.dataset.action = number;
      const key = this._key(number);
      const shown = shownName(name);
      button.append(element("span", "sign", {}, way ? SIGNS[way] : shown));
      if (way) button.append(element("span", "name", {}, shown));
      else if (number === this.idle) button.title = "what happens while nothing is held";
      if (key) button.append(element("kbd", "", { "aria-hidden": "true" }, key));
      button.setAttribute("aria-label", key ? `${shown}, key ${key}` : shown);
      button.setAttribute("aria-pressed", "false");
      if (way) button.dataset.way = way;
      (way ? cross : others).append(button);
      this._watchButton(button, number);
    });
    cross.dataset.ways = Object.keys(this.directions).length;
    if (cross.children.length) this.pad.append(cross);
    if (others.children.length) this.pad.append(others);
    this._mark();
  }

  /** Keys that this world has and what each does, [key, words], directions first. */
  get keys() {
    const ways = Object.values(this.directions);
    const others = [...this.names.keys()].filter((at) => !ways.includes(at) && at !== this.idle);
    return [...ways, ...others]
      .map((number) => [this._key(number), shownName(this.names[number])])
      .filter(([key]) => key);
  }

  /** Whether pulling on the picture steers. */
  get pulls() {
    return Object.keys(this.directions).length > 0;
  }

  _key(number) {
    const way = Object.keys(this.directions).find((one) => this.directions[one] === number);
    return way ? LETTERS[way] : number < 9 ? String(number + 1) : "";
  }

  /** Show which action led to the frame that is drawn. */
  obeyed(action) {
    for (const button of this.pad.querySelectorAll(".key"))
      button.classList.toggle("obeyed", Number(button.dataset.action) === action);
  }

  /** Handle a key; returns whether it was one of steering. */
  key(event, down) {
    let action = this.directions[KEYS[event.code]];
    const digit = /^Digit([1-9])$/.exec(event.code);
    if (digit && Number(digit[1]) <= this.names.length) action = Number(digit[1]) - 1;
    if (action === undefined) return false;
    if (!event.repeat) this._press(action, event.code, down, event.timeStamp);
    return true;
  }

  /** Let go of everything. */
  release() {
    this.pressed = [];
    if (!this.keeps) this._choose(this.idle, performance.now());
  }

  _press(action, source, down, time) {
    this.pressed = this.pressed.filter((entry) => entry.source !== source);
    if (down) {
      if (!this.enabled()) return;
      this.pressed.push({ action, source });
    }
    const last = this.pressed.at(-1);
    if (last !== undefined) this._choose(last.action, time);
    else if (!this.keeps) this._choose(this.idle, time);
    if (down) this.press(action);
  }

  _choose(action, time) {
    // A world without an idle action goes on with the last one.
    if (action === null || action === this.held) return;
    this.held = action;
    this._mark();
    this.hold(action, time);
  }

  _mark() {
    for (const button of this.pad.querySelectorAll(".key")) {
      const on = Number(button.dataset.action) === this.held;
      button.classList.toggle("held", on);
      button.setAttribute("aria-pressed", String(on));
    }
  }

  _watchButton(button, action) {
    const source = `button ${action}`;
    button.addEventListener("pointerdown", (event) => {
      button.setPointerCapture(event.pointerId);
      this._press(action, source, true, event.timeStamp);
    });
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"])
      button.addEventListener(name, (event) => this._press(action, source, false, event.timeStamp));
    button.addEventListener("contextmenu", (event) => event.preventDefault());
    button.addEventListener("keydown", (event) => {
      if (event.code !== "Space" && event.code !== "Enter") return;
      event.preventDefault();
      if (!event.repeat) this._press(action, source, true, event.timeStamp);
    });
    button.addEventListener("keyup", (event) => {
      if (event.code === "Space" || event.code === "Enter")
        this._press(action, source, false, event.timeStamp);
    });
  }

  _watchView() {
    // Press and pull: the way from where the pointer came down is the way to go.
    let from = null;
    const point = (event) => {
      const away = [event.clientX - from.x, event.clientY - from.y];
      const [across, along] = away.map(Math.abs);
      this.stick.firstElementChild.style.transform = `translate(${clip(away[0])}px, ${clip(away[1])}px)`;
      const way = along >= across ? (away[1] < 0 ? "up" : "down") : away[0] < 0 ? "left" : "right";
      const action = Math.max(across, along) < 14 ? undefined : this.directions[way];
      this._press(action ?? 0, "view", action !== undefined, event.timeStamp);
    };
    this.view.addEventListener("pointerdown", (event) => {
      if (!this.pulls || !this.enabled() || event.button > 0) return;
      this.view.setPointerCapture(event.pointerId);
      from = { x: event.clientX, y: event.clientY };
      const box = this.stick.parentElement.getBoundingClientRect();
      this.stick.style.left = `${from.x - box.left}px`;
      this.stick.style.top = `${from.y - box.top}px`;
      this.stick.firstElementChild.style.transform = "";
      this.stick.hidden = false;
    });
    this.view.addEventListener("pointermove", (event) => from && point(event));
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"])
      this.view.addEventListener(name, (event) => {
        if (from === null) return;
        from = null;
        this.stick.hidden = true;
        this._press(0, "view", false, event.timeStamp);
      });
  }
}

function clip(pixels) {
  return Math.max(-34, Math.min(34, pixels));
}

/** Make an element. */
export function element(tag, names = "", attributes = {}, text = "") {
  const made = document.createElement(tag);
  if (names) made.className = names;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  return made;
}
