"""Separable and dense behind one interface: causality, streaming = training pass, conditions."""

from dataclasses import replace

import pytest
import torch

from scd.data.clip import Conditions
from scd.data.spaces import ConditionSpec
from scd.models.attention import FrameCausal, TeacherForcing
from scd.models.base import Augmentation
from scd.models.block import Block
from scd.models.build import build, num_parameters
from scd.models.config import BlockConfig, CacheConfig, LayerSkip
from scd.models.separable import SeparableDiffuser
from scd.training.presets import preset
from tests.tiny import (
    ACTIONS,
    COMPOSITE,
    SHAPE,
    random_clips,
    random_conditions,
    tiny_dense,
    tiny_separable,
)

JOINS = ["token_concat", "token_concat_projected", "channel_concat", "add", "prefix"]
BIASED = BlockConfig(width=32, head_dim=16, rotary_axes=(4, 6, 6), distance_bias=0.3)
SKIP = LayerSkip(first=1, stop=3, below=0.5)
"""Times of random clips lie on either side of it, within one batch too."""
MODELS = {
    **{join: lambda join=join: tiny_separable(join) for join in JOINS},
    "no start frame": lambda: tiny_separable(start_frame=False),
    "clean estimate": lambda: tiny_separable("prefix", predict="clean"),
    "distance bias": lambda: tiny_separable(block=BIASED),
    "continuous actions": lambda: tiny_separable(conditions=ConditionSpec(action_dim=3)),
    "actions of parts": lambda: tiny_separable(conditions=COMPOSITE),
    "labels": lambda: tiny_separable(conditions=ConditionSpec(num_labels=3)),
    "actions and labels": lambda: tiny_separable(
        conditions=ConditionSpec(num_actions=4, num_labels=3)
    ),
    "unconditional": lambda: tiny_separable(conditions=ConditionSpec()),
    "dense": tiny_dense,
    "dense, clean estimate": lambda: tiny_dense(predict="clean"),
    "dense, distance bias": lambda: tiny_dense(block=BIASED),
    "dense, labels": lambda: tiny_dense(conditions=ConditionSpec(num_labels=3)),
    "dense, skip": lambda: tiny_dense(skip=SKIP),
    "dense, diagonal": lambda: tiny_dense(num_diagonal=1),
    "dense, skip, diagonal, clean estimate": lambda: tiny_dense(
        predict="clean", num_diagonal=2, skip=SKIP, block=BIASED
    ),
}


@pytest.fixture(params=list(MODELS), scope="module")
def model(request):
    return MODELS[request.param]()


def one_frame(conditions, frame):
    return conditions.frames(frame, frame + 1)


def assert_same(model, ours, theirs):
    """Equal to float32 rounding; a clean estimate is divided by times down to 0.05."""
    config = model.config
    predict = config.decoder.predict if isinstance(model, SeparableDiffuser) else config.predict
    factor = 20 if predict == "clean" else 1
    torch.testing.assert_close(ours, theirs, atol=5e-6 * factor, rtol=5e-6)


@torch.no_grad()
def stream(model, clean, noisy, time, conditions, num_given):
    """Velocity of each frame after the given ones, frame by frame, on a clean history."""
    given = clean[:, :num_given] if num_given else None
    state = model.begin(given, conditions.frames(0, num_given), clean.shape[0])
    velocities = []
    for frame in range(num_given, clean.shape[1]):
        context = model.context(state, one_frame(conditions, frame))
        offset = frame - model.needs_first_frame
        for _ in range(2):
            # The second step must not see what the first one left behind.
            velocity = model.velocity(context, noisy[:, 0, offset], time[:, 0, offset])
        velocities.append(velocity)
        model.observe(state, clean[:, frame], one_frame(conditions, frame))
    return torch.stack(velocities, dim=1)


@pytest.mark.parametrize("num_given", [0, 1, 3])
@torch.no_grad()
def test_training_pass_is_the_stream(model, num_given):
    if num_given == 0 and model.needs_first_frame:
        pytest.skip("this model must be given its first frame")
    clips = random_clips(model)
    parallel = model(*clips)[:, 0, num_given - model.needs_first_frame :]
    assert_same(model, stream(model, *clips, num_given), parallel)


