"""Decoded samples → batches, in the process that decodes: the last stages of the stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import Data, UserError
from pipeline.data.cache import Cache
from pipeline.data.decode import dtype_of
from pipeline.data.index import Index
from pipeline.data.plan import Plan
from pipeline.data.reader import BadSampleError, Reader, Replacements, Sample
from pipeline.data.remote.prefetch import Prefetch
from pipeline.data.stages import Decode, Decoded, PlannedSamples, Stage, apply

Item = tuple[torch.Tensor, tuple[str, ...]]
_LABEL = 8  # bytes


@dataclass(frozen=True)
class Form:
    """What a rank's batch is: `count` images [channels, size, size]."""

    count: int
    channels: int
    size: int
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, data: Data, count: int) -> Form:
        return cls(count, data.channels, data.size, dtype_of(data))

    @property
    def bytes(self) -> int:
        """Of the buffer that a batch crosses to the trainer in."""
        pixels = self.count * self.channels * self.size * self.size
        return self.count * _LABEL + pixels * self.dtype.itemsize


class Batch(NamedTuple):
    """images: uint8 [b, C, H, W] (latents: float32), in training channels last in memory, and pinned if there
    is CUDA; labels: int64 [b], or None if unconditional.

    bad: what is wrong with samples that were replaced, unless an earlier batch has said it.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    bad: tuple[str, ...] = ()


class PlannedDecode:
    """The stage after a user's own: raw samples, one per planned position, decoded.

    The replacement of one that cannot be decoded goes through the user's stages as well.
    """

    def __init__(
        self, source: PlannedSamples, decoder: Decode, stages: Sequence[Stage], replacements: Replacements
    ) -> None:
        self._source, self._decoder, self._stages, self._replacements = source, decoder, stages, replacements

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Decoded]:
        for position, sample in zip(self._source.positions(), samples, strict=False):
            try:
                decoded = self._decoder.one(sample)
            except BadSampleError as error:
                decoded = self._replacements.replace(position, error, self._staged)
            yield decoded

    def _staged(self, sample: Sample) -> Decoded:
        return self._decoder.one(apply(self._stages, sample))


class CachedDecode:
    """A source of decoded samples: each is read and decoded the first time, then comes from memory.

    Replacements are not cached: they belong to a position, and the next epoch has others.
    """

    def __init__(
        self,
        index: Index,
        plan: Plan,
        source: PlannedSamples,
        decoder: Decode,
        cache: Cache,
        replacements: Replacements,
    ) -> None:
        self._index, self._plan, self._source = index, plan, source
        self._decoder, self._cache, self._replacements = decoder, cache, replacements

    def __call__(self) -> Iterator[Decoded]:
        reader, ahead = Reader(self._index, self._plan.window), Prefetch(self._index)
        try:
            for position, shard, row in self._source.planned(ahead, epochs=1):
                cached = self._cache.get(shard, row)
                yield self._decode(reader, shard, row, position) if cached is None else cached
        finally:
            ahead.close()
            reader.close()

    def _decode(self, reader: Reader, shard: int, row: int, position: int) -> Decoded:
        try:
            decoded = self._decoder.one(reader.read(shard, row))
        except BadSampleError as error:
            return self._replacements.replace(position, error, self._decoder.one)
        self._cache.put(shard, row, *decoded)
        return decoded


class Turns:
    """Checks that a user's stages, put between `before` and `after`, give one sample for each they get, in
    order: batches are made by position."""

    def __init__(self) -> None:
        self._due: deque[str] = deque()

    def before(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            self._due.append(sample["__key__"])
            yield sample

    def after(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            due = self._due.popleft() if self._due else None
            if sample.get("__key__") != due:
                raise UserError(
                    f"data.stages gave sample {sample.get('__key__')!r} where {due!r} is due. A stage must "
                    "give one sample for each it gets, in order, as webdataset.map does."
                )
            yield sample
        raise UserError("data.stages came to an end. A stage must give one sample for each it gets.")


class Batches:
    """The last stage: decoded samples → one step's in a flat buffer, so that a single tensor crosses to the
    trainer, and what was wrong with replaced samples.

    The buffer (uint8) holds the labels as int64, then the images. A UserError is passed on as a value: one
    raised in a worker would reach the user inside a traceback.
    """

    def __init__(
        self, source: PlannedSamples, plan: Plan, form: Form, xflip: bool, replacements: Replacements
    ) -> None:
        self._source, self._plan, self._form = source, plan, form
        self._xflip, self._replacements = xflip, replacements

    def __call__(self, samples: Iterable[Decoded]) -> Iterator[Item | UserError]:
        decoded = iter(samples)
        for step in self._source.steps():
            buffer = torch.empty(self._form.bytes, dtype=torch.uint8)
            batch = unpack(buffer, self._form)
            assert batch.labels is not None
            images, labels = batch.images.numpy(), batch.labels.numpy()
            try:
                for i in range(len(images)):
                    images[i], labels[i] = next(decoded)
            except UserError as error:
                yield error
                return
            if self._xflip:
                mirrored = self._mirrored(step)
                images[mirrored] = images[mirrored, :, :, ::-1]
            yield buffer, self._replacements.found()

    def _mirrored(self, step: Sequence[range]) -> NDArray[np.bool_]:
        epochs = np.concatenate([np.asarray(part, np.int64) for part in step]) // self._plan.size
        pairs = np.concatenate([self._plan.samples(part.start, len(part)) for part in step])
        return flips(self._plan.seed, epochs, pairs)


def unpack(buffer: torch.Tensor, form: Form) -> Batch:
    """Images and labels as views of a buffer that Batches filled."""
    split = form.count * _LABEL
    numbers = buffer[split:].view(torch.float32 if form.dtype == np.float32 else torch.uint8)
    # Channels last in memory, as decoders write and the networks' convolutions read: no image is transposed.
    images = numbers.view(form.count, form.size, form.size, form.channels).permute(0, 3, 1, 2)
    return Batch(images, buffer[:split].view(torch.int64))


def flips(seed: int, epochs: NDArray[np.int64], pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which images are mirrored: bool [n] for epochs [n] and (shard, row) pairs [n, 2].

    A fair coin per (seed, epoch, shard, row), the same for any number of ranks and workers and any batch.
    """
    words = np.full(len(pairs), seed, np.uint64)
    for part in (epochs, pairs[:, 0], pairs[:, 1]):
        words = _mix(words ^ _mix(part.astype(np.uint64)))
    coins: NDArray[np.bool_] = words >> np.uint64(63) == 1
    return coins


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea, Flood 2014): every bit of the result depends on every bit of the input."""
    words = words + np.uint64(0x9E3779B97F4A7C15)  # arrays of uint64 wrap around, as intended
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = words ^ (words >> np.uint64(31))
    return mixed
