"""Wan models laid out for speed, behind the interface of an engine: separable and dense.

The plain twins are models/wan/separable.py and models/wan/dense.py, run by engine/plain.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scd.data.clip import Conditions
from scd.engine.interface import Engine
from scd.engine.layers import PackedLinear, Parts, split
from scd.engine.rows import RowEngine, together
from scd.engine.wan_stack import FastWanHead, FastWanStack, Maps, ReadText, WanRotary, part_of
from scd.models.config import Solver
from scd.models.embed import from_patches, to_patches
from scd.models.flow import guided, solve
from scd.models.kv_cache import KVCache
from scd.models.wan.config import WanConfig, WanSeparableConfig
from scd.models.wan.dense import WanDiffuser
from scd.models.wan.separable import WanFrameDecoder, WanSeparableDiffuser, corrupted
from scd.models.wan.transformer import TextCache, TextKeysValues, WanState, text_in


class FastWanEncoder(FastWanStack):
    """Frames beside the cached clean ones, to tokens or to keys and values."""

    def extend(
        self,
        caches: Sequence[KVCache],
        frames: Sequence[Tensor],
        time: float,
        places: Sequence[int],
        texts: Sequence[list[TextKeysValues]],
        conditions: Sequence[Conditions],
        only_cache: bool = False,
    ) -> list[Tensor]:
        """Write a frame of each stream into its cache, without keeping it.

        All products with weights are made once for all; each batch of streams attends to its own
        cache and its own text.

        Args:
            caches: one for each batch of streams; has room for a frame afterwards.
            frames: of each, [b c h w].
            time: of all frames.
            places: frame position of each.
            texts: keys and values in all layers, of each.
            conditions: with the actions of the frame, of each.
            only_cache: nobody reads what is returned: of the last layer there are only keys and
                values.

        Returns:
            Tokens of each batch, [b n d].
        """
        sizes = [len(each) for each in frames]
        for cache in caches:
            cache.make_room()
        x = self.tokens(frames[0] if len(frames) == 1 else torch.cat(list(frames)))
        rows = [[place] for place, size in zip(places, sizes, strict=True) for _ in range(size)]
        steering = [self.steering(each) for each in conditions]
        given = [each for each in steering if each is not None]
        parts, rotary = self.parts_at(time, together(given) if given else None), self.rotary(rows)

        def read(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            split_up = [part.split(sizes) for part in (q, k, v)]
            return together(
                [
                    self.attend(q, *cache.write(layer, k, v))
                    for cache, q, k, v in zip(caches, *split_up, strict=True)
                ]
            )

        def read_text(layer: int, q: Tensor) -> Tensor:
            each = zip(q.split(sizes), texts, strict=True)
            return together([self.attend_to_text(q, *text[layer]) for q, text in each])

        last = len(self.blocks) - 1
        for layer in range(last + 1 - only_cache):
            x = self.run_layer(layer, x, parts, rotary, read, read_text)
        if only_cache:
            k, v = (part.split(sizes) for part in self.keys_values(last, x, parts, rotary))
            for cache, *new in zip(caches, k, v, strict=True):
                cache.write(last, *new)
        return list(x.split(sizes))


@dataclass(frozen=True, kw_only=True)
class FastWanContext:
    """What the decoder needs of one frame of each stream."""

    tokens: Tensor
    """What the encoder knows of the frames, [f n d]."""
    texts: tuple[tuple[TextCache, int], ...]
    """Of each frame: the texts of its streams, and which of them is its own."""
    steering: Tensor | None = None
    """The decoder's embedded actions of the frames, [f 1 d]; None: no actions steer the model."""

    @property
    def num_frames(self) -> int:
        return self.tokens.shape[0]


