"""Plan → samples → batches, for one rank: a webdataset pipeline whose source stage is the plan.

The stages are those of any `webdataset.DataPipeline`: `PlannedSamples` (the source, in place of shard lists
and tar streams), then a user's own, then `Decode`, then batches. A DataLoader runs one pipeline per worker;
worker k takes the steps k, k + K, …, which the loader puts back in order, so the order of the samples is the
same for any number of workers, and neither ranks nor workers need to agree on anything while they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from pipeline.config import Data, UserError
from pipeline.data.decode import BadImageError, WrongSizeError, decode
from pipeline.data.index import Index
from pipeline.data.plan import HeldOutPlan, Plan
from pipeline.data.reader import Reader, Sample
from pipeline.data.sidecar import IMAGE_EXTENSIONS
from pipeline.data.workers import Loader

_CHECKED_SHARDS = 8

Decoded = tuple[NDArray[np.uint8], int]
Stage = Callable[[Iterable[Sample]], Iterable[Sample]]


class Batch(NamedTuple):
    """images: uint8 [b, C, H, W], pinned when CUDA is there; labels: int64 [b], or None if unconditional."""

    images: torch.Tensor
    labels: torch.Tensor | None


class PlannedSamples:
    """The source stage: raw samples in the order of the plan, without end.

    Step i stands for the global positions start + i * batch_size …; this rank's equal, contiguous slice of
    it is read. In a DataLoader worker k of K only steps k, k + K, … are.
    """

    def __init__(self, index: Index, plan: Plan, start: int, batch_size: int, rank: int, world: int) -> None:
        if batch_size % world:
            raise ValueError(f"a batch of {batch_size} cannot be divided equally over {world} ranks")
        self._index, self._plan, self._batch_size = index, plan, batch_size
        self._local = batch_size // world
        self._start = start + rank * self._local

    def __call__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        step, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        reader = Reader(self._index, self._plan.window)
        try:
            while True:
                position = self._start + step * self._batch_size
                for shard, row in self._plan.samples(position, self._local).tolist():
                    yield reader.read(shard, row)
                step += stride
        finally:
            reader.close()


class Decode:
    """A stage: raw samples → (image uint8 [C, H, W], label or -1)."""

    def __init__(self, size: int, channels: int) -> None:
        self._size, self._channels = size, channels

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Decoded]:
        for sample in samples:
            yield self.one(sample)

    def one(self, sample: Sample) -> Decoded:
        """Raises UserError, naming shard and sample, for an image that cannot be decoded or does not fit."""
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
            raise UserError(f"{where} cannot be decoded: {error}.") from None
        return image, int(sample.get("cls", -1))


class _Batches:
    """The last stage: `count` decoded samples → one flat buffer, so that one tensor crosses to the trainer.

    The buffer (uint8) holds the labels as int64, then the images. A UserError is passed on as a value: raised
    in a worker it would reach the user buried in a traceback.
    """

    def __init__(self, count: int, size: int, channels: int) -> None:
        self._shape = (count, channels, size, size)

    def __call__(self, samples: Iterable[Decoded]) -> Iterator[torch.Tensor | UserError]:
        source = iter(samples)
        while True:
            buffer = torch.empty(_bytes(self._shape), dtype=torch.uint8)
            batch = _unpack(buffer, self._shape)
            images, labels = batch.images.numpy(), np.empty(self._shape[0], np.int64)
            try:
                for i in range(len(images)):
                    images[i], labels[i] = next(source)
            except UserError as error:
                yield error
                return
            assert batch.labels is not None
            batch.labels.numpy()[:] = labels
            yield buffer


def _bytes(shape: tuple[int, int, int, int]) -> int:
    return shape[0] * 8 + int(np.prod(shape))


def _unpack(buffer: torch.Tensor, shape: tuple[int, int, int, int]) -> Batch:
    split = shape[0] * 8
    return Batch(buffer[split:].view(shape), buffer[:split].view(torch.int64))


class TrainingBatches(Iterator[Batch]):
    """What training_batches returns: an iterator that can be closed."""

    def __init__(self, loader: Loader, shape: tuple[int, int, int, int], conditional: bool) -> None:
        self._loader, self._shape, self._conditional = loader, shape, conditional

    def __next__(self) -> Batch:
        item = next(self._loader)
        if isinstance(item, UserError):
            self.close()
            raise item
        batch = _unpack(item, self._shape)
        if not self._conditional:
            return batch._replace(labels=None)
        assert batch.labels is not None
        if (batch.labels < 0).any():
            self.close()
            raise _unlabelled()
        return batch

    def close(self) -> None:
        self._loader.close()


def training_batches(
    index: Index,
    plan: Plan,
    *,
    start: int,
    batch_size: int,
    rank: int,
    world: int,
    size: int,
    channels: int,
    conditional: bool,
    workers: int,
    stages: Sequence[Stage] = (),
) -> TrainingBatches:
    """This rank's batches from global position `start` on, without end: step i covers the positions
    start + i * batch_size …, of which the rank gets its contiguous batch_size / world.

    Worker processes start at once (0: decode in this process, as asked). `stages` are put between reading and
    decoding; they get and give raw samples one for one, as webdataset.map does. Iterating raises UserError
    for a damaged shard or an image that does not fit; `close()` ends the workers, as does the end of the
    process.
    """
    shape = (batch_size // world, channels, size, size)
    pipeline = webdataset.DataPipeline(
        PlannedSamples(index, plan, start, batch_size, rank, world),
        *stages,
        Decode(size, channels),
        _Batches(*shape[:1], size, channels),
    )
    return TrainingBatches(Loader(pipeline, workers), shape, conditional)


def heldout_batches(
    index: Index,
    plan: HeldOutPlan,
    *,
    batch: int,
    rank: int,
    world: int,
    size: int,
    channels: int,
    conditional: bool,
    limit: int | None = None,
) -> Iterator[tuple[Batch, int]]:
    """The first `limit` held-out samples (None: all), each once over all ranks, as (batch, valid).

    They are decoded in this process. Every rank gets equally many batches, all of `batch` images; of the
    last ones only the first `valid` (perhaps 0) images count, the others are black. Raises UserError as
    training_batches does.
    """
    reader, decoder = Reader(index, plan.window), Decode(size, channels)
    try:
        for pairs, valid in plan.chunks(rank, world, batch, limit):
            images = np.zeros((batch, channels, size, size), np.uint8)
            labels = np.zeros(batch, np.int64)
            for i, (shard, row) in enumerate(pairs.tolist()):
                images[i], labels[i] = decoder.one(reader.read(shard, row))
            if conditional and (labels < 0).any():
                raise _unlabelled()
            yield Batch(torch.from_numpy(images), torch.from_numpy(labels) if conditional else None), valid
    finally:
        reader.close()


def label_frequencies(index: Index, plan: Plan) -> NDArray[np.float64]:
    """Share of each class among the samples of a plan, float64 [index.num_classes], from the index alone."""
    counts = np.zeros(index.num_classes, np.float64)
    for shard in np.flatnonzero(plan.counts).tolist():
        if plan.whole_shards:
            for label, count in index.shards[shard].labels.items():
                counts[label] += count
        else:
            labels = index.table(shard).label[plan.rows(shard)]
            counts += np.bincount(labels[labels >= 0], minlength=len(counts))
    frequencies: NDArray[np.float64] = counts / max(counts.sum(), 1.0)
    return frequencies


def check_images(index: Index, data: Data) -> None:
    """Decode the first image of a few shards, so that what cannot be trained on is said before training.

    Raises UserError for an image of another size than data.size, one that cannot be decoded, and, if
    data.conditional, shards without labels.
    """
    if data.conditional and not index.num_classes:
        raise UserError(f"data.conditional=true, but the shards in {index.root} have no labels (.cls).")
    filled = [i for i, shard in enumerate(index.shards) if shard.nsamples]
    reader, decoder = Reader(index, data.window), Decode(data.size, data.channels)
    try:
        for i in filled[:: max(1, len(filled) // _CHECKED_SHARDS)]:
            decoder.one(reader.read(i, 0))
    finally:
        reader.close()
    for shard in index.shards if data.conditional else ():
        if sum(shard.labels.values()) != shard.nsamples:
            missing = shard.nsamples - sum(shard.labels.values())
            raise UserError(
                f"data.conditional=true, but {missing} of the {shard.nsamples} samples of shard {shard.url} "
                "have no label: a .cls that holds one whole number."
            )


def _unlabelled() -> UserError:
    return UserError("data.conditional=true, but a sample has no label: a .cls that holds one whole number.")
