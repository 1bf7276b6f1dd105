"""Colours of another profile (Adobe RGB, Display P3, a press's CMYK) → sRGB, for which training and screens
take every image."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_MODES = ("RGB", "RGBA", "CMYK")  # grey stays as it is
_LEVELS = 3  # of 255, by which two profiles of sRGB itself may differ
_STEPS = (0, 51, 102, 153, 204, 255)


def in_srgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image as RGB or RGBA in sRGB, and whether that changed it.

    An image without a profile, with one that cannot be read, or with one that is sRGB's, keeps its pixels.
    """
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in _MODES:
        return image, False
    transform = _transform(bytes(profile), image.mode)
    if transform is None:
        return image, False
    made = transform.apply(image)
    made.info = {key: value for key, value in image.info.items() if key != "icc_profile"}
    return made, True


@lru_cache(maxsize=8)  # photos of one camera share a profile, and one of a press may be of megabytes
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None if it does nothing, or cannot be made."""
    wanted = "RGB" if mode == "CMYK" else mode
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), mode, wanted
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return None if mode != "CMYK" and _does_nothing(transform, mode) else transform


def _does_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    grid = np.stack(np.meshgrid(_STEPS, _STEPS, _STEPS, [255]), axis=-1).reshape(1, -1, 4)
    before = grid[..., : len(mode)].astype(np.uint8)
    after = np.asarray(transform.apply(Image.fromarray(before)), np.int64)
    return bool((abs(after - before) <= _LEVELS).all())
