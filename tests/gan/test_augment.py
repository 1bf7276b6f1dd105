"""Augmentation against a loop over pixels, in numpy and float64, written from its description alone."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from pipeline.gan import augment
from pipeline.gan.adaptive import AdaptiveP
from pipeline.gan.augment import OPS, Augmentation

COUNT = 24
NORMAL = NormalDist().inv_cdf


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, Augmentation.numbers, dtype=torch.float64, generator=generator(seed))


def images(count: int = COUNT, channels: int = 3, size: int = 9, dtype=torch.float64) -> torch.Tensor:
    return (
        2 * torch.rand(count, channels, size, size, generator=generator(5), dtype=torch.float64).to(dtype) - 1
    )


def reflected(place: float, last: int) -> float:
    while not 0 <= place <= last:
        place = -place if place < 0 else 2 * last - place
    return place


def between(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """Bilinear interpolation at a place counted from the upper left pixel, reflected into the image."""
    last = image.shape[1] - 1
    x, y = reflected(x, last), reflected(y, last)
    total = np.zeros(len(image))
    for row in range(last + 1):
        for column in range(last + 1):
            total += max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row)) * image[:, row, column]
    return total


def by_hand(image: np.ndarray, numbers: list[float], ops: tuple[str, ...], p: float) -> np.ndarray:
    """One image, one operation after another; to find where a pixel comes from, they are undone."""
    on = {op for op, number in zip(OPS, numbers, strict=False) if number < p and op in ops}
    flip, right, down, scale, angle, brightness, contrast, saturation, cut_x, cut_y = numbers[len(OPS) :]
    size, out = image.shape[1], image.copy()
    middle = (size - 1) / 2
    for row in range(size):
        for column in range(size):
            x, y = column - middle, row - middle
            if "rotate" in on:
                turned = complex(x, y) * np.exp(-2j * math.pi * angle)
                x, y = turned.real, turned.imag
            if "scale" in on:
                x, y = x / 2 ** (0.2 * NORMAL(scale)), y / 2 ** (0.2 * NORMAL(scale))
            if "shift" in on:
                x, y = x - round((2 * right - 1) * size / 8), y - round((2 * down - 1) * size / 8)
            if "flip" in on and flip < 0.5:
                x = -x
            out[:, row, column] = between(image, x + middle, y + middle)
    if "colour" in on:
        out = (out + 0.2 * NORMAL(brightness)) * 2 ** (0.5 * NORMAL(contrast))
        grey = out.mean(axis=0)
        out = grey + (out - grey) * 2 ** NORMAL(saturation)
    if "cutout" in on:
        for row in range(size):
            for column in range(size):
                away = max(abs((column + 0.5) / size - cut_x), abs((row + 0.5) / size - cut_y))
                out[:, row, column] *= away >= 0.25
    return out


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("ops", "p"), [*(((op,), 1.0) for op in OPS), (OPS, 1.0), (OPS, 0.5)])
def test_every_operation_is_what_a_loop_over_pixels_makes(ops, p, channels):
    """To the rounding of parameters, which are float32."""
    size = 9 if channels == 3 else 10
    x, transform = images(6, channels, size), Augmentation(ops, size)
    out = transform(x, transform.parameters(numbers(6, 3), p)).numpy()
    expected = np.stack(
        [by_hand(i, n, ops, p) for i, n in zip(x.numpy(), numbers(6, 3).tolist(), strict=True)]
    )
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5)
    assert channels == 1 or np.abs(expected - x.numpy()).max() > 0.1


def test_flips_and_shifts_move_values_as_they_are():
    transform = Augmentation(("flip", "shift"), 16)
    x = images(size=16, dtype=torch.float32)
    parameters = transform.parameters(numbers(COUNT), 1.0)
    out, exact = transform(x, parameters), 0
    for image, moved, row in zip(x, out, parameters.tolist(), strict=True):
        right, down = -row[0] * (row[4] - 7.5), 7.5 - row[5]
        assert right == int(right) and down == int(down) and max(abs(right), abs(down)) <= 2
        exact += int(right or down)
        flipped = image.flip(2) if row[0] < 0 else image
        padded = F.pad(flipped, (2, 2, 2, 2), mode="reflect")
        top, left = 2 - int(down), 2 - int(right)
        assert torch.equal(moved, padded[:, top : top + 16, left : left + 16])
    assert exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nothing_happens_at_p_0_nor_to_an_image_with_everything_off(dtype):
    x, transform = images(dtype=dtype), Augmentation(OPS, 9)
    assert torch.equal(transform(x, transform.parameters(numbers(COUNT), 0.0)), x)
    assert transform(x, None) is x
    nothing = transform.parameters(numbers(1), 0.0)
    parameters = transform.parameters(numbers(COUNT), 0.2)
    off = (parameters[:, :10] == nothing[:, :10]).all(1)  # where a cutout would be does not matter
    assert 0 < off.sum() < COUNT
    assert torch.equal(transform(x, parameters)[off], x[off])
    assert all(not torch.equal(a, b) for a, b in zip(transform(x, parameters)[~off], x[~off], strict=True))


@pytest.mark.parametrize("op", OPS)
def test_a_larger_p_transforms_more_images_and_those_of_before_alike(op):
    """An operation's strength depends on neither p nor the other operations."""
    transform = Augmentation((op,), 32)
    none, some, more, whole = (transform.parameters(numbers(4000), p) for p in (0.0, 0.3, 0.6, 1.0))
    for p, drawn in ((0.3, some), (0.6, more)):
        on = (drawn != none).any(1)
        assert torch.equal(drawn[on], whole[on])
        share = {"flip": 0.5, "shift": 80 / 81}.get(op, 1.0)  # the rest is moved by 0 pixels
        assert on.float().mean() == pytest.approx(p * share, abs=0.03)
    all_on = Augmentation(OPS, 32).parameters(numbers(4000), 1.0)
    columns = {"colour": slice(6, 9), "cutout": slice(9, 12)}.get(op)
    if columns:
        assert torch.equal(all_on[:, columns], whole[:, columns])


