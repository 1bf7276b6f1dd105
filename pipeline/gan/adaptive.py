"""Adaptive augmentation: p follows how sure D is of real images."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class AdaptiveP:
    """p of ADA (Karras et al. 2020, section 3): one step per tick, up if D overfits, else down.

    A tick ends where cur_nimg passes a multiple of tick_kimg, whatever else is reported in between. p depends
    on integers alone, so that it is the same on all ranks and, as long as D's signs are, in all worlds.
    """

    target: float  # of r, the mean sign of D(x) on real images, of D(x) − D(G(z)) under a paired loss
    speed_kimg: float  # from p = 0 to 1
    tick_kimg: float
    p: float = 0.0
    since: int = 0  # cur_nimg when it moved last
    signs: float = 0.0  # their sum since, and …
    count: float = 0.0  # … their number

    def observe(self, signs: float, count: float, cur_nimg: int) -> None:
        """What D said since the last call: a sum of `count` signs. Not finite: does not count."""
        if math.isfinite(signs):
            self.signs, self.count = self.signs + signs, self.count + count
        tick = 1000 * self.tick_kimg
        if cur_nimg // tick > self.since // tick:
            excess = self.signs - self.target * self.count
            step = (cur_nimg - self.since) / (1000 * self.speed_kimg)
            self.p = min(1.0, max(0.0, self.p + math.copysign(step, excess) if excess else self.p))
            self.since, self.signs, self.count = cur_nimg, 0.0, 0.0

    def state(self) -> dict[str, float]:
        """What a checkpoint must hold."""
        return {"p": self.p, "since": self.since, "signs": self.signs, "count": self.count}

    def load(self, saved: dict[str, float]) -> None:
        """Restore what `state` returned; {} leaves p where it starts."""
        self.p, self.signs, self.count = (saved.get(name, 0.0) for name in ("p", "signs", "count"))
        self.since = int(saved.get("since", 0))
