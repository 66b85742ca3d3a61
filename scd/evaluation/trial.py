"""What an evaluation rolls out, in units that any process may take, and what is measured of it.

A unit is one batch of clips and one of their trajectories. Its noise follows from its number alone,
so neither the number of processes nor the order of units changes a result.

Baselines are measured on the same clips: `repeat_last` shows the last given frame again,
`shuffled_actions` is the model steered by the actions of another clip: a model that listens must
lose by it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from jaxtyping import Float
from torch import Tensor

from scd.common.runtime import make_generator
from scd.common.threads import ThreadChoice
from scd.data.clip import Batch, Conditions, frames_to_pixels, pixels_to_frames
from scd.data.source import Source
from scd.data.toy import ToyWorld
from scd.evaluation.memory import MemoryClips, count_batch, find_memory_clips, memory_score
from scd.evaluation.metrics import AgainstTruth, Drift, Metric, Numbers, Seen, row_of
from scd.evaluation.predict import Window, choose_clips, predict, read_windows, reduced_to
from scd.evaluation.protocols import CUSTOM, Protocol
from scd.models.checkpoint import World
from scd.models.config import Guidance, SamplingConfig
from scd.streaming.rollout import Timing

Tensors = dict[str, Tensor]
"""What is measured of a unit: kind.baseline.name -> numbers, clips first. Kinds are those of the
metrics, memory, and timing (encoder, decoder, autoencoder by frame)."""


H264_FPS = 8
"""Frames per second of files in H.264."""

H264_CRF = 25
"""Constant rate factor of imageio's default quality, 5 of 10: int((1 - 5/10) * 51)."""

H264_PLAIN = "asm=0"
"""x264 without assembler code, whose choices for small pictures differed from call to call."""

H264_MULTIPLE = 16
"""imageio scales pictures whose sides are no multiples of this, which is not done here."""


@dataclass(frozen=True)
class Unit:
    """One batch of clips and one of their trajectories."""

    batch: int
    trajectory: int = 0
    what: Literal["trajectory", "shuffled", "memory"] = "trajectory"
    """shuffled: steered by the actions of another clip, with the noise of the trajectory; memory:
    other clips, in which shapes of the toy world come back."""

    @property
    def name(self) -> str:
        """Name of its file, without an ending."""
        what = f"trajectory_{self.trajectory:03d}" if self.what == "trajectory" else self.what
        return f"batch_{self.batch:05d}_{what}"


