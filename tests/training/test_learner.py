"""What a run trains at which rate, and states that were saved in other groups."""

import copy

import pytest
import torch
from accelerate import Accelerator

from scd.optim.optim import OptimConfig, build_optimizers, parameter_groups
from scd.training.config import TrainConfig
from scd.training.learner import Task, build_learners
from tests.tiny import tiny_separable
from tests.tiny_wan import tiny_wan_separable


def learner_of(model, optim, checkpoint=None):
    config = TrainConfig(optim=optim)
    task = Task(loss=lambda *_: (torch.zeros(()), {}))
    (learner,) = build_learners(config, task, model, Accelerator(cpu=True), checkpoint)
    return learner


def rates(learner) -> dict[int, float]:
    """The rate of each weight, by its number in the model."""
    found = {
        id(weight): group["base_lr"]
        for optimizer in learner.optimizers
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    return {number: found[id(weight)] for number, weight in enumerate(learner.network.parameters())}


@pytest.mark.parametrize("make", [tiny_separable, tiny_wan_separable])
def test_an_encoder_trains_at_its_own_rate(make):
    model = make()
    encoder = {id(weight) for weight in model.encoder.parameters()}
    expected = {
        number: 1e-4 if id(weight) in encoder else 2e-4
        for number, weight in enumerate(model.parameters())
    }
    assert rates(learner_of(model, OptimConfig(lr=1e-4, decoder_lr_ratio=2.0))) == expected


def move(model, optimizers, steps):
    for step in steps:
        for number, weight in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(1000 * step + number)
            weight.grad = torch.randn(weight.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_from_before_wans_encoder_had_a_rate_goes_on_as_if_uninterrupted(optimizer, tmp_path):
    optim = OptimConfig(optimizer=optimizer, decoder_lr_ratio=1.0, weight_decay=0.1)
    model = tiny_wan_separable()
    # As it was then: every weight counted as the decoder's.
    before = build_optimizers(parameter_groups(model, (), optim), optim)
    move(model, before, range(2))
    torch.save([one.state_dict() for one in before], tmp_path / "optimizer.pt")
    again = copy.deepcopy(model)
    move(model, before, range(2, 4))
    learner = learner_of(again, optim, tmp_path)
    assert sum(len(one.param_groups) for one in learner.optimizers) > sum(
        len(one.param_groups) for one in before
    )
    move(again, learner.optimizers, range(2, 4))
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_of_other_weights_is_refused(tmp_path):
    optim, model = OptimConfig(), tiny_wan_separable()
    other = parameter_groups(torch.nn.Linear(3, 3), (), optim)
    torch.save(
        [one.state_dict() for one in build_optimizers(other, optim)], tmp_path / "optimizer.pt"
    )
    with pytest.raises(ValueError, match="the saved state has groups of .* weights, needed"):
        learner_of(model, optim, tmp_path)
