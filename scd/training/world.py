"""Training of a world model: `scd train` and `scd distill`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.func import functional_call

from scd.autoencoders.build import build_autoencoder, latents_of
from scd.common.launcher import fsdp_version
from scd.common.runtime import derive_seed
from scd.common.weights import Weights
from scd.data.clip import Batch, Conditions
from scd.data.source import Source
from scd.engine.open import LARGE_PRODUCT, largest_product
from scd.models.build import Diffuser, build
from scd.models.checkpoint import RAW_FILE, World, write_world
from scd.models.flow import first_schedule, schedule
from scd.models.lora import LORA_FOLDER, LoraBase, add_lora, load_lora, merged, write_lora
from scd.models.weights import load_weights
from scd.objectives.config import (
    ConsistencyConfig,
    DenoiseConfig,
    MatchConfig,
    RegressionConfig,
    TeacherForcingConfig,
)
from scd.objectives.denoise import Denoise, Network, Objective, TeacherForcing
from scd.objectives.distill import Consistency, Regression, guided, guided_path, path_of, running
from scd.objectives.self_forcing import CriticMatching, DDPWrapper, StudentMatching
from scd.optim.optim import EMA
from scd.training.config import TrainConfig
from scd.training.fit import (
    check_fit,
    check_rollout,
    load_initial,
    open_loader,
    open_training,
)
from scd.training.held_out import draw_samples, read_held_out, validate
from scd.training.sharding import is_sharded, shard
from scd.training.state import OptimisationGroup, Run, Task
from scd.training.teacher import (
    Bidirectional,
    LowRankCritic,
    bidirectional_critic,
    causal_critic,
    encoder_parameters,
    load_bidirectional,
    load_teacher,
)
from scd.training.trainer import is_due, train_task

BF16_GRID = 16
"""Steps of a grid from which on one step changes about as much as bfloat16, of 8 binary digits,
rounds in a network's estimate. That it matters at 48: Causal-Forcing, question 58; CausVid, 19."""

logger = logging.getLogger(__name__)


