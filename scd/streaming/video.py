"""Streams of video that a text steers: latents from a world, frames from a decoder of its own.

A latent frame stands for several frames of video, so a step gives several frames: see
autoencoder/wan.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scd.autoencoders.base import StreamDecoder
from scd.data.clip import Conditions
from scd.engine.interface import Engine
from scd.models.checkpoint import World
from scd.models.flow import SamplingConfig, num_fresh, schedule
from scd.streaming.rollout import NoiseUse, frame_noise, step_noise


@dataclass(frozen=True, kw_only=True)
class StepTiming:
    """Wall-clock seconds of one step, by part; with a GPU each part is synchronised."""

    context_s: float
    """The causal pass before the denoising."""
    denoise_s: float
    """All denoising steps."""
    decode_s: float
    """Latents to frames."""
    remember_s: float
    """The pass that makes the finished latents part of the past; the frames are out already."""
    num_frames: int
    """Frames of video that came of it."""

    @property
    def denoise_only_s(self) -> float:
        """All of the network, nothing of the autoencoder."""
        return self.context_s + self.denoise_s + self.remember_s

    @property
    def ready_s(self) -> float:
        """From the beginning of the step until its frames are there."""
        return self.context_s + self.denoise_s + self.decode_s

    @property
    def total_s(self) -> float:
        """Sum of the parts."""
        return self.denoise_only_s + self.decode_s


class TextStream:
    """A batch of streams of one world, each steered by a text of its own.

    `begin` once; then `step`, again and again. `steer` gives other texts for what follows, while
    the past stays as it is; `fork` copies. The latents of the newest step are `newest`. The noise
    of latent frame i follows from the seed and i alone.
    """

    def __init__(
        self,
        world: World,
        engine: Engine,
        decoder: StreamDecoder | None,
        seed: int = 0,
        scale: float = 1.0,
        window: int | None = None,
        sampling: SamplingConfig | None = None,
    ) -> None:
        """Prepare to stream.

        Args:
            world: its card and schedule; a world whose model a text steers.
            engine: what runs its model.
            decoder: from latents to frames, from now on this stream's own; None: no frames.
            seed: of the noise.
            scale: of the guidance away from another text; 1: none.
            window: latent frames in memory; None: as the model was trained.
            sampling: steps per frame and the like; None: as the checkpoint says.

        Raises:
            ValueError: a model without text.
        """
        if not engine.config.conditions.has_text:
            raise ValueError("this model is not steered by a text")
        self.world, self.engine, self.decoder = world, engine, decoder
        self.seed, self.scale, self.window = seed, scale, window
        self.sampling = sampling or world.sampling
        self.block_size = engine.config.frames_per_block
        self.num_latents = 0
        self.newest: Tensor | None = None
        self.timing: StepTiming | None = None
        self._state: Any = None
        self._conditions = Conditions()

    @torch.no_grad()
    def begin(
        self,
        text: Float[Tensor, "b l _"],
        null_text: Float[Tensor, "b l _"] | None = None,
        given: Float[Tensor, "b t c h w"] | None = None,
    ) -> Float[Tensor, "b t2 3 h2 w2"]:
        """Start the streams.

        Args:
            text: embedded, of each stream.
            null_text: what guidance leads away from, of each stream; None without guidance.
            given: latents of given first frames; None: from nothing.

        Returns:
            The given frames as the decoder shows them; none from nothing.

        Raises:
            ValueError: texts that do not fit, given latents of another shape, or guidance without a
                null text.
        """
        self.steer(text, null_text)
        batch = text.shape[0]
        if given is not None:
            shape = (batch, given.shape[1], *self.engine.shape.shape)
            if given.shape != shape or given.shape[1] == 0:
                raise ValueError(
                    f"given latents must be {list(shape)}, 1 or more, got {list(given.shape)}"
                )
            given = given.to(self.engine.device, self.engine.dtype)
        both = batch * (2 if self.scale != 1 else 1)
        past = given if given is None or both == batch else torch.cat([given, given])
        self._state = self.engine.begin(past, self._conditions, both, self.window)
        self.num_latents = 0 if given is None else given.shape[1]
        if self.decoder is not None:
            self.decoder.reset()
        return self._show(text.new_zeros(batch, 0) if given is None else given)

    def steer(
        self, text: Float[Tensor, "b l _"], null_text: Float[Tensor, "b l _"] | None = None
    ) -> None:
        """Let other texts steer what follows.

        Raises:
            ValueError: texts that do not fit, or guidance without a null text.
        """
        guided = self.scale != 1
        if guided and null_text is None:
            raise ValueError("guidance needs an embedded text to lead away from")
        if self._state is not None and text.shape[0] != self._num_streams:
            raise ValueError(f"{self._num_streams} streams need as many texts, got {len(text)}")
        conditions = Conditions(text=text, null_text=null_text if guided else None)
        self.engine.config.conditions.check(conditions)
        self._num_streams = text.shape[0]
        conditions = conditions.with_null_branch() if guided else conditions
        assert conditions.text is not None
        placed = conditions.text.to(self.engine.device, self.engine.dtype)
        self._conditions = Conditions(text=placed)

    @torch.no_grad()
    def step(self) -> Float[Tensor, "b t 3 h w"]:
        """Generate the next latent frame, or block of them, of each stream, and its frames.

        Raises:
            ValueError: the streams have not begun.
        """
        if self._state is None:
            raise ValueError("begin the streams first")
        times = schedule(self.sampling).tolist()
        marks = [self._now()]
        noise = self._noise("frame")
        context = self.engine.context(self._state, self._conditions, self._encoder_noise(noise))
        marks.append(self._now())
        latents = self.engine.denoise(
            context,
            noise,
            times,
            self.sampling.solver,
            None if self.scale == 1 else self.scale,
            self._fresh(num_fresh(times, self.sampling.solver)),
        )
        marks.append(self._now())
        self.newest = latents if self.block_size > 1 else latents[:, None]
        frames = self._show(self.newest)
        marks.append(self._now())
        past = latents if self.scale == 1 else torch.cat([latents, latents])
        self.engine.observe(self._state, past, self._conditions)
        self.num_latents += self.block_size
        marks.append(self._now())
        spans = [after - before for before, after in zip(marks, marks[1:], strict=False)]
        self.timing = StepTiming(
            context_s=spans[0],
            denoise_s=spans[1],
            decode_s=spans[2],
            remember_s=spans[3],
            num_frames=frames.shape[1],
        )
        return frames

    def fork(self) -> TextStream:
        """Return an independent copy of the streams as they are; the weights are shared."""
        twin = object.__new__(TextStream)
        vars(twin).update(vars(self))
        twin.decoder = None if self.decoder is None else self.decoder.fork()
        twin._state = None if self._state is None else self._state.fork()
        return twin

    def _show(self, latents: Tensor) -> Tensor:
        parts = []
        if self.decoder is not None:
            parts = [self.decoder.next(latent) for latent in latents.unbind(1)]
        if not parts:
            card = self.world.card
            return torch.zeros(latents.shape[0], 0, 3, card.height, card.width)
        return torch.cat(parts, dim=1)

    def _noise(self, use: NoiseUse) -> Tensor:
        """Draw the noise of a step, [b c h w] or of a block [b frames c h w]."""
        shape = (self._num_streams, *self.engine.shape.shape)
        frames = range(self.num_latents, self.num_latents + self.block_size)
        drawn = [frame_noise(self.seed, frame, use, shape) for frame in frames]
        noise = drawn[0] if self.block_size == 1 else torch.stack(drawn, dim=1)
        return noise.to(self.engine.device)

    def _encoder_noise(self, noise: Tensor) -> Tensor | None:
        kind = self.engine.encoder_noise
        if kind == "none":
            return None
        noise = noise if kind == "same" else self._noise("encoder")
        return noise if self.scale == 1 else torch.cat([noise, noise])

    def _fresh(self, number: int) -> Tensor | None:
        if not number:
            return None
        shape = (self._num_streams, *self.engine.shape.shape)
        frames = range(self.num_latents, self.num_latents + self.block_size)
        drawn = [step_noise(self.seed, frame, number, shape) for frame in frames]
        fresh = drawn[0] if self.block_size == 1 else torch.stack(drawn, dim=2)
        return fresh.to(self.engine.device)

    def _now(self) -> float:
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)
        return time.perf_counter()
