"""Settings of models, their parts and their sampling; the networks are in the modules beside it.

Nothing here needs torch, so that the command line answers without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal, get_args

from scd.common.config import MAX_LAYERS, MAX_SIZE, MAX_STEPS, added, within
from scd.common.names import known
from scd.data.spaces import ConditionSpec

Solver = Literal["euler", "heun", "renoise"]
"""How the denoising steps lead from noise to a frame: see `solve`."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How one frame is denoised."""

    num_steps: int = 10
    """Denoising steps per frame."""
    schedule: Literal["uniform", "shifted", "reference", "listed"] = "uniform"
    """Times of the steps: evenly spaced; evenly spaced, then bent towards noise by `shift`; the
    release's grid from 1 to 0.001 and then 0; or those of `times`."""
    shift: float = 1.0
    """Timestep shift of the shifted schedule; above 1 spends more steps near noise. 1 elsewhere."""
    solver: Solver = "euler"
    """Integrator: Euler takes one call of the network per step, Heun two. "renoise" is for models
    distilled to few steps: each step ends at an estimate of the clean frame, and all but the last
    mix it with fresh noise."""
    times: tuple[float, ...] = added(())
    """Of the schedule "listed": where each step begins, descending from 1; the last one ends at 0.
    Empty elsewhere."""
    first_times: tuple[float, ...] = added(())
    """Likewise of the first frame, or block, of a stream that begins from nothing, whatever the
    schedule of the others: more steps than theirs, since no past helps it. Empty: as the others."""

    def __post_init__(self) -> None:
        within(1, MAX_STEPS, num_steps=self.num_steps)
        if not 0 < self.shift < 1e3:
            raise ValueError(f"shift must be above 0 and below 1000, got {self.shift}")
        if self.schedule != "shifted" and self.shift != 1:
            raise ValueError(f"shift={self.shift} has no effect on schedule={self.schedule!r}")
        if self.schedule == "listed":
            _check_times("times", self.times)
            if len(self.times) != self.num_steps:
                raise ValueError(
                    f"schedule 'listed' has {len(self.times)} times, one for each step: num_steps "
                    f"must be {len(self.times)}, got {self.num_steps}"
                )
        elif self.times:
            raise ValueError(f"times={self.times} have no effect on schedule={self.schedule!r}")
        if self.first_times:
            _check_times("first_times", self.first_times)
            if len(self.first_times) <= self.num_steps:
                raise ValueError(
                    f"first_times must be more than the {self.num_steps} steps of other frames, "
                    f"got {len(self.first_times)}"
                )


def _check_times(name: str, times: tuple[float, ...]) -> None:
    descend = all(later < earlier for earlier, later in pairwise(times))
    if not times or times[0] != 1 or not descend or times[-1] <= 0:
        raise ValueError(
            f"{name} must begin with 1, descend from each to the next and stay above 0, got {times}"
        )


Prediction = Literal["velocity", "clean"]
"""Meaning of a network's output. A clean estimate is far better where a token has more values than
the model is wide, as with pixels; it is turned into a velocity at once."""

EncoderNoise = Literal["none", "fresh", "same"]
"""What noise an encoder reads once per frame: none; noise of its own; or that from which the frame
is denoised. `context` takes it."""


