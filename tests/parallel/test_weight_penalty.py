"""One rank's part of the weight penalties: over all ranks autograd's, where layers count with factors too."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.config import WeightPenalty
from pipeline.gan.schedules import Rates
from pipeline.parallel.fragments import Fragment, finite
from pipeline.parallel.weight_penalty import LocalPenalty

FACTORS = {
    "plain": (1.0, 1.0, 1.0),
    "one of all": (0.3,) * 3,
    "some": (1.0, 0.3, 2.5),
    "alike": (0.3, 1.0, 0.3),
}


def on_two_ranks(weights, factors):
    """Each rank's fragments of weights, of which the second is the last rank's alone; and one not covered."""
    for rank in range(2):
        parts = [w.chunk(2)[rank] for w in weights]
        parts[1] = weights[1] if rank else weights[1][:0]
        given = zip(weights, parts, factors, strict=True)
        covered = [Fragment(str(i), 0, w.shape, part, c) for i, (w, part, c) in enumerate(given)]
        yield [*covered, Fragment("bias", 0, torch.Size([3]), torch.full((3,), 9.0), 0.0)]


@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS.keys())
@pytest.mark.parametrize(("l2", "l1"), [(0.7, 0.0), (0.0, 0.2), (0.7, 0.2)])
def test_it_is_that_of_autograd(factors, l2, l1):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in ((2000, 3), (7, 5), (4, 2, 3))]
    weights[0][0, 0] = 0  # where |w| has no derivative, and autograd says 0
    doubles = [w.double().requires_grad_() for w in weights]
    of_l2 = sum((c * w).square().sum() for c, w in zip(factors, doubles, strict=True))
    of_l1 = sum((c * w).abs().sum() for c, w in zip(factors, doubles, strict=True))
    due = torch.autograd.grad(l2 * of_l2 + l1 * of_l1, doubles)
    now, coefficients = Rates(1e-3, (0.0, 0.9), l2, l1), WeightPenalty(l2=l2, l1=l1)
    found: dict[str, float] = {}
    gradients: list[list[torch.Tensor]] = []
    for fragments in on_two_ranks(weights, factors):
        penalty = LocalPenalty.over(fragments, coefficients)
        sums = penalty.sums()
        each = [w.double().square().sum() for w in penalty.squared]
        known = penalty.sums(torch.stack(each) if each else torch.zeros(0))
        assert {k: float(v) for k, v in known.items()} == pytest.approx(
            {k: float(v) for k, v in sums.items()}
        )
        for name, part in (sums | penalty.gradient(sums, now)).items():
            assert part.dtype == torch.float64
            found[name] = found.get(name, 0) + float(part) * math.prod(penalty.factors(now)[name])
        gradients.append([torch.ones_like(w) for w in penalty.weights])
        penalty.add_gradient(gradients[-1], now)
    assert found["l2_penalty"] == pytest.approx(l2 * of_l2.item(), rel=1e-7)
    assert found.get("l1_penalty", 0) == pytest.approx(l1 * of_l1.item() if l1 else 0, rel=1e-7)
    assert found["penalty"] == pytest.approx(sum(float(g.square().sum()) for g in due), rel=1e-7)
    for whole, *parts in zip(due, *gradients, strict=True):
        torch.testing.assert_close(torch.cat(parts) - 1, whole.float(), rtol=1e-5, atol=1e-6)


def test_what_float32_cannot_hold_is_not_finite():
    """On GPUs squares are summed in float64; Adam's second moments of such a gradient are float32."""
    squares = torch.tensor([0, 3.3e38, 3.5e38, 1e44, torch.inf, torch.nan], dtype=torch.float64)
    assert finite(squares).tolist() == [True, True, False, False, False, False]
