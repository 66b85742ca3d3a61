"""Files and folders that appear whole or not at all, whenever the process or the disk gives up.

And the one reader of texts, line by line or as JSON.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from scd.common.config import shown

TEMPORARY = ".writing-"
"""How the names of things begin that are being written."""

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What a disk says that is full, or fails, in the middle of a file; it does not say of which."""

CURRENT_FOLDER, SWAP = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of Linux; RENAME_SWAP of macOS is the same number."""


def refuse_used(folder: Path, wanted: str = "") -> None:
    """Refuse to write a new folder where something is.

    Args:
        folder: to be written.
        wanted: what the caller has looked for in it in vain, for the message.

    Raises:
        FileExistsError: the path is there, and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = f"holds something else than {wanted}" if wanted else "is not an empty folder"
        raise FileExistsError(f"{folder} exists and {what}: choose another one")


def refuse_pipe(path: Path | str) -> None:
    """Refuse a pipe, socket or device in the place of a file (ValueError): reading it might never
    end. What is not there is left to who reads it."""
    with suppress(OSError):
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ValueError(f"{path} is no file but a pipe, a socket or a device")


def read_text(path: Path | str) -> str:
    """Read a text in UTF-8, without the mark that some editors put in front of it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no text in UTF-8; names the line; or no file.
    """
    refuse_pipe(path)
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} line {line}: is no text in UTF-8 ({error.reason}): save it as UTF-8"
        ) from error


def text_lines(path: Path | str) -> list[str]:
    r"""Read the lines of a text as `read_text` does; they end at \n or \r\n alone.

    Other characters at which Python's `splitlines` would cut, such as U+2028, stand within texts
    that people copy from pages.
    """
    text = read_text(path).removesuffix("\n")
    return [line.removesuffix("\r") for line in text.split("\n")] if text else []


def read_json(path: Path, format: str | int | None = None) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        format: what its field `format` must say. None: it has no such field.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not JSON, no text in UTF-8, or of another format.
    """
    values = parse_json(read_text(path), path)
    if format is not None:
        found = values.get("format") if isinstance(values, dict) else None
        if found != format:
            raise ValueError(f"{path}: needed format {format!r}, got {shown(found)}")
    return values


def parse_json(text: str | bytes, where: Path | str) -> Any:
    """Read JSON that stands in the place `where`, which an error (ValueError) names."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        # Also numbers of thousands of digits, and lists in lists in lists.
        raise ValueError(f"{where}: is not JSON ({error})") from error


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Give a new folder to fill; when the block ends it is flushed and takes `folder`'s place.

    If the block fails the new folder is removed and `folder` stays as it was. A process that is
    killed leaves the old folder or the new one in its place, where the system can exchange two
    (Linux and macOS, on their usual file systems); what it had begun is removed by the next one
    that writes the same folder.
    """
    # Of a link, what it leads to is replaced.
    folder = folder.resolve() if folder.is_symlink() else folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    aside = folder.parent / f"{TEMPORARY}{folder.name}-{secrets.token_hex(8)}"
    # Not by tempfile, whose folders only their owner can read.
    aside.mkdir()
    descriptor = os.open(aside, os.O_RDONLY)
    try:
        with suppress(OSError):
            # For as long as this process lives; not every file system knows it.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with _naming(folder):
            yield aside
        _open_to_others(aside)
        for entry in aside.iterdir():
            _flush(entry)
        _flush(aside)
        if folder.exists():
            _replace(aside, folder)
        else:
            aside.rename(folder)
        _flush(folder.parent)
    finally:
        # What has failed, or the old folder.
        shutil.rmtree(aside, ignore_errors=True)
        os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left that were about to write a folder."""
    for entry in folder.parent.glob(f"{TEMPORARY}{glob.escape(folder.name)}-*"):
        with suppress(OSError):
            descriptor = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry)
            finally:
                os.close(descriptor)


def _replace(new: Path, old: Path) -> None:
    """Put a folder into the place of one that is there, whose place becomes the new one's."""
    if exchange(new, old):
        return
    # A folder can only be renamed onto an empty one: the old one steps aside first.
    away = new.with_name(new.name + "-old")
    old.rename(away)
    try:
        new.rename(old)
    except BaseException:
        away.rename(old)
        raise
    shutil.rmtree(away)


def exchange(one: Path, other: Path) -> bool:
    """Let two files or folders change places at once.

    Returns:
        Whether they did: not every system, and not every file system, can.

    Raises:
        OSError: they are not there, or must not be moved.
    """
    libc, words = ctypes.CDLL(None, use_errno=True), (os.fsencode(one), os.fsencode(other))
    if hasattr(libc, "renameat2"):
        failed = libc.renameat2(CURRENT_FOLDER, words[0], CURRENT_FOLDER, words[1], SWAP)
    elif hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(*words, SWAP)
    else:
        return False
    number = ctypes.get_errno()
    if failed and number not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(number, os.strerror(number), str(other))
    return not failed


def write_file(path: Path, text: str) -> None:
    """Replace a small text file at once: a reader sees the old text or the new one."""
    with file_aside(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say what was to be written where the system only says that its disk refuses."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def file_aside(path: Path) -> Iterator[Path]:
    """Name a file to write; when the block ends it is flushed and takes `path`'s place.

    If the block fails the file is removed and `path` stays as it was.
    """
    aside = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    mode = _mode_of_new_files(aside)
    try:
        with _naming(path):
            yield aside
            aside.chmod(mode)
            _flush(aside)
        aside.replace(path)
        _flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def take_lock(path: Path) -> TextIO:
    """Lock a file, made if need be, until it is closed or the process ends.

    Raises:
        BlockingIOError: another process, or another place in this one, has it locked.
    """
    # A link would empty the file that it leads to, and a pipe wait for somebody to read it.
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    file = os.fdopen(os.open(path, flags, 0o666), "w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise BlockingIOError(
            f"{path.parent} is being written by another process: wait for it or stop it first"
        ) from error
    return file


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove what a killed process left half written of a file, or, in a folder of ours, of any."""
    for entry in folder.glob(f"{TEMPORARY}{name}*"):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _mode_of_new_files(path: Path) -> int:
    """Return the permissions that the umask leaves to new files, by making one and removing it.

    Asking for the umask itself would change it for all threads.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    path.unlink()
    return mode


def _open_to_others(folder: Path) -> None:
    """Give the files of a new folder the permissions that the umask leaves to them.

    safetensors, for one, makes files that only their owner can read.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for entry in folder.rglob("*"):
        if entry.is_file() and not entry.is_symlink():
            entry.chmod(mode | stat.S_IMODE(entry.stat().st_mode) & 0o111)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
