"""Layers left out, kept from a step on, and split: planted truths, and plain twins."""

import numpy as np
import pytest
import torch

from scd.evaluation.image import MAX_PSNR, psnr_of
from scd.models.attention import attend
from scd.models.config import SamplingConfig
from scd.probing.intercept import held, recorded
from scd.probing.measurements.leave_one_out import leave_one_out
from scd.probing.measurements.reuse import ReuseGrid, reuse_loss, reuse_rollout
from scd.probing.models import subject_of
from scd.probing.splits import Split, split_losses, splits
from scd.probing.subject import Task, losses, relative
from scd.probing.trajectory import noise_levels, step_times
from tests.probing.test_probe_features import their_task
from tests.probing.test_probe_subject import task_for
from tests.third_party import Doubling, TheirBlock, third_party
from tests.tiny import tiny_dense, tiny_separable

LEVELS = noise_levels()
STEPS = SamplingConfig(num_steps=6)


def faint():
    return TheirBlock(scale=1e-3)


def planted(place, num_layers=5):
    """At time 1/2 and for black frames the velocity is twice the noisy frame: one layer doubles."""
    subject = third_party([Doubling if one == place else faint for one in range(num_layers)])
    with torch.no_grad():
        for parameter in (subject.model.places, subject.model.clock):
            parameter.zero_()
        basis = torch.linalg.qr(torch.randn(16, 8))[0]
        subject.model.embed.weight.copy_(basis)
        subject.model.head.weight.copy_(basis.T)
        subject.model.embed.bias.zero_()
        subject.model.head.bias.zero_()
    task = their_task(num_clips=4)
    return subject, Task(
        clean=torch.zeros_like(task.clean), conditions=task.conditions, noise=task.noise
    )


@pytest.mark.parametrize("place", [0, 3])
def test_a_planted_important_layer_is_found(place):
    subject, task = planted(place)
    found = leave_one_out(subject, task, [0.5])
    assert found.layers[int(found.relative_loss.argmax())] == place + 1
    others = np.delete(np.abs(found.relative_loss), place)
    assert found.relative_loss[place] > 100 * others.max()
    assert found.ci_low[place] > 100 * others.max()


def test_an_identity_layer_costs_nothing_and_the_others_do():
    subject = subject_of(tiny_dense())
    block = subject.layers[1].block
    with torch.no_grad():
        for modulation in (block.attention_modulation, block.mlp_modulation):
            width = subject.width
            modulation.linear.weight[2 * width :] = 0
            modulation.linear.bias[2 * width :] = 0
    found = leave_one_out(subject, task_for(subject.model, 3, num_noises=2), LEVELS)
    assert found.relative_loss[1] == found.ci_low[1] == found.ci_high[1] == 0
    assert (found.by_level[1] == 0).all()
    assert (found.relative_loss[[0, 2]] != 0).all() and found.loss.shape == (5, 3)


def test_relative_losses_are_ratios_of_means():
    subject = subject_of(tiny_separable())
    task = task_for(subject.model, 3)
    found = leave_one_out(subject, task, LEVELS, layers=[4, 1])
    assert found.layers == (4, 1)
    state = task.begin(subject)
    full = torch.stack([task.error(subject, state, time) for time in LEVELS])
    np.testing.assert_allclose(found.loss, full, rtol=1e-5)
    del subject.model.encoder.blocks[0]
    smaller = subject_of(subject.model)
    left = losses(smaller, task, LEVELS)
    assert found.relative_loss[1] == pytest.approx(float(left.mean() / full.mean() - 1), rel=1e-3)
    np.testing.assert_allclose(found.by_level[1], left.mean(1) / full.mean(1) - 1, rtol=2e-3)
    assert found.ci_low[1] <= found.relative_loss[1] <= found.ci_high[1]
    assert relative(2 * full, full).ci_low == pytest.approx(1)
    with pytest.raises(ValueError, match=r"1 \.\. 3, got \[4\]"):
        leave_one_out(smaller, task, LEVELS, layers=[4])


