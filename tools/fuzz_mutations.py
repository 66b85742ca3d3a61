"""Ways in which files come to be wrong: by hand, by another program, by a disk.

`mutate` changes files of a folder and says what it did, in words.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
import re
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save

Words = str
"""What was done."""

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**400),
    *(0.0, -0.0, 0.5, 1.5, -3.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "x", "0", "true", "null", "nan", ".", "..", "/", "../..", "a/b", "~", "\0", "a\0b"),
    *("\u2028", "e\u0301", "\U0001f3ae", "\ud800", "%s", "{}", "C:\\x", "-x", "long " * 20_000),
    *([], {}, [[]], [None], [0], [1, 2, 3], {"": ""}, {"kind": "x"}, [0] * 10_000),
)
"""What may stand where something else should."""

TENSOR_TYPES = (
    *(torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool),
)
"""Types of numbers of tensors."""

ARRAY_TYPES = (
    *("int8", "uint8", "uint16", "int32", "uint64", ">i8", "float16", "float32", ">f4"),
    *("float64", "longdouble", "complex64", "bool", "U4", "S3", "M8[s]", "m8[s]", "object"),
)
"""Types of numbers, and of what is none, of arrays."""


def mutate(rng: random.Random, folder: Path, files: Sequence[str]) -> tuple[list[str], Words]:
    """Change one file of a folder, now and then two.

    Args:
        rng: of the case.
        folder: that holds the files.
        files: that may change, relative to the folder.

    Returns:
        Names of what was changed, and how.
    """
    number = min(len(files), 2 if rng.random() < 0.15 else 1)
    chosen = rng.sample(list(files), number)
    return chosen, "; ".join(f"{name}: {_change(rng, folder / name)}" for name in chosen)


def _change(rng: random.Random, path: Path) -> Words:
    if path.is_dir() or rng.random() < 0.08:
        return _displace(rng, path)
    structured = STRUCTURED.get(path.suffix)
    if structured is not None and rng.random() < 0.7:
        return structured(rng, path)
    return _damage(rng, path)


# Where a file lies.


def _displace(rng: random.Random, path: Path) -> Words:
    kind = rng.choice(("gone", "a folder", "empty", "a dangling link", "a loop", "a file", "moved"))
    target = path.with_name(path.name + "-moved")
    if kind == "moved":
        # A link that leads to the very thing: as good as the thing itself.
        path.rename(target)
        path.symlink_to(target.name)
        return "a link to where it is now"
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a dangling link":
        path.symlink_to("nowhere")
    elif kind == "a loop":
        path.symlink_to(path.name)
    elif kind in ("empty", "a file"):
        path.write_bytes(b"" if kind == "empty" else b"words\n")
    return kind


# Bytes.


def _damage(rng: random.Random, path: Path) -> Words:
    data = bytearray(path.read_bytes())
    place, size = rng.randrange(len(data) + 1), rng.choice((1, 4, 16, 200, 4096))
    kind = rng.choice(("flip", "flip", "cut", "zero", "insert", "remove", "double", "append"))
    if kind == "flip":
        size = rng.randint(1, 8)
        for _ in range(size if data else 0):
            # Headers stand first and tell most.
            end = len(data) if rng.random() < 0.5 else min(len(data), 512)
            data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "zero":
        data[place : place + size] = bytes(len(data[place : place + size]))
    elif kind == "insert":
        data[place:place] = rng.randbytes(size)
    elif kind == "remove":
        del data[place : place + size]
    elif kind == "double":
        data[place:place] = data[place : place + size]
    else:
        data += rng.choice((b"\0" * size, rng.randbytes(size), bytes(data)))
    path.write_bytes(data)
    return f"{kind} at {place}, {size} bytes"


# JSON, and lines of it.


def _change_json(rng: random.Random, path: Path) -> Words:
    text, words = _changed_json(rng, json.loads(path.read_text("utf-8")))
    path.write_bytes(_encoded(rng, text))
    return words


def _change_lines(rng: random.Random, path: Path) -> Words:
    lines = path.read_text("utf-8").splitlines()
    number = rng.randrange(len(lines))
    kind = rng.choice(("value", "value", "value", "twice", "gone", "blank", "joined", "order"))
    words = kind
    if kind == "value":
        lines[number], words = _changed_json(rng, json.loads(lines[number]))
    elif kind == "twice":
        lines.insert(number, lines[number])
    elif kind == "gone":
        del lines[number]
    elif kind == "blank":
        lines.insert(number, rng.choice(("", "  ", "# words", "\ufeff", "\u2028", "null", "[]")))
    elif kind == "joined":
        lines[number : number + 2] = [" ".join(lines[number : number + 2])]
    else:
        rng.shuffle(lines)
    path.write_bytes(_encoded(rng, rng.choice(("\n", "\n", "\r\n")).join([*lines, ""])))
    return f"line {number + 1}: {words}"


def _encoded(rng: random.Random, text: str) -> bytes:
    kind = rng.choices(("utf-8", "utf-8-sig", "utf-16", "latin-1"), (20, 1, 1, 1))[0]
    if kind != "utf-8":
        return text.encode(kind, "replace")
    return text.encode("utf-8", "surrogatepass")


def _changed_json(rng: random.Random, values: Any) -> tuple[str, Words]:
    """Change one place of a JSON value; return its text."""
    if rng.random() < 0.06:
        return _odd_text(rng, values)
    values = copy.deepcopy(values)
    places = list(_places(values))
    if not places:
        values = rng.choice(VALUES)
        return json.dumps(values), f"{values!r:.40}"
    holder, key, where = rng.choice(places)
    kind = rng.choice(("value", "value", "number", "type", "gone", "new", "renamed", "deep"))
    old = holder[key]
    is_number = isinstance(old, (int, float)) and not isinstance(old, bool)
    if kind == "number" and is_number:
        new = rng.choice((-old, old + 1, old - 1, old * 2, old / 2, old + 0.5, old * 10**6, 0))
    elif kind == "type":
        new = rng.choice((str(old), [old], {"value": old}, [old, old], bool(old)))
    elif kind == "gone":
        del holder[key]
        return json.dumps(values), f"{where} is gone"
    elif kind == "new" and isinstance(holder, dict):
        holder[rng.choice(("new", "", key.upper(), f" {key}", "kind"))] = old
        return json.dumps(values), f"a key more beside {where}"
    elif kind == "renamed" and isinstance(holder, dict):
        holder[key.upper()] = holder.pop(key)
        return json.dumps(values), f"{where} is {key.upper()}"
    elif kind == "deep":
        new = old
        for _ in range(rng.choice((3, 50))):
            new = [new]
    else:
        new = rng.choice(VALUES)
    holder[key] = new
    ascii_only = rng.random() < 0.5
    return json.dumps(values, ensure_ascii=ascii_only), f"{where} = {new!r:.40}"


def _places(values: Any, where: str = "") -> list[tuple[Any, Any, str]]:
    """Return all places of a JSON value: what holds it, its key there, and its path."""
    inner: Any = ()
    if isinstance(values, dict):
        inner = list(values.items())
    elif isinstance(values, list):
        inner = list(enumerate(values))
    found = []
    for key, value in inner:
        path = f"{where}.{key}"
        found += [(values, key, path), *_places(value, path)]
    return found


def _odd_text(rng: random.Random, values: Any) -> tuple[str, Words]:
    """Write JSON as no program of ours would."""
    text = json.dumps(values)
    kind = rng.choice(("nested", "digits", "two keys", "list", "scalar", "comment", "space"))
    if kind == "nested":
        depth = rng.choice((500, 5000, 100_000))
        inner = "[" * depth + "]" * depth
        text = re.sub(r": (\"[^\"]*\"|-?[\d.]+)", f": {inner}", text, count=1)
    elif kind == "digits":
        text = re.sub(r"-?\b\d+\b", "9" * 5000, text, count=1)
    elif kind == "two keys":
        text = re.sub(r"^\{", '{"kind": "other", "format": 7, "height": -1, ', text)
    elif kind == "list":
        text = f"[{text}]"
    elif kind == "scalar":
        text = rng.choice(("null", "7", '"words"', "true", "[]", "{}", "NaN"))
    elif kind == "comment":
        text = f"// by hand\n{text}"
    else:
        text = f" \n\t{text} \n \n"
    return text, kind


# Arrays.


def _change_arrays(rng: random.Random, path: Path) -> Words:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    name = rng.choice(list(arrays))
    kind = rng.choice(("type", "type", "shape", "values", "values", "name", "more", "header"))
    words = kind
    if kind == "name":
        arrays[name.upper()] = arrays.pop(name)
    elif kind == "more":
        arrays["more"] = np.arange(3)
    elif kind != "header":
        change = {"type": _other_type, "shape": _other_shape, "values": _other_values}[kind]
        arrays[name], words = change(rng, arrays[name])
    written = io.BytesIO()
    rng.choice((np.savez, np.savez, np.savez_compressed))(written, **arrays)
    data = written.getvalue()
    if kind == "header":
        # A header that promises more than there is; the archive's checksum tells it at the end.
        wanted = rng.choice((b"(99,)", b"(-1,)", b"(1e9)", b"(8,8)", b"8", b"(9**9"))
        data = re.sub(
            rb"\((\d+),\)", lambda found: wanted.ljust(len(found[0]))[: len(found[0])], data
        )
    path.write_bytes(data)
    return f"{name}: {words}"


def _other_type(rng: random.Random, array: np.ndarray) -> tuple[np.ndarray, Words]:
    kind = rng.choice(ARRAY_TYPES)
    return array.astype(np.int64).astype(kind), kind


def _other_shape(rng: random.Random, array: np.ndarray) -> tuple[np.ndarray, Words]:
    choices = {
        "none": array[:0],
        "shorter": array[:-1],
        "longer": np.concatenate([array, array]),
        "one more axis": array[:, None],
        "an axis in front": array[None],
        "scalar": np.array(array.flat[0]),
        "two columns": np.stack([array, array], axis=-1),
        "three axes": np.zeros((len(array), 2, 2), array.dtype),
    }
    words = rng.choice(list(choices))
    return choices[words], words


def _other_values(rng: random.Random, array: np.ndarray) -> tuple[np.ndarray, Words]:
    value = rng.choice((np.nan, np.inf, 1e300, 0.5, -0.0, 1.0, 1e-320, -1, 3, 2**31, 2**63))
    whole = np.uint64 if value == 2**63 else np.int64
    changed = array.astype(np.float64 if isinstance(value, float) else whole)
    changed[rng.randrange(len(changed))] = value
    return changed, f"{value!r}"


# Tensors.


def _change_safetensors(rng: random.Random, path: Path) -> Words:
    data = path.read_bytes()
    if rng.random() < 0.4:
        header, words = _other_header(rng, data)
        path.write_bytes(header)
        return words
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__")
    tensors = load(data)
    words = _change_state(rng, tensors)
    # Those that only a file of torch.save can hold stay away.
    tensors = {str(name): value for name, value in tensors.items() if _is_plain(value)}
    path.write_bytes(save(tensors, metadata))
    return words


def _is_plain(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    return value.is_contiguous() and not value.is_meta


def _other_header(rng: random.Random, data: bytes) -> tuple[bytes, Words]:
    """Change the JSON in front of the tensors, or the number of its bytes."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.2:
        size = rng.choice((0, 1, size - 1, size + 1, 2**31, 2**63 - 1, 2**64 - 1))
        return struct.pack("<Q", size) + data[8:], f"a header of {size} bytes"
    values = json.loads(data[8 : 8 + size])
    if rng.random() < 0.5:
        names = [name for name in values if name != "__metadata__"]
        name = rng.choice(sorted(names or values))
        if names:
            field = rng.choice(("dtype", "shape", "data_offsets"))
            values[name][field] = rng.choice(
                ("F64", "F32", "F8_E4M3", "BOOL", "X", [], [0], [2**40], [1, 2], [0, 8], [-1], None)
            )
            words = f"{name}.{field} = {values[name][field]}"
        else:
            words = "no tensors"
        text = json.dumps(values)
    else:
        text, words = _changed_json(rng, values)
    encoded = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(encoded)) + encoded + data[8 + size :], words


