"""How well pictures and actions fit together: at which lag the motion of a frame tells the action.

Frame i is to be the effect of action i. Whether it is can be measured without a model: from the
motion between frames i-1 and i, a linear map is fitted that tells action i + lag, for lags of -3 to
3, and tried on clips that it was not fitted on. If data is aligned, lag 0 is told best.

Two things would blur this, and both are taken out first. Motion goes on: so of each motion only
what the two motions before it do not tell is used. Actions are held: so of each action only what
the two before it do not tell is to be told. What has inertia, such as a car, shows an action in
several frames, in the first of them often least: so the lag that counts is the newest one of those
that stand out beside each other, not the largest. A frame cannot show what is done later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch.nn.functional import adaptive_avg_pool2d

from scd.data.clip import Clip
from scd.data.spaces import ActionPart, ConditionSpec

LAGS = tuple(range(-3, 4))
"""Frames by which an action may come too early (below 0) or too late."""

SIDE, CELLS = 32, 4
"""Rows and columns of the pictures that are compared, and of cells in which motion is counted."""

MEMORY = 2
"""Frames before, of motion and of actions, that tell what would have come anyway."""

RIDGE = 0.05
"""Pull of the linear maps towards 0, as a share of the number of frames."""

FOLDS = 4
"""Parts of the clips; each is told by what the others teach."""

MAX_ONE_HOT = 64
"""Choices up to which each has a column of its own."""

SURE = 3.5
"""Standard errors from which a correlation stands out."""

SHARE = 0.25
"""Part of the largest correlation from which another one stands out beside it."""


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """What was measured."""

    correlations: dict[int, float]
    """By lag: correlation of what the motion of frame i tells of action i + lag with that action,
    on clips that were not fitted. Empty: it cannot be measured."""
    best_lag: int | None
    """The newest action that frames show, 0 is right: of the lags beside the largest correlation
    that stand out too, the last. None: it cannot be told."""
    num_clips: int
    num_frames: int
    """Motions that were compared."""
    message: str


def measure_alignment(spec: ConditionSpec, clips: Sequence[Clip]) -> Alignment:
    """Measure at which lag the motion of frames tells actions best.

    Args:
        spec: what steers the clips.
        clips: some of them, of pixels; longer ones tell more.
    """
    pairs = [
        (motion(clip.frames.numpy()), columns(spec, clip.actions.numpy()))
        for clip in clips
        if clip.actions is not None and not clip.encoded and len(clip) > 2 * len(LAGS)
    ]
    num_frames = sum(len(moved) for moved, _ in pairs)
    if not pairs:
        return _untold("no clip has actions and enough frames", len(clips), num_frames)
    if max(float(np.abs(moved).max()) for moved, _ in pairs) < 1e-6:
        return _untold("nothing moves in the clips that were read", len(pairs), num_frames)
    if all((acts == pairs[0][1][:1]).all() for _, acts in pairs):
        return _untold("the action never changes in the clips", len(pairs), num_frames)
    motions = _rest([moved for moved, _ in pairs])
    actions = _rest([acts[1:] for _, acts in pairs])
    found = {lag: _told(motions, actions, lag) for lag in LAGS}
    return _judged(found, len(pairs), num_frames)


def motion(frames: Float[np.ndarray, "t c h w"]) -> Float[np.ndarray, "moved entries"]:
    """Return what moved between frames, as numbers: of each cell of the picture by how much it
    changed, how it brightened, and how far it went across and down."""
    small = adaptive_avg_pool2d(torch.from_numpy(frames), (SIDE, SIDE)).double().numpy()
    change, mean = np.diff(small, axis=0), (small[1:] + small[:-1]) / 2
    down, across = np.gradient(mean, axis=(-2, -1))

    def by_cell(values: np.ndarray) -> np.ndarray:
        side = SIDE // CELLS
        cells = values.sum(1).reshape(len(values), CELLS, side, CELLS, side)
        return cells.mean(axis=(2, 4)).reshape(len(values), -1)

    return np.concatenate(
        [
            by_cell(np.abs(change)),
            by_cell(change),
            by_cell(-change * across),
            by_cell(-change * down),
        ],
        axis=1,
    )


def columns(spec: ConditionSpec, actions: np.ndarray) -> Float[np.ndarray, "t columns"]:
    """Return actions as columns: one of each choice, key and entry of a box."""
    if spec.num_actions:
        return _one_hot(actions, spec.num_actions)
    parts = spec.action_parts or (ActionPart(name="", space="Box", shape=(spec.action_dim,)),)
    found, entry = [], 0
    for part in parts:
        for place in range(part.size):
            values = actions[:, entry + place]
            num = part.choices[place] if part.choices else 0
            found.append(_one_hot(values.astype(int), num) if num else values[:, None])
        entry += part.size
    return np.concatenate(found, axis=1).astype(np.float64)


def _one_hot(ids: np.ndarray, num: int) -> np.ndarray:
    if num > MAX_ONE_HOT:
        return ids[:, None].astype(np.float64)
    return np.eye(num)[ids]


def _ridge(given: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the linear map from columns of mean 0 to others."""
    square = given.T @ given
    pull = RIDGE * len(given) * max(float(np.diag(square).mean()) / len(given), 1e-12)
    return np.linalg.solve(square + pull * np.eye(len(square)), given.T @ wanted)


