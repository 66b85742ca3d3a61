"""The commands `scd export onnx` and `scd export web`, which speak and serve."""

from __future__ import annotations

from pathlib import Path

from scd.export.onnx_world import export_onnx, readable
from scd.export.serve_site import site_server
from scd.export.settings import OnnxConfig, WebConfig
from scd.export.site import export_web, readable_site


def export(config: OnnxConfig | WebConfig) -> None:
    """Write a world in another format and say what was written.

    Raises:
        OSError, ValueError: no such world, one that cannot be exported, or a folder in use.
    """
    if isinstance(config, OnnxConfig):
        print(f"{readable(export_onnx(config))}; saved {config.out}")
    else:
        export_and_serve(config)


def export_and_serve(config: WebConfig) -> None:
    """Write a site, say what it is, and serve it until Ctrl+C if a port was given.

    Raises:
        OSError, ValueError: as `export_web`, or the port is taken.
    """
    # Before minutes are spent, find out whether the port is free.
    server = None if config.serve is None else site_server(Path(config.out), config.serve)
    try:
        print(f"{readable_site(export_web(config))}; saved {config.out}")
        if server is None:
            print("Put the folder on any web server (docs/publish.md), or try it: --serve 8000")
            return
        print(f"play at http://localhost:{server.server_address[1]}/ (Ctrl+C stops)", flush=True)
        server.serve_forever()
    finally:
        if server is not None:
            server.server_close()
