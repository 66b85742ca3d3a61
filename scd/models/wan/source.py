"""Where weights of a Wan model come from: a folder of diffusers, or a causal checkpoint.

All that can be refused is refused by what configurations, indices and headers say, before any
weight is read. Names of weights are diffusers' (which are ours), or the original ones of the Wan2.1
release and of causal models that were trained from it (CausVid, Self-Forcing): a renaming and
nothing else, no tensor is transposed, split or permuted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scd.common.config import MAX_SIZE
from scd.common.files import read_json
from scd.common.hub import ABOUT, CONFIG_FILE, download, find_part, read_part_config
from scd.common.weight_names import Renaming, bare
from scd.common.weights import Header, Weights
from scd.data.spaces import ConditionSpec
from scd.models.wan.config import WanBlockConfig

WEIGHTS_STEM = "diffusion_pytorch_model"
"""Name of the files of weights in a folder of diffusers."""

CLASSES = ("WanTransformer3DModel",)
"""Classes of diffusers whose weights these are."""

EXAMPLE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
"""Name on the hub of a model that will do."""

TI2V_CHANNELS = 48
"""Channels of the latents of Wan2.2-TI2V-5B's autoencoder, whose cells are of 16 pixels, and which
makes 24 frames per second."""

SIZES = (
    "num_attention_heads",
    "attention_head_dim",
    "ffn_dim",
    "num_layers",
    "text_dim",
    "in_channels",
)
"""Numbers that a transformer's settings must have."""

PROBES = {
    "patch_embedding.weight": 5,
    "blocks.0.ffn.net.0.proj.weight": 2,
    "proj_out.weight": 2,
    "condition_embedder.text_embedder.linear_1.weight": 2,
    "condition_embedder.time_embedder.linear_1.weight": 2,
}
"""Weights whose shapes tell the sizes of a model, and how many axes they have."""

PARTS = ("vae", "text_encoder", "tokenizer")
"""Folders of a pipeline that a world needs besides its weights."""


@dataclass(frozen=True, kw_only=True)
class WanFound:
    """What the configuration of a Wan model says."""

    block: WanBlockConfig
    """Size of the blocks."""
    num_layers: int
    """Number of blocks."""
    channels: int
    """Channels of a latent frame."""
    patch_size: int
    """Side of the square of latent cells that makes one token."""
    text_dim: int
    """Entries of an embedded token of the text."""
    folder: Path | None
    """Folder of diffusers, or None."""
    is_causal: bool
    """Whether it was trained as a causal model of few steps."""
    flow_shift: float | None = None
    """Bend of the table of times towards noise, by the scheduler beside it; None: there is none."""

    def conditions(self, text_length: int) -> ConditionSpec:
        return ConditionSpec(text_length=text_length, text_dim=self.text_dim)

    @property
    def cell_size(self) -> int:
        """Pixels, each way, of a latent cell, where no autoencoder says it."""
        return 16 if self.channels == TI2V_CHANNELS else 8

    @property
    def fps(self) -> float:
        """Frames per second of its videos."""
        return 24.0 if self.channels == TI2V_CHANNELS else 16.0


@dataclass(frozen=True, kw_only=True)
class WanSource(WanFound):
    """Weights of a Wan model, not read yet, and what their configuration says."""

    weights: Weights
    """One tensor after another."""
    names: dict[str, str]
    """Our name of each weight -> its name there."""

    def headers(self) -> dict[str, Header]:
        """Return shape and type of each weight by our name."""
        return {name: self.weights.header(there) for name, there in self.names.items()}

    def named(self, name: str) -> str:
        """Turn our name of a weight into the one of the file, or into what it would be there."""
        there = self.names.get(name)
        if there is not None:
            return self.weights.stored_name(there)
        is_original = any(ours != theirs for ours, theirs in self.names.items())
        return _NAMES.to_theirs(name) or name if is_original else name


def open_source(model: str, key: str = "", head_dim: int = 128) -> WanSource:
    """Find the weights of a Wan model.

    Args:
        model: folder of diffusers, or its name on the hub; or a file with a state dict under the
            original names or diffusers'.
        key: of the state dict within a file; empty: the averaged one, if there is any.
        head_dim: width of an attention head, which a state dict does not tell.

    Raises:
        FileNotFoundError: it is not there or not whole, or the hub cannot be reached.
        ValueError: a model of another family, one of Wan2.2's two of 14B, or weights that cannot
            be read.
    """
    path = Path(model)
    if path.is_file():
        return _from_state_dict(path, key, head_dim)
    found = find_part(model, "transformer", CLASSES, "video transformer of Wan")
    settings = _of_config(found)
    weights = Weights(found)
    return WanSource(
        **vars(settings), weights=weights, names={name: name for name in weights.names()}
    )


