"""Who may come in: memory computed beforehand, and a number of sessions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import RLock

from scd.common.memory import GIB, OutOfMemory, free_bytes, readable
from scd.engine.interface import Engine
from scd.engine.pool import pool_bytes
from scd.models.checkpoint import World
from scd.models.config import Guidance
from scd.serving.messages import ServeError
from scd.streaming.rollout import Rollout
from scd.streaming.sessions import Session

SHARE = 0.8
"""Of the free memory that sessions may have unless told; activations and pictures need the rest."""


@dataclass(frozen=True, kw_only=True)
class HostConfig:
    """How many sessions there may be, and how much each may take."""

    max_sessions: int = 8
    """Sessions in memory; those on disk do not count."""
    max_rows: int = 16
    """Frames denoised side by side; a guided one counts twice."""
    memory_gib: float | None = None
    """For sessions and their histories; None: four fifths of what is free at the start."""
    history_frames: int = 300
    """Frames that a session can be rewound by, at least, once it has them."""
    keyframe_every: int = 16
    """Frames between two copies of a session's memory; a rewind replays fewer than that."""
    max_orders: int = 8
    """Calls of `step` that wait in one session."""
    max_fps: float = 60.0
    """Frames per second of one session."""
    max_steps: int = 64
    """Denoising steps per frame that a client may ask for."""
    max_step_count: int = 256
    """Frames of one `step` or one `frames`."""
    max_start_frames: int = 64
    """Given first frames."""
    queue_frames: int = 4
    """Frames of an attached client that it has not acknowledged; then no more are made for it."""
    queue_commands: int = 1024
    """Calls that wait for the model thread; more are refused."""
    idle_s: float = 120.0
    """After which a session that made no frame and got no call is put on disk."""
    evict_dir: Path | None = None
    """Where idle sessions go; None: they stay in memory."""
    backup_s: float | None = None
    """Between two copies of each session that are written to evict_dir while it stays in memory,
    for another host to go on with if this process is killed; None: there are none."""
    kept_sessions: int = 1000
    """Sessions on disk; beyond, the one is removed that was left longest ago."""
    kept_gib: float | None = None
    """Of all sessions on disk; None: 8, or more where that is little for those in memory."""
    kept_s: float = 7 * 86400.0
    """For which a session stays on disk."""
    left_s: float = 60.0
    """For which a session stays that its page has left."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a finite number above 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class SessionBytes:
    """Memory of one session by part."""

    stream: int
    """Keys and values of its window."""
    latent: int
    """Of one frame."""
    start: int
    """Given first frames, at the most."""

    def with_history(self, reach: int, every: int) -> int:
        """Return all of it: the stream, its copies in the history, and the frames kept.

        (reach // every + 2 + 1) * stream + (reach + every) * latent + start.
        """
        copies = reach // every + 2
        return (copies + 1) * self.stream + (reach + every) * self.latent + self.start


def session_bytes(
    world: World, engine: Engine, window: int | None, guidance: Guidance | None, max_start: int
) -> SessionBytes:
    """Compute the memory of a session before it is there.

    Args:
        world: that is played.
        engine: that plays it.
        window: frames in memory; None: as the model was trained.
        guidance: by conditions it needs a second memory.
        max_start: given first frames, at the most.

    Raises:
        ValueError: guidance that this model cannot give.
    """
    rollout = Rollout(world, None, guidance, 0, window, engine)
    shape, card = engine.shape, world.card
    # Of video the last picture is kept too.
    picture = 3 * card.height * card.width if world.autoencoder.config.is_video else 0
    return SessionBytes(
        stream=Session(0, rollout).bytes_needed,
        latent=shape.num_tokens * shape.token_dim * engine.dtype.itemsize + picture,
        start=max_start * 3 * card.height * card.width,
    )


def fitting_history(needed: SessionBytes, room: int, reach: int, every: int) -> tuple[int, int]:
    """Return how far back a session of some bytes can be rewound, and frames between copies.

    Copies are taken further apart first, since that costs only time; then the reach is shortened.

    Args:
        needed: of a session.
        room: bytes for it.
        reach: wanted, in frames.
        every: wanted, in frames.
    """
    while needed.with_history(reach, every) > room and (reach > 1 or every > 1):
        if every < reach:
            every = min(2 * every, reach)
        else:
            reach = every = max(reach // 2, 1)
    return reach, every


def budget_bytes(engine: Engine, memory_gib: float | None, max_rows: int) -> int:
    """Return the memory that sessions may have, the rows of the pool taken off.

    Raises:
        OutOfMemory: the rows alone need more.
    """
    rows = pool_bytes(engine, max_rows)
    free = free_bytes(engine.device)
    total = int(SHARE * free) if memory_gib is None else int(memory_gib * GIB)
    if total < rows:
        raise OutOfMemory(
            f"{max_rows} frames side by side need {readable(rows)} on {engine.device}, "
            f"{readable(total)} may be taken"
        )
    return total - rows


def for_under_way(budget: int, max_sessions: int) -> int:
    """Return the part of the memory that is for what comes and goes: bodies, uploads, snapshots.

    An eighth, and as much as there is for one session, whose snapshot then fits.
    """
    return max(budget // 8, budget // (max_sessions + 1))


class UnderWay:
    """Counts the bytes that come in and go out, and refuses those beyond; from any thread."""

    def __init__(self, budget: int) -> None:
        """Begin with none; `budget`: bytes, which may be set later."""
        self.budget = budget
        self.held = self.num_freed = 0
        # Of one thread several times: bytes may be let go of wherever memory is asked for.
        self._lock = RLock()

    def check(self, num_bytes: int) -> None:
        """Refuse bytes for which there is no room now.

        Raises:
            ServeError: too_large: they are more than may ever be under way; overloaded: others are.
        """
        if num_bytes > self.budget:
            raise ServeError(
                "too_large",
                f"{readable(num_bytes)} are more than the {readable(self.budget)} of memory for "
                "what comes and goes (--memory-gib)",
            )
        if self.held + num_bytes > self.budget:
            raise ServeError(
                "overloaded",
                f"{readable(num_bytes)} do not fit beside what others send and fetch now, "
                f"{readable(self.held)} of {readable(self.budget)}: try again shortly",
            )

    def take(self, num_bytes: int) -> None:
        """Count bytes from now on (ServeError as `check`)."""
        with self._lock:
            self.check(num_bytes)
            self.held += num_bytes

    def give(self, num_bytes: int) -> None:
        """Count bytes no more."""
        with self._lock:
            self.held -= num_bytes
            self.num_freed += num_bytes


class Counted(bytearray):
    """Bytes that are under way for as long as anybody holds them."""

    def __init__(self, under_way: UnderWay, size: int = 0, weight: int = 1) -> None:
        """Begin with zeros.

        Args:
            under_way: counts them.
            size: of them.
            weight: copies that whoever takes them makes on the way.

        Raises:
            ServeError: as `UnderWay.check`.
        """
        self._under_way, self._weight, self._taken = under_way, weight, 0
        self._take(size)
        super().__init__(size)

    def _take(self, size: int) -> None:
        self._under_way.take(self._weight * size)
        self._taken += self._weight * size

    def add(self, part: bytes) -> None:
        """Append bytes (ServeError as `UnderWay.check`)."""
        self._take(len(part))
        self.extend(part)

    def __del__(self) -> None:
        self._under_way.give(self._taken)


class Admission:
    """Promises memory to sessions by name, and never more than there is."""

    def __init__(self, max_sessions: int, budget: int) -> None:
        self.max_sessions, self.budget = max_sessions, budget
        self._promised: dict[str, int] = {}
        self.num_freed = 0
        """Bytes that sessions gave back, in all."""

    @property
    def reserved(self) -> int:
        """Bytes promised; may be read from any thread."""
        return sum(list(self._promised.values()))

    def promised(self, name: str) -> int | None:
        """Return what a session was promised; None: nothing."""
        return self._promised.get(name)

    def admit(self, name: str, needed: int) -> None:
        """Promise memory to a session, in place of what it may have been promised before.

        Raises:
            ServeError: too_many_sessions: no more may be there, or the others have the memory.
        """
        others = {key: value for key, value in self._promised.items() if key != name}
        if len(others) >= self.max_sessions:
            raise ServeError(
                "too_many_sessions",
                f"{len(others)} of {self.max_sessions} sessions are there already",
            )
        left = self.budget - sum(others.values())
        if needed > left:
            raise ServeError(
                "too_many_sessions",
                f"a session of this kind needs {readable(needed)}, {readable(left)} of "
                f"{readable(self.budget)} are left",
            )
        self.release(name)
        self._promised[name] = needed

    def restore(self, name: str, promised: int | None) -> None:
        """Promise again what `promised` returned."""
        self.release(name)
        if promised is not None:
            self._promised[name] = promised

    def release(self, name: str) -> None:
        """Take a promise back; harmless twice."""
        self.num_freed += self._promised.pop(name, 0)
