"""What a run will be, before it is started: size, arithmetic and memory."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from scd.common.config import to_json
from scd.common.launcher import fsdp_version, num_started
from scd.common.runtime import without_weights
from scd.data.clip import Batch, Conditions
from scd.models.attention import forget
from scd.models.build import Diffuser, build, num_parameters
from scd.models.lora import add_lora
from scd.objectives.config import DenoiseConfig, TeacherForcingConfig
from scd.optim.config import OptimConfig
from scd.optim.optim import ParameterGroup, parameter_groups
from scd.optim.states import EIGHT_BIT_BLOCK, EIGHT_BIT_LEAST
from scd.training.config import TrainConfig
from scd.training.fit import check_fit, check_window, open_loader
from scd.training.machine import run_device, settle
from scd.training.sharding import is_sharded
from scd.training.world import clip_objective

GIB = 2**30
MEMORY_FORMULA = (
    "per parameter 4 bytes each for weights, gradients and averaged weights, and for the optimizer "
    "8 (AdamW), 4 (Muon), 2 (AdamW in 8 bits), or 8 of the CPU's memory (offloaded); all of this "
    "divided by the processes where they share the weights; activations: all tensors that one "
    "micro-batch keeps for its backward pass, counted by running it on shapes alone, as on a CPU "
    "(training on a GPU keeps no dense masks). What a recomputed block keeps meanwhile, and the "
    "working memory of single operations, come on top"
)
"""How `Memory` is counted, in words."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory that one process of a run needs, in GiB: MEMORY_FORMULA says how it is counted."""

    weights_gib: float
    """The network."""
    gradients_gib: float
    """One per weight."""
    optimizer_gib: float
    """Averages that the optimisers keep, beside the weights."""
    offloaded_gib: float
    """Averages that they keep in the memory of the CPU; not in the sum."""
    average_gib: float
    """Averaged weights (EMA)."""
    activations_gib: float
    """What the forward pass keeps for the backward pass."""
    total_gib: float
    """Sum of all but what is offloaded."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Size of a run."""

    encoder_parameters: int
    """Weights that run once per frame."""
    decoder_parameters: int
    """Weights that run in every denoising step."""
    total_parameters: int
    """Sum of both."""
    tokens_per_frame: int
    """Tokens that a frame is cut into."""
    frames_per_step: int
    """Frames of all clips, micro-batches and processes of an optimiser step."""
    flops_per_step: int
    """Floating-point operations of matrix products and attention of such a step, forward and
    backward, what is recomputed included (a multiplication and an addition are two)."""
    memory: Memory
    """Memory of one process."""


def plan(config: TrainConfig, num_processes: int = 1) -> Plan:
    """Work a run out without data or training: its objective runs on shapes, not on numbers."""
    activations, flops = count_micro_batch(config)
    with without_weights():
        model = _built(config)
    num_total = num_parameters(model)
    num_encoder = sum(parameter.numel() for parameter in model.encoder_parameters())
    groups = parameter_groups(model, model.encoder_parameters(), config.optim)
    offloaded = config.optim.state == "offload"
    state = sum(
        parameter.numel() * state_bytes(group, parameter, config.optim)
        for group in groups
        for parameter in group.parameters
    )
    parts = GIB * (num_processes if config.shard_weights else 1)
    weights = 4 * num_total / parts
    moving = 4 * sum(one.numel() for one in model.parameters() if one.requires_grad) / parts
    sizes = {
        "weights_gib": weights,
        "gradients_gib": moving,
        "optimizer_gib": 0.0 if offloaded else state / parts,
        "average_gib": moving,
        "activations_gib": activations / GIB,
    }
    num_batches = config.num_accumulation * num_processes
    return Plan(
        encoder_parameters=num_encoder,
        decoder_parameters=num_total - num_encoder,
        total_parameters=num_total,
        tokens_per_frame=config.model.shape.num_tokens,
        frames_per_step=config.batch_size * config.num_frames * num_batches,
        flops_per_step=flops * num_batches,
        memory=Memory(
            **sizes,
            offloaded_gib=state / GIB if offloaded else 0.0,
            total_gib=sum(sizes.values()),
        ),
    )


def state_bytes(group: ParameterGroup, parameter: Tensor, config: OptimConfig) -> float:
    """Return the bytes per entry of what an optimiser remembers of a parameter."""
    if group.optimizer == "muon":
        return 4.0
    size, block = parameter.numel(), EIGHT_BIT_BLOCK
    if config.state == "8bit" and size >= EIGHT_BIT_LEAST and size % block == 0:
        # One byte and a share of a block's scale, for each of the two averages.
        return 2 * (1 + 4 / block)
    return 8.0


def dry_run(config: TrainConfig) -> None:
    """Print a run as JSON, all its settings and its plan, for the processes that were started; then
    see whether its data is fit for it.

    What `train` would refuse of the data is a warning on stderr: a plan needs no data.

    Raises:
        ValueError: the settings do not fit together, or not to what the launcher asks for.
    """
    check_window(config)
    run_device(config)
    config = settle(config)
    num_processes = num_started()
    planned = replace(config, shard_weights=is_sharded(config, num_processes, fsdp_version()))
    report = {
        "config": to_json(config),
        "num_processes": num_processes,
        "plan": asdict(plan(planned, num_processes)),
        "memory_formula": MEMORY_FORMULA,
    }
    print(json.dumps(report, indent=2))
    try:
        check_fit(config, open_loader(config, 0, num_processes).source.card)
    except (ValueError, OSError) as error:
        print(f"scd: warning: training would be refused: {error}", file=sys.stderr)


def count_micro_batch(config: TrainConfig) -> tuple[int, int]:
    """Count what one forward and backward pass of a micro-batch keeps and computes.

    Returns:
        Bytes that are kept between the passes, weights not included; floating-point operations of
        both passes.
    """
    objective = config.objective
    if not isinstance(objective, DenoiseConfig | TeacherForcingConfig):
        raise ValueError(f"only denoising can be planned, got {type(objective).__name__}")
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            # The tensor is held on to, or its storage's number might be given to another one.
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    forget()
    try:
        with FakeTensorMode():
            model = _built(config)
            model.gradient_checkpointing = config.gradient_checkpointing
            weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
            shape = (config.batch_size, config.num_frames)
            clean = torch.zeros(*shape, *config.model.shape.shape)
            with FlopCounterMode(display=False) as counter:
                with (
                    torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
                    torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"),
                ):
                    batch = Batch(frames=clean, conditions=_empty_conditions(config))
                    loss, _ = clip_objective(config, model).loss(model, batch, torch.Generator())
                num_bytes = sum(size for size, _ in kept.values())
                loss.backward()
            return num_bytes, counter.get_total_flops()
    finally:
        # Masks without numbers must not be taken for real ones later.
        forget()


def _built(config: TrainConfig) -> Diffuser:
    model = build(config.model)
    if config.lora:
        add_lora(model, config.lora, seed=0)
    return model


def _empty_conditions(config: TrainConfig) -> Conditions:
    spec, shape = config.model.conditions, (config.batch_size, config.num_frames)
    actions = labels = text = None
    if spec.num_actions:
        actions = torch.zeros(shape, dtype=torch.long)
    if spec.action_dim:
        actions = torch.tensor(spec.idle_action).expand(*shape, -1)
    if spec.num_labels:
        labels = torch.zeros(config.batch_size, dtype=torch.long)
    if spec.has_text:
        text = torch.zeros(config.batch_size, spec.text_length, spec.text_dim)
    return Conditions(actions=actions, labels=labels, text=text, null_text=text)
