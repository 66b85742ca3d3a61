// The page: parts joined, keys, and what is shown of the state.

import { Controls } from "./controls.js";
import { readToken } from "./connection.js";
import { Gamepads, View } from "./devices.js";
import { KeyMap } from "./keymap.js";
import { KeyPanel } from "./keypanel.js";
import { Meters } from "./meters.js";
import { fromLink, momentOf, replay, toLink } from "./moments.js";
import { Pictures, whyNoH264 } from "./pictures.js";
import { actionText, colourOf, lanesOf, partsOf, shownName, wordsOf } from "./parts.js";
import { Player } from "./player.js";
import { Recorder, recordingKind } from "./recorder.js";
import { Stage } from "./stage.js";
import { Steering, element } from "./steering.js";
import { Timeline } from "./timeline.js";
import { Worlds } from "./worlds.js";

const byId = (name) => document.getElementById(name);
const LONGEST_TAP_MS = 400;
const HINTED = 8; // keys that the hint has room for
const SMALL = 128; // pixels of a frame's shorter side below which it is smoothed

const token = readToken();
const address = new URL("v1/stream", document.baseURI.replace(/^http/, "ws")).href.split("#")[0];

const pictures = new Pictures((...of) => stage.push(...of), pictureFailed);
const player = new Player(address, token, pictures);
const stage = new Stage(byId("view"), byId("ambient"), byId("room"), drawn);
const meters = new Meters(byId("chart"), byId("meters"));
const recorder = new Recorder(stage, byId("record"), byId("recording"), say, () =>
  player.fetchVideo(),
);
const steering = new Steering(byId("pad"), hold, pressed, isWaiting);
const view = new View(byId("view"), byId("stick"), steering, refresh);
const panel = new KeyPanel(byId("binds"), byId("binds-reset"), byId("mouse-speed"), steering, showKeys);
new Gamepads(steering, say);
const worlds = new Worlds(byId("worlds"), byId("worlds-list"), byId("worlds-open"), player, say);
const controls = new Controls(player, say);
const timeline = new Timeline(byId("strip"), byId("strip-canvas"), byId("takes"), {
  look,
  choose: (take) => player.choose(take),
  remove: (take) => player.remove(take),
  describe: (at, last) => {
    const action = player.take?.frames.get(at)?.action ?? null;
    return `frame ${at} of ${last}${action === null ? "" : `, ${actionText(steering.parts, action)}`}`;
  },
});

let looked = null; // the old frame that is shown; null: the newest
let deferred = null; // letting go, put off until a frame has obeyed the press
let lastObeyed = 0;

// --- frames -----------------------------------------------------------------------------------

async function drawn(header, arrived, blob, time) {
  const { take } = player;
  if (take === null || header.session !== take.id) return;
  player.acknowledge(header);
  meters.frame(header, arrived, time);
  recorder.add();
  take.record(header, blob);
  if (blob === null && looked === null) {
    // H.264: the picture is kept as it was drawn.
    const copy = await stage.toBlob();
    const seen = take.frames.get(header.frame);
    if (seen) seen.blob ??= copy;
  }
  lastObeyed = Math.max(lastObeyed, header.sequence);
  if (deferred !== null && lastObeyed >= player.sequence) letGo();
  else if (!isWaiting()) steering.frame(time);
  if (looked === null) showFrame(header.frame);
  else timeline.refresh();
}

function showFrame(frame) {
  const seen = player.take?.frames.get(frame);
  const action = seen?.action ?? null;
  byId("frame").textContent = frame < 0 ? "–" : frame;
  byId("obeyed").hidden = action === null;
  if (action !== null) {
    showParts(action);
    byId("obeyed").style.setProperty("--of", colourOf(steering.parts[0], action));
  }
  steering.obeyed(action);
  timeline.refresh();
}

/** Write what each part of an action did. */
function showParts(action) {
  const words = wordsOf(steering.parts, action).map(([name, said]) => {
    const whole = element("span");
    if (name) whole.append(element("span", "of", {}, shownName(name)), " ");
    whole.append(said);
    return whole;
  });
  byId("obeyed").lastElementChild.replaceChildren(...words);
}

function pictureFailed(text) {
  say(player.connection.codec === "h264" ? `${text} The page goes on with JPEG.` : text, "bad");
  if (player.connection.codec !== "h264") return;
  byId("codec").value = "jpeg";
  player.useCodec("jpeg");
}

// --- steering ---------------------------------------------------------------------------------

/** Whether a frame has yet to obey what is held. */
function isWaiting() {
  return player.isRunning && lastObeyed < player.sequence;
}

