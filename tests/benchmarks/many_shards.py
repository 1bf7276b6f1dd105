"""What a start costs on very many shards, from the meeting of the ranks to the first batch. By hand:

    python tests/benchmarks/many_shards.py FOLDER CHECKOUT [OTHER_CHECKOUT …]

makes 100,000 shards of 10 samples in FOLDER (a few files, linked under all names), and starts 1 and 8 ranks
by the code in each checkout. Prints the processor time of all ranks, how often they asked the file system for
the attributes of a file (each a journey to a network disk), and the memory of one rank.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

SHARDS, ROWS, SIZE = 100_000, 10, 28
ORIGINALS = 4  # a file may not have 100,000 names everywhere
WORLDS = (1, 8)


def make(folder: Path) -> None:
    """The shards, with index and sidecars as `shardgan prepare` leaves them."""
    import io
    import tarfile

    import numpy as np
    from PIL import Image

    from pipeline.data.index import index_shards
    from pipeline.data.record import sidecar_path, write_record

    folder.mkdir(parents=True)
    for number in range(ORIGINALS):
        with tarfile.open(folder / f"{number:06d}.tar", "w") as tar:
            for row in range(ROWS):
                image = np.random.default_rng((number, row)).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
                Image.fromarray(image).save(file := io.BytesIO(), "PNG")
                info = tarfile.TarInfo(f"{row}.png")
                info.size = len(file.getvalue())
                tar.addfile(info, io.BytesIO(file.getvalue()))
    names = [f"{number:06d}.tar" for number in range(SHARDS)]
    made = list(index_shards(folder, {name: {} for name in names[:ORIGINALS]}, lambda _: None))
    for number, name in enumerate(names[ORIGINALS:], start=ORIGINALS):
        original = names[number % ORIGINALS]
        os.link(folder / original, folder / name)
        os.link(sidecar_path(folder, original), sidecar_path(folder, name))
    import dataclasses

    shards = [dataclasses.replace(made[n % ORIGINALS], url=name) for n, name in enumerate(names)]
    write_record(folder, "many", shards, {})


def compare(folder: Path, checkouts: list[Path]) -> None:
    from launch import processes

    if not folder.exists():
        make(folder)
    for world in WORLDS:
        for checkout in checkouts:
            with tempfile.TemporaryDirectory() as out:
                path = f"{checkout.resolve()}{os.pathsep}{Path(__file__).parent}"
                environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
                module = ["many_shards", "--work", str(folder), out]
                ended = processes.launch("ddp", world, module, on_cpu=True, environment=environment)
                assert ended.returncode == 0, ended.stdout + ended.stderr
                ranks = [json.loads(path.read_text()) for path in Path(out).iterdir()]
            total = {key: sum(rank[key] for rank in ranks) for key in ("seconds", "stats")}
            memory = max(rank["index_mb"] for rank in ranks), max(rank["peak_mb"] for rank in ranks)
            print(
                f"{world} ranks, {checkout}: {total['seconds']:.1f} s of processors, "
                f"{total['stats']:,} file attributes, {max(rank['wall'] for rank in ranks):.1f} s until the "
                f"last has a batch; memory of a rank {memory[0]:.0f} MB more, peak {memory[1]:.0f} MB",
                flush=True,
            )


def work(folder: str, out: str) -> None:
    """In a rank."""
    from launch.selfcheck import parity
    from pipeline import config
    from pipeline.parallel.batch import batch_shape
    from pipeline.run.reals import agreed_data, open_reals
    from pipeline.run.resume import first_state

    ranks = parity.join()
    keys = (f"data.train={folder}", f"data.size={SIZE}", "data.channels=1", "data.batch_size=64")
    settings = config.load(None, (*keys, "data.workers=0"))
    counts = {"stats": 0}
    asked = os.stat

    def counted(*given: Any, **named: Any) -> os.stat_result:
        counts["stats"] += 1
        return asked(*given, **named)

    os.stat = counted
    before, start, wall = _resident_mb(), time.process_time(), time.monotonic()
    index, split = agreed_data(settings, ranks)
    state = first_state(settings, index, split)
    report: Any = None  # for a cache that is not asked for
    batch = batch_shape(settings.data, ranks.world)
    reals = open_reals(settings, index, split, state, ranks, batch, report)
    list(islice(reals, 1))
    found = {
        "seconds": time.process_time() - start,
        "wall": time.monotonic() - wall,
        "index_mb": _resident_mb() - before,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        **counts,
    }
    assert index.num_samples == SHARDS * ROWS
    (Path(out) / f"{ranks.rank}.json").write_text(json.dumps(found))
    reals.close()
    ranks.leave()


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


if __name__ == "__main__":
    if sys.argv[1] == "--work":
        work(*sys.argv[2:])
    else:
        compare(Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]])
