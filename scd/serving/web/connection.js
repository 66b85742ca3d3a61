// All that the page asks of a server: over a WebSocket messages out, answers and frames in, and
// again after a loss; files over HTTP. `scd export web` puts a model in the page in its place.
// Protocol: docs/serving.md. Events: welcome, state, frame, stopped, evicted, problem, status.

const VERSION = 1;
// Of JPEG. Small frames are shown large, and with less one sees waves around what is small in them.
const QUALITY = 97;
const RETRY_MS = [300, 700, 1500, 3000, 5000];
const FINAL = {
  1009: "A message was too large for the server.",
  4000: "The server did not understand a message of this page. Reload it.",
  4001: "This page and the server are of different versions. Reload the page.",
  4003: "The server wants a token: open the address that it printed, with its token.",
  4004: "The server refused too many messages of this page in a row. Reload it.",
  4500: "The model of this server has stopped. Start the server again.",
};

/** A message that the server refused; `code` is for programs, `message` for people. */
export class Refused extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

/** What was asked when the connection went away. */
export class Lost extends Error {}

export class Connection extends EventTarget {
  /** Prepare; `open` connects. Every welcome is an event, the first one and those after a loss. */
  constructor(address, token) {
    super();
    this.address = address;
    this.token = token;
    this.codec = "jpeg";
    this.socket = null;
    this.tries = 0;
    this.timer = 0;
    this.number = 0;
    this.waiting = new Map();
    this.finished = false;
  }

  get isOpen() {
    return this.socket !== null && this.socket.readyState === WebSocket.OPEN;
  }

  open() {
    clearTimeout(this.timer);
    this.finished = false;
    this._status("connecting");
    const socket = new WebSocket(this.address);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    socket.onopen = () =>
      this.ask({
        type: "hello",
        version: VERSION,
        token: this.token,
        codec: this.codec,
        quality: QUALITY,
      }).then(
        (welcome) => this._emit("welcome", welcome),
        (error) => {
          if (!(error instanceof Lost)) this._emit("problem", error);
        },
      );
    socket.onmessage = (event) => this._read(event.data);
    socket.onclose = (event) => {
      if (this.socket === socket) this._closed(event);
    };
  }

  /** Connect anew, with another codec. */
  reopen(codec) {
    this.codec = codec;
    const old = this.socket;
    this.socket = null;
    old?.close(1000);
    this._forget();
    this.tries = 0;
    this.open();
  }

  send(message) {
    if (!this.isOpen) return false;
    this.socket.send(JSON.stringify(message));
    return true;
  }

  /** Send a message and return a promise of its answer. */
  ask(message) {
    return new Promise((resolve, reject) => {
      const request = ++this.number;
      this.waiting.set(request, { resolve, reject });
      if (!this.send({ ...message, request })) {
        this.waiting.delete(request);
        reject(new Lost("there is no connection to the server"));
      }
    });
  }

  /** Send a picture or video to begin from; returns {upload, frames}. */
  async upload(file) {
    const headers = { "Content-Type": "application/octet-stream" };
    const answer = await this._fetch("v1/uploads", { method: "POST", body: file, headers });
    return answer.json();
  }

  /** The picture of a frame as a file. */
  async picture(session, frame) {
    return (await this._fetch(`${addressOf(session)}/frames/${frame}`)).blob();
  }

  /** The stream as MP4, as far back as the server keeps it; null: it cannot be had. */
  async video(session) {
    const answer = await this._fetch(`${addressOf(session)}/video`).catch(() => null);
    return answer?.blob() ?? null;
  }

  /** The worlds that can be chosen: {worlds, current, asked}. */
  async worlds() {
    return (await this._fetch("v1/worlds")).json();
  }

  /** A world's moving picture as a file. */
  async worldPicture(name) {
    return (await this._fetch(`v1/worlds/${encodeURIComponent(name)}/picture`)).blob();
  }

  /** Have the server open another world in place of this one. */
  async openWorld(name) {
    await this._fetch(`v1/worlds/${encodeURIComponent(name)}`, { method: "POST" });
  }

  /** Name of the world that is served now. */
  async worldName() {
    return (await (await this._fetch("v1/world", { cache: "no-store" })).json()).world.name;
  }

  /** Delete a session that is not played; one that is gone already is fine. */
  async remove(session) {
    await this._fetch(addressOf(session), { method: "DELETE" }, 404);
  }

  /** Say that the page of a session is left. */
  leave(session) {
    navigator.sendBeacon(`${addressOf(session)}/leave`);
  }

  /** Milliseconds of a small question to the server and its answer. */
  async roundTrip() {
    const begun = performance.now();
    await this._fetch("health", { cache: "no-store" });
    return performance.now() - begun;
  }

  async _fetch(address, settings = {}, fine = 200) {
    const token = this.token ? { Authorization: `Bearer ${this.token}` } : {};
    const answer = await fetch(address, { ...settings, headers: { ...settings.headers, ...token } });
    if (!answer.ok && answer.status !== fine) throw await refusal(answer);
    return answer;
  }

  _read(data) {
    if (typeof data !== "string") {
      const length = new DataView(data).getUint32(0, true);
      const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
      const payload = new Uint8Array(data, 4 + length);
      this._emit(header.type, { header, payload, arrived: performance.now() });
      this._answer(header.request, header);
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "error") {
      const error = new Refused(message.code, message.message);
      if (!this._answer(message.request, error)) this._emit("problem", error);
      return;
    }
    // A server that welcomes and breaks down is not asked again and again at once.
    if (message.type === "state") this.tries = 0;
    // Who asked hears last: by then the page has seen the new state.
    if (message.type !== "welcome") this._emit(message.type, message);
    this._answer(message.request, message);
  }

  _answer(request, answer) {
    const asked = this.waiting.get(request);
    if (asked === undefined) return false;
    this.waiting.delete(request);
    if (answer instanceof Error) asked.reject(answer);
    else asked.resolve(answer);
    return true;
  }

  _forget() {
    const waiting = [...this.waiting.values()];
    this.waiting.clear();
    for (const asked of waiting) asked.reject(new Lost("the connection was lost"));
  }

  _closed(event) {
    this.socket = null;
    this._forget();
    if (event.code in FINAL) {
      this.finished = true;
      this._status("closed", FINAL[event.code]);
      return;
    }
    const delay = RETRY_MS[Math.min(this.tries, RETRY_MS.length - 1)];
    this.tries += 1;
    this._status("lost", event.reason, delay);
    this.timer = setTimeout(() => this.open(), delay);
  }

  _status(name, reason = "", delay = 0) {
    this._emit("status", { name, reason, delay, tries: this.tries });
  }

  _emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}

/** What an HTTP answer says went wrong. */
async function refusal(answer) {
  const body = await answer.json().catch(() => null);
  const error = body?.error ?? body;
  const text = error?.message ?? `the server answered ${answer.status}`;
  return new Refused(error?.code ?? String(answer.status), text);
}

function addressOf(session) {
  return `v1/sessions/${encodeURIComponent(session)}`;
}

/** The token of the address, kept for this tab and no longer shown; null: none. */
export function readToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem("scd token", given);
    history.replaceState(null, "", location.pathname + location.search);
  }
  return given ?? sessionStorage.getItem("scd token");
}
