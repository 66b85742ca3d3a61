"""Long streams: memories of several sizes, repairs by true frames, one row per part and metric."""

import json
from dataclasses import replace

import pytest
import torch

from scd.data.clip import Conditions
from scd.evaluation.inverse_dynamics import (
    InverseDynamics,
    InverseDynamicsConfig,
    ReadActions,
    TrainedInverseDynamics,
    pairs,
    save_inverse_dynamics,
)
from scd.evaluation.protocols import Protocol
from tests.tiny import COMPOSITE
from tools import long_streams


@pytest.fixture
def model_config(separable_config):
    return separable_config


@pytest.fixture
def judge(toy_source, tmp_path):
    torch.manual_seed(0)
    config = InverseDynamicsConfig(conditions=toy_source.card.conditions, width=16, feature_dim=2)
    network = InverseDynamics(config, 32, 32).eval()
    made = TrainedInverseDynamics(network=network, card=toy_source.card, held_out={})
    save_inverse_dynamics(made, tmp_path / "judge", {})
    return str(tmp_path / "judge")


def rows(result, metric):
    found = {}
    for row in result["rows"]:
        if row["metric"] == metric:
            found.setdefault(row["baseline"], {})[row["horizon"]] = row["mean"]
    return found


def test_every_memory_and_repair_has_rows_of_every_part(run, folder, judge, tmp_path, capsys):
    out = tmp_path / "long.json"
    words = [run, folder, "--out", str(out), "--frames", "25", "--part", "10", "--streams", "2"]
    words += ["--context", "2", "--num-steps", "1", "--judge", judge, "--observe-every", "0", "4"]
    assert long_streams.main([*words, "--caches", "3/0"]) == 0
    before = json.loads(out.read_text())["rows"]
    # The same command with another memory goes on; with other settings it is another result.
    assert long_streams.main([*words, "--caches", "3/0", "3/1"]) == 0
    assert json.loads(out.read_text())["rows"][: len(before)] == before
    assert long_streams.main([*words, "--seed", "1"]) == 2
    assert "holds another result" in capsys.readouterr().err
    result = json.loads(out.read_text())
    for name in ("long", *(f"long-{number}" for number in (1, 2, 3, 4))):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    names = [
        f"window 3, sinks {sinks}{repaired}"
        for sinks in (0, 1)
        for repaired in ("", ", observe every 4")
    ]
    names.insert(0, "recordings")
    for metric in ("sharpness", "contrast", "control", "frechet_own"):
        found = rows(result, metric)
        assert list(found) == names
        assert all(list(parts) == [10, 20, 25] for parts in found.values())
    # Another memory and a repair each change what is made.
    sharpness = [tuple(parts.values()) for parts in rows(result, "sharpness").values()]
    assert len(set(sharpness)) == 5
    head, _, first, *others = long_streams.stream_table(result).splitlines()
    assert head.startswith("| up to frame 10 / 20 / 25 | sharpness | contrast |")
    assert first.startswith("| recordings | ") and len(others) == 4


def test_actions_with_parts_are_read_part_by_part(toy_source):
    torch.manual_seed(0)
    config = InverseDynamicsConfig(conditions=COMPOSITE, width=16, feature_dim=2)
    network = InverseDynamics(config, 32, 32).eval()
    names = tuple("abcdefghi")
    card = replace(toy_source.card, conditions=COMPOSITE, action_names=names)
    judge = TrainedInverseDynamics(network=network, card=card, held_out={})
    frames, actions = torch.rand(2, 9, 3, 32, 32), torch.rand(2, 9, COMPOSITE.action_dim).round()
    true = long_streams.Recorded(frames=frames, conditions=Conditions(actions=actions))
    reader = ReadActions(Protocol(), judge)
    measured = long_streams.Measured(true=true, reader=reader, i3d=None)
    with torch.no_grad():
        found = measured.part(frames, actions, slice(3, 9))
        features = network.features(*pairs(frames[:, 2:]))
        errors = network.errors(features, actions[:, 3:].flatten(0, 1)).mean(0)
    rows = {"control", "control/keys", "control_error", "control_error/mouse"}
    assert rows <= set(found)
    assert found["control/keys"].mean == pytest.approx(1 - errors[0].item())
    assert found["control_error/mouse"].mean == pytest.approx(errors[1].item())


def test_recordings_go_on_with_the_next_one(toy_source, folder):
    source = long_streams.open_source(folder, "val")
    longest = max(source.num_frames(episode) for episode in range(source.num_episodes))
    true = long_streams.recorded(source, 2, longest + 5, seed=0)
    assert true.frames.shape[:2] == true.conditions.actions.shape == (2, longest + 5)


def test_a_stream_that_is_shown_each_frame_is_a_prediction_of_one_frame(run, folder):
    config = long_streams.StreamsConfig(run=run, data=folder, out="x.json", num_steps=1, context=2)
    source = long_streams.open_source(folder, "val")
    true = long_streams.recorded(source, 2, 6, seed=0)
    world = long_streams.load_world(run)
    made = long_streams.streamed(world, true, config, every=1)
    rollout = long_streams.Rollout(world, long_streams.with_num_steps(world.sampling, 1))
    for index in range(2, 6):
        rollout.begin(true.frames[:, :index], true.conditions.frames(0, index))
        alone = rollout.step(true.conditions.actions[:, index])
        torch.testing.assert_close(made[:, index - 2], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--caches", "16"], "caches must be WINDOW/SINKS, such as 16/1, got '16'"),
        (["--caches", "2/2"], "num_sinks must leave room in the window"),
        (["--observe-every", "-1"], "observe_every must be 0 or more"),
    ],
)
def test_wrong_settings_are_named(words, message, run, folder, tmp_path, capsys):
    out = str(tmp_path / "x.json")
    try:
        status = long_streams.main([run, folder, "--out", out, "--frames", "2", *words])
    except SystemExit as stop:
        status = stop.code
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert status == 2 and message in said
