"""The run folder: made once, found again by the same command, never overwritten."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from pipeline.config import Config, Ema, Run, UserError, dump, load, read_file, without_rampup
from pipeline.durable import write
from pipeline.lock import HeldError, Lock, refuse_held, take
from pipeline.run.changes import CHANGES, DATA
from pipeline.run.markers import DONE, SAVED, STOPPED, marked
from pipeline.run.report import say
from pipeline.run.rows import append, rows
from pipeline.run.saved_grids import reals_of
from pipeline.wording import in_kimg

if TYPE_CHECKING:
    from pipeline.parallel.ranks import Ranks
    from pipeline.run.stop import StopSignals

REFERENCE = "reference.json"  # what its scores are against

_SHOWN = 16  # digits of a fingerprint

# What may change when a run is resumed: how long, how often, where and how fast, not what is trained.
# Schedules last for the burn-in, and augmentation that adapts does so once per tick.
_OF_TRAINING = {"burn_in_kimg", "tick_kimg", "init", "init_optimizer"}
_FREE = {
    "run": {field.name for field in dataclasses.fields(Run)} - _OF_TRAINING,
    "track": None,
    "score": None,
    "data": {"train", "decoder", "workers", "batch_gpu", "cache", "max_bad", "remote"},
    "G": {"checkpoint"},
    "D": {"checkpoint"},
}


def _changeable(config: Config) -> set[str]:
    """What may change too with run.new_settings=true: all that may be [from, to], as it is read in every
    update."""
    return {key.partition("[")[0] for key in config.schedulable}


def find_folder(config: Config, announce: Callable[[str], None]) -> tuple[Config, Path]:
    """The run's folder, there or not, and the config to train with; a new name with run.resume=false.

    Raises UserError when the folder holds a run of other settings.
    """
    config = under_a_free_name(config)
    folder = Path(config.run.out) / str(config.run.name)
    check_same(config, folder)
    resumed = as_begun(config, folder)
    if resumed.ema != config.ema:
        announce(f"note: {folder} began without ema.rampup and continues without it")
    return resumed, folder


def claim_folder(
    config: Config, say: Callable[[str], None], stopped: Callable[[], bool]
) -> tuple[Config, Path, Lock | None]:
    """`find_folder`, and its lock, so that no other process trains in it; None if the run is finished.

    say, stopped: see `take`. Raises UserError as `find_folder`, and when another process trains in it.
    """
    while True:
        resolved, folder = find_folder(config, say)
        if finished(folder, resolved):
            return resolved, folder, None
        try:
            lock = take(folder, say, stopped=stopped)
        except HeldError as error:
            if config.run.resume:
                raise _running(folder, error) from None
            continue  # another process has just taken this name: try the next
        if not config.run.resume and (folder / "config.yaml").exists():  # … and has ended
            lock.release()
            continue
        try:  # again: another process may have trained in it meanwhile
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
    """Raises UserError if a process that can be seen at once (on this machine) trains in a run folder."""
    try:
        refuse_held(folder)
    except HeldError as error:
        raise _running(folder, error) from None


def _running(folder: Path, error: HeldError) -> UserError:
    return UserError(
        f"{folder} is being trained by {error.holder}. Stop that training, or give this one another run.name."
    )


def open_folder(config: Config, folder: Path, cur_nimg: int, still_ours: Callable[[], None]) -> None:
    """Create the folder or reopen it for resuming from cur_nimg; write config.yaml, and what changes in it.

    Call only when the run can start. still_ours: see Report. Raises UserError when the folder cannot be
    written.
    """
    still_ours()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STOPPED).unlink(missing_ok=True)
        if not finished(folder, config):  # of a run that is now to train longer
            (folder / DONE).unlink(missing_ok=True)
        _record_changes(config, folder, cur_nimg)
        run = dataclasses.replace(config.run, new_settings=False)  # these are its settings from here on
        write(folder / "config.yaml", dump(dataclasses.replace(config, run=run)), synced=True)
    except OSError as error:
        raise UserError(f"The run folder {folder} cannot be written: {error}") from None


def under_a_free_name(config: Config) -> Config:
    """With run.resume=false: under a name that no folder has, and from then on to be resumed."""
    if config.run.resume:
        return config
    name, number = str(config.run.name), 2
    while (Path(config.run.out) / name).exists():
        name, number = f"{config.run.name}-{number}", number + 1
    return dataclasses.replace(config, run=dataclasses.replace(config.run, name=name, resume=True))


def reference_of(folder: Path) -> dict[str, dict[str, Any]]:
    """For each kind of score, what a run's are against; {} if it has none yet or they cannot be read."""
    try:
        found = json.loads((folder / REFERENCE).read_bytes())
    except (OSError, ValueError):
        return {}
    parts = found.items() if isinstance(found, dict) else ()
    return {part: about for part, about in parts if isinstance(about, dict)}


