// A stream that is played, and its past: what can be gone back to, to the very frame.

import { Stream } from "./model.js";

const REACH = 2048; // frames that can be gone back
const EVERY = 64; // frames from one copy of a stream to the next
const QUEUE_FRAMES = 3; // frames that may be on their way to the screen

/** What a message asks for and cannot have; `code` is for programs. */
export class Refused extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

export class Session {
  /** `start`: what a message of the page chose, with the latents and actions that it stands for. */
  constructor(model, start) {
    Object.assign(this, { model, start });
    this.id = crypto.randomUUID();
    this.generation = 0;
    this.running = false;
    this.fps = null;
    this.action = model.idle;
    this.sequence = 0;
    this.due = 0;
  }

  /** Begin anew, as the start says. */
  async begin() {
    const { seed = 0, steps, guidance, label, latents, actions } = this.start;
    const how = { seed, steps: steps ?? this.model.about.sampling.num_steps, guidance: guidance ?? { kind: "none" }, label };
    this.stream = new Stream(this.model, how);
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
      num_given: this.given, running: this.running, fps: this.fps,
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

  /** Go back: the frame becomes the newest one again. */
  async rewind(frame) {
    this.stream = await this.at(frame);
    Object.assign(this, this.upto(frame));
    this.restarted();
  }

  /** Go on from another newest frame, which nobody has to acknowledge. */
  restarted() {
    this.generation += 1;
    this.heard = this.acknowledged = this.index;
  }

  canBegin() {
    return this.running && this.heard - this.acknowledged < QUEUE_FRAMES;
  }

  /** Make the next frame; returns the milliseconds of its parts. */
  async make() {
    const { stream, action, sequence } = this;
    const { steps } = stream;
    const { latent, encoder, decoder } = await stream.step(action);
    // Another action may be held by now.
    this.add({ latent, action, sequence, steps });
    this.heard = this.index;
    return { encoder_ms: encoder, decoder_ms: decoder };
  }
}
