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

from scd.common.config import from_json, to_json
from scd.common.memory import OutOfMemory
from scd.data.clip import Conditions
from scd.engine.interface import Engine
from scd.models.checkpoint import World
from scd.models.flow import with_num_steps
from scd.serving.errors import BadSnapshot
from scd.serving.events import Action, Start
from scd.serving.history import History, Kept, as_action
from scd.serving.identity import Identity, read_identity
from scd.serving.memory import MemoryNote, fill, note_of, tensors_of
from scd.serving.notes import FrameNote, GuidanceNote, SessionNote, StartNote, check_numbers
from scd.streaming.rollout import Rollout

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
