"""Keys and values in 8 bits, beside the plain ring of the same numbers, rounded before."""

import pytest
import torch

from scd.engine.int8_cache import Int8KVCache, rounded
from scd.engine.layers import rotate_halves
from scd.engine.open import open_engine
from scd.models.config import CacheConfig
from scd.models.kv_cache import KVCache
from tests.engine.test_int8 import can
from tests.engine.test_wan_engine import MODELS, stream
from tests.tiny_wan import BLOCK

LAYERS, TOKENS = 2, 6


def both(dtype, **settings):
    config = CacheConfig(**({"window": 3, "num_sinks": 0, "rebase_sinks": False} | settings))
    made = {"num_layers": LAYERS, "batch": 2, "tokens_per_frame": TOKENS}
    like = torch.empty(0, dtype=dtype)
    return [
        kind(config, BLOCK, **made, like=like, rotate=rotate_halves)
        for kind in (Int8KVCache, KVCache)
    ]


def drawn(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    size = (2, 2, BLOCK.num_heads, TOKENS, BLOCK.head_dim)
    return (3 * torch.randn(size, generator=generator)).to(dtype)


def back(x):
    levels, scale = rounded(x)
    return levels * scale[..., None].to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_head_of_each_token_is_rounded_by_itself(dtype):
    x = drawn(dtype, 0)
    x[0, 0, 0, 0], x[0, 0, 1, 2] = 0, 1000 * x[0, 0, 1, 2]
    levels, scale = rounded(x)
    assert levels.dtype == torch.int8 and scale.shape == x.shape[:-1]
    assert int(levels.abs().max()) == 127 and not back(x)[0, 0, 0, 0].any()
    exact = levels.float() * scale[..., None]
    # Half a step; at the largest a little more, where bfloat16 rounded the scale.
    assert ((exact - x.float()).abs() <= 1.01 * scale[..., None]).all()
    assert (exact - x.float()).norm() < 0.01 * x.float().norm()
    alone = rounded(x[:1, :1, 1:, 2:3])
    assert torch.equal(alone[0], levels[:1, :1, 1:, 2:3])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_ring_reads_what_the_plain_one_reads_of_rounded_numbers(dtype):
    """Filled, wrapped, tried twice, forked, several streams of one, and begun anew."""
    eighth, plain = both(dtype)

    def frame(number, *pair):
        for cache in pair:
            cache.make_room()
        for layer in range(LAYERS):
            k, v = drawn(dtype, 10 * number + layer)[:, : pair[0].batch].unbind(0)
            found, wanted = pair[0].write(layer, k, v), pair[1].write(layer, back(k), back(v))
            for one, two in zip(found, wanted, strict=True):
                assert one.dtype == dtype and torch.equal(one, two)

    for number in range(5):
        frame(number + 100, eighth, plain)
        frame(number, eighth, plain)
        for cache in (eighth, plain):
            cache.advance([number])
        if number == 1:
            early = eighth.fork(), plain.fork()
    frame(7, eighth, plain)
    frame(8, *early)
    frame(7, eighth, plain)
    several = eighth.fork(2), plain.fork(2)
    assert several[0].batch == 4
    for layer in range(LAYERS):
        k, v = drawn(dtype, 70 + layer).repeat_interleave(2, 1).unbind(0)
        for cache in several:
            cache.make_room()
        found, wanted = several[0].write(layer, k, v), several[1].write(layer, back(k), back(v))
        assert all(map(torch.equal, found, wanted))
    for cache in (eighth, plain):
        cache.reset()
    frame(9, eighth, plain)


@torch.no_grad()
def test_sinks_turn_as_those_of_the_plain_ring():
    eighth, plain = both(torch.float32, num_sinks=1, rebase_sinks=True)
    for number in range(6):
        for cache in (eighth, plain):
            cache.make_room()
        for layer in range(LAYERS):
            k, v = drawn(torch.float32, number + layer).unbind(0)
            found = eighth.write(layer, k, v)
            wanted = plain.write(layer, k, v)
            for one, two in zip(found, wanted, strict=True):
                assert (one - two).norm() < 0.01 * two.norm()
        for cache in (eighth, plain):
            cache.advance([number])


def test_it_takes_half_the_memory_of_bfloat16():
    shape, like = (25, 1, 12, 4032, 128), torch.empty(0, dtype=torch.bfloat16)
    share = Int8KVCache.bytes_of(shape, like) / KVCache.bytes_of(shape, like)
    assert share == pytest.approx(0.5 + 2 / 128)
    eighth, plain = both(torch.bfloat16)
    for cache in (eighth, plain):
        assert cache.num_bytes == cache.bytes_of(tuple(cache.keys.shape), like)


@can
@pytest.mark.parametrize("name", ["dense", "separable"])
def test_the_engine_of_8_bits_has_it(name):
    """By itself it moves frames less than the maps do."""
    model = MODELS[name]()
    plain, both_parts = stream(open_engine(model)), open_engine(model, "fast", "int8")
    alone = open_engine(model, "fast", "bf16")
    for engine, kind in ((both_parts, Int8KVCache), (alone, KVCache)):
        stack = getattr(engine, "encoder" if name == "separable" else "stack")
        assert stack.cache_kind is kind
    stack.cache_kind = Int8KVCache
    found = stream(alone)
    assert 0 < (found - plain).norm() < 0.05 * plain.norm()
    assert (found - plain).norm() < (stream(both_parts) - plain).norm()
