"""The fast engine computes what the model computes: every join, memory, guidance and solver."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from scd.data.spaces import ConditionSpec
from scd.engine.layers import Attention, PackedLinear, blocks_of, by_halves, rotate_halves
from scd.engine.modulation import Modulations
from scd.engine.open import advised_threads, open_engine
from scd.engine.separable import FastSeparable
from scd.models.attention import explicit_attention, frame_positions, rotary_table, rotate
from scd.models.config import BlockConfig, CacheConfig, LayerSkip
from scd.training.presets import preset
from tests.tiny import BLOCK, COMPOSITE, SHAPE, random_conditions, tiny_dense, tiny_separable

JOINS = ("token_concat", "token_concat_projected", "channel_concat", "add", "prefix")
FP32 = 2e-5
"""Largest difference of a frame in float32, over 7 frames that feed on each other."""
BF16 = 2.5
"""How much further from the float32 model the fast engine in bfloat16 may be than the model itself
in bfloat16, in root mean square: both only round, and over frames that feed on each other single
cases differ either way."""


@pytest.fixture(autouse=True)
def same_weights():
    torch.manual_seed(0)


def stream(engine, spec, num_given=3, num_frames=7, guidance="none", batch=2, seed=0, parts=()):
    """Frames of a short rollout, each made from the one before; solvers in turn."""
    generator = torch.Generator().manual_seed(seed)
    twice = guidance == "conditions"
    given = torch.randn(batch, num_given, *SHAPE.shape, generator=generator)
    given = given.to(engine.device, engine.dtype)
    conditions = random_conditions(spec, batch, num_given + num_frames, generator)
    conditions = conditions.to(engine.device)
    if twice:
        conditions, given = conditions.with_null_branch(parts), torch.cat([given, given])
    begin = given if num_given else None
    state = engine.begin(begin, conditions.frames(0, num_given), given.shape[0])
    frames = []
    for index in range(num_given, num_given + num_frames):
        now = conditions.frames(index, index + 1)
        context = engine.context(state, now)
        noise = torch.randn(batch, *SHAPE.shape, generator=generator).to(engine.device)
        corruption = torch.randn(batch, SHAPE.num_tokens, BLOCK.width, generator=generator)
        corruption = corruption.to(engine.device)
        if guidance == "context_noise":
            context = engine.with_noisy_branch(context, 0.3, corruption)
        fresh = torch.randn(2, batch, *SHAPE.shape, generator=generator).to(engine.device)
        solver = ("renoise", "euler", "heun")[index % 3]
        fresh = fresh if solver == "renoise" else None
        scale = None if guidance == "none" else 1.7
        frame = engine.denoise(context, noise, [1.0, 0.7, 0.3, 0.0], solver, scale, fresh)
        engine.observe(state, torch.cat([frame, frame]) if twice else frame, now)
        frames.append(frame.float().cpu())
    return torch.stack(frames, dim=1)


def check(model, **options):
    """Compare both precisions of the fast engine with the plain model in float32."""
    spec = model.config.conditions
    plain = stream(open_engine(model), spec, **options)
    assert plain.std() > 0.3
    fast = stream(open_engine(model, "fast"), spec, **options)
    torch.testing.assert_close(fast, plain, atol=FP32, rtol=0)
    rounded = stream(open_engine(model, "plain", "bf16"), spec, **options)
    half = stream(open_engine(model, "fast", "bf16"), spec, **options)
    assert 0 < (half - plain).norm() < BF16 * (rounded - plain).norm()
    assert (half - plain).norm() < 0.08 * plain.norm()


@pytest.mark.parametrize("guidance", ["none", "conditions", "context_noise"])
@pytest.mark.parametrize("predict", ["velocity", "clean"])
@pytest.mark.parametrize("join", JOINS)
def test_separable(join, predict, guidance):
    # The window of 4 frames is full from the start and wraps many times.
    model = tiny_separable(join, predict=predict, cache=CacheConfig(window=4, num_sinks=1))
    check(model, guidance=guidance)


@pytest.mark.parametrize("guidance", ["none", "conditions"])
@pytest.mark.parametrize("predict", ["velocity", "clean"])
def test_dense(predict, guidance):
    model = tiny_dense(predict=predict, cache=CacheConfig(window=4, num_sinks=1))
    check(model, guidance=guidance)


@pytest.mark.parametrize("guidance", ["none", "conditions"])
@pytest.mark.parametrize(
    "settings",
    [
        {"skip": LayerSkip(first=1, stop=3, below=0.5)},
        {"skip": LayerSkip(first=0, stop=1, below=1.0), "num_diagonal": 2},
        {"num_diagonal": 1, "block": replace(BLOCK, distance_bias=0.2)},
    ],
)
def test_dense_with_skipped_and_diagonal_layers(settings, guidance):
    model = tiny_dense(cache=CacheConfig(window=4, num_sinks=1), **settings)
    check(model, guidance=guidance)
    check(model, guidance=guidance, num_given=0)


@pytest.mark.parametrize(
    "cache",
    [
        CacheConfig(window=16, num_sinks=1),
        CacheConfig(window=3, num_sinks=0),
        CacheConfig(window=5, num_sinks=2, rebase_sinks=False),
        CacheConfig(window=1, num_sinks=0),
    ],
)
@pytest.mark.parametrize("num_given", [0, 1, 6])
@pytest.mark.parametrize("make", [tiny_separable, tiny_dense])
def test_memory(make, num_given, cache):
    check(make(cache=cache), num_given=num_given, batch=1)


@pytest.mark.parametrize(
    "spec",
    [
        ConditionSpec(),
        ConditionSpec(num_labels=3),
        ConditionSpec(num_actions=3, num_labels=2),
        ConditionSpec(action_dim=2),
        COMPOSITE,
    ],
)
@pytest.mark.parametrize("make", [tiny_separable, tiny_dense])
def test_conditions(make, spec):
    guided = "conditions" if spec.has_actions or spec.num_labels else "none"
    check(make(conditions=spec), guidance=guided)


@pytest.mark.parametrize("make", [tiny_separable, tiny_dense])
def test_a_part_of_actions_is_hidden_alone(make):
    model = make(conditions=COMPOSITE)
    check(model, guidance="conditions", parts=(True, False, False, True))


@pytest.mark.parametrize("make", [tiny_separable, tiny_dense])
def test_positions_bias_and_missing_parts(make):
    block = BlockConfig(
        width=32,
        head_dim=16,
        rotary_axes=(4, 6, 6),
        rotary_theta=10.0,
        learned_positions=True,
        distance_bias=0.2,
    )
    check(make(block=block))
    if make is tiny_separable:
        check(make(start_frame=False))


@pytest.mark.parametrize("make", [tiny_separable, tiny_dense])
@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_renoising_is_the_loop_written_by_hand(make, kind):
    model = make()
    engine, generator = open_engine(model, kind), torch.Generator().manual_seed(0)
    conditions = random_conditions(model.config.conditions, 2, 1, generator)
    noise, *fresh = torch.randn(4, 2, *SHAPE.shape, generator=generator)
    times = [1.0, 0.9375, 5 / 6, 0.625, 0.0]
    with torch.no_grad():
        context = model.context(model.begin(None, conditions, 2), conditions)
        noisy = noise
        for index, time in enumerate(times[:-1]):
            velocity = model.velocity(context, noisy, torch.full((2,), time).double())
            clean = noisy - time * velocity
            if index < 3:
                noisy = (1 - times[index + 1]) * clean + times[index + 1] * fresh[index]
    context = engine.context(engine.begin(None, conditions, 2), conditions)
    found = engine.denoise(context, noise, times, "renoise", step_noise=torch.stack(fresh))
    torch.testing.assert_close(found, clean, atol=FP32, rtol=0)
    # Other fresh noise makes another frame; a missing one, or one too many, is refused.
    other = engine.denoise(context, noise, times, "renoise", step_noise=-torch.stack(fresh))
    assert (other - clean).abs().max() > 1e-3
    with pytest.raises(ValueError, match="4 steps of solver 'renoise' need 3 step noises, got 0"):
        engine.denoise(context, noise, times, "renoise")
    with pytest.raises(ValueError, match="4 steps of solver 'euler' need 0 step noises, got 3"):
        engine.denoise(context, noise, times, step_noise=torch.stack(fresh))


def test_velocity_of_frames_at_their_own_times():
    skipping = tiny_dense(skip=LayerSkip(first=1, stop=2, below=0.5), num_diagonal=1)
    for model in (tiny_separable("prefix"), tiny_separable(), tiny_dense(), skipping):
        engines = open_engine(model), open_engine(model, "fast")
        generator = torch.Generator().manual_seed(0)
        noisy = torch.randn(2, *SHAPE.shape, generator=generator)
        conditions = random_conditions(model.config.conditions, 2, 1, generator)
        time = torch.tensor([0.9, 0.2])
        plain, fast = (
            engine.velocity(
                engine.context(engine.begin(None, conditions, 2), conditions), noisy, time
            )
            for engine in engines
        )
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=0)


def test_a_context_may_be_asked_for_again():
    engine = open_engine(tiny_separable(), "fast")
    generator = torch.Generator().manual_seed(0)
    first, second = (random_conditions(engine.config.conditions, 1, 1, generator) for _ in "ab")
    state = engine.begin(None, first)
    wanted = engine.context(state, second)
    engine.context(state, first)
    again = engine.context(state, second)
    assert torch.equal(again.tokens, wanted.tokens)
    assert not torch.equal(engine.context(state, first).tokens, wanted.tokens)


def test_the_model_stays_as_it_was_unless_released():
    model = tiny_separable("prefix")
    before, fresh = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    spec = model.config.conditions
    wanted = stream(open_engine(model, "fast", "bf16"), spec)
    kept = stream(open_engine(model, "fast"), spec)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == torch.float32
    assert torch.equal(stream(open_engine(model, "fast", release=True), spec), kept)
    for part in (model.encoder, model.decoder):
        linear = [name for name, _ in part.blocks.named_parameters() if not name.endswith("_norm")]
        assert all(part.blocks.get_parameter(name).numel() == 0 for name in linear)
    assert torch.equal(stream(open_engine(fresh, "fast", "bf16", release=True), spec), wanted)


def test_small_models_are_advised_one_thread():
    assert advised_threads(preset("doom-64").model) == 1
    assert advised_threads(preset("scd-m").model) == torch.get_num_threads()


def test_unknown_engine_and_precision():
    model = tiny_separable()
    with pytest.raises(ValueError, match="plain.*fast.*got 'quick'"):
        open_engine(model, "quick")
    with pytest.raises(ValueError, match="fp32.*bf16.*got 'fp16'"):
        open_engine(model, "fast", "fp16")
    with pytest.raises(ValueError, match="separable"):
        open_engine(tiny_dense(), "fast").with_noisy_branch(None, 0.1, torch.zeros(1))


@pytest.mark.parametrize("num_keys", [1, 40, 700, 3000])
@pytest.mark.parametrize("ring", [False, True])
def test_attention_equals_explicit_softmax(num_keys, ring):
    generator = torch.Generator().manual_seed(num_keys)
    room = num_keys + 5 * ring
    q, k, v = (
        torch.randn(2, 4, size, 16, generator=generator).bfloat16() for size in (64, room, room)
    )
    k, v = k[:, :, :num_keys], v[:, :, :num_keys]
    q = q / 4
    exact = explicit_attention(4 * q.float(), k.float(), v.float(), None)
    attend = Attention()
    for _ in range(2):
        torch.testing.assert_close(attend(q, k, v).float(), exact, atol=0.04, rtol=0)
    wide = attend(q.float(), k.float(), v.float())
    torch.testing.assert_close(wide, exact, atol=1e-5, rtol=0)


def test_rotation_by_halves_is_the_same_rotation():
    positions = frame_positions(torch.tensor([3, 7]), 2, 3)
    rotary = rotary_table(positions, (4, 6, 6), 10.0)
    x = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    expected = by_halves(rotate(x, rotary))
    torch.testing.assert_close(rotate_halves(by_halves(x), rotary), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_the_same_product(dtype, activation):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 640, generator=generator).to(dtype) / 25
    bias, x = torch.randn(512, generator=generator).to(dtype), torch.randn(3, 7, 640).to(dtype)
    linear = PackedLinear(weight, bias, 7, activation)
    assert linear.packed is not None and linear.plain is None
    expected = x.float() @ weight.float().t() + bias.float()
    if activation == "gelu":
        expected = torch.nn.functional.gelu(expected, approximate="tanh")
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(linear(x).float(), expected, atol=tolerance, rtol=1e-2)


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_small_weights_lie_both_ways_and_give_the_same_product(monkeypatch, activation):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(96, 64, generator=generator) / 8, torch.zeros(96)
    few, many = (torch.randn(rows, 64, generator=generator) for rows in (8, 400))
    linear = PackedLinear(weight, bias, 16, activation)
    assert linear.packed is not None and linear.plain is weight
    taken = []
    packed = torch.ops.mkldnn._linear_pointwise

    def counted(x, *others):
        taken.append(len(x))
        return packed(x, *others)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    expected = functional.linear(many, weight)
    expected = functional.gelu(expected, approximate="tanh") if activation == "gelu" else expected
    torch.testing.assert_close(linear(many), expected, atol=1e-5, rtol=0)
    linear(few)
    assert taken == [400]


def test_a_table_of_modulations_is_made_once():
    model = tiny_separable()
    decoder = model.decoder
    embeds, blocks = (decoder.embed_time, decoder.embed_conditions), blocks_of(decoder.blocks)
    table = Modulations(*embeds, blocks, decoder.head.modulation, False)
    calls = []
    embed = decoder.embed_time.forward
    decoder.embed_time.forward = lambda *inputs: calls.append(1) or embed(*inputs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            conditions = random_conditions(model.config.conditions, 2, 1, generator)
            found = table.at([1.0, 0.5], conditions)
            times = torch.tensor([1.0, 0.5])[:, None].expand(2, 2).flatten()
            each = table.of_each(times, conditions.concat(conditions))
            torch.testing.assert_close(found.flatten(0, 1), each, atol=1e-5, rtol=0)
    assert len(calls) == 1 + 3
    assert table.num_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("join", JOINS)
def test_a_compiled_step_gives_the_same_frames(join):
    model = tiny_separable(join)
    spec = model.config.conditions
    compiled = FastSeparable(model, compile_step=True)
    wanted = stream(open_engine(model), spec)
    torch.testing.assert_close(stream(compiled, spec), wanted, atol=FP32, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("guidance", ["none", "conditions", "context_noise"])
@pytest.mark.parametrize("join", ["token_concat", "prefix"])
def test_graphs_give_the_same_frames(join, guidance):
    model = tiny_separable(join, cache=CacheConfig(window=4, num_sinks=1)).cuda()
    spec, told = model.config.conditions, []
    plain = stream(open_engine(model), spec, guidance=guidance)
    engine = FastSeparable(model, report=told.append)
    for _ in range(2):
        fast = stream(engine, spec, guidance=guidance)
        torch.testing.assert_close(fast, plain, atol=1e-3, rtol=0)
    assert any("compiling" in line for line in told) and len(told) == 6
