// The start screen: worlds that this program has, each with a moving picture; one is played.

import { element } from "./steering.js";

const ASK_EVERY_MS = 250;
const MOST_TRIES = 240;

export class Worlds {
  /** `dialog` holds `list`; `opener` opens it, and is hidden where there is nothing to choose. */
  constructor(dialog, list, opener, player, say) {
    Object.assign(this, { dialog, list, opener, player, say });
    this.address = new Map();
    opener.onclick = () => this.open();
  }

  /** Ask which worlds there are; where nobody has asked for one, offer them at once. */
  async offer() {
    const { connection } = this.player;
    const known = await connection.worlds?.().catch(() => null);
    if (!known || known.worlds.length < 2) return;
    this.known = known;
    this.opener.hidden = false;
    if (!known.asked && !sessionStorage.getItem("scd chosen")) this.open();
  }

  open() {
    const { worlds, current } = this.known;
    this.list.replaceChildren(...worlds.map((world) => this._entry(world, world.name === current)));
    this.dialog.showModal();
    this.list.querySelector("[aria-current]")?.focus();
  }

  _entry(world, isCurrent) {
    const entry = element("button", "world", { type: "button", "data-world": world.name });
    if (isCurrent) entry.setAttribute("aria-current", "true");
    const picture = element("img", "", { alt: "", width: world.width, height: world.height });
    const facts = `${world.width} × ${world.height} · ${world.megabytes.toFixed(1)} MB · ` +
      `${world.num_steps} ${world.num_steps === 1 ? "step" : "steps"} a frame`;
    entry.append(picture, element("b", "", {}, world.name), element("span", "", {}, world.title || "a world"),
      element("small", "soft", {}, facts));
    entry.onclick = () => this._choose(world.name, isCurrent);
    this._show(picture, world.name);
    return entry;
  }

  async _show(picture, name) {
    if (!this.address.has(name)) {
      const blob = await this.player.connection.worldPicture(name).catch(() => null);
      if (blob !== null) this.address.set(name, URL.createObjectURL(blob));
    }
    picture.src = this.address.get(name) ?? "";
    picture.hidden = !this.address.has(name);
  }

  async _choose(name, isCurrent) {
    sessionStorage.setItem("scd chosen", name);
    if (isCurrent) return this.dialog.close();
    try {
      await this.player.connection.openWorld(name);
    } catch (error) {
      this.say(`${name} cannot be opened: ${error.message}`, "bad");
      return this.dialog.close();
    }
    for (const entry of this.list.children) entry.disabled = true;
    for (let tries = 0; tries < MOST_TRIES; tries += 1) {
      await new Promise((resolve) => setTimeout(resolve, ASK_EVERY_MS));
      if ((await this.player.connection.worldName().catch(() => null)) === name) {
        // Streams of the world before are not of this one.
        this.player.forget();
        return location.reload();
      }
    }
    this.say("The server does not come back: look at the terminal in which it runs.", "bad");
    this.dialog.close();
  }
}
