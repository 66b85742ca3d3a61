// Keeps the files of this version of the site for play without a network, and adds the headers that
// let pages share memory between threads, where the host cannot send them.

const VERSION = "VERSION_OF_SITE";
const PAGE = ["FILES_OF_PAGE"]; // what the page loads before this worker is there
const NAME = `scd ${new URL("./", self.location).pathname} `;
const HASHED = `${NAME}files`; // whose addresses hold their hashes, so that no version changes them

self.addEventListener("install", (event) => {
  event.waitUntil((async () => {
    const cache = await caches.open(NAME + VERSION);
    await Promise.all(PAGE.map(async (file) => {
      const come = isolating(await fetch(file, { cache: "no-cache" }));
      if (!come.ok) throw new Error(`${file} did not arrive (${come.status})`);
      await cache.put(file, come);
    }));
    await self.skipWaiting();
  })());
});

self.addEventListener("activate", (event) => {
  event.waitUntil((async () => {
    for (const key of await caches.keys())
      if (key.startsWith(NAME) && key !== NAME + VERSION && key !== HASHED) await caches.delete(key);
    await self.clients.claim();
  })());
});

self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method !== "GET" || new URL(request.url).origin !== self.location.origin) return;
  event.respondWith(answer(request));
});

async function answer(request) {
  const { pathname, searchParams } = new URL(request.url);
  const hashed = searchParams.has("sha256");
  const cache = await caches.open(hashed ? HASHED : NAME + VERSION);
  // What names the version comes from the host if it can; all else belongs to the version.
  const asks = request.mode === "navigate" || pathname.endsWith("/world.json");
  const kept = await cache.match(request, { ignoreSearch: !hashed });
  if (kept && !asks) return kept;
  try {
    const come = isolating(await fetch(request, request.mode === "navigate" ? {} : { cache: "no-cache" }));
    if (come.ok) await cache.put(request, come.clone());
    return come;
  } catch (error) {
    if (kept) return kept;
    throw error;
  }
}

function isolating(answer) {
  if (answer.status === 0 || answer.status === 304) return answer;
  const headers = new Headers(answer.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  headers.set("Cross-Origin-Resource-Policy", "same-origin");
  return new Response(answer.body, { status: answer.status, statusText: answer.statusText, headers });
}
