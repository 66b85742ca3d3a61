"""Weights cut up among processes: each holds a part of every weight, and of all that goes with it.

PyTorch's FSDP2, on GPUs and on CPUs alike. Gradients, averaged weights and the states of the
optimiser are cut as the weights are; a block's weights are whole only while it runs. Checkpoints
are written whole by the first process, so that any number of processes goes on from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from scd.common.launcher import TOGETHER
from scd.common.weights import Weights, check_fit, headers
from scd.models.build import Diffuser
from scd.objectives.config import DenoiseConfig, TeacherForcingConfig
from scd.training.config import TrainConfig

MODEL_METHODS = ("begin", "context", "velocity", "observe")
"""What runs a model besides its forward: sample pictures stream."""
BLOCK_METHODS = ("keys_values", "text_keys_values")
"""What runs a block besides its forward."""


def is_sharded(config: TrainConfig, num_processes: int, fsdp_version: int = 0) -> bool:
    """Tell whether a run's weights are cut up, because its settings or accelerate's ask for it;
    refuse what needs its weights whole (ValueError)."""
    if fsdp_version == 1:
        raise ValueError("weights are cut up by FSDP2 only: needed fsdp_version 2")
    if not config.shard_weights and not fsdp_version:
        return False
    if num_processes < 2:
        raise ValueError(
            f"weights are cut up among several processes, and one was started: use {TOGETHER}"
        )
    if not isinstance(config.objective, DenoiseConfig | TeacherForcingConfig):
        raise ValueError(
            "shard_weights is for training on clips, not for distillation: "
            f"got {type(config.objective).__name__}"
        )
    if config.optim.optimizer != "adamw" or config.optim.state != "fp32":
        raise ValueError(
            "shard_weights needs optim.optimizer adamw, since muon looks at whole matrices, and "
            f"optim.state fp32; got {config.optim.optimizer} and {config.optim.state}"
        )
    return True


def shard(model: Diffuser, accelerator: Accelerator) -> None:
    """Cut a model's weights up, in place: block by block, and what is left as one part.

    The model is the same on all processes before; after, each parameter is a DTensor.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # Before the cut, so that what gathers the weights stands around the run's precision.
    accelerator.prepare_model(model, evaluation_mode=True)
    blocks = ((block, BLOCK_METHODS) for block in model.transformer_blocks())
    for part, methods in (*blocks, (model, MODEL_METHODS)):
        fully_shard(part, mesh=mesh)
        for name in methods:
            if hasattr(part, name):
                register_fsdp_forward_method(part, name)


def load_parts(model: nn.Module, path: Path) -> None:
    """Load whole weights from files into a model; of one that was cut up each process takes its
    part."""
    state = model.state_dict()
    with Weights(path, as_stored=True) as stored, torch.no_grad():
        check_fit(model, headers(stored), str(path))
        for name in stored.names():
            state[name].copy_(_part_like(state[name], stored.get(name)))


def cut_state(optimizer: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved state dict whose tensors are cut as the parameters they belong to are."""
    parameters = [part for group in optimizer.param_groups for part in group["params"]]

    def cut(ours: Tensor, value: Any) -> Any:
        belongs = isinstance(value, Tensor) and value.shape == ours.shape
        return _part_like(ours, value) if belongs else value

    states = {
        place: {name: cut(parameters[place], value) for name, value in state.items()}
        for place, state in saved["state"].items()
    }
    return {**saved, "state": states}


def _part_like(ours: Tensor, whole: Tensor) -> Tensor:
    """Cut a whole tensor as another one of its shape is cut; nothing is sent."""
    if not isinstance(ours, DTensor):
        return whole
    whole = whole.to(ours.device)
    return distribute_tensor(whole, ours.device_mesh, ours.placements, src_data_rank=None)


def gathered(state: Any, keep: bool) -> Any:
    """Return a state with whole tensors in place of those that were cut up.

    All processes must call it; those that do not `keep` it get None in place of these.
    """

    def whole(part: DTensor) -> Tensor | None:
        tensor = part.full_tensor().detach()
        return tensor.cpu() if keep else None

    return tree_map_only(DTensor, whole, state)
