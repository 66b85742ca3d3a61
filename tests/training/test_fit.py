"""What the data decides of a run, and what it leaves to people."""

import json
from dataclasses import replace

import numpy as np
import pytest

from scd.cli import main
from scd.data.manifest import write_card, write_episode, write_manifest
from scd.data.source import DataCard
from scd.data.spaces import ConditionSpec
from scd.models.build import build
from scd.models.config import CacheConfig, FrameShape, SeparableConfig
from scd.training import fit
from scd.training.config import TrainConfig
from scd.training.fit import check_fit, fit_to_data, fit_window
from scd.training.presets import preset


@pytest.fixture
def base(monkeypatch) -> TrainConfig:
    monkeypatch.setattr(fit, "NUM_MEASURED_BATCHES", 1)
    run = preset("doom-32")
    return replace(run, data="toy:32", batch_size=1, num_frames=4)


def with_part(config: TrainConfig, part: str, **values) -> TrainConfig:
    if part == "autoencoder":
        return replace(config, autoencoder=replace(config.autoencoder, **values))
    changed = replace(getattr(config.model, part), **values)
    return replace(config, model=replace(config.model, **{part: changed}))


def test_frame_size_conditions_and_pixel_statistics_are_those_of_the_data(base, toy_source):
    fitted = fit_to_data(replace(base, data="toy:64"))
    assert fitted.model.shape.shape == (3, 64, 64)
    assert fitted.model.conditions == toy_source.card.conditions != base.model.conditions
    assert fitted.autoencoder != base.autoencoder
    assert fitted.autoencoder.std == round(fitted.autoencoder.std, 3)
    assert fit_to_data(fitted, base) == fitted
    check_fit(fitted, replace(toy_source.card, height=64, width=64))


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("shape", {"height": 64}, "model.shape.height is 64, but toy:32 says 32"),
        ("conditions", {"num_actions": 9}, "model.conditions.num_actions is 9, but toy:32 says 5"),
        ("conditions", {"num_labels": 2}, "model.conditions.num_labels is 2, but toy:32 says 0"),
        ("autoencoder", {"std": 3.0}, r"autoencoder.std is 3.0, but toy:32 says 0\.\d+"),
    ],
)
def test_a_changed_field_that_contradicts_the_data_is_refused(base, part, values, message):
    with pytest.raises(ValueError, match=message):
        fit_to_data(with_part(base, part, **values), base)


def test_a_changed_field_that_agrees_with_the_data_is_welcome(base):
    given = with_part(base, "conditions", num_actions=5)
    assert fit_to_data(given, base) == fit_to_data(base)


@pytest.mark.parametrize("num_frames", [8, 16, 32])
def test_the_memory_is_as_long_as_the_clips_unless_somebody_chose_it(num_frames):
    base = preset("toy")
    run = replace(base, num_frames=num_frames)
    assert fit_window(run, base).model.cache.window == num_frames
    chosen = with_part(run, "cache", window=7)
    assert fit_window(chosen, base) == chosen


def test_a_memory_longer_than_the_clips_is_refused(base, toy_source):
    chosen = with_part(base, "cache", window=5)
    with pytest.raises(ValueError, match="window is 5, but num_frames is 4.*untrained"):
        fit_window(chosen, base)
    with pytest.raises(ValueError, match="window is 5, but num_frames is 4.*untrained"):
        check_fit(chosen, toy_source.card)


def test_the_window_leaves_room_for_the_sinks(base):
    run = replace(base, model=replace(base.model, cache=CacheConfig(window=16, num_sinks=4)))
    with pytest.raises(ValueError, match="num_sinks must leave room"):
        fit_to_data(run, run)


def test_a_patch_is_held_against_the_frames_of_the_data(tmp_path, capsys):
    """The preset's frames are 64 x 64, the data's 45 x 75: only the data's count."""
    card = DataCard(height=45, width=75, fps=10.0, conditions=ConditionSpec(), action_names=())
    pixels = np.random.default_rng(0).integers(0, 256, (20, 45, 75, 3), np.uint8)
    write_manifest(tmp_path, [write_episode(tmp_path, "e", pixels, None, 10.0, "train")])
    write_card(tmp_path, card)
    words = ["train", "doom-64", "--data", str(tmp_path), "--dry-run", "--model.shape.patch-size"]
    assert main([*words, "15"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["model"]["shape"]["width"] == 75
    assert main([*words, "16"]) == 2
    refused = capsys.readouterr().err
    assert f"the 45x75 frames of {tmp_path}, which [1, 3, 5, 15] divide" in refused
    with pytest.raises(ValueError, match="patch_size must divide the frame"):
        build(SeparableConfig(shape=FrameShape(patch_size=15)))
