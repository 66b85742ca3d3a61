// One player's sessions: what is asked of the server, and what the page knows of its answers.
// Events: world, change, take, words. Frames go from the connection to `pictures`.

import { Connection, Lost, Refused } from "./connection.js";
import { Take } from "./takes.js";

const REMEMBERED = "scd session";
const BUSY_MS = 400;
// A server may take so long to notice that a connection is gone which was cut, not closed.
const BUSY_TRIES = 110;
const BUSY_TRIES_AFTER_RELOAD = 5;

export class Player extends EventTarget {
  constructor(address, token, pictures) {
    super();
    this.pictures = pictures;
    this.takes = [];
    this.take = null;
    this.world = null;
    this.limits = null;
    this.codecs = [];
    this.h264 = "";
    this.wantsRun = true;
    this.fps = null;
    this.asleep = false;
    this.isBusy = this.isRewinding = false;
    this.link = { name: "connecting", reason: "" };
    this.sequence = 0;
    this.held = null;
    this.connection = new Connection(address, token);
    this._listen();
  }

  get isRunning() {
    return Boolean(this.take?.state.running) && this.link.name === "live" && !this.asleep;
  }

  get newest() {
    return this.take?.newest ?? -1;
  }

  open() {
    this.connection.open();
  }

  _listen() {
    const on = (name, react) =>
      this.connection.addEventListener(name, (event) => react(event.detail));
    on("welcome", (welcome) => this._welcomed(welcome));
    on("state", (state) => this._stated(state));
    on("frame", ({ header, payload, arrived }) => {
      if (header.session === this.take?.id && header.generation === this.take.state.generation)
        this.pictures.push(header, payload, arrived);
    });
    on("problem", (error) => this._say(error.message, "bad"));
    on("status", (status) => {
      if (status.name !== "connecting" || this.link.name !== "lost") this.link = status;
      this.pictures.clear();
      this._changed();
    });
    on("stopped", ({ session, reason }) => {
      this._say(`This stream has ended: ${reason} Start another one.`, "bad");
      this._drop(session);
    });
    on("evicted", () => {
      this.asleep = true;
      this._changed();
    });
  }

  async _welcomed(welcome) {
    const first = this.world === null;
    const { world, limits, codecs, h264 } = welcome;
    Object.assign(this, { world, limits, codecs, h264 });
    this.link = { name: "live", reason: "" };
    this.fps ??= Math.min(welcome.limits.max_fps, welcome.world.fps);
    if (first) this.dispatchEvent(new Event("world"));
    const known = this.take?.id ?? sessionStorage.getItem(REMEMBERED);
    try {
      if (known && (await this._attach(known, first))) return;
      const beginning = this.take === null ? this.firstBeginning() : null;
      if (beginning !== null) await this.begin(beginning);
      else this._changed();
    } catch (error) {
      this.tell(error);
    }
  }

  /** What a new player begins with; null: the world wants words first. */
  firstBeginning() {
    if (this.world.takes_prompt && !this.world.prompt) return null;
    return this.world.clips > 0 ? { start: "clip", clip: 0 } : { start: "nothing" };
  }

  async _attach(session, first) {
    for (let tries = 0; ; tries += 1) {
      try {
        await this.connection.ask({ type: "attach", session });
        this.asleep = this.isBusy = false;
        if (this.wantsRun) await this.run();
        return true;
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        if (error.code === "session_busy" && tries < (first ? BUSY_TRIES_AFTER_RELOAD : BUSY_TRIES)) {
          this.isBusy = !first;
          this._changed();
          await new Promise((resolve) => setTimeout(resolve, BUSY_MS));
          continue;
        }
        // A copy of this tab plays it: this one begins its own.
        if (first) return false;
        this._say(`The server no longer has this stream (${error.message}). Here is a new one.`);
        this._drop(session);
        return false;
      }
    }
  }

  _stated(state) {
    let take = this.takes.find((one) => one.id === state.session);
    const voided = take !== undefined && take.state.generation !== state.generation;
    if (take === undefined) {
      const parent = this.takes.find((one) => one.id === state.forked_from);
      const number = 1 + Math.max(0, ...this.takes.map((one) => one.number));
      take = parent
        ? parent.fork(state, number)
        : new Take(state, number, this.limits.history_frames);
      // Branches stand right below what they were forked from.
      const place = parent ? this.takes.indexOf(parent) + 1 : this.takes.length;
      this.takes.splice(place, 0, take);
    } else {
      take.update(state, this.isRewinding);
    }
    const other = this.take !== take;
    this.take = take;
    sessionStorage.setItem(REMEMBERED, take.id);
    if (voided || other) this.dispatchEvent(new Event("take"));
    this._changed();
  }

