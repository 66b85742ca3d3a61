"""Weights in files: one reader for every format, and one writer.

Read one tensor at a time, of one file or of several with an index: no more than one file's weights
are ever held, so a model is copied, cut or renamed in less memory than it takes. What is written
has the layout of diffusers and transformers: name.safetensors, or name-00001-of-00002.safetensors
and so on beside name.safetensors.index.json. Names of other projects are in `weight_names`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import pickle
import re
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from scd.common.files import TEMPORARY, read_json
from scd.common.weight_names import own_names, state_in

INDEX = ".index.json"
"""End of the name of an index, which says in which file each tensor lies."""

SHARD_BYTES = 2 * 2**30
"""Bytes of weights per file, unless asked otherwise."""

DIGEST_BLOCK = 2**24
"""Bytes that are read at a time for a digest."""

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Types of numbers that weights may have, by their names in a file."""

COUNTS = {"I64": torch.int64, "I32": torch.int32}
"""Types of what layers count, such as the batches that they saw; no weights."""

LARGEST_WEIGHT = 1e9
"""Largest number that a weight may be: no trained one comes near, a bit that flipped does, and a
few products of such numbers are infinite."""

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
"""Names of the files of weights in a folder of diffusers or transformers."""

ENDINGS = ("safetensors", "bin", "pt", "pth", "ckpt")
"""Ends of the names of files of weights, the ones that are preferred first."""

logger = logging.getLogger(__name__)


def wild_weights(state: Mapping[str, Tensor]) -> list[str]:
    """Name the tensors whose numbers are not finite, or too large to be read again."""
    names = [name for name, one in state.items() if one.is_floating_point() and one.numel()]
    # NaN is not below anything.
    right = [(state[name].detach().abs().max() <= LARGEST_WEIGHT).cpu() for name in names]
    return [name for name, is_right in zip(names, right, strict=True) if not is_right]


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
    parts = [path]
    if not path.is_file():
        parts = sorted(set(places_in(find_weights(path).path).values()))
    for part in parts:
        with part.open("rb") as file:
            while block := file.read(DIGEST_BLOCK):
                digest.update(block)
    return digest.hexdigest()


class Header(NamedTuple):
    """What a file says of a tensor without its numbers being read."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """Type of its numbers; None: one that no weights have, such as those of quantised ones."""


class Found(NamedTuple):
    """Weights in a folder or file, not opened yet."""

    path: Path
    """The file, or the index of several."""
    variant: str
    """What stands between name and ending, such as fp16; empty: nothing."""
    is_safe: bool
    """Whether it is of safetensors, and not of torch.save."""


def find_weights(path: Path, stems: tuple[str, ...] = STEMS) -> Found:
    """Find the weights that a path means.

    Args:
        path: a file of weights, an index of several, the name that one file would have where there
            are several, or a folder.
        stems: names of the files that are looked for in a folder. Of several forms the best is
            taken: safetensors before what torch.save wrote, full precision before a variant.

    Raises:
        FileNotFoundError: there are none; says what is there.
    """
    if path.is_file():
        return Found(path, "", _is_safe(path))
    index = path.with_name(path.name + INDEX)
    if index.is_file():
        return Found(index, "", path.suffix == ".safetensors")
    if not path.is_dir():
        raise FileNotFoundError(f"no model weights at {path}")
    files = sorted(file for file in path.iterdir() if file.is_file())
    names = "|".join(map(re.escape, stems))
    form = re.compile(
        rf"(?:{names})(?:\.(\w+))?\.({'|'.join(ENDINGS)})(?:\.index(?:\.(\w+))?\.json)?"
    )
    found = []
    for file in files:
        if matched := form.fullmatch(file.name):
            variant, ending = matched[1] or matched[3] or "", matched[2]
            place = (ENDINGS.index(ending), variant != "", file.name.endswith(".json"), file.name)
            found.append((place, Found(file, variant, ending == "safetensors")))
    if found:
        return min(found, key=lambda one: one[0])[1]
    others = [file for file in files if file.suffix.removeprefix(".") in ENDINGS]
    if len(others) == 1:
        return Found(others[0], "", _is_safe(others[0]))
    held = [file.name for file in (others or files)][:8]
    raise FileNotFoundError(
        f"no model weights in {path}: needed {stems[0]}.safetensors or the like, found {held}"
    )


def _is_safe(path: Path) -> bool:
    """Tell by what a file begins with, which its name may not tell, whether it is safetensors'."""
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"version https://"):
        raise ValueError(
            f"{path} is the pointer of Git LFS to a file of weights, not the file: git lfs pull "
            "fetches it"
        )
    if head[8:9] == b"{":
        return True
    return path.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80"))


