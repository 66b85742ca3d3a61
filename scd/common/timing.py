"""Seconds of one frame of a stream, by part."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Wall-clock seconds of one frame, by part; with a GPU each part is synchronised."""

    encoder_s: float = 0.0
    """Causal work outside the denoising loop: the context, and for a dense model the pass that
    writes the frame before into memory."""
    decoder_s: float = 0.0
    """All denoising steps."""
    autoencoder_s: float = 0.0
    """Latent to pixels."""

    @property
    def total_s(self) -> float:
        """Sum of the parts."""
        return self.encoder_s + self.decoder_s + self.autoencoder_s


class Clock:
    """Seconds between laps; waits for the GPU where there is one."""

    def __init__(self, device: torch.device) -> None:
        """Begin a lap."""
        self.device = device
        self.lap()

    def lap(self) -> float:
        """Return the seconds since the last one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        seconds = now - getattr(self, "_last", now)
        self._last = now
        return seconds
