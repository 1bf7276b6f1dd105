"""The moving mean of something that a penalty measures on every image, the same on all ranks.

It moves after an update, by the whole batch, and what the update itself compares with is the mean before it:
a round does not wait for those that come after it, and the training depends on neither rounds nor ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pipeline.parallel.ranks import Ranks


class MovingMean:
    """One player's, on the device, where nothing waits for it. A skipped update does not move it."""

    def __init__(self, ranks: Ranks) -> None:
        self.value = torch.zeros((), device=ranks.device)  # fp32; replaced, never changed in place
        self._ranks, self._used = ranks, False
        self._observed: list[torch.Tensor] = []  # this rank's mean in each round of the update under way
        self._decay = 0.0

    def observe(self, values: torch.Tensor, decay: float) -> None:
        """values [N]: of this rank's images in one round, as many on every rank and in every round. decay:
        the share of the old mean that the update keeps."""
        self._observed.append(values.detach().mean())
        self._decay, self._used = decay, True

    def move(self, finite: torch.Tensor) -> None:
        """At the end of an update, unless `finite`, a flag on the device, is false. Takes one all-reduce of
        one number if anything was observed."""
        if self._observed:
            mine = torch.stack(self._observed).mean(dtype=torch.float32)
            mean = self._ranks.sum(mine) / self._ranks.world
            self.value = torch.where(finite, self.value.lerp(mean, 1 - self._decay), self.value)
            self._observed.clear()

    def state(self) -> dict[str, torch.Tensor]:
        """For a checkpoint; empty if nothing has ever been observed."""
        return {"moving_mean": self.value} if self._used else {}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state` returned, if it is there."""
        if "moving_mean" in state:
            self.value, self._used = state["moving_mean"].to(self.value.device), True
