"""TensorBoard: charts and sample grids of a run, as an event file in its folder. Whatever fails here,
training continues.

metrics.jsonl and samples/ hold everything. Each start writes the event file again from them, so it has each
step once, whatever was killed, resumed or switched on late.
"""

from __future__ import annotations

import io
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.config import Config
from pipeline.plugins import require
from pipeline.run.tracker import Announce, Tracker

_PREFIX = "events.out.tfevents."  # the names that TensorBoard looks for


def check_tensorboard(config: Config) -> None:
    """Raises UserError if TensorBoard's files are wanted and its package is not installed."""
    if config.track.tensorboard:
        for module in ("tensorboard", "google_crc32c"):
            require(module, "tensorboard", "track.tensorboard")


class TensorBoard(Tracker):
    """Writes to an event file. Announces the first failure and writes nothing after it."""

    tracks = True

    def __init__(self, folder: Path, announce: Announce) -> None:
        """folder: the run's."""
        super().__init__()
        self._announce = announce
        self._events: EventFile | None = None
        try:
            self._events = EventFile(folder / "tensorboard")
        except Exception as error:
            self._fail(error)
        else:
            announce(f"TensorBoard: tensorboard --logdir {folder}")

    def log(self, values: Mapping[str, float], step: int, at: float | None = None) -> None:
        self._try(lambda events: events.scalars(values, step, at))

    def image(self, key: str, path: Path, step: int, caption: str) -> None:
        self._try(lambda events: events.picture(key, path, step))

    def finish(self, failed: bool = False) -> None:
        self._try(EventFile.close)
        self._events = None

    def abandon(self) -> None:
        self.finish()

    def _try(self, write: Callable[[EventFile], None]) -> None:
        if self._events is not None:
            try:
                write(self._events)
            except Exception as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._events = None
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        self._announce(
            f"TensorBoard's file is not written any more, training continues without it: {reason}. The next "
            "start writes all of it."
        )


class EventFile:
    """An event file in a folder, in place of those that are there. Methods raise OSError."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._Event, self._Summary = Event, Summary
        folder.mkdir(exist_ok=True)
        for before in folder.glob(f"{_PREFIX}*"):
            if before.stat().st_size:  # a TensorBoard that reads it could not go past a file that is gone
                os.truncate(before, 0)
            else:
                before.unlink()
        seconds, rest = divmod(time.time_ns(), 10**9)  # TensorBoard reads files in the order of their names
        name = f"{_PREFIX}{seconds:010d}.{rest:09d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("wb")
        self._write(file_version="brain.Event:2")
        # A TensorBoard that shows the run forgets what it read from the files before.
        self._write(step=0, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, values: Mapping[str, float], step: int, at: float | None) -> None:
        """A point in each chart. at: when, in seconds since 1970; None: now."""
        charts = [self._Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(at, step=step, summary=self._Summary(value=charts))

    def picture(self, key: str, path: Path, step: int) -> None:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            (width, height), channels = picture.size, len(picture.getbands())
        image = self._Summary.Image(
            width=width, height=height, colorspace=channels, encoded_image_string=content
        )
        self._write(step=step, summary=self._Summary(value=[self._Summary.Value(tag=key, image=image)]))

    def close(self) -> None:
        self._file.close()

    def _write(self, at: float | None = None, **what: Any) -> None:
        event = self._Event(wall_time=time.time() if at is None else at, **what)
        for part in record(event.SerializeToString()):
            self._file.write(part)
        self._file.flush()


def record(data: bytes) -> tuple[bytes, ...]:
    """A TFRecord: the length of `data`, then `data`, each with its masked CRC-32C. TensorBoard's own writer
    computes that in Python: two seconds for a grid of 9 MB."""
    length = struct.pack("<Q", len(data))
    return length, _checksum(length), data, _checksum(data)


def _checksum(data: bytes) -> bytes:
    import google_crc32c

    crc: int = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
