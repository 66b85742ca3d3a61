"""The session store: idle sessions leave memory for the disk, and come back exactly.

Files are named by us after the session; a name that a client sends is only ever looked up in the
list of what is there. Several hosts may share a folder: whoever moves a file away has its session.

Each host has a folder of its own in it that it locks. Sessions are written there; one that leaves
memory is then moved to the shared folder, and one that comes back is moved to the own folder again.
So the own folder holds what its host plays as it was written last, which other hosts inherit when
the lock is gone, because the process is.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from scd.common.files import TEMPORARY, file_aside, take_lock
from scd.common.memory import readable
from scd.serving.messages import ServeError
from scd.serving.sessions import UNKNOWN
from scd.serving.snapshot import Fingerprint, Image, Parsed, contents, parse
from scd.serving.tensors import file_bytes, save

SUFFIX = ".session.safetensors"
"""Of the files."""
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Of a session."""
LEFTOVER_S = 3600.0
"""Age at which a half written file is that of a process which was killed."""
LOOK_S, LOOK_AGAIN_S = 0.25, 5.0
"""Seconds between two looks for what other hosts have put there or taken: while a session is asked
for that is not known, and else."""
OWN, LOCK = ".host-", "lock"
"""How the folders of hosts begin, and the file in each that its host has locked."""


def locked_folder(parent: Path, prefix: str, mode: int = 0o777) -> tuple[Path, TextIO]:
    """Make a folder that `abandoned` finds once this process is gone; return it and its lock.

    Raises:
        OSError: there can be no such folder.
    """
    number = secrets.token_hex(8)
    aside = parent / f"{TEMPORARY}{prefix}{number}"
    aside.mkdir(mode)
    lock = take_lock(aside / LOCK)
    # Locked before others can see it: the lock goes with the file, whatever the folder's name.
    return aside.rename(parent / f"{prefix}{number}"), lock


@contextmanager
def abandoned(folder: Path) -> Iterator[None]:
    """Hold the lock of a `locked_folder` whose process is gone.

    Raises:
        OSError: its process lives, another one is at it, or it is no such folder.
    """
    if folder.is_symlink() or not (folder / LOCK).is_file():
        raise FileNotFoundError(f"{folder / LOCK} is not there")
    with take_lock(folder / LOCK):
        yield


def remove_old(folder: Path, pattern: str) -> None:
    """Remove files and folders of ours that were left half made by a process that was killed."""
    for path in folder.glob(pattern):
        with suppress(OSError):
            found = os.stat(path, follow_symlinks=False)
            if found.st_uid == os.getuid() and time.time() - found.st_mtime > LEFTOVER_S:
                shutil.rmtree(path) if stat.S_ISDIR(found.st_mode) else path.unlink()


@dataclass(frozen=True, kw_only=True)
class KeptFile:
    """A session on disk that is in nobody's memory."""

    path: Path
    """Of the file."""
    num_bytes: int
    """Of the file."""
    since: float
    """When it was left, in seconds of the wall clock."""


def kept_files(folder: Path) -> dict[str, KeptFile]:
    """Return the sessions that lie in a folder, by name; links and pipes are none."""
    found = {}
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name.removesuffix(SUFFIX)
            if not entry.name.endswith(SUFFIX) or not NAME.fullmatch(name):
                continue
            # Another host may take it at this moment.
            with suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False):
                    size, since = entry.stat().st_size, entry.stat().st_mtime
                    found[name] = KeptFile(path=Path(entry.path), num_bytes=size, since=since)
    return found


@dataclass(frozen=True, kw_only=True)
class StoreLimits:
    """What may lie in a folder; beyond, sessions are removed that nobody came back to for longest.

    Bytes are those of all files, also of sessions in this host's memory, which are not removed.
    """

    max_sessions: int
    """In nobody's memory."""
    max_bytes: int
    """Of all files."""
    max_age_s: float
    """Since a session was left."""


