"""Evaluation of tiny real worlds: which numbers, of which clips, and when it refuses."""

import json
import math
from dataclasses import replace

import pytest
import torch
from matplotlib.image import imread

from scd.common.runtime import cpu_threads
from scd.data.source import DataCard, open_source
from scd.evaluation import evaluate, image, memory, predict
from scd.evaluation.metrics import AgainstTruth, find_row
from scd.evaluation.protocols import EvaluateConfig, Protocol
from scd.evaluation.trial import another_clip, measure
from scd.streaming.rollout import Timing


@pytest.fixture
def model_config(separable_config):
    """One kind is enough: evaluation sees both through the same rollout."""
    return separable_config


def settings(run, folder, tmp_path, **changes):
    values = dict(
        run=run, data=folder, device="cpu", threads="auto", out=str(tmp_path / "result" / "e.json")
    )
    values |= {name: changes.pop(name) for name in values.keys() & changes.keys()}
    protocol = Protocol(**{**dict(context=2, horizon=3, num_clips=5, batch_size=2), **changes})
    return EvaluateConfig(protocol=protocol, **values)


def test_result_file_says_everything(run, folder, tmp_path):
    result = evaluate.evaluate(settings(run, folder, tmp_path))
    written = json.loads((tmp_path / "result" / "e.json").read_text())
    assert written == json.loads(json.dumps(result))
    found = {(row["metric"], row["baseline"], row["horizon"]) for row in written["rows"]}
    assert len(found) == len(written["rows"])
    names = {
        "mse",
        "psnr",
        "psnr_per_frame",
        "ssim",
        "sharpness",
        "contrast",
        "brightness",
        "seams",
    }
    baselines = {"model", "repeat_last", "shuffled_actions"}
    expected = {(m, b, h) for m in names for b in baselines for h in (1, 2, 3)}
    gains = {("psnr_gain", b, h) for b in baselines - {"repeat_last"} for h in (1, 2, 3)}
    assert found == expected | gains
    estimate = {"metric", "baseline", "mean", "ci_low", "ci_high"}
    assert all(set(row) == estimate | {"horizon"} for row in written["rows"])
    assert all(set(row) == estimate for row in written["overall"])
    for row in written["rows"] + written["overall"]:
        assert row["ci_low"] <= row["mean"] + 1e-6 and row["mean"] <= row["ci_high"] + 1e-6
    assert {"command", "commit", "hardware", "settings", "timed"} <= set(written)
    seconds = written["seconds_per_frame"]
    assert 0 < seconds["total"]["p50"] <= seconds["total"]["p99"]
    parts = sum(seconds[part]["mean"] for part in ("encoder", "decoder", "autoencoder"))
    assert seconds["total"]["mean"] == pytest.approx(parts)
    assert imread(tmp_path / "result" / "e.png").shape[0] > 100


def test_chosen_threads_change_rounding_only(run, folder, tmp_path):
    given = [
        settings(run, folder, tmp_path, threads=number, out=str(tmp_path / f"{number}.json"))
        for number in (1, "auto")
    ]
    with cpu_threads(4):
        one, chosen = map(evaluate.evaluate, given)
        assert torch.get_num_threads() == 4
    assert one is not None and chosen is not None
    assert one["hardware"]["num_threads"] == 1 and chosen["hardware"]["num_threads"] <= 4
    for mine, theirs in zip(one["rows"], chosen["rows"], strict=True):
        assert mine["mean"] == pytest.approx(theirs["mean"], rel=1e-3, abs=1e-4)


def test_table_for_people_shows_the_rows():
    row = {"metric": "psnr", "baseline": "model", "horizon": 5, "mean": 21.5}
    settings = {"protocol": "custom", "horizon": 5, "num_clips": 12, "split": "val"}
    result = {"rows": [row], "settings": settings, "left_out": {"ssim": "too small"}}
    head, line, note = evaluate.readable(result).splitlines()
    assert head.split() == ["12", "clips", "of", "val", "+1", "+3", "+5"]
    assert line.split() == ["psnr", "model", "21.500"] and len(line) == len(head)
    assert note == "without ssim: too small"


