"""Whether a model has learnt what a probe takes for granted: what the page warns of.

What a split loses says something only of a model that predicts. One that was not trained may lose
nothing, or even gain, when its layers are frozen, since they do nothing of use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scd.probing.measurement import Entries, plain
from scd.probing.plan import Plan
from scd.probing.subject import Task, losses, relative


def loss_of_mean(task: Task, levels: Sequence[float]) -> Float[Tensor, "levels b"]:
    """Return the loss of the best guess that knows nothing but the mean and variance of each
    channel over all clips: at each time, of each clip.

    The velocity is guessed from the noisy frame as of Gaussian pixels that do not depend on each
    other: minus the mean, plus covariance over variance times what the frame exceeds its mean by.
    Its expected loss is s / ((1 - t)^2 s + t^2), for time t and variance s.
    """
    clean = task.clean.float()
    mean = clean.mean(dim=(0, 1, 3, 4), keepdim=True)[0]
    variance = (clean - mean).square().mean(dim=(0, 1, 3, 4), keepdim=True)[0]
    found = []
    for time in levels:
        gain = (time - (1 - time) * variance) / ((1 - time) ** 2 * variance + time**2)
        guess = -mean + gain * (task.at(time).float() - (1 - time) * mean)
        true = task.noise.float() - task.frame.float()
        found.append((guess - true).square().mean(dim=(-3, -2, -1)))
    return task.per_clip(torch.stack(found))


@torch.no_grad()
def against_mean(plan: Plan) -> Entries:
    """Compare the model's loss with that of the mean, on the same clips and noise."""
    model = losses(plan.subject, plan.task, plan.levels)
    mean = loss_of_mean(plan.task, plan.levels)
    found = relative(model, mean)
    return {
        "levels": list(plan.levels),
        "loss": plain(model.mean(1).cpu()),
        "loss_of_mean": plain(mean.mean(1).cpu()),
        "relative_loss": found.mean,
        "ci_low": found.ci_low,
        "ci_high": found.ci_high,
    }


def warnings_of(result: Mapping[str, Any]) -> list[str]:
    """Say why the model may have learnt too little for a probe; empty: nothing speaks for it.

    Args:
        result: of the probe, `against_mean` in it.
    """
    found, against = [], result["against_mean"]
    if not against["ci_high"] < 0:
        found.append(
            f"the model predicts no better than the mean: its loss differs by "
            f"{_percent(against, 'relative_loss')} from that of a guess which knows only the mean "
            "and variance of the pixels"
        )
    better = [one for one in result.get("candidates", ()) if one["with_past"]["ci_high"] < 0]
    if better:
        best = min((one["with_past"] for one in better), key=lambda one: one["mean"])
        found.append(
            f"freezing layers improves its loss, in {len(better)} of {len(result['candidates'])} "
            f"splits, at best by {_percent(best, 'mean')}"
        )
    useless = [one for one in result.get("leave_one_out", ()) if one["ci_high"] < 0]
    if useless:
        names = ", ".join(f"{one['name']} ({_percent(one, 'relative_loss')})" for one in useless)
        found.append(f"leaving layers out improves its loss: {names}")
    return found


def _percent(of: Mapping[str, Any], mean: str) -> str:
    low, high = (f"{100 * of[end]:+.1f}" for end in ("ci_low", "ci_high"))
    return f"{100 * of[mean]:+.1f} % ({low} .. {high})"
