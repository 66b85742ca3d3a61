"""What a run's launcher and machine decide: its device, its processes, its arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar, get_args

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

from scd.common.config import Precision
from scd.common.files import read_json
from scd.common.launcher import asked_precision, check_launch
from scd.common.processes import check_all_joined, started_device
from scd.common.runtime import choose_precision
from scd.models.weights import CONFIG_FILE
from scd.training.config import RunConfig, TrainConfig

Run = TypeVar("Run", bound=RunConfig)

SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
"""Accelerate's names of the ways to share the work that are supported: whole copies of the model,
or weights cut up by FSDP2."""


def run_device(config: RunConfig) -> torch.device:
    """Return the device of a run; refuse what its launcher asks for besides and the run would not
    do (ValueError). `scd train --dry-run` and training ask the same."""
    if isinstance(config, TrainConfig):
        check_launch(
            config.precision,
            config.num_accumulation,
            shards=True,
            recomputes=config.gradient_checkpointing,
        )
    else:
        check_launch(config.precision)
    return started_device(config.device)


def settle(config: Run) -> Run:
    """Return a run whose precision is decided: as it began, as its launcher asks, or as its device
    has instructions.

    Raises:
        ValueError: as `run_device`.
    """
    if config.precision != "auto":
        return config
    device = run_device(config)
    chosen = _begun_with(config) or asked_precision() or choose_precision("auto", device)
    return replace(config, precision=chosen)


def _begun_with(config: RunConfig) -> str:
    """Return the precision of the run in `config.out`; empty: there is none."""
    path = Path(config.out) / CONFIG_FILE
    if not config.out or not path.is_file():
        return ""
    found = read_json(path).get("precision")
    return found if found in get_args(Precision) else ""


def open_accelerator(config: RunConfig, leaves_unused: bool = False) -> Accelerator:
    """Return what knows devices, processes and precision. `leaves_unused`: a batch may leave a
    weight without gradient.

    Raises:
        ValueError: no such device, or a launcher that asks for what the run would not do.
    """
    device = run_device(config)
    choose_precision(config.precision, device)
    # Accelerate keeps its settings between runs of one Python process.
    AcceleratorState._reset_state(reset_partial_state=True)
    if config.device.startswith("cuda"):
        torch.cuda.set_device(device)
    accelerator = Accelerator(
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        # Else accelerate shares the work among GPUs only, and among CPUs not at all.
        cpu=device.type == "cpu",
        # The trainer divides the loss by the micro-batches: accelerate must not do so again.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=leaves_unused)],
    )
    if accelerator.distributed_type not in SUPPORTED:
        raise ValueError(
            f"training runs in one process, data-parallel in several, or by FSDP2 ({SUPPORTED}), "
            f"got {accelerator.distributed_type}"
        )
    check_all_joined(accelerator.num_processes)
    return accelerator
