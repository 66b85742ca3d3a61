// The model of a site in a worker: it obeys the messages that a server obeys (docs/serving.md) and
// makes frames between them. Sessions live as long as the page.

import { fetchFiles } from "./files.js";
import { Model, Stream } from "./model.js";

const REACH = 2048; // frames that can be gone back
const EVERY = 64; // frames from one copy of a stream to the next
const QUEUE_FRAMES = 3; // frames that may be on their way to the screen
const MAX_SESSIONS = 8;

class Refused extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

let site = null; // world.json
let model = null;
let clips = null;
let current = null; // the session that is played
let tail = Promise.resolve();
let wake = () => {};
const sessions = new Map();
const uploads = new Map();

// --- opening ------------------------------------------------------------------------------------

async function open({ backend, threads: wanted }) {
  const answer = await fetch(new URL("world.json", import.meta.url), { cache: "no-cache" });
  if (!answer.ok) throw new Error(`world.json did not arrive (${answer.status}). Reload the page.`);
  site = await answer.json();
  // Only where it is asked for: with onnxruntime-web 1.30 it does not take weights in bfloat16.
  const gpu = backend === "webgpu" ? await navigator.gpu?.requestAdapter().catch(() => null) : null;
  const runtime = site.runtimes[gpu ? "webgpu" : "wasm"];
  const names = [...site.model_files, ...(site.clips ? [site.clips.file] : []), runtime.wasm];
  const files = await fetchFiles(site.files, names, (come, all) =>
    postMessage({ type: "progress", text: `Loading the world: ${mb(come)} of ${mb(all)} MB` }));
  postMessage({ type: "progress", text: "Starting the model" });
  const ort = await import(new URL(runtime.script, import.meta.url).href);
  const most = Math.min(4, navigator.hardwareConcurrency || 1, wanted || Infinity);
  const threads = self.crossOriginIsolated ? most : 1;
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmBinary = files[runtime.wasm].buffer;
  ort.env.wasm.wasmPaths = { mjs: new URL(runtime.loader, import.meta.url).href };
  ort.env.logLevel = "error";
  model = await Model.open(ort, site.model, files, [gpu ? "webgpu" : "wasm"]);
  clips = site.clips ? { ...site.clips, pixels: files[site.clips.file] } : null;
  const words = threads === 1 ? "one thread" : `${threads} threads`;
  loop();
  return {
    type: "welcome", world: site.world, limits: site.limits, codecs: ["png"], h264: "",
    backend: gpu ? "webgpu" : `wasm-${threads}`,
    words: gpu ? "WebGPU" : `WebAssembly with SIMD, ${words}`,
  };
}

const mb = (bytes) => (bytes / 1e6).toFixed(1);

// --- sessions -----------------------------------------------------------------------------------

class Session {
  constructor(start) {
    this.id = crypto.randomUUID();
    this.start = start;
    this.generation = 0;
    this.running = false;
    this.fps = null;
    this.action = site.world.actions.length ? idle() : null;
    this.sequence = 0;
    this.due = 0;
  }

  /** Begin anew, as the start says. */
  async begin() {
    const { seed = 0, steps, guidance, label, pixels, actions } = this.start;
    const how = { seed, steps: steps ?? site.world.default_steps, guidance: guidance ?? { kind: "none" }, label };
    this.stream = new Stream(model, how);
    const latents = [];
    for (const picture of pixels) latents.push(await model.latent(picture));
    await this.stream.begin(latents, actions);
    this.first = 0;
    this.frames = latents.map((latent, at) => ({ latent, action: actions[at], sequence: 0, steps: 0 }));
    this.given = latents.length;
    this.copies = [this.stream.fork()];
    this.heard = this.acknowledged = this.index;
  }

  get index() {
    return this.stream.numFrames - 1;
  }

  get oldest() {
    return this.copies[0].numFrames - 1;
  }

  state() {
    const { stream } = this;
    return {
      type: "state", session: this.id, generation: this.generation, frame: this.index,
      num_given: this.given, running: this.running, attached: this === current, fps: this.fps,
      action: this.action, sequence: this.sequence, steps: stream.steps,
      guidance: { scale: 1, context_noise: 0.05, parts: [], ...stream.guidance }, seed: stream.seed,
      history_from: this.oldest, kept_from: this.first,
    };
  }

  /** Keep the frame that the stream has just got: its latent, action, sequence and steps. */
  add(frame) {
    this.frames.push(frame);
    if (this.stream.numFrames - this.copies.at(-1).numFrames >= EVERY) this.copies.push(this.stream.fork());
    while (this.copies.length > 1 && this.copies[1].numFrames - 1 <= this.index - REACH) this.copies.shift();
    const surplus = this.frames.length - (REACH + EVERY);
    if (surplus > 0) {
      this.frames.splice(0, surplus);
      this.first += surplus;
    }
  }

  kept(frame) {
    if (frame < this.first || frame > this.index)
      throw new Refused("out_of_history", `Frames ${this.first} to ${this.index} are kept, frame ${frame} was asked for.`);
    return this.frames[frame - this.first];
  }

