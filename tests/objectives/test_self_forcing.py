"""Rollouts of a student for training: what is generated, and where gradient goes."""

import pytest
import torch

from scd.models.config import CacheConfig
from scd.objectives.self_forcing import draw_exit, self_forced
from tests.tiny import random_clips, tiny_dense, tiny_separable

CACHE = CacheConfig(window=4, num_sinks=1)
TIMES = [1.0, 0.9, 0.6]
NUM_GIVEN, NUM_GENERATED = 2, 4
MODELS = {
    "joint": lambda cache: tiny_separable(cache=cache),
    "prefix": lambda cache: tiny_separable("prefix", predict="clean", cache=cache),
    "dense": lambda cache: tiny_dense(cache=cache),
}


@pytest.fixture(params=list(MODELS))
def build(request):
    return MODELS[request.param]


def roll(model, exit_step, dtype=torch.float64, num_with_gradient=None, given=None):
    clean, _, _, conditions = random_clips(model, num_frames=NUM_GIVEN + NUM_GENERATED)
    return self_forced(
        model,
        clean[:, :NUM_GIVEN].to(dtype) if given is None else given,
        conditions,
        NUM_GENERATED,
        TIMES,
        exit_step,
        torch.Generator().manual_seed(3),
        num_with_gradient,
    )


@pytest.mark.parametrize("exit_step", range(len(TIMES)))
@torch.no_grad()
def test_with_a_memory_is_as_without_one(build, exit_step):
    """The twin looks at the whole clip anew for every call, and draws the same noise."""
    model = build(CacheConfig(window=16)).double()
    generated = roll(model, exit_step)
    clean, _, _, conditions = random_clips(model, num_frames=NUM_GIVEN + NUM_GENERATED)
    clip = clean[:, :NUM_GIVEN].double()
    generator = torch.Generator().manual_seed(3)

    def noise():
        return torch.randn(2, *model.shape.shape, generator=generator).double()

    for index in range(NUM_GIVEN, NUM_GIVEN + NUM_GENERATED):
        noisy = noise()
        for step in range(exit_step + 1):
            time = torch.full((2, 1, 1), TIMES[step], dtype=torch.float64)
            # The frame's own place in the history is not read.
            history = torch.cat([clip, torch.zeros_like(clip[:, :1])], dim=1)
            seen = conditions.frames(0, index + 1)
            frame = noisy - TIMES[step] * model(history, noisy[:, None, None], time, seen)[:, 0, 0]
            if step < exit_step:
                noisy = (1 - TIMES[step + 1]) * frame + TIMES[step + 1] * noise()
        clip = torch.cat([clip, frame[:, None]], dim=1)
    torch.testing.assert_close(generated, clip[:, NUM_GIVEN:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("exit_step", [0, 2])
def test_gradient_is_the_finite_difference_of_the_exit_steps_alone(build, exit_step):
    """Only the context and the exit step of each frame are moved, all before held still."""
    model = build(CACHE).double()
    weights = list(model.parameters())
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
    generated = roll(model, exit_step)
    gradients = torch.autograd.grad(generated.sin().sum(), weights, allow_unused=True)
    found = sum(
        (gradient * direction).sum()
        for gradient, direction in zip(gradients, directions, strict=True)
        if gradient is not None
    )

    calls, size = [], 1e-5
    context, velocity = model.context, model.velocity

    def move(amount):
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight.add_(amount * direction)

    def watched_context(state, conditions):
        made = context(state, conditions)
        calls.append((state.fork(), conditions, []))
        return made

    def watched_velocity(made, noisy, time):
        calls[-1][2].append((noisy, time))
        return velocity(made, noisy, time)

    model.context, model.velocity = watched_context, watched_velocity
    with torch.no_grad():
        roll(model, exit_step)
        slope = 0.0
        for state, conditions, inputs in calls:
            noisy, time = inputs[exit_step]
            assert len(inputs) == exit_step + 1
            ends = []
            for sign in (1, -1):
                move(sign * size)
                twin = state.fork()
                frame = noisy - TIMES[exit_step] * velocity(context(twin, conditions), noisy, time)
                ends.append(frame.sin().sum())
                move(-sign * size)
            slope += (ends[0] - ends[1]) / (2 * size)
    torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-5)


def test_no_gradient_passes_from_a_frame_to_those_before(build):
    model = build(CACHE).double()
    weights = list(model.parameters())
    clean, _, _, _ = random_clips(model, num_frames=NUM_GIVEN + NUM_GENERATED)
    given = clean[:, :NUM_GIVEN].double().requires_grad_()
    last = roll(model, 1, given=given)[:, -1].sum()
    to_given, *whole = torch.autograd.grad(last, [given, *weights], allow_unused=True)
    assert to_given is None
    alone = roll(model, 1, num_with_gradient=1)
    assert alone.requires_grad
    first = torch.autograd.grad(alone[:, 0].sum(), weights, allow_unused=True, retain_graph=True)
    assert all(gradient is None or not gradient.any() for gradient in first)
    again = torch.autograd.grad(alone[:, -1].sum(), weights, allow_unused=True)
    for mine, theirs in zip(whole, again, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs)
    assert not roll(model, 1, num_with_gradient=0).requires_grad


def test_gradient_reaches_the_same_weights_in_bf16(build):
    """Autocast keeps copies of weights, and those made without gradient have none to give."""
    model = build(CACHE)
    weights = list(model.parameters())
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = roll(model, 2, torch.float32).square().mean()
        gradients.append(torch.autograd.grad(loss, weights, allow_unused=True))
    for exact, rounded in zip(*gradients, strict=True):
        assert (exact is None) == (rounded is None)
        if exact is not None and exact.norm() > 1e-3:
            similarity = torch.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0)
            assert similarity > 0.9


def test_exit_steps_are_drawn_evenly_and_repeat():
    generator = torch.Generator().manual_seed(0)
    draws = [draw_exit(4, generator) for _ in range(400)]
    assert all(60 < draws.count(step) < 140 for step in range(4))
    assert draws[0] == draw_exit(4, torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_rollout_from_nothing_and_one_longer_than_the_window():
    model = tiny_separable(cache=CACHE)
    clean, _, _, conditions = random_clips(model, num_frames=12)
    generator = torch.Generator().manual_seed(0)
    frames = self_forced(model, clean[:, :0], conditions, 12, TIMES, 1, generator)
    assert frames.shape == clean.shape and frames.isfinite().all()
