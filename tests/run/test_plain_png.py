"""Uncompressed PNGs, read back by Pillow, which checks every sum in them, and by FFmpeg."""

from __future__ import annotations

from io import BytesIO

import av
import numpy as np
import pytest
from PIL import Image

from pipeline.run.plain_png import plain_pngs


@pytest.mark.parametrize("shape", [(1, 1, 1), (28, 28, 1), (5, 9, 3), (32, 32, 3), (255, 256, 1)])
def test_other_readers_find_the_same_pixels(shape):
    images = np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8)
    files = [*plain_pngs(images)]
    for image, file in zip(images, files, strict=True):
        with Image.open(BytesIO(file)) as picture:
            picture.verify()
        with Image.open(BytesIO(file)) as picture:
            assert picture.mode == ("L" if shape[2] == 1 else "RGB")
            assert np.array_equal(np.asarray(picture).reshape(shape), image)
        with av.open(BytesIO(file), format="png_pipe") as container:
            frame = next(container.decode(video=0))
            assert np.array_equal(frame.to_ndarray().reshape(shape), image)


def test_a_damaged_one_is_not_taken_for_whole():
    file = bytearray(next(plain_pngs(np.zeros((1, 8, 8, 1), np.uint8))))
    file[60] ^= 1
    with Image.open(BytesIO(file)) as picture, pytest.raises((OSError, SyntaxError)):
        picture.verify()
