"""What started this process: one command alone, or a launcher that starts several of them.

Also what a launcher's environment asks for beside the command line: it is obeyed, or refused, but
never passed over. Of the standard library alone, so that the command line can look at once.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Variables in which torchrun and three kinds of mpirun say how many processes there are, and which
of them this is. Accelerate looks for the same ones in this order."""

TOGETHER = "torchrun --nproc-per-node N -m scd ..."
"""How several processes are started, on GPUs and on CPUs alike."""

REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism_config",
}
"""Ways to share the work that there are not here, by the variable that asks for them."""

REFUSED_OF_FSDP = {
    "FSDP_OFFLOAD_PARAMS": ("true", "weights in the CPU's memory"),
    "FSDP_RESHARD_AFTER_FORWARD": ("false", "weights that stay whole after the forward pass"),
}
"""Settings of accelerate's FSDP that are refused at a value."""


def _number(names: tuple[str, ...], default: int) -> int:
    for name in names:
        text = os.environ.get(name, "")
        if text and not text.isdecimal():
            raise ValueError(f"{name} must be a number in the environment, got {text!r}")
        if text:
            return int(text)
    return default


def num_started() -> int:
    """Return how many processes share the work, as their launcher says; 1 without one."""
    return max(_number(COUNTS, 1), 1)


def rank() -> int:
    """Return which of them this one is, from 0."""
    return _number(RANKS, 0)


def is_first() -> bool:
    """Tell whether this is the process that speaks for all."""
    return not any(os.environ.get(name, "0").strip("0") for name in RANKS)


@contextmanager
def first_speaks(errors: bool = False) -> Iterator[None]:
    """Let only the first of several processes print and warn in a with block.

    Args:
        errors: whether the others are silent on stderr too.
    """
    with ExitStack() as stack:
        if not is_first():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            if errors:
                stack.enter_context(redirect_stderr(nowhere))
            logger = logging.getLogger("scd")
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        yield


def refuse_several(command: str) -> None:
    """Refuse to run a command that does not share its work in several processes (ValueError)."""
    if num_started() > 1:
        raise ValueError(
            f"scd {command} runs in one process, and {num_started()} were started: give the "
            "command without a launcher"
        )


def asks_for_cpu() -> bool:
    """Tell whether accelerate was told to leave GPUs alone (`accelerate launch --cpu`)."""
    return _is_true("ACCELERATE_USE_CPU")


def asked_precision() -> str:
    """Return the precision that accelerate was told; empty: none.

    Its "no" says nothing: `accelerate launch` writes it where nobody chose.
    """
    value = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return "" if value == "no" else value


def fsdp_version() -> int:
    """Return the version of FSDP that accelerate's configuration asks for; 0: none.

    Of the environment and not of accelerate, which passes over it on CPUs.
    """
    if not _is_true("ACCELERATE_USE_FSDP"):
        return 0
    return _number(("FSDP_VERSION",), 1)


def check_launch(
    precision: str, num_accumulation: int = 1, *, shards: bool = False, recomputes: bool = False
) -> None:
    """Refuse what the environment asks for and the work would not do (ValueError).

    Args:
        precision: of the work: "fp32", "bf16", or "auto", which obeys.
        num_accumulation: micro-batches of a step.
        shards: whether it can cut weights up (FSDP2).
        recomputes: whether activations are recomputed in the backward pass.
    """
    _check_processes()
    for name, what in REFUSED.items():
        if _is_true(name):
            raise ValueError(
                f"{name} asks for {what}, which there is not here: processes have whole copies of "
                "the model, or its parts (--shard-weights)"
            )
    sagemaker = os.environ.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "NO")
    if _is_true("ACCELERATE_USE_SAGEMAKER") and sagemaker != "NO":
        raise ValueError(f"SageMaker's {sagemaker} is not supported: use {TOGETHER}")
    if fsdp_version():
        _check_fsdp(shards, recomputes)
    _check_numbers(precision, num_accumulation)


def _check_processes() -> None:
    """Refuse processes that do not know of each other, and those that were asked for in vain."""
    environment: Mapping[str, Any] = os.environ
    if num_started() > 1 and not any(name in environment for name in RANKS):
        raise ValueError(
            f"{num_started()} processes are to share the work ({_first(COUNTS)}), but no RANK says "
            f"which this one is: start them by {TOGETHER}"
        )
    # What accelerate sets for several processes, and then starts one.
    lost = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    if lost and not any(name in environment for name in (*COUNTS, *RANKS)):
        raise ValueError(
            "accelerate launch was asked for several processes (MASTER_ADDR is set) and started "
            f"one, as it does on CPUs whatever --num_processes says: use {TOGETHER}"
        )


def _check_fsdp(shards: bool, recomputes: bool) -> None:
    if not shards:
        raise ValueError(
            "ACCELERATE_USE_FSDP asks for weights cut up among processes, which only scd train "
            "does: start the command without that configuration"
        )
    for name, (value, what) in REFUSED_OF_FSDP.items():
        if os.environ.get(name, "").lower() == value:
            raise ValueError(
                f"{name}={value} asks for {what}, which there is not here: leave it out"
            )
    if _is_true("FSDP_ACTIVATION_CHECKPOINTING") and not recomputes:
        raise ValueError("FSDP_ACTIVATION_CHECKPOINTING is set: give --gradient-checkpointing too")


def _check_numbers(precision: str, num_accumulation: int) -> None:
    asked = asked_precision()
    if asked and (asked != "bf16" or precision not in ("auto", "bf16")):
        known = "there are fp32 and bf16" if asked != "bf16" else f"the command has {precision}"
        raise ValueError(
            f"ACCELERATE_MIXED_PRECISION asks for {asked}, but {known}: give accelerate launch "
            "--mixed_precision no, and choose by --precision where it is a flag"
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", str(num_accumulation)):
        raise ValueError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {steps}, but a step has {num_accumulation} "
            "micro-batches: unset it, or give the same --num-accumulation where the command has it"
        )
    for name, flag in (
        ("ACCELERATE_DYNAMO_BACKEND", "the network is not compiled"),
        ("ACCELERATE_GRADIENT_CLIPPING", "gradients are clipped by --optim.clip-norm"),
    ):
        value = os.environ.get(name, "")
        if value.lower() not in ("", "no", "none"):
            raise ValueError(f"{name} is {value}, but {flag}: unset it")


def check_device(type_of_device: str) -> None:
    """Refuse a device other than the one that accelerate was told, by its type (ValueError)."""
    asked = os.environ.get("ACCELERATE_TORCH_DEVICE", type_of_device)
    if asked.partition(":")[0] != type_of_device:
        raise ValueError(
            f"ACCELERATE_TORCH_DEVICE is {asked}, but the command runs on {type_of_device}: unset "
            "it, and choose by --device"
        )
    if asks_for_cpu() and type_of_device != "cpu":
        raise ValueError(
            f"accelerate launch was told --cpu, but the command {type_of_device}: give --device cpu"
        )
    if type_of_device == "mps" and num_started() > 1:
        raise ValueError(f"mps is one device for one process, and {num_started()} were started")


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


def _first(names: tuple[str, ...]) -> str:
    return next(f"{name}={os.environ[name]}" for name in names if name in os.environ)
