"""How much the features of a frame change over its denoising steps.

Every token of a transformer carries a large common vector, so that any two features look alike by
plain cosine: with nothing but the common vector left it is 1. Centred cosine takes it away first.
Source: paper, section 5.1; the centring and CKA (Kornblith et al., "Similarity of Neural Network
Representations Revisited") are ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from scd.probing.trajectory import Features, spread

NUM_CKA_STEPS = 10
"""Steps that are compared by CKA; each pair costs a product of all features."""

Matrices = Float[np.ndarray, "layers steps steps"]
"""One step x step matrix for each layer."""


@dataclass(frozen=True, kw_only=True)
class StepSimilarity:
    """Similarity of the features of every two steps, of the same frames, averaged over clips."""

    layers: tuple[int, ...]
    """Number of each layer, from 1."""
    cosine: Matrices
    """Cosine of each token with itself at the other step, averaged over tokens."""
    flattened: Matrices
    """Cosine of all tokens of a frame as one vector."""
    centred: Matrices
    """As `cosine`, after the layer's mean token over all tokens, clips and steps is taken away."""
    centred_by_step: Matrices
    """As `cosine`, after each step's own mean token over all tokens and clips is taken away: what
    all tokens gain in common as the time goes by does not count as change."""
    cka: Float[np.ndarray, "layers some some"]
    """Linear centred kernel alignment of the tokens of all clips, which centres each step by
    itself: a check that needs no two features to lie in the same coordinates."""
    cka_steps: tuple[int, ...]
    """Steps of `cka`, from 1."""


@torch.no_grad()
def step_similarity(
    features: Iterable[Features], num_cka_steps: int = NUM_CKA_STEPS
) -> StepSimilarity:
    """Compare the features of every two steps, layer by layer."""
    kinds = ("cosine", "flattened", "centred", "centred_by_step")
    found: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    layers, alignments, steps = [], [], []
    for one in features:
        tokens = one.tokens
        layers.append(one.layer + 1)
        steps = spread(0, tokens.shape[0] - 1, num_cka_steps)
        found["cosine"].append(token_cosine(tokens))
        found["flattened"].append(token_cosine(tokens.flatten(2)[:, :, None]))
        found["centred"].append(token_cosine(centred(tokens)))
        found["centred_by_step"].append(token_cosine(centred(tokens, by_step=True)))
        alignments.append(alignment(tokens[steps]))
    if not layers:
        raise ValueError("needed the features of 1 or more layers, got none")
    matrices = {name: torch.stack(of_layers).cpu().numpy() for name, of_layers in found.items()}
    return StepSimilarity(
        layers=tuple(layers),
        cka=torch.stack(alignments).cpu().numpy(),
        cka_steps=tuple(step + 1 for step in steps),
        **matrices,
    )


def token_cosine(tokens: Float[Tensor, "steps b n d"]) -> Float[Tensor, "steps steps"]:
    """Average over tokens the cosine of each with itself at another step, in -1 .. 1.

    The cosine with a token of zeros is 0.
    """
    unit = functional.normalize(tokens, dim=-1).flatten(1)
    num_tokens = tokens.shape[1] * tokens.shape[2]
    return (unit @ unit.T / num_tokens).clamp(-1, 1)


def centred(
    tokens: Float[Tensor, "steps b n d"], by_step: bool = False
) -> Float[Tensor, "steps b n d"]:
    """Take away the common vector: the mean token over all tokens and clips, and all steps or each.

    Args:
        tokens: of one layer.
        by_step: each step has a mean of its own.
    """
    axes = (1, 2) if by_step else (0, 1, 2)
    # In float64: the common vector may be a thousand times as long as what is left.
    mean = tokens.mean(dim=axes, keepdim=True, dtype=torch.float64)
    return (tokens - mean).float()


def alignment(tokens: Float[Tensor, "steps b n d"]) -> Float[Tensor, "steps steps"]:
    """Return linear CKA of every two steps over all tokens, in 0 .. 1.

    |X' Y|^2 / (|X' X| |Y' Y|) with columns of X and Y centred.
    """
    flat = tokens.flatten(1, 2)
    flat = flat - flat.mean(1, keepdim=True)
    # Scaled first: squares of squares of features leave the range of float32.
    flat = flat / flat.flatten(1).norm(dim=-1).clamp(min=1e-12)[:, None, None]
    num_steps = flat.shape[0]
    crossed = flat.new_zeros(num_steps, num_steps)
    for one in range(num_steps):
        for other in range(one, num_steps):
            crossed[one, other] = crossed[other, one] = (flat[one].T @ flat[other]).square().sum()
    own = crossed.diagonal().sqrt()
    return (crossed / (own[:, None] * own[None, :]).clamp(min=1e-30)).clamp(0, 1)
