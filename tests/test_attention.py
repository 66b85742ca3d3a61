"""Attention: the fused path is the plain one, positions are relative, masks leak nothing."""

import pytest
import torch

from scd.model.attention import (
    attend,
    explicit_attention,
    frame_causal_mask,
    frame_positions,
    rotary_table,
    rotate,
    teacher_forcing_mask,
)

CPU = torch.device("cpu")


def random_qkv(num_queries, num_keys, dtype=torch.float32, grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = (num_queries, num_keys, num_keys)
    return [
        torch.randn(2, 3, size, 16, generator=generator).to(dtype).requires_grad_(grad)
        for size in shapes
    ]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_fused_attention_is_explicit_attention(masked, biased):
    q, k, v = random_qkv(12, 12)
    visible = frame_causal_mask(3, 4, CPU) if masked else None
    bias = torch.randn(12, 12) if biased else None
    mask = visible
    if bias is not None:
        mask = bias if visible is None else bias.masked_fill(~visible, float("-inf"))
    torch.testing.assert_close(
        attend(q, k, v, visible, bias), explicit_attention(q, k, v, mask), atol=1e-6, rtol=0
    )


def test_short_bfloat16_path_has_the_gradients_of_the_fused_one():
    visible = frame_causal_mask(3, 4, CPU)
    q, k, v = random_qkv(12, 12, torch.bfloat16, grad=True)
    attend(q, k, v, visible).float().square().sum().backward()
    short = [x.grad.float() for x in (q, k, v)]
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    attend(*exact, visible).square().sum().backward()
    for ours, theirs in zip(short, exact, strict=True):
        torch.testing.assert_close(ours, theirs.grad, atol=0.05, rtol=0.05)


def test_rotary_depends_on_differences_only():
    q, k, v = random_qkv(1, 1)
    positions = torch.tensor([[2, 1, 3], [5, 0, 2]])
    moved = positions + torch.tensor([7, -3, 4])

    def logit(places):
        cosine, sine = rotary_table(places, (4, 6, 6), 100.0)
        turned_q = rotate(q, (cosine[:1], sine[:1]))
        turned_k = rotate(k, (cosine[1:], sine[1:]))
        return (turned_q * turned_k).sum(-1)

    torch.testing.assert_close(logit(positions), logit(moved), atol=1e-5, rtol=0)
    elsewhere = positions + torch.tensor([[1, 0, 0], [0, 0, 0]])
    assert not torch.allclose(logit(positions), logit(elsewhere), atol=1e-3)


def test_rotary_is_exact_far_into_a_stream():
    near, far = (
        rotary_table(torch.tensor([[start, 0, 0], [start + 1, 0, 0]]), (16, 24, 24), 1e4)
        for start in (0, 1_000_000)
    )

    def cosine_of_one_step(table):
        cosine, sine = table
        return cosine[1, 0] * cosine[0, 0] + sine[1, 0] * sine[0, 0]

    torch.testing.assert_close(cosine_of_one_step(near), cosine_of_one_step(far), atol=1e-6, rtol=0)


def test_positions_run_frame_by_frame_row_by_row():
    positions = frame_positions(torch.tensor([-1, 0]), 2, 3)
    assert positions.shape == (12, 3)
    assert positions[0].tolist() == [-1, 0, 0]
    assert positions[4].tolist() == [-1, 1, 1]
    assert positions[6].tolist() == [0, 0, 0]


def test_teacher_forcing_mask_by_hand():
    # Two clean frames, noisy frames 1 and 2, one token each.
    visible = teacher_forcing_mask(2, 1, 2, 1, CPU)
    assert visible.tolist() == [
        [True, False, True, False],
        [True, True, False, True],
    ]


def test_masked_keys_do_not_leak():
    q, k, v = random_qkv(12, 12)
    visible = frame_causal_mask(3, 4, CPU)
    before = attend(q, k, v, visible)
    k[:, :, 8:], v[:, :, 8:] = 100.0, 100.0
    after = attend(q, k, v, visible)
    torch.testing.assert_close(before[:, :, :8], after[:, :, :8], atol=0, rtol=0)
    assert not torch.allclose(before[:, :, 8:], after[:, :, 8:])
