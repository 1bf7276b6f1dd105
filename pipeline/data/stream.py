"""Plan → samples → batches, for one rank: a webdataset pipeline whose source stage is the plan.

The stages are those of any `webdataset.DataPipeline`: `PlannedSamples` (the source, in place of shard lists
and tar streams), then a user's own, then `Decode`, then batches. A DataLoader runs one pipeline per worker;
worker k takes the steps k, k + K, …, which the loader puts back in order, so the order of the samples is the
same for any number of workers, and neither ranks nor workers need to agree on anything while they run.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray

from pipeline.config import Data, UserError
from pipeline.data.batches import Batch as Batch  # the class is part of this module
from pipeline.data.batches import Batches, CachedDecode, Form, PlannedDecode, Turns, unpack
from pipeline.data.cache import Cache
from pipeline.data.check import check_images as check_images  # is part of this module
from pipeline.data.decode import dtype_of
from pipeline.data.index import Index
from pipeline.data.plan import HeldOutPlan, Plan
from pipeline.data.reader import BadSampleError, Reader, Replacements, Sample
from pipeline.data.remote.prefetch import Prefetch
from pipeline.data.stages import Decode, Decoded, PlannedSamples, apply, load_stages
from pipeline.data.workers import Loader
from pipeline.wording import counted


class TrainingBatches(Iterator[Batch]):
    """What training_batches returns: an iterator that can be closed."""

    def __init__(self, loader: Loader, form: Form, conditional: bool) -> None:
        self._loader, self._form, self._conditional = loader, form, conditional

    def __next__(self) -> Batch:
        item = next(self._loader)
        if isinstance(item, UserError):
            self.close()
            raise item
        buffer, found = item
        batch = unpack(buffer, self._form)._replace(bad=tuple(found))
        return batch if self._conditional else batch._replace(labels=None)

    def close(self) -> None:
        self._loader.close()


def training_batches(
    index: Index,
    plan: Plan,
    data: Data,
    *,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    rounds: int = 1,
    cache: Cache | None = None,
    pinned: bool = False,
) -> TrainingBatches:
    """This rank's batches from global position `start` on, without end: step i covers the positions
    start + i * batch_size …, cut into equal rounds, of each of which the rank gets its equal part.

    Worker processes start at once (0: decode in this process, as asked). data.stages are put between reading
    and decoding; they get and give raw samples one for one, as webdataset.map does. With a `cache` images are
    decoded once (and stages have no place). pinned: for a GPU, which then copies them without stopping the
    host; it takes a CUDA context. Unless data.max_bad is 0, damaged images are replaced by others of the plan
    and named in the batch, again in every epoch; the caller counts them. Iterating raises
    UserError for a shard that cannot be read or an image that does not fit (with max_bad 0: or is damaged);
    `close()` ends the workers, as does the end of the process.
    """
    form = Form.of(data, data.batch_size // world)
    stages = load_stages(data.stages)
    replacements = Replacements(index, plan, allowed=data.max_bad > 0)
    source = PlannedSamples(index, plan, start, data.batch_size, rank, world, rounds, replacements)
    decoder = Decode(data, index.num_classes if data.conditional else None)
    decoded: tuple[object, ...]
    if cache is not None:
        decoded = (CachedDecode(index, plan, source, decoder, cache, replacements),)
    else:
        turns = Turns()
        theirs = (turns.before, *stages, turns.after) if stages else ()
        decoded = (source, *theirs, PlannedDecode(source, decoder, stages, replacements))
    pipeline = webdataset.DataPipeline(*decoded, Batches(source, plan, form, data.xflip, replacements))
    loader = Loader(pipeline, data.workers, form.bytes, pinned)
    return TrainingBatches(loader, form, data.conditional)


def heldout_batches(
    index: Index,
    plan: HeldOutPlan,
    data: Data,
    *,
    batch: int,
    rank: int = 0,
    world: int = 1,
    limit: int | None = None,
    conditional: bool = False,
) -> Iterator[tuple[Batch, int]]:
    """The first `limit` held-out samples (None: all), each once over all ranks, as (batch, valid).

    They go through data.stages one by one and are decoded, in this process. Every rank gets equally many
    batches, all of `batch` images, with labels if `conditional`; of the last ones only the first `valid`
    (perhaps 0) images count, the others are zeros. Up to data.max_bad samples that were no good when they
    were indexed are replaced, always by the same ones; bytes that have changed since are not: scores would no
    longer compare. Raises UserError for those, and for one bad sample more.
    """
    decoder = Decode(data, index.num_classes if conditional else None)
    reader, ahead, replacements = Reader(index, plan.window), Prefetch(index), Replacements(index, plan)
    stages, replaced = load_stages(data.stages), 0

    def use(sample: Sample) -> Decoded:
        return decoder.one(apply(stages, sample))

    try:
        for pairs, valid in plan.chunks(rank, world, batch, limit):
            ahead.want(pairs[:, 0].tolist())
            images = np.zeros((batch, data.channels, data.size, data.size), dtype_of(data))
            labels = np.zeros(batch, np.int64)
            for i, (shard, row) in enumerate(pairs.tolist()):
                try:
                    sample = reader.read(shard, row)
                except BadSampleError as error:
                    raise UserError(f"A held-out image cannot be used: {error}") from None
                try:
                    images[i], labels[i] = use(sample)
                except BadSampleError as error:
                    replaced += 1
                    if replaced > data.max_bad:
                        count = counted(replaced, "held-out image")
                        raise UserError(
                            f"{count} cannot be used, more than data.max_bad={data.max_bad}: {error}"
                        ) from None
                    images[i], labels[i] = replacements.replace((shard + row) % plan.size, error, use)
            tensors = torch.from_numpy(images), torch.from_numpy(labels) if conditional else None
            yield Batch(*tensors, replacements.found()), valid
    finally:
        ahead.close()
        reader.close()


def label_frequencies(index: Index, plan: Plan) -> NDArray[np.float64]:
    """Share of each class among the samples of a plan, float64 [index.num_classes], from the index alone.

    Raises UserError if there are labels, but not one in the plan.
    """
    counts = np.zeros(index.num_classes, np.float64)
    for shard in np.flatnonzero(plan.counts).tolist():
        if plan.whole_shards:
            for label, count in index.shards[shard].labels.items():
                counts[label] += count
        else:
            labels = index.table(shard).label[plan.rows(shard)]
            there, times = np.unique(labels[labels >= 0], return_counts=True)
            counts[there] += times
    if len(counts) and not counts.any():
        raise UserError(
            "None of the images that are trained on has a label (.cls); those that are held out do."
        )
    frequencies: NDArray[np.float64] = counts / max(counts.sum(), 1.0)
    return frequencies
