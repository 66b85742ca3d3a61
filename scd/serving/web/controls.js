// The settings of a stream and what it begins from: controls -> what the player asks for.

import { element } from "./steering.js";

const PACES = [5, 10, 15, 20, 30, 60];
const SET_EVERY_MS = 120;

const byId = (name) => document.getElementById(name);

export class Controls {
  constructor(player, say) {
    this.player = player;
    this.say = say;
    this.pending = {};
    this.timer = 0;
    this.touched = -Infinity;
    this._watch();
  }

  /** Lay out the choices that a world has. */
  show() {
    const { world, limits } = this.player;
    const steps = byId("steps");
    steps.max = Math.min(limits.max_steps, Math.max(16, 2 * world.default_steps));
    byId("guidance-field").hidden = world.guidance.length < 2;
    const kinds = { none: "off", conditions: "by action", context_noise: "by context noise" };
    if (world.takes_prompt) kinds.conditions = world.actions.length ? "by words and action" : "by words";
    byId("prompt-card").hidden = !world.takes_prompt;
    byId("prompt").value ||= world.prompt ?? "";
    byId("guidance").replaceChildren(
      ...world.guidance.map((kind) => element("option", "", { value: kind }, kinds[kind] ?? kind)),
    );
    const own = Math.min(world.fps, limits.max_fps);
    const paces = PACES.filter((pace) => pace <= limits.max_fps);
    byId("speed").replaceChildren(
      element("option", "", { value: own }, `world's ${number(own)}`),
      ...paces.map((pace) => element("option", "", { value: pace }, String(pace))),
      element("option", "", { value: "" }, "as fast as it goes"),
    );
    byId("clips-row").hidden = world.clips === 0;
    byId("clip").replaceChildren(
      ...Array.from({ length: world.clips }, (_, clip) =>
        element("option", "", { value: clip }, `no. ${clip + 1}`),
      ),
    );
    byId("label-row").hidden = world.num_labels === 0;
    byId("label").max = world.num_labels - 1;
    // What was never taught to make a first frame makes stripes: offered where there is no clip.
    byId("from-nothing").hidden = !world.begins_from_nothing && world.clips > 0;
    byId("from-nothing").disabled = world.needs_start;
    byId("from-nothing").title = world.needs_start ? "this world begins from given frames" : "";
  }

  /** Show what the server says, unless the player is just moving it. */
  follow(state) {
    // A player who types has the word.
    if (state.prompt && document.activeElement !== byId("prompt")) byId("prompt").value = state.prompt;
    byId("prompt-cut").hidden = !state.prompt_cut;
    byId("prompt-cut").textContent = state.prompt_cut ?? "";
    if (performance.now() - this.touched < 600 || this.timer) return;
    byId("steps").value = state.steps;
    byId("steps-out").textContent = state.steps;
    byId("seed").value = state.seed;
    byId("guidance").value = state.guidance.kind;
    if (state.guidance.kind !== "none") byId("scale").value = state.guidance.scale;
    this._scale();
  }

  /** Begin with what is chosen. */
  begin(start) {
    const beginning = { seed: this._seed(), steps: Number(byId("steps").value), ...start };
    if (this.player.world.num_labels) beginning.label = Number(byId("label").value);
    const guidance = this._guidance();
    if (guidance.kind !== "none") beginning.guidance = guidance;
    const prompt = byId("prompt").value.trim();
    if (this.player.world.takes_prompt && prompt) beginning.prompt = prompt;
    return this.player.begin(beginning);
  }

  /** Send a file to the server and begin with it. */
  async upload(file) {
    const { limits } = this.player;
    if (file.size > limits.max_upload_bytes) {
      const most = number(limits.max_upload_bytes / 2 ** 20);
      this.say(`${file.name} has ${number(file.size / 2 ** 20)} MiB; the server takes ${most}.`, "bad");
      return;
    }
    this.say(`Sending ${file.name}`);
    try {
      const { upload, frames } = await this.player.connection.upload(file);
      if ((await this.begin({ start: "upload", upload })) !== null)
        this.say(`Begun from ${file.name}${frames > 1 ? `, ${frames} frames` : ""}.`);
    } catch (error) {
      const text = error instanceof TypeError ? "the server cannot be reached" : error.message;
      this.say(`${file.name} could not be used: ${text}`, "bad");
    }
  }

  _seed() {
    const seed = Number(byId("seed").value);
    return Number.isSafeInteger(seed) && seed >= 0 ? seed : 0;
  }

  _guidance() {
    const kind = byId("guidance").value || "none";
    return kind === "none" ? { kind } : { kind, scale: Number(byId("scale").value) };
  }

  _scale() {
    byId("scale-row").hidden = byId("guidance").value === "none";
    byId("scale-out").textContent = Number(byId("scale").value).toFixed(1);
  }

  // While a slider moves, the newest values are sent a few times a second.
  _set(settings) {
    this.touched = performance.now();
    Object.assign(this.pending, settings);
    this.timer ||= setTimeout(async () => {
      this.timer = 0;
      const settings = this.pending;
      this.pending = {};
      const answer = await this.player.set(settings);
      this.touched = -Infinity;
      if (answer === null && this.player.take) this.follow(this.player.take.state);
    }, SET_EVERY_MS);
  }

  _watch() {
    byId("steps").addEventListener("input", () => {
      byId("steps-out").textContent = byId("steps").value;
      this._set({ steps: Number(byId("steps").value) });
    });
    const guide = () => {
      this._scale();
      this._set({ guidance: this._guidance() });
    };
    byId("guidance").addEventListener("change", guide);
    byId("scale").addEventListener("input", guide);
    byId("seed").addEventListener("change", () => {
      byId("seed").value = this._seed();
      this._set({ seed: this._seed() });
    });
    byId("dice").onclick = () => {
      byId("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;
      this._set({ seed: this._seed() });
    };
    byId("speed").onchange = () => {
      this.player.fps = byId("speed").value === "" ? null : Number(byId("speed").value);
      if (this.player.isRunning) this.player.run();
    };
    byId("prompt-form").onsubmit = async (event) => {
      event.preventDefault();
      const prompt = byId("prompt").value.trim();
      if (!prompt || !this.player.world) return;
      byId("prompt").blur();
      byId("prompt-send").disabled = true;
      if (this.player.take === null) await this.begin({ start: "nothing" });
      else await this.player.set({ prompt, recompute: byId("recompute").checked });
      byId("prompt-send").disabled = false;
    };
    byId("prompt").onkeydown = (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      byId("prompt-form").requestSubmit();
    };
    byId("from-nothing").onclick = () => this.begin({ start: "nothing" });
    byId("from-clip").onclick = () => this.begin({ start: "clip", clip: Number(byId("clip").value) });
    byId("clip").onchange = byId("from-clip").onclick;
    byId("from-file").onclick = () => byId("file").click();
    byId("file").onchange = () => {
      const [file] = byId("file").files;
      byId("file").value = "";
      if (file) this.upload(file);
    };
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      const [file] = event.dataTransfer?.files ?? [];
      if (file && this.player.world) this.upload(file);
    });
    document.addEventListener("paste", (event) => {
      const [file] = event.clipboardData?.files ?? [];
      if (file && this.player.world) this.upload(file);
    });
  }
}

/** A number with one decimal where it has any. */
export function number(value) {
  return Number.isInteger(value) ? String(value) : value.toFixed(value < 10 ? 2 : 1);
}
