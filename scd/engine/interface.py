"""What a stream of frames needs from a model, whichever way it is computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scd.data.clip import Conditions
from scd.models.config import EncoderNoise, FrameShape, Solver
from scd.models.kinds import ModelConfig


class Engine(ABC):
    """A model that streams. For each frame: `context` once, `denoise` once, `observe` once.

    A state belongs to the engine that began it; its `fork` copies a batch of streams. Any number of
    streams may use one engine, one call at a time: its scratch memory is shared, so it is not for
    several threads at once.
    """

    config: ModelConfig
    """Of the model."""
    shape: FrameShape
    """Of a latent frame."""
    device: torch.device
    """Where the arithmetic happens."""
    dtype: torch.dtype
    """Of weights and KV cache."""
    needs_first_frame: bool
    """Whether a stream must be given its first frame."""

    @abstractmethod
    def begin(
        self,
        clean: Tensor | None,
        conditions: Conditions,
        batch: int = 1,
        window: int | None = None,
    ) -> Any:
        """Start a batch of streams from given frames [b t c h w], or (None) from nothing."""

    encoder_noise: EncoderNoise = "none"
    """What noise `context` needs."""

    @abstractmethod
    def context(self, state: Any, conditions: Conditions, noise: Tensor | None = None) -> Any:
        """Do the causal work of the next frame.

        Args:
            state: of the streams.
            conditions: of the frame, as [b 1].
            noise: that the encoder reads, [b c h w], where `encoder_noise` asks for it.
        """

    def contexts(
        self,
        states: Sequence[Any],
        conditions: Sequence[Conditions],
        noises: Sequence[Tensor | None],
    ) -> list[Any]:
        """Do what `context` does for several states, each of other streams with their own past.

        An engine that can makes the products of all in one call; here it is one after the other.
        """
        return [self.context(*each) for each in zip(states, conditions, noises, strict=True)]

    def with_noisy_branch(self, context: Any, strength: float, noise: Tensor) -> Any:
        """Return a context of twice the batch: corrupted by noise [b n d] first, then as it was.

        Raises:
            ValueError: the model is not separable, so it has no context to corrupt.
        """
        raise ValueError("guidance by context noise needs a separable model")

    @abstractmethod
    def denoise(
        self,
        context: Any,
        noise: Tensor,
        times: Sequence[float],
        solver: Solver = "euler",
        scale: float | None = None,
        step_noise: Tensor | None = None,
    ) -> Tensor:
        """Turn noise [b c h w] into frames.

        Args:
            context: of the b frames; with guidance, of [unconditional ; conditional] ones.
            noise: standard normal.
            times: of the steps, descending from 1 to 0.
            solver: integrator.
            scale: of the guidance; None: none.
            step_noise: noise [steps b c h w] with which each step but the last ends; of the solver
                "renoise" alone.

        Raises:
            ValueError: another number of step noises than the steps need.
        """

    @abstractmethod
    def velocity(self, context: Any, noisy: Tensor, time: Tensor) -> Tensor:
        """Return the velocity of noisy frames [b c h w], each at its time [b]."""

    @abstractmethod
    def observe(self, state: Any, clean: Tensor, conditions: Conditions) -> None:
        """Make frames [b c h w] part of the past."""
