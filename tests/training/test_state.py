"""What a run trains at which rate, and states of other weights."""

import pytest
import torch

from scd.optim.config import OptimConfig
from scd.optim.optim import build_optimizers, parameter_groups
from scd.training.state import OptimisationGroup
from tests.tiny import objective_of, tiny_separable
from tests.tiny_wan import tiny_wan_separable


def group_of(model, optim):
    objective = objective_of(lambda *_: (torch.zeros(()), {}))
    return OptimisationGroup.of(model, objective, optim, encoder=model.encoder_parameters())


def rates(group) -> dict[int, float]:
    """The rate of each weight, by its number in the model."""
    found = {
        id(weight): group["base_lr"]
        for optimizer in group.optimizers
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    return {number: found[id(weight)] for number, weight in enumerate(group.network.parameters())}


@pytest.mark.parametrize("make", [tiny_separable, tiny_wan_separable])
def test_an_encoder_trains_at_its_own_rate(make):
    model = make()
    encoder = {id(weight) for weight in model.encoder.parameters()}
    expected = {
        number: 1e-4 if id(weight) in encoder else 2e-4
        for number, weight in enumerate(model.parameters())
    }
    assert rates(group_of(model, OptimConfig(lr=1e-4, decoder_lr_ratio=2.0))) == expected


def test_a_state_of_other_weights_is_refused():
    optim, model = OptimConfig(), tiny_wan_separable()
    other = build_optimizers(parameter_groups(torch.nn.Linear(3, 3), (), optim), optim)
    with pytest.raises(ValueError, match="parameter group"):
        group_of(model, optim).load_optimizers([one.state_dict() for one in other])
