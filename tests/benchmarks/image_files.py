"""How fast `shardgan sample --images` writes files, beside sampling alone, in turns:

python tests/benchmarks/image_files.py RUN [IMAGES [TURNS]]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from pipeline.run.export import load_generator
from pipeline.run.image_files import write_images
from pipeline.run.sampling import Sampler


def alone(sampler: Sampler, seeds: range) -> float:
    """Seconds."""
    start = time.perf_counter()
    for _ in sampler.images(*sampler.latents(seeds)):
        pass
    return time.perf_counter() - start


def written(sampler: Sampler, seeds: range, folder: Path) -> float:
    start = time.perf_counter()
    write_images(sampler, seeds, [], folder, 1.0, "benchmark")
    return time.perf_counter() - start


def main(run: str, images: str = "4000", turns: str = "3") -> None:
    G, config, state = load_generator(Path(run))
    sampler, seeds = Sampler(G, config, state.label_frequencies, state.classes), range(int(images))
    alone(sampler, seeds[:256])  # warm
    seconds = [0.0, 0.0]
    # Nothing is deleted between turns: ext4 passes over the inodes of files deleted in the last minutes,
    # one by one, for each new file.
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(int(turns)):
            seconds[0] += alone(sampler, seeds)
            seconds[1] += written(sampler, seeds, Path(folder) / str(turn))
    rates = [int(turns) * len(seeds) / s for s in seconds]
    print(f"{rates[0]:.0f} images/s alone, {rates[1]:.0f} written: {rates[1] / rates[0]:.0%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
