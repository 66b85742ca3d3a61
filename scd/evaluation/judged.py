"""What a judge makes of the clips of an evaluation: control, and a Frechet distance of our own.

`control` is the share of frames from which the action that was given is read back, between a frame
and the one before it; for continuous actions `control_error`, as `Judge.errors`. Its baselines:
`model`; `shuffled_actions`, against the actions that were given, those of the other clip; `truth`,
real frames, the ceiling; and `unsteered`, real frames against the actions of another clip, what a
perfect model that does not listen would get.

`frechet_own` is the distance between the features of predicted and true pairs of frames. It depends
on the judge and is not FVD.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from scd.data.clip import Conditions
from scd.evaluation.frechet import frechet_estimate
from scd.evaluation.image import Estimate, bootstrap
from scd.evaluation.inverse_dynamics import TrainedJudge, pairs

NUM_PARTS = 4
"""Parts of the horizon in each of which a distance is taken by itself."""

CLIPS_PER_FEATURE = 2
"""Clips that a distance needs for each feature: the frames of one clip are much alike."""


@torch.no_grad()
def judge_clips(
    judge: TrainedJudge,
    given: Float[Tensor, "b 1 3 h w"],
    made: Mapping[str, Float[Tensor, "b t 3 h w"]],
    steering: Mapping[str, Conditions],
) -> tuple[dict[str, Float[Tensor, "b t"]], dict[str, Float[Tensor, "b t d"]]]:
    """Return how wrong the actions of some clips are read, and the features of their frames.

    Args:
        judge: who reads.
        given: the last frame before those of `made`.
        made: frames by baseline; "truth" is one.
        steering: what each baseline was steered by, of the same frames. "unsteered" judges the
            frames of "truth"; a baseline without is not judged by its actions.

    Returns:
        `Judge.errors` by the names of `steering`, and features by those of `made`.
    """
    network = judge.network
    device, num_frames = network.feature_mean.device, made["truth"].shape[1]
    errors, features = {}, {}
    for name, frames in made.items():
        whole = torch.cat([given.to(device), frames.to(device)], dim=1)
        features[name] = network.features(*pairs(whole)).unflatten(0, (-1, num_frames)).cpu()
    for name, conditions in steering.items():
        seen = features["truth" if name == "unsteered" else name].to(device)
        assert conditions.actions is not None
        actions = conditions.actions.to(device).flatten(0, 1)
        found = network.errors(seen.flatten(0, 1), actions)
        errors[name] = found.unflatten(0, (-1, num_frames)).cpu()
    return errors, features


class JudgedClips:
    """Judged frames of an evaluation. Phases: `add` for each batch of clips; then `estimates`."""

    def __init__(self, judge: TrainedJudge) -> None:
        """Begin with no clips."""
        self.judge = judge
        self._errors: dict[str, list[Float[Tensor, "b t"]]] = {}
        self._features: dict[str, list[Float[Tensor, "b t d"]]] = {}

    def add(
        self,
        given: Float[Tensor, "b 1 3 h w"],
        made: Mapping[str, Float[Tensor, "b t 3 h w"]],
        steering: Mapping[str, Conditions],
    ) -> None:
        """Judge some clips; the arguments are those of `judge_clips`."""
        errors, features = judge_clips(self.judge, given, made, steering)
        for name, found in features.items():
            self._features.setdefault(name, []).append(found)
        for name, found in errors.items():
            self._errors.setdefault(name, []).append(found)

    def left_out(self, num_clips: int) -> dict[str, str]:
        """Say what these clips do not allow, and why."""
        needed = CLIPS_PER_FEATURE * self.judge.network.config.feature_dim
        if num_clips >= needed:
            return {}
        return {"frechet_own": f"needs {needed} clips with this judge, got {num_clips}"}

    def estimates(
        self, horizon: int, seed: int
    ) -> Iterator[tuple[slice | None, str, str, Estimate]]:
        """Yield frames (None: all), metric, baseline and the estimate over clips.

        Control comes for each frame, a distance for each part of the horizon.
        """
        discrete = bool(self.judge.network.config.conditions.num_actions)
        metric = "control" if discrete else "control_error"
        for name, parts in self._errors.items():
            errors = torch.cat(parts)
            values = 1 - errors if discrete else errors
            for frame in range(horizon):
                frames = slice(frame, frame + 1)
                yield frames, metric, name, bootstrap(values[:, frame], seed=seed)
            yield None, metric, name, bootstrap(values.mean(1), seed=seed)
        features = {name: torch.cat(parts) for name, parts in self._features.items()}
        true = features.pop("truth")
        if self.left_out(len(true)):
            return
        for name, of_clips in features.items():
            for frames in parts_of(horizon):
                estimate = frechet_estimate(of_clips[:, frames], true[:, frames], seed)
                yield frames, "frechet_own", name, estimate
            yield None, "frechet_own", name, frechet_estimate(of_clips, true, seed)


def parts_of(horizon: int) -> list[slice]:
    """Cut a horizon into quarters, or into single frames if it is shorter than four."""
    number = min(NUM_PARTS, horizon)
    ends = [horizon * part // number for part in range(number + 1)]
    return [slice(start, stop) for start, stop in zip(ends[:-1], ends[1:], strict=True)]