function hold(action, time, released) {
  player.held = action;
  // A paused stream steps with the action that is pressed, whatever is let go meanwhile.
  if (!player.wantsRun) return;
  // Who taps a key for less than a frame wants one frame of it.
  if (released && isWaiting()) {
    deferred ??= setTimeout(letGo, LONGEST_TAP_MS);
    return;
  }
  clearTimeout(deferred);
  deferred = null;
  player.hold(action);
  if (player.isRunning) meters.acted(player.sequence, time);
}

function letGo() {
  clearTimeout(deferred);
  deferred = null;
  const told = player.sequence;
  steering.frame(performance.now());
  if (player.wantsRun && player.sequence === told) player.hold(steering.held);
}

function pressed(action) {
  byId("hint").classList.add("seen");
  if (player.take !== null && !player.wantsRun) player.step(action);
}

// --- running, looking back ---------------------------------------------------------------------

async function toggleRun() {
  if (looked !== null) await goOn();
  if (player.wantsRun && player.isRunning) await player.pause();
  else await player.run();
}

async function step(by) {
  if (player.take === null) return;
  if (player.wantsRun) await player.pause();
  const now = looked ?? player.newest;
  if (by > 0 && looked === null) await player.step(steering.held);
  else look(Math.max(player.take.from, now + by));
}

async function look(frame) {
  if (player.take === null || frame < 0) return;
  if (player.wantsRun) player.pause();
  if (frame >= player.newest) {
    toNow();
    return;
  }
  looked = frame;
  stage.showOld(frame, player.take.frames.get(frame)?.blob ?? null);
  const last = player.newest;
  const rest = last - frame === 1 ? `frame ${last} goes` : `frames ${frame + 1} to ${last} go`;
  byId("looking").firstElementChild.textContent =
    `Frame ${frame} of ${last}. Continued from here, ${rest}; a fork keeps them.`;
  showFrame(frame);
  refresh();
  const blob = await player.fetchFrame(frame);
  if (looked === frame && blob !== null) stage.showOld(frame, blob);
}

function toNow() {
  looked = null;
  stage.showNew(player.take?.frames.get(player.newest)?.blob);
  showFrame(player.newest);
  refresh();
}

async function goOn() {
  const frame = looked;
  if ((await player.rewind(frame)) !== null) toNow();
}

async function fork() {
  const frame = looked;
  const answer = await player.fork(frame);
  if (answer !== null)
    say(`Take ${player.take.number}, forked at frame ${answer.frame}. The other one waits below.`);
}

/** Put the moment into the address of the page, and that where it can be pasted from. */
async function share() {
  if (player.take === null) return;
  if (player.wantsRun) await player.pause();
  const { moment, why } = momentOf(player.world, player.take);
  if (!moment) {
    say(`This stream has no link: ${why}`, "bad");
    return;
  }
  history.replaceState(null, "", `#${await toLink(moment)}`);
  const copied = await navigator.clipboard?.writeText(location.href).then(() => true, () => false);
  say(copied ? "The link to this moment is copied." : "The address of this page is the link to this moment.");
}

/** Make the moment of the address again, if it holds one. */
async function open() {
  const link = /^#moment=(.*)$/.exec(location.hash)?.[1];
  if (!link || player.take === null) return;
  try {
    const moment = await fromLink(link);
    if (!(await replay(player, moment))) return;
    say(`${moment.actions.length} frames are made again as they were. Run goes on from here.`);
  } catch (error) {
    history.replaceState(null, "", location.pathname);
    say(error.message, "bad");
    if (!player.wantsRun) await player.run();
  }
}

// --- what is shown ------------------------------------------------------------------------------

function refresh() {
  const { take, link } = player;
  const running = player.isRunning;
  const state = link.name !== "live" ? link.name : running ? "running" : "paused";
  const names = {
    running: "live", paused: player.asleep ? "asleep on disk" : "paused", lost: "reconnecting",
    connecting: "connecting", closed: "no connection",
  };
  byId("status").dataset.state = state;
  byId("status").lastElementChild.textContent = names[state];
  document.body.classList.toggle("running", player.wantsRun);
  byId("run").setAttribute("aria-label", player.wantsRun ? "Pause" : "Run");
  const text = veilText(link, take);
  byId("veil").hidden = text === null;
  byId("veil").firstElementChild.textContent = text ?? "";
  byId("retry").hidden = link.name === "live" || link.name === "connecting";
  byId("looking").hidden = looked === null || text !== null;
  for (const name of ["run", "back", "step", "restart", "fork", "record", "share"])
    byId(name).disabled = take === null || link.name !== "live";
  showHint();
  if (take !== null) controls.follow(take.state);
  timeline.set(player.takes, take, looked);
}

