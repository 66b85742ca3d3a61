"""What a query may look at: the mask, the function and the tiles of it say the same."""

import itertools

import pytest
import torch

from scd.models.attention import (
    TILE,
    DistanceBias,
    FrameCausal,
    TeacherForcing,
    block_mask,
    dense_bias,
    dense_mask,
    padded,
    score_mod,
)

CPU = torch.device("cpu")


def small_ones():
    """Every visibility of a few frames of a few tokens."""
    for size, num_frames in itertools.product((1, 2, 3, 5), (1, 2, 3, 4)):
        for num_past in range(num_frames):
            yield FrameCausal(num_frames=num_frames, num_past=num_past, tokens_per_frame=size)
    for size, num_clean, first, num_noisy in itertools.product(
        (1, 2, 3), range(4), range(4), (1, 2, 3)
    ):
        yield TeacherForcing(
            num_clean=num_clean, first_noisy=first, num_noisy=num_noisy, tokens_per_frame=size
        )


def seen(visible, query, key):
    """What the definition says of two tokens, worked out by itself."""
    query_frame, key_frame = query // visible.tokens_per_frame, key // visible.tokens_per_frame
    if isinstance(visible, FrameCausal):
        return key_frame <= visible.num_past + query_frame
    if key_frame < visible.num_clean:
        return key_frame < visible.first_noisy + query_frame
    return key_frame - visible.num_clean == query_frame


def mask_from_mod(visible, num_queries, num_keys):
    zero = torch.zeros((), dtype=torch.long)
    queries, keys = torch.arange(num_queries), torch.arange(num_keys)
    return visible.mask_mod()(zero, zero, queries[:, None], keys[None, :])


def test_the_mask_and_its_function_are_the_definition():
    for visible in small_ones():
        num_queries = visible.num_query_frames * visible.tokens_per_frame
        num_keys = visible.num_key_frames * visible.tokens_per_frame
        expected = torch.tensor(
            [[seen(visible, q, k) for k in range(num_keys)] for q in range(num_queries)]
        )
        assert torch.equal(dense_mask(visible, CPU), expected), visible
        assert torch.equal(mask_from_mod(visible, num_queries, num_keys), expected), visible
        assert expected.any(-1).all(), visible


def test_padding_is_seen_by_padding_only():
    for visible in small_ones():
        num_queries = visible.num_query_frames * visible.tokens_per_frame
        num_keys = visible.num_key_frames * visible.tokens_per_frame
        mask = mask_from_mod(visible, TILE, TILE)
        assert not mask[:num_queries, num_keys:].any(), visible
        # A row that saw nothing would be a softmax of nothing.
        assert mask.any(-1).all(), visible


def test_teacher_forcing_by_hand():
    # Two clean frames, noisy frames 1 and 2, one token each.
    visible = TeacherForcing(num_clean=2, first_noisy=1, num_noisy=2, tokens_per_frame=1)
    assert dense_mask(visible, CPU).tolist() == [
        [True, False, True, False],
        [True, True, False, True],
    ]


TILED = [
    FrameCausal(num_frames=1, tokens_per_frame=3),
    FrameCausal(num_frames=9, tokens_per_frame=64),
    FrameCausal(num_frames=9, num_past=4, tokens_per_frame=64),
    FrameCausal(num_frames=40, num_past=3, tokens_per_frame=13),
    FrameCausal(num_frames=3, tokens_per_frame=300),
    TeacherForcing(num_clean=8, first_noisy=0, num_noisy=9, tokens_per_frame=64),
    TeacherForcing(num_clean=5, first_noisy=2, num_noisy=4, tokens_per_frame=300),
    TeacherForcing(num_clean=19, first_noisy=3, num_noisy=17, tokens_per_frame=13),
    TeacherForcing(num_clean=0, first_noisy=0, num_noisy=5, tokens_per_frame=48),
]


@pytest.mark.parametrize("visible", TILED, ids=str)
def test_tiles_are_those_of_the_mask(visible):
    tiles = block_mask(visible, CPU)
    num_queries, num_keys = tiles.seq_lengths
    for frames, length in (
        (visible.num_query_frames, num_queries),
        (visible.num_key_frames, num_keys),
    ):
        assert length == padded(torch.zeros(frames * visible.tokens_per_frame, 1)).shape[0]
    mask = mask_from_mod(visible, num_queries, num_keys)
    counts = mask.view(num_queries // TILE, TILE, num_keys // TILE, TILE).sum((1, 3))
    partial = listed(tiles.kv_num_blocks, tiles.kv_indices)
    full = listed(tiles.full_kv_num_blocks, tiles.full_kv_indices)
    assert torch.equal(full, counts == TILE**2)
    assert torch.equal(partial, (counts > 0) & (counts < TILE**2))
    # The way back, for gradients of keys and values, is made by PyTorch.
    assert torch.equal(listed(tiles.q_num_blocks, tiles.q_indices).T, partial)
    assert torch.equal(listed(tiles.full_q_num_blocks, tiles.full_q_indices).T, full)


def listed(numbers, indices):
    """The tiles that are listed, as a mask over tiles."""
    mask = torch.zeros(indices.shape[2:], dtype=torch.bool)
    for row, number in enumerate(numbers[0, 0].tolist()):
        mask[row, indices[0, 0, row, :number].long()] = True
    return mask


def test_tiles_of_a_long_clip_are_few_numbers():
    visible = TeacherForcing(num_clean=299, first_noisy=0, num_noisy=300, tokens_per_frame=64)
    tiles = block_mask(visible, CPU)
    tensors = [value for value in tiles.as_tuple() if isinstance(value, torch.Tensor)]
    assert sum(tensor.numel() for tensor in tensors) < 2**18


def test_the_change_of_a_logit_is_the_dense_bias():
    bias = DistanceBias(
        slope=0.25, query_frames=(2, 3), key_frames=(0, 5, 2, 3), tokens_per_frame=3
    )
    queries, keys = torch.arange(6)[:, None], torch.arange(12)[None, :]
    zero = torch.zeros((), dtype=torch.long)
    logits = torch.zeros(6, 12)
    changed = score_mod(bias, CPU)(logits, zero, zero, queries, keys)
    torch.testing.assert_close(changed, dense_bias(bias, CPU), atol=1e-6, rtol=0)
    assert changed[0, 3] == 0.75 and changed[5, 0] == -0.75
