"""Sites for tests: exported, and served."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scd.export.serve_site import site_server
from scd.export.settings import WebConfig, WeightType
from scd.export.site import export_web


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a site; give its address."""
    server = site_server(folder, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://localhost:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def served_site(
    run: Path, runtime: Path, folder: Path, weights: WeightType = "auto"
) -> Iterator[str]:
    """Export a world into a folder and serve it; give its address."""
    export_web(WebConfig(run=str(run), out=str(folder), ort=str(runtime), weights=weights))
    with served(folder) as address:
        yield address
