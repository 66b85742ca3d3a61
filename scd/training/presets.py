"""Named complete runs, and what a distillation is made from. The command line picks one and
overrides fields."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import tyro

from scd.autoencoders.config import WanAutoencoderConfig
from scd.common.config import Precision, at_least
from scd.data.spaces import ConditionSpec
from scd.models.config import (
    BlockConfig,
    CacheConfig,
    DecoderConfig,
    DenseConfig,
    EncoderConfig,
    FrameShape,
    SamplingConfig,
    SeparableConfig,
)
from scd.models.kinds import ModelConfig
from scd.models.wan.config import SHIFT, WanSeparableConfig
from scd.objectives.config import (
    ConsistencyConfig,
    DenoiseConfig,
    MatchConfig,
    TeacherForcingConfig,
)
from scd.optim.config import OptimConfig
from scd.training.config import TrainConfig

TOY_ACTIONS = ConditionSpec(num_actions=5)
"""none, up, down, left, right"""
DOOM_ACTIONS = ConditionSpec(num_actions=4)
"""none, forward, turn left, turn right"""
MINECRAFT_ACTIONS = ConditionSpec(num_actions=4)
"""Source: paper (Minecraft)."""


def _pixel_run(
    data: str,
    size: int,
    conditions: ConditionSpec,
    *,
    width: int = 192,
    num_layers: tuple[int, int] = (4, 2),
    num_frames: int = 16,
    batch_size: int = 4,
    max_steps: int = 20_000,
    muon_lr: float = 6e-3,
    patch_size: int = 8,
    modulate_output: bool = True,
) -> TrainConfig:
    """Return a run on small frames whose latents are the pixels themselves.

    Clean estimates, more noise in training, Muon, a coarse rotary theta and more clips instead of
    more draws per clip are what a small model needs there: docs/log.md.
    """
    return TrainConfig(
        data=data,
        max_steps=max_steps,
        batch_size=batch_size,
        num_frames=num_frames,
        precision="auto",
        ema_decay=0.99,
        model=SeparableConfig(
            shape=FrameShape(channels=3, height=size, width=size, patch_size=patch_size),
            block=BlockConfig(
                width=width, rotary_theta=10.0, learned_positions=True, initial_condition_std=0.5
            ),
            encoder=EncoderConfig(num_layers=num_layers[0], modulate_output=modulate_output),
            decoder=DecoderConfig(num_layers=num_layers[1], join="prefix", predict="clean"),
            conditions=conditions,
            cache=CacheConfig(window=num_frames),
        ),
        objective=DenoiseConfig(num_draws=1, time_mean=1.0, history_noise=0.3),
        optim=OptimConfig(
            optimizer="muon",
            lr=1e-3,
            muon_lr=muon_lr,
            decoder_lr_ratio=1.0,
            warmup_steps=50,
            decay_fraction=0.4,
        ),
        sampling=SamplingConfig(num_steps=10),
    )


def _dense_twin(run: TrainConfig) -> TrainConfig:
    """Return the same run with a dense model of as many layers and nearly as many parameters."""
    model = run.model
    assert isinstance(model, SeparableConfig)
    dense = DenseConfig(
        shape=model.shape,
        block=model.block,
        num_layers=model.encoder.num_layers + model.decoder.num_layers,
        predict=model.decoder.predict,
        conditions=model.conditions,
        cache=replace(model.cache, num_sinks=1),
    )
    assert isinstance(run.objective, DenoiseConfig)
    return replace(run, model=dense, objective=replace(run.objective, context_noise=0.0))


def _paper_run(model: ModelConfig, data: str, num_frames: int, batch_size: int) -> TrainConfig:
    """Return a run with the paper's settings (optimisation). Batch size is per process, of 8."""
    separable = isinstance(model, SeparableConfig)
    return TrainConfig(
        data=data,
        max_steps=1_000_000,
        batch_size=batch_size,
        num_frames=num_frames,
        precision="auto",
        gradient_checkpointing=True,
        ema_decay=0.9999,
        save_every=10_000,
        validate_every=10_000,
        sample_every=10_000,
        model=model,
        objective=DenoiseConfig(context_noise=0.05 if separable else 0.0),
        optim=OptimConfig(lr=1e-4, decoder_lr_ratio=2.0 if separable else 1.0),
        sampling=SamplingConfig(num_steps=50, schedule="reference"),
    )


