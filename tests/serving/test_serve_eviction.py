"""Sessions as files: back exactly, refused when they do not fit, kept when the disk is full."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from scd.common import files as atomic
from scd.engine.open import open_engine
from scd.models.checkpoint import World
from scd.models.config import CacheConfig, SamplingConfig
from scd.serving.messages import (
    Beginning,
    Evicted,
    GuidanceChoice,
    ServeError,
    State,
)
from scd.serving.session import History, KeptFrame, Start, as_action, as_guidance
from scd.serving.snapshot import Image, fingerprint_of, parse, rebuild, write
from scd.serving.store import SUFFIX, SessionStore, StoreLimits
from scd.serving.tensors import read_head
from scd.streaming.rollout import Rollout
from tests.serving.test_serve_host import pictures
from tests.tiny import tiny_dense, tiny_separable
from tests.tiny_host import (
    WAIT_S,
    Client,
    alone,
    done,
    equal,
    hosting,
    make_engine,
    make_world,
    refused,
    until,
)

GUIDED = GuidanceChoice(kind="conditions", scale=1.5)


def played(world, engine, num_frames, guidance=None, seed=2):
    """An image of a session that has played some frames, and the stream itself."""
    rollout = Rollout(world, None, as_guidance(guidance), seed, None, engine)
    rollout.begin()
    history = History.begin(rollout, [], 6, 3)
    for number in range(num_frames):
        rollout.step(as_action(number % 4, batch=True))
        history.add(rollout, KeptFrame(latent=rollout.newest, action=number % 4, steps=3))
    past = history.upto(num_frames - 1)
    state = State(
        session="a-name", generation=3, frame=num_frames - 1, num_given=0, running=False,
        attached=False, fps=None, action=1, sequence=5, steps=3,
        guidance=guidance or GuidanceChoice(), seed=seed, history_from=past.oldest,
        kept_from=past.kept_from,
    )  # fmt: skip
    start = Start(message=Beginning(seed=seed, guidance=guidance))
    return Image(state=state, start=start, live=rollout.fork(), history=past), rollout


@pytest.mark.parametrize("num_frames", [0, 1, 11])
@pytest.mark.parametrize(("kind", "make"), [("fast", tiny_separable), ("plain", tiny_dense)])
def test_a_session_goes_on_exactly_from_its_file(kind, make, num_frames):
    world = make_world(make)
    engine = make_engine(world, kind)
    fingerprint = fingerprint_of(world, engine)
    for guidance in (None, GUIDED)[: 1 + (num_frames > 4)]:
        image, rollout = played(world, engine, num_frames, guidance)
        parsed = parse(write(image, fingerprint))
        fingerprint.refuse(parsed.fingerprint)
        found = rebuild(parsed, (world, engine, None), 6, 3)
        assert (found.state, found.start) == (image.state, image.start)
        assert found.history.oldest == image.history.oldest
        earlier = found.history.oldest
        was, back = image.history.at(earlier), found.history.at(earlier)
        for one, other in ((rollout, found.live), (was, back)):
            for action in (3, 0):
                wanted, made = (each.step(as_action(action, batch=True)) for each in (one, other))
                assert torch.equal(wanted, made)


def test_bfloat16_and_a_first_frame_that_is_needed():
    world = make_world(start_frame=False)
    engine = open_engine(world.model, "fast", "bf16")
    with hosting(world, engine) as host:
        name = done(host.create(pictures(2), action=1)).session
        done(host.step(name, 1, count=9))
        # Copies that are written while a session stays in memory are without its history.
        bare = host.call(lambda loop: loop.sessions.image(loop.sessions.get(name), history=False))
        fingerprint = fingerprint_of(world, make_engine(world, "fast", "bf16"))
        for data, has_history in (
            (done(host.snapshot(name)), True),
            (write(done(bare), fingerprint), False),
        ):
            twin = done(host.restore(data))
            assert twin.session != name
            assert (twin.frame, twin.num_given, twin.generation) == (10, 2, 0)
            assert (twin.history_from == 10) != has_history
            mine = done(host.step(done(host.fork(name)).session, 3, count=3))
            equal(done(host.step(twin.session, 3, count=3)), [one.pixels for one in mine])
            again = done(host.restart(twin.session))
            assert (again.frame, again.generation) == (1, 1)


def rewritten(data, change):
    """The same file with its JSON and tensors changed."""
    texts, tensors = read_head(data).texts, load(bytes(data))
    notes = {name: json.loads(text) for name, text in texts.items()}
    change(notes, tensors)
    return save(tensors, {name: json.dumps(note) for name, note in notes.items()})


def files(folder):
    """Names of the sessions on disk that are in nobody's memory."""
    return [path.name for path in folder.glob(f"*{SUFFIX}")]


