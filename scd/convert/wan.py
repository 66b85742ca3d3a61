"""`scd convert wan`: weights of Wan2.1 into a separable causal world, or into a dense one.

Tensors are copied one after another: memory holds at most one file. Source: paper (composition).
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scd.autoencoders.config import FRAMES_PER_LATENT, WanAutoencoderConfig
from scd.autoencoders.wan import WAN, wan_shape_of
from scd.common.config import to_json
from scd.common.files import refuse_used, written_aside
from scd.common.hub import find_part, read_part_config
from scd.common.runtime import DTYPES, derive_seed, without_weights
from scd.common.weights import SHARD_BYTES, check_fit, write_shards
from scd.convert.settings import ConvertWanConfig
from scd.data.source import DataCard, open_source
from scd.data.spaces import ConditionSpec
from scd.models.build import build, frame_cost
from scd.models.checkpoint import read_world_parts, resolve, write_world_settings
from scd.models.config import CacheConfig, FrameShape, SamplingConfig
from scd.models.cost import Load
from scd.models.kinds import ModelConfig
from scd.models.lora import LoraFile
from scd.models.wan.config import (
    FEW_STEPS,
    SHIFT,
    WanConfig,
    WanDecoderConfig,
    WanEncoderConfig,
    WanSeparableConfig,
)
from scd.models.wan.separable import places_of
from scd.models.wan.source import PARTS, WanFound, WanSource, read_sizes
from scd.models.wan.source import open_source as open_weights
from scd.models.wan.timesteps import warped_times
from scd.models.wan.transformer import WanActions
from scd.models.weights import CONFIG_FILE, WEIGHTS_FILE
from scd.probing.interventions import proposed_layers

LIKE_ACTIONS = "condition_embedder.time_proj.weight"
"""Weight in whose type those of actions are stored."""

logger = logging.getLogger(__name__)

_SWITCHES = ("encoder_noise", "lowest_time", "encoder_shift", "join", "context_time")


def convert_wan(config: ConvertWanConfig) -> Path:
    """Write a world of Wan's weights.

    Raises:
        FileExistsError: `out` holds something.
        FileNotFoundError: the source is not there or not whole, or the hub cannot be reached.
        ValueError: a model of another family, a split into layers that are not there, frames that
            cannot be cut into tokens, a setting that has no effect, or weights of a type or shape
            that does not fit.
    """
    if not config.model or not config.out:
        raise ValueError("scd convert wan needs --model and --out")
    folder = Path(config.out)
    refuse_used(folder)
    split = read_split(config.split, config.unrecommended)
    source = open_weights(config.model, config.key, config.head_dim)
    actions = read_actions(config.actions, source.fps)
    model = model_config(config, source, split, None if actions is None else actions.conditions)
    autoencoder = _autoencoder(config, source)
    card = DataCard(
        height=config.height,
        width=config.width,
        fps=source.fps if actions is None else actions.fps,
        conditions=model.conditions,
        action_names=() if actions is None else actions.action_names,
        pixel_art=actions is not None and actions.pixel_art,
        key_map=() if actions is None else actions.key_map,
    )
    _check(source, model)
    lora = LoraFile.read(config.lora) if config.lora else None
    if lora is not None:
        lora.check(source.block, source.num_layers, source.names, config.model)
    with source.weights as weights, written_aside(folder) as aside:
        write_world_settings(aside, model, autoencoder, card, _sampling(config, source))
        dtype = DTYPES.get(config.dtype)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, theirs in source.names.items():
                places = _places(name, source, model)
                if places:
                    tensor = weights.get(theirs)
                    tensor = tensor if lora is None else lora.added_to(name, tensor)
                    tensor = tensor if dtype is None else tensor.to(dtype)
                    yield from ((place, tensor) for place in places)
                    if name == LIKE_ACTIONS:
                        yield from _first_weights(model, tensor.dtype)

        write_shards(tensors(), aside, WEIGHTS_FILE.removesuffix(".safetensors"), SHARD_BYTES)
        if config.copy_parts and source.folder is not None:
            for part in PARTS:
                shutil.copytree(find_part(config.model, part), aside / part)
    return folder


def plan_wan(config: ConvertWanConfig) -> dict[str, Any]:
    """Work out how large a world would be and what a latent frame of it costs, without weights.

    Raises:
        FileNotFoundError, ValueError: as `convert_wan`, of what is known without weights.
    """
    if not config.model:
        raise ValueError("scd convert wan --dry-run needs --model")
    split = read_split(config.split, config.unrecommended)
    source = read_sizes(config.model, config.key, config.head_dim)
    actions = read_actions(config.actions, source.fps)
    model = model_config(config, source, split, None if actions is None else actions.conditions)
    cost = frame_cost(model, Load(num_context_frames=config.window, bytes_per_value=2))
    whole, gib = frame_cost(model, Load(num_context_frames=1, bytes_per_value=1)), 2**30
    return {
        "model": to_json(model),
        "fps": source.fps if actions is None else actions.fps,
        "tokens_per_latent_frame": model.shape.num_tokens,
        "parameters": whole.weight_bytes,
        "bf16_gib": {
            "weights": cost.weight_bytes / gib,
            "keys_and_values_of_a_stream": cost.cache_bytes / gib,
        },
        "flops_per_latent_frame": {
            f"{steps} steps": cost.flops(steps)
            for steps in dict.fromkeys((1, len(FEW_STEPS), config.num_steps))
        },
        "about": "computed for the newest frame of a full window; in blocks of frames, for a whole "
        "block. Two operations are one multiplication with its addition. Without the autoencoder, "
        "the text encoder and the activations of a pass.",
    }


def read_actions(actions: str, fps: float) -> DataCard | None:
    """Return a card with the actions that `--actions` names; None: there are none.

    Args:
        actions: clips, latents or a world; or a number of actions to choose from.
        fps: of the world, where only a number is named.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: what it names has no actions.
    """
    if not actions:
        return None
    if actions.isdecimal():
        spec = ConditionSpec(num_actions=int(actions))
        names = tuple(f"action {number}" for number in range(spec.num_actions))
        card = DataCard(height=1, width=1, fps=fps, conditions=spec, action_names=names)
    else:
        card = _card_of(actions)
    if not card.conditions.has_actions:
        raise ValueError(
            f"{actions} has no actions: --actions names clips, latents or a world that has, or how "
            "many there are to choose from"
        )
    return replace(card, conditions=card.conditions.of_actions)


def _card_of(place: str) -> DataCard:
    with suppress(FileNotFoundError):
        return read_world_parts(resolve(place))["card"]
    return open_source(place, "train", latents=True).card


def _first_weights(model: ModelConfig, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of actions, which Wan does not have: the same in all parts, always the
    same, and without effect until they are trained."""
    if not model.conditions.has_actions:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(0, "weights of actions"))
        weights = WanActions(model.conditions, model.block.width).state_dict()
    for part in ("encoder.", "decoder.") if model.is_separable else ("",):
        for name, weight in weights.items():
            yield f"{part}condition_embedder.action_embedder.{name}", weight.to(dtype).clone()


