"""λ‖W‖² and λ‖W‖₁ over fragments: exact under every strategy, without gathering a parameter.

Both are sums over elements and split over fragments: the gradient of λ‖W‖² at an element is 2λ times the
element, on whichever rank it is. It is added on the local shards once, after the gradients have been averaged
over ranks and before clipping, which equals autograd on the penalty inside the loss. Parameters that do not
train are left out of value and gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from pipeline.config import WeightPenalty
from pipeline.gan.schedules import Rates
from pipeline.parallel.fragments import Fragment, sum_of_magnitudes, sum_of_squares


@dataclass(frozen=True)
class LocalPenalty:
    """One player's weight penalties on one rank's fragments."""

    coefficients: WeightPenalty  # which of the two there are; how strong they are `now` says
    weights: list[torch.Tensor]  # the penalised fragments' data

    @classmethod
    def over(cls, fragments: Sequence[Fragment], coefficients: WeightPenalty) -> Self:
        return cls(coefficients, [f.data for f in fragments if f.penalised])

    @property
    def squared(self) -> list[torch.Tensor]:
        """The weights whose squares are penalised: all or none."""
        return self.weights if self.coefficients.l2 else []

    def sums(self, squares: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Σw² over this rank's elements as l2_penalty and, if used, Σ|w| as l1_penalty: fp64 scalars, which
        `factors` make the penalties of.

        squares: the sum of squares of `squared`, if it is known already.
        """
        if not self.squared:
            device = self.weights[0].device if self.weights else None
            squares = torch.zeros((), dtype=torch.float64, device=device)
        elif squares is None:
            squares = sum_of_squares(self.weights)
        found = {"l2_penalty": squares}
        return found | ({"l1_penalty": sum_of_magnitudes(self.weights)} if self.coefficients.l1 else {})

    def factors(self, now: Rates) -> dict[str, tuple[float, ...]]:
        """What the charts of `sums` and `gradient` are still to be multiplied by: statistics do it for many
        updates at once."""
        squares = () if self.coefficients.l1 else (now.l2, 4 * now.l2)
        return {"l2_penalty": (now.l2,), "l1_penalty": (now.l1,), "penalty": squares}

    def gradient(self, sums: Mapping[str, torch.Tensor], now: Rates) -> dict[str, torch.Tensor]:
        """{"penalty": this rank's share of ‖∂penalty/∂W‖², less its `factors`}; empty if unpenalised.

        L2 alone takes no pass over the weights: Σ (2λw + λ'·sign w)² is 4λ·λ‖w‖² + 4λ·λ'‖w‖₁ + λ'² for each
        w ≠ 0.
        """
        if not self.coefficients.l1:
            return {"penalty": sums["l2_penalty"]} if self.coefficients.l2 else {}
        l2, l1 = now.l2, now.l1
        squares = 4 * l2 * (l2 * sums["l2_penalty"]) + 4 * l2 * (l1 * sums["l1_penalty"])
        for weight in self.weights:
            squares = squares + l1**2 * torch.count_nonzero(weight)
        return {"penalty": squares}

    def add_gradient(self, gradients: list[torch.Tensor], now: Rates) -> None:
        """Add ∂penalty/∂W, in place, to the gradients of the penalised fragments: one for each of `weights`,
        of the same shape."""
        if not gradients:
            return
        if now.l2:
            torch._foreach_add_(gradients, self.weights, alpha=2 * now.l2)
        if now.l1:
            signs = torch._foreach_sign(self.weights)  # 0 at 0, as autograd's subgradient
            torch._foreach_add_(gradients, signs, alpha=now.l1)
