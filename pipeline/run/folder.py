"""The run folder: made once, found again by the same command, never written over."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import TypeAdapter

from pipeline import config
from pipeline.config import Config, Ema, UserError
from pipeline.durable import write
from pipeline.lock import HeldError, Lock, refuse_held, take
from pipeline.run.report import say

if TYPE_CHECKING:
    from pipeline.parallel.ranks import Ranks
    from pipeline.run.stop import StopSignals

DONE, STOPPED = "DONE", "STOPPED"  # how a run has ended
REFERENCE = "reference.json"  # what its scores are against

# What may change between a run and its continuation: how long, how often, where and how fast, not what.
_FREE = {
    "run": None,
    "track": None,
    "score": None,
    "data": {"train", "workers", "batch_gpu", "cache", "max_bad"},
}


def find_folder(settings: Config, announce: Callable[[str], None]) -> tuple[Config, Path]:
    """The folder of this run, there or not; and the config that it goes on with, under a new name with
    run.resume=false.

    Raises UserError when the folder holds a run of other settings.
    """
    settings = under_a_free_name(settings)
    folder = Path(settings.run.out) / str(settings.run.name)
    check_same(settings, folder)
    resumed = as_begun(settings, folder)
    if resumed != settings:
        announce(f"note: {folder} began without ema.rampup and continues without it")
    return resumed, folder


def claim_folder(
    settings: Config, say: Callable[[str], None], stopped: Callable[[], bool]
) -> tuple[Config, Path, Lock | None]:
    """`find_folder`, and hold the folder as the only training in it; a finished run is not held (None).

    say, stopped: see `take`. Raises UserError when another training is at work there, or as `find_folder`.
    """
    while True:
        resolved, folder = find_folder(settings, say)
        if finished(folder, resolved):
            return resolved, folder, None
        try:
            lock = take(folder, say, stopped=stopped)
        except HeldError as error:
            if settings.run.resume:
                raise _running(folder, error) from None
            continue  # another has begun under this name just now: the next one is free
        try:  # again: another may have begun, and ended, meanwhile
            check_same(resolved, folder)
        except UserError:
            lock.release()
            raise
        if finished(folder, resolved):
            lock.release()
            return resolved, folder, None
        return resolved, folder, lock


def hold_folder(
    config: Config, ranks: Ranks, signals: StopSignals, held: ExitStack
) -> tuple[Config, Path, Callable[[], None]]:
    """`claim_folder` on the main rank, until `held` is closed; also a check that it is still held."""
    locks: list[Lock] = []

    def claim() -> tuple[Config, Path]:
        resolved, folder, lock = claim_folder(config, say, lambda: signals.received is not None)
        if lock is not None:
            locks.append(held.enter_context(lock))
        return resolved, folder

    resolved, folder = ranks.broadcast_from_main(claim)
    return resolved, folder, locks[0].check if locks else lambda: None


def refuse_running(folder: Path) -> None:
    """Raises UserError if a training on this machine is at work in a run folder, which is all that can be
    seen at once."""
    try:
        refuse_held(folder)
    except HeldError as error:
        raise _running(folder, error) from None


def _running(folder: Path, error: HeldError) -> UserError:
    return UserError(
        f"{folder} is being trained by {error.holder}. Stop that training, or give this one another run.name."
    )


def open_folder(settings: Config, folder: Path, still_ours: Callable[[], None]) -> None:
    """Make the folder, or mark the run in it as going on, with the config that it goes on with: once it is
    certain that it can.

    still_ours: see Report. Raises UserError when the folder cannot be written.
    """
    still_ours()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STOPPED).unlink(missing_ok=True)
        if not finished(folder, settings):  # it was, of a shorter run that is now gone on with
            (folder / DONE).unlink(missing_ok=True)
        write(folder / "config.yaml", config.dump(settings))
    except OSError as error:
        raise UserError(f"The run folder {folder} cannot be written: {error}") from None


def under_a_free_name(settings: Config) -> Config:
    """With run.resume=false: under a name that no folder has, and to be resumed from then on."""
    if settings.run.resume:
        return settings
    name, number = str(settings.run.name), 2
    while (Path(settings.run.out) / name).exists():
        name, number = f"{settings.run.name}-{number}", number + 1
    return dataclasses.replace(settings, run=dataclasses.replace(settings.run, name=name, resume=True))


def reference_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Of each kind of score what a run's are against; {} if it has none yet, or they cannot be read."""
    try:
        found = json.loads((folder / REFERENCE).read_bytes())
    except (OSError, ValueError):
        return {}
    parts = found.items() if isinstance(found, dict) else ()
    return {part: about for part, about in parts if isinstance(about, dict)}


def as_begun(settings: Config, folder: Path) -> Config:
    """The settings, with ema.rampup off if the run in `folder` began without it and no other is asked for."""
    if not (folder / "config.yaml").exists() or settings.ema.rampup != Ema().rampup:
        return settings
    off = dataclasses.replace(settings.ema, rampup=0.0)
    return settings if begun(folder).ema.rampup else dataclasses.replace(settings, ema=off)


def begun(folder: Path) -> Config:
    """The config of the run in `folder`. One written before there was ema.rampup means none."""
    path = folder / "config.yaml"
    begun = config.load(path)
    if "rampup" in (yaml.safe_load(path.read_text("utf-8")).get("ema") or {}):
        return begun
    return dataclasses.replace(begun, ema=dataclasses.replace(begun.ema, rampup=0.0))


def check_same(settings: Config, folder: Path) -> None:
    """Refuse to continue a run with settings that would make it another run."""
    if not (folder / "config.yaml").exists():
        return
    before = _settings(begun(folder))
    now = _settings(as_begun(settings, folder))
    keys = dict.fromkeys([*before, *now])  # options of a user's class may come and go
    changed = [
        f"  {key}: {before.get(key)!r} → {now.get(key)!r}" for key in keys if before.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(
            "\n".join(
                [
                    f"{folder} holds a run with other settings:",
                    *changed,
                    "Give it another run.name, or set run.resume=false to start over under a new name.",
                ]
            )
        )


def finished(folder: Path, settings: Config) -> bool:
    """Whether the run in this folder got as far as the settings ask (which may be further than before)."""
    try:
        return float((folder / DONE).read_text().split()[0]) >= 1000 * settings.run.total_kimg
    except (OSError, ValueError, IndexError):
        return False


def _settings(settings: Config) -> dict[str, Any]:
    """Dotted key → value of everything that must not change between a run and its continuation."""
    flat: dict[str, Any] = {}
    for section, values in TypeAdapter(Config).dump_python(settings).items():
        free = _FREE.get(section, set())
        if free is not None:
            flat |= _flat(section, {key: value for key, value in values.items() if key not in free})
    return flat


def _flat(path: str, values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(f"{path}.{key}", value) if isinstance(value, dict) else {f"{path}.{key}": value}
    return flat
