"""Settings of the training of an autoencoder -> its network and its perceptual distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scd.autoencoders.base import cells
from scd.autoencoders.deep_compression import deep_name, deep_settings
from scd.autoencoders.diffusers import new_network, shape_of
from scd.common.published_weights import ALEXNET, LPIPS_HEADS, check_weights, shipped_heads
from scd.common.runtime import derive_seed
from scd.data.source import Source
from scd.evaluation.lpips import load_lpips
from scd.objectives.perceptual import pyramid_distance
from scd.objectives.reconstruct import JUDGE_SMALLEST, Distance
from scd.training.autoencoder_settings import TrainAutoencoderConfig


def build_network(config: TrainAutoencoderConfig, source: Source) -> Any:
    """Build the network with its first weights, which depend on the seed alone.

    Raises:
        ValueError: none for frames of this size, frames that it cannot cut into cells, fewer frames
            than a step takes, or diffusers is not installed.
    """
    height, width = source.card.height, source.card.width
    name = deep_name(height, width) if config.network == "auto" else config.network
    available = sum(source.num_frames(episode) for episode in range(source.num_episodes))
    if available < config.batch_size * config.num_frames:
        raise ValueError(
            f"{config.data} has {available} frames to learn from, fewer than one step takes: "
            f"batch_size {config.batch_size} times num_frames {config.num_frames}"
        )
    if config.adversarial_steps and min(height, width) < JUDGE_SMALLEST:
        raise ValueError(
            f"the judge of patches needs frames of {JUDGE_SMALLEST}x{JUDGE_SMALLEST} or more, "
            f"{config.data} has {height}x{width}: set --adversarial-steps 0"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "initial weights"))
        network = new_network(deep_settings(name))
    _, cell_size = shape_of("AutoencoderDC", network)
    cells(height, width, cell_size)
    return network


def choose_distance(config: TrainAutoencoderConfig, device: torch.device) -> tuple[Distance, str]:
    """Return the perceptual distance and its name for the log.

    Raises:
        FileNotFoundError, ValueError: weights of LPIPS that are not there, or not those wanted.
    """
    if not config.alexnet:
        return pyramid_distance, "normalised Laplacian pyramid, no LPIPS"
    heads = config.lpips_heads or shipped_heads()
    check_weights(config.alexnet, ALEXNET, config.alexnet_sha256)
    check_weights(heads, LPIPS_HEADS, config.lpips_heads_sha256)
    lpips = load_lpips(config.alexnet, heads, device)

    def distance(predicted: Tensor, true: Tensor) -> Tensor:
        return lpips.distances(predicted, true, "signed")

    return distance, "LPIPS, AlexNet"
