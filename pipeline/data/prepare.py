"""Images → tar shards, byte for byte the same each time, and their index.

Shards are written by webdataset's own TarWriter, in the folder that staging.py keeps for them. Images are
shuffled once, by a fixed seed, so that every shard is a fair sample of the whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import webdataset
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.config import UserError
from pipeline.credentials import redacted
from pipeline.data import sidecar
from pipeline.data.decode import BadImageError, to_channels
from pipeline.data.index import Index, Shard, load_index
from pipeline.data.known import KNOWN
from pipeline.data.plan import permutation
from pipeline.data.record import INDEX, read_record, shard_of, sidecar_path, write_record
from pipeline.data.sources import Classes, Fit, Source, open_source
from pipeline.data.staging import FULL, Written, discard, finished, note, noted, publish, staging
from pipeline.data.workers import end_with_parent

_SHUFFLE_SEED = 20140610  # any fixed number; the day the GAN article appeared
_SKIPPED = "skipped.txt"


@dataclass(frozen=True)
class Options:
    """How images are written. None: as the source suggests (size, fit) or as each image is (channels)."""

    size: int | None = None
    fit: Fit | None = None
    channels: int | None = None
    per_shard: int = 1000
    classes: Classes = "top"


def prepare(
    source: str,
    out: str,
    options: Options,
    *,
    workers: int | None = None,
    announce: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Index:
    """Write the images of `source` (a folder, a zip, shards, a known data set) as shards into a new folder.

    `progress(done, total)` is called in images. Files that cannot be read are skipped, told by `announce` and
    listed in skipped.txt. If `out` was made by the same call before, nothing is done; if such a call was
    killed, this one goes on with the shards that are missing. Raises UserError if there are no images, they
    do not fit the options, or `out` is in use (leaving nothing behind), or if the disk is full.
    """
    target = Path(out).expanduser().absolute()
    recipe = {**_told(source), **asdict(options)}
    if _is_done(target, recipe):
        announce(f"{target} is there already, made by the same command; remove it to make it anew.")
        return load_index(str(target), announce)
    images = KNOWN[source](announce) if source in KNOWN else open_source(source, options.classes, announce)
    resolved = _resolve(images, options)
    with staging(target, json.dumps([recipe, images.fingerprint()]), announce) as folder:
        jobs = _jobs(images, resolved.per_shard)
        if kept := finished(folder):
            announce(f"{kept} of {len(jobs)} shards are there from an earlier try; going on with the others.")
        written = _write_all(images, resolved, folder, jobs, workers or _cores(), progress)
        _report_skipped(written, folder, announce)
        shards = [result.shard for result in written if result.shard.nsamples]
        if not shards:
            raise UserError(f"None of the {len(images.labels)} images of {source} can be read.")
        extra: dict[str, Any] = {"prepared": recipe}
        if images.classes:
            extra["classes"] = list(images.classes)
        write_record(folder, images.name, shards, extra)
        publish(folder, target)
    return load_index(str(target), announce)


def _told(source: str) -> dict[str, str]:
    """What is kept of where the images come from: the name, and, as many have the same, a digest of the path
    (data that are published need not tell it)."""
    if source in KNOWN:
        return {"source": source}
    path = redacted(source) if "://" in source else os.path.realpath(Path(source).expanduser())
    return {"source": Path(path).name, "path": hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_done(target: Path, recipe: dict[str, Any]) -> bool:
    """Whether `target` is there, made by the same recipe. Raises UserError if it holds something else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if target.is_dir() and (target / INDEX).exists():
        before = read_record(target).get("prepared")
        older = {"path": recipe["path"]} if "path" in recipe else {}  # versions did not note it
        if isinstance(before, dict) and asdict(Options()) | older | before == recipe:
            return True
    raise UserError(f"{target} is there already. Give the name of a new folder, or remove that one.")


def _resolve(images: Source, options: Options) -> Options:
    """Fill in size and fit from the first image that can be read."""
    size = options.size
    for number in range(len(images.labels)) if size is None else ():
        try:
            width, height = images.image(number).size
        except (BadImageError, OSError):
            continue
        if width != height:
            raise UserError(
                f"{images.describe(number)} is {width}x{height}, not square. Give --size N (and --fit crop, "
                "pad or stretch)."
            )
        size = width
        break
    if size is None:
        raise UserError(f"None of the {len(images.labels)} images of {images.name} can be read.")
    resizes = options.size is not None
    # Without --size nothing may change an image: another size than the first one's is then an error.
    return replace(options, size=size, fit=(options.fit or images.fit) if resizes else None)


