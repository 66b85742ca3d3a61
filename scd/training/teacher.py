"""A teacher beside the model that learns from it: what it is, and whether it fits."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scd.common.config import differences, to_json
from scd.common.runtime import derive_seed, without_weights
from scd.common.weights import check_fit, is_stored
from scd.data.clip import Conditions
from scd.models.base import CausalDiffuser
from scd.models.build import Diffuser
from scd.models.checkpoint import load_world, read_world_parts, resolve
from scd.models.lora import add_lora, without_lora
from scd.models.wan.config import WanConfig
from scd.models.wan.dense import WanDiffuser
from scd.models.wan.source import WanSource, open_source
from scd.models.weights import WEIGHTS_FILE, load_weights
from scd.objectives.config import MatchConfig
from scd.objectives.discriminator import Discriminator
from scd.training.config import TrainConfig


def load_teacher(config: TrainConfig, path: str, device: torch.device) -> Diffuser:
    """Load a teacher whose weights stay as they are, and see that it fits the run's model."""
    if not path:
        raise ValueError("objective.teacher must name the run or world to learn from")
    parts = read_world_parts(resolve(path))
    check_teacher(config, parts["model"], parts["autoencoder"], path)
    model = load_world(path).model
    # Scores may have gradient to their input, and a critic begins as a copy of its teacher.
    model.gradient_checkpointing = config.gradient_checkpointing
    return model.to(device).requires_grad_(False)


def check_teacher(config: TrainConfig, theirs: Any, autoencoder: Any, path: str) -> None:
    """Refuse a teacher of other latents or conditions (ValueError, with both). `theirs` and
    `autoencoder` are its settings, `path` is where it lies."""
    ours = config.model
    _same(path, "latent frames (channels, rows, columns)", theirs.shape.shape, ours.shape.shape)
    _same(
        path, "latents of the autoencoder", autoencoder.placeless(), config.autoencoder.placeless()
    )
    different = differences(to_json(theirs.conditions), to_json(ours.conditions))
    if different:
        raise ValueError(
            f"the teacher {path} and the student must work on the same conditions (its setting, "
            f"then the student's): {'; '.join(different[:3])}"
        )


def _same(path: str, what: str, their: Any, our: Any) -> None:
    if their != our:
        raise ValueError(
            f"the teacher {path} and the student must work on the same {what}: "
            f"got {their} and {our}"
        )


class Bidirectional(nn.Module):
    """A dense Wan model as it was published, behind the call of a teacher or a critic: all noisy
    frames of a clip see each other, and the history is not looked at."""

    def __init__(self, model: WanDiffuser) -> None:
        super().__init__()
        self.model = model

    @property
    def window(self) -> int:
        """Frames that it was trained on."""
        return self.model.config.cache.window

    def forward(
        self,
        history: Tensor,
        noisy: Float[Tensor, "b r m c h w"],
        time: Float[Tensor, "b r m"],
        conditions: Conditions,
    ) -> Float[Tensor, "b r m c h w"]:
        """Return the velocity of noisy frames, each draw by itself."""
        texts = conditions.repeat(noisy.shape[1])
        velocity = self.model.bidirectional(noisy.flatten(0, 1), time.flatten(0, 1), texts)
        return velocity.view(noisy.shape)


def load_bidirectional(
    config: TrainConfig, path: str, device: torch.device, dtype: torch.dtype | None = None
) -> Bidirectional:
    """Load a bidirectional Wan model as teacher, or as what a critic begins as:
    `find_bidirectional`. Its weights stay in the type that they are stored in, unless `dtype` says
    otherwise."""
    theirs, source = find_bidirectional(config, path)
    with without_weights():
        model = WanDiffuser(theirs)
    if source is None:
        load_weights(model, resolve(path) / WEIGHTS_FILE)
    else:
        with source.weights as weights:
            check_fit(model, source.headers(), path, source.named)
            for name, there in source.names.items():
                model.load_state_dict({name: weights.get(there)}, strict=False, assign=True)
    model.gradient_checkpointing = config.gradient_checkpointing
    return Bidirectional(model.to(device, dtype).eval().requires_grad_(False))


