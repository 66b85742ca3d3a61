"""Wan models behind the one interface: streams are the training pass, and diffusers' own class."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.config import PixelConfig
from scd.data.clip import Conditions
from scd.data.source import DataCard
from scd.data.spaces import ConditionSpec
from scd.engine.plain import PlainEngine
from scd.models.base import Augmentation
from scd.models.block import with_keys_values
from scd.models.build import build, frame_cost, num_parameters
from scd.models.checkpoint import World
from scd.models.config import CacheConfig, Guidance, SamplingConfig
from scd.models.cost import Load
from scd.models.wan.config import WanConfig, WanDecoderConfig, WanEncoderConfig, WanSeparableConfig
from scd.models.wan.dense import WanDiffuser
from scd.models.wan.separable import WanSeparableDiffuser
from scd.objectives.config import DenoiseConfig
from scd.objectives.self_forcing import self_forced
from scd.probing.intercept import without
from scd.probing.models import subject_of
from scd.probing.subject import Task
from scd.streaming.rollout import Rollout
from tests.tiny import denoising_loss
from tests.tiny_wan import (
    BLOCK,
    SHAPE,
    TEXT,
    random_text,
    tiny_transformer,
    tiny_wan,
    tiny_wan_separable,
    wan_clips,
)


def separable(decoder=None, **encoder):
    return tiny_wan_separable(
        encoder=WanEncoderConfig(num_layers=2, **encoder),
        decoder=decoder or WanDecoderConfig(num_first=1, num_last=1),
    )


MODELS = {
    "dense": lambda: tiny_wan(num_layers=2),
    "separable": separable,
    "separable, joined in the middle": lambda: separable(
        WanDecoderConfig(num_first=1, num_last=1, join="middle", context_time="clean")
    ),
    "separable, the same noise": lambda: separable(noise="same"),
}
"""Each with two layers: the first ones are read by others, the last ones are not."""


@pytest.fixture(params=list(MODELS), scope="module")
def model(request):
    return MODELS[request.param]()


def parallel(model, clean, noisy, time, conditions, noise):
    """The training pass, its encoder's noise given."""
    if isinstance(model, WanDiffuser):
        return model(clean, noisy, time, conditions)
    return model(clean, noisy, time, conditions, noise=noise)


def noise_of(model, noise):
    return None if isinstance(model, WanDiffuser) else noise


@torch.no_grad()
@pytest.mark.parametrize("num_given", [0, 3])
def test_training_pass_is_the_stream(model, num_given):
    clean, noisy, time, conditions, noise = wan_clips()
    given = clean[:, :num_given] if num_given else None
    state = model.begin(given, conditions, 2)
    expected = parallel(model, clean, noisy, time, conditions, noise)
    for frame in range(num_given, 5):
        context = model.context(state, conditions, noise_of(model, noise[:, 0, frame]))
        for _ in range(2):
            # The second step must not see what the first one left behind.
            velocity = model.velocity(context, noisy[:, 0, frame], time[:, 0, frame])
        torch.testing.assert_close(velocity, expected[:, 0, frame], atol=5e-6, rtol=5e-6)
        model.observe(state, clean[:, frame], conditions)


@torch.no_grad()
def test_a_frame_depends_on_its_past_and_on_nothing_else(model):
    clean, noisy, time, conditions, noise = wan_clips(batch=1, num_frames=3)
    before = parallel(model, clean, noisy, time, conditions, noise)

    def moved(changed_clean, changed_noisy, changed_noise):
        after = parallel(model, changed_clean, changed_noisy, time, conditions, changed_noise)
        return (after != before).flatten(3).any(-1)[0, 0].tolist()

    for frame in range(3):
        changed = clean.clone()
        changed[:, frame] += 1
        assert moved(changed, noisy, noise) == [target > frame for target in range(3)]
        changed = noisy.clone()
        changed[:, :, frame] += 1
        own = [target == frame for target in range(3)]
        assert moved(clean, changed, noise) == own
        if not isinstance(model, WanDiffuser):
            changed = noise.clone()
            changed[:, :, frame] += 1
            assert moved(clean, noisy, changed) == own


