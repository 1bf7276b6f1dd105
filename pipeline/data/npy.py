"""Images stored as `.npy`: the header read first, nothing but plain numbers, never a pickle.

An array is [H, W], [H, W, 1 or 3] or [1 or 3, H, W], of uint8, or of floats from 0 (black) to 1 (white).
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

MAGIC = npy_format.MAGIC_PREFIX
_VERSIONS = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
_LARGEST_HEADER = 1000  # characters: those of plain arrays have about 70


class Header(NamedTuple):
    height: int
    width: int
    channels: int
    shape: tuple[int, ...]
    channels_first: bool
    fortran: bool
    dtype: np.dtype[Any]
    offset: int  # of the first number, in bytes


def read_header(data: bytes) -> Header:
    """What the array is, without reading it. Raises ValueError for anything but an image's array."""
    file = io.BytesIO(data)
    version = npy_format.read_magic(file)
    if version not in _VERSIONS:
        raise ValueError(f"a .npy of version {version}")
    shape, fortran, dtype = _VERSIONS[version](file, max_header_size=_LARGEST_HEADER)
    if dtype.hasobject or not (dtype == np.uint8 or (dtype.kind == "f" and dtype.itemsize <= 8)):
        raise ValueError(f"a .npy of {dtype}; images are uint8, or floats from 0 to 1")
    channels_first = len(shape) == 3 and shape[2] not in (1, 3)
    whole = (*shape[1:], shape[0]) if channels_first else (*shape, 1)[:3]
    if len(shape) not in (2, 3) or whole[2] not in (1, 3) or min(shape) < 1:
        raise ValueError(
            f"a .npy of shape {list(shape)}; images are [H, W], [H, W, 1 or 3] or [1 or 3, H, W]"
        )
    return Header(whole[0], whole[1], whole[2], shape, channels_first, fortran, dtype, file.tell())


def read_pixels(data: bytes, header: Header) -> NDArray[np.uint8]:
    """uint8 [H, W, channels]. Raises ValueError if there are more or fewer numbers than the header says."""
    expected = int(np.prod(header.shape)) * header.dtype.itemsize
    if len(data) - header.offset != expected:
        raise ValueError(f"a .npy with {len(data) - header.offset} bytes of numbers, not {expected}")
    numbers = np.frombuffer(data, header.dtype, offset=header.offset)
    array = numbers.reshape(header.shape, order="F" if header.fortran else "C")
    if header.channels_first:
        array = array.transpose(1, 2, 0)
    array = array.reshape(header.height, header.width, header.channels)
    if header.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # NaN fails too
            raise ValueError(f"a .npy of floats from {array.min():g} to {array.max():g}, not 0 to 1")
        array = np.rint(array.astype(np.float64) * 255)
    return np.ascontiguousarray(array, np.uint8)
