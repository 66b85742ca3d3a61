// In the place of a server: a worker that runs the model in this browser. The page's other scripts
// are those of `scd play`; this has the names of its connection.js, and emits the same events.

/** A message that was refused; `code` is for programs, `message` for people. */
export class Refused extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

/** What was asked when the model went away. */
export class Lost extends Error {}

const RATE_MS = 2000; // over which frames per second are counted
const LOADED_ANEW = "scd loaded anew";
const VERSION = "VERSION_OF_SITE";

export class Connection extends EventTarget {
  constructor() {
    super();
    this.codec = "png";
    this.number = 0;
    this.waiting = new Map();
    this.worker = null;
    this.drawn = [];
    this.frame = -1;
    document.body.classList.add("local");
    // Of a video browsers do not give all frames.
    document.getElementById("from-file").textContent = "your picture";
    document.getElementById("file").accept = "image/*";
    window.scd = this._shown();
  }

  /** What tests and other pages may look at. */
  _shown() {
    const connection = this;
    return {
      get frame() {
        return connection.frame;
      },
      get framesPerSecond() {
        const { drawn } = connection;
        const span = (drawn.at(-1) ?? 0) - (drawn[0] ?? 0);
        return span > 0 ? (1000 * (drawn.length - 1)) / span : 0;
      },
      backend: "",
    };
  }

  async open() {
    this._status("connecting", "Loading the world");
    try {
      checkBrowser();
      if (await isolated()) this._start();
    } catch (error) {
      this._status("closed", error.message);
    }
  }

  _start() {
    this.worker?.terminate();
    this.worker = window.scdWorker ?? new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    window.scdWorker = null;
    this.worker.onmessage = ({ data }) => this._read(data);
    this.worker.onerror = (event) => {
      event.preventDefault();
      this._failed(`The model's worker could not start: ${event.message || "its script did not arrive"}.`);
    };
    this.ask({ type: "open", search: location.search }).then(
      (welcome) => {
        window.scd.backend = welcome.backend;
        const place = document.getElementById("made-by");
        if (place) place.textContent = `Made in this browser, by ${welcome.words}.`;
        this._emit("welcome", welcome);
      },
      (error) => this._failed(error.message),
    );
  }

  _failed(text) {
    this.worker?.terminate();
    this.worker = null;
    for (const { reject } of this.waiting.values()) reject(new Lost(text));
    this.waiting.clear();
    this._status("closed", text);
  }

  reopen() {}

  send(message) {
    if (message.type === "ack") this._drew(message.frame);
    this.worker?.postMessage(message);
    return this.worker !== null;
  }

  _drew(frame) {
    const now = performance.now();
    this.frame = frame;
    this.drawn = [...this.drawn.filter((time) => now - time < RATE_MS), now];
  }

  /** Send a message and return a promise of its answer. */
  ask(message, transfer = []) {
    return new Promise((resolve, reject) => {
      if (this.worker === null) {
        reject(new Lost("there is no model"));
        return;
      }
      const request = ++this.number;
      this.waiting.set(request, { resolve, reject });
      this.worker.postMessage({ ...message, request }, transfer);
    });
  }

  _read(message) {
    if (message.type === "progress") {
      this._status("connecting", message.text);
      return;
    }
    if (message.type === "frame") {
      const { header, payload } = message;
      this._emit("frame", { header, payload: new Uint8Array(payload), arrived: performance.now() });
      return;
    }
    const asked = this.waiting.get(message.request);
    this.waiting.delete(message.request);
    if (message.type === "error") {
      const error = new Refused(message.code, message.message);
      if (asked) asked.reject(error);
      else this._emit("problem", error);
      return;
    }
    if (["state", "stopped"].includes(message.type)) this._emit(message.type, message);
    asked?.resolve(message);
  }

  /** Take a picture to begin from; returns {upload, frames}. */
  async upload(file) {
    const { width, height } = document.getElementById("view");
    const picture = await createImageBitmap(file).catch(() => {
      throw new Refused("not_media", "it is no picture that this browser reads (PNG, JPEG, WebP)");
    });
    // Cut to shape around the middle, then resized, as the server does.
    const factor = Math.min(picture.width / width, picture.height / height);
    const [cut, cutHeight] = [width * factor, height * factor];
    const canvas = new OffscreenCanvas(width, height);
    const context = canvas.getContext("2d", { alpha: false });
    context.imageSmoothingQuality = "high";
    context.drawImage(
      picture, (picture.width - cut) / 2, (picture.height - cutHeight) / 2, cut, cutHeight, 0, 0, width, height,
    );
    picture.close();
    const { data } = context.getImageData(0, 0, width, height);
    return this.ask({ type: "upload", pixels: data });
  }

  /** The picture of a frame as a file. */
  async picture(session, frame) {
    const { payload } = await this.ask({ type: "show", session, frame });
    return new Blob([payload], { type: "image/png" });
  }

  /** No MP4 is made without a server. */
  async video() {
    return null;
  }

  /** Delete a session. */
  async remove(session) {
    await this.ask({ type: "remove", session });
  }

  leave() {}

  /** Milliseconds of a small question to the model and its answer. */
  async roundTrip() {
    const begun = performance.now();
    await this.ask({ type: "ping" });
    return performance.now() - begun;
  }

  _status(name, reason = "") {
    this._emit("status", { name, reason, delay: 0, tries: 0 });
  }

  _emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}

/** There is no server, and so no token. */
export function readToken() {
  return null;
}

// A module of one function that returns a vector of 128 bits: only with SIMD is it valid.
const SIMD = Uint8Array.of(
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11,
);

/** Say what this browser lacks. */
function checkBrowser() {
  if (typeof Worker === "undefined" || typeof OffscreenCanvas === "undefined")
    throw new Error("This browser has no workers that draw, which the model needs: try a newer one.");
  if (typeof WebAssembly === "undefined" || !WebAssembly.validate(SIMD))
    throw new Error("This browser has no WebAssembly with SIMD, which the model needs: try a newer one.");
  if (!window.isSecureContext)
    throw new Error("Browsers check a world's files on https and on localhost alone: open the page there.");
}

/** Let the service worker add the headers that threads need; false: the page is loading anew. */
async function isolated() {
  if (!("serviceWorker" in navigator)) return true;
  // The page itself comes from the host; this script may be the one that is kept of a version before.
  const { content: version } = document.querySelector("meta[name=version]");
  const isOld = version !== VERSION;
  try {
    const registered = await navigator.serviceWorker.register(new URL("sw.js", import.meta.url));
    await navigator.serviceWorker.ready;
    // Only what comes through it is kept.
    if (isOld || !navigator.serviceWorker.controller) {
      const taken = controlled();
      if (isOld) await registered.update();
      await taken;
    }
  } catch {
    return true; // a private window, say: no threads, and nothing is kept
  }
  // Once for each version, since it may not help.
  if ((isOld || !window.crossOriginIsolated) && sessionStorage.getItem(LOADED_ANEW) !== version) {
    sessionStorage.setItem(LOADED_ANEW, version);
    location.reload();
    return false;
  }
  return true;
}

/** Wait until the service worker has taken this page over, or for three seconds. */
function controlled() {
  return new Promise((resolve) => {
    navigator.serviceWorker.addEventListener("controllerchange", resolve, { once: true });
    setTimeout(resolve, 3000);
  });
}
