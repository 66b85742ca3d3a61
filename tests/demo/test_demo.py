"""The demo's folder, its measurements and its report, on tiny real worlds; slow: all of it."""

import json
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import av
import pytest
import torch

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.config import PixelConfig
from scd.common import provenance as results
from scd.common.config import to_json
from scd.common.runlog import RunLog
from scd.data.source import open_source
from scd.demo import demo, report
from scd.demo.first_look import claim_folder
from scd.demo.side_by_side import (
    MEMORY_CONTEXTS,
    NUM_GIVEN,
    measure_memory,
    stream_in_turns,
    write_stream,
)
from scd.evaluation.predict import choose_windows, read_windows
from scd.evaluation.protocols import Protocol
from scd.evaluation.trial import measure
from scd.models.build import build
from scd.models.checkpoint import World
from scd.models.config import SamplingConfig


@pytest.fixture
def worlds(separable_config, dense_config, toy_source) -> dict[str, World]:
    """A separable and a dense world whose weights are off their zeros."""
    torch.manual_seed(0)
    found = {}
    for name, config in (("separable", separable_config), ("dense", dense_config)):
        model = build(config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        found[name] = World(
            model=model,
            autoencoder=PixelAutoencoder(PixelConfig(mean=-0.3, std=0.3)),
            card=toy_source.card,
            sampling=SamplingConfig(num_steps=1),
        )
    return found


class Page(HTMLParser):
    """Tags with their attributes, and the text of table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data + " "


def test_report_of_tiny_worlds(worlds, tmp_path):
    source = open_source("toy:32", "val")
    config = demo.DemoConfig(train=True, quick=True)
    protocol = Protocol(context=2, horizon=8, num_clips=2, memory=False)
    measured = {name: measure(world, source, protocol) for name, world in worlds.items()}
    memory = measure_memory(worlds, source, Protocol(num_clips=2, horizon=8))
    length = NUM_GIVEN + 12
    batch = read_windows(source, choose_windows(source, 1, length, 0), length)
    frames, timings = stream_in_turns(worlds, batch, seed=0)
    draw = write_stream(batch.frames[0], frames, NUM_GIVEN, (1, 2, 4), 10.0, tmp_path)
    trained, runs = {}, {}
    for name in ("separable", "dense", "dense_equal_time"):
        runs[name] = tmp_path / name
        runs[name].mkdir()
        with RunLog(runs[name], total_steps=2) as log:
            log.event("step", {"step": 1, "loss": 2.0}, show=False)
            log.event("step", {"step": 2, "loss": 1.0}, show=False)
        trained[name] = demo.Trained(folder=runs[name], steps=2, seconds=3.5)
    worlds["dense_equal_time"] = worlds["dense"]
    measured["dense_equal_time"] = measured["dense"]

    result = demo.summarize_demo(trained, worlds, measured, memory, timings)
    result |= demo.add_up(trained, measuring_s=30.0, streaming_s=19.5)
    assert result["stages_s"] == {"training": 10.5, "measuring": 30.0, "streaming": 19.5}
    assert result["total_s"] == 60.0
    result |= {"settings": to_json(config) | {"protocol": to_json(protocol)}}
    result |= results.provenance() | {"command": "scd demo --out '<b>&'"}
    for horizon in (1, 4, 8):
        key = f"psnr_gain_db_h{horizon}"
        row = report.find_row(measured["separable"].rows, "psnr_gain", horizon)
        assert result[key] == row["mean"]
    seconds = result["seconds_per_frame"]
    assert set(seconds) == {"separable", "dense"}
    assert result["ratio_dense_over_separable"] == seconds["dense"] / seconds["separable"]
    assert (result["frames"], result["timed_frames"]) == (12, 4)
    contexts = [row["context"] for row in memory["rows"] if row["baseline"] == "separable"]
    assert tuple(contexts) == MEMORY_CONTEXTS and memory["events"] >= 2

    report.write_report(result, runs, draw, tmp_path)
    results.write_json(result, tmp_path / "report.json")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    links = [attrs.get(key) for _, attrs in page.tags for key in ("src", "srcset", "href")]
    links = [link for link in links if link is not None]
    assert len(links) == 7 and all(link.startswith("data:") for link in links), "self-contained"
    assert "http" not in re.sub(r"data:[^\"]*", "", text)
    assert ("meta", "width=device-width, initial-scale=1") in [
        (tag, attrs.get("content")) for tag, attrs in page.tags
    ]
    assert "prefers-color-scheme: dark" in text and "A quick run" in text
    assert (
        "took 0.2 minutes, interruptions not counted" in text
        and "1.0 with measuring and streaming" in text
    )
    assert "What this does not claim" in text
    assert "&lt;b&gt;&amp;" in text and "<b>&'" not in text
    gain = report.find_row(measured["dense"].rows, "psnr_gain", 4)
    shown = f"{gain['mean']:.2f} {gain['ci_low']:.2f} .. {gain['ci_high']:.2f} "
    assert shown in page.cells
    with av.open(tmp_path / "rollout.mp4") as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert sum(1 for _ in container.decode(stream)) == length
        # Truth, separable and dense, each 32 wide, with gaps of 2; eight times as large.
        assert (stream.height, stream.width) == (256, 8 * (3 * 32 + 2 * 2))


def test_streams_in_turns_are_the_rollouts_by_themselves(worlds, toy_source):
    batch = read_windows(toy_source, [(0, 0)], NUM_GIVEN + 3)
    frames, timings = stream_in_turns(worlds, batch, seed=5)
    alone, _ = stream_in_turns({"dense": worlds["dense"]}, batch, seed=5)
    assert torch.equal(frames["dense"], alone["dense"])
    assert not torch.equal(frames["dense"], frames["separable"])
    assert [len(of_frames) for of_frames in timings.values()] == [3, 3]


def test_only_an_earlier_demo_is_overwritten(tmp_path):
    claim_folder(tmp_path / "new" / "demo")
    claim_folder(tmp_path / "new" / "demo")
    (tmp_path / "empty").mkdir()
    claim_folder(tmp_path / "empty")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for path in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(FileExistsError, match="something else than an earlier demo"):
            demo.demo(demo.DemoConfig(out=str(path)))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_settings():
    assert demo.DemoConfig(train=True, quick=True).num_steps < demo.DemoConfig().num_steps
    assert demo.DemoConfig(train=True, steps=7).num_steps == 7
    assert demo.DemoConfig().protocol.num_clips == 64
    with pytest.raises(ValueError, match="steps must be 1 or more, got 0"):
        demo.DemoConfig(train=True, steps=0)
    with pytest.raises(ValueError, match="threads must be auto, or 1 or more, got 0"):
        demo.DemoConfig(threads=0)


def test_results_are_json_or_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json\.rows\[1\]\.mean is nan"):
        results.write_json({"rows": [{"mean": 1.0}, {"mean": float("nan")}]}, tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_interrupted_demo_continues_and_finishes(tmp_path):
    command = [sys.executable, "-m", "scd", "demo", "--train", "--quick", "--steps", "40"]
    command += ["--out", str(tmp_path / "demo")]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "demo" / "runs" / "quick-40-steps-seed-0" / "separable" / "log.jsonl"
    for _ in range(600):
        time.sleep(0.2)
        if log.exists() and '"step"' in log.read_text():
            break
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=60) == 130
    done = Path(log.parent / "last").read_text().strip()
    assert 0 < int(done.removeprefix("step_")) < 40

    second = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert second.returncode == 0, second.stderr
    assert '"event": "resume"' in log.read_text()
    result = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert {"psnr_gain_db_h1", "psnr_gain_db_h4", "psnr_gain_db_h8"} <= set(result)
    assert {"seconds_per_frame", "ratio_dense_over_separable", "frames"} <= set(result)
    assert {"command", "commit", "hardware", "timed"} <= set(result)
    seconds = [model["train_seconds"] for model in result["models"].values()]
    assert result["stages_s"]["training"] == sum(seconds)
    assert result["total_s"] == sum(result["stages_s"].values())
    for name in ("rollout.mp4", "frames.png", "report.html"):
        assert (tmp_path / "demo" / name).stat().st_size > 10_000
