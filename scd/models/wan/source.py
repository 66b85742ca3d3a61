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

from scd.common.hub import find_part, read_part_config
from scd.common.weights import StoredWeights, Weights, bare, open_weights
from scd.data.spaces import ConditionSpec
from scd.models.wan.config import WanBlockConfig

WEIGHTS_STEM = "diffusion_pytorch_model"
"""Name of the files of weights in a folder of diffusers."""

STATE_KEYS = ("generator_ema", "generator", "model", "state_dict")
"""Where a causal checkpoint keeps its weights, the averaged ones first."""

PARTS = ("vae", "text_encoder", "tokenizer")
"""Folders of a pipeline that a world needs besides its weights."""


@dataclass(frozen=True, kw_only=True)
class WanSource:
    """Weights of a Wan model, not read yet, and what their configuration says."""

    weights: Weights
    """One tensor after another."""
    names: dict[str, str]
    """Our name of each weight -> its name there."""
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

    def conditions(self, text_length: int) -> ConditionSpec:
        return ConditionSpec(text_length=text_length, text_dim=self.text_dim)


def open_source(model: str, key: str = "", head_dim: int = 128) -> WanSource:
    """Find the weights of a Wan model.

    Args:
        model: folder of diffusers, or its name on the hub; or a file with a state dict under the
            original names or diffusers'.
        key: of the state dict within a file; empty: the first of STATE_KEYS that is there.
        head_dim: width of an attention head, which a state dict does not tell.

    Raises:
        FileNotFoundError: it is not there or not whole, or the hub cannot be reached.
        ValueError: a model of another family, or weights that cannot be read.
    """
    path = Path(model)
    if path.is_file():
        return _from_state_dict(path, key, head_dim)
    found = find_part(model, "transformer", ("WanTransformer3DModel",), "video transformer of Wan")
    config = read_part_config(found)
    _check_config(found, config)
    weights = StoredWeights(found / f"{WEIGHTS_STEM}.safetensors")
    return WanSource(
        weights=weights,
        names={name: name for name in weights.names()},
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
    )


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    needed = ("num_attention_heads", "attention_head_dim", "ffn_dim", "num_layers", "text_dim")
    missing = [name for name in (*needed, "in_channels", "patch_size") if name not in config]
    if missing:
        raise ValueError(f"{folder}: config.json lacks {missing}")
    frames, rows, columns = config["patch_size"]
    outs = config.get("out_channels") or config["in_channels"]
    if config.get("image_dim") or config.get("added_kv_proj_dim") or config["in_channels"] != outs:
        raise ValueError(
            f"{folder}: needed text to video, with as many channels out as in, got "
            f"in_channels={config['in_channels']}, out_channels={outs}, "
            f"image_dim={config.get('image_dim')} and "
            f"added_kv_proj_dim={config.get('added_kv_proj_dim')}"
        )
    if frames != 1 or rows != columns:
        raise ValueError(
            f"{folder}: needed patches of one frame and a square, got {config['patch_size']}"
        )
    norm = config.get("qk_norm", "rms_norm_across_heads")
    if norm != "rms_norm_across_heads":
        raise ValueError(f"{folder}: needed qk_norm='rms_norm_across_heads', got {norm!r}")


def _from_state_dict(path: Path, key: str, head_dim: int) -> WanSource:
    weights = open_weights(path, STATE_KEYS, key)
    names = {from_original(name): name for name in weights.names()}
    probes = ("patch_embedding.weight", "blocks.0.ffn.net.0.proj.weight", "proj_out.weight")
    text = "condition_embedder.text_embedder.linear_1.weight"
    times = "condition_embedder.time_embedder.linear_1.weight"
    missing = [name for name in (*probes, text, times) if name not in names]
    if missing:
        raise ValueError(
            f"{path} holds no Wan model: it has no weight {missing[0]!r}, but for example "
            f"{sorted(weights.names())[:3]}"
        )

    def shape(name: str) -> tuple[int, ...]:
        return weights.shape(names[name])

    width, channels, frames, rows, columns = shape(probes[0])
    if frames != 1 or rows != columns or shape(probes[2])[0] != channels * rows * columns:
        raise ValueError(
            f"{path}: needed text to video with square patches of one frame, got patches "
            f"{list(shape(probes[0]))} and a head {list(shape(probes[2]))}"
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
            ffn_dim=shape(probes[1])[0],
            freq_dim=shape(times)[1],
            norm_before_text="blocks.0.norm2.weight" in names,
        ),
        num_layers=max(layers) + 1,
        channels=channels,
        patch_size=rows,
        text_dim=shape(text)[1],
        folder=None,
        is_causal=True,
    )


_PAIRS = (
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
"""Beginnings of names: the original ones, and diffusers'."""


def _rules(there: int, here: int) -> list[tuple[re.Pattern[str], str]]:
    rules = []
    for pair in _PAIRS:
        pattern = re.escape(pair[there]).replace(r"\{n\}", r"(\d+)")
        rules.append((re.compile(f"^{pattern}"), pair[here].replace("{n}", r"\1")))
    return rules


_TO_OURS, _TO_ORIGINAL = _rules(0, 1), _rules(1, 0)


def _renamed(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, replacement in rules:
        renamed, count = pattern.subn(replacement, name)
        if count:
            return renamed
    return None


def from_original(name: str) -> str:
    """Turn an original name, wrapped or not, into ours; one that is not known stays as it is."""
    name = bare(name)
    return _renamed(name, _TO_OURS) or name


def to_original(name: str) -> str:
    """Turn our name of a weight into the original one.

    Raises:
        ValueError: no weight of a Wan model has that name.
    """
    renamed = _renamed(name, _TO_ORIGINAL)
    if renamed is None:
        raise ValueError(f"no weight of a Wan model is named {name!r}")
    return renamed
