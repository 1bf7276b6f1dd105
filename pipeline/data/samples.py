"""The members of a tar → samples: which member is the image, which the label, and what is passed over.

A sample is the members `KEY.extension` of one KEY, which ends at the first dot of the file name, as in
webdataset. A sample without exactly one image is passed over and counted, with the reason; the others are
used.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipeline.data.tar import LARGEST_MEMBER, Member
from pipeline.wording import counted

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "npy")
LARGEST_LABEL = 999_999
LABEL = f"a file KEY.cls that holds one whole number from 0 to {LARGEST_LABEL:,}"
REPAIR = "`shardgan prepare SHARDS OUT` makes new shards of the images."
MOST_REASONS = 20  # kept of one shard and kind
_ARRAY = "npy"  # an image only if there is no other: beside one it is an embedding or the like
_NAMED = 3  # extensions in a reason
_LONGEST_NAME = 60  # characters of a name in a reason


@dataclass(frozen=True)
class PassedOver:
    """How many samples (or members) of a shard are not used, and why for the first of them."""

    count: int = 0
    reasons: tuple[str, ...] = ()

    @property
    def first(self) -> str:
        return f" The first: {self.reasons[0]}" if self.reasons else ""


NONE = PassedOver()


def describe(without_image: PassedOver, unusable: PassedOver) -> list[str]:
    """A line for each kind of sample that is passed over."""
    kinds = ((without_image, "without an image"), (unusable, "with an image that cannot be used"))
    return [
        f"{counted(what.count, 'sample')} {text} skipped.{what.first}" for what, text in kinds if what.count
    ]


class Image(NamedTuple):
    """Where a sample's image lies. `problem`: why it cannot be used; "" if it can."""

    extension: str
    offset: int
    size: int
    crc: int
    problem: str


@dataclass(slots=True)
class Sample:
    """The members of one key. `images`: the extensions of all that could be the image."""

    key: str
    header: int
    image: Image | None = None
    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    label: int = -1
    labels: int = 0
    dotted: dict[str, int] | None = None  # of members such as 1.cls, which belongs to 1.png

    def add(self, extension: str, member: Member) -> None:
        if _is_image(extension):
            self._add_image(extension, member)
            return
        if extension == "cls":
            label = parse_label(member.data or b"")
            self.labels += not self.labels or label != self.label
            self.label = label
        elif extension.endswith(".cls"):
            label = parse_label(member.data or b"")
            self.dotted = {**(self.dotted or {}), extension.removesuffix("cls"): label}
        if extension and len(self.others) <= _NAMED:
            self.others.append(extension)

    def _add_image(self, extension: str, member: Member) -> None:
        if self.image is None or _rank(extension) < _rank(self.image.extension):
            crc = 0 if member.data is None else zlib.crc32(member.data)
            self.image = Image(extension, member.offset, member.size, crc, _problem(member))
            self.images = [extension]
        elif _rank(extension) == _rank(self.image.extension):
            self.images.append(extension)

    def settle(self) -> None:
        """When all members are added: `photo.1.png` has the label in `photo.1.cls`."""
        if self.dotted and self.image and not self.labels:
            stem = self.image.extension.rpartition(".")[0] + "."
            if stem in self.dotted:
                self.label, self.labels = self.dotted[stem], 1
        self.dotted = None

    def problem(self) -> str:
        """Why the image cannot be used, or is not a single one; "" if there is one, or none."""
        if len(self.images) > 1:
            dotted = any("." in extension for extension in self.images)
            why = ": a key ends at the first dot of a file name" if dotted else ""
            images = f"{len(self.images)} images ({_listed(self.images)})"
            return f"sample '{shown(self.key)}' has {images}{why}."
        if self.labels > 1:
            return f"sample '{shown(self.key)}' has {self.labels} labels (.cls)."
        return self.image.problem if self.image else ""

    def lack(self) -> str:
        """That there is no image, and what there is."""
        only = f", only {_listed(self.others)}" if self.others else ""
        return f"sample '{shown(self.key)}' has no image ({', '.join(IMAGE_EXTENSIONS)}){only}."


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension (in lower case) of a member, as in webdataset; None if it belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or "\0" in name:
        return None
    return folder + slash + stem, extension.lower()


def split_at_last_dot(name: str) -> tuple[str, str]:
    """The same of a name that has a dot, for keys with dots."""
    key, _, extension = name.rpartition(".")
    return key, extension.lower()


def parse_label(value: Any) -> int:
    """The class in a .cls, given as bytes, text or a number; -1 if it is none."""
    if isinstance(value, bytes | str):
        text = value.strip()
        digits = text if isinstance(text, bytes) else text.encode()
        value = digits if re.fullmatch(rb"[0-9]{1,19}", digits) else -1
    try:
        label = int(value)
    except (TypeError, ValueError, OverflowError):
        return -1
    return label if 0 <= label <= LARGEST_LABEL else -1


def image_extension(sample: Mapping[str, Any]) -> str | None:
    """The extension of a webdataset sample's image; None if it has none."""
    found = [key for key in sample if _is_image(key) and not key.startswith("__")]
    return min(
        found, key=lambda key: (_rank(key), IMAGE_EXTENSIONS.index(key.rpartition(".")[2])), default=None
    )


def shown(name: str) -> str:
    """A name from a tar made fit for printing: short, without control characters."""
    return repr(name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "…")[1:-1]


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def _rank(extension: str) -> int:
    """KEY.png is the image rather than KEY.npy, and both rather than KEY.input.png."""
    last = extension.rpartition(".")[2]
    return 2 * (last != extension) + (last == _ARRAY)


def _problem(member: Member) -> str:
    if member.irregular:
        return f"'{shown(member.name)}' is {member.irregular}; shards hold plain files."
    if member.data is None:
        return f"'{shown(member.name)}' is larger than {LARGEST_MEMBER >> 20} MiB."
    return ""


def _listed(extensions: list[str]) -> str:
    more = ["…"] * (len(extensions) > _NAMED)
    return ", ".join([*map(shown, extensions[:_NAMED]), *more])
