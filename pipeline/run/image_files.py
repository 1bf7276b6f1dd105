"""Separate image files of many seeds, for other tools."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.config import UserError
from pipeline.cores import cores
from pipeline.durable import write
from pipeline.run.plain_png import END, bytes_of, plain_pngs
from pipeline.run.sampling import BATCH, Sampler, refuse_truncation
from pipeline.wording import why

MADE_BY = "made_by.json"
_COMPRESSION = 1  # zlib's: files 5 to 10 % larger than at 6, encoded in half the time
_BLOCK = 4096  # bytes that a file takes on most disks, however few it holds
_AHEAD = 4  # tasks per thread that may wait: memory is bounded


def write_images(
    sampler: Sampler,
    seeds: Sequence[int],
    classes: Sequence[int],
    folder: Path,
    truncation: float,
    run: str,
    done: Callable[[int], None] = lambda _: None,
) -> None:
    """An image per seed, seed00000.png …, of a class drawn from it; with several classes one of each,
    seed00000-class3.png … Files that are there already, and whole, are kept.

    run: name and kimg, written to the folder for people. done: is given how many more files are there. Raises
    UserError for a folder of other images, or that cannot be written.
    """
    refuse_truncation(truncation)  # before the folder is claimed for such images
    try:
        _claim(folder, sampler.made_of | {"truncation": truncation, "classes": sorted(classes)}, run)
        there = {path.name for path in folder.glob("*.png") if _is_whole(path)}
        labels: Sequence[int | None] = classes or [None]
        wanted = [(seed, label) for seed in dict.fromkeys(seeds) for label in labels]
        names = {name_of(*one, len(classes) > 1): one for one in wanted}
        missing = {name: one for name, one in names.items() if name not in there}
        done(len(names) - len(missing))
        _write_missing(sampler, missing, folder, truncation, done)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {why(error)}. The same command resumes.") from None


def name_of(seed: int, label: int | None, several: bool) -> str:
    """Of an image's file. several: classes."""
    return f"seed{seed:05d}-class{label}.png" if several else f"seed{seed:05d}.png"


def _claim(folder: Path, made_by: dict[str, Any], run: str) -> None:
    """Make the folder, or find that its images are of the same kind."""
    folder.mkdir(parents=True, exist_ok=True)
    # Before it is read: of another process of the same job, images come after it.
    others = any(not path.name.lstrip(".").startswith(MADE_BY) for path in folder.iterdir())
    try:
        before = json.loads((folder / MADE_BY).read_text("utf-8"))
    except FileNotFoundError:
        if others:
            raise UserError(f"{folder} holds other files: give a new or an empty folder.") from None
        write(folder / MADE_BY, json.dumps({"run": run, **made_by}, indent=1) + "\n")
        return
    except ValueError as error:
        raise UserError(f"{folder / MADE_BY} is damaged ({error}): give another folder.") from None
    if differ := [key for key, value in made_by.items() if before.get(key) != value]:
        was = "; ".join(f"{key} {before.get(key)}, not {made_by[key]}" for key in differ)
        raise UserError(f"{folder} holds other images, of {before.get('run')} ({was}): give another folder.")


def _is_whole(path: Path) -> bool:
    """Does it end as a PNG does? After a kill or a power failure the last files may not."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - len(END)))
        return file.read() == END


def _write_missing(
    sampler: Sampler,
    missing: Mapping[str, tuple[int, int | None]],
    folder: Path,
    truncation: float,
    done: Callable[[int], None],
) -> None:
    """Images are made here while threads write the last ones, mostly without the interpreter's lock."""
    if not missing:
        return
    seeds, labels = zip(*missing.values(), strict=True)
    z, c = sampler.latents(seeds)
    if labels[0] is not None:
        c = torch.tensor(labels)
    names = list(missing)
    threads = cores()
    waiting: deque[Future[int]] = deque()
    with ThreadPoolExecutor(threads, "png") as pool:
        try:
            for number, images in enumerate(sampler.images(z, c, truncation)):
                while len(waiting) >= _AHEAD * threads:
                    done(waiting.popleft().result())
                files = names[number * BATCH : (number + 1) * BATCH]
                waiting.append(pool.submit(_write, images, folder, files))
            while waiting:
                done(waiting.popleft().result())
        finally:
            pool.shutdown(cancel_futures=True)


def _write(images: Tensor, folder: Path, names: Sequence[str]) -> int:
    """Returns how many. In place: a rename would cost as much as the file itself (ext4)."""
    for encoded, name in zip(_encoded(images.permute(0, 2, 3, 1).numpy()), names, strict=True):
        with open(f"{folder}/{name}", "wb") as written:  # noqa: PTH123  Path is slower
            written.write(encoded)
    return len(images)


def _encoded(images: NDArray[np.uint8]) -> Iterator[bytes]:
    """A PNG per image, of uint8 [N, H, W, C]; compressed where that saves a block."""
    if bytes_of(*images.shape[1:]) < 0.9 * _BLOCK:
        yield from plain_pngs(images)
        return
    for image in images:
        encoded = BytesIO()  # Pillow is slower on a file
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(
            encoded, "PNG", compress_level=_COMPRESSION
        )
        yield encoded.getvalue()
