"""Every image of odd shards, for `shardgan prepare` to make sound ones of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

from pipeline.data.index import Index, local_index, not_empty
from pipeline.data.record import shard_of
from pipeline.data.sidecar import SampleTable, scan_all_images


@dataclass(frozen=True)
class _AllImages(Index):
    """`tables` are those of the shards that have samples with several images."""

    tables: Mapping[int, SampleTable] = field(default_factory=dict, compare=False)

    def table(self, shard: int) -> SampleTable:
        return self.tables[shard] if shard in self.tables else super().table(shard)


def load_all_images(train: str, announce: Callable[[str], None] = lambda _: None) -> Index:
    """As load_index, for shards on this machine, but where a sample has several images each is one by itself.

    That is so for keys with dots: here they end at the last one. Raises UserError as load_index does.
    """
    index = local_index(train, announce)
    odd = [i for i, shard in enumerate(index.shards) if shard.unusable]
    tables = {i: scan_all_images(index.path(i), index.shards[i].url) for i in odd}
    shards = tuple(
        shard_of(shard.url, tables[i]) if i in tables else shard for i, shard in enumerate(index.shards)
    )
    values = {item.name: getattr(index, item.name) for item in fields(index)}
    return not_empty(_AllImages(**values | {"shards": shards, "tables": tables}))
