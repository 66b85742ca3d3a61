"""Distillation in the training loop: it learns, resumes bit for bit, and stops when it must."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from scd.cli import main
from scd.common.config import from_json, to_json
from scd.common.runlog import read_log
from scd.data.spaces import ConditionSpec
from scd.models.build import build
from scd.models.checkpoint import load_auxiliary, load_world, resolve
from scd.models.config import CacheConfig, SamplingConfig
from scd.objectives.config import ConsistencyConfig, MatchConfig, RegressionConfig
from scd.optim.config import OptimConfig
from scd.optim.optim import EMA
from scd.training.config import TrainConfig
from scd.training.state import OptimisationGroup
from scd.training.world import build_groups, train
from tests.tiny import objective_of


def brief(model, out) -> TrainConfig:
    return TrainConfig(
        out=str(out),
        max_steps=4,
        num_frames=4,
        batch_size=2,
        log_every=1,
        validate_every=0,
        sample_every=0,
        save_every=0,
        device="cpu",
        model=replace(model, cache=CacheConfig(window=4)),
        optim=OptimConfig(lr=1e-3, warmup_steps=1),
        sampling=SamplingConfig(num_steps=2, solver="renoise"),
    )


@pytest.fixture
def config(tmp_path, separable_config) -> TrainConfig:
    return brief(separable_config, tmp_path / "student")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, separable_config) -> str:
    plain = brief(separable_config, tmp_path_factory.mktemp("teacher") / "run")
    plain = replace(plain, max_steps=8, optim=OptimConfig(lr=1e-2))
    return str(train(replace(plain, sampling=SamplingConfig(num_steps=2))))


@pytest.fixture
def matching(config, teacher) -> TrainConfig:
    critic = OptimConfig(lr=1e-3, betas=(0.0, 0.999), warmup_steps=0)
    objective = MatchConfig(
        teacher=teacher, num_given_frames=1, num_critic_updates=2, critic=critic, min_spread=0.0
    )
    return replace(config, initial=teacher, objective=objective)


def files_of(run) -> dict[str, bytes]:
    """Contents of the newest checkpoint, without the time it took."""
    files = {entry.name: entry.read_bytes() for entry in resolve(run).iterdir()}
    progress = json.loads(files.pop("progress.json"))
    progress.pop("elapsed_s")
    return files | {"progress": json.dumps(progress).encode()}


def change_of(config, teacher, name):
    """The objective of a name, on its base."""
    if name == "consistency":
        objective = ConsistencyConfig(teacher=teacher, target="average")
        return replace(config, objective=objective)
    if name == "regression":
        return replace(config, objective=RegressionConfig())
    return replace(config, objective=replace(config.objective, method=name))


@pytest.mark.parametrize("name", ["consistency", "gan"])
def test_two_and_two_steps_are_four_steps_bit_for_bit(matching, teacher, tmp_path, name):
    config = replace(change_of(matching, teacher, name), precision="bf16")
    whole = train(config)
    parts = replace(config, out=str(tmp_path / "parts"))
    train(replace(parts, max_steps=2))
    train(parts)
    assert files_of(tmp_path / "parts") == files_of(whole)
    assert ("auxiliary.pt" in files_of(whole)) == (name in ("dmd", "gan"))
    for number in ("loss", "critic_loss"):
        one, two = (
            [event.get(number) for event in read_log(run, "step")]
            for run in (whole, tmp_path / "parts")
        )
        assert one == two and len(one) == 4


def test_a_step_trains_the_critic_as_often_as_asked_and_then_the_student(matching):
    once = train(replace(matching, max_steps=1))
    critic = load_auxiliary(resolve(once))["critic"]
    assert critic["first_loss"] > 0
    assert {int(state["step"]) for state in critic["optimizers"][0]["state"].values()} == {2}
    start = load_world(matching.initial).model.state_dict()
    student = load_world(once, "raw").model.state_dict()
    for moved in (critic["weights"], student):
        assert any(not torch.equal(moved[name], weight) for name, weight in start.items())
    (event,) = read_log(once, "step")
    assert {"loss", "critic_loss", "spread", "grad_norm"} <= set(event)


def test_consistency_brings_one_step_nearer_to_the_teachers_many(config, teacher):
    """By the loss itself, which is the distance to the end of the teacher's path."""
    objective = ConsistencyConfig(teacher=teacher, num_grid_steps=4, num_teacher_steps=4)
    optim = OptimConfig(lr=3e-3, warmup_steps=1)
    run = train(replace(config, initial=teacher, objective=objective, optim=optim, max_steps=20))
    losses = [event["loss"] for event in read_log(run, "step")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_critic_that_diverges_stops_the_run_and_the_checkpoint_stays(matching):
    """A fast critic, in its first steps; that the rate is warmed up makes the rise a slow one."""
    critic = replace(matching.objective.critic, lr=1000.0, warmup_steps=10_000)
    config = replace(matching, objective=replace(matching.objective, critic=critic))
    run = resolve(train(replace(config, max_steps=1)))
    before = files_of(run.parent)
    with pytest.raises(ValueError, match=r"step [1-9]\d?: the critic diverges: .* than 10 times"):
        train(replace(config, max_steps=100))
    assert files_of(run.parent) == before
    (run / "auxiliary.pt").unlink()
    with pytest.raises(ValueError, match=r"lacks auxiliary\.pt, the state of critic"):
        train(replace(config, max_steps=100))


def test_a_collapse_stops_the_run_and_is_named(matching):
    objective = replace(matching.objective, min_spread=1e6)
    with pytest.raises(ValueError, match="step 0: the generated frames have collapsed: they vary"):
        train(replace(matching, objective=objective))


def test_a_rise_is_told_sudden_or_slow_but_not_below_what_knowing_nothing_gives():
    def last_of(losses, max_rise=10.0):
        network = nn.Linear(1, 1)
        critic = OptimisationGroup.of(
            network,
            objective_of(lambda *_: (torch.zeros(()), {})),
            OptimConfig(),
            name="critic",
            max_rise=max_rise,
        )
        for number, loss in enumerate(losses):
            try:
                critic.refuse(number, loss, {})
            except ValueError:
                return number
        return None

    assert last_of([0.5, 4.9, 0.1, 5.1]) == 3
    slow = [0.5 * 1.05**number for number in range(60)]
    assert last_of(slow) == next(number for number, loss in enumerate(slow) if loss > 5)
    assert last_of([0.01, 1.9, 2.1]) == 2
    assert last_of([0.5, 1e9], max_rise=0.0) is None


def test_a_rollout_longer_than_the_window_trains_on_its_end(matching):
    objective = replace(matching.objective, num_scored_frames=3)
    run = train(replace(matching, num_frames=9, max_steps=1, objective=objective))
    assert read_log(run, "step")[0]["loss"] > 0
    with pytest.raises(ValueError, match="8 scored frames .* than the 4 frames that the teacher"):
        train(replace(matching, num_frames=9, out=matching.out + "2"))


@pytest.mark.parametrize("name", ["consistency", "dmd"])
def test_a_teacher_of_other_latents_or_conditions_is_refused(matching, teacher, tmp_path, name):
    config = change_of(matching, teacher, name)
    pixels = replace(config.autoencoder, mean=0.5)
    with pytest.raises(ValueError, match=r"same latents .*mean=0\.0.*mean=0\.5"):
        train(replace(config, initial="", autoencoder=pixels))
    shape = replace(config.model.shape, height=64, width=64)
    with pytest.raises(ValueError, match=r"same latent frames .*\(3, 32, 32\).*\(3, 64, 64\)"):
        train(replace(config, initial="", data="toy:64", model=replace(config.model, shape=shape)))
    away = replace(config.objective, teacher=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(replace(config, objective=away))
    with pytest.raises(ValueError, match="objective.teacher must name the run"):
        train(replace(config, objective=replace(away, teacher="")))
    assert not (tmp_path / "student").exists()


def test_guidance_without_conditions_is_refused(matching):
    config = replace(
        matching,
        model=replace(matching.model, conditions=ConditionSpec()),
        objective=replace(matching.objective, guidance=2.0),
    )
    model = build(config.model)
    with pytest.raises(ValueError, match="guidance by conditions needs a teacher with actions"):
        build_groups(config, model, EMA(model, 0.9), Accelerator(cpu=True))


@pytest.mark.parametrize("name", ["dmd", "sid", "gan"])
def test_recomputed_blocks_train_the_same_weights(matching, teacher, tmp_path, name):
    config = change_of(replace(matching, max_steps=1), teacher, name)
    whole = train(config)
    again = train(replace(config, gradient_checkpointing=True, out=str(tmp_path / "again")))
    for mine, theirs in zip(
        *(load_auxiliary(resolve(run))["critic"]["weights"].values() for run in (whole, again)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
    mine, theirs = (load_world(run, "raw").model.state_dict() for run in (whole, again))
    torch.testing.assert_close(mine, theirs)


def test_a_dense_student_of_a_separable_teacher(matching, dense_config):
    model = replace(dense_config, cache=CacheConfig(window=4))
    run = train(replace(matching, initial="", model=model, max_steps=1))
    assert load_world(run).model.config == model


def test_settings_survive_a_file(matching, teacher):
    for name in ("consistency", "regression", "sid"):
        config = change_of(matching, teacher, name)
        assert from_json(TrainConfig, json.loads(json.dumps(to_json(config)))) == config


def test_the_command_makes_a_run_that_streams_at_its_own_steps(teacher, tmp_path, capsys):
    run, small = tmp_path / "fast", "--max-steps 1 --batch-size 1 --num-frames 4 --device cpu"
    words = f"distill {teacher} --data toy:32 --steps 2 --out {run} {small} --sample-every 0"
    assert main([*words.split(), "--method", "consistency"]) == 0
    world = load_world(run)
    assert world.sampling == SamplingConfig(num_steps=2, solver="renoise")
    assert world.model.config == load_world(teacher).model.config
    out = tmp_path / "a.mp4"
    assert main(f"sample {run} --data toy:32 --frames 2 --out {out}".split()) == 0
    after = tmp_path / "after"
    words = f"distill {teacher} --initial {run} --steps 2 --out {after} {small} --sample-every 0"
    flags = "--method dmd --objective.num-given-frames 2 --objective.critic.lr 1e-5"
    assert main([*words.split(), *flags.split()]) == 0
    settings = json.loads((after / "config.json").read_text())
    assert settings["initial"] == str(run)
    assert settings["objective"]["teacher"] == str(resolve(teacher))
    assert settings["objective"]["critic"]["lr"] == 1e-5
    capsys.readouterr()
    assert main(["distill", str(tmp_path / "nowhere"), "--data", "toy:32"]) == 2
    with pytest.raises(SystemExit) as stop:
        main(["distill", teacher, "--steps", "0"])
    assert stop.value.code == 2
    assert "steps must be 1 or more, got 0" in capsys.readouterr().err


SCRIPT = """
import json, os, sys
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parallel import DistributedDataParallel
from scd.common.config import from_json
from scd.models.embed import FrameHead
from scd.training.config import TrainConfig
from scd.training.world import train
wrapped, num_frames = {}, []
def note(module, inputs, output):
    if isinstance(module, DistributedDataParallel):
        wrapped[id(module)] = module
    if isinstance(module, FrameHead):
        num_frames.append(len(output))
register_module_forward_hook(note)
train(from_json(TrainConfig, json.load(open(sys.argv[1]))))
weights = [module.module.state_dict() for module in wrapped.values()]
torch.save([weights, num_frames], f"{sys.argv[1]}.{os.environ['RANK']}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dmd", "gan"])
def test_two_processes_share_gradients_and_exit_steps(matching, teacher, tmp_path, name):
    config = replace(change_of(matching, teacher, name), num_accumulation=2)
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for max_steps in (2, 4):
        settings = to_json(replace(config, max_steps=max_steps))
        (tmp_path / "config.json").write_text(json.dumps(settings))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", str(tmp_path / "train.py")]
        process = subprocess.run(
            [*command, str(tmp_path / "config.json")], env=environment, capture_output=True
        )
        assert process.returncode == 0, process.stderr.decode()
        one, two = (torch.load(tmp_path / f"config.json.{rank}") for rank in (0, 1))
        # The critic and the student; as many calls of each network in both processes.
        assert len(one[0]) == len(two[0]) == 2 and one[1] == two[1]
        for mine, theirs in zip(one[0], two[0], strict=True):
            assert all(torch.equal(weight, theirs[name]) for name, weight in mine.items())
    run = tmp_path / "student"
    assert read_log(run, "start")[0]["num_processes"] == 2
    assert [event["step"] for event in read_log(run, "step")] == [1, 2, 3, 4]