PAPER_FRAME = FrameShape(channels=32, height=8, width=8, patch_size=1)
"""Latent of the deep-compression autoencoder: 64 tokens per frame. Source: paper (sizes)."""


def _separable(
    width: int, encoder: int, decoder: int, conditions: ConditionSpec, window: int
) -> SeparableConfig:
    return SeparableConfig(
        shape=PAPER_FRAME,
        block=BlockConfig(width=width),
        encoder=EncoderConfig(num_layers=encoder),
        decoder=DecoderConfig(num_layers=decoder),
        conditions=conditions,
        cache=CacheConfig(window=window),
    )


def _dense(width: int, layers: int, conditions: ConditionSpec, window: int) -> DenseConfig:
    return DenseConfig(
        shape=PAPER_FRAME,
        block=BlockConfig(width=width),
        num_layers=layers,
        conditions=conditions,
        cache=CacheConfig(window=window),
    )


def _minecraft(encoder: int, decoder: int) -> TrainConfig:
    model = _separable(1024, encoder, decoder, MINECRAFT_ACTIONS, window=300)
    return _paper_run(model, "data/minecraft", num_frames=300, batch_size=2)


def _ucf(model: ModelConfig) -> TrainConfig:
    # Source: paper (optimisation): FAR-B's recipe, 16-frame clips, batch 32, no warm-up.
    run = _paper_run(model, "data/ucf101", num_frames=16, batch_size=4)
    return replace(run, max_steps=200_000, optim=replace(run.optim, warmup_steps=0))


_TOY = _pixel_run(
    "toy:32",
    32,
    TOY_ACTIONS,
    width=128,
    max_steps=640,
    muon_lr=1e-2,
    # Keeps the parameters of the two kinds within 5 percent of each other: the separable model has
    # its embeddings twice, which counts at this size.
    modulate_output=False,
)
_DOOM_32 = _pixel_run("data/doom-32", 32, DOOM_ACTIONS, batch_size=8)
_DOOM_64 = _pixel_run("data/doom-64", 64, DOOM_ACTIONS)
# As many tokens per frame as doom-32, so that a CPU trains it in an hour and plays it.
_DOOM_PLAY = _pixel_run("data/doom-64", 64, DOOM_ACTIONS, patch_size=16)
_DOOM_128 = replace(
    _pixel_run(
        "data/doom-128",
        128,
        DOOM_ACTIONS,
        width=512,
        num_layers=(8, 4),
        num_frames=32,
        batch_size=8,
        max_steps=100_000,
    ),
    gradient_checkpointing=True,
)

# Source: paper (teacher forcing): frames, steps and full finetuning; batch and rates are not told.
_WAN = TrainConfig(
    data="data/latents",
    max_steps=55_000,
    batch_size=1,
    num_frames=21,
    precision="auto",
    gradient_checkpointing=True,
    ema_decay=0.999,
    num_validation_clips=8,
    model=WanSeparableConfig(),
    objective=TeacherForcingConfig(),
    optim=OptimConfig(lr=1e-5, decoder_lr_ratio=1.0, warmup_steps=1000),
    sampling=SamplingConfig(num_steps=50, schedule="shifted", shift=5.0),
    autoencoder=WanAutoencoderConfig(source=""),
)

_RUNS = {
    "toy": _TOY,
    "toy-dense": _dense_twin(_TOY),
    "doom-32": _DOOM_32,
    "doom-32-dense": _dense_twin(_DOOM_32),
    "doom-64": _DOOM_64,
    "doom-64-dense": _dense_twin(_DOOM_64),
    "doom-play": _DOOM_PLAY,
    "doom-128": _DOOM_128,
    "doom-128-dense": _dense_twin(_DOOM_128),
    "wan-tf": _WAN,
    "scd-b": _ucf(_separable(768, 8, 4, ConditionSpec(), window=16)),
    "scd-m": _minecraft(8, 4),
    "scd-me": _minecraft(16, 4),
    "scd-md": _minecraft(8, 12),
    "dense-b": _ucf(_dense(768, 12, ConditionSpec(), window=16)),
    "dense-m": _paper_run(
        _dense(1024, 12, MINECRAFT_ACTIONS, window=300), "data/minecraft", 300, 2
    ),
}
PRESETS: dict[str, TrainConfig] = {
    name: replace(run, out=f"runs/out/{name}") for name, run in _RUNS.items()
}
"""Runs by name; the paper's six have its sizes, and "wan-tf" that of its source."""


