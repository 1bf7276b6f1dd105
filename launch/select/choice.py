"""Which candidate to choose: the scores of its trials, compared in pairs of the same fold and seed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, variance

from launch.select.candidates import Arm
from launch.select.trials import Trial

PAIRED, UNPAIRED = RULES = ("paired", "unpaired")
SEARCHED = "search"  # of the candidates whose trials have all finished, the best mean
LAMBDA = re.compile(r"penalty\.([GD]\.)?l[12]")


@dataclass(frozen=True)
class Outcome:
    """One finished trial."""

    trial: Trial
    score: float  # the one to choose by
    last: Mapping[str, float]  # the row of metrics.jsonl with that score
    seconds: float  # of training
    by_kimg: Mapping[float, float] = field(default_factory=dict)  # budget → score there; the end included

    @property
    def place(self) -> tuple[int, int]:
        return self.trial.place


@dataclass(frozen=True)
class Row:
    """One arm: its finished trials, how others failed, and those that are not done."""

    arm: Arm
    outcomes: Sequence[Outcome]
    failures: Mapping[str, str]
    pending: Sequence[str] = ()  # count neither for nor against it

    @property
    def mean(self) -> float:
        return fmean(o.score for o in self.outcomes) if self.outcomes else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean; nan if no seed has two folds."""
        return _error((o.trial.seed, o.score) for o in self.outcomes)

    @property
    def seconds(self) -> float:
        return sum(o.seconds for o in self.outcomes)

    def at(self, kimg: float) -> Row:
        """As if training had ended there; trials without a score there are still to come."""
        scored = [replace(o, score=o.by_kimg[kimg]) for o in self.outcomes if kimg in o.by_kimg]
        lacking = [o.trial.name for o in self.outcomes if kimg not in o.by_kimg]
        return Row(self.arm, scored, self.failures, [*self.pending, *lacking])

    def chart(self, name: str) -> float:
        """The mean over trials of a chart's last value; nan if there is none."""
        values = [o.last[name] for o in self.outcomes if name in o.last]
        return fmean(values) if values else math.nan

    def against(self, other: Row) -> tuple[float, float]:
        """Mean difference to another arm over the trials both have finished, and its standard error."""
        theirs = {o.place: o.score for o in other.outcomes}
        both = [o for o in self.outcomes if o.place in theirs]
        differences = [(o.trial.seed, o.score - theirs[o.place]) for o in both]
        return (fmean(d for _, d in differences) if both else math.nan), _error(differences)


