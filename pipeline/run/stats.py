"""Statistics of training: accumulated on the device without waiting for it, reduced once per tick."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from pipeline.parallel.engine import Share
from pipeline.parallel.ranks import Ranks
from pipeline.run.state import PartialSums

LOSS_PARTS = ("adversarial", "l2_penalty", "l1_penalty", "r1_penalty")


class Stats:
    """Running totals since the last tick: chart name → (sum over this rank, weight on this rank)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._totals: dict[str, torch.Tensor] = {}
        self._weights: dict[str, float] = {}

    def mean(self, name: str, value: torch.Tensor) -> None:
        """Average a scalar over everything that reports it: rounds, updates, ranks."""
        self.add({name: Share(value.detach(), 1.0)})

    def scores(self, of: str, logits: torch.Tensor) -> None:
        """D's mean logit on some images, and on real ones how often it says real (as the mean sign)."""
        logits = logits.detach().float()
        self.mean(f"Loss/scores/{of}", logits.mean())
        if of == "real":
            self.mean("Loss/signs/real", logits.sign().mean())

    def add(self, shares: Mapping[str, Share]) -> None:
        """Add each rank's share of some statistics."""
        for name, share in shares.items():
            if name in self._totals:
                self._totals[name] += share.total
                self._weights[name] += share.weight
            else:
                self._totals[name] = share.total.to(self._device, torch.float64, copy=True)
                self._weights[name] = share.weight

    def reduce(
        self, ranks: Ranks, mine: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Start afresh; returns chart name → value over all ranks, and for each of `mine` every rank's value.

        Collective, one all-reduce. All ranks must have reported the same names, as they do when all run
        the same updates.
        """
        names, own = sorted(self._totals), sorted(mine)
        table = torch.zeros(2 * len(names) + len(own) * ranks.world, dtype=torch.float64, device=self._device)
        if names:
            table[: len(names)] = torch.stack([self._totals[name] for name in names])
            weights = [self._weights[name] for name in names]
            table[len(names) : 2 * len(names)] = torch.tensor(weights, dtype=torch.float64)
        per_rank = table[2 * len(names) :].view(len(own), ranks.world)
        per_rank[:, ranks.rank] = torch.tensor([mine[name] for name in own], dtype=torch.float64)
        reduced: list[float] = ranks.sum(table).tolist()
        self._totals.clear()
        self._weights.clear()
        count, world = len(names), ranks.world
        values = {name: reduced[i] / reduced[count + i] for i, name in enumerate(names)}
        rest = reduced[2 * count :]
        everyone = {name: rest[i * world : (i + 1) * world] for i, name in enumerate(own)}
        return _complete(values), everyone

    def state(self) -> PartialSums:
        """What has been accumulated since the last tick on this rank, for a checkpoint."""
        return {name: (float(total), self._weights[name]) for name, total in self._totals.items()}

    def load(self, ranks: Ranks, saved: Sequence[PartialSums]) -> None:
        """Put back what `state` gave on each rank; in another world the first rank takes over all of it."""
        if len(saved) == ranks.world:
            mine = saved[ranks.rank]
        else:
            names = sorted({name for sums in saved for name in sums})
            pairs = {name: [sums[name] for sums in saved if name in sums] for name in names}
            mine = {
                name: (sum(t for t, _ in all_), sum(w for _, w in all_)) if ranks.main else (0.0, 0.0)
                for name, all_ in pairs.items()
            }
        for name, (total, weight) in mine.items():
            self._totals[name] = torch.tensor(total, dtype=torch.float64, device=self._device)
            self._weights[name] = weight


def _complete(values: dict[str, float]) -> dict[str, float]:
    """Add each player's loss, the sum of its parts, and turn squared norms into norms."""
    for player in ("D", "G"):
        # A lazily applied penalty counts 0 in the updates without it, so that the parts always add up.
        parts = [values[f"Loss/{player}/{part}"] for part in LOSS_PARTS if f"Loss/{player}/{part}" in values]
        if parts:
            values[f"Loss/{player}/loss"] = sum(parts)
        for norm in (f"Gradients/{player}/norm", f"Weights/{player}/norm"):
            if norm in values:
                values[norm] = math.sqrt(values[norm])
    return values
