"""Tables of what comes before training: autoencoders, and whether reading keeps ahead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cells import interval, markdown

METRICS = ("psnr", "psnr_per_frame", "ssim")
"""Of a reconstruction."""


def autoencoders(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per result of `scd train-autoencoder` (held_out.json)."""
    rows = []
    for name, result in results.items():
        found = result["held_out"]
        cells = [interval(found[metric] | {"metric": metric}) for metric in METRICS]
        minutes = f"{result['elapsed_s'] / 60:.0f}"
        network = result["settings"]["network"]
        rows.append([f"`{name}`", network, str(result["step"]), minutes, *cells])
    head = ["reconstruction", "network", "steps", "minutes", "PSNR, dB"]
    return markdown([*head, "mean of each frame's PSNR, dB", "SSIM"], rows)


def loading(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per way of reading in a result of benchmarks/loading.py."""
    rows = []
    for name, result in results.items():
        rates, ratios = result["frames_per_second"], result["over_training"]
        for way in ("videos", "latents", "encoding"):
            ratio = ratios[way]
            over = f"{ratio['median']:.1f} [{ratio['low']:.1f}, {ratio['high']:.1f}]"
            rows.append([f"`{name}`, {way}", f"{rates[way]:.0f}", f"{rates['training']:.0f}", over])
    return markdown(["", "frames/s", "training uses, frames/s", "times as fast"], rows)
