"""The plan of a run against what the run does."""

import json
from dataclasses import replace

import pytest
import torch

from scd.data.loader import Loader
from scd.models.build import build
from scd.models.config import CacheConfig
from scd.models.kinds import ModelConfig
from scd.objectives.config import DenoiseConfig, TeacherForcingConfig
from scd.optim.config import OptimConfig
from scd.optim.optim import build_optimizers, parameter_groups
from scd.training.config import TrainConfig
from scd.training.plan import GIB, count_micro_batch, dry_run, plan
from tests.tiny import denoising_loss as denoise
from tests.tiny import stored_in, teacher_forced_loss
from tests.tiny_wan import tiny_wan_separable, wan_clips


@pytest.fixture
def config(model_config: ModelConfig) -> TrainConfig:
    model = replace(model_config, cache=CacheConfig(window=6))
    return TrainConfig(model=model, num_frames=6, objective=DenoiseConfig(context_noise=0.0))


@pytest.mark.parametrize(
    "change", [{}, {"gradient_checkpointing": True}, {"precision": "bf16"}], ids=str
)
def test_activations_are_those_of_a_real_pass(config, toy_source, change):
    config = replace(config, **change)
    model = build(config.model)
    model.gradient_checkpointing = config.gradient_checkpointing
    batch = Loader(toy_source, config.batch_size, config.num_frames, seed=0).batch(0)
    sizes = {}

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"),
    ):
        denoise(
            model,
            batch.frames,
            batch.conditions,
            config.objective,
            torch.Generator(),
            model.needs_first_frame,
        )
    for weight in model.parameters():
        sizes.pop(weight.data_ptr(), None)
    measured = sum(size for size, _ in sizes.values())
    assert count_micro_batch(config)[0] == pytest.approx(measured, rel=0.02)


def test_parameters_and_memory_are_those_of_the_real_parts(config):
    config = replace(config, optim=OptimConfig(optimizer="muon"))
    model, result = build(config.model), plan(config)
    assert result.total_parameters == sum(p.numel() for p in model.parameters())
    assert result.encoder_parameters + result.decoder_parameters == result.total_parameters
    groups = parameter_groups(model, model.encoder_parameters(), config.optim)
    optimizers = build_optimizers(groups, config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    # AdamW's step counters are single numbers.
    state = sum(
        tensor.numel() * tensor.element_size()
        for optimizer in optimizers
        for entry in optimizer.state.values()
        for tensor in entry.values()
        if tensor.ndim > 0
    )
    assert result.memory.optimizer_gib * GIB == pytest.approx(state)
    assert result.memory.weights_gib * GIB == pytest.approx(4 * result.total_parameters)


def test_work_grows_with_clips_processes_and_recomputation(config):
    one = plan(config)
    two = plan(replace(config, num_accumulation=2), num_processes=3)
    assert two.flops_per_step == 6 * one.flops_per_step
    assert two.frames_per_step == 6 * one.frames_per_step
    twice = plan(replace(config, batch_size=2 * config.batch_size))
    assert twice.flops_per_step == pytest.approx(2 * one.flops_per_step, rel=0.01)
    recomputed = plan(replace(config, gradient_checkpointing=True))
    assert 1.02 < recomputed.flops_per_step / one.flops_per_step < 1.4
    assert recomputed.memory.activations_gib < 0.8 * one.memory.activations_gib


def test_a_dry_run_prints_json_and_warns_of_data_that_does_not_fit(config, capsys, tmp_path):
    dry_run(config)
    printed = capsys.readouterr()
    assert printed.err == ""
    report = json.loads(printed.out)
    assert report["config"]["num_frames"] == 6
    assert report["plan"]["memory"]["total_gib"] > 0
    for data in ("toy:64", str(tmp_path / "nowhere")):
        dry_run(replace(config, data=data))
        printed = capsys.readouterr()
        assert json.loads(printed.out)["plan"] == report["plan"]
        assert printed.err.startswith("scd: warning: training would be refused: " + data)
        assert printed.err.count("\n") == 1
    with pytest.raises(ValueError, match=r"window is 6, but num_frames is 5"):
        dry_run(replace(config, num_frames=5))


def test_a_real_pass_still_has_numbers_after_a_plan(config, toy_source):
    plan(config)
    batch = Loader(toy_source, config.batch_size, config.num_frames, seed=0).batch(0)
    loss, _ = denoise(
        build(config.model),
        batch.frames,
        batch.conditions,
        config.objective,
        torch.Generator().manual_seed(0),
        build(config.model).needs_first_frame,
    )
    assert 0 < float(loss.detach()) < 10


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_of_teacher_forcing_are_those_of_a_real_pass(recompute):
    model = tiny_wan_separable()
    config = TrainConfig(
        model=model.config,
        num_frames=5,
        gradient_checkpointing=recompute,
        objective=TeacherForcingConfig(),
    )
    model.gradient_checkpointing = recompute
    clean, _, _, conditions, _ = wan_clips(batch=config.batch_size, num_frames=5)
    conditions = replace(conditions, null_text=conditions.text)
    sizes = {}

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        teacher_forced_loss(model, clean, conditions, config.objective, torch.Generator())
    for weight in model.parameters():
        sizes.pop(weight.data_ptr(), None)
    measured = sum(size for size, _ in sizes.values())
    assert count_micro_batch(config)[0] == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("state", ["fp32", "8bit", "offload"])
def test_averages_take_what_was_planned(config, state):
    config = replace(config, optim=OptimConfig(state=state))
    memory, model = plan(config).memory, build(config.model)
    groups = parameter_groups(model, model.encoder_parameters(), config.optim)
    (optimizer,) = build_optimizers(groups, config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = sum(
        part.numel() * part.element_size()
        for entry in optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq")
        for part in stored_in(entry[name])
    )
    planned = memory.offloaded_gib if state == "offload" else memory.optimizer_gib
    # 8 bits bring a table of 256 numbers along with each average.
    assert planned * GIB == pytest.approx(held, rel=0.1 if state == "8bit" else 1e-6)
    assert (memory.offloaded_gib > 0) == (state == "offload")


def test_processes_that_share_the_weights_divide_all_but_activations(config):
    whole = plan(config, num_processes=4).memory
    cut = plan(replace(config, shard_weights=True), num_processes=4).memory
    for name in ("weights_gib", "gradients_gib", "optimizer_gib", "average_gib"):
        assert getattr(cut, name) == pytest.approx(getattr(whole, name) / 4)
    assert cut.activations_gib == whole.activations_gib
