"""Inverse dynamics: a small network that reads the action between two frames, and what it measures.

Its features, from which it reads the action, also have to tell how much the second frame is blurred
and noisy; so they carry how frames look and not only how they move, and give a Frechet distance. It
is trained on recorded clips by scd/training/inverse_dynamics.py. A number by one such model can be
compared with numbers by the same one only: neither is FVD nor comparable with it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Num
from torch import Tensor, nn

from scd.common.config import at_least, from_json, to_json
from scd.common.files import read_json, written_aside
from scd.common.provenance import write_json
from scd.data.actions import parts_of
from scd.data.source import DataCard
from scd.data.spaces import ActionPart, ConditionSpec
from scd.evaluation.frechet import frechet_estimate
from scd.evaluation.image import bootstrap
from scd.evaluation.metrics import Found, Metric, Numbers, Seen
from scd.evaluation.protocols import Protocol
from scd.models.weights import CONFIG_FILE, WEIGHTS_FILE, load_weights, save_weights

FORMAT = "scd-judge-1"
"""Name and version of the layout of config.json."""

NUM_DISTORTIONS = 2
"""What it reads besides the action: how blurred and how noisy the second frame is."""

GROUP_SIZE = 16
"""Channels that are normalised together."""

SMALLEST = 8
"""Rows and columns that a frame must have."""

GRID = 16
"""Rows or columns, whichever are fewer, at which look and movement are joined, at most."""

SHIFT = 3
"""How far the first frame is shifted to find each place of the second in it, in pixels of frames
twice as fine as the joint grid."""

NUM_PARTS = 4
"""Parts of the horizon in each of which a distance is taken by itself."""

CLIPS_PER_FEATURE = 2
"""Clips that a distance needs for each feature: the frames of one clip are much alike."""


@dataclass(frozen=True, kw_only=True)
class InverseDynamicsConfig:
    """The network."""

    conditions: ConditionSpec = field(default_factory=lambda: ConditionSpec(num_actions=4))
    """Actions that it reads; labels are not looked at."""
    width: int = 32
    """Channels at full resolution, doubled once; a multiple of 16."""
    feature_dim: int = 32
    """Features of a pair of frames. A Frechet distance needs twice as many clips."""

    def __post_init__(self) -> None:
        if not self.conditions.has_actions:
            raise ValueError(f"inverse dynamics reads actions, got data without: {self.conditions}")
        if self.width < GROUP_SIZE or self.width % GROUP_SIZE:
            raise ValueError(f"width must be a multiple of {GROUP_SIZE}, got {self.width}")
        at_least(1, feature_dim=self.feature_dim)


class InverseDynamics(nn.Module):
    """Convolutions over two frames and over how well each place matches its surroundings before.

    What is read is mostly how the picture moves, which plain convolutions learn slowly: so they are
    also given the differences between the second frame and the first one shifted by each step of
    up to SHIFT pixels (a cost volume, as in optical flow).

    Phases: train `readings`; `standardise` once, on real frames; then `features` and `errors`.
    """

    feature_mean: Tensor
    feature_deviation: Tensor
    action_mean: Tensor
    action_deviation: Tensor

    def __init__(self, config: InverseDynamicsConfig, height: int, width: int) -> None:
        super().__init__()
        if min(height, width) < SMALLEST:
            raise ValueError(f"inverse dynamics needs frames of 8x8 or more, got {height}x{width}")
        self.config = config
        halvings = max(1, math.ceil(math.log2(min(height, width) / GRID)))
        size = [(height, width)]
        for _ in range(halvings + 2):
            rows, columns = size[-1]
            size.append(((rows + 1) // 2, (columns + 1) // 2))
        self.volume_size = size[halvings - 1]
        channels = config.width
        look: list[nn.Module] = [nn.Conv2d(6, channels, 3, stride=2, padding=1)]
        for _ in range(halvings - 1):
            look += [*_rest(channels), nn.Conv2d(channels, channels, 3, stride=2, padding=1)]
        self.look = nn.Sequential(*look)
        self.move = nn.Conv2d((2 * SHIFT + 1) ** 2, channels, 3, stride=2, padding=1)
        self.trunk = nn.Sequential(
            *_rest(channels),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            *_rest(2 * channels),
            nn.Conv2d(2 * channels, 2 * channels, 3, stride=2, padding=1),
            nn.GELU(),
        )
        rows, columns = size[-1]
        self.project = nn.Linear(2 * channels * rows * columns, config.feature_dim)
        spec, dim = config.conditions, config.feature_dim
        self.parts = parts_of(spec)
        self.action = nn.Linear(dim, sum(map(num_outputs, self.parts)))
        self.distortion = nn.Linear(dim, NUM_DISTORTIONS)
        self.register_buffer("feature_mean", torch.zeros(dim))
        self.register_buffer("feature_deviation", torch.ones(dim))
        self.register_buffer("action_mean", torch.zeros(spec.action_dim))
        self.register_buffer("action_deviation", torch.ones(spec.action_dim))

    def raw_features(
        self, before: Float[Tensor, "f 3 h w"], after: Float[Tensor, "f 3 h w"]
    ) -> Float[Tensor, "f d"]:
        """Return what both readings are made from; pixels in [-1, 1]."""
        look = self.look(torch.cat([before, after], dim=1))
        small = [F.adaptive_avg_pool2d(frames, self.volume_size) for frames in (before, after)]
        seen = self.trunk(look + self.move(cost_volume(*small)))
        return self.project(rearrange(seen, "f c h w -> f (c h w)"))

    def readings(
        self, features: Float[Tensor, "f d"]
    ) -> tuple[Float[Tensor, "f actions"], Float[Tensor, "f 2"]]:
        """Return what is read of the action's parts, one after the other (logits of choices and
        keys, standardised values of a box); blur and noise."""
        hidden = F.gelu(features)
        return self.action(hidden), self.distortion(hidden)

    def features(
        self, before: Float[Tensor, "f 3 h w"], after: Float[Tensor, "f 3 h w"]
    ) -> Float[Tensor, "f d"]:
        """Return features in units of their deviation over real frames."""
        raw = self.raw_features(before, after)
        return (raw - self.feature_mean) / self.feature_deviation

    def errors(
        self, features: Float[Tensor, "f d"], actions: Num[Tensor, "f ..."]
    ) -> Float[Tensor, "f parts"]:
        """Return how wrong each part of each action is read, from what `features` gave.

        Returns:
            Choices and keys: the share that is read wrong, of a single choice 0 or 1. A box: the
            squared error over the variance of the training actions, mean of the entries; 1 is what
            reading nothing but their mean gives. An action without parts is one.
        """
        read, _ = self.readings(features * self.feature_deviation + self.feature_mean)
        return torch.stack([error_of(*one) for one in self.by_part(read, actions)], dim=1)

    def losses(
        self, read: Float[Tensor, "f outputs"], actions: Num[Tensor, "f ..."]
    ) -> Float[Tensor, " parts"]:
        """Return the loss of each part of what `readings` gave."""
        return torch.stack([loss_of(*one) for one in self.by_part(read, actions)])

    def by_part(
        self, read: Float[Tensor, "f outputs"], actions: Num[Tensor, "f ..."]
    ) -> Iterator[tuple[ActionPart, Float[Tensor, "f o"], Num[Tensor, "f e"]]]:
        """Yield each part, what is read of it, and its true entries, of a box standardised."""
        if self.config.conditions.num_actions:
            entries = actions[:, None]
        else:
            entries = (actions - self.action_mean) / self.action_deviation
        sizes = [part.size for part in self.parts]
        outputs = read.split([num_outputs(part) for part in self.parts], dim=1)
        yield from zip(self.parts, outputs, entries.split(sizes, dim=1), strict=True)

    @torch.no_grad()
    def standardise(
        self, features: Float[Tensor, "f d"] | None, actions: Float[Tensor, "f a"] | None
    ) -> None:
        """Keep mean and deviation of real frames' raw features, or of the boxes of actions."""
        # A feature that never moves, as may be in a tiny network, stays as it is.
        for name, values in (("feature", features), ("action", actions)):
            if values is not None:
                mean, deviation = values.mean(0), values.std(0, correction=0)
                if name == "action":
                    counts = [part.space != "Box" for part in self.parts for _ in range(part.size)]
                    mean[counts], deviation[counts] = 0, 1
                getattr(self, f"{name}_mean").copy_(mean)
                getattr(self, f"{name}_deviation").copy_(
                    torch.where(deviation > 0, deviation, torch.ones_like(deviation))
                )


