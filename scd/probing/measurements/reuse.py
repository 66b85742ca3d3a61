"""Feature reuse: from step s on layers 1 .. k keep their output and are not computed. (Ours.)"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from torch import Tensor

from scd.evaluation.html import fragment, plot
from scd.evaluation.image import psnr_of
from scd.evaluation.plots import Ink, curve_panels, finish
from scd.models.config import SamplingConfig
from scd.probing.intercept import Call, held, recorded
from scd.probing.measurement import Entries, Measurement, plain
from scd.probing.plan import Plan
from scd.probing.plots import draw_bar, draw_map
from scd.probing.subject import Progress, Subject, Task, losses, silent
from scd.probing.trajectory import denoise, spread, spread_early, step_times

NUM_LATER = 4
"""Later steps at which the loss is taken, spread from the next to the last."""

LATEST_SHARE = 0.8
"""Latest step from which reuse is tried by default, as a share of all steps."""

ANNOTATED = 16
"""Columns up to which the cells of a map carry their numbers."""

SECTION = """
<h2>May features be reused?</h2>
<p>From some step on the first layers keep their output of that step and are not computed again.
This tests directly whether a model can be separated: an encoder's features are those that may be
kept from the first step on.</p>
{{ maps }}
<p class="soft">Left: increase of the loss at later steps, on the straight path from the true frame
to its noise. Right: change of the PSNR of finished frames, which is {{ "%.1f" % untouched }} dB
when nothing is kept. PSNR rewards blur: the first step's estimate is the mean of all frames that
may follow, and so a frame that keeps it can score higher.</p>
"""


@dataclass(frozen=True, kw_only=True)
class ReuseGrid:
    """Axes of the maps, from 1."""

    layers: tuple[int, ...]
    """Depths k: layers 1 .. k, of those that run at every step, are kept."""
    steps: tuple[int, ...]
    """Steps s: the last in which they are computed."""

    @staticmethod
    def of(subject: Subject, num_steps: int, num_layers: int = 6, num_starts: int = 5) -> ReuseGrid:
        """Spread a grid over all depths and over the steps, more of them early.

        With as many of either as there are, or more, the map is complete.
        """
        depth = len(subject.stepped)
        layers = spread(max(1, round(depth / num_layers)), depth, num_layers)
        if num_starts >= num_steps - 1:
            return ReuseGrid(layers=tuple(layers), steps=tuple(range(1, num_steps)))
        last = max(1, min(num_steps - 1, round(LATEST_SHARE * num_steps)))
        return ReuseGrid(layers=tuple(layers), steps=tuple(spread_early(last, num_starts)))

    def check(self, subject: Subject, num_steps: int) -> None:
        """Refuse what does not exist (ValueError)."""
        depth = len(subject.stepped)
        if not self.layers or not all(1 <= layer <= depth for layer in self.layers):
            raise ValueError(f"layers to keep lie in 1 .. {depth}, got {list(self.layers)}")
        if not self.steps or not all(1 <= step < num_steps for step in self.steps):
            raise ValueError(
                f"steps after which to keep lie in 1 .. {num_steps - 1}, got {list(self.steps)}"
            )


@dataclass(frozen=True, kw_only=True)
class ReuseLoss:
    """Loss of later steps with kept features, on the straight path from the true frame."""

    grid: ReuseGrid
    relative_loss: Float[np.ndarray, "layers steps"]
    """Loss with kept features / loss without - 1, of the means over clips and later steps."""
    later: tuple[tuple[int, ...], ...]
    """For each step of the grid, the later ones at which the loss was taken."""


@dataclass(frozen=True, kw_only=True)
class ReuseRollout:
    """Frames of whole trajectories with kept features."""

    grid: ReuseGrid
    psnr: Float[np.ndarray, "layers steps"]
    """PSNR, in dB, of the mean error against the true frame."""
    psnr_untouched: float
    """Of the trajectory in which nothing is kept."""
    psnr_to_untouched: Float[np.ndarray, "layers steps"]
    """PSNR, in dB, against the frame of that trajectory."""


@torch.no_grad()
def reuse_loss(
    subject: Subject,
    task: Task,
    sampling: SamplingConfig,
    grid: ReuseGrid,
    num_later: int = NUM_LATER,
    progress: Progress = silent,
) -> ReuseLoss:
    """Measure the loss of later steps whose first layers repeat an earlier step.

    Both steps see the same true frame and the same noise, mixed by their times.

    Args:
        num_later: later steps at which the loss is taken.

    """
    times = step_times(sampling)
    num_steps = len(times) - 1
    grid.check(subject, num_steps)
    state = task.begin(subject)
    found = np.zeros((len(grid.layers), len(grid.steps)), np.float32)
    all_later = []
    for column, step in enumerate(grid.steps):
        later = spread(step + 1, num_steps, num_later)
        all_later.append(tuple(later))
        levels = [times[number - 1] for number in later]
        with recorded(_stepped(subject)) as calls:
            subject.velocity(state, task.at(times[step - 1]), times[step - 1])
        full = _mean_loss(subject, task, state, levels)
        for row, depth in enumerate(grid.layers):
            with _kept(subject, calls, depth):
                found[row, column] = _mean_loss(subject, task, state, levels) / full - 1
            progress((column + (row + 1) / len(grid.layers)) / len(grid.steps))
    return ReuseLoss(grid=grid, relative_loss=found, later=tuple(all_later))


@torch.no_grad()
def reuse_rollout(
    subject: Subject,
    task: Task,
    sampling: SamplingConfig,
    grid: ReuseGrid,
    decode: Callable[[Tensor], Tensor] = lambda frames: frames,
    progress: Progress = silent,
) -> ReuseRollout:
    """Finish trajectories whose first layers repeat an earlier step of the same trajectory.

    Args:
        decode: from latent frames to pixels in [-1, 1].
    """
    times = step_times(sampling)
    grid.check(subject, len(times) - 1)
    state = task.begin(subject)
    true = decode(task.frame)
    frames: dict[tuple[int, int], Tensor] = {}
    noisy, num_cells = task.noise, len(grid.layers) * len(grid.steps)
    for step in range(1, len(times)):
        with recorded(_stepped(subject)) as calls:
            (noisy,) = denoise(subject, state, noisy, times[step - 1 : step + 1])
        # Finished at once: the features of one step are held, not those of all.
        for depth in grid.layers if step in grid.steps else ():
            with _kept(subject, calls, depth):
                *_, frames[depth, step] = denoise(subject, state, noisy, times, step)
            progress(len(frames) / num_cells)
    untouched = decode(noisy)
    finished = [[decode(frames[depth, step]) for step in grid.steps] for depth in grid.layers]
    psnr, to_untouched = (
        np.array([[_psnr(frame, goal) for frame in row] for row in finished], np.float32)
        for goal in (true, untouched)
    )
    return ReuseRollout(
        grid=grid,
        psnr=psnr,
        psnr_untouched=_psnr(untouched, true),
        psnr_to_untouched=to_untouched,
    )


def _stepped(subject: Subject) -> list[Any]:
    return [subject.layers[place] for place in subject.stepped]


def _kept(subject: Subject, calls: dict[int, Call], depth: int) -> Any:
    return held(_stepped(subject)[:depth], [calls[place] for place in range(depth)])


def _mean_loss(subject: Subject, task: Task, state: Any, levels: Sequence[float]) -> float:
    return float(losses(subject, task, levels, state).double().mean())


def _psnr(frames: Tensor, true: Tensor) -> float:
    return float(psnr_of((frames.float() - true.float()).square().mean()))


def measure(plan: Plan, progress: Progress) -> Entries:
    subject, task, sampling, config = plan.subject, plan.task, plan.sampling, plan.config
    grid = ReuseGrid.of(subject, config.num_steps, config.reuse_depths, config.reuse_steps)
    loss = reuse_loss(subject, task, sampling, grid, progress=lambda share: progress(0.3 * share))
    rollout = reuse_rollout(
        subject, task, sampling, grid, plan.decode, lambda share: progress(0.3 + 0.7 * share)
    )
    return {
        "reuse": {
            "layers": list(grid.layers),
            "steps": list(grid.steps),
            "relative_loss": plain(loss.relative_loss),
            "psnr": plain(rollout.psnr),
            "psnr_untouched": rollout.psnr_untouched,
            "psnr_change": plain(rollout.psnr - rollout.psnr_untouched),
            "psnr_to_untouched": plain(rollout.psnr_to_untouched),
        }
    }


def section(result: Mapping[str, Any], _: Mapping[str, Any]) -> Markup:
    found = result["reuse"]
    names = [str(layer) for layer in found["layers"]]
    lost, change = np.array(found["relative_loss"]), np.array(found["psnr_change"])
    return fragment(
        SECTION,
        maps=plot(
            partial(plot_reuse, lost, change, names, found["steps"]),
            "Loss and PSNR when the first layers are kept from a step on",
        ),
        untouched=found["psnr_untouched"],
    )


def plot_reuse(
    lost: Float[np.ndarray, "l t"],
    gains: Float[np.ndarray, "l t"],
    names: Sequence[str],
    steps: Sequence[int],
    path: Path,
    ink: Ink,
) -> None:
    """Draw two maps: relative loss and change of PSNR, layers kept against the step kept."""
    size = (max(4.2, 0.42 * len(steps) + 1.6), max(3.0, 0.27 * len(names) + 1.1))
    figure, panels = curve_panels(2, ink)
    figure.set_size_inches(2 * size[0], size[1])
    between = Normalize(min(float(gains.min()), 0), max(float(gains.max()), 0) + 0.01)
    for axes, values, scale, label, form in (
        (panels[0], 100 * lost, PowerNorm(0.5, 0, max(float(100 * lost.max()), 1.0), clip=True),
         "loss increase, %", "{:.0f}"),
        (panels[1], gains, between, "change of PSNR, dB", "{:+.1f}"),
    ):  # fmt: skip
        cmap = "viridis" if axes is panels[1] else "viridis_r"
        drawn = draw_map(axes, values, names, scale, cmap)
        axes.set_xticks(range(len(steps)), [str(step) for step in steps], fontsize=7)
        axes.set_xlabel("reused after step")
        axes.set_ylabel("layers up to")
        if len(steps) <= ANNOTATED:
            _annotate(axes, values, scale, cmap == "viridis_r", form)
        draw_bar(figure, drawn, [axes], ink, label)
    finish(figure, path, "", ink)


def _annotate(
    axes: Axes, values: np.ndarray, scale: Normalize, dark_is_high: bool, form: str
) -> None:
    for row, column in np.ndindex(*values.shape):
        high = float(scale(values[row, column])) > 0.55
        axes.text(
            column, row, form.format(values[row, column]), ha="center", va="center", fontsize=6,
            color="white" if high == dark_is_high else "black",
        )  # fmt: skip


MEASUREMENT = Measurement(measure=measure, section=section, place=60)
