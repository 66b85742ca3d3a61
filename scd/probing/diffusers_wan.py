"""Weights of diffusers' WanTransformer3DModel, as a causal video diffuser that can be probed.

They are run as a dense causal Wan model of this package, whose weights have the same names: a frame
of latents sees itself and the clean frames before it, which stand at time 0. They need to have been
trained so, by teacher forcing. The paper's authors probe such a model.

Needs the extra `wan`: pip install -e ".[wan]".
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from jaxtyping import Float
from torch import Tensor

from scd.common.config import MAX_SIZE
from scd.common.runtime import without_weights
from scd.data.clip import Conditions
from scd.data.spaces import ConditionSpec
from scd.models.config import CacheConfig, FrameShape
from scd.models.wan.config import WanBlockConfig, WanConfig
from scd.models.wan.dense import WanDiffuser
from scd.probing.models import OurState, WanDenseSubject


class WanSubject(WanDenseSubject):
    """The weights of a WanTransformer3DModel, one frame of latents after another.

    Args:
        transformer: of one frame per token (patch size 1 along time), text to video.
        text: what the text encoder makes of the prompt; the same for all clips.
        height: rows of a latent frame.
        width: columns of a latent frame.

    Raises:
        ValueError: a transformer of another kind, or frames that cannot be cut into its patches.
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        text: Float[Tensor, "words a"],
        height: int,
        width: int,
    ) -> None:
        config: Any = transformer.config
        frames, down, across = config.patch_size
        if frames != 1 or config.added_kv_proj_dim is not None or config.image_dim is not None:
            raise ValueError(
                "needed a text-to-video transformer with one frame per token, got patches of "
                f"{frames} frames, image_dim={config.image_dim} and "
                f"added_kv_proj_dim={config.added_kv_proj_dim}"
            )
        if height % down or width % across or down != across:
            raise ValueError(f"frames of {height}x{width} do not make patches of {down}x{across}")
        if text.shape[-1] != config.text_dim:
            raise ValueError(f"the text must have {config.text_dim} entries, got {text.shape[-1]}")
        self.text = text
        shape = FrameShape(channels=config.in_channels, height=height, width=width, patch_size=down)
        block = WanBlockConfig(
            num_heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
            ffn_dim=config.ffn_dim,
            freq_dim=config.freq_dim,
            norm_before_text=config.cross_attn_norm,
            eps=config.eps,
        )
        with without_weights():
            model = WanDiffuser(
                WanConfig(
                    shape=shape,
                    block=block,
                    num_layers=config.num_layers,
                    conditions=ConditionSpec(text_length=len(text), text_dim=config.text_dim),
                    cache=CacheConfig(window=MAX_SIZE, num_sinks=0, rebase_sinks=False),
                )
            )
        model.load_state_dict(transformer.state_dict(), assign=True)
        super().__init__(model)

    @torch.no_grad()
    def begin(self, past: Float[Tensor, "b t c h w"], conditions: Conditions) -> OurState:
        """Run the clean frames once, each seeing itself and those before it.

        Raises:
            ValueError: conditions other than the text.
        """
        if any(value is not None for value in vars(conditions).values()):
            raise ValueError("a Wan model is steered by its text, but actions or labels were given")
        return super().begin(past, Conditions(text=self.text.expand(len(past), -1, -1).to(past)))
