"""Dense causal diffuser, the baseline: causal attention in all layers, at every denoising step.

It has every saving that the separable model has: a cache of clean frames, no mask where all is
visible, one modulation per frame, no row that nobody reads. Source: paper, section 8 (FAR); layers
that are skipped or that see their own frame only: sections 5.4 and 5.5.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from scd.common.config import added
from scd.data.clip import Conditions
from scd.models.attention import Rotary, attend, frame_positions, rotary_table
from scd.models.augment import Augmentation
from scd.models.base import CausalDiffuser, DiffuserConfig
from scd.models.block import Block, BlockConfig, Stack
from scd.models.cost import FrameCost, Load, dense_cost
from scd.models.embed import (
    ConditionEmbedder,
    Field,
    FrameHead,
    Prediction,
    TimeEmbedder,
    TokenEmbedder,
)
from scd.models.flow import CLEAN_TIME
from scd.models.initialise import initialise
from scd.models.kv_cache import KVCache
from scd.models.sizes import Sizes
from scd.models.skip import LayerSkip
from scd.models.visibility import DistanceBias, FrameCausal, TeacherForcing, Visibility


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
    """Last layers in which a frame sees itself only; nothing is remembered for them."""

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"num_layers must be 1 or more, got {self.num_layers}")
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

    @property
    def num_seeing(self) -> int:
        """Layers that see the past, the first ones."""
        return self.num_layers - self.num_diagonal


@dataclass(kw_only=True)
class DenseState:
    """A batch of streams: the clean frames so far."""

    cache: KVCache
    """Keys and values of all clean frames, of the layers that see the past."""
    next_frame: int
    """Position of the frame that comes next."""

    def fork(self) -> DenseState:
        """Return an independent copy."""
        return replace(self, cache=self.cache.fork())


@dataclass(frozen=True, kw_only=True)
class DenseContext:
    """What a denoising step of one frame needs: the memory itself, to attend to."""

    cache: KVCache
    """Memory; the noisy frame's place in it is overwritten at each step."""
    frame: int
    """Position of the frame."""
    steering: Float[Tensor, "b 1 d"] | None
    """Embedded conditions of the frame."""
    rotary: Rotary
    """Positions of its tokens."""


