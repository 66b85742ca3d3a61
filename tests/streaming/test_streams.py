"""Sessions that share calls: each has the frames that it has alone, whatever the others do."""

from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.config import PixelConfig
from scd.common import memory as device_memory
from scd.common.memory import OutOfMemory
from scd.data.clip import Conditions
from scd.data.source import DataCard
from scd.data.spaces import ConditionSpec
from scd.engine.open import open_engine
from scd.engine.plain import PlainEngine
from scd.engine.pool import FramePool, NewFrame, pool_bytes
from scd.models.checkpoint import World
from scd.models.config import CacheConfig, Guidance, SamplingConfig
from scd.streaming.rollout import Rollout
from scd.streaming.sessions import Session, Streams
from tests.tiny import BLOCK, SHAPE, random_conditions, tiny_dense, tiny_separable

FP32 = 1e-5
"""Largest difference of a frame in [-1, 1] from that of the same session alone."""
BF16 = 0.05
"""The same in bfloat16, where products of other sizes round otherwise."""

JOINS = ("token_concat", "token_concat_projected", "channel_concat", "add", "prefix")
GUIDED = {
    "none": None,
    "conditions": Guidance(kind="conditions", scale=1.7),
    "context_noise": Guidance(kind="context_noise", scale=1.5, context_noise=0.3),
}


@cache
def make_world(make=tiny_separable, **options):
    model = make(cache=CacheConfig(window=6, num_sinks=1), **options)
    spec = model.config.conditions
    return World(
        model=model,
        autoencoder=PixelAutoencoder(PixelConfig(mean=0.1, std=0.5)),
        card=DataCard(
            height=SHAPE.height,
            width=SHAPE.width,
            fps=10.0,
            conditions=spec,
            action_names=tuple("abcd"[: spec.num_actions or spec.action_dim]),
        ),
        sampling=SamplingConfig(num_steps=3),
    )


@cache
def make_engine(kind="fast", precision="fp32", make=tiny_separable, **options):
    return open_engine(make_world(make, **options).model, kind, precision)


def streams_of(kind="fast", max_rows=16, **options):
    return Streams(make_world(**options), make_engine(kind, **options), max_rows=max_rows)


def picture(seed):
    return torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def action(index=1):
    return torch.tensor(index)


def run(streams):
    """Tick until all is done, and return what ended."""
    ended = []
    while streams.is_busy:
        ended += streams.tick()
    return ended


@dataclass
class Diary:
    """What was done to one session, to be done again to a rollout of its own."""

    session: Session
    num_given: int
    seed: int
    guidance: str
    steps: list = field(default_factory=list)
    """(sampling, picture or None, action) of each frame; a picture was observed."""
    frames: list = field(default_factory=list)

    def replay(self, world, engine, window):
        rollout = Rollout(world, None, GUIDED[self.guidance], self.seed, window, engine)
        begin_with(rollout.begin, self.num_given)
        frames = []
        for sampling, observed, index in self.steps:
            rollout.sampling = sampling
            if observed is None:
                frames.append(rollout.step(action(index)[None])[0])
            else:
                rollout.observe(observed[None], action(index)[None])
        return frames


def begin_with(begin, num_given, batch=True):
    if not num_given:
        return begin()
    frames = torch.stack([picture(100 + index) for index in range(num_given)])
    actions = torch.arange(num_given)[None] % 4
    return begin(frames[None] if batch else frames, Conditions(actions=actions))


