"""Pictures and videos from outside: what becomes of good ones, and why others are refused."""

import asyncio
import io
import os
import resource
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scd.data.video import write_video
from scd.serving import uploads as kept_uploads
from scd.serving.admission import UnderWay
from scd.serving.decode import DecodeLimits, Refused, command, container_of, decode
from scd.serving.messages import ServeError
from scd.serving.settings import ClientLimits
from scd.serving.uploads import Uploads
from tests.data.test_video import numbered, numbers, write_as
from tests.servers import serving
from tests.tiny_host import until

LIMITS = DecodeLimits(
    height=16, width=16, fps=10.0, max_frames=8, max_pixels=200 * 200, max_s=5.0, cpu_s=20
)


def test_frames_of_an_upload_come_in_the_order_of_the_decoder(tmp_path):
    """A clip in AVI with B frames, whose stored times go back and forth."""
    write_as(tmp_path / "clip.avi", numbered(60), bf="2")
    with av.open(str(tmp_path / "clip.avi")) as container:
        times = [frame.pts for frame in container.decode(video=0)]
    assert times != sorted(times, key=lambda time: time or 0)
    frames = decode((tmp_path / "clip.avi").read_bytes(), LIMITS)
    # 25 frames a second in, 10 out, the last 8 of them.
    wanted = 2.5 * np.arange(16, 24)
    assert np.abs(np.array(numbers(frames)) - wanted).max() <= 1


def picture(height: int = 32, width: int = 32, format: str = "PNG", **options) -> bytes:
    """Left half red, right half blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0], pixels[:, width // 2 :, 2] = 255, 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def video(path: Path, num_frames: int = 20, fps: float = 20.0, side: int = 32) -> bytes:
    """Frame i is grey of level 10 i."""
    levels = np.arange(num_frames, dtype=np.uint8)[:, None, None, None] * 10
    pixels = np.broadcast_to(levels, (num_frames, side, side, 3))
    write_video(path, np.ascontiguousarray(pixels), fps, lossless=False)
    return path.read_bytes()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_picture_is_one_frame_of_the_worlds_size(format: str):
    frames = decode(picture(64, 64, format), LIMITS)
    assert frames.shape == (1, 16, 16, 3)
    assert np.abs(frames[0, 8, 2].astype(int) - [255, 0, 0]).max() < 20
    assert np.abs(frames[0, 8, 13].astype(int) - [0, 0, 255]).max() < 20


def test_a_wide_picture_is_cut_around_its_middle():
    frames = decode(picture(20, 60), LIMITS)
    assert (frames[0, :, :8] == [255, 0, 0]).all() and (frames[0, :, 8:] == [0, 0, 255]).all()


def test_a_turned_photograph_is_turned_back():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    frames = decode(picture(64, 64, "JPEG", exif=exif), LIMITS)
    assert frames[0, 2, 8, 0] > 200 and frames[0, 13, 8, 2] > 200


def test_a_video_comes_at_the_worlds_pace(tmp_path: Path):
    frames = decode(video(tmp_path / "a.mp4", 12, fps=20.0), LIMITS)
    # Every second frame.
    assert np.allclose(frames.mean((1, 2, 3)), [0, 20, 40, 60, 80, 100], atol=3)
    slow = decode(video(tmp_path / "b.mp4", 3, fps=5.0), LIMITS)
    assert np.allclose(slow.mean((1, 2, 3)), [0, 0, 10, 10, 20], atol=3)
    long = decode(video(tmp_path / "c.mp4", 24, fps=10.0), LIMITS)
    assert np.allclose(long.mean((1, 2, 3)), np.arange(16, 24) * 10, atol=3)


def test_an_animated_picture_is_a_video():
    shades = [Image.new("RGB", (16, 16), (level, level, level)) for level in (0, 120, 240)]
    file = io.BytesIO()
    shades[0].save(file, "GIF", save_all=True, append_images=shades[1:], duration=100)
    frames = decode(file.getvalue(), LIMITS)
    assert np.allclose(frames.mean((1, 2, 3)), [0, 120, 240], atol=3)


def bomb() -> bytes:
    """A PNG of some bytes that promises 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def refusal(data: bytes, limits: DecodeLimits = LIMITS) -> str:
    with pytest.raises(Refused) as caught:
        decode(data, limits)
    return caught.value.code


