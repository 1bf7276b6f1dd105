"""Statistics of training: accumulated on the device without waiting for it, reduced once per tick."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest

import torch

from pipeline.parallel.engine import Contribution, sent
from pipeline.parallel.ranks import Ranks
from pipeline.run.state import PartialSums

_TOGETHER = 32  # reports of a name that wait
_Report = tuple[torch.Tensor, tuple[float, ...]]  # a scalar and its factors: see Contribution


@dataclass(frozen=True)
class Reduced:
    """A tick's statistics over all ranks, the same on each."""

    values: dict[str, float]  # chart name → value
    sums: dict[str, tuple[float, float]]  # chart name → what its value is the ratio of: total, weight
    updates: dict[str, float]  # chart name → how many updates it is the mean of
    each: dict[str, list[float]]  # a name in `mine` → its value on every rank
    broken: dict[str, list[int]]  # chart name → ranks that reported something not finite


class Stats:
    """Running totals since the last tick: chart name → (sum over this rank, weight on this rank).

    Reports wait until a name has come often enough, and are then added in their order, in one launch per
    update and type for all names together.
    """

    def __init__(self, device: torch.device, reports: int = 1) -> None:
        """reports: how often something averaged is reported in one update, over all ranks and rounds."""
        self._device, self._reports = device, float(reports)
        self._waiting: dict[str, list[_Report]] = {}
        self._places: dict[str, int] = {}  # where in the totals a name is
        self._totals = torch.zeros(0, dtype=torch.float64, device=device)
        self._weights: dict[str, float] = {}
        self._units: dict[str, float] = {}  # what the weights of one update come to, over all ranks

    def mean(self, name: str, value: torch.Tensor) -> None:
        """Average a scalar over everything that reports it: rounds, updates, ranks."""
        self.add({name: Contribution(value.detach(), 1.0, self._reports)})

    def scores(self, real: torch.Tensor, fake: torch.Tensor, paired: bool = False) -> None:
        """Charts the means of D's logits [N] on real and fake images, and how often D says real, as the mean
        sign; if paired, also how often it prefers the i-th real to the i-th fake. Both of one type. Of signs,
        the sums are exact."""
        given = {"real": real.detach(), "fake": fake.detach()}
        if paired:
            given["paired"] = given["real"] - given["fake"]
        table = real.new_empty(2, len(given), len(real))
        torch.stack([*given.values()], out=table[0])
        torch.sign(table[0], out=table[1])
        sums = table.flatten(0, 1).sum(1, dtype=torch.float32)
        names = [f"Loss/{chart}/{of}" for chart in ("scores", "signs") for of in given]
        weight = float(len(real))
        for name, value in zip(names, sums.unbind(), strict=True):
            self.add({name: Contribution(value, weight, weight * self._reports)})

    def add(self, shares: Mapping[str, Contribution]) -> None:
        """Add this rank's contributions: scalars, which must not change afterwards."""
        for name, share in shares.items():
            if self._units.setdefault(name, share.unit) != share.unit:
                self._rescale(name, share.unit)  # from a checkpoint of another world or strategy
            if len(self._waiting.get(name, ())) == _TOGETHER:
                self._add_waiting()
            value = share.total.to(self._device, non_blocking=True)
            self._waiting.setdefault(name, []).append((value, share.factors))
            self._weights[name] = self._weights.get(name, 0.0) + share.weight

    def reduce(self, ranks: Ranks, mine: Mapping[str, float]) -> Reduced:
        """What all ranks have reported since the last call, and every rank's values of `mine`.

        Collective, one all-reduce; another if a sum is not finite, to find the ranks. All ranks must have
        reported the same names, as they do when all run the same updates.
        """
        self._add_waiting()
        names, own = sorted(self._places), sorted(mine)
        count, world = len(names), ranks.world
        table = torch.zeros(2 * count + len(own) * world, dtype=torch.float64, device=self._device)
        totals = self._totals[[self._places[name] for name in names]] if names else self._totals
        table[:count] = totals
        weights = [self._weights[name] for name in names]
        table[count : 2 * count] = torch.tensor(weights, dtype=torch.float64)
        per_rank = table[2 * count :].view(len(own), world)
        per_rank[:, ranks.rank] = torch.tensor([mine[name] for name in own], dtype=torch.float64)
        reduced: list[float] = ranks.sum(table).tolist()
        sums = {name: (reduced[i], reduced[count + i]) for i, name in enumerate(names)}
        broken = {} if all(map(math.isfinite, reduced[:count])) else _broken(names, totals, ranks)
        units = dict(self._units)
        self._totals = self._totals[:0]
        for kept in (self._places, self._weights, self._units):
            kept.clear()
        rows = [reduced[start : start + world] for start in range(2 * count, len(reduced), world)]
        return Reduced(
            values=_complete({name: total / weight for name, (total, weight) in sums.items()}),
            sums=sums,
            updates={name: reduced[count + i] / units[name] for i, name in enumerate(names)},
            each=dict(zip(own, rows, strict=True)),
            broken=broken,
        )

    def state(self) -> PartialSums:
        """What has been accumulated since the last tick on this rank, for a checkpoint."""
        self._add_waiting()
        totals = zip(self._places, self._totals.tolist(), strict=True)
        return {name: (total, self._weights[name], self._units[name]) for name, total in totals}

    def load(self, ranks: Ranks, saved: Sequence[PartialSums]) -> None:
        """Load what `state` returned on each rank; in another world the first rank gets all of it."""
        if len(saved) == ranks.world:
            mine = saved[ranks.rank]
        else:
            names = sorted({name for sums in saved for name in sums})
            parts = {name: [sums[name] for sums in saved if name in sums] for name in names}
            share = 1.0 if ranks.main else 0.0
            mine = {
                name: (share * sum(t for t, _, _ in all_), share * sum(w for _, w, _ in all_), all_[0][2])
                for name, all_ in parts.items()
            }
        self._places = {name: place for place, name in enumerate(mine)}
        totals = [total for total, _, _ in mine.values()]
        self._totals = torch.tensor(totals, dtype=torch.float64, device=self._device)
        self._weights = {name: weight for name, (_, weight, _) in mine.items()}
        self._units = {name: unit for name, (_, _, unit) in mine.items()}

    def _add_waiting(self) -> None:
        """Add to each name's total its reports, one after another: neighbours of one dtype together."""
        waiting, self._waiting = self._waiting, {}
        new = sorted(waiting.keys() - self._places, key=lambda name: (str(waiting[name][0][0].dtype), name))
        if new:
            self._places |= {name: place for place, name in enumerate(new, start=len(self._places))}
            self._totals = torch.cat([self._totals, self._totals.new_zeros(len(new))])
        ordered = sorted((self._places[name], values) for name, values in waiting.items())
        runs: dict[torch.dtype, list[tuple[int, list[_Report]]]] = {}  # (place of the first, reports)
        for number in range(max(map(len, waiting.values()), default=0)):
            layer = enumerate((place, values[number]) for place, values in ordered if number < len(values))
            for (_, dtype), run in groupby(layer, lambda at: (at[1][0] - at[0], at[1][1][0].dtype)):
                reports = [report for _, report in run]
                runs.setdefault(dtype, []).append((reports[0][0], [value for _, value in reports]))
        for alike in runs.values():
            lengths = [len(values) for _, values in alike]
            parts = torch.split(self._stacked([each for _, values in alike for each in values]), lengths)
            for (start, values), part in zip(alike, parts, strict=True):
                self._totals[start : start + len(values)].add_(part)

    def _stacked(self, reports: list[_Report]) -> torch.Tensor:
        values = torch.stack([value for value, _ in reports])
        if factors := [*zip_longest(*(factors for _, factors in reports), fillvalue=1.0)]:
            table = sent(torch.tensor(factors, dtype=torch.float64), self._device)
            for each in table.unbind():
                values.mul_(each)
        return values

    def _rescale(self, name: str, unit: float) -> None:
        """Make earlier reports weigh as much per update as those of now."""
        factor = unit / self._units[name]
        self._totals[self._places[name]].mul_(factor)
        self._weights[name] *= factor
        self._units[name] = unit