def as_begun(config: Config, folder: Path) -> Config:
    """The config; what it leaves open is as the run in `folder` began: `penalty.on: auto` is what it became,
    and ema.rampup is off if the run has none and it is not set now."""
    return _completed(config, begun(folder)) if (folder / "config.yaml").exists() else config


def _completed(config: Config, before: Config) -> Config:
    if config.ema.rampup == Ema().rampup and not before.ema.rampup:
        config = without_rampup(config)
    penalty = config.penalty
    if penalty.G.on == "auto":
        penalty = dataclasses.replace(penalty, G=dataclasses.replace(penalty.G, on=before.penalty.G.on))
    if penalty.D.on == "auto":
        penalty = dataclasses.replace(penalty, D=dataclasses.replace(penalty.D, on=before.penalty.D.on))
    return dataclasses.replace(config, penalty=penalty)


def begun(folder: Path) -> Config:
    """The config of the run in `folder`. One written before there was ema.rampup means none."""
    path = folder / "config.yaml"
    try:
        config = load(path)
    except UserError as error:
        raise UserError(f"{path} does not hold the settings of a run: {error}") from None
    return config if "rampup" in (read_file(path, Config).get("ema") or {}) else without_rampup(config)


def check_same(config: Config, folder: Path) -> None:
    """Raises UserError when resuming the run in `folder` with this config would make it another run, or its
    new scores ones that do not compare with earlier ones; and for the folder of a selection."""
    if (folder / "trials").is_dir() and not (folder / "config.yaml").exists():
        raise UserError(f"{folder} is a selection. Give this run another run.name.")
    _check_scores(config, folder)
    changed = changes(config, folder)
    may = {key for key in changed if key in _changeable(config)}
    refused = changed.keys() - (may if config.run.new_settings else ())
    if not refused:
        return
    remedy = "Give it another run.name, or set run.resume=false to start over under a new name."
    if refused <= may:
        remedy += " Or set run.new_settings=true to continue with the new values."
    elif config.run.new_settings:
        remedy += f" run.new_settings=true changes {', '.join(sorted(_changeable(config)))} only."
    lines = [f"  {key}: {old!r} → {new!r}" for key, (old, new) in changed.items() if key in refused]
    raise UserError("\n".join([f"{folder} holds a run with other settings:", *lines, remedy]))


def _check_scores(config: Config, folder: Path) -> None:
    """Early, as far as the configs tell: `references.keep_to` checks the rest with the first score."""
    against = reference_of(folder)
    if not against or not config.score.metrics or config.run.new_data:  # which begins with other scores
        return
    before, now = begun(folder).score, config.score
    changed = [
        f"  score.{key}: {old:,} → {new:,}"
        for part, key in (("heldout", "images"), ("train", "train_images"))
        for old, new, there in [
            (getattr(before, key), getattr(now, key), against.get(part, {}).get("images"))
        ]
        # fewer may be there than both ask for
        if old != new and old and new and isinstance(there, int) and min(old, new) <= there
    ]
    features, kind = against.get("heldout", {}).get("features"), now.features.partition(":")[0]
    of = features[0] if isinstance(features, list) and features else kind
    if of != kind and not {of, kind}.isdisjoint(("efflite0", "inception")):
        changed.append(f"  score.features: {of} → {now.features}")
    if changed:
        raise UserError(
            "\n".join([f"{folder} has scores, with which new ones would not compare:", *changed])
            + "\nLeave score as it was, or set run.resume=false to start over under a new name."
        )


