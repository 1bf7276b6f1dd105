"""A GPU differentiates in the order of a CPU, whatever has happened in the process before.

There a thread of the device's makes the nodes of a gradient and numbers them by itself. Here another thread
takes its part.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from device_thread import device_thread
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


def orders(turn: Callable[[], tuple[nn.Module, Tensor]], before: int) -> list[list[str]]:
    """In which order the parameters' gradients are complete, in each of three turns."""
    found = []
    for _ in range(before):
        torch._C._functions.UndefinedGrad()
    torch.manual_seed(0)
    for _ in range(3):
        order: list[str] = []
        module, loss = turn()
        for name, parameter in module.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name, order=order: order.append(name))
        loss.backward()
        found.append(order)
    return found


def after_each_start(turn: Callable[[], tuple[nn.Module, Tensor]], known: bool) -> list[list[list[str]]]:
    """What the turns are like in processes that have made other numbers of nodes before."""
    found = []
    for before in BEFORE:
        with device_thread(known), ThreadPoolExecutor(1) as trains:
            found.append(trains.submit(orders, turn, before).result())
    return found


@pytest.mark.parametrize("turn", [of_D, of_G])
def test_a_backward_runs_in_the_order_of_a_cpu_whatever_the_process_has_done(turn):
    on_a_cpu = orders(turn, 0)
    assert on_a_cpu[0] and on_a_cpu[0] == on_a_cpu[1] == on_a_cpu[2]
    assert after_each_start(turn, known=True) == [on_a_cpu] * len(BEFORE)


@pytest.mark.parametrize("turn", [of_D, of_G])
def test_it_would_not_by_itself(turn):
    found = after_each_start(turn, known=False)
    assert any(other != found[0] for other in found)


def test_the_devices_numbers_stay_ahead_of_a_long_training():
    """Many updates' worth of nodes later, and without taking numbers each time."""
    with device_thread():
        taken = []
        for _ in range(8):
            orders(of_D, before=2**15)
            taken.append(second_order._reached[torch.device("cpu")])
        assert taken == sorted(taken) and 1 < len(set(taken)) < 8
        assert orders(of_D, 0) == orders(of_D, 2**16)


def test_on_a_cpu_no_numbers_are_taken():
    of_D()
    before = torch._C._autograd._get_sequence_nr()
    of_D()
    assert torch._C._autograd._get_sequence_nr() - before < 1000 and not second_order._reached
