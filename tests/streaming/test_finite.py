"""Frames that are not finite stop whoever would show or measure them, with the world's name."""

import pytest
import torch

from scd.cli import main
from scd.models.checkpoint import World, load_world, save_world
from scd.streaming.environment import WorldEnv
from scd.streaming.finite import NotFinite
from scd.streaming.rollout import Rollout


@pytest.fixture
def model_config(separable_config):
    """One kind is enough: frames of all kinds come out of a rollout."""
    return separable_config


@pytest.fixture
def wild(tiny_world, tmp_path) -> World:
    """A world of finite weights that makes NaN of them."""
    with torch.no_grad():
        for weight in tiny_world.model.parameters():
            weight.fill_(9e8)
    return load_world(save_world(tiny_world, tmp_path / "wild"))


def test_a_rollout_stops_and_stays_as_it_was(wild):
    rollout = Rollout(wild)
    rollout.begin(from_nothing=True)
    for step in (rollout.step, lambda action: rollout.generate([action])):
        with pytest.raises(NotFinite, match="wild makes frames that are not finite.* frame 0 of"):
            step(0)
        assert rollout.num_frames == 0 and rollout.newest is None


def test_an_environment_stops(wild):
    env = WorldEnv(wild)
    with pytest.raises(NotFinite, match="wild makes frames that are not finite"):
        env.reset(seed=0)
        env.step(env.action_space.sample())


FLAGS = "--data toy:32 --context 2 --device cpu"


@pytest.mark.parametrize(
    "command",
    [
        "sample {} --frames 2 --out s",
        "evaluate {} --horizon 2 --num-clips 2 --no-memory --out e.json",
        "probe {} --num-clips 2 --num-steps 2 --measurements similarity --out p",
        "probe {} --num-clips 2 --num-steps 2 --measurements attention --out p",
    ],
)
def test_commands_stop_with_one_sentence(wild, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command.format("wild").split(), *FLAGS.split()]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("scd: wild") and "frames that are not finite" in said
    assert not list(tmp_path.glob("s/*")) and not (tmp_path / "e.json").exists()