def preset(name: str) -> TrainConfig:
    """Return a named run; ValueError if there is none of that name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """One training run, or only its plan."""

    run: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    """The run."""
    dry_run: bool = False
    """Print all settings, parameters, arithmetic and memory as JSON, and do not train. Started by
    accelerate or torchrun, of as many processes as they start."""


Method = Literal["dmd", "sid", "gan", "consistency", "regression"]
"""How a student learns: see `scd.objectives.distribution_matching` (the first three) and
`scd.objectives.distill`."""
Size = Literal["toy", "doom"]
"""Named sizes of a distillation."""


@dataclass(frozen=True, kw_only=True)
class DistillChoice:
    """What a distillation run is made from, before any of its fields is changed."""

    teacher: tyro.conf.Positional[str]
    """World, run or step folder to learn from."""
    data: str = "toy:32"
    """Clips to learn on, as in `scd train`."""
    initial: str = ""
    """Run or world whose weights the student starts from, and whose model it is; empty: the
    teacher."""
    steps: int = 4
    """Denoising steps per frame of the student."""
    method: Method = "consistency"
    """How it learns. On recorded clips: consistency with the teacher's path; regression, the plain
    baseline. On its own rollouts, best from a student of consistency (`initial`): dmd, distribution
    matching; sid, score identity; gan, against a discriminator."""
    preset: Size | None = None
    """Sizes of clips, batches and steps; None: toy for the toy world, doom for any other data."""

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps)

    @property
    def size(self) -> Size:
        """The preset that is meant."""
        return self.preset or ("toy" if self.data.startswith("toy:") else "doom")


MUON = OptimConfig(
    optimizer="muon", decoder_lr_ratio=1.0, warmup_steps=20, decay_fraction=0.5, clip_norm=1.0
)
"""Optimiser of students, as of the small models that they come from."""

CLIPS: dict[Size, dict[str, int]] = {
    "toy": {"max_steps": 400, "batch_size": 4, "num_frames": 16, "sample_every": 400},
    "doom": {"max_steps": 350, "batch_size": 4, "num_frames": 16, "sample_every": 350},
}
"""Fields of a run on recorded clips by preset: about eight minutes on one CPU core."""

ROLLOUTS: dict[Size, dict[str, int]] = {
    "toy": {"max_steps": 400, "batch_size": 4, "num_frames": 12, "sample_every": 400},
    "doom": {"max_steps": 400, "batch_size": 4, "num_frames": 12, "sample_every": 400},
}
"""Fields of a run on the student's rollouts by preset: ten to fifteen minutes on one CPU core."""


WAN_OPTIM = OptimConfig(
    lr=2e-6,
    decoder_lr_ratio=1.0,
    betas=(0.0, 0.999),
    weight_decay=0.01,
    warmup_steps=0,
    clip_norm=10.0,
)
"""How the student's weights move."""

_WAN_STUDENT = TrainConfig(
    batch_size=1,
    num_frames=21,
    num_accumulation=8,
    precision="auto",
    gradient_checkpointing=True,
    ema_decay=0.99,
    validate_every=0,
    num_validation_clips=1,
    model=WanSeparableConfig(),
    optim=WAN_OPTIM,
)
"""What both stages of a student share: 8 clips to a step, of 81 frames of video."""

WAN_CONSISTENCY = replace(
    _WAN_STUDENT,
    max_steps=3000,
    sample_every=500,
    save_every=500,
    objective=ConsistencyConfig(
        guidance=3.0,
        num_grid_steps=48,
        grid_shift=SHIFT,
        num_teacher_steps=1,
        target="average",
        huber=0.0,
        num_draws=1,
        history_noise=0.0,
        condition_dropout=0.0,
        min_spread=0.1,
    ),
)
"""The causal start of a student of few steps: Causal-Forcing's numbers. One step of the teacher on
a grid of 48, target the student's average, 3,000 steps or more of 8 clips to a card."""