def test_same_seed_same_rows_other_seed_other_rows(tiny_world, folder):
    source = open_source(folder, "val")
    first, again, other = (
        measure(
            tiny_world,
            source,
            Protocol(context=2, horizon=2, num_clips=3, batch_size=2, seed=seed),
        ).rows
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_rows_are_the_metrics_of_the_rollout(tiny_world, folder):
    """The protocol by hand: the same windows, one batch, the plain formula."""
    source = open_source(folder, "val")
    protocol = Protocol(context=2, horizon=3, num_clips=4, batch_size=4)
    measured = measure(tiny_world, source, protocol)
    windows = predict.choose_windows(source, 4, 5, seed=0)
    batch = predict.read_windows(source, windows, 5)
    predicted = predict.predict(tiny_world, batch, 2).frames
    for horizon in (1, 2, 3):
        true, last = batch.frames[:, 1 + horizon], batch.frames[:, 1]
        model_error = (predicted[:, horizon - 1] - true).square().mean().item()
        last_error = (last - true).square().mean().item()
        gain = 10 * math.log10(last_error / model_error)
        for metric, baseline, value in (
            ("mse", "model", model_error),
            ("mse", "repeat_last", last_error),
            ("psnr", "model", 10 * math.log10(4 / model_error)),
            ("psnr_gain", "model", gain),
        ):
            row = find_row(measured.rows, metric, horizon, baseline)
            assert row["mean"] == pytest.approx(value, rel=1e-4), (metric, baseline, horizon)
    (overall,) = [
        row for row in measured.overall if (row["metric"], row["baseline"]) == ("mse", "model")
    ]
    assert overall["mean"] == pytest.approx(
        (predicted - batch.frames[:, 2:]).square().mean().item()
    )


def test_shuffled_actions_are_those_of_another_clip(tiny_world, toy_source):
    protocol = Protocol(context=2, horizon=2, num_clips=9, batch_size=4, memory=False)
    other = another_clip(9, seed=0)
    assert sorted(other) == list(range(9))
    assert all(index != taken for index, taken in enumerate(other))
    rows = measure(tiny_world, toy_source, protocol).rows
    model, misled = (
        find_row(rows, "mse", 2, name)["mean"] for name in ("model", "shuffled_actions")
    )
    assert model != misled


def test_windows_do_not_overlap_and_spread_over_episodes(folder):
    source = open_source(folder, "val")
    windows = predict.choose_windows(source, 12, 5, seed=3)
    assert len(set(windows)) == 12
    assert all(start % 5 == 0 and start + 5 <= 20 for _, start in windows)
    assert sorted(episode for episode, _ in windows[:3]) == [0, 1, 2]
    assert windows == predict.choose_windows(source, 12, 5, seed=3)
    with pytest.raises(ValueError, match="clips must be 1 or more, got 0"):
        predict.choose_windows(source, 0, 5, seed=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 18}, "5 clips of 21 frames .* the data has 0; its longest episode has 20"),
        ({"context": 18, "num_clips": None}, "the data has 0; its longest episode has 20"),
        ({"num_clips": 0}, "num_clips must be 1 or more, got 0"),
        ({"num_clips": 13}, "needed 13 clips of 5 frames that do not overlap, the data has 12"),
        ({"context": 0}, "context must be 1 or more, got 0"),
        ({"horizon": 0}, "horizon must be 1 or more, got 0"),
        ({"data": "toy:64"}, "frames of 32x32, toy:64 has 64x64"),
        ({"threads": 0}, "threads must be auto, or 1 or more, got 0"),
        ({"out": "result"}, "out must be a .json file, got result"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(run, folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate.evaluate(settings(run, folder, tmp_path, **changes))
    assert not (tmp_path / "result").exists()


def test_a_small_collection_is_measured_on_all_its_clips(run, folder, tmp_path):
    result = evaluate.evaluate(settings(run, folder, tmp_path, num_clips=None, batch_size=16))
    # Three episodes of 20 frames, clips of 2 + 3.
    assert result["settings"]["num_clips"] == 12
    assert result["timed"].endswith("; 12 clips side by side")
    assert evaluate.readable(result).startswith("12 clips of val ")


def test_what_cannot_be_measured_is_left_out_by_name(run, folder, tmp_path):
    result = evaluate.evaluate(settings(run, folder, tmp_path, num_clips=1))
    assert result["left_out"] == {"shuffled_actions": "needs actions and two clips"}
    assert {row["baseline"] for row in result["rows"]} == {"model", "repeat_last"}


def test_other_conditions_are_refused(tiny_world, toy_source):
    card = toy_source.card
    other = DataCard(
        height=card.height,
        width=card.width,
        fps=card.fps,
        conditions=replace(card.conditions, num_actions=4),
        action_names=card.action_names[:4],
    )
    with pytest.raises(ValueError, match="^a is not steered as the model is .*: num_actions: 5, 4"):
        predict.check_fit(tiny_world, other, "a")


def test_memory_of_a_toy_world(tiny_world):
    source = open_source("toy:32", "val")
    protocol = Protocol(context=8, horizon=8, num_clips=3, batch_size=2)
    measured = measure(tiny_world, source, protocol)
    rows = [row for row in measured.rows if row["metric"] == "memory"]
    assert {row["baseline"]: row["mean"] for row in rows} == {"model": 0.0, "repeat_last": 0.0}
    assert measured.memory_events >= 3


def test_memory_of_shorter_contexts_is_on_the_same_events(tiny_world):
    clips = memory.find_memory_clips(open_source("toy:32", "val"), 2, 8, 8)
    protocol = Protocol(context=2, horizon=8, num_clips=2)
    counts = memory.count_batch(tiny_world, clips, protocol, 0)["model"]
    assert counts[:, 1].tolist() == [len(events) for events in clips.events]
    with pytest.raises(ValueError, match="give 8 frames, a context of 9"):
        memory.count_batch(tiny_world, clips, replace(protocol, context=9), 0)


def test_too_short_a_horizon_for_memory_is_said(tiny_world, monkeypatch):
    monkeypatch.setattr(memory, "MAX_SEARCHED", 3)
    protocol = Protocol(context=1, horizon=1, num_clips=2)
    measured = measure(tiny_world, open_source("toy:32", "val"), protocol)
    assert "1 predicted frames there are 0 in 3 episodes" in measured.left_out["memory"]


def test_timing_summary():
    timings = [Timing(encoder_s=0.0, decoder_s=float(n), autoencoder_s=1.0) for n in range(101)]
    summary = predict.summarize(timings)
    assert summary["decoder"] == pytest.approx({"mean": 50.0, "p50": 50.0, "p99": 99.0})
    assert summary["total"]["p50"] == pytest.approx(51.0)


def test_ideal_prediction_has_ideal_rows():
    frames = torch.rand(4, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sides = {"model": frames, "repeat_last": 0 * frames}
    values = {
        baseline: {name: one[:, None] for name, one in image.frame_values(side, frames).items()}
        for baseline, side in sides.items()
    }
    rows = AgainstTruth(Protocol(horizon=2)).estimates(values)
    found = {(metric, name): one.mean for horizon, metric, name, one in rows if horizon is None}
    assert found["psnr", "model"] == pytest.approx(image.MAX_PSNR)
    assert found["ssim", "model"] == pytest.approx(1.0)
    assert found["psnr_gain", "model"] == pytest.approx(
        image.MAX_PSNR - found["psnr", "repeat_last"]
    )


def test_a_result_that_is_not_whole_is_refused(tmp_path):
    out = tmp_path / "result.json"
    row = {"metric": "psnr", "baseline": "model", "horizon": 5, "mean": 21.5}
    settings = {"protocol": "custom", "horizon": 5, "num_clips": 12, "split": "val", "out": "x"}
    whole = {"rows": [row], "settings": settings, "left_out": {}}
    out.write_text(json.dumps(whole))
    assert evaluate._finished(out)["settings"]["out"] == str(out)
    for change in ({"rows": [{}]}, {"settings": []}, {"left_out": None}, {"rows": "words"}):
        out.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match="result.json is not a whole result"):
            evaluate._finished(out)