def set_note(*path, value):
    def change(notes, tensors):
        target = notes
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


def set_tensor(name, make):
    def change(notes, tensors):
        tensors[name] = make(tensors[name])

    return change


def without_copies(notes, tensors):
    notes["session"]["copies"] = []
    for name in [name for name in tensors if name.startswith("copy.")]:
        del tensors[name]


HOSTILE = {
    "copies that nobody speaks of": set_note("session", "copies", value=[]),
    "too many given frames": lambda notes, tensors: tensors.update(
        start=torch.zeros(65, 4, 6, 3, dtype=torch.uint8)
    ),
    "a tensor of its own": lambda notes, tensors: tensors.update(more=torch.zeros(2)),
    "another engine": set_note("world", "engine", value="FastSeparable bfloat16"),
    "another model": set_note("world", "settings", value="{}"),
    "settings that are no JSON": set_note("world", "settings", value="[" * 100_000),
    "other weights": set_note("world", "values", value=[0.5] * 16),
    "no fingerprint": set_note("world", "values", value=[]),
    "format": set_note("session", "format", value="scd session 1"),
    "unknown field": set_note("session", "surprise", value=1),
    "a text as a number": set_note("session", "state", "seed", value="1"),
    "infinite scale": set_note("session", "state", "guidance", "scale", value=float("inf")),
    "negative seed": set_note("session", "state", "seed", value=-1),
    "huge seed": set_note("session", "state", "seed", value=2**70),
    "too many steps": set_note("session", "state", "steps", value=10**9),
    "no steps": set_note("session", "state", "steps", value=0),
    "unknown action": set_note("session", "state", "action", value=99),
    "an action of another kind": set_note("session", "state", "action", value=[0.5, 0.5]),
    "unknown action of the past": set_note("session", "frames", 0, "action", value=-1),
    "label": set_note("session", "start", "label", value=3),
    "guidance of another memory": set_note(
        "session", "state", "guidance", "kind", value="conditions"
    ),
    "huge position": set_note("session", "live", "num_frames", value=2**62),
    "fewer frames than given": set_note("session", "state", "num_given", value=50),
    "a ring that is too long": set_note("session", "live", "slots", value=list(range(50))),
    "a ring in disorder": set_note("session", "live", "slots", value=[9, 8, 7, 6, 5, 4]),
    "a ring with holes": set_note("session", "live", "slots", value=[None] * 6),
    "frames that went": set_note("session", "live", "num_evicted", value=0),
    "frames missing": set_note("session", "state", "kept_from", value=5),
    "tensor missing": lambda notes, tensors: tensors.pop("live.keys"),
    "history missing": lambda notes, tensors: tensors.pop("latents"),
    "sinks missing": lambda notes, tensors: tensors.pop("live.sink_keys"),
    "shape": set_tensor("live.values", lambda tensor: tensor[:, :, :, 1:].contiguous()),
    "kind of number": set_tensor("live.newest", lambda tensor: tensor.double()),
    "not a number": set_tensor("latents", lambda tensor: tensor * float("nan")),
    "infinite memory": set_tensor("live.keys", lambda tensor: tensor + float("inf")),
    "start": lambda notes, tensors: tensors.update(start=torch.zeros(1, 2, 3)),
}


