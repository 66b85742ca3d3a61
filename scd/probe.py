"""Probing a network of one's own: `scd.probe.report` writes the page of `scd probe` for it.

`Subject` tells the probe where the network's layers are and how a frame is denoised;
docs/probing.md shows one.
"""

from scd.data.clip import Conditions
from scd.probing.intercept import Layer
from scd.probing.run import report
from scd.probing.settings import MeasureConfig
from scd.probing.subject import Subject

__all__ = ["Conditions", "Layer", "MeasureConfig", "Subject", "report"]
