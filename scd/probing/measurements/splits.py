"""Which split of a dense model to take: split ablations, predicted seconds, a recommendation.

What a split is, loses and costs: scd/probing/splits.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from scd.common.config import from_json, to_json
from scd.evaluation.html import fragment, plot
from scd.evaluation.plots import Ink, curve_panels, finish, legend, text_colour
from scd.probing.measurement import Entries, Measurement, Parts
from scd.probing.plan import Plan
from scd.probing.plots import BLUE, GREY, ORANGE, scale_percent
from scd.probing.splits import (
    Candidate,
    Speed,
    SplitLoss,
    candidates_of,
    chosen_splits,
    propose,
    split_losses,
    time_step,
)
from scd.probing.subject import Progress

SECTION = """
{% from "evaluation/parts.html" import table %}
<h2>A split into encoder and decoder</h2>
<p><strong>Encoder: layers {{ encoder }}</strong>, once per frame. <strong>Decoder: layers
{{ decoder }}</strong>, at each of {{ basis.num_steps }} steps. Predicted:
{{ "%.1f" % (1e3 * split.predicted_seconds_per_frame) }} ms per frame instead of
{{ "%.1f" % (1e3 * split.dense_seconds_per_frame) }}; the loss changes by
{{ "%+.1f" % (100 * split.predicted_relative_loss) }} %
({{ "%+.1f" % (100 * split.predicted_relative_loss_ci[0]) }} ..
{{ "%+.1f" % (100 * split.predicted_relative_loss_ci[1]) }}) without any training. Why this one:
{{ split.reason }}.{% if not split.is_recommended %} <strong>This is no recommendation</strong>: see
the warning at the top.{% endif %}</p>
{{ front }}
{{ table(["encoder: first + last", "ms per frame", "loss", "own frame only", "left out", "reuse",
          "attention"], lines) }}
