"""Idle sessions leave memory for the disk, and come back when somebody wants them."""

from __future__ import annotations

import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from scd.common.files import TEMPORARY, file_aside, take_lock
from scd.common.memory import OutOfMemory
from scd.serving.errors import (
    BadSnapshot,
    HostStopped,
    SessionBusy,
    TooManySessions,
    UnknownSession,
)
from scd.serving.events import Evicted, Info
from scd.serving.session import Player
from scd.serving.sessions import Players, check_steps
from scd.serving.snapshot import Identity, Image, Parsed, parse, rebuild, write

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


Retry = Callable[[Exception | None], None]
"""Is called when what was waited for is done, or with why it will not be."""

YIELD_S = 5.0
"""After which a session without a client makes room for somebody who needs it."""


def lacks_room(error: Exception) -> bool:
    """Whether something was refused that could be had if another session left memory."""
    return isinstance(error, (TooManySessions, OutOfMemory))


class Evictions:
    """For the model thread; what is slow is done beside it, and a session used meanwhile stays."""

    def __init__(self, players: Players, shelf: Shelf | None, aside: Aside) -> None:
        """Begin with none under way; no shelf: sessions stay in memory."""
        self.players, self.shelf, self._aside = players, shelf, aside
        self.num_evictions = self.num_restores = self.num_failed = 0
        self._waking: dict[str, list[Retry]] = {}

    def lies_here(self, name: str) -> bool:
        """Whether a session is on disk."""
        return self.shelf is not None and name not in self.players.playing and name in self.shelf

    def sweep(self) -> None:
        """Let those go that were idle for long enough."""
        now, idle_s = self.players.clock(), self.players.config.idle_s
        if self.shelf is not None:
            self.shelf.tidy(self.players.playing)
        for player in list(self.players.playing.values()):
            if player.is_idle(now, idle_s):
                self._begin(player, lambda error: None)
            else:
                self._back_up(player, now)

    def _back_up(self, player: Player, now: float) -> None:
        """Write a session that stays in memory, as it is now and without its history."""
        every_s, shelf = self.players.config.backup_s, self.shelf
        is_due = every_s is not None and now - player.written_at >= every_s
        if shelf is None or not is_due or player.is_on_its_way or player.written == player.mark:
            return
        player.is_on_its_way, player.written_at, mark = True, now, player.mark
        image = self.players.image(player, history=False)

        def end(done: Future) -> None:
            player.is_on_its_way = False
            if (error := done.exception()) is None:
                player.written = mark
                return
            self.num_failed += 1
            self.players.report(f"a copy of a session could not be written: {error}")

        self._aside.do(lambda: shelf.put(image), end)

    def release(self, name: str) -> Future[bool]:
        """Put a session on disk now, for another host; False: it is busy for a moment.

        Raises:
            UnknownSession: it is not in memory here.
            SessionBusy: it has a client.
        """
        player = self.players.playing.get(name)
        if player is None:
            raise UnknownSession("there is no session of this name")
        if player.sink is not None:
            raise SessionBusy("another client is attached to this session")
        released: Future[bool] = Future()

        def end(_: Exception | None) -> None:
            released.set_result(name not in self.players.playing)

        if not player.is_idle(self.players.clock(), 0.0) or not self._begin(player, end):
            released.set_result(False)
        return released

    def make_room(self, retry: Retry) -> bool:
        """Let the session go that nobody has wanted for longest; False: there is none to go."""
        now, playing = self.players.clock(), self.players.playing.values()
        idle = [one for one in playing if one.sink is None and one.is_idle(now, YIELD_S)]
        if not idle:
            return False
        return self._begin(min(idle, key=lambda one: one.last_used), retry)

    def _begin(self, player: Player, retry: Retry) -> bool:
        shelf = self.shelf
        if shelf is None or shelf.is_full:
            return False
        player.is_on_its_way, uses = True, player.uses
        image = self.players.image(player)
        self._aside.do(lambda: shelf.put(image), lambda done: self._end(player, uses, done, retry))
        return True

    def _end(self, player: Player, uses: int, done: Future, retry: Retry) -> None:
        shelf, name = self.shelf, player.session_id
        assert shelf is not None
        player.is_on_its_way = False
        if (error := done.exception()) is not None:
            self.num_failed += 1
            # Not again before it has been idle as long once more.
            player.last_used = self.players.clock()
            self.players.report(
                f"an idle session stays in memory, it could not be written: {error}"
            )
            retry(error if isinstance(error, Exception) else None)
            return
        if self.players.playing.get(name) is player and player.uses == uses:
            self._let_go(player)
        retry(None)

    def _let_go(self, player: Player) -> None:
        assert self.shelf is not None
        name = player.session_id
        self.shelf.keep(name)
        self.num_evictions += 1
        event = Evicted(session_id=name, generation=player.generation)
        self.players.leave(player, UnknownSession("the session was put on disk"), event)

    def wake(self, name: str, retry: Retry) -> None:
        """Bring a session back from disk."""
        shelf = self.shelf
        assert shelf is not None
        if name in self._waking:
            self._waking[name].append(retry)
            return
        self._waking[name] = [retry]
        self._aside.do(lambda: shelf.read(name), lambda done: self._wake(name, done))

    def _wake(self, name: str, done: Future[Parsed]) -> None:
        shelf = self.shelf
        assert shelf is not None
        error = done.exception()
        try:
            if error is None:
                self.adopt(done.result(), name)
                shelf.claim(name)
        except Exception as found:
            error = found
            if name in self.players.playing:
                # Somebody else has it; here it was never used.
                self.players.forget(self.players.playing[name])
            elif lacks_room(found) and self.make_room(lambda _: self._wake(name, done)):
                return
        for retry in self._waking.pop(name):
            retry(error if isinstance(error, Exception) else None)

    def adopt(self, parsed: Parsed, name: str | None) -> Info:
        """Go on with a session that was read; under a new name if there is none.

        Raises:
            PlayError: it does not fit this world, or there is no room.
        """
        players, streams = self.players, self.players.streams
        check_steps(parsed.note.num_steps, players.config.max_steps)
        info = players.adopt(
            lambda: rebuild(
                parsed,
                (streams.world, streams.engine, streams.window),
                players.reach,
                players.every,
            ),
            parsed.note.guidance.guidance,
            name,
        )
        self.num_restores += 1
        return info

    def drain(self, reason: str, tell_evicted: bool) -> None:
        """Put all sessions on disk, whatever they do, or end them where that is impossible.

        Args:
            reason: for clients of those that end.
            tell_evicted: clients hear `Evicted`; False: they hear the reason in any case.
        """
        if self.shelf is not None:
            self.shelf.tidy(self.players.playing)
        for player in list(self.players.playing.values()):
            try:
                self.players.drop(player)
                if self.shelf is not None:
                    self.shelf.put(self.players.image(player))
                    if tell_evicted:
                        self._let_go(player)
                        continue
                    self.shelf.keep(player.session_id)
            except Exception as error:
                self.players.report(f"a session is lost, it could not be written: {error}")
            self.players.stop(player, HostStopped(reason))
        if self.shelf is not None:
            self.shelf.end()
