// The past as a strip of frames with the actions beneath, and takes as branches on the same axis.

import { element } from "./steering.js";

const LANE = 7; // pixels of a lane; where there are many, less
const LANES = 28; // of all of them together

export class Timeline {
  /** Events by callbacks: look(frame), choose(take), remove(take). */
  constructor(strip, canvas, list, { look, choose, remove, describe }) {
    Object.assign(this, { strip, canvas, list, look, choose, remove, describe });
    this.take = null;
    this.takes = [];
    this.shown = null;
    this.waiting = 0;
    this.aspect = 1;
    this.lanes = [];
    this.lane = LANE;
    this.bitmaps = new WeakMap();
    new ResizeObserver(() => this.refresh()).observe(strip);
    this._watch();
  }

  /** Say what there is; `shown` is the old frame that is looked at, null: the newest. */
  set(takes, take, shown) {
    const changed = this.takes.length !== takes.length || this.take !== take;
    Object.assign(this, { takes: [...takes], take, shown });
    if (changed) this._branches();
    this.refresh();
  }

  /** Draw so many lanes below the frames: functions from an action to its colour. */
  setLanes(lanes) {
    this.lanes = lanes;
    this.lane = Math.max(4, Math.min(LANE, Math.floor(LANES / Math.max(1, lanes.length))));
    this.strip.style.setProperty("--lanes", `${this._deep - LANE - 3}px`);
    this.refresh();
  }

  /** Pixels below the frames. */
  get _deep() {
    return 3 + Math.max(LANE, this.lane * this.lanes.length);
  }

  /** Draw soon; not more often than the eye needs. */
  refresh() {
    if (!this.waiting) this.waiting = setTimeout(() => this._draw(), 80);
  }

  _scale() {
    const width = this.strip.clientWidth;
    const height = Math.max(1, this.strip.clientHeight - this._deep);
    const tile = Math.max(8, Math.min(2.2, Math.max(0.6, this.aspect)) * height);
    const count = Math.max(2, Math.floor(width / tile));
    const last = Math.max(0, this.take.newest);
    const first = Math.min(this.take.from, last);
    let stride = 1;
    while (Math.ceil((last + 1 - Math.floor(first / stride) * stride) / stride) > count) stride *= 2;
    return {
      width, height, count, stride, tile: width / count,
      origin: Math.floor(first / stride) * stride, perFrame: width / count / stride, last, first,
    };
  }

  _draw() {
    this.waiting = 0;
    if (this.take === null || !this.strip.clientWidth) return;
    const scale = (this.scale = this._scale());
    const ratio = window.devicePixelRatio || 1;
    const { canvas } = this;
    canvas.width = Math.round(scale.width * ratio);
    canvas.height = Math.round(this.strip.clientHeight * ratio);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    this._tiles(context, scale);
    this._lanes(context, scale);
    this._playhead(context, scale);
    this._describe(scale);
    this._places(scale);
  }

  _tiles(context, { origin, stride, tile, height, count, last }) {
    for (let place = 0; place < count; place += 1) {
      const frame = origin + place * stride;
      if (frame > last) break;
      const picture = this._bitmap(this._seen(frame, Math.min(last, frame + stride - 1)));
      const x = place * tile;
      const share = Math.min(1, (last + 1 - frame) / stride);
      if (picture) {
        // The middle of the frame fills the tile, which grows until the next one begins.
        const wide = Math.min(picture.width, (picture.height * tile) / height);
        const high = Math.min(picture.height, (picture.width * height) / tile);
        const left = (picture.width - wide) / 2;
        const top = (picture.height - high) / 2;
        const right = Math.max(2, tile * share - 1);
        context.drawImage(picture, left, top, wide * share, high, x, 0, right, height);
      } else {
        context.fillStyle = "rgba(128, 134, 145, 0.16)";
        context.fillRect(x, 0, tile * share - 1, height);
      }
    }
  }

  // The first picture at hand of some frames.
  _seen(first, last) {
    for (let frame = first; frame <= last; frame += 1) {
      const blob = this.take.frames.get(frame)?.blob;
      if (blob) return blob;
    }
    return null;
  }

  _bitmap(blob) {
    if (!blob) return null;
    const known = this.bitmaps.get(blob);
    if (known === undefined) {
      this.bitmaps.set(blob, null);
      createImageBitmap(blob).then(
        (bitmap) => {
          this.bitmaps.set(blob, bitmap);
          this.refresh();
        },
        () => {},
      );
    }
    return known ?? null;
  }

  _lanes(context, scale) {
    this.lanes.forEach((colourOf, number) =>
      this._lane(context, scale, colourOf, scale.height + 3 + number * this.lane));
  }

