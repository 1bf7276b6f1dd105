"""What the tests of shards at a URL have in common."""

from __future__ import annotations

import os
from pathlib import Path

from tiny_shards import SIZE, sample_of

from pipeline.config import Data, Remote
from pipeline.data.index import Index
from pipeline.data.plan import Split
from pipeline.data.stream import training_batches

SHARDS = [11, 7, 13, 20, 1]
NAMES = [f"s-{number:04d}.tar" for number in range(len(SHARDS))]
QUICK = Remote(stall_s=0.3, timeout_s=60.0)
SOON = Remote(stall_s=0.3, timeout_s=2.0)


def consumed(index: Index, workers: int = 0, start: int = 0) -> list[tuple[int, int, int]]:
    """(shard, row, label) of two epochs from a position on."""
    plan = Split(index.sizes, 1, 2).training()
    data = Data(size=SIZE, channels=1, batch_size=8, conditional=True, workers=workers)
    stream = training_batches(index, plan, data, start=start)
    batches = [next(stream) for _ in range(13)]
    stream.close()
    return [
        (*sample_of(image), label)
        for batch in batches
        for image, label in zip(batch.images.numpy(), batch.labels.tolist(), strict=True)  # type: ignore[union-attr]
    ]


def shards_kept(cache: Path) -> list[Path]:
    return sorted((cache / "shards").glob("*.tar"))


def close_all(files: list[int]) -> None:
    for file in files:
        os.close(file)
