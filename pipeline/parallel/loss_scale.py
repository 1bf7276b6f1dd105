"""fp16's loss scale, a power of two that keeps small gradients above the precision's underflow.

Losses are multiplied by it before backward, averaged fp32 gradients divided by it before anything else:
penalties, norms and clipping see true units under every strategy. If the scale is too large, a gradient is
infinite: all ranks skip the update, and the scale is halved. After many finite updates it is doubled. All of
this stays on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.parallel.fragments import not_finite

START = 2.0**16
_LARGEST = 2.0**24
_PATIENCE = 2000  # finite updates in a row before the scale is doubled


class LossScale:
    """One player's scale. Scaling by a power of two does not round."""

    def __init__(self, device: torch.device) -> None:
        self._scale = torch.tensor(START, device=device)
        self._finite = torch.zeros((), device=device)  # updates since it was last changed
        self._squares = torch.zeros((), dtype=torch.float64, device=device)

    def up(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to differentiate."""
        return loss.float() * self._scale

    def down_(self, gradients: Sequence[torch.Tensor]) -> None:
        """Divide gradients by the scale, in place."""
        if gradients:
            torch._foreach_mul_(list(gradients), (1 / self._scale).to(gradients[0].device))

    def update(self, squares: torch.Tensor) -> torch.Tensor:
        """Adapt to an update's squared gradient norm; returns the one to chart.

        For a skipped update this is the norm of the one before: an overflow is part of finding the scale, and
        an error only when the scale cannot be smaller.
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
        """For a checkpoint."""
        return {"loss_scale": self._scale.clone(), "loss_scale_finite": self._finite.clone()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned."""
        self._scale.copy_(state["loss_scale"])
        self._finite.copy_(state["loss_scale_finite"])
