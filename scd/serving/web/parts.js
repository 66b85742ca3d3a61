// What an action consists of: its parts, in words and in colours.

const IDLE = ["none", "noop", "idle", "nothing", "stay", "wait", "still", "stop"];
const HUES = [
  "#8a919c", "#4c8dd6", "#e0a13a", "#4fae87", "#c46a9f", "#8d78d6", "#d9704f", "#5fb3c4",
];
const MOST_LANES = 8; // keys of a part that have a lane each

/** The parts of a world's actions: name, space, first entry of the vector, size, names, bounds. */
export function partsOf(world) {
  if (!world.actions.length) return [];
  const plain = world.action_dim
    ? { name: "", space: "Box", shape: [world.action_dim], names: world.actions }
    : { name: "", space: "Discrete", shape: [], choices: [world.actions.length], names: world.actions };
  let first = 0;
  return (world.action_parts.length ? world.action_parts : [plain]).map((part) => {
    const size = part.shape.reduce((all, one) => all * one, 1);
    const count = part.space === "Discrete" ? part.choices[0] : size;
    const given = part.names?.length ? part.names : null;
    const own = !part.name && world.actions.length === count ? world.actions : null;
    const start = part.space === "Discrete" ? (part.start?.[0] ?? 0) : 0;
    const names = given ?? own ?? Array.from({ length: count }, (_, at) => String(at + start));
    const bound = (side, usual) =>
      Array.from({ length: size }, (_, at) => part[side]?.[at] ?? usual);
    const made = {
      name: part.name, space: part.space, first, size, names, choices: part.choices ?? [],
      low: bound("low", -1), high: bound("high", 1),
      whole: part.space !== "Box" || !(part.dtype ?? "float32").startsWith("float"),
    };
    const found = names.findIndex((name) => IDLE.includes(name.toLowerCase()));
    made.idle = part.space === "Discrete" && found >= 0 ? found : null;
    first += size;
    return made;
  });
}

/** A name as people see it. */
export function shownName(name) {
  return IDLE.includes(name.toLowerCase()) ? "do nothing" : name.replaceAll("_", " ");
}

/** The entries of an action that a part has. */
export function entriesOf(part, action) {
  return Array.isArray(action) ? action.slice(part.first, part.first + part.size) : [action];
}

/** What an action does, part by part: [name, words]. */
export function wordsOf(parts, action) {
  return parts.map((part) => {
    const values = entriesOf(part, action);
    if (part.space === "Discrete") return [part.name, shownName(part.names[values[0]] ?? String(values[0]))];
    if (part.space === "MultiBinary") {
      const held = part.names.filter((_, at) => values[at]).map(shownName);
      return [part.name, held.join(" ") || "no key"];
    }
    const digits = part.whole ? 0 : 2;
    return [part.name, values.map((value) => value.toFixed(digits)).join(" ")];
  });
}

/** An action in words. */
export function actionText(parts, action) {
  return wordsOf(parts, action).map((words) => words.join(" ").trim()).join(" · ");
}

/** A lane of the strip for each part, for each key where there are few: action -> colour.
 *  Where there are several, one that does nothing is empty. */
export function lanesOf(parts) {
  const rests = (part, values) =>
    parts.length > 1 && (part.space === "Discrete" ? values[0] === part.idle : values.every((value) => !value));
  return parts.flatMap((part) => {
    if (part.space !== "MultiBinary" || part.size > MOST_LANES)
      return [(action) => (rests(part, entriesOf(part, action)) ? "transparent" : colourOf(part, action))];
    return part.names.map((_, at) => (action) =>
      entriesOf(part, action)[at] ? HUES[1 + (at % (HUES.length - 1))] : "transparent");
  });
}

/** The colour of an action in one of its parts, the same everywhere on the page. */
export function colourOf(part, action) {
  const values = entriesOf(part, action);
  if (part.space === "Discrete") return HUES[values[0] % HUES.length];
  // Several entries have the colour of the largest, and of its sign.
  const sizes = values.map(Math.abs);
  const largest = sizes.indexOf(Math.max(...sizes));
  if (sizes[largest] < 0.05) return HUES[0];
  return HUES[1 + ((2 * largest + (values[largest] < 0 ? 1 : 0)) % (HUES.length - 1))];
}
