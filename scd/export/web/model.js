// An exported world as streams: the graphs of `scd export onnx`, the ring of keys and values around
// them, positions, guidance and solver. The twin of scd/export/onnx_engine.py and of Rollout.

import { frameNoise, stepNoises } from "./noise.js";

const HIDDEN = -1e9; // added to the logits of what is not seen

const product = (sizes) => sizes.reduce((all, one) => all * one, 1);

/** The graphs of a world. */
export class Model {
  /** `about`: what `scd export onnx` says; `files`: graphs and weights by name. */
  static async open(ort, about, files, providers) {
    const model = new Model();
    const { model: config } = about;
    Object.assign(model, { ort, about, config, spec: config.conditions, sessions: {} });
    const weights = { path: about.weights.file.split("/").at(-1), data: files[about.weights.file] };
    for (const [name, { file }] of Object.entries(about.graphs))
      model.sessions[name] = await ort.InferenceSession.create(files[file], {
        executionProviders: providers,
        externalData: [weights],
        graphOptimizationLevel: "all",
        logSeverityLevel: 3,
      });
    const { shape, block, cache, encoder } = config;
    const { num_actions: ids, action_dim: entries } = config.conditions;
    model.idle = ids ? 0 : entries ? about.idle_action : null; // the action that does nothing
    model.latentSize = shape.channels * shape.height * shape.width;
    model.rows = shape.height / shape.patch_size;
    model.columns = shape.width / shape.patch_size;
    model.numTokens = model.rows * model.columns;
    model.numHeads = block.width / block.head_dim;
    model.layers = encoder.num_layers;
    model.window = cache.window;
    return model;
  }

  /** Run a graph; what it does not take is left out. */
  async run(name, given) {
    const feeds = {};
    const { inputs, outputs } = this.about.graphs[name];
    for (const [key, { type, shape }] of Object.entries(inputs))
      feeds[key] = new this.ort.Tensor(TYPES[type], given[key], shape);
    const results = await this.sessions[name].run(feeds);
    const found = {};
    for (const key of Object.keys(outputs)) found[key] = results[key].data;
    return found;
  }

  /** What steers a frame, as the graphs take it. `hidden`: all of it is; `parts`: which are. */
  steering(action, label, hidden, parts) {
    const { spec } = this;
    const given = {};
    if (spec.num_actions) given.action = Int32Array.of(action ?? 0);
    else if (spec.action_dim) given.action = Float32Array.from(action ?? this.about.idle_action);
    given.hidden_action = Uint8Array.of(hidden && !parts.length ? 1 : 0);
    const names = (spec.action_parts ?? []).map((part) => part.name);
    given.hidden_parts = Uint8Array.from(names, (part) => (hidden && parts.includes(part) ? 1 : 0));
    given.label = Int32Array.of(label ?? 0);
    given.hidden_label = Uint8Array.of(hidden && !parts.length ? 1 : 0);
    return given;
  }

  /** Cosines and sines of angles of positions (frame, row, column), token by token. */
  rotary(positions) {
    const { rotary_axes: axes, rotary_theta: theta, head_dim: dim } = this.config.block;
    const half = dim / 2;
    const cosine = new Float32Array(positions.length * half);
    const sine = new Float32Array(positions.length * half);
    positions.forEach((position, token) => {
      let entry = token * half;
      axes.forEach((size, axis) => {
        for (let at = 0; at < size; at += 2) {
          const angle = position[axis] * theta ** (-at / Math.max(size, 1));
          cosine[entry] = Math.cos(angle);
          sine[entry] = Math.sin(angle);
          entry += 1;
        }
      });
    });
    return { cosine, sine };
  }

  rotaryOfFrame(frame) {
    const positions = Array.from({ length: this.numTokens }, (_, at) =>
      [frame, Math.floor(at / this.columns), at % this.columns]);
    return this.rotary(positions);
  }

  /** A latent as pixels, RGBA. */
  async pixels(latent) {
    const { frame } = await this.run("decode", { latent });
    const size = frame.length / 3;
    const pixels = new Uint8ClampedArray(4 * size).fill(255);
    for (let colour = 0; colour < 3; colour += 1)
      for (let at = 0; at < size; at += 1)
        pixels[4 * at + colour] = (frame[colour * size + at] + 1) * 127.5;
    return pixels;
  }

