"""The real images of a run: an index that all ranks agree on, and each rank's batches."""

from __future__ import annotations

import torch

from pipeline.config import Config
from pipeline.data.cache import Cache, reserve
from pipeline.data.check import check_images
from pipeline.data.decode import dtype_of
from pipeline.data.index import Index, load_index
from pipeline.data.plan import Split, split_of
from pipeline.data.stream import TrainingBatches, training_batches
from pipeline.errors import CommonError
from pipeline.gan.networks import check_networks, check_reach
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.ranks import Ranks
from pipeline.run.references import check_held_out
from pipeline.run.report import Report, say
from pipeline.run.state import State


def checked_index(config: Config, announce: bool, device: torch.device | None = None) -> Index:
    """The index of the training data, checked against the config. device: the rank's, for
    `check_networks`. Raises UserError."""
    assert config.data.train is not None
    index = load_index(config.data.train, say if announce else lambda _: None, config.data.remote)
    check_networks(config, index.num_classes if config.data.conditional else 0, device)
    check_reach(config, check_images(index, config.data))
    if (held_out := split_of(config, index).heldout().size) and config.score.metrics:
        check_held_out(config.data, held_out)
    return index


def agreed_data(config: Config, ranks: Ranks) -> tuple[Index, Split]:
    """The index, and what of it is trained on. Raises CommonError unless it is the same on all machines.

    One rank of each machine looks at the shards and hands the index on.
    """
    ranks.progress.doing = "reading the index of the data"
    first: list[Index] = []
    with ranks.raise_together():  # the main rank first: it may have to build what the others then read
        if ranks.main:
            first.append(checked_index(config, True, ranks.device))
    with ranks.raise_together():
        index = ranks.broadcast_on_machine(
            lambda: first.pop() if first else checked_index(config, False, ranks.device)
        )
    fingerprint = ranks.broadcast_from_main(lambda: index.fingerprint)
    if any(ranks.poll_any(index.fingerprint != fingerprint)()):
        raise CommonError(
            f"{index.where} is not the same data on all machines of this run: their indices differ."
        )
    return index, split_of(config, index)


def open_reals(
    config: Config, index: Index, split: Split, state: State, ranks: Ranks, batch: BatchShape, report: Report
) -> TrainingBatches:
    """This rank's part of every round of every global batch, from where the run stands, without end."""
    return training_batches(
        index,
        split.training(),
        config.data,
        start=state.cur_nimg,
        rank=ranks.rank,
        world=batch.world,
        rounds=batch.rounds,
        cache=_open_cache(config, index, ranks, report),
        pinned=ranks.device.type == "cuda",
    )


def _open_cache(config: Config, index: Index, ranks: Ranks, report: Report) -> Cache | None:
    """Memory for decoded images, shared by the ranks of a machine; None if not wanted or too small."""
    data = config.data
    if data.cache == "none":
        return None
    form = (index.sizes, data.size, data.channels, dtype_of(data))
    path, line = ranks.broadcast_on_machine(lambda: reserve(*form))
    for text in dict.fromkeys(ranks.gather_objects(line)):
        report.say(f"  {text}")
    with ranks.raise_together():
        return None if path is None else Cache(path, *form)