def find_bidirectional(config: TrainConfig, path: str) -> tuple[WanConfig, WanSource | None]:
    """Find a bidirectional Wan model and see that it fits a run; no weights are read.

    Returns:
        Settings of the model; and where its weights lie, None if in a world.

    Raises:
        FileNotFoundError: nothing is there, or not all of it.
        ValueError: it is no dense Wan model, or works on other latents or texts than the student.
    """
    if not path:
        raise ValueError("objective.teacher must name the Wan model to learn from")
    folder = Path(path)
    if (folder / "last").is_file() or is_stored(folder / WEIGHTS_FILE):
        parts = read_world_parts(resolve(path))
        theirs = parts["model"]
        if not theirs.takes_text or theirs.is_separable:
            raise ValueError(
                f"{path} holds a {type(theirs).__name__}: a bidirectional teacher is a dense Wan "
                "model (scd convert wan --split dense, or a folder of diffusers)"
            )
        check_teacher(config, theirs, parts["autoencoder"], path)
        return theirs, None
    ours, source = config.model, open_source(path)
    theirs = WanConfig(
        shape=replace(ours.shape, channels=source.channels, patch_size=source.patch_size),
        block=source.block,
        num_layers=source.num_layers,
        conditions=source.conditions(ours.conditions.text_length),
    )
    check_teacher(config, theirs, config.autoencoder, path)
    return theirs, source


def bidirectional_critic(
    config: TrainConfig, settings: MatchConfig, device: torch.device
) -> Bidirectional:
    """Return a critic that sees whole clips, with its first weights, which move."""
    path = settings.critic_model or settings.teacher
    critic = load_bidirectional(config, path, device, torch.float32).requires_grad_(True)
    critic.model.gradient_checkpointing = _recomputes(config, settings)
    return critic


class LowRankCritic(Bidirectional):
    """A critic that is a teacher with low-rank additions, which alone move and are kept."""

    def __init__(self, teacher: Bidirectional, rank: int, seed: int) -> None:
        """Give a teacher additions; it stays itself as `teacher`."""
        super().__init__(teacher.model)
        add_lora(self.model, rank, seed)

    @torch.no_grad()
    def teacher(self, *inputs: Any) -> Tensor:
        """Return the velocity without the additions."""
        with without_lora(self.model):
            return self(*inputs)

    def state_dict(self, *args: Any, **more: Any) -> Any:
        """Return the additions."""
        moving = {name for name, weight in self.named_parameters() if weight.requires_grad}
        state = super().state_dict(*args, **more)
        return {name: value for name, value in state.items() if name in moving}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **more: Any) -> Any:
        """Take up additions (ValueError: they are others)."""
        if state_dict.keys() != self.state_dict().keys():
            raise ValueError("the critic's low-rank additions are others")
        return super().load_state_dict(state_dict, strict=False)


def causal_critic(
    config: TrainConfig, settings: MatchConfig, student: Diffuser, teacher: Diffuser
) -> nn.Module:
    """Return a critic that sees the frames before, with its first weights, which move."""
    start = teacher if settings.critic_start == "teacher" else student
    critic = copy.deepcopy(start).requires_grad_(True)
    critic.gradient_checkpointing = _recomputes(config, settings)
    if settings.method != "gan":
        return critic
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "initial weights of the discriminator"))
        return Discriminator(critic)


def _recomputes(config: TrainConfig, settings: MatchConfig) -> bool:
    # Where the student's gradient passes through the critic, blocks that are recomputed in the
    # backward pass would find their weights no longer frozen.
    return config.gradient_checkpointing and settings.method == "dmd"


def encoder_parameters(critic: nn.Module) -> Iterator[nn.Parameter]:
    """Yield what trains at the encoder's learning rate: the encoder of the diffuser in a critic."""
    for module in critic.modules():
        if isinstance(module, CausalDiffuser):
            yield from module.encoder_parameters()
