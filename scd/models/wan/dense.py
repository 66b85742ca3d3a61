"""Dense causal Wan model: all layers at every step, frame by frame or in blocks of frames.

The form of CausVid and Self-Forcing. Its weights are those of diffusers' WanTransformer3DModel,
name by name. Source: paper (teacher forcing), Self-Forcing (rollout, rolling cache).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from scd.data.clip import Conditions
from scd.models.dense import DenseBase
from scd.models.stack import Text
from scd.models.wan.config import WanConfig
from scd.models.wan.transformer import WanState, WanTransformer, text_in, text_of


class WanDiffuser(WanTransformer, DenseBase):
    """Wan's transformer made causal, behind the interface that all models share."""

    config_class = WanConfig
    state_class = WanState
    clean_time = 0.0
    begins_at_once = False

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config.shape, config.block, config.conditions, config.num_layers)
        self.config = config
        self.num_local_frames = config.num_local_frames

    def steering(self, conditions: Conditions) -> Float[Tensor, "b t d"] | None:
        return self.condition_embedder.steering(conditions)

    def embeddings(
        self, time: Float[Tensor, "b t"], steering: Float[Tensor, "#b #t d"] | None
    ) -> tuple[Tensor, Tensor]:
        return self.condition_embedder.times(time, steering)

    def velocities(
        self,
        x: Float[Tensor, "b t n d"],
        embedding: Float[Tensor, "b t d"],
        noisy: Float[Tensor, "b t c h w"],
        time: Float[Tensor, "b t"],
    ) -> Float[Tensor, "b t c h w"]:
        return self.head(x, embedding)

    def text_of(self, conditions: Conditions, batch: int) -> Text:
        return self.text_keys_values(text_of(conditions, batch))

    def text_in(self, state: WanState, conditions: Conditions) -> Text:
        return text_in(state, conditions, self)

    def bidirectional(
        self,
        noisy: Float[Tensor, "b t c h w"],
        time: Float[Tensor, "b t"],
        conditions: Conditions,
    ) -> Float[Tensor, "b t c h w"]:
        """Return the velocity of noisy frames that all see each other: Wan as it is published."""
        embedding, modulation = self.embeddings(time, self.steering(conditions))
        text, frames = self.text_of(conditions, noisy.shape[0]), range(noisy.shape[1])
        x = self.run_masked(self.tokens(noisy), modulation, frames, None, text)
        return self.head(x, embedding)
