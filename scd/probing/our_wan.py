"""Wan models of this package as subjects of the probe.

Their layers look at the text too: that attention is left out, it is none over frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scd.common.runtime import make_generator
from scd.data.clip import Conditions
from scd.models.wan.dense import WanDiffuser
from scd.models.wan.separable import WanSeparableDiffuser
from scd.probing.intercept import Layer
from scd.probing.ours import OurState, OurSubject
from scd.probing.subject import CONTEXT


class _WanSubject(OurSubject):
    """What both kinds share."""

    def key_distances(self, layer: int, num_queries: int, num_keys: int) -> Sequence[int] | None:
        """Tell them of self-attention; attention to the text is not one over frames."""
        if num_keys == self.model.config.conditions.text_length:
            return None
        return super().key_distances(layer, num_queries, num_keys)

    def begun(self, past: Tensor, conditions: Conditions) -> tuple[Any, Conditions]:
        """Begin a stream with the past; see `OurSubject.stream`.

        Raises:
            ValueError: as many keys as the text has tokens: they could not be told apart.
        """
        words, num_tokens = self.model.config.conditions.text_length, self.tokens_per_frame
        room = max(past.shape[1], self.model.config.cache.num_sinks) + 1
        if words % num_tokens == 0 and words <= num_tokens * max(2, room):
            raise ValueError(
                f"{words} tokens of text are as many as those of {words // num_tokens} frames: the "
                "probe cannot tell whether a layer looks at the text or at frames"
            )
        return self.stream(past, conditions)


class WanDenseSubject(_WanSubject):
    """A dense causal Wan model: every layer runs at every step, over the memory of the past.

    Raises:
        ValueError: a model that denoises several frames together.
    """

    def __init__(self, model: WanDiffuser) -> None:
        if model.config.frames_per_block > 1:
            raise ValueError("the probe looks at single frames, this model denoises blocks of them")
        blocks = enumerate(model.blocks, 1)
        super().__init__(
            model, [Layer(name=f"layer {number}", block=block) for number, block in blocks]
        )

    @torch.no_grad()
    def begin(self, past: Float[Tensor, "b t c h w"], conditions: Conditions) -> OurState:
        """Fill the memory with the past.

        Raises:
            ValueError: conditions of another kind than the model's.
        """
        stream, now = self.begun(past, conditions)
        context: Any = self.model.context(stream, now)
        positions = context.cache.positions_with([context.frame])
        return OurState(context=context, distances=self.from_positions(positions, context.frame))


class WanSeparableSubject(_WanSubject):
    """A separable Wan model: encoder layers run once per frame, decoder layers at every step.

    The encoder reads noise that is always the same, so that what differs comes from the past.
    """

    def __init__(self, model: WanSeparableDiffuser) -> None:
        encoder = [
            Layer(name=f"encoder {number}", block=block, once=True)
            for number, block in enumerate(model.encoder.blocks, 1)
        ]
        decoder = [
            Layer(name=f"decoder {number}", block=block, identity=_read_only)
            for number, block in enumerate(model.decoder.blocks, 1)
        ]
        super().__init__(model, [*encoder, *decoder])

    def key_distances(self, layer: int, num_queries: int, num_keys: int) -> Sequence[int] | None:
        """Tell the same, but of decoder layers before the context joins: these see one frame."""
        alone = num_keys == self.tokens_per_frame and not self.layers[layer].once
        return [0] * num_keys if alone else super().key_distances(layer, num_queries, num_keys)

    @torch.no_grad()
    def begin(self, past: Float[Tensor, "b t c h w"], conditions: Conditions) -> OurState:
        """Run the encoder.

        Raises:
            ValueError: conditions of another kind than the model's.
        """
        stream, now = self.begun(past, conditions)
        stream.cache.make_room()
        positions = stream.cache.positions_with([stream.next_frame])
        self._distances, self._in_begin = self.from_positions(positions, stream.next_frame), True
        generator = make_generator(0, "noise of an encoder")
        noise = torch.randn(past.shape[0], *self.frame_shape, generator=generator)
        context = self.model.context(stream, now, noise.to(past))
        own = [0] * self.tokens_per_frame
        return OurState(context=context, distances=[CONTEXT] * len(own) + own)


def _read_only(
    tokens: Tensor,
    modulation: Tensor,
    rotary: Any,
    read: Any,
    text: Any,
    num_read: int | None = None,
) -> Tensor:
    """Pass on the tokens that a block would have returned; see `WanBlock.forward`."""
    return tokens if num_read is None else tokens[:, -num_read:]
