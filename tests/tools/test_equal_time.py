"""Equal time: a row's time is what its trainings took of the processor, and no more is planned."""

import json
from pathlib import Path

import pytest

from scd.common.runlog import RunLog
from scd.data.clip import frames_to_pixels
from scd.data.manifest import write_card, write_episode, write_manifest
from scd.models.checkpoint import load_world
from tools import equal_time


def test_a_step_that_was_trained_again_counts_once(tmp_path):
    with RunLog(tmp_path, total_steps=40) as log:
        for step, seconds in ((10, 9.0), (20, 0.25), (30, 5.0)):
            log.event("step", {"step": step, "processor_s": seconds}, show=False)
        log.event("checkpoint", {"step": 20}, show=False)
        # From step 20 on once more, and a last piece of four steps.
        for step, seconds in ((30, 0.5), (34, 0.75)):
            log.event("step", {"step": step, "processor_s": seconds}, show=False)
    assert equal_time.processor_s(tmp_path) == (90 + 2.5 + 5 + 3, 34)
    assert equal_time.processor_s(tmp_path, after=10) == (2.5 + 5 + 3, 24)


def test_a_plan_is_kept_and_of_one_time(tmp_path):
    plan = equal_time.Plan(tmp_path / "row", 2)
    assert plan.seconds == 120 and plan.once("steps", lambda: 7) == 7
    again = equal_time.Plan(tmp_path / "row", 2)
    assert again.once("steps", lambda: pytest.fail("was found before")) == 7
    with pytest.raises(ValueError, match=r"plans 2 minutes, not 3: name another folder"):
        equal_time.Plan(tmp_path / "row", 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "cars/latents-4"], "unknown way of making a frame 'latents-4'"),
        (["--rows", "chess/pixels-8"], "unknown game 'chess'"),
        (["--minutes", "0"], "minutes must be above 0, got 0.0"),
    ],
)
def test_wrong_settings_are_named(words, message, tmp_path, capsys):
    try:
        status = equal_time.main([str(tmp_path), *words])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.fixture
def recordings(toy_source, tmp_path) -> Path:
    """A game of 12 short episodes of the toy world."""
    data, entries = tmp_path / "toy" / "data", []
    for episode in range(12):
        clip = toy_source.read(episode, 0, 24)
        pixels, actions = frames_to_pixels(clip.frames).numpy(), clip.actions.numpy()
        split = ("train", "val", "test")[min(episode % 6, 2) if episode % 6 < 3 else 0]
        entries.append(write_episode(data, f"e{episode}", pixels, actions, 10.0, split))
    write_card(data, toy_source.card)
    write_manifest(data, entries)
    return tmp_path


@pytest.mark.slow
def test_rows_are_trained_measured_and_kept(recordings, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(equal_time.GAMES, "toy", equal_time.Game())
    monkeypatch.setattr(equal_time, "HORIZONS", (1, 8))
    out = tmp_path / "result.json"
    words = [str(recordings), "--minutes", "0.1", "--clips", "2", "--horizon", "8"]
    words += ["--judge-steps", "2", "--out", str(out), "--rows", "toy/latents-16", "toy/lapped-16"]
    assert equal_time.main(words) == 0
    result = json.loads(out.read_text())
    for name, row in result["rows"].items():
        # Six seconds, give or take a step and the noise of thirty timed ones.
        assert 2 < sum(row["seconds"].values()) < 12 and row["steps"] > 1
        assert [one["horizon"] for one in row["psnr_gain"]] == [1, 8]
        assert (tmp_path / name / "shown.png").stat().st_size > 1000
    latents, pixels = (result["rows"][f"toy/{way}"] for way in ("latents-16", "lapped-16"))
    assert load_world(tmp_path / "toy/lapped-16/world").autoencoder.config.lapped == 16
    assert set(latents["seconds"]) == {"autoencoder", "encoding", "world"}
    assert set(pixels["seconds"]) == {"world"}
    head, _, first, second = equal_time.table({"equal_time": result}).splitlines()
    assert "+1, dB | +8, dB" in head and first.startswith("| toy, latents, cells of 16 | ")
    assert second.count("|") == head.count("|")
    # The same command measures nothing again.
    capfd.readouterr()
    before = out.read_text()
    assert equal_time.main(words) == 0
    assert json.loads(out.read_text())["rows"] == json.loads(before)["rows"]
    assert "timed" not in capfd.readouterr().out
