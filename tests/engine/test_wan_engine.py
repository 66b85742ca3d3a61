"""The fast engine of Wan models computes what the model computes, and each thing once."""

import copy

import pytest
import torch

from scd.data.clip import Conditions
from scd.engine import wan_stack
from scd.engine.interface import Engine
from scd.engine.open import open_engine
from scd.engine.pool import FramePool, NewFrame, pool_bytes
from scd.engine.wan import FastWanSeparable
from scd.models.config import CacheConfig
from scd.models.flow import num_step_noises
from scd.models.wan.config import WanDecoderConfig, WanEncoderConfig
from tests.tiny_wan import BLOCK, SHAPE, TEXT, random_text, tiny_wan, tiny_wan_separable

FP32 = 2e-5
"""Largest difference of a frame in float32, over frames that feed on each other."""
BF16 = 2.5
"""How much further from the float32 model the fast engine in bfloat16 may be than the model itself
in bfloat16, in root mean square."""

WINDOW = CacheConfig(window=4, num_sinks=1)
"""Full after four frames; then it wraps, and its sinks move along."""


def separable(decoder=None, cache=WINDOW, **encoder):
    return tiny_wan_separable(
        WanEncoderConfig(num_layers=3, **encoder),
        decoder or WanDecoderConfig(num_first=2, num_last=1),
        cache,
    )


def blocks_of_two():
    return tiny_wan(4, CacheConfig(window=4, num_sinks=0, rebase_sinks=False), frames_per_block=2)


MODELS = {
    "dense": lambda: tiny_wan(4, WINDOW),
    "dense, in blocks": blocks_of_two,
    "separable": separable,
    "separable, clean context": lambda: separable(
        WanDecoderConfig(num_first=1, num_last=1, context_time="clean")
    ),
    "separable, joined in the middle": lambda: separable(
        WanDecoderConfig(num_first=2, num_last=2, join="middle", context_time="clean")
    ),
    "separable, joined in the last layer": lambda: separable(
        WanDecoderConfig(num_first=2, num_last=1, join="middle")
    ),
    "separable, one layer": lambda: separable(WanDecoderConfig(num_first=1, num_last=0)),
}


