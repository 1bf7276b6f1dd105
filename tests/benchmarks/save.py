"""How long a checkpoint keeps training waiting. By hand:

    accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 2 tests/benchmarks/save.py 50e6

trains a residual pair with so many parameters in each player, and prints medians over three saves, in seconds
of the slowest rank. copied: all that training waits for. waited_for: with writing, fsync and SHA-256 as well.
alone, beside: an update without and with a save in progress.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from launch.bench import pair
from launch.bench.meter import clocked
from pipeline.parallel.ranks import Ranks
from pipeline.run.saving import Saver
from pipeline.run.state import State
from pipeline.run.stats import Stats
from pipeline.step import train_step

_TIMES = 3


def main(parameters: float) -> None:
    ranks, gan, reals, found = pair.begin([pair.NO_CONFIG, *pair.settings(parameters, 32, batch=12)])
    state, stats = State(), Stats(ranks.device)
    folder = Path(ranks.broadcast_from_main(lambda: tempfile.mkdtemp(prefix="checkpoints-")))
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
    for _ in range(_TIMES):
        row = {"alone": _seconds(update, ranks), "waited_for": _seconds(save, ranks)}
        update()
        row["copied"] = _seconds(begin, ranks)
        row["beside"] = _seconds(update, ranks)
        saver.finish()
        rows.append(row)
    if ranks.main:
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        medians = ", ".join(f"{key} {statistics.median(row[key] for row in rows):.2f} s" for key in rows[0])
        print(f"{found['strategy']} x{found['world']}, {size / 2**20:,.0f} MiB: {medians}")
        shutil.rmtree(folder)
    ranks.leave()


def _seconds(work: Callable[[], object], ranks: Ranks) -> float:
    seconds: list[float] = []
    ranks.barrier()
    with clocked(seconds):
        work()
    return max(ranks.gather_objects(seconds[0]))


if __name__ == "__main__":
    main(float(sys.argv[1]))
