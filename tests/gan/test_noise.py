"""Noise that is a function of integers: white, normal, and of the image alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pipeline.gan.noise import Stream, _hash, keys_of, noise_like, white_noise


def test_noise_is_white_and_normal():
    """Moments of a million values, and correlations of neighbours, layers and images, to five deviations."""
    noise = white_noise(torch.arange(16), 3, 256)
    n = noise.numel()
    assert noise.dtype == torch.float32 and noise.isfinite().all()
    moments = {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0}
    for power, expected in moments.items():
        spread = math.sqrt({1: 1, 2: 2, 3: 15, 4: 96}[power] / n)
        assert noise.double().pow(power).mean().item() == pytest.approx(expected, abs=5 * spread)
    others = {
        "right": (noise[..., 1:], noise[..., :-1]),
        "below": (noise[..., 1:, :], noise[..., :-1, :]),
        "images": (noise[1:], noise[:-1]),
        "layers": (noise, white_noise(torch.arange(16), 4, 256)),
    }
    for what, (a, b) in others.items():
        assert abs((a * b).double().mean().item()) < 5 / math.sqrt(a.numel()), what


def test_noise_is_of_the_image_alone():
    """Not of the batch it is in, nor of the state of any generator."""
    keys = keys_of(torch.randn(6, 4))
    assert keys.unique().numel() == 6 and keys.min() >= 0 and keys.max() < 2**32
    whole = white_noise(keys, 0, 8)
    torch.manual_seed(1)
    assert torch.equal(whole[2:5], white_noise(keys[2:5], 0, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_noise_of_images_is_of_their_keys_and_of_what_it_is_for(dtype):
    keys, images = keys_of(torch.randn(200, 4)), torch.zeros(200, 3, 16, 16, dtype=dtype)
    found = {stream: noise_like(images, keys, stream) for stream in Stream}
    for noise in found.values():
        assert noise.shape == images.shape and noise.dtype == dtype
        assert noise.double().square().mean().item() == pytest.approx(1, abs=5 * math.sqrt(2 / noise.numel()))
    assert torch.equal(found[Stream.REAL][3:7], noise_like(images[3:7], keys[3:7], Stream.REAL))
    others = [*found.values(), white_noise(keys, 0, 16).expand(-1, 3, -1, -1)]
    for a, b in itertools.combinations(others, 2):
        assert abs((a.double() * b.double()).mean().item()) < 5 / math.sqrt(200 * 256)


def test_every_bit_of_a_key_moves_every_bit_of_its_hash():
    """Half of the time, to five deviations and what the hash itself is off by: 0.005."""
    x = torch.randint(0, 2**32, (20_000,), generator=torch.Generator().manual_seed(0))
    for bit in range(32):
        changed = _hash(x ^ 1 << bit) ^ _hash(x)
        shares = torch.stack([(changed >> place & 1).double().mean() for place in range(32)])
        assert (shares - 0.5).abs().max() < 2.5 / math.sqrt(len(x)) + 0.005, bit
    assert _hash(torch.arange(2**16)).unique().numel() == 2**16
