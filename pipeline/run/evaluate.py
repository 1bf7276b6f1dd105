"""How far generated images are from held-out real ones, as one number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.config import Data
from pipeline.data.index import Index
from pipeline.data.plan import HeldOutPlan
from pipeline.data.stages import load_stages
from pipeline.data.stream import heldout_batches
from pipeline.gan.draws import Draws
from pipeline.gan.images import to_uint8
from pipeline.parallel.ranks import CommonError, Ranks
from pipeline.run.cache import read_tensor, write_tensor
from pipeline.run.features import Extractor

Generate = Callable[[int, int], Tensor]
"""(start, count) → images uint8 [count, C, H, W] of the latents start … start + count - 1 of a fixed list."""

_BLOCK = 2048  # rows of the kernel matrix at once: 2048 x 2048 in float64 is 32 MiB


def kid(real: Tensor, fake: Tensor) -> float:
    """Kernel distance of two sets of features [n, d], n ≥ 2, unbiased, in float64 (Bińkowski et al. 2018).

    The squared maximum mean discrepancy under the cubic kernel (x·y/d + 1)³, as the U-statistic over all
    pairs: no random subsets, so the same sets always give the same number. Being unbiased it is about 0,
    on either side, for sets from one distribution, and negative for identical sets. With Inception features
    this is the paper's KID; say which features it is of.

    Memory is linear in n: the kernel matrices are summed block by block.
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


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x·y/d + 1)³ of all pairs of rows of x [n, d] and y [m, d] → [n, m]."""
    from torchmetrics.image.kid import poly_kernel  # here, as it takes as long to import as half of torch

    return poly_kernel(x, y)


def _sum_of_pairs(features: Tensor) -> Tensor:
    """Σ k(xᵢ, xⱼ) over i ≠ j. The kernel is symmetric: blocks below the diagonal are those above it."""
    blocks = torch.split(features, _BLOCK)
    total = features.new_zeros(())
    for i, x in enumerate(blocks):
        own = _kernel(x, x)
        total += own.sum() - own.diagonal().sum()
        for y in blocks[i + 1 :]:
            total += 2 * _kernel(x, y).sum()
    return total


def evaluate(
    generate: Generate, real: Tensor, extractor: Extractor, ranks: Ranks, *, batch: int = 64
) -> dict[str, float]:
    """Scores of a generator: KID between as many generated images as there are real features.

    Every rank calls this, and each calls `generate` equally often, on the same counts and always within
    the list, as a sharded generator needs. The result is the same on every rank, and but for rounding in
    any world.

    Args:
        generate: see `Generate`; its images are on `ranks.device`, quantised by `grid.to_uint8`.
        real: float32 [n, d] from `heldout_features`, of the same extractor.
        extractor: on `ranks.device`.
        batch: images generated at once on each rank.
    """
    fake = _fake_features(generate, len(real), extractor, ranks, batch)
    name = f"Metrics/kid_{extractor.name}"
    return {
        name: kid(real.to(fake.device), fake),
        f"{name}_real_images": len(real),
        f"{name}_fake_images": len(fake),
    }


def heldout_features(
    extractor: Extractor,
    index: Index,
    plan: HeldOutPlan,
    ranks: Ranks,
    data: Data,
    images: int,
    *,
    batch: int = 64,
) -> Tensor:
    """Features of `images` held-out real images, or of all if there are fewer: float32 [n, extractor.dim].

    Computed once by all ranks together and kept in the cache folder, under everything they depend on. The
    same set on every rank and in any world; which comes first may differ.

    Raises UserError if fewer than two images are held out, or if a shard cannot be read.
    """
    images = min(images, plan.size)
    if images < 2:
        raise CommonError(
            f"{plan.size} images are held out, too few to compare with. Raise data.holdout (now "
            f"{data.holdout:g}) or use more images."
        )
    key = {
        "index": index.fingerprint,
        "plan": plan.fingerprint,
        "size": data.size,
        "channels": data.channels,
        "features": [extractor.name, extractor.version],
        "images": images,
    }
    kept = None if data.stages else read_tensor("features", key)  # a user's code may change
    # Where nodes have caches of their own, one may be without: then all compute, as all must take part.
    if not any(ranks.any(kept is None)()) and kept is not None:
        return kept.to(ranks.device)
    features = _real_features(extractor, index, plan, ranks, data, images, batch)
    if not data.stages:
        write_tensor("features", key, features)
    return features


def from_latents(G: nn.Module, z: Tensor, c: Tensor | None, device: torch.device) -> Generate:
    """The images of a fixed list of latents z [n, z_dim] and labels c [n], made by a whole G on `device`."""

    @torch.no_grad()
    def generate(start: int, count: int) -> Tensor:
        part = slice(start, start + count)
        return to_uint8(G(z[part].to(device), None if c is None else c[part].to(device)))

    return generate


def fixed_images(G: nn.Module, draws: Draws, images: int, device: torch.device) -> Generate:
    """The images that scores are taken of: the same latents and labels at every evaluation of a run."""
    drawn = draws.latents("score", 0, images)
    return from_latents(G, drawn.z, drawn.c, device)


def _real_features(
    extractor: Extractor, index: Index, plan: HeldOutPlan, ranks: Ranks, data: Data, images: int, batch: int
) -> Tensor:
    """Features [images, d] of the first held-out images, each once, rank by rank."""
    parts, valid = [], []
    batch = min(batch, -(-images // ranks.world))
    with ranks.agreeing():  # a shard that one rank cannot read ends all of them, before they wait for it
        for reals, count in heldout_batches(
            index,
            plan,
            batch=batch,
            rank=ranks.rank,
            world=ranks.world,
            size=data.size,
            channels=data.channels,
            conditional=False,
            limit=images,
            stages=load_stages(data.stages),
        ):
            features = torch.zeros(batch, extractor.dim, device=ranks.device)
            features[:count] = extractor(reals.images[:count].to(ranks.device))
            parts.append(features)
            valid.append(torch.arange(batch, device=ranks.device) < count)
    return ranks.gather(torch.cat(parts))[ranks.gather(torch.cat(valid))]


def _fake_features(generate: Generate, images: int, extractor: Extractor, ranks: Ranks, batch: int) -> Tensor:
    """Features [images, d] in the order of the list: rank r makes the r-th of `world` equal slices."""
    share = -(-images // ranks.world)
    parts = []
    for offset in range(0, share, batch):
        count = min(batch, share - offset)
        start = ranks.rank * share + offset
        # The last ranks' slices may reach beyond the list: there, any images of it do as padding.
        inside = max(0, min(start, images - count))
        features = extractor(generate(inside, count))
        parts.append(features.roll(inside - start, dims=0) if inside != start else features)
    return ranks.gather(torch.cat(parts))[:images]
