"""Idle sessions on disk: one file each, written aside and renamed, read back exactly.

Files are named by us after the session; a name that a client sends is only ever looked up in the
list of what is there. Several hosts may share a folder: whoever moves a file away has its session.

Each host has a desk there, a folder of its own that it locks. Sessions are written at the desk; one
that leaves memory is then moved to the shelf, and one that comes back is moved to the desk again.
So the desk holds what its host plays as it was written last, which other hosts inherit when the
lock is gone, because the process is.
"""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from scd.common.files import TEMPORARY, file_aside, take_lock
from scd.serving.errors import BadSnapshot, UnknownSession
from scd.serving.identity import Identity
from scd.serving.snapshot import Image, Parsed, parse, write

SUFFIX = ".session.safetensors"
"""Of the files."""
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Of a session."""
LEFTOVER_S = 3600.0
"""Age at which a half written file is that of a process which was killed."""
LOOK_S = 0.25
"""Seconds between two looks for sessions that another host has put there."""
DESK, LOCK = ".host-", "lock"
"""How the folders of hosts begin, and the file in each that its host has locked."""


class Shelf:
    """Sessions in a folder. Files are read and written beside the model thread.

    A session that is here: `read`, then `claim`. One in memory: `put` any number of times, then
    `keep` once it leaves memory, or `discard` once it is gone for good.
    """

    def __init__(self, folder: Path, identity: Identity, max_sessions: int) -> None:
        """Look at what is there, and at what hosts have left that were killed.

        Args:
            folder: is made if it is not there.
            identity: of world and engine.
            max_sessions: that may lie there.

        Raises:
            OSError: there can be no such folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.identity, self.max_sessions = folder, identity, max_sessions
        self._paths: dict[str, Path] = {}
        self._looked_at = float("-inf")
        for path in folder.glob(f"{TEMPORARY}*{SUFFIX}*"):
            if time.time() - path.stat().st_mtime > LEFTOVER_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        number = secrets.token_hex(8)
        aside = folder / f"{TEMPORARY}{number}{SUFFIX}"
        aside.mkdir()
        self._lock = take_lock(aside / LOCK)
        # Locked before others can see it: the lock goes with the file, whatever the folder's name.
        self._desk = aside.rename(folder / f"{DESK}{number}")
        self._look()

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def is_full(self) -> bool:
        """Whether no more fit."""
        return len(self) >= self.max_sessions

    def __contains__(self, name: str) -> bool:
        """Whether a session lies here."""
        path = self._paths.get(name)
        if path is not None and not path.exists():
            # Another host has taken it.
            self._paths.pop(name)
        if name not in self._paths and time.monotonic() - self._looked_at > LOOK_S:
            self._look()
        return name in self._paths

    def _look(self) -> None:
        self._looked_at = time.monotonic()
        self._inherit()
        found = {}
        for path in self.folder.glob(f"*{SUFFIX}"):
            name = path.name.removesuffix(SUFFIX)
            if NAME.fullmatch(name):
                found[name] = path
        self._paths = found

    def _inherit(self) -> None:
        """Move to the shelf what lies at desks whose hosts are no more."""
        for desk in self.folder.glob(f"{DESK}*"):
            try:
                if desk == self._desk or not (desk / LOCK).is_file():
                    continue
                lock = take_lock(desk / LOCK)
            except OSError:
                # Its host lives, or another one inherits it at this moment.
                continue
            with lock:
                for path in desk.glob(f"*{SUFFIX}"):
                    path.replace(self.folder / path.name)
                shutil.rmtree(desk, ignore_errors=True)

    def _written(self, name: str) -> Path:
        return self._desk / f"{name}{SUFFIX}"

    def put(self, image: Image) -> None:
        """Write a session at the desk; slow, so beside the model thread, one image at a time.

        Raises:
            OSError: the disk is full, or the like; what was there before is still there.
        """
        data = write(image, self.identity)
        with file_aside(self._written(image.session_id)) as aside:
            aside.write_bytes(data)

    def keep(self, name: str) -> None:
        """Move to the shelf what was put: the session is in memory no more."""
        self._paths[name] = self._written(name).replace(self.folder / f"{name}{SUFFIX}")

    def read(self, name: str) -> Parsed:
        """Read a session; slow, so beside the model thread. It stays here until `claim`.

        Raises:
            UnknownSession: another host has taken it.
            BadSnapshot: the file is damaged, or of another world or engine.
        """
        path = self._paths.get(name)
        try:
            data = b"" if path is None else path.read_bytes()
        except OSError as error:
            raise UnknownSession(f"its file cannot be read: {error}") from error
        parsed = parse(data)
        self.identity.refuse(parsed.identity)
        if parsed.note.session_id != name:
            raise BadSnapshot("the file is that of another session")
        return parsed

    def claim(self, name: str) -> None:
        """Take a session away, once it is in memory (UnknownSession: another host was faster)."""
        path = self._paths.pop(name, None)
        try:
            if path is None:
                raise FileNotFoundError
            path.replace(self._written(name))
        except FileNotFoundError:
            raise UnknownSession("another host has taken this session") from None

    def discard(self, name: str) -> None:
        """Remove a session that is gone; harmless if it is not here."""
        path = self._paths.pop(name, None)
        for one in (path, self._written(name)):
            if one is not None:
                one.unlink(missing_ok=True)

    def tidy(self, playing: Collection[str]) -> None:
        """Remove from the desk what is of none of the sessions in memory: they were deleted."""
        for path in self._desk.glob(f"*{SUFFIX}"):
            if path.name.removesuffix(SUFFIX) not in playing:
                path.unlink(missing_ok=True)

    def end(self) -> None:
        """Leave; what is still at the desk is for other hosts. Nothing may be called afterwards."""
        for path in self._desk.glob(f"*{SUFFIX}"):
            path.replace(self.folder / path.name)
        shutil.rmtree(self._desk, ignore_errors=True)
        self._lock.close()


class Aside:
    """Work beside the model thread; what comes of it is handed to that thread."""

    def __init__(self, hand_over: Callable[[Callable[[], None]], None]) -> None:
        """Begin with nothing to do; `hand_over` lets the model thread call something."""
        self._hand_over = hand_over
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="scd-serve-aside")

    def do(self, work: Callable[[], object], then: Callable[[Future], None]) -> None:
        """Do some work; the model thread calls `then` with it done, result or error."""
        future = self._workers.submit(work)
        future.add_done_callback(lambda done: self._hand_over(lambda: then(done)))

    def end(self) -> None:
        """Wait for what has begun; what has not is dropped."""
        self._workers.shutdown(wait=True, cancel_futures=True)