def read_split(split: str, unrecommended: bool = False) -> tuple[int, int, int] | None:
    """Return numbers of layers: the encoder's first, the decoder's first and its last; None: dense.

    Args:
        split: "25,5+5", a probe.json, or "dense".
        unrecommended: take that of a probe that recommends none.
    """
    if split == "dense":
        return None
    found = re.fullmatch(r"(\d+),(\d+)\+(\d+)", split.replace(" ", ""))
    if found is not None:
        return int(found[1]), int(found[2]), int(found[3])
    if not split.endswith(".json"):
        raise ValueError(
            f'split must be like "25,5+5" (encoder, then first+last of the decoder), a probe.json, '
            f'or "dense", got {split!r}'
        )
    encoder, decoder = proposed_layers(Path(split), unrecommended)
    num_first = next(
        (place for place, layer in enumerate(decoder) if layer != place + 1), len(decoder)
    )
    rest = decoder[num_first:]
    if any(after != layer + 1 for layer, after in pairwise(rest)):
        raise ValueError(f"{split}: a decoder is the first and the last layers, got {decoder}")
    return encoder, num_first, len(rest)


def model_config(
    config: ConvertWanConfig,
    source: WanFound,
    split: tuple[int, int, int] | None,
    actions: ConditionSpec | None = None,
) -> WanConfig | WanSeparableConfig:
    """Return the settings of the model that the weights become, and actions besides."""
    cell = _cell_size(source)
    step = cell * source.patch_size
    if config.height % step or config.width % step:
        raise ValueError(
            f"height and width must be multiples of {step} (latent cells of {cell} pixels in "
            f"patches of {source.patch_size}), got {config.height}x{config.width}"
        )
    shape = FrameShape(
        channels=source.channels,
        height=config.height // cell,
        width=config.width // cell,
        patch_size=source.patch_size,
    )
    shared: Any = dict(
        shape=shape,
        block=source.block,
        conditions=_conditions(config, source, actions),
        cache=CacheConfig(window=config.window, num_sinks=config.num_sinks, rebase_sinks=False),
    )
    if split is None:
        if any(getattr(config, name) != getattr(ConvertWanConfig, name) for name in _SWITCHES):
            raise ValueError(f"{', '.join(_SWITCHES)} have no effect on split=dense")
        frames = config.frames_per_block
        return WanConfig(num_layers=source.num_layers, frames_per_block=frames, **shared)
    if config.frames_per_block != 1:
        raise ValueError("frames_per_block has an effect with split=dense only")
    encoder, first, last = split
    if not 1 <= encoder <= source.num_layers or not 1 <= first + last <= source.num_layers:
        raise ValueError(
            f"split {config.split!r} names {encoder} layers for the encoder and {first}+{last} for "
            f"the decoder, but {config.model} has {source.num_layers}"
        )
    return WanSeparableConfig(
        encoder=WanEncoderConfig(
            num_layers=encoder,
            noise=config.encoder_noise,
            lowest_time=config.lowest_time,
            shift=config.encoder_shift,
        ),
        decoder=WanDecoderConfig(
            num_first=first,
            num_last=last,
            join=config.join,
            context_time=config.context_time,
        ),
        **shared,
    )