  /** Pixels, RGB or RGBA, as a latent. */
  async latent(pixels) {
    const size = product(this.about.graphs.encode.inputs.frame.shape) / 3;
    const stride = pixels.length / size;
    const frame = new Float32Array(3 * size);
    for (let colour = 0; colour < 3; colour += 1)
      for (let at = 0; at < size; at += 1)
        frame[colour * size + at] = pixels[stride * at + colour] / 127.5 - 1;
    return (await this.run("encode", { frame })).latent;
  }

  /** Latents of a clip's frames, which stand in the clips' file, or are made of the pixels there. */
  async clip({ kind, frames, size, data }, number) {
    const latents = [];
    for (let frame = number * frames; frame < (number + 1) * frames; frame += 1) {
      const [from, to] = [frame * size, (frame + 1) * size];
      const stored = kind === "latents" ? new Float32Array(data.slice(from, to).buffer) : null;
      latents.push(stored ?? (await this.latent(data.subarray(from, to))));
    }
    return latents;
  }
}

const TYPES = { float: "float32", int32: "int32", bool: "bool" };

/** Keys and values of the past: scd/models/kv_cache.py, of one stream. */
class Ring {
  constructor(model) {
    this.model = model;
    const size = product(model.about.graphs.encoder.inputs.keys.shape);
    this.keys = new Float32Array(size);
    this.values = new Float32Array(size);
    this.slots = [];
    this.sinks = null;
    this.evicted = 0;
  }

  fork() {
    const twin = new Ring(this.model);
    twin.keys.set(this.keys);
    twin.values.set(this.values);
    // What the sinks were written as never changes.
    Object.assign(twin, { slots: [...this.slots], sinks: this.sinks, evicted: this.evicted });
    return twin;
  }

  makeRoom() {
    const { window, num_sinks: sinks, rebase_sinks: rebases } = this.model.config.cache;
    if (this.slots.filter((frame) => frame !== null).length < window) return;
    let oldest = sinks;
    for (let slot = sinks; slot < window; slot += 1)
      if (this.slots[slot] < this.slots[oldest]) oldest = slot;
    this.slots[oldest] = null;
    this.evicted += 1;
    if (rebases && sinks) this._moveSinks(sinks);
  }

  // Always from the keys as first written, so that no rounding adds up.
  _moveSinks(sinks) {
    const { numTokens, layers, numHeads, window, config } = this.model;
    const dim = config.block.head_dim;
    const size = sinks * numTokens * dim;
    const stride = window * numTokens * dim;
    if (this.sinks === null) {
      this.sinks = new Float32Array(layers * numHeads * size);
      for (let head = 0; head < layers * numHeads; head += 1)
        this.sinks.set(this.keys.subarray(head * stride, head * stride + size), head * size);
    }
    for (let slot = 0; slot < sinks; slot += 1) this.slots[slot] += 1;
    const { cosine, sine } = this.model.rotary([[this.evicted, 0, 0]]);
    for (let head = 0; head < layers * numHeads; head += 1)
      for (let at = 0; at < size; at += 2) {
        const pair = (at % dim) / 2;
        const even = this.sinks[head * size + at];
        const odd = this.sinks[head * size + at + 1];
        this.keys[head * stride + at] = even * cosine[pair] - odd * sine[pair];
        this.keys[head * stride + at + 1] = even * sine[pair] + odd * cosine[pair];
      }
  }

  /** What is added to the logits of each slot, and of the row's own. */
  bias(row) {
    const slope = this.model.config.block.distance_bias ?? 0;
    const bias = new Float32Array(this.model.window + 1).fill(HIDDEN);
    this.slots.forEach((frame, slot) => {
      if (frame !== null) bias[slot] = slope * (frame - row);
    });
    bias[this.model.window] = 0;
    return bias;
  }

  /** Write a row behind the others, or where one has left; `advance` keeps it. */
  write(keys, values) {
    const { numTokens, layers, numHeads, window, config } = this.model;
    const size = numTokens * config.block.head_dim;
    const start = this._next() * size;
    for (let head = 0; head < layers * numHeads; head += 1) {
      const place = head * window * size + start;
      this.keys.set(keys.subarray(head * size, (head + 1) * size), place);
      this.values.set(values.subarray(head * size, (head + 1) * size), place);
    }
  }

  advance(row) {
    this.slots[this._next()] = row;
  }

  _next() {
    const empty = this.slots.indexOf(null);
    return empty < 0 ? this.slots.length : empty;
  }
}

/** A stream: `begin`, then `step` for each frame; `observe` puts one in, `fork` copies. */
export class Stream {
  constructor(model, { seed, steps, guidance, label }) {
    Object.assign(this, { model, seed, steps, guidance, label });
  }

