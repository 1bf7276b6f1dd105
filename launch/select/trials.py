"""The trials of `shardgan select`: which there are, each a run folder like any other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from launch.select.candidates import Arm
from pipeline import config
from pipeline.config import Config, UserError
from pipeline.run.folder import DONE, check_same, finished

# Settings that decide what scores are against, and those that select itself gives to each trial.
_FIXED = (
    "score",
    "data.train",
    "data.size",
    "data.channels",
    "data.stages",
    "data.window",
    "data.holdout",
    "data.folds",
    "data.fold",
)
_OURS = ("run.name", "run.out", "run.seed", "run.resume")


@dataclass(frozen=True)
class Trial:
    """One training: an arm, with one seed, and one part of the data held out."""

    arm: Arm
    seed: int
    fold: int
    settings: Config
    arguments: tuple[str, ...]  # for pipeline.train

    @property
    def name(self) -> str:
        return str(self.settings.run.name)

    @property
    def folder(self) -> Path:
        return Path(self.settings.run.out) / self.name

    @property
    def place(self) -> tuple[int, int]:
        """What it has in common with trials of other arms."""
        return self.seed, self.fold

    @property
    def done(self) -> bool:
        return finished(self.folder, self.settings)


@dataclass(frozen=True)
class Launch:
    """How each trial is launched."""

    strategy: str = "single"
    procs: int = 1
    precision: str = "no"


def trials(
    path: str, overrides: Sequence[str], candidates: Sequence[Arm], folds: int, seeds: int
) -> tuple[Config, list[Trial]]:
    """The base config and all trials, fold by fold, so that those that are done first compare.

    Raises UserError, before anything is started, for an arm that cannot be trained or compared.
    """
    base = config.load(path, overrides)
    folder = Path(base.run.out) / str(base.run.name)
    if not base.run.resume:
        raise UserError(
            "run.resume=false: the trials of a selection are always resumed. To start over, leave it out and "
            "give the selection another run.name."
        )
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} is a run; give the selection another run.name.")
    slugs = [arm.slug for arm in candidates]
    if clash := {slug for slug in slugs if slugs.count(slug) > 1}:
        raise UserError(f"Two arms would be called {clash.pop()}.")
    for arm in candidates:
        _check_comparable(arm, base, config.load(path, [*overrides, *arm.settings]))
    made = []
    for seed, fold, arm in product(range(base.run.seed, base.run.seed + seeds), range(folds), candidates):
        arguments = (
            *overrides,
            *arm.settings,
            f"run.seed={seed}",
            f"data.folds={folds}",
            f"data.fold={fold}",
            f"run.out='{folder / 'trials'}'",
            f"run.name='{arm.slug},seed={seed},fold={fold}'",
            f"track.group='{base.track.group or base.run.name}'",
        )
        trial = Trial(arm, seed, fold, config.load(path, arguments), (path, *arguments))
        _check_same(trial)
        made.append(trial)
    return base, made


def _check_comparable(arm: Arm, base: Config, changed: Config) -> None:
    for key in (*_FIXED, *_OURS):
        before, after = base, changed
        for part in key.split("."):
            before, after = getattr(before, part), getattr(after, part)
        if before != after:
            hint = "use --seeds" if key == "run.seed" else "set it for all, behind CONFIG"
            raise UserError(
                f"{arm.name}: {key} cannot differ between trials, whose scores would not compare; {hint}."
            )


def _check_same(trial: Trial) -> None:
    """Refuse what is there already under this name but is another trial, or one of another length."""
    try:
        check_same(trial.settings, trial.folder)
    except UserError as error:  # whose last line is the cure for a single run
        what = str(error).splitlines()[:-1]
        raise UserError("\n".join([*what, "Give the selection another run.name."])) from None
    if not trial.done:
        return
    found, due = float((trial.folder / DONE).read_text().split()[0]), _length(trial.settings)
    if found != due:
        raise UserError(
            f"{trial.name} is finished at kimg {found / 1000:g}, where this config would end at kimg "
            f"{due / 1000:g}: trials of different length do not compare. Set run.total_kimg as before, or "
            "give the selection another run.name."
        )


def _length(settings: Config) -> int:
    """Images that a run has been shown when it is done: whole updates, the last of which passes the total."""
    step = settings.images_per_update
    return math.ceil(math.ceil(settings.run.total_kimg * 1000) / step) * step
