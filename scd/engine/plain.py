"""A model run as it is written: the twin that every fast path is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scd.common.runtime import finest
from scd.data.clip import Conditions
from scd.engine.interface import Engine
from scd.models.build import Diffuser
from scd.models.config import Solver
from scd.models.flow import guided, solve


class PlainEngine(Engine):
    """Calls the model once per denoising step, nothing else."""

    def __init__(self, model: Diffuser) -> None:
        self.model = model.eval()
        self.config, self.shape = model.config, model.shape
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.needs_first_frame = model.needs_first_frame
        self.encoder_noise = model.encoder_noise

    @torch.no_grad()
    def begin(
        self,
        clean: Tensor | None,
        conditions: Conditions,
        batch: int = 1,
        window: int | None = None,
    ) -> Any:
        return self.model.begin(clean, conditions, batch, window)

    @torch.no_grad()
    def context(self, state: Any, conditions: Conditions, noise: Tensor | None = None) -> Any:
        noise = None if noise is None else noise.to(self.dtype)
        return self.model.context(state, conditions, noise)

    @torch.no_grad()
    def with_noisy_branch(self, context: Any, strength: float, noise: Tensor) -> Any:
        noise = noise.to(self.dtype)[:, None]
        return self.model.with_noisy_branch(context, strength, noise)

    @torch.no_grad()
    def denoise(
        self,
        context: Any,
        noise: Tensor,
        times: Sequence[float],
        solver: Solver = "euler",
        scale: float | None = None,
        step_noise: Tensor | None = None,
    ) -> Tensor:
        def velocity_at(noisy: Tensor, time: float) -> Tensor:
            # In float64: the time embedding shows the rounding of a float32 time.
            time_of_each = noisy.new_full((noisy.shape[0],), time, dtype=finest(noisy.device))
            return self.model.velocity(context, noisy, time_of_each)

        noise, step_noise = (
            noise.to(self.dtype),
            None if step_noise is None else step_noise.to(self.dtype),
        )
        return solve(guided(velocity_at, scale), noise, times, solver, step_noise)

    @torch.no_grad()
    def velocity(self, context: Any, noisy: Tensor, time: Tensor) -> Tensor:
        return self.model.velocity(context, noisy, time)

    @torch.no_grad()
    def observe(self, state: Any, clean: Tensor, conditions: Conditions) -> None:
        self.model.observe(state, clean, conditions)
