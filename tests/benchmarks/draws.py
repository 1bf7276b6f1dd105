"""What a rank's draws of one update take, in blocks (version 2) and of the whole batch (version 1). By hand:

    OMP_NUM_THREADS=1 python tests/benchmarks/draws.py

Microseconds of the thread's CPU time for both players' latents and labels, 2,048 samples of z_dim 512 with
1,000 classes, in turns that alternate: median and least.
"""

from __future__ import annotations

import statistics
import time

from pipeline.gan.draws import Draws, Samples
from pipeline.parallel.batch import BatchShape

TURNS, BATCH, Z_DIM = 40, 2048, 512


def main() -> None:
    for world, rounds in ((1, 1), (8, 1), (8, 4), (64, 1)):
        shape = BatchShape(world, rounds, BATCH // world // rounds)
        parts = tuple(shape.part(0, number) for number in range(rounds))
        samples = Samples.all(BATCH) if world == 1 else Samples(BATCH, parts)
        taken: dict[int, list[float]] = {1: [], 2: []}
        for turn in range(TURNS):
            for version, found in taken.items():
                draws = Draws(0, Z_DIM, [1.0] * 1000, version)
                start = time.thread_time()
                for player in "DG":
                    draws.latents(player, turn, samples)
                found.append(1e6 * (time.thread_time() - start))
        for version, found in taken.items():
            middle, least = statistics.median(found[3:]), min(found[3:])
            print(f"{world} ranks, {rounds} rounds, version {version}: {middle:.0f} µs, least {least:.0f}")


if __name__ == "__main__":
    main()