class _SafeFile:
    """One file of safetensors, of which a tensor is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} cannot be read as a state dict, it is not a whole safetensors file: "
                f"{error}"
            ) from error

    def close(self) -> None:
        self._file.__exit__(None, None, None)

    def names(self) -> list[str]:
        return list(self._file.keys())

    def header(self, name: str) -> Header:
        try:
            found = self._file.get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{self.path} holds no {name!r}: {error}") from error
        return Header(tuple(found.get_shape()), (FLOATS | COUNTS).get(found.get_dtype()))

    def get(self, name: str) -> Tensor:
        self.header(name)
        try:
            return self._file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error


class _TorchFile:
    """One file of torch.save, left on disk, where its format allows it, until it is asked for."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        chosen = state_in(read_torch(path, "a state dict", on_disk=True), key, str(path))
        self._state, self.said, self.key = chosen
        for name in self.names():
            _refuse_unstored(self._state[name], name, path)

    def close(self) -> None:
        self._state = {}

    def names(self) -> list[str]:
        return [name for name, value in self._state.items() if isinstance(value, Tensor)]

    def header(self, name: str) -> Header:
        if name not in self._state:
            raise ValueError(f"{self.path} holds no {name!r}")
        tensor = self._state[name]
        known = tensor.dtype in {**FLOATS, **COUNTS}.values()
        return Header(tuple(tensor.shape), tensor.dtype if known else None)

    def get(self, name: str) -> Tensor:
        self.header(name)
        return self._state[name]


def _refuse_unstored(tensor: Tensor, name: str, path: Path) -> None:
    """Refuse (ValueError) a tensor whose numbers are not all in its file, one after another.

    That is a sparse one, one without numbers, or a few numbers that are shown very often, which
    would fill the memory.
    """
    stored = not tensor.is_meta and tensor.layout == torch.strided and not tensor.is_quantized
    if not stored or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"{path}: {name!r} is no plain tensor whose numbers are all stored, but "
            f"{tensor.layout} on {tensor.device} of shape {list(tensor.shape)}"
        )


DAMAGED = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    AssertionError,
    pickle.UnpicklingError,
    struct.error,
    tarfile.TarError,
    BadZipFile,
)
"""What PyTorch raises for files that somebody changed."""