class SessionStore:
    """Sessions in a folder; for one worker thread, `len` and `num_bytes` for any.

    A session that is here: `take`. One in memory: `put` any number of times, then `keep` once it
    leaves memory, or `discard` once it is gone for good.
    """

    def __init__(self, folder: Path, fingerprint: Fingerprint, limits: StoreLimits) -> None:
        """Look at what is there, and at what hosts have left that were killed.

        Args:
            folder: is made if it is not there.
            fingerprint: of world and engine.
            limits: what lies there beyond them is removed.

        Raises:
            OSError: there can be no such folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.fingerprint, self.limits = folder, fingerprint, limits
        self.num_expired = 0
        self._kept: dict[str, KeptFile] = {}
        # Bytes of what is put and not kept.
        self._written: dict[str, int] = {}
        remove_old(folder, f"{TEMPORARY}*{SUFFIX}*")
        remove_old(folder, f"{TEMPORARY}{OWN}*")
        self._own, self.lock = locked_folder(folder, OWN)
        self._look()
        self.expire()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        """Of all files, but those of other hosts' sessions in memory."""
        kept = sum(one.num_bytes for one in list(self._kept.values()))
        return kept + sum(list(self._written.values()))

    def __contains__(self, name: str) -> bool:
        kept = self._kept.get(name)
        if kept is not None and not kept.path.exists():
            # Another host has taken it.
            self._kept.pop(name)
        if name not in self._kept and time.monotonic() - self._looked_at > LOOK_S:
            self._look()
        return name in self._kept

    def _look(self) -> None:
        self._looked_at = time.monotonic()
        self._inherit()
        self._kept = kept_files(self.folder)

    def _inherit(self) -> None:
        """Take over what lies in the folders of hosts that are no more."""
        for folder in self.folder.glob(f"{OWN}*"):
            # Else its host lives, or another one inherits it at this moment.
            if folder != self._own:
                with suppress(OSError), abandoned(folder):
                    self._empty(folder)

    def _empty(self, folder: Path) -> None:
        for kept in kept_files(folder).values():
            kept.path.replace(self.folder / kept.path.name)
        shutil.rmtree(folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self._own / f"{name}{SUFFIX}"

    def expire(self, num_sessions: int = 0, num_bytes: int = 0) -> None:
        """Remove what is too old, and the oldest until so many more sessions and bytes fit."""
        limits, total = self.limits, self.num_bytes
        oldest = time.time() - limits.max_age_s
        for name, kept in sorted(self._kept.items(), key=lambda item: item[1].since):
            is_over = len(self._kept) + num_sessions > limits.max_sessions
            if not is_over and total + num_bytes <= limits.max_bytes and kept.since >= oldest:
                return
            kept.path.unlink(missing_ok=True)
            del self._kept[name]
            total -= kept.num_bytes
            self.num_expired += 1

    def put(self, image: Image) -> None:
        """Write a session.

        Raises:
            OSError: the disk is full, or the like; what was there before is still there.
        """
        name, (tensors, texts) = image.state.session, contents(image, self.fingerprint)
        size = file_bytes(tensors, texts)
        # All of it, since for a moment both are there.
        self.expire(num_bytes=size)
        if self.num_bytes + size > self.limits.max_bytes:
            most = readable(self.limits.max_bytes)
            raise OSError(f"{readable(size)} more do not fit into the {most} for sessions")
        with file_aside(self._path(name)) as aside, aside.open("wb") as file:
            save(tensors, texts, file.write)
        self._written[name] = size

    def keep(self, name: str, left_s: float | None = None) -> None:
        """Move what was put, or taken, to the shared folder: it is in memory no more.

        Args:
            name: of the session.
            left_s: seconds for which it stays; None: as the limits say.
        """
        self.expire(num_sessions=1)
        path = self._path(name).replace(self.folder / f"{name}{SUFFIX}")
        self._written.pop(name, None)
        found = path.stat()
        self._kept[name] = KeptFile(path=path, num_bytes=found.st_size, since=found.st_mtime)
        if left_s is not None:
            self.leave(name, left_s)

    def leave(self, name: str, left_s: float) -> bool:
        """Let a session stay for some seconds only; return whether it is here."""
        if name not in self:
            return False
        kept = self._kept[name]
        since = min(kept.since, time.time() - self.limits.max_age_s + left_s)
        os.utime(kept.path, (since, since))
        self._kept[name] = replace(kept, since=since)
        return True

    def take(self, name: str, make: Callable[[int], bytearray] = bytearray) -> Parsed:
        """Read a session, which is in memory then; `keep` puts it back.

        Args:
            name: of it.
            make: gives the bytes to read it into.

        Raises:
            ServeError: unknown_session: it is not here, or another host has taken it; bad_snapshot:
                the file is damaged, or of another world or engine: it stays.
        """
        if name not in self:
            raise ServeError("unknown_session", UNKNOWN)
        kept = self._kept[name]
        try:
            parsed = parse(_read(kept.path, make))
            self.fingerprint.refuse(parsed.fingerprint)
            if parsed.record.state.session != name:
                raise ServeError("bad_snapshot", "the file is that of another session")
            kept.path.replace(self._path(name))
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise ServeError("unknown_session", f"its file cannot be read: {why}") from error
        del self._kept[name]
        self._written[name] = kept.num_bytes
        return parsed

    def discard(self, name: str) -> bool:
        """Remove a session that is gone for good; return whether it lay here."""
        is_here = name in self
        if is_here:
            self._kept.pop(name).path.unlink(missing_ok=True)
        # Looked up in what is there: what a client says becomes no path.
        if self._written.pop(name, None) is not None:
            self._path(name).unlink(missing_ok=True)
        return is_here

    def tidy(self, names: Collection[str]) -> None:
        """Remove what was put of all sessions but these, which are in memory; and what is old."""
        for name in set(self._written) - set(names):
            self._path(name).unlink(missing_ok=True)
            del self._written[name]
        if time.monotonic() - self._looked_at > LOOK_AGAIN_S:
            self._look()
        self.expire()

    def end(self) -> None:
        """Leave; what was put and not kept is for other hosts. Nothing may be called afterwards."""
        self._empty(self._own)
        self._written.clear()
        self._kept = kept_files(self.folder)
        self.expire()
        self.lock.close()


def _read(path: Path, make: Callable[[int], bytearray]) -> bytearray:
    """Read a file; a link or a pipe that has taken its place meanwhile is an OSError."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError(errno.ENOENT, "it is no file")
        data = make(found.st_size)
        if file.readinto(data) != len(data):
            raise OSError(f"needed {len(data)} bytes, got fewer")
        return data
