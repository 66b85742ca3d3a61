"""The page of a probe: what was found, in plots and words, and what it does not say."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from scd.common.memory import readable
from scd.common.provenance import write_text
from scd.evaluation.html import origin, page_of, table
from scd.probing.plots import Point, pair_means, plot_front
from scd.probing.sections import (
    Plots,
    show_attention,
    show_colours,
    show_leave_one_out,
    show_reuse,
    show_similarity,
)

NOT_CLAIMED = (
    "That similar features are of no use: how much two vectors look alike says nothing of what a "
    "later layer reads from their difference. The map of reuse asks that directly.",
    "That a layer with little effect alone could be left out together with others.",
    "That attention on earlier frames is what a layer gets from them: values count too, and what "
    "an earlier layer has fetched stays in the tokens.",
    "What a split would lose after training. The losses here are those of untrained surgery: they "
    "rank splits of this model, and finetuning repairs much of them.",
    "That other clips, other training or another size would show the same: this is one checkpoint. "
    "The intervals say how the numbers vary over clips.",
)
"""Shown at the end of the page."""


def write_page(
    result: Mapping[str, Any], pictures: Mapping[str, Mapping[str, Any]], out: Path
) -> None:
    """Write report.html.

    Args:
        result: as in probe.json.
        pictures: what measurements keep for the plots alone, by their names.
        out: the probe's folder.
    """
    title = "What the layers of a causal video diffuser do"
    with tempfile.TemporaryDirectory() as folder:
        plots = Plots(Path(folder))
        body = [f"<h1>{title}</h1>", _opening(result), _cards(result)]
        for key, section in (
            ("proposed_split", _split),
            ("step_similarity", show_similarity),
            ("principal_components", show_colours),
            ("attention", show_attention),
            ("leave_one_out", show_leave_one_out),
            ("reuse", show_reuse),
        ):
            if key in result:
                body.append(section(result, pictures, plots))
        body += [_measured(result), _not_claimed(), origin(result)]
    write_text(page_of(title, "\n".join(body)), out / "report.html")


def _opening(result: Mapping[str, Any]) -> str:
    model, on = result["model"], result["measured_on"]
    left_out = "".join(
        f'<p class="warning">Not measured: {escape(reason)}.</p>'
        for reason in result["left_out"].values()
    )
    return (
        f"<p>A {escape(model['kind'])} of {len(model['layers'])} layers of width {model['width']} "
        f"({model['parameters'] / 1e6:.2f} M parameters), trained; looked at while it denoises "
        f"the frame after {on['given_frames']} given ones of {on['clips']} held-out clips in "
        f"{on['steps']} steps.</p>{left_out}"
    )


def _cards(result: Mapping[str, Any]) -> str:
    cards = []
    if "step_similarity" in result:
        layers = result["step_similarity"]
        middle = layers[len(layers) // 2]
        for kind, text in (("cosine", "plain"), ("centred", "centred")):
            value = pair_means(np.array([middle[kind]]))[1][0]
            cards.append(
                (f"{value:.2f}", f"{text} similarity of the last fifth of the steps with the "
                 f"steps before, {middle['name']}")
            )  # fmt: skip
    if "attention" in result:
        looks = [one for one in result["attention"] if np.mean(one["uniform"]) > 0]
        for one in (looks[0], looks[-1]):
            cards.append(
                (f"{np.mean(one['past_mass']):.2f}", f"of its attention {one['name']} gives to "
                 f"earlier frames; uniform would be {np.mean(one['uniform']):.2f}")
            )  # fmt: skip
    if "proposed_split" in result:
        split = result["proposed_split"]
        ratio = split["dense_seconds_per_frame"] / split["predicted_seconds_per_frame"]
        cards += [
            (escape(split["name"]), "recommended split: encoder layers, then first + last layers "
             "of the decoder"),
            (f"{ratio:.2f}x", "predicted speed against the model as it is"),
        ]  # fmt: skip
    shown = "".join(
        f'<div class="card"><b>{value}</b><span>{escape(text)}</span></div>'
        for value, text in cards
    )
    return f'<div class="cards">{shown}</div>'


def _split(result: Mapping[str, Any], _: Any, plots: Plots) -> str:
    split, basis = result["proposed_split"], result["prediction"]
    points = [
        Point(
            name=one["name"],
            seconds=one["predicted_seconds_per_frame"],
            loss=one["predicted_relative_loss"],
            low=one["with_past"]["ci_low"],
            high=one["with_past"]["ci_high"],
            on_front=one["on_front"],
            chosen=one["name"] == split["name"],
        )
        for one in result["candidates"]
    ]
    lines = [
        _candidate_cells(one, one["name"] == split["name"])
        for one in sorted(result["candidates"], key=lambda one: one["predicted_seconds_per_frame"])
        if one["on_front"] or one["name"] == split["name"]
    ]
    low, high = split["predicted_relative_loss_ci"]
    header = ["encoder: first + last", "ms per frame", "loss", "own frame only",
              "left out", "reuse", "attention"]  # fmt: skip
    return (
        "<h2>A split</h2>"
        f"<p><strong>Encoder: layers {_ranges(range(1, split['encoder_layers'] + 1))}</strong>, "
        f"once per frame. <strong>Decoder: layers {_ranges(split['decoder_layers'])}</strong>, "
        f"at each of {basis['num_steps']} steps. Predicted: "
        f"{1e3 * split['predicted_seconds_per_frame']:.1f} ms per frame instead of "
        f"{1e3 * split['dense_seconds_per_frame']:.1f}, and without any training a loss "
        f"{100 * split['predicted_relative_loss']:+.1f} % ({100 * low:+.1f} .. "
        f"{100 * high:+.1f}). Why this one: {escape(split['reason'])}.</p>"
        + plots(
            lambda path, ink: plot_front(points, split["dense_seconds_per_frame"], path, ink),
            "Predicted seconds per frame against predicted loss of all splits",
        )
        + table(header, lines)
        + '<p class="soft">The splits that no other beats. Loss: what layers between the '
        "decoder's first and last ones add is taken from the first step, pure noise, and added "
        "again in all others; nothing is trained. Own frame only: the decoder's layers besides see "
        "no earlier frame, as a decoder does not. Left out: the sum of the leave-one-out losses of "
        "the layers that the decoder lacks. Reuse: the loss of keeping all of the encoder's layers "
        "from the first step on. Attention: on earlier frames, in the layers after the encoder. "
        f"Seconds: one step of the model took {1e3 * basis['seconds_per_step']:.1f} ms here; the "
        f"rest follows by the ratio of {basis['counted']}, with {basis['num_context_frames']} "
        f"frames in sight and the context given to the decoder by "
        f"<code>{escape(basis['join'])}</code>.</p>"
    )


def _candidate_cells(one: Mapping[str, Any], chosen: bool) -> list[str]:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:+.1f} %"

    def interval(of: Mapping[str, float] | None) -> str:
        if of is None:
            return ""
        low, high = 100 * of["ci_low"], 100 * of["ci_high"]
        return f"{percent(of['mean'])}<small>{low:+.1f} .. {high:+.1f}</small>"

    name = escape(one["name"])
    return [
        f"<strong>{name}</strong>" if chosen else name,
        f"{1e3 * one['predicted_seconds_per_frame']:.1f}",
        interval(one["with_past"]),
        interval(one["own_frame"]),
        percent(one["left_out"]),
        percent(one["reuse"]),
        "" if one["past_mass"] is None else f"{one['past_mass']:.2f}",
    ]


def _measured(result: Mapping[str, Any]) -> str:
    on, memory = result["measured_on"], result["memory"]
    lines = [
        [escape(name.replace("_", " ")), f"{seconds:.1f}"]
        for name, seconds in result["seconds"].items()
    ]
    return (
        "<h2>What was measured</h2>"
        f"<p>{on['clips']} held-out clips that do not overlap, {on['noises_per_clip']} "
        f"draw{'s' if on['noises_per_clip'] > 1 else ''} of noise for each, seed "
        f"{result['settings']['seed']}; {on['given_frames']} frames given; Euler steps. "
        f"{readable(memory['stated_bytes'])} of memory were stated beforehand beside the weights, "
        f"{readable(memory['peak_bytes'])} were taken at most by what was measured last.</p>"
        + table(["measurement", "seconds"], lines)
    )


def _not_claimed() -> str:
    points = "".join(f"<li>{escape(text)}</li>" for text in NOT_CLAIMED)
    return f"<h2>What this does not claim</h2><ul>{points}</ul>"


def _ranges(numbers: Any) -> str:
    """Write numbers as people do: 1 to 3, 7 and 11 to 12."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    words = [f"{one[0]} to {one[-1]}" if len(one) > 1 else str(one[0]) for one in groups]
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
