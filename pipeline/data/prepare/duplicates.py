"""Images that are there more than once: the same bytes as they are written, whatever their files are."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import Index
from pipeline.data.prepare.listing import LeftOut
from pipeline.data.prepare.source import Source

KIND = "copies"


def count_copies(index: Index) -> int:
    """How many samples have the image of another one, by its CRC and size: 8 bytes of memory for each."""
    tables = (index.table(shard) for shard in range(len(index.shards)))
    images = [table.crc.astype(np.uint64) << np.uint64(32) | table.size.astype(np.uint64) for table in tables]
    return index.num_samples - len(np.unique(np.concatenate(images)))


def first_of_each(
    images: Source, digests: Iterable[tuple[int, bytes | None]]
) -> tuple[NDArray[np.int64], list[LeftOut]]:
    """The numbers [n], int64, of the images that are no copies of an earlier one, and the copies.

    digests: of each image by its number, in that order; None for one that cannot be read, which is kept for
    its error to be said.
    """
    first: dict[bytes, int] = {}
    kept, copies = list[int](), list[LeftOut]()
    for number, digest in digests:
        if digest is None or first.setdefault(digest, number) == number:
            kept.append(number)
        else:
            reason = f"a copy of {images.path(first[digest])}"
            copies.append(LeftOut(images.describe(number), KIND, reason))
    return np.array(kept, np.int64), copies
