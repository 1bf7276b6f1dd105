"""Plan → samples → batches, for one rank: a webdataset pipeline whose source stage is the plan.

The stages are those of any `webdataset.DataPipeline`: `PlannedSamples` (the source, in place of shard lists
and tar streams), then a user's own, then `Decode`, then batches. A DataLoader runs one pipeline per worker;
worker k takes the steps k, k + K, …, which the loader puts back in order, so the order of the samples is the
same for any number of workers, and neither ranks nor workers need to agree on anything while they run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray

from pipeline.config import Data, UserError
from pipeline.data.augment import flips
from pipeline.data.index import Index
from pipeline.data.plan import HeldOutPlan, Plan
from pipeline.data.prefetch import Prefetch
from pipeline.data.reader import BadSampleError, Reader, Sample
from pipeline.data.spares import Spares
from pipeline.data.stages import Decode, Decoded, PlannedSamples, Stage
from pipeline.data.workers import Loader

_CHECKED_SHARDS = 8

_Item = tuple[torch.Tensor, tuple[str, ...]]


class Batch(NamedTuple):
    """images: uint8 [b, C, H, W], those of training channels last in memory and pinned when CUDA is there;
    labels: int64 [b], or None if unconditional.

    bad: what is wrong with the samples that others stand in for, as far as not said with an earlier batch.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    bad: tuple[str, ...] = ()


class _Batches:
    """The last stage: raw samples → decoded, one step's in a flat buffer, so that one tensor crosses to the
    trainer, and beside it what was wrong with replaced samples.

    The buffer (uint8) holds the labels as int64, then the images. A UserError is passed on as a value: raised
    in a worker it would reach the user buried in a traceback.
    """

    def __init__(
        self,
        source: PlannedSamples,
        plan: Plan,
        stages: Sequence[Stage],
        decoder: Decode,
        shape: tuple[int, int, int, int],
        xflip: bool,
        spares: Spares | None,
    ) -> None:
        self._source, self._plan, self._stages, self._decoder = source, plan, stages, decoder
        self._shape, self._xflip, self._spares = shape, xflip, spares

    def __call__(self, samples: Iterable[Sample]) -> Iterator[_Item | UserError]:
        source = iter(samples)
        for start in self._source.positions():
            buffer = torch.empty(_bytes(self._shape), dtype=torch.uint8)
            batch = _unpack(buffer, self._shape)
            assert batch.labels is not None
            try:
                self._fill(batch.images.numpy(), batch.labels.numpy(), source, start)
            except UserError as error:
                yield error
                return
            yield buffer, self._spares.found() if self._spares else ()

    def _fill(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64], source: Iterator[Sample], start: int
    ) -> None:
        mirrored = self._mirrored(start)
        for i in range(len(images)):
            image, labels[i] = self._decode(next(source), start + i)
            images[i] = image[:, :, ::-1] if mirrored[i] else image

    def _decode(self, sample: Sample, position: int) -> Decoded:
        try:
            return self._decoder.one(sample)
        except BadSampleError as error:
            if self._spares is None:
                raise
            return self._spares.replace(position, error, self._staged)

    def _staged(self, sample: Sample) -> Decoded:
        """A stand-in goes through the user's stages like any other sample."""
        samples: Iterable[Sample] = [sample]
        for stage in self._stages:
            samples = stage(samples)
        return self._decoder.one(next(iter(samples)))

    def _mirrored(self, start: int) -> NDArray[np.bool_]:
        images = self._shape[0]
        if not self._xflip:
            return np.zeros(images, np.bool_)
        epochs = (start + np.arange(images, dtype=np.int64)) // self._plan.size
        return flips(self._plan.seed, epochs, self._plan.samples(start, images))


def _bytes(shape: tuple[int, int, int, int]) -> int:
    return shape[0] * 8 + int(np.prod(shape))


def _unpack(buffer: torch.Tensor, shape: tuple[int, int, int, int]) -> Batch:
    split = shape[0] * 8
    count, channels, height, width = shape
    # Channels last in memory, as decoders write and the networks' convolutions read: no image is transposed.
    images = buffer[split:].view(count, height, width, channels).permute(0, 3, 1, 2)
    return Batch(images, buffer[:split].view(torch.int64))