def test_what_is_no_picture_or_video_is_refused(tmp_path: Path):
    assert refusal(b"") == "not_media"
    assert refusal(b"hello" * 100) == "not_media"
    assert refusal(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n") == "not_media"
    assert refusal(b"ffconcat version 1.0\nfile /etc/passwd\n") == "not_media"
    assert refusal(b"<svg xmlns='http://www.w3.org/2000/svg'></svg>") == "not_media"
    assert refusal(picture(format="TIFF")) == "not_media"
    assert refusal(picture()[:60]) == "damaged"
    assert refusal(b"\0\0\0\x20ftypisom" + b"\0" * 100) == "damaged"
    assert refusal(video(tmp_path / "a.mp4")[:400]) == "damaged"


def test_what_is_too_large_is_refused_before_it_is_decoded(tmp_path: Path):
    assert refusal(picture(201, 200)) == "too_many_pixels"
    assert refusal(bomb()) in ("too_many_pixels", "damaged")
    assert refusal(bomb(), replace(LIMITS, max_pixels=10**9)) in ("too_many_pixels", "damaged")
    assert refusal(video(tmp_path / "a.mp4", 4, side=202)) == "too_many_pixels"
    assert refusal(video(tmp_path / "b.mp4", 25, fps=2.0)) == "too_long"


def test_only_readers_without_references_to_other_files_are_used():
    names = {container_of(head) for head in (b"0000ftyp", b"\x1a\x45\xdf\xa3", b"GIF89a")}
    assert names == {"mp4", "matroska", "gif"}
    assert container_of(b"RIFF1234AVI ") == "avi" and container_of(b"RIFF1234WEBP") is None


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_never_do_more_than_be_refused(data: st.DataObject):
    name = data.draw(st.sampled_from(sorted(SAMPLES)))
    file = bytearray(SAMPLES[name])
    places = st.tuples(st.integers(0, len(file) - 1), st.integers(0, 255))
    for place, value in data.draw(st.lists(places, max_size=12)):
        file[place] = value
    file = bytes(file[: data.draw(st.integers(1, len(file)))])
    try:
        frames = decode(file, LIMITS)
    except Refused as refused:
        assert refused.code in ("not_media", "damaged", "too_many_pixels", "too_long")
    else:
        assert frames.dtype == np.uint8 and 1 <= len(frames) <= 8


SAMPLES = {name: picture(format=name) for name in ("PNG", "JPEG", "WEBP", "BMP", "GIF")}


def uploads(**changes) -> Uploads:
    return Uploads(16, 16, 10.0, ClientLimits(**changes))


def code_of(adding) -> str:
    with pytest.raises(ServeError) as caught:
        asyncio.run(adding)
    return caught.value.code


def test_uploads_are_decoded_elsewhere_and_kept_by_id(tmp_path: Path):
    async def scenario():
        kept = uploads(max_uploads=2)
        first, num_frames = await kept.add(picture(64, 64))
        second, num_video = await kept.add(video(tmp_path / "a.mp4", 12))
        assert (num_frames, num_video, len(kept)) == (1, 6, 2) and len(first) > 16
        assert (kept.frames(first) == decode(picture(64, 64), LIMITS)).all()
        with pytest.raises(ServeError, match="no such upload"):
            kept.frames("../../etc/passwd")

    asyncio.run(scenario())


def test_the_decoder_starts_without_torch():
    code = "import sys, scd.serving.decode; print('torch' in sys.modules)"
    words = [sys.executable, "-c", code]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "False\n"


def test_what_others_left_locks_nobody_out(monkeypatch):
    async def scenario():
        kept = uploads(max_uploads=2)
        names = [(await kept.add(picture()))[0] for _ in range(2)]
        with pytest.raises(ServeError, match="kept already: try again in 30 s"):
            await kept.add(picture())
        # Who has begun has what was sent; who has not is waited for, for a while.
        kept.frames(names[1])
        third, _ = await kept.add(picture())
        assert kept.frames(names[0]).shape == (1, 16, 16, 3)
        with pytest.raises(ServeError, match="no such upload"):
            kept.frames(names[1])
        monkeypatch.setattr(kept_uploads, "YOUNG_S", 0.0)
        fourth, _ = await kept.add(picture())
        fifth, _ = await kept.add(picture())
        assert len(kept) == 2
        assert len(kept.frames(fourth)) == len(kept.frames(fifth)) == 1
        with pytest.raises(ServeError, match="no such upload"):
            kept.frames(third)

    asyncio.run(scenario())


def test_room_in_bytes_is_made_by_dropping_what_was_begun_from():
    async def scenario():
        one = 16 * 16 * 3
        kept = Uploads(16, 16, 10.0, ClientLimits(), under_way=UnderWay(2 * 2 * one))
        first, _ = await kept.add(picture())
        await kept.add(picture())
        with pytest.raises(ServeError, match="do not fit beside"):
            await kept.add(picture())
        kept.frames(first)
        await kept.add(picture())
        assert len(kept) == 2

    asyncio.run(scenario())


def test_uploads_expire():
    async def scenario():
        kept = uploads(upload_kept_s=1e-3)
        identity, _ = await kept.add(picture())
        await asyncio.sleep(0.01)
        assert len(kept) == 0
        with pytest.raises(ServeError, match="expired"):
            kept.frames(identity)

    asyncio.run(scenario())


def test_refusals_of_the_decoder_arrive():
    assert code_of(uploads().add(b"nothing")) == "not_media"
    assert code_of(uploads(max_upload_pixels=100).add(picture())) == "too_many_pixels"
    assert code_of(uploads(max_upload_bytes=10).add(picture())) == "too_large"


def test_a_server_that_ends_while_it_decodes_says_so_without_a_trace(monkeypatch, caplog):
    wait = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(kept_uploads, "command", lambda limits: wait)
    answers = []

    def decoders() -> list[psutil.Process]:
        # Others may be there, such as the one that multiprocessing keeps.
        found = []
        for one in psutil.Process().children():
            with suppress(psutil.Error):
                found += [one] if one.cmdline() == wait else []
        return found

    with serving() as server, caplog.at_level("ERROR"):
        asked = threading.Thread(
            target=lambda: answers.append(server.call("POST", "/v1/uploads", picture()))
        )
        asked.start()
        until(decoders)
    asked.join(60)
    ((status, said),) = answers
    assert (status, said["error"]["code"]) == (503, "model_stopped")
    assert not [one for one in caplog.records if one.exc_info]
    assert not decoders()


def test_a_decoder_that_takes_too_long_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kept_uploads, "START_S", 0.0)
    # Its libraries alone take longer to load.
    assert code_of(uploads(decoder_s=0.01).add(picture())) == "too_slow_to_decode"


