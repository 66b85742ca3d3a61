"""One session as a file: safetensors, with everything that is not a tensor as JSON in its header.

Nothing in it is code, and nothing is believed: shapes, numbers and places are checked against what
a stream of this world and engine can have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from scd.common.config import differences, from_json, to_json
from scd.common.memory import OutOfMemory
from scd.common.runtime import make_generator
from scd.data.clip import Conditions
from scd.engine.interface import Engine
from scd.models.checkpoint import World
from scd.models.flow import SamplingConfig, with_num_steps
from scd.models.kv_cache import KVCache
from scd.models.separable import SeparableState
from scd.serving.errors import BadSnapshot
from scd.serving.events import Action, Start
from scd.serving.session import History, Kept, as_action
from scd.streaming.rollout import Guidance, GuidanceKind, Rollout

NUM_VALUES = 16
"""Numbers of a frame by which two models of one shape are told apart."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A memory depends on the model and on how an engine lays it out."""

    settings: str
    """Of model and autoencoder, as JSON."""
    engine: str
    """Its kind and precision."""
    fingerprint: tuple[float, ...]
    """What the weights make of a fixed frame."""
    tolerance: float
    """Of these numbers, whose scale is 1: machines round products otherwise."""

    def refuse(self, other: Identity) -> None:
        """Refuse what another world or engine has made (BadSnapshot)."""
        if other.engine != self.engine:
            raise BadSnapshot(f"the snapshot is of engine {other.engine}, this is {self.engine}")
        if other.settings != self.settings:
            raise BadSnapshot(f"the snapshot is of another world: {_first_difference(other, self)}")
        theirs, ours = other.fingerprint, self.fingerprint
        # Written so that NaN is refused too.
        same = [abs(a - b) <= self.tolerance for a, b in zip(theirs, ours, strict=False)]
        if len(theirs) != len(ours) or not all(same):
            raise BadSnapshot("the snapshot is of a model of this shape with other weights")


def identity_of(world: World, engine: Engine) -> Identity:
    """Describe a world and its engine; runs the model for two frames."""
    settings = {"model": to_json(engine.config), "autoencoder": to_json(world.autoencoder.config)}
    dtype = str(engine.dtype).removeprefix("torch.")
    return Identity(
        settings=json.dumps(settings, sort_keys=True),
        engine=f"{type(engine).__name__} {dtype}",
        fingerprint=_fingerprint(world, engine),
        tolerance=1e-3 if engine.dtype == torch.float32 else 0.1,
    )


def read_identity(values: Any) -> Identity:
    """Read what `to_json` wrote (ValueError)."""
    return from_json(Identity, values, "world")


def _fingerprint(world: World, engine: Engine) -> tuple[float, ...]:
    """Return some numbers of the second frame of a stream, made in one step."""
    spec, generator = engine.config.conditions, make_generator(0, "fingerprint of a model")
    action = None
    if spec.has_actions:
        action = torch.zeros(1, spec.action_dim) if spec.action_dim else torch.zeros(1).long()
    labels = torch.zeros(1, dtype=torch.long) if spec.num_labels else None
    frame = 2 * torch.rand(1, 1, 3, world.card.height, world.card.width, generator=generator) - 1
    rollout = Rollout(world, SamplingConfig(num_steps=1), engine=engine)
    actions = None if action is None else action[:, None]
    rollout.begin(frame, Conditions(actions=actions, labels=labels), can_reset=False)
    rollout.step(action)
    assert rollout.newest is not None
    made = rollout.newest.float().flatten().cpu()
    places = torch.linspace(0, made.numel() - 1, NUM_VALUES).long()
    return tuple(round(value, 6) for value in made[places].tolist())


def _first_difference(theirs: Identity, ours: Identity) -> str:
    try:
        found = differences(json.loads(theirs.settings), json.loads(ours.settings))
    except (ValueError, RecursionError):
        found = []
    return found[0][:200] if found else "its settings cannot be read"


LAST_FRAME = 2**31
"""Frames of the longest stream that is believed."""


@dataclass(frozen=True, kw_only=True)
class MemoryNote:
    """A stream's memory, but its tensors."""

    num_frames: int
    """Of the stream."""
    slots: tuple[int | None, ...]
    """Position of the frame in each place of the ring."""
    num_evicted: int
    """Frames that have left the window."""


def note_of(rollout: Rollout) -> MemoryNote:
    """Return the numbers of a stream's memory."""
    cache = rollout.state.cache
    return MemoryNote(
        num_frames=rollout.num_frames, slots=tuple(cache.slots), num_evicted=cache.num_evicted
    )