def test_strengths_have_the_spread_that_is_promised():
    drawn = {op: Augmentation((op,), 32).parameters(numbers(20000), 1.0).double() for op in OPS}
    assert (drawn["flip"][:, 0] < 0).double().mean() == pytest.approx(0.5, abs=0.02)
    shifts = 15.5 - drawn["shift"][:, 4:6]
    assert shifts.unique().tolist() == list(range(-4, 5)) and shifts.mean().abs() < 0.05
    zooms = -drawn["scale"][:, 0].log2()
    assert zooms.std() == pytest.approx(0.2, rel=0.03) and zooms.mean().abs() < 0.01
    angles = torch.atan2(drawn["rotate"][:, 1], drawn["rotate"][:, 0])
    assert angles.std() == pytest.approx(math.tau / 12**0.5, rel=0.03)
    contrast = (drawn["colour"][:, 6] + drawn["colour"][:, 7]).log2()
    assert contrast.std() == pytest.approx(0.5, rel=0.03)
    assert drawn["cutout"][:, 10:].abs().max() <= 16 and (drawn["cutout"][:, 9] == 8).all()


def test_numbers_depend_on_the_place_in_the_batch_alone():
    transform = Augmentation(OPS, 16)
    whole = transform.parameters(numbers(12, 1), 0.5)
    assert whole.shape == (12, Augmentation.columns) and whole.dtype == torch.float32
    assert torch.equal(whole[:5], transform.parameters(numbers(5, 1), 0.5))
    assert not torch.equal(whole, transform.parameters(numbers(12, 2), 0.5))


