"""Which sample when: pure integers, no files, no processes.

The order of an epoch is a function of (seed, epoch, shard sizes): the shards are permuted, cut into windows
of a few shards, and the samples of each window permuted. So the only state of the data is one integer, the
images consumed since the start of training; epoch, shard and row follow from it, for any number of ranks and
workers. Only a few windows are in memory, and seeking is a bisection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config, UserError
from pipeline.data.index import Index

Ints = NDArray[np.int64]

_VERSION = 1  # of the order: part of the fingerprint, raised when the same seed gives another order
_SHARDS, _WINDOW, _SPLIT_SHARDS, _SPLIT_ROWS, _REPLACEMENT = range(5)  # what a permutation is for
_TOLERANCE = 0.05  # whole shards are held out if that meets the wished share to within so much of it
_TRAINING, _HELD_OUT = 0, 1
_IN_WINDOW = 8  # attempts to replace a sample by one of the same window


def permutation(n: int, *purpose: int) -> Ints:
    """A permutation of range(n) [n] fixed by `purpose` for all versions of numpy.

    Generator.permutation may change between versions; the raw output of PCG64 and SeedSequence may not.
    """
    raw = np.random.PCG64(np.random.SeedSequence(purpose)).random_raw(n)
    return np.argsort(raw, kind="stable").astype(np.int64)


class Split:
    """Which rows of which shard are trained on and which are held out, fixed by the seed.

    Whole shards are held out if that gives about the wanted share; else every shard gives some of its rows.
    `folds` cuts the data into so many disjoint parts and holds out number `fold`; without it the share
    `holdout` is held out (0: nothing). Plans shuffle `window` shards together.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        seed: int,
        window: int,
        holdout: float = 0.0,
        folds: int | None = None,
        fold: int = 0,
    ) -> None:
        self.seed, self.window = seed, window
        self._sizes = counts = np.asarray(sizes, np.int64)
        self._share, self._folds, self._fold = (None if folds else holdout), folds, (fold if folds else 0)
        self._starts: Ints = np.cumsum(counts) - counts
        total = int(counts.sum())
        if folds is not None and total < folds:
            raise UserError(f"{total} samples cannot be cut into {folds} folds. Lower data.folds.")
        self._wanted = 0 if folds is not None else _wanted(total, holdout)
        order = permutation(len(counts), seed, _SPLIT_SHARDS)
        shards = _fold_shards(counts, order, folds, fold) if folds else _some(counts, order, self._wanted)
        self.by_shard = shards is not None
        if shards is not None:
            self.held: Ints = np.where(np.isin(np.arange(len(counts)), shards), counts, 0)
        else:
            self.held = self._before(self._starts + counts) - self._before(self._starts)

    def training(self) -> Plan:
        """The plan of what is trained on. Raises UserError if that is nothing."""
        plan = Plan(self, _TRAINING)
        if not plan.size:
            raise UserError(
                "There is nothing to train on: no samples, or all are held out. Lower data.holdout."
            )
        return plan

    def heldout(self) -> HeldOutPlan:
        """The plan of the others. Its size may be 0."""
        return HeldOutPlan(self, _HELD_OUT)

    def trained_once(self) -> HeldOutPlan:
        """What is trained on, each sample once, in one fixed shuffled order."""
        return HeldOutPlan(self, _TRAINING)

    def fingerprint(self, part: int) -> str:
        """Equal for plans of the same samples in the same order."""
        about = (_VERSION, part, self.seed, self.window, self._share, self._folds, self._fold)
        return hashlib.sha256(repr(about).encode() + self._sizes.tobytes()).hexdigest()[:32]

    def counts(self, part: int) -> Ints:
        """Samples of each shard in a part [shards]."""
        return self.held if part == _HELD_OUT else self._sizes - self.held

    def rows(self, shard: int, part: int) -> Ints:
        """The rows of one shard that belong to a part, ascending."""
        n = int(self._sizes[shard])
        if self.by_shard or not self.held[shard]:
            everything = bool(self.held[shard]) == (part == _HELD_OUT)
            return np.arange(n if everything else 0, dtype=np.int64)
        slots = self._starts[shard] + np.arange(n, dtype=np.int64)
        held = self._before(slots + 1) > self._before(slots)
        rows = permutation(n, self.seed, _SPLIT_ROWS, shard)[held == (part == _HELD_OUT)]
        return np.sort(rows)

    def _before(self, slot: Ints) -> Ints:
        """How many of the first `slot` samples are held out: evenly spread, exact in the sum."""
        if self._folds is not None:
            return (slot + self._folds - 1 - self._fold) // self._folds
        total = int(self._sizes.sum())
        # Python integers if the product might not fit: 10^8 samples do, 10^10 may not.
        if total < 2**31:
            return slot * self._wanted // max(total, 1)
        return np.array([int(s) * self._wanted // total for s in np.atleast_1d(slot)], np.int64)


def _wanted(total: int, holdout: float) -> int:
    if not holdout:
        return 0
    wanted = min(max(round(total * holdout), 1), total - 1)
    if wanted < 1:
        raise UserError(f"Nothing can be held out of {total} samples; set data.holdout=0.")
    return wanted


def _some(sizes: Ints, order: Ints, wanted: int) -> Ints | None:
    """The first shards of `order` that together have about `wanted` samples; None if no number does."""
    sums = np.concatenate([[0], np.cumsum(sizes[order])])
    cut = int(np.argmin(np.abs(sums - wanted)))
    if abs(int(sums[cut]) - wanted) > _TOLERANCE * wanted or sums[cut] == sums[-1] > 0:
        return None  # the latter: all of them, which leaves nothing to train on
    return order[:cut]


def _fold_shards(sizes: Ints, order: Ints, folds: int, fold: int) -> Ints | None:
    """The shards of one of `folds` parts of about equal size; None if the shards are too few or uneven."""
    if len(sizes) < folds:
        return None
    largest_first = order[np.argsort(-sizes[order], kind="stable")]
    sums = [0] * folds
    parts: list[list[int]] = [[] for _ in range(folds)]
    for shard in largest_first.tolist():
        lightest = sums.index(min(sums))
        sums[lightest] += int(sizes[shard])
        parts[lightest].append(shard)
    share = sum(sums) / folds
    if any(abs(s - share) > _TOLERANCE * share for s in sums):
        return None
    return np.sort(np.array(parts[fold], np.int64))


class Plan:
    """The order of one part of the data, epoch after epoch without end.

    size: samples per epoch; counts: of each shard [shards]; window: shards that are read from at once.
    """

    def __init__(self, split: Split, part: int) -> None:
        self._split, self._part, self.seed = split, part, split.seed
        self.counts = split.counts(part)
        self._present = np.flatnonzero(self.counts)
        self.window = max(1, min(split.window, len(self._present)))
        self.size = int(self.counts.sum())
        self.fingerprint = split.fingerprint(part)
        # Caches, not state: a batch may span two epochs, and any batch two windows.
        self._epoch_order: Callable[[int], tuple[Ints, Ints]] = lru_cache(2)(self._order)
        self._window_samples: Callable[[int, int], Ints] = lru_cache(2)(self._shuffle)

    def __reduce__(self) -> tuple[type[Plan], tuple[Split, int]]:
        return type(self), (self._split, self._part)

    def epoch(self, position: int) -> float:
        """How many epochs `position` images are."""
        return position / self.size

    def samples(self, position: int, count: int) -> Ints:
        """The (shard, row) pairs [count, 2] at global positions position … position + count - 1."""
        parts: list[Ints] = []
        while count > 0:
            epoch, place = divmod(position, self.size)
            _, ends = self._epoch_order(epoch)
            window = int(np.searchsorted(ends, place, side="right"))
            samples = self._window_samples(epoch, window)
            first = place - (int(ends[window - 1]) if window else 0)
            taken = samples[first : first + count]
            parts.append(taken)
            position, count = position + len(taken), count - len(taken)
        return np.concatenate(parts) if parts else np.empty((0, 2), np.int64)

    def shards_from(self, position: int, windows: int) -> list[int]:
        """The shards of the window at a position and of those after it, `windows` in all, in that order."""
        epoch, place = divmod(position, self.size)
        order, ends = self._epoch_order(epoch)
        first = int(np.searchsorted(ends, place, side="right")) * self.window
        shards: list[int] = order[first : first + windows * self.window].tolist()
        missing = windows - -(-len(shards) // self.window)
        if missing > 0:
            shards += self._epoch_order(epoch + 1)[0][: missing * self.window].tolist()
        return list(dict.fromkeys(shards))

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        """The (shard, row) to use in place of the sample at a position; another one for every attempt.

        From the same window, whose shards are open, and after some attempts from the whole epoch.
        """
        epoch, place = divmod(position, self.size)
        _, ends = self._epoch_order(epoch)
        window = int(np.searchsorted(ends, place, side="right"))
        first, end = (int(ends[window - 1]) if window else 0), int(ends[window])
        if attempt >= _IN_WINDOW:
            first, end = 0, self.size
        purpose = np.random.SeedSequence((self.seed, _REPLACEMENT, self._part, position, attempt))
        chosen = first + int(np.random.PCG64(purpose).random_raw()) % (end - first)
        shard, row = self.samples(epoch * self.size + chosen, 1)[0].tolist()
        return shard, row

    def rows(self, shard: int) -> Ints:
        """The rows of a shard in this plan, ascending."""
        return self._split.rows(shard, self._part)

    @property
    def whole_shards(self) -> bool:
        """Whether each shard is in this plan with all of its samples or none."""
        return bool(self._split.by_shard or not self._split.held.any())

    def _order(self, epoch: int) -> tuple[Ints, Ints]:
        """Shards in the order of an epoch, and where in the epoch each window ends."""
        order = self._present[permutation(len(self._present), self.seed, _SHARDS, self._part, epoch)]
        ends = np.cumsum(self.counts[order])
        last = np.arange(self.window - 1, len(order) + self.window - 1, self.window)
        return order, ends[np.minimum(last, len(order) - 1)]

    def _shuffle(self, epoch: int, window: int) -> Ints:
        """The (shard, row) pairs of one window in their order [samples of the window, 2]."""
        order, _ = self._epoch_order(epoch)
        shards = order[window * self.window : (window + 1) * self.window].tolist()
        rows = [self._split.rows(shard, self._part) for shard in shards]
        pairs = np.empty((sum(map(len, rows)), 2), np.int64)
        pairs[:, 0] = np.repeat(shards, [len(r) for r in rows])
        pairs[:, 1] = np.concatenate(rows)
        return pairs[permutation(len(pairs), self.seed, _WINDOW, self._part, epoch, window)]


class HeldOutPlan(Plan):
    """Samples to look at once each, in one fixed shuffled order, so that the first n are a fair n."""

    def chunks(
        self, rank: int, world: int, batch: int, limit: int | None = None
    ) -> Iterator[tuple[Ints, int]]:
        """This rank's share of the first `limit` samples: (pairs [n, 2], n), n ≤ batch.

        Every rank gets the same number of chunks, so that all make the same number of forwards; the last
        ones may hold fewer samples than `batch`, or none.
        """
        total = self.size if limit is None else min(limit, self.size)
        for start in range(0, total, world * batch):
            share = min(batch, -(-(total - start) // world))
            mine = min(start + rank * share, total)
            count = min(share, total - mine)
            yield self.samples(mine, count), count


def split_of(config: Config, index: Index) -> Split:
    """What of the data a run with this config trains on and what it holds out."""
    data = config.data
    return Split(index.sizes, config.run.seed, data.window, data.holdout, data.folds, data.fold)