def _jobs(images: Source, per_shard: int) -> list[tuple[int, NDArray[np.int64]]]:
    order = permutation(len(images.labels), _SHUFFLE_SEED)
    starts = range(0, len(order), per_shard)
    return [(number, order[start : start + per_shard]) for number, start in enumerate(starts)]


def _write_all(
    images: Source,
    options: Options,
    folder: Path,
    jobs: list[tuple[int, NDArray[np.int64]]],
    workers: int,
    progress: Callable[[int, int], None],
) -> list[Written]:
    done, total = 0, len(images.labels)
    results: dict[int, Written] = {}
    progress(done, total)
    # Forked, so that the workers have the source's arrays without a copy.
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), multiprocessing.get_context("fork"), _adopt, (images, options, folder)
    )
    try:
        futures = {pool.submit(_write_shard, number, rows): (number, len(rows)) for number, rows in jobs}
        for future in as_completed(futures):
            number, count = futures[future]
            results[number] = future.result()
            done += count
            progress(done, total)
    except BrokenProcessPool:
        raise UserError(
            "A process that writes shards was ended from outside: out of memory? The same command goes on "
            "from there; fewer --workers take less."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [results[number] for number in sorted(results)]


_job: tuple[Source, Options, Path]  # of a worker process


def _adopt(images: Source, options: Options, folder: Path) -> None:
    global _job
    _job = (images, options, folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends the pool
    end_with_parent()  # if that is killed, nobody else would end this one and give back the folder


def _write_shard(number: int, rows: NDArray[np.int64]) -> Written:
    folder = _job[2]
    if (earlier := noted(folder, number)) is not None:
        return earlier
    path = folder / f"shard-{number:06d}.tar"
    try:
        written = _write_tar(path, number, rows)
        note(folder, number, written)
    except BaseException:
        discard(path)
        raise
    return written


def _write_tar(path: Path, number: int, rows: NDArray[np.int64]) -> Written:
    images, options, folder = _job
    skipped: list[str] = []
    with path.open("wb") as file, tar_writer(file) as tar:
        for place, row in enumerate(rows.tolist()):
            try:
                image = _fit(images.image(row), options, images.describe(row))
            except (BadImageError, OSError) as error:
                if isinstance(error, OSError) and error.errno in FULL:
                    raise
                skipped.append(f"{images.describe(row)}: {error}")
                continue
            sample = {"__key__": f"{number:06d}-{place:06d}", "png": _png(image)}
            if images.labels[row] >= 0:
                sample["cls"] = b"%d" % images.labels[row]
            tar.write(sample)
    if len(skipped) == len(rows):
        path.unlink()
        return Written(Shard(path.name, 0, 0, "", {}), tuple(skipped))
    table = sidecar.scan(path, path.name)
    sidecar.save(table, sidecar_path(folder, path.name))
    return Written(shard_of(path.name, table), tuple(skipped))


def tar_writer(file: BinaryIO) -> Any:
    """webdataset's writer, told to write the same bytes for the same samples: no times, no names."""
    return webdataset.TarWriter(file, user="", group="", mode=0o644, mtime=0, compress=False, encoder=False)


def _fit(image: Image.Image, options: Options, name: str) -> Image.Image:
    """The image at the size and in the channels wanted."""
    grey = options.channels == 1 or (options.channels is None and image.mode in ("L", "1", "I", "I;16", "LA"))
    image = to_channels(image, 1 if grey else 3)
    assert options.size is not None
    size = (options.size, options.size)
    if image.size == size:
        return image
    if options.fit == "crop":
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    if options.fit == "stretch":
        return image.resize(size, Image.Resampling.LANCZOS)
    if options.fit == "pad":  # smaller images keep their pixels
        image.thumbnail(size, Image.Resampling.LANCZOS)
        padded = Image.new(image.mode, size)
        padded.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
        return padded
    raise UserError(
        f"{name} is {image.width}x{image.height}, the first image {size[0]}x{size[0]}. Give --size N (and "
        "--fit crop, pad or stretch)."
    )


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=6)
    return data.getvalue()


def _report_skipped(written: list[Written], folder: Path, announce: Callable[[str], None]) -> None:
    skipped = [" ".join(_shown(reason).split()) for result in written for reason in result.skipped]
    if not skipped:
        return
    (folder / _SKIPPED).write_text("".join(f"{reason}\n" for reason in skipped), "utf-8")
    announce(f"{len(skipped)} images could not be read and are left out ({_SKIPPED} lists them):")
    for reason in skipped[:10]:
        announce(f"  {reason}")
    if len(skipped) > 10:
        announce(f"  … and {len(skipped) - 10} more")


def _shown(text: str) -> str:
    """Names of files need not be UTF-8: what of one cannot be written down is escaped."""
    return text.encode(errors="backslashreplace").decode()
