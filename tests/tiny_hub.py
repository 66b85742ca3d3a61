"""A hub of this machine, for the real client: making, filling and reading a repository over HTTP.

What it answers follows the client's own calls (huggingface_hub); large files go and come by the
protocol of Git LFS, whose batch call says where to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "hf_of_the_test"
"""Of the account that may write."""

OWNER = "me"
"""That account."""

LARGE = (".safetensors",)
"""Endings of names of files that are stored by LFS."""


class Hub(ThreadingHTTPServer):
    """Repositories by name (of data: `datasets/OWNER/NAME`): the files of each, and its commits."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Call)
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[str]] = {}
        self.objects: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def sha(self, name: str) -> str:
        """Return the commit at which a repository is: 40 hexadecimal digits."""
        return hashlib.sha1("\n".join([name, *self.commits[name]]).encode()).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a hub without repositories while the block runs."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def on_hub(code: str, address: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run code whose hub is at an address, with a cache of its own."""
    # The client reads all of these when it is imported. Large files go by LFS, not by chunks.
    given = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    words = [sys.executable, "-c", code]
    return subprocess.run(
        words, env=environment | given, capture_output=True, text=True, timeout=120
    )


class Call(BaseHTTPRequestHandler):
    """One call of the client."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None: ...

    def _json(self, values: Any, status: int = 200, **headers: str) -> None:
        self._bytes(json.dumps(values).encode(), status, **headers)

    def _bytes(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self) -> None:
        body = self._body()
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != oid:
            return self._json({"error": "other bytes than announced"}, 400)
        self.server.objects[oid] = body
        self._json({})

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        hub, words = self.server, self.path.partition("?")[0].strip("/").split("/")
        if words == ["api", "validate-yaml"]:
            has_front = json.loads(body)["content"].startswith("---\n")
            return self._json({"errors": [], "warnings": []}, 200 if has_front else 400)
        if words == ["api", "repos", "create"]:
            asked = json.loads(body)
            owner, name = asked["organization"] or OWNER, asked["name"]
            if owner != OWNER:
                return self._json({"error": f"no rights in {owner}"}, 403)
            hub.files.setdefault(f"{owner}/{name}", {})
            hub.commits.setdefault(f"{owner}/{name}", [])
            return self._json({"url": f"{hub.address}/{owner}/{name}", "id": f"{owner}/{name}"})
        if words[-3:] == ["lfs", "objects", "batch"]:
            objects = [
                one | {"actions": {"upload": {"href": f"{hub.address}/store/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        name = "/".join(words[2:4])
        if words[4] == "preupload":
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        assert words[4] == "commit", self.path
        for line in body.decode().splitlines():
            self._commit(name, **json.loads(line))
        sha = hub.sha(name)
        self._json({"commitUrl": f"{hub.address}/{name}/commit/{sha}", "commitOid": sha})

    def _commit(self, name: str, key: str, value: dict[str, Any]) -> None:
        files = self.server.files[name]
        if key == "header":
            self.server.commits[name].append(value["summary"])
        elif key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        else:
            assert key == "lfsFile", key
            files[value["path"]] = self.server.objects[value["oid"]]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, words = self.server, self.path.partition("?")[0].strip("/").split("/")
        is_api, is_data = words[0] == "api", "datasets" in words[:2]
        words = words[2:] if is_api else words[is_data:]
        name = ("datasets/" if is_data else "") + "/".join(words[:2])
        if name not in hub.files:
            refusal = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            return self._json({"error": "Repository not found"}, 404, **refusal)
        files, sha = hub.files[name], hub.sha(name)
        if not is_api:
            body = files["/".join(words[4:])]
            etag = f'"{hashlib.sha256(body).hexdigest()}"'
            return self._bytes(body, ETag=etag, X_Repo_Commit=sha)
        rest = words[2:]
        if rest[:1] == ["revision"] and rest[1] not in ("main", sha):
            return self._json({"error": "?"}, 404, **{"X-Error-Code": "RevisionNotFound"})
        if rest[:1] == ["tree"]:
            return self._json([entry_of(path, body) for path, body in sorted(files.items())])
        self._json({"id": name, "sha": sha, "siblings": [{"rfilename": path} for path in files]})


def entry_of(path: str, body: bytes) -> dict[str, Any]:
    """Describe a file as the hub lists it."""
    oid = hashlib.sha1(body).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(body), "oid": oid}
    if path.endswith(LARGE):
        large = hashlib.sha256(body).hexdigest()
        entry["lfs"] = {"oid": large, "size": len(body), "pointerSize": 134}
    return entry
