"""All randomness of training, as a function of (seed, purpose, cur_nimg): there is no state to save.

A global batch is drawn in blocks of samples, each with a seed of its own, and each rank draws the blocks that
its samples lie in, on its CPU: the draws depend neither on the number of ranks nor on their devices.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.gan.augment import Augmentation

# Of what training draws; a run keeps that which it began with. 1: the whole batch as one block. 2: noise of
# finite differences and path lengths by each rank.
VERSION = 3
BLOCK = 64  # samples; a part of version 2 and later ones
_MOST_COLUMNS = 16  # with more, a grid with a column per class is hard to read


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2⁶³) from any parts: equal for equal parts, unrelated for others (1 and "1" differ)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Drawn(NamedTuple):
    """The random inputs of one player's turn, on the CPU, for some samples of the batch: [n, …]."""

    z: Tensor  # float32 [n, z_dim], or as `Draws.mixed` has it
    c: Tensor | None  # int64 [n]
    seed: int  # for dropout inside the networks; callers add their rank and round
    augmentation: Tensor | None = None  # float32 [n, columns]: gan/augment.py
    mix: Tensor | None = None  # float32 [n], uniform in [0, 1): where WGAN-GP looks
    keyed: bool = True  # since version 3

    @property
    def key(self) -> Tensor | None:
        """z, if the noise that penalties add is a function of it; None if each rank draws its own."""
        return self.z if self.keyed else None