def test_hostile_files_are_refused_and_the_host_plays_on():
    world = make_world()
    with hosting(world, max_sessions=3) as host:
        name = done(host.create(seed=1)).session
        done(host.step(name, 1, count=11))
        data = done(host.snapshot(name))
        for what, change in HOSTILE.items():
            error = host.restore(rewritten(data, change)).exception(WAIT_S)
            assert isinstance(error, ServeError), what
            assert error.code in ("bad_snapshot", "bad_request") and len(str(error)) < 600
        assert host.overview().num_sessions == 1
        promised = host.overview().reserved_bytes
        twin = done(host.restore(rewritten(data, lambda *_: None)))
        until(lambda: host.overview().reserved_bytes == 2 * promised)
        equal(done(host.step(twin.session, 2)), [one.pixels for one in done(host.step(name, 2))])
        # A history whose copies are further apart than here is not taken over, the session is.
        for copies in (
            without_copies,
            set_note("session", "copies", 1, "num_frames", value=40),
        ):
            done(host.close(twin.session))
            twin = done(host.restore(rewritten(data, copies)))
            assert twin.history_from == twin.frame == 10


@cache
def whole_file():
    """A small snapshot, and where it fits."""
    world = make_world()
    engine = make_engine(world)
    fingerprint = fingerprint_of(world, engine)
    return write(played(world, engine, 4)[0], fingerprint), fingerprint, (world, engine, None)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_damaged_files_are_refused(data):
    whole, fingerprint, place = whole_file()
    damaged = bytearray(whole)
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        # The header, where a change means something else.
        for _ in range(data.draw(st.integers(1, 4))):
            damaged[data.draw(st.integers(0, 2000))] = data.draw(st.integers(0, 255))
    try:
        parsed = parse(bytes(damaged))
        fingerprint.refuse(parsed.fingerprint)
        rebuild(parsed, place, 6, 3)
    except ServeError:
        return
    # What was changed does not matter then: a seed, a name.
    assert len(damaged) == len(whole)


def test_a_model_with_other_weights_is_told_apart(tmp_path):
    world, other = make_world(), make_world(amount=0.11)
    fingerprint, theirs = (fingerprint_of(one, make_engine(one)) for one in (world, other))
    assert fingerprint == fingerprint_of(world, make_engine(world))
    with pytest.raises(ServeError, match="with other weights"):
        fingerprint.refuse(theirs)
    small = make_world(join="add")
    with pytest.raises(ServeError, match="decoder.join: 'add', 'token_concat'"):
        fingerprint.refuse(fingerprint_of(small, make_engine(small)))


def test_an_idle_session_is_evicted_and_comes_back_exactly(tmp_path):
    world = make_world()
    with hosting(world, evict_dir=tmp_path, idle_s=0.05) as host:
        name = done(host.create(seed=6)).session
        client = Client(host)
        done(host.attach(name, client))
        done(host.act(name, 2, 4))
        done(host.step(name, count=14))
        client.wait(lambda one: isinstance(one.events[-1], Evicted))
        until(lambda: host.overview().num_evicted == 1)
        assert host.overview().num_sessions == host.overview().reserved_bytes == 0
        assert files(tmp_path) == [f"{name}{SUFFIX}"]
        # Words that are late do not bring it back.
        refused(host.acknowledge(name, 0, 13), "unknown_session")
        # Several that want it at once.
        first, second = host.look(name), host.step(name, count=2)
        assert (done(first).frame, done(first).action, done(first).sequence) == (13, 2, 4)
        engine = make_engine(world)
        equal(done(second), alone(world, engine, [2] * 16, seed=6)[-2:])
        until(lambda: host.overview().num_evicted == 1)
        done(host.rewind(name, 9))
        assert files(tmp_path) == []
        equal(done(host.step(name, 3)), alone(world, engine, [2] * 10 + [3], seed=6)[-1:])
        until(lambda: host.overview().num_evicted == 1)
        done(host.close(name))
        refused(host.look(name), "unknown_session")
        assert files(tmp_path) == []
        assert host.overview().num_evictions >= 3


def test_a_session_comes_back_whatever_the_room_for_what_comes_and_goes(tmp_path):
    world = make_world()
    with hosting(world, evict_dir=tmp_path, idle_s=0.05) as host:
        name = done(host.create(seed=6)).session
        done(host.step(name, 2, count=4))
        until(lambda: host.overview().num_evicted == 1)
        host.under_way.budget = 8
        assert done(host.look(name)).frame == 3
        refused(host.snapshot(name), "too_large")


