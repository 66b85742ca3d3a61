"""What one frame costs by formula: operations, bytes that must move, and memory that must be held.

A matrix product of [m k] and [k n] is 2 m n k operations, attention of q queries over s keys at
width d is 4 q s d. Everything element by element (norms, rotations, gates) counts nothing. Bytes
are a lower bound: weights are read once per pass, keys and values once where they are attended to,
and activations stay on the chip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scd.common.config import at_least
from scd.models.config import DecoderConfig, DenseConfig, SeparableConfig
from scd.models.embed import TimeEmbedder


@dataclass(frozen=True, kw_only=True)
class Load:
    """How many streams share a frame's work, and what they cache."""

    num_context_frames: int
    """Frames that attention sees, the newest (encoder) or the noisy one (dense) included."""
    batch: int = 1
    """Streams side by side."""
    branches: int = 1
    """Times that each is denoised side by side: 2 with guidance."""
    memories: int = 1
    """Branches with a past of their own: 2 with guidance by conditions, else 1."""
    bytes_per_value: int = 4
    """Of weights, keys and values: 4 in float32, 2 in bfloat16."""

    def __post_init__(self) -> None:
        at_least(1, **vars(self))
        if self.memories > self.branches:
            raise ValueError(f"{self.branches} branches cannot have {self.memories} memories")

    @property
    def num_encoded(self) -> int:
        """Frames that are encoded, or cached, side by side."""
        return self.batch * self.memories

    @property
    def num_denoised(self) -> int:
        return self.batch * self.branches


@dataclass(frozen=True, kw_only=True)
class FrameCost:
    """Cost of the next frame of all streams together, their windows full."""

    encoder_flops: int = 0
    """Operations of the encoder pass; a dense model has none."""
    prepare_flops: int = 0
    """Operations on a frame's context that do not depend on the time of a step."""
    step_flops: int
    """Operations of one call of the network that denoises."""
    memory_flops: int = 0
    """Operations of the pass that writes the finished frame into the KV cache (dense)."""
    encoder_bytes: int = 0
    """Bytes that the encoder pass moves."""
    prepare_bytes: int
    """Bytes that move once per frame: for the context, and the weights of all that depends on
    times and conditions alone, since the times of all steps are known."""
    step_bytes: int
    """Bytes that one denoising call moves."""
    light_below: float = 0.0
    """Steps at times below this are light: they skip layers. 0: none."""
    light_flops: int = 0
    """Operations that a light step saves."""
    light_bytes: int = 0
    """Bytes that a light step does not move."""
    memory_bytes: int = 0
    """Bytes that the pass that writes the finished frame moves."""
    weight_bytes: int
    """All parameters."""
    cache_bytes: int
    """Keys and values that stay from frame to frame."""
    prefix_bytes: int = 0
    """Keys and values that last for one frame (join "prefix")."""

    def flops(self, num_steps: int, times: Sequence[float] | None = None) -> int:
        """Return the operations of one frame of all streams; see `bytes`."""
        once = self.encoder_flops + self.prepare_flops + self.memory_flops
        saved = self._num_light(num_steps, times) * self.light_flops
        return once + num_steps * self.step_flops - saved

    def bytes(self, num_steps: int, times: Sequence[float] | None = None) -> int:
        """Return the least number of bytes that one frame of all streams moves.

        Args:
            num_steps: calls of the network that denoises.
            times: of these calls; None: evenly spaced from 1. They matter if some skip layers.
        """
        once = self.encoder_bytes + self.prepare_bytes + self.memory_bytes
        saved = self._num_light(num_steps, times) * self.light_bytes
        return once + num_steps * self.step_bytes - saved

    def _num_light(self, num_steps: int, times: Sequence[float] | None) -> int:
        if times is None:
            times = [1 - step / num_steps for step in range(num_steps)]
        return sum(time < self.light_below for time in times[:num_steps])

    @property
    def memory_needed(self) -> int:
        """Bytes that must be held to stream: weights, and the KV cache of every stream."""
        return self.weight_bytes + self.cache_bytes + self.prefix_bytes


