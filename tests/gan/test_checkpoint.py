"""Activation checkpointing: the same gradients, bit for bit, from less memory."""

import pytest
import torch
from torch import nn

from pipeline.config import UserError
from pipeline.gan.layers import run
from pipeline.gan.resnet import Discriminator, Generator

KEYS = {"size": 32, "channels": 1, "width": 4, "depth": 2, "norm": "group", "dropout": 0.2}


def pairs(kind, **keys):
    """The same network without and with checkpointing."""
    for checkpoint in (False, True):
        torch.manual_seed(0)
        yield kind(**KEYS, **keys, checkpoint=checkpoint, activation="silu")


def gradients(network, x, penalised):
    """Of a loss that may hold the gradient's own square; dropout is seeded."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_(penalised)
    out = network(x)
    loss = out.square().mean()
    if penalised:
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        loss = loss + slope.square().sum()
    loss.backward()
    return {name: p.grad for name, p in network.named_parameters()}


@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("kind", [Generator, Discriminator])
def test_gradients_are_the_same_bits_with_dropout_too(kind, penalised):
    torch.manual_seed(2)
    x, keys = (torch.randn(3, 6), {"z_dim": 6}) if kind is Generator else (torch.randn(3, 1, 32, 32), {})
    plain, checkpointed = (gradients(network, x, penalised) for network in pairs(kind, **keys))
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name
    with torch.no_grad():  # the comparison is of something: dropout's seed decides
        network = next(pairs(kind, **keys))
        assert not torch.equal(network(x), network(x))


class Counted(nn.Module):
    """Counts its passes."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return x.exp().sin()


def test_a_block_keeps_its_input_alone_and_runs_again():
    kept = {}
    for checkpoint in (False, True):
        block, held, x = Counted(), [], torch.ones(1000, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, held=held: held.append(t) or t, lambda t: t):
            out = run(block, x, checkpoint=checkpoint)
        out.sum().backward()
        kept[checkpoint] = sum(t.numel() for t in held)
        assert block.passes == 1 + checkpoint
        with torch.no_grad():
            run(block, x, checkpoint=checkpoint)
        assert block.passes == 2 + checkpoint
    assert kept == {False: 2000, True: 1000}


@pytest.mark.parametrize("keys", [{"norm": "batch"}, {"norm": "sync_batch"}, {"spectral_norm": True}])
@pytest.mark.parametrize("kind", [Generator, Discriminator])
def test_networks_that_change_when_run_are_refused(kind, keys):
    arguments = KEYS | keys | ({"z_dim": 4} if kind is Generator else {})
    with pytest.raises(UserError, match=f"checkpoint=true .* {next(iter(keys))}="):
        kind(**arguments, checkpoint=True)
    kind(**arguments)
