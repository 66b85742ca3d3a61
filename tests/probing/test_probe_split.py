"""Proposed splits: predicted seconds = the cost formulas, the front, the rule."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from scd.common.config import from_json, to_json
from scd.evaluation.image import Estimate
from scd.models.build import frame_cost
from scd.models.config import DecoderConfig, DenseConfig, EncoderConfig, SeparableConfig
from scd.models.cost import Load, Sizes
from scd.probing.splits import (
    Speed,
    Split,
    SplitLoss,
    candidates_of,
    chosen_splits,
    front_of,
    propose,
    splits,
    time_step,
)
from tests.probing.test_probe_features import their_task
from tests.third_party import TheirBlock, third_party
from tests.tiny import ACTIONS, BLOCK, SHAPE


def speed_of(sizes=None, join="prefix", num_steps=10):
    return Speed(
        seconds_per_step=0.5, num_steps=num_steps, num_context_frames=9, join=join, sizes=sizes
    )


def split_of(num_layers, encoder, first):
    return Split(num_layers=num_layers, num_encoder=encoder, num_first=first)


def loss_of(split, mean, width=0.01):
    estimate = Estimate(mean=mean, ci_low=mean - width, ci_high=mean + width)
    return SplitLoss(split=split, with_past=estimate, own_frame=None)


@pytest.mark.parametrize("join", ["prefix", "token_concat", "add"])
def test_predicted_seconds_are_the_ratio_of_operations_of_real_models(join):
    speed = speed_of(Sizes(DenseConfig(shape=SHAPE, block=BLOCK, conditions=ACTIONS)), join)
    load = Load(num_context_frames=9)
    dense = frame_cost(
        DenseConfig(shape=SHAPE, block=BLOCK, num_layers=6, conditions=ACTIONS), load
    )
    separable = frame_cost(
        SeparableConfig(
            shape=SHAPE,
            block=BLOCK,
            encoder=EncoderConfig(num_layers=4),
            decoder=DecoderConfig(num_layers=3, join=join),
            conditions=ACTIONS,
        ),
        load,
    )
    split = split_of(6, 4, 1)
    assert split.num_decoder == 3
    step = 0.5 / dense.step_flops
    assert speed.dense_seconds(6) == pytest.approx(step * dense.flops(10))
    assert speed.seconds(split) == pytest.approx(step * separable.flops(10))


def test_layers_are_counted_where_operations_are_unknown():
    split = split_of(6, 4, 1)
    assert speed_of().dense_seconds(6) == pytest.approx(0.5 / 6 * 66)
    assert speed_of().seconds(split) == pytest.approx(0.5 / 6 * (4 + 3 + 10 * 3))
    assert speed_of(join="token_concat").seconds(split) == pytest.approx(0.5 / 6 * (4 + 60))
    assert speed_of(join="add").seconds(split) == pytest.approx(0.5 / 6 * (4 + 30))


def test_nobody_on_the_front_is_beaten():
    generator = np.random.default_rng(0)
    seconds, losses = generator.random(40), generator.random(40)
    front = front_of(seconds, losses)
    for one in range(40):
        beaten = any(
            seconds[other] < seconds[one] and losses[other] < losses[one] for other in range(40)
        )
        assert front[one] == (not beaten)
    # Equals do not beat each other.
    assert front_of(np.array([1.0, 1.0, 2.0]), np.array([1.0, 1.0, 1.0])).tolist() == [
        True, True, False,
    ]  # fmt: skip


def test_the_fastest_split_within_the_tolerance_is_recommended():
    speed = speed_of()
    losses = [
        loss_of(split_of(6, 5, 0), 0.9),
        loss_of(split_of(6, 5, 1), 0.045),
        loss_of(split_of(6, 5, 2), 0.03),
        loss_of(split_of(6, 5, 3), 0.01),
    ]
    candidates = candidates_of(losses, speed)
    dense = speed.dense_seconds(6)
    # 0.045 + 0.01 is above 0.05: the upper end of the interval decides.
    assert propose(candidates, dense, 0.05)[0].split == split_of(6, 5, 2)
    assert propose(candidates, dense, 0.06)[0].split == split_of(6, 5, 1)
    least, why = propose(candidates, dense, 0.0)
    assert least.split == split_of(6, 5, 3) and "loses least" in why
    assert "no split is predicted to be faster" in propose(candidates, 0.0, 0.05)[1]
    with pytest.raises(ValueError, match="1 or more candidates"):
        propose([], dense, 0.05)


def test_a_candidate_carries_what_was_measured_of_its_layers():
    (one, last) = candidates_of(
        [loss_of(split_of(6, 4, 1), 0.1), loss_of(split_of(6, 6, 2), 0.2)],
        speed_of(),
        leave_one_out={layer: float(layer) for layer in range(1, 7)},
        reuse={3: 0.3, 6: 0.6},
        past_mass={layer: layer / 10 for layer in range(1, 7)},
    )
    assert one.name == "4: 1+2" and last.name == "6: 2+0"
    assert one.left_out == 2 + 3 + 4 and last.left_out == 3 + 4 + 5 + 6
    assert one.reuse == 0.3 and last.reuse == 0.6
    assert one.past_mass == pytest.approx(0.55) and last.past_mass is None
    (bare,) = candidates_of([loss_of(split_of(6, 4, 1), 0.1)], speed_of(), {1: 0.0})
    assert bare.left_out is None and bare.reuse is None and bare.past_mass is None


def test_deep_models_are_tried_at_spaced_depths():
    assert chosen_splits(6) == splits(6)
    found = chosen_splits(30, most=90)
    assert 20 < len(found) <= 90
    assert {split.num_first % 3 for split in found} == {0}


def test_losses_survive_json():
    one = loss_of(split_of(6, 4, 1), 0.1)
    both = replace(one, own_frame=one.with_past)
    for loss in (one, both):
        assert from_json(SplitLoss, json.loads(json.dumps(to_json(loss)))) == loss


class Slow(TheirBlock):
    def forward(self, tokens, past):
        time.sleep(0.05)
        return super().forward(tokens, past)


def test_a_call_is_timed_and_leaves_the_model_as_it_was():
    """The time of one call: not of the pass over the past, and not the sum of all calls."""
    subject, task = third_party([TheirBlock, Slow]), their_task()
    state = task.begin(subject)
    with torch.no_grad():
        before = subject.velocity(state, task.noise, 1.0)
        assert 0.05 <= time_step(subject, task, num_timed=7) < 7 * 0.05
        assert torch.equal(subject.velocity(state, task.noise, 1.0), before)
