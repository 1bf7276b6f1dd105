"""The Dirac-GAN's closed form under every strategy.

Near the origin one alternating update (D first) is the linear map (h/2 = k, a = 1 − 2hλ_G, b = 1 − 2hλ_D)

    ψ' = bψ − kθ        θ' = aθ + kψ'

with determinant ab. Iterates turn around the origin on an ellipse, so no norm that is known beforehand
shrinks steadily. The map's own radius does: the area that two iterates span, v × v', is a quadratic form of v
that every update multiplies by the determinant, so its root, the radius, shrinks by √(ab) per update, and not
at all without penalties.
"""

from __future__ import annotations

import json
from itertools import pairwise

import dirac
import pytest
from launches import LAUNCHED


@pytest.mark.parametrize("lambdas", dirac.LAMBDAS, ids=lambda pair: f"G{pair[0]}-D{pair[1]}")
@pytest.mark.parametrize("name", LAUNCHED)
def test_the_radius_shrinks_by_the_closed_form(launched, name, lambdas):
    path = json.loads((launched(name) / dirac.name(*lambdas)).read_text())
    areas = [theta * psi_ - psi * theta_ for (theta, psi), (theta_, psi_) in pairwise(path)]
    of_G, of_D = lambdas
    due = ((1 - 2 * dirac.STEP * of_G) * (1 - 2 * dirac.STEP * of_D)) ** 0.5
    assert len(areas) == dirac.UPDATES
    for update, (area, area_) in enumerate(pairwise(areas)):
        assert (area_ / area) ** 0.5 == pytest.approx(due, rel=1e-5), update
    # Over all updates no error has added up.
    assert (areas[-1] / areas[0]) ** (0.5 / (len(areas) - 1)) == pytest.approx(due, rel=1e-6)
