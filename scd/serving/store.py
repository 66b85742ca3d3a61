"""The session store: idle sessions leave memory for the disk, and come back exactly.

Files are named by us after the session; a name that a client sends is only ever looked up in the
list of what is there. Several hosts may share a folder: whoever moves a file away has its session.

Each host has a folder of its own in it that it locks. Sessions are written there; one that leaves
memory is then moved to the shared folder, and one that comes back is moved to the own folder again.
So the own folder holds what its host plays as it was written last, which other hosts inherit when
the lock is gone, because the process is.
"""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scd.common.files import TEMPORARY, file_aside, take_lock
from scd.common.memory import OutOfMemory
from scd.common.runtime import return_freed_memory
from scd.serving.messages import Evicted, ServeError, Stopped
from scd.serving.session import Session, as_guidance
from scd.serving.sessions import Sessions
from scd.serving.snapshot import Fingerprint, Image, Parsed, parse, rebuild, write

SUFFIX = ".session.safetensors"
"""Of the files."""
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Of a session."""
LEFTOVER_S = 3600.0
"""Age at which a half written file is that of a process which was killed."""
LOOK_S = 0.25
"""Seconds between two looks for sessions that another host has put there."""
OWN, LOCK = ".host-", "lock"
"""How the folders of hosts begin, and the file in each that its host has locked."""
YIELD_S = 5.0
"""After which a session without a client makes room for somebody who needs it."""

Retry = Callable[[Exception | None], None]
"""Is called when what was waited for is done, or with why it will not be."""


class SessionStore:
    """Sessions in a folder; for one worker thread, `len` and `is_full` for any.

    A session that is here: `take`. One in memory: `put` any number of times, then `keep` once it
    leaves memory, or `discard` once it is gone for good.
    """

    def __init__(self, folder: Path, fingerprint: Fingerprint, max_sessions: int) -> None:
        """Look at what is there, and at what hosts have left that were killed.

        Args:
            folder: is made if it is not there.
            fingerprint: of world and engine.
            max_sessions: that may lie there.

        Raises:
            OSError: there can be no such folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.fingerprint, self.max_sessions = folder, fingerprint, max_sessions
        self._paths: dict[str, Path] = {}
        self._looked_at = float("-inf")
        for path in folder.glob(f"{TEMPORARY}*{SUFFIX}*"):
            if time.time() - path.stat().st_mtime > LEFTOVER_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        number = secrets.token_hex(8)
        aside = folder / f"{TEMPORARY}{number}{SUFFIX}"
        aside.mkdir()
        self.lock = take_lock(aside / LOCK)
        # Locked before others can see it: the lock goes with the file, whatever the folder's name.
        self._own = aside.rename(folder / f"{OWN}{number}")
        self._look()

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def is_full(self) -> bool:
        return len(self) >= self.max_sessions

    def __contains__(self, name: str) -> bool:
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
        """Take over what lies in the folders of hosts that are no more."""
        for folder in self.folder.glob(f"{OWN}*"):
            try:
                if folder == self._own or not (folder / LOCK).is_file():
                    continue
                lock = take_lock(folder / LOCK)
            except OSError:
                # Its host lives, or another one inherits it at this moment.
                continue
            with lock:
                self._empty(folder)

    def _empty(self, folder: Path) -> None:
        for path in folder.glob(f"*{SUFFIX}"):
            path.replace(self.folder / path.name)
        shutil.rmtree(folder, ignore_errors=True)

    def _written(self, name: str) -> Path:
        return self._own / f"{name}{SUFFIX}"

    def put(self, image: Image) -> None:
        """Write a session.

        Raises:
            OSError: the disk is full, or the like; what was there before is still there.
        """
        data = write(image, self.fingerprint)
        with file_aside(self._written(image.state.session)) as aside:
            aside.write_bytes(data)

    def keep(self, name: str) -> None:
        """Move what was put, or taken, to the shared folder: it is in memory no more."""
        self._paths[name] = self._written(name).replace(self.folder / f"{name}{SUFFIX}")

    def take(self, name: str) -> Parsed:
        """Read a session, which is in memory then; `keep` puts it back.

        Raises:
            ServeError: unknown_session: it is not here, or another host has taken it; bad_snapshot:
                the file is damaged, or of another world or engine: it stays.
        """
        if name not in self:
            raise ServeError("unknown_session", "there is no session of this name")
        try:
            parsed = parse(self._paths[name].read_bytes())
            self.fingerprint.refuse(parsed.fingerprint)
            if parsed.record.state.session != name:
                raise ServeError("bad_snapshot", "the file is that of another session")
            self._paths[name].replace(self._written(name))
        except OSError as error:
            raise ServeError("unknown_session", f"its file cannot be read: {error}") from error
        del self._paths[name]
        return parsed

    def discard(self, name: str) -> bool:
        """Remove a session that is gone for good; return whether it lay here."""
        is_here = name in self
        # Looked up in what is there: what a client says becomes no path.
        written = [path for path in self._own.glob(f"*{SUFFIX}") if path == self._written(name)]
        for path in (*([self._paths.pop(name)] if is_here else []), *written):
            path.unlink(missing_ok=True)
        return is_here

    def tidy(self, names: Collection[str]) -> None:
        """Remove what was put of all sessions but these, which are in memory: others are gone."""
        for path in self._own.glob(f"*{SUFFIX}"):
            if path.name.removesuffix(SUFFIX) not in names:
                path.unlink(missing_ok=True)

    def end(self) -> None:
        """Leave; what was put and not kept is for other hosts. Nothing may be called afterwards."""
        self._empty(self._own)
        self.lock.close()


