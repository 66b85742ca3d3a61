"""Parameter groups, the learning-rate schedule and the average of the weights."""

import copy

import pytest
import torch
from torch import nn

from scd.models.build import build
from scd.models.config import DenseConfig, EncoderConfig, SeparableConfig
from scd.optim.config import OptimConfig
from scd.optim.optim import (
    EMA,
    build_optimizers,
    fitting_state,
    lr_multiplier,
    parameter_groups,
    set_lr,
)
from tests.tiny import stored_in


def models():
    torch.manual_seed(0)
    return [
        build(SeparableConfig(encoder=EncoderConfig(num_layers=1))),
        build(DenseConfig(num_layers=1)),
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("model", models())
def test_every_parameter_is_moved_by_exactly_one_group(model, optimizer):
    config = OptimConfig(optimizer=optimizer)
    optimizers = build_optimizers(
        parameter_groups(model, model.encoder_parameters(), config), config
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for one in optimizers:
        one.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    moved = [id(p) for one in optimizers for group in one.param_groups for p in group["params"]]
    assert len(moved) == len(set(moved)) == len(before)


def test_muon_moves_the_matrices_of_the_blocks_and_nothing_else():
    model = models()[0]
    config = OptimConfig(optimizer="muon")
    names = {id(p): name for name, p in model.named_parameters()}
    muon = {
        names[id(p)]
        for group in parameter_groups(model, model.encoder_parameters(), config)
        if group.optimizer == "muon"
        for p in group.parameters
    }
    expected = {
        name
        for name, p in model.named_parameters()
        if ".blocks." in name and p.ndim == 2 and "modulation" not in name
    }
    assert muon == expected and len(muon) > 0


def test_encoder_and_decoder_have_their_own_rates_and_vectors_no_decay():
    separable, dense = models()
    config = OptimConfig(lr=1e-4, decoder_lr_ratio=3.0, weight_decay=0.1)
    encoder = {id(p) for p in separable.encoder.parameters()}
    for group in parameter_groups(separable, separable.encoder_parameters(), config):
        for parameter in group.parameters:
            assert group.lr == pytest.approx(1e-4 if id(parameter) in encoder else 3e-4)
            assert (group.weight_decay == 0) == (parameter.ndim < 2)
    rates = {group.lr for group in parameter_groups(dense, dense.encoder_parameters(), config)}
    assert sorted(rates) == pytest.approx([3e-4])


def test_a_group_that_misses_a_parameter_is_caught():
    model = models()[1]
    groups = parameter_groups(model, [], OptimConfig())
    from scd.optim.optim import _assert_covered

    groups[0].parameters.pop()
    with pytest.raises(AssertionError, match="do not cover"):
        _assert_covered(model, groups)


def test_frozen_parameters_are_left_alone():
    model = models()[1]
    frozen = next(model.parameters()).requires_grad_(False)
    groups = parameter_groups(model, [], OptimConfig())
    assert all(frozen is not p for group in groups for p in group.parameters)


def test_rate_rises_linearly_stays_and_falls_to_the_end():
    config = OptimConfig(warmup_steps=4, decay_fraction=0.5)
    rates = [lr_multiplier(config, step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:11] == [1.0] * 7
    assert rates[11:] == pytest.approx([0.1 * left for left in range(9, 0, -1)])
    constant = OptimConfig(warmup_steps=0, decay_fraction=0.0)
    assert {lr_multiplier(constant, step, 20) for step in range(20)} == {1.0}


def test_set_lr_scales_each_base_rate_and_forgets_the_last_scale():
    model = models()[0]
    config = OptimConfig(lr=1e-3, decoder_lr_ratio=2.0)
    optimizers = build_optimizers(
        parameter_groups(model, model.encoder_parameters(), config), config
    )
    for multiplier in (0.1, 0.5):
        set_lr(optimizers, multiplier)
    rates = {group["lr"] for one in optimizers for group in one.param_groups}
    assert rates == {5e-4, 1e-3}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("decoder_lr_ratio", -1.0),
        ("betas", (0.9, 1.0)),
        ("warmup_steps", -1),
        ("decay_fraction", 1.5),
        ("clip_norm", -0.1),
    ],
)
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        OptimConfig(**{field: value})


def test_average_ramps_up_as_stated():
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    ema = EMA(layer, decay=0.5)
    expected = 0.0
    for n in range(12):
        torch.nn.init.constant_(layer.weight, float(n + 1))
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1)
        ema.update()
    assert float(ema.state_dict()["weight"]) == pytest.approx(expected, rel=1e-6)
    assert ema.num_updates == 12