def _change_state(rng: random.Random, state: dict[str, Any]) -> Words:
    """Change one entry of a state dict in place."""
    # safetensors gives tensors in another order each time.
    name = rng.choice(sorted(state))
    tensor = state[name]
    kind = rng.choice(("type", "shape", "values", "values", "gone", "more", "renamed", "laid out"))
    if kind == "type":
        state[name] = tensor.to(rng.choice(TENSOR_TYPES))
        return f"{name} in {state[name].dtype}"
    if kind == "shape":
        shapes = {
            "transposed": tensor.T.contiguous() if tensor.ndim == 2 else tensor[None],
            "none": tensor[:0] if tensor.ndim else tensor[None],
            "flat": tensor.flatten(),
            "an axis more": tensor[None],
            "a number": torch.tensor(0.5),
        }
        words = rng.choice(list(shapes))
        state[name] = shapes[words]
        return f"{name}: {words}"
    if kind == "values" and tensor.is_floating_point() and tensor.numel():
        value = rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 0.0))
        state[name] = tensor.clone()
        state[name].view(-1)[rng.randrange(tensor.numel())] = value
        return f"{name}: {value}"
    if kind == "values":
        state[name] = torch.full_like(tensor, rng.choice((0, 1, 200)))
        return f"{name}: all the same"
    if kind == "gone":
        del state[name]
        return f"{name} is gone"
    if kind == "more":
        state[rng.choice(("more", "", "x.y", f"module.{name}", f"{name}.weight"))] = tensor.clone()
        return f"one more beside {name}"
    if kind == "laid out":
        state[name] = rng.choice((tensor.to_sparse, lambda: tensor.to("meta"), _of_one))()
        return f"{name}: {state[name].layout}, {state[name].device}, {tuple(state[name].shape)}"
    state[f"module._orig_mod.{name}"] = state.pop(name)
    return f"{name} in a wrapper"


