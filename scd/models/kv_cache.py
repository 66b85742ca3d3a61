"""Keys and values of past frames, kept in one preallocated ring per layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scd.common.memory import check_free
from scd.models.attention import Rotary, rotary_table, rotate
from scd.models.config import CacheConfig


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in the cache the keys and values of some tokens stand, and what they see there."""

    start: int
    """First token."""
    stop: int
    """Behind the last one."""
    filled: int
    """Tokens in the cache, these included."""
    num_evicted: int
    """Frames that had left the window."""


class KVCache:
    """Keys and values of the past of one batch of streams.

    For each new frame: `make_room()`; `write(layer, k, v)` for every layer, which returns all that
    the new tokens may see, themselves included; then `advance()` keeps the frame. Without
    `advance` the next `write` replaces it: so a frame can be tried many times before it is kept.

    Keys come rotated to absolute positions. Attention does not care for the order of keys, so a
    full ring overwrites its oldest frame in place: no copy, no mask, and memory never grows. While
    the ring is not full, several frames can be written at once.

    The past carries no gradient. With gradients on, `write` returns a copy in which only the new
    tokens' own keys and values have one, so a backward pass may come after any later write.
    """

    tensors = ("keys", "values")
    """What is held of each token, by name."""

    def __init__(
        self,
        config: CacheConfig,
        block: Any,
        *,
        num_layers: int,
        batch: int,
        tokens_per_frame: int,
        like: Tensor,
        rotate: Callable[[Tensor, Rotary], Tensor] = rotate,
    ) -> None:
        """Allocate the ring.

        Args:
            config: its size, in frames, or in whatever else has a place of its own.
            block: settings of the blocks: heads and rotary embedding.
            num_layers: that see other frames.
            batch: streams side by side.
            tokens_per_frame: of a place.
            like: in whose type, and on whose device, keys and values are kept.
            rotate: applies a rotary embedding to keys in the order of entries that they come in.

        Raises:
            OutOfMemory: the ring needs more than is free; nothing was allocated.
        """
        self.config, self.block = config, block
        self.tokens_per_frame = tokens_per_frame
        self.rotate = rotate
        size = config.window * tokens_per_frame
        shape = (num_layers, batch, block.num_heads, size, block.head_dim)
        what = f"a memory of {config.window} frames for each of {batch} streams"
        check_free(what, self.bytes_of(shape, like), like.device)
        self._allocate(shape, like)
        self.sink_keys: Tensor | None = None
        self.slots: list[int | None] = []
        """Frame position held by each slot of the ring; None: its frame has left the window."""
        self.num_evicted = 0
        """Frames that have left the window."""

    def _allocate(self, shape: tuple[int, ...], like: Tensor) -> None:
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)

    @staticmethod
    def bytes_of(shape: tuple[int, ...], like: Tensor) -> int:
        """Return the memory of keys and values of a shape [layers, streams, heads, tokens, e]."""
        return 2 * math.prod(shape) * like.dtype.itemsize

    def _put(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Hold the keys and values of tokens from one place on."""
        stop = start + k.shape[2]
        self.keys[layer, :, :, start:stop] = k.detach()
        self.values[layer, :, :, start:stop] = v.detach()

    def _get(self, layer: int, filled: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the first tokens."""
        return self.keys[layer, :, :, :filled], self.values[layer, :, :, :filled]

    def _first_keys(self, num_tokens: int) -> Tensor:
        """Return a copy of the first tokens' keys in all layers."""
        return self.keys[:, :, :, :num_tokens].clone()

    def _put_first_keys(self, keys: Tensor) -> None:
        self.keys[:, :, :, : keys.shape[3]] = keys

    @property
    def batch(self) -> int:
        """Streams side by side."""
        return self.keys.shape[1]

    @property
    def num_frames(self) -> int:
        return sum(frame is not None for frame in self.slots)

    @property
    def num_free(self) -> int:
        """Frames that fit before the oldest must go."""
        return self.config.window - self.num_frames

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values: 2 * layers * batch * window * n * d * bytes each."""
        return sum(getattr(self, name).nbytes for name in self.tensors)

    def make_room(self) -> None:
        """Let the oldest frame but the sinks go if the window is full; harmless twice."""
        if self.num_free:
            return
        frames = [
            (frame, slot)
            for slot, frame in enumerate(self.slots)
            if frame is not None and slot >= self.config.num_sinks
        ]
        self.slots[min(frames)[1]] = None
        self.num_evicted += 1
        if self.config.rebase_sinks and self.config.num_sinks:
            self._move_sinks()

    def _move_sinks(self) -> None:
        """Turn the sinks' keys forward by the number of frames that have left the window."""
        num_sinks = self.config.num_sinks
        size = num_sinks * self.tokens_per_frame
        if self.sink_keys is None:
            self.sink_keys = self._first_keys(size)
        for slot, frame in enumerate(self.slots[:num_sinks]):
            assert frame is not None
            self.slots[slot] = frame + 1
        # Filled in place: a list made into a tensor would wait for a GPU.
        moved = torch.zeros(size, 3, dtype=torch.long, device=self.keys.device)
        moved[:, 0] = self.num_evicted
        rotary = rotary_table(moved, self.block.rotary_axes, self.block.rotary_theta)
        # Two rotations in a row are one: always from the keys as first written, so that no
        # rounding adds up over a long stream.
        turned = self.rotate(self.sink_keys.flatten(0, 1), rotary)
        self._put_first_keys(turned.unflatten(0, self.sink_keys.shape[:2]))

    def _next_slot(self) -> int:
        return self.slots.index(None) if None in self.slots else len(self.slots)

    def write(
        self, layer: int, k: Float[Tensor, "b k s e"], v: Float[Tensor, "b k s e"]
    ) -> tuple[Float[Tensor, "b k s2 e"], Float[Tensor, "b k s2 e"]]:
        """Put in the keys and values of the next frame, or frames; return all in the cache.

        Raises:
            ValueError: more frames at once than there is room for.
        """
        num_frames = k.shape[2] // self.tokens_per_frame
        if num_frames > self.num_free or (num_frames > 1 and None in self.slots):
            raise ValueError(
                f"{num_frames} frames at once need as many free places in a row, got "
                f"{self.num_free} of {self.config.window}; call make_room for one"
            )
        place = self._next_place(k.shape[2])
        self._put(layer, place.start, k, v)
        if torch.is_grad_enabled():
            # What a backward pass reads must not be overwritten by the frames to come.
            return self._read_again(layer, k, v, place)
        return self._get(layer, place.filled)

    def writer(self, layer: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return `write` of a layer for one use, and for its recomputation in a backward pass.

        By then later frames may have been kept, but none may have left the window.
        """
        place: Place | None = None

        def put(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal place
            if place is not None:
                return self._read_again(layer, k, v, place)
            place = self._next_place(k.shape[2])
            return self.write(layer, k, v)

        return put

    def _next_place(self, num_tokens: int) -> Place:
        start = self._next_slot() * self.tokens_per_frame
        stop = start + num_tokens
        filled = max(stop, len(self.slots) * self.tokens_per_frame)
        return Place(start=start, stop=stop, filled=filled, num_evicted=self.num_evicted)

    def _read_again(
        self, layer: int, k: Float[Tensor, "b k s e"], v: Float[Tensor, "b k s e"], place: Place
    ) -> tuple[Float[Tensor, "b k s2 e"], Float[Tensor, "b k s2 e"]]:
        """Return what `write` returned at an earlier place, and write nothing."""
        assert self.num_evicted == place.num_evicted, "frames have left the cache since"
        keys, values = self._get(layer, place.filled)
        return _with_new(keys, k, place.start), _with_new(values, v, place.start)

    def positions_with(self, frames: list[int]) -> list[int]:
        """Return the frame position of each slot that `write` returns for these new frames."""
        slots = list(self.slots)
        start = self._next_slot()
        slots[start : start + len(frames)] = frames
        assert None not in slots
        return [frame for frame in slots if frame is not None]

    def advance(self, frames: list[int]) -> None:
        """Keep the frames, by position, that were just written to all layers."""
        start = self._next_slot()
        self.slots[start : start + len(frames)] = frames

    def fork(self, num: int = 1) -> KVCache:
        """Return an independent copy, each stream `num` times in a row; only filled slots.

        Raises:
            OutOfMemory: several copies need more than is free; nothing was allocated.
        """
        batch, window = self.keys.shape[1] * num, self.config.window
        if num > 1:
            what = f"a memory of {window} frames for each of {batch} streams"
            check_free(what, self.num_bytes * num, self.keys.device)
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        filled = len(self.slots) * self.tokens_per_frame
        for name in self.tensors:
            mine = getattr(self, name)
            theirs = mine.new_empty(mine.shape[0], batch, *mine.shape[2:])
            each = theirs.unflatten(1, (-1, num))
            each[:, :, :, :, :filled] = mine[:, :, None, :, :filled]
            setattr(twin, name, theirs)
        twin.slots = list(self.slots)
        sinks = self.sink_keys
        twin.sink_keys = None if sinks is None else sinks.repeat_interleave(num, 1)
        return twin

    def reset(self) -> None:
        """Forget everything; the memory stays allocated."""
        self.slots = []
        self.sink_keys = None
        self.num_evicted = 0


def _with_new(held: Tensor, new: Tensor, start: int) -> Tensor:
    stop = start + new.shape[2]
    return torch.cat([held[:, :, :start], new.to(held.dtype), held[:, :, stop:]], dim=2)