@pytest.mark.parametrize("on_cuda", [False, True])
def test_it_can_be_differentiated_twice(on_cuda, monkeypatch):
    """With what looks pixels up on a CPU, and with what does on CUDA."""
    if on_cuda:
        monkeypatch.setattr(augment, "_rows", lambda rows, index: F.embedding(index, rows))
    x, transform = images(2, 2, 5).requires_grad_(), Augmentation(OPS, 5)
    parameters = transform.parameters(numbers(2), 1.0)
    assert gradcheck(lambda images: transform(images, parameters), x)
    assert gradgradcheck(lambda images: transform(images, parameters).pow(3), x)


def test_what_looks_pixels_up_on_cuda_and_on_a_cpu_gives_the_same(monkeypatch):
    x, transform = images(dtype=torch.float32).requires_grad_(), Augmentation(OPS, 9)
    parameters, found = transform.parameters(numbers(COUNT), 1.0), []
    for rows in (augment._rows, lambda rows, index: F.embedding(index, rows)):
        monkeypatch.setattr(augment, "_rows", rows)
        out = transform(x, parameters)
        (slope,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        found.append((out, slope, *torch.autograd.grad(slope.square().sum(), x)))
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_low_precision_around_it_does_not_matter():
    """Fakes may be bfloat16; geometry in it would be off by pixels."""
    x, transform = images(size=32, dtype=torch.float32), Augmentation(OPS, 32)
    parameters = transform.parameters(numbers(COUNT), 1.0)
    expected = transform(x, parameters)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transform(x, parameters), expected)
    low = x.bfloat16()
    out = transform(low, parameters)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, transform(low.float(), parameters).bfloat16())


def test_images_stay_channels_last():
    x, transform = images(dtype=torch.float32), Augmentation(OPS, 9)
    out = transform(x.to(memory_format=torch.channels_last), transform.parameters(numbers(COUNT), 1.0))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_adaptive_p_reaches_06_after_300_of_500_kimg_and_comes_back():
    adaptive = AdaptiveP(target=0.6, speed_kimg=500, tick_kimg=4)
    for n in range(50, 300_001, 50):
        adaptive.observe(50, 50, n)
    assert adaptive.p == pytest.approx(0.6, abs=1e-9)
    for n in range(300_050, 320_001, 50):
        adaptive.observe(25, 50, n)
    assert adaptive.p == pytest.approx(0.56, abs=1e-9)


def test_adaptive_p_moves_at_ticks_alone_and_resumes_between_them():
    """What it is asked in between, and how often, changes nothing."""

    def trained(every: int, restart_at: int = -1) -> list[float]:
        adaptive, found, waiting = AdaptiveP(0.25, 1, tick_kimg=0.1), [], 0.0
        for n in range(10, 1001, 10):
            waiting += (-1) ** (n // 300) * 10
            if n % every == 0 or n // 100 > (n - 10) // 100:
                adaptive.observe(waiting, 10, n)
                waiting = 0.0
            if n == restart_at:
                saved, adaptive = adaptive.state(), AdaptiveP(0.25, 1, tick_kimg=0.1)
                adaptive.load(saved)
            found.append(adaptive.p)
        return found

    expected = trained(10)
    assert len(set(expected)) > 3 and trained(10, restart_at=550) == expected
    assert [p for p, before in zip(expected, [0.0, *expected], strict=False) if p != before][:2] == [0.1, 0.2]


@pytest.mark.parametrize(("signs", "p"), [(8, 0.7), (-8, 0.3), (2, 0.5), (math.nan, 0.5)])
def test_adaptive_p_stays_within_0_and_1_and_where_it_is_on_target(signs, p):
    """On target, or without any finite sign, it stays."""
    adaptive = AdaptiveP(target=0.25, speed_kimg=0.05, tick_kimg=0.01, p=0.5)
    adaptive.observe(signs, 8, 10)
    assert adaptive.p == pytest.approx(p)
    for n in range(20, 110, 10):
        adaptive.observe(signs, 8, n)
    assert adaptive.p == pytest.approx({0.7: 1.0, 0.3: 0.0}.get(p, p))