def test_a_decoder_that_computes_too_long_is_ended_by_the_system():
    program = "import scd.serving.decode as d\nd.shut_in(1)\nwhile True: pass"
    run = subprocess.run([sys.executable, "-c", program])
    with pytest.raises(ServeError) as caught:
        uploads()._checked(run.returncode, b"")
    assert caught.value.code == "too_slow_to_decode"


def test_the_decoder_can_open_no_file(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    program = (
        "import scd.serving.decode as d\n"
        "d.shut_in(5)\n"
        f"try:\n    open({str(secret)!r})\nexcept OSError as error:\n    print(error.errno)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "24", run.stderr
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 3
    # As a program of its own it neither needs nor sees the modules beside it.
    alone = subprocess.run(command(LIMITS), input=picture(), capture_output=True, cwd="/")
    assert alone.returncode == 0 and len(alone.stdout) == 16 * 16 * 3


@pytest.mark.skipif(sys.platform != "linux", reason="the system says it there only")
def test_a_decoder_ends_with_the_server_that_was_killed():
    # Its input stays open when its parent is gone, since this process holds the other end too.
    source, target = os.pipe()
    program = (
        "import subprocess, sys, os\n"
        "from dataclasses import replace\n"
        "from scd.serving.decode import command\n"
        "from tests.serving.test_upload import LIMITS\n"
        "words = command(replace(LIMITS, parent=os.getpid()))\n"
        f"decoder = subprocess.Popen(words, stdin={source})\n"
        "print(decoder.pid, flush=True)\n"
        "decoder.wait()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, pass_fds=[source]
    ) as server:
        assert server.stdout is not None
        decoder = psutil.Process(int(server.stdout.readline()))
        # It waits for its input: it has loaded what it needs by then.
        deadline = time.monotonic() + 60
        while decoder.num_fds() > 3 or decoder.memory_info().rss < 3e7:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.kill()
    assert not psutil.wait_procs([decoder], timeout=20)[1]
    os.close(source), os.close(target)