class DenseDiffuser(CausalDiffuser, Stack):
    """One stack of frame-causal blocks behind the interface that all models share.

    A frame may look at the clean frames before it and at itself; the first frame has no past. The
    token of frame i carries action i, clean or noisy.
    """

    config_class = DenseConfig

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        self.config = config
        block = config.block
        self.embed_frame = TokenEmbedder(config.shape, block.width, block.learned_positions)
        self.embed_time = TimeEmbedder(block.width)
        self.embed_conditions = ConditionEmbedder(config.conditions, block.width)
        self.blocks = nn.ModuleList(Block(block) for _ in range(config.num_layers))
        self.head = FrameHead(config.shape, block.width, config.predict)
        initialise(self, block)

    def frame_cost(self, load: Load) -> FrameCost:
        """Count one frame: n tokens, width d, p values per token, C frames, the noisy one included.

        A step: each layer 24 n d^2 (4 maps of attention, 8 of the MLP) + 4 n C n d (attention) +
        12 d^2 (modulations); besides 4 n p d (channels), 2 (256 d + d^2) (time), 4 d^2 (head). The
        pass that remembers the clean frame: the same without the head, and of the last layer only
        keys and values.

        Bytes: weights once per pass, those of times and conditions once per frame; 2 (C - 1) n d
        keys and values per layer read in every step, and 2 n d written once.

        A diagonal layer: n keys in place of C n, no part in the pass that remembers, no memory. A
        step that skips layers: those that are left.
        """
        config = self.config
        sizes = Sizes(shape=self.shape, block=config.block, conditions=config.conditions)
        return dense_cost(sizes, config.num_layers, load, config.num_diagonal, config.skip)

    def forward(
        self,
        clean: Float[Tensor, "b t c h w"] | None,
        noisy: Float[Tensor, "b r m c h w"],
        time: Float[Tensor, "b r m"],
        conditions: Conditions,
        augment: Augmentation | None = None,
    ) -> Float[Tensor, "b r m c h w"]:
        """Return the velocity of noisy frames, all at once.

        Args:
            clean: frames of the clip, the history: clean frame j sees clean frames up to j, noisy
                frame i sees clean frames before i and itself. None: one sequence in which a noisy
                frame sees the noisy frames before it (FAR's training).
            noisy: r draws of the last m frames of the clip.
            time: of each noisy frame, 0 clean to 1 noise.
            conditions: of all t frames of the clip.
            augment: random changes for training; None: a pure function of the input. It may not
                ask for context noise, since this model has no context to corrupt.
        """
        if augment is not None:
            if augment.context_noise > 0:
                raise ValueError("a dense model has no context: context_noise must be 0")
            conditions = augment.drop(conditions)
        num_draws = noisy.shape[1]
        frames = rearrange(noisy, "b r m c h w -> (b r) m c h w")
        times = rearrange(time, "b r m -> (b r) m")
        if clean is None:
            velocity = self._mixed(frames, times, conditions.repeat(num_draws))
        else:
            velocity = self._teacher_forced(clean, frames, times, conditions)
        return rearrange(velocity, "(b r) m c h w -> b r m c h w", r=num_draws)

    def field(
        self,
        clean: Float[Tensor, "b t c h w"],
        conditions: Conditions,
        num_noisy: int,
        num_draws: int = 1,
    ) -> Field:
        """Return `forward` as a function of noisy frames and times; each call runs all of it."""

        def velocity(noisy: Tensor, time: Tensor) -> Tensor:
            assert noisy.shape[1:3] == (num_draws, num_noisy)
            return self(clean, noisy, time, conditions)

        return velocity

    def _mixed(self, frames: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        num_frames = frames.shape[1]
        positions = list(range(num_frames))
        embedding = self._embedding(time, conditions)
        rotary = self._rotary(positions, frames.device)
        visible = FrameCausal(num_frames=num_frames, tokens_per_frame=self.shape.num_tokens)
        bias = self._bias(positions, positions)

        def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, visible, bias)

        x = self.embed_frame(frames)
        for layer, block in enumerate(self.blocks):
            reads = read if layer < self.config.num_seeing else self._read_own
            x = self._kept(layer, time, x, self.run(block, x, embedding, rotary, reads))
        return self.head(x, embedding, frames, time)

    def _teacher_forced(
        self, clean: Tensor, noisy: Tensor, time: Tensor, conditions: Conditions
    ) -> Tensor:
        num_clean, num_noisy = clean.shape[1] - 1, noisy.shape[1]
        num_draws = noisy.shape[0] // clean.shape[0]
        first = clean.shape[1] - num_noisy
        if first < 0:
            raise ValueError(f"{clean.shape[1]} clean frames, but {num_noisy} noisy ones")
        device, num_tokens = noisy.device, self.shape.num_tokens
        past, present = list(range(num_clean)), list(range(first, first + num_noisy))
        # The last clean frame is no frame's past.
        x_past = self.embed_frame(clean[:, :-1])
        x = self.embed_frame(noisy)
        time_past = x_past.new_full(x_past.shape[:2], CLEAN_TIME, dtype=torch.float32)
        embedding_past = self._embedding(time_past, conditions.frames(0, num_clean))
        embedding = self._embedding(
            time, conditions.frames(first, first + num_noisy).repeat(num_draws)
        )
        rotary_past, rotary = self._rotary(past, device), self._rotary(present, device)
        visible_past = FrameCausal(num_frames=num_clean, tokens_per_frame=num_tokens)
        visible = TeacherForcing(
            num_clean=num_clean,
            first_noisy=first,
            num_noisy=num_noisy,
            tokens_per_frame=num_tokens,
        )
        bias_past = self._bias(past, past)
        bias = self._bias(present, past + present)

        def read_past(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, visible_past, bias_past)

        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if layer >= self.config.num_seeing:
                after = self.run(block, x, embedding, rotary, self._read_own)
                x = self._kept(layer, time, x, after)
                continue
            past_inputs = (x_past, embedding_past, rotary_past)
            if layer == self.config.num_seeing - 1 or num_clean == 0:
                keys, values = block.keys_values(*past_inputs)
            else:
                x_past, keys, values = self.run(block.with_keys_values, *past_inputs, read_past)
            keys, values = (part.repeat_interleave(num_draws, 0) for part in (keys, values))

            def read(
                q: Tensor, k: Tensor, v: Tensor, keys: Tensor = keys, values: Tensor = values
            ) -> Tensor:
                keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
                return attend(q, keys, values, visible, bias)

            x = self._kept(layer, time, x, self.run(block, x, embedding, rotary, read))
        return self.head(x, embedding, noisy, time)

    def _read_own(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend within each frame: the attention of a diagonal layer."""
        size = self.shape.num_tokens
        num_frames = q.shape[2] // size
        q, k, v = (rearrange(part, "b k (t n) e -> (b t) k n e", n=size) for part in (q, k, v))
        return rearrange(attend(q, k, v), "(b t) k n e -> b k (t n) e", t=num_frames)

    def _kept(self, layer: int, time: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Return a layer's output [b t n d], but its input for noisy frames that skip it."""
        skip = self.config.skip
        if skip is None or layer not in skip.layers:
            return after
        return torch.where(skip.skips(time)[..., None, None], before, after)

    def begin(
        self,
        clean: Float[Tensor, "b t c h w"] | None,
        conditions: Conditions,
        batch: int = 1,
        num_frames_in_memory: int | None = None,
    ) -> DenseState:
        """Start a batch of streams, from given first frames or (None) from nothing."""
        weight = self.embed_frame.project.weight
        cache = KVCache.for_blocks(
            self.config.cache.with_window(num_frames_in_memory),
            self.config.block,
            self.config.num_seeing,
            batch if clean is None else clean.shape[0],
            self.shape.num_tokens,
            weight,
        )
        state = DenseState(cache=cache, next_frame=0)
        num_given = 0 if clean is None else clean.shape[1]
        while clean is not None and state.next_frame < num_given:
            start = state.next_frame
            stop = min(start + max(cache.num_free, 1), num_given)
            self._remember(state, clean[:, start:stop], conditions.frames(start, stop))
        return state

    def context(
        self, state: DenseState, conditions: Conditions, noise: Tensor | None = None
    ) -> DenseContext:
        """Return what every step of the next frame needs; conditions are [b 1]."""
        state.cache.make_room()
        return DenseContext(
            cache=state.cache,
            frame=state.next_frame,
            steering=self.embed_conditions(conditions),
            rotary=self._rotary([state.next_frame], state.cache.keys.device),
        )

    def velocity(
        self,
        context: DenseContext,
        noisy: Float[Tensor, "b c h w"],
        time: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c h w"]:
        """Run the layers once, each over the whole memory and the noisy frame, or itself only.

        What all frames skip is not computed.
        """
        embedding = self.embed_time(time[:, None])
        if context.steering is not None:
            embedding = embedding + context.steering
        bias = self._cache_bias(context.cache, [context.frame])
        x = self.embed_frame(noisy[:, None])
        skip = self.config.skip
        skipped = skip.layers if skip is not None and bool(skip.skips(time).all()) else ()
        for layer, block in enumerate(self.blocks):
            if layer in skipped:
                continue
            read = self._read_own
            if layer < self.config.num_seeing:
                read = self._reader(context.cache, layer, None, bias)
            after = block(x, embedding, context.rotary, read)
            x = self._kept(layer, time[:, None], x, after)
        return self.head(x, embedding, noisy[:, None], time[:, None])[:, 0]

    def observe(
        self, state: DenseState, clean: Float[Tensor, "b c h w"], conditions: Conditions
    ) -> None:
        """Make a frame part of the past: one pass over the clean frame writes its memory.

        Carrying the clean frame along with the next frame's first step would cost the same.
        """
        self._remember(state, clean[:, None], conditions)

    def _remember(self, state: DenseState, clean: Tensor, conditions: Conditions) -> None:
        num_frames = clean.shape[1]
        frames = list(range(state.next_frame, state.next_frame + num_frames))
        cache = state.cache
        cache.make_room()
        time = clean.new_full(clean.shape[:2], CLEAN_TIME, dtype=torch.float32)
        embedding = self._embedding(time, conditions)
        rotary = self._rotary(frames, clean.device)
        bias = self._cache_bias(cache, frames)
        visible = None
        if num_frames > 1:
            visible = FrameCausal(
                num_frames=cache.num_frames + num_frames,
                num_past=cache.num_frames,
                tokens_per_frame=self.shape.num_tokens,
            )
        x = self.embed_frame(clean)
        last = self.config.num_seeing - 1
        for layer, block in enumerate(self.blocks[: last + 1]):
            assert isinstance(block, Block)
            if layer == last:
                cache.write(layer, *block.keys_values(x, embedding, rotary))
            else:
                x = block(x, embedding, rotary, self._reader(cache, layer, visible, bias))
        cache.advance(frames)
        state.next_frame += num_frames

    @staticmethod
    def _reader(cache: KVCache, layer: int, visible: Visibility | None, bias: DistanceBias | None):
        def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, *cache.write(layer, k, v), visible, bias)

        return read

    def _embedding(self, time: Tensor, conditions: Conditions) -> Tensor:
        embedding = self.embed_time(time)
        steering = self.embed_conditions(conditions)
        return embedding if steering is None else embedding + steering

    def _rotary(self, frames: list[int], device: torch.device) -> Rotary:
        positions = frame_positions(
            torch.tensor(frames, dtype=torch.long, device=device),
            self.shape.rows,
            self.shape.columns,
        )
        return rotary_table(
            positions, self.config.block.rotary_axes, self.config.block.rotary_theta
        )

    def _cache_bias(self, cache: KVCache, frames: list[int]) -> DistanceBias | None:
        return self._bias(frames, cache.positions_with(frames))

    def _bias(self, queries: list[int], keys: list[int]) -> DistanceBias | None:
        if self.config.block.distance_bias == 0:
            return None
        return DistanceBias(
            slope=self.config.block.distance_bias,
            query_frames=tuple(queries),
            key_frames=tuple(keys),
            tokens_per_frame=self.shape.num_tokens,
        )
