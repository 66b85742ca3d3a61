"""Our models as subjects: the same velocities as the models, and layers that can be taken out."""

import copy

import pytest
import torch

from scd.models.attention import explicit_attention
from scd.models.config import CacheConfig
from scd.models.flow import interpolate, velocity_between
from scd.probing.intercept import Layer, change_held, held, newest, recorded, replaced, without
from scd.probing.models import subject_of
from scd.probing.subject import CONTEXT, Task
from tests.tiny import ACTIONS, random_conditions, tiny_dense, tiny_separable

SEPARABLE = ["token_concat", "token_concat_projected", "channel_concat", "add", "prefix"]
MODELS = {"dense": tiny_dense} | {
    join: lambda join=join: tiny_separable(join=join) for join in SEPARABLE
}


def task_for(model, num_clips=2, num_frames=4, num_noises=1):
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(num_clips, num_frames, *model.shape.shape, generator=generator)
    conditions = random_conditions(model.config.conditions, num_clips, num_frames, generator)
    return Task.of(clean, conditions, num_noises=num_noises)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@torch.no_grad()
def test_a_subject_computes_what_the_model_computes(model):
    task = task_for(model)
    subject = subject_of(model)
    state = task.begin(subject)
    for time in (0.9, 0.3):
        times = torch.full((2, 1, 1), time)
        noisy = interpolate(task.frame, task.noise, times[:, 0, 0])
        expected = model(task.clean, noisy[:, None, None], times, task.conditions)[:, 0, 0]
        torch.testing.assert_close(
            subject.velocity(state, noisy, time), expected, atol=1e-5, rtol=1e-4
        )
        error = (expected - velocity_between(task.frame, task.noise)).square().mean((1, 2, 3))
        torch.testing.assert_close(task.error(subject, state, time), error, atol=1e-4, rtol=1e-4)


def test_layers_are_named_and_counted_from_one():
    assert [layer.name for layer in subject_of(tiny_dense()).layers] == [
        "layer 1",
        "layer 2",
        "layer 3",
    ]
    subject = subject_of(tiny_separable())
    assert [(layer.name, layer.once) for layer in subject.layers] == [
        ("encoder 1", True),
        ("encoder 2", True),
        ("decoder 1", False),
        ("decoder 2", False),
    ]
    assert subject.stepped == [2, 3]
    assert subject.places(None) == [0, 1, 2, 3] and subject.places([4, 1]) == [3, 0]
    for wrong in ([0], [5], [1, 1], []):
        with pytest.raises(ValueError, match=r"1 \.\. 4"):
            subject.places(wrong)


@torch.no_grad()
def test_watched_attention_is_what_the_layer_reads(model):
    """From q, k and bias alone: the weights that the layer used."""
    subject, task = subject_of(model), task_for(model)
    state = task.begin(subject)
    plain = subject.velocity(state, task.noise, 1.0)
    attentions = []
    with subject.watch_attention(attentions.append):
        begun = task.begin(subject)
        in_begin = len(attentions)
        watched = subject.velocity(begun, task.noise, 1.0)
    torch.testing.assert_close(watched, plain, atol=1e-6, rtol=0)
    assert [attention.layer for attention in attentions[in_begin:]] == subject.stepped
    assert {attention.layer for attention in attentions[:in_begin]} == {
        place for place, layer in enumerate(subject.layers) if layer.once
    }
    for attention in attentions:
        assert attention.q.shape == (2, subject.num_heads, subject.tokens_per_frame, 16)
        assert len(attention.distances) == attention.k.shape[2] and attention.bias is None
        values = torch.randn(attention.k.shape, generator=torch.Generator().manual_seed(1))
        assert explicit_attention(attention.q, attention.k, values, None).isfinite().all()


def test_distances_of_keys():
    n = 6
    seen = {}
    for name, model in (("dense", tiny_dense()), ("joint", tiny_separable())):
        subject, task = subject_of(model), task_for(model)
        with subject.watch_attention(
            lambda attention, name=name: seen.update(
                {(name, attention.layer): list(attention.distances)}
            )
        ):
            subject.velocity(task.begin(subject), task.noise, 1.0)
    assert seen["dense", 2] == [3] * n + [2] * n + [1] * n + [0] * n
    # Rows of a stream: the start frame, frames 0, 1 and 2, whose row is the context of frame 3.
    assert seen["joint", 1] == [3] * n + [2] * n + [1] * n + [0] * n
    assert seen["joint", 3] == [CONTEXT] * n + [0] * n


def test_distances_in_a_memory_that_has_wrapped():
    cache = CacheConfig(window=3, num_sinks=0)
    subject = subject_of(tiny_dense(cache=cache))
    task = task_for(subject.model, num_frames=6)
    attentions = []
    with subject.watch_attention(attentions.append):
        subject.velocity(task.begin(subject), task.noise, 1.0)
    # Frames 3, 4 and 5 lie in places 0, 1 and 2 of the ring.
    assert list(attentions[-1].distances) == [2] * 6 + [1] * 6 + [0] * 6


