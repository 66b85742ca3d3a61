"""Names of Wan's weights: diffusers' (which are ours), and the original ones, both ways.

The original names are those of the Wan2.1 release, and of causal models that were trained from it
(CausVid, Self-Forcing). A renaming and nothing else: no tensor is transposed, split or permuted.
"""

from __future__ import annotations

import re

from scd.common.weights import bare

_PAIRS = (
    ("blocks.{n}.self_attn.q.", "blocks.{n}.attn1.to_q."),
    ("blocks.{n}.self_attn.k.", "blocks.{n}.attn1.to_k."),
    ("blocks.{n}.self_attn.v.", "blocks.{n}.attn1.to_v."),
    ("blocks.{n}.self_attn.o.", "blocks.{n}.attn1.to_out.0."),
    ("blocks.{n}.self_attn.norm_q.", "blocks.{n}.attn1.norm_q."),
    ("blocks.{n}.self_attn.norm_k.", "blocks.{n}.attn1.norm_k."),
    ("blocks.{n}.cross_attn.q.", "blocks.{n}.attn2.to_q."),
    ("blocks.{n}.cross_attn.k.", "blocks.{n}.attn2.to_k."),
    ("blocks.{n}.cross_attn.v.", "blocks.{n}.attn2.to_v."),
    ("blocks.{n}.cross_attn.o.", "blocks.{n}.attn2.to_out.0."),
    ("blocks.{n}.cross_attn.norm_q.", "blocks.{n}.attn2.norm_q."),
    ("blocks.{n}.cross_attn.norm_k.", "blocks.{n}.attn2.norm_k."),
    # Only the norm before the text has weights; the original counts it third, diffusers second.
    ("blocks.{n}.norm3.", "blocks.{n}.norm2."),
    ("blocks.{n}.ffn.0.", "blocks.{n}.ffn.net.0.proj."),
    ("blocks.{n}.ffn.2.", "blocks.{n}.ffn.net.2."),
    ("blocks.{n}.modulation", "blocks.{n}.scale_shift_table"),
    ("head.modulation", "scale_shift_table"),
    ("head.head.", "proj_out."),
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("patch_embedding.", "patch_embedding."),
)
"""Beginnings of names: the original ones, and diffusers'."""


def _rules(there: int, here: int) -> list[tuple[re.Pattern[str], str]]:
    rules = []
    for pair in _PAIRS:
        pattern = re.escape(pair[there]).replace(r"\{n\}", r"(\d+)")
        rules.append((re.compile(f"^{pattern}"), pair[here].replace("{n}", r"\1")))
    return rules


_TO_OURS, _TO_ORIGINAL = _rules(0, 1), _rules(1, 0)


def _renamed(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, replacement in rules:
        renamed, count = pattern.subn(replacement, name)
        if count:
            return renamed
    return None


def from_original(name: str) -> str:
    """Turn an original name, wrapped or not, into ours; one that is not known stays as it is."""
    name = bare(name)
    return _renamed(name, _TO_OURS) or name


def to_original(name: str) -> str:
    """Turn our name of a weight into the original one.

    Raises:
        ValueError: no weight of a Wan model has that name.
    """
    renamed = _renamed(name, _TO_ORIGINAL)
    if renamed is None:
        raise ValueError(f"no weight of a Wan model is named {name!r}")
    return renamed
