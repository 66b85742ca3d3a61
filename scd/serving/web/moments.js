// A moment as a link: world, seed, beginning and actions, from which the stream is made again.

const VERSION = 1;
const MOST_FRAMES = 3000;
const AT_ONCE = 16;

/** What a link says; null: this take cannot be told by one, `why` says why. */
export function momentOf(world, take) {
  const { state, begun, changed } = take;
  if (changed) return { why: "Steps, seed, guidance or words were changed on the way." };
  if (!begun || begun.start === "upload") return { why: "It begins from a picture of yours." };
  const actions = [];
  for (let frame = state.num_given; frame <= take.newest; frame += 1) {
    const seen = take.frames.get(frame);
    if (!seen || seen.action === null) return { why: "Its beginning was not seen by this page." };
    actions.push(seen.action);
  }
  if (!actions.length) return { why: "Nothing was played yet." };
  if (actions.length > MOST_FRAMES) return { why: `It is longer than ${MOST_FRAMES} frames.` };
  return { moment: { v: VERSION, world: world.name, weights: world.weights, begin: begun, actions } };
}

/** The part of an address after #. */
export async function toLink(moment) {
  const packed = { ...moment, actions: runsOf(moment.actions) };
  const text = JSON.stringify(packed);
  return `moment=${base64(new TextEncoder().encode(text))}.${await sumOf(text)}`;
}

/** Read a link; throws what is wrong with it, in words. */
export async function fromLink(link) {
  const [body, sum] = link.split(".");
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes(body));
  } catch {
    throw new Error("The link is no moment: it is cut, or was changed.");
  }
  if (sum !== (await sumOf(text))) throw new Error("The link was changed since it was made.");
  const moment = JSON.parse(text);
  if (moment?.v !== VERSION) throw new Error(`The link is of version ${moment?.v}, needed ${VERSION}.`);
  if (!isMade(moment)) throw new Error(`The link was changed: needed 1 to ${MOST_FRAMES} frames and a beginning.`);
  const actions = moment.actions.flatMap(([action, count]) => Array(count).fill(action));
  return { ...moment, actions };
}

/** Whether a page can have made it. The sum of a link is no secret: whoever changes a link can make its sum too. */
function isMade({ begin, actions }) {
  if (begin === null || typeof begin !== "object" || "type" in begin || !Array.isArray(actions)) return false;
  const counts = actions.map((run) => (Array.isArray(run) && run.length === 2 ? run[1] : 0));
  const frames = counts.reduce((sum, count) => sum + count, 0);
  return frames > 0 && frames <= MOST_FRAMES && counts.every((count) => Number.isInteger(count) && count > 0);
}

/** Make the frames of a moment again, in a paused stream; whether it is done, else it was said why not. */
export async function replay(player, moment) {
  const { world } = player;
  if (moment.world !== world.name || moment.weights !== world.weights)
    throw new Error(
      moment.world === world.name
        ? `The link is of another version of ${world.name}.`
        : `The link is of the world ${moment.world}: open it by scd play ${moment.world}.`,
    );
  await player.pause();
  const answer = await player.begin(moment.begin);
  if (answer === null) return false;
  for (const [action, count] of runsOf(moment.actions))
    for (let left = count; left > 0; left -= AT_ONCE)
      if ((await player.ask({ type: "step", action, count: Math.min(left, AT_ONCE) })) === null)
        return false;
  return true;
}

/** Equal actions one after another: [action, how many]. */
function runsOf(actions) {
  const runs = [];
  for (const action of actions) {
    const last = runs.at(-1);
    if (last && JSON.stringify(last[0]) === JSON.stringify(action)) last[1] += 1;
    else runs.push([action, 1]);
  }
  return runs;
}

async function sumOf(text) {
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  return base64(new Uint8Array(digest).slice(0, 12));
}

function base64(data) {
  const text = btoa(Array.from(data, (one) => String.fromCharCode(one)).join(""));
  return text.replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

function bytes(text) {
  return Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (one) => one.charCodeAt(0));
}
