"""The trials of `shardgan select`, each a run folder like any other, and which of them would not compare."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from operator import attrgetter
from pathlib import Path

from launch.select.candidates import Arm
from pipeline.config import Config, UserError, dump, load
from pipeline.config_layers import as_override
from pipeline.run import checkpoint
from pipeline.run.folder import as_begun, check_same, finished, finished_at
from pipeline.wording import in_kimg

# Settings that decide what scores are against, and those that select itself sets in each trial.
_FIXED = (
    *("run.total_kimg", "score", "data.train", "data.size", "data.channels", "data.decoder"),
    *("data.stages", "data.window", "data.holdout", "data.folds", "data.fold"),
    *("run.name", "run.out", "run.seed", "run.resume", "run.new_settings", "run.new_data"),
)
_HINTS = {
    "run.seed": "use --seeds",
    "data.folds": "use --folds",
    "data.fold": "each fold is held out in turn",
    "run.name": "each is named after its values",
}
_SCORES = 5  # of a trial along its way, the last at its end
_IMAGES_PER_SCORED = 20  # shown to D between two scores, for each image that a score generates


@dataclass(frozen=True)
class Trial:
    """One training: an arm, with one seed, and one part of the data held out."""

    arm: Arm
    seed: int
    fold: int
    config: Config
    arguments: tuple[str, ...]  # for pipeline.train

    @property
    def name(self) -> str:
        return str(self.config.run.name)

    @property
    def folder(self) -> Path:
        return Path(self.config.run.out) / self.name

    @property
    def place(self) -> tuple[int, int]:
        """What it has in common with trials of other arms."""
        return self.seed, self.fold

    @property
    def done(self) -> bool:
        return finished(self.folder, self.config)


@dataclass(frozen=True)
class LaunchOptions:
    """How each trial is launched."""

    strategy: str = "single"
    procs: int = 1
    precision: str = "no"
    compiled: bool = False


def refuse(subject: str, changes: Iterable[str], remedy: str = "Set these as before") -> None:
    """Raises UserError if there are changes, `key: before → now` each, after which scores do not compare."""
    if changed := "; ".join(changes):
        raise UserError(
            f"{subject} ({changed}): scores would not compare. {remedy}, or give the selection another "
            "run.name."
        )


def trials(
    path: str, overrides: Sequence[str], candidates: Sequence[Arm], folds: int, seeds: int
) -> tuple[Config, list[Trial]]:
    """The base config and all trials, fold by fold, so that those done first compare.

    Raises UserError, before anything is started, for an arm that cannot be trained or compared.
    """
    base = load_base(path, overrides, candidates)
    folder = Path(base.run.out) / str(base.run.name)
    if not base.run.resume:
        raise UserError(
            "run.resume=false: the trials of a selection are always resumed. To start over, leave it out and "
            "give the selection another run.name."
        )
    for key in ("new_settings", "new_data"):
        if getattr(base.run, key):
            raise UserError(
                f"run.{key}=true: all trials of a selection are trained alike, from start to end. "
                "Leave it out, and give a selection with other settings or data another run.name."
            )
    if base.data.folds is not None:
        raise UserError(
            f"data.folds={base.data.folds}: `select` cuts the data by itself. Leave data.folds and data.fold "
            "out (null in a config), and give --folds."
        )
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} is a run; give the selection another run.name.")
    _check_effective(candidates, overrides)
    check_comparable(base, {arm: _loaded(path, overrides, arm) for arm in candidates})
    found = _trials(path, overrides, base, candidates, folds, seeds)
    if any(as_begun(trial.config, trial.folder).ema != trial.config.ema for trial in found):
        # The selection began without ema.rampup: trials with it would not compare with those.
        found = _trials(path, [*overrides, "ema.rampup=0"], base, candidates, folds, seeds)
    return base, found


def _loaded(path: str, overrides: Sequence[str], arm: Arm) -> Config:
    try:
        return load(path, [*overrides, *arm.settings])
    except UserError as error:
        raise UserError(f"{arm.name}: {error}") from None


def load_base(path: str, overrides: Sequence[str], candidates: Sequence[Arm]) -> Config:
    """The config without what candidates change; with the settings of the first, if it is valid only with a
    value of theirs, as augment.ops is with augment.p. Raises UserError."""
    try:
        return load(path, overrides)
    except UserError:
        if not candidates:
            raise
        return load(path, [*overrides, *candidates[0].settings])


def _trials(
    path: str, overrides: Sequence[str], base: Config, candidates: Sequence[Arm], folds: int, seeds: int
) -> list[Trial]:
    """Raises UserError for one whose folder holds something else."""
    folder = Path(base.run.out) / str(base.run.name)
    rhythm = _rhythm(base)
    found = []
    for seed, fold, arm in product(range(base.run.seed, base.run.seed + seeds), range(folds), candidates):
        arguments = (
            *rhythm,
            *overrides,
            *arm.settings,
            f"run.seed={seed}",
            f"data.folds={folds}",
            f"data.fold={fold}",
            as_override("run.out", str(folder / "trials")),
            as_override("run.name", f"{arm.slug},seed={seed},fold={fold}"),
            as_override("track.group", str(base.track.group or base.run.name)),
        )
        trial = Trial(arm, seed, fold, load(path, arguments), (path, *arguments))
        _check_folder(trial)
        found.append(trial)
    return found


def _rhythm(base: Config) -> tuple[str, ...]:
    """How often a trial reports, which settings on the command line override: the config's own values suit a
    training that someone watches.

    A trial is scored five times, or fewer times where scores would take long; at ticks, as a tick between
    would make augmentation adapt.
    """
    apart = max(base.run.total_kimg / _SCORES, _IMAGES_PER_SCORED * base.score.images / 1000)
    eval_kimg = base.run.tick_kimg * math.ceil(apart / base.run.tick_kimg - 1e-9)
    eval_kimg = eval_kimg if eval_kimg < base.run.total_kimg else 1e9  # at the end alone
    return "run.snapshot_kimg=1e9", f"run.eval_kimg={eval_kimg:.9g}", "run.keep=1"


def _check_effective(candidates: Sequence[Arm], overrides: Sequence[str]) -> None:
    """Refuse a setting on the command line that a grid overrides in every trial."""
    keys = list(candidates[0].values)
    replaced = set[str]().union(*map(_both_players, keys))
    for given in (setting.partition("=")[0].strip() for setting in overrides):
        if _both_players(given) <= replaced:
            others = sorted(replaced - {given}) if given not in keys else []
            hint = f", or vary the other player alone: --grid {others[0]}=…" if len(others) == 1 else ""
            raise UserError(
                f"{given} on the command line has no effect, as --grid {', '.join(keys)} sets it in every "
                f"trial. Leave it out{hint}."
            )


def _both_players(key: str) -> set[str]:
    """penalty.l2 sets penalty.G.l2 and penalty.D.l2."""
    section, _, name = key.partition(".")
    return (
        {f"penalty.{p}.{name}" for p in "GD"}
        if section == "penalty" and name in ("l2", "l1", "on")
        else {key}
    )


def check_comparable(base: Config, resolved: Mapping[Arm, Config]) -> None:
    """Refuse arms that are one training or have one name, and those that change what scores are against."""
    seen: dict[str, Arm] = {}
    for arm, config in resolved.items():
        other = seen.setdefault(dump(config), arm)
        if other != arm:
            raise UserError(f"{other.name} and {arm.name} are the same settings. Leave one of them out.")
        for key in (key for key in _FIXED if attrgetter(key)(base) != attrgetter(key)(config)):
            hint = _HINTS.get(key, "set it for all, behind CONFIG")
            raise UserError(
                f"{arm.name}: {key} cannot differ between trials, whose scores would not compare; {hint}."
            )
    slugs = [arm.slug for arm in resolved]
    if clash := {slug for slug in slugs if slugs.count(slug) > 1}:
        raise UserError(f"Two arms would be called {clash.pop()}.")


def _check_folder(trial: Trial) -> None:
    """Refuse a folder of this name that holds another trial, or one of another length."""
    try:
        check_same(trial.config, trial.folder)
    except UserError as error:  # its last line is the remedy for a single run
        what = str(error).splitlines()[:-1]
        raise UserError("\n".join([*what, "Give the selection another run.name."])) from None
    due, saved = _length(trial.config), checkpoint.find(trial.folder / "checkpoints")
    if trial.done:
        found = finished_at(trial.folder)
        changes = [f"run.total_kimg: {in_kimg(found / 1000)} → {in_kimg(due / 1000)}"] if found != due else []
        refuse(f"{trial.name} is finished, at another length", changes)
    elif saved and saved[0] > due:  # it would be resumed, end at once and be scored there
        kimg = in_kimg(saved[0] / 1000)
        refuse(
            f"{trial.name} is already at kimg {kimg}",
            [f"run.total_kimg: {in_kimg(due / 1000)}"],
            f"Set run.total_kimg to at least {kimg}",
        )


def _length(config: Config) -> int:
    """Images that a run has shown to D when it is done: whole updates, the last of which passes the total."""
    step = config.images_per_update
    return math.ceil(math.ceil(config.run.total_kimg * 1000) / step) * step
