// Opened as a file, a page gets no modules and no workers: this script is none, and says so.

if (location.protocol === "file:")
  document.querySelector("#veil p").textContent =
    "Browsers run worlds from a web server alone. In this folder run “python -m http.server 8000” " +
    "and open http://localhost:8000.";
