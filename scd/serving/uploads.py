"""Pictures and videos from outside as frames to begin with: decoded elsewhere, kept for a while."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import cast

import numpy as np
from jaxtyping import UInt8

from scd.common.files import file_aside
from scd.common.memory import readable
from scd.serving.admission import UnderWay
from scd.serving.decode import REFUSED, DecodeLimits, command
from scd.serving.messages import ServeError
from scd.serving.settings import ClientLimits

AT_ONCE, WAITING = 2, 8
"""Uploads that are decoded at once, and that wait for it; further ones are sent away."""


START_S = 10.0
"""Seconds that a decoder may take to start on a busy machine."""

YOUNG_S = 30.0
"""Seconds for which an upload that nobody has begun from is not dropped for another's sake."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """One decoded upload."""

    frames: UInt8[np.ndarray, "t h w 3"]
    """In the size of the world."""
    made_s: float
    """When it was decoded, on the monotonic clock."""
    is_used: bool = False
    """Whether somebody has begun from it."""


class Uploads:
    """Decoded uploads by id: `add`, then `frames` any number of times until they expire.

    Where there is no more room the oldest are dropped before their time, those that somebody has
    begun from first, so that nobody is locked out by what others have left.

    For one event loop.
    """

    def __init__(
        self,
        height: int,
        width: int,
        fps: float,
        limits: ClientLimits,
        shared: Path | None = None,
        under_way: UnderWay | None = None,
    ) -> None:
        """Prepare for frames of one size and pace.

        Args:
            height: of the frames.
            width: of the frames.
            fps: of the frames.
            limits: of one server; where a folder is shared, each has them.
            shared: folder in which other servers find the uploads of this one, and this one theirs.
            under_way: counts the frames that are kept, which may take half of it; None: nobody
                does.
        """
        self._limits, self._shared = limits, shared
        self._decode = DecodeLimits(
            height=height,
            width=width,
            fps=fps,
            max_frames=limits.max_upload_frames,
            max_pixels=limits.max_upload_pixels,
            max_s=limits.max_upload_s,
            cpu_s=max(1, round(limits.decoder_s)),
            parent=os.getpid(),
        )
        self._under_way = under_way or UnderWay(sys.maxsize)
        self._kept: dict[str, Upload] = {}
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._num_inside = 0

    def __len__(self) -> int:
        self._drop_expired()
        return len(self._kept)

    def check_room(self) -> None:
        """Refuse an upload before its bytes are read.

        Raises:
            ServeError: too_many_uploads are kept or on their way.
        """
        if self._num_inside >= AT_ONCE + WAITING:
            raise ServeError("too_many_uploads", "other uploads are decoded: try again shortly")
        if not self._make_room(self._limits.max_uploads - self._num_inside - 1, sys.maxsize):
            raise ServeError(
                "too_many_uploads",
                f"{self._limits.max_uploads} uploads are kept already: try again in {YOUNG_S:g} s",
            )

    async def add(self, data: bytes | bytearray) -> tuple[str, int]:
        """Decode a picture or a video and keep its frames.

        Returns:
            The id, and the number of frames.

        Raises:
            ServeError: too_large, not_media, damaged, too_many_pixels, too_long,
                too_slow_to_decode, too_many_uploads.
        """
        if len(data) > self._limits.max_upload_bytes:
            raise ServeError(
                "too_large",
                f"an upload has at most {self._limits.max_upload_bytes} bytes, got {len(data)}",
            )
        self.check_room()
        self._num_inside += 1
        try:
            async with self._turns:
                frames = await self._decoded(data)
        finally:
            self._num_inside -= 1
        identity = secrets.token_urlsafe(16)
        made_s = time.monotonic()
        if self._shared is not None:
            await asyncio.to_thread(self._share, self._shared, identity, frames)
        self._keep(identity, frames, made_s)
        return identity, len(frames)

    def _keep(self, identity: str, frames: np.ndarray, made_s: float) -> None:
        """Keep frames, counted until nobody has them (ServeError: there is no room for them)."""
        most = self._under_way.budget // 2
        if not self._make_room(sys.maxsize, most - frames.nbytes):
            raise ServeError(
                "too_many_uploads",
                f"{readable(frames.nbytes)} of frames do not fit beside {readable(self._bytes())} "
                f"of {readable(most)} that are kept already: try again in {YOUNG_S:g} s",
            )
        self._under_way.take(frames.nbytes)
        weakref.finalize(frames, self._under_way.give, frames.nbytes)
        self._kept[identity] = Upload(frames=frames, made_s=made_s)

    def _bytes(self) -> int:
        return sum(one.frames.nbytes for one in self._kept.values())

    def _make_room(self, count: int, num_bytes: int) -> bool:
        """Drop until so many uploads of so many bytes are left; tell whether that was possible."""

        def fits() -> bool:
            return len(self._kept) <= count and self._bytes() <= num_bytes

        self._drop_expired()
        young_s = time.monotonic() - YOUNG_S
        old = [name for name, one in self._kept.items() if one.is_used or one.made_s < young_s]
        old.sort(key=lambda name: (not self._kept[name].is_used, self._kept[name].made_s))
        for name in old:
            if fits():
                break
            del self._kept[name]
            if self._shared is not None:
                (self._shared / f"{name}.npy").unlink(missing_ok=True)
        return fits()

    def _share(self, folder: Path, identity: str, frames: np.ndarray) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.npy"):
            if time.time() - path.stat().st_mtime > self._limits.upload_kept_s:
                path.unlink(missing_ok=True)
        with file_aside(folder / f"{identity}.npy") as aside, aside.open("wb") as file:
            np.save(file, frames, allow_pickle=False)

    def frames(self, identity: str) -> UInt8[np.ndarray, "t h w 3"]:
        """Return the frames of an upload.

        Raises:
            ServeError: unknown_upload.
        """
        self._drop_expired()
        if identity not in self._kept and self._shared is not None:
            self._fetch(self._shared, identity)
        if identity not in self._kept:
            raise ServeError("unknown_upload", "no such upload, or it has expired: send it anew")
        upload = self._kept[identity]
        self._kept[identity] = replace(upload, is_used=True)
        return upload.frames

    def _fetch(self, folder: Path, identity: str) -> None:
        """Take what another server has put there, if it has not expired."""
        # Looked up in what is there: what a client says becomes no path.
        for path in folder.glob("*.npy"):
            left_s = path.stat().st_mtime + self._limits.upload_kept_s - time.time()
            if path.stem == identity and left_s > 0:
                frames = np.load(path, allow_pickle=False)
                made_s = time.monotonic() + left_s - self._limits.upload_kept_s
                self._keep(identity, frames, made_s)

    def _drop_expired(self) -> None:
        first_s = time.monotonic() - self._limits.upload_kept_s
        self._kept = {name: one for name, one in self._kept.items() if one.made_s > first_s}

    async def _decoded(self, data: bytes | bytearray) -> np.ndarray:
        # Twice: the limit is of processor time, and others may use the processor too.
        limit_s = 2 * self._limits.decoder_s + START_S
        words = command(self._decode)
        with subprocess.Popen(words, stdin=PIPE, stdout=PIPE, stderr=DEVNULL) as process:
            # A thread waits for it, rather than the event loop: the loop may end first, and would
            # leave the pipes open. It writes any buffer, whatever its type says.
            talk = asyncio.ensure_future(
                asyncio.to_thread(process.communicate, cast("bytes", data), limit_s)
            )
            try:
                pixels, _ = await asyncio.shield(talk)
            except subprocess.TimeoutExpired:
                raise self._too_slow() from None
            finally:
                process.kill()
                await asyncio.wait([talk])
        return self._checked(process.returncode, pixels)

    def _checked(self, status: int | None, output: bytes) -> np.ndarray:
        if status == REFUSED:
            answer = json.loads(output)
            raise ServeError(answer["code"], answer["message"])
        if status in (-9, -24):
            raise self._too_slow()
        shape = (-1, self._decode.height, self._decode.width, 3)
        frame_bytes = self._decode.height * self._decode.width * 3
        num_frames, rest = divmod(len(output), frame_bytes)
        if status != 0 or rest or not 1 <= num_frames <= self._decode.max_frames:
            raise ServeError("damaged", "the decoder gave up on this upload")
        return np.frombuffer(output, np.uint8).reshape(shape)

    def _too_slow(self) -> ServeError:
        return ServeError(
            "too_slow_to_decode",
            f"decoding took longer than {self._limits.decoder_s:g} s: send something smaller",
        )
