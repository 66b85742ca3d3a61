"""One function that makes any model of this package a subject of the probe."""

from __future__ import annotations

from scd.model.build import Diffuser
from scd.model.dense import DenseDiffuser
from scd.model.separable import SeparableDiffuser
from scd.model.wan.dense import WanDiffuser
from scd.probe.our_wan import WanDenseSubject, WanSeparableSubject
from scd.probe.ours import DenseSubject, SeparableSubject
from scd.probe.subject import Subject


def subject_of(model: Diffuser) -> Subject:
    """Make a model probeable; it is put into eval mode."""
    if isinstance(model, DenseDiffuser):
        return DenseSubject(model)
    if isinstance(model, SeparableDiffuser):
        return SeparableSubject(model)
    if isinstance(model, WanDiffuser):
        return WanDenseSubject(model)
    return WanSeparableSubject(model)
