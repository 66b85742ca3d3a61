"""Memory of what is gone comes back, at once and to the machine."""

from __future__ import annotations

import gc
import json
import weakref
from contextlib import contextmanager
from functools import partial
from io import BytesIO

import pytest
import safetensors.torch
import torch

from scd.serving.admission import Counted, UnderWay
from scd.serving.commands import Call
from scd.serving.messages import ServeError
from scd.serving.scheduler import RequestQueue
from scd.serving.tensors import head_bytes, pack, read_head, save
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


def test_bytes_under_way_are_counted_as_long_as_they_are_held():
    under_way = UnderWay(100)
    first = Counted(under_way, 60)
    second = Counted(under_way)
    second.add(b"x" * 40)
    assert under_way.held == 100 and bytes(second) == b"x" * 40
    for make, code in (
        (lambda: second.add(b"y"), "overloaded"),
        (lambda: Counted(under_way, 51, weight=2), "too_large"),
    ):
        with pytest.raises(ServeError) as caught:
            make()
        assert caught.value.code == code
    assert len(second) == 40
    view = memoryview(first)
    # What pytest keeps of an error holds these names, too.
    under_way.give(0)
    held = under_way.held
    del first
    assert held == under_way.held == 100
    view.release()
    del view
    assert under_way.held == 40 and under_way.num_freed == 60


def test_snapshots_are_counted_while_they_are_out_and_refused_beyond_the_bound():
    with uncollected(), hosting(max_sessions=4) as host:
        name = done(host.create()).session
        done(host.step(name, 1, count=6))
        file = done(host.snapshot(name))
        assert isinstance(file, Counted) and host.overview().under_way_bytes == len(file)
        twin = done(host.restore(file)).session
        assert host.overview().under_way_bytes == len(file)
        # Whoever has the file may not have another one while there is no room for it.
        host.under_way.budget = len(file) + 10
        refused(host.snapshot(name), "overloaded", "try again shortly")
        del file
        until(lambda: host.overview().under_way_bytes == 0)
        assert len(done(host.snapshot(twin))) > 0
        host.under_way.budget = 10
        refused(host.snapshot(name), "too_large", "--memory-gib")


def test_a_file_is_that_of_the_library_and_read_as_by_it():
    tensors = {
        "wide": torch.arange(6.0).view(2, 3)[:, 1:],
        "half": torch.randn(3).bfloat16(),
        "none": torch.zeros(2, 0, 4),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    data, file = pack(tensors, {"a": "b"}), BytesIO()
    save(tensors, {"a": "b"}, file.write)
    assert file.getvalue() == data
    head = read_head(data)
    assert head.texts == {"a": "b"} and head.size == len(data)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    theirs = bytearray(safetensors.torch.save(whole, {"a": "b"}))
    for read in (
        safetensors.torch.load(bytes(data)),
        _viewed(data),
        _viewed(theirs),
    ):
        assert read.keys() == whole.keys()
        assert all(torch.equal(read[name], whole[name]) for name in whole)


def _viewed(data):
    return {name: entry.view(data) for name, entry in read_head(data).entries.items()}


@pytest.mark.parametrize(
    ("note", "words"),
    [
        ({"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}, "must be of"),
        ({"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}, "no shape"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "no shape"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "does not lie"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "does not lie"),
        ({"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 32]}, "does not lie"),
    ],
)
def test_heads_that_name_other_bytes_than_there_are(note, words):
    text = json.dumps({"__metadata__": {}, "one": note}).encode()
    with pytest.raises(ValueError, match=words):
        read_head(len(text).to_bytes(8, "little") + text)


def test_a_head_without_end_is_not_waited_for():
    with pytest.raises(ValueError, match="at most"):
        head_bytes((2**40).to_bytes(8, "little"))
    assert head_bytes(b"1234567") is None
