"""Candidates that a search proposes, a batch at a time, by the scores of those before: optuna's TPE.

A batch is a function of the ranges, the seed and those scores: nothing of the sampler is kept. So a search
that was killed proposes what it would have. search.json lists what was proposed, as another version of optuna
may propose something else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np

from launch.select import files
from launch.select.candidates import Arm, arm_of
from launch.select.choice import Row
from launch.select.ranges import Axis, axes_of, own_value
from launch.select.trials import Trial, check_comparable, trials
from pipeline.config import Config, UserError, load
from pipeline.plugins import require

_FILE = "search.json"
_RANDOM = 5  # candidates with a score before TPE has anything to go by
_ATTEMPTS = 50  # at a candidate that was not there before
_COMBINATIONS = 200  # of ends that are checked, so that it takes seconds


@dataclass
class Search:
    """What has been proposed, and what comes next."""

    axes: Sequence[Axis]
    own: dict[str, str]  # key → the config's own value
    count: int  # candidates in all, as far as there are so many
    batch: int  # proposed at a time
    seed: int
    folder: Path
    trials_of: Callable[[Sequence[Arm]], list[Trial]]
    candidates: list[Arm] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Slurm reserves an array for each batch, also for those that nothing would be left for."""
        there = math.prod(axis.size for axis in self.axes)
        if any(axis.penalty for axis in self.axes):
            first = self._without()  # it may lie beside the ranges
            there += any(axis.read(first.values[axis.key]) is None for axis in self.axes)
        self.count = int(min(self.count, there))

    def read(self) -> list[Trial]:
        """The trials of what was proposed before, or of the first batch. Raises UserError."""
        try:
            content = json.loads((self.folder / _FILE).read_text("utf-8"))
            self.batch = int(content["at_once"])
            self.candidates = [arm_of({str(k): str(v) for k, v in c.items()}) for c in content["candidates"]]
        except FileNotFoundError:
            self.candidates = []
            self.candidates = self._next([])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            file = self.folder / _FILE
            raise UserError(f"{file} cannot be read: {error}. Restore it, or remove it.") from None
        return self.trials_of(self.candidates)

    def write(self) -> None:
        """Raises UserError."""
        content = {"at_once": self.batch, "candidates": [dict(arm.values) for arm in self.candidates]}
        files.write(self.folder / _FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def propose(self, rows: Sequence[Row]) -> list[Arm]:
        """The next candidates, now that those in `rows` have ended; none at the end of the search.

        Raises UserError for one that the config does not take.
        """
        more = self._next(rows)
        if more:
            self.trials_of(more)  # what the config refuses is not written down, to be read at every start
            self.candidates += more
            self.write()
        return more

    @property
    def batches(self) -> list[int]:
        """Sizes of the batches that are still to be proposed."""
        left = max(0, self.count - len(self.candidates))
        return [min(self.batch, left - start) for start in range(0, left, self.batch)]

    def _next(self, rows: Sequence[Row]) -> list[Arm]:
        size = min(self.batch, self.count - len(self.candidates))
        found = [] if self.candidates or not any(axis.penalty for axis in self.axes) else [self._without()]
        if size > len(found):
            found += self._ask(rows, size - len(found), [*self.candidates, *found])
        return found[: max(0, size)]

    def _without(self) -> Arm:
        """λ = 0, and the config's own values of all else."""
        return arm_of({axis.key: "0" if axis.penalty else self.own[axis.key] for axis in self.axes})

    def _spelled(self, arm: Arm) -> tuple[str, ...]:
        """Its values as the lists have them."""
        return tuple(axis.spelled(arm.values[axis.key]) for axis in self.axes)

    def _ask(self, rows: Sequence[Row], count: int, known: Sequence[Arm]) -> list[Arm]:
        """So many candidates that are not `known`; fewer if there are no more."""
        optuna = require("optuna", "search", "--search tpe")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        seed = int(np.random.SeedSequence([self.seed, len(self.candidates)]).generate_state(1)[0])
        # The constant liar: those that were asked for before, and have no score, count as bad.
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=_RANDOM, multivariate=True, constant_liar=True, seed=seed
        )
        study = optuna.create_study(sampler=sampler)
        space = {axis.key: axis.distribution(optuna.distributions) for axis in self.axes}
        for params, score in self._scored(rows):
            study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=score))
        found: list[Arm] = []
        taken = set(map(self._spelled, known))
        for _ in range(_ATTEMPTS * count):
            params = study.ask(space).params
            arm = arm_of({axis.key: axis.written(params[axis.key]) for axis in self.axes})
            if (values := self._spelled(arm)) not in taken:
                taken.add(values)
                found.append(arm)
            if len(found) == count:
                break
        return found

    def _scored(self, rows: Sequence[Row]) -> Iterator[tuple[dict[str, Any], float]]:
        """Values and mean score of each within the ranges; one of which a trial failed counts as the worst of
        the others."""
        means = {row.arm: row.mean for row in rows if row.outcomes and not row.failures and not row.pending}
        worst = max(means.values(), default=math.nan)
        for row in rows:
            values = {axis.key: axis.read(row.arm.values[axis.key]) for axis in self.axes}
            score = means.get(row.arm, worst if row.failures else math.nan)
            if None not in values.values() and math.isfinite(score):
                yield values, score


def _check_ends(base: Config, config: str, settings: Sequence[str], axes: Sequence[Axis]) -> None:
    """Raises UserError, before anything starts, for ends that the config does not take together, or whose
    trials would not compare."""
    resolved: dict[Arm, Config] = {}
    for combination in islice(product(*(axis.ends for axis in axes)), _COMBINATIONS):
        arm = arm_of({axis.key: end for axis, end in zip(axes, combination, strict=True)})
        try:
            resolved[arm] = load(config, [*settings, *arm.settings])
        except UserError as error:
            raise UserError(f"The search may propose {arm.name}. {error}") from None
    check_comparable(base, resolved)


def search(
    config: str, settings: Sequence[str], ranges: Sequence[str], count: int, jobs: int, folds: int, seeds: int
) -> tuple[Config, Search]:
    """The base config, and a search in it. ranges: of --grid. count: candidates.

    Raises UserError for ranges that cannot be read, or whose ends the config does not take or do not compare.
    """
    require("optuna", "search", "--search tpe")
    base = load(config, settings)
    axes = axes_of(ranges, base)
    _check_ends(base, config, settings, axes)
    own = {axis.key: axis.spelled(own_value(axis.key, base) or axis.ends[0]) for axis in axes}
    folder = Path(base.run.out) / str(base.run.name)

    def trials_of(candidates: Sequence[Arm]) -> list[Trial]:
        return trials(config, settings, candidates, folds, seeds)[1]

    return base, Search(axes, own, count, jobs, base.run.seed, folder, trials_of)
