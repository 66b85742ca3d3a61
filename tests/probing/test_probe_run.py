"""`scd probe`: its files, going on after an interruption, its page, and what it refuses."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.config import PixelConfig
from scd.cli import main
from scd.models.build import build
from scd.models.checkpoint import World, load_world, save_world
from scd.models.config import BlockConfig, CacheConfig, DenseConfig, FrameShape, SamplingConfig
from scd.probing.models import subject_of
from scd.probing.plan import memory_needed, training_times
from scd.probing.run import _settings, probe
from scd.probing.settings import ProbeConfig, measurement_names
from tests.tiny import shaken

NUM_LAYERS = 3


def world_of(config, source):
    return World(
        model=shaken(build(config), 0.3),
        autoencoder=PixelAutoencoder(PixelConfig()),
        card=source.card,
        sampling=SamplingConfig(num_steps=4),
    )


def dense_of(source, num_layers=NUM_LAYERS):
    return DenseConfig(
        shape=FrameShape(height=32, width=32, patch_size=16),
        block=BlockConfig(width=16, head_dim=8, rotary_axes=(4, 2, 2)),
        num_layers=num_layers,
        cache=CacheConfig(window=3, num_sinks=1),
        conditions=source.card.conditions,
    )


@pytest.fixture(scope="module")
def dense(toy_source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "world"
    return str(save_world(world_of(dense_of(toy_source), toy_source), folder))


def config_of(run, out, **changes):
    settings = dict(
        run=run, data="toy:32", out=str(out), num_clips=3, context=3, num_steps=4,
        reuse_depths=2, reuse_steps=2, tokens=(0, 3), device="cpu",
    )  # fmt: skip
    return ProbeConfig(**(settings | changes))


@pytest.fixture(scope="module")
def done(dense, tmp_path_factory):
    """A whole probe of the dense model: its folder and its result."""
    out = tmp_path_factory.mktemp("probe") / "out"
    return out, probe(config_of(dense, out))


def test_probe_json_has_the_names_that_scripts_rely_on(done):
    out, returned = done
    result = json.loads((out / "probe.json").read_text())
    assert result == json.loads(json.dumps(returned))
    for key in ("step_similarity", "attention", "leave_one_out"):
        assert [one["layer"] for one in result[key]] == [1, 2, 3]
        assert [one["name"] for one in result[key]] == ["layer 1", "layer 2", "layer 3"]
    for layer in result["step_similarity"]:
        for kind in ("cosine", "flattened", "centred"):
            matrix = np.array(layer[kind])
            assert matrix.shape == (4, 4)
            np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-4)
    for layer in result["attention"]:
        assert len(layer["past_mass"]) == len(layer["uniform"]) == 2
        assert all(0 < mass < 1 for mass in layer["past_mass"])
        # The memory holds three frames, one of them the frame itself.
        np.testing.assert_allclose(layer["uniform"], 2 / 3, atol=1e-6)
    for layer in result["leave_one_out"]:
        assert layer["ci_low"] <= layer["relative_loss"] <= layer["ci_high"]
    reuse = result["reuse"]
    shape = (len(reuse["layers"]), len(reuse["steps"]))
    assert np.array(reuse["relative_loss"]).shape == np.array(reuse["psnr"]).shape == shape
    split = result["proposed_split"]
    assert 1 <= split["encoder_layers"] <= NUM_LAYERS
    assert set(split["decoder_layers"]) < {1, 2, 3}
    assert split["predicted_seconds_per_frame"] > 0
    assert split["predicted_relative_loss"] in [
        one["predicted_relative_loss"] for one in result["candidates"]
    ]
    assert result["prediction"]["num_context_frames"] == 3
    assert result["measured_on"]["clips"] == 3 and result["command"] and result["hardware"]
    assert 0 < result["memory"]["peak_bytes"]


def test_the_page_is_whole_and_alone(done):
    out, result = done
    page = (out / "report.html").read_text()
    addresses = re.findall(r'(?:src|srcset|href)="([^"]{0,30})', page)
    assert addresses and all(address.startswith("data:image/png;base64,") for address in addresses)
    # Pictures may hold any letters by chance.
    assert "http" not in re.sub(r'base64,[^"]*', "", page).replace("https://example", "")
    for heading in (
        "A split", "Do features change", "Features as colours", "Where do layers look",
        "What is lost without a layer", "May features be reused", "What this does not claim",
    ):  # fmt: skip
        assert heading in page
    assert "Plain cosine is inflated" in page and "centred by step between" in page
    assert "token in row 1, column 1" in page and "token in row 2, column 2" in page
    assert result["proposed_split"]["name"] in page
    light = re.findall(r'<img class="\w+" alt="([^"]+)"', page)
    assert len(light) == page.count('<source media="(prefers-color-scheme: dark)"') == 10


def test_what_is_done_is_not_measured_again(done, dense, monkeypatch):
    out, result = done
    parts = sorted((out / "parts").iterdir())
    before = {path.name: path.stat().st_mtime_ns for path in parts}
    assert set(before) == {f"{name}.json" for name in measurement_names()}
    (out / "parts" / "similarity.json").unlink()
    # A number that was changed by hand or by a disk makes a part one that is not there.
    colours = out / "parts" / "colours.json"
    kept = json.loads(colours.read_text())
    kept["part"]["seconds"] += 1
    colours.write_text(json.dumps(kept))
    before["colours.json"] = colours.stat().st_mtime_ns
    monkeypatch.setattr("scd.probing.run.write_report", lambda *_: None)
    again = probe(config_of(dense, out, tolerance=1e9))
    after = {path.name: path.stat().st_mtime_ns for path in parts}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"similarity.json", "colours.json"}
    # The same clips and noise: what was measured anew is what it was.
    assert again["step_similarity"] == result["step_similarity"]
    assert again["leave_one_out"] == result["leave_one_out"]
    # Another tolerance is another choice among the same splits.
    assert again["candidates"] == result["candidates"]
    fastest = min(one["predicted_seconds_per_frame"] for one in again["candidates"])
    assert again["proposed_split"]["predicted_seconds_per_frame"] == fastest


def test_other_settings_and_other_weights_are_refused(done, dense, toy_source, tmp_path):
    out, _ = done
    with pytest.raises(FileExistsError, match="num_clips: 3, 2"):
        probe(config_of(dense, out, num_clips=2))
    torch.manual_seed(5)
    other = save_world(world_of(dense_of(toy_source), toy_source), tmp_path / "other")
    with pytest.raises(FileExistsError, match="weights_hash"):
        probe(config_of(str(other), out))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="something else than a probe"):
        probe(config_of(dense, tmp_path / "full"))


def test_weights_in_several_files_are_told_apart_too(dense, toy_source, tmp_path, monkeypatch):
    monkeypatch.setattr("scd.models.checkpoint.SHARD_BYTES", 20_000)
    known = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        large = save_world(world_of(dense_of(toy_source), toy_source), tmp_path / str(seed))
        assert not (large / "model.safetensors").exists()
        known.add(_settings(config_of(str(large), tmp_path))["weights_hash"])
    assert len(known) == 2


def test_a_separable_model_is_probed_as_far_as_it_applies(separable_config, toy_source, tmp_path):
    world = world_of(separable_config, toy_source)
    run = str(save_world(world, tmp_path / "world"))
    names = ("attention", "similarity", "splits")
    result = probe(config_of(run, tmp_path / "out", measurements=names))
    assert result["left_out"] == {"splits": "splits: this model is split already"}
    assert "proposed_split" not in result
    assert [one["name"] for one in result["step_similarity"]] == ["decoder 1"]
    encoder, decoder = result["attention"]
    assert encoder["past_mass"][0] > 0
    assert decoder["past_mass"] == [0.0] and decoder["context_mass"][0] > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "split already" in page and "0 by construction" in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 1}, "context must be 2 or more, got 1"),
        ({"num_steps": 1}, "num_steps must be 2 or more, got 1"),
        ({"num_clips": 0}, "num_clips must be 1 or more"),
        ({"levels": (0.5, 1.5)}, r"levels are times in \(0, 1\]"),
        ({"measurements": ()}, "different measurements"),
        ({"measurements": ("colors",)}, "measurements of attention, colours, .*got .*colors"),
        ({"tolerance": -1.0}, "tolerance must not be negative"),
        ({"frame_steps": 0}, "frame_steps must be 1 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of("run", "out", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (2, 4)}, r"different numbers in 1 \.\. 3"),
        ({"data": "toy:64"}, "frames of 32x32"),
        ({"tokens": (4,)}, r"tokens lie in 0 \.\. 3, one or more, got \[4\]"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(dense, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        probe(config_of(dense, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_more_clips_than_there_are_is_refused(dense, folder, tmp_path):
    with pytest.raises(ValueError, match="needed 16 clips of 4 frames .* the data has 15"):
        probe(config_of(dense, tmp_path / "out", data=folder, num_clips=16))


def test_a_model_without_a_past_is_refused(toy_source, tmp_path, capsys):
    """A memory of one frame: that which is denoised."""
    config = replace(dense_of(toy_source), cache=CacheConfig(window=1, num_sinks=0))
    run = str(save_world(world_of(config, toy_source), tmp_path / "world"))
    words = ["probe", run, "--data", "toy:32", "--out", str(tmp_path / "out"), "--num-clips", "2"]
    assert main([*words, "--context", "2", "--num-steps", "2", "--device", "cpu"]) == 2
    assert "no layer of this model looks at earlier frames" in capsys.readouterr().err


def test_the_command_reports_bad_input(dense, tmp_path, capsys):
    words = ["probe", dense, "--data", "toy:32", "--out", str(tmp_path / "out")]
    assert main([*words, "--layers", "1", "9"]) == 2
    assert capsys.readouterr().err == (
        "scd: layers must be different numbers in 1 .. 3, got [1, 9]\n"
    )
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--num-steps", "1"])
    assert "num_steps must be 2 or more, got 1" in capsys.readouterr().err


def test_memory_is_stated_and_missing_memory_refused(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("scd.common.memory.free_bytes", lambda device: 2**20)
    # Told before any clip is read.
    monkeypatch.setattr("scd.probing.plan.read_windows", None)
    with pytest.raises(ValueError, match="the probe needs .* MiB on cpu, 1.0 MiB are free"):
        probe(config_of(dense, tmp_path / "out"))


def test_stated_memory_grows_with_what_is_held(dense):
    subject = subject_of(load_world(dense).model)
    few = config_of(dense, "out")
    needed = memory_needed(few, subject, 3, 3)
    for more in ({"num_noises": 7}, {"num_steps": 50}):
        assert memory_needed(replace(few, **more), subject, 3, 3) > needed
    assert memory_needed(few, subject, 20, 3) > needed < memory_needed(few, subject, 3, 20)


def test_noise_levels_follow_the_training(dense, tmp_path):
    assert training_times(Path(dense)) == (0.0, 1.0)
    step = tmp_path / "run" / "step_000001"
    shutil.copytree(dense, step)
    (step.parent / "last").write_text("step_000001")
    (step.parent / "config.json").write_text(
        json.dumps({"objective": {"time_mean": 1.5, "time_std": 0.5}})
    )
    assert training_times(step.parent) == (1.5, 0.5) == training_times(step)
