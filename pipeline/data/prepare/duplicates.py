"""Images that are there more than once: the same bytes as they are written, whatever their files are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import Index
from pipeline.data.prepare.listing import LeftOut
from pipeline.data.prepare.source import Source
from pipeline.data.reader import Reader, image_of

KIND = "copies"


def count_copies(index: Index) -> int:
    """How many samples have the image of another one.

    Those of equal CRC and size are read and compared: PNGs hold CRCs of their own, so two of one size have
    the same with a probability of 2^-16, not 2^-32.
    """
    images = [index.table(shard).crc_and_size for shard in range(len(index.shards))]
    _, kinds, counts = np.unique(np.concatenate(images), return_inverse=True, return_counts=True)
    alike = np.flatnonzero(counts[kinds] > 1).tolist()
    reader = Reader(index, window=1)
    try:
        read = (image_of(reader.read(*index.place(number))) for number in alike)
        return len(alike) - len({hashlib.sha256(image).digest() for image in read})
    finally:
        reader.close()


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
