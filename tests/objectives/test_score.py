"""Distillation losses: the golden tensors of Self-Forcing, formulas by hand, known optima."""

import math

import pytest
import torch
from safetensors.torch import load_file

from scd.models.flow import guide, interpolate
from scd.objectives.discriminator import adversarial_loss, discriminator_loss, roughness
from scd.objectives.distribution_matching import (
    dmd_gradient,
    dmd_loss,
    draw_score_times,
    score_time,
    sid_loss,
)
from tests.reference import reference_folder

ATOL, GRADIENT_ATOL = 2e-5, 2e-6


@pytest.fixture(scope="module")
def golden():
    path = reference_folder() / "wan" / "wan_dmd.safetensors"
    if not path.is_file():
        pytest.skip(f"no golden tensors at {path}")
    return load_file(path)


def close(found, expected, atol=ATOL):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("fake_guidance", [0, 2])
@pytest.mark.parametrize("normalise", [True, False])
def test_golden_dmd_gradient(golden, normalise, fake_guidance):
    # Self-Forcing's guidance g is c + g (c - u): scale 1 + g.
    real = guide(golden["real_uncond"], golden["real_cond"], 1 + 3.0)
    fake = guide(golden["fake_uncond"], golden["fake_cond"], 1.0 + fake_guidance)
    name = "grad" if normalise else "grad_unnormalised"
    expected = golden[name + ("_fakecfg2" if fake_guidance else "")]
    close(dmd_gradient(golden["gen_x0"], real, fake, normalise), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_golden_dmd_loss_and_its_gradient(golden, masked):
    frames = golden["gen_x0"].clone().requires_grad_()
    counted = golden["gradient_mask"].bool() if masked else None
    end = "_masked" if masked else ""
    loss = dmd_loss(frames, golden["grad"], counted)
    close(loss, golden["loss" + end][0])
    (gradient,) = torch.autograd.grad(loss, frames)
    close(gradient, golden["loss_grad" + end], GRADIENT_ATOL)


def test_golden_score_time_and_noised_input(golden):
    def time_of(raw):
        return score_time(golden[raw] / 1000, 5.0, 0.02, 0.98).expand(-1, 3)

    time = time_of("raw_timestep")
    close(1000 * time, golden["score_timestep"], 1e-4)
    close(1000 * time_of("raw_timestep_clamped"), golden["timestep_clamped"], 1e-4)
    close(interpolate(golden["gen_x0"], golden["noise"], time), golden["score_input"])


def test_golden_critic_loss(golden):
    """The critic's clean estimate as a velocity, against noise - generated."""
    time = (golden["critic_timestep"] / 1000)[..., None, None, None]
    noisy = (1 - time) * golden["gen_x0"] + time * golden["noise"]
    velocity = (noisy - golden["fake_cond"]) / time
    loss = (velocity - (golden["noise"] - golden["gen_x0"])).square().mean()
    close(loss, golden["critic_loss"][0])


def test_dmd_gradient_by_hand():
    generated = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    real = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    fake = torch.tensor([[3.0, 1.0], [0.0, math.inf]])
    # Distances 1.5 and 0: the second row is 0 / 0 and infinity.
    expected = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    assert torch.equal(dmd_gradient(generated, real, fake), expected)


def test_score_times_are_shifted_clamped_and_repeatable():
    draws = [
        draw_score_times((10_000,), torch.Generator().manual_seed(1), shift, 0.02, 0.98)
        for shift in (1.0, 5.0, 5.0)
    ]
    assert torch.equal(draws[1], draws[2])
    assert draws[0].mean().item() == pytest.approx(0.5, abs=0.01)
    # The median of a shifted uniform draw is the shifted 1/2: 5 / 6.
    assert draws[1].median().item() == pytest.approx(5 / 6, abs=0.01)
    for draw in draws:
        assert draw.min() == pytest.approx(0.02) and draw.max() == pytest.approx(0.98)


def gaussian_clean(noisy, time, mean, std):
    """Best clean estimate if clean frames are normal: E[clean | noisy]."""
    keep, spread = 1 - time, (1 - time) ** 2 * std**2 + time**2
    return mean + keep * std**2 / spread * (noisy - keep * mean)


@pytest.mark.parametrize("method", ["dmd", "sid"])
def test_the_known_optimum_of_a_gaussian_problem_is_reached(method):
    """A student shift + scale * noise, teacher and critic both exact: it becomes the teacher's."""
    generator = torch.Generator().manual_seed(0)
    mean, std = 1.5, 0.5
    shift = torch.zeros((), requires_grad=True)
    scale = torch.full((), 2.0, requires_grad=True)
    optimizer = torch.optim.Adam([shift, scale], lr=0.02)
    for _ in range(600):
        generated = shift + scale * torch.randn(512, 1, generator=generator)
        time = draw_score_times((512, 1), generator, 1.0, 0.02, 0.98)
        noisy = (1 - time) * generated + time * torch.randn(512, 1, generator=generator)
        real = gaussian_clean(noisy, time, mean, std)
        fake = gaussian_clean(noisy, time, shift.detach(), scale.detach())
        if method == "dmd":
            loss = dmd_loss(generated, dmd_gradient(generated, real, fake, normalise=False))
        else:
            loss = sid_loss(generated[None], real[None], fake[None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert shift.item() == pytest.approx(mean, abs=0.1)
    assert scale.abs().item() == pytest.approx(std, abs=0.1)


def test_sid_loss_by_hand():
    generated = torch.tensor([[1.0, 3.0]], requires_grad=True)
    real, fake = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 1.0]])
    # (-2) ((-1) - alpha (-2)) / 1.5 and 0: the mean over two entries.
    assert sid_loss(generated, real, fake, alpha=1.0).item() == pytest.approx(-2 / 3)
    assert sid_loss(generated, real, fake, alpha=0.5).item() == pytest.approx(0.0)


@pytest.mark.parametrize("relativistic", [False, True])
def test_adversarial_losses_pull_against_each_other(relativistic):
    real, fake = torch.tensor([0.3, -1.0]), torch.tensor([-0.2, 0.4], requires_grad=True)
    judge = torch.autograd.grad(discriminator_loss(real, fake, relativistic), fake)[0]
    student = torch.autograd.grad(adversarial_loss(real, fake, relativistic), fake)[0]
    assert (judge > 0).all() and (student < 0).all()
    at_zero = discriminator_loss(torch.zeros(2), torch.zeros(2), relativistic).item()
    assert at_zero == pytest.approx(math.log(2) * (1 if relativistic else 2))
    moved = discriminator_loss(real + 5, fake.detach() + 5, relativistic)
    same = discriminator_loss(real, fake.detach(), relativistic)
    assert torch.isclose(moved, same) == relativistic


def test_roughness_of_a_linear_judge_is_the_square_of_its_slope():
    slope = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frames = torch.randn(4000, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    noise = torch.randn(4000, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = roughness((frames + 0.05 * noise) @ slope, frames @ slope, distance=0.05)
    assert found.item() == pytest.approx(slope.square().sum().item(), rel=0.1)
