"""Paths through latents."""

from __future__ import annotations

import pytest
import torch

from pipeline.run.interpolation import loop, slerp


def test_slerp_keeps_its_ends_and_its_length():
    a, b = torch.nn.functional.normalize(
        torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)), dim=2
    )
    path = slerp(a, b, torch.linspace(0, 1, 9))
    assert torch.allclose(path[:, 0], a, atol=1e-6) and torch.allclose(path[:, -1], b, atol=1e-6)
    assert torch.allclose(path.norm(dim=2), torch.ones(5, 9), atol=1e-5)
    angles = (path[:, 1:] * path[:, :-1]).sum(dim=2).acos()
    assert torch.allclose(angles, angles[:, :1].expand_as(angles), atol=1e-3)
    opposite = slerp(torch.ones(1, 1), -torch.ones(1, 1), torch.linspace(0, 1, 3))
    assert opposite.flatten().tolist() == [1.0, 0.0, -1.0]


@pytest.mark.parametrize(("keys", "d"), [(2, 128), (3, 2), (4, 8), (5, 128)])
def test_a_loop_moves_at_one_speed_and_never_jumps(keys, d):
    """Latents of two dimensions have arcs of very different lengths."""
    z = torch.randn(keys, d, generator=torch.Generator().manual_seed(1))
    path = loop(z, 40 * keys)
    assert path.shape == (40 * keys, d) and path.dtype == torch.float32
    steps = (path.roll(-1, dims=0) - path).norm(dim=1)  # the last one back to the first
    assert steps.max() <= 1.02 * steps.mean()
    assert torch.allclose(path[0], z[0], atol=1e-6)
    for key in z[1:]:
        assert (path - key).norm(dim=1).min() <= 0.51 * steps.max()  # every one is passed
    low, high = z.norm(dim=1).min(), z.norm(dim=1).max()
    if d == 128:
        assert (path.norm(dim=1) > 0.9 * low).all() and (path.norm(dim=1) < 1.1 * high).all()