def changes(config: Config, folder: Path) -> dict[str, tuple[Any, Any]]:
    """Dotted key → (old, new) of what is trained, where the run in `folder` differs from `config`."""
    if not (folder / "config.yaml").exists():
        return {}
    as_it_began = begun(folder)
    before, now = _fixed(as_it_began), _fixed(_completed(config, as_it_began))
    keys = dict.fromkeys([*before, *now])  # options of a user's class may come and go
    if before["augment.target"] is None:
        del keys["run.tick_kimg"]
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def _record_changes(config: Config, folder: Path, cur_nimg: int) -> None:
    """A line in changes.jsonl for each setting with another value from cur_nimg on. Raises OSError."""
    file = folder / CHANGES
    last = {row.get("key"): row for row in rows(file)}
    for row in last.values():
        if row["cur_nimg"] > cur_nimg:  # the run falls back to an older checkpoint, and trains that again
            append(file, {**row, "cur_nimg": cur_nimg})
    for key, (old, new) in changes(config, folder).items():
        row = {"cur_nimg": cur_nimg, "key": key, "old": old, "new": new}
        if row != last.get(key):  # else a start that was killed before it could write config.yaml has
            append(file, row)
        say(f"{key}: {old!r} → {new!r} from kimg {in_kimg(cur_nimg / 1000)} on")


def record_data(folder: Path, cur_nimg: int, before: Sequence[str], now: Sequence[str]) -> None:
    """Scores of a run that continues on other data are against other images from cur_nimg on: a line in
    changes.jsonl, and none of what they are against, nor of what samples compare with.

    before, now: fingerprints of its last checkpoint's data and plan, and of the present ones. If these are
    equal, a start that has trained nothing may have left for others. Raises UserError.
    """
    before, now = [each[:_SHOWN] for each in before], [each[:_SHOWN] for each in now]
    old, new = next(((old, new) for old, new in zip(before, now, strict=True) if old != new), ("", ""))
    try:
        last = next((row for row in reversed(rows(folder / CHANGES)) if row.get("key") == DATA), None)
        if not new:
            if last is None or last["new"] in now:
                return
            old, new = last["new"], last["old"]
        (folder / REFERENCE).unlink(missing_ok=True)
        reals_of(folder).unlink(missing_ok=True)
        row = {"cur_nimg": cur_nimg, "key": DATA, "old": old, "new": new}
        if row != last:  # else the last start did no more than that
            append(folder / CHANGES, row)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}.") from None


def finished(folder: Path, config: Config) -> bool:
    """Whether the run in this folder trained as far as the config asks, which may be further than before."""
    return finished_at(folder) >= 1000 * config.run.total_kimg


def finished_at(folder: Path) -> float:
    """cur_nimg at the end of a run that is finished; else 0."""
    return marked(folder, DONE)


def has_saved(folder: Path) -> bool:
    """Whether there were checkpoints: the run has recorded one, or has ended, or the folder is a link to
    what is gone."""
    checkpoints = folder / "checkpoints"
    lost = checkpoints.is_symlink() and not checkpoints.exists()
    return lost or any(marked(folder, name) > 0 for name in (SAVED, STOPPED, DONE))


def _fixed(config: Config) -> dict[str, Any]:
    """Dotted key → value of everything that must not change when a run is resumed."""
    flat: dict[str, Any] = {}
    for section, values in TypeAdapter(Config).dump_python(config, mode="json").items():
        free = _FREE.get(section, set())
        if free is not None:
            flat |= flattened(section, {key: value for key, value in values.items() if key not in free})
    return flat


def flattened(path: str, values: dict[str, Any]) -> dict[str, Any]:
    """Dotted key, beginning with `path` → value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flattened(f"{path}.{key}", value) if isinstance(value, dict) else {f"{path}.{key}": value}
    return flat
