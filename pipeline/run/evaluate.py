"""Scores of generated images against real ones, by chart name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat

import torch
from torch import Tensor, nn

from pipeline.gan.draws import Draws
from pipeline.parallel.ranks import Ranks
from pipeline.run.features import Extractor
from pipeline.run.images import MADE_AT_ONCE, PLAIN, Images
from pipeline.run.metrics import METRICS
from pipeline.run.references import References
from pipeline.run.scores import FUNCTIONS, frechet

FULL = 50_000  # generated images of fid50k_full

Generate = Callable[[int, int], Tensor]
"""(start, count) → images uint8 [count, C, H, W] of latents start … start + count - 1 of a fixed list."""


def evaluate(
    generate: Generate,
    real: References,
    extractor: Extractor,
    ranks: Ranks,
    metrics: Sequence[str] = ("kid",),
    *,
    batch: int = 64,
) -> dict[str, float]:
    """Scores of as many generated images as there are held-out ones, against these.

    If `real` has training images, also against them, under names ending in `_train`. All ranks call this;
    each calls `generate` equally often, with the same counts and within the list, as a sharded generator
    needs. The result is the same on every rank and, but for rounding, in any world.

    Args:
        generate: see `Generate`; its images are on `ranks.device`.
        real: of the same extractor.
        extractor: on `ranks.device`.
        metrics: of `METRICS`.
        batch: images generated at once on each rank.
    """
    fake = _fake_features(generate, len(real.heldout), extractor, ranks, batch)
    heldout, train = real.heldout, real.train
    found = _compare(heldout.to(fake.device), fake, extractor, metrics)
    if train is not None:
        train = train.to(fake.device)
        count = min(len(train), len(fake))  # equal counts, so that both scores compare
        against = _compare(train[:count], fake[:count], extractor, metrics)
        found |= {f"{name}_train": value for name, value in against.items()}
        for name in metrics:
            if METRICS[name].needs_train:
                found |= _named(name, extractor, train, heldout.to(fake.device), fake)
        found[f"{extractor.name}_train_images"] = len(train)
    found |= {f"{extractor.name}_real_images": len(heldout), f"{extractor.name}_fake_images": len(fake)}
    return {f"Metrics/{name}": value for name, value in found.items()}


def _compare(real: Tensor, fake: Tensor, extractor: Extractor, metrics: Sequence[str]) -> dict[str, float]:
    """The scores of two sets of features."""
    found: dict[str, float] = {}
    for name, metric in METRICS.items():
        if name in metrics and not metric.needs_train:
            found |= _named(name, extractor, real, fake)
    return found


def _named(metric: str, extractor: Extractor, *features: Tensor) -> dict[str, float]:
    values = FUNCTIONS[metric](*features)
    names = METRICS[metric].charts(extractor.name, extractor.canonical)
    return dict(zip(names, values if isinstance(values, tuple) else (values,), strict=True))


def from_latents(
    G: Callable[[Tensor, Tensor | None], Tensor],
    z: Tensor,
    c: Tensor | None,
    device: torch.device,
    images: Images = PLAIN,
    at_once: int = MADE_AT_ONCE,
) -> Generate:
    """Images of a whole G on `device` from fixed latents z [n, z_dim] and labels c [n].

    images: makes them of what G makes. at_once: how many G makes in one pass (`made_at_once`).
    """

    @torch.no_grad()
    def generate(start: int, count: int) -> Tensor:
        part = slice(start, start + count)
        labels = repeat(None) if c is None else torch.split(c[part], at_once)
        pairs = zip(torch.split(z[part], at_once), labels, strict=False)
        made = [G(some.to(device), None if of is None else of.to(device)) for some, of in pairs]
        return images(torch.cat(made))

    return generate


def evaluate_generator(
    G: nn.Module,
    draws: Draws,
    real: References,
    extractor: Extractor,
    ranks: Ranks,
    metrics: Sequence[str],
    images: Images = PLAIN,
    at_once: int = MADE_AT_ONCE,
) -> dict[str, float]:
    """`evaluate` for a whole G on `ranks.device`, with the same latents at every evaluation.

    With all training images and the features that FID is defined with, it adds `fid50k_full`, the number that
    papers report (Karras et al. 2020): 50,000 generated images against all training images.
    """
    fakes = fixed_images(G, draws, len(real.heldout), ranks.device, images, at_once)
    found = evaluate(fakes, real, extractor, ranks, metrics)
    if extractor.canonical and "fd" in metrics and real.train is not None and real.all_of_train:
        many = fixed_images(G, draws, FULL, ranks.device, images, at_once)
        features = _fake_features(many, FULL, extractor, ranks, batch=64)
        found["Metrics/fid50k_full"] = frechet(real.train.to(features.device), features)
    return found


def fixed_images(
    G: nn.Module,
    draws: Draws,
    count: int,
    device: torch.device,
    images: Images = PLAIN,
    at_once: int = MADE_AT_ONCE,
) -> Generate:
    """Images for scores: of the same latents and labels at every evaluation of a run."""
    drawn = draws.fixed("score", count)
    return from_latents(G, drawn.z, drawn.c, device, images, at_once)


def _fake_features(generate: Generate, images: int, extractor: Extractor, ranks: Ranks, batch: int) -> Tensor:
    """Features [images, d] in the list's order: rank r generates the r-th of `world` equal slices."""
    share = -(-images // ranks.world)
    parts = []
    for offset in range(0, share, batch):
        count = min(batch, share - offset)
        start = ranks.rank * share + offset
        # The last ranks' slices may reach beyond the list; other images of it are the padding.
        inside = max(0, min(start, images - count))
        features = extractor(generate(inside, count))
        parts.append(features.roll(inside - start, dims=0) if inside != start else features)
    return ranks.gather(torch.cat(parts))[:images]
