"""Attention mass: blockwise sums are those of an explicit softmax; hand-built layers are exact."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from scd.models.config import SamplingConfig
from scd.probing.measurements.attention import attention_mass, mass
from scd.probing.models import subject_of
from scd.probing.subject import FrameAttention
from scd.probing.trajectory import step_times
from tests.probing.test_probe_features import their_task
from tests.probing.test_probe_subject import task_for
from tests.third_party import Doubling, TheirBlock, third_party
from tests.tiny import BLOCK, tiny_dense, tiny_separable

STEPS = SamplingConfig(num_steps=3)


def own_only():
    return TheirBlock(sees_past=False)


class MaskedBlock(TheirBlock):
    """Hides the first frame of the past."""

    def forward(self, tokens, past):
        seen = torch.cat([past, tokens], dim=1)
        q, k, v = self.qkv(self.norm(seen)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mask = torch.arange(seen.shape[1]) >= tokens.shape[1]
        q = q[:, :, -tokens.shape[1] :]
        read = nn.functional.scaled_dot_product_attention(q, k, v, mask.expand(q.shape[2], -1))
        return tokens + self.out(read.transpose(1, 2).flatten(2))


def random_attention(bias):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 5, 8, generator=generator)
    k = torch.randn(2, 3, 20, 8, generator=generator)
    if bias is not None:
        bias = torch.randn(1, 1, *bias, generator=generator)
        bias[..., 0] = float("-inf")
    return FrameAttention(
        layer=0, q=q, k=k, bias=bias, distances=[3 - key // 5 for key in range(20)]
    )


@pytest.mark.parametrize("bias", [None, (5, 20), (1, 20)])
@pytest.mark.parametrize("max_block_bytes", [1, 1500, 2**20])
def test_blockwise_mass_is_that_of_an_explicit_softmax(bias, max_block_bytes):
    attention = random_attention(bias)
    logits = attention.q @ attention.k.mT / 8**0.5
    weights = (logits if bias is None else logits + attention.bias).softmax(-1)
    members = nn.functional.one_hot(torch.tensor(attention.distances), 4).float()
    expected = weights.unflatten(-1, (4, 5)).sum(-1).mean(2).flip(-1)
    torch.testing.assert_close(mass(attention, members, max_block_bytes), expected)


def test_deep_layers_that_see_their_own_frame_have_no_mass_on_the_past():
    subject = third_party([TheirBlock, TheirBlock, own_only, own_only])
    found = attention_mass(subject, their_task(num_frames=5), STEPS)
    assert found.past_mass.shape == (4, 2, 3) and found.layers == (1, 2, 3, 4)
    assert (found.past_mass[2:] == 0).all() and (found.past_mass[:2] > 0.1).all()
    # Four given frames: the one that is denoised is frame 5, and looks uniformly at 4 of 5.
    np.testing.assert_allclose(found.uniform, [0.8, 0.8, 0, 0])
    assert (found.context_mass == 0).all() and found.profile.shape == (4, 2, 5)
    np.testing.assert_allclose(found.profile.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(found.profile[..., 1:].sum(-1), found.past_mass.mean(-1), atol=1e-5)
    assert (found.profile[2:, :, 0] == 1).all()


def test_equal_weights_are_the_uniform_baseline():
    subject = third_party([TheirBlock])
    with torch.no_grad():
        subject.layers[0].block.qkv.weight[:16] = 0
        subject.layers[0].block.qkv.bias[:16] = 0
    found = attention_mass(subject, their_task(), STEPS, chosen=[0, 4])
    np.testing.assert_allclose(found.past_mass, 3 / 4, atol=1e-6)
    np.testing.assert_allclose(found.profile, 1 / 4, atol=1e-6)
    np.testing.assert_allclose(found.maps, 1 / 24, atol=1e-6)
    assert found.maps.shape == (1, 4, 2, 2, 3) and found.chosen == (0, 4)


@torch.no_grad()
def test_hidden_keys_do_not_count_in_the_uniform_baseline():
    """All frames are run, the oldest is hidden by a mask: two of three visible ones are past."""
    subject = third_party([MaskedBlock])
    found = attention_mass(subject, their_task(), STEPS)
    np.testing.assert_allclose(found.uniform, 2 / 3, atol=1e-6)
    assert (found.profile[..., 1:3] > 0).all() and found.profile.shape[-1] == 3


@torch.no_grad()
def test_maps_and_mass_of_a_dense_model_are_those_of_its_weights():
    """With a bias over distance, which is part of the logits."""
    subject = subject_of(tiny_dense(block=replace(BLOCK, distance_bias=0.5)))
    task = task_for(subject.model)
    found = attention_mass(subject, task, STEPS, chosen=[2])
    attentions = []
    with subject.watch_attention(attentions.append):
        subject.velocity(task.begin(subject), task.noise, step_times(STEPS)[0])
    for attention in attentions:
        assert attention.bias is not None
        weights = (attention.q @ attention.k.mT / 16**0.5 + attention.bias).softmax(-1)
        np.testing.assert_allclose(
            weights[..., :18].sum(-1).mean((0, 2)),
            found.past_mass[attention.layer, :, 0],
            atol=1e-5,
        )
    assert found.maps.shape == (3, 4, 1, 2, 3)
    np.testing.assert_allclose(found.maps.sum((1, 2, 3, 4)), 1, atol=1e-5)
    one_step = attention_mass(subject, task, SamplingConfig(num_steps=2), chosen=[2])
    np.testing.assert_allclose(one_step.past_mass[..., 0], found.past_mass[..., 0], atol=1e-6)


def test_diagonal_layers_of_a_dense_model_have_no_mass_on_the_past():
    subject = subject_of(tiny_dense(num_diagonal=1))
    found = attention_mass(subject, task_for(subject.model), STEPS)
    assert (found.past_mass[2] == 0).all() and (found.past_mass[:2] > 0).all()


@pytest.mark.parametrize("join", ["token_concat", "prefix", "add"])
def test_a_separable_decoder_sees_its_context_and_no_other_frame(join):
    subject = subject_of(tiny_separable(join=join))
    found = attention_mass(subject, task_for(subject.model), STEPS)
    assert (found.past_mass[2:] == 0).all() and (found.past_mass[:2] > 0).all()
    assert (found.context_mass[:2] == 0).all()
    assert ((found.context_mass[2:] > 0) == (join != "add")).all()
    shares = found.profile.sum(-1) + found.context_mass.mean(-1)
    np.testing.assert_allclose(shares, 1, atol=1e-5)
    # Rows before that of the newest known frame: the start frame and two frames, of four in all.
    np.testing.assert_allclose(found.uniform, [0.75, 0.75, 0, 0])


def test_attention_that_cannot_be_measured_is_refused():
    task = their_task()
    with pytest.raises(ValueError, match="no layer of this model looks at earlier frames"):
        attention_mass(third_party([own_only] * 2), task, STEPS)
    with pytest.raises(ValueError, match="seen in layer 2: it must go through"):
        attention_mass(third_party([TheirBlock, Doubling]), task, STEPS)
    with pytest.raises(ValueError, match=r"0 \.\. 5, one or more, got \[6\]"):
        attention_mass(third_party([TheirBlock]), task, STEPS, chosen=[6])
    with pytest.raises(ValueError, match="2 or more, got 1"):
        attention_mass(third_party([TheirBlock]), task, SamplingConfig(num_steps=1))
