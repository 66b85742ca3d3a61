// What is seen, as a file: MP4 by the browser, by the server, or else WebM.

const MP4 = ["video/mp4;codecs=avc1.42E01E", "video/mp4;codecs=avc1.4D401F", "video/mp4;codecs=avc1"];
const WEBM = ["video/webm;codecs=vp9", "video/webm;codecs=vp8", "video/webm"];
const SHORT_SIDE = 384;

function supported(kinds) {
  if (typeof MediaRecorder === "undefined" || !HTMLCanvasElement.prototype.captureStream)
    return null;
  return kinds.find((kind) => MediaRecorder.isTypeSupported(kind)) ?? null;
}

/** How this browser would record: {kind, words}. */
export function recordingKind() {
  if (supported(MP4)) return { kind: "mp4", words: "MP4, by this browser" };
  if (supported(WEBM)) {
    const words = document.body.classList.contains("local")
      ? "WebM: this browser makes no MP4" : "this browser makes no MP4, so the server does, of the whole stream";
    return { kind: "webm", words };
  }
  return { kind: null, words: "this browser cannot record" };
}

export class Recorder {
  /** `stage` shows the picture, `button` starts and stops, `chip` shows the seconds, `say` tells what
   *  became of it. `fetchVideo` asks the server for the stream as MP4. */
  constructor(stage, button, chip, say, fetchVideo) {
    Object.assign(this, { stage, button, chip, say, fetchVideo });
    this.name = "world";
    this.canvas = document.createElement("canvas");
    this.recorder = null;
    this.num = 0;
  }

  get isOn() {
    return this.recorder !== null;
  }

  /** Start, or stop and save. */
  async toggle() {
    try {
      if (this.isOn) {
        const { blob, ending, num } = await this.stop();
        const name = this.name.replace(/[^\w-]+/g, "-");
        const whole = ending === "webm" ? await this.fetchVideo() : null;
        if (whole !== null) {
          download(whole, `${name}-stream.mp4`);
          this.say("Saved the whole stream as MP4, made by the server: this browser makes none.");
        } else {
          download(blob, `${name}-${num}-frames.${ending}`);
          this.say(`Saved ${num} frames as ${ending === "mp4" ? "MP4" : "WebM"}.`);
        }
      } else {
        this.start();
      }
    } catch (error) {
      this.say(`Nothing could be recorded: ${error.message}.`, "bad");
    }
    this.button.setAttribute("aria-pressed", String(this.isOn));
    this.button.setAttribute("aria-label", this.isOn ? "Stop recording" : "Record");
    this.chip.hidden = !this.isOn;
    this.tell();
  }

  /** Show how long it is. */
  tell() {
    if (this.isOn) this.chip.lastElementChild.textContent = `${this.seconds.toFixed(0)} s`;
  }

  /** Begin; every `add` from now on is recorded, at the pace at which it comes. */
  start() {
    const type = supported(MP4) ?? supported(WEBM);
    if (type === null) throw new Error("this browser cannot record a canvas");
    const { width, height } = this.stage.view;
    let factor = Math.max(1, Math.ceil(SHORT_SIDE / Math.min(width, height)));
    // H.264 wants even sides.
    if ((width * factor) % 2 || (height * factor) % 2) factor += 1;
    this.canvas.width = width * factor;
    this.canvas.height = height * factor;
    this.context = this.canvas.getContext("2d", { alpha: false });
    this.context.imageSmoothingEnabled = this.stage.smooth;
    this.num = 0;
    this.chunks = [];
    const stream = this.canvas.captureStream();
    this.recorder = new MediaRecorder(stream, { mimeType: type, videoBitsPerSecond: 6e6 });
    this.recorder.ondataavailable = (event) => event.data.size && this.chunks.push(event.data);
    this.recorder.start(1000);
    this.began = performance.now();
    this.add();
  }

  /** Record what is shown now. */
  add() {
    if (this.recorder === null) return;
    this.context.drawImage(this.stage.shown, 0, 0, this.canvas.width, this.canvas.height);
    this.num += 1;
  }

  get seconds() {
    return this.isOn ? (performance.now() - this.began) / 1000 : 0;
  }

  /** End and return {blob, ending, num}. */
  async stop() {
    const { recorder } = this;
    this.recorder = null;
    const ended = new Promise((resolve, reject) => {
      recorder.onstop = resolve;
      recorder.onerror = (event) => reject(event.error ?? new Error("the recording failed"));
    });
    recorder.stop();
    await ended;
    for (const track of recorder.stream.getTracks()) track.stop();
    const type = recorder.mimeType.split(";")[0];
    const ending = type.endsWith("mp4") ? "mp4" : "webm";
    return { blob: new Blob(this.chunks, { type }), ending, num: this.num };
  }
}

/** Let the browser save a file. */
function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