class WorldTask(Task):
    """A world model with its data, its autoencoder and its objective, each opened once."""

    config: TrainConfig

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective | None,
        source: Source | None,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.accelerator, self.objective = config, accelerator, objective
        self.max_steps, self.num_accumulation = config.max_steps, config.num_accumulation
        num_processes = accelerator.num_processes
        self.sharded = is_sharded(config, num_processes, fsdp_version())
        self.is_wrapped = self.sharded
        num_frames = config.batch_size * config.num_frames
        self.is_small = largest_product(config.model, num_frames) < LARGE_PRODUCT
        autoencoder = build_autoencoder(config.autoencoder, accelerator.device)
        source = open_training(config, autoencoder, source)
        self.held_out = read_held_out(config, source)
        self.loader = open_loader(config, accelerator.process_index, num_processes, source)
        check_fit(config, source.card, autoencoder)
        self.model: Diffuser = build_model(config)
        self.world = World(
            model=self.model, autoencoder=autoencoder, card=source.card, sampling=config.sampling
        )

    def begin(self) -> None:
        """Take over the weights of `config.initial`."""
        if self.config.initial:
            load_initial(self.model, self.config)
        if self.config.lora:
            add_lora(self.model, self.config.lora, derive_seed(self.config.seed, "additions"))

    def restore(self, checkpoint: Path) -> None:
        """Give the model the averaged weights of a checkpoint, to go on."""
        if not self.config.lora:
            super().restore(checkpoint)
            return
        add_lora(self.model, self.config.lora, seed=0)
        load_weights(self.model, checkpoint / RAW_FILE)
        load_lora(self.model, self._bases(), checkpoint / LORA_FOLDER)
        moving = {name for name, one in self.model.named_parameters() if one.requires_grad}
        with Weights(checkpoint / self.weights_file) as weights:
            # What moves and is no addition lies in the world under its own name.
            state = {name: weights.get(name) for name in weights.names() if name in moving}
        self.model.load_state_dict(state, strict=False)

    def _bases(self) -> dict[str, LoraBase]:
        """Describe what additions are added to, by the part of the model."""
        config: Any = self.config.model
        sides = ("encoder", "decoder") if config.is_separable else ("",)
        parts = zip(sides, self.model.parts, strict=True)
        return {
            side: LoraBase.of(config.block, len(part.blocks), part.state_dict())
            for side, part in parts
        }

    def shard(self) -> None:
        """Cut the model's weights up."""
        shard(self.model, self.accelerator)

    def make_groups(self, ema: EMA) -> list[OptimisationGroup]:
        """Return the student's critic, if it has one, and the model."""
        if self.objective is not None:
            return [_group(self.config, self.model, self.objective)]
        return build_groups(self.config, self.model, ema, self.accelerator)

    def facts(self) -> dict[str, Any]:
        """Tell whether the weights are cut up, and how many move if not all do."""
        facts: dict[str, Any] = {"sharded": self.sharded}
        if self.config.lora:
            moving = (one.numel() for one in self.model.parameters() if one.requires_grad)
            facts["moving_parameters"] = sum(moving)
        return facts

    def prepare(self, batch: Batch) -> Batch:
        """Encode a batch, unless latents were stored."""
        frames = latents_of(self.world.autoencoder, batch)
        return replace(batch, frames=frames, encoded=True)

    def look(self, run: Run, last: bool) -> None:
        """Measure the loss on held-out clips, and draw what the model makes of some."""

        def due(every: int) -> bool:
            return is_due(run.step, every) or (last and every > 0)

        if due(self.config.validate_every):
            with run.averaged():
                losses = validate(
                    self.world,
                    self.held_out,
                    self.config.validation_times,
                    self.accelerator,
                    self.sharded,
                )
            run.log.event("validation", {"step": run.step} | losses)
        if due(self.config.sample_every):
            self._sample(run)

    def _sample(self, run: Run) -> None:
        writes = self.accelerator.is_main_process
        if writes or self.sharded:
            assert run.folder is not None
            path = run.folder / "samples" / f"step_{run.step:06d}.png" if writes else None
            batch = self.held_out[0].to(self.accelerator.device)
            try:
                with run.averaged(), self.accelerator.autocast():
                    draw_samples(self.world, batch, path, self.config.num_frames)
            except FileNotFoundError as error:
                # Training needs latents only; pictures need their decoder too.
                run.log.event("sample", {"step": run.step, "skipped": str(error)})
        self.accelerator.wait_for_everyone()

    def write(self, run: Run, folder: Path, averaged: Mapping[str, Tensor]) -> None:
        """Write a world of the averaged weights."""
        if self.config.lora:
            write_lora(averaged, self._bases(), folder / LORA_FOLDER)
            averaged = merged(averaged)
        write_world(self.world, averaged, folder)


def train(
    config: TrainConfig, objective: Objective | None = None, source: Source | None = None
) -> Path:
    """Train a world model and return the run folder.

    Args:
        config: the run.
        objective: what to minimise; None: as `config.objective` says.
        source: the training split as `scd.training.fit.open_split` opens it, where it is open.

    Raises:
        ValueError, FileExistsError, OSError, Interrupted: as `scd.training.trainer.train_task`.
    """
    # A rollout begins without gradient, and a discriminator has an output nobody reads; without
    # dropout of conditions no batch reaches the null vector of continuous actions.
    leaves_unused = isinstance(config.objective, MatchConfig) or (
        config.model.conditions.action_dim > 0 and config.objective.condition_dropout == 0
    )
    train_task(
        config,
        lambda settled, accelerator: WorldTask(settled, objective, source, accelerator),
        leaves_unused,
    )
    return Path(config.out)


