"""A causal video diffuser as somebody else would write it, without a line of this package's models.

Frames of 2 channels and 4x6 cells are cut into 2x2 patches. The noisy frame enters before a chosen
layer: what comes before knows the past and the places only, and so is the same at all steps.
"""

import torch
from torch import nn
from torch.nn import functional

from scd.probing.subject import Layer, Subject

PATCH, ROWS, COLUMNS, CHANNELS = 2, 2, 3, 2
WIDTH, HEADS = 16, 2


class TheirBlock(nn.Module):
    def __init__(self, sees_past=True, scale=1.0):
        super().__init__()
        self.sees_past = sees_past
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, WIDTH))
        self.scale = scale

    def forward(self, tokens, past):
        seen = torch.cat([past, tokens], dim=1) if self.sees_past else tokens
        q = self.qkv(self.norm(tokens))[..., :WIDTH]
        k, v = self.qkv(self.norm(seen))[..., WIDTH:].chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
        read = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + self.scale * self.out(read)
        return tokens + self.scale * self.mlp(tokens)


class Doubling(nn.Module):
    """A layer on which everything depends."""

    def forward(self, tokens, past):
        return 2 * tokens


class TheirModel(nn.Module):
    def __init__(self, blocks, enters_before=0):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.enters_before = enters_before
        self.embed = nn.Linear(CHANNELS * PATCH**2, WIDTH)
        self.places = nn.Parameter(torch.randn(ROWS * COLUMNS, WIDTH))
        self.clock = nn.Parameter(torch.randn(WIDTH))
        self.head = nn.Linear(WIDTH, CHANNELS * PATCH**2)

    def patches(self, frames):
        return functional.unfold(frames, PATCH, stride=PATCH).mT

    def forward(self, past, noisy, time):
        tokens = self.places.expand(noisy.shape[0], -1, -1)
        for place, block in enumerate(self.blocks):
            if place == self.enters_before:
                tokens = tokens + self.embed(self.patches(noisy)) + time * self.clock
            tokens = block(tokens, past)
        size = (ROWS * PATCH, COLUMNS * PATCH)
        return functional.fold(self.head(tokens).mT, size, PATCH, stride=PATCH)


class TheirSubject(Subject):
    """The adapter: six fields, two methods."""

    def __init__(self, model):
        self.model = model.eval()
        self.layers = [
            Layer(name=f"layer {number}", block=block)
            for number, block in enumerate(model.blocks, 1)
        ]
        self.tokens_per_frame, self.grid = ROWS * COLUMNS, (ROWS, COLUMNS)
        self.frame_shape = (CHANNELS, ROWS * PATCH, COLUMNS * PATCH)
        self.num_heads, self.width = HEADS, WIDTH

    def begin(self, past, conditions):
        tokens = [self.model.embed(self.model.patches(frame)) for frame in past.unbind(1)]
        return torch.cat(tokens, dim=1)

    def velocity(self, state, noisy, time):
        return self.model(state, noisy, time)


def third_party(blocks, enters_before=0, seed=0):
    """Build the subject; blocks are made by calling the given functions."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TheirSubject(TheirModel([make() for make in blocks], enters_before))
