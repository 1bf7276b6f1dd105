"""Tiny shards whose images say which sample they are."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

MakeShards = Callable[..., Path]  # the fixture of that name
Members = Iterable[tuple[str, bytes]]
SIZE = 4  # pixels: the smallest that has room for shard and row


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def image_of(shard: int, row: int) -> bytes:
    pixels = np.zeros((SIZE, SIZE), np.uint8)
    pixels.reshape(-1)[:8] = np.array([shard, row], ">u4").view(np.uint8)
    return png(pixels)


def sample_of(image: np.ndarray) -> tuple[int, int]:
    """(shard, row) of a decoded image [1, SIZE, SIZE]."""
    shard, row = np.ascontiguousarray(image.reshape(-1)[:8]).view(">u4").tolist()
    return shard, row


def write_tar(path: Path, members: Members, format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members_of(shard: int, rows: int, classes: int) -> Members:
    for row in range(rows):
        if classes:
            yield f"{shard}-{row}.cls", str((shard + row) % classes).encode()
        yield f"{shard}-{row}.png", image_of(shard, row)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
