"""Reads a W&B run back from the `.wandb` file that an offline run leaves, to see what would be uploaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

from pipeline.run.wandb_offline import records


@dataclass
class OfflineRun:
    run_id: str = ""
    project: str = ""
    name: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)  # rows, pictures as W&B's dictionaries
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)  # chart or glob → its x axis
    finished: bool = False
    status: int | None = None  # that W&B shows as finished (0) or failed
    files: Path = Path()  # what pictures' paths are relative to


def offline_runs(folder: Path) -> list[OfflineRun]:
    """Every offline run below `folder`/wandb, oldest first."""
    return [read_offline_run(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]


def read_offline_run(path: Path) -> OfflineRun:
    run = OfflineRun(files=path.parent / "files")
    for data in records(path.read_bytes()):
        _apply(run, Record.FromString(data))
    return run


def _apply(run: OfflineRun, record: Record) -> None:
    match record.WhichOneof("record_type"):
        case "run":
            run.run_id, run.project, run.name = record.run.run_id, record.run.project, record.run.display_name
            run.group, run.tags = record.run.run_group, list(record.run.tags)
            run.config |= _items(record.run.config.update)
        case "config":
            run.config |= _items(record.config.update)
        case "history":
            run.history.append(_items(record.history.item))
        case "summary":
            run.summary |= _items(record.summary.update)
        case "metric":
            run.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        case "exit":
            run.finished, run.status = True, record.exit.exit_code


def _items(items: Any) -> dict[str, Any]:
    """A row. A dictionary in it (a picture) is stored as one item per entry."""
    row: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        inner = row
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
    return row