def read_sizes(model: str, key: str = "", head_dim: int = 128) -> WanFound:
    """Return what a Wan model's configuration says, as `open_source`; of a folder of diffusers, or
    its name on the hub, no weights are needed, nor downloaded."""
    if Path(model).is_file():
        return open_source(model, key, head_dim)
    folder = Path(model)
    if not folder.is_dir():
        folder = download(model, [f"*/{CONFIG_FILE}", *ABOUT])
    return _of_config(find_part(folder, "transformer", CLASSES, "video transformer of Wan"))


def _of_config(found: Path) -> WanFound:
    _refuse_two_experts(found)
    config = read_part_config(found)
    _check_config(found / CONFIG_FILE, config)
    return WanFound(
        block=WanBlockConfig(
            num_heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            ffn_dim=config["ffn_dim"],
            freq_dim=config.get("freq_dim", 256),
            norm_before_text=config.get("cross_attn_norm", True),
            eps=config.get("eps", 1e-6),
        ),
        num_layers=config["num_layers"],
        channels=config["in_channels"],
        patch_size=config["patch_size"][1],
        text_dim=config["text_dim"],
        folder=found.parent,
        is_causal=False,
        flow_shift=_flow_shift(found.parent),
    )


def _refuse_two_experts(transformer: Path) -> None:
    """Refuse one of the two transformers of Wan2.2 A14B: each knows half of the times."""
    path = transformer.parent / "model_index.json"
    index = read_json(path) if path.is_file() else {}
    index = index if isinstance(index, dict) else {}
    second = index.get("transformer_2")
    named = isinstance(second, list) and second[:1] not in ([], [None])
    if named or (transformer.parent / "transformer_2").is_dir():
        ratio = index.get("boundary_ratio")
        raise ValueError(
            f"{transformer.parent} is of Wan2.2 with two transformers, one for high and one for "
            f"low noise (transformer_2{'' if ratio is None else f', boundary_ratio {ratio}'}): a "
            f"world is made of one that knows all times. Needed Wan2.1, as {EXAMPLE}"
        )


