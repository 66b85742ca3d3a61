"""Initial weights of a model."""

from __future__ import annotations

import torch
from torch import nn

from scd.models.block import Block, BlockConfig, Modulation
from scd.models.decoder import FrameDecoder
from scd.models.embed import ConditionEmbedder, FrameHead, TimeEmbedder, TokenEmbedder
from scd.models.encoder import CausalEncoder


def initialise(module: nn.Module, config: BlockConfig) -> None:
    """Set the initial weights of a model.

    Linear maps Xavier-uniform with zero bias; tables, time embedding and learned positions normal
    with deviation 0.02 (tables: as configured); modulations zero but for the gates' bias; heads
    zero.
    Source: paper, section 1.2.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=config.initial_condition_std)
    for part in module.modules():
        if isinstance(part, TimeEmbedder):
            nn.init.normal_(part.rise.weight, std=0.02)
            nn.init.normal_(part.mix.weight, std=0.02)
        if isinstance(part, Modulation):
            nn.init.zeros_(part.linear.weight)
            nn.init.zeros_(part.linear.bias)
    for part in module.modules():
        if isinstance(part, Block):
            for modulation in (part.attention_modulation, part.mlp_modulation):
                modulation.linear.bias.data.chunk(3)[2].fill_(config.initial_gate)
        if isinstance(part, TokenEmbedder) and part.positions is not None:
            nn.init.normal_(part.positions, std=0.02)
        if isinstance(part, ConditionEmbedder) and part.spec.action_dim:
            nn.init.normal_(part.null_action, std=0.02)
        if isinstance(part, FrameHead):
            nn.init.zeros_(part.project.weight)
        if isinstance(part, CausalEncoder) and part.start is not None:
            nn.init.normal_(part.start, std=0.02)
        if isinstance(part, FrameDecoder):
            _initialise_join(part)


def _initialise_join(decoder: FrameDecoder) -> None:
    # Source: paper, section 1.4.
    if decoder.config.join == "channel_concat":
        identity = torch.eye(decoder.block.width)
        decoder.merge.weight.data.copy_(torch.cat([identity, identity], dim=1))
    if decoder.config.join == "token_concat_projected":
        nn.init.zeros_(decoder.align.weight)
