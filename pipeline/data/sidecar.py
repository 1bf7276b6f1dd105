"""Where every sample of a shard lies: built by one strict walk, kept beside the shard, read lazily.

A sidecar is an `.npz` of plain arrays (no pickle): about 40 bytes per sample, so the windows a stream has
open cost megabytes, whatever the size of the data.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config import UserError
from pipeline.data.tar import LARGEST_MEMBER, Member, TarReader

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "npy")
_ARRAY = "npy"  # an image only where there is no other: beside one it is an embedding or the like
LARGEST_LABEL = 999_999
_VERSION = 1


@dataclass(frozen=True, eq=False)
class Table:
    """The samples of one shard, in file order. Arrays have one entry per sample.

    offset, size (int64): the image's bytes in the tar; extension (uint8): index into IMAGE_EXTENSIONS;
    label (int64): the `.cls` number, -1 if there is none; crc (uint32): of the image's bytes.
    """

    filesize: int
    sha256: str
    names: bytes  # the keys, UTF-8, one after the other
    name_ends: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    extension: NDArray[np.uint8]
    label: NDArray[np.int64]
    crc: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.offset)

    def key(self, row: int) -> str:
        start = int(self.name_ends[row - 1]) if row else 0
        return self.names[start : int(self.name_ends[row])].decode()

    def label_counts(self) -> dict[int, int]:
        labels, counts = np.unique(self.label[self.label >= 0], return_counts=True)
        return dict(zip(labels.tolist(), counts.tolist(), strict=True))


@dataclass
class _Sample:
    key: str
    header: int
    extensions: set[str]
    image: Member | None = None
    extension: str = ""
    crc: int = 0
    label: int = -1


def scan(path: Path, shard: str) -> Table:
    """Walk the tar at `path` and note its samples.

    A sample is a run of members `KEY.extension` with the same KEY (up to the first dot of the file name, as
    in webdataset); exactly one of them is an image. Raises UserError naming the shard and byte offset.
    """
    samples: list[_Sample] = []
    keys: set[str] = set()
    with path.open("rb") as file:
        tar = TarReader(file, shard)
        for member in tar:
            folder, slash, base = member.name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if not stem or not dot or "\0" in member.name:
                continue  # not a sample's: webdataset passes over such names too
            key, extension = folder + slash + stem, extension.lower()
            if not samples or samples[-1].key != key:
                _complete(tar, samples)
                if key in keys:
                    raise tar.error(member.header, f"sample {key!r} is there twice, or in two places.")
                keys.add(key)
                samples.append(_Sample(key, member.header, set()))
            _add(tar, samples[-1], extension, member)
        _complete(tar, samples)
    return _table(tar, samples)


def _add(tar: TarReader, sample: _Sample, extension: str, member: Member) -> None:
    if extension in sample.extensions:
        raise tar.error(member.header, f"{member.name!r} is there twice.")
    sample.extensions.add(extension)
    if extension in IMAGE_EXTENSIONS:
        if sample.image is not None and _ARRAY not in (extension, sample.extension):
            raise tar.error(member.header, f"sample {sample.key!r} has two images.")
        if sample.image is not None and extension == _ARRAY:
            return
        if member.data is None:
            raise tar.error(member.header, f"{member.name!r} is larger than {LARGEST_MEMBER >> 20} MiB.")
        sample.image, sample.extension = member._replace(data=None), extension
        sample.crc = zlib.crc32(member.data)
    elif extension == "cls":
        text = (member.data or b"").strip()
        # Something else than a number is no label; only a conditional run minds (see stream.check_images).
        if text.isdigit() and len(text) < 20:
            sample.label = int(text)
            if sample.label > LARGEST_LABEL:
                raise tar.error(member.header, f"label {sample.label} is above {LARGEST_LABEL}.")


def _complete(tar: TarReader, samples: list[_Sample]) -> None:
    if samples and samples[-1].image is None:
        sample = samples[-1]
        raise tar.error(
            sample.header,
            f"sample {sample.key!r} has no image ({', '.join(IMAGE_EXTENSIONS)}), "
            f"only {', '.join(sorted(sample.extensions))}.",
        )


def _table(tar: TarReader, samples: list[_Sample]) -> Table:
    names = [sample.key.encode() for sample in samples]
    images = [sample.image for sample in samples if sample.image is not None]
    return Table(
        filesize=tar.size,
        sha256=tar.sha256,
        names=b"".join(names),
        name_ends=np.cumsum([len(name) for name in names], dtype=np.int64),
        offset=np.array([image.offset for image in images], np.int64),
        size=np.array([image.size for image in images], np.int64),
        extension=np.array([IMAGE_EXTENSIONS.index(sample.extension) for sample in samples], np.uint8),
        label=np.array([sample.label for sample in samples], np.int64),
        crc=np.array([sample.crc for sample in samples], np.uint32),
    )


def save(table: Table, path: Path) -> None:
    """Write beside, then rename: several processes may do so at once, and a reader sees all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(
                file,
                version=np.array(_VERSION),
                filesize=np.array(table.filesize, np.int64),
                sha256=np.frombuffer(bytes.fromhex(table.sha256), np.uint8),
                names=np.frombuffer(table.names, np.uint8),
                name_ends=table.name_ends,
                offset=table.offset,
                size=table.size,
                extension=table.extension,
                label=table.label,
                crc=table.crc,
            )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> Table | None:
    """The sidecar at `path`; None if there is none, or none this version can read (it is built anew)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.zip.infolist()):
                return None  # not by `save`: unpacked it may be of any size
            if int(file["version"]) != _VERSION:
                return None
            table = Table(
                filesize=int(file["filesize"]),
                sha256=file["sha256"].tobytes().hex(),
                names=file["names"].tobytes(),
                name_ends=file["name_ends"].astype(np.int64),
                offset=file["offset"].astype(np.int64),
                size=file["size"].astype(np.int64),
                extension=file["extension"].astype(np.uint8),
                label=file["label"].astype(np.int64),
                crc=file["crc"].astype(np.uint32),
            )
    except Exception:  # bytes made to do harm make numpy and zipfile raise nearly anything
        return None
    return table if _plausible(table) and _are_keys(table.names, table.name_ends) else None


def _plausible(table: Table) -> bool:
    """Arrays that fit each other and the file: a sidecar may have come with the data, from anyone."""
    columns = (table.name_ends, table.offset, table.size, table.extension, table.label, table.crc)
    if len({column.shape for column in columns}) != 1 or table.offset.ndim != 1:
        return False
    if not 0 <= table.filesize < 2**63:
        return False
    if not len(table):
        return True
    return bool(
        (table.size >= 0).all()
        and (table.size <= LARGEST_MEMBER).all()
        and (table.offset >= 0).all()
        and (table.offset <= table.filesize - table.size).all()
        and (table.extension < len(IMAGE_EXTENSIONS)).all()
        and (table.label >= -1).all()
        and (table.label <= LARGEST_LABEL).all()
        and (np.diff(table.name_ends, prepend=0) >= 0).all()
        and table.name_ends[-1] == len(table.names)
    )


def _are_keys(names: bytes, ends: NDArray[np.int64]) -> bool:
    """Whether each key by itself is UTF-8: all together are, and none begins inside a character."""
    try:
        names.decode()
    except UnicodeDecodeError:
        return False
    starts = np.frombuffer(names, np.uint8)[ends[ends < len(names)]]
    return bool((starts & 0xC0 != 0x80).all())


def check(table: Table, shard: str, filesize: int, sha256: str | None) -> None:
    """Raises UserError if a freshly scanned shard is not the one its index speaks of."""
    if table.filesize != filesize or (sha256 is not None and table.sha256 != sha256):
        raise UserError(
            f"shard {shard} is not the file that index.json describes (another SHA-256). Fetch it again, or, "
            "if it was changed on purpose, run `shardgan prepare --index-only` on its folder."
        )
