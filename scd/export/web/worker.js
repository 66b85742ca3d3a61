// The model of a site in a worker: it obeys the messages that a server obeys (docs/serving.md) and
// makes frames between them. Sessions live as long as the page.

import { fetchFiles } from "./files.js";
import { Model } from "./model.js";
import { Refused, Session } from "./session.js";

const MAX_SESSIONS = 8;

let site = null; // world.json
let model = null;
let clips = null;
let current = null; // the session that is played
let tail = Promise.resolve();
let wake = () => {};
const sessions = new Map();
const uploads = new Map();

// --- opening ------------------------------------------------------------------------------------

let loading = null;

/** Load the world, once, as the address of the page asks. */
function load({ search }) {
  loading ??= loaded(new URLSearchParams(search));
  return loading;
}

async function loaded(asked) {
  const answer = await fetch(new URL("world.json", import.meta.url), { cache: "no-cache" });
  if (!answer.ok) throw new Error(`world.json did not arrive (${answer.status}). Reload the page.`);
  site = await answer.json();
  // Only where it is asked for: with onnxruntime-web 1.30 it takes no weights in bfloat16.
  const gpu = asked.get("backend") === "webgpu" ? await navigator.gpu?.requestAdapter().catch(() => null) : null;
  const runtime = site.runtimes[gpu ? "webgpu" : "wasm"];
  const names = [...site.model_files, ...(site.clips ? [site.clips.file] : []), runtime.wasm];
  const files = await fetchFiles(site.files, names, (come, all) =>
    postMessage({ type: "progress", text: `Loading the world: ${mb(come)} of ${mb(all)} MB` }));
  postMessage({ type: "progress", text: "Starting the model" });
  const ort = await import(new URL(runtime.script, import.meta.url).href);
  const most = Math.min(4, navigator.hardwareConcurrency || 1, Number(asked.get("threads")) || Infinity);
  const threads = self.crossOriginIsolated ? most : 1;
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmBinary = files[runtime.wasm].buffer;
  ort.env.wasm.wasmPaths = { mjs: new URL(runtime.loader, import.meta.url).href };
  ort.env.logLevel = "error";
  model = await Model.open(ort, site.model, files, [gpu ? "webgpu" : "wasm"]).catch((error) => {
    throw gpu ? new Error(`WebGPU does not take this world, which needs --weights fp32: ${error.message}`) : error;
  });
  clips = site.clips ? { ...site.clips, data: files[site.clips.file] } : null;
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

const stateOf = (session) => ({ ...session.state(), attached: session === current });

/** Make the next frame of a session and send it. */
async function make(session) {
  const times = await session.make();
  const began = performance.now();
  const pixels = await model.pixels(session.stream.newest);
  await send(session, session.index, pixels, { ...times, autoencoder_ms: performance.now() - began });
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
  postMessage(stateOf(session));
  await showNewest(session);
  return stateOf(session);
}

const COMMANDS = {
  async create(message) {
    if (sessions.size >= MAX_SESSIONS)
      throw new Refused("too_many_takes", `There are ${MAX_SESSIONS} takes, which is all that this page keeps: delete one.`);
    const session = new Session(model, await started(message));
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
    return stateOf(current);
  },
  async pause() {
    played().running = false;
    return stateOf(current);
  },
  async step({ action, count = 1 }) {
    const session = played();
    session.running = false;
    if (action !== null && action !== undefined) Object.assign(session, { action: flat(action), sequence: 0 });
    for (let made = 0; made < count; made += 1) await make(session);
    return stateOf(session);
  },
  async set({ steps, guidance, seed }) {
    const { stream } = played();
    const isOwn = (one) => one.kind === "conditions";
    if (guidance && isOwn(guidance) !== isOwn(stream.guidance))
      throw new Refused("bad_request", "Guidance by action has a memory of its own: begin anew with it.");
    if (steps) stream.steps = checkedSteps(steps);
    if (guidance) stream.guidance = guidance;
    if (seed !== undefined && seed !== null) stream.seed = seed;
    return stateOf(current);
  },
  async rewind({ frame }) {
    const session = played();
    await session.rewind(frame);
    return moved(session);
  },
  async fork({ frame, seed }) {
    if (sessions.size >= MAX_SESSIONS)
      throw new Refused("too_many_takes", `There are ${MAX_SESSIONS} takes, which is all that this page keeps: delete one.`);
    const session = played();
    const index = frame ?? session.index;
    const { start, given, action } = session;
    const twin = Object.assign(new Session(model, start), { given, action, ...session.upto(index) });
    twin.stream = await session.at(index);
    if (seed !== undefined && seed !== null) twin.stream.seed = seed;
    twin.heard = twin.acknowledged = twin.index;
    session.running = false;
    sessions.set(twin.id, twin);
    current = twin;
    const state = { ...stateOf(twin), forked_from: session.id };
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

/** What a stream begins with: latents of given frames and what led to them. */
async function started(message) {
  const { start = "nothing", clip = 0, upload } = message;
  if (message.steps) checkedSteps(message.steps);
  const given = { ...message, latents: [], actions: [] };
  if (start === "clip") {
    if (!clips || clip >= clips.count)
      throw new Refused("unknown_clip", `This world has ${clips?.count ?? 0} clips, number ${clip} was asked for.`);
    given.latents = await model.clip(clips, clip);
    given.actions = clips.actions[clip];
  } else if (start === "upload") {
    const pixels = uploads.get(upload);
    if (!pixels) throw new Refused("unknown_upload", "The picture is gone: choose it again.");
    Object.assign(given, { latents: [await model.latent(pixels)], actions: [message.action ?? model.idle] });
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
        await make(session);
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
  if (type === "load") {
    load(data).catch(() => {}); // who asks by "open" is told
    return;
  }
  try {
    const answer = type === "open" ? await load(data) : await exclusive(() => COMMANDS[type](data));
    postMessage({ ...answer, request });
  } catch (error) {
    postMessage({ type: "error", request, code: error.code ?? "fault", message: error.message });
  }
  wake();
};
