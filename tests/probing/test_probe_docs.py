"""The examples of docs/probing.md, run as they stand: a network of others, a new measurement."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from scd.cli import main
from scd.probing import settings
from tests.documents import code
from tests.probing.test_probe_run import dense as dense

PAGE = "docs/probing.md"


class TheirBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU())

    def forward(self, tokens, past=None):
        batch, number, width = tokens.shape
        q, k, v = self.qkv(tokens).view(batch, number, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        self.kept = (k, v)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        read = functional.scaled_dot_product_attention(q, k, v)
        tokens = tokens + self.out(read.transpose(1, 2).reshape(batch, number, width))
        return tokens + self.mlp(tokens)


class TheirNetwork(nn.Module):
    def __init__(self, width: int = 24, heads: int = 2, depth: int = 3):
        super().__init__()
        self.width, self.heads = width, heads
        self.patch = nn.Conv2d(3, width, 2, stride=2)
        self.blocks = nn.ModuleList(TheirBlock(width, heads) for _ in range(depth))
        self.unpatch = nn.ConvTranspose2d(width, 3, 2, stride=2)

    def tokens(self, frames, time):
        found = self.patch(frames).flatten(2).transpose(1, 2)
        return found + math.sin(3 * time)

    def remember(self, past):
        memory = [None] * len(self.blocks)
        for frame in past.unbind(1):
            tokens = self.tokens(frame, 0.0)
            for place, block in enumerate(self.blocks):
                before = memory[place]
                tokens = block(tokens, before)
                kept = getattr(block, "kept", None)
                memory[place] = (
                    kept if before is None
                    else tuple(torch.cat(pair, dim=2) for pair in zip(before, kept, strict=True))
                )  # fmt: skip
        return memory

    def denoise(self, noisy, time, memory):
        tokens = self.tokens(noisy, time)
        for block, past in zip(self.blocks, memory, strict=True):
            tokens = block(tokens, past)
        return self.unpatch(tokens.transpose(1, 2).unflatten(2, (4, 4)))


def test_the_pages_adapter_probes_a_network_of_others(tmp_path, monkeypatch):
    assert len(code(PAGE)) == 3
    block = next(one for one in code(PAGE) if "class TheirSubject" in one)
    measured = next(one for one in code(PAGE) if "step_similarity(" in one)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = TheirNetwork()
    with torch.no_grad():
        # The second layer changes nothing: leaving it out must show exactly that.
        for part in (network.blocks[1].out, network.blocks[1].mlp[1]):
            part.weight.zero_()
            part.bias.zero_()
    names: dict[str, Any] = {"network": network, "clips": torch.randn(4, 5, 3, 8, 8)}
    exec(compile(block, PAGE, "exec"), names)
    result = names["result"]
    assert json.loads(Path("their-probe/probe.json").read_text()) == json.loads(json.dumps(result))
    exec(compile(measured, PAGE, "exec"), names)
    assert names["similarity"].layers == (1, 2, 3)
    assert names["similarity"].centred.shape == (3, 10, 10)
    attention = names["attention"]
    assert attention.past_mass.shape == (3, 2, 10)
    np.testing.assert_allclose(attention.uniform, 4 / 5)
    assert ((attention.past_mass > 0) & (attention.past_mass < 1)).all()
    importance = names["importance"].relative_loss
    assert importance[1] == 0 and abs(importance[0]) > 1e-4
    adapter = re.findall(r"^class .*?(?=^\S)", block, re.M | re.S)
    assert len(block.splitlines()) <= 40 and len(adapter[0].splitlines()) <= 18
    # The page is that of `scd probe`, measurement for measurement.
    page = Path("their-probe/report.html").read_text()
    assert "A TheirNetwork of 3 layers" in page and "What this does not claim" in page
    for heading in ("A split", "Features as colours", "Where do layers look", "May features be"):
        assert heading in page
    assert set(result["seconds"]) == set(settings.measurement_names()) and not result["left_out"]
    assert result["model"]["parameters"] == sum(one.numel() for one in network.parameters())
    # Nothing was trained.
    assert "predicts no better than the mean" in result["warnings"][0]
    assert "A split of an untrained model is no recommendation" in page
    assert result["proposed_split"]["is_recommended"] is False


def test_a_measurement_is_one_file(dense, tmp_path, monkeypatch):
    """The page's own measurement, as a file beside the others: nothing else knows of it."""
    mine = tmp_path / "more" / "mine.py"
    mine.parent.mkdir()
    mine.write_text(next(one for one in code(PAGE) if "MEASUREMENT" in one))
    package = settings.import_module(settings.PACKAGE)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(mine.parent)])
    assert "mine" in settings.measurement_names()
    out = tmp_path / "out"
    words = ["probe", dense, "--data", "toy:32", "--out", str(out), "--measurements", "mine"]
    words += ["attention", "--num-clips", "2", "--context", "2", "--num-steps", "2"]
    assert main([*words, "--device", "cpu"]) == 0
    result = json.loads((out / "probe.json").read_text())
    assert len(result["loss_by_level"]) == 5 and result["seconds"]["mine"] > 0
    assert sorted(path.name for path in (out / "parts").iterdir()) == [
        "attention.json", "mine.json",
    ]  # fmt: skip
    page = (out / "report.html").read_text()
    assert page.index("Where do layers look") < page.index("<h2>Loss</h2>")
