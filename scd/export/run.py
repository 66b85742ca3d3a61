"""The command `scd export web`: write a site and, if asked, serve it."""

from __future__ import annotations

from pathlib import Path

from scd.export.serve_site import site_server
from scd.export.settings import WebConfig
from scd.export.site import export_web, readable


def export_and_serve(config: WebConfig) -> None:
    """Write a site, say what it is, and serve it until Ctrl+C if a port was given.

    Raises:
        OSError, ValueError: as `export_web`, or the port is taken.
    """
    # Before minutes are spent, find out whether the port is free.
    server = None if config.serve is None else site_server(Path(config.out), config.serve)
    try:
        print(f"{readable(export_web(config))}; saved {config.out}")
        if server is None:
            print("Put the folder on any web server (docs/publish.md), or try it: --serve 8000")
            return
        print(f"play at http://localhost:{server.server_address[1]}/ (Ctrl+C stops)", flush=True)
        server.serve_forever()
    finally:
        if server is not None:
            server.server_close()
