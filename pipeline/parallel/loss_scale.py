"""fp16's loss scale: gradients too small for half precision are computed times a large power of two.

Losses are multiplied by the scale before their backward pass and the averaged fp32 gradients divided by it
before anything else happens to them, so that penalties, norms and clipping see true units under every
strategy. A scale too large makes some gradient infinite: the update is skipped, on all ranks alike, and the
scale halved. After many updates without that it is doubled. All of it stays on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.parallel.fragments import not_finite

START = 2.0**16
_LARGEST = 2.0**24
_PATIENCE = 2000  # updates in a row that must be finite before the scale is doubled


class LossScale:
    """One player's scale. A power of two, so that scaling by it rounds nothing."""

    def __init__(self, device: torch.device) -> None:
        self._scale = torch.tensor(START, device=device)
        self._finite = torch.zeros((), device=device)  # updates since it was last changed
        self._squares = torch.zeros((), dtype=torch.float64, device=device)

    def up(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to differentiate."""
        return loss.float() * self._scale

    def down_(self, gradients: Sequence[torch.Tensor]) -> None:
        """Bring gradients back to true units, in place."""
        if gradients:
            torch._foreach_mul_(list(gradients), (1 / self._scale).to(gradients[0].device))

    def update(self, squares: torch.Tensor) -> torch.Tensor:
        """Adapt to an update whose squared gradient norm was `squares`; returns what is to be charted.

        For an update that is skipped that is the last one's norm: overflows are how the scale is found, and
        no error, unless there is no smaller scale to try.
        """
        overflow = not_finite(squares)
        found = overflow & (self._scale > 1.0)
        finite = torch.where(overflow, 0.0, self._finite + 1)
        grow = finite >= _PATIENCE
        scale = torch.where(overflow, self._scale / 2, torch.where(grow, self._scale * 2, self._scale))
        self._scale.copy_(scale.clamp(1.0, _LARGEST))
        self._finite.copy_(torch.where(grow, 0.0, finite))
        self._squares = torch.where(found, self._squares, squares)
        return self._squares

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of it."""
        return {"loss_scale": self._scale.clone(), "loss_scale_finite": self._finite.clone()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state` gave."""
        self._scale.copy_(state["loss_scale"])
        self._finite.copy_(state["loss_scale_finite"])
