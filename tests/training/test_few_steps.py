"""A run of few steps: its checkpoint says how it is sampled, and every command follows it."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import turns
from scd.bench.case import Case, parse_case
from scd.bench.compare import CompareConfig, compare, pairs_of
from scd.bench.measure import BenchConfig, bench, cases_of
from scd.bench.streams import TimedSessions, TimedStreams
from scd.cli import main
from scd.common.config import to_json
from scd.data.clip import Conditions
from scd.engine.plain import PlainEngine
from scd.evaluation.evaluate import evaluate, prepare
from scd.evaluation.protocols import PROTOCOLS, EvaluateConfig, Protocol
from scd.models.checkpoint import load_world, save_world
from scd.models.config import SamplingConfig
from scd.models.flow import schedule, with_num_steps
from scd.sampling.sample import sample
from scd.sampling.settings import SampleConfig
from scd.streaming.environment import WorldEnv, WorldVectorEnv
from scd.streaming.rollout import Rollout

pytestmark = pytest.mark.usefixtures("brief_bench")

CPU = torch.device("cpu")
LISTED = SamplingConfig(num_steps=3, solver="renoise", schedule="listed", times=(1.0, 0.8, 0.4))
TWO = with_num_steps(LISTED, 2)
SHIFTED = SamplingConfig(num_steps=2, solver="renoise", schedule="shifted", shift=5.0)


@pytest.fixture
def model_config(separable_config):
    """One kind is enough: where the steps come from is the same for both."""
    return separable_config


@pytest.fixture
def runs(tiny_world, tmp_path):
    """The same weights, sampled in three ways."""
    ways = {"listed": LISTED, "shifted": SHIFTED, "euler": SamplingConfig(num_steps=3)}
    return {
        name: str(save_world(replace(tiny_world, sampling=way), tmp_path / name))
        for name, way in ways.items()
    }


def test_a_checkpoint_carries_its_schedule(runs):
    assert load_world(runs["listed"]).sampling == LISTED
    assert Rollout(load_world(runs["listed"])).times == [1.0, 0.8, 0.4, 0.0]
    path = f"{runs['euler']}/config.json"
    with open(path) as file:
        settings = json.load(file)
    del settings["sampling"]["times"]
    with open(path, "w") as file:
        json.dump(settings, file)
    assert load_world(runs["euler"]).sampling == SamplingConfig(num_steps=3)


def test_sample_and_evaluate_follow_it(runs, folder, tmp_path, no_pictures):
    found = {}
    for name, run in runs.items():
        common = {"run": run, "data": folder, "device": "cpu"}
        sampled = sample(
            SampleConfig(**common, context=3, frames=3, out=str(tmp_path / f"s-{name}"))
        )
        protocol = Protocol(context=3, horizon=3, num_clips=2)
        out = str(tmp_path / f"{name}.json")
        measured = evaluate(EvaluateConfig(**common, protocol=protocol, out=out))
        assert sampled["model"]["sampling"] == measured["model"]["sampling"]
        found[name] = sampled["model"]["sampling"], measured["rows"]
    assert found["listed"][0]["times"] == [1.0, 0.8, 0.4]
    assert found["shifted"][0]["solver"] == "renoise" and found["shifted"][0]["shift"] == 5.0
    # Other solvers make other frames of the same noise.
    assert found["listed"][1] != found["euler"][1]


def test_engines_agree_on_the_frames_of_a_run(runs):
    actions = torch.tensor([[0, 1, 2, 3]])
    frames = []
    for kind in ("plain", "fast"):
        from_file = load_world(runs["listed"])
        case = Case(model=runs["listed"], engine=kind, steps=3, context=4)
        rollout = Rollout(from_file, engine=TimedStreams(case, CPU).engine)
        rollout.begin(torch.zeros(1, 1, 3, 32, 32), Conditions(actions=actions[:, :1]))
        frames.append(rollout.generate(actions, 4))
    torch.testing.assert_close(*frames, atol=1e-4, rtol=0)


def test_bench_times_a_run_as_it_is_sampled(runs):
    config = BenchConfig(
        model=f"{runs['listed']},toy", engine="plain", frames=2, device="cpu", context="4"
    )
    cases = cases_of(config)
    assert [case.steps for case in cases] == [3, 1, 4, 10, 50]
    assert cases[0].sampling == LISTED and cases[0].num_calls == 3
    assert cases[1].sampling == SamplingConfig(num_steps=1)
    (row,) = bench(replace(config, model=runs["shifted"]))
    assert row["steps"] == 2
    assert row["sampling"]["solver"] == "renoise" and row["sampling"]["shift"] == 5.0
    # Flags count: as many steps as are asked for, with the run's schedule and solver.
    (case,) = cases_of(replace(config, model=runs["shifted"], steps="4"))
    assert case.sampling == replace(SHIFTED, num_steps=4)
    case = parse_case(f"model={runs['listed']} context=4", {})
    assert case.steps == 3
    streams = TimedStreams(case, CPU)
    streams.begin()
    assert streams.rollout.times == schedule(LISTED).tolist()


def test_timed_streams_and_sessions_make_as_many_calls_as_the_run_says(runs):
    case = parse_case(f"model={runs['listed']} context=4", {})
    streams = TimedStreams(case, CPU)
    streams.fill()
    engine = streams.engine
    assert isinstance(engine, PlainEngine)
    calls, velocity = [], engine.model.velocity
    engine.model.velocity = lambda *inputs: calls.append(1) or velocity(*inputs)
    assert torch.isfinite(streams.frame()).all() and len(calls) == 3
    sessions = TimedSessions(replace(case, sessions=2), CPU)
    sessions.fill()
    assert sessions.streams.sampling == LISTED
    assert len(sessions.play(4, 60.0).latencies) == 4


def test_heun_is_counted_with_both_its_calls(tiny_world, tmp_path):
    heun = replace(tiny_world, sampling=SamplingConfig(num_steps=3, solver="heun"))
    run = str(save_world(heun, tmp_path / "heun"))
    (row,) = bench(BenchConfig(model=run, engine="plain", frames=2, device="cpu", context="4"))
    case = parse_case(f"model={run} context=4", {})
    assert case.num_calls == 5 and row["flops_per_frame"] == case.cost().flops(5)


def test_comparisons_follow_each_run(runs):
    config = CompareConfig(
        a=f"model={runs['listed']}", b="model=toy", context="4", rounds=1, frames=1, device="cpu"
    )
    ((a, b),) = pairs_of(config)
    assert (a.steps, b.steps) == (3, 10)
    (result,) = compare(replace(config, b=f"model={runs['shifted']}"))
    assert (result["a"]["steps"], result["b"]["steps"]) == (3, 2)
    assert result["a"]["sampling"]["times"] == [1.0, 0.8, 0.4]


@pytest.mark.parametrize(
    "words",
    [
        "sample RUN --data toy:32 --context 3 --frames 2 --steps 2 --out OUT",
        "evaluate RUN --data toy:32 --context 3 --horizon 2 --num-clips 2 --num-steps 2 "
        "--out OUT/e.json",
    ],
)
def test_commands_take_other_steps_than_a_list_has(runs, words, tmp_path, no_pictures):
    words = words.replace("RUN", runs["listed"]).replace("OUT", str(tmp_path / "out"))
    assert main([*words.split(), "--device", "cpu"]) == 0
    (path,) = (tmp_path / "out").glob("*.json")
    assert json.loads(path.read_text())["model"]["sampling"] == to_json(TWO)


def test_protocols_environments_and_turns_take_other_steps_than_a_list_has(runs, folder, tmp_path):
    protocol = replace(PROTOCOLS["toy-8-8"], num_clips=1)
    config = EvaluateConfig(run=runs["listed"], data=folder, num_steps=2, protocol=protocol)
    assert prepare(config, CPU).trial.sampling == TWO
    world = load_world(runs["listed"])
    assert WorldEnv(world, num_steps=2)._rollout.sampling == TWO
    assert WorldVectorEnv(world, num_envs=1, num_steps=2)._streams.sampling == TWO
    words = [f"few={runs['listed']}@2", "--data", folder, "--out", str(tmp_path / "t.json")]
    words += ["--frames", "1", "--block", "1", "--given", "2", "--warm-up", "1", "--device", "cpu"]
    assert turns.main(words) == 0
    written = json.loads((tmp_path / "t.json").read_text())
    assert written["worlds"]["few"]["sampling"] == to_json(TWO)


def test_steps_of_a_stream_there_and_back_are_the_listed_ones(runs):
    rollout = Rollout(load_world(runs["listed"]))
    for num_steps in (2, 7, 3):
        rollout.num_steps = num_steps
        assert len(rollout.times) == num_steps + 1
    assert rollout.sampling == LISTED and rollout.times == [1.0, 0.8, 0.4, 0.0]


def test_a_bench_of_other_steps_than_a_list_has_is_refused_in_one_line(runs, capsys):
    words = f"bench --model {runs['listed']} --steps 2 --context 4 --device cpu"
    assert main(words.split()) == 2
    said = capsys.readouterr().err.strip()
    assert "schedule 'listed' has 3 times" in said and "num_steps must be 3, got 2" in said
    assert len(said.splitlines()) == 1
