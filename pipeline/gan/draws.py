"""All randomness of training, as a function of (seed, purpose, cur_nimg): there is no state to save.

Each rank draws the whole global batch on its CPU and takes a slice: the draws depend neither on the number
of ranks nor on their devices.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_MOST_COLUMNS = 16  # with more, a grid with a column per class is hard to read


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2⁶³) from any parts: equal for equal parts, unrelated for others (1 and "1" differ)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Drawn(NamedTuple):
    """The random inputs of one player's turn, for the whole global batch, on the CPU."""

    z: Tensor  # float32 [count, z_dim], or as `Draws.mixed` has it
    c: Tensor | None  # int64 [count]
    seed: int  # for dropout inside the networks; callers add their rank and round
    augmentation: Tensor | None = None  # float32 [count, columns]: gan/augment.py
    mix: Tensor | None = None  # float32 [count], uniform in [0, 1): where WGAN-GP looks


class Draws:
    """Latents and fake labels.

    label_frequencies: how often each class occurs in the training set (counts or shares); fake labels
    follow it. None: unconditional, labels are None.
    """

    def __init__(self, seed: int, z_dim: int, label_frequencies: Sequence[float] | None) -> None:
        self._seed = seed
        self._z_dim = z_dim
        self._frequencies: Tensor | None = None
        if label_frequencies is not None:
            self._frequencies = torch.tensor(label_frequencies, dtype=torch.float64)
            if not all(f >= 0 for f in label_frequencies) or not sum(label_frequencies) > 0:
                raise ValueError(f"label frequencies must be ≥ 0 and not all 0: {list(label_frequencies)}")

    def latents(self, purpose: str, cur_nimg: int, count: int, labels: bool = True) -> Drawn:
        """z, standard normal float32 [count, z_dim], labels int64 [count] or None, and a seed, on the CPU.

        `count` is the whole global batch: a draw of another count is another draw, not a slice of this one.
        labels: False leaves them out.
        """
        z = torch.randn(count, self._z_dim, generator=self.generator("latents", purpose, cur_nimg))
        seed = derive_seed(self._seed, "networks", purpose, cur_nimg)
        if self._frequencies is None or not labels:
            return Drawn(z, None, seed)
        u = torch.rand(count, dtype=torch.float64, generator=self.generator("labels", purpose, cur_nimg))
        return Drawn(z, self.classes_at(u), seed)

    def mixed(self, z: Tensor, share: float, purpose: str, cur_nimg: int) -> Tensor:
        """z [count, z_dim] for style mixing (Karras et al. 2019, section 3.1): columns [count, 2·z_dim + 1]
        of z, a second z, and the crossover in [0, 1], from which layer on the second one counts.

        A `share` of the images have a crossover uniform in [0, 1), the others 1: the second never counts.
        """
        generator = self.generator("mixing", purpose, cur_nimg)
        other = torch.randn(z.shape, generator=generator)
        where, mixes = torch.rand(2, len(z), 1, generator=generator)
        return torch.cat([z, other, torch.where(mixes < share, where, 1.0)], dim=1)

    def uniform(self, purpose: str, cur_nimg: int, count: int) -> Tensor:
        """float32 [count] in [0, 1), for the whole global batch as in `latents`, on the CPU."""
        return torch.rand(count, generator=self.generator(purpose, cur_nimg))

    def grid(self, count: int) -> tuple[Tensor, Tensor | None]:
        """The fixed latents of sample grids, as `latents` gives them; labels cycle through the classes.

        Laid out row by row in `grid_columns(count)` columns, each column holds one class.
        """
        z = self.latents("grid", 0, count).z
        if self._frequencies is None:
            return z, None
        classes = self._frequencies.nonzero().flatten()
        return z, classes[torch.arange(count) % len(classes)]

    def grid_columns(self, count: int) -> int:
        """Columns of a grid of `count` images: one per class if there are few classes, else a square grid."""
        if self._frequencies is not None:
            classes = int(self._frequencies.count_nonzero())
            if 1 < classes <= min(_MOST_COLUMNS, count):
                return classes
        return math.ceil(math.sqrt(count))

    def classes_at(self, u: Tensor) -> Tensor:
        """Classes int64 [n] for u float64 [n], uniform in [0, 1); one that never occurs has no interval."""
        assert self._frequencies is not None
        cdf = self._frequencies.cumsum(0)
        return torch.searchsorted(cdf / cdf[-1], u, right=True)

    def generator(self, *parts: int | str) -> torch.Generator:
        """A source of random numbers for what `parts` name."""
        return torch.Generator().manual_seed(derive_seed(self._seed, *parts))
