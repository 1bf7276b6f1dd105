"""What is checked before the first trial of `shardgan select` starts: what one refuses, all would."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from launch.processes import check_compiling, check_space
from launch.select import files
from launch.select.local import shares
from launch.select.ranges import Axis
from launch.select.trials import LaunchOptions, Trial, refuse
from pipeline.config import Config, UserError
from pipeline.data.index import Index, load_index
from pipeline.data.plan import split_of
from pipeline.data.stream import check_images
from pipeline.gan.networks import check_networks
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.compilation import check_compiled
from pipeline.run import checkpoint
from pipeline.run.features import Extractor, load_features
from pipeline.run.folder import reference_of
from pipeline.run.images import Images, images_of
from pipeline.run.references import differences
from pipeline.run.report import say
from pipeline.run.resume import first_state
from pipeline.run.source import open_source

_COMMON = "selection.json"


def common(
    trials: Sequence[Trial], launch: LaunchOptions, searched: Sequence[Axis] | None = None
) -> dict[str, Any]:
    """What all trials of a selection share besides the config, now and later. searched: axes of a search, in
    their order, as proposals depend on it and on run.seed."""
    keys = [f"--grid {key}" for key in trials[0].arm.values] or ["--arms"]
    return {
        "candidates": keys if searched is None else [f"--search tpe {axis.text}" for axis in searched],
        "strategy": launch.strategy,
        "procs": launch.procs,
        "precision": launch.precision,
        "compiled": launch.compiled,
    } | ({} if searched is None else {"run.seed": trials[0].config.run.seed})


def check_common(folder: Path, now: dict[str, Any]) -> None:
    """Refuse to add to a selection what would not compare with it. Raises UserError."""
    file = folder / _COMMON
    try:
        before = json.loads(file.read_text()) if file.exists() else {}
        changes = [
            f"{key}: {_text(before[key])} → {_text(now[key])}"
            for key in now
            if before.get(key, now[key]) != now[key]
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {error}. Give the selection another run.name.") from None
    refuse(f"{folder} holds a selection made in another way", changes)


def _text(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def write_common(folder: Path, now: dict[str, Any]) -> None:
    """Later commands on the same folder must agree with it. Raises UserError."""
    check_common(folder, now)
    files.write(folder / _COMMON, json.dumps(now, indent=1) + "\n")


def check(base: Config, trials: Sequence[Trial], launch: LaunchOptions, jobs: int | None) -> None:
    """Refuse, once, what would end every trial. Raises UserError.

    jobs: trials at a time on this machine; None: on others, which may compile what this one cannot. An arm
    whose networks cannot be built is refused only if all are alike: else it is tried, and reported as failed.
    """
    todo = [trial for trial in trials if not trial.done]
    if launch.compiled:
        check_compiled(launch.strategy)
    if todo:
        if jobs is not None:
            shares(launch, min(jobs, len(todo)))
            if launch.compiled:
                check_compiling(launch.strategy)
        for trial in todo:
            try:
                batch_shape(trial.config.data, launch.procs)
            except UserError as error:
                raise UserError(f"{trial.arm.name}: {error}") from None
        check_space(Path(base.run.out))
    assert base.data.train is not None
    index = load_index(base.data.train, say, base.data.remote)
    check_images(index, base.data)
    images = images_of(base.data, torch.device("cpu"))
    if todo:
        _check_networks(todo, index)
        _warn_of_sources(todo, index)
    _check_references(trials, index, _features(base.score.features), images)


def _check_networks(todo: Sequence[Trial], index: Index) -> None:
    """Raises UserError if no arm's networks can be built."""
    refused = []
    for trial in {trial.arm.name: trial for trial in todo}.values():
        try:
            check_networks(trial.config, index.num_classes if trial.config.data.conditional else 0)
            return
        except UserError as error:
            refused.append(error)
    raise refused[-1]


def _warn_of_sources(todo: Sequence[Trial], index: Index) -> None:
    """Say once if trials are to start from a run that was trained on what they hold out. Raises UserError if
    what run.init names is not there."""
    new = [t for t in todo if t.config.run.init and not checkpoint.find(t.folder / "checkpoints")]
    for init in dict.fromkeys(str(trial.config.run.init) for trial in new):
        source = open_source(init)
        mine = {trial.place: trial.config for trial in new if trial.config.run.init == init}
        states = (first_state(config, index, split_of(config, index)) for config in mine.values())
        if any(map(source.was_split_otherwise, states)):
            say(
                f"warning: {source.where} may have been trained on images that trials hold out, so scores "
                "flatter all candidates that start from it: compare them with one another alone, or set "
                "run.init to a run on other data"
            )


def _features(name: str) -> Extractor:
    try:
        return load_features(name)
    except (OSError, ImportError) as error:
        raise UserError(
            f"score.features={name} cannot be loaded: {error}. Install what it needs, or set others."
        ) from None


def _check_references(trials: Sequence[Trial], index: Index, extractor: Extractor, images: Images) -> None:
    """Raises UserError if a finished trial was scored against other images than new ones would be."""
    plans = {trial.place: split_of(trial.config, index).heldout() for trial in trials}
    for plan in plans.values():
        if plan.size < 2:
            raise UserError(
                f"{plan.size} images are held out, too few to compare with. Use fewer --folds or more images."
            )
    for trial in (trial for trial in trials if trial.done):
        plan, before = plans[trial.place], reference_of(trial.folder).get("heldout")
        now = {
            "index": index.fingerprint,
            "plan": plan.fingerprint,
            "pixels": images.version,
            "features": [extractor.name, extractor.version],
            "images": min(trial.config.score.images, plan.size),
        }
        if before is not None:
            refuse(
                f"{trial.name} is finished, scored against other images or by other features",
                differences({"heldout": {key: before.get(key) for key in now}}, {"heldout": now}),
                "Set data.train, score.images and score.features as before",
            )
