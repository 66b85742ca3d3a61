"""A command of this package that serves, started for a measurement and ended after it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def start(words: Sequence[str]) -> tuple[subprocess.Popen[str], str]:
    """Run `scd WORDS...`; return its process, and the address that it prints first.

    Raises:
        ValueError: it printed none.
    """
    command = [sys.executable, "-m", "scd", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if "http://" not in line:
            raise ValueError(f"scd {words[0]} did not start")
    except BaseException:
        # Of a signal too: nobody else knows of the process yet.
        stop(process)
        raise
    return process, line[line.index("http://") :].split()[0]


def stop(process: subprocess.Popen[str]) -> None:
    """End a command and wait for its end."""
    with process:
        process.terminate()
        process.wait(60)


@contextmanager
def started(words: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Run `scd WORDS...` for the time of a with block.

    Returns:
        The address that it prints first, and the number of its process.

    Raises:
        ValueError: it printed none.
    """
    process, url = start(words)
    try:
        yield url, process.pid
    finally:
        stop(process)