def _of_one() -> torch.Tensor:
    """Return a tensor of very many equal numbers, which takes no room in a file."""
    return torch.zeros(1, dtype=torch.float16).expand(2**33)


def _change_pickled(rng: random.Random, path: Path) -> Words:
    found = torch.load(path, map_location="cpu", weights_only=True)
    kind = rng.choice(("entry", "entry", "entry", "value", "wrapped", "whole", "code", "old"))
    words = kind
    holder = found
    while isinstance(holder, (list, dict)) and not _has_tensors(holder):
        inner = list(holder.values()) if isinstance(holder, dict) else holder
        inner = [one for one in inner if isinstance(one, (list, dict)) and one]
        if not inner:
            break
        holder = rng.choice(inner)
    if kind == "entry" and isinstance(holder, dict) and _has_tensors(holder):
        tensors = {name: one for name, one in holder.items() if isinstance(one, torch.Tensor)}
        words = _change_state(rng, tensors)
        for name in [name for name in holder if isinstance(holder[name], torch.Tensor)]:
            del holder[name]
        holder.update(tensors)
    elif kind in ("entry", "value"):
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        value = rng.choice((None, 3, "words", [], {}, float("nan"), torch.ones(2), (1, 2)))
        holder[rng.choice(keys)] = value
        words = f"{value!r:.30} for an entry"
    elif kind == "wrapped":
        found = {rng.choice(("state_dict", "model", "ema", "x", 3, None)): found, "step": 3}
    elif kind == "whole":
        found = rng.choice((None, 3, [], {}, "words", torch.ones(2), [found], (found, found)))
    elif kind == "code":
        found = {"model": found, "args": Image.new}
    torch.save(found, path, _use_new_zipfile_serialization=kind != "old")
    return words


