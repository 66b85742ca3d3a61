"""What every causal diffuser has: settings, random changes in training, and one interface."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scd.data.clip import Conditions
from scd.data.spaces import ConditionSpec
from scd.models.config import EncoderNoise, FrameShape
from scd.models.embed import Field
from scd.models.kv_cache import KVCache
from scd.models.weights import Pretrained


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes of the input in training; without it a model is a pure function."""

    generator: torch.Generator
    """Source of all draws."""
    condition_dropout: float = 0.0
    """Chance that an action (frame by frame), or a label or text (clip by clip), is hidden; each
    part of an action is hidden alone by the same chance besides."""
    context_noise: float = 0.0
    """Strength eta of the noise on the context. Source: paper, equation 7."""

    def drop(self, conditions: Conditions, spec: ConditionSpec | None = None) -> Conditions:
        """Hide conditions at random; each call draws anew (encoder and decoder separately).

        Args:
            spec: says the parts of actions; None: no part is hidden alone.
        """
        if self.condition_dropout == 0:
            return conditions
        if conditions.actions is not None:
            hidden = self._hidden(conditions.actions.shape[:2], conditions.actions.device)
            if conditions.null_actions is not None:
                hidden = hidden | conditions.null_actions
            conditions = replace(conditions, null_actions=hidden)
            if spec is not None and spec.is_composite:
                shape = torch.Size([*hidden.shape, len(spec.action_parts)])
                parts = self._hidden(shape, hidden.device)
                if conditions.null_parts is not None:
                    parts = parts | conditions.null_parts
                conditions = replace(conditions, null_parts=parts)
        if conditions.labels is not None:
            hidden = self._hidden(conditions.labels.shape, conditions.labels.device)
            if conditions.null_labels is not None:
                hidden = hidden | conditions.null_labels
            conditions = replace(conditions, null_labels=hidden)
        if conditions.text is not None:
            if conditions.null_text is None:
                raise ValueError(
                    "hiding the text at random needs null_text, the embedded empty prompt; "
                    "else condition_dropout must be 0"
                )
            hidden = self._hidden(conditions.text.shape[:1], conditions.text.device)
            text = torch.where(hidden[:, None, None], conditions.null_text, conditions.text)
            conditions = replace(conditions, text=text)
        return conditions

    def _hidden(self, shape: torch.Size, device: torch.device) -> Tensor:
        draw = torch.rand(shape, generator=self.generator, device=self.generator.device)
        return (draw < self.condition_dropout).to(device)

    def noise_like(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        draw = torch.randn(x.shape, generator=self.generator, device=self.generator.device)
        return draw.to(x.device, x.dtype)


@dataclass(kw_only=True)
class State:
    """A batch of streams: what is cached of their past."""

    cache: KVCache
    """Keys and values of past frames."""
    next_position: int
    """Frame position at which the cache is written next."""

    def fork(self, num: int = 1) -> Any:
        """Return an independent copy, each stream `num` times in a row."""
        return replace(self, cache=self.cache.fork(num))


class CausalDiffuser(nn.Module, Pretrained):
    """The interface that all kinds share.

    Training: `model(clean, noisy, time, conditions)`. Streaming: `begin`, then for each frame
    `context` once, `velocity` once per step, `observe` with the finished frame.
    """

    config: Any
    encoder: Any
    decoder: Any
    shape: FrameShape
    """Of a latent frame."""
    encoder_noise: EncoderNoise = "none"
    """What noise `context` needs."""
    needs_first_frame = False
    """Whether a stream must be given its first frame."""

    @property
    def parts(self) -> list[Any]:
        """Stacks of blocks, the one that denoises last."""
        return [self.encoder, self.decoder] if self.config.is_separable else [self]

    def transformer_blocks(self) -> list[nn.Module]:
        return [block for part in self.parts for block in part.blocks]

    def denoising_blocks(self) -> nn.ModuleList:
        """Return the blocks that run at every denoising step."""
        return self.parts[-1].blocks

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training recomputes each block instead of keeping what is inside it."""
        return all(part.recomputes for part in self.parts)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        for part in self.parts:
            part.recomputes = value

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that train at the encoder's learning rate: none without an encoder."""
        return self.encoder.parameters() if self.config.is_separable else iter(())

    def field(
        self,
        clean: Float[Tensor, "b t c h w"],
        conditions: Conditions,
        num_noisy: int,
        num_draws: int = 1,
        noise: Float[Tensor, "b r2 m c h w"] | None = None,
    ) -> Field:
        """Return `forward` as a function of noisy frames and times, for many steps on one history.

        Where there is an encoder it runs once, here; else each call runs all of the model.

        Args:
            noise: what an encoder reads that reads noise, for one draw or for all r; None: as in
                `forward` without `augment`.
        """

        def velocity(noisy: Tensor, time: Tensor) -> Tensor:
            assert noisy.shape[1:3] == (num_draws, num_noisy)
            return self(clean, noisy, time, conditions)

        return velocity

    def stream_cache(self, batch: int, window: int | None) -> KVCache:
        """Allocate the KV cache of a batch of streams; window None: the model's own."""
        config = self.config
        cache = config.cache.with_window(window)
        return self.parts[0].new_cache(cache, batch, config.frames_per_block)

    def with_noisy_branch(self, context: Any, strength: float, noise: Tensor) -> Any:
        """Return a context of twice the batch: with corrupted context first, then as it was.

        The unconditional branch of guidance by context noise. Source: paper (sampling).

        Raises:
            ValueError: a dense model has no context to corrupt.
        """
        raise ValueError("guidance by context noise needs a separable model")
