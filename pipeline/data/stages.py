"""The stages of the pipeline that are ours: what is read, and how it is decoded.

They work in anyone's `webdataset.DataPipeline`; stream.py makes the one that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from pipeline.config import UserError
from pipeline.data.decode import BadImageError, WrongSizeError, decode
from pipeline.data.index import Index
from pipeline.data.plan import Plan
from pipeline.data.prefetch import Prefetch
from pipeline.data.reader import BadSampleError, Reader, Sample
from pipeline.data.sidecar import IMAGE_EXTENSIONS
from pipeline.data.spares import Spares

Decoded = tuple[NDArray[np.uint8], int]
Stage = Callable[[Iterable[Sample]], Iterable[Sample]]


class PlannedSamples:
    """The source stage: raw samples in the order of the plan, without end.

    Step i stands for the global positions start + i * batch_size …; this rank's equal, contiguous slice of
    it is read. In a DataLoader worker k of K only steps k, k + K, … are. A damaged sample is replaced by a
    spare one if there are `spares`; without, it is an error.
    """

    def __init__(
        self,
        index: Index,
        plan: Plan,
        start: int,
        batch_size: int,
        rank: int,
        world: int,
        spares: Spares | None = None,
    ) -> None:
        if batch_size % world:
            raise ValueError(f"a batch of {batch_size} cannot be divided equally over {world} ranks")
        self._index, self._plan, self._batch_size = index, plan, batch_size
        self._local = batch_size // world
        self._start = start + rank * self._local
        self._spares = spares

    def positions(self) -> Iterator[int]:
        """The global position of the first sample of each step that this worker reads."""
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        return count(self._start + first * self._batch_size, stride * self._batch_size)

    def __call__(self) -> Iterator[Sample]:
        reader, ahead = Reader(self._index, self._plan.window), Prefetch(self._index)
        try:
            for start in self.positions():
                ahead.want(self._plan.shards_from(start, windows=2))
                for i, (shard, row) in enumerate(self._plan.samples(start, self._local).tolist()):
                    yield self._read(reader, shard, row, start + i)
        finally:
            ahead.close()
            reader.close()

    def _read(self, reader: Reader, shard: int, row: int, position: int) -> Sample:
        try:
            return reader.read(shard, row)
        except BadSampleError as error:
            if self._spares is None:
                raise
            return self._spares.replace(position, error, use=lambda sample: sample)


class Decode:
    """A stage: raw samples → (image uint8 [C, H, W], label or -1)."""

    def __init__(self, size: int, channels: int) -> None:
        self._size, self._channels = size, channels

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Decoded]:
        for sample in samples:
            yield self.one(sample)

    def one(self, sample: Sample) -> Decoded:
        """Raises UserError, naming shard and sample, for an image that does not fit, and its subclass
        BadSampleError for one that cannot be decoded."""
        where = f"shard {sample.get('__url__')} sample {sample.get('__key__')}"
        data = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
        if data is None:
            raise UserError(f"{where} has no image left after the stages before decoding.")
        try:
            image = decode(data, self._size, self._channels)
        except WrongSizeError as wrong:
            raise UserError(
                f"{where} is {wrong.width}x{wrong.height} but data.size={self._size}; "
                f"run `shardgan prepare … --size {self._size}`."
            ) from None
        except BadImageError as error:
            raise BadSampleError(f"{where} cannot be decoded: {error}.") from None
        return image, int(sample.get("cls", -1))
