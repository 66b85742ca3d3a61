// Mouse, finger and gamepad -> controls of the steering.

const DEAD_ZONE = 0.15; // of a gamepad's stick, which seldom rests at 0
const PULL = 56; // pixels of a pull at full deflection
const STILL = 14; // pixels below which a pull is none

/** The picture: a stick for who pulls on it; for a mouse that looks, a place to lock it. */
export class View {
  /** `locked(is)` is told when the mouse is taken, and given back. */
  constructor(view, stick, steering, locked) {
    Object.assign(this, { view, stick, steering, locked });
    this.from = null;
    this._watchStick();
    this._watchMouse();
  }

  get isLocked() {
    return document.pointerLockElement === this.view;
  }

  get looks() {
    return Boolean(this.steering.keymap?.has(/^Mouse[XY]$/));
  }

  _watchMouse() {
    const button = (event, down) => {
      const name = `Mouse${event.button}`;
      if (this.isLocked || this.steering.capture) this.steering.control(name, down, event.timeStamp);
    };
    this.view.addEventListener("mousedown", (event) => button(event, true));
    window.addEventListener("mouseup", (event) => button(event, false));
    this.view.addEventListener("contextmenu", (event) => {
      if (this.steering.keymap?.has(/^Mouse2$/)) event.preventDefault();
    });
    document.addEventListener("mousemove", (event) => {
      if (this.isLocked) this.steering.move(event.movementX, event.movementY, event.timeStamp);
    });
    document.addEventListener("pointerlockchange", () => {
      if (!this.isLocked) this.steering.release();
      this.locked(this.isLocked);
    });
  }

  _watchStick() {
    this.view.addEventListener("pointerdown", (event) => {
      if (this.steering.capture || event.button > 0 || this.isLocked || this.from) return;
      if (event.pointerType === "mouse" && this.looks) {
        // Browsers refuse it for a moment after it was left: the next click asks again.
        Promise.resolve(this.view.requestPointerLock()).catch(() => {});
        return;
      }
      if (!this.steering.pulls) return;
      this.view.setPointerCapture(event.pointerId);
      this.from = { x: event.clientX, y: event.clientY, id: event.pointerId };
      const box = this.stick.parentElement.getBoundingClientRect();
      this.stick.style.left = `${this.from.x - box.left}px`;
      this.stick.style.top = `${this.from.y - box.top}px`;
      this.stick.firstElementChild.style.transform = "";
      this.stick.hidden = false;
    });
    this.view.addEventListener("pointermove", (event) => {
      if (this.from?.id === event.pointerId) this._pull(event);
    });
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"])
      this.view.addEventListener(name, (event) => {
        if (this.from?.id !== event.pointerId) return;
        this.from = null;
        this.stick.hidden = true;
        for (const axis of ["StickX", "StickY"]) this.steering.axis(axis, 0, event.timeStamp);
      });
  }

  _pull(event) {
    let across = event.clientX - this.from.x;
    let down = event.clientY - this.from.y;
    const thumb = [across, down].map((by) => `${clip(by, 34)}px`);
    this.stick.firstElementChild.style.transform = `translate(${thumb.join(", ")})`;
    if (Math.max(Math.abs(across), Math.abs(down)) < STILL) across = down = 0;
    else if (this.steering.hasFourWays) {
      // The way that is pulled least counts for nothing, the other one at once.
      if (Math.abs(down) >= Math.abs(across)) [across, down] = [0, Math.sign(down) * PULL];
      else [across, down] = [Math.sign(across) * PULL, 0];
    }
    this.steering.axis("StickX", clip(across / PULL, 1), event.timeStamp);
    this.steering.axis("StickY", clip(down / PULL, 1), event.timeStamp);
  }
}

/** All gamepads that there are, as one. They are asked while there are any. */
export class Gamepads {
  constructor(steering, say) {
    Object.assign(this, { steering, say });
    this.asked = 0;
    this.values = new Map();
    window.addEventListener("gamepadconnected", ({ gamepad }) => {
      say(`Gamepad: ${gamepad?.id ?? "connected"}`);
      this.asked ||= requestAnimationFrame(() => this._ask());
    });
    window.addEventListener("gamepaddisconnected", () => say("The gamepad is gone."));
    window.addEventListener("blur", () => this.values.clear());
  }

  _ask() {
    const pads = navigator.getGamepads().filter((pad) => pad?.connected);
    // Who looks elsewhere steers nothing.
    const here = document.hasFocus() && !document.hidden;
    const buttons = new Map();
    const axes = new Map();
    for (const pad of here ? pads : []) {
      pad.buttons.forEach(({ value, pressed }, number) => strongest(buttons, `Pad${number}`, pressed && !value ? 1 : value));
      pad.axes.forEach((value, number) => strongest(axes, `PadAxis${number}`, outside(value)));
    }
    for (const [name, was] of this.values)
      if (was && !buttons.has(name) && !axes.has(name)) (/Axis/.test(name) ? axes : buttons).set(name, 0);
    for (const [name, value] of buttons)
      if (this._changed(name, value)) this.steering.control(name, value > 0.1, performance.now(), value);
    for (const [name, value] of axes)
      if (this._changed(name, value)) this.steering.axis(name, value, performance.now());
    this.asked = pads.length ? requestAnimationFrame(() => this._ask()) : 0;
  }

  _changed(name, value) {
    const was = this.values.get(name) ?? 0;
    if (was === value || (value && was && Math.abs(value - was) < 0.02)) return false;
    this.values.set(name, value);
    return true;
  }
}

function strongest(values, name, value) {
  if (Math.abs(value) >= Math.abs(values.get(name) ?? 0)) values.set(name, value);
}

/** A stick beyond its dead zone, from 0 on. */
function outside(value) {
  const by = Math.max(0, Math.abs(value) - DEAD_ZONE) / (1 - DEAD_ZONE);
  return Math.sign(value) * Math.min(1, by);
}

function clip(value, most) {
  return Math.max(-most, Math.min(most, value));
}
