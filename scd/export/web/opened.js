// What cannot wait for the page's modules: how a page must be opened, and the start of its model.

if (location.protocol === "file:") {
  // A page that was opened as a file gets no modules and no workers.
  document.addEventListener("DOMContentLoaded", () => {
    document.querySelector("#veil p").textContent =
      "Browsers run worlds from a web server alone. In this folder run “python -m http.server 8000” " +
      "and open http://localhost:8000.";
  });
} else if (window.crossOriginIsolated && window.Worker && navigator.serviceWorker?.controller) {
  // All of it is kept here: it loads while the page does. connection.js takes it over.
  window.scdWorker = new Worker("worker.js", { type: "module" });
  window.scdWorker.postMessage({ type: "load", search: location.search });
}
