"""A causal video diffuser made of diffusers' Wan blocks, as a subject of the probe.

The weights are those of a WanTransformer3DModel as it is, trained to make one frame after another
by teacher forcing: a frame of latents sees itself and the clean frames before it, which stand at
time 0. Only the attention is ours; the blocks, and all that surrounds them, run as they are.
Source: paper, section 5 (the model that its authors probe).

Needs the extra `wan`: pip install -e ".[wan]".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from scd.data.clip import Conditions
from scd.models.attention import (
    Rotary,
    attend,
    frame_positions,
    join_heads,
    rotary_table,
    rotate,
    split_heads,
)
from scd.models.visibility import FrameCausal
from scd.probing.intercept import Layer
from scd.probing.subject import Subject

TIME_SCALE = 1000
"""What Wan multiplies times by. Source: diffusers' schedulers of flow matching."""

ROTARY_THETA = 1e4
"""Longest wavelength of a position over 2 pi. Source: WanRotaryPosEmbed."""

Process = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention of one layer: from its index, rotated queries and keys, and values, to what is read."""


@dataclass(frozen=True, kw_only=True)
class WanState:
    """What the steps of one frame need."""

    memory: dict[int, tuple[Tensor, Tensor]]
    """Rotated keys and values of all earlier frames, by layer."""
    num_past: int
    """Earlier frames."""


class WanSubject(Subject):
    """Blocks of a WanTransformer3DModel, one frame of latents after another.

    Args:
        transformer: of one frame per token (patch size 1 along time), text to video.
        text: what the text encoder makes of the prompt; the same for all clips.
        height: rows of a latent frame.
        width: columns of a latent frame.

    Raises:
        ValueError: a transformer of another kind, or frames that cannot be cut into its patches.
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        text: Float[Tensor, "words a"],
        height: int,
        width: int,
    ) -> None:
        config: Any = transformer.config
        frames, down, across = config.patch_size
        if frames != 1 or config.added_kv_proj_dim is not None or config.image_dim is not None:
            raise ValueError(
                "needed a text-to-video transformer with one frame per token, got patches of "
                f"{frames} frames, image_dim={config.image_dim} and "
                f"added_kv_proj_dim={config.added_kv_proj_dim}"
            )
        if height % down or width % across:
            raise ValueError(f"frames of {height}x{width} do not make patches of {down}x{across}")
        if text.shape[-1] != config.text_dim:
            raise ValueError(f"the text must have {config.text_dim} entries, got {text.shape[-1]}")
        self.transformer = transformer.eval()
        self.text = text
        self.grid = (height // down, width // across)
        self.tokens_per_frame = self.grid[0] * self.grid[1]
        self.frame_shape = (config.in_channels, height, width)
        self.num_heads = config.num_attention_heads
        self.head_dim = config.attention_head_dim
        self.width = self.num_heads * self.head_dim
        self.layers = [
            Layer(name=f"layer {number}", block=block)
            for number, block in enumerate(transformer.blocks, start=1)
        ]
        self._distances: Sequence[int] | None = None

    def begin(self, past: Float[Tensor, "b t c h w"], conditions: Conditions) -> WanState:
        """Run the clean frames once, each seeing itself and those before it.

        Raises:
            ValueError: conditions other than the text.
        """
        if any(value is not None for value in vars(conditions).values()):
            raise ValueError("a Wan model is steered by its text, but actions or labels were given")
        num_past = past.shape[1]
        memory: dict[int, tuple[Tensor, Tensor]] = {}
        visible = FrameCausal(num_frames=num_past, tokens_per_frame=self.tokens_per_frame)

        def process(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            memory[layer] = (k, v)
            return attend(q, k, v, visible)

        if num_past:
            self._run(past, 0.0, range(num_past), process)
        return WanState(memory=memory, num_past=num_past)

    def velocity(
        self, state: WanState, noisy: Float[Tensor, "b c h w"], time: float
    ) -> Float[Tensor, "b c h w"]:
        """Run all blocks once over the noisy frame, which reads the memory."""
        frames = range(state.num_past, -1, -1)
        distances = [frame for frame in frames for _ in range(self.tokens_per_frame)]

        def process(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if state.num_past:
                past_keys, past_values = state.memory[layer]
                k, v = torch.cat([past_keys, k], dim=2), torch.cat([past_values, v], dim=2)
            self._distances = distances
            try:
                return attend(q, k, v)
            finally:
                self._distances = None

        tokens, embedding = self._run(noisy[:, None], time, [state.num_past], process)
        return self._head(tokens, embedding)

    def key_distances(self, layer: int, num_queries: int, num_keys: int) -> Sequence[int] | None:
        """Tell them of self-attention at a step; attention to the text is not one over frames."""
        return self._distances

    def _run(
        self, frames: Tensor, time: float, positions: Any, process: Process
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens after the last block, and the embedding of the time."""
        model = self.transformer
        batch = frames.shape[0]
        tokens = model.patch_embedding(rearrange(frames, "b t c h w -> b c t h w"))
        tokens = rearrange(tokens, "b d t h w -> b (t h w) d")
        ticks = torch.full((batch,), TIME_SCALE * time, device=frames.device)
        text = self.text.to(tokens).expand(batch, -1, -1)
        embedding, modulation, words, _ = model.condition_embedder(ticks, text)
        modulation = modulation.unflatten(1, (6, -1))
        rotary = self._rotary(list(positions), frames.device)
        with self._attending(process):
            for block in model.blocks:
                tokens = block(tokens, words, modulation, rotary)
        return tokens, embedding

    @contextmanager
    def _attending(self, process: Process) -> Iterator[None]:
        # Their annotation of a processor lists their own classes; any callable will do.
        attentions: list[Any] = [block.attn1 for block in self.transformer.blocks]
        before = [attention.processor for attention in attentions]
        try:
            for layer, attention in enumerate(attentions):
                attention.processor = _processor(layer, self.head_dim, process)
            yield
        finally:
            for attention, processor in zip(attentions, before, strict=True):
                attention.processor = processor

    def _rotary(self, positions: list[int], device: torch.device) -> Rotary:
        space = 2 * (self.head_dim // 6)
        places = frame_positions(torch.tensor(positions, device=device), *self.grid)
        return rotary_table(places, (self.head_dim - 2 * space, space, space), ROTARY_THETA)

    def _head(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        model = self.transformer
        shift, scale = (model.scale_shift_table + embedding[:, None]).chunk(2, dim=1)
        tokens = (model.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens)
        config: Any = model.config
        _, down, across = config.patch_size
        return rearrange(
            model.proj_out(tokens),
            "b (h w) (p q c) -> b c (h p) (w q)",
            h=self.grid[0],
            p=down,
            q=across,
        )


def _processor(layer: int, head_dim: int, process: Process) -> Callable[..., Tensor]:
    """Return what diffusers calls an attention processor, for one layer's self-attention."""

    def processor(attention: Any, x: Tensor, _text: None, _mask: None, rotary: Rotary) -> Tensor:
        q = split_heads(attention.norm_q(attention.to_q(x)), head_dim)
        k = split_heads(attention.norm_k(attention.to_k(x)), head_dim)
        v = split_heads(attention.to_v(x), head_dim)
        read = join_heads(process(layer, rotate(q, rotary), rotate(k, rotary), v))
        return attention.to_out[0](read.type_as(x))

    return processor