  _drop(session) {
    this.takes = this.takes.filter((one) => one.id !== session);
    if (this.take?.id === session) {
      this.take = null;
      sessionStorage.removeItem(REMEMBERED);
      this.dispatchEvent(new Event("take"));
    }
    this._changed();
  }

  /** Ask something; what goes wrong is told in words. Returns the answer, or null. */
  async ask(message) {
    try {
      if (this.asleep) await this._attach(this.take.id, false);
      return await this.connection.ask(message);
    } catch (error) {
      this.tell(error);
      return null;
    }
  }

  /** Begin a stream: in the session that there is, or in a new one. */
  async begin(beginning) {
    const old = this.take;
    if (old !== null) this.pictures.clear();
    const answer = await this.ask({ type: old === null ? "create" : "reset", ...beginning });
    if (answer !== null) {
      const { seed, steps, guidance, prompt } = answer;
      this.take.begun = { ...beginning, seed, steps, guidance, ...(prompt ? { prompt } : {}) };
    }
    if (answer !== null && this.wantsRun) await this.run();
    return answer;
  }

  async run() {
    this.wantsRun = true;
    if (this.take === null) return;
    if (this.held !== null) this.hold(this.held);
    await this.ask({ type: "run", fps: this.fps });
  }

  async pause() {
    this.wantsRun = false;
    if (this.take !== null) await this.ask({ type: "pause" });
  }

  async step(action = null) {
    await this.ask({ type: "step", action, count: 1 });
  }

  /** Hold an action from the next frame on; its frames carry the number of now. */
  hold(action) {
    // Before there is a session nothing obeys; a world of words waits for its prompt.
    if (this.take === null) return;
    this.sequence += 1;
    this.connection.send({ type: "action", action, sequence: this.sequence });
  }

  set(settings) {
    return this.ask({ type: "set", ...settings });
  }

  async rewind(frame) {
    this.isRewinding = true;
    const answer = await this.ask({ type: "rewind", frame });
    this.isRewinding = false;
    return answer;
  }

  /** Go on in a copy that ends with `frame`; null: with the newest. */
  async fork(frame) {
    const running = this.wantsRun;
    const answer = await this.ask({ type: "fork", frame });
    if (answer !== null && running) await this.run();
    return answer;
  }

  /** Go on in another take. */
  async choose(take) {
    const from = this.take;
    if (take === from) return;
    if (this.asleep || (await this.ask({ type: "detach" })) !== null) {
      this.asleep = false;
      const answer = await this.ask({ type: "attach", session: take.id });
      if (answer === null && from !== null) await this.ask({ type: "attach", session: from.id });
      else if (this.wantsRun) await this.run();
    }
  }

  /** Delete a take that is not played. */
  async remove(take) {
    try {
      await this.connection.remove(take.id);
      this._drop(take.id);
      this.dispatchEvent(new Event("take"));
    } catch (error) {
      this.tell(error);
    }
  }

  /** Forget the sessions of this tab: the next page begins its own. */
  forget() {
    sessionStorage.removeItem(REMEMBERED);
    this.takes = [];
  }

  /** Say that this page is left, which may also be that it is loaded anew: then it attaches again. */
  leave() {
    for (const { id } of this.takes) this.connection.leave(id);
  }

  /** Ask for the picture of a frame that was made before this page was there; null: known. */
  async fetchFrame(frame) {
    const { take } = this;
    if (take.frames.get(frame)?.blob) return null;
    try {
      const blob = await this.connection.picture(take.id, frame);
      take.frames.set(frame, { action: null, steps: 0, ...take.frames.get(frame), blob });
      return blob;
    } catch (error) {
      if (!(error instanceof TypeError)) this.tell(error);
      return null;
    }
  }

  /** Ask for the stream as MP4, as far back as the server keeps it; null: it cannot be had. */
  async fetchVideo() {
    return this.take === null ? null : this.connection.video(this.take.id);
  }

  acknowledge(header) {
    if (header.shown) return;
    const { generation, frame } = header;
    this.connection.send({ type: "ack", generation, frame });
  }

  useCodec(codec) {
    if (codec === this.connection.codec) return;
    this.pictures.clear();
    this.connection.reopen(codec);
  }

  tell(error) {
    // A loss shows by itself, and what was under way is asked for again.
    if (error instanceof Lost) return;
    this._say(ADVICE[error.code] ?? sentence(error.message), "bad");
  }

  _say(text, kind = "") {
    this.dispatchEvent(new CustomEvent("words", { detail: { text, kind } }));
  }

  _changed() {
    this.dispatchEvent(new Event("change"));
  }
}

const ADVICE = {
  too_many_sessions: "The server has no room for another take: delete one, or wait a little.",
  session_busy: "Somebody else plays this stream: it can be seen in one place at a time.",
};

function sentence(text) {
  const whole = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}