@torch.no_grad()
def test_draws_are_independent_and_share_one_encoder_pass(model):
    clean, noisy, time, conditions, noise = wan_clips(num_draws=3)
    together = parallel(model, clean, noisy, time, conditions, noise)
    for draw in range(3):
        alone = parallel(model, clean, noisy[:, draw, None], time[:, draw, None], conditions, noise)
        torch.testing.assert_close(together[:, draw, None], alone, atol=5e-6, rtol=5e-6)


@torch.no_grad()
def test_a_field_is_the_training_pass(model):
    clean, noisy, time, conditions, _ = wan_clips(num_draws=2)
    field = model.field(clean, conditions, 3, 2)
    expected = model(clean, noisy[:, :, -3:], time[:, :, -3:], conditions)
    torch.testing.assert_close(field(noisy[:, :, -3:], time[:, :, -3:]), expected)


@torch.no_grad()
def test_last_frames_are_denoised_as_among_all(model):
    clean, noisy, time, conditions, noise = wan_clips()
    expected = parallel(model, clean, noisy, time, conditions, noise)[:, :, -2:]
    found = parallel(model, clean, noisy[:, :, -2:], time[:, :, -2:], conditions, noise[:, :, -2:])
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=5e-6)


@torch.no_grad()
def test_forks_are_independent(model):
    clean, noisy, time, conditions, noise = wan_clips()

    def velocity(state):
        context = model.context(state, conditions, noise_of(model, noise[:, 0, 2]))
        return model.velocity(context, noisy[:, 0, 2], time[:, 0, 2])

    state = model.begin(clean[:, :2], conditions)
    expected, twin = velocity(state), state.fork()
    model.observe(twin, clean[:, 2], conditions)
    torch.testing.assert_close(velocity(state), expected, rtol=0, atol=0)
    model.observe(state, clean[:, 2], conditions)
    torch.testing.assert_close(velocity(state), velocity(twin), rtol=0, atol=0)


def windowed(model, cache):
    config = replace(model.config, cache=cache)
    twin = type(model)(config)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


@torch.no_grad()
@pytest.mark.parametrize(("window", "num_sinks"), [(3, 1), (2, 0)])
@pytest.mark.parametrize("name", ["dense", "separable"])
def test_a_full_window_drops_the_oldest_frame_but_the_sinks(name, window, num_sinks):
    cache = CacheConfig(window=window, num_sinks=num_sinks, rebase_sinks=False)
    model = windowed(MODELS[name](), cache)
    clean, noisy, time, conditions, noise = wan_clips(num_frames=6)
    stack = model if isinstance(model, WanDiffuser) else model.encoder
    state = model.begin(clean[:, :5], conditions)
    # The frames in memory see what they saw when they came: their keys stay as they were.
    assert sorted(frame for frame in state.cache.slots if frame is not None) == [
        *range(num_sinks),
        *range(5 - window + num_sinks, 5),
    ]
    context = model.context(state, conditions, noise_of(model, noise[:, 0, 5]))
    velocity = model.velocity(context, noisy[:, 0, 5], time[:, 0, 5])
    expected = plain_window(model, stack, clean, noisy, time, conditions, noise, cache)
    torch.testing.assert_close(velocity, expected, atol=5e-6, rtol=5e-6)


def plain_window(model, stack, clean, noisy, time, conditions, noise, cache):
    """The last frame's velocity with all keys and values in lists, dropped by hand."""
    text = stack.text_keys_values(conditions.text)
    held = [[] for _ in stack.blocks]
    num_others = cache.window - cache.num_sinks - 1

    def run(frames, times, frame, keep):
        x = stack.tokens(frames[:, None])
        embedding, modulation = stack.condition_embedder.times(times[:, None])
        rotary = stack.rotary([frame])
        for layer, block in enumerate(stack.blocks):
            others = held[layer][cache.num_sinks :]
            past = held[layer][: cache.num_sinks] + others[max(0, len(others) - num_others) :]

            def read(q, k, v, past=past):
                keys = torch.cat([*(pair[0] for pair in past), k], dim=2)
                values = torch.cat([*(pair[1] for pair in past), v], dim=2)
                return torch.softmax(q @ keys.mT / q.shape[-1] ** 0.5, -1) @ values

            x, k, v = with_keys_values(block, x, modulation, rotary, read, text[layer])
            if keep:
                held[layer].append((k, v))
        return x, embedding

    for frame in range(5):
        run(clean[:, frame], torch.zeros(2), frame, True)
    if isinstance(model, WanDiffuser):
        x, embedding = run(noisy[:, 0, 5], time[:, 0, 5], 5, False)
        return model.head(x, embedding)[:, 0]
    x, _ = run(noise[:, 0, 5], torch.ones(2), 5, False)
    words = model.decoder.text_keys_values(conditions.text)
    return model.decoder.denoise(x[:, 0], words, noisy[:, 0, 5], time[:, 0, 5])


