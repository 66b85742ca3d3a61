"""Streams of one case in the steady state: the window is full, and every frame evicts another."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from scd.bench.case import Case
from scd.bench.limits import synchronize
from scd.common.runtime import DTYPES, make_generator
from scd.data.clip import Conditions
from scd.engine.interface import Engine
from scd.engine.open import open_engine
from scd.models.flow import num_fresh, schedule
from scd.models.separable import SeparableState
from scd.streaming.sessions import Lap

GUIDANCE_SCALE, CONTEXT_NOISE = 1.5, 0.05
"""Of guided cases; speed does not depend on them. Source: paper (sampling)."""


class TimedStreams:
    """The streams of one case: `begin` or `fill`, then `frame` again and again."""

    def __init__(self, case: Case, device: torch.device) -> None:
        """Build the engine; `cold_start_s` says how long that took, the weights being there."""
        self.case, self.device = case, device
        model, self.autoencoder = case.subject.load(device, DTYPES[case.precision])
        synchronize(device)
        began = time.perf_counter()
        self.engine = open_engine(model, case.engine, case.precision, release=True)
        synchronize(device)
        self.cold_start_s = time.perf_counter() - began
        self.times = schedule(case.sampling).tolist()
        self.generator = make_generator(0, "bench", device=device)
        self.state: Any = None

    @torch.no_grad()
    def begin(self) -> None:
        """Start from nothing, or from one random frame where the model needs one."""
        self.state = None
        clean, conditions = None, self._lasting
        if self.engine.needs_first_frame:
            clean = self._noise(*self.engine.shape.shape)[:, None]
            conditions = self._conditions()
        if self.case.guidance == "conditions":
            conditions = conditions.with_null_branch()
            clean = None if clean is None else torch.cat([clean, clean])
        self.state = self.engine.begin(clean, conditions, self._num_memories, self.case.context)

    @torch.no_grad()
    def fill(self) -> None:
        """Fill the window with random keys and values, as if so many frames lay behind."""
        self.begin()
        fill_window(self.state, self.engine, self.generator)

    @torch.no_grad()
    def frame(self, lap: Lap = lambda part: None, decode: bool = True) -> Tensor:
        """Make the next frame of all streams, from the action to the pixels and into the past.

        Args:
            lap: is called after each part with its name: encoder, decoder, autoencoder, memory.
            decode: whether latents become pixels.
        """
        engine, guidance = self.engine, self.case.guidance
        conditions = self._conditions()
        if guidance == "conditions":
            conditions = conditions.with_null_branch()
        read = self._noise(*engine.shape.shape) if engine.encoder_noise != "none" else None
        if read is not None and guidance == "conditions":
            read = torch.cat([read, read])
        context = engine.context(self.state, conditions, read)
        if guidance == "context_noise":
            tokens = self._noise(engine.shape.num_tokens, engine.config.block.width)
            context = engine.with_noisy_branch(context, CONTEXT_NOISE, tokens)
        lap("encoder")
        scale = None if guidance == "none" else GUIDANCE_SCALE
        solver, noise = self.case.sampling.solver, self._noise(*engine.shape.shape)
        more = [self._noise(*engine.shape.shape) for _ in range(num_fresh(self.times, solver))]
        fresh = torch.stack(more) if more else None
        latent = engine.denoise(context, noise, self.times, solver, scale, fresh)
        lap("decoder")
        shown = latent
        if self.autoencoder is not None and decode:
            shown = self.autoencoder.decode(latent[:, None])[:, 0].float()
        lap("autoencoder")
        if guidance == "conditions":
            latent = torch.cat([latent, latent])
        engine.observe(self.state, latent, conditions)
        lap("memory")
        return shown

    @property
    def _num_memories(self) -> int:
        return self.case.batch * (2 if self.case.guidance == "conditions" else 1)

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(
            self.case.batch, *shape, generator=self.generator, device=self.device
        ).to(self.engine.dtype)

    @cached_property
    def _lasting(self) -> Conditions:
        """What steers all frames of a stream: label and text."""
        spec, batch, labels, text = self.engine.config.conditions, self.case.batch, None, None
        if spec.num_labels:
            labels = torch.zeros(batch, dtype=torch.long, device=self.device)
        if spec.has_text:
            text = self._noise(spec.text_length, spec.text_dim)
        return Conditions(labels=labels, text=text, null_text=text)

    def _conditions(self) -> Conditions:
        """Return actions of one frame, which come from the machine that the player sits at."""
        spec, batch, actions = self.engine.config.conditions, self.case.batch, None
        if spec.num_actions:
            actions = torch.randint(spec.num_actions, (batch, 1))
        elif spec.action_dim:
            actions = torch.rand(batch, 1, spec.action_dim) * 2 - 1
        return replace(self._lasting, actions=actions).to(self.device)


def fill_window(state: Any, engine: Engine, generator: torch.Generator) -> None:
    """Give streams that just began a full window of random keys and values."""
    cache = state.cache
    for held in (cache.keys, cache.values):
        held[0].normal_(generator=generator)
        held[1:] = held[0]
    first = state.next_position
    cache.reset()
    cache.advance(list(range(first, first + cache.config.window)))
    state.next_position = first + cache.config.window
    if isinstance(state, SeparableState):
        shape = (cache.keys.shape[1], 1, *engine.shape.shape)
        state.newest = torch.randn(
            shape, generator=generator, device=engine.device, dtype=engine.dtype
        )