@torch.no_grad()
def test_a_frame_depends_on_its_past_and_on_nothing_else(model):
    clean, noisy, time, conditions = random_clips(model, num_frames=5)
    before = model(clean, noisy, time, conditions)
    first = int(model.needs_first_frame)
    for frame in range(5):
        changed = clean.clone()
        changed[:, frame] += 1
        moved = (model(changed, noisy, time, conditions) != before).flatten(3).any(-1)[0, 0]
        assert moved.tolist() == [target > frame for target in range(first, 5)], frame
    for frame in range(first, 5):
        changed = noisy.clone()
        changed[:, :, frame - first] += 1
        moved = (model(clean, changed, time, conditions) != before).flatten(3).any(-1)[0, 0]
        assert moved.tolist() == [target == frame for target in range(first, 5)], frame


@torch.no_grad()
def test_a_frame_knows_its_action_and_earlier_ones_only(model):
    if not model.config.conditions.has_actions:
        pytest.skip("no actions")
    clean, noisy, time, conditions = random_clips(model, num_frames=5)
    before = model(clean, noisy, time, conditions)
    first = int(model.needs_first_frame)
    for frame in range(1, 5):
        actions = conditions.actions.clone()
        if parts := model.config.conditions.action_parts:
            ends = torch.tensor([low + high for part in parts for low, high in part.limits])
            actions[:, frame] = ends - actions[:, frame]
        else:
            actions[:, frame] = (actions[:, frame] + 1) % 4
        changed = Conditions(actions=actions, labels=conditions.labels)
        moved = (model(clean, noisy, time, changed) != before).flatten(3).any(-1)[0, 0]
        assert moved.tolist() == [target >= frame for target in range(first, 5)], frame


@torch.no_grad()
def test_draws_and_target_windows_are_slices_of_the_same_thing(model):
    clean, noisy, time, conditions = random_clips(model, num_draws=3)
    together = model(clean, noisy, time, conditions)
    for draw in range(3):
        one = slice(draw, draw + 1)
        alone = model(clean, noisy[:, one], time[:, one], conditions)
        assert_same(model, together[:, one], alone)
    last_two = model(clean, noisy[:, :, -2:], time[:, :, -2:], conditions)
    assert_same(model, together[:, :, -2:], last_two)


@torch.no_grad()
def test_noisy_history_is_the_same_as_feeding_it(model):
    """Without clean frames, each draw is its own history."""
    clean, _, _, conditions = random_clips(model)
    first = int(model.needs_first_frame)
    noisy, time = clean[:, None].repeat(1, 2, 1, 1, 1, 1), torch.rand(2, 2, clean.shape[1])
    noisy[:, 1] += 1
    velocity = model(None, noisy, time, conditions)
    assert velocity.shape[2] == clean.shape[1] - (first and isinstance(model, SeparableDiffuser))
    if isinstance(model, SeparableDiffuser):
        for draw in range(2):
            alone = model(
                noisy[:, draw],
                noisy[:, draw : draw + 1, first:],
                time[:, draw : draw + 1, first:],
                conditions,
            )
            assert_same(model, velocity[:, draw : draw + 1], alone)
    else:
        changed = noisy.clone()
        changed[:, :, 2] += 1
        moved = (model(None, changed, time, conditions) != velocity).flatten(3).any(-1)[0, 0]
        assert moved.tolist() == [False, False, True, True, True]


@torch.no_grad()
def test_train_and_eval_mode_are_the_same(model):
    clips = random_clips(model)
    expected = model(*clips)
    model.train()
    assert torch.equal(model(*clips), expected)
    model.eval()


def test_gradient_checkpointing_has_the_same_gradients(model):
    clips = random_clips(model)
    gradients = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        model.zero_grad()
        model(*clips).square().mean().backward()
        gradients.append([weight.grad for weight in model.parameters() if weight.grad is not None])
    model.gradient_checkpointing = False
    model.zero_grad()
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=1e-6, rtol=0)


@torch.no_grad()
def test_another_action_can_be_tried_for_the_same_frame(model):
    """The last context before `observe` counts, also after a fork in between."""
    clean, noisy, time, conditions = random_clips(model)
    other = Conditions(
        actions=None if conditions.actions is None else conditions.actions.flip(0),
        labels=conditions.labels,
    )
    offset = 3 - model.needs_first_frame

    def third_frame(tries):
        state = model.begin(clean[:, :2], conditions.frames(0, 2))
        for steering in tries:
            model.context(state, one_frame(steering, 2))
        states = (state.fork(), state)
        for one in states:
            model.observe(one, clean[:, 2], one_frame(conditions, 2))
        velocities = [
            model.velocity(
                model.context(one, one_frame(conditions, 3)),
                noisy[:, 0, offset],
                time[:, 0, offset],
            )
            for one in states
        ]
        assert torch.equal(*velocities)
        return velocities[0]

    assert torch.equal(third_frame([conditions]), third_frame([other, conditions]))
    assert torch.equal(third_frame([conditions]), third_frame([]))