def _broken(names: Sequence[str], totals: torch.Tensor, ranks: Ranks) -> dict[str, list[int]]:
    """The ranks on which a total is not finite, for each name of which there are any. Collective."""
    found = ranks.gather((~totals.isfinite())[None].double()).T.tolist()  # [names, ranks]
    rows = {
        name: [rank for rank, flag in enumerate(row) if flag] for name, row in zip(names, found, strict=True)
    }
    return {name: row for name, row in rows.items() if row}


def _place(chart: str) -> tuple[bool, bool, str]:
    """Where a part of a loss is in its sum, whose rounding depends on the order."""
    return not chart.endswith("/adversarial"), not chart.endswith("/l2_penalty"), chart


def _complete(values: dict[str, float]) -> dict[str, float]:
    """Add each player's loss, the sum of its parts, and turn squared norms into norms."""
    for player in ("D", "G"):
        # All that the player reports under Loss/ is part of it; a lazy penalty is 0 in updates without it.
        parts = sorted((name for name in values if name.startswith(f"Loss/{player}/")), key=_place)
        if parts:
            values[f"Loss/{player}/loss"] = sum(values[part] for part in parts)
        gradient, penalty = f"Gradients/{player}/norm", f"Gradients/{player}/penalty"
        for name in values:
            if name in (gradient, penalty) or name.startswith(f"Weights/{player}/norm"):
                values[name] = math.sqrt(values[name])
        if values.get(gradient) and penalty in values:
            values[f"{penalty}_share"] = values[penalty] / values[gradient]
    return values
