"""The files of a folder or a zip: its images, and every other file with the reason for leaving it out."""

from __future__ import annotations

import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Common formats that Pillow decodes without running anything. The bytes of a file decide what it really is.
EXTENSIONS = frozenset(
    (
        *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"),
        *(".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm"),
    )
)
LINKED = "links to folders"  # a kind of what is left out
ARRAY = ".npy"  # a latent; an image's array is read as well
LABELS = "dataset.json"  # StyleGAN's
_TABLES = (".csv", ".tsv", ".jsonl", ".parquet", ".xlsx")
_TABLE_NAMES = frozenset(
    ("dataset.json", "metadata.json", "labels.json", "annotations.json", "labels.txt", "classes.txt")
)
_OF_WINDOWS = frozenset(("thumbs.db", "desktop.ini"))
_SHORT_SUFFIX = re.compile(r"\.[a-z0-9]{1,8}")


@dataclass(frozen=True)
class LeftOut:
    """A file that no image was made of. `name` is relative to the source; a summary counts by `kind`."""

    name: str
    kind: str
    reason: str
    count: int = 1  # of such files that are not listed one by one


@dataclass
class Listing:
    """The files of a source, by their paths relative to it, with `/` between folders."""

    images: list[str] = field(default_factory=list)  # sorted
    left_out: list[LeftOut] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)  # left out, but may hold labels
    empty: list[str] = field(default_factory=list)  # folders

    def add(self, name: str) -> None:
        """Decide by the name of a file whether it is an image."""
        base = name.rpartition("/")[2]
        if found := _hidden(name):
            self.left_out.append(LeftOut(name, *found))
        elif (suffix := _suffix(base)) in EXTENSIONS:
            self.images.append(name)
        else:
            if suffix in _TABLES or base.lower() in _TABLE_NAMES:
                self.tables.append(name)
            kind = suffix if _SHORT_SUFFIX.fullmatch(suffix) else "other names"
            self.left_out.append(LeftOut(name, kind if suffix else "no suffix", "not the name of an image"))

    def settle(self) -> None:
        """All files have been added. If none has the name of an image, arrays are what is meant."""
        if not self.images:
            self.images = [item.name for item in self.left_out if item.kind == ARRAY]
            self.left_out = [item for item in self.left_out if item.kind != ARRAY]
        self.images.sort()
        self.tables.sort()

    def take_labels(self, name: str) -> None:
        """A file is no longer left out, as its labels are read."""
        self.tables.remove(name)
        self.left_out = [item for item in self.left_out if item.name != name]

    def leave_out(self, name: str, kind: str, reason: str) -> None:
        self.left_out.append(LeftOut(name, kind, reason))


def list_folder(root: Path, without: Path | None = None) -> Listing:
    """All files below `root`, except in the folder `without`. Links to folders are not followed."""
    listing = Listing()

    def refused(error: OSError) -> None:
        name = os.path.relpath(error.filename, root)
        kind = "no permission" if isinstance(error, PermissionError) else "unreadable"
        listing.leave_out(f"{name}/", kind, f"a folder that cannot be read: {error.strerror}")

    for folder, folders, files in os.walk(root, onerror=refused):
        inside = os.path.relpath(folder, root)
        above = "" if inside == "." else f"{inside}/"
        if above and not folders and not files:
            listing.empty.append(inside)
        folders[:] = [name for name in folders if _enter(folder, name, above, without, listing)]
        for name in files:
            listing.add(above + name)
    listing.settle()
    return listing


def _enter(folder: str, name: str, above: str, without: Path | None, listing: Listing) -> bool:
    path = os.path.join(folder, name)  # noqa: PTH118  a million of them
    if without is not None and path == str(without):
        return False
    if _hidden(name):
        listing.leave_out(f"{above}{name}/", "hidden folders", "a hidden folder")
        return False
    if Path(path).is_symlink():
        listing.leave_out(f"{above}{name}", LINKED, "a link to a folder, which is not followed")
        return False
    return True


def list_zip(members: Iterable[zipfile.ZipInfo]) -> tuple[Listing, dict[str, zipfile.ZipInfo]]:
    """All files of a zip, and its member for each name. Backslashes separate folders as well."""
    listing, found, folders = Listing(), dict[str, zipfile.ZipInfo](), list[str]()
    for member in members:
        name = member.filename.replace("\\", "/")
        if name.endswith("/"):
            folders.append(name)
        elif name in found:
            listing.leave_out(name, "twice in the zip", "listed before by the same name")
        elif stat.S_ISLNK(member.external_attr >> 16):
            listing.leave_out(name, "links", "a link in a zip")
        else:
            found[name] = member
            listing.add(name)
    filled = {parent for name in (*found, *folders) for parent in _parents(_bare(name))}
    listing.empty += [name for name in map(_bare, folders) if name not in filled and not _hidden(name)]
    listing.settle()
    return listing, found


def _bare(folder: str) -> str:
    return folder.rstrip("/")


def _parents(name: str) -> Iterable[str]:
    while name := name.rpartition("/")[0]:
        yield name


def by_kind(left_out: Sequence[LeftOut]) -> str:
    """How many files of each kind, the most first: `.tif 2, hidden 1`."""
    kinds = Counter[str]()
    for item in left_out:
        kinds[item.kind] += item.count
    return ", ".join(
        f"{kind} {count:,}" for kind, count in sorted(kinds.items(), key=lambda k: (-k[1], k[0]))
    )


def parts(name: str) -> tuple[str, ...]:
    """The folders of a path and its last part."""
    return tuple(part for part in name.split("/") if part not in ("", "."))


def _hidden(name: str) -> tuple[str, str] | None:
    """Kind and reason, if a system put this file there."""
    if name.startswith(".") or "/." in name or "__MACOSX" in name:
        for part in parts(name):
            if part.startswith(("._", "__MACOSX")):
                return "macOS's own", "made by macOS"
            if part == "..":
                return "outside", "a path that leads out of the source"
            if part.startswith("."):
                return "hidden", "a hidden file"
    if name.rpartition("/")[2].lower() in _OF_WINDOWS:
        return "Windows's own", "made by Windows"
    return None


def _suffix(base: str) -> str:
    stem, dot, end = base.rpartition(".")
    return f".{end.lower()}" if stem and dot and end else ""