@torch.no_grad()
def test_sinks_that_move_with_the_window_keep_their_distance():
    # In one layer a frame's keys are its own, so that only distances can differ.
    model = windowed(tiny_wan(num_layers=1), CacheConfig(window=3, num_sinks=1))
    clean, noisy, time, conditions, _ = wan_clips(num_frames=6)
    velocities = []
    for frames in ([0, 4], [0, 1, 2, 3, 4]):
        state = model.begin(clean[:, frames], conditions)
        context = model.context(state, conditions)
        velocities.append(model.velocity(context, noisy[:, 0, 5], time[:, 0, 5]))
    torch.testing.assert_close(*velocities, atol=5e-6, rtol=5e-6)


@torch.no_grad()
@pytest.mark.parametrize("window", [8, 4])
def test_blocks_of_frames_see_each_other_and_the_blocks_before(window):
    cache = CacheConfig(window=window, num_sinks=0, rebase_sinks=False)
    model = tiny_wan(frames_per_block=2, cache=cache)
    clean, noisy, time, conditions, _ = wan_clips(num_frames=6)
    time = time[:, :, ::2].repeat_interleave(2, dim=2)
    expected = model(clean, noisy, time, conditions)
    state = model.begin(clean[:, :2], conditions)
    for first in (2, 4):
        context = model.context(state, conditions)
        block = noisy[:, 0, first : first + 2]
        velocity = model.velocity(context, block, time[:, 0, first])
        if window == 8 or first == 2:
            wanted = expected[:, 0, first : first + 2]
            torch.testing.assert_close(velocity, wanted, atol=5e-6, rtol=5e-6)
        other = block.flip(1)
        assert not torch.allclose(
            model.velocity(context, other, time[:, 0, first]).flip(1), velocity
        )
        model.observe(state, clean[:, first : first + 2], conditions)
    with pytest.raises(ValueError, match="whole blocks of 2 frames"):
        model.begin(clean[:, :3], conditions)
    with pytest.raises(ValueError, match="blocks of 2 frames, got 1"):
        model.velocity(context, noisy[:, 0, 0], time[:, 0, 0])


@torch.no_grad()
def test_without_the_mask_it_is_diffusers_own_model():
    theirs = tiny_transformer()
    model = tiny_wan()
    model.load_state_dict(theirs.state_dict())
    clean, _, _, conditions, _ = wan_clips()
    for time in (0.02, 0.5, 0.937):
        expected = theirs(
            clean.transpose(1, 2), torch.full((2,), 1000 * time), conditions.text, return_dict=False
        )[0].transpose(1, 2)
        ours = model.bidirectional(clean, torch.full((2, 5), time, dtype=torch.float64), conditions)
        # Their sinusoids are float32.
        torch.testing.assert_close(ours, expected, atol=3e-5, rtol=0)


@torch.no_grad()
def test_encoder_layers_are_the_first_of_the_dense_model():
    dense, separable = tiny_wan(), tiny_wan_separable()
    state = dense.state_dict()
    names = separable.encoder.state_dict()
    separable.encoder.load_state_dict({name: state[name] for name in names})
    clean, _, _, conditions, noise = wan_clips()
    seen = []
    hook = dense.blocks[3].register_forward_hook(lambda _, __, output: seen.append(output))
    dense.velocity(
        dense.context(dense.begin(clean[:, :4], conditions), conditions),
        noise[:, 0, 4],
        torch.ones(2),
    )
    hook.remove()
    state = separable.begin(clean[:, :4], conditions)
    context = separable.context(state, conditions, noise[:, 0, 4])
    torch.testing.assert_close(context.tokens, seen[-1][:, 0])


