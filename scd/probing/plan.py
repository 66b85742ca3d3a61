"""What all measurements of one probe share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from scd.common.files import read_json
from scd.data.clip import Conditions
from scd.data.source import Source, open_source
from scd.evaluation.predict import check_fit, choose_windows, read_windows
from scd.models.checkpoint import World, resolve
from scd.models.config import SamplingConfig
from scd.probing.models import subject_of
from scd.probing.settings import MeasureConfig, ProbeConfig
from scd.probing.subject import Subject, Task
from scd.probing.trajectory import (
    MAX_BLOCK_BYTES,
    MAX_FEATURE_BYTES,
    feature_bytes,
    noise_levels,
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all measurements share."""

    config: MeasureConfig
    subject: Subject
    task: Task
    sampling: SamplingConfig
    """Steps of the trajectories."""
    levels: Sequence[float]
    """Times at which losses are taken."""
    decode: Callable[[Tensor], Tensor]
    """From latent frames to pixels in [-1, 1]."""
    frame_steps: int
    """Denoising steps of the frame whose seconds are predicted."""

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.subject.layers]

    @property
    def stepped(self) -> list[int]:
        """Numbers, from 1, of the chosen layers that run at every step."""
        asked = self.subject.places(self.config.layers)
        return [place + 1 for place in self.subject.stepped if place in asked]


def open_clips(config: ProbeConfig, world: World) -> Source:
    """Open the data, and refuse what does not fit before anything is read (ValueError)."""
    source = open_source(config.data, config.split, config.strict)
    check_fit(world, source.card, config.data)
    subject = subject_of(world.model)
    subject.places(config.layers)
    subject.tokens(config.tokens)
    choose_windows(source, config.num_clips, config.context + 1, config.seed)
    return source


def make_plan(config: ProbeConfig, world: World, source: Source) -> Plan:
    """Read the clips and choose the steps and noise levels of all measurements."""
    num_frames = config.context + 1
    windows = choose_windows(source, config.num_clips, num_frames, config.seed)
    batch = read_windows(source, windows, num_frames)
    device = next(world.model.parameters()).device
    clean = world.autoencoder.encode(batch.frames.to(device))
    # A list of times holds for its own number of steps: others are spaced evenly.
    sampling = SamplingConfig(num_steps=config.num_steps)
    if world.sampling.schedule != "listed":
        sampling = replace(world.sampling, num_steps=config.num_steps, solver="euler")
    return Plan(
        config=config,
        subject=subject_of(world.model),
        task=Task.of(clean, batch.conditions.to(device), config.seed, config.num_noises),
        sampling=sampling,
        levels=config.levels or noise_levels(*training_times(Path(config.run))),
        decode=lambda latents: world.autoencoder.decode(latents[:, None])[:, 0],
        frame_steps=config.frame_steps or world.sampling.num_steps,
    )


def training_times(run: Path) -> tuple[float, float]:
    """Return mean and deviation of the logit of the times that a run was trained on.

    0 and 1, the settings of the paper, for a world whose run is not known.
    """
    step = resolve(run)
    for path in (step / "config.json", step.parent / "config.json"):
        if path.is_file():
            values = read_json(path)
            objective = values.get("objective", {}) if isinstance(values, dict) else None
            if not isinstance(objective, dict):
                raise ValueError(f"{path}: needed the settings of a run or world")
            if "time_mean" in objective:
                mean, std = objective["time_mean"], objective.get("time_std")
                if not isinstance(mean, (int, float)) or not isinstance(std, (int, float)):
                    raise ValueError(f"{path}: needed numbers for time_mean and time_std")
                return mean, std
    return 0.0, 1.0


def plan_of(
    config: MeasureConfig,
    subject: Subject,
    clean: Float[Tensor, "b t c h w"],
    conditions: Conditions,
    decode: Callable[[Tensor], Tensor],
) -> Plan:
    """Plan the measurements of a model of which nothing else is known (else ValueError).

    Args:
        clean: (latent) frames of each clip.
        decode: from latent frames [b c h w] to pixels in [-1, 1].
    """
    if clean.ndim != 5 or tuple(clean.shape[2:]) != tuple(subject.frame_shape):
        raise ValueError(
            f"clips must be [clips, frames, {', '.join(map(str, subject.frame_shape))}], as the "
            f"subject's frame_shape says, got {list(clean.shape)}"
        )
    if not clean.is_floating_point() or not clean.isfinite().all():
        raise ValueError(
            f"clips must be finite floats, as the subject's frames, got {clean.dtype}: "
            "scd.pixels_to_frames makes frames of 8-bit pixels"
        )
    subject.places(config.layers)
    subject.tokens(config.tokens)
    return Plan(
        config=config,
        subject=subject,
        task=Task.of(clean, conditions, config.seed, config.num_noises),
        sampling=SamplingConfig(num_steps=config.num_steps),
        levels=config.levels or noise_levels(),
        decode=decode,
        frame_steps=config.frame_steps or config.num_steps,
    )


def memory_needed(config: MeasureConfig, subject: Subject, num_clips: int, num_past: int) -> int:
    """Return the bytes that a probe holds beside the weights, at the most.

    Features of all layers (or as many as fit into 2 GiB), five copies of those of one layer for
    their comparison, keys and values of the frames that are seen, the activations of one pass over
    them (16 d values per token), and a block of attention weights.
    """
    frames, layers = num_clips * config.num_noises, len(subject.layers)
    one = feature_bytes(subject, frames, config.num_steps)
    tokens = frames * (num_past + 1) * subject.tokens_per_frame
    memory = 2 * 4 * layers * tokens * subject.width
    kept = max(one, min(layers * one, MAX_FEATURE_BYTES))
    return kept + 5 * one + memory + 16 * 4 * tokens * subject.width + 3 * MAX_BLOCK_BYTES