  /** Start from given latents and the action that led to each. */
  async begin(latents, actions) {
    const { model } = this;
    const branches = this.guidance.kind === "conditions" ? 2 : 1;
    this.rings = Array.from({ length: branches }, () => new Ring(model));
    this.row = model.config.encoder.start_frame ? -1 : 0;
    this.newest = null;
    this.numFrames = latents.length;
    for (; this.row < latents.length - 1; this.row += 1) {
      this.newest = this.row < 0 ? null : latents[this.row];
      await this._extend(actions[this.row + 1]);
      for (const ring of this.rings) ring.advance(this.row);
    }
    this.newest = this.row < 0 ? null : latents[this.row];
  }

  /** Run the encoder for the next frame; return the context of each branch. */
  async _extend(action) {
    const { model, row } = this;
    const contexts = [];
    const blank = this.newest ?? new Float32Array(model.latentSize);
    const rotary = model.rotaryOfFrame(row);
    for (const [branch, ring] of this.rings.entries()) {
      ring.makeRoom();
      const steering = this._steering(action, branch);
      const found = await model.run("encoder", {
        frame: blank, is_start: Uint8Array.of(row < 0 ? 1 : 0), ...rotary,
        keys: ring.keys, values: ring.values, bias: ring.bias(row), ...steering,
      });
      ring.write(found.new_keys, found.new_values);
      contexts.push({ context: found.context, scale: found.norm_scale, steering });
    }
    return contexts;
  }

  // The unconditional branch stands first.
  _steering(action, branch) {
    const hidden = this.rings.length === 2 && branch === 0;
    return this.model.steering(action, this.label, hidden, this.guidance.parts ?? []);
  }

  async _prepared(contexts) {
    const branches = [...contexts];
    if (this.guidance.kind === "context_noise") {
      const { context, scale, steering } = contexts[0];
      const noise = frameNoise(this.seed, this.numFrames, "context", context.length);
      const strength = this.guidance.context_noise ?? 0.05;
      const noisy = context.map((value, at) => value + strength * noise[at] * scale[at % scale.length]);
      branches.unshift({ context: noisy, steering });
    }
    const prepared = [];
    for (const { context, steering } of branches)
      prepared.push(await this.model.run("prepare", { context, ...steering }));
    return prepared;
  }

  /** Make the next frame; returns its latent, and the milliseconds of its parts. */
  async step(action) {
    const began = performance.now();
    const prepared = await this._prepared(await this._extend(action));
    const encoded = performance.now();
    const latent = await this._denoised(prepared);
    this._keep(latent);
    return { latent, encoder: encoded - began, decoder: performance.now() - encoded };
  }

  async _denoised(prepared) {
    const { model, seed, numFrames, steps } = this;
    const { times, calls, num_noises: number } = model.about.schedules[steps];
    const noises = stepNoises(seed, numFrames, number, model.latentSize);
    let frame = frameNoise(seed, numFrames, "frame", model.latentSize);
    let start = frame;
    let before = null;
    for (const call of calls) {
      const velocity = await this._velocity(prepared, frame, times[call.index]);
      const next = new Float32Array(frame.length);
      const noise = call.step_noise ? noises[call.index] : null;
      for (let at = 0; at < next.length; at += 1) {
        let value = call.keep * start[at] + call.gain * velocity[at];
        if (call.gain_before) value += call.gain_before * before[at];
        if (noise !== null) value += call.step_noise * noise[at];
        next[at] = value;
      }
      [frame, before] = [next, velocity];
      if (call.ends_step) start = frame;
    }
    return frame;
  }

  async _velocity(prepared, noisy, time) {
    const found = [];
    const times = { time: Float32Array.of(time), ticks: Float32Array.of(1000 * time) };
    for (const each of prepared)
      found.push((await this.model.run("velocity", { noisy, ...times, ...each })).velocity);
    if (found.length === 1) return found[0];
    const [hidden, seen] = found;
    const { scale } = this.guidance;
    return seen.map((value, at) => hidden[at] + scale * (value - hidden[at]));
  }

  /** Put in a frame and the action that led to it. */
  async observe(latent, action) {
    await this._extend(action);
    this._keep(latent);
  }

  _keep(latent) {
    for (const ring of this.rings) ring.advance(this.row);
    this.newest = latent;
    this.row += 1;
    this.numFrames += 1;
  }

  fork() {
    const twin = new Stream(this.model, this);
    const { row, newest, numFrames } = this;
    return Object.assign(twin, { row, newest, numFrames, rings: this.rings.map((ring) => ring.fork()) });
  }
}
