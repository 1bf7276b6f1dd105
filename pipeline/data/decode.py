"""Image bytes → uint8 array. An allow-list of formats, and no pixel decoded before the size is known."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP")
LARGEST = 1 << 26  # pixels: what an image to be resized may have


class BadImageError(ValueError):
    """Bytes that are not an image of an allowed format, or not a whole one."""


class WrongSizeError(ValueError):
    """An image of another size than asked for. `width` and `height` are what it has."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__(width, height)
        self.width, self.height = width, height


def decode(data: bytes, size: int, channels: int) -> NDArray[np.uint8]:
    """An image as uint8 [channels, size, size].

    Grey becomes colour and colour grey as `channels` (1 or 3) asks. Raises WrongSizeError before anything is
    decompressed, and BadImageError for bytes that are no image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.size != (size, size):
                raise WrongSizeError(*image.size)
            pixels = np.frombuffer(to_channels(image, channels).tobytes(), np.uint8)
    except WrongSizeError:
        raise
    except Exception as error:  # damaged or hostile bytes make Pillow raise nearly anything
        raise BadImageError(str(error) or type(error).__name__) from None
    if channels == 1:
        return pixels.reshape(1, size, size)
    return pixels.reshape(size, size, channels).transpose(2, 0, 1)


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """The image in 8-bit grey (1) or RGB (3): 16 bits scaled down, transparency laid on white."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # Pillow would clip at 255. Grey PNGs of 16 bits open as "I;16", or as "I" with the same values.
        values = np.asarray(image, np.int64).clip(0, 65535)
        image = Image.fromarray((values // 257).astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
