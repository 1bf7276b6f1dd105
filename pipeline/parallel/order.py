"""Whether all ranks run the layers of a sharded network in one order.

Gathers find each other by their order alone. A rank that runs another layer than the others, as with
stochastic depth drawn from each rank's own random numbers, would compute with a mixture of two layers'
weights, and no error would say so.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

_FACTOR, _MODULUS = 1_000_003, 2**48 - 59  # a prime; sums of ranks' figures are in float64


class Order:
    """A number that depends on which of these modules ran since the last `take`, and in which order."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._seen = 0
        for number, module in enumerate(modules, 1):
            module.register_forward_pre_hook(partial(self._see, number))

    def _see(self, number: int, *_: Any) -> None:
        self._seen = (self._seen * _FACTOR + number) % _MODULUS

    def take(self) -> float:
        seen, self._seen = self._seen, 0
        return float(seen)


def gathered_alone(network: nn.Module) -> list[nn.Module]:
    """The modules that DeepSpeed's stage 3 gathers each by itself: those with parameters of their own."""
    return [module for module in network.modules() if any(True for _ in module.parameters(recurse=False))]
