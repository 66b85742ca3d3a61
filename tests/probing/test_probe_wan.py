"""Wan's blocks as a subject: one frame after another = one masked pass of diffusers' own code."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformer3DModel

from scd.data.clip import Conditions
from scd.models.attention import FrameCausal, dense_mask
from scd.models.wan.transformer import TIME_SCALE
from scd.probing.diffusers_wan import WanSubject
from scd.probing.intercept import without
from scd.probing.subject import Task
from tests.tiny import shaken

HEIGHT, WIDTH, CHANNELS, TOKENS = 4, 6, 4, 6


class Masked(WanAttnProcessor):
    """Their attention, with a mask that their blocks do not pass on."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def __call__(self, attention, x, text, mask, rotary):
        return super().__call__(attention, x, text, self.mask[None, None], rotary)


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return shaken(
        WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=10,
            freq_dim=16,
            ffn_dim=32,
            num_layers=3,
            rope_max_seq_len=16,
        )
    )


@pytest.fixture
def subject(transformer):
    text = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
    return WanSubject(transformer, text, HEIGHT, WIDTH)


def frames_of(num_frames, batch=2):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, num_frames, CHANNELS, HEIGHT, WIDTH, generator=generator)


@torch.no_grad()
def parallel(transformer, text, frames, time):
    """The last frame's velocity by diffusers' forward over all frames, clean ones at time 0."""
    num_frames = frames.shape[1]
    mask = dense_mask(
        FrameCausal(num_frames=num_frames, tokens_per_frame=TOKENS), torch.device("cpu")
    )
    before = [block.attn1.processor for block in transformer.blocks]
    times = torch.zeros(len(frames), num_frames * TOKENS)
    times[:, -TOKENS:] = TIME_SCALE * time
    try:
        for block in transformer.blocks:
            block.attn1.processor = Masked(mask)
        result = transformer(
            frames.transpose(1, 2), times, text.expand(len(frames), -1, -1), return_dict=False
        )[0]
    finally:
        for block, processor in zip(transformer.blocks, before, strict=True):
            block.attn1.processor = processor
    return result[:, :, -1]


@pytest.mark.parametrize("num_past", [0, 1, 4])
def test_frame_by_frame_is_one_masked_pass_of_their_own_code(subject, transformer, num_past):
    frames = frames_of(num_past + 1)
    with torch.no_grad():
        state = subject.begin(frames[:, :-1], Conditions())
        velocity = subject.velocity(state, frames[:, -1], 0.7)
    expected = parallel(transformer, subject.text, frames, 0.7)
    assert velocity.shape == frames[:, -1].shape
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)
    if num_past:
        frames[:, 0] += 1
        assert not torch.allclose(parallel(transformer, subject.text, frames, 0.7), expected)


def test_the_transformer_stays_as_it_was(subject, transformer):
    before = [block.attn1.processor for block in transformer.blocks]
    Task.of(frames_of(4), Conditions()).begin(subject)
    assert [block.attn1.processor for block in transformer.blocks] == before
    assert all("forward" not in vars(block) for block in transformer.blocks)


def test_attention_is_seen_over_frames_and_not_over_the_text(subject):
    task = Task.of(frames_of(4), Conditions())
    state = task.begin(subject)
    attentions = []
    with torch.no_grad(), subject.watch_attention(attentions.append):
        subject.velocity(state, task.noise, 1.0)
    assert [attention.layer for attention in attentions] == [0, 1, 2]
    for attention in attentions:
        assert attention.q.shape == (2, 2, TOKENS, 24)
        assert attention.k.shape == (2, 2, 4 * TOKENS, 24)
        assert attention.distances == [d for d in (3, 2, 1, 0) for _ in range(TOKENS)]


def test_a_layer_can_be_left_out(subject):
    task = Task.of(frames_of(4), Conditions())
    full = task.error(subject, task.begin(subject), 0.5)
    with without([subject.layers[1]]):
        less = task.error(subject, task.begin(subject), 0.5)
    assert not torch.allclose(full, less)
    assert torch.equal(task.error(subject, task.begin(subject), 0.5), full)


def test_what_does_not_fit_is_refused(subject, transformer):
    text = subject.text
    with pytest.raises(ValueError, match="do not make patches of 2x2"):
        WanSubject(transformer, text, 5, 6)
    with pytest.raises(ValueError, match="must have 10 entries, got 3"):
        WanSubject(transformer, text[:, :3], 4, 6)
    with pytest.raises(ValueError, match="steered by its text"):
        subject.begin(frames_of(2), Conditions(actions=torch.zeros(2, 2, dtype=torch.long)))
    of_images = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, text_dim=10, ffn_dim=8, freq_dim=8,
        num_layers=1, image_dim=8, added_kv_proj_dim=12,
    )  # fmt: skip
    with pytest.raises(ValueError, match="text-to-video"):
        WanSubject(of_images, text, 4, 6)
