"""What an inverse dynamics model makes of predicted frames: action accuracy, Frechet distance.

Action accuracy (`control` in results) is the share of frames from which the action that was given
is read back, between a frame and the one before it; for continuous actions `control_error`, as
`InverseDynamics.errors`. Its baselines: `model`; `shuffled_actions`, against the actions that were
given, those of the other clip; `truth`, real frames, the ceiling; and `unsteered`, real frames
against the actions of another clip, what a perfect model that does not listen would get.

The Frechet distance (`frechet_own`) is that between the features of predicted and true pairs of
frames. It depends on the inverse dynamics model and is not FVD.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from scd.data.source import DataCard
from scd.evaluation.frechet import frechet_estimate
from scd.evaluation.image import bootstrap
from scd.evaluation.inverse_dynamics import TrainedInverseDynamics, pairs
from scd.evaluation.metrics import Found, Metric, Numbers, Seen
from scd.evaluation.protocols import Protocol

NUM_PARTS = 4
"""Parts of the horizon in each of which a distance is taken by itself."""

CLIPS_PER_FEATURE = 2
"""Clips that a distance needs for each feature: the frames of one clip are much alike."""


class ReadActions(Metric):
    """Actions that are read back from frames, and the features from which they are."""

    kind = "actions"

    def __init__(self, protocol: Protocol, reader: TrainedInverseDynamics) -> None:
        super().__init__(protocol)
        self.reader = reader
        self.discrete = bool(reader.card.conditions.num_actions)

    @property
    def num_clips_needed(self) -> int:
        """Clips that a distance needs."""
        return CLIPS_PER_FEATURE * self.reader.network.config.feature_dim

    @torch.no_grad()
    def measure(self, seen: Seen) -> Numbers:
        """Return errors of actions and features of frames, of a baseline one of them or both."""
        features = {name: self._features(seen, one) for name, one in seen.with_truth.items()}
        found = {name: {"features": one.cpu()} for name, one in features.items()}
        if seen.shuffled:
            read = features | {"unsteered": self._features(seen, seen.future)}
        else:
            read = {name: one for name, one in features.items() if name != "repeat_last"}
        actions = seen.steering.actions
        assert actions is not None
        for name, one in read.items():
            flat = actions.to(one.device).flatten(0, 1)
            errors = self.reader.network.errors(one.flatten(0, 1), flat)
            found.setdefault(name, {})["error"] = errors.unflatten(0, one.shape[:2]).cpu()
        return found

    def _features(self, seen: Seen, frames: Tensor) -> Float[Tensor, "b m d"]:
        network = self.reader.network
        whole = torch.cat([seen.last, frames], dim=1).to(network.feature_mean.device)
        return network.features(*pairs(whole)).unflatten(0, frames.shape[:2])

    def estimates(self, found: Numbers) -> Found:
        """Yield accuracy for each frame, and a distance for each part of the horizon."""
        seed = self.protocol.seed
        metric = "control" if self.discrete else "control_error"
        for baseline, numbers in found.items():
            if "error" in numbers:
                errors = numbers["error"].mean(1)
                values = 1 - errors if self.discrete else errors
                for horizon, frames in self.horizons():
                    yield horizon, metric, baseline, bootstrap(values[:, frames].mean(1), seed=seed)
        true = found["truth"]["features"]
        if len(true) < self.num_clips_needed:
            return
        parts = [(part.stop, part) for part in parts_of(self.protocol.horizon)]
        for baseline, numbers in found.items():
            if "features" in numbers and baseline != "truth":
                for horizon, frames in [*parts, (None, slice(None))]:
                    sides = (numbers["features"], true)
                    made, real = (side[:, :, frames].flatten(1, 2) for side in sides)
                    yield horizon, "frechet_own", baseline, frechet_estimate(made, real, seed)

    def left_out(self, card: DataCard, num_clips: int) -> dict[str, str]:
        needed = self.num_clips_needed
        if num_clips >= needed:
            return {}
        return {
            "frechet_own": f"needs {needed} clips with this inverse dynamics model, got {num_clips}"
        }

    def by_clip(self, found: Numbers) -> dict[str, Float[Tensor, "b trajectories"]]:
        return {"action_error": found["model"]["error"].double().mean(2)}


def parts_of(horizon: int) -> list[slice]:
    """Cut a horizon into quarters, or into single frames if it is shorter than four."""
    number = min(NUM_PARTS, horizon)
    ends = [horizon * part // number for part in range(number + 1)]
    return [slice(start, stop) for start, stop in zip(ends[:-1], ends[1:], strict=True)]