class WanRows:
    """Contexts of frames side by side, one row each: tokens, and keys and values of the text.

    A row takes the text over only when it is another one than lay there.
    """

    def __init__(self, decoder: FastWanDecoder, capacity: int) -> None:
        shape, block, length = decoder.shape, decoder.block, decoder.text_length
        self.capacity, self.first_layer = capacity, decoder.first_text_layer
        like = {"dtype": decoder.dtype, "device": decoder.device}
        self.tokens = torch.empty(capacity, shape.num_tokens, block.width, **like)
        size = (len(decoder.blocks), capacity, block.num_heads, length, block.head_dim)
        self.keys, self.values = torch.empty(size, **like), torch.empty(size, **like)
        self.texts: list[tuple[TextCache, int] | None] = [None] * capacity
        self.kept = [length] * capacity
        # At time 0 the context has a modulation of its own, which the actions change too.
        steered = decoder.is_steered and decoder.clean_context
        self.steering = torch.empty(capacity, 1, block.width, **like) if steered else None

    @property
    def num_bytes(self) -> int:
        tensors = (self.tokens, self.keys, self.values)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def put(
        self, row: int, tokens: Tensor, text: TextCache, index: int, steering: Tensor | None
    ) -> None:
        self.tokens[row] = tokens
        if self.steering is not None and steering is not None:
            self.steering[row] = steering
        held = self.texts[row]
        if held is not None and held[0] is text and held[1] == index:
            return
        layers = text.layers[self.first_layer :]
        kept = layers[0][0].shape[2]
        for layer, both in enumerate(layers):
            for ours, theirs in zip((self.keys, self.values), both, strict=True):
                ours[layer, row, :, :kept] = theirs[index]
                # The last one stands for the rest, which beside a longer text are read one by one.
                ours[layer, row, :, kept:] = theirs[index, :, -1:]
        self.texts[row], self.kept[row] = (text, index), kept

    def text(self, layer: int, num_rows: int) -> TextKeysValues:
        """Return keys and values in a layer, as `attend_to_text` reads them, of the first rows."""
        kept = max(self.kept[:num_rows])
        return self.keys[layer, :num_rows, :, :kept], self.values[layer, :num_rows, :, :kept]

    def move(self, source: int, target: int) -> None:
        self.tokens[target] = self.tokens[source]
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]
        self.texts[target], self.kept[target] = self.texts[source], self.kept[source]
        if self.steering is not None:
            self.steering[target] = self.steering[source]


