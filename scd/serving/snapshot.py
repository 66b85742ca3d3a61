"""One session as a file: safetensors, with everything that is not a tensor as JSON in its header.

Nothing in it is code, and nothing is believed: shapes, numbers and places are checked against what
a stream of this world and engine can have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from scd.common.config import differences, to_json
from scd.common.memory import OutOfMemory
from scd.common.runtime import make_generator
from scd.data.clip import Conditions
from scd.engine.interface import Engine
from scd.models.checkpoint import World
from scd.models.config import SamplingConfig
from scd.models.flow import with_num_steps
from scd.models.kv_cache import KVCache
from scd.models.separable import SeparableState
from scd.serving.layout import Place, begin_blank, no_text
from scd.serving.messages import (
    ServeError,
    State,
)
from scd.serving.records import CacheRecord, FrameRecord, Record, SessionRecord, Texts, bad
from scd.serving.session import History, KeptFrame, Start, as_action, as_guidance
from scd.serving.tensors import Head, pack, read_head
from scd.streaming.rollout import Rollout
from scd.streaming.steering import nothing

NUM_VALUES = 16
"""Numbers of a frame by which two models of one shape are told apart."""


class Fingerprint(Record):
    """A KV cache depends on the model and on how an engine lays it out."""

    settings: str
    """Of model and autoencoder, as JSON."""
    engine: str
    """Its kind and precision."""
    values: tuple[float, ...]
    """What the weights make of a fixed frame."""
    tolerance: float
    """Of these numbers, whose scale is 1: machines round products otherwise."""

    def refuse(self, other: Fingerprint) -> None:
        """Refuse what another world or engine has made (ServeError bad_snapshot)."""
        if other.engine != self.engine:
            raise bad(f"the snapshot is of engine {other.engine}, this is {self.engine}")
        if other.settings != self.settings:
            raise bad(f"the snapshot is of another world: {_first_difference(other, self)}")
        # Written so that NaN is refused too.
        pairs = zip(other.values, self.values, strict=False)
        same = [abs(theirs - ours) <= self.tolerance for theirs, ours in pairs]
        if len(other.values) != len(self.values) or not all(same):
            raise bad("the snapshot is of a model of this shape with other weights")


def fingerprint_of(world: World, engine: Engine) -> Fingerprint:
    """Describe a world and its engine; runs the model for two frames."""
    # A world may have been copied: where its autoencoder lies is not what it computes.
    autoencoder = to_json(world.autoencoder.config.placeless())
    settings = {"model": to_json(engine.config), "autoencoder": autoencoder}
    dtype = str(engine.dtype).removeprefix("torch.")
    return Fingerprint(
        settings=json.dumps(settings, sort_keys=True),
        engine=f"{type(engine).__name__} {dtype}",
        values=_second_frame(world, engine),
        tolerance=1e-3 if engine.dtype == torch.float32 else 0.1,
    )


def _second_frame(world: World, engine: Engine) -> tuple[float, ...]:
    """Return some numbers of the second frame of a stream, made in one step."""
    spec, generator = engine.config.conditions, make_generator(0, "fingerprint of a model")
    action = nothing(spec)[None] if spec.has_actions else None
    labels = torch.zeros(1, dtype=torch.long) if spec.num_labels else None
    frame = 2 * torch.rand(1, 1, 3, world.card.height, world.card.width, generator=generator) - 1
    rollout = Rollout(world, SamplingConfig(num_steps=1), engine=engine)
    actions = None if action is None else action[:, None]
    conditions = Conditions(actions=actions, labels=labels, text=no_text(spec))
    rollout.begin(frame, conditions, can_reset=False)
    rollout.step_latents(action)
    assert rollout.newest is not None
    made = rollout.newest.float().flatten().cpu()
    places = torch.linspace(0, made.numel() - 1, NUM_VALUES).long()
    return tuple(round(value, 6) for value in made[places].tolist())


def _first_difference(theirs: Fingerprint, ours: Fingerprint) -> str:
    try:
        found = differences(json.loads(theirs.settings), json.loads(ours.settings))
    except (ValueError, RecursionError):
        found = []
    return found[0][:200] if found else "its settings cannot be read"


LAST_FRAME = 2**31
"""Frames of the longest stream that is believed."""


def tensors_of(rollout: Rollout, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a stream's KV cache: what is filled of it, by name."""
    state = rollout.state
    cache: KVCache = state.cache
    filled = len(cache.slots) * cache.tokens_per_frame
    tensors = {"keys": cache.keys[:, :, :, :filled], "values": cache.values[:, :, :, :filled]}
    if cache.sink_keys is not None:
        tensors["sink_keys"] = cache.sink_keys
    if isinstance(state, SeparableState):
        tensors["newest"] = state.newest
    # What the world remembers beside it: of text and video.
    tensors |= {f"kept.{name}": tensor for name, tensor in rollout.remembered().items()}
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def fill(rollout: Rollout, record: CacheRecord, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Put a KV cache into a stream that has just begun.

    Args:
        rollout: of the world and engine, with the guidance of the stream.
        record: its numbers.
        tensors: finite ones, by name.
        prefix: of their names.

    Raises:
        ServeError: bad_snapshot: numbers or tensors that no stream of this world can have.
    """
    state = rollout.state
    cache: KVCache = state.cache
    separable = isinstance(state, SeparableState)
    # Just begun, a separable stream stands at its start frame, or at its only given frame.
    first = state.next_position if separable else 0
    if not rollout.num_given <= record.num_frames <= LAST_FRAME:
        raise bad(f"a stream cannot have {record.num_frames} frames")
    next_position = max(first, record.num_frames - 1) if separable else record.num_frames
    _check_ring(record, cache, first, next_position)
    filled = len(record.slots) * cache.tokens_per_frame
    for name in ("keys", "values"):
        target = getattr(cache, name)[:, :, :, :filled]
        target.copy_(_like(target, tensors, f"{prefix}.{name}"))
    cache.slots, cache.num_evicted = list(record.slots), record.num_evicted
    cache.sink_keys = None
    if record.num_evicted and cache.config.rebase_sinks and cache.config.num_sinks:
        sinks = cache.keys[:, :, :, : cache.config.num_sinks * cache.tokens_per_frame]
        read = _like(sinks, tensors, f"{prefix}.sink_keys")
        cache.sink_keys = read.to(cache.keys.device, copy=True)
    if separable:
        shape = (state.newest.shape[0], min(record.num_frames, 1), *rollout.engine.shape.shape)
        like = state.newest.new_empty(shape)
        state.newest = _like(like, tensors, f"{prefix}.newest").to(like.device, copy=True)
    state.next_position = next_position
    rollout.num_frames = record.num_frames
    begins = f"{prefix}.kept."
    # Copied: the file is let go.
    kept = {name: one.clone() for name, one in tensors.items() if name.startswith(begins)}
    rollout.recall({name.removeprefix(begins): one for name, one in kept.items()})


def _check_ring(record: CacheRecord, cache: KVCache, first: int, next_position: int) -> None:
    """Refuse places of the ring that cannot be after the rows first .. next_position - 1."""
    config, slots = cache.config, record.slots
    num_rows = next_position - first
    held = [frame for frame in slots if frame is not None]
    # Room was made for a frame that was then dropped.
    has_gap = len(held) == config.window - 1 and len(slots) == config.window <= num_rows
    fits = has_gap or (len(held) == len(slots) == min(num_rows, config.window))
    moved = record.num_evicted if config.rebase_sinks else 0
    sinks = [first + index + moved for index in range(min(config.num_sinks, len(slots)))]
    others = [frame for frame in slots[len(sinks) :] if frame is not None]
    wanted = list(range(next_position - len(others), next_position))
    right = list(slots[: len(sinks)]) == sinks and sorted(others) == wanted
    if not fits or not right or record.num_evicted != num_rows - len(held):
        raise bad(f"places of the memory that no stream has after {record.num_frames} frames")


def _like(target: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    found = tensors.get(name)
    if found is None:
        raise bad(f"the snapshot lacks the tensor {name}")
    if found.shape != target.shape or found.dtype != target.dtype:
        raise bad(
            f"{name} must be {target.dtype} of shape {tuple(target.shape)}, got {found.dtype} of "
            f"shape {tuple(found.shape)}"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Image:
    """All that makes a session, at one moment; nothing of it changes any more."""

    state: State
    """Name, generation, and settings."""
    start: Start
    """What it began with, for `restart`."""
    live: Rollout
    """The stream, with its seed, steps and guidance."""
    history: History
    """What it can go back to."""


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """A file that was read, and not yet compared with a world."""

    fingerprint: Fingerprint
    """Of what made it."""
    record: SessionRecord
    """Its JSON."""
    tensors: Mapping[str, Tensor]
    """Its tensors, all finite; they lie in the bytes of the file."""

    def text(self, place: int | None) -> Tensor | None:
        """Return a text [1 l c], the same tensor every time; None: there is none."""
        if place is None:
            return None
        if place >= len(self._texts):
            raise bad(f"the snapshot lacks text {place}")
        return self._texts[place]

    @cached_property
    def _texts(self) -> list[Tensor]:
        held = self.tensors.get("texts")
        return [] if held is None else list(held.clone().split(1))


def write(
    image: Image, fingerprint: Fingerprint, make: Callable[[int], bytearray] = bytearray
) -> bytearray:
    """Turn a session into a file; may run beside the model thread, since an image is fixed.

    Args:
        image: of the session.
        fingerprint: of its world and engine.
        make: gives the bytes for the file.
    """
    return pack(*contents(image, fingerprint), make)


def contents(image: Image, fingerprint: Fingerprint) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and texts of a session's file."""
    live, history, start = image.live, image.history, image.start
    tensors = tensors_of(live, "live")
    for index, copy in enumerate(history.copies):
        tensors |= tensors_of(copy, f"copy.{index}")
    texts = Texts()
    if history.kept:
        tensors["latents"] = torch.cat([frame.latent for frame in history.kept]).cpu()
    pictures = [frame.picture for frame in history.kept if frame.picture is not None]
    if pictures:
        tensors["pictures"] = torch.from_numpy(np.stack(pictures))
    if start.frames is not None:
        tensors["start"] = torch.from_numpy(np.require(start.frames, requirements="W"))
    record = SessionRecord(
        state=image.state.model_copy(update={"kept_from": history.kept_from}),
        start=start.message,
        actions=start.actions,
        live=CacheRecord.of(live, texts),
        copies=tuple(CacheRecord.of(copy, texts) for copy in history.copies),
        frames=tuple(
            FrameRecord(
                action=frame.action,
                sequence=frame.sequence,
                steps=frame.steps,
                text=texts.place(frame.text),
            )
            for frame in history.kept
        ),
        null_text=texts.place(live.conditions.lasting.null_text),
    )
    if texts:
        tensors["texts"] = torch.cat([text.float().cpu() for text in texts])
    words = {"session": record.model_dump_json(), "world": fingerprint.model_dump_json()}
    return tensors, words


def parse_head(data: bytes | bytearray) -> tuple[Fingerprint, SessionRecord, Head]:
    """Read what stands before the tensors, which need not be there yet.

    Raises:
        ServeError: bad_snapshot: it is damaged, or no snapshot.
    """
    try:
        head = read_head(data)
        fingerprint = Fingerprint.model_validate_json(head.texts["world"])
        record = SessionRecord.model_validate_json(head.texts["session"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise bad(f"this is no whole snapshot of a session: {str(error)[:200]}") from error
    return fingerprint, record, head


def parse(data: bytes | bytearray) -> Parsed:
    """Read a file; may run beside the model thread.

    Raises:
        ServeError: bad_snapshot: it is damaged, no snapshot, or has values that are not numbers.
    """
    fingerprint, record, head = parse_head(data)
    if len(data) != head.size:
        raise bad(f"this is no whole snapshot: needed {head.size} bytes, got {len(data)}")
    # What cannot be written to would be warned of.
    held = data if isinstance(data, bytearray) else bytearray(data)
    tensors = {name: entry.view(held) for name, entry in head.entries.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise bad(f"{name} must be finite, got NaN or infinity")
    return Parsed(fingerprint=fingerprint, record=record, tensors=tensors)


def rebuild(parsed: Parsed, place: Place, reach: int, every: int) -> Image:
    """Make a session of a file whose `Fingerprint` fits; on the model thread.

    Args:
        parsed: what `parse` read.
        place: where it goes on.
        reach: of the history from now on.
        every: of the history from now on.

    Raises:
        ServeError: bad_snapshot: tensors, actions or numbers that no session of this world can
            have.
    """
    record = parsed.record
    try:
        live = _stream(record, record.live, parsed, "live", place)
        actions = [record.state.action, *(one.action for one in record.frames), *record.actions]
        for action in dict.fromkeys(actions):
            live.check(as_action(action, batch=True))
        history = _history(parsed, live, place, reach, every)
        card = place[0].card
        frames = parsed.tensors.get("start")
        size = (card.height, card.width, 3)
        if frames is not None and (frames.dtype != torch.uint8 or frames.shape[1:] != size):
            raise bad(f"start must be bytes of shape [t, *{size}], got {tuple(frames.shape)}")
    except (ServeError, OutOfMemory):
        raise
    except ValueError as error:
        raise bad(f"the snapshot does not fit this world: {error}") from error
    start = Start(
        message=record.start,
        frames=None if frames is None else frames.numpy().copy(),
        actions=record.actions,
    )
    return Image(state=record.state, start=start, live=live, history=history)


def _stream(
    record: SessionRecord, cache: CacheRecord, parsed: Parsed, prefix: str, place: Place
) -> Rollout:
    """Begin a stream and give it a KV cache of the file."""
    world, engine, window = place
    state, label = record.state, record.start.label
    sampling = with_num_steps(world.sampling, state.steps)
    guidance = as_guidance(state.guidance)
    rollout = Rollout(world, sampling, guidance, state.seed, window, engine)
    begin_blank(rollout, label, parsed.text(cache.text), parsed.text(record.null_text))
    rollout.num_given = state.num_given
    fill(rollout, cache, parsed.tensors, prefix)
    return rollout


def _history(parsed: Parsed, live: Rollout, place: Place, reach: int, every: int) -> History:
    """Take the history over where its copies are as far apart as here; else begin a new one."""
    record, first_kept = parsed.record, parsed.record.state.kept_from
    kept: list[KeptFrame] = []
    if record.frames:
        latents = parsed.tensors.get("latents")
        wanted = (len(record.frames), *live.engine.shape.shape)
        if latents is None or latents.shape != wanted or latents.dtype != live.engine.dtype:
            raise bad(f"{len(record.frames)} frames need latents of shape {wanted}")
        # Copied, each by itself: the file is let go, and later the oldest frames.
        device = live.engine.device
        pictures = parsed.tensors.get("pictures")
        shown = [None] * len(latents) if pictures is None else list(pictures.numpy().copy())
        kept = [
            KeptFrame(
                latent=latent[None].to(device, copy=True),
                action=frame.action,
                sequence=frame.sequence,
                steps=frame.steps,
                text=parsed.text(frame.text),
                picture=picture,
            )
            for latent, picture, frame in zip(latents, shown, record.frames, strict=True)
        ]
    counts = [copy.num_frames for copy in record.copies]
    if first_kept + len(kept) != live.num_frames or (counts and counts[0] < first_kept):
        raise bad(f"frames of the history are missing before frame {live.num_frames}")
    even = all(later - earlier == every for earlier, later in pairwise(counts))
    if not counts or not even or not 0 <= live.num_frames - counts[-1] < every:
        return History.begin(live, kept, reach, every)
    # Only those that are reached, so that a file cannot bring more than there is room for.
    first = len(counts) - min(len(counts), reach // every + 2)
    copies = [
        _stream(record, copy, parsed, f"copy.{first + index}", place)
        for index, copy in enumerate(record.copies[first:])
    ]
    return History(copies, kept, first_kept, reach, every)
