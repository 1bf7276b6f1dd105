"""What a run folder knows of its W&B run: its id, what W&B surely has, what the files left for it hold."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

_HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
_BLOCK = 32 * 1024
_FRAGMENT = struct.Struct("<IHB")
_FULL, _FIRST, _LAST = 1, 2, 4


@dataclass(frozen=True)
class Tracked:
    """The W&B run of a run folder, as remembered beside its files, so that a kill at any time keeps it."""

    run_id: str
    online: bool  # it is on a server, and what it lacks is sent there; if not, it lies here for `wandb sync`
    has: int  # W&B has every step up to this one
    project: str | None = None
    entity: str | None = None


def remember(folder: Path, tracked: Tracked) -> None:
    with suppress(OSError):  # without it the next start looks into the files, and asks the server
        path = folder / "wandb" / "run.json"
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(".run.partial")
        partial.write_text(json.dumps(asdict(tracked)))
        partial.replace(path)


def recall(folder: Path) -> Tracked | None:
    try:
        return Tracked(**json.loads((folder / "wandb" / "run.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def last_step(folder: Path, run_id: str) -> int:
    """The last step in the offline files of a run; -1 if there is none.

    Less than was logged, if the processes were killed: W&B buffers. Never with a gap before it.
    """
    files = _files(folder, run_id)
    return max((step for path in files for step in steps(path.read_bytes())), default=-1)


def mend(folder: Path, run_id: str, live: Path) -> None:
    """Make offline files whole that a kill has cut: `wandb sync` stops at one, and leaves those after it.

    An incomplete last record is taken off, as its step is told again; a file without a beginning gets a name
    that `wandb sync` does not look for.

    live: the file of the run that was just opened, which is left alone.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    for path in _files(folder, run_id):
        if path.samefile(live):
            continue
        data = path.read_bytes()
        sound = max((end for _, end in _records(data)), default=0)
        if not any(Record.FromString(text).HasField("run") for text in records(data)):
            path.rename(path.with_suffix(".wandb.incomplete"))
        elif sound < len(data):
            os.truncate(path, sound)


def leave_to_the_server(folder: Path, run_id: str) -> None:
    """Mark offline files as uploaded, as `wandb sync` does, or it would upload steps for a second time."""
    for path in _files(folder, run_id):
        path.with_suffix(".wandb.synced").touch()


def _files(folder: Path, run_id: str) -> list[Path]:
    """In no order: their names hold the local time, which may go back."""
    return list(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))


def steps(data: bytes) -> Iterator[int]:
    """The step of every row in a .wandb file, up to where it was cut short."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    for text in records(data):
        for item in Record.FromString(text).history.item:
            if [*item.nested_key, item.key][0] == "_step":
                yield int(item.value_json)


def records(data: bytes) -> Iterator[bytes]:
    """The whole, sound records of a .wandb file."""
    return (text for text, _ in _records(data))


def _records(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Each record and where it ends: after a header, the framing of LevelDB's logs.

    Blocks of 32 KiB hold fragments of records: checksum, length, kind (whole, first, middle or last), bytes.
    """
    at, parts = len(_HEADER), b""
    while data.startswith(_HEADER) and at < len(data):
        left = _BLOCK - at % _BLOCK
        if left < _FRAGMENT.size:  # too little for a fragment: padding
            at += left
            continue
        if at + _FRAGMENT.size > len(data):
            return
        checksum, length, kind = _FRAGMENT.unpack_from(data, at)
        fragment = data[at + _FRAGMENT.size : at + _FRAGMENT.size + length]
        if zlib.crc32(bytes([kind]) + fragment) != checksum:
            return
        at += _FRAGMENT.size + length
        parts = fragment if kind in (_FULL, _FIRST) else parts + fragment
        if kind in (_FULL, _LAST):
            yield parts, at
