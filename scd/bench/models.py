"""What can be timed: the named runs, the shapes of Wan2.1, or a trained world; and how it is built.

Speed does not depend on the weights, so all but a trained world have random ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.config import PixelConfig
from scd.common.config import from_json
from scd.common.runtime import make_generator, without_weights
from scd.data.source import DataCard
from scd.data.spaces import ConditionSpec
from scd.models.build import Diffuser, build
from scd.models.checkpoint import World, load_world, resolve
from scd.models.config import (
    BlockConfig,
    CacheConfig,
    DecoderConfig,
    DenseConfig,
    EncoderConfig,
    FrameShape,
    Join,
    SamplingConfig,
    SeparableConfig,
)
from scd.models.kinds import ModelConfig
from scd.models.wan.config import WanConfig, WanSeparableConfig
from scd.models.weights import CONFIG_FILE, read_settings
from scd.training.presets import PRESETS

_WAN_SHAPE = FrameShape(channels=16, height=60, width=104, patch_size=2)
_WAN_BLOCK = BlockConfig(width=1536, head_dim=128, rotary_axes=(44, 42, 42))
_WAN_CACHE = CacheConfig(window=21, num_sinks=0)
"""81 frames of video are 21 latent ones."""

WAN_MODELS: dict[str, WanConfig | WanSeparableConfig] = {
    "wan-1.3b": WanSeparableConfig(),
    "wan-1.3b-dense": WanConfig(),
}
"""Wan2.1 1.3B at 480x832: encoder of 25 layers and decoder of 5 + 5, and all 30 at every step."""

WAN_SHAPES: dict[str, ModelConfig] = {
    "wan-shape": SeparableConfig(
        shape=_WAN_SHAPE,
        block=_WAN_BLOCK,
        encoder=EncoderConfig(num_layers=25),
        decoder=DecoderConfig(num_layers=10),
        conditions=ConditionSpec(),
        cache=_WAN_CACHE,
    ),
    "wan-shape-dense": DenseConfig(
        shape=_WAN_SHAPE,
        block=_WAN_BLOCK,
        num_layers=30,
        conditions=ConditionSpec(),
        cache=_WAN_CACHE,
    ),
}
"""Layers, width and tokens of Wan2.1 1.3B, in blocks of ours."""

WAN_NOTE = (
    "shape only: the layers, width, heads and 1,560 tokens per frame of Wan2.1 1.3B at 480x832, "
    "made of this project's blocks: no text cross-attention, an MLP of 4 times the width (Wan's is "
    "5.8 times), no autoencoder"
)
WAN_MODEL_NOTE = "latents only: the video autoencoder and the text encoder are not timed here"
NORMS = ("q_norm", "k_norm", "norm_q.weight", "norm_k.weight", "norm2.weight")
"""Ends of the names of weights that scale what was normalised."""
CELL = 8
"""Pixels along a latent cell of Wan."""
LATENT_NOTE = "latents without an autoencoder: end to end ends at latents"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that can be timed."""

    name: str
    """As asked for: a preset, a shape, or a folder."""
    config: ModelConfig
    """Of the network."""
    folder: str | None
    """Of a trained world; None: random weights."""
    note: str
    """What a reader of its numbers must know; may be empty."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How a trained world denoises a frame."""

    @property
    def has_pixels(self) -> bool:
        """Whether its latents can be turned into pixels here."""
        if self.config.takes_text:
            # Its autoencoder makes four frames of a latent one, and remembers those before.
            return False
        return self.folder is not None or self.config.shape.channels == 3

    def load(self, device: torch.device, dtype: torch.dtype) -> World:
        """Return the world: trained, or of random weights, whose card is made up."""
        if self.folder is not None:
            world = load_world(self.folder, device=device)
            world.model.to(dtype)
            if not self.has_pixels:
                world.autoencoder = NoAutoencoder()
            return world
        shape, spec = self.config.shape, self.config.conditions
        names = tuple(map(str, range(spec.num_actions or spec.action_dim)))
        return World(
            model=random_model(self.config, device, dtype),
            autoencoder=PixelAutoencoder(PixelConfig()) if self.has_pixels else NoAutoencoder(),
            card=DataCard(
                height=shape.height,
                width=shape.width,
                fps=10.0,
                conditions=spec,
                action_names=names,
            ),
            sampling=self.sampling,
        )


class NoAutoencoder(PixelAutoencoder):
    """For latents that nothing here can decode: their first three channels stand for colours."""

    def __init__(self) -> None:
        super().__init__(PixelConfig())

    def decode(self, latents: Tensor) -> Tensor:
        return latents[..., :3, :, :]


def find_subject(name: str, join: Join | None = None) -> Subject:
    """Find a model by name.

    Args:
        name: a preset, a shape, or the folder of a run or world; of Wan models also with their size
            in pixels, "wan-1.3b@256x448".
        join: of the decoder, in place of the model's own.

    Raises:
        ValueError: nothing has that name, or the model's join cannot be changed.
        FileNotFoundError: the folder holds no world.
    """
    folder, note, sampling = None, "", SamplingConfig()
    if name in PRESETS:
        config = PRESETS[name].model
        note = LATENT_NOTE if config.shape.channels != 3 else ""
    elif name.partition("@")[0] in WAN_MODELS:
        config, note = _wan_model(name), WAN_MODEL_NOTE
    elif name in WAN_SHAPES:
        config, note = WAN_SHAPES[name], WAN_NOTE
    elif "/" in name or name.startswith("."):
        folder = str(resolve(name))
        path = resolve(name) / CONFIG_FILE
        settings = read_settings(path)
        config = from_json(ModelConfig, settings["model"], f"{path}: model")
        sampling = from_json(SamplingConfig, settings.get("sampling"), f"{path}: sampling")
    else:
        names = ", ".join([*PRESETS, *WAN_MODELS, *WAN_SHAPES])
        raise ValueError(f"unknown model {name!r}; there are {names}, or the folder of a run (a/b)")
    if join is not None:
        config = _with_join(name, config, join, trained=folder is not None)
    return Subject(name=name, config=config, folder=folder, note=note, sampling=sampling)


def _wan_model(name: str) -> WanConfig | WanSeparableConfig:
    kind, _, size = name.partition("@")
    config = WAN_MODELS[kind]
    if not size:
        return config
    found = re.fullmatch(r"(\d+)x(\d+)", size)
    step = CELL * config.shape.patch_size
    if found is None or int(found[1]) % step or int(found[2]) % step or "0" in found.groups():
        raise ValueError(
            f"the size in {name!r} must be rows x columns of pixels, multiples of {step}, "
            "as 256x448"
        )
    height, width = int(found[1]) // CELL, int(found[2]) // CELL
    return replace(config, shape=replace(config.shape, height=height, width=width))


def _with_join(name: str, config: ModelConfig, join: Join, trained: bool) -> ModelConfig:
    if not isinstance(config, SeparableConfig):
        raise ValueError(f"join={join!r} has no effect on {name}, a dense model")
    if trained and join != config.decoder.join:
        raise ValueError(f"{name} was trained with join={config.decoder.join!r}, not {join!r}")
    return replace(config, decoder=replace(config.decoder, join=join))


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Diffuser:
    """Build a model whose weights are all off zero, at once in its type and place.

    No weight exists twice or in another type, so building it takes no more memory than it.
    """
    with without_weights():
        model = build(config).to(dtype)
    model.to_empty(device=device)
    generator = make_generator(0, "random weights", device=device)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(NORMS):
                weight.fill_(1)
            else:
                weight.normal_(0, 0.02, generator=generator)
    return model.eval()
