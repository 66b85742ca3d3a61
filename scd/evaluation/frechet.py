"""Frechet distance between two sets of features, taken as Gaussians.

    distance = |mean_1 - mean_2|^2 + trace(cov_1 + cov_2 - 2 (cov_1 cov_2)^(1/2))

Source: Dowson and Landau, "The Frechet distance between multivariate normal distributions"; for
pictures: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule".
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from scd.evaluation.image import Estimate, bootstrap_draws, centred_estimate


def frechet_distance(
    mean: Float[Tensor, "*r d"],
    covariance: Float[Tensor, "*r d d"],
    other_mean: Float[Tensor, "*r d"],
    other_covariance: Float[Tensor, "*r d d"],
) -> Float[Tensor, "*r"]:
    """Return the distance of Gaussians, 0 or more; covariances may be singular."""
    root = _root(covariance)
    # The eigenvalues of cov_1 cov_2 are those of this symmetric product, which stay real and whose
    # rounding errors below 0 can be cut off.
    inner = root @ other_covariance @ root
    shared = torch.linalg.eigvalsh((inner + inner.mT) / 2).clamp(min=0).sqrt().sum(-1)
    traces = sum(one.diagonal(dim1=-2, dim2=-1).sum(-1) for one in (covariance, other_covariance))
    apart = (mean - other_mean).square().sum(-1)
    return (apart + traces - 2 * shared).clamp(min=0)


def _root(covariance: Float[Tensor, "*r d d"]) -> Float[Tensor, "*r d d"]:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT


def frechet_of_sets(
    features: Float[Tensor, "num d"], other: Float[Tensor, "num_other d"]
) -> Float[Tensor, ""]:
    """Return the distance between two sets of two samples or more, with unbiased covariances.

    The same as `frechet_distance` of their moments, without ever forming a covariance: of 256
    samples with 400 features each only products of 256 by 256 are decomposed.
    """
    if min(len(features), len(other)) < 2:
        raise ValueError(
            f"a Frechet distance needs two samples or more, got {len(features)} and {len(other)}"
        )
    means, factors = zip(*map(_factor, (features.double(), other.double())), strict=True)
    # The singular values of F G^T are the roots of the eigenvalues of F^T F G^T G.
    shared = torch.linalg.svdvals(factors[0] @ factors[1].mT).sum()
    traces = factors[0].square().sum() + factors[1].square().sum()
    return ((means[0] - means[1]).square().sum() + traces - 2 * shared).clamp(min=0)


def _factor(values: Float[Tensor, "num d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, "rows d"]]:
    """Return the mean and a matrix F with as few rows as may be, the covariance being F^T F."""
    mean = values.mean(0)
    centred = (values - mean) / (len(values) - 1) ** 0.5
    if len(values) > values.shape[1]:
        centred = torch.linalg.qr(centred, mode="r").R
    return mean, centred


def frechet_estimate(
    features: Float[Tensor, "b m d"], other: Float[Tensor, "b m2 d"], seed: int = 0
) -> Estimate:
    """Estimate the distance between features of the same clips by two sources, and its interval.

    Every frame of every clip is one sample; `features` may have several predictions of each frame
    of `other`. Clips are resampled, of both sides alike.
    """
    moments = torch.stack([_moments(features), _moments(other)], dim=1)
    return centred_estimate(*bootstrap_draws(moments, _distance_of_moments, seed))


def _moments(features: Float[Tensor, "b m d"]) -> Float[Tensor, "b entries d"]:
    """Return each clip's mean and mean outer product, row by row: they average over clips."""
    values = features.double()
    products = torch.einsum("bmi,bmj->bij", values, values) / values.shape[1]
    return torch.cat([values.mean(1, keepdim=True), products], dim=1)


def _distance_of_moments(moments: Float[Tensor, "r 2 entries d"]) -> Float[Tensor, " r"]:
    mean, products = moments[:, :, 0], moments[:, :, 1:]
    covariance = products - mean[..., :, None] * mean[..., None, :]
    return frechet_distance(mean[:, 0], covariance[:, 0], mean[:, 1], covariance[:, 1])
