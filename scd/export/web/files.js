// The files of a site: fetched in pieces, joined, and held against the hashes that the export wrote.

/** Fetch files by name; `told(bytes, all)` hears how far it is. Returns their bytes by name. */
export async function fetchFiles(listed, names, told) {
  const all = names.reduce((sum, name) => sum + listed[name].bytes, 0);
  let come = 0;
  const joined = await Promise.all(names.map(async (name) => {
    const { bytes, pieces } = listed[name];
    const whole = new Uint8Array(bytes);
    let place = 0;
    await Promise.all(pieces.map((piece) => {
      const from = place;
      place += piece.bytes;
      return fetchPiece(piece, whole.subarray(from, place), (length) => {
        come += length;
        told(come, all);
      });
    }));
    return [name, whole];
  }));
  forgetOthers(listed).catch(() => {});
  return Object.fromEntries(joined);
}

const addressOf = ({ file, sha256 }) => new URL(`${file}?sha256=${sha256}`, import.meta.url).href;

async function fetchPiece(piece, into, told) {
  const { file, bytes, sha256 } = piece;
  const answer = await fetch(addressOf(piece)).catch(() => null);
  if (!answer?.ok)
    throw new Error(`${file} did not arrive (${answer?.status ?? "no connection"}). Reload the page.`);
  const reader = answer.body.getReader();
  let place = 0;
  for (;;) {
    const { done, value } = await reader.read().catch(() => {
      throw new Error(`${file} broke off after ${place} of ${bytes} bytes. Reload the page.`);
    });
    if (done) break;
    if (place + value.length <= bytes) into.set(value, place);
    place += value.length;
    told(value.length);
  }
  if (place !== bytes || (await hashOf(into)) !== sha256) {
    await forget((address) => address === addressOf(piece));
    throw new Error(
      `${file} is not the file of this world: it needs ${bytes} bytes of another hash, ${place} came. ` +
      "Reload the page, and upload all files of the site again if that does not help.");
  }
}

/** Let the service worker drop the files of versions before this one. */
async function forgetOthers(listed) {
  const known = new Set(Object.values(listed).flatMap(({ pieces }) => pieces.map(addressOf)));
  const here = new URL("./", import.meta.url).href;
  await forget((address) => address.startsWith(here) && address.includes("?sha256=") && !known.has(address));
}

/** Drop kept files by their addresses. */
async function forget(chosen) {
  for (const key of await caches.keys()) {
    const cache = await caches.open(key);
    for (const request of await cache.keys()) if (chosen(request.url)) await cache.delete(request);
  }
}

/** SHA-256 in hexadecimal; browsers have it on https and localhost alone. */
async function hashOf(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
