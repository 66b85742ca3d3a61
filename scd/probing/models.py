"""The models of this package as subjects of the probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scd.common.runtime import finest, make_generator
from scd.data.clip import Conditions, check_conditions
from scd.models.build import Diffuser
from scd.models.config import BlockConfig
from scd.models.cost import Sizes
from scd.models.dense import DenseDiffuser
from scd.models.separable import SeparableDiffuser
from scd.models.wan.dense import WanDiffuser
from scd.models.wan.separable import WanSeparableDiffuser
from scd.probing.intercept import Layer, no_change
from scd.probing.subject import CONTEXT, Subject


@dataclass(frozen=True, kw_only=True)
class OurState:
    """What the denoising steps of a frame need."""

    context: Any
    """The model's own."""
    distances: Sequence[int]
    """Of each key of the steps' attention; see `FrameAttention.distances`."""


class OurSubject(Subject):
    """What all kinds share."""

    def __init__(self, model: Any, layers: Sequence[Layer]) -> None:
        config = model.config
        self.model = self.module = model.eval()
        self.layers = layers
        self.tokens_per_frame = model.shape.num_tokens
        self.grid = (model.shape.rows, model.shape.columns)
        self.frame_shape = model.shape.shape
        self.num_heads, self.width = config.block.num_heads, config.block.width
        if isinstance(config.block, BlockConfig):
            self.sizes = Sizes(config)
        self.window = config.cache.window
        # Of the keys of the attention that comes next; None: it is none of the newest frame.
        self._distances: Sequence[int] | None = None
        self._in_begin = False

    def key_distances(self, layer: int, num_queries: int, num_keys: int) -> Sequence[int] | None:
        """Read them from the positions in the KV cache, which is a ring and so in no order."""
        if self._distances is None or self.layers[layer].once is not self._in_begin:
            return None
        assert len(self._distances) == num_keys
        return self._distances

    @torch.no_grad()
    def velocity(
        self, state: OurState, noisy: Float[Tensor, "b c h w"], time: float
    ) -> Float[Tensor, "b c h w"]:
        self._distances, self._in_begin = state.distances, False
        # In float64: the time embedding shows the rounding of a float32 time.
        times = noisy.new_full(noisy.shape[:1], time, dtype=finest(noisy.device))
        return self.model.velocity(state.context, noisy, times)

    def stream(self, past: Tensor, conditions: Conditions) -> tuple[Any, Conditions]:
        """Begin a stream with the past; return its state and the conditions of the next frame."""
        num_past, config = past.shape[1], self.model.config
        check_conditions(config.conditions, conditions, num_past + 1)
        self._distances = None
        # No room for more frames than there are.
        room = min(config.cache.window, max(num_past, config.cache.num_sinks) + 1)
        stream = self.model.begin(past, conditions.frames(0, num_past), window=room)
        return stream, conditions.frames(num_past, num_past + 1)

    def from_positions(self, positions: Sequence[int], newest: int) -> list[int]:
        """Return how far back from the newest frame each token of frames at positions lies."""
        return [newest - position for position in positions for _ in range(self.tokens_per_frame)]


class _Dense(OurSubject):
    """Every layer runs at every step, over the KV cache of the past."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, _layers("layer", model.blocks))

    @torch.no_grad()
    def begin(self, past: Float[Tensor, "b t c h w"], conditions: Conditions) -> OurState:
        stream, now = self.stream(past, conditions)
        context = self.model.context(stream, now)
        positions = context.cache.positions_with([context.frame])
        return OurState(context=context, distances=self.from_positions(positions, context.frame))


class _Separable(OurSubject):
    """Encoder layers run once per frame, decoder layers at every step.

    The row of an encoder belongs to a frame, from which its distances are counted. A decoder sees
    no other frame: what it knows of them is the context.
    """

    def __init__(self, model: Any, identity: Callable[..., Any]) -> None:
        decoder = _layers("decoder", model.decoder.blocks, identity=identity)
        super().__init__(model, [*_layers("encoder", model.encoder.blocks, once=True), *decoder])

    @torch.no_grad()
    def begin(self, past: Float[Tensor, "b t c h w"], conditions: Conditions) -> OurState:
        stream, now = self.stream(past, conditions)
        stream.cache.make_room()
        newest = stream.next_position
        positions = stream.cache.positions_with([newest])
        # A prefix decoder runs its layers over the context too: these are no frame's attention.
        self._distances, self._in_begin = self.from_positions(positions, newest), True
        own = [0] * self.tokens_per_frame
        distances = [CONTEXT] * len(own) + own if self.sees_context else own
        return OurState(context=self.encode(stream, now, past), distances=distances)

    sees_context = True
    """Whether the context is tokens that the decoder attends to."""

    def encode(self, stream: Any, now: Conditions, past: Tensor) -> Any:
        """Return the context of the model's steps."""
        return self.model.context(stream, now)