class Play:
    """Carries out random operations, as far as they make sense, and keeps diaries."""

    def __init__(self, world, engine, window, max_rows):
        self.streams = Streams(world, engine, max_rows=max_rows, window=window)
        self.diaries, self.open = [], []

    def do(self, name, which, index, steps, solver, guidance):
        if name == "tick":
            return self.tick()
        if name == "open" and len(self.open) < 5:
            sampling = SamplingConfig(num_steps=steps, solver=solver)
            session = begin_with(
                lambda frames=None, conditions=None: self.streams.open(
                    frames, conditions, seed=which, sampling=sampling, guidance=GUIDED[guidance]
                ),
                index,
                batch=False,
            )
            self.add(Diary(session, index, which, guidance))
        if name == "open" or not self.open:
            return
        diary = self.open[which % len(self.open)]
        session = diary.session
        if name == "close":
            self.streams.close(session)
            self.open.remove(diary)
        if name == "fork":
            # The copy does not have the frame that is under way, nor its request.
            done = len(diary.steps) - (session.status != "idle")
            twin = replace(
                diary, session=self.streams.fork(session), steps=diary.steps[:done], frames=[]
            )
            twin.frames += diary.frames
            self.add(twin)
        if session.status == "idle" and name == "request":
            session.rollout.sampling = SamplingConfig(num_steps=steps, solver=solver)
            self.streams.request(session, action(index))
            diary.steps.append((session.rollout.sampling, None, index))
        if session.status == "idle" and name == "observe":
            seen = picture(which)
            self.streams.observe(session, seen, action(index))
            diary.steps.append((session.rollout.sampling, seen, index))

    def add(self, diary):
        self.diaries.append(diary)
        self.open.append(diary)

    def tick(self):
        before = {id(frame): frame.num_done for frame, _ in self.streams._denoising.values()}
        under_way = [frame for frame, _ in self.streams._denoising.values()]
        ended = self.streams.tick()
        # Nobody starves: every frame under way advanced by one call.
        assert all(frame.num_done == before[id(frame)] + 1 for frame in under_way)
        pool = self.streams._pool
        rows = [row for frame, _ in self.streams._denoising.values() for row in frame.rows]
        assert sorted(rows) == list(range(pool.num_rows))
        for one in ended:
            assert one.error is None
            (diary,) = (diary for diary in self.diaries if diary.session is one.session)
            assert one.index + 1 == one.session.num_frames == diary.num_given + len(diary.steps)
            diary.frames.append(one.frame)


OPERATIONS = st.tuples(
    st.sampled_from(["open", "request", "request", "request", "tick", "tick", "tick"]
                    + ["observe", "close", "fork"]),
    st.integers(0, 7),
    st.integers(0, 3),
    st.integers(1, 4),
    st.sampled_from(["euler", "heun", "renoise"]),
    st.sampled_from(list(GUIDED)),
)  # fmt: skip


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    join=st.sampled_from(JOINS),
    window=st.sampled_from([None, 3]),
    max_rows=st.integers(2, 6),
    operations=st.lists(OPERATIONS, min_size=10, max_size=50),
)
def test_a_session_has_the_frames_that_it_has_alone(join, window, max_rows, operations):
    world, engine = make_world(join=join), make_engine(join=join)
    play = Play(world, engine, window, max_rows)
    for operation in operations:
        play.do(*operation)
    while play.streams.is_busy:
        play.tick()
    assert play.streams._pool.num_rows == 0
    for diary in play.diaries:
        alone = diary.replay(world, engine, window)[: len(diary.frames)]
        if diary in play.open:
            assert len(alone) == sum(observed is None for _, observed, _ in diary.steps)
        for frame, wanted in zip(diary.frames, alone, strict=True):
            torch.testing.assert_close(frame, wanted, atol=FP32, rtol=0)


