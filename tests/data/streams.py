"""Opening shards and streaming them, as the tests do it."""

from __future__ import annotations

from pathlib import Path

from tiny_shards import SIZE, sample_of

from pipeline.data.index import Index, load_index
from pipeline.data.plan import Plan, training_plan
from pipeline.data.stream import (
    Batch,
    TrainingBatches,
    training_batches,
)

BATCH = 12  # divides over 1, 2, 3 and 4 ranks


def open_all(root: Path, **split: object) -> tuple[Index, Plan]:
    index = load_index(str(root))
    holdout, folds, fold = split.get("holdout", 0.0), split.get("folds"), split.get("fold", 0)
    return index, training_plan(index.sizes, 1, 2, holdout, folds, fold)  # type: ignore[arg-type]


def batches(index: Index, plan: Plan, **changes: object) -> TrainingBatches:
    options: dict = {"start": 0, "batch_size": BATCH, "rank": 0, "world": 1, "workers": 0}
    options |= {"size": SIZE, "channels": 1, "conditional": False} | changes
    return training_batches(index, plan, **options)


def ids(batch: Batch) -> list[tuple[int, int]]:
    return [sample_of(image) for image in batch.images.numpy()]
