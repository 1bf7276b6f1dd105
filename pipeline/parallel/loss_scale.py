"""fp16's loss scale, a power of two that keeps small gradients above the precision's underflow.

Losses are multiplied by it before backward, averaged fp32 gradients divided by it before anything else:
penalties, norms and clipping see true units under every strategy. If the scale is too large, a gradient is
infinite: all ranks skip the update, and the scale is halved. After many finite updates it is doubled. All of
this stays on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

START = 2.0**16
_LARGEST = 2.0**24
_PATIENCE = 2000  # finite updates in a row before the scale is doubled


class LossScale:
    """One player's scale. Scaling by a power of two does not round."""

    def __init__(self, device: torch.device) -> None:
        self._scale = torch.tensor(START, device=device)
        self._finite = torch.zeros((), dtype=torch.int32, device=device)  # updates since it last changed
        self._squares = torch.zeros((), dtype=torch.float64, device=device)

    def up(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to differentiate."""
        return loss.float() * self._scale

    def down_(self, gradients: Sequence[torch.Tensor]) -> None:
        """Divide gradients by the scale, in place."""
        if gradients:
            torch._foreach_mul_(list(gradients), (1 / self._scale).to(gradients[0].device))

    def update(self, squares: torch.Tensor, found_inf: torch.Tensor) -> torch.Tensor:
        """Adapt to an update's squared gradient norm and whether it was infinite, fp32 1.0 or 0.0; returns
        the one to chart.

        For a skipped update this is the norm of the one before: an overflow is part of finding the scale, and
        an error only when the scale cannot be smaller.
        """
        halved = found_inf * self._scale > 1.0
        torch._amp_update_scale_(self._scale, self._finite, found_inf, 2.0, 0.5, _PATIENCE)
        self._scale.clamp_(1.0, _LARGEST)
        self._squares = torch.where(halved, self._squares, squares)
        return self._squares

    def state(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        return {
            "loss_scale": self._scale.clone(),
            "loss_scale_finite": self._finite.float(),
            "loss_scale_squares": torch.nan_to_num(self._squares, 0.0, 0.0, 0.0),
        }

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned; without the squares, which only charts show, in older versions."""
        self._scale.copy_(state["loss_scale"])
        self._finite.copy_(state["loss_scale_finite"])
        if "loss_scale_squares" in state:
            self._squares = state["loss_scale_squares"].to(self._squares)
