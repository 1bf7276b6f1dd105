"""`shardgan bench loader`: our stream beside webdataset's with Pillow, and beside reading bytes alone.

They take turns in this process, on shards made of scaled real images. Processor time is measured, which other
load changes little.
"""

from __future__ import annotations

import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch
import webdataset
from PIL import Image

from launch.bench import table
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
    _report(measure(turns, images))


def measure(turns: int, images: int) -> dict[str, Speeds]:
    """Speeds for each kind of image; `images` of the smallest in a turn."""
    torch.set_num_threads(1)
    speeds = {}
    with tempfile.TemporaryDirectory(prefix="shardgan-bench-") as folder:
        for name, (size, channels, kind) in _KINDS.items():
            shards = make_shards(Path(folder) / name.replace(" ", "-"), size, channels, kind)
            fewer = max(_BATCH, images * 28 // size // _BATCH * _BATCH)
            speeds[name] = _in_turns(_contestants(str(shards), size, channels), turns, fewer)
    return speeds


def make_shards(folder: Path, size: int, channels: int, kind: str) -> Path:
    """Two indexed shards of the small image set, scaled; for colour, each grey image in three shades."""
    pictures = list(_pictures())
    if not pictures:
        raise UserError(
            "This measures with a few images that only a checkout of the sources has. Run it there, or give "
            "`shardgan bench step` shards of yours: --data SHARDS."
        )
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


def _contestants(shards: str, size: int, channels: Literal[1, 3]) -> dict[str, Batches]:
    index = load_index(shards)
    data = Data(size=size, channels=channels, conditional=True, batch_size=_BATCH, workers=0)
    plan = Split(index.sizes, 0, data.window).training()
    path, line = reserve(index.sizes, size, channels)
    if path is None:
        raise UserError(line)
    cached = training_batches(index, plan, data, cache=Cache(path, index.sizes, size, channels))
    for _ in range(sum(index.sizes) // _BATCH):  # the first epoch fills the cache
        next(cached)
    files = sorted(Path(shards).glob("*.tar"))
    ours = training_batches(index, plan, data)
    return {_OURS: ours, _CACHED: cached, _THEIRS: _theirs(files, channels), _BYTES: _bytes(files)}


def _theirs(files: list[Path], channels: int) -> Batches:
    """As its documentation has it: shuffle, decode with Pillow to uint8, tuples, batches."""
    urls = [str(path) for path in files]
    samples: Any = webdataset.WebDataset(urls, shardshuffle=False).shuffle(_PER_SHARD, initial=_PER_SHARD)
    samples = samples.decode("l8" if channels == 1 else "rgb8").to_tuple("png;jpg", "cls")
    batches: Batches = iter(samples.batched(_BATCH).repeat())
    return batches


def _bytes(files: list[Path]) -> Batches:
    """The files from front to back, a batch's share of bytes at a time."""
    while True:
        for path in files:
            with path.open("rb") as file:
                while chunk := file.read(max(1, path.stat().st_size * _BATCH // _PER_SHARD)):
                    yield chunk


def _in_turns(contestants: dict[str, Batches], turns: int, images: int) -> Speeds:
    """In turns; each begins with a batch that does not count, as it opens files."""
    speeds: Speeds = {name: [] for name in contestants}
    for _ in range(turns):
        for name, stream in contestants.items():
            next(stream)
            start = time.process_time()
            count = sum(_BATCH for _ in islice(stream, images // _BATCH))
            speeds[name].append(count / max(time.process_time() - start, 1e-9))
    return speeds


def _report(speeds: dict[str, Speeds]) -> None:
    names = (_OURS, _CACHED, _THEIRS, _BYTES)
    rows = []
    for kind, found in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(found[_OURS], found[_THEIRS], strict=True))
        rows.append([kind, *(f"{statistics.median(found[name]):,.0f}" for name in names), f"{ratio:.2f}x"])
    table.show(
        "Images per CPU-second",
        (*names, "ours / theirs"),
        rows,
        f"Medians of {len(found[_OURS])} turns; a ratio is of two neighbouring turns. One process, one "
        "thread; cached: with data.cache=ram.",
    )
