"""Images of a trained G by seed: an image is a function of its seed, its class and the truncation alone.

Unlike the latents of a grid (`Draws.grid`), which are one draw for the whole grid, by `--seed`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import Config, UserError
from pipeline.gan.draws import Draws
from pipeline.gan.truncation import Truncated
from pipeline.run.evaluate import from_latents
from pipeline.run.features import digest_of_weights
from pipeline.run.images import images_of, made_at_once

BATCH = 64  # images made at once
LARGEST_SEED = 2**32 - 1


def refuse_truncation(psi: float) -> None:
    """Raise UserError for what is no ψ: of NaN the images would be noise, with no other sign of it."""
    if not (math.isfinite(psi) and psi >= 0):
        raise UserError(f"truncation {psi}: give a number from 0; 1 truncates nothing.")


class Sampler:
    """Makes images of a whole G on one device."""

    def __init__(
        self,
        G: nn.Module,
        config: Config,
        frequencies: Sequence[float] | None = None,
        names: Sequence[str] = (),
        device: torch.device | None = None,
    ) -> None:
        """G: in eval mode, such as `load_generator` gives; it is moved to the device (default: a GPU if there
        is one). frequencies, names: of the classes (State.label_frequencies, State.classes); None, ():
        unconditional. Raises UserError if data.decoder cannot be used."""
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.G, self.z_dim = G.to(self.device), config.G.z_dim
        self.seed = config.run.seed  # by which the run drew the latents of its own grids
        self.frequencies = None if frequencies is None else list(frequencies)
        self.names = tuple(names or map(str, range(len(frequencies or ()))))
        self._decode = images_of(config.data, self.device)
        self._at_once = made_at_once(config.data.size, config.data.batch_gpu)

    @property
    def made_of(self) -> dict[str, str]:
        """What images of the same seeds depend on."""
        return {"G": digest_of_weights(self.G), "images": self._decode.version}

    def latents(self, seeds: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """z, standard normal float32 [n, z_dim], and classes int64 [n] or None, each a function of its seed.

        z is NumPy's `RandomState(seed).randn(z_dim)`, whose stream is fixed for good (and which StyleGAN's
        own scripts use); the class is drawn by its frequency in the training set. Raises UserError for a seed
        outside [0, 2³²).
        """
        if hasattr(seeds, "__index__") and not np.ndim(seeds):
            raise UserError(f"seeds={seeds}: give several, as in range({seeds}), or [{seeds}] for one.")
        if wrong := [s for s in seeds if not (hasattr(s, "__index__") and 0 <= s <= LARGEST_SEED)]:
            raise UserError(f"seed {wrong[0]}: seeds are whole numbers from 0 to {LARGEST_SEED}.")
        z, u = np.empty((len(seeds), self.z_dim), np.float32), np.empty(len(seeds))
        numbers = np.random.RandomState()  # a new one per seed would take longer than its numbers
        for i, seed in enumerate(seeds):
            numbers.seed(seed)
            z[i], u[i] = numbers.randn(self.z_dim), numbers.random_sample()
        if self.frequencies is None:
            return torch.from_numpy(z), None
        return torch.from_numpy(z), Draws(0, self.z_dim, self.frequencies).classes_at(torch.from_numpy(u))

    def classes(self, wanted: Sequence[int | str]) -> list[int]:
        """The numbers of classes given by number or name. Raises UserError for one that there is not."""
        if self.frequencies is None:
            raise UserError("classes: this G is unconditional (data.conditional=false), so it has none.")
        return [self._class(one) for one in wanted]

    def images(self, z: Tensor, c: Tensor | None = None, truncation: float = 1.0) -> Iterator[Tensor]:
        """uint8 [≤ 64, 1 or 3, H, W] on the CPU, in the order of z [n, z_dim] and classes c [n].

        truncation: ψ of `Truncated`. The batch changes an image by rounding alone. Raises UserError if this G
        cannot be truncated, or for a ψ below 0 or not finite.
        """
        refuse_truncation(truncation)
        G: Callable[[Tensor, Tensor | None], Tensor]
        G = self.G if truncation == 1 else Truncated(self.G, truncation)
        make = from_latents(G, z, c, self.device, self._decode, self._at_once)
        return (make(start, min(BATCH, len(z) - start)).cpu() for start in range(0, len(z), BATCH))

    def sample(
        self,
        seeds: Sequence[int],
        classes: Sequence[int | str] | int | str | None = None,
        truncation: float = 1.0,
    ) -> Tensor:
        """An image per seed, uint8 [n, 1 or 3, H, W] on the CPU.

        classes: one for all, or one per seed, by number or name; None: drawn from the seeds. Raises UserError
        as the methods above, or if classes are not as many as seeds.
        """
        z, c = self.latents(seeds)
        if classes is not None:
            given: Any = classes
            each = list(given) if np.ndim(given) else [given] * len(z)  # a number of numpy's or torch's too
            if len(each) != len(z):
                raise UserError(f"{len(each)} classes for {len(z)} seeds: give one for all, or one for each.")
            c = torch.tensor(self.classes(each), dtype=torch.int64)
        parts = [*self.images(z, c, truncation)]
        if not parts:
            raise UserError("There are no seeds to make images of.")
        return torch.cat(parts)

    def _class(self, wanted: int | str) -> int:
        """A number is one; a text is a name if there is such a class, for names may be numerals."""
        if isinstance(wanted, str):
            if wanted in self.names:
                return self.names.index(wanted)
            if alike := [n for n, name in enumerate(self.names) if name.casefold() == wanted.casefold()]:
                return alike[0]
        if not isinstance(wanted, str) or wanted.isdecimal():
            if 0 <= int(wanted) < len(self.names):
                return int(wanted)
            raise UserError(f"There is no class {wanted}: classes are from 0 to {len(self.names) - 1}.")
        near = difflib.get_close_matches(wanted, self.names, n=1)
        some = ", ".join(self.names[:20]) + ", …" * (len(self.names) > 20)
        raise UserError(
            f"There is no class {wanted!r}{f'; did you mean {near[0]!r}?' if near else f': they are {some}.'}"
        )
