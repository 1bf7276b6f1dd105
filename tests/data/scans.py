"""What a scan finds in a shard."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.sidecar import SampleTable, scan


def scan_bytes(folder: Path, data: bytes) -> SampleTable:
    path = folder / "x.tar"
    path.write_bytes(data)
    return scan(path, "x.tar")


def content(table: SampleTable, data: bytes) -> list[tuple[str, bytes, int]]:
    images = [data[o : o + n] for o, n in zip(table.offset.tolist(), table.size.tolist(), strict=True)]
    return [(table.key(row), images[row], int(table.label[row])) for row in range(len(table))]