def _rest(series: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Take out of each row what the rows before it tell; columns then have deviation 1. The first
    rows of each series become NaN."""
    rows = np.concatenate(series)
    scale = rows.std(0)
    mean, scale = rows.mean(0), np.where(scale > 1e-9, scale, np.inf)
    scaled = [(one - mean) / scale for one in series]
    before = [
        np.concatenate([one[MEMORY - back : len(one) - back] for back in range(1, MEMORY + 1)], 1)
        for one in scaled
    ]
    after = [one[MEMORY:] for one in scaled]
    fitted = _ridge(np.concatenate(before), np.concatenate(after))
    rest = [one - past @ fitted for one, past in zip(after, before, strict=True)]
    scale = np.concatenate(rest).std(0)
    scale = np.where(scale > 1e-9, scale, np.inf)
    return [np.concatenate([np.full((MEMORY, one.shape[1]), np.nan), one / scale]) for one in rest]


def _told(motions: Sequence[np.ndarray], actions: Sequence[np.ndarray], lag: int) -> float:
    """Return the correlation of actions at a lag with what motions tell of them."""
    given, wanted, fold = [], [], []
    for number, (moved, acts) in enumerate(zip(motions, actions, strict=True)):
        length = len(moved)
        # The same frames for every lag, so that lags differ by nothing else.
        at = np.arange(MEMORY + max(LAGS), length - max(LAGS))
        given.append(moved[at])
        wanted.append(acts[at + lag])
        alone = len(motions) < FOLDS
        # Neighbours in one part: clips of one episode resemble each other.
        mine = number * FOLDS // len(motions)
        fold.append(at * FOLDS // length if alone else np.full(len(at), mine))
    x, y, part = np.concatenate(given), np.concatenate(wanted), np.concatenate(fold)
    told = np.empty_like(y)
    for number in range(FOLDS):
        mine = part == number
        if mine.any():
            mean_x, mean_y = x[~mine].mean(0), y[~mine].mean(0)
            told[mine] = (x[mine] - mean_x) @ _ridge(x[~mine] - mean_x, y[~mine] - mean_y)
    centred = y - y.mean(0)
    size = np.sqrt((told**2).sum() * (centred**2).sum())
    return float((told * centred).sum() / size) if size > 0 else 0.0


def _judged(found: dict[int, float], num_clips: int, num_frames: int) -> Alignment:
    peak = max(found, key=lambda lag: found[lag])
    needed = max(SURE / np.sqrt(num_frames), SHARE * found[peak])
    best: int | None = peak
    while best + 1 in found and found[best + 1] >= needed:
        best += 1
    told = f"correlation {found[best]:.2f}" + (
        f", {found[peak]:.2f} with action i{peak:+d}" if peak != best else ""
    )
    if found[peak] < SURE / np.sqrt(num_frames):
        best = None
        message = (
            f"cannot tell: no lag stands out (correlation {found[peak]:.2f} at lag {peak}, of "
            f"{num_frames} frames)"
        )
    elif best == 0:
        message = f"frame i shows action i, as it should ({told})"
    else:
        way = "later" if best < 0 else "earlier"
        seen = ", unless who acted saw frame i first" if best > 0 else ""
        message = (
            f"frame i shows action i{best:+d} ({told}): move actions {abs(best)} "
            f"frame{'s' * (abs(best) > 1)} {way}{seen}"
        )
    return Alignment(
        correlations={lag: round(value, 4) for lag, value in found.items()},
        best_lag=best,
        num_clips=num_clips,
        num_frames=num_frames,
        message=message,
    )


def _untold(why: str, num_clips: int, num_frames: int) -> Alignment:
    return Alignment(
        correlations={},
        best_lag=None,
        num_clips=num_clips,
        num_frames=num_frames,
        message=f"cannot tell: {why}",
    )
