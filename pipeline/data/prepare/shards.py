"""Images in WebDataset shards, also in odd ones that training passes over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.data.index import Announce, Index, local_index, not_empty
from pipeline.data.prepare.labels import Classes, chosen, renumbered, some
from pipeline.data.prepare.listing import LeftOut
from pipeline.data.prepare.pictures import LeftOutError
from pipeline.data.prepare.source import Stored
from pipeline.data.reader import BadSampleError, Reader, image_of
from pipeline.data.record import shard_of
from pipeline.data.samples import LABEL, PassedOver, shown
from pipeline.data.sidecar import SampleTable, has_odd_labels, scan_all_images
from pipeline.wording import counted


@dataclass(frozen=True)
class AllImages(Index):
    """`tables`: where the images of each shard lie."""

    tables: tuple[SampleTable, ...] = field(default=(), compare=False)

    def table(self, shard: int) -> SampleTable:
        return self.tables[shard]


def all_images(train: str, announce: Announce = lambda _: None) -> Index:
    """As load_index, for shards on this machine, but where a sample has several images each is one by itself.

    Such samples have dots in their keys, which here end at the last one. Raises UserError as load_index does.
    """
    index = local_index(train, announce)
    tables = tuple(
        scan_all_images(index.path(i), shard.url) if shard.unusable else index.table(i)
        for i, shard in enumerate(index.shards)
    )
    shards = tuple(shard_of(shard.url, table) for shard, table in zip(index.shards, tables, strict=True))
    return not_empty(AllImages(index.name, index.root, shards, index.class_names, tables=tables))


class Shards(Stored):
    """The images and labels of shards; whatever else their samples hold is left behind."""

    def __init__(self, index: Index, classes: Classes = "top") -> None:
        """Raises UserError for classes by folders."""
        self._index, self._reader = index, Reader(index, len(index.shards))
        tables = [index.table(shard) for shard in range(len(index.shards))]
        values = np.concatenate([table.label for table in tables])
        labelled = renumbered(values, index.class_names, "the shards")
        keys = (table.key(row) for table in tables for row in range(len(table)))
        lacking = int((values < 0).sum())
        if lacking == len(values):
            first = index.shards[0].url
            odd = has_odd_labels(index.path(0), first)
            text = f"the labels (.cls) of shard {first} are no numbers of classes. A label is {LABEL}."
            labelled = replace(labelled, warnings=(text,) if odd else _about_folders(keys))
        elif lacking:
            first = next(key for key, value in zip(keys, values, strict=True) if value < 0)
            text = f"{counted(lacking, 'image')} without a label, the first {shown(first)}"
            labelled = replace(labelled, warnings=(f"{text}. A label is {LABEL}.",))
        left_out = [
            item
            for shard, table in zip(index.shards, tables, strict=True)
            for kind, what in (("no image", table.without_image), ("unusable", table.unusable))
            for item in _passed_over(shard.url, kind, what)
        ]
        super().__init__(index.name, chosen(labelled, classes, index.name), left_out)

    def fingerprint(self) -> str:
        return self._index.fingerprint

    def path(self, number: int) -> str:
        shard, row = self._index.place(number)
        return f"{self._index.shards[shard].url}/{self._index.table(shard).key(row)}"

    def describe(self, number: int) -> str:
        shard, row = self._index.place(number)
        return f"sample {self._index.table(shard).key(row)} of {self._index.shards[shard].url}"

    def read(self, number: int) -> bytes:
        try:
            sample = self._reader.read(*self._index.place(number))
        except BadSampleError as error:
            raise LeftOutError("damaged", str(error)) from None
        return image_of(sample)


def _passed_over(shard: str, kind: str, what: PassedOver) -> Iterator[LeftOut]:
    """The samples of a shard that have no image to use: the first of them one by one."""
    yield from (LeftOut(shard, kind, reason) for reason in what.reasons)
    if more := what.count - len(what.reasons):
        yield LeftOut(shard, kind, f"{more:,} more samples like these", more)


def _about_folders(keys: Iterable[str]) -> tuple[str, ...]:
    """A tar of class folders can be read as a shard, but the labels of a shard are its .cls files."""
    folders = sorted({key.rpartition("/")[0] for key in keys if "/" in key})
    if len(folders) < 2:
        return ()
    return (
        f"the folders {some(folders)} of the shards are not taken for classes. If they are, unpack the "
        "shards and prepare the folder.",
    )