def _flow_shift(folder: Path) -> float | None:
    """Read how the scheduler beside a transformer bends times towards noise."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return None
    settings = read_json(path)
    settings = settings if isinstance(settings, dict) else {}
    shift = settings.get("flow_shift", settings.get("shift"))
    if shift is None:
        return None
    if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not 0 < shift < 1e3:
        raise ValueError(f"{path}: flow_shift must be above 0 and below 1000, got {shift!r}")
    return float(shift)


def _check_config(path: Path, config: dict[str, Any]) -> None:
    missing = [name for name in (*SIZES, "patch_size") if name not in config]
    if missing:
        raise ValueError(f"{path} lacks {missing}")
    optional = {"freq_dim": config.get("freq_dim", 256)}
    for name, value in {**{name: config[name] for name in SIZES}, **optional}.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
            raise ValueError(f"{path}: {name} must be an integer of 1 to {MAX_SIZE}, got {value!r}")
    eps = config.get("eps", 1e-6)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < 1:
        raise ValueError(f"{path}: eps must lie between 0 and 1, got {eps!r}")
    outs = config.get("out_channels") or config["in_channels"]
    if config.get("image_dim") or config.get("added_kv_proj_dim") or config["in_channels"] != outs:
        raise ValueError(
            f"{path}: needed text to video, with as many channels out as in, got "
            f"in_channels={config['in_channels']}, out_channels={outs}, "
            f"image_dim={config.get('image_dim')} and "
            f"added_kv_proj_dim={config.get('added_kv_proj_dim')}"
        )
    patch = config["patch_size"]
    if not isinstance(patch, list) or patch not in [[1, size, size] for size in range(1, 65)]:
        raise ValueError(f"{path}: needed patches of one frame and a square, got {patch!r}")
    norm = config.get("qk_norm", "rms_norm_across_heads")
    if norm != "rms_norm_across_heads":
        raise ValueError(f"{path}: needed qk_norm='rms_norm_across_heads', got {norm!r}")


def _from_state_dict(path: Path, key: str, head_dim: int) -> WanSource:
    if found := re.search(r"(high|low)_noise", f"{path.parent.name}/{path.name}"):
        raise ValueError(
            f"{path} is one of the two transformers of Wan2.2, by its name the one for "
            f"{found[1]} noise: a world is made of one that knows all times. Needed Wan2.1, as "
            f"{EXAMPLE}"
        )
    weights = Weights(path, key)
    names = _our_names(path, weights)
    shapes = [weights.header(names[name]).shape for name in PROBES]
    for name, shape, rank in zip(PROBES, shapes, PROBES.values(), strict=False):
        if len(shape) != rank:
            raise ValueError(
                f"{path}: {weights.stored_name(names[name])!r} must have {rank} axes, got "
                f"{list(shape)}"
            )
    patches, (ffn_dim, _), head, (_, text_dim), (_, freq_dim) = shapes
    width, channels, frames, rows, columns = patches
    if frames != 1 or rows != columns or head[0] != channels * rows * columns:
        raise ValueError(
            f"{path}: needed text to video with square patches of one frame, got patches "
            f"{list(patches)} and a head {list(head)}"
        )
    if width % head_dim:
        raise ValueError(
            f"{path}: its width {width} is no multiple of head_dim={head_dim}; set --head-dim"
        )
    layers = {int(found[1]) for name in names if (found := re.match(r"blocks\.(\d+)\.", name))}
    return WanSource(
        weights=weights,
        names=names,
        block=WanBlockConfig(
            num_heads=width // head_dim,
            head_dim=head_dim,
            ffn_dim=ffn_dim,
            freq_dim=freq_dim,
            norm_before_text="blocks.0.norm2.weight" in names,
        ),
        num_layers=max(layers) + 1,
        channels=channels,
        patch_size=rows,
        text_dim=text_dim,
        folder=None,
        is_causal=True,
    )


def _our_names(path: Path, weights: Weights) -> dict[str, str]:
    """Return our name of each weight of a state dict -> its bare name there."""
    names = {from_original(name): name for name in weights.names()}
    if len(names) < len(weights.names()):
        twice = next(name for name in weights.names() if names[from_original(name)] != name)
        other = names[from_original(twice)]
        raise ValueError(
            f"{path} holds {weights.stored_name(twice)!r} and {weights.stored_name(other)!r}, "
            "which name one weight: needed one of them"
        )
    missing = [name for name in PROBES if name not in names]
    if missing:
        theirs = to_original(missing[0])
        known = sum(_NAMES.to_theirs(name) is not None for name in names)
        held = sorted(map(weights.stored_name, weights.names()))[:3]
        raise ValueError(
            f"{path} lacks the weight {theirs!r} of a Wan model"
            if known > len(names) / 2
            else f"{path} holds no Wan model: it has no weight {theirs!r}, but for example {held}"
        )
    return names


_NAMES = Renaming(
    (
        ("blocks.{n}.self_attn.q.", "blocks.{n}.attn1.to_q."),
        ("blocks.{n}.self_attn.k.", "blocks.{n}.attn1.to_k."),
        ("blocks.{n}.self_attn.v.", "blocks.{n}.attn1.to_v."),
        ("blocks.{n}.self_attn.o.", "blocks.{n}.attn1.to_out.0."),
        ("blocks.{n}.self_attn.norm_q.", "blocks.{n}.attn1.norm_q."),
        ("blocks.{n}.self_attn.norm_k.", "blocks.{n}.attn1.norm_k."),
        ("blocks.{n}.cross_attn.q.", "blocks.{n}.attn2.to_q."),
        ("blocks.{n}.cross_attn.k.", "blocks.{n}.attn2.to_k."),
        ("blocks.{n}.cross_attn.v.", "blocks.{n}.attn2.to_v."),
        ("blocks.{n}.cross_attn.o.", "blocks.{n}.attn2.to_out.0."),
        ("blocks.{n}.cross_attn.norm_q.", "blocks.{n}.attn2.norm_q."),
        ("blocks.{n}.cross_attn.norm_k.", "blocks.{n}.attn2.norm_k."),
        # Only the norm before the text has weights; the original counts it third, diffusers second.
        ("blocks.{n}.norm3.", "blocks.{n}.norm2."),
        ("blocks.{n}.ffn.0.", "blocks.{n}.ffn.net.0.proj."),
        ("blocks.{n}.ffn.2.", "blocks.{n}.ffn.net.2."),
        ("blocks.{n}.modulation", "blocks.{n}.scale_shift_table"),
        ("head.modulation", "scale_shift_table"),
        ("head.head.", "proj_out."),
        ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
        ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
        ("time_projection.1.", "condition_embedder.time_proj."),
        ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
        ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
        ("patch_embedding.", "patch_embedding."),
    )
)
"""Beginnings of names: the original ones, and diffusers'."""


def from_original(name: str) -> str:
    """Turn an original name, wrapped or not, into ours; one that is not known stays as it is."""
    name = bare(name)
    return _NAMES.to_ours(name) or name


def to_original(name: str) -> str:
    """Turn our name of a weight into the original one.

    Raises:
        ValueError: no weight of a Wan model has that name.
    """
    renamed = _NAMES.to_theirs(name)
    if renamed is None:
        raise ValueError(f"no weight of a Wan model is named {name!r}")
    return renamed