def test_features_that_do_not_move_can_be_kept_from_the_first_step_on():
    """Layers 1 and 2 know the past only: the whole frame is the same without them."""
    subject, task = third_party([TheirBlock] * 4, enters_before=2), their_task()
    grid = ReuseGrid(layers=(1, 2, 3, 4), steps=(1, 3, 5))
    found = reuse_loss(subject, task, STEPS, grid)
    assert found.relative_loss.shape == (4, 3) and found.later == ((2, 3, 5, 6), (4, 5, 6), (6,))
    np.testing.assert_allclose(found.relative_loss[:2], 0, atol=1e-6)
    assert (np.abs(found.relative_loss[2:]) > 1e-4).all()
    rollout = reuse_rollout(subject, task, STEPS, grid)
    np.testing.assert_allclose(rollout.psnr_to_untouched[:2], MAX_PSNR, atol=1e-4)
    np.testing.assert_allclose(rollout.psnr[:2], rollout.psnr_untouched, atol=1e-4)
    assert (rollout.psnr_to_untouched[2:] < MAX_PSNR - 1).all()
    # Kept later, less is lost.
    assert (np.diff(rollout.psnr_to_untouched[3]) > 0).all()


@torch.no_grad()
def test_kept_layers_give_what_they_gave_in_the_step():
    """The plain twin: all of a dense model's layers kept is its head on old tokens."""
    model = tiny_dense()
    subject, task = subject_of(model), task_for(model)
    state, times = task.begin(subject), step_times(STEPS)
    kept = []
    hook = model.blocks[-1].register_forward_hook(lambda *call: kept.append(call[2]))
    subject.velocity(state, task.at(times[1]), times[1])
    hook.remove()
    found = reuse_loss(subject, task, STEPS, ReuseGrid(layers=(3,), steps=(2,)), num_later=1)
    assert found.later == ((3,),)
    time, noisy = torch.full((2, 1), times[2]), task.at(times[2])
    embedding = model.embed_time(time) + state.context.steering
    velocity = model.head(kept[0], embedding, noisy[:, None], time)[:, 0]
    error = (velocity - (task.noise - task.frame)).square().mean()
    full = task.error(subject, state, times[2]).mean()
    assert found.relative_loss[0, 0] == pytest.approx(float(error / full - 1), rel=1e-3)


@torch.no_grad()
def test_a_rollout_that_keeps_layers_is_the_plain_loop():
    subject = subject_of(tiny_dense())
    task = task_for(subject.model)
    state, times = task.begin(subject), step_times(STEPS)
    noisy = task.noise
    for number, (time, after) in enumerate(zip(times, times[1:], strict=False), 1):
        if number <= 3:
            with recorded(subject.layers[:2]) as calls:
                velocity = subject.velocity(state, noisy, time)
        else:
            with held(subject.layers[:2], [calls[0], calls[1]]):
                velocity = subject.velocity(state, noisy, time)
        noisy = noisy + (after - time) * velocity
    expected = float(psnr_of((noisy - task.frame).square().mean()))
    grid = ReuseGrid(layers=(1, 2), steps=(2, 3))
    found = reuse_rollout(subject, task, STEPS, grid)
    assert found.psnr[1, 1] == pytest.approx(expected, abs=1e-4)
    assert len(set(found.psnr.flatten().tolist())) == 4


def test_quality_of_a_rollout_is_measured_in_pixels():
    subject = subject_of(tiny_separable())
    task = task_for(subject.model)
    grid = ReuseGrid.of(subject, 6, num_layers=2, num_starts=2)
    assert grid == ReuseGrid(layers=(1, 2), steps=(1, 5))
    whole = ReuseGrid.of(subject, 6, num_layers=9, num_starts=5)
    assert whole == ReuseGrid(layers=(1, 2), steps=(1, 2, 3, 4, 5))
    found = reuse_rollout(subject, task, STEPS, grid, decode=lambda frames: 0 * frames + 1)
    np.testing.assert_allclose(found.psnr, MAX_PSNR, atol=1e-4)
    doubled = reuse_rollout(subject, task, STEPS, grid, decode=lambda frames: 2 * frames)
    plain = reuse_rollout(subject, task, STEPS, grid)
    expected = float(psnr_of(torch.tensor(4.0)) - psnr_of(torch.tensor(1.0)))
    np.testing.assert_allclose(doubled.psnr - plain.psnr, expected, atol=1e-4)