def test_swap_shows_the_average_and_restores_the_weights_bit_for_bit():
    layer = torch.nn.Linear(3, 3)
    ema = EMA(layer, decay=0.9)
    with torch.no_grad():
        layer.weight.add_(torch.randn(3, 3))
    ema.update()
    weights, average = copy.deepcopy(layer.state_dict()), copy.deepcopy(ema.state_dict())
    with pytest.raises(RuntimeError, match="inside"), ema.swap():
        assert torch.equal(layer.weight, average["weight"])
        assert not torch.equal(layer.weight, weights["weight"])
        raise RuntimeError("inside")
    assert torch.equal(layer.weight, weights["weight"])
    assert torch.equal(ema.state_dict()["weight"], average["weight"])


def trained_with(state: str, num_steps: int = 4, saved=None, weights=None):
    """A small network after some steps of AdamW with its averages kept in some way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64))
    if weights is not None:
        model.load_state_dict(weights)
    config = OptimConfig(lr=1e-2, weight_decay=0.1, state=state)
    (optimizer,) = build_optimizers(parameter_groups(model, [], config), config)
    if saved is not None:
        optimizer.load_state_dict(saved)
    first = 0 if saved is None else 2
    for step in range(first, first + num_steps):
        set_lr([optimizer], 1 / (1 + step))
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 64, generator=generator)
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("state", ["offload", "8bit"])
def test_states_elsewhere_or_in_fewer_bits_move_the_weights_as_adamw_does(state):
    plain, moved = trained_with("fp32")[0], trained_with(state)[0]
    start = trained_with("fp32", num_steps=0)[0]
    change, difference = 0.0, 0.0
    for before, ours, theirs in zip(
        start.parameters(), moved.parameters(), plain.parameters(), strict=True
    ):
        change += (theirs - before).square().sum().item()
        difference += (ours - theirs).square().sum().item()
    # The fused update rounds in another order; 8 bits keep two digits of each average.
    assert difference < {"offload": 1e-10, "8bit": 4e-3}[state] * change
    assert difference > 0 or state == "offload"


@pytest.mark.parametrize("state", ["offload", "8bit"])
def test_states_elsewhere_or_in_fewer_bits_are_saved_and_taken_up(state, tmp_path):
    whole = trained_with(state)[0]
    model, optimizer = trained_with(state, num_steps=2)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    again, _ = trained_with(state, num_steps=2, saved=saved, weights=model.state_dict())
    for ours, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_averages_in_eight_bits_take_a_quarter_of_the_bytes():
    _, optimizer = trained_with("8bit", num_steps=1)
    for weight, state in optimizer.state.items():
        held = sum(
            part.numel() * part.element_size()
            for name in ("exp_avg", "exp_avg_sq")
            for part in stored_in(state[name])
        )
        small = weight.numel() < 4096
        assert held / weight.numel() == (8 if small else pytest.approx(2 + 2 * 4 / 256, abs=0.4))


def test_a_state_that_is_not_of_these_weights_is_refused_and_settings_are_those_of_now():
    def build_one(lr):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3))]
        optimizer = torch.optim.AdamW(weights, lr=lr)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        return optimizer

    optimizer = build_one(0.1)
    optimizer.step()
    saved = optimizer.state_dict()
    taken = fitting_state(build_one(0.2), saved)
    assert taken["param_groups"][0]["lr"] == 0.2
    assert torch.equal(taken["state"][1]["exp_avg"], saved["state"][1]["exp_avg"])
    for change, message in (
        (None, "needed the state of an optimiser, got NoneType"),
        ({"state": []}, "needed the state of an optimiser"),
        ({2: saved["state"][0]}, "there are 2 weights, got a state of 2"),
        ({0: []}, "there are 2 weights, got a state of 0"),
        ({0: {"exp_avg": torch.ones(3)}}, r"exp_avg of weight 0 must have the shape \[3, 2\]"),
        ({0: {"exp_avg": "words"}}, "exp_avg of weight 0 must be a tensor or a number, got str"),
        ({0: {"step": torch.tensor(float("nan"))}}, "step of weight 0 must be finite"),
        ({0: {"step": torch.tensor(1.0)}}, "differs from weight to weight"),
        ({**saved, "param_groups": []}, r"needed parameter groups of \[2\] weights, got \[\]"),
        ({"state": saved["state"]}, "needed parameter groups of .* got None"),
    ):
        wrong = change
        if isinstance(change, dict) and "state" not in change:
            wrong = {**saved, "state": saved["state"] | change}
        with pytest.raises(ValueError, match=message):
            fitting_state(build_one(0.1), wrong)
