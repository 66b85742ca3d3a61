"""How sessions leave memory for the disk and come back, and what is said of those that are removed.

For the model thread; the files are those of `scd.serving.store`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from scd.common.memory import OutOfMemory, readable
from scd.common.runtime import return_freed_memory
from scd.serving.admission import Counted
from scd.serving.layout import Layout
from scd.serving.messages import Evicted, ServeError, Stopped
from scd.serving.session import Session, as_guidance
from scd.serving.sessions import UNKNOWN, Sessions
from scd.serving.snapshot import Fingerprint, Parsed, parse, parse_head, rebuild, write
from scd.serving.store import SessionStore

TELL_S = 60.0
"""Between two lines of the log about sessions that were removed or refused."""

Retry = Callable[[Exception | None], None]
"""Is called when what was waited for is done, or with why it will not be."""


class Seldom:
    """Tells of what happens often: the first time at once, then once a minute with their number."""

    def __init__(self, report: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._report, self._clock = report, clock
        self._count, self._told_at = 0, float("-inf")

    def note(self, count: int, said: Callable[[], str]) -> None:
        """Note that something happened so many times; `said` follows the number."""
        self._count += count
        if self._count and self._clock() - self._told_at >= TELL_S:
            self._report(f"{self._count} {said()}")
            self._count, self._told_at = 0, self._clock()


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
        layout: Layout,
        hand_over: Callable[[Callable[[], None]], None],
    ) -> None:
        """Begin with none under way; no store: sessions stay in memory."""
        self.sessions, self.store = sessions, store
        self._fingerprint, self._layout, self._hand_over = fingerprint, layout, hand_over
        self.num_evictions = self.num_restores = self.num_failed = self.num_lost = 0
        self._removed, self._num_told = Seldom(sessions.report, sessions.clock), 0
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

    def snapshot(self, session: Session) -> Future[bytearray]:
        image = self.sessions.image(session)
        make = partial(Counted, self.sessions.under_way)
        return self._ask(lambda: write(image, self._fingerprint, make))

    def leave(self, name: str) -> Future[bool]:
        """Note that nobody will come back to a session on disk; say whether it was there."""
        store, left_s = self.store, self.sessions.config.left_s
        return _known(False) if store is None else self._ask(lambda: store.leave(name, left_s))

    def sweep(self) -> None:
        """Let those go that were idle for long enough, and write copies of others."""
        now, store, config = self.sessions.clock(), self.store, self.sessions.config
        if store is not None:
            known = {*self.sessions.playing, *self._waking, *self._leaving}
            self._work(lambda: store.tidy(known), self._note_tidied)
        for session in list(self.sessions.playing.values()):
            has_left = session.has_left and session.sink is None
            if has_left and session.is_idle(now, config.left_s):
                # A file that was written of it is tidied away, since it is not known any more.
                self.sessions.stop(session, ServeError("unknown_session", UNKNOWN))
            elif store is not None and session.is_idle(now, config.idle_s):
                self._evict(session, lambda error: None)
            elif store is not None:
                self._back_up(session, store, now)

    def _note_tidied(self, done: Future[None]) -> None:
        self._note_fault(done)
        store = self.store
        assert store is not None
        num_new, self._num_told = store.num_expired - self._num_told, store.num_expired
        most = store.limits
        self._removed.note(
            num_new,
            lambda: (
                f"sessions to which nobody came back were removed, {len(store)} of "
                f"{most.max_sessions} are kept, {readable(store.num_bytes)} of "
                f"{readable(most.max_bytes)}"
            ),
        )

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
            raise ServeError("unknown_session", UNKNOWN)
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
        idle = [one for one in playing if one.sink is None and one.is_idle(now, 0.0)]
        order = [(not one.has_left, one.last_used, one.name) for one in idle]
        return bool(idle) and self._evict(self.sessions.playing[min(order)[2]], retry)

    def _evict(self, session: Session, retry: Retry) -> bool:
        store = self.store
        if store is None:
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
        left_s = sessions.config.left_s if session.has_left else None
        self._work(lambda: store.keep(name, left_s), end)

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
        work = self._work
        work(lambda: store.take(name, self._bytes_of), lambda done: self._wake(name, store, done))

    def _bytes_of(self, size: int) -> bytearray:
        """Return bytes to read a session's own file into: they are under way, but a file that is
        larger than all that may be is read too, or its session would be locked out for ever."""
        under_way = self.sessions.under_way
        return Counted(under_way, size) if size <= under_way.budget else bytearray(size)

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
            self.check(file)
            return parse(file)

        self._work(read, lambda done: self._restored(done, answer))
        return answer

    def check(self, file: bytes | bytearray) -> None:
        """Refuse a snapshot of which no session can be made, by its head alone; on any thread.

        Raises:
            ServeError: bad_snapshot.
        """
        fingerprint, record, head = parse_head(file)
        self._fingerprint.refuse(fingerprint)
        self._layout.check(record, head.entries)

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
        self._layout.check(parsed.record, parsed.tensors)
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
                self.num_lost += 1
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
