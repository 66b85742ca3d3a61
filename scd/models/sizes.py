"""Operations and parameters of the parts of which all models are made, by formula.

A matrix product of [m k] and [k n] is 2 m n k operations, attention of q queries over s keys at
width d is 4 q s d. Everything element by element (norms, rotations, gates) counts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from scd.data.clip import ConditionSpec
from scd.models.block import BlockConfig
from scd.models.embed import FrameShape, TimeEmbedder


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Operations and parameters of the parts that all models are made of, for one frame."""

    shape: FrameShape
    """Tokens of a frame."""
    block: BlockConfig
    """Width of a token."""
    conditions: ConditionSpec
    """What steers a frame."""

    @property
    def tokens(self) -> int:
        """Tokens of a frame."""
        return self.shape.num_tokens

    def linear(self, num_tokens: int, num_maps: int) -> int:
        """Return the operations of `num_maps` square maps on some tokens."""
        return 2 * num_tokens * num_maps * self.block.width**2

    def attention(self, queries: int, keys: int) -> int:
        """Return the operations of logits and of what is read."""
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
        """Operations of cutting a frame into tokens."""
        return 2 * self.tokens * self.shape.token_dim * self.block.width

    @property
    def time_flops(self) -> int:
        """Operations of embedding a time."""
        return 2 * (2 * TimeEmbedder.NUM_SINUSOIDS) * self.block.width + self.linear(1, 1)

    @property
    def condition_flops(self) -> int:
        """Operations of embedding a continuous action; discrete ones are looked up."""
        return 2 * self.conditions.action_dim * self.block.width

    @property
    def head_flops(self) -> int:
        """Operations of turning tokens back into a frame: its modulation and one map."""
        return self.linear(1, 2) + self.embed_flops

    @property
    def keys_values_size(self) -> int:
        """Values that a layer remembers of a frame."""
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
        """Parameters that cut a frame into tokens."""
        learned = self.tokens * self.block.width if self.block.learned_positions else 0
        return (self.shape.token_dim + 1) * self.block.width + learned

    @property
    def time_parameters(self) -> int:
        """Parameters that embed times and conditions."""
        width, spec = self.block.width, self.conditions
        rows = 2 * TimeEmbedder.NUM_SINUSOIDS + 1 + width + 1
        rows += spec.num_actions + 1 if spec.num_actions else 0
        rows += spec.action_dim + 2 if spec.action_dim else 0
        rows += spec.num_labels + 1 if spec.num_labels else 0
        return rows * width

    @property
    def head_parameters(self) -> int:
        """Parameters of the map from tokens to a frame, without its modulation."""
        return (self.block.width + 1) * self.shape.token_dim

    @property
    def output_modulation_parameters(self) -> int:
        """Parameters of a modulation of two parts, at the end of a stack."""
        return 2 * (self.block.width + 1) * self.block.width
