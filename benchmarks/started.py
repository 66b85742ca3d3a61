"""A command of this package that serves, started for a measurement and ended after it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def started(words: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Run `scd WORDS...` for the time of a with block.

    Returns:
        The address that it prints first, and the number of its process.

    Raises:
        ValueError: it printed none.
    """
    command = [sys.executable, "-m", "scd", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            if "http://" not in line:
                raise ValueError(f"scd {words[0]} did not start")
            yield line[line.index("http://") :].split()[0], process.pid
        finally:
            process.terminate()
            process.wait(60)