def _conditions(
    config: ConvertWanConfig, source: WanFound, actions: ConditionSpec | None
) -> ConditionSpec:
    """Return the text that steers a world, and the actions of its latent frames."""
    spec = source.conditions(config.text_length)
    if actions is None:
        return spec
    return replace(
        actions,
        text_length=spec.text_length,
        text_dim=spec.text_dim,
        actions_per_frame=FRAMES_PER_LATENT,
    )


def _cell_size(source: WanFound) -> int:
    """Return the pixels per latent cell of the autoencoder beside the weights."""
    if source.folder is None or not (source.folder / "vae").is_dir():
        return source.cell_size
    folder = find_part(source.folder, "vae", (WAN,), "autoencoder")
    settings = read_part_config(folder)
    channels, cell_size = wan_shape_of(settings, str(folder / CONFIG_FILE))
    if channels != source.channels:
        raise ValueError(
            f"{source.folder}: its transformer works on latents of {source.channels} channels, its "
            f"vae/ makes latents of {channels}"
        )
    return cell_size


def _autoencoder(config: ConvertWanConfig, source: WanSource) -> WanAutoencoderConfig:
    """Store the path of autoencoder and text encoder: the source, the world itself, or none."""
    place, folder = "", source.folder
    if folder is not None:
        if config.copy_parts:
            place = str(Path(config.out).resolve())
        elif not Path(config.model).is_dir():
            place = config.model
        elif any((folder / part).is_dir() for part in PARTS):
            place = str(folder.resolve())
    return WanAutoencoderConfig(
        source=place, channels=source.channels, cell_size=_cell_size(source)
    )


def _sampling(config: ConvertWanConfig, source: WanSource) -> SamplingConfig:
    if not source.is_causal:
        shift = source.flow_shift
        if shift is not None and shift != SHIFT:
            logger.warning(
                "%s: its scheduler bends the denoising steps by flow_shift %g, and so does the "
                "world; training draws its times with --objective.shift, %g unless it is set",
                source.folder,
                shift,
                SHIFT,
            )
        if shift == 1:
            return SamplingConfig(num_steps=config.num_steps)
        return SamplingConfig(num_steps=config.num_steps, schedule="shifted", shift=shift or SHIFT)
    times = warped_times(FEW_STEPS)
    return SamplingConfig(num_steps=len(times), schedule="listed", times=times, solver="renoise")


def _check(source: WanSource, model: ModelConfig) -> None:
    """Refuse weights of another shape or type, by headers alone (ValueError)."""
    whole = WanConfig(
        shape=model.shape,
        block=source.block,
        conditions=source.conditions(model.conditions.text_length),
        cache=model.cache,
        num_layers=source.num_layers,
    )
    with without_weights():
        check_fit(build(whole), source.headers(), str(source.weights.path), source.named)


def _places(name: str, source: WanSource, model: Any) -> list[str]:
    return places_of(name, source.num_layers, model) if model.is_separable else [name]
