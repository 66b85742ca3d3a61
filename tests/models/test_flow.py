"""Flow matching: end points, round trips, and the measured order of each solver."""

import json
import math
from dataclasses import replace

import pytest
import torch

from scd.common.config import from_json, to_json
from scd.models.config import SamplingConfig
from scd.models.flow import (
    clean_from_velocity,
    draw_times,
    evaluations,
    guide,
    guided,
    interpolate,
    num_step_noises,
    schedule,
    solve,
    velocity_between,
    velocity_from_clean,
)


def frames(seed):
    return torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(seed))


def test_time_0_is_clean_and_1_is_noise():
    clean, noise = frames(0), frames(1)
    assert torch.equal(interpolate(clean, noise, torch.zeros(2, 3)), clean)
    assert torch.equal(interpolate(clean, noise, torch.ones(2, 3)), noise)


def test_velocity_and_clean_estimate_are_the_same_knowledge():
    clean, noise, time = frames(0), frames(1), torch.rand(2, 3) * 0.9 + 0.06
    noisy, velocity = interpolate(clean, noise, time), velocity_between(clean, noise)
    torch.testing.assert_close(clean_from_velocity(noisy, velocity, time), clean)
    torch.testing.assert_close(
        velocity_from_clean(noisy, clean, time), velocity, atol=1e-4, rtol=1e-4
    )


