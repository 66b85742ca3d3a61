"""Keys and values of the past in 8 bits: half the memory of bfloat16."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from scd.models.kv_cache import KVCache

LARGEST = 127


class Int8KVCache(KVCache):
    """A ring of keys and values rounded to 8 bits, each head of each token with a scale of its own.

    What is read is in the type of the model, in memory that the next read overwrites: attend to it
    before the next `write`. Without gradients.
    """

    tensors = ("keys", "values", "key_scales", "value_scales")

    def _allocate(self, shape: tuple[int, ...], like: Tensor) -> None:
        self.like = like
        self.keys = torch.empty(shape, dtype=torch.int8, device=like.device)
        self.values = torch.empty_like(self.keys)
        self.key_scales = torch.empty(shape[:-1], dtype=torch.float32, device=like.device)
        self.value_scales = torch.empty_like(self.key_scales)
        self._read: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def bytes_of(shape: tuple[int, ...], like: Tensor) -> int:
        entries = torch.Size(shape).numel()
        return 2 * (entries + 4 * entries // shape[-1])

    def _put(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        stop = start + k.shape[2]
        held = ((self.keys, self.key_scales, k), (self.values, self.value_scales, v))
        for whole, scales, new in held:
            whole[layer, :, :, start:stop], scales[layer, :, :, start:stop] = rounded(new)

    def _get(self, layer: int, filled: int) -> tuple[Tensor, Tensor]:
        _, batch, heads, size, entries = self.keys.shape
        if self._read is None or self._read[0].shape[0] != batch:
            room = self.like.new_empty(2, batch, heads, size, entries)
            self._read = room[0], room[1]
        # Of a ring that is not full, each head in a row: products of all heads at once need it so.
        keys, values = (
            room.view(-1)[: batch * heads * filled * entries].view(batch, heads, filled, entries)
            for room in self._read
        )
        held = ((self.keys, self.key_scales, keys), (self.values, self.value_scales, values))
        for whole, scales, read in held:
            torch.mul(
                whole[layer, :, :, :filled],
                scales[layer, :, :, :filled, None].to(read.dtype),
                out=read,
            )
        return keys, values

    def _first_keys(self, num_tokens: int) -> Tensor:
        scales = self.key_scales[:, :, :, :num_tokens, None]
        return self.keys[:, :, :, :num_tokens] * scales.to(self.like.dtype)

    def _put_first_keys(self, keys: Tensor) -> None:
        stop = keys.shape[3]
        self.keys[:, :, :, :stop], self.key_scales[:, :, :, :stop] = rounded(keys)


def rounded(
    x: Float[Tensor, "... e"],
) -> tuple[Int8[Tensor, "... e"], Float[Tensor, "..."]]:
    """Return heads as whole numbers of -127 .. 127, and the scale of each, rounded to the type of
    x so that it multiplies exactly as it divided."""
    # A head of zeros would divide by nothing.
    largest = x.detach().float().abs().amax(-1).clamp_min(1e-30)
    scale = (largest / LARGEST).to(x.dtype).float()
    # A scale that was rounded down would carry the largest beyond the range.
    levels = (x.detach().float() / scale[..., None]).round_().clamp_(-LARGEST, LARGEST)
    return levels.to(torch.int8), scale
