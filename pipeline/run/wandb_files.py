"""What a run folder remembers of its W&B run: its id, what W&B has, and which offline files are complete."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pipeline.durable import write


@dataclass(frozen=True)
class Tracked:
    """The W&B run of a run folder, kept in wandb/run.json."""

    run_id: str
    online: bool  # a server has some of it, and alone knows how much; if not, it is here for `wandb sync`
    has: int  # W&B or the complete offline files have every step up to this one
    project: str | None = None
    entity: str | None = None
    complete: list[str] = field(default_factory=list)  # offline folders that a job closed
    replaces: list[str] = field(default_factory=list)  # earlier ids, which older checkpoints have
    of: str | None = None  # the run folder's name; None in files of an older version


def remember(folder: Path, tracked: Tracked) -> None:
    with suppress(OSError):  # the next start then sends again what `has` does not count
        write(folder / "wandb" / "run.json", json.dumps(asdict(tracked)))


def recall(folder: Path) -> Tracked | None:
    try:
        return Tracked(**json.loads((folder / "wandb" / "run.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def find_run(folder: Path, run_id: str | None) -> tuple[Tracked, bool]:
    """The W&B run of the run in `folder`, of this id if it has one; and whether it is new, as that of a copy
    of another run's folder is.

    Deletes offline files that no job closed: their rows are written again. A file that `wandb sync` has begun
    to upload stays, and the run counts as online: only the server knows how much it got. Raises OSError.
    """
    known = recall(folder)
    new = known is None and run_id is None
    if known is not None and _is_copy(folder, known):
        leave_to_the_server(folder, known.run_id)  # these files are the other's
        new, before = True, [*known.replaces, known.run_id]
        known = Tracked(_new_id(folder), online=False, has=-1, replaces=before)
    if known is None or run_id not in (None, known.run_id, *known.replaces):
        known = Tracked(run_id or _new_id(folder), online=False, has=-1)
    online = known.online
    for run in _offline(folder, known.run_id):
        if run.name in known.complete:
            continue
        if any(run.glob("*.sync*")):  # .synced or .syncstate, which `wandb sync` leaves
            online = True
        else:
            aside = run.rename(run.with_name(f".{run.name}"))
            shutil.rmtree(aside, ignore_errors=True)
    counted = online or bool(known.complete)  # a run.json of an older version counts other files too
    settled = replace(known, online=online, has=known.has if counted else -1, of=folder.name)
    if settled != known:
        remember(folder, settled)
    return settled, new


def leave_to_the_server(folder: Path, run_id: str) -> None:
    """Mark offline files as `wandb sync` does, or it would upload their steps a second time."""
    for run in _offline(folder, run_id):
        (run / f"run-{run_id}.wandb.synced").touch()


def _is_copy(folder: Path, known: Tracked) -> bool:
    """Whether the folder was copied from one beside it, rather than renamed."""
    if known.of in (None, folder.name):
        return False
    other = recall(folder.with_name(known.of))
    return other is not None and (other.run_id, other.of) == (known.run_id, known.of)


def _offline(folder: Path, run_id: str) -> list[Path]:
    return list(folder.glob(f"wandb/offline-run-*-{run_id}"))


def _new_id(folder: Path) -> str:
    """The id of a new run: WANDB_RUN_ID, unless a run beside it has that."""
    wanted = os.environ.get("WANDB_RUN_ID")
    others = (recall(file.parents[1]) for file in folder.parent.glob("*/wandb/run.json"))
    if wanted and not any(other and other.run_id == wanted for other in others):
        return wanted
    return secrets.token_hex(4)
