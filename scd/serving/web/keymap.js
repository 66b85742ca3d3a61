// Which control does what: the world's map, or the one that a user made of it and this browser keeps.

import { shownName } from "./parts.js";

const WAYS = {
  KeyW: "up", KeyA: "left", KeyS: "down", KeyD: "right",
  "StickY-": "up", "StickX-": "left", "StickY+": "down", "StickX+": "right",
};
/** Ways of a map that has none of those: where it has, the arrows may be for something else. */
const ARROWS = { ArrowUp: "up", ArrowLeft: "left", ArrowDown: "down", ArrowRight: "right" };
const CAPS = {
  ArrowUp: "↑", ArrowLeft: "←", ArrowDown: "↓", ArrowRight: "→", Space: "space",
  ShiftLeft: "shift", ShiftRight: "shift", Mouse0: "click", Mouse1: "middle click",
  Mouse2: "right click", MouseX: "mouse ↔", MouseY: "mouse ↕", StickX: "pull ↔", StickY: "pull ↕",
  "StickX-": "pull ←", "StickX+": "pull →", "StickY-": "pull ↑", "StickY+": "pull ↓",
};

/** Keys of the page, which steer nothing; the space bar is the page's where no map has it. */
export const RESERVED = [
  "Comma", "Period", "Slash", "KeyF", "KeyP", "KeyR", "KeyV", "Enter", "Escape", "Tab",
  "ControlLeft", "ControlRight", "AltLeft", "AltRight", "MetaLeft", "MetaRight",
];

export const isAxis = (control) => /^(MouseX|MouseY|StickX|StickY|PadAxis\d+)$/.test(control);

/** A control as it is printed on a keycap. */
export function capOf(control) {
  const found = /^(?:Key|Digit)(.)$/.exec(control) ?? /^Numpad(.+)$/.exec(control);
  if (found) return found[1];
  const axis = /^PadAxis(\d+)([+-]?)$/.exec(control);
  if (axis) {
    const stick = ["stick", "right stick"][axis[1] >> 1] ?? `axis ${axis[1]}`;
    return `${stick} ${{ "-": "←↑", "+": "→↓", "": "↔↕" }[axis[2]][axis[1] & 1]}`;
  }
  const button = /^Pad(\d+)$/.exec(control);
  if (button) return `pad ${"↑↓←→"[button[1] - 12] ?? button[1]}`;
  return CAPS[control] ?? control.toLowerCase();
}

const KINDS = ["key", "Mouse", "Stick", "Pad"];

function kindOf(control) {
  return /^(Pad|Mouse|Stick)/.exec(control)?.[1] ?? "key";
}

export class KeyMap {
  constructor(world, parts) {
    this.parts = parts;
    this.place = `scd keys ${world.name}`;
    this.worlds = world.key_map.map(({ control, part, entry, value }) => ({ control, part, entry, value }));
    this.targets = parts.flatMap((part) => targetsOf(part));
    this.bindings = this._kept() ?? this.worlds;
  }

  /** Whether it is the user's own. */
  get isOwn() {
    return this.bindings !== this.worlds;
  }

  /** What a control does: bindings, with the entry of the vector in `at`. */
  of(control) {
    return this.bindings
      .filter((one) => one.control === control)
      .map((one) => ({ ...one, at: this.parts.find((part) => part.name === one.part).first + one.entry }));
  }

  has(pattern) {
    return this.bindings.some((one) => pattern.test(one.control));
  }

  /** Controls of a target. */
  controlsOf(target) {
    const own = this.bindings.filter((one) => meets(one, target)).map((one) => one.control);
    return own.sort((one, other) => KINDS.indexOf(kindOf(one)) - KINDS.indexOf(kindOf(other)));
  }

  /** The key of a target, as on a keycap; empty: it has none. */
  keyOf(target) {
    const keys = this.controlsOf(target).filter((control) => kindOf(control) === "key");
    return keys.length ? capOf(keys[0]) : "";
  }

  /** The way to which a target leads, by the world's own map; undefined: to none. */
  wayOf(target) {
    if (target.space === "Box") return undefined;
    const ways = this.worlds.some(({ control }) => control in WAYS) ? WAYS : ARROWS;
    const own = this.worlds.filter((one) => meets(one, target));
    return own.map((one) => ways[one.control]).find(Boolean);
  }

  /** Give a target a control instead of those of its kind; null: take them away. */
  bind(target, control) {
    const kind = control && kindOf(control);
    this.bindings = this.bindings.filter(
      (one) => one.control !== control && !(meets(one, target) && (!kind || kindOf(one.control) === kind)),
    );
    const { part, entry, value } = target;
    if (control) this.bindings.push({ control, part, entry, value });
    this._keep();
  }

  /** Make the mouse so many times as fast as the world's map has it. */
  set mouseSpeed(factor) {
    const own = (control) => this.worlds.find((one) => one.control === control)?.value;
    this.bindings = this.bindings.map((one) =>
      /^Mouse[XY]$/.test(one.control) ? { ...one, value: (own(one.control) ?? one.value) * factor } : one,
    );
    this._keep();
  }

  get mouseSpeed() {
    const one = this.bindings.find(({ control }) => /^Mouse[XY]$/.test(control));
    const own = one && this.worlds.find(({ control }) => control === one.control);
    return own ? one.value / own.value : 1;
  }

  reset() {
    this.bindings = this.worlds;
    try {
      localStorage.removeItem(this.place);
    } catch {
      // A browser that keeps nothing has nothing to forget.
    }
  }

  _keep() {
    try {
      localStorage.setItem(this.place, JSON.stringify(this.bindings));
    } catch {
      // The map is in force until the page is left.
    }
  }

  // A map of before the world changed is kept as far as it still means something.
  _kept() {
    try {
      const kept = JSON.parse(localStorage.getItem(this.place));
      if (!Array.isArray(kept)) return null;
      return kept.filter((one) => !RESERVED.includes(one.control) && this.targets.some((target) => meets(one, target)));
    } catch {
      return null;
    }
  }
}

function meets(one, target) {
  if (one.part !== target.part || one.entry !== target.entry) return false;
  if (target.space !== "Box") return !isAxis(one.control) && one.value === target.value;
  if (target.axis || isAxis(one.control)) return target.axis && isAxis(one.control);
  return one.value === target.value || Math.sign(one.value) === Math.sign(target.value);
}

/** What can be bound in a part: {part, entry, value, label, space}. */
function targetsOf(part) {
  const common = { part: part.name, space: part.space };
  if (part.space === "Discrete")
    return part.names.map((name, value) => ({ ...common, entry: 0, value, label: shownName(name) }));
  if (part.space === "MultiBinary")
    return part.names.map((name, entry) => ({ ...common, entry, value: 1, label: shownName(name) }));
  return part.names.flatMap((name, entry) => {
    const label = shownName(name);
    if (part.space === "MultiDiscrete")
      return Array.from({ length: part.choices[entry] - 1 }, (_, at) => ({
        ...common, entry, value: at + 1, label: `${label}: ${at + 1}`,
      }));
    const [low, high] = [part.low[entry], part.high[entry]];
    return [
      ...(low < 0 ? [{ ...common, entry, value: low, label: `${label} −` }] : []),
      { ...common, entry, value: high, label: low < 0 ? `${label} +` : label },
      { ...common, entry, value: high, label: `${label} ↔`, axis: true },
    ];
  });
}