  _lane(context, { origin, perFrame, first, last }, colourOf, top) {
    const thick = this.lane - (this.lanes.length > 1 ? 1 : 0);
    let begun = null;
    for (let frame = first; frame <= last + 1; frame += 1) {
      const action = frame > last ? undefined : this.take.frames.get(frame)?.action;
      const colour = frame > last ? null : (action ?? null) === null ? "transparent" : colourOf(action);
      if (begun !== null && begun.colour === colour) continue;
      if (begun !== null) {
        context.fillStyle = begun.colour;
        const x = (begun.frame - origin) * perFrame;
        const width = Math.max(1, (frame - begun.frame) * perFrame - (perFrame > 3 ? 1 : 0));
        context.fillRect(x, top, width, thick);
      }
      begun = { frame, colour };
    }
  }

  _playhead(context, { origin, perFrame, height, last, width }) {
    const style = getComputedStyle(this.strip);
    const at = this.shown ?? last;
    const x = Math.min(width - 1, (at - origin + 0.5) * perFrame);
    if (this.shown !== null) {
      const begin = (this.shown + 1 - origin) * perFrame;
      context.globalAlpha = 0.66;
      context.fillStyle = style.getPropertyValue("--card");
      context.fillRect(begin, 0, (last + 1 - origin) * perFrame - begin, height + this._deep);
      context.globalAlpha = 1;
    }
    context.fillStyle = style.getPropertyValue("--accent");
    context.fillRect(x - 1, 0, 2, height + this._deep);
  }

  _describe({ first, last }) {
    const at = this.shown ?? last;
    this.strip.setAttribute("aria-valuemin", first);
    this.strip.setAttribute("aria-valuemax", last);
    this.strip.setAttribute("aria-valuenow", at);
    this.strip.setAttribute("aria-valuetext", this.describe(at, last));
  }

  _branches() {
    this.list.replaceChildren();
    this.list.hidden = this.takes.length < 2;
    if (this.list.hidden) return;
    this.takes.forEach((take, row) => {
      const item = element("li");
      const bar = element("button", "take", { type: "button" });
      const from = take.parent ? `, forked from take ${take.parent.number} at ${take.forkedAt}` : "";
      bar.setAttribute("aria-label", `take ${take.number}${from}`);
      bar.setAttribute("aria-current", String(take === this.take));
      bar.append(element("span", "line"), element("span", "label", {}, `${take.number}`));
      bar.title = `Take ${take.number}${from}`;
      bar.onclick = () => this.choose(take);
      const above = take.parent ? row - this.takes.indexOf(take.parent) : 0;
      item.style.setProperty("--up", above);
      item.append(bar);
      if (take !== this.take) {
        const name = `Delete take ${take.number}`;
        const close = element("button", "close", { type: "button", "aria-label": name }, "×");
        close.title = name;
        close.onclick = () => this.remove(take);
        item.append(close);
      }
      item.take = take;
      this.list.append(item);
    });
  }

  _places({ origin, perFrame, width }) {
    for (const item of this.list.children) {
      const { take } = item;
      const begin = Math.max(0, ((take.forkedAt ?? take.from) - origin) * perFrame);
      const end = Math.max(begin + 3, (take.newest + 1 - origin) * perFrame);
      item.style.setProperty("--begin", `${Math.min(begin, width - 60)}px`);
      item.style.setProperty("--end", `${Math.min(end, width - 56)}px`);
    }
  }

  _watch() {
    const { strip } = this;
    const frameAt = (event) => {
      const { origin, perFrame, first, last } = this.scale;
      const x = event.clientX - strip.getBoundingClientRect().left;
      return Math.max(first, Math.min(last, origin + Math.floor(x / perFrame)));
    };
    let dragging = false;
    strip.addEventListener("pointerdown", (event) => {
      if (this.take === null || !this.scale) return;
      dragging = true;
      strip.setPointerCapture(event.pointerId);
      this.look(frameAt(event));
    });
    strip.addEventListener("pointermove", (event) => dragging && this.look(frameAt(event)));
    for (const name of ["pointerup", "pointercancel"])
      strip.addEventListener(name, () => (dragging = false));
    strip.addEventListener("keydown", (event) => {
      if (this.take === null || !this.scale) return;
      const { first, last, stride } = this.scale;
      const moves = {
        ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1,
        PageDown: -4 * stride, PageUp: 4 * stride, Home: -Infinity, End: Infinity,
      };
      if (!(event.key in moves)) return;
      event.preventDefault();
      event.stopPropagation();
      this.look(Math.max(first, Math.min(last, (this.shown ?? last) + moves[event.key])));
    });
  }
}
