"""Animations that repeat without end, in the format of the file's suffix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.durable import whole
from pipeline.plugins import require

FPS = 25  # 40 ms a frame: GIF counts hundredths of a second
Frame = npt.NDArray[np.uint8]


def needed(path: Path) -> None:
    """Raises UserError if this file could not be written for want of a library."""
    if path.suffix.lower() == ".mp4":
        require("av", "video", "An .mp4 file")


def save_animation(frames: Iterator[Frame], path: Path) -> None:
    """Write frames, uint8 [H, W] or [H, W, 3] of one size, at FPS, whole or not at all.

    .mp4 is H.264 in 4:2:0, which browsers play: an odd size gets a white line. Raises OSError, UserError.
    """
    needed(path)
    with whole(path) as partial:
        if path.suffix.lower() == ".mp4":
            _mp4(frames, partial)
        else:
            first, *others = (Image.fromarray(frame) for frame in frames)
            kind = {".gif": "GIF", ".webp": "WEBP"}[path.suffix.lower()]
            how = {"save_all": True, "append_images": others, "duration": 1000 // FPS, "loop": 0}
            first.save(partial, kind, quality=90, **how)


def _mp4(frames: Iterator[Frame], path: Path) -> None:
    import av
    from av.video.reformatter import Colorspace

    try:
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as file:
            stream = None
            for frame in frames:
                picture = _even(frame)
                if stream is None:
                    stream = file.add_stream("libx264", rate=FPS, options={"crf": "18"})
                    stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
                    context = stream.codec_context
                    context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709, as below
                shown = av.VideoFrame.from_ndarray(picture, format="rgb24")
                file.mux(stream.encode(shown.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
            if stream is not None:
                file.mux(stream.encode())
    except av.FFmpegError as error:
        raise OSError(error.strerror) from None


def _even(frame: Frame) -> Frame:
    """As [H, W, 3] with even sides, which halved colour needs."""
    colour = frame if frame.ndim == 3 else np.repeat(frame[:, :, None], 3, axis=2)
    height, width, _ = colour.shape
    return np.pad(colour, ((0, height % 2), (0, width % 2), (0, 0)), constant_values=255)
