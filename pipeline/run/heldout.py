"""Held-out images during training: a few to look at, and D's logits on them."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config import Data
from pipeline.data.index import Index
from pipeline.data.plan import HeldOutPlan
from pipeline.data.stream import Batch, heldout_batches
from pipeline.gan.draws import Samples
from pipeline.gan.images import to_float
from pipeline.parallel.ranks import Ranks
from pipeline.parallel.seeding import seed_generators
from pipeline.players import Gan
from pipeline.run.stats import Stats


class HeldOutImages:
    """Images that are never trained on."""

    def __init__(self, data: Data, index: Index, plan: HeldOutPlan, ranks: Ranks) -> None:
        """Reads as many as D sees at once, if that many are held out."""
        self._data, self._index, self._plan, self._ranks = data, index, plan, ranks
        self._batch: Batch | None = None
        count = min(data.batch_size // ranks.world, data.batch_gpu or data.batch_size)
        if plan.size >= count * ranks.world:
            with ranks.raise_together():
                batch = self._first(count, ranks.rank, ranks.world)
            labels = None if batch.labels is None else batch.labels.to(ranks.device)
            self._batch = Batch(batch.images.to(ranks.device), labels)

    @property
    def size(self) -> int:
        """How many are held out."""
        return self._plan.size

    @property
    def images(self) -> Tensor | None:
        """This rank's, as in batches, on its device; None if too few are held out."""
        return None if self._batch is None else self._batch.images

    def some(self, count: int) -> Tensor:
        """The first of them, as in batches, [at most count, C, H, W], read on this rank."""
        return self._first(min(count, self._plan.size), 0, 1).images

    def of_classes(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images as in batches [n, C, H, W], of these classes int64 [n], read on this rank; and whether there
        was one among the first 8·n, bool [n]: zeros where not."""
        n = len(labels)
        batch = min(n, self._plan.size)
        found, there = torch.zeros(0), torch.zeros(n, dtype=torch.bool)
        for some, valid in heldout_batches(
            self._index, self._plan, self._data, batch=batch, limit=8 * n, conditional=True
        ):
            if not len(found):
                found = torch.zeros(n, *some.images.shape[1:], dtype=some.images.dtype)
            assert some.labels is not None
            for image, label in zip(some.images[:valid], some.labels[:valid], strict=True):
                if len(places := torch.nonzero((labels == label) & ~there)):
                    found[places[0]], there[places[0]] = image, True
            if there.all():
                break
        return found, there

    def score(self, gan: Gan, cur_nimg: int, stats: Stats) -> None:
        """Chart D's mean logit on them: next to Loss/scores/real, it shows over-fitting.

        Computed as in training (augmented alike, BatchNorm by batch, so that the two compare); buffers are
        restored.
        """
        if self._batch is None:
            return
        D, rank, count = gan.D, self._ranks.rank, len(self._batch.images)
        mine = Samples(count * self._ranks.world, (slice(rank * count, (rank + 1) * count),))
        augmentation = gan.augmentation("heldout", cur_nimg, mine)
        if augmentation is not None:
            augmentation = augmentation.to(self._ranks.device)
        seed_generators(0, self._ranks.device)
        with D.unobserved(), D.autocast():
            images = gan.augment(to_float(self._batch.images), augmentation)
            logits = D.module(images, self._batch.labels)
        stats.mean("Loss/scores/heldout", logits.float().mean())

    def _first(self, count: int, rank: int, world: int) -> Batch:
        """This rank's part of the first `count` for each of `world` ranks."""
        batches = heldout_batches(
            self._index,
            self._plan,
            self._data,
            batch=count,
            rank=rank,
            world=world,
            limit=count * world,
            conditional=self._data.conditional,
        )
        return next(batches)[0]
