"""One function that makes any model of this package a subject of the probe."""

from __future__ import annotations

from typing import Any

from scd.models.dense import DenseDiffuser
from scd.models.separable import SeparableDiffuser
from scd.probing.our_wan import WanDenseSubject, WanSeparableSubject
from scd.probing.ours import DenseSubject, SeparableSubject
from scd.probing.subject import Subject


def subject_of(model: Any) -> Subject:
    """Make a model probeable; it is put into eval mode."""
    if isinstance(model, DenseDiffuser):
        return DenseSubject(model)
    if isinstance(model, SeparableDiffuser):
        return SeparableSubject(model)
    return WanSeparableSubject(model) if model.config.is_separable else WanDenseSubject(model)
