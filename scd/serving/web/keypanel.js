// The panel in which a user changes what controls do: press one to bind it.

import { RESERVED, capOf } from "./keymap.js";
import { shownName } from "./parts.js";
import { element } from "./steering.js";

export class KeyPanel {
  /** `changed()` is told of every change. */
  constructor(list, reset, speed, steering, changed) {
    Object.assign(this, { list, reset, speed, steering, changed });
    this.open = null;
    // Before the page's own keys: whatever is pressed now is bound.
    window.addEventListener("keydown", (event) => this.open && this._key(event), true);
    reset.onclick = () => {
      this.keymap.reset();
      this._done();
    };
    speed.oninput = () => {
      this.keymap.mouseSpeed = 2 ** Number(speed.value);
      this._refresh();
    };
  }

  get keymap() {
    return this.steering.keymap;
  }

  /** Lay out a row for everything that can be bound. */
  show() {
    this.rows = [];
    this.list.replaceChildren();
    let part = null;
    for (const target of this.keymap.targets) {
      if (target.part !== part && target.part) this.list.append(element("p", "of", {}, shownName(target.part)));
      part = target.part;
      const row = element("div", "bind");
      const button = element("button", "", { type: "button" });
      row.append(element("span", "", {}, target.label), button);
      button.onclick = () => (this.open?.button === button ? this._close() : this._listen(button, target));
      button.onblur = () => this.open?.button === button && this._close();
      this.list.append(row);
      this.rows.push({ button, target });
    }
    this._refresh();
  }

  _refresh() {
    for (const { button, target } of this.rows) {
      const caps = this.keymap.controlsOf(target).map(capOf);
      button.replaceChildren(...(caps.length ? caps.map((cap) => element("kbd", "", {}, cap)) : ["–"]));
      button.setAttribute("aria-label", `${target.label}: ${caps.join(", ") || "no control"}; change`);
    }
    this.reset.hidden = !this.keymap.isOwn;
    this.speed.parentElement.hidden = !this.keymap.has(/^Mouse[XY]$/);
    this.speed.value = Math.log2(this.keymap.mouseSpeed);
  }

  _listen(button, target) {
    this._close();
    this.open = { button, target };
    button.classList.add("listening");
    button.textContent = target.axis ? "move a stick" : "press a key";
    this.steering.release();
    this.steering.capture = (control, axis) => {
      if (target.axis && !axis) return;
      this._bind(target.axis ? axis : control);
    };
  }

  _key(event) {
    event.preventDefault();
    event.stopPropagation();
    if (event.repeat) return;
    if (event.code === "Escape") this._close();
    else if (event.code === "Backspace" || event.code === "Delete") this._bind(null);
    else if (RESERVED.includes(event.code)) this.open.button.textContent = `${capOf(event.code)} is the page's`;
    else if (!this.open.target.axis) this._bind(event.code);
  }

  _bind(control) {
    const { target } = this.open;
    this.keymap.bind(target, control);
    this._done();
  }

  _done() {
    this._close();
    this._refresh();
    this.steering.relabel();
    this.changed();
  }

  _close() {
    if (!this.open) return;
    this.open.button.classList.remove("listening");
    this.open = this.steering.capture = null;
    this._refresh();
  }
}
