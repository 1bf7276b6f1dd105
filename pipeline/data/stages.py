"""Our stages of the pipeline: read what is planned, decode it.

They work in anyone's `webdataset.DataPipeline`; stream.py makes the one that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any

from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from pipeline.config import Data, UserError
from pipeline.data.decode import BadImageError, WrongSizeError, decode, decode_latent
from pipeline.data.index import Index
from pipeline.data.plan import Plan
from pipeline.data.reader import BadSampleError, Reader, Replacements, Sample, image_of
from pipeline.data.remote.prefetch import Prefetch
from pipeline.data.samples import LABEL, parse_label
from pipeline.plugins import import_named, reason

Decoded = tuple[NDArray[Any], int]  # see Decode
Stage = Callable[[Iterable[Sample]], Iterable[Sample]]


class OwnStage:
    """A user's own stage by its name, package.module:name, which may lie in the current folder.

    It is pickled by that name, so that a worker that is not forked gets stages that do not pickle, such as
    lambdas. Raises UserError if it cannot be imported or called, or pickled as it is part of a notebook.
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
        if self._name.startswith("__main__:"):
            raise UserError(
                f"data.stages: data workers cannot import {self._name} here. Put it into a file of its own, "
                "module.py, and name it module:stage; or set data.workers=0."
            )
        return type(self), (self._name,)


def load_stages(names: Sequence[str]) -> tuple[Stage, ...]:
    """A user's own stages. Raises UserError, see `OwnStage`."""
    return tuple(map(OwnStage, names))


def apply(stages: Sequence[Stage], sample: Sample) -> Sample:
    """One sample sent through the stages by itself. Raises UserError if one of them fails."""
    samples: Iterable[Sample] = iter([sample])
    try:
        for stage in stages:
            samples = stage(samples)
        changed = next(iter(samples), None)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"data.stages: sample {sample['__key__']!r}: {reason(error)}") from error
    if changed is None:
        raise UserError(
            f"data.stages gave nothing for sample {sample['__key__']!r}; they must give one for each."
        )
    return changed


class PlannedSamples:
    """The source stage: raw samples in the order of the plan, without end.

    Step i stands for the global positions start + i * batch_size …, cut into equal rounds, of each of which
    this rank reads its equal, contiguous part. DataLoader worker k of K reads only the steps k, k + K, …
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
        rounds: int = 1,
        replacements: Replacements | None = None,
    ) -> None:
        if batch_size % (world * rounds):
            raise ValueError(
                f"a batch of {batch_size} cannot be divided equally over {world} ranks and {rounds} rounds"
            )
        self._index, self._plan, self._batch_size = index, plan, batch_size
        images = batch_size // (world * rounds)
        firsts = ((number * world + rank) * images for number in range(rounds))
        self._parts = [range(first, first + images) for first in firsts]
        self._start = start
        self._replacements = replacements or Replacements(index, plan, allowed=False)

    def steps(self) -> Iterator[list[range]]:
        """The global positions of the samples of each step that this worker reads: a range per round."""
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for start in count(self._start + first * self._batch_size, stride * self._batch_size):
            yield [range(start + part.start, start + part.stop) for part in self._parts]

    def positions(self) -> Iterator[int]:
        """The global position of each sample that this worker reads."""
        return (position for step in self.steps() for part in step for position in part)

    def planned(self, ahead: Prefetch, epochs: int | None = None) -> Iterator[tuple[int, int, int]]:
        """(position, shard, row) of each sample that this worker reads.

        Shards are prefetched, during the first `epochs` only if given.
        """
        for part in (part for step in self.steps() for part in step):
            done = epochs is not None and part.start - self._start >= epochs * self._plan.size
            ahead.want(() if done else self._plan.shards_from(part.start, windows=2))
            for position, (shard, row) in zip(
                part, self._plan.samples(part.start, len(part)).tolist(), strict=True
            ):
                yield position, shard, row

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
    """A stage: raw samples → (image uint8 or latent float32 [C, H, W], label or -1).

    data: what images there are, and of which size. num_classes: the label must be one of so many; None: any
    will do, or none.
    """

    def __init__(self, data: Data, num_classes: int | None = None) -> None:
        self._size, self._channels, self._num_classes = data.size, data.channels, num_classes
        self._decode: Callable[[bytes, int, int], NDArray[Any]] = decode_latent if data.latents else decode

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Decoded]:
        for sample in samples:
            yield self.one(sample)

    def one(self, sample: Sample) -> Decoded:
        """Raises BadSampleError, naming shard and sample, for an image that cannot be decoded or has another
        size, or a missing label; UserError for a sample without an image."""
        where = f"shard {sample.get('__url__')} sample {sample.get('__key__')}"
        try:
            image = self._decode(image_of(sample), self._size, self._channels)
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
