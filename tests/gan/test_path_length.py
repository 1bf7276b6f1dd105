"""Path length regularisation against lengths worked out by hand and against a plain second implementation."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from launch.selfcheck.networks import LatentGenerator
from pipeline.gan import gradient_penalty
from pipeline.gan.path_length import PathLength, path_lengths
from pipeline.parallel.moving_mean import MovingMean

WEIGHT, YES = 3.0, torch.tensor(True)


def ranks(world: int = 1, others: tuple[Tensor, ...] = ()) -> SimpleNamespace:
    """Ranks of which the others say what is given."""
    return SimpleNamespace(device=torch.device("cpu"), world=world, sum=lambda mine: sum(others, mine))


def mean(value: float = 0.0) -> MovingMean:
    found = MovingMean(ranks())
    found.value = torch.tensor(value, dtype=torch.float64)
    return found


def known(monkeypatch: pytest.MonkeyPatch, y: Tensor) -> Tensor:
    """y as it enters ⟨G(w), y⟩, from noise that is drawn as `y`."""
    monkeypatch.setattr(gradient_penalty, "noise", lambda images, *_: y.view_as(images))
    return y.flatten(1) / math.sqrt(y[0, 0].numel())


@pytest.mark.parametrize("layers", [None, 3])
def test_a_linear_generator_has_a_transposed_y(monkeypatch, layers):
    """x = A w has J = Aᵀy. With w of several layers, of which x is the sum of A_l w_l, ‖J‖² is their mean."""
    torch.manual_seed(0)
    count, dim, a = layers or 1, 5, 0.7
    A = torch.randn(count, 2 * 4 * 4, dim, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, count, dim, dtype=torch.float64, requires_grad=True)
    latent = w if layers else w[:, 0]
    images = torch.einsum("lxd,nld->nx", A, latent if layers else latent[:, None]).view(6, 2, 4, 4)
    y = known(monkeypatch, torch.randn(6, 2, 4, 4).double())
    lengths = torch.einsum("lxd,nx->nld", A, y).square().sum(2).mean(1).sqrt()
    torch.testing.assert_close(path_lengths(images, latent), lengths)
    penalty, expected = (
        PathLength(WEIGHT, 0.9)(images, latent, mean(a)),
        WEIGHT * (lengths - a).square().mean(),
    )
    assert penalty.dtype == torch.float64 and penalty.shape == ()
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(torch.autograd.grad(penalty, A)[0], torch.autograd.grad(expected, A)[0])


def test_y_is_drawn_for_each_image_with_a_norm_of_the_root_of_the_channels():
    """E‖y‖² over an image of C channels is C: for x = w, ‖J‖² is it."""
    w = torch.zeros(500, 3 * 8 * 8, requires_grad=True)
    lengths = path_lengths(w.view(500, 3, 8, 8), w)
    assert lengths.square().mean().item() == pytest.approx(3, rel=0.02)
    assert len(lengths.unique()) == 500


def test_it_reaches_every_weight_of_a_network(monkeypatch):
    """Against finite differences: of ⟨G(w), y⟩ for each element of w, and of that along the weights."""
    torch.manual_seed(0)
    G = LatentGenerator(z_dim=3, size=28, channels=1, width=2, norm="none", activation="silu").double()
    z, noise, a, step = torch.randn(2, 3).double(), torch.randn(2, 1, 28, 28).double(), 0.1, 1e-5
    y = known(monkeypatch, noise)

    def penalty() -> float:
        """By perturbing each element of w in turn."""
        w = G.mapping(z).detach().unflatten(1, (2, 3))
        J = torch.zeros_like(w)
        for place in ((n, layer, i) for n in range(2) for layer in range(2) for i in range(3)):
            for sign in (1, -1):
                moved = w.clone()
                moved[place] += sign * 1e-4
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(G.mapping, "forward", lambda _, moved=moved: moved.flatten(1))
                    J[place] += sign * (G(z).flatten(1) * y).sum().item() / 2e-4
        return WEIGHT * ((J.square().sum(2).mean(1).sqrt() - a) ** 2).mean().item()

    images = G(z)
    found = PathLength(WEIGHT, 0.9)(images, G.latent, mean(a))
    assert found.item() == pytest.approx(penalty(), rel=1e-6)
    weights = (G.mapping[0].weight, G.blocks[1].conv.weight, G.contrast.weight)
    for weight, gradient in zip(weights, torch.autograd.grad(found, weights), strict=True):
        before, direction, values = weight.detach().clone(), torch.randn_like(weight), []
        for sign in (1, -1):
            with torch.no_grad():
                weight.copy_(before + sign * step * direction)
            values.append(penalty())
        with torch.no_grad():
            weight.copy_(before)
        slope = (values[0] - values[1]) / (2 * step)
        assert slope != 0 and (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-4)


def test_it_counts_its_factor_times_and_observes_nothing_where_it_is_not_due():
    w = torch.randn(4, 8, requires_grad=True)
    images, a = (w * w).view(4, 2, 2, 2), mean(0.5)
    torch.manual_seed(0)
    once = PathLength(WEIGHT, 0.9)(images, w, a)
    torch.manual_seed(0)
    torch.testing.assert_close(PathLength(WEIGHT, 0.9, factor=4)(images, w, a), 4 * once)
    idle, still = PathLength(WEIGHT, 0.9, factor=0), MovingMean(ranks())
    value = idle(images, w, still)
    assert value.item() == 0.0 and value.shape == () and value.dtype == torch.float32
    assert not idle.twice and still.state() == {}


def test_an_image_that_does_not_depend_on_its_latent_leaves_finite_gradients():
    w, A = torch.randn(3, 4, requires_grad=True), torch.zeros(4, 4, requires_grad=True)
    penalty = PathLength(WEIGHT, 0.9)((w @ A).view(3, 1, 2, 2), w, mean(0.0))
    assert torch.autograd.grad(penalty, A)[0].isfinite().all()


def test_bf16_is_promoted():
    w = torch.randn(3, 4, requires_grad=True)
    assert path_lengths((2 * w.bfloat16()).view(3, 1, 2, 2), w).dtype == torch.float32
    low = w.bfloat16().detach().requires_grad_()
    assert path_lengths((2 * low).view(3, 1, 2, 2), low).dtype == torch.float32


def test_the_mean_moves_after_each_update_by_the_whole_batch_and_not_after_a_skipped_one():
    """Two rounds, two ranks: a ← d·a + (1 − d)·m, m the mean over rounds and ranks of what they observed."""
    found = MovingMean(ranks(2, (torch.tensor(5.0),)))
    by_hand, decay = 0.0, 0.75
    for first, second, finite in ((1.0, 3.0, True), (float("nan"), 2.0, False), (4.0, 6.0, True)):
        before = found.value.item()
        found.observe(torch.tensor([first - 0.5, first + 0.5]), decay)
        found.observe(torch.tensor([second, second]), decay)
        assert found.value.item() == before
        found.move(torch.tensor(finite))
        if finite:
            by_hand = decay * by_hand + (1 - decay) * ((first + second) / 2 + 5) / 2
        assert found.value.item() == pytest.approx(by_hand, rel=1e-6)
        found.move(YES)  # an update that observes nothing
        assert found.value.item() == pytest.approx(by_hand, rel=1e-6)


def test_the_mean_is_saved_once_there_is_one():
    found, other = MovingMean(ranks()), MovingMean(ranks())
    assert found.state() == {}
    other.load(found.state())
    assert other.state() == {}
    found.observe(torch.tensor([2.0]), 0.5)
    found.move(YES)
    other.load(found.state())
    assert other.value.item() == 1.0 and other.state().keys() == found.state().keys() == {"moving_mean"}
