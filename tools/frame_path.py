"""List the files of scd that a streamed frame passes, from a key pressed to the picture drawn.

    python tools/frame_path.py

Starts the server of the shipped world in this process, plays a few frames and then notes every
function of scd that runs, in any thread, between an action sent and its frame decoded.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import scd
from scd.serving.client import Client
from scd.serving.http_api import make_app
from scd.serving.run import Server, listening, open_service, uvicorn_config
from scd.serving.settings import ServeConfig

ROOT = Path(scd.__file__).resolve().parent


class Trace:
    """Notes the files whose functions are called while it is on."""

    def __init__(self) -> None:
        self.on = False
        self.files: dict[str, set[str]] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if self.on and event == "call" and code.co_filename.startswith(f"{ROOT}/"):
            name = str(Path(code.co_filename).relative_to(ROOT))
            self.files.setdefault(name, set()).add(code.co_qualname)


def main() -> None:
    """Play, trace, print."""
    trace = Trace()
    threading.setprofile(trace)
    sys.setprofile(trace)
    config = ServeConfig(port=0, device="cpu")
    with listening(config) as listener:
        service = open_service(config, None)
        service.host.start()
        ready = threading.Event()
        server = Server(uvicorn_config(config, make_app(service)), ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        ready.wait()
        with Client(f"ws://127.0.0.1:{listener.getsockname()[1]}") as client:
            client.create(start="clip", clip=0)
            client.run()
            seen = 0
            for received in client.frames():
                seen += 1
                if seen == 20:
                    trace.on = True
                    client.act(1, sequence=7)
                if trace.on and received.header.sequence == 7:
                    trace.on = False
                    break
            client.close()
        server.should_exit = True
        thread.join()
        service.host.stop(10)
    for name, functions in sorted(trace.files.items()):
        print(f"{name:28}{', '.join(sorted(functions))}")
    print(f"{len(trace.files)} files")


if __name__ == "__main__":
    main()
