"""What a stream does of a separable world, as modules that are traced: one stream, static shapes.

Each graph takes and returns tensors alone. Whoever runs them keeps the ring of keys and values, the
positions and the solver, as `scd.export.onnx_engine` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scd.autoencoders.base import Autoencoder
from scd.data.clip import Conditions
from scd.data.spaces import ConditionSpec
from scd.models.attention import explicit_attention
from scd.models.block import Attend, with_keys_values
from scd.models.checkpoint import World
from scd.models.config import SeparableConfig
from scd.models.decoder import FrameDecoder, Prepared
from scd.models.encoder import CausalEncoder


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A module with an example of each input, by name, and the names of its outputs."""

    module: nn.Module
    """What is traced."""
    inputs: dict[str, Tensor]
    """In the order in which the module takes them."""
    outputs: tuple[str, ...]
    """In the order in which the module returns them."""


def condition_inputs(spec: ConditionSpec) -> dict[str, Tensor]:
    """Return an example of each input by which a frame is steered; `as_conditions` reads them."""
    inputs: dict[str, Tensor] = {}
    if spec.num_actions:
        inputs["action"] = torch.zeros(1, 1, dtype=torch.int32)
    elif spec.action_dim:
        inputs["action"] = torch.zeros(1, 1, spec.action_dim)
    if spec.has_actions:
        inputs["hidden_action"] = torch.zeros(1, 1, dtype=torch.bool)
    if spec.is_composite:
        inputs["hidden_parts"] = torch.zeros(1, 1, len(spec.action_parts), dtype=torch.bool)
    if spec.num_labels:
        inputs["label"] = torch.zeros(1, dtype=torch.int32)
        inputs["hidden_label"] = torch.zeros(1, dtype=torch.bool)
    return inputs


def as_conditions(names: Sequence[str], values: Sequence[Tensor]) -> Conditions:
    """Join the inputs of `condition_inputs` again."""
    given: dict[str, Tensor] = dict(zip(names, values, strict=True))
    return Conditions(
        actions=given.get("action"),
        labels=given.get("label"),
        null_actions=given.get("hidden_action"),
        null_parts=given.get("hidden_parts"),
        null_labels=given.get("hidden_label"),
    )


