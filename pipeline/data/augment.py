"""What is done to training images on the way: decided by which image it is, not by where it is read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_Words = NDArray[np.uint64]


def flips(seed: int, epochs: NDArray[np.int64], pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which images are mirrored: bool [n] for epochs [n] and (shard, row) pairs [n, 2].

    A fair coin per (seed, epoch, shard, row), the same for any number of ranks and workers and any batch.
    """
    words = np.full(len(pairs), seed, np.uint64)
    for part in (epochs, pairs[:, 0], pairs[:, 1]):
        words = _mix(words ^ _mix(part.astype(np.uint64)))
    coins: NDArray[np.bool_] = words >> np.uint64(63) == 1
    return coins


def _mix(words: _Words) -> _Words:
    """SplitMix64 (Steele, Lea, Flood 2014): every bit of the result hangs on every bit that goes in."""
    words = words + np.uint64(0x9E3779B97F4A7C15)  # arrays of uint64 wrap around, as they should here
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: _Words = words ^ (words >> np.uint64(31))
    return mixed
