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
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from scd.common.config import (
    Precision,
    PrecisionChoice,
    StreamPrecision,
    StreamPrecisionChoice,
    Threads,
)
from scd.common.cores import num_cores
from scd.common.files import text_lines

STREAM_DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.bfloat16,
    "fp8": torch.bfloat16,
}
"""Type of what is not in 8 bits, at each precision of a stream."""

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Type of a stream's weights and memory at each precision."""


BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Instructions of CPUs that multiply bfloat16: two of Intel's and AMD's, two of ARM's; PyTorch and
Linux name them alike."""

BF16_MACOS = 14
"""Version of macOS from which on PyTorch has bfloat16 on Apple's GPU."""


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
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}") from error
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps needed, the GPU of a Mac; PyTorch finds none on this machine")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} needed, this machine has {torch.cuda.device_count()} GPUs")
    return device


def finest(device: torch.device) -> torch.dtype:
    """Return the type with the most digits that a device has: not float64 on Apple's GPU."""
    return torch.float32 if device.type == "mps" else torch.float64


def refuse_mps(device: torch.device, what: str) -> None:
    """Refuse Apple's GPU for what measures in float64, which it lacks (ValueError)."""
    if device.type == "mps":
        raise ValueError(f"{what} measures in float64, which mps lacks: give --device cpu")


def choose_precision(name: str, device: torch.device) -> Precision:
    """Return the named precision, or for "auto" bf16 where the device has instructions for it.

    The one place that decides, for training, streams and the server. PyTorch calls bf16 supported
    on any CPU with AVX-512, where without those instructions a step takes longer than in fp32.

    Raises:
        ValueError: no such precision, or bf16 on an Apple GPU whose system has none.
    """
    known = get_args(PrecisionChoice)
    if name not in known:
        raise ValueError(f"precision must be one of {list(known)}, got {name!r}")
    if device.type == "mps":
        if name == "bf16" and not torch.backends.mps.is_macos_or_newer(BF16_MACOS, 0):
            raise ValueError(f"bf16 on mps needs macOS {BF16_MACOS}: give --precision fp32")
        return "bf16" if name == "bf16" else "fp32"
    if name != "auto":
        return cast(Precision, name)
    return "bf16" if has_fast_bf16(device) else "fp32"


INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni")
"""Instructions of CPUs that multiply whole numbers of 8 bits and add in 32."""


FP8_CAPABILITY: tuple[int, ...] = (8, 9)
"""Compute capability from which on GPUs multiply floating-point numbers of 8 bits."""


def choose_stream_precision(name: str, device: torch.device) -> StreamPrecision:
    """Return the named precision of a stream; in 8 bits where the device can, else as for training.

    Raises:
        ValueError: no such precision, or one that the device lacks.
    """
    if name == "fp8":
        found: tuple[int, int] = (0, 0)
        if device.type == "cuda":
            found = torch.cuda.get_device_capability(device)
        if found < FP8_CAPABILITY:
            least, has = (".".join(map(str, one)) for one in (FP8_CAPABILITY, found))
            raise ValueError(
                f"precision fp8 needs a GPU of compute capability {least} or more, the device is "
                f"{device}{f', of {has}' if device.type == 'cuda' else ''}: give bf16"
            )
        return "fp8"
    if name != "int8":
        if name not in (known := get_args(StreamPrecisionChoice)):
            raise ValueError(f"precision must be one of {list(known)}, got {name!r}")
        return choose_precision(name, device)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        raise ValueError(
            f"precision int8 needs a CPU with VNNI and oneDNN, the device is {device}: give "
            + ("fp8 or bf16" if device.type == "cuda" else "bf16")
        )
    if not any(flag in cpu_flags() for flag in INT8_INSTRUCTIONS):
        raise ValueError("precision int8 needs a CPU with VNNI, this one has none: give bf16")
    return "int8"


def has_fast_bf16(device: torch.device) -> bool:
    """Tell whether a CPU or CUDA device has instructions that multiply bfloat16."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    # PyTorch uses them by oneDNN, which its packages for Macs lack.
    if not torch.backends.mkldnn.is_available():
        return False
    flags = cpu_flags()
    return any(name in flags for name in BF16_INSTRUCTIONS)


def cpu_flags() -> set[str]:
    """Return the names of what the CPU can do."""
    # An older PyTorch has no such query; Linux says it too.
    query = getattr(torch.cpu, "get_capabilities", None)
    if query is not None:
        return {name for name, there in query().items() if there is True}
    info = Path("/proc/cpuinfo")
    lines = text_lines(info) if info.exists() else []
    flags = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return set(next(flags, "").split())


def explain_precision(precision: Precision, device: torch.device) -> str:
    """Say in words why a precision is the one that "auto" chose."""
    kind = "CPU" if device.type == "cpu" else "GPU"
    if device.type == "mps":
        return f"{precision}: on Apple's GPU bf16 is chosen by name only"
    has = "has instructions for bf16" if precision == "bf16" else "has no instructions for bf16"
    return f"{precision}: this {kind} {has}"


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
        "num_cores": num_cores(),
        "num_threads": torch.get_num_threads(),
        "gpus": ", ".join(gpus) or "none",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in text_lines(info):
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
def without_weights() -> Iterator[None]:
    """Let networks be built in a with block that have shapes and no numbers, which are loaded then.

    Nothing is drawn either. On the device "meta" drawing changes nothing, but PyTorch does it by a
    decomposition whose first use imports its compiler: a second, and a hundred megabytes that stay.
    """
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """Leaves tensors as they are where first weights would be drawn."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        is_first = getattr(func, "__module__", "") == nn.init.__name__
        if is_first or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else given["tensor"]
        return func(*args, **given)


@contextmanager
def cpu_threads(threads: Threads) -> Iterator[None]:
    """Run with a number of CPU threads ("auto": those that there are), and with as many as before
    afterwards."""
    before = torch.get_num_threads()
    if threads != "auto":
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


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
    for line in text_lines("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    return 0.0