@dataclass(frozen=True, kw_only=True)
class FrameShape:
    """Shape of one latent frame and how it is cut into tokens."""

    channels: int = 3
    """Channels of a latent frame."""
    height: int = 32
    """Rows of a latent frame."""
    width: int = 32
    """Columns of a latent frame."""
    patch_size: int = 8
    """Side of the square of latent cells that makes one token."""

    def __post_init__(self) -> None:
        within(
            1,
            MAX_SIZE,
            channels=self.channels,
            height=self.height,
            width=self.width,
            patch_size=self.patch_size,
        )

    def check_cut(self, where: str = "model.shape") -> None:
        """Refuse a patch size that does not divide the frame (ValueError). Not when the settings
        are made: the data decides on the frame later."""
        if self.height % self.patch_size or self.width % self.patch_size:
            side = math.gcd(self.height, self.width)
            sides = [size for size in range(1, side + 1) if side % size == 0]
            raise ValueError(
                f"patch_size must divide the frame: got patch_size={self.patch_size} for the "
                f"{self.height}x{self.width} frames of {where}, which {sides} divide"
            )

    @property
    def rows(self) -> int:
        return self.height // self.patch_size

    @property
    def columns(self) -> int:
        return self.width // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of one frame."""
        return self.rows * self.columns

    @property
    def token_dim(self) -> int:
        """Latent values in one token."""
        return self.channels * self.patch_size**2

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of a latent frame."""
        return self.channels, self.height, self.width


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Settings that all blocks of a model share."""

    width: int = 128
    """Hidden size: entries of a token inside the model."""
    head_dim: int = 64
    """Width of one attention head."""
    rotary_axes: tuple[int, int, int] = (16, 24, 24)
    """Entries of a head that carry the frame, row and column position."""
    rotary_theta: float = 1e4
    """Longest wavelength of a position over 2 pi; 10 separates the places of a 4x4 grid better."""
    learned_positions: bool = False
    """Add a learned vector to each token by its place in the frame (ours; off in the paper)."""
    initial_gate: float = 0.0
    """Gate of each residual branch at the start: 0 in the paper; above 0 learns faster early."""
    initial_condition_std: float = 0.02
    """Deviation of the tables of actions and labels at the start: 0.02 in the paper; a larger one
    is learnt from sooner."""
    distance_bias: float = 0.0
    """Slope of an attention bias over frame distance. 0: none, as in the paper."""

    def __post_init__(self) -> None:
        within(1, MAX_SIZE, width=self.width, head_dim=self.head_dim)
        if self.width % self.head_dim:
            raise ValueError(
                f"width must be a multiple of head_dim: got width={self.width}, "
                f"head_dim={self.head_dim}"
            )
        axes = self.rotary_axes
        if sum(axes) != self.head_dim or any(size % 2 or size < 0 for size in axes):
            raise ValueError(
                f"rotary_axes must be even, 0 or more, and add up to head_dim={self.head_dim}, "
                f"got {axes}"
            )
        within(1e-6, 1e9, rotary_theta=self.rotary_theta)
        within(1e-9, 1e3, initial_condition_std=self.initial_condition_std)
        within(-1e3, 1e3, initial_gate=self.initial_gate, distance_bias=self.distance_bias)

    @property
    def num_heads(self) -> int:
        return self.width // self.head_dim


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Settings of the causal encoder."""

    num_layers: int = 4
    """Transformer blocks."""
    start_frame: bool = True
    """Put learned tokens before the first frame, so that a stream can begin from nothing. False:
    the first frame has no context and must be given, as in the release."""
    modulate_output: bool = True
    """Scale and shift the context by time and action after its last norm, as in the paper."""

    def __post_init__(self) -> None:
        within(1, MAX_LAYERS, num_layers=self.num_layers)


Join = Literal["token_concat", "token_concat_projected", "channel_concat", "add", "prefix"]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Settings of the frame decoder."""

    num_layers: int = 2
    """Transformer blocks."""
    join: Join = "token_concat"
    """How the context meets the noisy frame: as more tokens in one sequence (the paper's); the
    same after a projection that starts at zero; one linear map of both side by side; a sum; or
    (ours) as a prefix that attends only to itself and does not know the time, so that its keys and
    values are computed once per frame and a step costs only the noisy tokens."""
    predict: Prediction = "velocity"
    """What the network's output means; it is turned into a velocity either way. Prefer "clean"
    where a token has more values than the model is wide, as with pixels."""

    def __post_init__(self) -> None:
        within(1, MAX_LAYERS, num_layers=self.num_layers)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """KV cache of a stream: how much of the past it keeps."""

    window: int = 16
    """Frames in the KV cache, the newest included. Attention beyond the training length is
    untrained, so this is the number of frames of a training clip."""
    num_sinks: int = 1
    """Frames, the first of the stream, that stay in the KV cache for good; part of the window. The
    learned start frame, where a model has one, is the first of them."""
    rebase_sinks: bool = True
    """Move the sinks' positions along with the window, so that no distance exceeds it. False: they
    stay at their absolute positions."""

    def __post_init__(self) -> None:
        within(1, MAX_SIZE, window=self.window)
        if not 0 <= self.num_sinks < self.window:
            raise ValueError(
                f"num_sinks must leave room in the window: got num_sinks={self.num_sinks}, "
                f"window={self.window}"
            )

    def with_window(self, window: int | None) -> CacheConfig:
        """Return the same with another window; None: this one."""
        return self if window is None else replace(self, window=window)

    def in_blocks(self, frames_per_block: int) -> CacheConfig:
        """Return the same for a ring in which a block of frames has one place."""
        return replace(
            self,
            window=self.window // frames_per_block,
            num_sinks=self.num_sinks // frames_per_block,
        )


@dataclass(frozen=True, kw_only=True)
class LayerSkip:
    """Which layers are skipped, and at which times: there their residual branches add nothing.

    Clean frames never skip a layer, so what is cached of them is whole.
    """

    first: int
    """First layer that is skipped, counted from 0."""
    stop: int
    """First layer after those that are skipped, counted from 0."""
    below: float
    """Noisy frames at times below this skip them, in (0, 1]."""

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.stop:
            raise ValueError(
                f"skipped layers must be first .. stop - 1 with 0 <= first < stop, "
                f"got first={self.first}, stop={self.stop}"
            )
        if not 0 < self.below <= 1:
            raise ValueError(f"below must lie in (0, 1], got {self.below}")

    @property
    def layers(self) -> range:
        return range(self.first, self.stop)


