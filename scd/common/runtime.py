"""Device, precision, random generators and threads of a process, and what it runs on."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Type of a stream's weights and memory at each precision."""


def choose_device(name: str = "auto") -> torch.device:
    """Return the named device, or for "auto" a CUDA device where there is one, else the CPU.

    Raises:
        ValueError: the device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} needed, this machine has {torch.cuda.device_count()} GPUs")
    return device


def cache_folder(name: str) -> Path:
    """Return the folder of this user, made or not, where things of a kind are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "scd" / name


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """Hash a run's seed, a purpose and indices (rank, step, ...) into one seed.

    The hash is the same on every machine and in every Python process, and different purposes or
    indices give unrelated streams. So whatever is drawn at step k can be drawn again without the
    draws before it: a resumed run needs no saved generator state.

    Returns:
        An integer in 0 .. 2**63 - 1.
    """
    text = "/".join([str(seed), purpose, *map(str, indices)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_generator(
    seed: int, purpose: str, *indices: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return a fresh generator on a device for one purpose, seeded by `derive_seed`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, purpose, *indices))


def describe_hardware() -> dict[str, str | int]:
    """Return CPU model, usable cores, threads, GPU names, platform and PyTorch version."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "num_cores": _num_cores(),
        "num_threads": torch.get_num_threads(),
        "gpus": ", ".join(gpus) or "none",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


def git_commit() -> str:
    """Return the commit of the checkout this package runs from, with "+" if files were changed.

    Returns "unknown" outside a checkout, or where git is not installed.
    """
    folder = Path(__file__).parent
    try:
        tracked, commit, status = (
            subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            ).stdout.strip()
            for arguments in (
                # An installed package may lie inside somebody else's checkout.
                ("ls-files", "--error-unmatch", Path(__file__).name),
                ("rev-parse", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    assert tracked
    return commit + ("+" if status else "")


@contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """Run with a number of CPU threads, and with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def return_freed_memory() -> None:
    """Give memory that was freed back to the machine.

    The C library of Linux keeps freed memory for itself, up to as much as the weights of a model:
    the process then stays that large although nobody uses it.
    """
    if platform.system() == "Linux":
        # glibc's name for it; other C libraries have none.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory the process has held in GiB: of tensors on a GPU, resident on a CPU.

    The number is since the start of the process (CPU) or the last reset (GPU); 0 where unknown.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if platform.system() != "Linux":
        return 0.0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    return 0.0
