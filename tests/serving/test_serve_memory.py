"""Memory of what is gone comes back, at once and to the machine."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from functools import partial

from scd.serving.commands import Call
from scd.serving.messages import ServeError
from scd.serving.scheduler import RequestQueue
from tests.serving.test_serve_host import pictures
from tests.tiny_host import WAIT_S, Client, done, hosting, refused, until


class File(bytearray):
    """A snapshot of which one can see whether it is still held."""


@contextmanager
def uncollected():
    """Nothing but the last reference frees anything."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def is_gone(*held):
    return all(one() is None for one in held)


def parts_of(host, name):
    """What is large of a session: itself, its stream's memory, a copy of it, and a kept frame."""

    def look(loop):
        session = loop.sessions.playing[name]
        copy, *_ = session.history.copies
        caches = session.rollout.state.cache, copy.state.cache
        held = [session, session.rollout, *caches, *(cache.keys for cache in caches)]
        return [weakref.ref(one) for one in [*held, session.history.kept[-1].latent]]

    return done(host.call(look))


def test_what_is_gone_is_freed_without_the_garbage_collector():
    with uncollected(), hosting(max_sessions=4) as host:
        client = Client(host)
        source = done(host.create(sink=client, pictures=pictures(3), action=1)).session
        done(host.step(source, 1, count=6))
        file = File(done(host.snapshot(source)))
        sent = weakref.ref(file)
        restored = done(host.restore(file)).session
        del file
        done(host.step(restored, 1))
        until(partial(is_gone, sent))
        fork = done(host.fork(source, 4)).session
        done(host.rewind(fork, 3))
        held = [one for name in (source, restored, fork) for one in parts_of(host, name)]
        assert all(one() is not None for one in held)
        for name in (source, restored, fork):
            done(host.close(name))
        until(partial(is_gone, *held))


def test_what_is_refused_is_freed_without_the_garbage_collector():
    with uncollected(), hosting(max_sessions=1) as host:
        name = done(host.create()).session
        data = done(host.snapshot(name))
        for wrong, code in (
            (data[:-1], "bad_snapshot"),
            (b"nothing", "bad_snapshot"),
            (data.replace(b'"steps\\":3', b'"steps\\":9'), "bad_request"),
            (data, "too_many_sessions"),
        ):
            file = File(wrong)
            sent = weakref.ref(file)
            # Not by `refused`: what pytest keeps of an error holds this frame.
            error = host.restore(file).exception(WAIT_S)
            assert isinstance(error, ServeError) and error.code == code
            del file
            until(partial(is_gone, sent))


def test_an_upload_is_let_go_once_its_message_is_obeyed():
    with uncollected(), hosting() as host:
        name = done(host.create()).session
        upload = pictures(40)
        sent = weakref.ref(upload)
        refused(host.reset(name, upload[:, :2]), "bad_request")
        del upload
        until(partial(is_gone, sent))


def test_a_queue_that_ends_refuses_what_waits_and_keeps_nothing():
    with uncollected():
        queue, file = RequestQueue(4), File(b"some")
        sent, future = weakref.ref(file), queue.put(Call(message=lambda _: None, file=file))
        del file
        queue.close("over")
        queue.refuse_all("over")
        refused(future, "model_stopped", "over")
        assert sent() is None