def stream(engine: Engine, guidance="none", num_given=2, num_frames=6, batch=2, seed=0):
    """Frames of a short rollout, each made from those before; solvers, times and texts in turn."""
    generator = torch.Generator().manual_seed(seed)
    size, twice = engine.config.frames_per_block, guidance == "conditions"
    shape = (batch, size, *SHAPE.shape) if size > 1 else (batch, *SHAPE.shape)
    texts = [random_text(batch, seed=number) for number in range(2)]
    both = 2 * batch if twice else batch
    if twice:
        texts = [torch.cat([random_text(batch, seed=7), text]) for text in texts]

    def drawn(*sizes):
        return torch.randn(*sizes, generator=generator).to(engine.device, engine.dtype)

    given = drawn(batch, num_given, *SHAPE.shape).repeat(both // batch, 1, 1, 1, 1)
    given = given if num_given else None
    state = engine.begin(given, Conditions(text=texts[0].to(engine.device)), both)
    frames = []
    for index in range(num_frames):
        now = Conditions(text=texts[index >= 4].to(engine.device))
        noise = drawn(*shape)
        reads = noise.repeat(both // batch, 1, 1, 1) if engine.encoder_noise != "none" else None
        context = engine.context(state, now, reads)
        corruption = drawn(batch, SHAPE.num_tokens, BLOCK.width)
        if guidance == "context_noise":
            context = engine.with_noisy_branch(context, 0.3, corruption)
        solver = ("renoise", "euler", "heun")[index % 3]
        times = ([1.0, 0.7, 0.3, 0.0], [1.0, 0.5, 0.0])[index % 2]
        fresh = drawn(2, *shape)[: num_step_noises(times, solver)]
        fresh = fresh if len(fresh) else None
        scale = None if guidance == "none" else 1.7
        frame = engine.denoise(context, noise, times, solver, scale, fresh)
        kept = torch.cat([frame, frame]) if twice else frame
        engine.observe(state, kept, now)
        frames.append(frame.float().cpu())
    return torch.stack(frames, dim=1)


@pytest.mark.parametrize("guidance", ["none", "conditions", "context_noise"])
@pytest.mark.parametrize("name", MODELS)
def test_frames_are_those_of_the_plain_model(name, guidance):
    model = MODELS[name]()
    if guidance == "context_noise" and not model.config.is_separable:
        with pytest.raises(ValueError, match="separable"):
            open_engine(model, "fast").with_noisy_branch(None, 0.1, torch.zeros(1))
        return
    plain = stream(open_engine(model), guidance)
    assert plain.std() > 0.3
    fast = stream(open_engine(model, "fast"), guidance)
    torch.testing.assert_close(fast, plain, atol=FP32, rtol=0)
    rounded = stream(open_engine(model, "plain", "bf16"), guidance)
    half = stream(open_engine(model, "fast", "bf16"), guidance)
    assert 0 < (half - plain).norm() < BF16 * (rounded - plain).norm()


@pytest.mark.parametrize("num_given", [0, 1, 6])
@pytest.mark.parametrize(
    "cache",
    [
        CacheConfig(window=16, num_sinks=0, rebase_sinks=False),
        CacheConfig(window=5, num_sinks=2, rebase_sinks=False),
        CacheConfig(window=1, num_sinks=0),
    ],
)
@pytest.mark.parametrize("make", [separable, lambda cache: tiny_wan(3, cache)])
def test_memory(make, cache, num_given):
    model = make(cache=cache)
    plain, fast = (
        stream(open_engine(model, kind), num_given=num_given, batch=1) for kind in ("plain", "fast")
    )
    torch.testing.assert_close(fast, plain, atol=FP32, rtol=0)


@pytest.mark.parametrize("name", ["separable", "separable, clean context", "dense"])
def test_velocity_of_frames_at_their_own_times(name):
    model, noisy = MODELS[name](), torch.randn(2, *SHAPE.shape)
    conditions, time = Conditions(text=random_text()), torch.tensor([0.9, 0.2])
    found = []
    for kind in ("plain", "fast"):
        engine = open_engine(model, kind)
        state = engine.begin(noisy[:, None], conditions)
        reads = noisy if engine.encoder_noise != "none" else None
        found.append(engine.velocity(engine.context(state, conditions, reads), noisy, time))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)


@pytest.fixture
def filled_up(monkeypatch):
    """Texts of fewer words than they may have, each of another number; how many are kept."""
    kept, count = [], wan_stack.tokens_kept

    def padded(batch=2, seed=0):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(batch, TEXT.text_length, TEXT.text_dim, generator=generator)
        for row in range(batch):
            text[row, (2, 0, 7, 4)[(row + 3 * seed) % 4] :] = 0
        return text

    def counted(text):
        kept.append(count(text))
        return kept[-1]

    monkeypatch.setattr(wan_stack, "TEXT_PIECE", 2)
    monkeypatch.setattr(wan_stack, "tokens_kept", counted)
    monkeypatch.setitem(globals(), "random_text", padded)
    return kept


@pytest.mark.parametrize("name", MODELS)
def test_zeros_behind_a_text_are_read_as_one(name, filled_up):
    model = MODELS[name]()
    plain = stream(open_engine(model), "conditions", batch=1)
    assert not filled_up
    fast = stream(open_engine(model, "fast"), "conditions", batch=1)
    torch.testing.assert_close(fast, plain, atol=FP32, rtol=0)
    rounded = stream(open_engine(model, "plain", "bf16"), "conditions", batch=1)
    half = stream(open_engine(model, "fast", "bf16"), "conditions", batch=1)
    assert 0 < (half - plain).norm() < BF16 * (rounded - plain).norm()
    assert min(filled_up) < max(filled_up) <= TEXT.text_length


@pytest.mark.parametrize("name", ["separable", "separable, clean context"])
def test_streams_with_texts_of_several_lengths_share_calls(name, filled_up):
    test_streams_that_share_calls_get_their_own_frames(name)
    assert len(set(filled_up)) > 1


def test_a_text_is_read_once_and_times_are_embedded_once():
    model = separable()
    calls = {"text": 0, "times": 0}
    for part in (model.encoder, model.decoder):
        embedder = part.condition_embedder

        def counted(forward, what):
            def call(*inputs):
                calls[what] += 1
                return forward(*inputs)

            return call

        embedder.text_embedder.forward = counted(embedder.text_embedder.forward, "text")
        embedder.time_embedder.forward = counted(embedder.time_embedder.forward, "times")
    engine = open_engine(model, "fast")
    stream(engine)
    # Two texts for each of two parts; two times of the encoder, two schedules of the decoder.
    assert calls == {"text": 4, "times": 4}


def test_forks_are_independent_and_share_what_they_were_told():
    engine = open_engine(separable(), "fast")
    conditions = Conditions(text=random_text(1))
    state = engine.begin(torch.randn(1, 3, *SHAPE.shape), conditions)
    noise = torch.randn(1, *SHAPE.shape)
    before = engine.context(state, conditions, noise).tokens
    twin, futures = state.fork(), state.fork(3)
    engine.observe(twin, noise, conditions)
    again = engine.context(state, conditions, noise).tokens
    torch.testing.assert_close(again, before)
    many = Conditions(text=random_text(1).expand(3, -1, -1))
    each = engine.context(futures, many, noise.expand(3, -1, -1, -1)).tokens
    torch.testing.assert_close(each, before.expand(3, -1, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["separable", "separable, clean context", "dense"])
def test_streams_that_share_calls_get_their_own_frames(name):
    engine = open_engine(MODELS[name](), "fast")
    shares = isinstance(engine, FastWanSeparable)
    noises = torch.randn(3, 1, *SHAPE.shape)
    schedules = [[1.0, 0.5, 0.0], [1.0, 0.8, 0.2, 0.0], [1.0, 0.0]]
    conditions = [Conditions(text=random_text(1, seed=number)) for number in range(3)]

    def begun():
        states = [
            engine.begin(noise[:, None].repeat(1, number + 1, 1, 1, 1), condition)
            for number, (noise, condition) in enumerate(zip(noises, conditions, strict=True))
        ]
        reads = list(noises) if shares else [None] * 3
        return engine.contexts(states, conditions, reads)

    alone = [
        engine.denoise(context, noise, times)
        for context, noise, times in zip(begun(), noises, schedules, strict=True)
    ]
    pool = FramePool(engine, 4)
    assert pool.num_bytes == pool_bytes(engine, 4)
    contexts = begun()
    frames = pool.add(
        [
            NewFrame(context=context, noise=noise, times=times)
            for context, noise, times in zip(contexts, noises, schedules, strict=True)
        ]
    )
    found = {}
    while pool.num_rows:
        pool.advance()
        for index, frame in enumerate(frames):
            if frame.is_done and index not in found:
                found[index] = pool.latents([frame])
                # The last row moves into the place that becomes free.
                pool.remove(frame)
    for index, expected in enumerate(alone):
        torch.testing.assert_close(found[index], expected, atol=FP32, rtol=0)


@pytest.mark.parametrize("name", ["separable", "dense"])
def test_the_model_stays_as_it_was_unless_released(name):
    model = MODELS[name]()
    before, fresh = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    wanted = stream(open_engine(model, "fast", "bf16"))
    kept = stream(open_engine(model, "fast"))
    for weight, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[weight]) and tensor.dtype == torch.float32
    assert torch.equal(stream(open_engine(model, "fast", release=True)), kept)
    maps = [module for module in model.transformer_blocks()[0].modules() if not module._modules]
    linear = [module for module in maps if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 10 and all(module.weight.numel() == 0 for module in linear)
    assert torch.equal(stream(open_engine(fresh, "fast", "bf16", release=True)), wanted)


def test_noise_and_a_text_are_needed():
    engine = open_engine(separable(), "fast")
    conditions = Conditions(text=random_text(1))
    state = engine.begin(None, conditions)
    with pytest.raises(ValueError, match="reads noise"):
        engine.context(state, conditions)
    with pytest.raises(ValueError, match="embedded text"):
        engine.context(state, Conditions(), torch.zeros(1, *SHAPE.shape))
    with pytest.raises(ValueError, match="whole blocks of 2 frames"):
        open_engine(blocks_of_two(), "fast").begin(torch.zeros(1, 3, *SHAPE.shape), conditions)


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_frames():
    model = separable()
    compiled = FastWanSeparable(model, compile_step=True)
    wanted = stream(open_engine(model))
    torch.testing.assert_close(stream(compiled), wanted, atol=FP32, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("guidance", ["none", "conditions", "context_noise"])
def test_graphs_give_the_same_frames(guidance):
    model, told = separable().cuda(), []
    plain = stream(open_engine(model), guidance)
    engine = FastWanSeparable(model, report=told.append)
    for _ in range(2):
        torch.testing.assert_close(stream(engine, guidance), plain, atol=1e-3, rtol=0)
    assert any("compiling" in line for line in told)
