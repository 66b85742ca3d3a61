"""Where weights of a Wan model come from: a folder of diffusers, or a causal checkpoint.

All that can be refused is refused by what configurations, indices and headers say, before any
weight is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scd.common.hub import find_part, read_part_config
from scd.common.weights import StoredWeights, Weights, open_weights
from scd.data.spaces import ConditionSpec
from scd.models.wan.config import WanBlockConfig
from scd.models.wan.names import from_original

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
        """Return what steers the model."""
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
    """Refuse a transformer that is not of text to video, or of other parts than ours."""
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
