"""A stack of Wan's blocks with what turns frames, times and text into its input, and back.

It knows three ways to run: all frames under a mask, noisy frames beside their clean history, and
frames that read a memory. Source: paper, sections 6.1 and 6.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from scd.data.clip import ConditionSpec
from scd.models.attention import Rotary, attend, frame_positions, rotary_table
from scd.models.block import Attend, Stack
from scd.models.embed import FrameShape, to_patches
from scd.models.kv_cache import CacheConfig, KVCache
from scd.models.visibility import FrameCausal, TeacherForcing, Visibility
from scd.models.wan.block import TextKeysValues, WanBlock
from scd.models.wan.config import WanBlockConfig

TIME_SCALE = 1000
"""What Wan multiplies times by."""


class TwoMaps(nn.Module):
    """Two linear maps with a nonlinearity between, under the names of diffusers' embedders."""

    def __init__(self, first: int, width: int, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(first, width)
        self.linear_2 = nn.Linear(width, width)
        self.between = between

    def forward(self, x: Float[Tensor, "*b p"]) -> Float[Tensor, "*b d"]:
        """Map vectors."""
        return self.linear_2(self.between(self.linear_1(x)))


def _tanh_gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


class WanEmbedder(nn.Module):
    """Times and text to vectors; `time_proj` makes the modulation that all blocks share."""

    def __init__(self, block: WanBlockConfig, text_dim: int) -> None:
        super().__init__()
        self.time_embedder = TwoMaps(block.freq_dim, block.width, functional.silu)
        self.time_proj = nn.Linear(block.width, 6 * block.width)
        self.text_embedder = TwoMaps(text_dim, block.width, _tanh_gelu)
        self.num_sinusoids = block.freq_dim // 2

    def times(
        self, time: Float[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b t 6 d"]]:
        """Embed times: for the head, and for the blocks."""
        # diffusers may keep this part, norms and tables in more digits than the rest.
        sinusoids = time_sinusoids(time, self.num_sinusoids)
        embedding = self.time_embedder(sinusoids.to(self.time_embedder.linear_1.weight.dtype))
        embedding = embedding.to(self.time_proj.weight.dtype)
        modulation = self.time_proj(functional.silu(embedding))
        return embedding, rearrange(modulation, "b t (parts d) -> b t parts d", parts=6)


def time_sinusoids(time: Float[Tensor, "*b"], num: int) -> Float[Tensor, "*b features"]:
    """Return cosines, then sines, of 1000 * time at `num` frequencies from 1 towards 1e-4.

    In float64, as in the original; diffusers' float32 ones differ by 3e-5 in what the model
    returns. Times below 0, by which other models mark clean frames, count as 0.
    """
    ticks = TIME_SCALE * time.double().clamp(min=0)
    steps = torch.arange(num, device=time.device, dtype=torch.float64)
    angles = ticks[..., None] * 1e4 ** (-steps / num)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class WanTransformer(Stack):
    """Embedders and blocks, and the head if there is one, named as in WanTransformer3DModel."""

    def __init__(
        self,
        shape: FrameShape,
        block: WanBlockConfig,
        conditions: ConditionSpec,
        num_layers: int,
        has_head: bool = True,
    ) -> None:
        super().__init__()
        self.frame_shape, self.block_config = shape, block
        patch = (1, shape.patch_size, shape.patch_size)
        self.patch_embedding = nn.Conv3d(shape.channels, block.width, patch, patch)
        self.condition_embedder = WanEmbedder(block, conditions.text_dim)
        self.blocks = nn.ModuleList(WanBlock(block) for _ in range(num_layers))
        if has_head:
            self.proj_out = nn.Linear(block.width, shape.token_dim)
            table = torch.randn(1, 2, block.width) / block.width**0.5
            self.scale_shift_table = nn.Parameter(table)

    def embed(self, frames: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t n d"]:
        """Cut frames into tokens: the convolution of patches, which do not overlap, as one map."""
        weight = self.patch_embedding.weight
        patches = to_patches(frames.to(weight.dtype), self.frame_shape.patch_size)
        return functional.linear(patches, weight.flatten(1), self.patch_embedding.bias)

    def text_memory(self, text: Float[Tensor, "b l c"]) -> list[TextKeysValues]:
        """Embed a text and return its keys and values in every layer; padding counts as text."""
        weight = self.condition_embedder.time_proj.weight
        words = self.condition_embedder.text_embedder(text.to(weight.dtype))
        return [block.text_keys_values(words) for block in self._blocks]

    def head(
        self, x: Float[Tensor, "b t n d"], embedding: Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b t c h w"]:
        """Turn tokens into velocities."""
        table = self.scale_shift_table.float() + embedding.float()[:, :, None]
        shift, scale = rearrange(table, "b t (parts one) d -> parts b t one d", one=1)
        normed = functional.layer_norm(x.float(), x.shape[-1:], eps=self.block_config.eps)
        patches = self.proj_out((normed * (1 + scale) + shift).to(x.dtype))
        # The channel stands last within a patch here, and first in `embed`.
        return rearrange(
            patches,
            "b t (rows columns) (p q c) -> b t c (rows p) (columns q)",
            rows=self.frame_shape.rows,
            p=self.frame_shape.patch_size,
            q=self.frame_shape.patch_size,
        )

    def masked(
        self,
        frames: Float[Tensor, "b t c h w"],
        modulation: Float[Tensor, "b t 6 d"],
        text: list[TextKeysValues],
        visible: Visibility | None,
    ) -> Float[Tensor, "b t n d"]:
        """Run all layers over all frames in one sequence, under a mask; None: each sees all."""
        rotary = self.rotary(range(frames.shape[1]))

        def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, visible)

        x = self.embed(frames)
        for block, words in zip(self._blocks, text, strict=True):
            x = self.run(block, x, modulation, rotary, read, words)
        return x

    def teacher_forced(
        self,
        clean: Float[Tensor, "b t c h w"],
        clean_modulation: Float[Tensor, "b t 6 d"],
        noisy: Float[Tensor, "br m c h w"],
        modulation: Float[Tensor, "br m 6 d"],
        text: list[TextKeysValues],
        frames_per_block: int = 1,
    ) -> Float[Tensor, "br m n d"]:
        """Run all layers over noisy frames, each beside the clean frames before it.

        Args:
            clean: frames of a clip: each sees those up to itself.
            clean_modulation: of their times.
            noisy: r draws of the last m frames, the r of a clip in a row; each sees the clean
                frames before it and itself, and stands where the clean one stands.
            modulation: of their times.
            text: of each clip.
            frames_per_block: frames that see each other.
        """
        num_draws, num_noisy = noisy.shape[0] // clean.shape[0], noisy.shape[1]
        first = clean.shape[1] - num_noisy
        if first < 0 or first % frames_per_block or num_noisy % frames_per_block:
            raise ValueError(
                f"needed whole blocks of {frames_per_block} frames and no more noisy than clean "
                f"ones, got {num_noisy} noisy and {clean.shape[1]} clean ones"
            )
        # The last block of clean frames is no frame's past.
        num_past, size = clean.shape[1] - frames_per_block, self.frame_shape.num_tokens
        x_past, x = self.embed(clean[:, :num_past]), self.embed(noisy)
        past_modulation = clean_modulation[:, :num_past]
        past_rotary = self.rotary(range(num_past))
        rotary = self.rotary(range(first, first + num_noisy))
        visible_past = FrameCausal(
            num_frames=num_past, tokens_per_frame=size, frames_per_block=frames_per_block
        )
        visible = None
        if num_noisy > frames_per_block:
            visible = TeacherForcing(
                num_clean=num_past,
                first_noisy=first,
                num_noisy=num_noisy,
                tokens_per_frame=size,
                frames_per_block=frames_per_block,
            )

        def read_past(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, visible_past)

        for layer, (block, words) in enumerate(zip(self._blocks, text, strict=True)):
            if layer == len(text) - 1 or num_past == 0:
                keys, values = block.keys_values(x_past, past_modulation, past_rotary)
            else:
                x_past, keys, values = self.run(
                    block.with_keys_values, x_past, past_modulation, past_rotary, read_past, words
                )
            keys, values = (part.repeat_interleave(num_draws, 0) for part in (keys, values))
            read = _reading_also(keys, values, visible)
            x = self.run(block, x, modulation, rotary, read, words)
        return x

    def extend(
        self,
        cache: KVCache,
        frames: Float[Tensor, "b t c h w"],
        modulation: Float[Tensor, "b t 6 d"],
        text: list[TextKeysValues],
        rotary: Rotary,
        only_remember: bool = False,
    ) -> Float[Tensor, "b t n d"] | None:
        """Run frames that see each other and a memory, and write them into its next place.

        Args:
            cache: has room for them; the caller advances it to keep them.
            frames: next frames of each stream.
            modulation: of their times.
            text: of each stream.
            rotary: their positions.
            only_remember: nobody reads their tokens: the last layer only remembers, and None is
                returned.
        """
        x = self.embed(frames)
        for layer, (block, words) in enumerate(zip(self._blocks, text, strict=True)):
            if only_remember and layer == len(text) - 1:
                cache.write(layer, *block.keys_values(x, modulation, rotary))
                return None
            x = self.run(block, x, modulation, rotary, _remembering(cache, layer), words)
        return x

    def new_cache(self, config: CacheConfig, batch: int, frames_per_block: int = 1) -> KVCache:
        """Allocate the memory of a batch of streams; a place of it holds a block of frames."""
        block, weight = self.block_config, self.patch_embedding.weight
        return KVCache(
            CacheConfig(
                window=config.window // frames_per_block,
                num_sinks=config.num_sinks // frames_per_block,
                rebase_sinks=config.rebase_sinks,
            ),
            num_layers=len(self.blocks),
            batch=batch,
            num_heads=block.num_heads,
            head_dim=block.head_dim,
            tokens_per_frame=self.frame_shape.num_tokens * frames_per_block,
            rotary_axes=block.rotary_axes,
            rotary_theta=block.rotary_theta,
            dtype=weight.dtype,
            device=weight.device,
        )

    def rotary(self, frames: Sequence[int]) -> Rotary:
        """Return the positions of the tokens of some frames."""
        device = self.patch_embedding.weight.device
        positions = frame_positions(
            torch.tensor(list(frames), dtype=torch.long, device=device),
            self.frame_shape.rows,
            self.frame_shape.columns,
        )
        return rotary_table(
            positions, self.block_config.rotary_axes, self.block_config.rotary_theta
        )

    @property
    def _blocks(self) -> list[WanBlock]:
        blocks = list(self.blocks)
        return blocks  # type: ignore[return-value]


def _reading_also(keys: Tensor, values: Tensor, visible: Visibility | None) -> Attend:
    def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), visible)

    return read


def _remembering(cache: KVCache, layer: int) -> Attend:
    write = cache.writer(layer)
    return lambda q, k, v: attend(q, *write(k, v))
