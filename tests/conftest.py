"""Small real parts that tests share: models of a few thousand weights, worlds, toy clips."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.config import PixelConfig
from scd.bench import card, timing
from scd.data.clip import Batch, frames_to_pixels
from scd.data.loader import Loader
from scd.data.manifest import write_card, write_episode, write_manifest
from scd.data.source import Source, open_source
from scd.evaluation import evaluate
from scd.models.build import build
from scd.models.checkpoint import World, save_world
from scd.models.config import (
    BlockConfig,
    DecoderConfig,
    DenseConfig,
    EncoderConfig,
    FrameShape,
    SamplingConfig,
    SeparableConfig,
)
from scd.models.kinds import ModelConfig
from tests.browser import CHROMIUM
from tests.tiny import shaken

# Tensors here are too small to be split: more threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_source() -> Source:
    """The toy world, 32x32, training split."""
    return open_source("toy:32", "train")


@pytest.fixture
def toy_batch(toy_source: Source) -> Batch:
    """Two clips of six frames."""
    return Loader(toy_source, batch_size=2, num_frames=6, seed=0).batch(0)


@pytest.fixture(scope="session")
def separable_config(toy_source: Source) -> SeparableConfig:
    """A separable model for the toy world: 1 + 1 layers of width 16."""
    return SeparableConfig(
        shape=FrameShape(height=32, width=32, patch_size=16),
        block=BlockConfig(width=16, head_dim=16, rotary_axes=(4, 6, 6)),
        encoder=EncoderConfig(num_layers=1),
        decoder=DecoderConfig(num_layers=1),
        conditions=toy_source.card.conditions,
    )


@pytest.fixture(scope="session")
def dense_config(separable_config: SeparableConfig) -> DenseConfig:
    """A dense model of the same size."""
    return DenseConfig(
        shape=separable_config.shape,
        block=separable_config.block,
        num_layers=2,
        conditions=separable_config.conditions,
    )


@pytest.fixture(params=["separable", "dense"])
def model_config(
    request: pytest.FixtureRequest, separable_config: SeparableConfig, dense_config: DenseConfig
) -> ModelConfig:
    """Each kind of model in turn."""
    return separable_config if request.param == "separable" else dense_config


@pytest.fixture
def tiny_world(model_config: ModelConfig, toy_source: Source) -> World:
    """A world of each kind whose weights are off their zeros, so that every input matters."""
    torch.manual_seed(0)
    return World(
        model=shaken(build(model_config)),
        autoencoder=PixelAutoencoder(PixelConfig()),
        card=toy_source.card,
        sampling=SamplingConfig(num_steps=2),
    )


@pytest.fixture
def brief_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """`scd bench` with limits measured on next to nothing, and hardly any warming up."""
    monkeypatch.setattr(card, "MATMUL_SIZES", {"cpu": (128,)})
    monkeypatch.setattr(card, "COPY_BYTES", {"cpu": 2**22})
    monkeypatch.setattr(card, "LIMIT_SECONDS", 0.02)
    monkeypatch.setattr(timing, "WARM_S", 0.0)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations without their picture, which takes longer than they do; test_evaluate sees it."""
    monkeypatch.setattr(evaluate, "plot_metrics", lambda *_: None)


@pytest.fixture
def run(tiny_world: World, tmp_path: Path) -> str:
    """The tiny world as a folder."""
    return str(save_world(tiny_world, tmp_path / "world"))


@pytest.fixture
def folder(toy_source: Source, tmp_path: Path) -> str:
    """Three validation episodes of the toy world, 20 frames each, as files."""
    path = tmp_path / "data"
    entries = []
    for episode in range(3):
        clip = toy_source.read(episode, 0, 20)
        assert clip.actions is not None
        pixels, actions = frames_to_pixels(clip.frames).numpy(), clip.actions.numpy()
        entries.append(write_episode(path, f"e{episode}", pixels, actions, 10.0, "val"))
    write_card(path, toy_source.card)
    write_manifest(path, entries)
    return str(path)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    with playwright.sync_playwright() as driver:
        # A container has no sandbox to give.
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()
