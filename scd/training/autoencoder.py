"""Training of an autoencoder, of pictures or of video: `scd train-autoencoder`.

First the distances alone; then, from the averaged weights on and with the encoder frozen, also a
discriminator of patches, edges, and latents with noise on them. So the latents no longer move in
the second part, and the decoder learns on those that the finished encoder makes: what was encoded
and what was trained on it stay good. Actions are not looked at, and time by a network of video
alone. One process. Source: FAR.

A checkpoint holds AutoencoderDC or AutoencoderKLWan as diffusers reads it, averaged weights, and
mean and deviation of its latents, channel by channel, measured: in `statistics.json`, or of video
in its settings. The run folder as a whole is an autoencoder to everybody who is given its name:
that of the newest step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from scd.autoencoders.base import Autoencoder, NetworkAutoencoder, cells
from scd.autoencoders.build import build_autoencoder, open_autoencoder
from scd.autoencoders.deep_compression import deep_name
from scd.autoencoders.diffusers import WEIGHTS_FILE, Statistics, measure_statistics
from scd.autoencoders.trained import (
    cell_size_of,
    decode_clips,
    encode_clips,
    network_named,
    save_trained,
)
from scd.common.config import to_json
from scd.common.provenance import provenance, write_json
from scd.common.published_weights import ALEXNET, LPIPS_HEADS, check_weights, shipped_heads
from scd.common.runtime import derive_seed
from scd.data.clip import Batch
from scd.data.loader import Loader, read_clips
from scd.data.source import Source, open_source
from scd.evaluation.grids import PictureRow, write_grid
from scd.evaluation.image import Estimate, estimates, frame_values
from scd.evaluation.lpips import load_lpips
from scd.evaluation.predict import choose_windows, count_windows
from scd.models.shipped import find_world_parts
from scd.objectives.reconstruct import (
    SMALLEST_PICTURE,
    Discriminate,
    Distance,
    PatchDiscriminator,
    Reconstruct,
    pyramid_distance,
)
from scd.optim.muon import kernels
from scd.optim.optim import EMA
from scd.training.config import TrainAutoencoderConfig
from scd.training.state import OptimisationGroup, Run, Task
from scd.training.trainer import is_due, train_task

RESULT_FILE = "held_out.json"
"""How well the finished autoencoder reconstructs clips that it has not seen."""

NUM_SHOWN = 8
"""Held-out clips whose first frame is shown."""

MEASURED_FRAMES = 512
"""Frames on which the scale of the latents is measured, at least."""


def train_autoencoder(config: TrainAutoencoderConfig) -> dict[str, Estimate]:
    """Train until the steps are done or the time is over, save, and measure on held-out clips.

    Returns:
        PSNR, SSIM and the mean squared error of reconstructions, with intervals over clips.

    Raises:
        ValueError, FileExistsError, OSError, Interrupted: as `scd.training.trainer.train_task`;
            also frames that the network cannot cut into cells, data smaller than a step, and
            weights of LPIPS that are not those wanted.
    """
    run = train_task(config, AutoencoderTask)
    task = run.task
    assert isinstance(task, AutoencoderTask)
    if not task.found:
        # All steps were done before.
        task.look(run, last=True)
    return task.found


class AutoencoderTask(Task):
    """A network, its discriminator of patches and its perceptual distance."""

    config: TrainAutoencoderConfig
    weights_file = WEIGHTS_FILE
    # One process, and the objective knows the precision.
    is_wrapped = True

    def __init__(self, config: TrainAutoencoderConfig, accelerator: Accelerator) -> None:
        if accelerator.num_processes > 1:
            raise ValueError("an autoencoder is trained in one process")
        self.config, self.accelerator = config, accelerator
        self.max_steps = config.max_steps
        self.is_small = config.network.startswith("small")
        source = open_source(config.data, "train", config.strict)
        self.held_out = open_source(config.data, "val", config.strict)
        self.loader = Loader(
            source,
            config.batch_size,
            config.num_frames,
            config.seed,
            workers=config.num_loader_workers,
            on_error=config.data_on_error,
        )
        distance, self.distance_name = choose_distance(config, accelerator.device)
        self.model: Any = build_network(config, source).train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "weights of the judge"))
            discriminator = PatchDiscriminator()
        self.reconstruct = Reconstruct(
            distance=distance,
            perceptual_weight=config.perceptual_weight,
            adversarial_weight=config.adversarial_weight,
            edge_weight=config.edge_weight,
            border_weight=config.border_weight,
            cell_size=cell_size_of(self.model),
            latent_noise=config.latent_noise,
            discriminator=discriminator.to(accelerator.device).train(),
            autocast=accelerator.autocast,
        )
        self.found: dict[str, Estimate] = {}
        self.num_measured = 0
        self.kept_scale: Statistics | None = None

    def begin(self) -> None:
        """Take over the weights of `config.initial`, and the scale of latents that stay."""
        if not self.config.initial:
            return
        initial = open_initial(self.config.initial)
        _, weights = initial.computes()
        try:
            self.model.load_state_dict(dict(weights))
        except RuntimeError as error:
            raise ValueError(
                f"{self.config.initial} is an autoencoder of another network than the one that is "
                f"to learn on ({self.config.network}): its weights have other names or shapes"
            ) from error
        self._keep_scale(initial)

    def restore(self, checkpoint: Path) -> None:
        super().restore(checkpoint)
        self._keep_scale(open_autoencoder(checkpoint))

    def _keep_scale(self, autoencoder: Autoencoder) -> None:
        """Keep the scale of latents whose encoder never moves."""
        assert isinstance(autoencoder, NetworkAutoencoder)
        if not self.config.reconstruction_steps:
            mean, std = autoencoder.statistics()
            self.kept_scale = tuple(mean), tuple(std)

    def make_groups(self, ema: EMA) -> list[OptimisationGroup]:
        """Return the network and its discriminator, which learns from the same batch."""
        config, reconstruct = self.config, self.reconstruct
        network = OptimisationGroup.of(
            self.model, reconstruct, config.optim, matrices=kernels(self.model)
        )
        discriminator = OptimisationGroup.of(
            reconstruct.discriminator,
            Discriminate(reconstruct=reconstruct),
            config.optim,
            matrices=(),
            name="discriminator",
            # Never, where nobody asks it; its state is kept all the same.
            first_step=config.reconstruction_steps if config.is_judged else config.max_steps,
            same_batch=True,
        )
        return [network, discriminator]

    def facts(self) -> dict[str, Any]:
        """Name the perceptual distance."""
        return {"perceptual": self.distance_name}

    def begin_step(self, run: Run) -> None:
        """Freeze the encoder in the second part, whose first step begins at the averaged weights.

        They are what is saved: the decoder then learns on the latents that the saved encoder makes.
        """
        self.reconstruct.decoder_alone = run.step >= self.config.reconstruction_steps
        if run.step == self.config.reconstruction_steps:
            self.model.load_state_dict(run.ema.state_dict(), strict=False)
        if self.reconstruct.decoder_alone:
            self.model.encoder.requires_grad_(False)

    def look(self, run: Run, last: bool) -> None:
        """Measure the averaged weights on held-out clips and write a picture; the end, a result."""
        if not last and not is_due(run.step, self.config.validate_every):
            return
        assert run.folder is not None
        with run.averaged():
            found, (true, made) = self.measure()
        run.log.event(
            "validation", {"step": run.step} | {name: one.mean for name, one in found.items()}
        )
        rows = [PictureRow(name="truth", frames=true), PictureRow(name="autoencoder", frames=made)]
        labels = [str(number) for number in range(len(true))]
        write_grid(rows, labels, run.folder / "samples" / f"step_{run.step:06d}.png")
        if last:
            self.found = found
            result = {
                "step": run.step,
                "elapsed_s": run.clock.total_s,
                "num_clips": self.num_measured,
                "num_frames": self.config.num_frames,
                "held_out": {name: to_json(estimate) for name, estimate in found.items()},
                "settings": to_json(self.config),
            }
            write_json(result | provenance(self.accelerator.device), run.folder / RESULT_FILE)

    @torch.no_grad()
    def measure(self) -> tuple[dict[str, Estimate], tuple[Tensor, Tensor]]:
        """Measure what the network makes of held-out clips, as it is: metrics with their intervals
        over clips, and some frames [f 3 h w], true and made."""
        num_frames, source = self.config.num_frames, self.held_out
        # 1 or more: `choose_windows` refuses none.
        wanted = max(1, count_windows(source, num_frames))
        wanted = min(self.config.num_validation_clips, wanted)
        windows = choose_windows(source, wanted, num_frames, seed=0)
        values: dict[str, list[Tensor]] = {}
        shown: list[tuple[Tensor, Tensor]] = []
        clips = read_clips(source, windows, num_frames, self.config.data_on_error)
        self.num_measured = len(clips)
        for first in range(0, len(clips), 8):
            true = Batch.of(clips[first : first + 8]).frames
            latents = encode_clips(self.model, true.to(self.accelerator.device))
            made = decode_clips(self.model, latents).float().clamp(-1, 1).cpu()
            # The last ones: of video they are the harder ones.
            shown += [(true[:, -1], made[:, -1])]
            for name, of_frames in frame_values(made, true).items():
                values.setdefault(name, []).append(of_frames.mean(1))
        found = estimates({name: torch.cat(parts) for name, parts in values.items()})
        true, made = (torch.cat(side)[:NUM_SHOWN] for side in zip(*shown, strict=True))
        return found, (true, made)

    @torch.no_grad()
    def write(self, run: Run, folder: Path, averaged: Mapping[str, Tensor]) -> None:
        """Write the network with the averaged weights, and the measured scale of its latents."""
        with run.averaged():
            scale = self.kept_scale or measure_statistics(self._raw_latents())
            save_trained(self.model, folder, scale)

    def _raw_latents(self) -> Iterator[Tensor]:
        num_frames = self.config.num_frames
        for index in range(-(-MEASURED_FRAMES // (self.config.batch_size * num_frames))):
            for clips in self.loader.batch(index).frames.split(-(-64 // num_frames)):
                yield encode_clips(self.model, clips.to(self.accelerator.device))


def build_network(config: TrainAutoencoderConfig, source: Source) -> Any:
    """Build the network with its first weights, which depend on the seed alone; refuse data that it
    cannot learn from (ValueError)."""
    height, width = source.card.height, source.card.width
    name = deep_name(height, width) if config.network == "auto" else config.network
    available = sum(source.num_frames(episode) for episode in range(source.num_episodes))
    if available < config.batch_size * config.num_frames:
        raise ValueError(
            f"{config.data} has {available} frames to learn from, fewer than one step takes: "
            f"batch_size {config.batch_size} times num_frames {config.num_frames}"
        )
    if config.is_judged and min(height, width) < SMALLEST_PICTURE:
        raise ValueError(
            f"the discriminator of patches needs frames of {SMALLEST_PICTURE}x{SMALLEST_PICTURE} "
            f"or more, {config.data} has {height}x{width}: set --adversarial-weight 0"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "initial weights"))
        network = network_named(name)
    cells(height, width, cell_size_of(network))
    return network


def open_initial(source: str) -> NetworkAutoencoder:
    """Open the autoencoder that a training starts from, or that of a world."""
    world = find_world_parts(source)
    found = build_autoencoder(world["autoencoder"]) if world else open_autoencoder(source)
    if not isinstance(found, NetworkAutoencoder):
        raise ValueError(f"{source} is a world of pixels: it has no autoencoder to start from")
    return found


def choose_distance(config: TrainAutoencoderConfig, device: torch.device) -> tuple[Distance, str]:
    """Return the perceptual distance and its name for the log."""
    if not config.alexnet:
        return pyramid_distance, "normalised Laplacian pyramid, no LPIPS"
    heads = config.lpips_heads or shipped_heads()
    check_weights(config.alexnet, ALEXNET, config.alexnet_sha256)
    check_weights(heads, LPIPS_HEADS, config.lpips_heads_sha256)
    lpips = load_lpips(config.alexnet, heads, device)

    def distance(predicted: Tensor, true: Tensor) -> Tensor:
        return lpips.distances(predicted, true, "signed")

    return distance, "LPIPS, AlexNet"


def readable(found: Mapping[str, Estimate]) -> str:
    """Say in one line for people how well an autoencoder reconstructs."""
    parts = [
        f"{label} {found[name].mean:.{digits}f} [{found[name].ci_low:.{digits}f}, "
        f"{found[name].ci_high:.{digits}f}]"
        for name, label, digits in (
            ("psnr", "PSNR", 2),
            ("psnr_per_frame", "PSNR per frame", 2),
            ("ssim", "SSIM", 4),
        )
        if name in found
    ]
    return f"held-out reconstruction: {', '.join(parts)}"