  /** The stream as it was when a frame was the newest: a copy, shown the frames since. */
  async at(frame) {
    if (frame < this.oldest || frame > this.index)
      throw new Refused("out_of_history", `Frames ${this.oldest} to ${this.index} can be gone back to, frame ${frame} was asked for.`);
    const { seed, steps, guidance } = this.stream;
    const copy = this.copies.findLast((one) => one.numFrames <= frame + 1);
    const stream = Object.assign(copy.fork(), { seed, steps, guidance });
    while (stream.numFrames <= frame) {
      const { latent, action } = this.kept(stream.numFrames);
      await stream.observe(latent, action);
    }
    return stream;
  }

  /** What is kept up to a frame. */
  upto(frame) {
    return {
      first: this.first, frames: this.frames.slice(0, frame + 1 - this.first),
      copies: this.copies.filter((one) => one.numFrames <= frame + 1),
    };
  }

  /** Go on from another newest frame, which nobody has to acknowledge. */
  restarted() {
    this.generation += 1;
    this.heard = this.acknowledged = this.index;
  }

  canBegin() {
    return this.running && this.heard - this.acknowledged < QUEUE_FRAMES;
  }

  async make() {
    const { stream, action, sequence } = this;
    const { steps } = stream;
    const { latent, encoder, decoder } = await stream.step(action);
    const began = performance.now();
    const pixels = await model.pixels(latent);
    const autoencoder = performance.now() - began;
    // Another action may be held by now.
    this.add({ latent, action, sequence, steps });
    this.heard = this.index;
    await send(this, this.index, pixels, { encoder_ms: encoder, decoder_ms: decoder, autoencoder_ms: autoencoder });
  }
}

function idle() {
  return site.world.action_dim ? site.model.idle_action : 0;
}

async function send(session, frame, pixels, more) {
  const kept = session.kept(frame);
  const { width, height } = site.world;
  const header = {
    type: "frame", session: session.id, generation: session.generation, frame,
    action: kept.steps ? kept.action : null, sequence: kept.sequence, steps: kept.steps,
    encoder_ms: 0, decoder_ms: 0, autoencoder_ms: 0, queued_ms: 0, codec: "png", key: true,
    width, height, shown: false, ...more,
  };
  const payload = await asPng(pixels);
  postMessage({ type: "frame", header, payload }, [payload]);
}

/** Lossless: what is rewound to is the very frame again. */
async function asPng(pixels) {
  const { width, height } = site.world;
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
  return (await canvas.convertToBlob({ type: "image/png" })).arrayBuffer();
}

async function showNewest(session) {
  if (session.index < session.first) return;
  const { latent } = session.kept(session.index);
  await send(session, session.index, await model.pixels(latent), { shown: true });
}

// --- messages: one function for each, as the methods of scd.serving.commands ---------------------

function played() {
  if (current === null) throw new Refused("no_session", "No stream is played: begin one.");
  return current;
}

async function moved(session) {
  current = session;
  // The page must know of a new session before it sees its frames.
  postMessage(session.state());
  await showNewest(session);
  return session.state();
}

const COMMANDS = {
  async create(message) {
    if (sessions.size >= MAX_SESSIONS)
      throw new Refused("too_many_takes", `There are ${MAX_SESSIONS} takes, which is all that this page keeps: delete one.`);
    const session = new Session(await started(message));
    await session.begin();
    sessions.set(session.id, session);
    return moved(session);
  },
  async attach({ session }) {
    const found = sessions.get(session);
    if (!found) throw new Refused("unknown_session", "the page was loaded anew");
    return moved(found);
  },
  async detach() {
    const session = played();
    session.running = false;
    current = null;
    return { type: "detached", session: session.id };
  },
  async reset(message) {
    const session = played();
    session.start = await started(message);
    return COMMANDS.restart(null, session.start);
  },
  async restart(_, start = null) {
    const session = played();
    const { seed, steps, guidance } = session.stream;
    session.start = start ?? { ...session.start, seed, steps, guidance };
    await session.begin();
    session.restarted();
    return moved(session);
  },
  async run({ fps }) {
    Object.assign(played(), { running: true, fps: fps ?? null });
    return current.state();
  },
  async pause() {
    played().running = false;
    return current.state();
  },
  async step({ action, count = 1 }) {
    const session = played();
    session.running = false;
    if (action !== null && action !== undefined) Object.assign(session, { action: flat(action), sequence: 0 });
    for (let made = 0; made < count; made += 1) await session.make();
    return session.state();
  },
  async set({ steps, guidance, seed }) {
    const { stream } = played();
    const isOwn = (one) => one.kind === "conditions";
    if (guidance && isOwn(guidance) !== isOwn(stream.guidance))
      throw new Refused("bad_request", "Guidance by action has a memory of its own: begin anew with it.");
    if (steps) stream.steps = checkedSteps(steps);
    if (guidance) stream.guidance = guidance;
    if (seed !== undefined && seed !== null) stream.seed = seed;
    return current.state();
  },
  async rewind({ frame }) {
    const session = played();
    session.stream = await session.at(frame);
    Object.assign(session, session.upto(frame));
    session.restarted();
    return moved(session);
  },
  async fork({ frame, seed }) {
    if (sessions.size >= MAX_SESSIONS)
      throw new Refused("too_many_takes", `There are ${MAX_SESSIONS} takes, which is all that this page keeps: delete one.`);
    const session = played();
    const index = frame ?? session.index;
    const { start, given, action } = session;
    const twin = Object.assign(new Session(start), { given, action, ...session.upto(index) });
    twin.stream = await session.at(index);
    if (seed !== undefined && seed !== null) twin.stream.seed = seed;
    twin.heard = twin.acknowledged = twin.index;
    session.running = false;
    sessions.set(twin.id, twin);
    current = twin;
    const state = { ...twin.state(), forked_from: session.id };
    postMessage(state);
    await showNewest(twin);
    return state;
  },
  async remove({ session }) {
    if (session === current?.id) current = null;
    sessions.delete(session);
    return { type: "detached", session };
  },
  async show({ session, frame }) {
    const found = sessions.get(session);
    if (!found) throw new Refused("unknown_session", "This take is gone.");
    return { type: "shown", payload: await asPng(await model.pixels(found.kept(frame).latent)) };
  },
  async upload({ pixels }) {
    const upload = crypto.randomUUID();
    uploads.set(upload, pixels);
    return { type: "uploaded", upload, frames: 1 };
  },
  async ping() {
    return { type: "pong" };
  },
};

