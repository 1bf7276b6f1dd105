"""export.json: what an export holds and is, for whoever loads or publishes it; nothing of the machine.

It is written last: a folder without it is no export, or one that was interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from pipeline.config import Config, UserError
from pipeline.data.index import Index, load_index
from pipeline.data.plan import split_of
from pipeline.durable import write
from pipeline.run.changes import CHANGES, data_since, settings_changed
from pipeline.run.evaluations import evaluated
from pipeline.run.folder import reference_of
from pipeline.run.references import fingerprints
from pipeline.run.rows import Row, rows
from pipeline.run.state import State

FILE = "export.json"
CARD = "README.md"
WEIGHTS = ("G_ema.safetensors", "G.safetensors", "D.safetensors")
PROGRAMS = ("G_ema.pt2", "G_ema.onnx", "G_ema.onnx.data")  # the last one's weights, if they are large
NAMES = (*WEIGHTS, *PROGRAMS, "samples.png", "config.yaml", CARD, FILE)  # all that an export may hold
_PATIENCE_S = 10.0  # for the index of remote data, without which an export lacks some facts only


@dataclass(frozen=True)
class Exported:
    """The facts of an export. What is not known is None or empty."""

    name: str  # of the run
    cur_nimg: int  # real images that D was shown, counting repeats
    label_frequencies: list[float] | None  # of the training images; None: unconditional
    classes: list[str]  # the classes' names, by label
    training_images: int | None = None
    heldout_images: int | None = None
    license: str | None = None  # of the training images: `license` in their index.json
    scores: dict[str, float] | None = None  # of this very checkpoint, by chart name
    against: dict[str, str] | None = None  # fingerprints of the real images of these scores
    data_since: int = -1  # the cur_nimg after which it was trained on these data; −1: from the start
    changes: tuple[dict[str, Any], ...] = ()  # settings that changed in mid-run: cur_nimg, key, old, new
    files: tuple[str, ...] = ()
    card: str = ""  # its SHA-256 as it was written
    format: Literal[1] = 1

    @property
    def num_classes(self) -> int:
        """0 for an unconditional G."""
        return len(self.label_frequencies or ())


def read(folder: Path) -> Exported:
    """What `folder` was written to hold. Raises UserError if it is no export, or was interrupted."""
    try:
        found = TypeAdapter(Exported).validate_json((folder / FILE).read_bytes())
    except (OSError, ValueError):
        raise UserError(
            f"{folder} is no export: it has no readable {FILE}. `shardgan export RUN --out DIR` makes one."
        ) from None
    return replace(found, files=tuple(name for name in found.files if name in NAMES))


def digest(card: Path) -> str:
    """SHA-256 of a model card; "" if there is none. Raises OSError."""
    return hashlib.sha256(card.read_bytes()).hexdigest() if card.exists() else ""


def save(folder: Path, facts: Exported) -> None:
    """Raises OSError."""
    write(folder / FILE, json.dumps(asdict(facts), indent=1, ensure_ascii=False) + "\n")


def facts_of(run: Path, config: Config, state: State) -> Exported:
    """The facts of a checkpoint; less of them if the run's data are no longer where they were."""
    scores, against = scores_of(run, state.cur_nimg)
    facts = Exported(
        str(config.run.name),
        state.cur_nimg,
        state.label_frequencies,
        list(state.classes),
        scores=scores,
        against=against,
        data_since=data_since(_changes(run)),
        changes=tuple(settings_changed(_changes(run), state.cur_nimg)),
    )
    index = _index(config, state)
    if index is None:
        return facts
    split = split_of(config, index)
    return replace(
        facts,
        training_images=split.training().size,
        heldout_images=split.heldout().size,
        license=index.license,
    )


def _index(config: Config, state: State) -> Index | None:
    """The data that the run was trained on, if they are there."""
    assert config.data.train is not None
    try:
        index = load_index(config.data.train, remote=replace(config.data.remote, timeout_s=_PATIENCE_S))
    except UserError:
        return None
    return index if index.fingerprint == state.data else None


def scores_of(run: Path, cur_nimg: int) -> tuple[dict[str, float], dict[str, str]]:
    """The scores of a checkpoint, and the fingerprints of what they are against: of the last `shardgan
    evaluate`, else of training. Further ones, of earlier calls, if they are of as many images against the
    same."""
    trained = {"against": fingerprints(reference_of(run))}
    scores: dict[str, float] = {}
    against: dict[str, str] = {}
    for found in (*evaluated(run), *_rows(run, trained)):
        more = {key: value for key, value in found.items() if key.startswith("Metrics/")}
        if not more or found.get("cur_nimg") != cur_nimg:
            continue
        if not scores:
            scores, against = more, found.get("against", {})
        elif _agree(against, found.get("against", {})) and _agree(_counts(scores), _counts(more)):
            scores, against = more | scores, found.get("against", {}) | against
    return scores, against


def _counts(scores: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in scores.items() if key.endswith("_images")}


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(other.get(key, value) == value for key, value in one.items())


def _rows(run: Path, more: Row) -> Iterator[Row]:
    """Those since the run has its present data."""
    with suppress(OSError):
        since = data_since(_changes(run))
        yield from (row | more for row in reversed(rows(run / "metrics.jsonl")) if row["cur_nimg"] > since)


def _changes(run: Path) -> list[Row]:
    with suppress(OSError):
        return rows(run / CHANGES)
    return []