class Sizes:
    """Operations and parameters of the parts that all models are made of, for one frame."""

    def __init__(self, config: Any) -> None:
        self.shape, self.block, self.conditions = config.shape, config.block, config.conditions

    @property
    def tokens(self) -> int:
        return self.shape.num_tokens

    def linear(self, num_tokens: int, num_maps: int) -> int:
        """Return the operations of `num_maps` square maps on some tokens."""
        return 2 * num_tokens * num_maps * self.block.width**2

    def attention(self, queries: int, keys: int) -> int:
        return 4 * queries * keys * self.block.width

    def block_flops(self, keys: int, tokens: int | None = None, read: int | None = None) -> int:
        """Return the operations of one block: 4 maps of attention, 8 of the MLP, 6 modulations.

        Args:
            keys: that each token sees.
            tokens: that give keys and values; None: those of a frame.
            read: tokens whose output somebody reads; None: all.
        """
        tokens = self.tokens if tokens is None else tokens
        read = tokens if read is None else read
        maps = self.linear(tokens, 2) + self.linear(read, 10)
        return maps + self.attention(read, keys) + self.linear(1, 6)

    @property
    def keys_values_flops(self) -> int:
        """Operations of a block that only gives keys and values: 2 maps and half the modulation."""
        return self.linear(self.tokens, 2) + self.linear(1, 3)

    @property
    def embed_flops(self) -> int:
        return 2 * self.tokens * self.shape.token_dim * self.block.width

    @property
    def time_flops(self) -> int:
        return 2 * (2 * TimeEmbedder.NUM_SINUSOIDS) * self.block.width + self.linear(1, 1)

    @property
    def condition_flops(self) -> int:
        """Operations of embedding continuous actions and held keys; choices are looked up."""
        spec = self.conditions
        looked_up = sum(len(part.choices) for part in spec.action_parts) if spec.action_dim else 0
        return 2 * (spec.action_dim - looked_up) * self.block.width

    @property
    def head_flops(self) -> int:
        """Operations of turning tokens back into a frame: its modulation and one map."""
        return self.linear(1, 2) + self.embed_flops

    @property
    def keys_values_size(self) -> int:
        """Values that a layer caches of a frame."""
        return 2 * self.tokens * self.block.width

    @property
    def modulation_parameters(self) -> int:
        """Parameters of the maps of a block that see only its time and conditions."""
        return 6 * (self.block.width + 1) * self.block.width

    @property
    def block_parameters(self) -> int:
        """Parameters of a block: 18 square matrices, biases, norms of queries and keys."""
        width = self.block.width
        biases = 9 * width
        return 12 * width**2 + biases + 2 * self.block.head_dim + self.modulation_parameters

    @property
    def embed_parameters(self) -> int:
        learned = self.tokens * self.block.width if self.block.learned_positions else 0
        return (self.shape.token_dim + 1) * self.block.width + learned

    @property
    def time_parameters(self) -> int:
        width = self.block.width
        return (2 * TimeEmbedder.NUM_SINUSOIDS + 1 + width + 1 + self.condition_rows) * width

    @property
    def condition_rows(self) -> int:
        """Vectors among the parameters that embed actions and labels."""
        spec = self.conditions
        rows = spec.num_actions + 1 if spec.num_actions else 0
        if spec.is_composite:
            rows += sum((sum(part.choices) or part.size + 1) + 1 for part in spec.action_parts)
        elif spec.action_dim:
            rows += spec.action_dim + 2
        return rows + (spec.num_labels + 1 if spec.num_labels else 0)

    @property
    def head_parameters(self) -> int:
        """Parameters of the map from tokens to a frame, without its modulation."""
        return (self.block.width + 1) * self.shape.token_dim

    @property
    def output_modulation_parameters(self) -> int:
        """Parameters of a modulation of two parts, at the end of a stack."""
        return 2 * (self.block.width + 1) * self.block.width