class FastWanDecoder(FastWanStack):
    """The decoder's layers over a noisy frame and its context."""

    def __init__(
        self,
        decoder: WanFrameDecoder,
        free: bool,
        text_length: int,
        first_text_layer: int,
        maps: Maps = PackedLinear,
    ) -> None:
        """Lay the weights out.

        Args:
            decoder: the plain one.
            free: give up its weights.
            text_length: tokens of a text.
            first_text_layer: place of its first layer in a cache of texts.
            maps: how its linear maps are computed.
        """
        num_tokens = decoder.shape.num_tokens
        super().__init__(decoder, free, 2 * num_tokens, text_length, maps)
        self.first_text_layer = first_text_layer
        self.head = FastWanHead(decoder, free)
        config = decoder.config
        self.join = config.num_first if config.join == "middle" else 0
        self.clean_context = config.context_time == "clean"
        self.is_steered = self.modulations.embedder.action_embedder is not None
        # Within one frame only differences of positions matter, so every frame is frame 0.
        self.rotary_alone = self.rotary([[0]])
        self.rotary_joint = self.rotary_alone.repeated(2)

    def velocity(self, rows: WanRows, patches: Tensor, modulation: Tensor, time: Tensor) -> Tensor:
        """Return what is `predicted`, which is the velocity."""
        return self.predicted(rows, patches, modulation)

    def predicted(self, rows: WanRows, patches: Tensor, modulation: Tensor) -> Tensor:
        """Return the velocity of noisy frames, as patches; see rows.RowEngine."""
        num_frames = patches.shape[0]
        parts = joint = split(modulation)
        if self.clean_context:
            joint = self._with_clean(rows, modulation)

        def read(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attend(q, k, v)

        def read_text(layer: int, q: Tensor) -> Tensor:
            return self.attend_to_text(q, *rows.text(layer, num_frames))

        x, last = self.embed(patches), len(self.blocks) - 1
        for layer in range(last):
            if layer == self.join:
                x = torch.cat([rows.tokens[:num_frames], x], dim=1)
            here, rotary = (
                (joint, self.rotary_joint) if layer >= self.join else (parts, self.rotary_alone)
            )
            x = self.run_layer(layer, x, here, rotary, read, read_text)
        if last == self.join:
            x = torch.cat([rows.tokens[:num_frames], x], dim=1)
        return self.head(self._last(x, joint, parts, read_text), parts)

    def _last(self, x: Tensor, joint: Parts, parts: Parts, read_text: ReadText) -> Tensor:
        """Run the last layer, after which nobody reads the context's half."""
        layer, block = len(self.blocks) - 1, self.blocks[-1]
        q, k, v = block.queries_keys_values(
            x, part_of(joint, layer), self.rotary_joint, self.rotary_alone
        )
        x, read = x[:, -self.shape.num_tokens :], self.attend(q, k, v)
        return block.finish(x, read, part_of(parts, layer), lambda q: read_text(layer, q))

    def _with_clean(self, rows: WanRows, modulation: Tensor) -> Parts:
        """Return parts [r 2 1 d]: of the context's half at time 0, then of the noisy half."""
        steering = None if rows.steering is None else rows.steering[: len(modulation)]
        clean = self.modulations_at((0.0,), steering)[0].expand_as(modulation)
        return torch.stack([clean, modulation], dim=2)[:, :, :, None].unbind(1)


class FastWanSeparable(RowEngine):
    """Encoder twice per frame, decoder at every step in place."""

    config: WanSeparableConfig

    def __init__(
        self,
        model: WanSeparableDiffuser,
        free: bool = False,
        maps: Maps = PackedLinear,
        compile_step: bool | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        """Lay the weights out.

        Args:
            model: the plain one.
            free: give up its weights; it cannot be used afterwards.
            maps: how the linear maps of the blocks are computed.
            compile_step: see rows.RowEngine.
            report: likewise.
        """
        model.eval()
        self.config, self.shape = model.config, model.shape
        self.needs_first_frame = model.needs_first_frame
        self.encoder_noise = model.encoder_noise
        length, num_layers = self.config.conditions.text_length, self.config.encoder.num_layers
        with torch.no_grad():
            self.encoder = FastWanEncoder(model.encoder, free, self.shape.num_tokens, length, maps)
            self.decoder = FastWanDecoder(model.decoder, free, length, num_layers, maps)
        self.device, self.dtype = self.encoder.device, self.encoder.dtype
        self.prepare(compile_step, report)

    @torch.no_grad()
    def begin(
        self,
        clean: Tensor | None,
        conditions: Conditions,
        batch: int = 1,
        window: int | None = None,
    ) -> WanState:
        batch = batch if clean is None else clean.shape[0]
        cache = self.encoder.new_cache(self.config.cache.with_window(window), batch)
        state = WanState(cache=cache, next_position=0)
        for place, frame in enumerate(() if clean is None else clean.unbind(1)):
            self.observe(state, frame, conditions.frames(place, place + 1))
        return state

    @torch.no_grad()
    def contexts(
        self,
        states: Sequence[WanState],
        conditions: Sequence[Conditions],
        noises: Sequence[Tensor | None],
    ) -> list[FastWanContext]:
        given = [noise for noise in noises if noise is not None]
        if len(given) < len(noises):
            raise ValueError("the encoder of a separable Wan model reads noise: none was given")
        found = self._encode(states, given, 1.0, conditions)
        return [
            FastWanContext(
                tokens=tokens,
                texts=_each_text(state.text, len(tokens)),
                steering=self.decoder.steering(condition),
            )
            for state, tokens, condition in zip(states, found, conditions, strict=True)
        ]

    def _encode(
        self,
        states: Sequence[WanState],
        frames: Sequence[Tensor],
        time: float,
        conditions: Sequence[Conditions],
        only_cache: bool = False,
    ) -> list[Tensor]:
        each = zip(states, conditions, strict=True)
        return self.encoder.extend(
            [state.cache for state in states],
            frames,
            time,
            [state.next_position for state in states],
            [text_in(state, condition, self.encoder, self.decoder) for state, condition in each],
            conditions,
            only_cache,
        )

    @torch.no_grad()
    def with_noisy_branch(
        self, context: FastWanContext, strength: float, noise: Tensor
    ) -> FastWanContext:
        noisy = corrupted(context.tokens, strength, noise.to(self.dtype))
        tokens = torch.cat([noisy, context.tokens])
        steering = None if context.steering is None else context.steering.repeat(2, 1, 1)
        return FastWanContext(tokens=tokens, texts=context.texts * 2, steering=steering)

    def new_rows(self, capacity: int) -> WanRows:
        return WanRows(self.decoder, capacity)

    @property
    def row_bytes(self) -> int:
        text = 2 * len(self.decoder.blocks) * self.config.conditions.text_length
        return (self.shape.num_tokens + text) * self.config.block.width * self.dtype.itemsize

    def put(self, rows: WanRows, start: int, contexts: Sequence[FastWanContext]) -> None:
        row = start
        for context in contexts:
            for place, (tokens, text) in enumerate(zip(context.tokens, context.texts, strict=True)):
                steering = None if context.steering is None else context.steering[place]
                rows.put(row, tokens, *text, steering)
                row += 1

    def modulations_at(self, times: Sequence[float], context: FastWanContext) -> Tensor:
        return self.decoder.modulations_at(times, context.steering)

    def modulations_of_each(self, time: Tensor, context: FastWanContext) -> Tensor:
        steering = None if context.steering is None else context.steering[:, 0]
        return self.decoder.modulations.of_each(time, steering)

    @torch.no_grad()
    def observe(self, state: WanState, clean: Tensor, conditions: Conditions) -> None:
        self._encode([state], [clean], 0.0, [conditions], only_cache=True)
        state.cache.advance([state.next_position])
        state.next_position += 1


def _each_text(text: TextCache | None, num: int) -> tuple[tuple[TextCache, int], ...]:
    assert text is not None
    return tuple((text, index) for index in range(num))


@dataclass(frozen=True, kw_only=True)
class FastWanDenseContext:
    """What a denoising step needs: the KV cache, and the place in it of the frame or block."""

    cache: KVCache
    """What it attends to; the noisy frame's place in it is overwritten at each step."""
    rotary: WanRotary
    """Positions of the tokens."""
    text: list[TextKeysValues]
    """In each layer."""
    steering: Tensor | None
    """Embedded actions of the frame [b 1 d], or of each of its block; None: no actions steer the
    model."""


class FastWanDense(Engine):
    """All layers at every step, each over the whole KV cache; frame by frame or in blocks."""

    config: WanConfig

    def __init__(self, model: WanDiffuser, free: bool = False, maps: Maps = PackedLinear) -> None:
        """Lay the weights out.

        Args:
            model: the plain one.
            free: give up its weights; it cannot be used afterwards.
            maps: how the linear maps of the blocks are computed.
        """
        model.eval()
        self.config, self.shape = model.config, model.shape
        self.needs_first_frame = model.needs_first_frame
        tokens = self.shape.num_tokens * self.config.frames_per_block
        with torch.no_grad():
            length = self.config.conditions.text_length
            self.stack = FastWanStack(model, free, tokens, length, maps)
            self.head = FastWanHead(model, free)
        self.device, self.dtype = self.stack.device, self.stack.dtype

    @torch.no_grad()
    def begin(
        self,
        clean: Tensor | None,
        conditions: Conditions,
        batch: int = 1,
        window: int | None = None,
    ) -> WanState:
        size, num_given = self.config.frames_per_block, 0 if clean is None else clean.shape[1]
        if num_given % size:
            raise ValueError(f"needed whole blocks of {size} frames, got {num_given} frames")
        batch = batch if clean is None else clean.shape[0]
        cache = self.stack.new_cache(self.config.cache.with_window(window), batch, size)
        state = WanState(cache=cache, next_position=0)
        for start in range(0, num_given, size):
            assert clean is not None
            stop = start + size
            self.observe(state, clean[:, start:stop], conditions.frames(start, stop))
        return state

    @torch.no_grad()
    def context(
        self, state: WanState, conditions: Conditions, noise: Tensor | None = None
    ) -> FastWanDenseContext:
        state.cache.make_room()
        first = state.next_position
        return FastWanDenseContext(
            cache=state.cache,
            rotary=self.stack.rotary([range(first, first + self.config.frames_per_block)]),
            text=text_in(state, conditions, self.stack),
            steering=self.stack.steering(conditions),
        )

    @torch.no_grad()
    def denoise(
        self,
        context: FastWanDenseContext,
        noise: Tensor,
        times: Sequence[float],
        solver: Solver = "euler",
        scale: float | None = None,
        step_noise: Tensor | None = None,
    ) -> Tensor:
        """Turn noise into frames; see interface.Engine. Between steps frames are float32."""
        modulations = self.stack.modulations_at(times[:-1], context.steering)
        step = {time: index for index, time in enumerate(times)}

        def velocity_at(patches: Tensor, time: float) -> Tensor:
            return self._velocity(context, patches, modulations[step[time]])

        patches = self._patches(noise)
        new = None
        if step_noise is not None:
            new = torch.stack([self._patches(each) for each in step_noise])
        patches = solve(guided(velocity_at, scale), patches, times, solver, new)
        return self._frames(patches, noise).to(self.dtype)

    @torch.no_grad()
    def velocity(self, context: FastWanDenseContext, noisy: Tensor, time: Tensor) -> Tensor:
        steering, per_stream = context.steering, 1
        if steering is not None:
            per_stream = steering.shape[1]
            steering = steering.flatten(0, 1)
        modulation = self.stack.modulations.of_each(time.repeat_interleave(per_stream), steering)
        velocity = self._velocity(context, self._patches(noisy), modulation)
        return self._frames(velocity, noisy).to(noisy.dtype)

    def _patches(self, frames: Tensor) -> Tensor:
        """Return the patches of frames [b c h w], or of blocks [b t c h w], as [b s p]."""
        size, num = self.config.frames_per_block, 1 if frames.dim() == 4 else frames.shape[1]
        if num != size:
            raise ValueError(f"needed blocks of {size} frames, got {num}")
        return to_patches(frames.float(), self.shape.patch_size).flatten(1, -2)

    def _frames(self, patches: Tensor, like: Tensor) -> Tensor:
        if like.dim() == 5:
            patches = patches.unflatten(1, (like.shape[1], -1))
        return from_patches(patches, self.shape)

    def _velocity(
        self, context: FastWanDenseContext, patches: Tensor, modulation: Tensor
    ) -> Tensor:
        parts = self.stack.parts_of(modulation, context.steering)
        x = self.stack.embed(patches)
        x = self._run(context, x, parts, range(len(self.stack.blocks)))
        return self.head(x, parts)

    def _run(
        self, context: FastWanDenseContext, x: Tensor, parts: Parts, layers: Sequence[int]
    ) -> Tensor:
        def read(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.stack.attend(q, *context.cache.write(layer, k, v))

        def read_text(layer: int, q: Tensor) -> Tensor:
            return self.stack.attend_to_text(q, *context.text[layer])

        for layer in layers:
            x = self.stack.run_layer(layer, x, parts, context.rotary, read, read_text)
        return x

    @torch.no_grad()
    def observe(self, state: WanState, clean: Tensor, conditions: Conditions) -> None:
        """Make frames part of the past: one pass over them writes the KV cache."""
        size, first = self.config.frames_per_block, state.next_position
        context, stack = self.context(state, conditions), self.stack
        parts = stack.parts_at(0.0, context.steering)
        x = stack.embed(self._patches(clean))
        last = len(stack.blocks) - 1
        x = self._run(context, x, parts, range(last))
        state.cache.write(last, *stack.keys_values(last, x, parts, context.rotary))
        state.cache.advance([first // size])
        state.next_position = first + size
