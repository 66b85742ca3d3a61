"""Sessions behind one thread: their frames, stalled clients, resets, faults, the end of it."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from scd.autoencoders.base import PixelAutoencoder
from scd.autoencoders.config import PixelConfig
from scd.engine.plain import PlainEngine
from scd.models.checkpoint import World
from scd.models.config import SamplingConfig
from scd.models.flow import schedule, with_num_steps
from scd.serving.admission import HostConfig
from scd.serving.host import Host
from scd.serving.messages import (
    Create,
    Frame,
    GuidanceChoice,
    ServeError,
    Set,
    Step,
    Stopped,
)
from tests.tiny import COMPOSITE
from tests.tiny_host import (
    QUICK,
    WAIT_S,
    Client,
    alone,
    clip_of,
    done,
    equal,
    hosting,
    make_engine,
    make_world,
    refused,
    until,
)


def pictures(number, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, 4, 6, 3), dtype=np.uint8)


def test_a_stepped_session_has_the_frames_of_a_rollout_of_its_own():
    world = make_world()
    given = pictures(3), (0, 2, 1)
    with hosting(clips=clip_of(*given)) as host:
        session = done(host.create(start="clip", clip=0, seed=5, steps=2)).session
        assert done(host.look(session)).frame == 2
        done(host.act(session, 3, 7))
        frames = done(host.step(session, count=2))
        frames += done(host.step(session))
        frames += done(host.step(session, 1, count=2))
        info = done(host.look(session))
    assert [frame.header.frame for frame in frames] == [3, 4, 5, 6, 7]
    assert [frame.header.action for frame in frames] == [3, 3, 3, 1, 1]
    assert [frame.header.sequence for frame in frames] == [7, 7, 7, 0, 0]
    assert all(frame.header.steps == 2 and frame.header.generation == 0 for frame in frames)
    assert all(frame.header.encoder_ms > 0 and frame.header.decoder_ms > 0 for frame in frames)
    wanted = alone(world, make_engine(world), [3, 3, 3, 1, 1], given, seed=5, num_steps=2)
    equal(frames, wanted)
    assert (info.frame, info.num_given, info.seed, info.steps) == (7, 3, 5, 2)


def test_running_sessions_have_the_frames_they_have_alone_and_the_action_held():
    world = make_world()
    with hosting(max_sessions=3) as host:
        clients = [Client(host) for _ in range(3)]
        names = [done(host.create(seed=seed)).session for seed in range(3)]
        for name, client in zip(names, clients, strict=True):
            done(host.attach(name, client))
            done(host.act(name, 2, 9))
            assert done(host.run(name)).running
        for client in clients:
            client.wait_frames(12)
        for name in names:
            assert not done(host.pause(name)).running
        # A frame that had begun may still come.
        until(lambda: host.overview().num_running == 0)
        time.sleep(0.05)
        numbers = [len(client.frames) for client in clients]
        time.sleep(0.05)
        assert numbers == [len(client.frames) for client in clients]
    for seed, client in enumerate(clients):
        assert {frame.header.sequence for frame in client.frames} == {9}
        assert [frame.header.frame for frame in client.frames] == list(range(len(client.frames)))
        wanted = alone(world, make_engine(world), [2] * len(client.frames), seed=seed)
        gaps = [
            np.abs(frame.pixels.astype(int) - pixels).max()
            for frame, pixels in zip(client.frames, wanted, strict=True)
        ]
        # Calls of other sizes round otherwise: now and then a pixel on an edge.
        assert max(gaps) <= 1


def test_a_client_that_does_not_acknowledge_gets_no_more_frames_and_stalls_nobody():
    with hosting(queue_frames=3) as host:
        slow, quick = Client(host, acknowledges=False), Client(host)
        names = [done(host.create(seed=seed)).session for seed in range(2)]
        for name, client in zip(names, (slow, quick), strict=True):
            done(host.attach(name, client))
            done(host.run(name))
        quick.wait_frames(30)
        assert [frame.header.frame for frame in slow.frames] == [0, 1, 2]
        # Of another generation, of the past, of the future: none lets more than a queue through.
        done(host.acknowledge(names[0], 7, 2))
        with pytest.raises(ValueError, match="greater than or equal to 0"):
            host.acknowledge(names[0], 0, -5)
        quick.wait_frames(40)
        assert len(slow.frames) == 3
        done(host.acknowledge(names[0], 0, 10**9))
        slow.wait_frames(6)
        quick.wait_frames(len(quick.frames) + 10)
        assert len(slow.frames) == 6


@pytest.mark.parametrize("max_rows", [2, 16])
def test_sessions_get_equal_shares(max_rows):
    with hosting(max_sessions=5, max_rows=max_rows) as host:
        clients = [Client(host) for _ in range(5)]
        names = [done(host.create(seed=seed)).session for seed in range(5)]
        for name, client in zip(names, clients, strict=True):
            done(host.attach(name, client))
        runs = [host.run(name) for name in names]
        assert all(done(one).running for one in runs)
        before = [len(client.frames) for client in clients]
        clients[0].wait_frames(before[0] + 20)
        made = [len(client.frames) - then for client, then in zip(clients, before, strict=True)]
    # A tenth, and the frames under way.
    assert max(made) - min(made) <= 2 + 2


def test_a_session_without_a_client_makes_no_frames():
    with hosting() as host:
        name = done(host.create()).session
        refused(host.run(name), "bad_request", "attach first")
        client = Client(host)
        done(host.attach(name, client))
        done(host.run(name))
        client.wait_frames(2)
        done(host.detach(name, client))
        done(host.detach(name, client))
        assert not done(host.look(name)).running
        made = host.overview().num_frames
        time.sleep(0.05)
        assert host.overview().num_frames <= made + 1


def test_one_client_per_session():
    with hosting() as host:
        name = done(host.create()).session
        first, second = Client(host), Client(host)
        assert done(host.attach(name, first)).attached
        refused(host.attach(name, second), "session_busy")
        done(host.detach(name, second))
        assert done(host.look(name)).attached
        done(host.detach(name, first))
        assert done(host.attach(name, second)).attached
        # Methods of an object are made anew each time they are named.
        done(host.detach(name, second))
        done(host.attach(name, second.__call__))
        done(host.detach(name, second.__call__))
        assert not done(host.look(name)).attached


def test_a_client_may_go_and_another_come_while_a_frame_is_under_way():
    world = make_world()
    with hosting() as host:
        name = done(host.create(seed=5, steps=8)).session
        client = Client(host)
        heard = [client]
        done(host.attach(name, client))
        host.act(name, 2)
        for number in range(2, 20):
            host.run(name)
            client.wait_frames(1)
            # The next frame has begun, or is about to.
            time.sleep(0.0004 * (number % 4))
            host.detach(name, client)
            client = Client(host)
            heard.append(client)
            done(host.attach(name, client))
        done(host.pause(name))
        done(host.step(name))
        frames = [frame for one in heard for frame in one.frames]
        assert host.overview().healthy, host.overview().reason
        assert len(frames) >= 18
        # What ended between two clients nobody heard; it is in the history all the same.
        pixels = alone(world, make_engine(world), [2] * (frames[-1].header.frame + 1), None, 5, 8)
        equal(frames, [pixels[frame.header.frame] for frame in frames])


def test_frames_come_at_the_pace_that_was_asked_for():
    with hosting(max_fps=40.0) as host:
        clients = [Client(host) for _ in range(2)]
        for client, fps in zip(clients, (20.0, None), strict=True):
            name = done(host.create()).session
            done(host.attach(name, client))
            done(host.run(name, fps))
        clients[0].wait_frames(10)
        # Never more than the pace; how many fewer is up to the machine.
        assert len(clients[1].frames) <= 2 * len(clients[0].frames) + 2
        with pytest.raises(ValueError, match="finite number"):
            host.run(name, float("nan"))


def test_a_reset_voids_what_is_under_way():
    world = make_world()
    with hosting(max_step_count=1000) as host:
        name = done(host.create(seed=1)).session
        client = Client(host)
        done(host.attach(name, client))
        waiting = host.step(name, 1, count=1000)
        client.wait_frames(3)
        info = done(host.reset(name, seed=2))
        refused(waiting, "superseded")
        assert (info.generation, info.frame, info.seed) == (1, -1, 2)
        done(host.step(name, 3, count=2))
        number = next(i for i, frame in enumerate(client.frames) if frame.header.generation == 1)
        # From the first frame of the new generation on there is none of the old one.
        later = client.frames[number:]
        assert [(frame.header.generation, frame.header.frame) for frame in later] == [
            (1, 0),
            (1, 1),
        ]
        equal(later, alone(world, make_engine(world), [3, 3], seed=2))
        done(host.set(name, steps=1, seed=8))
        info = done(host.restart(name))
        assert (info.generation, info.seed, info.steps) == (2, 8, 1)
        equal(
            done(host.step(name, 3, count=2)),
            alone(world, make_engine(world), [3, 3], seed=8, num_steps=1),
        )


GUIDANCES = [
    None,
    GuidanceChoice(kind="conditions", scale=1.5),
    GuidanceChoice(kind="context_noise", scale=2.0),
]


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_rewind_and_fork_are_exact_at_every_kept_frame(guidance):
    world = make_world()
    with hosting(max_sessions=2, history_frames=6, keyframe_every=3) as host:
        name = done(host.create(guidance=guidance, seed=3)).session
        for action in range(16):
            done(host.step(name, action % 4))
        info = done(host.look(name))
        # 6 back at least, fewer than 6 + 3 more.
        assert 16 - 1 - 6 - 3 < info.history_from <= 16 - 1 - 6
        engine = make_engine(world)
        past = alone(world, engine, [number % 4 for number in range(16)], seed=3, guidance=guidance)
        for index in range(info.history_from, 16, 2):
            fork = done(host.fork(name, index))
            assert (fork.frame, fork.forked_from) == (index, name)
            # What was, again: from the memory as it was, for the same actions.
            same = [(index + 1 + number) % 4 for number in range(min(3, 15 - index))]
            for number, action in enumerate(same):
                equal(done(host.step(fork.session, action)), past[index + 1 + number :][:1])
            # The fork can itself go back: to the oldest frame, and on from there.
            done(host.rewind(fork.session, info.history_from))
            first = info.history_from + 1
            equal(done(host.step(fork.session, first % 4)), past[first:][:1])
            done(host.close(fork.session))
        for index in (14, 12, 9):
            info = done(host.rewind(name, index))
            assert info.frame == index
            (frame,) = done(host.step(name, 1))
            actions = [number % 4 for number in range(index + 1)] + [1]
            equal([frame], alone(world, engine, actions, seed=3, guidance=guidance)[-1:])
        assert info.generation == 3
        for index in (1, 11):
            refused(host.rewind(name, index), "out_of_history", "can be gone back to")
        assert done(host.look(name)).generation == 3


def test_the_history_shows_what_was_seen_given_frames_too():
    clip = pictures(3)
    with hosting(history_frames=4, keyframe_every=2, clips=clip_of(clip, (1, 2, 3))) as host:
        name = done(host.create(start="clip", clip=0)).session
        shown = done(host.frames(name, 0, 3))
        equal(shown, clip)
        # They led to given frames, of which that is not said.
        assert [frame.header.action for frame in shown] == [None] * 3
        done(host.act(name, 1, 4))
        frames = done(host.step(name, count=2))
        observed = done(host.observe(name, pictures(1, 9)[0], 3))
        assert (observed.frame, observed.generation) == (5, 0)
        again = done(host.frames(name, 3, 3))
        equal(again, [frames[0].pixels, frames[1].pixels, pictures(1, 9)[0]])
        assert [frame.header.sequence for frame in again] == [4, 4, 0]
        assert [frame.header.steps for frame in again] == [3, 3, 0]
        done(host.step(name, count=20))
        assert done(host.look(name)).kept_from > 15
        refused(host.frames(name, 5), "out_of_history", "frame 5 was asked for")


def test_a_fork_is_another_session_and_may_have_another_seed():
    world = make_world()
    with hosting() as host:
        name = done(host.create(seed=4)).session
        done(host.step(name, 1, count=2))
        twin = done(host.fork(name, seed=11))
        assert twin.seed == 11 and not twin.attached
        (mine,), (theirs,) = done(host.step(name, 2)), done(host.step(twin.session, 2))
        equal([mine], alone(world, make_engine(world), [1, 1, 2], seed=4)[-1:])
        assert not np.array_equal(mine.pixels, theirs.pixels)


class Sabotaged(PixelAutoencoder):
    """Cannot decode once it is told so."""

    is_broken = False

    def decode(self, latents):
        """Fail, or decode."""
        if self.is_broken:
            raise RuntimeError("the device is gone")
        return super().decode(latents)


def test_the_end_of_the_model_thread_is_noticed_and_said():
    model = make_world()
    world = World(model.model, Sabotaged(PixelConfig()), model.card, model.sampling)
    said = []
    with hosting(world, said=said) as host:
        name = done(host.create()).session
        client = Client(host)
        done(host.attach(name, client))
        assert host.overview().healthy
        world.autoencoder.is_broken = True
        waiting = [host.step(name, count=4), host.step(name)]
        for future in waiting:
            refused(future, "model_stopped", "RuntimeError: the device is gone")
        client.wait(lambda one: any(isinstance(event, Stopped) for event in one.events))
        until(lambda: not host.overview().healthy)
        assert "the device is gone" in host.overview().reason
        refused(host.create(), "model_stopped", "the device is gone")
    assert any("the device is gone" in line for line in said)


class Poisoned(PlainEngine):
    """Makes NaN of one action."""

    def context(self, state, conditions, *rest):
        """Fail for action 3."""
        if int(conditions.actions[0, 0]) == 3:
            raise RuntimeError("no such kernel")
        return super().context(state, conditions, *rest)

    def velocity(self, context, noisy, time):
        """Return NaN for action 2."""
        found = super().velocity(context, noisy, time)
        return found * float("nan") if int(context.conditions.actions[0, 0]) == 2 else found


@pytest.mark.parametrize(("action", "fault"), [(3, "no such kernel"), (2, "not finite")])
def test_a_fault_stops_its_session_alone(action, fault):
    world, said = make_world(), []
    with hosting(world, Poisoned(world.model), said) as host:
        names = [done(host.create(seed=seed)).session for seed in range(2)]
        clients = [Client(host) for _ in names]
        for name, client in zip(names, clients, strict=True):
            done(host.attach(name, client))
            done(host.run(name))
            client.wait_frames(2)
        done(host.act(names[0], action))
        clients[0].wait(lambda one: any(isinstance(event, Stopped) for event in one.events))
        assert fault in clients[0].events[-1].reason
        refused(host.step(names[0]), "session_stopped", fault)
        clients[1].wait_frames(len(clients[1].frames) + 5)
        overview = host.overview()
        assert (overview.num_sessions, overview.num_faults, overview.healthy) == (1, 1, True)
        assert done(host.create()).frame == -1
    assert any(fault in line for line in said)


class Full(PlainEngine):
    """Has no room for the pass of action 3, nor for the calls of a tick in which it was tried."""

    def __init__(self, model):
        super().__init__(model)
        self.was_tried = False

    def context(self, state, conditions, *rest):
        """Fail for action 3."""
        if int(conditions.actions[0, 0]) == 3:
            self.was_tried = True
            raise torch.OutOfMemoryError("no room for a pass")
        return super().context(state, conditions, *rest)

    def velocity(self, context, noisy, time):
        """Fail once it was tried."""
        if self.was_tried:
            self.was_tried = False
            raise torch.OutOfMemoryError("no room for a call")
        return super().velocity(context, noisy, time)


def test_a_device_full_in_a_pass_and_in_the_call_that_all_share_ends_those_two_alone():
    world, said = make_world(), []
    with hosting(world, Full(world.model), said, max_sessions=3) as host:
        names = [done(host.create(seed=seed)).session for seed in range(3)]
        clients = [Client(host) for _ in names]
        for name, client in zip(names, clients, strict=True):
            done(host.attach(name, client))
            done(host.run(name))
            client.wait_frames(2)
        done(host.act(names[2], 3))
        until(lambda: host.overview().num_faults == 2)
        reasons = [str(host.look(name).exception(WAIT_S) or "") for name in names]
        assert "session 2, which remembers 6 frames, ran out of memory" in reasons[2]
        # Of the others that which joined last of those in the call; one goes on.
        assert sum("one call for" in reason for reason in reasons[:2]) == 1
        going = clients[reasons.index("")]
        going.wait_frames(len(going.frames) + 5)
        assert done(host.create()).frame == -1
        overview = host.overview()
        assert (overview.num_sessions, overview.num_faults, overview.healthy) == (2, 2, True)
    assert sum("session 2 was stopped" in line for line in said) == 1


def test_a_client_that_raises_is_let_go():
    said = []
    with hosting(said=said) as host:
        name = done(host.create()).session

        def deaf(event):
            raise RuntimeError("the line is dead")

        done(host.attach(name, deaf))
        assert len(done(host.step(name, count=2))) == 2
        assert not done(host.look(name)).attached
    assert any("the line is dead" in line for line in said)


def test_limits_and_words_that_do_not_fit_are_refused_and_harmless():
    world = make_world()
    with hosting(max_sessions=1, max_start_frames=2, max_rows=1) as host:
        name = done(host.create()).session
        guided = GuidanceChoice(kind="conditions", scale=2.0)
        noisy = GuidanceChoice(kind="context_noise")
        wrong = [
            (host.act(name, 4), "unknown_action", "0 .. 3, got 4"),
            (host.act(name, (0.5, 1.0)), "unknown_action", "an action of this world is a number"),
            (host.step(name, count=257), "bad_field", "count: must lie in 1 .. 256 here, got 257"),
            (host.set(name, steps=9), "bad_field", "steps: must lie in 1 .. 8 here, got 9"),
            (host.set(name, guidance=guided), "bad_request", "reset with it"),
            (host.set(name, guidance=noisy), "bad_request", "max_rows is 1"),
            (host.observe(name, pictures(1)[0, :, :5], 1), "bad_request", "must be bytes of shape"),
            (host.frames(name, 0), "out_of_history", "frame 0 was asked for"),
            (host.reset(name, pictures(3)), "bad_request", "1 to 2 frames"),
            (host.reset(name, pictures(1), action=7), "unknown_action", "0 .. 3, got 7"),
            (host.reset(name, label=1), "bad_field", "this world wants none, got 1"),
            (host.reset(name, start="clip", clip=0), "unknown_clip", "this world has 0 clips"),
        ]
        for future, code, words in wrong:
            refused(future, code, words)
        for kind, fields in ((Set, {"seed": -1}), (Step, {"count": 0}), (Create, {"action": 1})):
            with pytest.raises(ValueError):
                kind(**fields)
        refused(host.create(), "too_many_sessions", "1 of 1 sessions")
        refused(host.fork(name), "too_many_sessions", "1 of 1 sessions")
        for call in (host.look, host.step, host.close, host.pause, host.snapshot):
            refused(call("../../etc/passwd"), "unknown_session")
        info = done(host.look(name))
        assert (info.generation, info.frame) == (0, -1)
        equal(done(host.step(name, 1)), alone(world, make_engine(world), [1]))
        done(host.close(name))
        done(host.create())


def test_steps_that_wait_are_bounded_and_so_are_calls():
    gate = threading.Event()
    with hosting(max_orders=2, queue_frames=1, queue_commands=5) as host:
        name = done(host.create()).session

        def hold(event):
            if isinstance(event, Frame) and event.header.frame == 1:
                gate.wait(WAIT_S)

        done(host.attach(name, hold))
        # Nobody acknowledges: they wait.
        orders = [host.step(name, count=2) for _ in range(3)]
        refused(orders[2], "bad_request", "2 steps of this session wait already")
        until(lambda: host.overview().num_frames == 1)
        done(host.acknowledge(name, 0, 0))
        until(lambda: host.overview().num_commands == 0)
        calls = [host.look(name) for _ in range(16)]
        sent_away = [call for call in calls if call.done() and call.exception()]
        gate.set()
        assert sent_away
        for call in sent_away:
            refused(call, "overloaded", "5 calls wait")
        assert all(done(call).frame >= 0 for call in calls if call not in sent_away)


def test_memory_is_promised_before_it_is_taken():
    with hosting(max_sessions=50, memory_gib=0.002, history_frames=4) as host:
        names = []
        with pytest.raises(ServeError, match="a session of this kind needs"):
            for _ in range(50):
                names.append(done(host.create()).session)
        overview = host.overview()
        assert 0 < len(names) < 50
        assert overview.reserved_bytes <= overview.budget_bytes <= 0.002 * 2**30
        guided = GuidanceChoice(kind="conditions", scale=2.0)
        refused(host.reset(names[0], guidance=guided), "too_many_sessions")
        assert host.overview().reserved_bytes == overview.reserved_bytes
        done(host.close(names[1]))
        done(host.close(names[2]))
        assert done(host.reset(names[0], guidance=guided)).guidance == guided


def test_a_history_that_does_not_fit_is_shortened_and_said():
    said = []
    with hosting(said=said, memory_gib=0.01, max_sessions=4, history_frames=10_000) as host:
        name = done(host.create()).session
        assert len(done(host.step(name, count=3))) == 3
    assert "instead of 10000 and 4" in said[0]
    world = make_world()
    with pytest.raises(ValueError, match="may be taken"):
        Host(world, make_engine(world), replace(QUICK, memory_gib=1e-5), said.append).start()


def test_after_a_stop_everything_is_refused():
    with hosting() as host:
        name = done(host.create()).session
        client = Client(host)
        done(host.attach(name, client))
        host.stop(WAIT_S)
        assert isinstance(client.events[-1], Stopped)
        refused(host.look(name), "model_stopped", "the server is stopping")
        assert not host.overview().healthy


def test_settings_are_checked():
    for name, value in {"max_sessions": 0, "max_fps": 0.0, "idle_s": float("inf")}.items():
        with pytest.raises(ValueError, match=f"{name} must be a finite number above 0, got"):
            HostConfig(**{name: value})


def test_steps_there_and_back_are_the_listed_ones_before_and_after_a_snapshot():
    listed = SamplingConfig(num_steps=4, schedule="listed", times=(1.0, 0.94, 0.83, 0.62))
    world = replace(make_world(), sampling=listed)
    with hosting(world) as host:
        name = done(host.create(seed=5)).session
        done(host.set(name, steps=2))
        assert done(host.set(name, steps=4)).steps == 4
        frames = done(host.step(name, 1))
        twin = done(host.restore(done(host.snapshot(name)))).session
        equal(frames + done(host.step(name, 2)), alone(world, make_engine(world), [1, 2], seed=5))
        equal(done(host.step(twin, 2)), alone(world, make_engine(world), [1, 2], seed=5)[1:])


def test_listed_times_with_another_number_of_steps():
    listed = SamplingConfig(num_steps=4, schedule="listed", times=(1.0, 0.9, 0.6, 0.3))
    assert with_num_steps(listed, 4) == listed
    assert with_num_steps(listed, 2).times == (1.0, 0.6)
    assert with_num_steps(listed, 1).times == (1.0,)
    more = schedule(with_num_steps(listed, 7)).tolist()
    assert len(more) == 8 and more == sorted(more, reverse=True)
    assert with_num_steps(SamplingConfig(), 3) == SamplingConfig(num_steps=3)
    with pytest.raises(ValueError, match="num_steps must be"):
        with_num_steps(listed, 0)
    torch.testing.assert_close(schedule(with_num_steps(listed, 8))[2::2][:3].float(),
                               torch.tensor([0.9, 0.6, 0.3]))  # fmt: skip


def test_actions_are_given_part_by_part():
    world = make_world(conditions=COMPOSITE)
    with hosting(world) as host:
        assert [part["name"] for part in host.info.action_parts] == [
            "keys", "mouse", "pad/[0]", "pad/[1]"
        ]  # fmt: skip
        name, twin = (done(host.create(seed=3)).session for _ in range(2))
        action = {"keys": ["w", "d"], "mouse": [0.5, -0.25], "pad": [[2, 1], 0]}
        vector = (1.0, 0.0, 0.0, 1.0, 0.5, -0.25, 2.0, 1.0, 1.0)
        (by_part,), (by_vector,) = done(host.step(name, action)), done(host.step(twin, vector))
        assert by_part.header.action == by_vector.header.action == vector
        assert (by_part.pixels == by_vector.pixels).all()
        assert done(host.look(name)).action == vector
        wrong = [
            ({"kays": ["w"]}, "no part 'kays'; did you mean 'keys'"),
            ({"keys": ["q"]}, "no key 'q'"),
            ({"mouse": [0.5, 2.0]}, "'mouse_y' is a number in -1 .. 1, got 2"),
            ((0.5, *vector[1:]), "'w' is a whole number in 0 .. 1, got 0.5"),
            ((1.0, 0.0), "needed 9 entries, got 2"),
            (1, "a vector of 9 numbers, or its parts: keys, mouse, pad/"),
            (([1, 0, 0, 0], 1), "needs parts by name: keys, mouse, pad"),
        ]
        for given, words in wrong:
            with pytest.raises(ServeError, match=words) as caught:
                done(host.step(name, given))
            assert caught.value.code == "unknown_action"
        with pytest.raises(ServeError, match="unknown part of an action 'feet'"):
            feet = GuidanceChoice(kind="conditions", scale=2.0, parts=("feet",))
            done(host.create(guidance=feet))
        looks = GuidanceChoice(kind="conditions", scale=2.0, parts=("mouse",))
        state = done(host.create(guidance=looks))
        assert state.guidance == looks and len(done(host.step(state.session, action))) == 1
    with hosting() as host:
        name = done(host.create()).session
        with pytest.raises(ServeError, match="an action of this world is a number"):
            done(host.step(name, {"keys": ["w"]}))
