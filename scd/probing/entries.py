"""What each measurement adds to probe.json, and what it keeps for the plots alone.

Layers are objects with `layer`, its number from 1, and `name`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from scd.evaluation.image import Estimate
from scd.probing.ablation import LeaveOneOut
from scd.probing.attention import AttentionMass
from scd.probing.features import ColourView
from scd.probing.reuse import ReuseLoss, ReuseRollout
from scd.probing.similarity import StepSimilarity
from scd.probing.splice import SpliceLoss, Split
from scd.probing.split import Candidate, Proposal

DIGITS = 6
"""Digits after the point: more would say nothing, and matrices are long."""

Entries = dict[str, Any]
"""Plain JSON values. What stands under "pictures" is for the plots and stays out of probe.json."""


def similarity_entries(found: StepSimilarity, names: Sequence[str]) -> Entries:
    """Return one object per layer with its step by step matrices."""
    layers = [
        _layer(layer, names)
        | {
            kind: _plain(getattr(found, kind)[row])
            for kind in ("cosine", "flattened", "centred", "centred_by_step", "cka")
        }
        for row, layer in enumerate(found.layers)
    ]
    return {"step_similarity": layers, "cka_steps": list(found.cka_steps)}


def colour_entries(found: ColourView, names: Sequence[str]) -> Entries:
    """Return per layer how soon its components look as in the last step; and the pictures."""
    layers = [
        _layer(layer, names)
        | {"agreement": _plain(found.agreement[row]), "explained": _plain(found.explained[row])}
        for row, layer in enumerate(found.layers)
    ]
    pictures = {"steps": list(found.steps), "colours": _plain(found.pictures)}
    return {"principal_components": layers, "pictures": pictures}


def attention_entries(found: AttentionMass, names: Sequence[str]) -> Entries:
    """Return per layer its shares of attention by head, averaged over steps, and by distance."""
    layers = [
        _layer(layer, names)
        | {
            "past_mass": _plain(found.past_mass[row].mean(-1)),
            "uniform": _plain(np.full(found.past_mass.shape[1], found.uniform[row])),
            "context_mass": _plain(found.context_mass[row].mean(-1)),
            "past_mass_by_step": _plain(found.past_mass[row]),
            "by_distance": _plain(found.profile[row]),
        }
        for row, layer in enumerate(found.layers)
    ]
    pictures = {"maps": _plain(found.maps), "chosen": list(found.chosen)}
    return {"attention": layers, "pictures": pictures}


def leave_one_out_entries(found: LeaveOneOut, names: Sequence[str]) -> Entries:
    """Return per layer the relative loss without it, with its interval."""
    layers = [
        _layer(layer, names)
        | {
            kind: _plain(getattr(found, kind)[row])
            for kind in ("relative_loss", "ci_low", "ci_high", "by_level")
        }
        for row, layer in enumerate(found.layers)
    ]
    return {
        "leave_one_out": layers,
        "loss": {"levels": list(found.levels), "mean": _plain(found.loss.mean(-1))},
    }


def reuse_entries(loss: ReuseLoss, rollout: ReuseRollout) -> Entries:
    """Return the maps of reuse, layers x steps."""
    return {
        "reuse": {
            "layers": list(loss.grid.layers),
            "steps": list(loss.grid.steps),
            "relative_loss": _plain(loss.relative_loss),
            "psnr": _plain(rollout.psnr),
            "psnr_untouched": rollout.psnr_untouched,
            "psnr_change": _plain(rollout.psnr - rollout.psnr_untouched),
            "psnr_to_untouched": _plain(rollout.psnr_to_untouched),
        }
    }


def splice_entries(found: Sequence[SpliceLoss], seconds_per_step: float) -> Entries:
    """Return the loss of each split, and the time of a step of the dense model."""
    return {
        "seconds_per_step": seconds_per_step,
        "splices": [
            {
                "split": asdict(one.split),
                "with_past": asdict(one.with_past),
                "own_frame": None if one.own_frame is None else asdict(one.own_frame),
            }
            for one in found
        ],
    }


def splice_losses_of(entries: Mapping[str, Any]) -> tuple[list[SpliceLoss], float]:
    """Undo `splice_entries`."""
    losses = [
        SpliceLoss(
            split=Split(**one["split"]),
            with_past=Estimate(**one["with_past"]),
            own_frame=None if one["own_frame"] is None else Estimate(**one["own_frame"]),
        )
        for one in entries["splices"]
    ]
    return losses, entries["seconds_per_step"]


def proposal_entries(
    proposal: Proposal, candidates: Sequence[Candidate], basis: Mapping[str, Any]
) -> Entries:
    """Return the recommended split, and all candidates.

    Args:
        proposal: the recommended one.
        candidates: all of them.
        basis: what the predictions rest on.
    """
    chosen = candidate_entry(proposal.candidate)
    return {
        "proposed_split": chosen
        | {
            "predicted_relative_loss_ci": [
                proposal.candidate.with_past.ci_low,
                proposal.candidate.with_past.ci_high,
            ],
            "dense_seconds_per_frame": proposal.dense_seconds,
            "reason": proposal.reason,
        },
        "candidates": [candidate_entry(one) for one in candidates],
        "prediction": dict(basis),
    }


def candidate_entry(one: Candidate) -> Entries:
    """Return one candidate for a split."""
    return {
        "name": one.name,
        "encoder_layers": one.split.num_encoder,
        "decoder_layers": one.split.decoder_layers,
        "predicted_seconds_per_frame": one.seconds,
        "predicted_relative_loss": one.with_past.mean,
        "with_past": asdict(one.with_past),
        "own_frame": None if one.own_frame is None else asdict(one.own_frame),
        "left_out": one.left_out,
        "reuse": one.reuse,
        "past_mass": one.past_mass,
        "on_front": one.on_front,
    }


def _layer(number: int, names: Sequence[str]) -> Entries:
    return {"layer": number, "name": names[number - 1]}


def _plain(values: Any) -> Any:
    return np.round(np.asarray(values, np.float64), DIGITS).tolist()
