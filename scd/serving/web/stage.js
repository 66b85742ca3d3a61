// The picture: drawn when the screen is, crisp at whole multiples of its size.

import { Enlarger, factorOf } from "./enlarge.js";

export class Stage {
  /** `drawn(header, arrived, blob, time)` is told of every live frame, when it is on the screen. */
  constructor(view, ambient, frame, drawn) {
    this.view = view;
    this.ambient = ambient;
    this.frame = frame;
    this.drawn = drawn;
    this.context = view.getContext("2d", { alpha: false });
    this.glow = ambient.getContext("2d", { alpha: false });
    // The same picture enlarged, over the view, which stays as the frames are.
    this.large = document.createElement("canvas");
    Object.assign(this.large, { id: "large", ariaHidden: "true" });
    this.large.hidden = true;
    view.after(this.large);
    this.largeContext = this.large.getContext("2d", { alpha: false });
    this.small = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    this.enlarger = null;
    this.queue = [];
    this.asked = 0;
    this.pace = () => null; // pictures of video per second; null: as they come
    this.due = 0;
    this.preview = null;
    this.painted = 0;
    this.smooth = false;
    this.scale = 1;
    new ResizeObserver(() => this.fit()).observe(frame);
  }

  /** Take over the size of a world's frames. */
  setSize(width, height) {
    this.view.width = width;
    this.view.height = height;
    this.ambient.width = this.ambient.height = 12;
    this.frame.parentElement.style.setProperty("--aspect", width / height);
    this.fit();
  }

  /** Enlarge by the largest whole number of screen pixels that there is room for. */
  fit() {
    const ratio = window.devicePixelRatio || 1;
    const { width, height } = this.view;
    const room = Math.min(this.frame.clientWidth / width, this.frame.clientHeight / height);
    const exact = room * ratio;
    this.scale = (exact >= 1 ? Math.floor(exact + 1e-6) : exact) / ratio;
    for (const { style } of [this.view, this.large]) {
      style.width = `${width * this.scale}px`;
      style.height = `${height * this.scale}px`;
    }
    const soft = this.smooth || exact < 1;
    this.view.style.imageRendering = soft ? "auto" : "pixelated";
    this._choose(this.smooth ? factorOf(width, height, this.scale * ratio) : 1);
  }

  /** Enlarge frames by a factor from now on, before the browser does the rest; 1: not at all. */
  _choose(factor) {
    const { width, height } = this.view;
    const { enlarger } = this;
    this.large.hidden = factor === 1;
    if (factor === 1) this.enlarger = null;
    else if (enlarger?.width !== width || enlarger.height !== height || enlarger.factor !== factor) {
      this.enlarger = new Enlarger(width, height, factor);
      this.small.canvas.width = width;
      this.small.canvas.height = height;
      this.large.width = width * factor;
      this.large.height = height * factor;
      this._enlarge(this.view);
    }
  }

  _enlarge(picture) {
    if (this.enlarger === null) return;
    const { width, height } = this.view;
    this.small.drawImage(picture, 0, 0, width, height, 0, 0, width, height);
    this.largeContext.putImageData(this.enlarger.enlarge(this.small.getImageData(0, 0, width, height).data), 0, 0);
  }

  /** What the player sees: the enlarged picture, where there is one. */
  get shown() {
    return this.enlarger === null ? this.view : this.large;
  }

  /** Draw a picture with the next frame of the screen; it is closed then. */
  push(header, picture, arrived, blob) {
    this.queue.push({ header, picture, arrived, blob });
    if (!this.asked) this.asked = requestAnimationFrame(() => this._draw());
  }

  /** Drop what is not drawn yet. */
  clear() {
    for (const entry of this.queue) entry.picture.close();
    this.queue = [];
  }

  _draw() {
    const now = performance.now();
    this.asked = 0;
    while (this.queue.length && this._isDue(now)) {
      const { header, picture, arrived, blob } = this.queue.shift();
      if (this.preview === null) this._paint(picture, header.width, header.height);
      picture.close();
      this.drawn(header, arrived, blob, performance.now());
    }
    if (this.queue.length) this.asked = requestAnimationFrame(() => this._draw());
  }

  // The pictures of one frame come at once, and are shown at the pace of the video; faster where
  // the next ones wait already.
  _isDue(now) {
    const { header } = this.queue[0];
    const fps = this.pace();
    if (!(header.num_pictures > 1) || header.shown || !fps) return true;
    if (now < this.due) return false;
    const period = this.queue.length > header.num_pictures ? 500 / fps : 1000 / fps;
    this.due = Math.max(this.due, now - period) + period;
    return true;
  }

  _paint(picture, width, height) {
    // An H.264 picture may have one row or column more than the frame.
    this.painted += 1;
    this.context.drawImage(picture, 0, 0, width, height, 0, 0, this.view.width, this.view.height);
    this._enlarge(width === this.view.width && height === this.view.height ? picture : this.view);
    this.glow.drawImage(this.view, 0, 0, this.ambient.width, this.ambient.height);
  }

  /** Show an old frame instead of the stream; null: none is at hand, a blank. */
  async showOld(frame, blob) {
    this.preview = frame;
    if (blob === null) this._blank();
    else await this._show(blob);
  }

  /** Back to the stream, whose newest frame is `blob`. */
  async showNew(blob) {
    this.preview = null;
    if (blob) await this._show(blob);
  }

  // What is painted while the picture is read is newer, and stays.
  async _show(blob) {
    const painted = (this.painted += 1);
    const picture = await createImageBitmap(blob);
    if (this.painted === painted) this._paint(picture, picture.width, picture.height);
    picture.close();
  }

  _blank() {
    this.painted += 1;
    this.context.fillStyle = "#15171b";
    this.context.fillRect(0, 0, this.view.width, this.view.height);
    this._enlarge(this.view);
    this.glow.fillStyle = "#15171b";
    this.glow.fillRect(0, 0, this.ambient.width, this.ambient.height);
  }

  /** The picture as JPEG, for streams whose payloads are none. */
  toBlob() {
    return new Promise((resolve) => this.view.toBlob(resolve, "image/jpeg", 0.9));
  }
}