function veilText(link, take) {
  if (link.name === "closed") return link.reason;
  if (link.name === "lost")
    return link.tries > 1
      ? "The server does not answer. Trying again; your stream is kept."
      : "The connection was lost. Connecting to the same stream again.";
  if (player.isBusy) return "The server still holds the connection that was lost. A moment.";
  if (link.name === "connecting") return link.reason || "Connecting to the server";
  if (take === null && player.world?.needs_start && !player.world.clips)
    return "This world begins from a picture: choose one of yours.";
  if (take === null && player.world?.takes_prompt) return "This world begins from words: type what it shows.";
  return take === null ? "No stream yet: begin one." : null;
}

// What steers this world: its own keys, or the fingers that there are instead.
function hintParts() {
  if (!player.world?.actions.length) return [];
  const touch = window.matchMedia("(pointer: coarse)").matches;
  const runs = steering.keymap.of("Space").length ? "P" : "space";
  if (!player.wantsRun) return [touch ? "Paused: a key makes one frame" : `Paused: a key makes one frame, ${runs} runs`];
  if (view.isLocked) return [["esc", "frees the mouse"]];
  const buttons = steering.parts.some((part) => part.space !== "Box");
  if (touch) {
    const hold = buttons ? "Hold a key" : "Move a slider";
    return [steering.pulls ? `${hold}, or press the picture and pull` : hold];
  }
  const { hints: keys } = steering;
  const more = keys.length - HINTED;
  if (view.looks) keys.unshift(["click", "looks with the mouse"]);
  return [...keys.slice(0, HINTED), ...(more > 0 ? [`and ${more} more, by the keys on the page`] : [])];
}

function showHint() {
  const parts = hintParts();
  const told = JSON.stringify(parts);
  if (byId("hint").dataset.told === told) return;
  byId("hint").dataset.told = told;
  byId("hint").replaceChildren(...parts.map(keyAndWords));
}

/** [keys, words] as keycaps and words; words alone as they are. */
function keyAndWords(part) {
  if (typeof part === "string") return element("span", "", {}, part);
  const whole = element("span");
  whole.append(...keycaps(part[0]), part[1]);
  return whole;
}

function keycaps(keys) {
  return keys.split(" ").flatMap((key) => [element("kbd", "", {}, key), " "]);
}

/** What the world is, its size, and how it was trained, in a line. */
function worldLine(world) {
  const kind = world.separable ? "separable" : "dense";
  return [
    (world.title !== world.name && world.title) || `a ${kind} world model`,
    `${world.width} × ${world.height} pixels`,
    `${countText(world.parameters)} parameters`,
    `${world.default_steps} ${world.default_steps === 1 ? "step" : "steps"} a frame`,
    ...(world.trained ? [`trained ${world.trained}`] : []),
  ].join(" · ");
}

/** A count in three digits: 950, 12.3 k, 4.8 M, 1.3 B. */
function countText(count) {
  for (const [size, sign] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    const part = count / size;
    if (part >= 0.9995) return `${part.toFixed(part < 99.95 ? 1 : 0)} ${sign}`;
  }
  return String(count);
}

// Few pixels enlarged are blocks, unless they are smoothed; pixel art is meant to be blocks.
function setSmooth(on) {
  byId("smooth").checked = on;
  stage.smooth = on;
  stage.fit();
}

function say(text, kind = "") {
  const line = document.createElement("p");
  line.className = kind;
  line.textContent = text;
  byId("words").append(line);
  while (byId("words").children.length > 3) byId("words").firstElementChild.remove();
  setTimeout(() => line.remove(), kind === "bad" ? 9000 : 4500);
}

/** Say everywhere which controls there are now. */
function showKeys() {
  showHelp();
  showHint();
}

/** Say in the help, and to who does not see the picture, which keys this world has. */
function showHelp() {
  const { hints: keys, pulls } = steering;
  const told = keys.map(([key, words]) => `${key} ${words}`).join(", ");
  byId("view").setAttribute("aria-label", `The stream.${told ? ` Keys: ${told}.` : ""}`);
  byId("help-keys").replaceChildren(
    ...keys.flatMap(([key, words]) => {
      const caps = element("dt");
      caps.append(...keycaps(key));
      return [caps, element("dd", "", {}, words)];
    }),
  );
  const ways = [
    steering.keymap.has(/^Arrow/) && "the arrow keys", view.looks && "the mouse, once you click the picture",
    pulls && "pulling on the picture", steering.keymap.has(/^Pad/) && "a gamepad",
  ].filter(Boolean);
  byId("help-ways").textContent = ways.length
    ? `What steers too: ${ways.join("; ")}. What each does can be changed under “Keys”.` : "";
  byId("run-key").textContent = steering.keymap.of("Space").length ? "P" : "space";
}

