"""Consistency and regression: their formulas by hand, what they refuse."""

from dataclasses import replace

import pytest
import torch

from scd.data.clip import Batch
from scd.models.flow import clean_from_velocity, guide, interpolate, velocity_between
from scd.objectives.config import ConsistencyConfig, RegressionConfig
from scd.objectives.distill import (
    Consistency,
    Regression,
    draw,
    grid_of,
    guided,
    guided_path,
    pseudo_huber,
    spread,
)
from tests.tiny import loss_of, random_clips, tiny_dense, tiny_separable

PLAIN = ConsistencyConfig(
    num_grid_steps=4, num_teacher_steps=2, huber=0.0, history_noise=0.2, condition_dropout=0.2
)


def consistency_loss(
    student, target, teacher, clean, conditions, config, generator, needs_first_frame=False
):
    objective = Consistency(
        config=config, teacher=teacher, target=target, needs_first_frame=needs_first_frame
    )
    return loss_of(objective, student, clean, conditions, generator)


def draw_of(clean, conditions, *rest):
    return draw(Batch(frames=clean, conditions=conditions), *rest)


@pytest.fixture(params=["joint", "prefix", "no start frame", "dense"])
def model(request):
    if request.param == "dense":
        return tiny_dense()
    if request.param == "no start frame":
        return tiny_separable(start_frame=False)
    return tiny_separable("prefix" if request.param == "prefix" else "token_concat")


@torch.no_grad()
def test_a_field_is_the_forward_pass(model):
    clean, noisy, time, conditions = random_clips(model, num_draws=3)
    field = model.field(clean, conditions, noisy.shape[2], 3)
    for moment in (time, 0.5 * time):
        expected = model(clean, noisy, moment, conditions)
        torch.testing.assert_close(field(noisy, moment), expected)


def never(*_):
    """A network that is not to be called."""
    raise AssertionError


@pytest.mark.parametrize("num_teacher_steps", [1, 2, 4])
@torch.no_grad()
def test_the_target_is_the_teachers_path_then_the_target_networks_jump(model, num_teacher_steps):
    config = replace(PLAIN, num_teacher_steps=num_teacher_steps)
    target = tiny_dense() if num_teacher_steps < 4 else never
    clean, _, _, conditions = random_clips(model)
    needs_first = model.needs_first_frame
    loss, _ = consistency_loss(
        model, target, model.field, clean, conditions, config, torch.Generator(), needs_first
    )
    drawn = draw_of(clean, conditions, 4, config, torch.Generator(), needs_first)
    grid = torch.tensor(grid_of(config))
    time = grid[drawn.place]
    noisy = interpolate(drawn.frames, drawn.noise, time)

    def velocity(network, frames, moment):
        return network(drawn.history, frames, moment, drawn.conditions)

    estimate = clean_from_velocity(noisy, velocity(model, noisy, time), time)
    moved, place = noisy, drawn.place
    for _ in range(num_teacher_steps):
        after = (place + 1).clamp(max=4)
        change = (grid[after] - grid[place])[..., None, None, None]
        moved, place = moved + change * velocity(model, moved, grid[place]), after
    arrived = place == 4
    if target is not never:
        jumped = clean_from_velocity(moved, velocity(target, moved, grid[place]), grid[place])
        moved = torch.where(arrived[..., None, None, None], moved, jumped)
    assert arrived.all() == (num_teacher_steps == 4)
    torch.testing.assert_close(loss, (estimate - moved).square().mean())


def straight(noise, frames):
    """A network that knows the answer."""
    return lambda *_: velocity_between(frames, noise)


def test_a_student_that_knows_the_frames_is_consistent_with_a_teacher_that_does():
    clean, _, _, conditions = random_clips(tiny_dense())
    drawn = draw_of(clean, conditions, 4, PLAIN, torch.Generator(), False)
    knows = straight(drawn.noise, drawn.frames)
    loss, logs = consistency_loss(
        knows, knows, lambda *_: knows, clean, conditions, PLAIN, torch.Generator()
    )
    assert loss < 1e-12 and logs["spread"].item() == pytest.approx(1.0)
    still = straight(0 * drawn.noise, 0 * drawn.frames)
    loss, _ = consistency_loss(
        still, knows, lambda *_: knows, clean, conditions, PLAIN, torch.Generator()
    )
    assert loss > 0.1