WAN_DMD = replace(
    _WAN_STUDENT,
    max_steps=120,
    sample_every=20,
    save_every=20,
    log_every=1,
    objective=MatchConfig(
        view="bidirectional",
        guidance=4.0,
        num_given_frames=0,
        num_draws=1,
        time_per="clip",
        min_spread=0.1,
        critic=replace(WAN_OPTIM, lr=4e-7),
    ),
)
"""Preset "wan" of a distillation: Self-Forcing's numbers. Its 600 updates of the critic are 120
steps of ours, five of the critic and one of the student each; 8 clips to a step on each of 8 cards
are its 64."""


@dataclass(frozen=True, kw_only=True)
class WanSteps:
    """Steps of a student of Wan."""

    steps: tuple[int, ...] = ()
    """Denoising steps of the student on Wan's scale of 1000, descending from 1000, before the
    shift: 1000 750 500 250 are four, 1000 500 two, 1000 is one. Empty: those of what it starts
    from, or four of a model that was not distilled."""
    first_steps: tuple[int, ...] = ()
    """Likewise of the first frame, or block, of a video that begins from nothing, more than of the
    others: 1000 750 500 250 beside one or two. Empty: as the others, or with `steps` empty as what
    it starts from."""
    shift: float = SHIFT
    """Bend of the steps towards noise."""


@dataclass(frozen=True, kw_only=True)
class WanConsistencyChoice(WanSteps):
    """What a causal start of Wan is made from, before any of its fields is changed."""

    teacher: tyro.conf.Positional[str]
    """Causal Wan model of many steps to learn from, whose denoising path is followed: a run of
    `scd train wan-tf`, separable or dense, frame by frame or in blocks as the student."""
    data: str = ""
    """Latents with embedded prompts, as `scd encode` writes them."""
    initial: str = ""
    """World or run that the student starts from, and whose model it is; empty: the teacher."""
    preset: Literal["wan"] = "wan"
    """Sizes of clips, batches and steps."""


@dataclass(frozen=True, kw_only=True)
class WanDmdChoice(WanSteps):
    """What a distillation of Wan is made from, before any of its fields is changed."""

    run: tyro.conf.Positional[str]
    """World or run of a Wan model that the student starts from: of `scd distill wan-consistency`,
    which is best, of `scd train wan-tf`, or as `scd convert wan` wrote it."""
    prompts: str = ""
    """Text file with a prompt in each line, or a folder in which they were embedded before."""
    teacher: str = ""
    """Bidirectional Wan to learn from: a folder of diffusers, its name on the hub, or a dense world
    of `scd convert wan --split dense`, which is then run without its causal mask. It may be larger
    than the student."""
    embedded: str = ""
    """Folder in which the embedded prompts of a file are kept. Empty: the run folder's name with
    "-prompts"."""
    negative_prompt: str = ""
    """What the teacher's guidance leads away from. Self-Forcing takes Wan's own, long one."""
    source: str = ""
    """Folder with text_encoder/ and tokenizer/, or its name on the hub. Empty: where the world
    says."""
    text_precision: Precision = "bf16"
    """Arithmetic of the text encoder."""
    text_device: str = "cpu"
    """Where the text encoder runs."""
    only_embed: bool = field(default=False)
    """Embed the prompts and stop: to be done once, before several processes train."""
    preset: Literal["wan"] = "wan"
    """Sizes of clips, batches and steps."""


DISTILLATIONS: dict[str, tuple[type, TrainConfig, str, str]] = {
    "": (DistillChoice, TrainConfig(objective=ConsistencyConfig()), "teacher", "a teacher"),
    "wan-consistency": (WanConsistencyChoice, WAN_CONSISTENCY, "teacher", "a teacher"),
    "wan-dmd": (WanDmdChoice, WAN_DMD, "run", "a world"),
}
"""By the word after `scd distill`, if any: the choice, a run as it makes them, the name of what
comes first in the choice, and what that is."""
