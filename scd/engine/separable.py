"""A separable model laid out for speed, behind the interface of an engine.

Encoder: one row of each stream at a time, over its KV cache. Decoder: contexts in place, one call
for frames of any streams. The plain twins are models/encoder.py, models/decoder.py and
models/separable.py, run by engine/plain.py; tests compare them, for every join.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scd.data.clip import Conditions
from scd.engine.layers import FastHead, PackedLinear, Parts, modulate, release, split
from scd.engine.rows import RowEngine, together
from scd.engine.stack import FastStack
from scd.models.block import layer_norm
from scd.models.config import SeparableConfig
from scd.models.decoder import FrameDecoder
from scd.models.encoder import CausalEncoder
from scd.models.kv_cache import KVCache
from scd.models.separable import SeparableDiffuser, SeparableState


class FastEncoder(FastStack):
    """Clean frame and coming action to the context of the next frame."""

    def __init__(self, encoder: CausalEncoder, free: bool) -> None:
        super().__init__(encoder, encoder.output_modulation, free)
        self.start, self.first_row = encoder.start, encoder.first_row
        self.modulates_output = encoder.output_modulation is not None

    def extend(
        self,
        caches: Sequence[KVCache],
        clean: Sequence[Tensor],
        upcoming: Conditions,
        rows: Sequence[int],
    ) -> list[tuple[Tensor, Tensor]]:
        """Write one row into each cache, without keeping it, and return its context.

        All products with weights are made once for all; each batch of streams attends to its own
        cache, however full that is.

        Args:
            caches: one for each batch of streams; has room for the row afterwards.
            clean: the row's frames of each, [b 1 c h w], or [b 0 c h w] for the start frame.
            upcoming: conditions of the frames after them, of all streams in order.
            rows: frame position of each.

        Returns:
            For each batch context tokens [b n d] and the norm scale [r 1 d] of the last norm, for 1
            or b streams.
        """
        sizes = [len(frames) for frames in clean]
        if len({frames.shape[1] for frames in clean}) == 1:
            x = self._rows(together(clean))
        else:
            x = together([self._rows(frames) for frames in clean])
        for cache in caches:
            cache.make_room()
        parts = self.clean_parts(upcoming)
        places = [row for row, size in zip(rows, sizes, strict=True) for _ in range(size)]
        rotary = self.rotary(places)
        biases = [self.distance_bias(row, cache) for row, cache in zip(rows, caches, strict=True)]

        def read(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if len(caches) == 1:
                return self.attend(q, *caches[0].write(layer, k, v), biases[0])
            qs, ks, vs = (one.split(sizes) for one in (q, k, v))
            return torch.cat(
                [
                    self.attend(q, *cache.write(layer, k, v), bias)
                    for q, k, v, cache, bias in zip(qs, ks, vs, caches, biases, strict=True)
                ]
            )

        for layer in range(len(self.blocks)):
            x = self.run_layer(layer, x, parts, rotary, read)
        tokens, scale = self._finished(x, parts)
        scales = scale.split(sizes) if len(scale) == len(tokens) else [scale] * len(sizes)
        return list(zip(tokens.split(sizes), scales, strict=True))

    def _rows(self, clean: Tensor) -> Tensor:
        if clean.shape[1]:
            return self.tokens(clean[:, 0])
        assert self.start is not None
        return self.start.expand(clean.shape[0], -1, -1)

    def _finished(self, x: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
        if not self.modulates_output:
            return layer_norm(x), torch.ones_like(x[:1, :1])
        return modulate(x, parts[-1], parts[-2]), parts[-2].view(-1, 1, parts[-2].shape[-1])


class DecoderRows:
    """Room for the contexts of frames that are denoised side by side, one row each.

    Rows are independent, so frames of different streams, at different steps, share a call. Join
    "prefix" keeps the context's keys and values of each layer, with room behind them for those of
    the noisy tokens; the other joins keep the context's tokens.
    """

    def __init__(self, decoder: FastDecoder, capacity: int) -> None:
        shape, block = decoder.shape, decoder.block
        self.capacity = capacity
        like = {"dtype": decoder.dtype, "device": decoder.device}
        if decoder.join == "prefix":
            size = (capacity, block.num_heads, 2 * shape.num_tokens, block.head_dim)
            self.keys = torch.empty(len(decoder.blocks), *size, **like)
            self.values = torch.empty_like(self.keys)
        else:
            self.tokens = torch.empty(capacity, shape.num_tokens, block.width, **like)

    @property
    def num_bytes(self) -> int:
        tensors = [part for part in vars(self).values() if isinstance(part, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def move(self, source: int, target: int) -> None:
        if hasattr(self, "tokens"):
            self.tokens[target] = self.tokens[source]
        else:
            self.keys[:, target] = self.keys[:, source]
            self.values[:, target] = self.values[:, source]


class FastDecoder(FastStack):
    """Transformer over one frame at a time: `put` a context in a row, `velocity` at every step."""

    def __init__(self, decoder: FrameDecoder, free: bool) -> None:
        self.join = decoder.config.join
        self.joint = self.join in ("token_concat", "token_concat_projected")
        num_tokens = decoder.shape.num_tokens
        super().__init__(
            decoder,
            decoder.head.modulation,
            free,
            tokens=num_tokens * (1 + self.joint),
            fused_last=not self.joint,
        )
        # Within one frame only differences of positions matter, so every frame is frame 0. Both
        # halves of the joined sequence have the same places.
        self.rotary_alone = self.rotary([0])
        self.rotary_joint = self.rotary_alone.repeated(1 + self.joint)
        self.head = FastHead(decoder.head, num_tokens, free)
        if self.join == "channel_concat":
            self.merge = PackedLinear.of(decoder.merge, rows=num_tokens)
        if self.join == "token_concat_projected":
            self.align_norm = decoder.align_norm
            self.align = PackedLinear.of(decoder.align, rows=num_tokens)
        if free:
            for name in ("merge", "align"):
                if hasattr(decoder, name):
                    release(getattr(decoder, name))

    def put(self, rows: DecoderRows, start: int, tokens: Tensor, conditions: Conditions) -> None:
        """Put the contexts of frames [f n d] and their conditions into rows from `start` on."""
        stop = start + tokens.shape[0]
        if self.join == "token_concat_projected":
            tokens = self.align(self.align_norm(tokens))
        if self.join != "prefix":
            rows.tokens[start:stop] = tokens
            return
        parts, num_tokens, x = self.clean_parts(conditions), self.shape.num_tokens, tokens

        def keep(layer: int, k: Tensor, v: Tensor) -> None:
            rows.keys[layer, start:stop, :, :num_tokens] = k
            rows.values[layer, start:stop, :, :num_tokens] = v

        def read(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keep(layer, k, v)
            return self.attend(q, k, v)

        last = len(self.blocks) - 1
        for layer in range(last):
            x = self.run_layer(layer, x, parts, self.rotary_alone, read)
        keep(last, *self.keys_values(last, x, parts, self.rotary_alone))

    def velocity(
        self, rows: DecoderRows, patches: Tensor, modulation: Tensor, time: Tensor
    ) -> Tensor:
        """Return the velocity of noisy frames, as patches; as `predicted`, at times [f 1 1]."""
        return self.head.velocity(self.predicted(rows, patches, modulation), patches, time)

    def predicted(self, rows: DecoderRows, patches: Tensor, modulation: Tensor) -> Tensor:
        """Return what the model predicts of noisy frames, as patches.

        Args:
            rows: contexts of the first f rows belong to the f frames.
            patches: noisy frames [f n p], float32.
            modulation: at the times and conditions of the frames, [r parts d] for 1 or f.
        """
        num_frames, num_tokens = patches.shape[0], self.shape.num_tokens
        parts = split(modulation)
        x = self.embed(patches)
        if self.join != "prefix":
            x = self._joined(rows.tokens[:num_frames], x)

        def read(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.join == "prefix":
                keys, values = rows.keys[layer, :num_frames], rows.values[layer, :num_frames]
                keys[:, :, num_tokens:] = k
                values[:, :, num_tokens:] = v
                k, v = keys, values
            return self.attend(q, k, v)

        for layer in range(len(self.blocks)):
            # Nobody reads the context's half after the last block.
            alone = self.joint and layer == len(self.blocks) - 1
            of_queries = self.rotary_alone if alone else None
            x = self.run_layer(layer, x, parts, self.rotary_joint, read, of_queries)
        return self.head(x, parts)

    def _joined(self, context: Tensor, x: Tensor) -> Tensor:
        if self.joint:
            return torch.cat([context, x], dim=1)
        if self.join == "channel_concat":
            return self.merge(torch.cat([x, context], dim=-1))
        return x + context


@dataclass(frozen=True, kw_only=True)
class FastContext:
    """What the encoder gave for one frame of each stream."""

    tokens: Tensor
    """Context tokens [f n d]."""
    norm_scale: Tensor
    """Factor of the encoder's last norm, [r 1 d] for 1 or f frames: noise enters before it."""
    conditions: Conditions
    """Of the frames."""

    @property
    def num_frames(self) -> int:
        return self.tokens.shape[0]


