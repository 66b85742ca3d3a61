"""Frames to tokens and back on the fast path. The plain twin is models/embed.py."""

from __future__ import annotations

from torch import Tensor

from scd.engine.block import Parts, modulate
from scd.engine.linear import PackedLinear, release
from scd.models.embed import FrameHead, TokenEmbedder
from scd.models.flow import SMALLEST_TIME


class FastEmbedder:
    """Patches of frames to tokens."""

    def __init__(self, embed: TokenEmbedder, rows: int, free: bool) -> None:
        """Lay the weights out; `free` gives up the plain ones."""
        self.project = PackedLinear.of(embed.project, rows=rows)
        self.positions = None if embed.positions is None else embed.positions.detach()
        if free:
            release(embed.project)

    def __call__(self, patches: Tensor) -> Tensor:
        """Map patches [f n p] to tokens [f n d]."""
        tokens = self.project(patches.to(self.project.bias.dtype))
        return tokens if self.positions is None else tokens + self.positions


class FastHead:
    """Tokens to the velocity of noisy frames."""

    def __init__(self, head: FrameHead, rows: int, free: bool) -> None:
        """Lay the weights out; `free` gives up the plain ones."""
        self.project, self.predict = PackedLinear.of(head.project, rows=rows), head.predict
        if free:
            release(head.project)

    def __call__(
        self, x: Tensor, modulation: Parts, patches: Tensor, time: float | Tensor
    ) -> Tensor:
        """Map tokens [f n d] to velocities [f n p], float32.

        Args:
            x: tokens after the last block.
            modulation: whose last two parts are those of the norm: 1 + scale, shift.
            patches: the noisy frames.
            time: of all frames, or of each, [f 1 1].
        """
        output = self.project(modulate(x, modulation[-1], modulation[-2])).float()
        if self.predict == "velocity":
            return output
        floor = time.clamp(SMALLEST_TIME) if isinstance(time, Tensor) else max(time, SMALLEST_TIME)
        return (patches - output) / floor