@dataclass(frozen=True, kw_only=True)
class DiffuserConfig:
    """Settings that every causal diffuser has, and what its kind can do."""

    is_separable = False
    """Whether an encoder gives each frame a context, and only a decoder runs at every step."""
    takes_text = False
    """Whether it makes video from a text: trained from published weights, on latent frames that
    stand for several frames of video."""
    keeps_stored_type = False
    """Whether loaded weights stay in the type in which they are stored, not float32."""
    recomputes_streams = False
    """Whether gradient checkpointing reaches into frames made one after another."""
    frames_per_block = 1
    """Latent frames that are denoised together and see each other."""

    shape: FrameShape = field(default_factory=FrameShape)
    """Latent frames and their tokens."""
    conditions: ConditionSpec = field(default_factory=ConditionSpec)
    """What steers the frames."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """KV cache of a stream: how much of the past it keeps."""

    def __post_init__(self) -> None:
        if self.conditions.actions_per_frame > 1 and not self.takes_text:
            raise ValueError(
                "a latent frame that stands for several frames of video has several actions, which "
                f"only Wan models read, got actions_per_frame={self.conditions.actions_per_frame}"
            )


@dataclass(frozen=True, kw_only=True)
class SeparableConfig(DiffuserConfig):
    """Settings of a separable causal diffuser."""

    is_separable = True

    block: BlockConfig = field(default_factory=BlockConfig)
    """Blocks of encoder and decoder."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The causal encoder, run once per frame."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The frame decoder, run at every step."""


@dataclass(frozen=True, kw_only=True)
class DenseConfig(DiffuserConfig):
    """Settings of a dense causal diffuser."""

    block: BlockConfig = field(default_factory=BlockConfig)
    """Blocks of the model."""
    num_layers: int = 6
    """Transformer blocks."""
    predict: Prediction = "velocity"
    """What the network's output means; it is turned into a velocity either way."""
    skip: LayerSkip | None = added(None)
    """Layers that noisy frames pass by once they are nearly clean; None: none."""
    num_diagonal: int = added(0)
    """Last layers in which a frame sees itself only; nothing is cached for them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(1, MAX_LAYERS, num_layers=self.num_layers)
        if not 0 <= self.num_diagonal < self.num_layers:
            raise ValueError(
                f"num_diagonal must leave one of {self.num_layers} layers that sees the past, "
                f"got {self.num_diagonal}"
            )
        if self.skip is not None and (
            self.skip.stop > self.num_layers or len(self.skip.layers) == self.num_layers
        ):
            raise ValueError(
                f"skipped layers must be some of 0 .. {self.num_layers - 1}, not all, "
                f"got {self.skip.first} .. {self.skip.stop - 1}"
            )


GuidanceKind = Literal["none", "conditions", "context_noise"]
"""Branch that frames are pushed away from: see Guidance."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How a stream is pushed away from an unconditional branch."""

    kind: GuidanceKind = "none"
    """The branch: none; actions and labels hidden in the whole stream (classifier-free guidance,
    which needs a second memory); or the context corrupted by noise (negative guidance of the
    paper (sampling), which needs no second encoder pass)."""
    scale: float = 1.0
    """Strength; 1 means no push. The paper uses 1.5 for context noise on Minecraft."""
    context_noise: float = 0.05
    """Strength of the noise in the branch "context_noise"."""
    parts: tuple[str, ...] = ()
    """Parts of actions that the branch "conditions" hides, and nothing else; empty: everything."""

    def __post_init__(self) -> None:
        if self.kind == "none" and self.scale != 1:
            raise ValueError(f"scale={self.scale} has no effect on guidance kind='none'")
        if not 0 < self.context_noise < math.inf or not math.isfinite(self.scale):
            raise ValueError(
                "context_noise must be positive and scale finite, got "
                f"{self.context_noise} and {self.scale}"
            )
        if self.parts and self.kind != "conditions":
            raise ValueError(f"parts={self.parts} have no effect on guidance kind={self.kind!r}")

    def hides(self, spec: ConditionSpec) -> tuple[bool, ...]:
        """Tell of each part of an action whether it alone is hidden; empty: everything is.

        Raises:
            ValueError: a model's actions have no such part.
        """
        names = [part.name for part in spec.action_parts] if spec.is_composite else []
        for name in self.parts:
            known(name, "part of an action", names)
        return tuple(name in self.parts for name in names) if self.parts else ()


EngineKind = Literal["plain", "fast"]
"""How a model is run: as it is written, or laid out for the machine."""


ENGINES: tuple[EngineKind, ...] = get_args(EngineKind)
"""All kinds."""
