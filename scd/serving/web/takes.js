// What this browser has seen of each session: a take is one, forks are takes of their own.

const MAX_FRAMES = 4000;

export class Take {
  /** `reach`: frames that the server keeps, about. */
  constructor(state, number, reach, parent = null, forkedAt = null) {
    this.reach = reach;
    this.id = state.session;
    this.number = number;
    this.parent = parent;
    this.forkedAt = forkedAt;
    this.frames = new Map();
    this.begun = null; // what it was begun with; null: this page did not begin it
    this.update(state);
  }

  /** Take over what the server says; a new generation has the past up to its newest frame in
   *  common with this one (`keeps`), or nothing. */
  update(state, keeps = false) {
    const began = this.state && state.generation !== this.state.generation;
    // From its beginning on a take is told by its actions only while all else stays as it was.
    const how = JSON.stringify([state.seed, state.steps, state.guidance, state.prompt]);
    this.changed = this.state && !(began && !keeps) ? this.changed || how !== this.how : false;
    this.how = how;
    this.state = state;
    this.newest = state.frame;
    if (began) this.cut(keeps ? state.frame : -1);
  }

  /** Oldest frame that can be gone back to; states are rarer than frames, hence the sum. */
  get from() {
    return Math.max(0, this.state.history_from, this.newest - this.reach);
  }

  /** Keep a frame's picture and what led to it. */
  record(header, blob) {
    this.newest = Math.max(this.newest, header.frame);
    const known = this.frames.get(header.frame);
    // A frame that is shown again does not say what led to it: what is known stays.
    const action = header.shown && known ? known.action : header.action;
    const steps = header.shown && known ? known.steps : header.steps;
    this.frames.set(header.frame, { blob: blob ?? known?.blob ?? null, action, steps });
    this.frames.delete(header.frame - MAX_FRAMES);
  }

  cut(frame) {
    for (const index of [...this.frames.keys()]) if (index > frame) this.frames.delete(index);
  }

  /** A take of a fork, with all that was seen until then. */
  fork(state, number) {
    const copy = new Take(state, number, this.reach, this, state.frame);
    copy.begun = this.begun;
    copy.changed = this.changed || copy.how !== this.how;
    for (const [index, seen] of this.frames) if (index <= state.frame) copy.frames.set(index, seen);
    return copy;
  }
}