@dataclass(frozen=True, kw_only=True)
class RolledOut:
    """The clips of a unit and what a world made of them."""

    batch: Batch
    """The true clips, from their beginning."""
    frames: Float[Tensor, "b m 3 h w"]
    """The predicted frames after the context, in [-1, 1]."""
    steering: Conditions
    """What steered them, of all frames of the clips."""
    seconds: Float[Tensor, "m 3"]
    """Of each frame: encoder, decoder, autoencoder."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A world, clips and a protocol: all that the numbers of a unit depend on."""

    world: World
    source: Source
    windows: list[Window]
    protocol: Protocol
    """How they are rolled out and measured; its number of clips is theirs."""
    metrics: Sequence[Metric]
    sampling: SamplingConfig | None = None
    """How frames are denoised; None: as the world says."""
    guidance: Guidance | None = None
    """How predictions are pushed away from an unconditional branch; None: not."""
    threads: ThreadChoice | None = None
    """Of the CPU; None: those that the process has."""

    @property
    def with_shuffled(self) -> bool:
        """Whether clips are also steered by the actions of another one."""
        has_actions = self.source.card.conditions.has_actions
        return self.protocol.shuffled_actions and has_actions and len(self.windows) > 1

    @cached_property
    def memory_clips(self) -> MemoryClips | str:
        """Windows in which shapes come back; or why there are none, which may be no reason."""
        if not self.protocol.memory or not isinstance(self.source, ToyWorld):
            return ""
        try:
            return find_memory_clips(
                self.source, len(self.windows), self.protocol.context, self.protocol.horizon
            )
        except ValueError as error:
            return str(error)

    def units(self) -> list[Unit]:
        """Return all units, batch by batch."""
        units = []
        for batch in range(len(self.protocol.batches())):
            units += [Unit(batch, number) for number in range(self.protocol.num_trajectories)]
            if self.with_shuffled:
                units.append(Unit(batch, what="shuffled"))
            if isinstance(self.memory_clips, MemoryClips):
                units.append(Unit(batch, what="memory"))
        return units

    def roll_out(self, unit: Unit) -> RolledOut:
        """Predict the rest of a unit's clips."""
        length, batches = self.protocol.num_frames, self.protocol.batches()
        chosen, number = batches[unit.batch], unit.batch + len(batches) * unit.trajectory
        batch = read_windows(self.source, self.windows[chosen], length)
        other = None
        if unit.what == "shuffled":
            order = another_clip(len(self.windows), self.protocol.seed)
            taken = [self.windows[index] for index in order[chosen]]
            other = read_windows(self.source, taken, length).conditions
        made = predict(
            self.world,
            batch,
            self.protocol.context,
            self.protocol.seed,
            number,
            other,
            self.sampling,
            self.guidance,
            self.threads,
        )
        seconds = [[one.encoder_s, one.decoder_s, one.autoencoder_s] for one in made.timings]
        return RolledOut(
            batch=batch,
            frames=made.frames,
            steering=other or batch.conditions,
            seconds=torch.tensor(seconds, dtype=torch.float64),
        )

    def measure(self, unit: Unit) -> Tensors:
        if unit.what == "memory":
            assert isinstance(self.memory_clips, MemoryClips)
            counts = count_batch(
                self.world,
                self.memory_clips,
                self.protocol,
                unit.batch,
                self.sampling,
                self.guidance,
                self.threads,
            )
            return {f"memory.{baseline}.counts": one for baseline, one in counts.items()}
        rolled = self.roll_out(unit)
        seen = self._seen(unit, rolled)
        found = {
            f"{metric.kind}.{baseline}.{name}": value.contiguous()
            for metric in self.metrics
            for baseline, numbers in metric.measure(seen).items()
            for name, value in numbers.items()
        }
        is_full = len(rolled.frames) == min(self.protocol.batch_size, len(self.windows))
        if is_full and not seen.shuffled:
            found["timing.model.seconds"] = rolled.seconds
        return found

    def _seen(self, unit: Unit, rolled: RolledOut) -> Seen:
        protocol, true = self.protocol, rolled.batch.frames
        given = true[:, : protocol.context]
        if protocol.fvd_context == "reconstructed":
            given = self._reconstructed(given)
        predicted = torch.cat([given, rolled.frames.to(given)], dim=1)
        if protocol.h264:
            both = [through_h264(*clip) for clip in zip(predicted, true, strict=True)]
            predicted, true = (torch.stack(side) for side in zip(*both, strict=True))
        return Seen(
            predicted=predicted,
            true=true,
            context=protocol.context,
            steering=rolled.steering.frames(protocol.context, None),
            shuffled=unit.what == "shuffled",
            is_first=unit.trajectory == 0 and unit.what == "trajectory",
        )

    @torch.no_grad()
    def _reconstructed(self, frames: Tensor) -> Tensor:
        autoencoder = self.world.autoencoder
        device = next(iter(self.world.model.parameters())).device
        clips = [autoencoder.decode(autoencoder.encode(clip[None].to(device))) for clip in frames]
        return torch.cat(clips).float().cpu()


def through_h264(
    predicted: Float[Tensor, "t 3 h w"], true: Float[Tensor, "t 3 h w"], crf: int = H264_CRF
) -> tuple[Float[Tensor, "t 3 h w"], Float[Tensor, "t 3 h w"]]:
    """Return frames in [-1, 1] as they come back from a file in H.264, as published evaluations do.

    They write prediction and truth side by side into an mp4 file by imageio and measure what they
    read back, so their numbers hold the losses of the compression on both sides. The same frames
    always give the same result: one thread encodes, in plain code.
    """
    width = predicted.shape[-1]
    both = torch.cat([predicted, true], dim=-1)
    if both.shape[-2] % H264_MULTIPLE or both.shape[-1] % H264_MULTIPLE:
        raise ValueError(
            f"side by side in H.264, frames need sides that are multiples of {H264_MULTIPLE}, "
            f"got {both.shape[-2]}x{both.shape[-1]}"
        )
    pixels = _decoded(_encoded(frames_to_pixels(both).cpu().numpy(), crf))
    found = pixels_to_frames(torch.from_numpy(pixels)).to(predicted.device)
    return found[..., :width], found[..., width:]


