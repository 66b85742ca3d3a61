"""State dicts of the paper's release and of FAR: a world model, or FAR's autoencoder.

`scd convert reference` and `scd convert autoencoder`. A state dict lacks settings, which are
inferred from the names and shapes of its weights. FAR's autoencoders are copies of diffusers'
AutoencoderDC, with the same names. Source of the layouts: the release's and FAR's code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from scd.autoencoders.deep_compression import FAR_SCALE, settings_of
from scd.autoencoders.diffusers import new_network, save_network
from scd.common.files import refuse_used, written_aside
from scd.common.weights import read_state_dict
from scd.data.spaces import ConditionSpec
from scd.models.build import Diffuser, build
from scd.models.config import (
    BlockConfig,
    CacheConfig,
    DecoderConfig,
    DenseConfig,
    EncoderConfig,
    FrameShape,
    Join,
    SeparableConfig,
)
from scd.models.weights import check_state

_STACK_NAMES = (
    (r"x_embedder\.", "embed_frame.project."),
    (r"timestep_embedder\.linear_1\.", "embed_time.rise."),
    (r"timestep_embedder\.linear_2\.", "embed_time.mix."),
    (r"action_embedder\.embedding_table\.", "embed_conditions.actions."),
    (r"label_embedder\.embedding_table\.", "embed_conditions.labels."),
    (r"transformer_blocks\.(\d+)\.norm1\.linear\.", r"blocks.\1.attention_modulation.linear."),
    (r"transformer_blocks\.(\d+)\.norm2\.linear\.", r"blocks.\1.mlp_modulation.linear."),
    (r"transformer_blocks\.(\d+)\.attn\.norm_([qk])\.weight", r"blocks.\1.attention.\2_norm"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0\.", r"blocks.\1.attention.to_out."),
    (r"transformer_blocks\.(\d+)\.attn\.to_([qkv])\.", r"blocks.\1.attention.to_\2."),
    (r"transformer_blocks\.(\d+)\.mlp\.net\.0\.proj\.", r"blocks.\1.mlp.0."),
    (r"transformer_blocks\.(\d+)\.mlp\.net\.2\.", r"blocks.\1.mlp.2."),
    (r"proj_out\.", "head.project."),
    (r"decoder_input_proj\.", "merge."),
    (r"decoder_alignment\.0\.", "align_norm."),
    (r"decoder_alignment\.1\.", "align."),
)
"""Names inside one stack of blocks: the release's, and ours."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Settings that cannot be inferred from a state dict of the release or of FAR."""

    channels: int = 32
    """Channels of a latent frame."""
    height: int = 8
    """Rows of a latent frame."""
    width: int = 8
    """Columns of a latent frame."""
    join: Literal["token_concat", "add"] = "token_concat"
    """How the decoder is given the context, if no weight tells; the other joins are recognised."""
    rotary_axes: tuple[int, int, int] | None = None
    """Entries of a head for frame, row and column. None: a quarter and twice three eighths."""
    distance_bias: float = 0.0
    """Slope of the attention bias over frame distance."""
    key: str = ""
    """Name of the state dict inside the file, where it lies in a dictionary. Empty: the file is
    the state dict."""
    cache: CacheConfig = field(default_factory=lambda: CacheConfig(window=300, num_sinks=0))
    """KV cache of a stream; the release keeps all frames."""