class DenseSubject(_Dense):
    """A dense causal diffuser.

    Raises:
        ValueError: a model that skips layers in some steps, which then have no features.
    """

    def __init__(self, model: DenseDiffuser) -> None:
        if model.config.skip is not None:
            raise ValueError("the probe compares all layers at all steps, this model skips some")
        self._num_seeing = model.num_seeing
        super().__init__(model)

    def key_distances(self, layer: int, num_queries: int, num_keys: int) -> Sequence[int] | None:
        if layer >= self._num_seeing:
            return [0] * num_keys
        return super().key_distances(layer, num_queries, num_keys)


class SeparableSubject(_Separable):
    """A separable diffuser: the encoder's row is that of the frame before the denoised one."""

    def __init__(self, model: SeparableDiffuser) -> None:
        join, block = model.config.decoder.join, model.config.block
        super().__init__(model, _give_zeros(block) if join == "prefix" else _read_only)
        self.sees_context = join not in ("channel_concat", "add")


class _ReadsText(OurSubject):
    """Layers with cross-attention to a text, which is left out: its keys are of no frame."""

    def key_distances(self, layer: int, num_queries: int, num_keys: int) -> Sequence[int] | None:
        if num_keys == self.model.config.conditions.text_length:
            return None
        return super().key_distances(layer, num_queries, num_keys)

    def stream(self, past: Tensor, conditions: Conditions) -> tuple[Any, Conditions]:
        """Refuse a text of as many tokens as some frames: keys are told apart by their number."""
        words, num_tokens = self.model.config.conditions.text_length, self.tokens_per_frame
        room = max(past.shape[1], self.model.config.cache.num_sinks) + 1
        if words % num_tokens == 0 and words <= num_tokens * max(2, room):
            raise ValueError(
                f"{words} tokens of text are as many as those of {words // num_tokens} frames: the "
                "probe cannot tell whether a layer looks at the text or at frames"
            )
        return super().stream(past, conditions)


class WanDenseSubject(_ReadsText, _Dense):
    """A dense causal Wan model.

    Raises:
        ValueError: a model that denoises several frames together.
    """

    def __init__(self, model: WanDiffuser) -> None:
        if model.config.frames_per_block > 1:
            raise ValueError("the probe looks at single frames, this model denoises blocks of them")
        super().__init__(model)


class WanSeparableSubject(_ReadsText, _Separable):
    """A separable Wan model, whose encoder's row is that of the denoised frame itself.

    The encoder reads noise that is always the same, so that what differs comes from the past.
    """

    def __init__(self, model: WanSeparableDiffuser) -> None:
        super().__init__(model, _read_only_frames)

    def key_distances(self, layer: int, num_queries: int, num_keys: int) -> Sequence[int] | None:
        # Decoder layers before the context joins see one frame.
        alone = num_keys == self.tokens_per_frame and not self.layers[layer].once
        return [0] * num_keys if alone else super().key_distances(layer, num_queries, num_keys)

    def encode(self, stream: Any, now: Conditions, past: Tensor) -> Any:
        generator = make_generator(0, "noise of an encoder")
        noise = torch.randn(past.shape[0], *self.frame_shape, generator=generator)
        return self.model.context(stream, now, noise.to(past))


SUBJECTS: dict[type[nn.Module], Callable[[Any], Subject]] = {
    DenseDiffuser: DenseSubject,
    SeparableDiffuser: SeparableSubject,
    WanDiffuser: WanDenseSubject,
    WanSeparableDiffuser: WanSeparableSubject,
}


def subject_of(model: Diffuser) -> Subject:
    """Make a model probeable; it is put into eval mode."""
    return SUBJECTS[type(model)](model)


def _layers(
    name: str,
    blocks: Iterable[nn.Module],
    once: bool = False,
    identity: Callable[..., Any] = no_change,
) -> list[Layer]:
    return [
        Layer(name=f"{name} {number}", block=block, once=once, identity=identity)
        for number, block in enumerate(blocks, 1)
    ]


def _read_only(
    tokens: Tensor, embedding: Tensor, rotary: Any, attend: Any, num_read: int | None = None
) -> Tensor:
    """Stand in for `Block.forward`: the tokens it would have returned, unchanged."""
    return tokens if num_read is None else tokens[:, :, -num_read:]


def _read_only_frames(
    tokens: Tensor,
    modulation: Any,
    rotary: Any,
    attend: Any,
    text: Any,
    num_read: int | None = None,
) -> Tensor:
    """Stand in for `WanBlock.forward`."""
    return tokens if num_read is None else tokens[:, -num_read:]


def _give_zeros(block: BlockConfig) -> Callable[..., Tensor]:
    """Pass on the tokens, and zeros to who asks for keys: see `Block.with_keys_values`."""

    def run(tokens: Tensor, embedding: Tensor, rotary: Any, attend: Any, *num_read: Any) -> Tensor:
        num_tokens = tokens.shape[1] * tokens.shape[2]
        nothing = tokens.new_zeros(tokens.shape[0], block.num_heads, num_tokens, block.head_dim)
        attend(nothing, nothing, nothing)
        return _read_only(tokens, embedding, rotary, attend, *num_read)

    return run