def _encoded(pixels: np.ndarray, crf: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        options = {"crf": str(crf), "x264-params": H264_PLAIN}
        stream = container.add_stream("libx264", rate=H264_FPS, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        reformatter = VideoReformatter()
        for picture in pixels:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = reformatter.reformat(frame, format="yuv420p", threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def _decoded(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data), "r") as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(shown)


def another_clip(num_clips: int, seed: int) -> list[int]:
    """For each clip choose another one, each once: a random cycle through all of them."""
    order = torch.randperm(num_clips, generator=make_generator(seed, "shuffle"))
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return other.tolist()


@dataclass(kw_only=True)
class Measurement:
    """What an evaluation found."""

    rows: list[dict[str, Any]]
    """metric, horizon, mean, ci_low, ci_high, baseline; one for each horizon. A distance between
    sets of frames has one for each quarter of the horizon, at the quarter's last frame."""
    overall: list[dict[str, Any]]
    """The same of all predicted frames together, without a horizon."""
    clips: list[dict[str, Any]]
    """Where each clip is and, by metric, the mean over the predicted frames of each trajectory."""
    timings: list[Timing]
    """Of the model's steps on full batches, without the first step."""
    left_out: dict[str, str]
    memory_events: int
    """Hidden shapes behind the memory score."""
    numbers: Mapping[str, Numbers]
    """All of it clip by clip, by the kinds of the metrics."""


def measure(
    world: World,
    source: Source,
    protocol: Protocol,
    metrics: Sequence[Metric] | None = None,
    threads: ThreadChoice | None = None,
) -> Measurement:
    """Roll out held-out clips and compare them with the truth and the baselines.

    Metrics are, unless given, those that need no other network.
    """
    protocol = reduced_to(protocol, source)
    trial = Trial(
        world=world,
        source=source,
        windows=choose_clips(source, protocol, "the data")[0],
        protocol=protocol,
        metrics=[AgainstTruth(protocol), Drift(protocol)] if metrics is None else metrics,
        threads=threads,
    )
    return measurement(trial, {unit: trial.measure(unit) for unit in trial.units()})


def measurement(trial: Trial, parts: Mapping[Unit, Tensors]) -> Measurement:
    """Make a result of what was measured of all units, in the order of `Trial.units`."""
    protocol, seed = trial.protocol, trial.protocol.seed
    found, timings = _gather(parts)
    result = Measurement(
        rows=[],
        overall=[],
        clips=[{"episode": episode, "start": start} for episode, start in trial.windows],
        # The first step of a process also pays for what is set up once.
        timings=timings[1:] or timings,
        left_out=_left_out(trial),
        memory_events=0,
        numbers=found,
    )
    estimates = [
        estimate
        for metric in trial.metrics
        if found.get(metric.kind)
        for estimate in metric.estimates(found[metric.kind])
    ]
    for baseline, numbers in found.get("memory", {}).items():
        counts = numbers["counts"][:, 0]
        result.memory_events = int(counts[:, 1].sum())
        estimates.append((protocol.horizon, "memory", baseline, memory_score(counts, seed)))
    about = {}
    if protocol.name != CUSTOM:
        about["protocol"] = protocol.name
        about |= {name: getattr(protocol, name) for name in ("num_clips", "num_trajectories")}
    for horizon, metric, baseline, estimate in estimates:
        row = row_of(metric, estimate, baseline)
        if horizon is None:
            result.overall.append(row | about)
        else:
            result.rows.append(row | {"horizon": horizon} | about)
    values = {
        name: one.tolist()
        for metric in trial.metrics
        if found.get(metric.kind)
        for name, one in metric.by_clip(found[metric.kind]).items()
    }
    for index, clip in enumerate(result.clips):
        clip["values"] = {name: numbers[index] for name, numbers in values.items()}
    return result


def _left_out(trial: Trial) -> dict[str, str]:
    found: dict[str, str] = {}
    if trial.protocol.shuffled_actions and not trial.with_shuffled:
        found["shuffled_actions"] = "needs actions and two clips"
    for metric in trial.metrics:
        found |= metric.left_out(trial.source.card, len(trial.windows))
    if isinstance(trial.memory_clips, str) and trial.memory_clips:
        found["memory"] = trial.memory_clips
    return found


def _gather(parts: Mapping[Unit, Tensors]) -> tuple[dict[str, Numbers], list[Timing]]:
    """Put the units together: batches one after another, trajectories side by side."""
    tables: dict[tuple[str, ...], dict[int, list[Tensor]]] = {}
    timings: list[Timing] = []
    for unit, tensors in parts.items():
        for key, value in tensors.items():
            if key == "timing.model.seconds":
                timings += [
                    Timing(encoder_s=encoder, decoder_s=decoder, autoencoder_s=autoencoder)
                    for encoder, decoder, autoencoder in value.tolist()
                ]
            else:
                table = tables.setdefault(tuple(key.split(".")), {})
                table.setdefault(unit.trajectory, []).append(value)
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for (kind, baseline, name), table in tables.items():
        joined = [torch.cat(batches) for _, batches in sorted(table.items())]
        found.setdefault(kind, {}).setdefault(baseline, {})[name] = torch.stack(joined, dim=1)
    return dict(found), timings