def test_gradient_of_consistency_reaches_the_student_alone():
    student, target, teacher = (tiny_separable(amount=amount) for amount in (0.1, 0.2, 0.3))
    clean, _, _, conditions = random_clips(student)
    loss, _ = consistency_loss(
        student, target, teacher.field, clean, conditions, PLAIN, torch.Generator()
    )
    loss.backward()
    assert any(weight.grad is not None for weight in student.parameters())
    others = [*target.parameters(), *teacher.parameters()]
    assert all(weight.grad is None for weight in others)


@torch.no_grad()
def test_regression_is_the_error_of_the_estimate_at_the_schedules_times():
    model, config = tiny_separable(), RegressionConfig(num_draws=3)
    clean, _, _, conditions = random_clips(model)
    times = [1.0, 0.6]
    objective = Regression(config=config, times=times)
    loss, _ = loss_of(objective, model, clean, conditions, torch.Generator())
    drawn = draw_of(clean, conditions, 2, config, torch.Generator(), False)
    time = torch.tensor(times)[drawn.place]
    noisy = interpolate(drawn.frames, drawn.noise, time)
    velocity = model(drawn.history, noisy, time, drawn.conditions)
    expected = (noisy - time[..., None, None, None] * velocity - drawn.frames).square().mean()
    torch.testing.assert_close(loss, expected)


@torch.no_grad()
def test_guidance_pushes_away_from_hidden_conditions():
    model = tiny_separable()
    clean, noisy, time, conditions = random_clips(model, num_draws=2)
    hidden = replace(conditions, null_actions=torch.ones(2, 5, dtype=torch.bool))
    expected = guide(model(clean, noisy, time, hidden), model(clean, noisy, time, conditions), 3.0)
    found = guided(model, 3.0)(clean, noisy, time, conditions)
    torch.testing.assert_close(found, expected)
    path = guided_path(model.field, 3.0)(clean, conditions, 5, 2, None)
    torch.testing.assert_close(path(noisy, time), expected)
    assert guided(model, 1.0) is model


def test_distances_by_hand():
    found, expected = torch.zeros(2, 1, 1, 2), torch.tensor([[[[3.0, 3.0]]], [[[0.0, 0.0]]]])
    assert pseudo_huber(found, expected, 0.0).item() == pytest.approx(4.5)
    # The root of 9 + 16 less 4, and 0.
    assert pseudo_huber(found, expected, 4.0).item() == pytest.approx(0.5)
    frames = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert spread(frames, frames).item() == pytest.approx(1.0)
    assert spread(0.1 * frames + 5, frames).item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_teacher_steps": 9},
            "must lie in 1 .. num_grid_steps, got 9 and 8",
        ),
        ({"num_teacher_steps": 0}, "num_teacher_steps"),
        ({"grid_shift": 0.0}, "grid_shift must be above 0"),
        ({"guidance": 2.0}, "condition_dropout must be 0, got 0.1"),
        ({"guidance": 0.5}, "guidance 1 or more"),
        ({"num_draws": 0}, "num_draws must be 1 or more"),
        ({"condition_dropout": 1.0}, "condition_dropout must lie in"),
        ({"target": "average", "num_teacher_steps": 8}, "the teacher walks the whole grid"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(ConsistencyConfig(), **change)


def test_a_clip_without_a_frame_to_denoise_is_refused():
    clean, _, _, conditions = random_clips(tiny_separable(start_frame=False), num_frames=1)
    with pytest.raises(ValueError, match="clips of 2 or more frames, got 1"):
        draw_of(clean, conditions, 4, PLAIN, torch.Generator(), True)
