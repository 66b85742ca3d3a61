"""The ring of keys and values equals a plain list of frames, wraps, forks and forgets."""

import pytest
import torch

from scd.models.attention import frame_positions, rotary_table, rotate
from scd.models.config import BlockConfig, CacheConfig
from scd.models.kv_cache import KVCache

AXES, THETA = (4, 6, 6), 100.0
ROWS, COLUMNS = 1, 2


def new_cache(window, num_sinks, rebase=True):
    return KVCache(
        CacheConfig(window=window, num_sinks=num_sinks, rebase_sinks=rebase),
        BlockConfig(width=32, head_dim=16, rotary_axes=AXES, rotary_theta=THETA),
        num_layers=2,
        batch=1,
        tokens_per_frame=ROWS * COLUMNS,
        like=torch.empty(0),
    )


def at(keys, frame):
    positions = frame_positions(torch.tensor([frame]), ROWS, COLUMNS)
    return rotate(keys, rotary_table(positions, AXES, THETA))


class NaiveMemory:
    """Every frame's unrotated keys in a list; rotated and joined anew at each call."""

    def __init__(self, window, num_sinks, rebase):
        self.window, self.num_sinks, self.rebase = window, num_sinks, rebase
        self.frames = []

    def visible(self):
        if len(self.frames) <= self.window:
            kept = [(index, *frame) for index, frame in enumerate(self.frames)]
        else:
            gone = len(self.frames) - self.window
            kept = [
                (index + gone * self.rebase, *self.frames[index]) for index in range(self.num_sinks)
            ]
            kept += [
                (index, *self.frames[index])
                for index in range(len(self.frames))
                if index >= gone + self.num_sinks
            ]
        keys = torch.cat([at(k, position) for position, k, _ in kept], dim=2)
        return keys, torch.cat([v for *_, v in kept], dim=2)


def read(q, keys, values):
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values)


@pytest.mark.parametrize(
    "window, num_sinks, rebase",
    [(4, 0, True), (4, 1, True), (4, 2, True), (4, 2, False), (1, 0, True)],
)
def test_ring_is_the_naive_memory_over_several_wraps(window, num_sinks, rebase):
    generator = torch.Generator().manual_seed(0)
    cache, naive = new_cache(window, num_sinks, rebase), NaiveMemory(window, num_sinks, rebase)
    for frame in range(13):
        k, v, q = (torch.randn(1, 2, 2, 16, generator=generator) for _ in range(3))
        naive.frames.append((k, v))
        expected = read(q, *naive.visible())
        cache.make_room()
        for layer in range(2):
            # A frame may be tried several times before it is kept.
            cache.write(layer, torch.randn(1, 2, 2, 16), torch.randn(1, 2, 2, 16))
            got = read(q, *cache.write(layer, at(k, frame), v))
            torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
        cache.advance([frame])
        assert cache.num_frames == min(frame + 1, window)


@pytest.mark.parametrize("window, num_sinks, rebase", [(4, 1, True), (3, 0, True), (4, 2, False)])
def test_gradients_reach_the_new_tokens_only_and_survive_later_writes(window, num_sinks, rebase):
    generator = torch.Generator().manual_seed(0)
    cache, naive = new_cache(window, num_sinks, rebase), NaiveMemory(window, num_sinks, rebase)
    mine, theirs, leaves = [], [], []
    for frame in range(9):
        k, v, q = (torch.randn(1, 2, 2, 16, generator=generator) for _ in range(3))
        k, v = k.requires_grad_(), v.requires_grad_()
        leaves.append((k, v))
        naive.frames.append((k, v))
        expected = read(q, *naive.visible())
        naive.frames[-1] = (k.detach(), v.detach())
        cache.make_room()
        # Tried once for nothing, in both layers, before it counts.
        for layer in (0, 1, 0, 1):
            got = read(q, *cache.write(layer, at(k, frame), v))
        cache.advance([frame])
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
        mine.append((frame + 1) * got.square().sum())
        theirs.append((frame + 1) * expected.square().sum())
    assert not cache.keys.requires_grad and not cache.values.requires_grad
    flat = [leaf for pair in leaves for leaf in pair]
    found = torch.autograd.grad(torch.stack(mine).sum(), flat)
    for gradient, expected in zip(
        found, torch.autograd.grad(torch.stack(theirs).sum(), flat), strict=True
    ):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, expected, atol=2e-5, rtol=1e-4)


def test_without_gradients_nothing_is_copied():
    cache = new_cache(3, 0)
    k, v = torch.randn(1, 2, 2, 16, requires_grad=True), torch.randn(1, 2, 2, 16)
    with torch.no_grad():
        keys, values = cache.write(0, k, v)
    assert keys.data_ptr() == cache.keys.data_ptr()
    assert values.data_ptr() == cache.values.data_ptr()


def test_several_frames_at_once_while_there_is_room():
    k, v = torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 16)
    cache = new_cache(4, 0)
    for layer in range(2):
        keys, values = cache.write(layer, k, v)
    cache.advance([0, 1, 2])
    assert torch.equal(keys, k) and torch.equal(values, v)
    with pytest.raises(ValueError, match="2 frames at once"):
        cache.write(0, k[:, :, :4], v[:, :, :4])


def test_positions_follow_the_rebased_sinks():
    cache = new_cache(3, 1)
    for frame in range(5):
        cache.make_room()
        positions = cache.positions_with([frame])
        for layer in range(2):
            cache.write(layer, torch.randn(1, 2, 2, 16), torch.randn(1, 2, 2, 16))
        cache.advance([frame])
    # Sink, then the two newest frames, at most two apart: as far as a window of three ever saw.
    assert sorted(positions) == [2, 3, 4]


def test_fork_is_independent_and_reset_forgets():
    cache = new_cache(3, 1)
    k, v = torch.randn(1, 2, 2, 16), torch.randn(1, 2, 2, 16)
    for frame in range(4):
        cache.make_room()
        for layer in range(2):
            cache.write(layer, at(k, frame), v)
        cache.advance([frame])
    twin = cache.fork()
    before = cache.keys.clone()
    twin.make_room()
    for layer in range(2):
        twin.write(layer, k + 1, v)
    twin.advance([4])
    assert torch.equal(cache.keys, before)
    assert cache.slots != twin.slots
    cache.reset()
    assert cache.num_frames == 0 and cache.num_free == 3
    keys, _ = cache.write(0, k, v)
    assert torch.equal(keys, k)


def test_memory_is_what_the_formula_says():
    cache = new_cache(5, 1)
    assert cache.num_bytes == 2 * 2 * 1 * 5 * 2 * 32 * 4


@pytest.mark.parametrize("window, num_sinks", [(0, 0), (2, 2), (2, -1)])
def test_impossible_windows_are_refused(window, num_sinks):
    with pytest.raises(ValueError):
        CacheConfig(window=window, num_sinks=num_sinks)
