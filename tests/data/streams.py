"""Opening shards and streaming them, as the tests do it."""

from __future__ import annotations

from pathlib import Path

from tiny_shards import SIZE, sample_of

from pipeline.config import Data
from pipeline.data.index import Index, load_index
from pipeline.data.plan import Plan, Split
from pipeline.data.stream import (
    Batch,
    TrainingBatches,
    training_batches,
)

BATCH = 12  # divides over 1, 2, 3 and 4 ranks
_PLACE = ("start", "rank", "world", "rounds", "cache")


def open_all(root: Path, **split: object) -> tuple[Index, Plan]:
    index = load_index(str(root))
    return index, Split(index.sizes, 1, 2, **split).training()  # type: ignore[arg-type]


def batches(index: Index, plan: Plan, **changes: object) -> TrainingBatches:
    """`changes` of Data by key, or of where in the stream to start and for which rank."""
    place = {key: changes.pop(key) for key in _PLACE if key in changes}
    return training_batches(index, plan, data_of(**changes), **place)  # type: ignore[arg-type]


def data_of(**changes: object) -> Data:
    """For tiny shards, decoded in this process, no bad image allowed."""
    keys: dict = {"size": SIZE, "channels": 1, "batch_size": BATCH, "workers": 0, "max_bad": 0}
    return Data(**keys | changes)


def named(stage: object) -> tuple[str]:
    """A stage made in a test, by a name such as a config gives."""
    globals()["stage"] = stage
    return ("streams:stage",)


def ids(batch: Batch) -> list[tuple[int, int]]:
    return [sample_of(image) for image in batch.images.numpy()]
