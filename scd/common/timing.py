"""Seconds of one frame of a stream, by part."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from scd.common.runtime import synchronize


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Wall-clock seconds of one step, by part; with a GPU each part is synchronised."""

    encoder_s: float = 0.0
    """Causal work outside the denoising loop: the context, and the update of the KV cache."""
    decoder_s: float = 0.0
    """All denoising steps."""
    autoencoder_s: float = 0.0
    """Latent to pixels."""
    update_s: float = 0.0
    """Part of encoder_s: a finished frame goes into the KV cache, its pixels are out already."""
    num_frames: int = 1
    """Frames of video that came of the step, for each stream."""

    @property
    def total_s(self) -> float:
        return self.denoise_only_s + self.autoencoder_s

    @property
    def denoise_only_s(self) -> float:
        """All of the network, nothing of the autoencoder."""
        return self.encoder_s + self.decoder_s

    @property
    def ready_s(self) -> float:
        """From the beginning of the step until its frames are there."""
        return self.total_s - self.update_s


class Clock:
    """Seconds between laps; waits for the GPU where there is one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lap()

    def lap(self) -> float:
        """Return the seconds since the last one."""
        synchronize(self.device)
        now = time.perf_counter()
        seconds = now - getattr(self, "_last", now)
        self._last = now
        return seconds