@torch.no_grad()
def test_own_frame_only_is_a_model_without_a_past():
    """All layers narrowed: the frame is made as if it were the first, but for its position."""
    model = tiny_dense(conditions=ACTIONS)
    subject, task = subject_of(model), task_for(model)
    state = task.begin(subject)
    with subject.own_frame_only([0, 1, 2]):
        narrowed = subject.velocity(state, task.noise, 1.0)
    last = task.conditions.frames(3, 4)
    alone = model.context(model.begin(None, last, batch=2), last)
    expected = model.velocity(alone, task.noise, torch.ones(2))
    torch.testing.assert_close(narrowed, expected, atol=1e-5, rtol=1e-4)
    assert (subject.velocity(state, task.noise, 1.0) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_layers_held_at_their_own_outputs_change_nothing(model):
    subject, task = subject_of(model), task_for(model)
    state = task.begin(subject)
    stepped = [subject.layers[place] for place in subject.stepped]
    with recorded(stepped) as calls:
        plain = subject.velocity(state, task.noise, 1.0)
    for num in range(1, len(stepped) + 1):
        front = stepped[:num]
        with held(front, [calls[place] for place in range(num)]):
            assert torch.equal(subject.velocity(state, task.noise, 1.0), plain)
        with change_held(front, [calls[place] for place in range(num)]):
            torch.testing.assert_close(
                subject.velocity(state, task.noise, 1.0), plain, atol=1e-5, rtol=1e-4
            )
    output = newest(calls[0].output, subject.tokens_per_frame)
    assert output.shape == (2, subject.tokens_per_frame, subject.width)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["held", "change_held", "without"])
def test_layers_that_are_left_out_are_not_computed(kind):
    subject = subject_of(tiny_dense())
    task = task_for(subject.model)
    state = task.begin(subject)
    with recorded(subject.layers) as calls:
        subject.velocity(state, task.noise, 1.0)
    front = subject.layers[:2]
    leave_out = {
        "held": lambda: held(front, [calls[0], calls[1]]),
        "change_held": lambda: change_held(front, [calls[0], calls[1]]),
        "without": lambda: without(front),
    }[kind]
    computed = []
    for place, layer in enumerate(subject.layers):
        layer.block.mlp.register_forward_hook(lambda *_, place=place: computed.append(place))
    with leave_out():
        subject.velocity(state, task.noise, 0.5)
    assert computed == [2]


@torch.no_grad()
def test_without_a_layer_is_the_model_built_without_it(model):
    subject, task = subject_of(model), task_for(model)
    for place in range(len(subject.layers)):
        smaller = copy.deepcopy(model)
        blocks = smaller.blocks if hasattr(smaller, "blocks") else smaller.decoder.blocks
        left_out = place
        if not hasattr(smaller, "blocks"):
            blocks = smaller.encoder.blocks if place < 2 else blocks
            left_out = place % 2
        del blocks[left_out]
        smaller = subject_of(smaller)
        expected = smaller.velocity(task.begin(smaller), task.noise, 0.7)
        with without([subject.layers[place]]):
            found = subject.velocity(task.begin(subject), task.noise, 0.7)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert (found - subject.velocity(task.begin(subject), task.noise, 0.7)).abs().max() > 1e-4


def test_modules_are_as_they_were_afterwards():
    block = torch.nn.Linear(3, 3)
    before = block.forward
    with pytest.raises(RuntimeError), replaced(block, lambda x: x):
        with replaced(block, lambda x: 2 * x):
            assert torch.equal(block(torch.ones(3)), torch.full((3,), 2.0))
        assert torch.equal(block(torch.ones(3)), torch.ones(3))
        raise RuntimeError
    assert block.forward == before and "forward" not in vars(block)
    layer = Layer(name="layer 1", block=block)
    with without([layer]):
        assert torch.equal(block(torch.ones(3)), torch.ones(3))


def test_noise_of_a_clip_depends_on_the_clip_and_draw_alone():
    model = tiny_dense()
    few, many = task_for(model, num_clips=2, num_noises=2), task_for(model, 3, num_noises=3)
    assert few.noise.shape[0] == 4 and few.num_clips == 2
    torch.testing.assert_close(
        few.noise.unflatten(0, (2, 2)), many.noise.unflatten(0, (3, 3))[:2, :2]
    )
    assert torch.equal(few.clean[0], few.clean[1]) and not torch.equal(few.noise[0], few.noise[1])
    assert torch.equal(
        few.per_clip(torch.tensor([[1.0, 3.0, 5.0, 7.0]])), torch.tensor([[2.0, 6.0]])
    )


def test_bad_tasks_are_refused():
    model = tiny_dense()
    with pytest.raises(ValueError, match="2 or more given frames .* got 1"):
        task_for(model, num_frames=2)
    with pytest.raises(ValueError, match="clips and draws of noise, got 2 and 0"):
        task_for(model, num_noises=0)
    task = task_for(tiny_dense(conditions=type(ACTIONS)()))
    with pytest.raises(ValueError, match="steered by actions, but none were given"):
        task.begin(subject_of(model))