def num_outputs(part: ActionPart) -> int:
    """Return how many numbers a part is read from: one for each choice, key or value."""
    return sum(part.choices) or part.size


def loss_of(
    part: ActionPart, read: Float[Tensor, "f o"], true: Num[Tensor, "f e"]
) -> Float[Tensor, ""]:
    """Return cross entropy of choices, binary cross entropy of keys, or squared error of a box;
    mean of the entries."""
    if part.choices:
        logits = read.split(list(part.choices), dim=1)
        each = [F.cross_entropy(one, true[:, at].long()) for at, one in enumerate(logits)]
        return torch.stack(each).mean()
    if part.space == "MultiBinary":
        return F.binary_cross_entropy_with_logits(read, true)
    return F.mse_loss(read, true)


def error_of(
    part: ActionPart, read: Float[Tensor, "f o"], true: Num[Tensor, "f e"]
) -> Float[Tensor, " f"]:
    """Return the share of choices or keys that are read wrong, or the squared error of a box."""
    if part.choices:
        chosen = [logits.argmax(-1) for logits in read.split(list(part.choices), dim=1)]
        return (torch.stack(chosen, dim=1) != true).float().mean(1)
    if part.space == "MultiBinary":
        return ((read > 0) != (true > 0.5)).float().mean(1)
    return (read - true).square().mean(1)


