"""Benchmarks of Wan models by engine and precision, on a tiny one."""

import json
from pathlib import Path

import pytest

from benchmarks import rounding, wan_layers, wan_step
from scd.autoencoders.config import WanAutoencoderConfig
from scd.autoencoders.wan import WanAutoencoder
from scd.cli import main
from scd.data.source import DataCard
from scd.models.checkpoint import World, save_world
from scd.models.config import SamplingConfig
from tests.engine.test_int8 import can
from tests.tiny_wan import TEXT, tiny_wan, tiny_wan_separable
from tests.tiny_wan_vae import tiny_vae


def world(model, folder):
    card = DataCard(height=32, width=48, fps=16.0, conditions=TEXT, action_names=())
    place = Path(folder).parent / "parts"
    if not place.exists():
        tiny_vae().save_pretrained(place / "vae")
    autoencoder = WanAutoencoder(WanAutoencoderConfig(source=str(place)))
    sampling = SamplingConfig(num_steps=2)
    made = World(model=model, autoencoder=autoencoder, card=card, sampling=sampling)
    return str(save_world(made, folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world(tiny_wan_separable(), tmp_path_factory.mktemp("worlds") / "separable")


@can
def test_layers_are_timed_in_turns_and_counted_up(folder, tmp_path):
    dense = world(tiny_wan(2), tmp_path / "dense")
    config = wan_layers.LayersConfig(model=folder, against=dense, context=3, steps=2, rounds=2)
    result = wan_layers.measure(config)
    runs = ["plain:bf16", "fast:bf16", "fast:int8"]
    assert list(result["seconds"]) == [*runs, *(f"{dense}:{run}" for run in runs)]
    for run, parts in result["seconds"].items():
        assert min(parts.values()) > 0 and len(result["ratios"][run]) == 2
    assert result["ratios"]["plain:bf16"] == [1.0, 1.0]


@can
def test_errors_of_every_layer_grow_with_coarser_numbers(folder):
    errors = rounding.measure(rounding.RoundingConfig(model=folder, context=3, steps=2))
    for precision in rounding.PRECISIONS:
        found = errors[precision]
        assert len(found["encoder"]) == 4 and len(found["decoder"]) == 3
        every = [*found["encoder"], *found["decoder"], found["velocity"], found["frame"]]
        assert 0 < min(every) and max(every) < 0.2
    assert errors["bf16"]["velocity"] < errors["int8"]["velocity"]


@can
def test_a_step_is_timed_beside_diffusers_class(folder):
    result = wan_step.measure(wan_step.StepConfig(model=folder, rounds=2))
    assert list(result["seconds"]) == [
        *("fast:bf16", "fast:int8", "plain:bf16"),
        *("diffusers:bf16", "diffusers:fp32"),
    ]
    assert all(min(each) > 0 and len(each) == 2 for each in result["seconds"].values())
    assert min(result["ratios"]["fast:bf16"]["diffusers:fp32"]) > 0


@can
def test_the_command_times_both_precisions(folder, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    words = ["--engine", "fast", "--context", "3", "--steps", "1", "--frames", "1"]
    words += ["--device", "cpu"]
    bench = ["bench", "--model", folder, "--precision", "bf16,int8", "--seconds", "1"]
    assert main([*bench, *words, "--json", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["precision"] for row in rows] == ["bf16", "int8"]
    sides = f"model={folder} engine=plain precision=bf16", f"model={folder} precision=int8"
    compare = ["bench", "compare", "--a", sides[0], "--b", sides[1], "--rounds", "1"]
    assert main([*compare, *words]) == 0
    assert "A takes" in capsys.readouterr().out


def test_other_models_are_refused(tmp_path, capsys):
    dense = world(tiny_wan(2), tmp_path / "dense")
    for script, model in (
        (wan_layers, "toy"),
        (rounding, dense),
        (rounding, "toy"),
        (wan_step, dense),
    ):
        assert script.main([model]) == 2
        assert "Wan model, got" in capsys.readouterr().err