// Told at any time, while a frame is made too.
const AT_ONCE = {
  action({ action, sequence }) {
    if (current) Object.assign(current, { action: flat(action), sequence });
  },
  ack({ generation, frame }) {
    if (current?.generation === generation)
      current.acknowledged = Math.max(current.acknowledged, Math.min(frame, current.heard));
  },
};

/** An action as the graphs take it; parts by name become one vector. */
function flat(action) {
  if (typeof action !== "object" || action === null || Array.isArray(action)) return action;
  return site.model.model.conditions.action_parts.flatMap((part) => action[part.name]);
}

function checkedSteps(steps) {
  const most = site.limits.max_steps;
  if (!Number.isInteger(steps) || steps < 1 || steps > most)
    throw new Refused("bad_field", `steps: must lie in 1 .. ${most} here, got ${steps}`);
  return steps;
}

/** What a stream begins with: pixels of given frames and what led to them. */
async function started(message) {
  const { start = "nothing", clip = 0, upload } = message;
  if (message.steps) checkedSteps(message.steps);
  const given = { ...message, pixels: [], actions: [] };
  if (start === "clip") {
    if (!clips || clip >= clips.count)
      throw new Refused("unknown_clip", `This world has ${clips?.count ?? 0} clips, number ${clip} was asked for.`);
    const { frames: length, size, pixels } = clips;
    for (let frame = 0; frame < length; frame += 1) {
      const from = (clip * length + frame) * size;
      given.pixels.push(pixels.subarray(from, from + size));
    }
    given.actions = clips.actions[clip];
  } else if (start === "upload") {
    const pixels = uploads.get(upload);
    if (!pixels) throw new Refused("unknown_upload", "The picture is gone: choose it again.");
    Object.assign(given, { pixels: [pixels], actions: [message.action ?? idle()] });
  } else if (site.world.needs_start) {
    throw new Refused("bad_field", "This world cannot begin from nothing: choose a clip or a picture.");
  }
  return given;
}

// --- the loop -----------------------------------------------------------------------------------

/** One at a time: messages and frames. */
function exclusive(work) {
  const done = tail.then(work);
  tail = done.catch(() => {});
  return done;
}

/** Let messages that wait be heard; a timer would take 4 ms. */
const { port1, port2 } = new MessageChannel();
const breath = () => new Promise((resolve) => {
  port1.onmessage = resolve;
  port2.postMessage(null);
});

async function loop() {
  for (;;) {
    await breath();
    if (!current?.canBegin()) {
      await new Promise((resolve) => (wake = resolve));
      continue;
    }
    const wait = current.due - performance.now();
    if (wait > 0) {
      await new Promise((resolve) => setTimeout(resolve, wait));
      continue;
    }
    await exclusive(async () => {
      const session = current;
      if (!session?.canBegin()) return;
      const began = performance.now();
      session.due = session.fps ? Math.max(session.due + 1000 / session.fps, began) : 0;
      try {
        await session.make();
      } catch (error) {
        session.running = false;
        sessions.delete(session.id);
        current = null;
        postMessage({ type: "stopped", session: session.id, reason: `${error.message}.` });
      }
    });
  }
}

onmessage = async ({ data }) => {
  const { type, request } = data;
  if (type in AT_ONCE) {
    AT_ONCE[type](data);
    wake();
    return;
  }
  try {
    const answer = type === "open" ? await open(data) : await exclusive(() => COMMANDS[type](data));
    postMessage({ ...answer, request });
  } catch (error) {
    postMessage({ type: "error", request, code: error.code ?? "fault", message: error.message });
  }
  wake();
};
