"""Streams that a text steers: as the models compute them, decoded as a whole clip is."""

import pytest
import torch

from scd.data.clip import Conditions
from scd.models.config import Guidance
from scd.models.flow import guided, schedule, solve
from scd.streaming.noise import frame_noise, step_noise
from scd.streaming.rollout import Rollout
from tests.tiny_text_world import FOUR_STEPS, KINDS, text_world
from tests.tiny_wan_vae import tiny_vae

NUM = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    tiny_vae().save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module", params=["separable", "dense"])
def world(request, source):
    return text_world(request.param, source)


def texts(batch=2, seed=0):
    return torch.randn(batch, 16, 32, generator=torch.Generator().manual_seed(seed))


def stream_of(world, scale=1.0):
    return Rollout(world, None, Guidance(kind="conditions", scale=scale) if scale != 1 else None, 3)


def begin(stream, text=None, null_text=None, given=None):
    text = texts() if text is None else text
    batch, conditions = len(text), Conditions(text=text, null_text=null_text)
    return stream.begin(conditions=conditions, batch=batch, latents=given)


def run(stream, num=NUM):
    """Return frames and latents of some steps."""
    frames, latents = [], []
    for _ in range(num):
        frames.append(stream.step_video())
        newest = stream.newest
        latents.append(newest[:, None] if newest.ndim == 4 else newest)
    return torch.cat(frames, dim=1), torch.cat(latents, dim=1)


@torch.no_grad()
def plain(world, text, num=NUM, scale=1.0, null=None, given=None, switches=None):
    """The same by the calls that every model answers, and the solver."""
    model, times = world.model, schedule(world.sampling).tolist()
    both = 1 if scale == 1 else 2

    def conditions(text):
        return Conditions(text=text if both == 1 else torch.cat([null, text]))

    def doubled(x):
        return x if x is None or both == 1 else torch.cat([x, x])

    state = model.begin(doubled(given), conditions(text), both * len(text))
    latents = []
    first = 0 if given is None else given.shape[1]
    for frame in range(first, first + num):
        now = conditions((switches or {}).get(frame, text))
        text = (switches or {}).get(frame, text)
        shape = (len(text), *model.shape.shape)
        noise = frame_noise(3, frame, "frame", shape)
        if model.encoder_noise == "none":
            context = model.context(state, now)
        else:
            context = model.context(state, now, doubled(frame_noise(3, frame, "encoder", shape)))

        def at(noisy, time, context=context):
            each = noisy.new_full((len(noisy),), time, dtype=torch.float64)
            return model.velocity(context, noisy, each)

        field = guided(at, None if scale == 1 else scale)
        fresh = step_noise(3, frame, 3, shape)
        latents.append(solve(field, noise, times, "renoise", fresh))
        model.observe(state, doubled(latents[-1]), now)
    return torch.stack(latents, dim=1)


def test_a_stream_is_what_the_model_computes_and_a_whole_clip_decodes_to(world):
    stream = stream_of(world)
    assert begin(stream).shape == (2, 0, 3, 16, 32)
    frames, latents = run(stream)
    assert torch.equal(latents, plain(world, texts()))
    assert frames.shape == (2, 9, 3, 16, 32)
    assert torch.equal(frames, world.autoencoder.decode(latents))
    assert stream.num_frames == NUM and stream.timing.num_frames == 4
    begin(stream)
    again, _ = run(stream)
    assert torch.equal(again, frames)


def test_latents_without_frames_and_latents_that_others_denoise_are_the_same(world):
    bare, drafted = stream_of(world), stream_of(world)
    begin(bare)
    begin(drafted)
    latents, kept = [], []
    for _ in range(NUM):
        latents.append(bare.step_latents())
        draft = drafted.draft()
        solver = drafted.sampling.solver
        latent = drafted.engine.denoise(
            draft.context, draft.noise, drafted.times, solver, None, draft.step_noise
        )
        drafted.keep(draft, latent)
        kept.append(latent)
    expected = plain(world, texts())
    assert torch.equal(torch.stack(latents, dim=1), expected)
    assert torch.equal(torch.stack(kept, dim=1), expected)