@torch.no_grad()
def test_a_fork_goes_its_own_way(model):
    clean, noisy, time, conditions = random_clips(model)
    state = model.begin(clean[:, :2], conditions.frames(0, 2))
    twin = state.fork()
    context = model.context(state, one_frame(conditions, 2))
    expected = model.velocity(context, noisy[:, 0, 2 - model.needs_first_frame], time[:, 0, 2 - 1])
    model.context(twin, one_frame(conditions, 2))
    model.observe(twin, clean[:, 2] + 1, one_frame(conditions, 2))
    model.context(twin, one_frame(conditions, 3))
    again = model.velocity(context, noisy[:, 0, 2 - model.needs_first_frame], time[:, 0, 2 - 1])
    assert torch.equal(again, expected)


@pytest.mark.parametrize("make", [tiny_separable, tiny_dense])
@torch.no_grad()
def test_a_stream_past_its_window_is_a_banded_parallel_pass(make, monkeypatch):
    """The ring forgets exactly what a mask over the whole stream would hide."""
    window, num_frames = 4, 14
    model = make(cache=CacheConfig(window=window, num_sinks=0))
    clips = random_clips(model, num_frames=num_frames)
    streamed = stream(model, *clips, num_given=0)

    class BandedCausal(FrameCausal):
        def mask_mod(self):
            near, size = super().mask_mod(), self.tokens_per_frame
            return lambda b, h, q, k: near(b, h, q, k) & (q // size - k // size < window)

    class BandedForcing(TeacherForcing):
        def mask_mod(self):
            near, size = super().mask_mod(), self.tokens_per_frame
            num_clean, first = self.num_clean, self.first_noisy
            return lambda b, h, q, k: (
                near(b, h, q, k)
                & ((k // size >= num_clean) | (q // size + first - k // size < window))
            )

    for module in ("encoder", "stack"):
        monkeypatch.setattr(f"scd.models.{module}.FrameCausal", BandedCausal)
    monkeypatch.setattr("scd.models.stack.TeacherForcing", BandedForcing)
    parallel = model(*clips)[:, 0]
    torch.testing.assert_close(streamed, parallel, atol=5e-6, rtol=5e-6)
    monkeypatch.undo()
    assert not torch.allclose(streamed[:, -1], model(*clips)[:, 0, -1], atol=1e-3)


@pytest.mark.parametrize("make", [tiny_separable, tiny_dense])
@torch.no_grad()
def test_beginning_with_frames_is_observing_them(make):
    """Also when more frames are given than the window holds."""
    model = make(cache=CacheConfig(window=4, num_sinks=1))
    clean, noisy, time, conditions = random_clips(model, num_frames=9)
    at_once = model.begin(clean[:, :8], conditions.frames(0, 8))
    one_by_one = model.begin(clean[:, :1], conditions.frames(0, 1))
    for frame in range(1, 8):
        model.observe(one_by_one, clean[:, frame], one_frame(conditions, frame))
    velocities = [
        model.velocity(
            model.context(state, one_frame(conditions, 8)), noisy[:, 0, 8], time[:, 0, 8]
        )
        for state in (at_once, one_by_one)
    ]
    torch.testing.assert_close(*velocities, atol=2e-6, rtol=5e-6)


@torch.no_grad()
def test_context_is_computed_once_per_frame():
    model = tiny_separable()
    clean, noisy, time, conditions = random_clips(model)
    calls = []
    model.encoder.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    state = model.begin(clean[:, :1], conditions.frames(0, 1))
    calls.clear()
    context = model.context(state, one_frame(conditions, 1))
    for _ in range(7):
        model.velocity(context, noisy[:, 0, 1], time[:, 0, 1])
    assert len(calls) == 1


@torch.no_grad()
def test_the_right_context_is_used():
    model = tiny_separable()
    clean, noisy, time, conditions = random_clips(model, batch=3)
    right = model(clean, noisy, time, conditions)
    wrong = model(clean.roll(1, 0), noisy, time, conditions)
    assert (right - wrong).abs().mean() > 1e-2


@torch.no_grad()
def test_context_noise_scales_with_the_last_norm():
    model = tiny_separable()
    clean, _, _, conditions = random_clips(model)
    context = model.encoder(clean, conditions)
    noise = torch.randn_like(context.tokens)
    moved = context.with_noise(0.05, noise).tokens - context.tokens
    torch.testing.assert_close(moved, 0.05 * noise * context.norm_scale, atol=1e-6, rtol=0)
    state = model.begin(clean, conditions)
    streamed = model.context(state, one_frame(conditions, 0))
    both = model.with_noisy_branch(streamed, 0.05, noise[:, :1])
    corrupted = streamed.encoded.with_noise(0.05, noise[:, :1]).tokens
    expected = torch.cat([corrupted, streamed.encoded.tokens])
    assert torch.equal(both.encoded.tokens, expected)


@pytest.mark.parametrize("make", [tiny_separable, tiny_dense])
@torch.no_grad()
def test_fresh_models_output_zero_velocity(make):
    model = make(amount=0.0)
    assert model(*random_clips(model, num_frames=3)).abs().max() == 0


def test_the_gates_start_where_they_are_told():
    block = BlockConfig(width=32, head_dim=16, rotary_axes=(4, 6, 6), initial_gate=0.5)
    for part in tiny_separable(block=block, amount=0.0).modules():
        if isinstance(part, Block):
            for modulation in (part.attention_modulation, part.mlp_modulation):
                shift, scale, gate = modulation.linear.bias.chunk(3)
                assert (gate == 0.5).all() and not shift.any() and not scale.any()


def test_hidden_conditions_become_the_null_embedding():
    model = tiny_separable()
    clean, noisy, time, conditions = random_clips(model)
    hidden = Conditions(
        actions=conditions.actions, null_actions=torch.ones_like(conditions.actions).bool()
    )
    others = Conditions(actions=3 - conditions.actions, null_actions=hidden.null_actions)
    with torch.no_grad():
        assert torch.equal(model(clean, noisy, time, hidden), model(clean, noisy, time, others))
        assert not torch.equal(
            model(clean, noisy, time, hidden), model(clean, noisy, time, conditions)
        )


@pytest.mark.parametrize("make", [tiny_separable, tiny_dense])
def test_a_part_of_an_action_can_be_hidden_alone(make):
    model = make(conditions=COMPOSITE)
    clean, noisy, time, conditions = random_clips(model)
    other = random_clips(model, seed=1)[3]
    num_parts, first = len(COMPOSITE.action_parts), 0
    assert num_parts == 4
    with torch.no_grad():
        seen = model(clean, noisy, time, conditions)
        for place, part in enumerate(COMPOSITE.action_parts):
            entries = slice(first, first := first + part.size)
            mask = torch.zeros(*conditions.actions.shape[:2], num_parts, dtype=torch.bool)
            mask[..., place] = True
            hidden = replace(conditions, null_parts=mask)
            actions = conditions.actions.clone()
            actions[..., entries] = other.actions[..., entries]
            outputs = [
                model(clean, noisy, time, replace(hidden, actions=one))
                for one in (conditions.actions, actions, other.actions)
            ]
            assert torch.equal(outputs[0], outputs[1])
            assert not torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], seen)
            by_branch = conditions.with_null_branch([one == place for one in range(num_parts)])
            assert torch.equal(by_branch.null_parts, torch.cat([mask, torch.zeros_like(mask)]))
        # All parts alone are the whole action.
        everything = replace(conditions, null_parts=torch.ones_like(mask))
        whole = replace(conditions, null_actions=mask[..., 0] | True)
        assert torch.equal(model(clean, noisy, time, everything), model(clean, noisy, time, whole))


def test_dropout_hides_actions_whole_and_part_by_part():
    generator = torch.Generator().manual_seed(0)
    conditions = random_conditions(COMPOSITE, 32, 16, generator)
    augment = Augmentation(generator=generator, condition_dropout=0.25)
    dropped = augment.drop(conditions, COMPOSITE)
    assert 0.2 < dropped.null_actions.float().mean() < 0.3
    assert dropped.null_parts.shape == (32, 16, 4)
    assert 0.2 < dropped.null_parts.float().mean() < 0.3
    apart = (dropped.null_parts[..., 0] & ~dropped.null_parts[..., 1]).float().mean()
    assert 0.15 < apart < 0.23


def test_condition_dropout_draws_frame_by_frame_and_label_by_clip():
    spec = ConditionSpec(num_actions=4, num_labels=3)
    generator = torch.Generator().manual_seed(0)
    conditions = random_conditions(spec, 64, 32, generator)
    augment = Augmentation(generator=generator, condition_dropout=0.25)
    dropped, again = augment.drop(conditions), augment.drop(conditions)
    assert 0.2 < dropped.null_actions.float().mean() < 0.3
    assert dropped.null_labels.shape == (64,)
    assert not torch.equal(dropped.null_actions, again.null_actions)


def test_a_dense_model_has_no_context_to_corrupt():
    model = tiny_dense()
    augment = Augmentation(generator=torch.Generator(), context_noise=0.05)
    with pytest.raises(ValueError, match="context_noise must be 0"):
        model(*random_clips(model), augment)


def test_a_model_without_start_frame_needs_frames():
    model = tiny_separable(start_frame=False)
    clean, noisy, time, conditions = random_clips(model)
    with pytest.raises(ValueError, match="start frame"):
        model.begin(None, conditions.frames(0, 0))
    with pytest.raises(ValueError, match="5 clean frames give context to 4"):
        model(clean, torch.cat([noisy, noisy[:, :, :1]], dim=2), torch.rand(2, 1, 5), conditions)


PAPER_SIZES = {
    # Millions of parameters in paper.md; what we add is the start frame, 64 tokens of the width.
    "scd-m": 233.6,
    "scd-b": 131.6,
    "scd-me": 384.7,
    "scd-md": 384.7,
    "dense-m": 230.2,
    "dense-b": 129.6,
}


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_paper_sizes(name):
    config = preset(name).model
    with torch.device("meta"):
        model = build(config)
    added = model.encoder.start.numel() if isinstance(model, SeparableDiffuser) else 0
    assert round((num_parameters(model) - added) / 1e6, 1) == PAPER_SIZES[name]


def test_encoder_and_decoder_sizes_of_scd_m():
    with torch.device("meta"):
        model = build(preset("scd-m").model)
    added = model.encoder.start.numel()
    assert round((num_parameters(model.encoder) - added) / 1e6, 1) == 154.6
    assert round(num_parameters(model.decoder) / 1e6, 1) == 79.0


@pytest.mark.parametrize("make", [tiny_separable, tiny_dense])
@torch.no_grad()
def test_save_and_load(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    assert again.config == model.config
    clips = random_clips(model)
    assert torch.equal(again(*clips), model(*clips))


def test_from_pretrained_takes_the_words_of_the_field_and_no_others(tmp_path):
    tiny_separable().save_pretrained(tmp_path / "model")
    folder, kind = tmp_path / "model", SeparableDiffuser

    def types(**words):
        return {weight.dtype for weight in kind.from_pretrained(folder, **words).parameters()}

    assert types() == types(dtype="auto") == types(torch_dtype="float32") == {torch.float32}
    assert types(dtype="bfloat16") == types(torch_dtype=torch.bfloat16) == {torch.bfloat16}
    for words, said in (
        ({"revison": "main"}, "'revison'; did you mean 'revision'"),
        ({"dtypes": torch.float32}, "'dtypes'; did you mean 'dtype'"),
        ({"dtype": torch.int8}, "dtype must be one of float32, bfloat16, float16 or 'auto'"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "mean the same: give one"),
        ({"revision": "main"}, "has a meaning on the hub only"),
    ):
        with pytest.raises(ValueError, match=said):
            kind.from_pretrained(folder, **words)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json: needed format"):
        kind.from_pretrained(folder)


def test_loading_refuses_what_does_not_fit(tmp_path):
    tiny_separable().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    good = path.read_text()
    path.write_text(good.replace('"join"', '"joint"'))
    with pytest.raises(ValueError, match="unknown fields \\['joint'\\]"):
        SeparableDiffuser.from_pretrained(tmp_path / "model")
    path.write_text(good.replace('"num_layers": 2', '"num_layers": 3'))
    with pytest.raises(ValueError, match="another architecture"):
        SeparableDiffuser.from_pretrained(tmp_path / "model")
    path.write_text(good)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        SeparableDiffuser.from_pretrained(tmp_path / "model")


def test_patches_must_fit_the_frame():
    """Where a model is built: settings alone are made before the data decides on the frame."""
    shape = type(SHAPE)(channels=3, height=4, width=6, patch_size=8)
    told = r"got patch_size=8 for the 4x6 frames of model\.shape, which \[1, 2\] divide"
    for settings in (tiny_separable().config, tiny_dense().config):
        with pytest.raises(ValueError, match=told):
            build(replace(settings, shape=shape))
    assert ACTIONS.num_actions == 4