def test_grids_that_do_not_fit_are_refused():
    subject, task = third_party([TheirBlock] * 2), their_task()
    for grid, text in (
        (ReuseGrid(layers=(3,), steps=(1,)), r"layers to keep lie in 1 \.\. 2, got \[3\]"),
        (ReuseGrid(layers=(1,), steps=(6,)), r"lie in 1 \.\. 5, got \[6\]"),
        (ReuseGrid(layers=(), steps=(1,)), r"got \[\]"),
    ):
        for measure in (reuse_loss, reuse_rollout):
            with pytest.raises(ValueError, match=text):
                measure(subject, task, STEPS, grid)


def test_splits_are_all_there_are():
    found = splits(4)
    assert len(found) == len(set(found)) == 9
    assert all(1 <= split.num_decoder < 4 for split in found)
    assert Split(num_layers=12, num_encoder=9, num_first=2).decoder_layers == [1, 2, 10, 11, 12]
    assert {split.num_decoder for split in splits(12, max_decoder=3)} == {1, 2, 3}
    for wrong in ((4, 4, 0), (4, 2, 2), (4, 5, 0)):
        with pytest.raises(ValueError, match="a split needs"):
            Split(num_layers=wrong[0], num_encoder=wrong[1], num_first=wrong[2])


def test_a_split_where_nothing_moves_costs_nothing():
    """Layers 1 and 2 know the past only; 3 and 4 see their own frame only."""
    own = [lambda: TheirBlock(sees_past=False)] * 2
    subject = third_party([TheirBlock, TheirBlock, *own], enters_before=2)
    found = split_losses(subject, their_task(), LEVELS)
    by_split = {(one.split.num_encoder, one.split.num_first): one for one in found}
    free = by_split[2, 0]
    assert abs(free.with_past.mean) < 1e-5 and abs(free.own_frame.mean) < 1e-5
    assert abs(by_split[1, 0].with_past.mean) < 1e-5
    assert abs(by_split[1, 0].own_frame.mean) > 1e-4
    assert abs(by_split[3, 0].with_past.mean) > 1e-4
    alone = split_losses(subject, their_task(), LEVELS, [free.split], own_frame=False)
    assert alone[0].own_frame is None and alone[0].with_past == free.with_past


@torch.no_grad()
def test_a_split_ablation_is_the_sum_that_it_says():
    model = tiny_dense()
    subject, task = subject_of(model), task_for(model)
    split = Split(num_layers=3, num_encoder=2, num_first=1)
    found = split_losses(subject, task, [0.4], [split])[0]
    state = task.begin(subject)
    tokens = {}
    hooks = [
        block.register_forward_hook(lambda *call, place=place: tokens.update({place: call[2]}))
        for place, block in enumerate(model.blocks)
    ]
    subject.velocity(state, task.noise, 1.0)
    change = tokens[1] - tokens[0]
    for hook in hooks:
        hook.remove()
    context = state.context
    for narrow, estimate in ((False, found.with_past), (True, found.own_frame)):
        time, noisy = torch.full((2, 1), 0.4), task.at(0.4)
        embedding = model.embed_time(time) + context.steering

        def run(layer, x, narrow=narrow, embedding=embedding):

            def past(q, k, v):
                return attend(q, *context.cache.write(layer, k, v))

            read = model.attend_own if narrow else past
            return model.blocks[layer](x, embedding, context.rotary, read)

        x = run(2, run(0, model.embed_frame(noisy[:, None])) + change)
        velocity = model.head(x, embedding, noisy[:, None], time)[:, 0]
        error = (velocity - (task.noise - task.frame)).square().mean()
        full = task.error(subject, state, 0.4).mean()
        assert estimate.mean == pytest.approx(float(error / full - 1), rel=1e-3)


def test_what_cannot_be_split_is_refused():
    separable = subject_of(tiny_separable())
    with pytest.raises(ValueError, match="split already"):
        split_losses(separable, task_for(separable.model), LEVELS)
    dense = subject_of(tiny_dense())
    with pytest.raises(ValueError, match="a split of 4 layers, the model has 3"):
        split_losses(dense, task_for(dense.model), LEVELS, splits(4))
