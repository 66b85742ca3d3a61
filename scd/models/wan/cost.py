"""What one frame of a Wan model costs by formula: operations, bytes, memory.

Counted as in scd/models/cost.py. A text is embedded once per prompt, so its maps do not count, but
its keys and values are read in every pass.
"""

from __future__ import annotations

from scd.models.cost import FrameCost, Load, Sizes
from scd.models.wan.config import WanConfig, WanSeparableConfig
from scd.models.wan.transformer import ACTION_WIDTH


class WanSizes(Sizes):
    """Operations and parameters of the parts of a Wan model, for one frame."""

    def block_flops(self, keys: int, tokens: int | None = None, read: int | None = None) -> int:
        """Return the operations of one block: 4 maps of self-attention, 2 to the text, the MLP.

        Args:
            keys: that each token sees in self-attention.
            tokens: that give keys and values; None: those of a frame.
            read: tokens whose output somebody reads; None: all.
        """
        tokens = self.tokens if tokens is None else tokens
        read = tokens if read is None else read
        width = self.block.width
        maps = self.linear(tokens, 2) + self.linear(read, 4) + 4 * read * width * self.block.ffn_dim
        return maps + 4 * read * (keys + self.conditions.text_length) * width

    @property
    def keys_values_flops(self) -> int:
        return self.linear(self.tokens, 2)

    @property
    def time_flops(self) -> int:
        """Operations of embedding a time, of pooling actions that are looked up, and of the
        modulation that all blocks share."""
        pool = 2 * self._pooled * self.block.width + self.linear(1, 1) if self._pooled else 0
        return 2 * self.block.freq_dim * self.block.width + self.linear(1, 7) + pool

    @property
    def _pooled(self) -> int:
        """Values that the embedded actions of a latent frame have; 0: there are none."""
        spec = self.conditions
        return ACTION_WIDTH * spec.actions_per_frame if spec.has_actions else 0

    @property
    def text_size(self) -> int:
        """Values that a layer caches of a text."""
        return 2 * self.conditions.text_length * self.block.width

    @property
    def block_parameters(self) -> int:
        """Parameters of a block: two attentions, the MLP, a norm and the table of modulations."""
        width, inner = self.block.width, self.block.ffn_dim
        attention = 4 * (width + 1) * width + 2 * width
        norm = 2 * width if self.block.norm_before_text else 0
        return 2 * attention + (2 * width + 1) * inner + width + norm + 6 * width

    @property
    def keys_values_parameters(self) -> int:
        """Parameters of a block that are read where it only gives keys and values."""
        return 2 * (self.block.width + 1) * self.block.width + self.block.width

    @property
    def embed_parameters(self) -> int:
        return (self.shape.token_dim + 1) * self.block.width

    @property
    def time_parameters(self) -> int:
        width = self.block.width
        actions = 0
        if self._pooled:
            actions = self.condition_rows * ACTION_WIDTH + (self._pooled + width + 2) * width
        return (self.block.freq_dim + 1) * width + 7 * (width + 1) * width + actions

    @property
    def text_parameters(self) -> int:
        return (self.conditions.text_dim + 1 + self.block.width + 1) * self.block.width

    @property
    def head_parameters(self) -> int:
        return (self.block.width + 1) * self.shape.token_dim + 2 * self.block.width


def wan_cost(config: WanConfig, load: Load) -> FrameCost:
    """Count a frame of a dense causal Wan model; in blocks of frames, a whole block.

    n tokens, width d, MLP f, C frames of context, l tokens of text. A step, each layer: 12 n d^2
    (6 maps) + 4 n d f + 4 n (C n + l) d; besides 4 n p d (p values per token) and the time's
    2 (256 d + 7 d^2). The pass that updates the cache: the same without head; of the last
    layer 4 n d^2.
    """
    sizes = WanSizes(config)
    size, layers, frames = load.bytes_per_value, config.num_layers, config.frames_per_block
    n = frames * sizes.tokens
    # The context counts this block's frames.
    context = load.num_context_frames * sizes.tokens
    block, embed = sizes.block_flops(context, n), frames * (sizes.embed_flops + sizes.time_flops)
    step = embed + layers * block + frames * sizes.embed_flops
    update = embed + (layers - 1) * block + frames * sizes.keys_values_flops
    blocks = layers * sizes.block_parameters
    step_weights = sizes.embed_parameters + blocks + sizes.head_parameters
    last = sizes.keys_values_parameters
    update_weights = sizes.embed_parameters + blocks - sizes.block_parameters + last
    written = load.num_encoded * frames * sizes.keys_values_size
    read = load.num_encoded * (load.num_context_frames - frames) * sizes.keys_values_size
    text = load.num_encoded * sizes.text_size
    return FrameCost(
        step_flops=load.num_denoised * step,
        memory_flops=load.num_encoded * update,
        prepare_bytes=size * sizes.time_parameters,
        step_bytes=size * (step_weights + layers * (read + text)),
        memory_bytes=size * (update_weights + (layers - 1) * (read + text) + layers * written),
        weight_bytes=size * (step_weights + sizes.time_parameters + sizes.text_parameters),
        cache_bytes=size * layers * (read + written + text),
    )


def wan_separable_cost(config: WanSeparableConfig, load: Load) -> FrameCost:
    """Count a frame of a separable Wan model; blocks as in `wan_cost`.

    Once per frame the encoder's layers over C frames of context, and once more, without the last
    layer's output, for the finished frame. A step: the decoder's layers for 2 n tokens over 2 n
    keys, of the last one n tokens; with join "middle" the first layers for n tokens over n.
    """
    sizes, decoder = WanSizes(config), config.decoder
    size, layers, n = load.bytes_per_value, config.encoder.num_layers, sizes.tokens
    block = sizes.block_flops(load.num_context_frames * n)
    begin = sizes.embed_flops + sizes.time_flops
    alone = decoder.num_first if decoder.join == "middle" else 0
    num_times = 1 if decoder.context_time == "same" else 2
    steps = (
        sizes.embed_flops
        + num_times * sizes.time_flops
        + alone * sizes.block_flops(n)
        + (decoder.num_layers - alone - 1) * sizes.block_flops(2 * n, 2 * n)
        + sizes.block_flops(2 * n, 2 * n, n)
        + sizes.embed_flops
    )
    encoder_weights = sizes.embed_parameters + layers * sizes.block_parameters
    less = sizes.block_parameters - sizes.keys_values_parameters
    step_weights = (
        sizes.embed_parameters + decoder.num_layers * sizes.block_parameters + sizes.head_parameters
    )
    written = load.num_encoded * sizes.keys_values_size
    read = (load.num_context_frames - 1) * written
    text = load.num_encoded * sizes.text_size
    step_text = load.num_denoised * sizes.text_size
    others = sizes.time_parameters + sizes.text_parameters
    return FrameCost(
        encoder_flops=load.num_encoded * (begin + layers * block),
        step_flops=load.num_denoised * steps,
        memory_flops=load.num_encoded * (begin + (layers - 1) * block + sizes.keys_values_flops),
        encoder_bytes=size * (encoder_weights + sizes.time_parameters + layers * (read + text)),
        prepare_bytes=size * sizes.time_parameters,
        step_bytes=size * (step_weights + decoder.num_layers * step_text),
        memory_bytes=size
        * (encoder_weights - less + (layers - 1) * (read + text) + layers * written),
        weight_bytes=size * (encoder_weights + step_weights + 2 * others),
        cache_bytes=size * (layers * (read + written + text) + decoder.num_layers * text),
    )