@torch.no_grad()
def test_the_encoder_runs_once_per_frame_and_the_text_once_per_prompt():
    model = tiny_wan_separable()
    _, noisy, time, conditions, noise = wan_clips()
    calls = {"encoder": 0, "decoder": 0, "text": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    hooks = [
        model.encoder.blocks[0].register_forward_hook(count("encoder")),
        model.decoder.blocks[0].register_forward_hook(count("decoder")),
        model.encoder.condition_embedder.text_embedder.register_forward_hook(count("text")),
    ]
    state = model.begin(None, conditions, 2)
    for frame in range(2):
        context = model.context(state, conditions, noise[:, 0, frame])
        for _ in range(3):
            model.velocity(context, noisy[:, 0, frame], time[:, 0, frame])
        model.observe(state, noisy[:, 0, frame], conditions)
    # One pass for the context, one that remembers the finished frame.
    assert calls == {"encoder": 4, "decoder": 6, "text": 1}
    other = Conditions(text=random_text(seed=1))
    changed = model.context(state, other, noise[:, 0, 2])
    assert calls["text"] == 2
    assert not torch.allclose(
        changed.tokens, model.context(state, conditions, noise[:, 0, 2]).tokens
    )
    for hook in hooks:
        hook.remove()


def test_gradient_reaches_every_weight_with_and_without_checkpointing(model):
    clean, noisy, time, conditions, noise = wan_clips()
    gradients = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        parallel(model, clean, noisy, time, conditions, noise).square().mean().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    model.gradient_checkpointing = False
    for name, gradient in gradients[0].items():
        assert gradient is not None and (gradient != 0).any(), name
        torch.testing.assert_close(gradient, gradients[1][name])
    model.zero_grad()


def test_the_objectives_take_it(model):
    clean, _, _, conditions, _ = wan_clips()
    generator = torch.Generator().manual_seed(0)
    config = DenoiseConfig(num_draws=2, context_noise=0.0, condition_dropout=0.0)
    loss, _ = denoising_loss(model, clean, conditions, config, generator)
    loss.backward()
    generated = self_forced(model, clean[:, :1], conditions, 2, [1.0, 0.9], 1, generator)
    assert generated.shape == (2, 2, *SHAPE.shape)
    generated.square().mean().backward()
    model.zero_grad()
    hiding = replace(config, condition_dropout=0.5)
    with pytest.raises(ValueError, match="needs null_text"):
        denoising_loss(model, clean, conditions, hiding, generator)
    hidden = replace(conditions, null_text=torch.zeros_like(conditions.text))
    augment = Augmentation(generator=generator, condition_dropout=0.5)
    dropped = [bool((augment.drop(hidden).text[0] == 0).all()) for _ in range(40)]
    assert 8 < sum(dropped) < 32


def world_of(model):
    return World(
        model=model,
        autoencoder=PixelAutoencoder(PixelConfig()),
        card=DataCard(
            height=4,
            width=6,
            fps=16.0,
            conditions=model.config.conditions,
            action_names=(),
        ),
        sampling=SamplingConfig(num_steps=2, schedule="shifted", shift=5.0),
    )


@pytest.mark.parametrize("kind", ["none", "conditions"])
@pytest.mark.parametrize("name", ["dense", "separable"])
def test_a_rollout_streams_it(name, kind):
    model = MODELS[name]()
    guidance = Guidance() if kind == "none" else Guidance(kind="conditions", scale=2.0)
    rollout = Rollout(world_of(model), guidance=guidance, seed=3)
    steering = Conditions(text=random_text(), null_text=torch.zeros(2, 8, 32))
    rollout.begin(None, steering, batch=2, can_reset=True)
    # Latents of 16 channels are no pictures: each is kept before anything would show it.
    first = [stepped(rollout) for _ in range(2)]
    rollout.reset()
    again = [stepped(rollout) for _ in range(2)]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)
    rollout.reset()
    rollout.change_text(random_text(seed=5))
    assert not torch.allclose(stepped(rollout), first[0])


def stepped(rollout):
    draft = rollout.draft()
    latent = rollout.engine.denoise(
        draft.context,
        draft.noise,
        rollout.times,
        rollout.sampling.solver,
        rollout.guidance_scale,
        draft.step_noise,
    )
    rollout.keep(draft, latent)
    return latent


