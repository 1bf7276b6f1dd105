"""What is too coarse for sums and small differences is promoted, here alone."""

from __future__ import annotations

from torch import Tensor


def wide(values: Tensor) -> Tensor:
    """The values, in float32 if they have less; float64 stays float64."""
    return values.float() if values.dtype.itemsize < 4 else values
