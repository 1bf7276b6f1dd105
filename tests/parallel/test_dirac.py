"""The Dirac-GAN's closed form under every strategy.

Near the origin one alternating update (D first) is the linear map (h/2 = k, a = 1 − 2hλ_G, b = 1 − 2hλ_D)

    ψ' = bψ − kθ        θ' = aθ + kψ'

with determinant ab. Iterates turn around the origin on an ellipse, so no norm that is known beforehand
shrinks steadily. The map's own radius does: the area that two iterates span, v × v', is a quadratic form of v
that every update multiplies by the determinant, so its root, the radius, shrinks by √(ab) per update, and not
at all without penalties. A gradient penalty on D(x) = ψx is one on its weight: R1(γ) is L2(γ/2), R1 + R2 with
the same γ is L2(γ).
"""

from __future__ import annotations

import json
from itertools import pairwise

import dirac
import pytest
from launches import LAUNCHED


@pytest.mark.parametrize("game", dirac.SHRINKS)
@pytest.mark.parametrize("name", LAUNCHED)
def test_the_radius_shrinks_by_the_closed_form(launched, name, game):
    path = json.loads((launched(name) / f"dirac-{game}.json").read_text())
    areas = [theta * psi_ - psi * theta_ for (theta, psi), (theta_, psi_) in pairwise(path)]
    _, due = dirac.SHRINKS[game]
    assert len(areas) == dirac.UPDATES
    for update, (area, area_) in enumerate(pairwise(areas)):
        assert (area_ / area) ** 0.5 == pytest.approx(due, rel=1e-5), update
    # Over all updates no error has added up.
    assert (areas[-1] / areas[0]) ** (0.5 / (len(areas) - 1)) == pytest.approx(due, rel=1e-6)


@pytest.mark.parametrize("game", ["r1", "r1-r2"])
@pytest.mark.parametrize("name", LAUNCHED)
def test_a_gradient_penalty_on_D_is_a_weight_penalty(launched, name, game):
    """The trajectories are the same, not only their radius."""
    path, by_weight = (
        json.loads((launched(name) / f"dirac-{which}.json").read_text()) for which in (game, "l2-of-D")
    )
    for at, due in zip(path, by_weight, strict=True):
        assert at == pytest.approx(due, rel=1e-4, abs=1e-9)
