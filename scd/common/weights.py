"""Weights in files, read and written one tensor at a time, in one file or in several with an index.

No more than one file's weights are ever held: so a model is copied, cut or renamed in less memory
than it takes. The layout is that of diffusers and transformers: name.safetensors, or
name-00001-of-00002.safetensors and so on beside name.safetensors.index.json.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = ".index.json"
"""End of the name of an index, which says in which file each tensor lies."""

SHARD_BYTES = 2 * 2**30
"""Bytes of weights per file, unless asked otherwise."""

DIGEST_BLOCK = 2**24
"""Bytes that are read at a time for a digest."""

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Types of numbers that weights may have, by their names in a file."""


_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
"""What wrappers of a module put into its names, anywhere."""

_PREFIXES = ("model.", "module.", "generator.", "diffusion_model.")
"""What checkpoints put in front of all names."""


def is_stored(path: Path) -> bool:
    """Tell whether weights lie at a path, in one file or in several."""
    return path.is_file() or path.with_name(path.name + INDEX).is_file()


def is_file_of(name: str, weights: str) -> bool:
    """Tell whether a file's name is one of those under which weights lie.

    Args:
        name: of the file.
        weights: of the weights, name.safetensors.
    """
    stem = re.escape(weights.removesuffix(".safetensors"))
    part, index = r"-\d{5}-of-\d{5}", re.escape(INDEX)
    return bool(re.fullmatch(rf"{stem}({part})?\.safetensors|{stem}\.safetensors{index}", name))


def digest_of(path: Path, kind: Literal["sha256", "blake2b"]) -> str:
    """Return what tells stored weights from others, in hexadecimal digits.

    Of one file it is the digest of its bytes; of several, of all their bytes in the order of their
    names. No more than a block is held.

    Args:
        path: name.safetensors, whether there is one such file or several with an index.
        kind: 64 digits of SHA-256, or 32 of BLAKE2b.

    Raises:
        FileNotFoundError: there is no such file, or not all that the index names.
        ValueError: the index is damaged.
    """
    digest = hashlib.sha256() if kind == "sha256" else hashlib.blake2b(digest_size=16)
    for part in [path] if path.is_file() else sorted(set(_files(path).values())):
        with part.open("rb") as file:
            while block := file.read(DIGEST_BLOCK):
                digest.update(block)
    return digest.hexdigest()


class StoredWeights:
    """Weights in safetensors files, by name; a tensor is read when it is asked for.

    For use in a with-block, which holds the files open.
    """

    def __init__(self, path: Path) -> None:
        """Look at the files; nothing is read.

        Args:
            path: name.safetensors, whether there is one such file or several with an index.

        Raises:
            FileNotFoundError: there is no such file, or not all that the index names.
            ValueError: the index or a file is damaged.
        """
        self.path = path
        self._stack = ExitStack()
        self._files = _files(path)

    def __enter__(self) -> StoredWeights:
        self._open: dict[Path, Any] = {}
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | None:
        """Return the type of a tensor's numbers; None: one that weights do not have."""
        return _TYPES.get(self._slice(name).get_dtype())

    def get(self, name: str) -> Tensor:
        try:
            return self._file(name).get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self._files[name]} is damaged: {error}") from error

    def _slice(self, name: str) -> Any:
        try:
            return self._file(name).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{self._files[name]} holds no {name!r}: {error}") from error

    def _file(self, name: str) -> Any:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = self._stack.enter_context(_opened(path))
        return self._open[path]


def _files(path: Path) -> dict[str, Path]:
    if path.is_file():
        with _opened(path) as file:
            return {name: path for name in file.keys()}
    index = path.with_name(path.name + INDEX)
    if not index.is_file():
        raise FileNotFoundError(f"no model weights at {path}")
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): path.with_name(file) for name, file in places.items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights: {error}") from error
    missing = sorted({file.name for file in files.values() if not file.is_file()})
    if missing:
        raise FileNotFoundError(
            f"{path.parent} lacks {len(missing)} of the files that {index.name} names: "
            f"{missing[:5]}"
        )
    return files


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as a state dict, it is not a whole safetensors file: {error}"
        ) from error


