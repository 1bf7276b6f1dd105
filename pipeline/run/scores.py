"""Scores that compare sets of feature vectors [n, d]: pure functions, in float64, on one device.

pipeline/run/metrics.py says what they are called. Memory is linear in n: kernel and distance matrices are
computed block by block. All scores but `kid` depend on the number of
vectors, so compare scores of equal counts only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_BLOCK = 2048  # rows of the kernel matrix at once: 2048 x 2048 in float64 is 32 MiB
_ROWS = 1 << 14  # of features in float64 at once: of 2048 each, 256 MiB
_ROUNDING = 1e-12  # relative to |x|² + |y|²: below it, |x − y|² from a matrix product is rounding
_SAME = 1e-4  # of features' length: nearer are those of one image, computed in batches of other sizes
_CLOSEST = 0.01  # of held-out images; a fake that is nearer to a training image than they are is a copy


def kid(real: Tensor, fake: Tensor) -> float:
    """Kernel distance of two sets of features [n, d], n ≥ 2, unbiased (Bińkowski et al. 2018).

    The squared maximum mean discrepancy under the cubic kernel (x·y/d + 1)³, as the U-statistic over all
    pairs: without random subsets, so it is deterministic. As it is unbiased, it is near 0, on either side,
    for sets from one distribution, and negative for identical sets. The paper's KID has Inception features.
    """
    if real.ndim != 2 or real.shape != fake.shape or len(real) < 2:
        raise ValueError(
            f"two sets of n ≥ 2 equally long vectors, not {list(real.shape)}, {list(fake.shape)}"
        )
    real, fake = real.double(), fake.double()
    n = len(real)
    within = _sum_of_pairs(real) + _sum_of_pairs(fake)
    across = torch.stack(
        [_kernel(x, y).sum() for x in torch.split(real, _BLOCK) for y in torch.split(fake, _BLOCK)]
    ).sum()
    return float(within / (n * (n - 1)) - 2 * across / n**2)


def frechet(real: Tensor, fake: Tensor) -> float:
    """Fréchet distance of the normal distributions fitted to two sets (Heusel et al. 2017).

    |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½, with Σ = RᵀR from a QR decomposition: the last trace is then
    the sum of the singular values of R₁R₂ᵀ, which is also exact for fewer vectors than dimensions, where
    roots of covariance matrices are not. It falls as n grows: compare equal counts only.
    """
    (mean_1, root_1), (mean_2, root_2) = _moments(real), _moments(fake)
    spread = root_1.square().sum() + root_2.square().sum()
    overlap = torch.linalg.svdvals(root_1 @ root_2.T).sum()
    return float((mean_1 - mean_2).square().sum() + spread - 2 * overlap)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019): the share of fakes that lie among the real
    images, and of real images that lie among the fakes. Among a set means: within the distance of any member
    to its k-th nearest other member."""
    real, fake = real.double(), fake.double()
    return _share_among(fake, real, k), _share_among(real, fake, k)


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020): the mean number of real images' neighbourhoods that a fake
    lies in, over k (1 for equal distributions, without upper limit); and the share of real images with a fake
    in their neighbourhood."""
    real, fake = real.double(), fake.double()
    radii = _radii(real, k)
    inside = covered = 0
    for rows, near in _distances(real, fake):
        within = near < radii[rows, None]
        inside, covered = inside + int(within.sum()), covered + int(within.any(dim=1).sum())
    return inside / (k * len(fake)), covered / len(real)


def memorisation(train: Tensor, heldout: Tensor, fake: Tensor) -> tuple[float, float]:
    """How near fakes come to training images, compared with held-out images, which cannot be copies.

    Returns the ratio of the median distances to the nearest training image, fakes' over held-out images'
    (well below 1: suspiciously near; above: odd fakes), and the share of fakes that are nearer than all but
    the nearest hundredth of held-out images (0.01: like new images; 1: copies). Held-out images that are
    among the training images too are not counted in that hundredth; NaN if all are.
    """
    of_heldout, of_fakes = _nearest(heldout.double(), train), _nearest(fake.double(), train)
    squares = torch.cat([part.double().square().sum(dim=1) for part in torch.split(train, _ROWS)])
    apart = of_heldout[of_heldout > _SAME * squares.mean().sqrt()]
    copies = (of_fakes < apart.quantile(_CLOSEST)).double().mean() if len(apart) else torch.nan
    return float(of_fakes.median() / of_heldout.median()), float(copies)


FUNCTIONS: dict[str, Callable[..., float | tuple[float, ...]]] = {
    "kid": kid,
    "fd": frechet,
    "pr": precision_recall,
    "dc": density_coverage,
    "nn": memorisation,
}
"""Of each of METRICS: (real, fake), or (train, held-out, fake) for those that need training images, each
[n, d] → a value per name."""


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x·y/d + 1)³ of all pairs of rows of x [n, d] and y [m, d] → [n, m]."""
    return (x @ y.T * (1.0 / x.shape[1]) + 1.0) ** 3


def _sum_of_pairs(features: Tensor) -> Tensor:
    """Σ k(xᵢ, xⱼ) over i ≠ j. By symmetry, blocks above the diagonal count twice."""
    blocks = torch.split(features, _BLOCK)
    total = features.new_zeros(())
    for i, x in enumerate(blocks):
        own = _kernel(x, x)
        total += own.sum() - own.diagonal().sum()
        for y in blocks[i + 1 :]:
            total += 2 * _kernel(x, y).sum()
    return total


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d], and R [min(n, d), d] with RᵀR the unbiased covariance. By blocks: n may be a million."""
    blocks = torch.split(features, _ROWS)
    mean = torch.stack([block.double().sum(dim=0) for block in blocks]).sum(dim=0) / len(features)
    root = features.new_empty(0, features.shape[1], dtype=torch.float64)
    for block in blocks:
        root = torch.linalg.qr(torch.cat([root, block.double() - mean]), mode="r").R
    return mean, root / (len(features) - 1) ** 0.5


def _distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Euclidean distances from blocks of rows of x to all of y: (slice of x, [rows, len(y)]).

    Exactly 0 between equal rows, which matters if a set holds an image several times.
    """
    step = max(1, _BLOCK**2 // len(y))
    squares = y.square().sum(dim=1)
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        near = torch.cdist(x[rows], y, compute_mode="use_mm_for_euclid_dist")
        largest = x[rows].square().sum(dim=1, keepdim=True) + squares
        yield rows, near.masked_fill_(near.square() < _ROUNDING * largest, 0)


def _radii(x: Tensor, k: int) -> Tensor:
    """The distance of each vector to its k-th nearest other one [n], or to the last if there are fewer."""
    return torch.cat([near.kthvalue(min(k + 1, len(x)), dim=1).values for _, near in _distances(x, x)])


def _share_among(x: Tensor, members: Tensor, k: int) -> float:
    radii = _radii(members, k)
    among = torch.cat([(near <= radii).any(dim=1) for _, near in _distances(x, members)])
    return float(among.double().mean())


def _nearest(x: Tensor, pool: Tensor) -> Tensor:
    """The distance of each vector of x to the nearest of `pool` [len(x)]. By blocks, as _moments."""
    nearest = x.new_full((len(x),), torch.inf)
    for part in torch.split(pool, _ROWS):
        for rows, near in _distances(x, part.double()):
            nearest[rows] = torch.minimum(nearest[rows], near.min(dim=1).values)
    return nearest
