// Payloads -> pictures, in order: JPEG each by itself, or H.264 through WebCodecs.

/** Whether this browser decodes H.264 of a codec string by WebCodecs; a sentence why not, or null. */
export async function whyNoH264(codecs, codec) {
  if (!codecs.includes("h264")) return "This server sends no H.264.";
  if (!window.isSecureContext) return "Browsers keep WebCodecs for localhost and https: JPEG.";
  if (!("VideoDecoder" in window)) return "This browser has no WebCodecs: JPEG.";
  const asked = { codec, optimizeForLatency: true };
  try {
    const { supported } = await VideoDecoder.isConfigSupported(asked);
    return supported ? null : "This browser decodes no H.264: JPEG.";
  } catch {
    return "This browser decodes no H.264: JPEG.";
  }
}

/** Decodes a stream of frames and hands each picture to `deliver(header, picture, arrived)`. */
export class Pictures {
  constructor(deliver, fail) {
    this.deliver = deliver;
    this.fail = fail;
    this.tail = Promise.resolve();
    this.decoder = null;
    this.config = null;
    this.headers = new Map();
    this.count = 0;
    this.era = 0;
  }

  /** Forget all that is under way. */
  clear() {
    this.era += 1;
    this.headers.clear();
    this.config = null;
    if (this.decoder !== null && this.decoder.state !== "closed") this.decoder.close();
    this.decoder = null;
  }

  push(header, payload, arrived) {
    if (header.codec === "h264") this._video(header, payload, arrived);
    else this._picture(header, payload, arrived);
  }

  _picture(header, payload, arrived) {
    const era = this.era;
    const blob = new Blob([payload], { type: `image/${header.codec}` });
    const decoding = createImageBitmap(blob);
    decoding.catch(() => {});
    this.tail = this.tail.then(async () => {
      try {
        const picture = await decoding;
        if (era === this.era) this.deliver(header, picture, arrived, blob);
        else picture.close();
      } catch (error) {
        this.fail(`A picture could not be read: ${error.message}`);
      }
    });
  }

  _video(header, payload, arrived) {
    if (header.key && header.config !== this.config) this._configure(header.config);
    // Until the first key frame there is nothing to decode from.
    if (this.decoder === null) return;
    const timestamp = ++this.count;
    this.headers.set(timestamp, { header, arrived });
    const type = header.key ? "key" : "delta";
    try {
      this.decoder.decode(new EncodedVideoChunk({ type, timestamp, data: payload }));
    } catch (error) {
      this._broken(error);
    }
  }

  _configure(config) {
    if (this.decoder !== null && this.decoder.state !== "closed") this.decoder.close();
    this.config = config;
    this.headers.clear();
    const decoder = new VideoDecoder({
      output: (frame) => {
        const of = this.headers.get(frame.timestamp);
        this.headers.delete(frame.timestamp);
        if (of === undefined || decoder !== this.decoder) frame.close();
        else this.deliver(of.header, frame, of.arrived, null);
      },
      error: (error) => {
        if (decoder === this.decoder) this._broken(error);
      },
    });
    this.decoder = decoder;
    decoder.configure({ codec: config, optimizeForLatency: true });
  }

  _broken(error) {
    this.clear();
    this.fail(`H.264 could not be decoded (${error.message}).`);
  }
}