class EncoderStep(nn.Module):
    """The newest frame, its action to come and the ring -> its context, and its row of the ring."""

    def __init__(self, encoder: CausalEncoder, names: Sequence[str]) -> None:
        super().__init__()
        self.encoder, self.names = encoder, tuple(names)

    def forward(
        self,
        frame: Float[Tensor, "1 c h w"],
        is_start: Any,
        cosine: Float[Tensor, "n half"],
        sine: Float[Tensor, "n half"],
        keys: Float[Tensor, "layers 1 k ring e"],
        values: Float[Tensor, "layers 1 k ring e"],
        bias: Float[Tensor, " slots"],
        *steering: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the encoder for one row.

        Args:
            frame: newest one; not read at the start.
            is_start: whether the row is that of the learned start frame; of a model without one
                there is no such input, and None.
            cosine: rotary table of the row's tokens.
            sine: the same.
            keys: of the frames before, rotated, slot by slot.
            values: of the same.
            bias: added to the logits of each slot, and behind them of the row itself: minus
                infinity, or nearly, where a slot is empty or is written now.
            steering: as `condition_inputs`.
        """
        encoder = self.encoder
        x = encoder.embed_frame(frame[:, None])
        if is_start is not None:
            assert encoder.start is not None
            x = torch.where(is_start, encoder.start[None, None], x)
        embedding = encoder.embedding(x, as_conditions(self.names, steering))
        size = encoder.shape.num_tokens
        mask = bias[:, None].expand(-1, size).reshape(1, -1).expand(size, -1)
        new_keys, new_values = [], []
        for layer, block in enumerate(encoder.blocks):
            read = _over_ring(keys[layer], values[layer], mask)
            x, k, v = with_keys_values(block, x, embedding, (cosine, sine), read)
            new_keys.append(k)
            new_values.append(v)
        context = encoder.finished(x, embedding)
        rows = torch.stack(new_keys), torch.stack(new_values)
        return context.tokens[:, 0], context.norm_scale[:, 0], *rows


def _over_ring(keys: Tensor, values: Tensor, mask: Tensor) -> Attend:
    def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return explicit_attention(q, torch.cat([keys, k], 2), torch.cat([values, v], 2), mask)

    return read


class StartlessEncoderStep(EncoderStep):
    """The same of a model without a learned start frame, which has no input `is_start`."""

    def forward(self, frame: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Run the encoder for one row; see EncoderStep."""
        return super().forward(frame, None, *inputs)


class Prepare(nn.Module):
    """A context and the frame's action -> all of it that does not change over denoising steps."""

    def __init__(self, decoder: FrameDecoder, names: Sequence[str]) -> None:
        super().__init__()
        self.decoder, self.names = decoder, tuple(names)

    def forward(self, context: Float[Tensor, "1 n d"], *steering: Tensor) -> tuple[Tensor, ...]:
        """Return what `prepared_names` names."""
        prepared = self.decoder.prepare(context, as_conditions(self.names, steering))
        parts = []
        if prepared.keys_values:
            keys, values = zip(*prepared.keys_values, strict=True)
            parts += [torch.stack(keys), torch.stack(values)]
        else:
            parts.append(prepared.tokens)
        return (*parts, *([] if prepared.steering is None else [prepared.steering]))


def prepared_names(config: SeparableConfig) -> tuple[str, ...]:
    """Name what `Prepare` returns and `Velocity` takes."""
    is_prefix = config.decoder.join == "prefix"
    names = ("prefix_keys", "prefix_values") if is_prefix else ("context_tokens",)
    return (*names, "steering") if config.conditions.is_steered else names


class Velocity(nn.Module):
    """A noisy frame, its time and what was prepared -> its velocity."""

    def __init__(self, decoder: FrameDecoder, names: Sequence[str]) -> None:
        super().__init__()
        self.decoder, self.names = decoder, tuple(names)

    def forward(
        self,
        noisy: Float[Tensor, "1 c h w"],
        time: Float[Tensor, "1"],
        ticks: Float[Tensor, "1"],
        *prepared: Tensor,
    ) -> Float[Tensor, "1 c h w"]:
        """Run the decoder once. Ticks come from outside, as `ticks_of` makes them of float64: GPUs
        of browsers have none."""
        parts = dict(zip(self.names, prepared, strict=True))
        pairs: list[tuple[Tensor, Tensor]] = []
        if "prefix_keys" in parts:
            keys, values = parts["prefix_keys"], parts["prefix_values"]
            pairs = list(zip(keys.unbind(0), values.unbind(0), strict=True))
        decoder = self.decoder
        # With a prefix the decoder reads no tokens of the context.
        unread = noisy.new_zeros(1, 1, decoder.shape.num_tokens, decoder.block.width)
        tokens, steering = parts.get("context_tokens", unread), parts.get("steering")
        prepared_parts = Prepared(tokens=tokens, steering=steering, keys_values=pairs)
        return decoder.denoise(prepared_parts, noisy, time, ticks)


class Decode(nn.Module):
    """A latent frame -> the frame in [-1, 1]."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.network = getattr(autoencoder, "network", None)

    def forward(self, latent: Float[Tensor, "1 c h w"]) -> Float[Tensor, "1 3 h2 w2"]:
        return self.autoencoder.decode(latent[:, None])[:, 0]


class Encode(Decode):
    """A frame in [-1, 1] -> its latent."""

    def forward(self, frame: Float[Tensor, "1 3 h2 w2"]) -> Float[Tensor, "1 c h w"]:
        return self.autoencoder.encode(frame[:, None])[:, 0]


def graphs_of(world: World) -> dict[str, Graph]:
    """Return every graph of a separable world by name."""
    model: Any = world.model
    config, shape, block = model.config, model.config.shape, model.config.block
    steering = condition_inputs(config.conditions)
    num_layers, slots = config.encoder.num_layers, config.cache.window
    ring = num_layers, 1, block.num_heads, slots * shape.num_tokens, block.head_dim
    latent = torch.zeros(1, *shape.shape)
    start = {"is_start": torch.zeros(1, dtype=torch.bool)} if config.encoder.start_frame else {}
    step = EncoderStep if start else StartlessEncoderStep
    encoder_inputs = {
        "frame": latent,
        **start,
        "cosine": torch.ones(shape.num_tokens, block.head_dim // 2),
        "sine": torch.zeros(shape.num_tokens, block.head_dim // 2),
        "keys": torch.zeros(ring),
        "values": torch.zeros(ring),
        "bias": torch.zeros(slots + 1),
        **steering,
    }
    context = torch.zeros(1, shape.num_tokens, block.width)
    prepare, names = Prepare(model.decoder, tuple(steering)), prepared_names(config)
    with torch.no_grad():
        prepared = dict(zip(names, prepare(context, *steering.values()), strict=True))
    denoised = {"noisy": latent, "time": torch.ones(1), "ticks": torch.ones(1), **prepared}
    picture = torch.zeros(1, 3, world.card.height, world.card.width)
    return {
        "encoder": Graph(
            module=step(model.encoder, tuple(steering)),
            inputs=encoder_inputs,
            outputs=("context", "norm_scale", "new_keys", "new_values"),
        ),
        "prepare": Graph(module=prepare, inputs={"context": context, **steering}, outputs=names),
        "velocity": Graph(
            module=Velocity(model.decoder, names), inputs=denoised, outputs=("velocity",)
        ),
        "decode": Graph(
            module=Decode(world.autoencoder), inputs={"latent": latent}, outputs=("frame",)
        ),
        "encode": Graph(
            module=Encode(world.autoencoder), inputs={"frame": picture}, outputs=("latent",)
        ),
    }
