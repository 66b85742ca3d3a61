"""The runtime of sites, fetched once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from scd.export.onnx_web import runtime_folder


@pytest.fixture(scope="session")
def runtime() -> Iterator[Path]:
    """The npm package onnxruntime-web."""
    if shutil.which("node") is None:
        pytest.skip("needs Node and npm, which fetches onnxruntime-web")
    try:
        with runtime_folder("") as folder:
            yield folder
    except OSError as error:
        pytest.skip(str(error))