def test_a_stream_goes_on_from_given_frames(world):
    clip = torch.rand(2, 5, 3, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    given = world.autoencoder.encode(clip)
    stream = stream_of(world)
    shown = begin(stream, given=given)
    frames, latents = run(stream, 2)
    assert torch.equal(latents, plain(world, texts(), 2, given=given))
    whole = world.autoencoder.decode(torch.cat([given, latents], dim=1))
    assert shown.shape[1] == 5
    assert torch.equal(torch.cat([shown, frames], dim=1), whole)
    other = plain(world, texts(), 2, given=given.flip(1))
    assert not torch.allclose(other, latents, atol=1e-3)


def test_another_text_from_some_frame_on(world):
    stream = stream_of(world)
    begin(stream)
    before, _ = run(stream, 2)
    stream.change_text(texts(seed=1))
    _, after = run(stream, NUM - 2)
    switched = plain(world, texts(), switches={2: texts(seed=1)})
    assert torch.equal(after, switched[:, 2:])
    assert torch.equal(before, world.autoencoder.decode(switched[:, :2]))
    assert not torch.allclose(after, plain(world, texts())[:, 2:], atol=1e-3)


def test_guidance_leads_away_from_another_text(world):
    null = texts(seed=5)
    stream = stream_of(world, scale=2.5)
    begin(stream, texts(), null)
    _, guided = run(stream)
    torch.testing.assert_close(guided, plain(world, texts(), scale=2.5, null=null))
    assert not torch.allclose(guided, plain(world, texts()), atol=1e-3)
    with pytest.raises(ValueError, match="to lead away from"):
        begin(stream)


def test_a_fork_is_independent(world):
    stream = stream_of(world)
    begin(stream)
    stream.step_video()
    twin = stream.fork()
    twin.change_text(texts(seed=1))
    twin.step_video()
    frames, _ = run(stream, NUM - 1)
    assert torch.equal(frames, world.autoencoder.decode(plain(world, texts()))[:, 1:])


def test_futures_are_forks_of_one_seed_each(world):
    """With a decoder that has a past, and a text of each stream to lead away from."""
    stream = stream_of(world, scale=2.5)
    begin(stream, texts(), texts(seed=5))
    stream.step_video()
    futures = stream.fork(2)
    frames, latents = run(futures, NUM - 1)
    assert frames.shape[:2] == (4, 4 * (NUM - 1))
    for number, seed in enumerate(futures.seeds):
        alone = stream.fork()
        alone.seed = seed
        expected, of_latents = run(alone, NUM - 1)
        torch.testing.assert_close(latents[number::2], of_latents, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(frames[number::2], expected, atol=1e-5, rtol=1e-5)


def test_noise_of_an_encoder_may_be_that_of_the_frame(source):
    world = text_world("separable", source)
    fresh = stream_of(world)
    same = stream_of(world)
    same.engine.encoder_noise = "same"
    latents = []
    for stream in (fresh, same):
        begin(stream)
        latents.append(run(stream, 1)[1])
    assert not torch.allclose(*latents, atol=1e-4)


def test_blocks_of_frames(source):
    world = text_world("blocks", source)
    stream = stream_of(world)
    begin(stream)
    frames, latents = run(stream, 2)
    assert latents.shape[1] == 6 and stream.num_frames == 6
    assert torch.equal(frames, world.autoencoder.decode(latents))
    noise = torch.stack([frame_noise(3, n, "frame", (2, 16, 2, 4)) for n in range(3)], dim=1)
    fresh = torch.stack([step_noise(3, n, 3, (2, 16, 2, 4)) for n in range(3)], dim=2)
    model = world.model
    with torch.no_grad():
        context = model.context(model.begin(None, Conditions(), 2), Conditions(text=texts()))
        expected = solve(
            lambda noisy, time: model.velocity(context, noisy, noisy.new_full((2,), time).double()),
            noise,
            schedule(FOUR_STEPS).tolist(),
            "renoise",
            fresh,
        )
    torch.testing.assert_close(latents[:, :3], expected)


def test_what_a_stream_refuses(source):
    world = text_world("separable", source)
    stream = stream_of(world)
    with pytest.raises(ValueError, match="begin the stream first"):
        stream.step_video()
    with pytest.raises(ValueError, match=r"\[streams, 16, 32\]"):
        begin(stream, torch.zeros(1, 16, 8))
    with pytest.raises(ValueError, match=r"given latents must be \[2, 1, 16, 2, 4\]"):
        begin(stream, given=torch.zeros(2, 1, 16, 2, 2))
    begin(stream)
    with pytest.raises(ValueError, match="2 streams need as many texts, got 1"):
        stream.change_text(texts(1))
    with pytest.raises(ValueError, match="several frames"):
        stream.step()
    assert set(KINDS) == {"separable", "dense", "blocks"}
