"""Low-rank additions to the linear maps of a Wan model's blocks (LoRA): trained by peft, kept in
files as diffusers reads them, merged into weights.

An addition to a map of weight W is up @ down, of as few rows and columns as its rank. Training
needs the extra `lora`; files are read, merged and written without it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from scd.common.weights import Weights, save_tensors
from scd.models.wan.config import WanBlockConfig
from scd.models.wan.source import from_original

LORA_FOLDER = "lora"
"""Folder of a checkpoint that holds the additions by themselves."""
LORA_FILE = "pytorch_lora_weights.safetensors"
"""Name under which diffusers looks for additions in a folder."""
METADATA = "scd_lora"
"""What a file says of the model that its additions were trained on."""

TARGETS = r".*blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ffn\.net\.(0\.proj|2))"
"""Names of the maps that get an addition: all linear ones of a block."""
EXTRA = 'low-rank additions need peft: pip install -c constraints.txt -e ".[lora]"'
"""What to do where the package is missing."""

_ENDS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "alpha": "alpha"}
"""What tensors of a file are, by the end of their names: diffusers' and peft's, and kohya's."""


_LORA = re.compile(r".*\.lora_[AB]\.default\.weight$").match


@dataclass(frozen=True, kw_only=True)
class LoraBase:
    """What the model is that additions were trained on."""

    width: int
    """Entries of a token."""
    ffn_dim: int
    """Width inside the MLP."""
    num_layers: int
    """Blocks."""
    digest: str = ""
    """Of some of its weights; empty: not known."""

    @staticmethod
    def of(block: WanBlockConfig, num_layers: int, weights: Mapping[str, Tensor]) -> LoraBase:
        """Describe a model by its settings and some of its weights."""
        digest = hashlib.blake2b(digest_size=16)
        # Rounded, so that a base and its copy in fewer digits are one.
        digest.update(
            weights["patch_embedding.weight"].detach().cpu().bfloat16().float().numpy().tobytes()
        )
        return LoraBase(
            width=block.width,
            ffn_dim=block.ffn_dim,
            num_layers=num_layers,
            digest=digest.hexdigest(),
        )


