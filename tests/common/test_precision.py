"""Which arithmetic is chosen for a device, and that Apple's GPU meets none that it lacks."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scd.common import runtime
from scd.common.runlog import read_log
from scd.common.runtime import choose_precision, has_fast_bf16
from scd.training.machine import settle
from scd.training.presets import PRESETS
from scd.training.world import train

CPU, MPS = torch.device("cpu"), torch.device("mps")

EPYC_9005 = {"avx512_f", "avx512_bf16", "avx512_vnni"}
XEON_8100 = {"avx512_f", "avx512_bw", "avx512_vl"}
XEON_8400 = {"avx512_f", "avx512_bf16", "amx_bf16", "amx_tile"}
GRAVITON_2, GRAVITON_3 = {"neon", "dot"}, {"neon", "dot", "bf16", "sve"}


def pretend(monkeypatch, flags: set[str]) -> None:
    """Let PyTorch say what another processor can do."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(flags, True))


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        (EPYC_9005, "bf16"),
        (XEON_8400, "bf16"),
        (GRAVITON_3, "bf16"),
        (XEON_8100, "fp32"),
        (GRAVITON_2, "fp32"),
        ({"avx2"}, "fp32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(sorted(value)),
)
def test_a_cpu_computes_in_bf16_where_it_has_instructions(flags, precision, monkeypatch):
    pretend(monkeypatch, flags)
    assert choose_precision("auto", CPU) == precision
    assert choose_precision("bf16", CPU) == "bf16" and choose_precision("fp32", CPU) == "fp32"


def test_pytorch_and_linux_name_the_instructions_of_this_cpu_alike(monkeypatch):
    assert runtime.cpu_flags()
    found = has_fast_bf16(CPU)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert has_fast_bf16(CPU) is found


def test_apples_gpu_has_bf16_by_name_from_macos_14_on(monkeypatch):
    for macos in (13, 15):
        monkeypatch.setattr(
            torch.backends.mps, "is_macos_or_newer", lambda major, _, has=macos: has >= major
        )
        assert choose_precision("auto", MPS) == choose_precision("fp32", MPS) == "fp32"
        if macos < 14:
            with pytest.raises(ValueError, match="bf16 on mps needs macOS 14"):
                choose_precision("bf16", MPS)
        else:
            assert choose_precision("bf16", MPS) == "bf16"


def test_a_run_keeps_the_precision_that_it_began_with(tmp_path, monkeypatch):
    config = replace(
        PRESETS["toy"],
        out=str(tmp_path / "run"),
        max_steps=1,
        num_frames=3,
        batch_size=1,
        validate_every=0,
        sample_every=0,
        num_validation_clips=1,
        device="cpu",
        threads=1,
    )
    config = replace(
        config, model=replace(config.model, cache=replace(config.model.cache, window=3))
    )
    assert config.precision == "auto"
    for flags, steps in ((XEON_8100, 1), (EPYC_9005, 2)):
        pretend(monkeypatch, flags)
        run = train(replace(config, max_steps=steps))
        assert settle(config).precision == "fp32"
    told = read_log(run, "precision")
    assert [event["chosen"] for event in told] == ["fp32", "fp32"]
    assert told[0]["fastest"] == "fp32: this CPU has no instructions for bf16"
    assert told[1]["fastest"] == "bf16: this CPU has instructions for bf16"
    # Asked for by name it is obeyed, and its price is told.
    pretend(monkeypatch, XEON_8100)
    slow = train(replace(config, out=str(tmp_path / "slow"), precision="bf16"))
    assert read_log(slow, "start")[0]["precision"] == "bf16"
    assert read_log(slow, "precision")[0]["fastest"].startswith("fp32: ")
    exact = train(replace(config, out=str(tmp_path / "exact"), precision="fp32"))
    assert not read_log(exact, "precision")


def test_the_finest_type_is_float64_but_on_apples_gpu():
    assert runtime.finest(CPU) == torch.float64 and runtime.finest(MPS) == torch.float32


def test_what_trains_and_streams_asks_for_float64_by_one_function():
    """Tensors of a run's device; times of a schedule are the CPU's."""
    on_the_cpu = {"models/flow.py", "models/wan/timesteps.py"}
    root = Path(runtime.__file__).parents[1]
    for room in ("models", "engine", "streaming", "objectives", "training", "sampling", "optim"):
        for path in (root / room).rglob("*.py"):
            if str(path.relative_to(root)) not in on_the_cpu:
                text = path.read_text()
                assert not re.search(r"\.double\(\)|torch\.float64|torch\.double", text), path
