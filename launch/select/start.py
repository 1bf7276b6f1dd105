"""What is looked at before the first trial of `shardgan select` starts: what one refuses, all would."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from launch.processes import check_space
from launch.select import files
from launch.select.run import shares
from launch.select.trials import LaunchOptions, Trial
from pipeline.config import Config, UserError
from pipeline.data.index import Index, load_index
from pipeline.data.plan import HeldOutPlan, split_of
from pipeline.data.stream import check_images
from pipeline.gan.networks import check_networks
from pipeline.parallel.batch import batch_shape
from pipeline.run.features import Extractor, load_features
from pipeline.run.folder import reference_of
from pipeline.run.references import differences
from pipeline.run.report import say

_COMMON = "selection.json"


def common(trials: Sequence[Trial], launch: LaunchOptions) -> dict[str, Any]:
    """What all trials of a selection share beside the config, now and later."""
    given = trials[0].arm.values
    return {
        "candidates": [f"--grid {key}" for key in given] or ["--arms"],
        "strategy": launch.strategy,
        "procs": launch.procs,
        "precision": launch.precision,
    }


def check_common(folder: Path, now: dict[str, Any]) -> None:
    """Refuse to add to a selection what would not compare with it. Raises UserError."""
    file = folder / _COMMON
    try:
        before = json.loads(file.read_text()) if file.exists() else {}
        changed = [
            f"{key} {before[key]} → {now[key]}" for key in now if before.get(key, now[key]) != now[key]
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {error}. Give the selection another run.name.") from None
    if changed:
        raise UserError(
            f"{folder} holds a selection made in another way ({'; '.join(changed)}), whose trials do not "
            "stand beside these. Give this one another run.name."
        )


def note_common(folder: Path, now: dict[str, Any]) -> None:
    """For later commands on the same folder, which are held to it. Raises UserError."""
    check_common(folder, now)
    files.write(folder / _COMMON, json.dumps(now, indent=1) + "\n")


def check(base: Config, trials: Sequence[Trial], launch: LaunchOptions, jobs: int | None) -> None:
    """Refuse, once, what every trial would end with. Raises UserError.

    jobs: so many at a time on this machine; None: on others. An arm that cannot be built is not refused
    among others that can: it is tried, and told as failed.
    """
    todo = [trial for trial in trials if not trial.done]
    if todo:
        if jobs is not None:
            shares(launch, min(jobs, len(todo)))
        for trial in todo:
            _check_batch(trial, launch.procs)
        check_space(Path(base.run.out))
    assert base.data.train is not None
    index = load_index(base.data.train, say, base.data.remote)
    check_images(index, base.data)
    if todo:
        _check_networks(todo, index)
    _check_references(trials, index, _features(base.score.features))


def _check_batch(trial: Trial, procs: int) -> None:
    try:
        batch_shape(trial.settings.data, procs)
    except UserError as error:
        raise UserError(f"{trial.arm.name}: {error}") from None


def _check_networks(todo: Sequence[Trial], index: Index) -> None:
    """Raises UserError if no arm's networks can be built."""
    for trial in {trial.arm.name: trial for trial in reversed(todo)}.values():
        try:
            check_networks(trial.settings, index.num_classes if trial.settings.data.conditional else 0)
        except UserError as error:
            refused = error
        else:
            return
    raise refused


def _features(name: str) -> Extractor:
    try:
        return load_features(name)
    except (OSError, ImportError) as error:
        raise UserError(
            f"score.features={name} cannot be loaded: {error}. Install what it needs, or set others."
        ) from None


def _check_references(trials: Sequence[Trial], index: Index, extractor: Extractor) -> None:
    """Raises UserError if a trial is finished whose score is against other images than new ones would be."""

    @cache
    def plan(place: tuple[int, int]) -> HeldOutPlan:
        trial = next(trial for trial in trials if trial.place == place)
        return split_of(trial.settings, index).heldout()

    for place in dict.fromkeys(trial.place for trial in trials):
        if plan(place).size < 2:
            raise UserError(
                f"{plan(place).size} images are held out, too few to compare with. Use fewer --folds, or "
                "more images."
            )
    for trial in trials:
        before = reference_of(trial.folder).get("heldout")
        if not trial.done or before is None:
            continue
        now = {
            "index": index.fingerprint,
            "plan": plan(trial.place).fingerprint,
            "features": [extractor.name, extractor.version],
            "images": min(trial.settings.score.images, plan(trial.place).size),
        }
        changed = differences({"heldout": {key: before.get(key) for key in now}}, {"heldout": now})
        if changed:
            raise UserError(
                f"{trial.name} is finished, and was scored against other images or by other features than "
                f"this config says ({'; '.join(changed)}): new scores would not compare. Set data.train, "
                "score.images and score.features as before, or give the selection another run.name."
            )
