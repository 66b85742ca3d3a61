"""The formulas of a frame's cost count what the models do."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scd.data.clip import Conditions
from scd.data.spaces import ConditionSpec
from scd.engine.plain import PlainEngine
from scd.models.build import build, frame_cost, num_parameters
from scd.models.config import BlockConfig, CacheConfig, Join, LayerSkip
from scd.models.cost import FrameCost, Load
from scd.training.presets import preset
from tests.tiny import ACTIONS, COMPOSITE, random_conditions, tiny_dense, tiny_separable

WINDOW, BATCH, STEPS = 4, 2, 3
CACHE = CacheConfig(window=WINDOW, num_sinks=1)
VECTORS = ConditionSpec(action_dim=3, num_labels=5)
LEARNED = BlockConfig(width=48, head_dim=16, rotary_axes=(4, 6, 6), learned_positions=True)

MODELS = {
    **{join: lambda join=join, **given: tiny_separable(join, **given) for join in get_args(Join)},
    "dense": tiny_dense,
    "dense, diagonal": lambda **given: tiny_dense(num_diagonal=1, **given),
}


def counted_frame(model, guidance: str) -> dict[str, int]:
    """Run one frame of streams whose windows are full and count each part's operations."""
    engine, generator = PlainEngine(model), torch.Generator().manual_seed(0)
    memories = 2 if guidance == "conditions" else 1
    rows = BATCH * memories
    conditions = random_conditions(model.config.conditions, rows, 2 * WINDOW, generator)
    clean = torch.randn(rows, 2 * WINDOW - 1, *model.shape.shape, generator=generator)
    state = engine.begin(clean, conditions.frames(0, 2 * WINDOW - 1))
    now = conditions.frames(2 * WINDOW - 1, None)
    noise = torch.randn(BATCH, *model.shape.shape, generator=generator)
    counted = {}

    def count(name, function):
        # The fused kernel of a CPU is not counted, its two products are.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            result = function()
        counted[name] = counter.get_total_flops()
        return result

    context = count("context", lambda: engine.context(state, now))
    if guidance == "context_noise":
        tokens = torch.randn(BATCH, model.shape.num_tokens, model.config.block.width)
        context = count("noisy", lambda: engine.with_noisy_branch(context, 0.1, tokens))
    scale = None if guidance == "none" else 1.5
    times = torch.linspace(1, 0, STEPS + 1).tolist()
    frame = count("steps", lambda: engine.denoise(context, noise, times, scale=scale))
    frame = torch.cat([frame] * memories)
    count("memory", lambda: engine.observe(state, frame, now))
    return counted


def cost_of(model, guidance: str = "none") -> FrameCost:
    streams = Load(
        num_context_frames=WINDOW,
        batch=BATCH,
        branches=1 if guidance == "none" else 2,
        memories=2 if guidance == "conditions" else 1,
    )
    return frame_cost(model.config, streams)


@pytest.mark.parametrize("guidance", ["none", "conditions", "context_noise"])
@pytest.mark.parametrize("conditions", [ACTIONS, VECTORS, COMPOSITE, ConditionSpec()])
@pytest.mark.parametrize("name", MODELS)
def test_operations_are_those_that_a_frame_takes(name, conditions, guidance):
    if guidance == "context_noise" and name.startswith("dense"):
        pytest.skip("a dense model has no context to corrupt")
    model = MODELS[name](conditions=conditions, cache=CACHE)
    counted, cost = counted_frame(model, guidance), cost_of(model, guidance)
    before = counted["context"] + counted.get("noisy", 0)
    # Not in the formula: operations element by element, and the look-up of actions and labels.
    assert cost.encoder_flops + cost.prepare_flops == pytest.approx(before, rel=0.01)
    assert STEPS * cost.step_flops == pytest.approx(counted["steps"], rel=0.01)
    assert cost.memory_flops == pytest.approx(counted["memory"], rel=0.01)
    assert cost.flops(STEPS) == pytest.approx(sum(counted.values()), rel=0.01)


