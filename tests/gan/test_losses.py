"""Losses against the formulas of their papers, in float64 and far out where a naive form overflows."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy

from pipeline.gan.losses import adversarial

KINDS = ("minimax", "nonsaturating", "hinge", "least_squares", "wasserstein", "relativistic")
real = torch.tensor([-3.0, -0.2, 0.0, 0.7, 4.0])
fake = torch.tensor([-2.5, -1.0, 0.1, 1.5, 3.0])


def bce(logits: torch.Tensor, target: float) -> torch.Tensor:
    p = logits.double().sigmoid()
    return binary_cross_entropy(p, torch.full_like(p, target)).float()


@pytest.mark.parametrize("kind", ["minimax", "nonsaturating"])
def test_log_losses_are_binary_cross_entropy_on_probabilities(kind):
    loss = adversarial(kind)
    torch.testing.assert_close(loss.d(real, fake), bce(real, 1) + bce(fake, 0))
    expected = -bce(fake, 0) if kind == "minimax" else bce(fake, 1)
    torch.testing.assert_close(loss.g(fake), expected)


def test_hinge_by_hand():
    loss = adversarial("hinge")
    # max(0, 1 − real) = 4, 1.2, 1, 0.3, 0; max(0, 1 + fake) = 0, 0, 1.1, 2.5, 4
    assert loss.d(real, fake).item() == pytest.approx((4 + 1.2 + 1 + 0.3) / 5 + (1.1 + 2.5 + 4) / 5)
    assert loss.g(fake).item() == pytest.approx(-(-2.5 - 1 + 0.1 + 1.5 + 3) / 5)


def test_least_squares_by_hand():
    loss = adversarial("least_squares")
    d = sum((a - 1) ** 2 for a in real.tolist()) / 10 + sum(b**2 for b in fake.tolist()) / 10
    assert loss.d(real, fake).item() == pytest.approx(d)
    assert loss.g(fake).item() == pytest.approx(sum((b - 1) ** 2 for b in fake.tolist()) / 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["minimax", "nonsaturating"])
def test_sure_of_the_wrong_and_of_the_right(kind, dtype):
    """At logits of ±100, where σ rounds to 0 or 1 and log σ would be −∞ or its gradient 0/0."""
    loss = adversarial(kind)
    high = torch.full((4,), 100.0, dtype=dtype, requires_grad=True)
    low = torch.full((4,), -100.0, dtype=dtype, requires_grad=True)
    wrong, right = loss.d(low, high), loss.d(high, low)
    assert wrong.dtype == torch.float32 and wrong.item() == 200.0
    assert 0 <= right.item() < 1e-40
    g_sure = {"minimax": -100.0, "nonsaturating": 0.0}[kind]  # D takes the fakes for real
    g_lost = {"minimax": 0.0, "nonsaturating": 100.0}[kind]
    assert loss.g(high).item() == pytest.approx(g_sure, abs=1e-30)
    assert loss.g(low).item() == pytest.approx(g_lost, abs=1e-30)
    assert all(
        g.isfinite().all() for g in torch.autograd.grad(wrong + loss.g(high) + loss.g(low), (high, low))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_half_precision_are_averaged_in_float32(kind):
    loss = adversarial(kind)
    many = torch.linspace(0.1, 0.9, 10_000).bfloat16()
    other = many.flip(0)
    for half, full in (
        (loss.d(many, other), loss.d(many.float(), other.float())),
        (loss.g(many, other), loss.g(many.float(), other.float())),
    ):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_each_player_pulls_the_logits_its_way(kind):
    loss = adversarial(kind)
    r, f = torch.tensor([-0.5, 0.5], requires_grad=True), torch.tensor([-0.5, 0.5], requires_grad=True)
    d_real, d_fake = torch.autograd.grad(loss.d(r, f), (r, f))
    (g_fake,) = torch.autograd.grad(loss.g(f, r.detach()), f)
    assert (d_real < 0).all(), "lowering L_D must raise the logits of real images"
    if kind == "least_squares":  # towards 0 from either side
        assert (d_fake.sign() == f.sign()).all()
    else:
        assert (d_fake > 0).all(), "lowering L_D must lower the logits of fakes"
    assert (g_fake < 0).all(), "lowering L_G must raise the logits of fakes"


def test_nonsaturating_learns_where_minimax_does_not():
    lost = torch.tensor([-10.0], requires_grad=True)
    (slow,) = torch.autograd.grad(adversarial("minimax").g(lost), lost)
    (fast,) = torch.autograd.grad(adversarial("nonsaturating").g(lost), lost)
    assert slow.item() == pytest.approx(-torch.tensor(-10.0).sigmoid().item())
    assert fast.item() == pytest.approx(-torch.tensor(10.0).sigmoid().item())


def test_wasserstein_by_hand():
    loss = adversarial("wasserstein")
    assert loss.d(real, fake).item() == pytest.approx((1.1 - 1.5) / 5)
    assert loss.g(fake).item() == pytest.approx(-1.1 / 5)


@pytest.mark.parametrize("gap", [-200.0, -3.0, 0.0, 3.0, 200.0])
def test_the_relativistic_loss_compares_pairs(gap):
    """∂L_D/∂aᵢ = −σ(bᵢ − aᵢ)/N, ∂L_D/∂bᵢ its opposite, ∂L_G/∂bᵢ = −σ(aᵢ − bᵢ)/N: finite and exact far out."""
    loss = adversarial("relativistic")
    assert loss.paired
    a = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    b = (a.detach() + gap * torch.tensor([1.0, 0.5, -1.0])).requires_grad_()
    by_a, by_b = torch.autograd.grad(loss.d(a, b), (a, b))
    assert by_a.dtype == torch.float64
    torch.testing.assert_close(by_a, -(b - a).sigmoid() / 3, rtol=1e-12, atol=0)
    torch.testing.assert_close(by_b, -by_a, rtol=1e-12, atol=0)
    (of_G,) = torch.autograd.grad(loss.g(b, a.detach()), b)
    torch.testing.assert_close(of_G, -(a - b).sigmoid() / 3, rtol=1e-12, atol=0)
    swapped = torch.tensor([2, 0, 1])
    torch.testing.assert_close(loss.d(a[swapped], b[swapped]), loss.d(a, b))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_double_precision_stay_so(kind):
    loss = adversarial(kind)
    assert loss.d(real.double(), fake.double()).dtype == torch.float64
    assert loss.g(fake.double(), real.double()).dtype == torch.float64
