"""Attention: the fused path is the plain one, positions are relative, masks leak nothing."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from scd.models.attention import (
    DistanceBias,
    FrameCausal,
    TeacherForcing,
    _compiled_flex,
    _flex,
    attend,
    dense_bias,
    dense_mask,
    explicit_attention,
    frame_positions,
    rotary_table,
    rotate,
)

CPU = torch.device("cpu")
THREE_FRAMES = FrameCausal(num_frames=3, tokens_per_frame=4)
MANY = {
    # Tokens that fill no tile, a few tiles, and whole tiles with frames that straddle their edges.
    "causal, short": FrameCausal(num_frames=3, tokens_per_frame=4),
    "causal": FrameCausal(num_frames=7, tokens_per_frame=45),
    "causal, past": FrameCausal(num_frames=8, num_past=5, tokens_per_frame=48),
    "forcing": TeacherForcing(num_clean=4, first_noisy=2, num_noisy=3, tokens_per_frame=50),
    "forcing, whole tiles": TeacherForcing(
        num_clean=4, first_noisy=1, num_noisy=4, tokens_per_frame=32
    ),
    "forcing, no past": TeacherForcing(
        num_clean=0, first_noisy=0, num_noisy=2, tokens_per_frame=70
    ),
}


def bias_of(visible, slope=0.3):
    """The bias of a visibility whose clean frames are 0 .. and whose noisy ones are the last."""
    num_queries, num_keys = visible.num_query_frames, visible.num_key_frames
    keys, first = range(num_keys), num_keys - num_queries
    if isinstance(visible, TeacherForcing):
        first = visible.first_noisy
        keys = [*range(visible.num_clean), *range(first, first + num_queries)]
    return DistanceBias(
        slope=slope,
        query_frames=tuple(range(first, first + num_queries)),
        key_frames=tuple(keys),
        tokens_per_frame=visible.tokens_per_frame,
    )


def explicit_mask(visible, bias, device=CPU):
    mask = None if visible is None else dense_mask(visible, device)
    if bias is None:
        return mask
    added = dense_bias(bias, device)
    return added if mask is None else added.masked_fill(~mask, float("-inf"))


def qkv_for(visible, **kinds):
    size = visible.tokens_per_frame
    return random_qkv(visible.num_query_frames * size, visible.num_key_frames * size, **kinds)


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
    visible = THREE_FRAMES if masked else None
    bias = bias_of(THREE_FRAMES) if biased else None
    expected = explicit_attention(q, k, v, explicit_mask(visible, bias))
    torch.testing.assert_close(attend(q, k, v, visible, bias), expected, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("biased", [False, True])
@torch.no_grad()
def test_flex_attention_is_explicit_attention(name, biased):
    """Uncompiled, which computes all tiles and hides what is not seen."""
    visible = MANY[name]
    bias = bias_of(visible) if biased else None
    q, k, v = qkv_for(visible)
    expected = explicit_attention(q, k, v, explicit_mask(visible, bias))
    for _ in range(2):  # The second time from what is kept.
        read = _flex(q, k, v, visible, bias, flex_attention)
        torch.testing.assert_close(read, expected, atol=1e-6, rtol=1e-5)
    assert not expected.isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("biased", [False, True])
@torch.no_grad()
def test_compiled_flex_attention_is_explicit_attention(name, biased):
    """Compiled, only the listed tiles are computed; on a CPU too, where there is a C++ compiler."""
    torch._dynamo.reset()
    visible = MANY[name]
    bias = bias_of(visible) if biased else None
    q, k, v = qkv_for(visible)
    expected = explicit_attention(q, k, v, explicit_mask(visible, bias))
    read = _flex(q, k, v, visible, bias, _compiled_flex())
    torch.testing.assert_close(read, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_flex_attention_has_the_outputs_and_gradients_of_the_dense_mask(
    name, biased, dtype
):
    torch._dynamo.reset()
    visible, device = MANY[name], torch.device("cuda")
    bias = bias_of(visible) if biased else None
    q, k, v = (x.to(device, dtype).requires_grad_() for x in qkv_for(visible))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = explicit_attention(*exact, explicit_mask(visible, bias, device))
    read = _flex(q, k, v, visible, bias, _compiled_flex())
    weight = torch.randn(read.shape, generator=torch.Generator().manual_seed(1)).to(device)
    (read.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    atol = 1e-4 if dtype == torch.float32 else 0.05
    pairs = [(read, expected), *((x.grad, y.grad) for x, y in zip((q, k, v), exact, strict=True))]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs.double(), atol=atol, rtol=atol)


@pytest.mark.gpu
def test_a_gpu_trains_on_tiles_and_streams_on_the_dense_mask(monkeypatch):
    calls = []
    monkeypatch.setattr("scd.models.attention._flex", lambda q, *_: calls.append(1) or q)
    visible = MANY["causal"]
    q, k, v = (x.to("cuda") for x in qkv_for(visible))
    attend(q, k, v, visible)
    assert len(calls) == 1
    attend(q, k, v)
    with torch.no_grad():
        attend(q, k, v, visible)
    assert len(calls) == 1


def test_short_bfloat16_path_has_the_gradients_of_the_fused_one():
    q, k, v = random_qkv(12, 12, torch.bfloat16, grad=True)
    attend(q, k, v, THREE_FRAMES).float().square().sum().backward()
    short = [x.grad.float() for x in (q, k, v)]
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    attend(*exact, THREE_FRAMES).square().sum().backward()
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


def test_masked_keys_do_not_leak():
    q, k, v = random_qkv(12, 12)
    before = attend(q, k, v, THREE_FRAMES)
    k[:, :, 8:], v[:, :, 8:] = 100.0, 100.0
    after = attend(q, k, v, THREE_FRAMES)
    torch.testing.assert_close(before[:, :, :8], after[:, :, :8], atol=0, rtol=0)
    assert not torch.allclose(before[:, :, 8:], after[:, :, 8:])
