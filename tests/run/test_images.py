"""From latents to images: the user's decoder, and what is shown without one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.config import Data, UserError
from pipeline.gan.images import to_float, to_uint8
from pipeline.run.evaluate import from_latents
from pipeline.run.images import PLAIN, FirstChannels, images_of, made_at_once

CPU = torch.device("cpu")
SEEN: list[tuple[int, bool, bool, torch.dtype]] = []


class Decoder(nn.Module):
    """Three of four channels, four times as large; batch norm and dropout show whether it is in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.25))
        self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.5)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        SEEN.append((len(latents), self.training, torch.is_grad_enabled(), latents.dtype))
        images = self.dropout(self.norm(self.scale * latents[:, :3]))
        return images.repeat_interleave(4, 2).repeat_interleave(4, 3)


class Flat(nn.Module):
    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.flatten(1)


class FourChannels(nn.Module):
    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        raise FileNotFoundError("no weights here")


def data_of(decoder: str | None, channels: int = 4) -> Data:
    return Data(size=5, channels=channels, decoder=decoder and f"test_images:{decoder}")


def test_images_stay_as_they_are():
    stored = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert images_of(Data(channels=1), CPU) is PLAIN
    assert PLAIN(stored) is stored and torch.equal(PLAIN(to_float(stored)), stored)


def test_fewer_large_images_are_made_at_once_and_no_more_than_in_training():
    sizes = {size: made_at_once(size) for size in (28, 256, 512, 1024, 4096)}
    assert sizes == {28: 64, 256: 64, 512: 16, 1024: 4, 4096: 1}
    assert [made_at_once(512, most) for most in (1, 12, 100)] == [1, 12, 16]


@pytest.mark.parametrize("labels", [None, torch.arange(9)])
def test_images_do_not_depend_on_how_many_are_made_at_once(labels):
    seen: list[int] = []

    def G(z: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        seen.append(len(z))
        return (z if c is None else z + c[:, None]).view(-1, 4, 2, 2)

    z, shown = torch.randn(9, 16), FirstChannels()
    all_at_once = from_latents(G, z, labels, CPU, shown)(1, 7)
    in_parts = from_latents(G, z, labels, CPU, shown, at_once=3)(1, 7)
    assert seen == [7, 3, 3, 1] and torch.equal(in_parts, all_at_once)


def test_a_decoder_sees_few_latents_at_a_time_in_eval_mode_without_gradients():
    images, latents = images_of(data_of("Decoder"), CPU), torch.randn(19, 4, 5, 5).half()
    SEEN.clear()
    found = images(latents.requires_grad_())
    due = [(n, False, False, torch.float32) for n in (8, 8, 3)]
    assert due == SEEN
    scaled = 0.25 * latents.detach().float()[:, :3] / (1 + 1e-5) ** 0.5  # as batch norm is when new
    whole = to_uint8(scaled.repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert found.dtype == torch.uint8 and found.shape == (19, 3, 20, 20)
    assert (found.int() - whole.int()).abs().max() <= 1
    assert torch.equal(found[9:12], images(latents[9:12])), "an image depends on its latent alone"


def test_of_no_latents_a_decoder_is_not_asked():
    """A rank may have none of a last batch; diffusers' attention fails for it."""
    images = images_of(data_of("Decoder"), CPU)
    SEEN.clear()
    found = images(torch.empty(0, 4, 5, 5))
    assert found.dtype == torch.uint8 and found.shape == (0, 3, 20, 20) and SEEN == []


def test_a_decoder_of_a_notebook_needs_a_file(monkeypatch):
    monkeypatch.setattr(Decoder, "__module__", "builtins")  # as __main__ there, which has no __file__
    with pytest.raises(
        UserError, match=r"code of Decoder, .* in no file .*: put it in one, mine.py, .* mine:Decoder"
    ):
        images_of(data_of("Decoder"), CPU)


def test_other_weights_are_another_version(monkeypatch):
    before = images_of(data_of("Decoder"), CPU).version
    assert before == images_of(data_of("Decoder"), CPU).version != PLAIN.version
    build = Decoder.__init__

    def other(self) -> None:
        build(self)
        self.scale.data.fill_(0.5)

    monkeypatch.setattr(Decoder, "__init__", other)
    assert images_of(data_of("Decoder"), CPU).version != before


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ("Nowhere", "cannot be imported"),
        ("Data", "is not a class derived from torch.nn.Module"),
        ("Broken", "cannot be built and run: FileNotFoundError: no weights here"),
        ("Flat", r"gives \[1, 100\] for latents \[1, 4, 5, 5\]; images are floats in"),
        ("FourChannels", r"gives \[1, 4, 5, 5\] for latents"),
    ],
)
def test_what_is_no_decoder_is_refused(decoder, message):
    with pytest.raises(UserError, match=rf"data\.decoder=test_images:{decoder} {message}"):
        images_of(data_of(decoder), CPU)


@pytest.mark.parametrize(("channels", "shown"), [(4, 3), (2, 1)])
def test_without_a_decoder_the_first_channels_are_shown(channels, shown):
    images = images_of(data_of(None, channels), CPU)
    assert isinstance(images, FirstChannels)
    latents = 7 + 3 * torch.randn(64, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    found = images(latents)
    assert found.shape == (64, shown, 8, 8) and found.dtype == torch.uint8
    pixels = found.float()
    assert abs(pixels.mean() - 127.5) < 2 and abs(pixels.std() - 127.5 / 2) < 4
    assert torch.equal(images(latents[3:5]), found[3:5]), "an image depends on its latent alone"
    assert torch.equal(images(torch.ones(1, channels, 1, 1)), torch.full((1, shown, 1, 1), 128).byte())


def test_latents_are_trained_on_as_they_are_and_are_not_changed():
    latents = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    floats = to_float(latents)
    assert torch.equal(floats, latents) and floats.data_ptr() != latents.data_ptr()
    floats.requires_grad_()  # as a gradient penalty does
    assert not latents.requires_grad
