// Plays a site's model in Node, without a browser: node site_in_node.mjs SITE PLAN.
// PLAN: {start, actions, rewinds, ...}; prints {frames, again}, pictures in base64.

import { readFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";

const [folder, plan] = [process.argv[2], JSON.parse(process.argv[3])];
const address = (name) => pathToFileURL(`${folder}/${name}`).href;
const { Model } = await import(address("model.js"));
const { Session } = await import(address("session.js"));
const site = JSON.parse(await readFile(`${folder}/world.json`, "utf-8"));
const ort = await import(address(site.runtimes.wasm.script));

async function bytesOf(name) {
  const pieces = site.files[name].pieces.map(({ file }) => readFile(`${folder}/${file}`));
  return new Uint8Array(Buffer.concat(await Promise.all(pieces)));
}

ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmBinary = (await bytesOf(site.runtimes.wasm.wasm)).buffer;
const names = [...site.model_files, ...(site.clips ? [site.clips.file] : [])];
const files = Object.fromEntries(await Promise.all(names.map(async (name) => [name, await bytesOf(name)])));
const model = await Model.open(ort, site.model, files, ["wasm"]);
const start = { latents: [], actions: [], ...plan.start };
if ("clip" in plan.start)
  Object.assign(start, {
    latents: await model.clip({ ...site.clips, data: files[site.clips.file] }, plan.start.clip),
    actions: site.clips.actions[plan.start.clip],
  });
const session = new Session(model, start);
await session.begin();

async function picture() {
  return Buffer.from(await model.pixels(session.stream.newest)).toString("base64");
}

async function played(actions) {
  const frames = [];
  for (const action of actions) {
    session.action = action;
    await session.make();
    frames.push(await picture());
  }
  return frames;
}

const frames = await played(plan.actions);
const again = [];
for (const frame of plan.rewinds ?? []) {
  const { oldest, index: newest } = session;
  const kept = session.frames.length;
  await session.rewind(frame);
  const shown = await picture();
  const next = await played(plan.actions.slice(frame + 1 - session.given).slice(0, 2));
  again.push({ oldest, newest, kept, shown, next });
}
console.log(JSON.stringify({ frames, again }));
