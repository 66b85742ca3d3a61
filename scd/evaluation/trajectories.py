"""What a named protocol rolls out, in units that any process may take, and what is measured of it.

A unit is one batch of clips and one of their trajectories. Its noise follows from its number alone,
so neither the number of processes nor the order of units changes a result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from scd.data.clip import Batch, Conditions
from scd.data.source import Source
from scd.evaluation.compress import through_h264
from scd.evaluation.drift import frame_looks
from scd.evaluation.fvd import I3d
from scd.evaluation.image import frame_values
from scd.evaluation.inverse_dynamics import TrainedJudge
from scd.evaluation.judged import judge_clips
from scd.evaluation.lpips import METRICS, Lpips
from scd.evaluation.measure import another_clip
from scd.evaluation.predict import Protocol, Window, predict, read_windows
from scd.evaluation.protocols import NamedProtocol
from scd.models.checkpoint import World
from scd.models.flow import SamplingConfig
from scd.streaming.rollout import Guidance

Tensors = dict[str, Tensor]
"""What is measured of a unit: kind.baseline.name -> numbers, clips first. Kinds: values and looks
by frame, errors (of actions that are read back) by frame, features (of the judge) by frame, fvd
(features of whole clips), timing (encoder, decoder, autoencoder by frame)."""


@dataclass(frozen=True, kw_only=True)
class Instruments:
    """Networks that measure; what is None is not measured."""

    lpips: Lpips | None = None
    """Measures LPIPS."""
    i3d: I3d | None = None
    """Measures FVD."""
    judge: TrainedJudge | None = None
    """Measures control and the Frechet distance of its own features."""


@dataclass(frozen=True, order=True)
class Unit:
    """One batch of clips and one of their trajectories."""

    batch: int
    """Number of the batch."""
    trajectory: int
    """Number of the trajectory."""
    shuffled: bool = False
    """Steered by the actions of another clip; the noise is that of the trajectory."""

    @property
    def name(self) -> str:
        """Name of its file, without an ending."""
        which = "shuffled" if self.shuffled else f"trajectory_{self.trajectory:03d}"
        return f"batch_{self.batch:05d}_{which}"

    @property
    def is_first(self) -> bool:
        """Whether it also measures what does not depend on the model."""
        return self.trajectory == 0 and not self.shuffled


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
    """What predicts."""
    source: Source
    """Where clips are read."""
    windows: list[Window]
    """The clips."""
    protocol: NamedProtocol
    """How they are rolled out and measured."""
    sampling: SamplingConfig
    """How frames are denoised."""
    guidance: Guidance
    """How predictions are pushed away from an unconditional branch."""
    instruments: Instruments
    """What measures them."""

    @property
    def with_shuffled(self) -> bool:
        """Whether clips are also steered by the actions of another one."""
        has_actions = self.source.card.conditions.has_actions
        return self.protocol.shuffled_actions and has_actions and len(self.windows) > 1

    @property
    def _device(self) -> torch.device:
        return next(iter(self.world.model.parameters())).device

    @cached_property
    def rolled(self) -> Protocol:
        """How the rollouts go."""
        named = self.protocol
        return Protocol(
            context=named.context,
            horizon=named.horizon,
            num_clips=named.num_clips,
            batch_size=named.batch_size,
            seed=named.seed,
            sampling=self.sampling,
            guidance=self.guidance,
        )

    @cached_property
    def batches(self) -> list[slice]:
        """Which clips go side by side."""
        return self.rolled.batches()

    def units(self) -> list[Unit]:
        """Return all units, batch by batch."""
        units = []
        for batch in range(len(self.batches)):
            units += [Unit(batch, number) for number in range(self.protocol.num_trajectories)]
            if self.with_shuffled:
                units.append(Unit(batch, 0, shuffled=True))
        return units

    def roll_out(self, unit: Unit) -> RolledOut:
        """Predict the rest of a unit's clips.

        Raises:
            ValueError: a clip that cannot be read.
        """
        length, chosen = self.protocol.num_frames, self.batches[unit.batch]
        batch = read_windows(self.source, self.windows[chosen], length)
        other = None
        if unit.shuffled:
            taken = [self.windows[index] for index in another_clip(self.rolled)[chosen]]
            other = read_windows(self.source, taken, length).conditions
        number = unit.batch + len(self.batches) * unit.trajectory
        made = predict(self.world, batch, self.rolled, number, other)
        seconds = [[one.encoder_s, one.decoder_s, one.autoencoder_s] for one in made.timings]
        return RolledOut(
            batch=batch,
            frames=made.frames,
            steering=other or batch.conditions,
            seconds=torch.tensor(seconds, dtype=torch.float64),
        )

    def measure(self, unit: Unit) -> Tensors:
        """Roll a unit out and measure it.

        Raises:
            ValueError: as `roll_out`, or a network of FVD that is none.
        """
        rolled = self.roll_out(unit)
        whole, true_whole = self._as_watched(rolled)
        context = self.protocol.context
        true = true_whole[:, context:]
        name = "shuffled_actions" if unit.shuffled else "model"
        made = {name: whole[:, context:]}
        found: Tensors = {}
        if context:
            given = true_whole[:, context - 1 : context]
            if unit.is_first:
                made["repeat_last"] = given.expand_as(true)
            for baseline, frames in made.items():
                for metric, values in self._values(frames, true).items():
                    found[f"values.{baseline}.{metric}"] = values
            if self.instruments.judge is not None:
                found |= self._judged(unit, rolled, given, made | {"truth": true})
        looks = made | ({"truth": true} if unit.is_first else {})
        for baseline, frames in looks.items():
            for look, values in frame_looks(frames).items():
                found[f"looks.{baseline}.{look}"] = values
        if self.instruments.i3d is not None and not unit.shuffled:
            found |= self._fvd_features(unit, whole, true_whole)
        if not unit.shuffled and len(whole) == min(self.rolled.batch_size, len(self.windows)):
            found["timing.model.seconds"] = rolled.seconds
        return {key: value.contiguous() for key, value in found.items()}

    def _as_watched(self, rolled: RolledOut) -> tuple[Tensor, Tensor]:
        """Return whole clips, predicted and true, as they are measured."""
        protocol, true = self.protocol, rolled.batch.frames
        given = true[:, : protocol.context]
        if protocol.fvd_context == "reconstructed":
            given = self._reconstructed(given)
        whole = torch.cat([given, rolled.frames.to(given)], dim=1)
        if not protocol.h264:
            return whole, true
        both = [through_h264(*clip) for clip in zip(whole, true, strict=True)]
        return torch.stack([made for made, _ in both]), torch.stack([real for _, real in both])

    @torch.no_grad()
    def _reconstructed(self, frames: Tensor) -> Tensor:
        autoencoder, device = self.world.autoencoder, self._device
        clips = [autoencoder.decode(autoencoder.encode(clip[None].to(device))) for clip in frames]
        return torch.cat(clips).float().cpu()

    def _values(self, frames: Tensor, true: Tensor) -> Mapping[str, Tensor]:
        """Measure each frame against the truth, clip by clip to bound the memory."""
        network, device = self.instruments.lpips, self._device
        parts = []
        for clip in zip(frames, true, strict=True):
            one, other = (side.to(device) for side in clip)
            values = frame_values(one, other)
            if network is not None:
                for given, metric in METRICS.items():
                    values[metric] = network(one, other, given)
            parts.append(values)
        return {name: torch.stack([part[name] for part in parts]).cpu() for name in parts[0]}

    def _judged(
        self, unit: Unit, rolled: RolledOut, given: Tensor, made: Mapping[str, Tensor]
    ) -> Tensors:
        judge = self.instruments.judge
        assert judge is not None
        steered = rolled.steering.frames(self.protocol.context, None)
        if unit.shuffled:
            steering = {"shuffled_actions": steered, "unsteered": steered}
        else:
            steering = {"model": steered} | ({"truth": steered} if unit.is_first else {})
        errors, features = judge_clips(judge, given, made, steering)
        if not unit.is_first:
            del features["truth"]
        found = {f"errors.{name}.action": values for name, values in errors.items()}
        return found | {f"features.{name}.judge": values for name, values in features.items()}

    def _fvd_features(self, unit: Unit, whole: Tensor, true_whole: Tensor) -> Tensors:
        i3d = self.instruments.i3d
        assert i3d is not None
        first = 0 if self.protocol.fvd_frames == "all" else self.protocol.context
        found = {"fvd.model.i3d": i3d.features(whole[:, first:])}
        # Beside another prediction a file in H.264 holds the truth in another form.
        if unit.is_first or self.protocol.h264:
            found["fvd.truth.i3d"] = i3d.features(true_whole[:, first:])
        return found
