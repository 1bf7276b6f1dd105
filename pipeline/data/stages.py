"""Our stages of the pipeline: read what is planned, decode it.

They work in anyone's `webdataset.DataPipeline`; stream.py makes the one that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from pipeline.config import UserError
from pipeline.data.decode import BadImageError, WrongSizeError, decode
from pipeline.data.index import Index
from pipeline.data.plan import Plan
from pipeline.data.reader import BadSampleError, Reader, Replacements, Sample, image_of
from pipeline.data.remote.prefetch import Prefetch
from pipeline.data.samples import LABEL, parse_label
from pipeline.plugins import import_named

Decoded = tuple[NDArray[np.uint8], int]
Stage = Callable[[Iterable[Sample]], Iterable[Sample]]


class OwnStage:
    """A user's own stage by its name, package.module:name, which may lie in the current folder.

    It is pickled by that name, so that a worker that is not forked gets stages that do not pickle, such as
    lambdas. Raises UserError if it cannot be imported or called.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._stage: Stage = import_named(name, f"data.stages: {name} (package.module:name)")
        if not callable(self._stage):
            raise UserError(
                f"data.stages: {name} is not a stage, which is called with an iterator of samples."
            )

    def __call__(self, samples: Iterable[Sample]) -> Iterable[Sample]:
        return self._stage(samples)

    def __reduce__(self) -> tuple[type[OwnStage], tuple[str]]:
        return type(self), (self._name,)


def load_stages(names: Sequence[str]) -> tuple[Stage, ...]:
    """A user's own stages. Raises UserError, see `OwnStage`."""
    return tuple(map(OwnStage, names))


def apply(stages: Sequence[Stage], sample: Sample) -> Sample:
    """One sample sent through the stages by itself."""
    samples: Iterable[Sample] = [sample]
    for stage in stages:
        samples = stage(samples)
    changed = next(iter(samples), None)
    if changed is None:
        raise UserError(
            f"data.stages gave nothing for sample {sample['__key__']!r}; they must give one for each."
        )
    return changed


class PlannedSamples:
    """The source stage: raw samples in the order of the plan, without end.

    Step i stands for the global positions start + i * batch_size …, of which this rank reads its equal,
    contiguous slice. DataLoader worker k of K reads only the steps k, k + K, …
    A damaged sample is an error, unless `replacements` allow for it.
    """

    def __init__(
        self,
        index: Index,
        plan: Plan,
        start: int,
        batch_size: int,
        rank: int,
        world: int,
        replacements: Replacements | None = None,
    ) -> None:
        if batch_size % world:
            raise ValueError(f"a batch of {batch_size} cannot be divided equally over {world} ranks")
        self._index, self._plan, self._batch_size = index, plan, batch_size
        self._local = batch_size // world
        self._start = start + rank * self._local
        self._replacements = replacements or Replacements(index, plan, allowed=False)

    def steps(self) -> Iterator[int]:
        """The global position of the first sample of each step that this worker reads."""
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        return count(self._start + first * self._batch_size, stride * self._batch_size)

    def positions(self) -> Iterator[int]:
        """The global position of each sample that this worker reads."""
        return (start + i for start in self.steps() for i in range(self._local))

    def planned(self, ahead: Prefetch, epochs: int | None = None) -> Iterator[tuple[int, int, int]]:
        """(position, shard, row) of each sample that this worker reads.

        Shards are prefetched, during the first `epochs` only if given.
        """
        for start in self.steps():
            done = epochs is not None and start - self._start >= epochs * self._plan.size
            ahead.want(() if done else self._plan.shards_from(start, windows=2))
            for i, (shard, row) in enumerate(self._plan.samples(start, self._local).tolist()):
                yield start + i, shard, row

    def __call__(self) -> Iterator[Sample]:
        reader, ahead = Reader(self._index, self._plan.window), Prefetch(self._index)
        try:
            for position, shard, row in self.planned(ahead):
                try:
                    sample = reader.read(shard, row)
                except BadSampleError as error:
                    sample = self._replacements.replace(position, error, use=lambda sample: sample)
                yield sample
        finally:
            ahead.close()
            reader.close()


class Decode:
    """A stage: raw samples → (image uint8 [C, H, W], label or -1).

    num_classes: the label must be one of so many; None: any will do, or none.
    """

    def __init__(self, size: int, channels: int, num_classes: int | None = None) -> None:
        self._size, self._channels, self._num_classes = size, channels, num_classes

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Decoded]:
        for sample in samples:
            yield self.one(sample)

    def one(self, sample: Sample) -> Decoded:
        """Raises BadSampleError, naming shard and sample, for an image that cannot be decoded or has another
        size, or a missing label; UserError for a sample without an image."""
        where = f"shard {sample.get('__url__')} sample {sample.get('__key__')}"
        try:
            image = decode(image_of(sample), self._size, self._channels)
        except WrongSizeError as wrong:
            raise BadSampleError(
                f"{where} is {wrong.width}x{wrong.height} but data.size={self._size}; "
                f"run `shardgan prepare … --size {self._size}`."
            ) from None
        except BadImageError as error:
            raise BadSampleError(f"{where} cannot be decoded: {error}.") from None
        label = parse_label(sample.get("cls"))
        if self._num_classes is not None and label < 0:
            raise BadSampleError(f"{where} has no label, {LABEL}; data.conditional=true needs one.")
        if self._num_classes is not None and label >= self._num_classes:
            raise BadSampleError(
                f"{where} has label {label}; the shards' labels end at {self._num_classes - 1}."
            )
        return image, label
