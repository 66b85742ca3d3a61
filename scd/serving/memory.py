"""The memory of one stream <-> tensors and numbers that can be checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scd.models.kv_cache import KVCache
from scd.models.separable import SeparableState
from scd.serving.errors import BadSnapshot
from scd.streaming.rollout import Rollout

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
    first = state.next_row if separable else 0
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
        state.next_row = next_position
    else:
        state.next_frame = next_position
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