def tensors_of(rollout: Rollout, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a stream's memory: what is filled of it, by name."""
    state = rollout.state
    cache: KVCache = state.cache
    filled = len(cache.slots) * cache.tokens_per_frame
    tensors = {"keys": cache.keys[:, :, :, :filled], "values": cache.values[:, :, :, :filled]}
    if cache.sink_keys is not None:
        tensors["sink_keys"] = cache.sink_keys
    if isinstance(state, SeparableState):
        tensors["newest"] = state.newest
    # Copied, since a file holds no two tensors that share their memory.
    return {
        f"{prefix}.{name}": tensor.cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def fill(rollout: Rollout, note: MemoryNote, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Put a memory into a stream that has just begun.

    Args:
        rollout: of the world and engine, with the guidance of the stream.
        note: its numbers.
        tensors: finite ones, by name.
        prefix: of their names.

    Raises:
        BadSnapshot: numbers or tensors that no stream of this world can have.
    """
    state = rollout.state
    cache: KVCache = state.cache
    separable = isinstance(state, SeparableState)
    # Just begun, a separable stream stands at its start frame, or at its only given frame.
    first = state.next_position if separable else 0
    if not rollout.num_given <= note.num_frames <= LAST_FRAME:
        raise BadSnapshot(f"a stream cannot have {note.num_frames} frames")
    next_position = max(first, note.num_frames - 1) if separable else note.num_frames
    _check_ring(note, cache, first, next_position)
    filled = len(note.slots) * cache.tokens_per_frame
    for name in ("keys", "values"):
        target = getattr(cache, name)[:, :, :, :filled]
        target.copy_(_like(target, tensors, f"{prefix}.{name}"))
    cache.slots, cache.num_evicted = list(note.slots), note.num_evicted
    cache.sink_keys = None
    if note.num_evicted and cache.config.rebase_sinks and cache.config.num_sinks:
        sinks = cache.keys[:, :, :, : cache.config.num_sinks * cache.tokens_per_frame]
        read = _like(sinks, tensors, f"{prefix}.sink_keys")
        cache.sink_keys = read.to(cache.keys.device, copy=True)
    if separable:
        shape = (state.newest.shape[0], min(note.num_frames, 1), *rollout.engine.shape.shape)
        like = state.newest.new_empty(shape)
        state.newest = _like(like, tensors, f"{prefix}.newest").to(like.device, copy=True)
    state.next_position = next_position
    rollout.num_frames = note.num_frames


def _check_ring(note: MemoryNote, cache: KVCache, first: int, next_position: int) -> None:
    """Refuse places of the ring that cannot be after the rows first .. next_position - 1."""
    config, slots = cache.config, note.slots
    num_rows = next_position - first
    held = [frame for frame in slots if frame is not None]
    # Room was made for a frame that was then dropped.
    has_gap = len(held) == config.window - 1 and len(slots) == config.window <= num_rows
    fits = has_gap or (len(held) == len(slots) == min(num_rows, config.window))
    moved = note.num_evicted if config.rebase_sinks else 0
    sinks = [first + index + moved for index in range(min(config.num_sinks, len(slots)))]
    others = [frame for frame in slots[len(sinks) :] if frame is not None]
    wanted = list(range(next_position - len(others), next_position))
    right = list(slots[: len(sinks)]) == sinks and sorted(others) == wanted
    if not fits or not right or note.num_evicted != num_rows - len(held):
        raise BadSnapshot(f"places of the memory that no stream has after {note.num_frames} frames")


def _like(target: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    found = tensors.get(name)
    if found is None:
        raise BadSnapshot(f"the snapshot lacks the tensor {name}")
    if found.shape != target.shape or found.dtype != target.dtype:
        raise BadSnapshot(
            f"{name} must be {target.dtype} of shape {tuple(target.shape)}, got {found.dtype} of "
            f"shape {tuple(found.shape)}"
        )
    return found


LARGEST_NUMBER = 2**53
"""Seeds, sequences and generations are below: what JSON carries everywhere."""


@dataclass(frozen=True, kw_only=True)
class GuidanceNote:
    """A `Guidance`, whose `kind` JSON needs for the dataclass."""

    branch: GuidanceKind
    """That frames are pushed away from."""
    scale: float
    """Strength."""
    context_noise: float
    """Strength of the noise in the branch "context_noise"."""

    @staticmethod
    def of(guidance: Guidance) -> GuidanceNote:
        """Return the note of a guidance."""
        return GuidanceNote(
            branch=guidance.kind, scale=guidance.scale, context_noise=guidance.context_noise
        )

    @property
    def guidance(self) -> Guidance:
        """What it notes (ValueError: values that a guidance refuses)."""
        return Guidance(kind=self.branch, scale=self.scale, context_noise=self.context_noise)


@dataclass(frozen=True, kw_only=True)
class StartNote:
    """What a session began with, but its frames."""

    seed: int
    """Of the noise."""
    actions: tuple[Action, ...]
    """That led to the given frames."""
    label: int | None
    """Class of the stream."""
    num_steps: int | None
    """Denoising steps per frame."""
    guidance: GuidanceNote | None
    """None: none."""


@dataclass(frozen=True, kw_only=True)
class FrameNote:
    """A frame of the history, but its latent."""

    action: Action
    """That led to it."""
    sequence: int
    """That came with the action."""
    num_steps: int
    """That it took."""


@dataclass(frozen=True, kw_only=True)
class SessionNote:
    """A session, but its tensors."""

    format: str
    """Of the file."""
    session_id: str
    """Its name."""
    generation: int
    """Of its frames."""
    start: StartNote
    """What it began with."""
    seed: int
    """Of the noise."""
    num_steps: int
    """Denoising steps per frame."""
    guidance: GuidanceNote
    """As it is."""
    num_given: int
    """Frames with which it began."""
    action: Action
    """The one held."""
    sequence: int
    """That came with it."""
    live: MemoryNote
    """The stream."""
    copies: tuple[MemoryNote, ...]
    """Of the stream in the history, oldest first."""
    first: int
    """Oldest frame of the history."""
    frames: tuple[FrameNote, ...]
    """Of the history."""


def check_numbers(note: SessionNote) -> None:
    """Refuse numbers that no session has (BadSnapshot)."""
    numbers = {
        "generation": note.generation,
        "seed": note.seed,
        "start.seed": note.start.seed,
        "num_given": note.num_given,
        "sequence": note.sequence,
        "first": note.first,
    }
    for name, number in numbers.items():
        if not 0 <= number < LARGEST_NUMBER:
            raise BadSnapshot(f"{name} must be 0 or more and below 2**53, got {number}")


FORMAT = "scd session 1"
"""Of the file."""
Place = tuple[World, Engine, int | None]
"""Where a session goes on: world, engine, and frames in memory (None: as trained)."""


@dataclass(frozen=True, kw_only=True)
class Image:
    """All that makes a session, at one moment; nothing of it changes any more."""

    session_id: str
    """Its name, which an evicted session keeps."""
    generation: int
    """Of its frames."""
    start: Start
    """What it began with, for `reset`."""
    live: Rollout
    """The stream, with its seed, steps and guidance."""
    history: History
    """What it can go back to."""
    action: Action
    """The one held."""
    sequence: int
    """That came with it."""


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """A file that was read, and not yet compared with a world."""

    identity: Identity
    """Of what made it."""
    note: SessionNote
    """Its JSON."""
    tensors: Mapping[str, Tensor]
    """Its tensors, all finite."""


def write(image: Image, identity: Identity) -> bytes:
    """Turn a session into a file; may run beside the model thread, since an image is fixed."""
    live, history, start = image.live, image.history, image.start
    tensors = tensors_of(live, "live")
    for index, copy in enumerate(history.copies):
        tensors |= tensors_of(copy, f"copy.{index}")
    if history.kept:
        tensors["latents"] = torch.cat([frame.latent for frame in history.kept]).cpu()
    if start.frames is not None:
        tensors["start"] = torch.from_numpy(start.frames.copy())
    note = SessionNote(
        format=FORMAT,
        session_id=image.session_id,
        generation=image.generation,
        start=StartNote(
            seed=start.seed,
            actions=start.actions,
            label=start.label,
            num_steps=start.num_steps,
            guidance=start.guidance and GuidanceNote.of(start.guidance),
        ),
        seed=live.seed,
        num_steps=live.num_steps,
        guidance=GuidanceNote.of(live.guidance),
        num_given=live.num_given,
        action=image.action,
        sequence=image.sequence,
        live=note_of(live),
        copies=tuple(note_of(copy) for copy in history.copies),
        first=history.kept_from,
        frames=tuple(
            FrameNote(action=frame.action, sequence=frame.sequence, num_steps=frame.num_steps)
            for frame in history.kept
        ),
    )
    texts = {"session": note, "world": identity}
    header = {name: json.dumps(to_json(value), allow_nan=False) for name, value in texts.items()}
    return save(tensors, header)


def parse(data: bytes) -> Parsed:
    """Read a file; may run beside the model thread.

    Raises:
        BadSnapshot: it is damaged, no snapshot, or has values that are not numbers.
    """
    try:
        tensors = load(data)
        texts = read_header(data)
        world, session = (
            json.loads(texts[name], parse_constant=_no_number) for name in ("world", "session")
        )
        identity, note = read_identity(world), from_json(SessionNote, session, "session")
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadSnapshot(f"this is no whole snapshot of a session: {str(error)[:200]}") from error
    if note.format != FORMAT:
        raise BadSnapshot(f"needed a snapshot of format {FORMAT!r}, got {note.format[:40]!r}")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise BadSnapshot(f"{name} must be finite, got NaN or infinity")
    check_numbers(note)
    return Parsed(identity=identity, note=note, tensors=tensors)


def read_header(data: bytes) -> dict[str, Any]:
    """Return the texts of a safetensors header (ValueError, KeyError: it has none)."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size])["__metadata__"]


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def rebuild(parsed: Parsed, place: Place, reach: int, every: int) -> Image:
    """Make a session of a file whose `Identity` fits; on the model thread.

    Args:
        parsed: what `parse` read.
        place: where it goes on.
        reach: of the history from now on.
        every: of the history from now on.

    Raises:
        BadSnapshot: tensors, actions or numbers that no session of this world can have.
    """
    note = parsed.note
    try:
        live = _memory(note, note.live, parsed, "live", place)
        actions = [note.action, *(frame.action for frame in note.frames), *note.start.actions]
        for action in dict.fromkeys(actions):
            live.check(as_action(action, batch=True))
        history = _history(parsed, live, place, reach, every)
        card = place[0].card
        start = _start(parsed, (card.height, card.width, 3))
    except (BadSnapshot, OutOfMemory):
        raise
    except ValueError as error:
        raise BadSnapshot(f"the snapshot does not fit this world: {error}") from error
    return Image(
        session_id=note.session_id,
        generation=note.generation,
        start=start,
        live=live,
        history=history,
        action=note.action,
        sequence=note.sequence,
    )


def _memory(
    note: SessionNote, memory: MemoryNote, parsed: Parsed, prefix: str, place: Place
) -> Rollout:
    """Begin a stream and give it a memory of the file."""
    world, engine, window = place
    sampling = with_num_steps(world.sampling, note.num_steps)
    rollout = Rollout(world, sampling, note.guidance.guidance, note.seed, window, engine)
    labels = None if note.start.label is None else torch.tensor([note.start.label])
    frames = actions = None
    if engine.needs_first_frame:
        spec = engine.config.conditions
        frames = torch.zeros(1, 1, 3, world.card.height, world.card.width)
        if spec.has_actions:
            actions = torch.zeros(1, 1, spec.action_dim) if spec.action_dim else None
            actions = torch.zeros(1, 1, dtype=torch.long) if actions is None else actions
    rollout.begin(frames, Conditions(actions=actions, labels=labels), can_reset=False)
    rollout.num_given = note.num_given
    fill(rollout, memory, parsed.tensors, prefix)
    return rollout


def _history(parsed: Parsed, live: Rollout, place: Place, reach: int, every: int) -> History:
    """Take the history over where its copies are as far apart as here; else begin a new one."""
    note = parsed.note
    kept: list[Kept] = []
    if note.frames:
        latents = parsed.tensors.get("latents")
        wanted = (len(note.frames), *live.engine.shape.shape)
        if latents is None or latents.shape != wanted or latents.dtype != live.engine.dtype:
            raise BadSnapshot(f"{len(note.frames)} frames need latents of shape {wanted}")
        latents = latents.to(live.engine.device)
        kept = [
            Kept(latent=latent[None], **vars(frame))
            for latent, frame in zip(latents, note.frames, strict=True)
        ]
    counts = [copy.num_frames for copy in note.copies]
    if note.first + len(kept) != live.num_frames or (counts and counts[0] < note.first):
        raise BadSnapshot(f"frames of the history are missing before frame {live.num_frames}")
    even = all(later - earlier == every for earlier, later in pairwise(counts))
    if not counts or not even or not 0 <= live.num_frames - counts[-1] < every:
        return History(live, kept, reach, every)
    # Only those that are reached, so that a file cannot bring more than there is room for.
    first = len(counts) - min(len(counts), reach // every + 2)
    copies = [
        _memory(note, copy, parsed, f"copy.{first + index}", place)
        for index, copy in enumerate(note.copies[first:])
    ]
    return History.of_parts(copies, kept, note.first, reach, every)


def _start(parsed: Parsed, size: tuple[int, int, int]) -> Start:
    frames = parsed.tensors.get("start")
    if frames is not None and (frames.dtype != torch.uint8 or frames.shape[1:] != size):
        raise BadSnapshot(f"start must be bytes of shape [t, *{size}], got {tuple(frames.shape)}")
    note = parsed.note.start
    return Start(
        frames=None if frames is None else frames.numpy(),
        seed=note.seed,
        actions=note.actions,
        label=note.label,
        num_steps=note.num_steps,
        guidance=note.guidance and note.guidance.guidance,
    )