@dataclass(frozen=True)
class Samples:
    """Some samples of a batch of `of`, in the order in which they are used: parts of it that do not overlap,
    from the first to the last."""

    of: int
    parts: tuple[slice, ...]

    @classmethod
    def all(cls, count: int) -> Samples:
        """The whole batch."""
        return cls(count, (slice(0, count),))

    @cached_property
    def blocks(self) -> list[int]:
        """Which blocks they lie in."""
        ranges = (range(part.start // BLOCK, -(-part.stop // BLOCK)) for part in self.parts)
        return sorted({number for each in ranges for number in each})

    @cached_property
    def ends(self) -> list[int]:
        """Where each of these blocks ends, if they lie one after another. The batch's last may be shorter."""
        return [*accumulate(min(BLOCK, self.of - BLOCK * number) for number in self.blocks)]

    def among(self, drawn: Tensor) -> Tensor:
        """These samples' rows of all that was drawn: the whole batch, or their blocks one after another."""
        parts = self.parts
        if len(drawn) < self.of:
            firsts = {number: BLOCK * place for place, number in enumerate(self.blocks)}
            moved = [firsts[part.start // BLOCK] + part.start % BLOCK for part in parts]
            parts = tuple(slice(at, at + p.stop - p.start) for at, p in zip(moved, parts, strict=True))
        return drawn[parts[0]] if len(parts) == 1 else torch.cat([drawn[part] for part in parts])


Fill = Callable[[Tensor, torch.Generator], object]  # fills a tensor [n, …] with random numbers


def _normal(out: Tensor, generator: torch.Generator) -> None:
    out.normal_(generator=generator)


def _uniform(out: Tensor, generator: torch.Generator) -> None:
    out.uniform_(generator=generator)


class Draws:
    """Latents, fake labels, and what else training draws.

    label_frequencies: how often each class occurs in the training set (counts or shares); fake labels
    follow it. None: unconditional, labels are None. version: see VERSION.
    """

    def __init__(
        self,
        seed: int,
        z_dim: int,
        label_frequencies: Sequence[float] | None,
        version: int = VERSION,
    ) -> None:
        self.version = version
        self._seed = seed
        self._z_dim = z_dim
        self._frequencies: Tensor | None = None
        if label_frequencies is not None:
            self._frequencies = torch.tensor(label_frequencies, dtype=torch.float64)
            if not all(f >= 0 for f in label_frequencies) or not sum(label_frequencies) > 0:
                raise ValueError(f"label frequencies must be ≥ 0 and not all 0: {list(label_frequencies)}")

    def latents(self, purpose: str, cur_nimg: int, samples: Samples, labels: bool = True) -> Drawn:
        """z, standard normal float32 [n, z_dim], labels int64 [n] or None, and a seed, on the CPU.

        A draw for a batch of another size is another draw. labels: False leaves them out.
        """
        z = samples.among(self._drawn(samples, (self._z_dim,), _normal, "latents", purpose, cur_nimg))
        seed, keyed = derive_seed(self._seed, "networks", purpose, cur_nimg), self.version > 2
        if self._frequencies is None or not labels:
            return Drawn(z, None, seed, keyed=keyed)
        u = self._drawn(samples, (), _uniform, "labels", purpose, cur_nimg, dtype=torch.float64)
        return Drawn(z, samples.among(self.classes_at(u)), seed, keyed=keyed)

    def mixed(self, z: Tensor, share: float, purpose: str, cur_nimg: int, samples: Samples) -> Tensor:
        """z [n, z_dim] for style mixing (Karras et al. 2019, section 3.1): columns [n, 2·z_dim + 1] of z, a
        second z, and the crossover in [0, 1], from which layer on the second one counts.

        A `share` of the images have a crossover uniform in [0, 1), the others 1: the second never counts.
        """

        def fill(out: Tensor, generator: torch.Generator) -> None:
            out[:, :-1] = torch.randn(len(out), z.shape[1], generator=generator)
            where, mixes = torch.rand(2, len(out), generator=generator)
            out[:, -1] = torch.where(mixes < share, where, 1.0)

        more = self._drawn(samples, (z.shape[1] + 1,), fill, "mixing", purpose, cur_nimg)
        return torch.cat([z, samples.among(more)], dim=1)

    def uniform(self, purpose: str, cur_nimg: int, samples: Samples) -> Tensor:
        """float32 [n] in [0, 1), on the CPU."""
        return samples.among(self._drawn(samples, (), _uniform, purpose, cur_nimg))

    def augmentation(
        self, augment: Augmentation, p: float, purpose: str, cur_nimg: int, samples: Samples
    ) -> Tensor:
        """float32 [n, columns], on the CPU: what `augment` does to each image."""
        parts, float64 = ("augmentation", purpose, cur_nimg), torch.float64
        numbers = self._drawn(samples, (augment.numbers,), _uniform, *parts, dtype=float64)
        # Of whole blocks, as rounding may depend on where in a tensor a number is.
        return samples.among(augment.parameters(numbers, p))

    def fixed(self, purpose: str, count: int) -> Drawn:
        """`latents` that every version draws alike: of grids and scores, which are compared over a run."""
        first = copy(self)
        first.version = 1
        return first.latents(purpose, 0, Samples.all(count))

    def grid(self, count: int) -> tuple[Tensor, Tensor | None]:
        """The fixed latents of sample grids, float32 [count, z_dim]; labels cycle through the classes.

        Laid out row by row in `grid_columns(count)` columns, each column holds one class.
        """
        z = self.fixed("grid", count).z
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

    def _drawn(
        self,
        samples: Samples,
        shape: tuple[int, ...],
        fill: Fill,
        *parts: int | str,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """[m, *shape]: of version 1 the whole batch, else the blocks that these samples lie in.

        parts: what the numbers are for; a block's seed follows from them and the block's number.
        """
        generator = torch.Generator()
        if self.version == 1:
            out = torch.empty(samples.of, *shape, dtype=dtype)
            fill(out, generator.manual_seed(derive_seed(self._seed, *parts)))
            return out
        out, start = torch.empty(samples.ends[-1], *shape, dtype=dtype), 0
        for number, end in zip(samples.blocks, samples.ends, strict=True):
            fill(out[start:end], generator.manual_seed(derive_seed(self._seed, *parts, number)))
            start = end
        return out
