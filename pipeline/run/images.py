"""From what G makes and what shards hold to images that people look at and scores compare.

Images are that already. Latents become images by the user's decoder, `data.decoder`; without one, only
something to look at is made of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.config import Data, UserError
from pipeline.gan.images import to_uint8
from pipeline.parallel.ranks import Ranks
from pipeline.plugins import import_class, reason
from pipeline.run.features import digest_of

MADE_AT_ONCE = 64  # images by G, outside of updates, if they are no larger than …
_PIXELS = 256**2
_AT_ONCE = 8  # latents decoded: an image is much larger, and so are its activations


class Images:
    """uint8 [N, 1 or 3, H, W] of what G makes (float) or shards hold. This one: of images.

    version: changes whenever other images are made of the same; scores depend on it.
    """

    version = "uint8, as stored"  # not resized on reading; fakes are quantised by `to_uint8`

    def __call__(self, made: Tensor) -> Tensor:
        return made if made.dtype == torch.uint8 else to_uint8(made)


class Decoded(Images):
    """Of latents [N, C, h, w], by the user's decoder: in eval mode, without gradients, a few at a time."""

    def __init__(self, data: Data, device: torch.device) -> None:
        """Raises UserError if the decoder cannot be built, or gives no images of a latent."""
        assert data.decoder is not None
        self._title, self._device = f"data.decoder={data.decoder}", device
        made = import_class(data.decoder, self._title, nn.Module)
        try:
            self._decoder = made().requires_grad_(False).eval().to(device)
            images = self._decode(torch.zeros(1, data.channels, data.size, data.size, device=device))
        except Exception as error:
            raise UserError(f"{self._title} cannot be built and run: {reason(error)}") from error
        shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        if not isinstance(images, Tensor) or images.ndim != 4 or shape[:2] not in ([1, 1], [1, 3]):
            raise UserError(
                f"{self._title} gives {shape} for latents [1, {data.channels}, {data.size}, {data.size}]; "
                "images are floats in [-1, 1], [1, 3, H, W]."
            )
        self.version = f"{data.decoder}, {digest_of(self._decoder)}"
        self._none = to_uint8(images[:0])

    def __call__(self, made: Tensor) -> Tensor:
        if not len(made):  # a rank's share of a last batch, for which diffusers' decoder would fail
            return self._none
        latents = made.to(self._device, torch.float32)
        return torch.cat([to_uint8(self._decode(part)) for part in torch.split(latents, _AT_ONCE)])

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            images: Tensor = self._decoder(latents)
        return images


class FirstChannels(Images):
    """Of latents without a decoder: their first three channels, from −2 to 2 standard deviations of each.

    Of each in the image itself, whatever the others. For a look at them only; they are no images to score.
    """

    version = "no images, each by itself"  # once over all that were made together

    def __call__(self, made: Tensor) -> Tensor:
        shown = made[:, : 3 if made.shape[1] >= 3 else 1].float()
        mean = shown.mean((2, 3), keepdim=True)
        deviation = shown.std((2, 3), correction=0, keepdim=True)
        return to_uint8((shown - mean) / (2 * deviation.clamp(min=1e-6)))


PLAIN = Images()


def made_at_once(size: int, batch_gpu: int | None = None) -> int:
    """How many images of this size G is to make at once, outside of updates: no more than in them, and fewer
    large ones. 64 of 1024 px by stylegan2 would take 95 GB."""
    return max(1, min(MADE_AT_ONCE, batch_gpu or MADE_AT_ONCE, MADE_AT_ONCE * _PIXELS // size**2))


def images_of(data: Data, device: torch.device) -> Images:
    """How images are made for the data of a run, on `device`. Raises UserError for an unfit decoder."""
    if not data.latents:
        return PLAIN
    return FirstChannels() if data.decoder is None else Decoded(data, device)


def agreed_images(data: Data, ranks: Ranks) -> Images:
    """The same on all ranks, each on its device. Raises CommonError unless all have them."""
    with ranks.raise_together():
        return images_of(data, ranks.device)