@pytest.mark.parametrize("make", [tiny_separable, tiny_dense])
@pytest.mark.parametrize("kind", ["plain", "fast"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_engine_gives_the_frames_of_a_rollout(make, kind, precision):
    world, engine = make_world(make), make_engine(kind, precision, make)
    streams = Streams(world, engine)
    kinds = ["none", "conditions", "none"] + ["context_noise"] * (make is tiny_separable)
    diaries = []
    for number, guidance in enumerate(kinds):
        solver = ("euler", "heun", "renoise", "renoise")[number]
        sampling = SamplingConfig(num_steps=2 + number, solver=solver)
        session = streams.open(seed=number, sampling=sampling, guidance=GUIDED[guidance])
        diaries.append(Diary(session, 0, number, guidance))
    for index in (1, 3, 0):
        for diary in diaries:
            streams.request(diary.session, action(index))
            diary.steps.append((diary.session.rollout.sampling, None, index))
        for one in run(streams):
            diaries[one.session.number].frames.append(one.frame)
    for diary in diaries:
        alone = torch.stack(diary.replay(world, engine, None))
        tolerance = FP32 if precision == "fp32" else BF16
        torch.testing.assert_close(torch.stack(diary.frames), alone, atol=tolerance, rtol=0)


@pytest.mark.parametrize("spec", [ConditionSpec(num_labels=3), ConditionSpec(action_dim=2)])
def test_labels_and_vectors_steer(spec):
    streams = streams_of(conditions=spec)
    frames = []
    for index in range(2):
        labels = torch.tensor([index]) if spec.num_labels else None
        session = streams.open(conditions=Conditions(labels=labels))
        vector = torch.tensor([index, 0.5]) if spec.action_dim else None
        streams.request(session, vector)
    frames = [one.frame for one in run(streams)]
    assert len(frames) == 2 and not torch.allclose(*frames)


def counted(engine, monkeypatch):
    """Count calls of the decoder, and frames in each."""
    calls, velocity = [], engine.decoder.velocity

    def count(rows, patches, modulation, time):
        calls.append(patches.shape[0])
        return velocity(rows, patches, modulation, time)

    monkeypatch.setattr(engine.decoder, "velocity", count)
    return calls


def test_sessions_in_step_cost_as_many_calls_as_one(monkeypatch):
    calls = counted(make_engine("fast"), monkeypatch)
    for num_sessions in (1, 4):
        streams = streams_of()
        for seed in range(num_sessions):
            streams.request(streams.open(seed=seed), action())
        assert len(run(streams)) == num_sessions
        assert calls == [num_sessions] * 3
        calls.clear()
    guided = streams.open(guidance=GUIDED["conditions"], sampling=SamplingConfig(num_steps=2))
    streams.request(guided, action())
    streams.request(streams.sessions[0], action())
    assert [one.session.number for one in run(streams)] == [guided.number, 0]
    assert calls == [3, 3, 1]


def test_frames_that_begin_together_share_their_causal_pass(monkeypatch):
    engine, passes = make_engine("fast"), []
    embed, put = engine.encoder.embed, engine.decoder.put

    def counted_embed(patches):
        passes.append(("encoder", patches.shape[0]))
        return embed(patches)

    def counted_put(rows, start, tokens, conditions):
        passes.append(("put", tokens.shape[0]))
        return put(rows, start, tokens, conditions)

    monkeypatch.setattr(engine.encoder, "embed", counted_embed)
    monkeypatch.setattr(engine.decoder, "put", counted_put)
    streams = streams_of(max_rows=8)
    sessions = []
    # Memories that are not filled alike, and one that is full.
    for seed, num_frames in enumerate((1, 4, 9)):
        guidance = GUIDED["conditions"] if seed == 1 else None
        sessions.append(streams.open(seed=seed, guidance=guidance))
        for _ in range(num_frames):
            streams.request(sessions[-1], action(seed))
            run(streams)
    passes.clear()
    for session in sessions:
        streams.request(session, action(2))
    frames = {one.session: one.frame for one in run(streams)}
    assert passes == [("encoder", 4), ("put", 4)]
    for seed, (session, num_frames) in enumerate(zip(sessions, (1, 4, 9), strict=True)):
        rollout = Rollout(streams.world, None, session.rollout.guidance, seed, None, streams.engine)
        rollout.begin()
        for _ in range(num_frames):
            rollout.step(action(seed)[None])
        wanted = rollout.step(action(2)[None])[0]
        torch.testing.assert_close(frames[session], wanted, atol=FP32, rtol=0)


BIASED = replace(BLOCK, distance_bias=0.3)


@pytest.mark.parametrize(
    ("spec", "block"),
    [
        (ConditionSpec(), BLOCK),
        (ConditionSpec(num_labels=3), BLOCK),
        (ConditionSpec(num_actions=4, num_labels=2), BIASED),
        (ConditionSpec(action_dim=2), BIASED),
    ],
)
def test_contexts_of_several_states_are_those_of_each(spec, block):
    world = make_world(conditions=spec, block=block)
    engine, generator = make_engine(conditions=spec, block=block), torch.Generator().manual_seed(0)
    states, conditions = [], []
    # Batches of other sizes, memories not yet written, half full and full, some with a branch.
    for batch, num_frames, guided in ((1, 0, False), (2, 3, True), (1, 8, False), (2, 0, True)):
        if guided and not (spec.has_actions or spec.num_labels):
            guided = False
        size = batch // 2 if guided else batch
        known = random_conditions(spec, size, num_frames + 1, generator)
        known = known.with_null_branch() if guided else known
        frames = torch.randn(batch, num_frames, *SHAPE.shape, generator=generator)
        past = frames if num_frames else None
        states.append(engine.begin(past, known.frames(0, num_frames), batch))
        conditions.append(known.frames(num_frames, num_frames + 1))
    alone = [
        engine.context(state.fork(), now) for state, now in zip(states, conditions, strict=True)
    ]
    together = engine.contexts(states, conditions, [None] * len(states))
    for found, wanted, state, now in zip(together, alone, states, conditions, strict=True):
        torch.testing.assert_close(found.tokens, wanted.tokens, atol=FP32, rtol=0)
        scale = found.norm_scale.expand(wanted.norm_scale.shape)
        torch.testing.assert_close(scale, wanted.norm_scale, atol=FP32, rtol=0)
        # What was written is kept without another pass.
        assert found.conditions is now and state.encoded_for is now
    assert world.model.config.block == block


def test_the_order_of_requests_is_kept_and_nobody_is_held_up_long(monkeypatch):
    calls = counted(make_engine("fast"), monkeypatch)
    streams = streams_of(max_rows=4)
    first = streams.open()
    streams.request(first, action())
    streams.tick()
    late = [streams.open(seed=seed) for seed in range(6)]
    for session in late:
        streams.request(session, action())
    ended = run(streams)
    assert [one.session for one in ended] == [first, *late]
    # 3 calls per frame: no more than 4 calls' worth, 2 frames, begin beside others.
    assert calls[:4] == [1, 3, 4, 4] and sum(calls) == 7 * 3
    assert len(calls) <= 3 + 4


def test_a_session_closed_in_mid_frame_leaves_the_others_alone():
    streams = streams_of(max_rows=3)
    sessions = [streams.open(seed=seed) for seed in range(4)]
    for session in sessions:
        streams.request(session, action())
    streams.tick()
    assert [one.status for one in sessions] == ["denoising"] * 3 + ["waiting"]
    streams.close(sessions[0])
    streams.close(sessions[3])
    streams.close(sessions[0])
    assert streams.sessions == sessions[1:3] and streams._pool.num_rows == 2
    ended = {one.session: one.frame for one in run(streams)}
    assert list(ended) == sessions[1:3]
    for seed in (1, 2):
        rollout = Rollout(streams.world, seed=seed, engine=streams.engine)
        rollout.begin()
        wanted = rollout.step(action()[None])[0]
        torch.testing.assert_close(ended[sessions[seed]], wanted, atol=FP32, rtol=0)
    with pytest.raises(ValueError, match="session 0 is closed"):
        streams.request(sessions[0], action())
    with pytest.raises(ValueError, match="begin the stream first"):
        _ = sessions[0].rollout.state


@pytest.mark.parametrize("join", ["token_concat", "prefix"])
@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_a_frame_that_is_not_finite_stops_its_session_alone(kind, join):
    streams = streams_of(kind, join=join)
    healthy, broken, other = (streams.open(seed=seed) for seed in range(3))
    for _ in range(2):
        for session in (healthy, broken, other):
            streams.request(session, action())
        run(streams)
    broken.rollout._state.newest.fill_(float("nan"))
    for session in (healthy, broken, other):
        streams.request(session, action())
    ended = {one.session: one for one in run(streams)}
    assert ended[broken].frame is None
    assert ended[broken].error == (
        "session 1 was stopped at frame 2: it is not finite (NaN or infinity)"
    )
    assert broken.status == "stopped" and streams.sessions == [healthy, other]
    with pytest.raises(ValueError, match="session 1 was stopped at frame 2"):
        streams.request(broken, action())
    # Rows that held NaN serve others afterwards.
    third = streams.open(seed=3)
    for session in (healthy, other, third):
        streams.request(session, action())
    later = {one.session: one for one in run(streams)}
    for seed, session in ((0, healthy), (2, other), (3, third)):
        rollout = Rollout(streams.world, seed=seed, engine=streams.engine)
        rollout.begin()
        for _ in range(session.num_frames):
            wanted = rollout.step(action()[None])[0]
        torch.testing.assert_close(later[session].frame, wanted, atol=FP32, rtol=0)
    streams.close(broken)


def test_wrong_use_is_refused_and_harmless():
    streams, others = streams_of(max_rows=1), streams_of()
    session = streams.open()
    with pytest.raises(ValueError, match="action ids must lie in 0 .. 3, got 4"):
        streams.request(session, action(4))
    with pytest.raises(ValueError, match="none were given"):
        streams.request(session)
    with pytest.raises(ValueError, match=r"an action is one id, got shape \(2,\)"):
        streams.request(session, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="session 0 belongs to other streams"):
        others.request(session, action())
    with pytest.raises(ValueError, match="session 0 belongs to other streams"):
        others.close(session)
    with pytest.raises(ValueError, match="takes 2 rows, max_rows is 1"):
        streams.open(guidance=GUIDED["conditions"])
    with pytest.raises(ValueError, match="frames must be finite"):
        streams.open(
            torch.full((1, 3, 4, 6), float("nan")), Conditions(actions=action()[None, None])
        )
    with pytest.raises(ValueError, match="frames must be finite"):
        streams.observe(session, torch.full((3, 4, 6), float("inf")), action())
    with pytest.raises(ValueError, match="frames must be 4x6, got 8x6"):
        streams.observe(session, torch.zeros(3, 8, 6), action())
    with pytest.raises(ValueError, match="max_rows must be 1 or more, got 0"):
        streams_of(max_rows=0)
    assert streams.sessions == [session] and not streams.is_busy and streams.tick() == []
    streams.request(session, action())
    for wrong in (streams.request, lambda *words: streams.observe(session, picture(0), action())):
        with pytest.raises(ValueError, match="frame 0 of session 0 is still under way"):
            wrong(session, action())
    (ended,) = run(streams)
    assert ended.index == 0 and session.status == "idle"
    vectors = streams_of(conditions=ConditionSpec(action_dim=2))
    session = vectors.open()
    with pytest.raises(ValueError, match=r"an action is a vector, got shape \(\)"):
        vectors.request(session, torch.tensor(1.0))
    with pytest.raises(ValueError, match="must be finite"):
        vectors.request(session, torch.tensor([1.0, float("nan")]))


def test_a_session_that_does_not_fit_is_refused_before_it_takes_memory():
    world, engine = make_world(), make_engine()
    streams = Streams(world, engine, window=10**10)
    with pytest.raises(OutOfMemory, match=r"session 0, which remembers 10000000000 frames, needs "
                       r"[\d.]+ GiB on cpu, [\d.]+ GiB are free"):  # fmt: skip
        streams.open()
    assert streams.sessions == []
    with pytest.raises(OutOfMemory, match="room for 1000000000000 frames side by side needs"):
        Streams(world, engine, max_rows=10**12)
    streams.window = None
    streams.request(streams.open(), action())
    assert run(streams)[0].error is None


def test_memory_that_was_promised_is_not_given_twice(monkeypatch):
    streams = streams_of()
    first = streams.open()
    needed = first.bytes_needed
    assert needed == first.rollout.state.cache.num_bytes == first.bytes_untouched
    # Room for one more, as long as the first does not fill its own.
    monkeypatch.setattr(device_memory, "free_bytes", lambda device: 2 * needed - 1)
    for attempt in (streams.open, lambda: streams.fork(first)):
        with pytest.raises(OutOfMemory, match="session [01], which remembers 6 frames, needs"):
            attempt()
    streams.close(first)
    assert streams.open().bytes_needed == needed


def test_a_pass_without_memory_stops_its_session_alone(monkeypatch):
    streams = streams_of()
    session, other = streams.open(), streams.open()
    streams.request(session, action())
    streams.request(other, action())

    def full(*words):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(session.rollout, "_branched", full)
    stopped, ended = run(streams)
    assert stopped.session is session and "frame 0: session 0" in stopped.error
    assert "ran out of memory on cpu" in stopped.error and "no room" in stopped.error
    assert ended.session is other and ended.frame is not None


@pytest.mark.parametrize("part", ["_branched", "velocity", "decode"])
def test_an_interrupted_tick_can_be_made_again(part, monkeypatch):
    streams = streams_of()
    session = streams.open()
    streams.request(session, action())
    owner = {"_branched": session.rollout, "velocity": streams.engine.decoder}.get(
        part, streams.world.autoencoder
    )

    def interrupt(*words):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, part, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(streams)
    (ended,) = run(streams)
    rollout = Rollout(streams.world, engine=streams.engine)
    rollout.begin()
    torch.testing.assert_close(ended.frame, rollout.step(action()[None])[0], atol=FP32, rtol=0)


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_bytes_of_a_pool_are_those_of_the_formula(kind, join):
    engine = make_engine(kind, join=join)
    pool = FramePool(engine, 5)
    assert pool.num_bytes == pool_bytes(engine, 5)


def test_a_full_pool_refuses_more():
    engine, pool = make_engine(), FramePool(make_engine(), 1)
    conditions = Conditions(actions=action()[None, None])
    context = engine.context(engine.begin(None, conditions), conditions)
    new = NewFrame(context=context, noise=torch.zeros(1, *SHAPE.shape), times=[1.0, 0.0])
    with pytest.raises(ValueError, match="2 rows are needed, 1 are free"):
        pool.add([new, new])
    pool.add([new])
    with pytest.raises(ValueError, match="1 rows are needed, 0 are free"):
        pool.add([new])


class Forgetful(PlainEngine):
    """Cannot remember the frames of its second stream."""

    def observe(self, state, clean, conditions):
        """Refuse after the first call."""
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 2:
            raise RuntimeError("no such kernel")
        super().observe(state, clean, conditions)


def test_a_fault_after_a_frame_stops_its_session_and_loses_no_frame_of_another():
    world = make_world()
    streams = Streams(world, Forgetful(world.model))
    good, bad = streams.open(), streams.open(seed=1)
    for session in (good, bad):
        streams.request(session, action())
    ended = {one.session: one for one in run(streams)}
    assert ended[good].error is None and ended[good].frame is not None
    assert "session 1 was stopped at frame 0: RuntimeError: no such kernel" in ended[bad].error
    assert not bad.is_open
    streams.request(good, action())
    assert run(streams)[0].error is None
