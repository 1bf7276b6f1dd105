"""Which latents and classes a picture or an animation shows, and where."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.config import UserError
from pipeline.gan.draws import Draws
from pipeline.run.grid import column_titles, whole_rows
from pipeline.run.interpolation import loop, slerp
from pipeline.run.sampling import Sampler

_STEPS = 8  # images from one end of an interpolation to the other
_KEYS = 4  # latents that an animated image passes
_FRAMES = 40  # from one of them to the next


class Layout(NamedTuple):
    """Images row by row."""

    z: Tensor  # [n, z_dim]; of an animation [frames, n, z_dim]
    c: Tensor | None  # [n]
    columns: int
    titles: tuple[str, ...] = ()  # of the columns

    def images(self, sampler: Sampler, truncation: float) -> Tensor:
        """Of a picture: uint8 [n, C, H, W]."""
        return torch.cat([*sampler.images(self.z, self.c, truncation)])

    def frames(self, sampler: Sampler, truncation: float) -> Iterator[Tensor]:
        """Of an animation: uint8 [n, C, H, W] each."""
        frames, n, _ = self.z.shape
        c = None if self.c is None else self.c.repeat(frames)
        waiting = torch.empty(0)
        for part in sampler.images(self.z.flatten(0, 1), c, truncation):
            waiting = torch.cat([waiting, part]) if len(waiting) else part
            while len(waiting) >= n:
                yield waiting[:n]
                waiting = waiting[n:]


def grid(sampler: Sampler, seed: int, count: int | None, classes: Sequence[int]) -> Layout:
    """`Draws.grid`: the latents of a run's own sample grids, by the run's seed; a column per class if these
    are few. count: None: whole rows of at most 64. classes: none: all."""
    draws = _draws(sampler, seed, classes)
    z, c = draws.grid(count or 64)
    columns = draws.grid_columns(len(z))
    shown = count or whole_rows(len(z), columns)
    z, c = z[:shown], None if c is None else c[:shown]
    return Layout(z, c, columns, column_titles(c, columns, sampler.names))


def by_seed(sampler: Sampler, seeds: Sequence[int], classes: Sequence[int]) -> Layout:
    """An image per seed, of a class drawn from the seed; with classes, a row per seed and a column for each
    class."""
    z, c = sampler.latents(seeds)
    if not classes:
        return Layout(z, c, math.ceil(math.sqrt(len(z))))
    c = torch.tensor(classes).repeat(len(z))
    columns = len(classes) if len(classes) > 1 else math.ceil(math.sqrt(len(z)))
    titles = column_titles(c, columns, sampler.names)
    return Layout(z.repeat_interleave(len(classes), dim=0), c, columns, titles)


def rows(
    sampler: Sampler, seed: int, count: int | None, seeds: Sequence[int], classes: Sequence[int]
) -> Layout:
    """Rows of images, at most `count` (default: 64), from one latent to another within a class; with seeds,
    from each to the next, in the given or the first one's class."""
    draws = _draws(sampler, seed, classes)
    columns = _STEPS
    if seeds:
        if len(seeds) < 2 or len(classes) > 1:
            raise UserError("--interpolate from seed to seed takes two seeds or more, and one class.")
        keys, drawn = sampler.latents(seeds)
        starts, ends = keys[:-1], keys[1:]
        c = drawn if drawn is None else torch.tensor(classes or [int(drawn[0])]).expand(len(starts))
    else:
        columns = max(2, min(_STEPS, count or 64))
        number = max(1, (count or 64) // columns)
        keys = draws.fixed("interpolate", 2 * number).z
        starts, ends = keys[0::2], keys[1::2]
        c = draws.grid(number)[1]
    z = slerp(starts, ends, torch.linspace(0, 1, columns)).flatten(0, 1)
    return Layout(z, None if c is None else c.repeat_interleave(columns), columns)


def loops(
    sampler: Sampler, seed: int, count: int | None, seeds: Sequence[int], classes: Sequence[int]
) -> Layout:
    """Moving images: one through all seeds, in each of the classes; or `count` (default: whole rows of at
    most 16), each through latents of its own."""
    if not seeds:
        still = _draws(sampler, seed, classes)
        n, columns = count or 16, still.grid_columns(count or 16)
        c = still.grid(n)[1]
        shown = count or whole_rows(n, columns)
        keys = still.fixed("interpolate", _KEYS * n).z.view(_KEYS, n, -1)
        z = torch.stack([loop(keys[:, i], _KEYS * _FRAMES) for i in range(shown)], dim=1)
        c = None if c is None else c[:shown]
        return Layout(z, c, columns, column_titles(c, columns, sampler.names))
    if len(seeds) < 2:
        raise UserError("An animation from seed to seed takes two seeds or more.")
    keys, drawn = sampler.latents(seeds)
    path = loop(keys, _FRAMES * len(seeds))[:, None]
    if drawn is None:
        return Layout(path, None, 1)
    if not classes:
        raise UserError(
            "An animation from seed to seed stays in one class: name one, or several, with --classes."
        )
    c = torch.tensor(classes)
    return Layout(path.expand(-1, len(c), -1), c, len(c), column_titles(c, len(c), sampler.names))


def _draws(sampler: Sampler, seed: int, classes: Sequence[int]) -> Draws:
    """Of labels by the training set's frequencies, or equally of the wanted classes."""
    frequencies = sampler.frequencies
    if classes and frequencies is not None:
        frequencies = [float(label in classes) for label in range(len(frequencies))]
    return Draws(seed, sampler.z_dim, frequencies)