player.addEventListener("change", () => {
  if (!player.isRunning) meters.paused();
  refresh();
});
player.addEventListener("take", () => {
  stage.clear();
  meters.sent.clear();
  lastObeyed = player.sequence;
  looked = null;
  stage.showNew(player.take?.frames.get(player.newest)?.blob);
  if (player.take) showFrame(player.newest);
  refresh();
});
player.addEventListener("take", () => player.take && open(), { once: true });
window.addEventListener("hashchange", open);
player.addEventListener("words", ({ detail }) => say(detail.text, detail.kind));
player.addEventListener("world", async () => {
  const { world } = player;
  document.title = `${world.name} · scd play`;
  recorder.name = world.name;
  byId("world").textContent = world.name;
  byId("facts").textContent = byId("facts").title = worldLine(world);
  byId("world-facts").textContent = worldLine(world);
  byId("goal").hidden = !world.goal;
  byId("goal").textContent = world.goal ? `Goal: ${world.goal}.` : "";
  byId("about").textContent = `Recordings: ${recordingKind().words}.`;
  stage.setSize(world.width, world.height);
  stage.pace = () => player.fps;
  timeline.aspect = world.width / world.height;
  const parts = partsOf(world);
  steering.show(parts, new KeyMap(world, parts), world.action_dim > 0);
  timeline.setLanes(lanesOf(parts));
  panel.show();
  setSmooth(Math.min(world.width, world.height) < SMALL && !world.pixel_art);
  showHelp();
  player.held = steering.held;
  byId("keys-card").hidden = world.actions.length === 0;
  byId("steer").hidden = world.actions.length === 0;
  controls.show();
  worlds.offer();
  const why = await whyNoH264(player.codecs, player.h264);
  byId("codec").disabled = why !== null;
  byId("codec-note").hidden = why === null;
  byId("codec-note").textContent = why ?? "";
});

// --- keys and buttons ---------------------------------------------------------------------------

const KEYS = {
  Space: toggleRun, KeyP: toggleRun, Comma: () => step(-1), Period: () => step(1), KeyF: fork, KeyV: () => recorder.toggle(),
  KeyR: () => player.take && player.ask({ type: "restart" }), Escape: () => looked !== null && toNow(),
  Enter: () => looked !== null && goOn(), KeyL: share,
};

function isTyping(target, code) {
  if (target.closest("dialog, textarea, select, input:not([type=range], [type=checkbox])")) return true;
  if (target.closest("input[type=range]")) return code.startsWith("Arrow");
  return Boolean(target.closest("button, summary, input")) && (code === "Space" || code === "Enter");
}

window.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target, event.code)) return;
  if (event.key === "?") byId("help").showModal();
  else if (steering.keymap?.of(event.code).length) {
    event.preventDefault();
    if (!event.repeat) steering.control(event.code, true, event.timeStamp);
  }
  else if (event.code in KEYS && !event.repeat) {
    event.preventDefault();
    if (player.link.name === "live") KEYS[event.code]();
  }
});
// A key that was not down, as one let go after the page was left, has nothing to let go of.
window.addEventListener("keyup", (event) => {
  if (steering.isDown(event.code)) steering.control(event.code, false, event.timeStamp);
});

byId("run").onclick = toggleRun;
byId("back").onclick = () => step(-1);
byId("step").onclick = () => step(1);
byId("restart").onclick = KEYS.KeyR;
byId("fork").onclick = fork;
byId("fork-here").onclick = fork;
byId("share").onclick = share;
byId("record").onclick = () => recorder.toggle();
byId("go-on").onclick = async () => {
  await goOn();
  await player.run();
};
byId("to-now").onclick = toNow;
byId("retry").onclick = () => player.open();
byId("help-open").onclick = () => byId("help").showModal();
byId("help-close").onclick = () => byId("help").close();
byId("worlds-close").onclick = () => byId("worlds").close();
byId("keep").onchange = () => {
  steering.keeps = byId("keep").checked;
  if (!steering.keeps) steering.release();
};
byId("smooth").onchange = () => setSmooth(byId("smooth").checked);
byId("codec").onchange = () => player.useCodec(byId("codec").value);

// A page that nobody sees draws nothing, and so asks for nothing.
document.addEventListener("visibilitychange", () => {
  if (document.hidden && player.isRunning) player.ask({ type: "pause" });
  else if (!document.hidden && player.take && player.wantsRun) player.run();
});

// One that the browser may show again as it is has not been left.
window.addEventListener("pagehide", (event) => {
  if (!event.persisted) player.leave();
});

setInterval(() => {
  const pace = meters.framesPerSecond;
  byId("pace").textContent = pace === null ? "" : `${pace.toFixed(1)} frames/s`;
  recorder.tell();
  if (byId("meters").open) meters.draw();
}, 250);

setInterval(async () => {
  if (document.hidden || player.link.name !== "live") return;
  meters.network = await player.connection.roundTrip().catch(() => null);
}, 2000);

if (window.matchMedia("(max-width: 60rem)").matches)
  for (const card of document.querySelectorAll(".side details")) card.open = false;

player.open();