def our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the release (encoder and decoder) or of FAR (one stack) to ours."""
    renamed = {}
    for name, tensor in state.items():
        side = re.match(r"(encoder|decoder)\.", name)
        prefix = side.group(0) if side else ""
        rest = name[len(prefix) :]
        # The encoder ends in its output norm; in the others the norm belongs to the head.
        output = "output_modulation.linear." if prefix == "encoder." else "head.modulation.linear."
        for theirs, ours in (*_STACK_NAMES, (r"norm_out\.linear\.", output)):
            rest, found = re.subn(f"^{theirs}", ours, rest)
            if found:
                break
        renamed[prefix + rest] = tensor
    return renamed


def config_of(
    state: Mapping[str, Tensor], config: ReferenceConfig
) -> SeparableConfig | DenseConfig:
    """Infer a model's settings from the shapes of its weights, which have our names."""
    dense = "head.project.weight" in state
    stacks = ("",) if dense else ("encoder.", "decoder.")
    probes = [f"{stack}{part}" for stack in stacks for part in _PROBES]
    missing = [name for name in probes if name not in state]
    if missing:
        raise ValueError(f"not a state dict of the release or of FAR: no weight {missing[:3]}")
    first = stacks[0]
    width, token_dim = state[f"{first}embed_frame.project.weight"].shape
    head_dim = state[f"{first}blocks.0.attention.q_norm"].numel()
    patch_size = round((token_dim / config.channels) ** 0.5)
    if patch_size**2 * config.channels != token_dim:
        raise ValueError(
            f"tokens of {token_dim} values are no square patches of {config.channels} channels"
        )
    axes = config.rotary_axes or (head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8)
    shape = FrameShape(
        channels=config.channels, height=config.height, width=config.width, patch_size=patch_size
    )
    block = BlockConfig(
        width=width, head_dim=head_dim, rotary_axes=axes, distance_bias=config.distance_bias
    )
    tables = {
        name: state.get(f"{first}embed_conditions.{name}.weight") for name in ("actions", "labels")
    }
    # The last row of a table is the null embedding.
    sizes = {f"num_{name}": 0 if one is None else len(one) - 1 for name, one in tables.items()}
    shared: Any = dict(
        shape=shape, block=block, conditions=ConditionSpec(**sizes), cache=config.cache
    )
    if dense:
        return DenseConfig(num_layers=_num_layers(state, ""), **shared)
    join: Join = config.join
    if "decoder.merge.weight" in state:
        join = "channel_concat"
    if "decoder.align.weight" in state:
        join = "token_concat_projected"
    encoder = EncoderConfig(
        num_layers=_num_layers(state, "encoder."),
        start_frame=False,
        modulate_output="encoder.output_modulation.linear.weight" in state,
    )
    decoder = DecoderConfig(num_layers=_num_layers(state, "decoder."), join=join)
    return SeparableConfig(encoder=encoder, decoder=decoder, **shared)


_PROBES = ("embed_frame.project.weight", "blocks.0.attention.q_norm", "embed_time.rise.weight")


def _num_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    found = [re.match(rf"{re.escape(prefix)}blocks\.(\d+)\.", name) for name in state]
    return 1 + max(int(match.group(1)) for match in found if match)


def read_reference(state: Mapping[str, Tensor], config: ReferenceConfig) -> Diffuser:
    """Build the model of a state dict in the layout of the release or of FAR.

    Raises:
        ValueError: weights are missing, unknown, or do not fit the layout or the latent shape.
    """
    renamed = our_names(state)
    model = build(config_of(renamed, config))
    check_state(model, renamed, "the state dict")
    model.load_state_dict(renamed)
    return model.eval()


def convert_reference(source: str, out: str, config: ReferenceConfig) -> Path:
    """Turn a state dict of the release or of FAR into a folder that `from_pretrained` reads."""
    folder = Path(out)
    refuse_used(folder)
    model = read_reference(read_state_dict(source, config.key), config)
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True, kw_only=True)
class ConvertAutoencoderConfig:
    """One state dict of an autoencoder."""

    file: str = ""
    """State dict of FAR's deep-compression autoencoder: .pth or .safetensors."""
    out: str = ""
    """Folder to write, as diffusers and `scd encode` read it; it must not exist, or be empty."""
    scale: float = FAR_SCALE
    """Factor that brings its latents to unit scale; FAR uses the same for every collection."""
    key: str = ""
    """Name of the state dict inside the file, where it lies in a dictionary."""

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale must be above 0, got {self.scale}")


def convert_autoencoder(config: ConvertAutoencoderConfig) -> Path:
    """Write the folder of an autoencoder.

    Raises:
        ValueError: the file is damaged, weights are missing or unknown or of another shape, or
            diffusers is not installed.
    """
    if not config.file or not config.out:
        raise ValueError("scd convert autoencoder needs a state dict and --out")
    folder = Path(config.out)
    refuse_used(folder)
    state = read_state_dict(config.file, config.key)
    network = new_network(settings_of(state, config.scale))
    check_state(network, state, config.file)
    network.load_state_dict(state)
    with written_aside(folder) as aside:
        save_network(network, aside)
    return folder