class TrainingBatches(Iterator[Batch]):
    """What training_batches returns: an iterator that can be closed."""

    def __init__(
        self, loader: Loader, shape: tuple[int, int, int, int], conditional: bool, max_bad: int
    ) -> None:
        self._loader, self._shape, self._conditional = loader, shape, conditional
        self._bad: set[str] = set()
        self._max_bad = max_bad

    def __next__(self) -> Batch:
        item = next(self._loader)
        if isinstance(item, UserError):
            self.close()
            raise item
        buffer, found = item
        batch = _unpack(buffer, self._shape)._replace(bad=self._not_yet_said(found))
        if not self._conditional:
            return batch._replace(labels=None)
        assert batch.labels is not None
        if (batch.labels < 0).any():
            self.close()
            raise _unlabelled()
        return batch

    def _not_yet_said(self, found: Sequence[str]) -> tuple[str, ...]:
        new = tuple(dict.fromkeys(text for text in found if text not in self._bad))
        self._bad |= set(new)
        if len(self._bad) > self._max_bad:
            self.close()
            raise UserError(
                f"{len(self._bad)} images cannot be used, more than data.max_bad={self._max_bad}. "
                f"The last one: {new[-1]}"
            )
        return new

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
    xflip: bool = False,
    max_bad: int = 0,
    stages: Sequence[Stage] = (),
) -> TrainingBatches:
    """This rank's batches from global position `start` on, without end: step i covers the positions
    start + i * batch_size …, of which the rank gets its contiguous batch_size / world.

    Worker processes start at once (0: decode in this process, as asked). `stages` are put between reading and
    decoding; they get and give raw samples one for one, as webdataset.map does. Up to `max_bad` different
    damaged images are replaced by others of the plan. Iterating raises UserError for one more, for a shard
    that cannot be read or an image that does not fit; `close()` ends the workers, as does the end of the
    process.
    """
    shape = (batch_size // world, channels, size, size)
    spares = Spares(index, plan) if max_bad else None
    source = PlannedSamples(index, plan, start, batch_size, rank, world, spares)
    batches = _Batches(source, plan, stages, Decode(size, channels), shape, xflip, spares)
    pipeline = webdataset.DataPipeline(source, *stages, batches)
    return TrainingBatches(Loader(pipeline, workers), shape, conditional, max_bad)


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
    last ones only the first `valid` (perhaps 0) images count, the others are black. Nothing stands in for a
    damaged image, since scores on other images would not compare: it raises UserError, as does one that does
    not fit.
    """
    reader, decoder, ahead = Reader(index, plan.window), Decode(size, channels), Prefetch(index)
    try:
        for pairs, valid in plan.chunks(rank, world, batch, limit):
            ahead.want(pairs[:, 0].tolist())
            images = np.zeros((batch, channels, size, size), np.uint8)
            labels = np.zeros(batch, np.int64)
            for i, (shard, row) in enumerate(pairs.tolist()):
                images[i], labels[i] = decoder.one(reader.read(shard, row))
            if conditional and (labels < 0).any():
                raise _unlabelled()
            yield Batch(torch.from_numpy(images), torch.from_numpy(labels) if conditional else None), valid
    finally:
        ahead.close()
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

    Raises UserError for an image of another size than data.size, one that cannot be decoded (unless
    data.max_bad allows for some), if data.conditional, shards without labels, and too little room for
    shards of elsewhere, of which only one is fetched for this.
    """
    if index.remote:
        index.remote.check_room([shard.filesize for shard in index.shards], data.window)
    if data.conditional and not index.num_classes:
        raise UserError(f"data.conditional=true, but the shards in {index.where} have no labels (.cls).")
    filled = [i for i, shard in enumerate(index.shards) if shard.nsamples]
    reader, decoder = Reader(index, data.window), Decode(data.size, data.channels)
    try:
        for i in filled[:1] if index.remote else filled[:: max(1, len(filled) // _CHECKED_SHARDS)]:
            try:
                decoder.one(reader.read(i, 0))
            except BadSampleError:  # one bad image does not speak for the others
                if not data.max_bad:
                    raise
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
