"""One function that makes any model of this package a subject of the probe."""

from __future__ import annotations

from scd.models.build import Diffuser
from scd.models.dense import DenseDiffuser
from scd.models.separable import SeparableDiffuser
from scd.models.wan.dense import WanDiffuser
from scd.probing.our_wan import WanDenseSubject, WanSeparableSubject
from scd.probing.ours import DenseSubject, SeparableSubject
from scd.probing.subject import Subject


def subject_of(model: Diffuser) -> Subject:
    """Make a model probeable; it is put into eval mode."""
    if isinstance(model, DenseDiffuser):
        return DenseSubject(model)
    if isinstance(model, SeparableDiffuser):
        return SeparableSubject(model)
    if isinstance(model, WanDiffuser):
        return WanDenseSubject(model)
    return WanSeparableSubject(model)