def lacks_room(error: Exception) -> bool:
    """Whether something was refused that could be had if another session left memory."""
    is_full = isinstance(error, ServeError) and error.code == "too_many_sessions"
    return is_full or isinstance(error, OutOfMemory)


class Evictions:
    """Lets sessions leave memory and come back; a session that is used meanwhile stays.

    For the model thread, which touches no disk: files are read and written by a worker thread, one
    after the other, and `hand_over` lets the model thread go on with what came of it.
    """

    def __init__(
        self,
        sessions: Sessions,
        store: SessionStore | None,
        fingerprint: Fingerprint,
        hand_over: Callable[[Callable[[], None]], None],
    ) -> None:
        """Begin with none under way; no store: sessions stay in memory."""
        self.sessions, self.store = sessions, store
        self._fingerprint, self._hand_over = fingerprint, hand_over
        self.num_evictions = self.num_restores = self.num_failed = 0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="scd-serve-store")
        self._waking: dict[str, list[Retry]] = {}
        self._leaving: set[str] = set()

    def _work(self, work: Callable[[], Any], then: Callable[[Future[Any]], None]) -> None:
        """Let the worker do something; the model thread calls `then` with it done or failed."""
        future = self._worker.submit(work)
        future.add_done_callback(lambda done: self._hand_over(lambda: then(done)))

    def _ask(self, work: Callable[[], Any]) -> Future[Any]:
        """Let the worker do something; return its future, which the model thread fulfils."""
        answer: Future[Any] = Future()
        self._work(work, lambda done: _copy(done, answer))
        return answer

    def has(self, name: str) -> Future[bool]:
        """Say whether a session is in memory or on disk; its use is not noted."""
        store = self.store
        if name in self.sessions.playing or store is None:
            return _known(name in self.sessions.playing)
        return self._ask(lambda: name in store)

    def delete(self, name: str) -> Future[bool]:
        """Remove a session from the disk; say whether it was there and in no memory."""
        store = self.store
        return _known(False) if store is None else self._ask(lambda: store.discard(name))

    def snapshot(self, session: Session) -> Future[bytes]:
        image = self.sessions.image(session)
        return self._ask(lambda: write(image, self._fingerprint))

    def sweep(self) -> None:
        """Let those go that were idle for long enough, and write copies of others."""
        now, store = self.sessions.clock(), self.store
        if store is None:
            return
        known = {*self.sessions.playing, *self._waking, *self._leaving}
        self._work(lambda: store.tidy(known), self._note_fault)
        for session in list(self.sessions.playing.values()):
            if session.is_idle(now, self.sessions.config.idle_s):
                self._evict(session, lambda error: None)
            else:
                self._back_up(session, store, now)

    def trim(self) -> None:
        """Return memory to the machine that the C library keeps, beside the model thread."""
        self._work(return_freed_memory, lambda done: None)

    def _note_fault(self, done: Future[Any]) -> None:
        if (error := done.exception()) is not None:
            self.num_failed += 1
            self.sessions.report(f"the session store fails: {error}")

    def _back_up(self, session: Session, store: SessionStore, now: float) -> None:
        """Write a session that stays in memory, as it is now and without its history."""
        every_s = self.sessions.config.backup_s
        is_due = every_s is not None and now - session.written_at >= every_s
        if not is_due or session.is_being_written or session.written == session.version:
            return
        session.is_being_written, session.written_at = True, now
        version, image = session.version, self.sessions.image(session, history=False)

        def end(done: Future[None]) -> None:
            session.is_being_written = False
            if (error := done.exception()) is None:
                session.written = version
                return
            self.num_failed += 1
            self.sessions.report(f"a copy of a session could not be written: {error}")

        self._work(lambda: store.put(image), end)

    def release(self, name: str) -> Future[bool]:
        """Put a session on disk now, for another host; False: it is busy for a moment.

        Raises:
            ServeError: unknown_session: it is not in memory here; session_busy: it has a client.
        """
        session = self.sessions.playing.get(name)
        if session is None:
            raise ServeError("unknown_session", "there is no session of this name")
        if session.sink is not None:
            raise ServeError("session_busy", "another client is attached to this session")
        released: Future[bool] = Future()

        def end(_: Exception | None) -> None:
            released.set_result(name not in self.sessions.playing)

        if not session.is_idle(self.sessions.clock(), 0.0) or not self._evict(session, end):
            return _known(False)
        return released

    def make_room(self, retry: Retry) -> bool:
        """Let the session go that nobody has wanted for longest; False: there is none to go."""
        now, playing = self.sessions.clock(), self.sessions.playing.values()
        idle = [one for one in playing if one.sink is None and one.is_idle(now, YIELD_S)]
        return bool(idle) and self._evict(min(idle, key=lambda one: one.last_used), retry)

    def _evict(self, session: Session, retry: Retry) -> bool:
        store = self.store
        if store is None or store.is_full:
            return False
        session.is_being_written, uses = True, session.uses
        image = self.sessions.image(session)
        self._work(
            lambda: store.put(image), lambda done: self._leave(session, store, uses, done, retry)
        )
        return True

    def _leave(
        self, session: Session, store: SessionStore, uses: int, done: Future[None], retry: Retry
    ) -> None:
        """Take a session out of memory that was written, unless somebody has used it meanwhile."""
        sessions, name = self.sessions, session.name
        session.is_being_written = False
        if (error := done.exception()) is not None:
            self.num_failed += 1
            # Not again before it has been idle as long once more.
            session.last_used = sessions.clock()
            sessions.report(f"an idle session stays in memory, it could not be written: {error}")
            retry(error if isinstance(error, Exception) else None)
            return
        if sessions.playing.get(name) is not session or session.uses != uses:
            retry(None)
            return

        def end(done: Future[None]) -> None:
            self._note_fault(done)
            if done.exception() is None:
                self._leaving.discard(name)
            retry(None)

        self._leaving.add(name)
        self.num_evictions += 1
        gone = ServeError("unknown_session", "the session was put on disk")
        sessions.leave(session, gone, Evicted(session=name))
        self._work(lambda: store.keep(name), end)

    def can_wake(self, name: str) -> bool:
        """Whether a session may lie on disk."""
        sessions = self.sessions
        return (
            self.store is not None and name not in sessions.playing and name not in sessions.stopped
        )

    def wake(self, name: str, retry: Retry) -> None:
        """Bring a session back from disk, if it is there."""
        store = self.store
        assert store is not None
        if name in self._waking:
            self._waking[name].append(retry)
            return
        self._waking[name] = [retry]
        self._work(lambda: store.take(name), lambda done: self._wake(name, store, done))

    def _wake(self, name: str, store: SessionStore, done: Future[Parsed]) -> None:
        error = done.exception()
        if error is None:
            try:
                self._adopt(done.result(), name)
            except Exception as found:
                if lacks_room(found) and self.make_room(lambda _: self._wake(name, store, done)):
                    return
                error = found
                self._work(lambda: store.keep(name), self._note_fault)
        for retry in self._waking.pop(name):
            retry(error if isinstance(error, Exception) else None)

    def restore(self, file: bytes | bytearray) -> Future[Session]:
        """Open a session, under a new name, from what `snapshot` gave."""
        answer: Future[Session] = Future()

        def read() -> Parsed:
            parsed = parse(file)
            self._fingerprint.refuse(parsed.fingerprint)
            return parsed

        self._work(read, lambda done: self._restored(done, answer))
        return answer

    def _restored(self, done: Future[Parsed], answer: Future[Session]) -> None:
        """Open a session that was read, if need be once another one has made room."""
        try:
            answer.set_result(self._adopt(done.result(), None))
        except Exception as error:
            if lacks_room(error) and self.make_room(lambda _: self._restored(done, answer)):
                return
            answer.set_exception(error)

    def _adopt(self, parsed: Parsed, name: str | None) -> Session:
        """Go on with a session that was read; under a new name if there is none.

        Raises:
            ServeError: it does not fit this world, or there is no room.
        """
        sessions, streams, state = self.sessions, self.sessions.streams, parsed.record.state
        if state.steps > (most := sessions.config.max_steps):
            raise ServeError("bad_request", f"steps: must lie in 1 .. {most}, got {state.steps}")
        guidance = as_guidance(state.guidance)
        assert guidance is not None
        place = (streams.world, streams.engine, streams.window)
        session = sessions.adopt(
            lambda: rebuild(parsed, place, sessions.reach, sessions.every), guidance, name
        )
        self.num_restores += 1
        return session

    def end(self, reason: str, tell_evicted: bool) -> None:
        """Put all sessions on disk, whatever they do, or end them where that is impossible.

        Args:
            reason: for clients of those that end.
            tell_evicted: clients hear `Evicted`; False: they hear the reason in any case.
        """
        # Before, since both would write a session that is on its way out.
        self._worker.shutdown(wait=True)
        sessions, store = self.sessions, self.store
        if store is not None:
            store.tidy({*sessions.playing, *self._waking, *self._leaving})
        for session in list(sessions.playing.values()):
            event: Stopped | Evicted = Stopped(session=session.name, reason=reason)
            try:
                sessions.drop(session)
                if store is not None:
                    store.put(sessions.image(session))
                    if tell_evicted:
                        event = Evicted(session=session.name)
            except Exception as error:
                sessions.report(f"a session is lost, it could not be written: {error}")
            sessions.leave(session, ServeError("model_stopped", reason, fatal=True), event)
        if store is not None:
            store.end()


def _known(value: bool) -> Future[bool]:
    future: Future[bool] = Future()
    future.set_result(value)
    return future


def _copy(done: Future[Any], to: Future[Any]) -> None:
    error = done.exception()
    to.set_result(done.result()) if error is None else to.set_exception(error)