def build_model(config: TrainConfig) -> Diffuser:
    """Build the run's model with its first weights, which depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "initial weights"))
        model = build(config.model)
    model.gradient_checkpointing = config.gradient_checkpointing
    return model


def build_groups(
    config: TrainConfig, model: Diffuser, ema: EMA, accelerator: Accelerator
) -> list[OptimisationGroup]:
    """Return what `config.objective` trains: the critic of a matching, and the model. Refuse a
    teacher that does not fit the model, or an objective that is not for it (ValueError)."""
    objective, device = config.objective, accelerator.device
    if not isinstance(objective, ConsistencyConfig | MatchConfig):
        return [_group(config, model, clip_objective(config, model))]
    if objective.guidance > 1 and not config.model.conditions.is_steered:
        raise ValueError("guidance by conditions needs a teacher with actions, labels or text")
    if isinstance(objective, MatchConfig):
        return _matching_groups(config, objective, model, accelerator)
    teacher = load_teacher(config, objective.teacher, device)
    size = model.config.frames_per_block
    if teacher.config.frames_per_block != size:
        raise ValueError(
            f"the teacher {objective.teacher} denoises blocks of {teacher.config.frames_per_block} "
            f"frames: a student on its path does the same, got model.frames_per_block={size}"
        )

    def averaged(*inputs: Tensor | Conditions, **more: Tensor) -> Tensor:
        return functional_call(model, ema.state_dict(), inputs, more)

    target = averaged if objective.target == "average" else model
    if config.precision == "bf16" and objective.num_grid_steps > BF16_GRID:
        logger.warning(
            "products in bf16 round what a short step of the teacher changes (a grid of %d steps): "
            "others saw consistency and matching stay unfinished in it. Weights, averages and "
            "gradients are float32 here; --precision fp32 makes the products so, too",
            objective.num_grid_steps,
        )
    consistency = Consistency(
        config=objective,
        teacher=guided_path(path_of(teacher, accelerator.autocast), objective.guidance),
        target=running(target, accelerator.autocast),
        needs_first_frame=model.needs_first_frame,
        frames_per_block=size,
        encoder_noise=model.encoder_noise,
    )
    return [_group(config, model, consistency, min_spread=objective.min_spread)]


def clip_objective(config: TrainConfig, model: Diffuser) -> Objective:
    """Return what `config.objective` makes a model learn from recorded clips alone."""
    objective, needs_first_frame = config.objective, model.needs_first_frame
    if isinstance(objective, DenoiseConfig):
        return Denoise(config=objective, needs_first_frame=needs_first_frame)
    if isinstance(objective, RegressionConfig):
        times = schedule(config.sampling).tolist()[:-1]
        return Regression(config=objective, times=times, needs_first_frame=needs_first_frame)
    if not isinstance(objective, TeacherForcingConfig):
        raise ValueError(f"only denoising can be planned, got {type(objective).__name__}")
    if not config.model.takes_text:
        raise ValueError("teacher forcing on Wan's noise levels is for Wan models: see denoise")
    return TeacherForcing(config=objective, frames_per_block=config.model.frames_per_block)


def _group(
    config: TrainConfig, model: Diffuser, objective: Objective, **more: Any
) -> OptimisationGroup:
    encoder = model.encoder_parameters()
    return OptimisationGroup.of(model, objective, config.optim, encoder=encoder, **more)


def _matching_groups(
    config: TrainConfig, objective: MatchConfig, model: Diffuser, accelerator: Accelerator
) -> list[OptimisationGroup]:
    """Return critic and student, whose rollouts are matched to a teacher."""
    device = accelerator.device
    if objective.view == "bidirectional":
        # It stays as it is, and products are made in 16 bits either way.
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        teacher = load_bidirectional(config, objective.teacher, device, dtype)
    else:
        teacher = load_teacher(config, objective.teacher, device)
    if model.needs_first_frame and objective.num_given_frames == 0:
        raise ValueError("this model must be given a first frame: num_given_frames is 0")
    check_rollout(config)
    network: Network = teacher
    if isinstance(teacher, Bidirectional) and objective.critic_lora:
        seed = derive_seed(config.seed, "additions of the critic")
        window, critic = teacher.window, LowRankCritic(teacher, objective.critic_lora, seed)
        network = critic.teacher
    elif isinstance(teacher, Bidirectional):
        window, critic = teacher.window, bidirectional_critic(config, objective, device)
    else:
        window = teacher.config.cache.window
        critic = causal_critic(config, objective, model, teacher).to(device)
    parts: dict[str, Any] = {
        "config": objective,
        "student": model,
        "critic": critic,
        "teacher": guided(running(network, accelerator.autocast), objective.guidance),
        "times": schedule(config.sampling).tolist()[:-1],
        "first_times": first_schedule(config.sampling).tolist()[:-1],
        "num_frames": config.num_frames,
        "num_scored": objective.num_scored(config.num_frames, window),
        "window": window,
        "autocast": accelerator.autocast,
    }
    return [
        OptimisationGroup.of(
            critic,
            CriticMatching(**parts),
            objective.critic,
            name="critic",
            encoder=encoder_parameters(critic),
            num_updates=objective.num_critic_updates,
            max_rise=objective.max_rise,
        ),
        _group(
            config,
            model,
            StudentMatching(**parts),
            wrapped=DDPWrapper(model),
            min_spread=objective.min_spread,
        ),
    ]
