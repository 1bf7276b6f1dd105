"""Truncation: towards the mean w of the image's class."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import UserError
from pipeline.gan.stylegan2 import Generator
from pipeline.gan.truncation import SAMPLES, Truncated

LABELS = torch.tensor([0, 2, 1, 2])


def generator(num_classes: int = 3) -> Generator:
    """In float64, none of whose parameters is where it starts."""
    torch.manual_seed(0)
    G = Generator(z_dim=6, size=28, channels=3, num_classes=num_classes, width=3, max_width=5, mapping=3)
    with torch.no_grad():
        for p in G.double().parameters():
            p += 0.3 * torch.randn_like(p)
    return G.eval()


def test_truncation_moves_every_w_towards_the_mean_of_its_class():
    G = generator()
    z, psi = torch.randn(4, 6).double(), 0.7
    torch.testing.assert_close(Truncated(G, 1.0)(z, LABELS), G(z, LABELS).detach())
    assert torch.equal(*Truncated(G, 0.0)(z, LABELS)[[1, 3]]), "two images of class 2"
    w = G.mapping(z, LABELS)
    centre = torch.stack([truncated_centre(G, label) for label in LABELS])
    torch.testing.assert_close(
        Truncated(G, psi)(z, LABELS), G.synthesis(centre + psi * (w - centre)).detach()
    )
    torch.manual_seed(5)
    fresh = G.mapping(torch.randn(40_000, 6).double(), torch.full((40_000,), 2)).detach()
    torch.testing.assert_close(centre[1], fresh.mean(0), rtol=0, atol=5 * fresh.std(0).max().item() / 100)


def truncated_centre(G: Generator, label: Tensor) -> Tensor:
    """w̄, from images of ψ = 0: none but it gives them."""
    seen: list[Tensor] = []
    original = G.synthesis
    G.synthesis = lambda w: seen.append(w) or original(w)  # type: ignore[method-assign, func-returns-value]
    Truncated(G, 0.0)(torch.zeros(1, 6).double(), label[None])
    G.synthesis = original  # type: ignore[method-assign]
    return seen[0][0]


def test_truncation_without_labels_and_without_a_latent():
    images = Truncated(generator(num_classes=0), 0.0)(torch.randn(3, 6).double(), None)
    assert torch.equal(images[0], images[2]) and SAMPLES == 10_000
    with pytest.raises(UserError, match=r"this one has no mapping\(z, c\)"):
        Truncated(nn.Linear(2, 2), 0.5)
