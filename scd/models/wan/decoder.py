"""Frame decoder of a separable Wan model: a noisy frame and its context to a velocity.

Source: paper, section 6.1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from scd.data.clip import ConditionSpec
from scd.models.attention import attend
from scd.models.embed import FrameShape
from scd.models.wan.block import TextKeysValues
from scd.models.wan.config import WanBlockConfig, WanDecoderConfig
from scd.models.wan.transformer import WanTransformer


class WanFrameDecoder(WanTransformer):
    """The first and the last layers of a Wan model over one frame and its context."""

    def __init__(
        self,
        config: WanDecoderConfig,
        shape: FrameShape,
        block: WanBlockConfig,
        conditions: ConditionSpec,
    ) -> None:
        super().__init__(shape, block, conditions, config.num_layers)
        self.config = config

    def denoise(
        self,
        context: Float[Tensor, "f n d"],
        text: list[TextKeysValues],
        noisy: Float[Tensor, "f c h w"],
        time: Float[Tensor, " f"],
    ) -> Float[Tensor, "f c h w"]:
        """Return the velocity of noisy frames, each by itself.

        Args:
            context: of the same f frames.
            text: of each frame, or of fewer rows which as many frames in a row share.
            noisy: latent frames at `time`.
            time: 0 clean to 1 noise.
        """
        embedding, modulation = self.condition_embedder.times(time[:, None])
        # Within one frame only differences of positions matter, so every frame is frame 0.
        rotary = self.rotary([0])
        x = self.embed(noisy[:, None])
        join = self.config.num_first if self.config.join == "middle" else 0
        for layer, (block, words) in enumerate(zip(self.blocks, text, strict=True)):
            if layer == join:
                # Context and noise have the same places, and stand as two frames side by side.
                x = torch.cat([context[:, None].to(x.dtype), x], dim=1)
                modulation = torch.cat([self._of_context(modulation, time), modulation], dim=1)
                rotary = rotary[0].repeat(2, 1), rotary[1].repeat(2, 1)
            last = layer == len(self.blocks) - 1
            # Nobody reads the context's half after the last block.
            x = self.run(block, x, modulation, rotary, attend, words, 1 if last else None)
        return self.head(x, embedding)[:, 0]

    def _of_context(self, modulation: Tensor, time: Tensor) -> Tensor:
        if self.config.context_time == "same":
            return modulation
        return self.condition_embedder.times(torch.zeros_like(time)[:, None])[1]