def add_lora(model: nn.Module, rank: int, seed: int) -> None:
    """Give a model's blocks additions, which change nothing yet; they alone, and weights of
    actions, which no published model has, move from now on. Additions are float32.

    Raises:
        ValueError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(EXTRA) from error
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name, weight in model.named_parameters():
        if _LORA(name):
            weight.data = weight.data.float()
        elif "action_embedder." in name:
            weight.requires_grad_(True)


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Run a model as it was before it got additions, for a with block."""
    layers: list[Any] = [one for one in model.modules() if hasattr(one, "enable_adapters")]
    # peft lets gradient pass where additions are on, whatever held before.
    moving = [(weight, weight.requires_grad) for weight in model.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for weight, moves in moving:
            weight.requires_grad_(moves)


def additions_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the additions among the weights of a model that has some, by diffusers' names."""
    return {name.replace(".default.", "."): value for name, value in state.items() if _LORA(name)}


def has_lora(names: Iterable[str]) -> bool:
    """Tell whether a model whose weights have these names has additions."""
    return any(_LORA(name) for name in names)


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a model that has additions as those of one that has none, with the
    additions in them."""
    plain = {}
    for name, value in state.items():
        if _LORA(name):
            continue
        if name.endswith(".base_layer.weight"):
            layer = name.removesuffix(".base_layer.weight")
            down, up = (state[f"{layer}.lora_{side}.default.weight"] for side in "AB")
            value = value + (up.float() @ down.float()).to(value)
        plain[name.replace(".base_layer.", ".")] = value
    return plain


def load_lora(model: nn.Module, parts: Iterable[str], folder: Path) -> None:
    """Put additions that `write_lora` wrote into a model that has as many."""
    for part in parts:
        with Weights(folder / part / LORA_FILE) as weights:
            state = {
                re.sub(r"^transformer\.", f"{part}." if part else "", name).replace(
                    ".weight", ".default.weight"
                ): weights.get(name)
                for name in weights.names()
            }
        model.load_state_dict(state, strict=False)


def write_lora(state: Mapping[str, Tensor], bases: Mapping[str, LoraBase], folder: Path) -> None:
    """Write the additions among a model's weights, as diffusers' pipelines and its
    WanTransformer3DModel load them.

    Args:
        state: weights of a model that has additions.
        bases: of each of its parts, by the beginning of their names: "encoder" and "decoder" of a
            separable model, which have a folder each, "" of a dense one.
        folder: is made.
    """
    additions = additions_of(state)
    for part, base in bases.items():
        start = f"{part}." if part else ""
        place = folder / part
        place.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"transformer.{name.removeprefix(start)}": value.detach().cpu().contiguous()
            for name, value in additions.items()
            if name.startswith(start)
        }
        save_tensors(tensors, place / LORA_FILE, {METADATA: json.dumps(asdict(base))})


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """Additions read from a file."""

    path: Path
    additions: Mapping[str, tuple[Tensor, Tensor, float]]
    """Down, up and factor of each map, by our name of its weight."""
    base: LoraBase | None
    """What it says it was trained on; None: nothing."""

    @staticmethod
    def read(place: str) -> LoraFile:
        """Read a file of additions, or the one in a folder, in the names of diffusers, peft, kohya
        or Wan's release.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it holds other tensors, or halves of additions.
        """
        path = Path(place)
        path = path / LORA_FILE if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"needed a file of LoRA (or a folder with {LORA_FILE}): {path}")
        found: dict[str, dict[str, Tensor]] = {}
        with Weights(path) as weights:
            for name in weights.names():
                layer, end = _split(name, path)
                found.setdefault(f"{layer}.weight", {})[end] = weights.get(name)
        additions = {}
        for name, parts in found.items():
            if not {"down", "up"} <= parts.keys():
                raise ValueError(f"{path}: the addition to {name!r} lacks a half: {sorted(parts)}")
            rank = parts["down"].shape[0]
            additions[name] = (parts["down"], parts["up"], float(parts.get("alpha", rank)) / rank)
        return LoraFile(path=path, additions=additions, base=_base_in(path))

    def check(
        self, block: WanBlockConfig, num_layers: int, names: Iterable[str], where: str
    ) -> None:
        """Refuse a model of another base, with the fields that differ, or without a weight that is
        added to (ValueError); `names` are its weights', `where` it lies."""
        first = {"width": block.width, "ffn_dim": block.ffn_dim, "num_layers": num_layers}
        theirs = {} if self.base is None else {name: getattr(self.base, name) for name in first}
        theirs = theirs or self._seen(num_layers)
        different = [
            f"{name} {value}, not {first[name]}"
            for name, value in theirs.items()
            if value != first[name]
        ]
        if different:
            raise ValueError(
                f"{self.path} is LoRA of another base than {where}: {'; '.join(different)}"
            )
        unknown = sorted(self.additions.keys() - set(names))
        if unknown:
            raise ValueError(f"{self.path} adds to {unknown[0]!r}, which {where} does not have")

    def _seen(self, num_layers: int) -> dict[str, int]:
        """Read the base's sizes from shapes; of its layers only that there are more."""
        sizes = {}
        for name, (down, up, _) in self.additions.items():
            if name.endswith("attn1.to_q.weight"):
                sizes["width"] = down.shape[1]
            if name.endswith("ffn.net.0.proj.weight"):
                sizes["ffn_dim"] = up.shape[0]
            if (found := re.match(r"blocks\.(\d+)\.", name)) and int(found[1]) >= num_layers:
                sizes["num_layers"] = max(sizes.get("num_layers", 0), int(found[1]) + 1)
        return sizes

    def added_to(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight, by our name, with the addition to it, if there is one.

        Raises:
            ValueError: an addition of another shape.
        """
        if name not in self.additions:
            return weight
        down, up, factor = self.additions[name]
        shape = (up.shape[0], down.shape[1])
        if shape != tuple(weight.shape):
            raise ValueError(
                f"{self.path}: the addition to {name!r} is {list(shape)}, the weight is "
                f"{list(weight.shape)}"
            )
        return (weight.float() + factor * (up.float() @ down.float())).to(weight.dtype)


def _split(name: str, path: Path) -> tuple[str, str]:
    """Return our name of a map, and what a tensor is of the addition to it."""
    bare = re.sub(r"\.(default|weight)\b", "", name)
    layer, _, end = bare.rpartition(".")
    layer = re.sub(r"^(transformer|diffusion_model|base_model\.model)\.", "", layer)
    if end not in _ENDS or not layer.startswith("blocks."):
        raise ValueError(
            f"{path}: needed additions to the linear maps of Wan's blocks (lora_A, lora_B), got "
            f"{name!r}"
        )
    return from_original(f"{layer}.").removesuffix("."), _ENDS[end]


def _base_in(path: Path) -> LoraBase | None:
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, "pt") as file:
        said: Any = (file.metadata() or {}).get(METADATA)
    try:
        return None if said is None else LoraBase(**json.loads(said))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {METADATA} in its header cannot be read: {error}") from error
