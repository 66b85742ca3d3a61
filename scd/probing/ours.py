"""The models of this package that are not Wan's as subjects of the probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scd.data.clip import Conditions
from scd.models.block import BlockConfig
from scd.models.build import Diffuser
from scd.models.dense import DenseContext, DenseDiffuser
from scd.models.separable import SeparableDiffuser
from scd.models.sizes import Sizes
from scd.probing.intercept import Layer
from scd.probing.subject import CONTEXT, Subject


@dataclass(frozen=True, kw_only=True)
class OurState:
    """What the denoising steps of a frame need."""

    context: Any
    """Of the model."""
    distances: Sequence[int]
    """Of each key that an attention of the steps looks at; see `Look.distances`."""


class OurSubject(Subject):
    """What all kinds share."""

    def __init__(self, model: Diffuser, layers: Sequence[Layer]) -> None:
        config = model.config
        self.model: Diffuser = model.eval()
        self.layers = layers
        self.tokens_per_frame = model.shape.num_tokens
        self.grid = (model.shape.rows, model.shape.columns)
        self.frame_shape = model.shape.shape
        self.num_heads, self.width = config.block.num_heads, config.block.width
        if isinstance(config.block, BlockConfig):
            self.sizes = Sizes(shape=config.shape, block=config.block, conditions=config.conditions)
        self.window = config.cache.window
        self._spec, self._cache = config.conditions, config.cache
        # Which keys the attention that comes next looks at; None: it is none of the newest frame.
        self._distances: Sequence[int] | None = None
        self._in_begin = False

    def key_distances(self, layer: int, num_queries: int, num_keys: int) -> Sequence[int] | None:
        """Tell from the memory's positions, which are in no order once it has wrapped."""
        if self._distances is None or self.layers[layer].once is not self._in_begin:
            return None
        assert len(self._distances) == num_keys
        return self._distances

    @torch.no_grad()
    def velocity(
        self, state: OurState, noisy: Float[Tensor, "b c h w"], time: float
    ) -> Float[Tensor, "b c h w"]:
        """Run all layers that are not `once`."""
        self._distances, self._in_begin = state.distances, False
        # In float64: the time embedding shows the rounding of a float32 time.
        times = noisy.new_full(noisy.shape[:1], time, dtype=torch.float64)
        return self.model.velocity(state.context, noisy, times)

    def stream(self, past: Tensor, conditions: Conditions) -> tuple[Any, Conditions]:
        """Begin a stream with the past; return its state and the conditions of the next frame."""
        num_past = past.shape[1]
        self._spec.check(conditions, num_past + 1)
        self._distances = None
        # No room for more frames than there are.
        room = min(self._cache.window, max(num_past, self._cache.num_sinks) + 1)
        stream = self.model.begin(past, conditions.frames(0, num_past), num_frames_in_memory=room)
        return stream, conditions.frames(num_past, num_past + 1)

    def from_positions(self, positions: Sequence[int], newest: int) -> list[int]:
        """Return how far back from the newest frame each token of frames at positions lies."""
        return [newest - position for position in positions for _ in range(self.tokens_per_frame)]


class DenseSubject(OurSubject):
    """A dense causal diffuser: every layer runs at every step, over the memory of the past.

    Raises:
        ValueError: a model that skips layers in some steps, which then have no features.
    """

    def __init__(self, model: DenseDiffuser) -> None:
        if model.config.skip is not None:
            raise ValueError("the probe compares all layers at all steps, this model skips some")
        blocks = enumerate(model.blocks, 1)
        super().__init__(
            model, [Layer(name=f"layer {number}", block=block) for number, block in blocks]
        )

    def key_distances(self, layer: int, num_queries: int, num_keys: int) -> Sequence[int] | None:
        """Tell the same of all layers but the diagonal ones, which see their own frame only."""
        if layer >= self.model.config.num_seeing:
            return [0] * num_keys
        return super().key_distances(layer, num_queries, num_keys)

    @torch.no_grad()
    def begin(self, past: Float[Tensor, "b t c h w"], conditions: Conditions) -> OurState:
        """Fill the memory with the past.

        Raises:
            ValueError: conditions of another kind than the model's.
        """
        stream, now = self.stream(past, conditions)
        context = self.model.context(stream, now)
        assert isinstance(context, DenseContext)
        positions = context.cache.positions_with([context.frame])
        return OurState(context=context, distances=self.from_positions(positions, context.frame))


class SeparableSubject(OurSubject):
    """A separable diffuser: encoder layers run once per frame, decoder layers at every step.

    An encoder's row belongs to the frame before the one that is denoised; its distances are counted
    from there. A decoder sees no other frame: what it knows of them is the context.
    """

    def __init__(self, model: SeparableDiffuser) -> None:
        encoder = [
            Layer(name=f"encoder {number}", block=block, once=True)
            for number, block in enumerate(model.encoder.blocks, 1)
        ]
        prefix = model.config.decoder.join == "prefix"
        identity = _give_zeros(model.config.block) if prefix else _read_only
        decoder = [
            Layer(name=f"decoder {number}", block=block, identity=identity)
            for number, block in enumerate(model.decoder.blocks, 1)
        ]
        super().__init__(model, [*encoder, *decoder])

    @torch.no_grad()
    def begin(self, past: Float[Tensor, "b t c h w"], conditions: Conditions) -> OurState:
        """Run the encoder.

        Raises:
            ValueError: conditions of another kind than the model's.
        """
        stream, now = self.stream(past, conditions)
        stream.cache.make_room()
        positions = stream.cache.positions_with([stream.next_row])
        # A prefix decoder runs its layers over the context too: these are no frame's attention.
        self._distances, self._in_begin = self.from_positions(positions, stream.next_row), True
        context = self.model.context(stream, now)
        own = [0] * self.tokens_per_frame
        joined = self.model.config.decoder.join in ("channel_concat", "add")
        return OurState(context=context, distances=own if joined else [CONTEXT] * len(own) + own)


def _read_only(
    tokens: Tensor, embedding: Tensor, rotary: Any, attend: Any, num_read: int | None = None
) -> Tensor:
    """Pass on the tokens that a block would have returned; see `Block.forward`."""
    return tokens if num_read is None else tokens[:, :, -num_read:]


def _give_zeros(block: BlockConfig) -> Callable[..., Tensor]:
    """Pass on the tokens, and zeros to who asks for keys: see `Block.with_keys_values`."""

    def run(
        tokens: Tensor, embedding: Tensor, rotary: Any, attend: Any, num_read: int | None = None
    ) -> Tensor:
        num_tokens = tokens.shape[1] * tokens.shape[2]
        nothing = tokens.new_zeros(tokens.shape[0], block.num_heads, num_tokens, block.head_dim)
        attend(nothing, nothing, nothing)
        return _read_only(tokens, embedding, rotary, attend, num_read)

    return run
