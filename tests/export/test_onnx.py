"""Exported graphs against the plain engine: the same stream, frame by frame."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import onnxruntime
import pytest
import torch

from scd.autoencoders.base import Autoencoder, PixelAutoencoder
from scd.autoencoders.config import ImageAutoencoderConfig, PixelConfig
from scd.autoencoders.deep_compression import deep_settings
from scd.autoencoders.diffusers import ImageAutoencoder
from scd.cli import main
from scd.data.clip import Conditions
from scd.data.source import DataCard
from scd.data.spaces import ConditionSpec
from scd.export.graphs import Decode, Encode, Graph
from scd.export.onnx_engine import OnnxEngine
from scd.export.onnx_files import traced
from scd.export.onnx_world import DESCRIPTION, write_onnx
from scd.models.checkpoint import World, save_world
from scd.models.config import CacheConfig, Guidance, SamplingConfig
from scd.streaming.rollout import Rollout
from tests.tiny import ACTIONS, BLOCK, COMPOSITE, SHAPE, tiny_dense, tiny_separable

FRAMES, WINDOW = 64, 6
"""So that the window wraps ten times."""


def world_of(conditions: ConditionSpec = ACTIONS, num_steps: int = 2, **settings) -> World:
    num_names = conditions.num_actions or conditions.action_dim
    card = DataCard(
        height=SHAPE.height,
        width=SHAPE.width,
        fps=10.0,
        conditions=conditions,
        action_names=tuple(f"entry {at}" for at in range(num_names)),
    )
    cache = CacheConfig(window=WINDOW, num_sinks=settings.pop("num_sinks", 1))
    return World(
        model=tiny_separable(conditions=conditions, cache=cache, **settings),
        autoencoder=PixelAutoencoder(PixelConfig(mean=-0.2, std=0.6)),
        card=card,
        sampling=SamplingConfig(num_steps=num_steps, solver="renoise"),
    )


def exported(world: World, folder: Path, weights: str = "auto") -> OnnxEngine:
    folder.mkdir()
    write_onnx(world, "tiny", weights, folder)
    return OnnxEngine(folder)


def largest_difference(world: World, engine: OnnxEngine, guidance: Guidance | None = None) -> float:
    """Play both for 64 frames behind 3 given ones; return how far apart they come."""
    generator = torch.Generator().manual_seed(3)
    spec, card = world.card.conditions, world.card
    frames = torch.rand(1, 3, 3, card.height, card.width, generator=generator) * 2 - 1
    plan = [action_of(spec, generator) for _ in range(FRAMES + 3)]
    labels = torch.tensor([1]) if spec.num_labels else None
    given = Conditions(labels=labels, actions=torch.stack(plan[:3])[None])
    rollouts = [Rollout(world, guidance=guidance, seed=5, engine=each) for each in (None, engine)]
    for rollout in rollouts:
        rollout.begin(frames, given)
    worst = 0.0
    for action in plan[3:]:
        plain, fast = (rollout.step(action[None]) for rollout in rollouts)
        worst = max(worst, float((plain - fast).abs().max()))
    assert float(plain.std()) > 0.05
    return worst


def action_of(spec: ConditionSpec, generator: torch.Generator) -> torch.Tensor:
    if spec.num_actions:
        return torch.randint(spec.num_actions, (), generator=generator)
    entries = []
    for part in spec.action_parts:
        if part.space == "Box":
            entries += (torch.rand(part.size, generator=generator) * 2 - 1).tolist()
        else:
            most = part.choices or (2,) * part.size
            entries += [float(torch.randint(one, (), generator=generator)) for one in most]
    return torch.tensor(entries)


GUIDED = {
    "none": None,
    "conditions": Guidance(kind="conditions", scale=1.5),
    "context_noise": Guidance(kind="context_noise", scale=1.5),
}


def test_a_stream_of_graphs_is_that_of_the_model(tmp_path: Path):
    world = world_of(join="prefix", predict="clean")
    engine = exported(world, tmp_path / "out")
    for name, guidance in GUIDED.items():
        assert largest_difference(world, engine, guidance) < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("join", "predict"),
    [
        ("token_concat", "velocity"),
        ("token_concat_projected", "clean"),
        ("channel_concat", "velocity"),
        ("add", "clean"),
        ("prefix", "velocity"),
    ],
)
def test_every_join_and_output_is_exported(join: str, predict: str, tmp_path: Path):
    block = replace(BLOCK, distance_bias=0.05, learned_positions=True)
    world = world_of(join=join, predict=predict, block=block, num_sinks=2)
    assert largest_difference(world, exported(world, tmp_path / "out")) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("start_frame", [True, False])
def test_composite_actions_labels_and_parts_are_exported(start_frame: bool, tmp_path: Path):
    spec = replace(COMPOSITE, num_labels=3)
    world = world_of(spec, join="prefix", start_frame=start_frame)
    engine = exported(world, tmp_path / "out")
    assert largest_difference(world, engine) < 1e-4
    hidden = Guidance(kind="conditions", scale=2.0, parts=(spec.action_parts[0].name,))
    assert largest_difference(world, engine, hidden) < 1e-4


def test_a_command_writes_what_the_world_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    world = world_of(join="prefix")
    world.model.bfloat16()
    run = save_world(world, tmp_path / "tiny-world")
    out = tmp_path / "out"
    assert main(["export", "onnx", str(run), "--out", str(out)]) == 0
    assert "5 graphs" in capsys.readouterr().out
    about = json.loads((out / DESCRIPTION).read_text("utf-8"))
    assert about["name"] == "tiny-world" and about["card"]["action_names"][1] == "entry 1"
    # The exporter writes where each node was traced: paths of whoever exports.
    assert not any(b".py" in path.read_bytes() for path in out.glob("*.onnx"))
    assert about["graphs"]["encoder"]["inputs"]["bias"] == {"type": "float", "shape": [WINDOW + 1]}
    calls = about["schedules"]["2"]["calls"]
    assert [call["step_noise"] for call in calls] == [0.5, 0.0]
    # Weights that fit into two bytes take no more, and are those of the world.
    num_values = sum(weight.numel() for weight in world.model.parameters())
    assert about["weights"]["bytes"] < 2.3 * num_values
    assert largest_difference(replace(world, model=world.model.float()), OnnxEngine(out)) < 1e-4
    assert main(["export", "onnx", str(run), "--out", str(out)]) == 2
    assert "out" in capsys.readouterr().err


def test_worlds_without_graphs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    world = world_of()
    run = save_world(replace(world, model=tiny_dense()), tmp_path / "dense")
    assert main(["export", "onnx", str(run), "--out", str(tmp_path / "out")]) == 2
    assert "dense world" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_beyond_float16_are_refused(tmp_path: Path):
    world = world_of()
    with torch.no_grad():
        world.model.encoder.blocks[0].mlp[0].weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="1e\\+06, float16 ends at 65504.*--weights fp32"):
        exported(world, tmp_path / "out", "fp16")


@pytest.mark.slow
def test_the_networks_of_an_autoencoder_are_exported():
    network = diffusers.AutoencoderDC(**deep_settings("small-8"))
    scale = {"mean": (0.1,) * 32, "std": (2.0,) * 32}
    config = ImageAutoencoderConfig(
        source="", network="AutoencoderDC", channels=32, cell_size=8, **scale
    )
    assert_exported(ImageAutoencoder(config, network), (1, 32, 8, 8))


def test_pixels_of_overlapping_patches_are_exported():
    lapped = PixelConfig(mean=0.1, std=0.5, lapped=16)
    assert_exported(PixelAutoencoder(lapped), (1, 3, 64, 64))


def assert_exported(autoencoder: Autoencoder, latents: tuple[int, ...]) -> None:
    """Compare the graphs of an autoencoder of 64x64 pixels with itself."""
    generator = torch.Generator().manual_seed(1)
    for kind, shape in ((Decode, latents), (Encode, (1, 3, 64, 64))):
        module, given = kind(autoencoder), torch.rand(shape, generator=generator) * 2 - 1
        proto = traced(Graph(module=module, inputs={"given": given}, outputs=("made",)))
        session = onnxruntime.InferenceSession(proto.SerializeToString())
        (made,) = session.run(None, {"given": given.numpy()})
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(made), module(given), atol=1e-4)
