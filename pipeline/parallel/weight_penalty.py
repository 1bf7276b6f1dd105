"""λ‖W‖² and λ‖W‖₁ over fragments: exact under every strategy, without gathering a parameter.

Both are sums over elements and split over fragments: the gradient of λ‖W‖² at an element is 2λ times the
element, on whichever rank it is. It is added on the local shards once, after the gradients have been averaged
over ranks and before clipping, which equals autograd on the penalty inside the loss. Parameters that do not
train are left out of value and gradient.

A fragment may count with a constant factor c of its layer (gan/penalised.py): λ(cw)² with the gradient 2λc²w,
and λ|cw| with λc·sign w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import torch

from pipeline.config import WeightPenalty
from pipeline.gan.schedules import Rates
from pipeline.parallel.fragments import Fragment, magnitudes_of, squares_of


@dataclass(frozen=True)
class LocalPenalty:
    """One player's weight penalties on one rank's fragments."""

    coefficients: WeightPenalty  # which of the two there are; how strong they are `now` says
    weights: list[torch.Tensor]  # the penalised fragments' data
    gains: tuple[float, ...] = ()  # the factor c of each; none given: 1
    _powers: dict[int, torch.Tensor] = field(default_factory=dict)  # of the factors, on the device

    @classmethod
    def over(cls, fragments: Sequence[Fragment], coefficients: WeightPenalty) -> Self:
        mine = [f for f in fragments if f.penalised]
        return cls(coefficients, [f.data for f in mine], tuple(f.penalised for f in mine))

    @cached_property
    def by_gain(self) -> dict[float, list[int]]:
        """Factor c → which of `weights` have it."""
        gains = self.gains or (1.0,) * len(self.weights)
        return {c: [i for i, gain in enumerate(gains) if gain == c] for c in dict.fromkeys(gains)}

    @cached_property
    def _parts(self) -> list[list[torch.Tensor]]:
        """The weights of each factor."""
        return [[self.weights[i] for i in places] for places in self.by_gain.values()]

    @property
    def squared(self) -> list[torch.Tensor]:
        """The weights whose squares are penalised: all or none."""
        return self.weights if self.coefficients.l2 else []

    def sums(self, squares: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Σ(cw)² over this rank's elements as l2_penalty and, if used, Σ|cw| as l1_penalty: fp64 scalars,
        which `factors` make the penalties of.

        squares: the sum of squares of each of `squared`, if they are known already.
        """
        found = {"l2_penalty": self._total(squares_of(self.squared) if squares is None else squares, 2)}
        if self.coefficients.l1:
            found["l1_penalty"] = self._total(magnitudes_of(self.weights), 1)
        return found

    def factors(self, now: Rates) -> dict[str, tuple[float, ...]]:
        """What the charts of `sums` and `gradient` are still to be multiplied by: statistics do it for many
        updates at once."""
        squares = () if self.coefficients.l1 else (now.l2, 4 * now.l2)
        return {"l2_penalty": (now.l2,), "l1_penalty": (now.l1,), "penalty": squares}

    def gradient(self, sums: Mapping[str, torch.Tensor], now: Rates) -> dict[str, torch.Tensor]:
        """{"penalty": this rank's share of ‖∂penalty/∂W‖², less its `factors`}; empty if unpenalised.

        L2 alone takes no pass over the weights where all factors c are 1: Σ (2λc²w + λ'c·sign w)² is
        4λ²·Σc⁴w² + 4λλ'·Σc³|w| + λ'²·Σc², the last over each w ≠ 0.
        """
        if not (self.coefficients.l2 or self.coefficients.l1):
            return {}
        plain = self._plain
        fourth = sums["l2_penalty"] if plain else self._total(squares_of(self.squared), 4)
        if not self.coefficients.l1:
            return {"penalty": fourth}
        l2, l1 = now.l2, now.l1
        third = sums["l1_penalty"] if plain else self._total(magnitudes_of(self.weights), 3)
        signs = torch._foreach_sign(self.weights) if self.weights else []
        of_signs = self._total(magnitudes_of(signs), 2)
        return {"penalty": 4 * l2 * (l2 * fourth) + 4 * l2 * (l1 * third) + l1 * (l1 * of_signs)}

    def add_gradient(self, gradients: list[torch.Tensor], now: Rates) -> None:
        """Add ∂penalty/∂W, in place, to the gradients of the penalised fragments: one for each of `weights`,
        of the same shape."""
        for (c, places), weights in zip(self.by_gain.items(), self._parts, strict=True):
            mine = [gradients[i] for i in places]
            if now.l2:
                torch._foreach_add_(mine, weights, alpha=2 * now.l2 * c**2)
            if now.l1:
                signs = torch._foreach_sign(weights)  # 0 at 0, as autograd's subgradient
                torch._foreach_add_(mine, signs, alpha=now.l1 * c)

    @property
    def _plain(self) -> bool:
        """Whether all factors c are 1."""
        return self.by_gain.keys() <= {1.0}

    def _total(self, each: torch.Tensor, power: int) -> torch.Tensor:
        """Σ cᵖᵒʷᵉʳ · each over the weights, a number for each → fp64 scalar; 0 without any."""
        if not len(each):
            device = self.weights[0].device if self.weights else None
            return torch.zeros((), dtype=torch.float64, device=device)
        if self._plain:
            return each.sum()
        if power not in self._powers:
            factors = torch.tensor(self.gains, dtype=torch.float64) ** power
            self._powers[power] = factors.to(each.device)
        return (each * self._powers[power]).sum()
