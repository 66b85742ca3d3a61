"""Engines whose network sees a noisy frame and its context, and no past.

Contexts lie in rows of memory that stays where it is, so frames of any streams, each at its own
step, share a call of the network, and a GPU replays all steps of a frame as one graph.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from scd.data.clip import Conditions
from scd.engine.graph import LoopGraphs, can_compile, compiled
from scd.engine.interface import Engine
from scd.models.config import Solver
from scd.models.embed import from_patches, to_patches
from scd.models.flow import guided, solve


def together(batches: Sequence[Tensor]) -> Tensor:
    """Join batches of streams; one alone is not copied."""
    return batches[0] if len(batches) == 1 else torch.cat(list(batches))


@runtime_checkable
class Rows(Protocol):
    """Room for the contexts of frames that are denoised side by side, one row each."""

    capacity: int

    @property
    def num_bytes(self) -> int: ...

    def move(self, source: int, target: int) -> None: ...


class RowEngine(Engine):
    """What engines with such a network share: the loop over the steps of a frame."""

    decoder: Any
    """The network: `predicted` of rows, noisy patches [f n p] and modulations [r parts d] for 1 or
    f frames, as patches, the context of frame i in row i; `velocity` of the same and times [f 1 1];
    its `head` says what it predicts."""

    def prepare(
        self, compile_step: bool | None = None, report: Callable[[str], None] = print
    ) -> None:
        """Get ready to denoise, once the decoder is there.

        Args:
            compile_step: compile the decoder's step, seconds to a minute at the first frame; None:
                where there is a GPU and Triton.
            report: told what takes long, and how long it took.
        """
        self._graphs = LoopGraphs(report) if self.device.type == "cuda" else None
        self._step = self.decoder.predicted
        if can_compile(self.device) if compile_step is None else compile_step:
            self._step = compiled(self.decoder.predicted)
        self._rows = self.new_rows(0)

    @abstractmethod
    def new_rows(self, capacity: int) -> Rows:
        """Allocate rows."""

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """Memory of one row."""

    @abstractmethod
    def put(self, rows: Any, start: int, contexts: Sequence[Any]) -> None:
        """Put contexts, each of one frame or of several, into rows from `start` on."""

    @abstractmethod
    def modulations_at(self, times: Sequence[float], context: Any) -> Tensor:
        """Return the modulations at each time, [times r parts d] for 1 or f frames."""

    @abstractmethod
    def modulations_of_each(self, time: Tensor, context: Any) -> Tensor:
        """Return the modulations of its frames, each at its time [f]: [f parts d]."""

    def context(self, state: Any, conditions: Conditions, noise: Tensor | None = None) -> Any:
        return self.contexts([state], [conditions], [noise])[0]

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
        """Turn noise into frames; see interface.Engine. Between steps frames are float32."""
        rows = self._put(context)
        modulations = self.modulations_at(times[:-1], context)
        step = {time: index for index, time in enumerate(times)}
        predicts = self.decoder.head.predict

        def loop(patches: Tensor, modulations: Tensor, new: Tensor) -> Tensor:
            def predicted_at(patches: Tensor, time: float) -> Tensor:
                return self._step(rows, patches, modulations[step[time]])

            return solve(guided(predicted_at, scale), patches, times, solver, new, predicts)

        step_noise = noise.new_empty(0, *noise.shape) if step_noise is None else step_noise
        patches, new = (
            to_patches(one.float(), self.shape.patch_size) for one in (noise, step_noise)
        )
        if self._graphs is None:
            patches = loop(patches, modulations, new)
        else:
            key = (context.num_frames, tuple(times), solver, scale)
            patches = self._graphs.run(key, loop, patches, modulations, new)
        return from_patches(patches, self.shape).to(self.dtype)

    @torch.no_grad()
    def velocity(self, context: Any, noisy: Tensor, time: Tensor) -> Tensor:
        rows = self._put(context)
        modulation = self.modulations_of_each(time, context)
        patches = to_patches(noisy.float(), self.shape.patch_size)
        velocity = self.decoder.velocity(rows, patches, modulation, time.float()[:, None, None])
        return from_patches(velocity, self.shape).to(noisy.dtype)

    def _put(self, context: Any) -> Rows:
        if self._rows.capacity < context.num_frames:
            self._rows = self.new_rows(context.num_frames)
            if self._graphs is not None:
                self._graphs.clear()
        self.put(self._rows, 0, [context])
        return self._rows