<p class="soft">The Pareto front: splits that no other beats in both time and loss. Loss: increase
when the layers between the decoder's first and last ones add at every step what they added at the
first, from pure noise; nothing is trained. Own frame only: the decoder's layers see no earlier
frame either, as in a separable model. Left out: sum of the leave-one-out losses of the layers that
the decoder lacks. Reuse: loss increase when all of the encoder's layers keep their output of the
first step. Attention: to earlier frames, mean of the layers after the encoder. Time: one step of
the model took {{ "%.1f" % (1e3 * basis.seconds_per_step) }} ms here; the rest is predicted from the
ratio of {{ basis.counted }}, with {{ basis.num_context_frames }} frames in the attention window and
the context given to the decoder by <code>{{ basis.join }}</code>.</p>
"""


def measure(plan: Plan, progress: Progress) -> Entries:
    """Try splits of a dense model, and time it."""
    subject = plan.subject
    if any(layer.once for layer in subject.layers):
        return {"left_out": "splits: this model is split already"}
    if len(subject.layers) < 2:
        return {"left_out": "splits: a model of one layer cannot be split"}
    seconds = time_step(subject, plan.task)
    tried = chosen_splits(len(subject.layers))
    found = split_losses(subject, plan.task, plan.levels, tried, progress=progress)
    return {"seconds_per_step": seconds, "losses": [to_json(one) for one in found]}


def conclude(plan: Plan, parts: Parts) -> Entries:
    """Recommend a split, from what all measurements found."""
    subject, config = plan.subject, plan.config
    seconds = parts["splits"]["seconds_per_step"]
    losses = [from_json(SplitLoss, one) for one in parts["splits"]["losses"]]
    num_frames = plan.task.clean.shape[1]
    speed = Speed(
        seconds_per_step=seconds,
        num_steps=plan.frame_steps,
        num_context_frames=min(num_frames, subject.window or num_frames),
        join=config.join,
        sizes=subject.sizes,
    )
    candidates = candidates_of(losses, speed, **known_of_layers(parts))
    dense_seconds = speed.dense_seconds(len(subject.layers))
    chosen, reason = propose(candidates, dense_seconds, config.tolerance)
    return {
        "proposed_split": candidate_entry(chosen)
        | {
            "predicted_relative_loss_ci": [chosen.with_past.ci_low, chosen.with_past.ci_high],
            "dense_seconds_per_frame": dense_seconds,
            "reason": reason,
        },
        "candidates": [candidate_entry(one) for one in candidates],
        "prediction": {
            "seconds_per_step": seconds,
            "num_steps": speed.num_steps,
            "num_context_frames": speed.num_context_frames,
            "join": speed.join,
            "counted": "layers" if subject.sizes is None else "operations",
            "tolerance": config.tolerance,
        },
    }


def known_of_layers(parts: Parts) -> dict[str, Mapping[int, float] | None]:
    """Return what the other measurements say of single layers, for `candidates_of`."""
    left = parts.get("leave_one_out", {}).get("leave_one_out")
    attention = parts.get("attention", {}).get("attention")
    reuse = parts.get("reuse", {}).get("reuse")
    return {
        "leave_one_out": left and {one["layer"]: one["relative_loss"] for one in left},
        "past_mass": attention and {one["layer"]: fmean(one["past_mass"]) for one in attention},
        "reuse": reuse
        and {
            layer: losses[0]
            for layer, losses in zip(reuse["layers"], reuse["relative_loss"], strict=True)
        },
    }


def candidate_entry(one: Candidate) -> Entries:
    return {
        "name": one.name,
        "encoder_layers": one.split.num_encoder,
        "decoder_layers": one.split.decoder_layers,
        "predicted_seconds_per_frame": one.seconds,
        "predicted_relative_loss": one.with_past.mean,
    } | {name: value for name, value in asdict(one).items() if name not in ("split", "seconds")}


def cards(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    split = result["proposed_split"]
    ratio = split["dense_seconds_per_frame"] / split["predicted_seconds_per_frame"]
    return [
        (split["name"], ("recommended split" if split["is_recommended"] else
         "split that the rule names, no recommendation: see the warning")
         + ": encoder layers, then first + last layers of the decoder"),
        (f"{ratio:.2f}x", "predicted speed against the model as it is"),
    ]  # fmt: skip


def section(result: Mapping[str, Any], _: Mapping[str, Any]) -> Markup:
    """Show the recommended split among all."""
    split, candidates = result["proposed_split"], result["candidates"]
    chosen = split["name"]
    shown = [one for one in candidates if one["on_front"] or one["name"] == chosen]
    shown.sort(key=lambda one: one["predicted_seconds_per_frame"])
    return fragment(
        SECTION,
        split=split,
        basis=result["prediction"],
        encoder=_ranges(range(1, split["encoder_layers"] + 1)),
        decoder=_ranges(split["decoder_layers"]),
        front=plot(
            partial(plot_front, candidates, chosen, split["dense_seconds_per_frame"]),
            "Predicted seconds per frame against predicted loss of all splits",
        ),
        lines=[_cells(one, one["name"] == chosen) for one in shown],
    )


def _cells(one: Mapping[str, Any], chosen: bool) -> list[str]:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:+.1f} %"

    def with_interval(of: Mapping[str, float] | None) -> str:
        if of is None:
            return ""
        low, high = (f"{100 * of[end]:+.1f}" for end in ("ci_low", "ci_high"))
        return Markup(f"{percent(of['mean'])}<small>{low} .. {high}</small>")

    return [
        Markup("<strong>{}</strong>").format(one["name"]) if chosen else one["name"],
        f"{1e3 * one['predicted_seconds_per_frame']:.1f}",
        with_interval(one["with_past"]),
        with_interval(one["own_frame"]),
        percent(one["left_out"]),
        percent(one["reuse"]),
        "" if one["past_mass"] is None else f"{one['past_mass']:.2f}",
    ]


def _ranges(numbers: Any) -> str:
    """Write numbers as people do: 1 to 3, 7 and 11 to 12."""
    runs = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    groups = [[number for _, number in run] for _, run in runs]
    words = [f"{one[0]} to {one[-1]}" if len(one) > 1 else str(one[0]) for one in groups]
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def plot_front(
    candidates: Sequence[Mapping[str, Any]], chosen: str, dense_seconds: float, path: Path, ink: Ink
) -> None:
    """Draw candidates for a split: predicted seconds per frame against predicted loss."""
    figure, (axes,) = curve_panels(1, ink)
    figure.set_size_inches(7.5, 4.2)
    axes.axvline(1e3 * dense_seconds, color=GREY, linestyle="--", label="unsplit")
    places = {
        one["name"]: (1e3 * one["predicted_seconds_per_frame"], 100 * one["with_past"]["mean"])
        for one in candidates
    }
    front = sorted(places[one["name"]] for one in candidates if one["on_front"])
    axes.plot(*zip(*front, strict=True), color=BLUE, linewidth=1, label="front")
    for one in candidates:
        is_chosen = one["name"] == chosen
        colour, at = ORANGE if is_chosen else BLUE, places[one["name"]]
        if one["on_front"]:
            ends = (100 * one["with_past"][end] for end in ("ci_low", "ci_high"))
            axes.vlines(at[0], *ends, color=colour, linewidth=1)
            axes.annotate(
                one["name"], at, textcoords="offset points", xytext=(5, 4), fontsize=7,
                color=text_colour(ink),
            )  # fmt: skip
        axes.plot(
            *at, color=colour, marker="*" if is_chosen else "o", linestyle="none",
            markersize=13 if is_chosen else 4, alpha=1 if one["on_front"] else 0.35,
            label="chosen" if is_chosen else None,
        )  # fmt: skip
    scale_percent(axes)
    axes.set_xlabel("predicted ms per frame")
    axes.set_ylabel("loss increase without training, %")
    legend(axes, ink)
    finish(figure, path, "", ink)


MEASUREMENT = Measurement(
    measure=measure, section=section, place=10, cards=cards, conclude=conclude
)
