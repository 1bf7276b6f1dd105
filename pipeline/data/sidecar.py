"""Where every sample of a shard lies: built by one strict walk, kept beside the shard, read lazily.

A sidecar is an `.npz` of plain arrays (no pickle): about 40 bytes per sample, so the open windows of a stream
take megabytes, whatever the size of the data.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline import durable
from pipeline.config import UserError
from pipeline.data.samples import (
    IMAGE_EXTENSIONS,
    LARGEST_LABEL,
    MOST_REASONS,
    NONE,
    PassedOver,
    Sample,
    image_extension,
    shown,
    split_at_last_dot,
    split_name,
)
from pipeline.data.tar import LARGEST_MEMBER, MOST_HEADERS, TarReader

_VERSION = 1
_COLUMNS = {  # arrays of SampleTable, in the order of the file
    "name_ends": np.int64, "offset": np.int64, "size": np.int64,
    "extension": np.uint32, "label": np.int64, "crc": np.uint32,
}  # fmt: skip
_FIRST = 16  # samples of a shard whose labels are compared
_EXTRA = "passed_over"  # JSON, only of odd shards, and not in sidecars of earlier versions


@dataclass(frozen=True, eq=False)
class SampleTable:
    """The samples of one shard, in file order. Arrays have one entry per sample.

    offset, size (int64): the image's bytes in the tar; extension (unsigned): index into `extensions`;
    label (int64): the `.cls` number, -1 if there is none; crc (uint32): of the image's bytes.

    Not among them: samples without an image, samples whose image cannot be used (`unusable`), and members
    that belong to no sample (`strays`).
    """

    filesize: int
    sha256: str
    names: bytes  # the keys, UTF-8, one after the other
    name_ends: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    extension: NDArray[np.unsignedinteger[Any]]
    label: NDArray[np.int64]
    crc: NDArray[np.uint32]
    extensions: tuple[str, ...] = IMAGE_EXTENSIONS  # and others, such as input.png
    without_image: PassedOver = NONE
    unusable: PassedOver = NONE
    strays: PassedOver = NONE

    def __len__(self) -> int:
        return len(self.offset)

    def key(self, row: int) -> str:
        start = int(self.name_ends[row - 1]) if row else 0
        return self.names[start : int(self.name_ends[row])].decode()

    @property
    def crc_and_size(self) -> NDArray[np.uint64]:
        """In one number of each image; equal ones are probably copies."""
        return self.crc.astype(np.uint64) << np.uint64(32) | self.size.astype(np.uint32)

    def label_counts(self) -> dict[int, int]:
        labels, counts = np.unique(self.label[self.label >= 0], return_counts=True)
        return dict(zip(labels.tolist(), counts.tolist(), strict=True))


def scan(path: Path, shard: str) -> SampleTable:
    """The samples of the tar at `path`: members `KEY.extension` with the same KEY, one of which is the image.

    Other samples are passed over. Raises UserError, naming the shard and byte offset, if it is no whole tar.
    """
    return _table(*_walk(path, shard))


def scan_all_images(path: Path, shard: str) -> SampleTable:
    """As `scan`, but each of several images in a sample is one by itself, its key up to the last dot."""
    walked = _walk(path, shard)
    several = {sample.key for sample in walked[1] if len(sample.images) > 1}
    return _table(*(_walk(path, shard, several) if several else walked))


def has_other_labels(path: Path, shard: str, table: SampleTable) -> bool:
    """Whether any of the first samples of a shard has a label, and not the one in the table. False if they
    cannot be read, which is for others to find."""
    known = {table.key(row): int(table.label[row]) for row in range(min(_FIRST, len(table)))}
    try:
        _, samples, _ = _walk(path, shard, most=_FIRST)
    except (UserError, OSError):
        return False
    return any(s.label >= 0 and known.get(s.key, s.label) != s.label for s in samples if not s.problem())


def has_odd_labels(path: Path, shard: str) -> bool:
    """Whether any of the first samples of a shard has a label that is no number of a class. False if they
    cannot be read."""
    try:
        _, samples, _ = _walk(path, shard, most=_FIRST)
    except (UserError, OSError):
        return False
    return any(s.labels and s.label < 0 for s in samples)


def _walk(
    path: Path, shard: str, at_last_dot: Collection[str] = (), most: float = math.inf
) -> tuple[TarReader, Collection[Sample], PassedOver]:
    """The samples, and the members that belong to none. Keys in `at_last_dot` end there. most: ends where
    there are more samples."""
    samples: dict[str, Sample] = {}
    strays: list[str] = []
    count = 0
    with path.open("rb") as file:
        tar = TarReader(file, shard)
        for member in tar:
            name = split_name(member.name)
            if name is None:
                count += 1
                if len(strays) < MOST_REASONS:
                    text = f"'{shown(member.name)}' belongs to no sample KEY.extension."
                    strays.append(str(tar.error(member.header, text)))
                continue
            if name[0] in at_last_dot:
                name = split_at_last_dot(member.name)
            key, extension = name
            if key not in samples:
                samples[key] = Sample(key, member.header)
                if len(samples) > most:
                    break
            samples[key].add(extension, member)
    for sample in samples.values():
        sample.settle()
    return tar, samples.values(), PassedOver(count, tuple(strays))


def _table(tar: TarReader, samples: Collection[Sample], strays: PassedOver) -> SampleTable:
    without = [sample for sample in samples if sample.image is None]
    unusable = [sample for sample in samples if sample.image is not None and sample.problem()]
    used = [(sample, sample.image) for sample in samples if sample.image is not None and not sample.problem()]
    images = [image for _, image in used]
    names = [sample.key.encode() for sample, _ in used]
    extensions = tuple(dict.fromkeys([*IMAGE_EXTENSIONS, *(image.extension for image in images)]))
    numbers = {extension: number for number, extension in enumerate(extensions)}
    return SampleTable(
        filesize=tar.size,
        sha256=tar.sha256,
        names=b"".join(names),
        name_ends=np.cumsum([len(name) for name in names], dtype=np.int64),
        offset=np.array([image.offset for image in images], np.int64),
        size=np.array([image.size for image in images], np.int64),
        extension=np.array(
            [numbers[image.extension] for image in images], np.min_scalar_type(len(extensions))
        ),
        label=np.array([sample.label for sample, _ in used], np.int64),
        crc=np.array([image.crc for image in images], np.uint32),
        extensions=extensions,
        without_image=_passed_over(tar, without, Sample.lack),
        unusable=_passed_over(tar, unusable, Sample.problem),
        strays=strays,
    )


def _passed_over(tar: TarReader, samples: Sequence[Sample], why: Callable[[Sample], str]) -> PassedOver:
    reasons = (str(tar.error(sample.header, why(sample))) for sample in samples[:MOST_REASONS])
    return PassedOver(len(samples), tuple(reasons))


def save(table: SampleTable, path: Path, make_folder: bool = True) -> None:
    """Write a sidecar; several processes may do so at once. Raises OSError. See durable.whole."""
    with durable.whole(path, make_folder) as partial, partial.open("wb") as file:
        np.savez(
            file,
            version=np.array(_VERSION),
            filesize=np.array(table.filesize, np.int64),
            sha256=np.frombuffer(bytes.fromhex(table.sha256), np.uint8),
            names=np.frombuffer(table.names, np.uint8),
            **{name: getattr(table, name) for name in _COLUMNS},
            **_extra(table),  # type: ignore[arg-type]  # no name of them is allow_pickle
        )


def _extra(table: SampleTable) -> dict[str, NDArray[np.uint8]]:
    """Only of odd shards: the extensions of their images, and what was passed over."""
    known = (table.without_image, table.unusable, table.strays)
    if table.extensions == IMAGE_EXTENSIONS and known == (NONE,) * 3:
        return {}
    extra = [table.extensions[len(IMAGE_EXTENSIONS) :], *((what.count, what.reasons) for what in known)]
    return {_EXTRA: np.frombuffer(json.dumps(extra).encode(), np.uint8)}


def _read_extra(data: bytes) -> dict[str, Any]:
    """The arguments of SampleTable that _extra wrote. Raises ValueError for what _extra does not write."""
    extensions, *known = json.loads(data)
    without_image, unusable, strays = (PassedOver(count, tuple(reasons)) for count, reasons in known)
    for what in (without_image, unusable, strays):
        counts = isinstance(what.count, int) and 0 <= what.count <= MOST_HEADERS
        texts = all(isinstance(reason, str) and reason.isprintable() for reason in what.reasons)
        if not (counts and len(what.reasons) <= min(what.count, MOST_REASONS) and texts):
            raise ValueError(what)
    if not all(isinstance(text, str) and image_extension({text: b""}) for text in extensions):
        raise ValueError(extensions)
    return {
        "extensions": (*IMAGE_EXTENSIONS, *extensions),
        "without_image": without_image,
        "unusable": unusable,
        "strays": strays,
    }


def load(source: Path | BinaryIO) -> SampleTable | None:
    """A sidecar; None if there is none that this version can read, and it must be built."""
    try:
        with np.load(source, allow_pickle=False) as file:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.zip.infolist()):
                return None  # not from `save`: it may have any size when unpacked
            if int(file["version"]) != _VERSION:
                return None
            table = SampleTable(
                filesize=int(file["filesize"]),
                sha256=file["sha256"].tobytes().hex(),
                names=file["names"].tobytes(),
                **{name: file[name].astype(kind) for name, kind in _COLUMNS.items()},
                **(_read_extra(file[_EXTRA].tobytes()) if _EXTRA in file else {}),
            )
    except Exception:  # hostile bytes make numpy and zipfile raise nearly anything
        return None
    return table if _plausible(table) and _are_keys(table.names, table.name_ends) else None


def _plausible(table: SampleTable) -> bool:
    """Whether the arrays fit each other and the file: a sidecar may come from anyone, with the data."""
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
        and (table.extension < len(table.extensions)).all()
        and (table.label >= -1).all()
        and (table.label <= LARGEST_LABEL).all()
        and (np.diff(table.name_ends, prepend=0) >= 0).all()
        and table.name_ends[-1] == len(table.names)
    )


def _are_keys(names: bytes, ends: NDArray[np.int64]) -> bool:
    """Whether each key is UTF-8: all together are, and none begins inside a character."""
    try:
        names.decode()
    except UnicodeDecodeError:
        return False
    starts = np.frombuffer(names, np.uint8)[ends[ends < len(names)]]
    return bool((starts & 0xC0 != 0x80).all())


def check(table: SampleTable, shard: str, filesize: int, sha256: str | None) -> None:
    """Raises UserError if a shard that was just scanned is not the one in its index."""
    if table.filesize != filesize or (sha256 is not None and table.sha256 != sha256):
        raise UserError(
            f"shard {shard} is not the file that index.json describes (another SHA-256). Fetch it again, or, "
            "if it was changed on purpose, run `shardgan prepare --index-only` on its folder."
        )
