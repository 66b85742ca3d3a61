"""`scd export diffusers`: a Wan world as folders that diffusers' WanTransformer3DModel loads.

A dense world is one transformer, a separable one two: encoder and decoder. The encoder is written
with the decoder's head, without which diffusers would not load it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from scd.common.config import from_json, to_json
from scd.common.files import refuse_used, written_aside
from scd.common.hub import find_part
from scd.common.weights import Weights, write_shards
from scd.convert.settings import ExportConfig
from scd.models.checkpoint import resolve
from scd.models.kinds import ModelConfig
from scd.models.shipped import parts_beside
from scd.models.wan.config import WanConfig, WanSeparableConfig
from scd.models.wan.source import PARTS, WEIGHTS_STEM
from scd.models.weights import CONFIG_FILE, WEIGHTS_FILE, read_settings

SPLIT_FILE = "scd.json"
"""Settings of a separable world, beside its two transformers."""


def export(config: ExportConfig) -> None:
    """Write the transformers of a Wan world and say where; see `export_diffusers`."""
    for folder in export_diffusers(config.run, config.out):
        print(f"saved {folder}")


def export_diffusers(run: str | os.PathLike[str], out: str) -> list[Path]:
    """Write the transformers of a Wan world, and its other parts where they are available.

    Returns:
        The folders that `WanTransformer3DModel.from_pretrained` takes.

    Raises:
        FileNotFoundError: no world is there.
        FileExistsError: `out` holds something.
        ValueError: the world is none of Wan.
    """
    folder, target = resolve(run), Path(out)
    refuse_used(target)
    settings = read_settings(folder / CONFIG_FILE)
    config = from_json(ModelConfig, settings["model"], f"{folder / CONFIG_FILE}: model")
    if not config.takes_text:
        raise ValueError(f"{run} is no Wan world but {type(config).__name__}: nothing to export")
    if config.conditions.has_actions:
        raise ValueError(
            f"{run} is steered by actions, whose weights diffusers' WanTransformer3DModel has "
            "no place: scd push, or a copy of the folder, hands it on"
        )
    if config.is_separable:
        num_layers = {part: getattr(config, part).num_layers for part in ("encoder", "decoder")}
    else:
        num_layers = {"transformer": config.num_layers}
    with Weights(folder / WEIGHTS_FILE, as_stored=True) as weights, written_aside(target) as aside:
        for part, number in num_layers.items():
            (aside / part).mkdir()
            text = json.dumps(_transformer_config(config, number), indent=2)
            (aside / part / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
            write_shards(_tensors(weights, part), aside / part, WEIGHTS_STEM)
        if config.is_separable:
            text = json.dumps(to_json(config), indent=2)
            (aside / SPLIT_FILE).write_text(text + "\n", encoding="utf-8")
        else:
            _add_parts(_source_of(run, settings.get("autoencoder")), aside)
    return [target / part for part in num_layers]


def _tensors(weights: Weights, part: str) -> Iterator[tuple[str, Tensor]]:
    """Read the weights of "encoder", "decoder", or all of a dense "transformer"."""
    prefix = "" if part == "transformer" else f"{part}."
    for name in weights.names():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), weights.get(name)
    if part == "encoder":
        for name in ("proj_out.weight", "proj_out.bias", "scale_shift_table"):
            yield name, weights.get(f"decoder.{name}")


def _transformer_config(config: WanConfig | WanSeparableConfig, num_layers: int) -> dict[str, Any]:
    """Return the config.json of a WanTransformer3DModel."""
    block, shape = config.block, config.shape
    return {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None,
        "attention_head_dim": block.head_dim,
        "cross_attn_norm": block.norm_before_text,
        "eps": block.eps,
        "ffn_dim": block.ffn_dim,
        "freq_dim": block.freq_dim,
        "image_dim": None,
        "in_channels": shape.channels,
        "num_attention_heads": block.num_heads,
        "num_layers": num_layers,
        "out_channels": shape.channels,
        "patch_size": [1, shape.patch_size, shape.patch_size],
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.conditions.text_dim,
    }


def _source_of(run: str | os.PathLike[str], autoencoder: Any) -> str:
    """Return the diffusers folder with a world's other parts: the world, or the one it names."""
    named = autoencoder.get("source") if isinstance(autoencoder, dict) else None
    return parts_beside(str(run)) or named or ""


def _add_parts(source: str, folder: Path) -> None:
    """Copy what makes a pipeline whole, from a folder of diffusers if there is one."""
    if not source or not Path(source).is_dir():
        return
    for part in (*PARTS, "scheduler"):
        if (Path(source) / part).is_dir():
            shutil.copytree(find_part(source, part), folder / part)
    index = Path(source) / "model_index.json"
    if index.is_file():
        shutil.copyfile(index, folder / index.name)