def test_a_disk_that_is_full_loses_nothing(tmp_path, monkeypatch):
    world, said = make_world(), []
    with hosting(world, said=said, evict_dir=tmp_path, idle_s=0.02) as host:

        def full(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(atomic, "_flush", full)
            name = done(host.create(seed=1)).session
            frames = done(host.step(name, 1, count=3))
            until(lambda: host.overview().num_failed_evictions >= 2)
            assert files(tmp_path) == []
        frames += done(host.step(name, 1, count=2))
        equal(frames, alone(world, make_engine(world), [1] * 5, seed=1))
        until(lambda: host.overview().num_evicted == 1)
    assert any("stays in memory" in line and "No space left" in line for line in said)


def test_sessions_make_room_for_others_and_wait_for_room(tmp_path):
    world = make_world()
    with hosting(world, evict_dir=tmp_path, max_sessions=2) as host:
        names = [done(host.create(seed=seed)).session for seed in range(5)]
        until(lambda: host.overview().num_evicted == 3)
        for turn in range(2):
            for seed, name in enumerate(names):
                wanted = alone(world, make_engine(world), [1] * (turn + 1), seed=seed)[-1:]
                equal(done(host.step(name, 1)), wanted)
        clients = [Client(host) for _ in range(2)]
        for name, client in zip(names, clients, strict=False):
            done(host.attach(name, client))
        refused(host.attach(names[2], Client(host)), "too_many_sessions")
        refused(host.create(), "too_many_sessions")
        done(host.detach(names[0], clients[0]))
        assert done(host.attach(names[2], clients[0])).attached


def test_a_host_that_stops_hands_its_sessions_to_the_next(tmp_path):
    world = make_world()
    with hosting(world, evict_dir=tmp_path) as host:
        names = [done(host.create(seed=seed)).session for seed in range(2)]
        client = Client(host)
        done(host.attach(names[0], client))
        for name in names:
            done(host.step(name, 1, count=7))
        done(host.run(names[0]))
        host.stop(WAIT_S)
        assert isinstance(client.events[-1], Evicted)
        refused(host.look(names[0]), "model_stopped")
    with hosting(world, evict_dir=tmp_path) as first, hosting(world, evict_dir=tmp_path) as second:
        assert first.overview().num_evicted == second.overview().num_evicted == 2
        equal(
            done(first.step(names[1], 2)),
            alone(world, make_engine(world), [1] * 7 + [2], seed=1)[-1:],
        )
        refused(second.look(names[1]), "unknown_session")
        info = done(second.look(names[0]))
        actions = [1] * (info.frame + 1) + [3]
        equal(done(second.step(names[0], 3)), alone(world, make_engine(world), actions)[-1:])
        # What one puts there while both run, the other finds.
        late = done(first.create(seed=9)).session
        first.stop(WAIT_S)
        until(lambda: done(second.is_here(late)))
        assert done(second.look(late)).seed == 9


def test_what_a_killed_host_had_written_is_another_ones(tmp_path):
    world, engine = make_world(), make_engine(make_world())
    with hosting(world, said=[], evict_dir=tmp_path, backup_s=0.02) as first:
        name, gone = (done(first.create(seed=seed)).session for seed in (3, 4))
        client = Client(first)
        done(first.attach(name, client))
        made = done(first.step(name, 1, count=9))
        until(
            lambda: newest_in_memory(tmp_path).get(name) == 8 and gone in newest_in_memory(tmp_path)
        )
        done(first.close(gone))
        until(lambda: gone not in newest_in_memory(tmp_path))
        with hosting(world, evict_dir=tmp_path) as second:
            # As long as the first lives, what it has written is its own.
            refused(second.look(name), "unknown_session")
            # The lock goes with the process, the session as it was written last stays.
            first._loop.evictions.store.lock.close()
            until(lambda: done(second.is_here(name)))
            info = done(second.look(name))
            assert (info.frame, info.history_from, info.attached) == (8, 8, False)
            wanted = alone(world, engine, [1] * 9 + [2], seed=3)
            equal(made + done(second.step(name, 2)), wanted)
            assert not done(second.is_here(gone))


def newest_in_memory(folder):
    """Frames of the sessions that hosts have written and still play, by name."""
    paths = list(folder.glob(f".host-*/*{SUFFIX}"))
    notes = [parse(path.read_bytes()).record for path in paths]
    return {note.state.session: note.state.frame for note in notes}


def test_a_session_is_released_to_another_host_unless_somebody_plays_it(tmp_path):
    world = make_world()
    with hosting(world, evict_dir=tmp_path) as first, hosting(world, evict_dir=tmp_path) as second:
        name = done(first.create(seed=3)).session
        client = Client(first)
        done(first.attach(name, client))
        made = done(first.step(name, 1, count=5))
        refused(first.release(name), "session_busy")
        done(first.detach(name, client))
        until(lambda: done(first.release(name)))
        assert not first.overview().num_sessions
        # Hosts look into the folder a few times per second.
        until(lambda: done(second.is_here(name)))
        made += done(second.step(name, 2, count=2))
        equal(made, alone(world, make_engine(world), [1] * 5 + [2] * 2, seed=3))
        refused(first.release(name), "unknown_session")
        # The history has come too.
        assert done(second.rewind(name, 1)).frame == 1


def test_a_damaged_file_on_disk_is_said_and_left_there(tmp_path):
    with hosting(evict_dir=tmp_path, idle_s=0.02) as host:
        name = done(host.create()).session
        until(lambda: host.overview().num_evicted == 1)
        path = tmp_path / f"{name}{SUFFIX}"
        path.write_bytes(path.read_bytes()[:-10])
        for _ in range(2):
            refused(host.look(name), "bad_snapshot", "no whole snapshot")
        assert path.exists()
        assert done(host.create()).frame == -1


def test_a_store_looks_at_nothing_but_its_files(tmp_path):
    world = make_world()
    engine = make_engine(world)
    fingerprint = fingerprint_of(world, engine)
    (tmp_path / f"a name with blanks{SUFFIX}").write_bytes(b"")
    (tmp_path / "notes.txt").write_bytes(b"")
    old = tmp_path / f".writing-x{SUFFIX}-1"
    old.write_bytes(b"")
    os.utime(old, (1, 1))
    limits = StoreLimits(max_sessions=1, max_bytes=2**30, max_age_s=1000.0)
    store = SessionStore(tmp_path / "store" / "..", fingerprint, limits)
    assert len(store) == 0 and "../../etc/passwd" not in store and not old.exists()
    image, _ = played(world, engine, 2)
    store.put(image)
    store.keep("a-name")
    assert len(store) == 1 and "a-name" in store
    assert store.take("a-name").record.state.seed == 2
    with pytest.raises(ServeError, match="no session of this name"):
        store.take("a-name")
    store.put(replace(image, state=image.state.model_copy(update={"session": "another"})))
    store.keep("another")
    (tmp_path / f"another{SUFFIX}").rename(tmp_path / f"a-name{SUFFIX}")
    store._look()
    with pytest.raises(ServeError, match="that of another session"):
        store.take("a-name")
    assert store.discard("a-name") and not store.discard("a-name")
    assert files(tmp_path) == [f"a name with blanks{SUFFIX}"]


def test_a_world_of_another_window_is_refused():
    world = make_world()
    engine = make_engine(world)
    fingerprint = fingerprint_of(world, engine)
    image, _ = played(world, engine, 8)
    wide = tiny_separable(cache=CacheConfig(window=7, num_sinks=1))
    other = World(wide, world.autoencoder, world.card, SamplingConfig(num_steps=3))
    parsed = parse(write(image, fingerprint))
    with pytest.raises(ServeError, match="cache.window: 6, 7"):
        fingerprint_of(other, make_engine(other)).refuse(parsed.fingerprint)
    with pytest.raises(ServeError, match="places of the memory"):
        rebuild(parsed, (other, make_engine(other), None), 6, 3)