def read_torch(path: Path, what: str, on_disk: bool = False) -> Any:
    """Read what `torch.save` wrote; nothing but tensors and plain values is accepted.

    Args:
        path: the file.
        what: it should be, for errors.
        on_disk: leave tensors there until they are used, where the file's format allows it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another format, or holds other objects, which could run code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no state dict at {path}")
    is_archive = is_zipfile(path)
    if is_archive and _holds_program(path):
        raise ValueError(f"{path} cannot be read as {what}: it is a TorchScript archive, a program")
    try:
        # Files of PyTorch before 1.6 are no archives, which alone can stay on disk. Settings of a
        # command line, which many trainers add, are plain values in a plain class.
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            # PyTorch opens a path by its ending, whatever the file holds.
            mapped = on_disk and is_archive and path.suffix != ".safetensors"
            place = path if mapped else file
            return torch.load(place, map_location="cpu", weights_only=True, mmap=mapped)
    except DAMAGED as error:
        # PyTorch's own words advise to read files of this kind without its safeguard.
        raise ValueError(f"{path} cannot be read as {what}: {_reason(path, error)}") from error


def _holds_program(path: Path) -> bool:
    try:
        with ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (BadZipFile, OSError, ValueError):
        return False


def _reason(path: Path, error: BaseException) -> str:
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return (
            f"it holds an object of {found[1]}, and objects could run code; needed tensors and "
            "plain values, save the state dict alone where the file was made"
        )
    if tarfile.is_tarfile(path):
        return "it is of PyTorch before 0.2 (a tar file); save it anew with PyTorch 0.2 to 1.13"
    return "it is damaged, cut off, or no file of torch.save"


class Weights:
    """Weights in files, by name; a tensor is read when it is asked for.

    For use in a with-block, after which the files are closed.
    """

    def __init__(self, path: str | Path, key: str = "", as_stored: bool = False) -> None:
        """Look at the files; no weight is read.

        Args:
            path: see `find_weights`.
            key: of the state dict in a file that holds several; empty: the averaged one, if any.
            as_stored: names are as they are in the files, as of those that we wrote. Else what
                wrappers and trainers put around them is taken off, and what was chosen is logged.

        Raises:
            FileNotFoundError: there is no such file, or not all that the index names.
            ValueError: the index or a file is damaged, holds code, no state dict or no such key.
        """
        found = find_weights(Path(path))
        self.path = found.path
        self._stack = ExitStack()
        self._open: dict[Path, _SafeFile | _TorchFile] = {}
        said = [f"took the variant {found.variant!r}"] if found.variant else []
        if found.path.name.endswith(".json"):
            self._files = places_in(found.path)
        else:
            file = self._opened(found.path, key)
            self._files = dict.fromkeys(file.names(), found.path)
            if isinstance(file, _TorchFile):
                key, said = file.key, [*said, file.said]
        if as_stored:
            self._names = {name: name for name in self._files}
            return
        self._names, chosen = own_names(self._files, key, str(self.path))
        for text in filter(None, (*said, chosen)):
            logger.warning("%s: %s", self.path, text)

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._open.clear()

    def names(self) -> list[str]:
        return list(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def stored_name(self, name: str) -> str:
        """Return the name of a weight in its file."""
        return self._names[name]

    def header(self, name: str) -> Header:
        """Return shape and type of a tensor, without reading it."""
        return self._file(name).header(self._names[name])

    def get(self, name: str) -> Tensor:
        """Read a tensor.

        Raises:
            ValueError: the file is damaged, or a number in it is not finite.
        """
        tensor = self._file(name).get(self._names[name])
        is_float = tensor.dtype in FLOATS.values() and tensor.numel()
        # NaN is not below anything.
        if is_float and not (largest := tensor.abs().max()) <= LARGEST_WEIGHT:
            raise ValueError(
                f"{self._files[self._names[name]]}: the numbers of {self._names[name]!r} must be "
                f"finite, {LARGEST_WEIGHT:g} at most, got {largest.item():g}"
            )
        return tensor

    def state_dict(self) -> dict[str, Tensor]:
        """Read all of them, floating-point numbers in float32."""
        # Copied where the type is the same: a file of torch.save may stay open, and change.
        return {
            name: tensor.to(torch.float32, copy=True)
            if (tensor := self.get(name)).dtype in FLOATS.values()
            else tensor.clone()
            for name in self.names()
        }

    def _file(self, name: str) -> _SafeFile | _TorchFile:
        return self._opened(self._files[self._names[name]])

    def _opened(self, path: Path, key: str = "") -> _SafeFile | _TorchFile:
        if path not in self._open:
            file = _SafeFile(path) if _is_safe(path) else _TorchFile(path, key)
            self._open[path] = file
            self._stack.callback(file.close)
        return self._open[path]


def places_in(index: Path) -> dict[str, Path]:
    """Return in which file each tensor lies that an index names.

    Raises:
        FileNotFoundError: a file that it names is missing.
        ValueError: it is damaged, or names files elsewhere.
    """
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(one, str) for one in places.values()):
        raise ValueError(f"{index} is no index of weights: it needs weight_map, names of files")
    outside = sorted(name for name in set(places.values()) if Path(name).name != name)
    if outside:
        raise ValueError(f"{index}: needed files beside it, it names {outside[:3]}")
    files = {name: index.with_name(file) for name, file in places.items()}
    missing = sorted({file.name for file in files.values() if not file.is_file()})
    if missing:
        raise FileNotFoundError(
            f"{index.parent} lacks {len(missing)} of the files that {index.name} names: "
            f"{missing[:5]}"
        )
    return files


def read_state_dict(path: str | Path, key: str = "") -> dict[str, Tensor]:
    """Read a whole state dict, its names bare and floating-point numbers in float32.

    Raises:
        FileNotFoundError, ValueError: as `Weights`.
    """
    with Weights(path, key) as weights:
        return weights.state_dict()


def headers(state: Weights | Mapping[str, Tensor]) -> dict[str, Header]:
    """Return shape and type of each weight by its name."""
    if isinstance(state, Weights):
        return {name: state.header(name) for name in state.names()}
    known = {*FLOATS.values(), *COUNTS.values()}
    return {
        name: Header(tuple(tensor.shape), tensor.dtype if tensor.dtype in known else None)
        for name, tensor in state.items()
    }


def check_fit(
    model: nn.Module,
    given: Mapping[str, Header],
    where: str,
    named: Callable[[str], str] = str,
) -> None:
    """Refuse weights whose names, shapes or types are not those of a model (ValueError).

    Args:
        model: with weights or, on the device "meta", without.
        given: by the model's names.
        where: the weights are, for the message.
        named: turns a name of the model into the one of the file, for the message.
    """
    needed = {name: (tuple(one.shape), one.dtype) for name, one in model.state_dict().items()}
    problems = [
        f"{len(names)} {what} such as {min(map(named, names))!r}"
        for what, names in (
            ("missing weights", needed.keys() - given.keys()),
            ("unknown weights", given.keys() - needed.keys()),
        )
        if names
    ]
    both = sorted(needed.keys() & given.keys())
    problems += [
        f"{named(name)!r} of shape {given[name].shape} where {needed[name][0]} is needed"
        for name in both
        if needed[name][0] != given[name].shape
    ][:1]
    if problems:
        raise ValueError(f"{where} is of another architecture: {'; '.join(problems)}")
    wrong = [name for name in both if not _is_like(given[name].dtype, needed[name][1])]
    if wrong:
        raise ValueError(
            f"{where}: {len(wrong)} weights are no floating-point numbers of 16 bits or more, such "
            f"as {named(wrong[0])!r}: needed fp32, fp16 or bf16, not quantised weights"
        )


def _is_like(given: torch.dtype | None, needed: torch.dtype) -> bool:
    # Averages of a model keep what its layers count as floating-point numbers too.
    kinds = FLOATS if needed.is_floating_point else FLOATS | COUNTS
    return given in kinds.values()


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file of named tensors (OSError: the disk refuses it, as a full one does).

    One entry of metadata at most: several would be written in a random order, and equal files
    differ.
    """
    about = None if metadata is None else dict(metadata)
    guarded(lambda path: save_file(dict(tensors), path, metadata=about), path)


def guarded(write: Callable[[Path], object], path: Path) -> None:
    """Run a writer; whatever way it has of saying that the disk refused becomes an OSError."""
    try:
        write(path)
    except (SafetensorError, RuntimeError) as error:
        free = shutil.disk_usage(path.parent).free / 2**30
        place = Path(*(part for part in path.parts if not part.startswith(TEMPORARY)))
        raise OSError(f"could not write {place} ({free:.2f} GiB free): {error}") from error


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
        save_tensors(shard, folder / f"{stem}-{number:05d}.part", {"format": "pt"})
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
    (folder / f"{stem}.safetensors{INDEX}").write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8"
    )
