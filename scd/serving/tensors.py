"""Tensors in one buffer as safetensors lays them out: read where they lie, written where they go.

The library copies every tensor that it reads, and all of them twice to write them; what a server
holds of large files is what its memory is promised for, so here nothing is copied.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KINDS = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
}
"""Kinds of numbers that sessions have, by their names in the file."""
NAMES = {dtype: name for name, dtype in KINDS.items()}

HEAD_BYTES = 4 * 2**20
"""Of the longest head that is read: that of some ten thousand frames."""

Texts = Mapping[str, str]
"""What a file says beside its tensors."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a file."""

    dtype: torch.dtype
    """Of its numbers."""
    shape: tuple[int, ...]
    """Of it."""
    begin: int
    """First byte, from the beginning of the file."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, data: bytearray) -> Tensor:
        """Return the tensor where it lies in a whole file."""
        count = math.prod(self.shape)
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.frombuffer(data, dtype=self.dtype, count=count, offset=self.begin)
        return flat.view(self.shape)


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a file begins with."""

    texts: Texts
    """Beside the tensors."""
    entries: Mapping[str, Entry]
    """Tensors by name."""
    size: int
    """Bytes of the whole file."""


def head_bytes(data: bytes | bytearray) -> int | None:
    """Return how many bytes of a file its head is; None: too few are there to say.

    Raises:
        ValueError: more than `HEAD_BYTES`.
    """
    if len(data) < 8:
        return None
    size = int.from_bytes(data[:8], "little")
    if size > HEAD_BYTES:
        raise ValueError(f"a head has at most {HEAD_BYTES} bytes, got {size}")
    return 8 + size


def read_head(data: bytes | bytearray) -> Head:
    """Read the head of a file, of which no more than that need be there.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: it has none, or its tensors do not lie side
            by side, each where its numbers may be read.
    """
    start = head_bytes(data)
    if start is None or len(data) < start:
        raise ValueError(f"needed a head of {start or 8} bytes, got {len(data)}")
    notes = json.loads(bytes(data[8:start]))
    texts = notes.pop("__metadata__")
    entries, place = {}, start
    for name, note in sorted(notes.items(), key=lambda item: item[1]["data_offsets"]):
        shape = tuple(note["shape"])
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{name} has no shape")
        if note["dtype"] not in KINDS:
            raise ValueError(f"{name} must be of {list(KINDS)}, got {note['dtype']!r}")
        entry = Entry(dtype=KINDS[note["dtype"]], shape=shape, begin=place)
        end = place + entry.num_bytes
        if note["data_offsets"] != [place - start, end - start] or place % entry.dtype.itemsize:
            raise ValueError(f"{name} does not lie where its {entry.num_bytes} bytes are")
        entries[name], place = entry, end
    return Head(texts=texts, entries=entries, size=place)


def _planned(tensors: Mapping[str, Tensor], texts: Texts) -> tuple[bytes, dict[str, Entry], int]:
    """Return the head of a file, where its tensors lie, and its size."""
    # The widest numbers first: so each lies at a multiple of its own width.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    notes: dict[str, Any] = {"__metadata__": dict(texts)}
    place = 0
    for name in order:
        tensor, begin = tensors[name], place
        place += tensor.numel() * tensor.dtype.itemsize
        kind = NAMES[tensor.dtype]
        notes[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, place]}
    text = json.dumps(notes, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    entries = {
        name: Entry(
            dtype=tensors[name].dtype,
            shape=tuple(tensors[name].shape),
            begin=start + notes[name]["data_offsets"][0],
        )
        for name in order
    }
    return len(text).to_bytes(8, "little") + text, entries, start + place


def pack(
    tensors: Mapping[str, Tensor], texts: Texts, make: Callable[[int], bytearray] = bytearray
) -> bytearray:
    """Return a file; `make` gives the bytes for it."""
    head, entries, size = _planned(tensors, texts)
    data = make(size)
    data[: len(head)] = head
    for name, entry in entries.items():
        entry.view(data).copy_(tensors[name])
    return data


def file_bytes(tensors: Mapping[str, Tensor], texts: Texts) -> int:
    """Return the size of a file before it is written."""
    return _planned(tensors, texts)[2]


def save(tensors: Mapping[str, Tensor], texts: Texts, put: Callable[[Any], object]) -> None:
    """Pass a file on, one tensor after the other, to what takes bytes and writes them."""
    head, entries, _ = _planned(tensors, texts)
    put(head)
    for name in entries:
        flat = tensors[name].cpu().contiguous().flatten()
        put(flat.view(torch.uint8).numpy().data)
