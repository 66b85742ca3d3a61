"""Sessions behind one thread that owns the model: messages from any thread in, frames out."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from threading import Thread
from typing import Any

import numpy as np

from scd.common.config import to_json
from scd.common.runtime import without_weights
from scd.common.weights import digest_of
from scd.engine.interface import Engine
from scd.models.about import About
from scd.models.build import build, num_parameters
from scd.models.checkpoint import World
from scd.models.shipped import Clips
from scd.models.weights import WEIGHTS_FILE
from scd.serving.admission import HostConfig, UnderWay
from scd.serving.commands import Call
from scd.serving.messages import Answer, Command, ServeError, Sink, WorldInfo
from scd.serving.metrics import HostOverview
from scd.serving.scheduler import EngineLoop, RequestQueue
from scd.streaming.texts import WorldTexts

MOST_DIGESTED = 100_000_000
"""Parameters of a model whose file is read whole for its digest."""


class Host:
    """Start it, send it messages from any thread, stop it.

    The model thread fulfils the futures in the order of the messages; what is refused is a
    `ServeError` of the future. A full queue is refused at once.

    A session that is paused, or whose client has not acknowledged `queue_frames` frames, makes no
    frames and costs nothing but its memory.
    """

    def __init__(
        self,
        world: World,
        engine: Engine,
        config: HostConfig | None = None,
        report: Callable[[str], None] = print,
        clips: Clips | None = None,
        name: str = "world",
        about: About | None = None,
        texts: WorldTexts | None = None,
        prompt: str = "",
    ) -> None:
        """Prepare; nothing big is allocated before `start`.

        Args:
            world: that is played.
            engine: of its model; nobody else may use it from `start` to `stop`.
            config: limits.
            report: told on the model thread what a person should know; must not block.
            clips: that sessions may begin with.
            name: of the world, for people.
            about: what else it says of itself; None: nothing.
            texts: of a world that a text steers: its text encoder; None: no text does.
            prompt: of sessions that bring none; empty: they must.

        Raises:
            ValueError: clips that do not fit the world, a text encoder or a prompt that is missing
                or too much.
        """
        if world.card.conditions.has_text != (texts is not None) or (prompt and texts is None):
            raise ValueError(
                "a world that a text steers needs its text encoder, and no other world takes a "
                f"prompt, got {prompt!r}"
            )
        card = world.card
        if clips is not None and clips.frames.shape[-2:] != (card.height, card.width):
            raise ValueError(
                f"clips must be {card.height}x{card.width}, as the world, "
                f"got {clips.frames.shape[-2]}x{clips.frames.shape[-1]}"
            )
        self.world, self.engine, self.config = world, engine, config or HostConfig()
        self.info = world_info(world, engine, name, clips, about, prompt)
        self._texts = texts
        self._clips, self._report = clips, report
        self.under_way = UnderWay(0)
        """Counts what comes and goes; has room from `start` on."""
        self._requests = RequestQueue(self.config.queue_commands)
        self._thread = Thread(target=self._live, name="scd-serve-model", daemon=True)
        self._ready: Future[None] = Future()
        self._began = time.monotonic()
        self._stopping = False
        self._loop: EngineLoop | None = None
        self._alive_at = self._began

    def start(self) -> None:
        """Allocate and begin; sessions that lie in `evict_dir` are there again. Once only.

        Raises:
            ValueError: not even one session fits into memory, or limits that do not fit together.
            OSError: `evict_dir` cannot be made.
        """
        self._began = self._alive_at = time.monotonic()
        self._thread.start()
        self._ready.result()

    def stop(self, timeout_s: float = 30.0) -> int | None:
        """End: clients are told, sessions are written to `evict_dir` if there is one.

        Harmless twice. After `timeout_s` seconds it returns, done or not.

        Returns:
            How many sessions are lost; None: it is not done.
        """
        self._stopping = True
        self._requests.ring()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            return None
        return 0 if self._loop is None else self._loop.evictions.num_lost

    def overview(self) -> HostOverview:
        """Say how all stands now, without waiting for the model thread."""
        now, requests, loop = time.monotonic(), self._requests, self._loop
        healthy = self._thread.is_alive() and not requests.reason
        if loop is None:
            reason = requests.reason or "it has not started"
            return HostOverview(healthy=False, reason=reason, max_sessions=self.config.max_sessions)
        return replace(
            loop.overview(),
            healthy=healthy,
            reason="" if healthy else requests.reason or "the model thread is gone",
            uptime_s=now - self._began,
            tick_age_s=now - self._alive_at,
            num_commands=len(requests),
        )

    def playing(self) -> tuple[str, ...]:
        """Name the sessions in memory now, without waiting for the model thread."""
        return () if self._loop is None else tuple(self._loop.sessions.playing)

    def ask(
        self,
        message: Command,
        session: str = "",
        sink: Sink | None = None,
        upload: np.ndarray | None = None,
        file: bytes | bytearray = b"",
    ) -> Future[Answer]:
        """Have a message obeyed.

        Args:
            message: what is asked for.
            session: of which; empty for messages that open one.
            sink: of the client that asks, which hears what comes later; None: it does not stay.
            upload: frames [t h w 3] that the message's `upload` names.
            file: snapshot to restore.
        """
        call = Call(message=message, name=session, sink=sink, upload=upload, file=file)
        return self._requests.put(call)

    def check_snapshot(self, head: bytes | bytearray) -> None:
        """Refuse a snapshot by its beginning, before the rest of it has come; from any thread.

        Raises:
            ServeError: bad_snapshot: no session of this world can be made of it; model_stopped.
        """
        if self._loop is None:
            raise ServeError("model_stopped", "the host has not started", fatal=True)
        self._loop.evictions.check(head)

    def call(self, do: Callable[[EngineLoop], Any]) -> Future[Any]:
        """Have something done on the model thread."""
        return self._requests.put(Call(message=do))

    def _live(self) -> None:
        loop = None
        try:
            loop = EngineLoop(
                self.world,
                self.engine,
                self.config,
                self._clips,
                self.info,
                self._requests,
                self._report,
                self.under_way,
                self._texts,
            )
            self._loop = loop
            self._ready.set_result(None)
            while not self._stopping:
                self._alive_at = time.monotonic()
                loop.turn()
            self._end(loop, "the server is stopping", tell_evicted=True)
        except BaseException as error:
            reason = f"the model thread has ended: {type(error).__name__}: {error}"
            if not self._ready.done():
                self._requests.close(reason)
                self._ready.set_exception(error)
                return
            self._report(reason)
            self._end(loop, reason, tell_evicted=False)

    def _end(self, loop: EngineLoop | None, reason: str, tell_evicted: bool) -> None:
        # First of all, so that nobody who asks from now on waits in vain.
        self._requests.close(reason)
        try:
            if loop is not None:
                loop.prompts.end()
                loop.evictions.end(reason, tell_evicted)
        except BaseException as error:
            self._report(f"while ending: {type(error).__name__}: {error}")
        finally:
            self._requests.refuse_all(reason)


def world_info(
    world: World,
    engine: Engine,
    name: str,
    clips: Clips | None,
    about: About | None,
    prompt: str = "",
) -> WorldInfo:
    """Say what is played.

    Args:
        world: whose card and sampling they are.
        engine: what runs its model.
        name: of the world.
        clips: to begin from; None: there are none.
        about: what its card says; None: nothing.
        prompt: of sessions that bring none.
    """
    about = about or About()
    card, spec = world.card, world.card.conditions
    is_separable = engine.config.is_separable
    kinds = ["none"]
    if spec.is_steered:
        kinds.append("conditions")
    if is_separable:
        kinds.append("context_noise")
    # Of a model without weights: those of this one may have been freed for the engine's.
    with without_weights():
        parameters = num_parameters(build(engine.config))
    weights = None if world.folder is None else world.folder / WEIGHTS_FILE
    is_read = weights is not None and weights.is_file() and parameters < MOST_DIGESTED
    return WorldInfo(
        name=name,
        title=about.title,
        trained=about.trained,
        goal=about.goal,
        parameters=parameters,
        weights=digest_of(weights, "blake2b") if weights is not None and is_read else "",
        height=card.height,
        width=card.width,
        pixel_art=card.pixel_art,
        actions=card.action_names,
        action_dim=spec.action_dim,
        action_parts=tuple(to_json(part) for part in spec.action_parts),
        key_map=tuple(to_json(binding) for binding in card.keys),
        num_labels=spec.num_labels,
        takes_prompt=spec.has_text,
        prompt=prompt,
        pictures_per_frame=world.autoencoder.config.frames_per_latent,
        separable=is_separable,
        default_steps=world.sampling.num_steps,
        fps=card.fps,
        clips=0 if clips is None else len(clips.frames),
        needs_start=engine.needs_first_frame,
        begins_from_nothing=world.begins_from_nothing,
        guidance=tuple(kinds),
    )