def separable_cost(config: SeparableConfig, load: Load) -> FrameCost:
    """Count a frame of a separable model: n tokens, width d, p values per token, C frames.

    Encoder, each of its layers: 24 n d^2 (4 maps of attention, 8 of the MLP) + 4 n C n d
    (attention) + 12 d^2 (modulations). A step, each layer of the decoder: the same for s tokens
    over k keys in place of n and C n: joint s = k = 2n, prefix s = n and k = 2n, others s = k = n;
    of the last joint layer only n tokens go on after keys and values. Prefix, once per frame: all
    layers for n tokens over n keys, of the last only keys and values. Besides (channels, times,
    conditions, head): 2 n p d, 2 (256 d + d^2), 4 d^2 where they occur.

    Bytes: weights of encoder and decoder once per pass, those of times and conditions once per
    frame; 2 C n d keys and values per encoder layer, C - 1 frames read and one written; prefix
    2 n d per layer, written once and read in every step.
    """
    sizes, encoder, decoder = Sizes(config), config.encoder, config.decoder
    tokens, layers = sizes.tokens, decoder.num_layers
    context = load.num_context_frames * tokens
    encoder_flops = (
        sizes.embed_flops
        + sizes.time_flops
        + sizes.condition_flops
        + encoder.num_layers * sizes.block_flops(context)
        + (sizes.linear(1, 2) if encoder.modulate_output else 0)
    )
    encoder_parameters = (
        sizes.embed_parameters
        + sizes.time_parameters
        + encoder.num_layers * sizes.block_parameters
        + (sizes.output_modulation_parameters if encoder.modulate_output else 0)
        + (tokens * sizes.block.width if encoder.start_frame else 0)
    )
    cache = encoder.num_layers * load.num_context_frames * sizes.keys_values_size
    prefix = layers * sizes.keys_values_size if decoder.join == "prefix" else 0
    prepare_flops, prepare_weights = _prepare(sizes, decoder)
    # Of a step: the maps of tokens. The maps of times and conditions are read once per frame.
    step_weights = (
        sizes.embed_parameters
        + layers * (sizes.block_parameters - sizes.modulation_parameters)
        + sizes.head_parameters
        + _merge_parameters(sizes, decoder)
    )
    time_weights = (
        sizes.time_parameters
        + layers * sizes.modulation_parameters
        + sizes.output_modulation_parameters
    )
    align = _align_parameters(sizes, decoder)
    size = load.bytes_per_value
    return FrameCost(
        encoder_flops=load.num_encoded * encoder_flops,
        prepare_flops=load.num_denoised * prepare_flops,
        step_flops=load.num_denoised * _step_flops(sizes, decoder),
        encoder_bytes=size * (encoder_parameters + load.num_encoded * cache),
        prepare_bytes=size * (time_weights + prepare_weights + load.num_denoised * prefix),
        step_bytes=size * (step_weights + load.num_denoised * prefix),
        weight_bytes=size * (encoder_parameters + step_weights + time_weights + align),
        cache_bytes=size * load.num_encoded * cache,
        prefix_bytes=size * load.num_denoised * prefix,
    )


def _prepare(sizes: Sizes, decoder: DecoderConfig) -> tuple[int, int]:
    """Count operations, and weights read beyond those of times, of a frame's context."""
    if decoder.join == "token_concat_projected":
        flops = sizes.condition_flops + sizes.linear(sizes.tokens, 1)
        return flops, _align_parameters(sizes, decoder)
    if decoder.join != "prefix":
        return sizes.condition_flops, 0
    whole = decoder.num_layers - 1
    flops = (
        sizes.condition_flops
        + sizes.time_flops
        + whole * sizes.block_flops(sizes.tokens)
        + sizes.keys_values_flops
    )
    maps = sizes.block_parameters - sizes.modulation_parameters
    last = 2 * (sizes.block.width + 1) * sizes.block.width + sizes.block.head_dim
    return flops, whole * maps + last