class FastSeparable(RowEngine):
    """Encoder once per frame, then all steps of the decoder in place."""

    config: SeparableConfig

    def __init__(
        self,
        model: SeparableDiffuser,
        free: bool = False,
        compile_step: bool | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        """Lay the weights out.

        Args:
            model: the plain one.
            free: give up its weights; it cannot be used afterwards.
            compile_step: compile the decoder's step, seconds to a minute at the first frame; None:
                where there is a GPU and Triton.
            report: told what takes long, and how long it took.
        """
        model.eval()
        self.config, self.shape = model.config, model.shape
        self.needs_first_frame = model.needs_first_frame
        weight = model.decoder.head.project.weight
        self.device, self.dtype = weight.device, weight.dtype
        with torch.no_grad():
            self.encoder = FastEncoder(model.encoder, free)
            self.decoder = FastDecoder(model.decoder, free)
        self.prepare(compile_step, report)

    @torch.no_grad()
    def begin(
        self,
        clean: Tensor | None,
        conditions: Conditions,
        batch: int = 1,
        window: int | None = None,
    ) -> SeparableState:
        if clean is None:
            clean = torch.empty(batch, 0, *self.shape.shape, dtype=self.dtype, device=self.device)
        num_given = clean.shape[1]
        if num_given == 0 and self.needs_first_frame:
            raise ValueError("this model has no start frame: it needs 1 or more first frames")
        config = self.config.cache.with_window(window)
        cache = self.encoder.new_cache(config, clean.shape[0])
        first = self.encoder.first_row
        # The row of the last given frame waits: it carries an action that is not known yet.
        for row in range(first, num_given - 1):
            frame = clean[:, max(row, 0) : row + 1]
            self.encoder.extend([cache], [frame], conditions.frames(row + 1, row + 2), [row])
            cache.advance([row])
        row = max(first, num_given - 1)
        return SeparableState(cache=cache, newest=clean[:, max(row, 0) :], next_position=row)

    @torch.no_grad()
    def contexts(
        self,
        states: Sequence[SeparableState],
        conditions: Sequence[Conditions],
        noises: Sequence[Tensor | None],
    ) -> list[FastContext]:
        found = self.encoder.extend(
            [state.cache for state in states],
            [state.newest for state in states],
            conditions[0] if len(conditions) == 1 else side_by_side(conditions),
            [state.next_position for state in states],
        )
        for state, condition in zip(states, conditions, strict=True):
            state.encoded_for = condition
        return [
            FastContext(tokens=tokens, norm_scale=norm_scale, conditions=condition)
            for (tokens, norm_scale), condition in zip(found, conditions, strict=True)
        ]

    @torch.no_grad()
    def with_noisy_branch(
        self, context: FastContext, strength: float, noise: Tensor
    ) -> FastContext:
        noisy = context.tokens + strength * noise.to(self.dtype) * context.norm_scale
        norm_scale = context.norm_scale.expand(context.tokens.shape[0], -1, -1)
        return FastContext(
            tokens=torch.cat([noisy, context.tokens]),
            norm_scale=torch.cat([norm_scale, norm_scale]),
            conditions=context.conditions.concat(context.conditions),
        )

    @torch.no_grad()
    def observe(self, state: SeparableState, clean: Tensor, conditions: Conditions) -> None:
        if state.encoded_for is not conditions:
            self.context(state, conditions)
        state.keep(clean)

    def new_rows(self, capacity: int) -> DecoderRows:
        return DecoderRows(self.decoder, capacity)

    @property
    def row_bytes(self) -> int:
        decoder = self.config.decoder
        copies = 4 * decoder.num_layers if decoder.join == "prefix" else 1
        return copies * self.shape.num_tokens * self.config.block.width * self.dtype.itemsize

    def put(self, rows: DecoderRows, start: int, contexts: Sequence[FastContext]) -> None:
        tokens = together([context.tokens for context in contexts])
        conditions = [context.conditions for context in contexts]
        joined = conditions[0] if len(conditions) == 1 else side_by_side(conditions)
        self.decoder.put(rows, start, tokens, joined)

    def modulations_at(self, times: Sequence[float], context: FastContext) -> Tensor:
        return self.decoder.modulations.at(times, context.conditions)

    def modulations_of_each(self, time: Tensor, context: FastContext) -> Tensor:
        return self.decoder.modulations.of_each(time, context.conditions)


def side_by_side(conditions: Sequence[Conditions]) -> Conditions:
    """Join conditions of one frame, of which only some may hide something."""

    def joined(name: str, shown_like: str) -> Tensor | None:
        values = [getattr(one, name) for one in conditions]
        known = [value for value in values if value is not None]
        if not known:
            return None
        likes = [getattr(one, shown_like) for one in conditions]
        return torch.cat(
            [
                known[0].new_zeros(len(like), *known[0].shape[1:]) if value is None else value
                for value, like in zip(values, likes, strict=True)
            ]
        )

    return Conditions(
        actions=joined("actions", "actions"),
        labels=joined("labels", "labels"),
        null_actions=joined("null_actions", "actions"),
        null_labels=joined("null_labels", "labels"),
        null_parts=joined("null_parts", "actions"),
    )
