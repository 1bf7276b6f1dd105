"""Which candidate to choose: the scores of its trials, compared in pairs of the same fold and seed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from launch.select.candidates import Arm
from launch.select.trials import Trial

PAIRED, UNPAIRED = RULES = ("paired", "unpaired")
_LAMBDA = re.compile(r"penalty\.([GD]\.)?l[12]")


@dataclass(frozen=True)
class Outcome:
    """One finished trial."""

    trial: Trial
    score: float  # the one to choose by
    last: Mapping[str, float]  # the row of metrics.jsonl with that score
    seconds: float  # of training

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
        """Standard error of the mean over trials; nan for fewer than two."""
        return _error([o.score for o in self.outcomes])

    @property
    def seconds(self) -> float:
        return sum(o.seconds for o in self.outcomes)

    def chart(self, name: str) -> float:
        """The mean over trials of a chart's last value; nan if there is none."""
        values = [o.last[name] for o in self.outcomes if name in o.last]
        return fmean(values) if values else math.nan

    def against(self, other: Row) -> tuple[float, float]:
        """Mean difference to another arm over the trials both have finished, and its standard error."""
        theirs = {o.place: o.score for o in other.outcomes}
        differences = [o.score - theirs[o.place] for o in self.outcomes if o.place in theirs]
        return (fmean(differences) if differences else math.nan), _error(differences)


@dataclass(frozen=True)
class ScoreTable:
    """All arms, and the choice by the trials (seed and fold) that all have finished: only they compare."""

    score: str  # as in the charts, without "Metrics/"
    rows: Sequence[Row]
    rule: str = PAIRED

    @property
    def comparable(self) -> list[Row]:
        """The arms, each with those of its trials that all have finished. An arm with failed trials is left
        out unless it has these."""
        done = {row.arm: {o.place for o in row.outcomes} for row in self.rows}
        intact = [done[row.arm] for row in self.rows if not row.failures] or list(done.values())
        common = set[tuple[int, int]].intersection(*intact) if intact else set()
        return [
            Row(row.arm, [o for o in row.outcomes if o.place in common], row.failures, row.pending)
            for row in self.rows
            if common and common <= done[row.arm]
        ]

    @property
    def left_out(self) -> list[Row]:
        """The arms that are not compared, because trials of theirs failed."""
        compared = {row.arm for row in self.comparable}
        return [row for row in self.rows if row.arm not in compared] if compared else []

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
        """The arms other than the best whose distance from it is at most one standard error.

        By the paired rule that is the error of the difference over pairs of the same fold and seed; by the
        unpaired one, that of the best one's own mean.
        """
        best = self.minimum
        return [row for row in self.comparable if best and row.arm != best.arm and self._is_within(row, best)]

    @property
    def penalty(self) -> str | None:
        """The key of the one λ whose values, all numbers, are the candidates; None if they are anything else.
        Only a larger λ is known to regularise more."""
        keys = {key for row in self.rows for key in row.arm.values}
        key = keys.pop() if len(keys) == 1 else ""
        numbers = all(row.arm.number(key) is not None for row in self.rows) if key else False
        return key if numbers and _LAMBDA.fullmatch(key) else None

    def _is_within(self, row: Row, best: Row) -> bool:
        if self.rule == PAIRED:
            difference, error = row.against(best)
        else:
            difference, error = row.mean - best.mean, best.error
        return difference <= (0 if math.isnan(error) else error)

    def _lambda(self, row: Row) -> float:
        return (row.arm.number(self.penalty) if self.penalty else None) or 0


def _error(values: Sequence[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