def _step_flops(sizes: Sizes, decoder: DecoderConfig) -> int:
    tokens, layers = sizes.tokens, decoder.num_layers
    flops = sizes.embed_flops + sizes.time_flops + sizes.head_flops
    if decoder.join in ("token_concat", "token_concat_projected"):
        both = 2 * tokens
        # After the last block nobody reads the context's half.
        blocks = (layers - 1) * sizes.block_flops(both, both) + sizes.block_flops(
            both, both, tokens
        )
        return flops + blocks
    if decoder.join == "prefix":
        return flops + layers * sizes.block_flops(2 * tokens)
    if decoder.join == "channel_concat":
        flops += sizes.linear(tokens, 2)
    return flops + layers * sizes.block_flops(tokens)


def _merge_parameters(sizes: Sizes, decoder: DecoderConfig) -> int:
    width = sizes.block.width
    return (2 * width + 1) * width if decoder.join == "channel_concat" else 0


def _align_parameters(sizes: Sizes, decoder: DecoderConfig) -> int:
    width = sizes.block.width
    return (width + 3) * width if decoder.join == "token_concat_projected" else 0


def dense_cost(config: DenseConfig, load: Load) -> FrameCost:
    """Count a frame of a dense model: as `separable_cost`, C frames with the noisy one among them.

    A step: each layer 24 n d^2 (4 maps of attention, 8 of the MLP) + 4 n C n d (attention) +
    12 d^2 (modulations); besides 4 n p d (channels), 2 (256 d + d^2) (time), 4 d^2 (head). The
    pass that caches the clean frame: the same without the head, and of the last layer only keys
    and values.

    Bytes: weights once per pass, those of times and conditions once per frame; 2 (C - 1) n d keys
    and values per layer read in every step, and 2 n d written once.

    A diagonal layer: n keys in place of C n, no part in the pass that caches, nothing cached. A
    step that skips layers: those that are left.
    """
    sizes, num_layers, skip = Sizes(config), config.num_layers, config.skip
    num_diagonal = config.num_diagonal
    num_seeing = num_layers - num_diagonal
    context = load.num_context_frames * sizes.tokens
    seeing, diagonal = sizes.block_flops(context), sizes.block_flops(sizes.tokens)
    blocks = num_seeing * seeing + num_diagonal * diagonal
    step = sizes.embed_flops + sizes.time_flops + blocks + sizes.head_flops
    update = (
        sizes.embed_flops
        + sizes.time_flops
        + sizes.condition_flops
        + (num_seeing - 1) * seeing
        + sizes.keys_values_flops
    )
    maps = sizes.block_parameters - sizes.modulation_parameters
    step_weights = sizes.embed_parameters + num_layers * maps + sizes.head_parameters
    time_weights = (
        sizes.time_parameters
        + num_layers * sizes.modulation_parameters
        + sizes.output_modulation_parameters
    )
    last = 2 * (sizes.block.width + 1) * sizes.block.width + sizes.block.head_dim
    update_weights = sizes.embed_parameters + (num_seeing - 1) * maps + last
    # Of one layer, for one frame.
    cached = load.num_encoded * sizes.keys_values_size
    read = (load.num_context_frames - 1) * cached
    skipped = range(0) if skip is None else skip.layers
    skipped_seeing = len([layer for layer in skipped if layer < num_seeing])
    skipped_diagonal = len(skipped) - skipped_seeing
    size = load.bytes_per_value
    return FrameCost(
        prepare_flops=load.num_denoised * sizes.condition_flops,
        step_flops=load.num_denoised * step,
        memory_flops=load.num_encoded * update,
        prepare_bytes=size * time_weights,
        # The noisy frame's own keys and values need not leave the chip.
        step_bytes=size * (step_weights + num_seeing * read),
        light_below=0.0 if skip is None else skip.below,
        light_flops=load.num_denoised * (skipped_seeing * seeing + skipped_diagonal * diagonal),
        light_bytes=size * (len(skipped) * maps + skipped_seeing * read),
        # The older frames are read in all layers but the last, the new one written in all.
        memory_bytes=size * (update_weights + (num_seeing - 1) * read + num_seeing * cached),
        weight_bytes=size * (step_weights + time_weights),
        cache_bytes=size * num_seeing * (read + cached),
    )