def _has_tensors(values: Any) -> bool:
    inner = values.values() if isinstance(values, dict) else values
    return any(isinstance(value, torch.Tensor) for value in inner)


# Videos and pictures.


def _change_video(rng: random.Random, path: Path) -> Words:
    """Put another video under the name: of other frames, sizes, codecs, or none at all."""
    kind = rng.choice(
        ("fewer", "more", "larger", "odd", "tiny", "codec", "picture", "gif", "sound")
    )
    num_frames, size = {"fewer": (1, 16), "more": (40, 16), "larger": (8, 64)}.get(kind, (8, 16))
    height, width = {"odd": (15, 17), "tiny": (2, 2)}.get(kind, (size, size))
    aside = path.with_name("aside.mkv")
    if kind in ("picture", "gif"):
        Image.new("RGB", (width, height)).save(path, "PNG" if kind == "picture" else "GIF")
        return kind
    if kind == "sound":
        with av.open(str(aside), "w") as container:
            sound = container.add_stream("pcm_s16le", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
            frame.rate = 8000
            container.mux([*sound.encode(frame), *sound.encode(None)])  # type: ignore[arg-type]
    else:
        codec = rng.choice(("mpeg4", "mjpeg", "ffv1", "libx264")) if kind == "codec" else "ffv1"
        with av.open(str(aside), "w") as container:
            stream = container.add_stream(codec, rate=rng.choice((1, 10, 1000)))
            stream.height, stream.width = height, width
            stream.pix_fmt = {"ffv1": "bgr0", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
            for number in range(num_frames):
                picture = np.full((height, width, 3), 5 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    os.replace(aside, path)
    return f"{kind}: {num_frames} frames of {height}x{width}"


STRUCTURED: dict[str, Callable[[random.Random, Path], Words]] = {
    ".json": _change_json,
    ".jsonl": _change_lines,
    ".npz": _change_arrays,
    ".safetensors": _change_safetensors,
    ".pt": _change_pickled,
    ".mp4": _change_video,
    ".avi": _change_video,
}
"""Changes that a reader of bytes does not see, by the end of a file's name."""