@dataclass(frozen=True)
class ScoreTable:
    """All arms, and the choice by the trials (seed and fold) that all have finished: only they compare."""

    score: str  # as in the charts, without "Metrics/"
    rows: Sequence[Row]
    rule: str = PAIRED

    @property
    def comparable(self) -> list[Row]:
        """The arms, each with those of its trials that all have finished. An arm with failed trials is left
        out unless it has these; of a search, one that lacks any."""
        if self.rule == SEARCHED:
            return [row for row in self.rows if row.outcomes and not row.failures and not row.pending]
        done = {row.arm: {o.place for o in row.outcomes} for row in self.rows}
        intact = [done[row.arm] for row in self.rows if not row.failures] or list(done.values())
        common = set[tuple[int, int]].intersection(*intact) if intact else set()
        return [
            Row(row.arm, [o for o in row.outcomes if o.place in common], row.failures, row.pending)
            for row in self.rows
            if common and common <= done[row.arm]
        ]

    @property
    def seen(self) -> dict[Arm, Row]:
        """What is shown of each arm: the trials that are compared, or all its own if it is left out."""
        return {row.arm: row for row in [*self.rows, *self.comparable]}

    @property
    def left_out(self) -> list[Row]:
        """The arms that are not compared, because trials of theirs failed."""
        compared = {row.arm for row in self.comparable}
        return [row for row in self.rows if row.failures and row.arm not in compared] if compared else []

    @property
    def plane(self) -> tuple[list[str], list[str]] | None:
        """Of a grid over two keys, the values of each, from small to large if all are numbers; else None."""
        arms = [row.arm for row in self.rows]
        keys = list(arms[0].values)
        if self.rule == SEARCHED or len(keys) != 2:
            return None
        first, second = (_in_order(key, arms) for key in keys)
        return (first, second) if min(len(first), len(second)) > 1 else None

    @property
    def budgets(self) -> list[float]:
        """kimg at which trials have been scored, the end included."""
        return sorted({kimg for row in self.rows for o in row.outcomes for kimg in o.by_kimg})

    def at(self, kimg: float) -> ScoreTable:
        """As if every training had ended there."""
        return replace(self, rows=[row.at(kimg) for row in self.rows])

    @property
    def lines(self) -> dict[Arm, dict[float, Row]]:
        """The learning curve of each arm: at each budget, of the trials that all have scored there."""
        then = {kimg: {row.arm: row for row in self.at(kimg).comparable} for kimg in self.budgets}
        return {
            row.arm: {kimg: there[row.arm] for kimg, there in then.items() if row.arm in there}
            for row in self.rows
        }

    @property
    def by_budget(self) -> list[tuple[float, Row]]:
        """(kimg, what would be chosen there), for each budget at which there is anything to choose by."""
        found = ((kimg, self.at(kimg).choice) for kimg in self.budgets)
        return [(kimg, choice) for kimg, choice in found if choice is not None]

    def shown(self, most: int, also: Sequence[Arm] = ()) -> list[Row]:
        """The arms with finished trials, as far as they are compared; of more than `most` of a search, the
        first and the best, and `also` these, in the order of `rows`."""
        compared, seen = {row.arm for row in self.comparable}, self.seen
        rows = [seen[row.arm] for row in self.rows if row.outcomes]
        if self.rule != SEARCHED or len(rows) <= most:
            return rows
        best = sorted(rows[1:], key=lambda row: (row.arm not in compared, row.mean))[: most - 1]
        kept = {rows[0].arm, *also, *(row.arm for row in best)}
        return [row for row in rows if row.arm in kept]

    @property
    def minimum(self) -> Row | None:
        """The lowest mean; among equal ones the largest λ, or else the first listed."""
        return min(self.comparable, key=lambda row: (row.mean, -self._lambda(row)), default=None)

    @property
    def choice(self) -> Row | None:
        """The largest λ within one standard error of the best; the best if candidates differ in anything
        else."""
        best = self.minimum
        if best is None or self.penalty is None:
            return best
        return max([best, *self.within], key=self._lambda)

    @property
    def within(self) -> list[Row]:
        """The arms other than the best whose distance from it is at most one standard error."""
        best = self.minimum
        others = [row for row in self.comparable if best and row.arm != best.arm]
        return [row for row in others if best and row.mean - best.mean <= self._allowed(row)]

    def _allowed(self, row: Row) -> float:
        """How far an arm's mean may be above the best one's: by one standard error, 0 if there is none.

        By the unpaired rule it is that of the best one's mean, in which folds that differ hide a loss in each
        of them. By the paired rule it may not exceed that of the difference, over pairs of the same fold and
        seed, either. That one alone would not do: a failure in one fold makes it as large as the loss.
        """
        best = self.minimum
        if best is None or math.isnan(best.error):
            return 0
        return best.error if self.rule == UNPAIRED else min(best.error, row.against(best)[1])

    @property
    def penalty(self) -> str | None:
        """The key of the one λ whose values, all numbers, are the candidates; None if they are anything else.
        Only a larger λ is known to regularise more. None in a search, whose values are not a grid."""
        if self.rule == SEARCHED:
            return None
        keys = {key for row in self.rows for key in row.arm.values}
        key = keys.pop() if len(keys) == 1 else ""
        numbers = all(row.arm.number(key) is not None for row in self.rows) if key else False
        return key if numbers and LAMBDA.fullmatch(key) else None

    def _lambda(self, row: Row) -> float:
        return (row.arm.number(self.penalty) if self.penalty else None) or 0


def _in_order(key: str, arms: Sequence[Arm]) -> list[str]:
    """The values of a key."""
    values = {arm.values[key]: arm.number(key) for arm in arms}
    return list(values) if None in values.values() else sorted(values, key=lambda text: values[text] or 0)


def _error(values: Iterable[tuple[int, float]]) -> float:
    """Standard error of the mean of (seed, value), a value for each fold.

    That of the folds of one seed, as a root mean square over seeds: each seed cuts the data into folds of its
    own, and all trainings share most of their images, so more seeds are not taken for more observations. Or
    that of the seeds' means if it is larger: all folds of a seed start from the same weights, so only other
    seeds show what these do.
    """
    by_seed: dict[int, list[float]] = {}
    for seed, value in values:
        by_seed.setdefault(seed, []).append(value)
    within = [variance(of_seed) / len(of_seed) for of_seed in by_seed.values() if len(of_seed) > 1]
    means = [fmean(of_seed) for of_seed in by_seed.values()]
    between = variance(means) / len(means) if len(means) > 1 else 0.0
    return math.sqrt(max(fmean(within), between)) if within else math.nan
