"""`shardgan bench loader`: our stream beside webdataset's with Pillow, and beside reading bytes alone.

All in this process and by turns, on shards made for the occasion from real images, scaled. What counts is
processor time, so that whatever else the machine does changes little.
"""

from __future__ import annotations

import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table

from pipeline.config import Data, UserError
from pipeline.data.cache import Cache, reserve
from pipeline.data.index import load_index
from pipeline.data.plan import Split
from pipeline.data.prepare.writer import tar_writer
from pipeline.data.stream import training_batches

_IMAGES = Path(__file__).parents[2] / "tests" / "assets" / "fashion-mnist-500"
_BATCH = 50
_PER_SHARD = 250
_KINDS: dict[str, tuple[int, Literal[1, 3], str]] = {
    "28-px PNG": (28, 1, "PNG"),
    "64-px JPEG": (64, 3, "JPEG"),
    "256-px JPEG": (256, 3, "JPEG"),
}
_OURS, _CACHED, _THEIRS, _BYTES = "ours", "cached", "webdataset + Pillow", "bytes alone"

Speeds = dict[str, list[float]]  # contestant → images per CPU-second, a figure per turn
Batches = Iterator[object]


@click.command("loader")
@click.option("--turns", type=click.IntRange(1), default=5, show_default=True, help="Of each contestant.")
@click.option(
    "--images", type=click.IntRange(_BATCH), default=500, show_default=True, help="Of 28 px, per turn."
)
def command(turns: int, images: int) -> None:
    """Images per CPU-second of our stream, of webdataset.WebDataset with Pillow, and of reading alone.

    Without worker processes, single-threaded; larger images are fewer per turn.
    """
    torch.set_num_threads(1)
    speeds = {}
    with tempfile.TemporaryDirectory(prefix="shardgan-bench-") as folder:
        for name, (size, channels, kind) in _KINDS.items():
            shards = _make(Path(folder) / name.replace(" ", "-"), size, channels, kind)
            fewer = max(_BATCH, images * 28 // size // _BATCH * _BATCH)
            speeds[name] = _measure(_contestants(shards, size, channels), turns, fewer)
    _report(speeds, Console())


def _make(folder: Path, size: int, channels: int, kind: str) -> Path:
    """Two shards of real images at another size; grey ones in three shades where colour is wanted."""
    pictures = list(_pictures())
    if not pictures:
        raise UserError("The small image set that comes with the sources is not here.")
    folder.mkdir()
    for shard in range(2):
        with (folder / f"shard-{shard}.tar").open("wb") as file, tar_writer(file) as tar:
            for row in range(_PER_SHARD):
                picture = pictures[(shard * _PER_SHARD + row) % len(pictures)]
                scaled = picture.resize((size, size), Image.Resampling.BICUBIC)
                if channels == 3:
                    grey = np.asarray(scaled)
                    scaled = Image.fromarray(np.dstack([grey, 255 - grey, grey // 2]))
                data = io.BytesIO()
                scaled.save(data, kind, **({"quality": 90} if kind == "JPEG" else {}))
                extension = "png" if kind == "PNG" else "jpg"
                tar.write({"__key__": f"{shard}-{row:04d}", extension: data.getvalue(), "cls": b"0"})
    load_index(str(folder))
    return folder


def _pictures() -> Iterator[Image.Image]:
    for shard in sorted(_IMAGES.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".png") and (file := tar.extractfile(member)):
                    yield Image.open(io.BytesIO(file.read()))


def _contestants(shards: Path, size: int, channels: int) -> dict[str, Callable[[], Batches]]:
    return {
        _OURS: partial(_ours, shards, size, channels),
        _CACHED: partial(_cached, shards, size, channels),
        _THEIRS: partial(_theirs, shards, channels),
        _BYTES: partial(_bytes, shards),
    }


def _cached(shards: Path, size: int, channels: int) -> Batches:
    """With data.cache=ram, from the second epoch on."""
    sizes = load_index(str(shards)).sizes
    path, line = reserve(sizes, size, channels)
    if path is None:
        raise UserError(line)
    stream = _ours(shards, size, channels, Cache(path, sizes, size, channels))
    for _ in range(sum(sizes) // _BATCH):
        next(stream)
    return stream


def _ours(shards: Path, size: int, channels: int, cache: Cache | None = None) -> Batches:
    index = load_index(str(shards))
    colours: Literal[1, 3] = 1 if channels == 1 else 3
    data = Data(size=size, channels=colours, conditional=True, batch_size=_BATCH, workers=0)
    return training_batches(index, Split(index.sizes, 0, data.window).training(), data, cache=cache)


def _theirs(shards: Path, channels: int) -> Batches:
    """As its documentation has it: shuffle, decode by Pillow to uint8, tuples, batches."""
    urls = sorted(str(path) for path in shards.glob("*.tar"))
    samples: Any = webdataset.WebDataset(urls, shardshuffle=False).shuffle(_PER_SHARD, initial=_PER_SHARD)
    samples = samples.decode("l8" if channels == 1 else "rgb8").to_tuple("png;jpg", "cls")
    batches: Batches = iter(samples.batched(_BATCH).repeat())
    return batches


def _bytes(shards: Path) -> Batches:
    """The files from front to back, as fast as they come; a turn's end is that of a file's share."""
    while True:
        for path in sorted(shards.glob("*.tar")):
            with path.open("rb") as file:
                while chunk := file.read(max(1, path.stat().st_size * _BATCH // _PER_SHARD)):
                    yield chunk


def _measure(contestants: dict[str, Callable[[], Batches]], turns: int, images: int) -> Speeds:
    """By turns; each begins with a batch that does not count, since what opens files does so then."""
    speeds: Speeds = {name: [] for name in contestants}
    streams = {name: begin() for name, begin in contestants.items()}
    for _ in range(turns):
        for name, stream in streams.items():
            next(stream)
            start = time.process_time()
            count = sum(_BATCH for _ in islice(stream, images // _BATCH))
            speeds[name].append(count / max(time.process_time() - start, 1e-9))
    return speeds


def _report(speeds: dict[str, Speeds], console: Console) -> None:
    table = Table(title="Images per CPU-second")
    table.add_column()
    for heading in (_OURS, _CACHED, _THEIRS, _BYTES, "ours / theirs"):
        table.add_column(heading, justify="right")
    for kind, found in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(found[_OURS], found[_THEIRS], strict=True))
        medians = (f"{statistics.median(found[name]):,.0f}" for name in (_OURS, _CACHED, _THEIRS, _BYTES))
        table.add_row(kind, *medians, f"{ratio:.2f}x")
    console.print(table)
    turns = len(next(iter(speeds.values()))[_OURS])
    console.print(
        f"Medians of {turns} turns; a ratio is of two neighbouring turns. One process, one thread; cached: "
        "with data.cache=ram."
    )