def test_nearly_clean_frames_do_not_blow_up():
    noisy = frames(0)
    velocity = velocity_from_clean(noisy, noisy - 1, torch.full((2, 3), 1e-4))
    torch.testing.assert_close(velocity, torch.full_like(noisy, 20.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_a_straight_path_is_solved_exactly(num_steps):
    clean, noise = frames(0), frames(1)
    times = schedule(SamplingConfig(num_steps=num_steps)).tolist()
    result = solve(lambda noisy, time: velocity_between(clean, noise), noise, times)
    torch.testing.assert_close(result, clean, atol=1e-5, rtol=0)


def test_an_exact_clean_estimate_ends_at_it():
    clean, noise = frames(0), frames(1)

    def velocity(noisy, time):
        return velocity_from_clean(noisy, clean, torch.full((2, 3), time))

    result = solve(velocity, noise, schedule(SamplingConfig(num_steps=4)).tolist())
    torch.testing.assert_close(result, clean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver, order, calls", [("euler", 1, 1), ("heun", 2, 2)])
def test_measured_order(solver, order, calls):
    """dx/dt = x has the solution x(0) = x(1) / e; halving the step divides the error by 2^order."""
    noise = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    counted = []

    def velocity(x, time):
        counted.append(time)
        return x

    errors = []
    for num_steps in (64, 128):
        # The last step goes to a time above 0, where Heun corrects too.
        times = torch.linspace(1, 1e-9, num_steps + 1, dtype=torch.float64).tolist()
        errors.append(abs(float(solve(velocity, noise, times, solver)) - 1 / math.e))
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.1
    assert len(counted) == calls * (64 + 128)


@pytest.mark.parametrize("scale", [None, 1.5])
def test_renoising_mixes_each_clean_estimate_with_fresh_noise(scale):
    noise, fresh = frames(0), torch.stack([frames(1), frames(2)])
    times, counted = [1.0, 0.8, 0.25, 0.0], []

    def field(noisy, time):
        counted.append(time)
        return (noisy * (1 + time)).sin()

    velocity = guided(field, scale)
    noisy = noise
    for index, time in enumerate(times[:-1]):
        estimate = noisy - time * velocity(noisy, time)
        if times[index + 1] > 0:
            noisy = interpolate(estimate, fresh[index], torch.tensor(times[index + 1]))
    counted.clear()
    found = solve(velocity, noise, times, "renoise", fresh)
    torch.testing.assert_close(found, estimate, atol=1e-6, rtol=0)
    assert counted == [1.0, 0.8, 0.25] and len(evaluations(times, "renoise")) == 3


def test_one_renoised_step_is_the_clean_estimate():
    noise = frames(0)
    one = solve(lambda noisy, time: noisy.sin(), noise, [1.0, 0.0], "renoise")
    torch.testing.assert_close(one, solve(lambda noisy, time: noisy.sin(), noise, [1.0, 0.0]))


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_renoising_with_an_exact_estimate_ends_at_it(num_steps):
    clean, noise = frames(0), frames(1)
    times = schedule(SamplingConfig(num_steps=num_steps)).tolist()
    fresh = torch.stack([frames(2 + index) for index in range(num_steps - 1)] or [noise])

    def velocity(noisy, time):
        return velocity_from_clean(noisy, clean, torch.full((2, 3), time))

    found = solve(velocity, noise, times, "renoise", fresh[: num_steps - 1])
    torch.testing.assert_close(found, clean, atol=1e-5, rtol=0)


def test_fresh_noise_is_counted():
    times = [1.0, 0.5, 0.2, 0.0]
    assert [num_step_noises(times, solver) for solver in ("euler", "heun", "renoise")] == [0, 0, 2]
    with pytest.raises(ValueError, match="3 steps of solver 'renoise' need 2 step noises, got 1"):
        solve(lambda noisy, time: noisy, frames(0), times, "renoise", frames(1)[None])


def test_draws_of_time_are_logit_normal_and_inside():
    generator = torch.Generator().manual_seed(0)
    time = draw_times((20_000,), generator, mean=1.0, std=0.5)
    logits = torch.log(time / (1 - time))
    assert 0 < time.min() and time.max() < 1
    assert abs(logits.mean() - 1) < 0.02 and abs(logits.std() - 0.5) < 0.02
    extreme = draw_times((20_000,), generator, mean=20.0)
    assert extreme.max() < 1


def test_draws_are_independent_and_repeatable():
    draws = [draw_times((2, 5), torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0].unique().numel() == 10


def test_schedules_run_from_1_to_0():
    for sampling in (
        SamplingConfig(num_steps=7),
        SamplingConfig(num_steps=7, schedule="shifted", shift=5.0),
        SamplingConfig(num_steps=7, schedule="reference"),
        SamplingConfig(num_steps=7, schedule="listed", times=(1.0, 0.9, 0.8, 0.7, 0.6, 0.3, 0.01)),
    ):
        times = schedule(sampling)
        assert len(times) == 8 and times[0] == 1 and times[-1] == 0
        assert (times.diff() < 0).all()


def test_shift_5_gives_the_four_steps_of_self_forcing():
    times = schedule(SamplingConfig(num_steps=4, schedule="shifted", shift=5.0))
    expected = torch.tensor([1, 0.9375, 5 / 6, 0.625, 0], dtype=torch.float64)
    torch.testing.assert_close(times, expected)


def test_a_listed_schedule_is_its_list():
    sampling = SamplingConfig(num_steps=3, schedule="listed", times=(1.0, 0.75, 0.5))
    assert schedule(sampling).tolist() == [1.0, 0.75, 0.5, 0.0]


def test_settings_written_before_there_were_lists_load():
    old = to_json(SamplingConfig(num_steps=5, schedule="shifted", shift=5.0))
    old.pop("times")
    found = from_json(SamplingConfig, json.loads(json.dumps(old)))
    assert found == SamplingConfig(num_steps=5, schedule="shifted", shift=5.0)
    listed = SamplingConfig(num_steps=2, schedule="listed", times=(1.0, 0.5), solver="renoise")
    assert from_json(SamplingConfig, json.loads(json.dumps(to_json(listed)))) == listed


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ((), "got ()"),
        ((0.9, 0.5), "begin with 1.* got (0.9, 0.5)"),
        ((1.0, 0.5, 0.5), "descend.* got (1.0, 0.5, 0.5)"),
        ((1.0, 0.2, 0.6), "descend.* got (1.0, 0.2, 0.6)"),
        ((1.0, 0.5, 0.0), "above 0, got (1.0, 0.5, 0.0)"),
        ((1.0, float("nan")), "descend.* got (1.0, nan)"),
    ],
)
def test_a_list_that_does_not_descend_from_1_is_refused(times, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        SamplingConfig(num_steps=max(len(times), 1), schedule="listed", times=times)


def test_a_listed_schedule_has_as_many_steps_as_times():
    listed = SamplingConfig(num_steps=2, schedule="listed", times=(1.0, 0.5))
    with pytest.raises(ValueError, match="has 2 times.*num_steps must be 2, got 4"):
        replace(listed, num_steps=4)


def test_guidance_scale_1_is_no_guidance():
    unconditional, conditional = frames(0), frames(1)
    torch.testing.assert_close(guide(unconditional, conditional, 1.0), conditional)
    torch.testing.assert_close(
        guide(unconditional, conditional, 1.5), 1.5 * conditional - 0.5 * unconditional
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_steps": 0},
        {"shift": 2.0},
        {"schedule": "shifted", "shift": 0.0},
        {"num_steps": 2, "times": (1.0, 0.5)},
        {"num_steps": 2, "times": (1.0, 0.5), "schedule": "listed", "shift": 2.0},
    ],
)
def test_settings_without_sense_are_refused(wrong):
    with pytest.raises(ValueError):
        SamplingConfig(**wrong)