def test_what_does_not_fit_is_refused(model):
    clean, noisy, time, conditions, noise = wan_clips()
    with pytest.raises(ValueError, match="none was given"):
        model.context(model.begin(None, conditions, 2), Conditions(), noise[:, 0, 0])
    with pytest.raises(ValueError, match="2 streams need as many texts, got 1"):
        model.begin(clean, Conditions(text=conditions.text[:1]))
    rollout = Rollout(world_of(model))
    with pytest.raises(ValueError, match="embedded text, but none"):
        rollout.begin(None)
    with pytest.raises(ValueError, match=r"\[streams, 8, 32\]"):
        rollout.begin(None, Conditions(text=torch.zeros(1, 7, 32)))
    if isinstance(model, WanSeparableDiffuser):
        with pytest.raises(ValueError, match="reads noise"):
            model.context(model.begin(None, conditions, 2), conditions)
        with pytest.raises(ValueError, match="clean frames as history"):
            model(None, noisy, time, conditions)
    else:
        augment = Augmentation(generator=torch.Generator(), context_noise=0.05)
        with pytest.raises(ValueError, match="context_noise must be 0"):
            model(clean, noisy, time, conditions, augment)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="steered by an embedded text, and by actions"):
        WanConfig(shape=SHAPE, block=BLOCK, conditions=ConditionSpec(num_actions=2))
    with pytest.raises(ValueError, match="whole blocks"):
        WanConfig(conditions=TEXT, frames_per_block=4, cache=CacheConfig(window=6, num_sinks=0))
    with pytest.raises(ValueError, match="'fresh' or the 'same'"):
        WanEncoderConfig(noise="none")
    with pytest.raises(ValueError, match="1 layer or more"):
        WanDecoderConfig(num_first=0, num_last=0)
    with pytest.raises(ValueError, match="both a length and a dimension"):
        ConditionSpec(text_length=3)


@torch.no_grad()
def test_operations_and_weights_are_those_that_a_frame_takes(model):
    model = windowed(model, CacheConfig(window=3, num_sinks=0, rebase_sinks=False))
    clean, noisy, _, conditions, noise = wan_clips(num_frames=4)
    cost = frame_cost(model.config, Load(num_context_frames=3, batch=2))
    engine = PlainEngine(model)
    state = engine.begin(clean[:, :3], conditions)
    counted = {}

    def count(name, function):
        # The fused kernel of a CPU is not counted, its two products are.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            result = function()
        counted[name] = counter.get_total_flops()
        return result

    engine.context(state, conditions, noise[:, 0, 3])
    context = count("context", lambda: engine.context(state, conditions, noise[:, 0, 3]))
    frame = count("steps", lambda: engine.denoise(context, noisy[:, 0, 3], [1.0, 0.5, 0.0]))
    count("memory", lambda: engine.observe(state, frame, conditions))
    assert cost.encoder_flops == pytest.approx(counted["context"], rel=0.01)
    assert 2 * cost.step_flops == pytest.approx(counted["steps"], rel=0.01)
    assert cost.memory_flops == pytest.approx(counted["memory"], rel=0.01)
    assert cost.weight_bytes == 4 * num_parameters(model)
    words = sum(part.numel() for pair in state.text.layers for part in pair)
    assert cost.cache_bytes == state.cache.num_bytes + 4 * words


def test_a_full_size_model_has_as_many_weights_as_published():
    with torch.device("meta"):
        sizes = [num_parameters(build(config)) for config in (WanConfig(), WanSeparableConfig())]
    # Wan2.1's own count; and 35 of its layers, with embedders for each part.
    assert sizes == [1_418_996_800, 1_676_874_560]


@torch.no_grad()
@pytest.mark.parametrize("name", ["dense", "separable, joined in the middle"])
def test_the_probe_sees_frames_and_not_the_text(name):
    model = MODELS[name]()
    clean, _, _, conditions, _ = wan_clips(num_frames=4)
    subject, looks = subject_of(model), []
    task = Task(clean=clean, conditions=conditions, noise=torch.randn(2, *SHAPE.shape))
    with subject.watch_attention(looks.append):
        state = task.begin(subject)
        subject.velocity(state, task.noise, 1.0)
    assert [look.layer for look in looks] == list(range(len(subject.layers)))
    for look in looks:
        layer = subject.layers[look.layer]
        assert len(look.distances) == look.k.shape[-2]
        if isinstance(model, WanDiffuser) or layer.once:
            assert sorted(set(look.distances)) == [0, 1, 2, 3]
    full = task.error(subject, task.begin(subject), 0.5)
    for layer in subject.layers:
        with without([layer]):
            less = task.error(subject, task.begin(subject), 0.5)
        assert not torch.allclose(full, less)
