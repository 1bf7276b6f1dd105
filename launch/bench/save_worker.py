"""One rank of `shardgan bench save`: how long a checkpoint keeps training waiting."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from launch.bench.penalty_worker import noise
from pipeline import config
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.launched import read_launch
from pipeline.parallel.ranks import Ranks
from pipeline.players import build
from pipeline.run.saving import Saver
from pipeline.run.state import State
from pipeline.run.stats import Stats
from pipeline.step import train_step


def main(out: Path, times: int, settings: list[str]) -> None:
    """Measure under the strategy of the launcher; the main rank writes OUT."""
    ranks = Ranks(read_launch(), timedelta(seconds=600))
    resolved, state = config.load(None, settings), State()
    shape = batch_shape(resolved.data, ranks.world)
    gan = build(resolved, ranks, shape)
    reals, stats = noise(resolved, shape.local), Stats(ranks.device)
    folder = Path(ranks.broadcast_from_main(lambda: tempfile.mkdtemp(prefix="checkpoints-", dir=out.parent)))
    saver = Saver(folder, ranks, keep=1)

    def update() -> None:
        state.cur_nimg = train_step(gan, reals, state.cur_nimg, stats)
        saver.advance(*ranks.poll_any(*saver.flags)())

    def begin() -> None:
        saver.begin([gan.G, gan.D], gan.G_ema, state)

    def save() -> None:
        begin()
        saver.finish()

    rows: list[dict[str, float]] = []
    update()
    save()
    for _ in range(times):
        row = {"alone": _seconds(update, ranks), "waited_for": _seconds(save, ranks)}
        update()
        row["copied"] = _seconds(begin, ranks)
        row["beside"] = _seconds(update, ranks)
        row["rest"] = _seconds(lambda: [saver.finish()], ranks)
        rows.append(row)
    found: dict[str, Any] = {"strategy": ranks.strategy, "world": ranks.world}
    found |= {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    found["bytes"] = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    if ranks.main:
        out.write_text(json.dumps(found))
    ranks.leave()


def _seconds(work: Callable[[], object], ranks: Ranks) -> float:
    """Of the slowest rank."""
    ranks.barrier()
    start = time.perf_counter()
    work()
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return max(ranks.gather_objects(time.perf_counter() - start))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
