"""What has happened in a process before does not decide in which order a GPU differentiates.

There a thread of the device's makes the nodes of a gradient and numbers them by itself. Here another thread
takes its part.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import load
from pipeline.gan import second_order
from pipeline.gan.networks import build_G
from pipeline.gan.path_length import path_lengths

BEFORE = (0, 24, 86, 174, 542, 5_000)  # nodes that a process has made before it trains
STYLEGAN2 = (
    "data.train=none",
    "data.size=32",
    "G.kind=stylegan2",
    "G.z_dim=16",
    "G.width=4",
    "G.max_width=16",
)


class Device:
    """Differentiates in a thread of its own, as torch does on each GPU."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._grad = torch.autograd.grad

    def grad(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self._thread.submit(self._grad, *args, **kwargs).result()
        return found

    def backward(self, loss: Tensor) -> None:
        self._thread.submit(loss.backward).result()

    def close(self) -> None:
        self._thread.shutdown()


def of_D() -> tuple[nn.Module, Tensor]:
    """Pairs with R1 and R2."""
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3), nn.SiLU()) for _ in range(4)]
    D = nn.Sequential(*blocks, nn.Flatten(), nn.LazyLinear(1))
    real, fake = (torch.randn(3, 4, 12, 12, requires_grad=True) for _ in range(2))
    of_real, of_fake = D(real), D(fake)
    penalties = [
        second_order.gradient(logits.sum(), images).square().sum()
        for logits, images in ((of_real, real), (of_fake, fake))
    ]
    return D, torch.stack([nn.functional.softplus(of_fake - of_real).mean(), *penalties]).sum()


def of_G() -> tuple[nn.Module, Tensor]:
    """A StyleGAN2 with path length."""
    G = build_G(load(None, STYLEGAN2), 0)
    images = G(torch.randn(2, 16))
    return G, images.mean() + path_lengths(images, G.latent).square().mean()


def orders(turn: Callable[[], tuple[nn.Module, Tensor]], before: int, device: Device) -> list[list[str]]:
    """In which order the parameters' gradients are complete, in each of three turns."""
    found = []
    for _ in range(before):
        torch._C._functions.UndefinedGrad()
    second_order.begin(torch.device("cpu"))
    torch.manual_seed(0)
    for _ in range(3):
        order: list[str] = []
        module, loss = turn()
        for name, parameter in module.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name, order=order: order.append(name))
        device.backward(loss)
        found.append(order)
    return found


@pytest.fixture
def each_start(monkeypatch):
    """What a turn is like in processes that have made other numbers of nodes before."""

    def run(turn: Callable[[], tuple[nn.Module, Tensor]]) -> list[list[list[str]]]:
        results = []
        for before in BEFORE:
            with (
                closing(Device()) as device,
                monkeypatch.context() as patched,
                ThreadPoolExecutor(1) as trains,
            ):
                patched.setattr(torch.autograd, "grad", device.grad)
                results.append(trains.submit(orders, turn, before, device).result())
        return results

    return run


@pytest.mark.parametrize("turn", [of_D, of_G])
def test_a_backward_runs_in_one_order_whatever_the_process_has_done(monkeypatch, each_start, turn):
    monkeypatch.setattr(second_order, "_is_numbered_by_the_device", lambda found: True)
    found = each_start(turn)
    assert all(other == found[0] for other in found)
    assert found[0][0] and found[0][0] == found[0][1] == found[0][2]


@pytest.mark.parametrize("turn", [of_D, of_G])
def test_it_would_not_by_itself(each_start, turn):
    found = each_start(turn)
    assert any(other != found[0] for other in found)
