"""Memory of a device: what is free before a run, and the most that a run held."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from scd.common.files import text_lines
from scd.common.runtime import return_freed_memory

GIB = 2**30
MIB = 2**20

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where Linux says how much memory a container may have."""


class OutOfMemory(ValueError):
    """A run that needs more memory than is free: what it needs and what there is."""


def free_bytes(device: torch.device) -> int:
    """Return the memory that could be allocated, without what `release` would give back."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    left = _left_to_container()
    return available if left is None else min(available, left)


def _left_to_container() -> int | None:
    try:
        limit = (CONTROL_GROUP / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        used = int((CONTROL_GROUP / "memory.current").read_text(encoding="ascii"))
        lines = text_lines(CONTROL_GROUP / "memory.stat")
        # What was read from files counts as used, but gives way to whoever needs the room.
        stat = {name: int(value) for name, value in map(str.split, lines)}
        return int(limit) - used + stat.get("inactive_file", 0) + stat.get("slab_reclaimable", 0)
    except (OSError, ValueError):
        return None


def check_free(what: str, needed: int, device: torch.device, promised: int = 0) -> None:
    """Refuse a run before it begins.

    Args:
        what: the run, in words.
        needed: bytes of its weights and caches.
        device: where it would run.
        promised: bytes that others were given, who did not touch them yet.

    Raises:
        OutOfMemory: they are more than is free.
    """
    free = free_bytes(device) - promised
    if needed > free:
        # Costs a tenth of a second, so only now.
        release()
        free = max(free_bytes(device) - promised, 0)
    if needed > free:
        raise OutOfMemory(f"{what} needs {readable(needed)} on {device}, {readable(free)} are free")


@contextmanager
def out_of_memory_named(
    what: str, needed: int | Callable[[], int], device: torch.device
) -> Iterator[None]:
    """Turn a full device into `OutOfMemory`; the process stays usable.

    Args:
        what: the run, in words.
        needed: bytes that the formula says, or what counts them when they are asked for.
        device: where it runs.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if not _is_full(error):
            raise
        message = str(error).splitlines()[0] if str(error) else "out of memory"
    else:
        return
    # Outside the handler: the traceback holds on to the tensors of the run.
    release()
    num_bytes = needed if isinstance(needed, int) else needed()
    raise OutOfMemory(
        f"{what} ran out of memory on {device}: {readable(num_bytes)} of weights and caches were "
        f"needed, {readable(free_bytes(device))} are free now ({message})"
    )


def _is_full(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    signs = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return any(sign in str(error) for sign in signs)


def release() -> None:
    """Give what nobody uses any more back to the machine."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return_freed_memory()


def forget_frames(error: BaseException | None) -> None:
    """Let go of what the functions held that an error has ended, and those of what caused it.

    The lines of its traceback stay. Whoever keeps the error, as a future does, would keep all their
    variables, itself often among them: then only the garbage collector finds them, much later.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class PeakMemory:
    """The most memory held from its making on: of tensors on a GPU, resident on a CPU.

    On a CPU this is the growth of the process, so what it held before does not count. Linux keeps
    the peak itself; elsewhere it is the largest value at the calls of `bytes`.
    """

    def __init__(self, device: torch.device) -> None:
        release()
        self.device = device
        self._peak = 0
        self._kept_by_kernel = False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        self._before = psutil.Process().memory_info().rss
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self._kept_by_kernel = True
        except OSError:
            pass

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        now = psutil.Process().memory_info().rss
        if self._kept_by_kernel:
            (line,) = (
                line for line in text_lines("/proc/self/status") if line.startswith("VmHWM:")
            )
            now = max(now, 1024 * int(line.split()[1]))
        self._peak = max(self._peak, now - self._before)
        return self._peak

    def held(self) -> int:
        """Return what is held now, beyond what was held before; less than at the peak."""
        release()
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) - self._before
        return psutil.Process().memory_info().rss - self._before


def readable(num_bytes: int) -> str:
    """Return a size for people."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.1f} MiB"