@pytest.mark.parametrize("num_diagonal", [0, 2])
@pytest.mark.parametrize(("below", "num_light"), [(0.2, 0), (0.5, 1), (0.9, 2)])
def test_steps_that_skip_layers_are_counted_as_they_are(below, num_light, num_diagonal):
    skip = LayerSkip(first=1, stop=2, below=below)
    model = tiny_dense(cache=CACHE, skip=skip, num_diagonal=num_diagonal)
    counted, cost = counted_frame(model, "none"), cost_of(model)
    times = torch.linspace(1, 0, STEPS + 1).tolist()
    for given in (None, times):
        steps = cost.flops(STEPS, given) - cost.prepare_flops - cost.memory_flops
        assert steps == STEPS * cost.step_flops - num_light * cost.light_flops
        assert steps == pytest.approx(counted["steps"], rel=0.01)
        saved = STEPS * cost.step_bytes - (cost.bytes(STEPS, given) - cost.bytes(0))
        assert saved == num_light * cost.light_bytes
    # A layer of a diagonal model reads no memory, so skipping it moves fewer bytes less.
    seeing = cost_of(tiny_dense(cache=CACHE, skip=skip))
    assert (cost.light_bytes < seeing.light_bytes) == (num_diagonal == 2)


@pytest.mark.parametrize("block", [None, LEARNED])
@pytest.mark.parametrize("conditions", [ACTIONS, VECTORS, COMPOSITE])
@pytest.mark.parametrize("name", MODELS)
def test_weights_are_counted_exactly(name, conditions, block):
    model = MODELS[name](conditions=conditions, **({"block": block} if block else {}))
    assert cost_of(model).weight_bytes == 4 * num_parameters(model)


@pytest.mark.parametrize("name", ["toy", "toy-dense", "scd-m", "scd-md", "dense-b"])
def test_presets_are_counted_without_their_weights(name):
    config = preset(name).model
    with torch.device("meta"):
        parameters = num_parameters(build(config))
    cost = frame_cost(config, Load(num_context_frames=8, bytes_per_value=2))
    assert cost.weight_bytes == 2 * parameters


@pytest.mark.parametrize("name", MODELS)
def test_caches_are_counted_exactly(name):
    model = MODELS[name](cache=CACHE)
    state = model.begin(
        torch.zeros(BATCH, 1, *model.shape.shape),
        Conditions(actions=torch.zeros(BATCH, 1, dtype=torch.long)),
    )
    cost = cost_of(model)
    assert cost.cache_bytes == state.cache.num_bytes
    assert cost.memory_needed == cost.weight_bytes + cost.cache_bytes + cost.prefix_bytes


def test_the_prefix_is_what_a_frame_prepares():
    model = tiny_separable("prefix", cache=CACHE)
    state = model.begin(None, Conditions(), BATCH)
    now = Conditions(actions=torch.zeros(BATCH, 1, dtype=torch.long))
    held = model.context(state, now).prepared.keys_values
    size = sum(part.numel() * part.element_size() for pair in held for part in pair)
    assert cost_of(model).prefix_bytes == size


def test_bytes_grow_with_what_is_read():
    model = tiny_separable("prefix", cache=CACHE)
    one, two = (frame_cost(model.config, Load(num_context_frames=WINDOW, batch=b)) for b in (1, 2))
    assert one.weight_bytes == two.weight_bytes
    assert two.cache_bytes == 2 * one.cache_bytes
    assert two.bytes(3) - one.bytes(3) == one.cache_bytes + 4 * one.prefix_bytes
    # Every weight moves at least once, and no more than once per pass.
    assert one.bytes(1) >= one.weight_bytes
    assert one.bytes(5) - one.bytes(4) == one.step_bytes < one.weight_bytes


@pytest.mark.parametrize(("join", "gflops"), [("token_concat", 154), ("prefix", 94)])
def test_counts_of_the_paper_shape(join, gflops):
    """8 + 4 layers, width 1024, 64 tokens, 10 steps, 64 frames of context, counted by hand."""
    config = preset("scd-m").model
    config = replace(config, decoder=replace(config.decoder, join=join))
    counted = frame_cost(config, Load(num_context_frames=64)).flops(10)
    # By hand the last joint layer was counted in full: q, out and MLP of 64 tokens that nobody
    # reads, 20 n d^2, and their attention.
    unread = 10 * (20 * 64 * 1024**2 + 4 * 64 * 128 * 1024) if join == "token_concat" else 0
    assert (counted + unread) / 1e9 == pytest.approx(gflops, rel=0.02)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_context_frames": 0}, "num_context_frames must be 1 or more, got 0"),
        ({"num_context_frames": 4, "batch": -1}, "batch must be 1 or more"),
        ({"num_context_frames": 4, "memories": 2}, "1 branches cannot have 2 memories"),
    ],
)
def test_impossible_streams_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Load(**given)
