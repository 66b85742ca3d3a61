"""Streams with gradients: each frame's own passes have one, what is remembered has none."""

import pytest
import torch

from scd.models.config import CacheConfig
from tests.tiny import random_clips, tiny_dense, tiny_separable

CACHE = CacheConfig(window=4, num_sinks=1)
NUM_GIVEN, NUM_FRAMES = 2, 8
TIME = 0.6
MODELS = {
    **{
        join: lambda join=join: tiny_separable(join, cache=CACHE)
        for join in ("token_concat", "add", "prefix")
    },
    "no start frame": lambda: tiny_separable(start_frame=False, cache=CACHE),
    "clean estimate": lambda: tiny_separable("prefix", predict="clean", cache=CACHE),
    "dense": lambda: tiny_dense(cache=CACHE),
}


@pytest.fixture(params=list(MODELS), scope="module")
def model(request):
    return MODELS[request.param]().double()


def begun(model):
    """A stream after its given frames, and what comes next: noisy and clean frames, conditions."""
    clean, noisy, _, conditions = random_clips(model, batch=2, num_frames=NUM_FRAMES)
    clean, noisy = clean.double(), noisy[:, 0, -NUM_FRAMES + NUM_GIVEN :].double()
    state = model.begin(clean[:, :NUM_GIVEN], conditions.frames(0, NUM_GIVEN))
    frames = [
        (noisy[:, index - NUM_GIVEN], clean[:, index], conditions.frames(index, index + 1))
        for index in range(NUM_GIVEN, NUM_FRAMES)
    ]
    return state, frames


def loss_of(model, state, noisy, conditions):
    """A number that depends on all of a frame's velocity."""
    context = model.context(state, conditions)
    time = noisy.new_full((noisy.shape[0],), TIME)
    return model.velocity(context, noisy, time).sin().sum()


def moved(model, directions, amount):
    for weight, direction in zip(model.parameters(), directions, strict=True):
        weight.add_(amount * direction)


def test_gradient_is_the_finite_difference_with_the_past_held_still(model):
    # The window of four wraps; all backward passes wait until the last frame is remembered.
    state, frames = begun(model)
    generator = torch.Generator().manual_seed(1)
    directions = [
        torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        for weight in model.parameters()
    ]
    size, slopes, losses = 1e-5, [], []
    with torch.no_grad():
        for noisy, clean, conditions in frames:
            ends = []
            for sign in (1, -1):
                moved(model, directions, sign * size)
                ends.append(loss_of(model, state.fork(), noisy, conditions))
                moved(model, directions, -sign * size)
            slopes.append((ends[0] - ends[1]) / (2 * size))
            model.observe(state, clean, conditions)
    state, frames = begun(model)
    for noisy, clean, conditions in frames:
        losses.append(loss_of(model, state, noisy, conditions))
        model.observe(state, clean, conditions)
    for loss, slope in zip(losses, slopes, strict=True):
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        found = sum(
            (gradient * direction).sum()
            for gradient, direction in zip(gradients, directions, strict=True)
            if gradient is not None
        )
        torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-5)


def test_streaming_with_gradients_computes_what_it_does_without(model):
    state, frames = begun(model)
    with torch.no_grad():
        twin, _ = begun(model)
    for noisy, clean, conditions in frames:
        loss = loss_of(model, state, noisy, conditions)
        with torch.no_grad():
            expected = loss_of(model, twin, noisy, conditions)
            model.observe(twin, clean, conditions)
        model.observe(state, clean, conditions)
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-9, atol=1e-9)


def test_no_gradient_reaches_a_remembered_frame(model):
    state, frames = begun(model)
    first, second = frames[0], frames[1]
    remembered = first[1].clone().requires_grad_()
    loss_of(model, state, first[0], first[2])
    model.observe(state, remembered, first[2])
    noisy = second[0].clone().requires_grad_()
    loss = loss_of(model, state, noisy, second[2])
    to_past, to_noisy = torch.autograd.grad(loss, [remembered, noisy], allow_unused=True)
    assert to_past is None
    assert to_noisy.abs().max() > 0


def test_recomputed_blocks_leave_the_memory_alone(model):
    def gradients(recompute):
        model.gradient_checkpointing = recompute
        state, frames = begun(model)
        losses = []
        for noisy, clean, conditions in frames:
            losses.append(loss_of(model, state, noisy, conditions))
            model.observe(state, clean, conditions)
        before = state.cache.keys.clone()
        found = torch.autograd.grad(
            torch.stack(losses).sum(), list(model.parameters()), allow_unused=True
        )
        assert torch.equal(state.cache.keys, before)
        model.gradient_checkpointing = False
        return found

    for mine, theirs in zip(gradients(True), gradients(False), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs)
