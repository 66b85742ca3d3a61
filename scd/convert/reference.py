"""State dicts of the paper's release and of FAR: a world model, or FAR's autoencoder.

`scd convert reference` and `scd convert autoencoder`. A state dict lacks settings, which are
inferred from the names and shapes of its weights. FAR's autoencoders are copies of diffusers'
AutoencoderDC, with the same names. Source of the layouts: the release's and FAR's code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from scd.autoencoders.deep_compression import settings_of
from scd.autoencoders.diffusers import new_network, save_network
from scd.common.files import refuse_used, written_aside
from scd.common.runtime import without_weights
from scd.common.weight_names import Renaming
from scd.common.weights import check_fit, headers, read_state_dict
from scd.convert.settings import ConvertAutoencoderConfig, ReferenceConfig
from scd.data.spaces import ConditionSpec
from scd.models.build import Diffuser, build
from scd.models.config import (
    BlockConfig,
    DecoderConfig,
    DenseConfig,
    EncoderConfig,
    FrameShape,
    Join,
    SeparableConfig,
)

_STACK = (
    ("x_embedder.", "embed_frame.project."),
    ("timestep_embedder.linear_1.", "embed_time.rise."),
    ("timestep_embedder.linear_2.", "embed_time.mix."),
    ("action_embedder.embedding_table.", "embed_conditions.actions."),
    ("label_embedder.embedding_table.", "embed_conditions.labels."),
    ("transformer_blocks.{n}.norm1.linear.", "blocks.{n}.attention_modulation.linear."),
    ("transformer_blocks.{n}.norm2.linear.", "blocks.{n}.mlp_modulation.linear."),
    ("transformer_blocks.{n}.attn.norm_q.weight", "blocks.{n}.attention.q_norm"),
    ("transformer_blocks.{n}.attn.norm_k.weight", "blocks.{n}.attention.k_norm"),
    ("transformer_blocks.{n}.attn.to_out.0.", "blocks.{n}.attention.to_out."),
    ("transformer_blocks.{n}.attn.to_q.", "blocks.{n}.attention.to_q."),
    ("transformer_blocks.{n}.attn.to_k.", "blocks.{n}.attention.to_k."),
    ("transformer_blocks.{n}.attn.to_v.", "blocks.{n}.attention.to_v."),
    ("transformer_blocks.{n}.mlp.net.0.proj.", "blocks.{n}.mlp.0."),
    ("transformer_blocks.{n}.mlp.net.2.", "blocks.{n}.mlp.2."),
    ("proj_out.", "head.project."),
    ("decoder_input_proj.", "merge."),
    ("decoder_alignment.0.", "align_norm."),
    ("decoder_alignment.1.", "align."),
)
"""Beginnings of names inside one stack of blocks: the release's, and ours."""

_NAMES = {
    # The encoder ends in its output norm; in the others the norm belongs to the head.
    side: Renaming((*_STACK, ("norm_out.linear.", f"{norm}.linear.")))
    for side, norm in (
        ("encoder.", "output_modulation"),
        ("decoder.", "head.modulation"),
        ("", "head.modulation"),
    )
}


def our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the release (encoder and decoder) or of FAR (one stack) to ours."""
    renamed = {}
    for name, tensor in state.items():
        side, rest = _side_of(name)
        ours = side + (_NAMES[side].to_ours(rest) or rest)
        if ours in renamed:
            raise ValueError(f"{name!r} is the weight {ours!r} of ours, which is there already")
        renamed[ours] = tensor
    return renamed


def their_name(name: str) -> str:
    """Turn our name of a weight into the release's; one that is not known stays as it is."""
    side, rest = _side_of(name)
    return side + (_NAMES[side].to_theirs(rest) or rest)


def _side_of(name: str) -> tuple[str, str]:
    side = next(side for side in _NAMES if name.startswith(side))
    return side, name.removeprefix(side)


def config_of(
    state: Mapping[str, Tensor], config: ReferenceConfig
) -> SeparableConfig | DenseConfig:
    """Infer a model's settings from the shapes of its weights, which have our names."""
    dense = "head.project.weight" in state
    stacks = ("",) if dense else ("encoder.", "decoder.")
    probes = [f"{stack}{part}" for stack in stacks for part in _PROBES]
    missing = [name for name in probes if name not in state]
    if missing:
        raise ValueError(
            "not a state dict of the release or of FAR: no weight "
            f"{[their_name(name) for name in missing[:3]]}; it holds "
            f"{sorted(map(their_name, state))[:3]} ..."
        )
    first = stacks[0]
    _check_axes({name: state[name] for name in probes}, (2, 1, 2) * len(stacks))
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
    if any(one is not None and one.ndim != 2 for one in tables.values()):
        raise ValueError("the tables of actions and labels must have 2 axes")
    # The last row of a table is the null embedding.
    sizes: dict[str, Any] = {
        f"num_{name}": 0 if one is None else len(one) - 1 for name, one in tables.items()
    }
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


def _check_axes(state: Mapping[str, Tensor], ranks: Sequence[int]) -> None:
    for (name, tensor), rank in zip(state.items(), ranks, strict=True):
        if tensor.ndim != rank or not tensor.numel():
            raise ValueError(
                f"{their_name(name)!r} must have {rank} axes and some numbers, got "
                f"{list(tensor.shape)}"
            )


_PROBES = ("embed_frame.project.weight", "blocks.0.attention.q_norm", "embed_time.rise.weight")


def _num_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    found = [re.match(rf"{re.escape(prefix)}blocks\.(\d+)\.", name) for name in state]
    return 1 + max(int(match.group(1)) for match in found if match)


def read_reference(
    state: Mapping[str, Tensor], config: ReferenceConfig, where: str = "the state dict"
) -> Diffuser:
    """Build the model of a state dict in the layout of the release or of FAR.

    Raises:
        ValueError: weights are missing, unknown, or do not fit the layout or the latent shape.
    """
    try:
        renamed = our_names(state)
        with without_weights():
            model = build(config_of(renamed, config))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    check_fit(model, headers(renamed), where, their_name)
    model.load_state_dict(renamed, assign=True)
    return model.eval()


def convert_reference(source: str, out: str, config: ReferenceConfig) -> Path:
    """Turn a state dict of the release or of FAR into a folder that `from_pretrained` reads."""
    folder = Path(out)
    refuse_used(folder)
    model = read_reference(read_state_dict(source, config.key), config, source)
    model.save_pretrained(folder)
    return folder


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
    try:
        settings = settings_of(state, config.scale)
    except ValueError as error:
        raise ValueError(f"{config.file}: {error}") from error
    network = new_network(settings)
    check_fit(network, headers(state), config.file)
    network.load_state_dict(state)
    with written_aside(folder) as aside:
        save_network(network, aside)
    return folder
