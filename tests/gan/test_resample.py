"""Resampling by [1, 3, 3, 1], and grouped convolutions: against their definitions, to any derivative."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from pipeline.gan.grouped_conv import GroupedConv2d
from pipeline.gan.resample import Doubled, enlarge, shrink, smooth

AXIS = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
KERNEL = (AXIS[:, None] * AXIS)[None, None]


def by_kernel(x, twice):
    channels = x.shape[1]
    kernel = KERNEL.to(x.dtype).expand(channels, 1, 4, 4)
    if twice:
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=1, groups=channels)
    return F.conv2d(x, kernel, stride=2, padding=1, groups=channels)


def images(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("resample", "twice", "size"),
    [
        *((enlarge, True, size) for size in ((1, 1), (5, 5), (2, 2), (6, 8), (14, 4))),
        *((shrink, False, size) for size in ((2, 2), (6, 8), (14, 4))),
    ],
)
def test_it_is_the_filter_between_zeros(resample, twice, size):
    x = images(2, 3, *size)
    torch.testing.assert_close(resample(x), by_kernel(x, twice), rtol=0, atol=1e-14)


def test_inside_it_is_bilinear():
    x = images(1, 2, 8, 8)
    for ours, factor in ((enlarge(x), 2), (shrink(x), 0.5)):
        theirs = F.interpolate(x, scale_factor=factor, mode="bilinear", antialias=factor < 1)
        torch.testing.assert_close(ours[..., 1:-1, 1:-1], theirs[..., 1:-1, 1:-1])


@pytest.mark.parametrize("resample", [enlarge, shrink])
def test_its_derivatives(resample):
    x = images(1, 2, 4, 4).requires_grad_()
    torch.autograd.gradcheck(resample, x)
    torch.autograd.gradgradcheck(lambda x: resample(x).pow(2), x)


@pytest.mark.parametrize("resample", [enlarge, shrink])
def test_it_works_in_bf16_and_keeps_channels_last(resample):
    x = images(2, 5, 6, 6).contiguous(memory_format=torch.channels_last)
    out = resample(x.bfloat16())
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.double(), resample(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("border", "size"), [(1, (2, 2)), (1, (5, 8)), (2, (2, 2)), (2, (5, 8)), (2, (1, 1))]
)
def test_smoothing_is_the_filter_without_resampling(border, size):
    x = images(2, 3, *size)
    expected = F.conv2d(x, KERNEL.expand(3, 1, 4, 4), padding=border, groups=3)
    torch.testing.assert_close(smooth(x, border), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("border", [1, 2])
def test_the_derivatives_of_smoothing(border):
    x = images(1, 2, 4, 4).requires_grad_()
    torch.autograd.gradcheck(lambda x: smooth(x, border), x)
    torch.autograd.gradgradcheck(lambda x: smooth(x, border).pow(2), x)


def pair(groups, **options):
    ours = GroupedConv2d(8, 8, 3, groups=groups, **options).double()
    theirs = nn.Conv2d(8, 8, 3, groups=groups, **options).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "bias": False}])
def test_a_grouped_convolution_and_its_derivatives_are_torch_s(groups, options):
    """To the third derivative, in which every product of the rule occurs."""
    torch.manual_seed(0)
    x, results = images(2, 8, 5, 5).requires_grad_(), []
    for layer in pair(groups, **options):
        inputs = [x, *layer.parameters()]
        found = [layer(x)]
        for _ in range(3):
            value = found[-1].sin().sum() + sum(t.pow(3).sum() for t in found)
            found += [sum(g.sum() for g in torch.autograd.grad(value, inputs, create_graph=True))]
            results.append(found[-1])
        results.append(torch.autograd.grad(found[-1], x)[0])
    for ours, theirs in zip(results[:4], results[4:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_grouped_convolution_under_autocast_is_torch_s():
    ours, theirs = pair(2, padding=1)
    ours, theirs, x = ours.float(), theirs.float(), images(2, 8, 5, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
        torch.testing.assert_close(ours(x), theirs(x), rtol=0.02, atol=0.02)
    (ours(x).sum() + ours(x).square().sum()).backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


def test_without_memory_there_are_shapes():
    with torch.device("meta"):
        layer = GroupedConv2d(8, 8, 3, padding=1, groups=2)
        assert shrink(enlarge(layer(torch.zeros(2, 8, 4, 4)))).shape == (2, 8, 4, 4)


def test_a_frozen_grouped_convolution_passes_gradients_on():
    layer, _ = pair(4, padding=1)
    x = images(1, 8, 5, 5).requires_grad_()
    layer.requires_grad_(False)(x).sum().backward()
    assert x.grad.abs().sum() > 0 and layer.weight.grad is None


@pytest.mark.parametrize("doubled", [Doubled(), enlarge])
def test_autocast_on_a_gpu_widens_nothing(monkeypatch, doubled):
    """As it does what torch enlarges, on GPUs alone. The tensors have no memory."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    with FakeTensorMode(), torch.autocast("cuda", dtype=torch.bfloat16):
        x = torch.empty((2, 4, 4, 4), device="cuda", dtype=torch.bfloat16, memory_format=torch.channels_last)
        assert F.interpolate(x, scale_factor=2).dtype == torch.float32
        larger = doubled(x)
        assert larger.dtype == torch.bfloat16 and larger.shape == (2, 4, 8, 8)