def cost_volume(
    before: Float[Tensor, "f 3 h w"], after: Float[Tensor, "f 3 h w"]
) -> Float[Tensor, "f shifts h w"]:
    """Return mean absolute differences between the second frame and the first, shifted each way.

    The first frame goes on beyond its edges as it is at them.
    """
    h, w = before.shape[-2:]
    wide = F.pad(before, (SHIFT, SHIFT, SHIFT, SHIFT), mode="replicate")
    steps = range(2 * SHIFT + 1)
    shifted = [wide[..., down : down + h, right : right + w] for down in steps for right in steps]
    return torch.stack([(after - one).abs().mean(1) for one in shifted], dim=1)


def _rest(channels: int) -> list[nn.Module]:
    return [nn.GroupNorm(channels // GROUP_SIZE, channels), nn.GELU()]


@dataclass(frozen=True, kw_only=True)
class TrainedInverseDynamics:
    """An inverse dynamics model with what its numbers depend on."""

    network: InverseDynamics
    """In eval mode."""
    card: DataCard
    """Of the data that it was trained on."""
    held_out: Mapping[str, Any]
    """How well it reads the actions of real held-out frames."""
    digest: str = ""
    """Of the file of its weights: numbers by models of different digests cannot be compared."""

    def check_fit(self, card: DataCard, data: str) -> None:
        """Refuse frames, speeds and actions of another kind than it was trained on (ValueError)."""
        ours, theirs = to_json(self.card), to_json(card)
        # How frames are shown, and by which keys they were steered, changes nothing that it sees.
        for_players = ("pixel_art", "key_map")
        other = [name for name in ours if ours[name] != theirs[name] and name not in for_players]
        if other:
            raise ValueError(
                f"the inverse dynamics model was trained on data with other {', '.join(other)}: "
                f"{ {name: ours[name] for name in other} }, but {data} has "
                f"{ {name: theirs[name] for name in other} }; scd train-judge makes one for it"
            )


def pairs(
    frames: Float[Tensor, "b t 3 h w"],
) -> tuple[Float[Tensor, "f 3 h w"], Float[Tensor, "f 3 h w"]]:
    """Return each frame but the last and the one after it, clip by clip."""
    return frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1)


def save_inverse_dynamics(
    trained: TrainedInverseDynamics, folder: Path, about: Mapping[str, Any]
) -> None:
    """Write a model's folder whole or not at all, and what else is to be told of its training."""
    values = {
        "format": FORMAT,
        "judge": to_json(trained.network.config),
        "card": to_json(trained.card),
        "held_out": dict(trained.held_out),
        "training": dict(about),
    }
    with written_aside(folder) as aside:
        write_json(values, aside / CONFIG_FILE)
        save_weights(trained.network, aside / WEIGHTS_FILE)


def load_inverse_dynamics(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> TrainedInverseDynamics:
    """Load the folder of an inverse dynamics model.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the files are damaged, of another format, or do not fit together.
    """
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"needed the folder of an inverse dynamics model (scd train-judge), got {path}"
        )
    values = read_json(file, FORMAT)
    missing = sorted({"judge", "card", "held_out"} - set(values))
    if missing:
        raise ValueError(f"{file}: missing fields {missing}")
    config = from_json(InverseDynamicsConfig, values["judge"], f"{file}: judge")
    card = from_json(DataCard, values["card"], f"{file}: card")
    network = InverseDynamics(config, card.height, card.width)
    load_weights(network, Path(path) / WEIGHTS_FILE, str(device))
    network.requires_grad_(False)
    return TrainedInverseDynamics(
        network=network.eval(),
        card=card,
        held_out=values["held_out"],
        digest=hashlib.sha256((Path(path) / WEIGHTS_FILE).read_bytes()).hexdigest()[:16],
    )


class ReadActions(Metric):
    """Actions that are read back from frames, and the Frechet distance of the features.

    Action accuracy (`control` in results) is the share of frames from which the action that was
    given is read back; for continuous actions `control_error`, as `InverseDynamics.errors`. Where
    an action has parts, each has a row of its own (`control/keys`, `control_error/mouse`), and the
    row without a name is their mean. Baselines: `model`; `shuffled_actions`, against the actions
    that were given, those of the other clip; `truth`, real frames, the ceiling; and `unsteered`,
    real frames against the actions of another clip, what a perfect model that does not listen would
    get.

    The distance (`frechet_own`) is that between predicted and true pairs of frames.
    """

    kind = "actions"

    def __init__(self, protocol: Protocol, reader: TrainedInverseDynamics) -> None:
        super().__init__(protocol)
        self.reader = reader
        spec = reader.card.conditions
        kinds = ["control_error" if one.space == "Box" else "control" for one in parts_of(spec)]
        self.rows: dict[str, list[int]] = {}
        """Places of the parts that each row is the mean of, by the row's name."""
        for place, (kind, part) in enumerate(zip(kinds, parts_of(spec), strict=True)):
            self.rows.setdefault(kind, []).append(place)
            if spec.is_composite and part.name:
                self.rows[f"{kind}/{part.name}"] = [place]

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
        """Yield accuracy for each frame, and a distance for each quarter of the horizon."""
        seed = self.protocol.seed
        for baseline, numbers in found.items():
            if "error" in numbers:
                for metric, values in self.values_of(numbers["error"].mean(1)).items():
                    for horizon, frames in self.horizons():
                        estimate = bootstrap(values[:, frames].mean(1), seed=seed)
                        yield horizon, metric, baseline, estimate
        true = found["truth"]["features"]
        if len(true) < self.num_clips_needed:
            return
        parts = [(part.stop, part) for part in quarters_of(self.protocol.horizon)]
        for baseline, numbers in found.items():
            if "features" in numbers and baseline != "truth":
                for horizon, frames in [*parts, (None, slice(None))]:
                    sides = (numbers["features"], true)
                    made, real = (side[:, :, frames].flatten(1, 2) for side in sides)
                    yield horizon, "frechet_own", baseline, frechet_estimate(made, real, seed)

    def values_of(self, errors: Float[Tensor, "*b parts"]) -> dict[str, Float[Tensor, "*b"]]:
        """Return what each row says of errors: the share that is read right, or a box's error."""
        means = {metric: errors[..., places].mean(-1) for metric, places in self.rows.items()}
        return {
            metric: one if metric.startswith("control_error") else 1 - one
            for metric, one in means.items()
        }

    def left_out(self, card: DataCard, num_clips: int) -> dict[str, str]:
        needed = self.num_clips_needed
        if num_clips >= needed:
            return {}
        return {
            "frechet_own": f"needs {needed} clips with this inverse dynamics model, got {num_clips}"
        }

    def by_clip(self, found: Numbers) -> dict[str, Float[Tensor, "b trajectories"]]:
        return {"action_error": found["model"]["error"].double().mean((2, 3))}


def quarters_of(horizon: int) -> list[slice]:
    """Cut a horizon into quarters, or into single frames if it is shorter than four."""
    number = min(NUM_PARTS, horizon)
    ends = [horizon * part // number for part in range(number + 1)]
    return [slice(start, stop) for start, stop in zip(ends[:-1], ends[1:], strict=True)]