class LoadedWeights:
    """Weights of a PyTorch file, left on disk until a tensor is asked for; as StoredWeights."""

    def __init__(self, path: Path, keys: tuple[str, ...] = (), key: str = "") -> None:
        """Look at a file.

        Args:
            path: a file that torch.save wrote, with nothing but tensors and plain values in it.
            keys: under which the state dict may lie, the first of them that is there counts.
            key: under which it must lie; empty: under one of `keys`, or it is the file itself.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, holds code, or no state dict.
        """
        if not path.is_file():
            raise FileNotFoundError(f"no state dict at {path}")
        self.path = path
        try:
            # Files of PyTorch before 1.6 are no archives, which alone can stay on disk.
            on_disk = is_zipfile(path)
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=on_disk)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} cannot be read as a state dict: {error}") from error
        self.key = key
        if isinstance(found, Mapping) and not key:
            self.key = next((name for name in keys if name in found), "")
        if self.key:
            if not isinstance(found, Mapping) or self.key not in found:
                held = sorted(map(str, found)) if isinstance(found, Mapping) else type(found)
                raise ValueError(f"{path} has no {self.key!r}; it holds {held}")
            found = found[self.key]
        if not isinstance(found, Mapping) or not found:
            raise ValueError(f"{path} holds no state dict but {type(found).__name__}")
        others = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
        if others:
            raise ValueError(
                f"{path}: {others[:5]} are not tensors; name the state dict with --key"
            )
        self._state = {str(name): value for name, value in found.items()}

    def __enter__(self) -> LoadedWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._state = {}

    def names(self) -> list[str]:
        return list(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> torch.dtype | None:
        """Return the type of a tensor's numbers; None: one that weights do not have."""
        dtype = self._state[name].dtype
        return dtype if dtype in _TYPES.values() else None

    def get(self, name: str) -> Tensor:
        return self._state[name]


Weights = StoredWeights | LoadedWeights
"""Weights that are read one by one."""


def open_weights(path: Path, keys: tuple[str, ...] = (), key: str = "") -> Weights:
    """Look at a state dict in .safetensors, in one file or in several, or in a file of torch.save.

    Args:
        path: the file.
        keys: see `LoadedWeights`.
        key: see `LoadedWeights`; a .safetensors file has none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds something else than tensors, or has no such key.
    """
    if path.suffix != ".safetensors":
        return LoadedWeights(path, keys, key)
    if key:
        raise ValueError(f"{path} has no {key!r}: a .safetensors file holds one state dict")
    return StoredWeights(path)


def read_state_dict(path: str | Path, key: str = "") -> dict[str, Tensor]:
    """Read a whole state dict in float32, its names bare.

    Raises:
        FileNotFoundError, ValueError: as `open_weights`.
    """
    with open_weights(Path(path), key=key) as weights:
        return {bare(name): weights.get(name).float() for name in weights.names()}


def bare(name: str) -> str:
    """Take off what wrappers and checkpoints put into the name of a weight."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while prefix := next((one for one in _PREFIXES if name.startswith(one)), ""):
        name = name.removeprefix(prefix)
    return name


def write_shards(
    tensors: Iterator[tuple[str, Tensor]],
    folder: Path,
    stem: str,
    max_bytes: int = SHARD_BYTES,
) -> None:
    """Write named tensors into files of a folder as they come.

    Args:
        tensors: names and tensors; a tensor is let go when its file is written.
        folder: exists; the caller renames it when all is there.
        stem: name of the files without .safetensors.
        max_bytes: per file; a larger tensor has a file of its own.
    """
    places: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    held = total = number = 0

    def flush() -> None:
        nonlocal held, number
        number += 1
        # diffusers and transformers read only files that say so.
        save_file(shard, folder / f"{stem}-{number:05d}.part", metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, number))
        shard.clear()
        held = 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > max_bytes:
            flush()
        # A tensor may be a view of a file, or lie in it twice.
        shard[name] = tensor.contiguous().clone()
        held, total = held + size, total + size
    flush()
    if number == 1:
        (folder / f"{stem}-00001.part").rename(folder / f"{stem}.safetensors")
        return
    files = {}
    for shard_number in range(1, number + 1):
        files[shard_number] = f"{stem}-{shard_number:05d}-of-{number:05d}.safetensors"
        (folder / f"{stem}-{shard_number:05d}.part").rename(folder / files[shard_number])
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: files[place] for name, place in sorted(places.items())},
    }
    (folder / f"{stem}.safetensors{INDEX}").write_text(json.dumps(index, indent=2) + "\n")
