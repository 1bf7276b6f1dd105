"""Which class each image is of: by the folders it lies in, or by StyleGAN's `dataset.json`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.config import UserError
from pipeline.data.prepare.listing import LABELS, Listing, parts
from pipeline.data.prepare.pictures import LeftOutError
from pipeline.data.samples import LARGEST_LABEL
from pipeline.wording import counted, one_line

Classes = Literal["top", "path", "none"]  # which folders name the class of an image: the first, all, no
_FEW = 3  # names in a message
_PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}


@dataclass(frozen=True, eq=False)
class Labels:
    """values: int64 [n], -1 without a label; classes: their names by label, () without labels.

    origin: where the labels come from; warnings: what may be wrong with them; remarks: what else to know.
    """

    values: NDArray[np.int64]
    classes: tuple[str, ...] = ()
    origin: str = ""
    warnings: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def unlabelled(count: int, *remarks: str) -> Labels:
    return Labels(np.full(count, -1, np.int64), remarks=remarks)


def chosen(labels: Labels, by: Classes, source: str) -> Labels:
    """Labels that images come with, or none of them. Raises UserError if folders are to name the classes."""
    if by == "path":
        raise UserError(f"--classes path is for folders and zips of images; {source} has labels of its own.")
    return labels if by == "top" else unlabelled(len(labels.values))


def label(listing: Listing, by: Classes, source: str, read: Callable[[str], bytes]) -> Labels:
    """The labels of the images of a listing. `read(name)` gives the bytes of one of its files.

    Raises UserError if `dataset.json` cannot be used, or images lie both in folders and beside them.
    """
    images = listing.images
    if by == "none":
        return unlabelled(len(images))
    shared = _shared_folders(images)
    folders = {"/".join(shared[:depth]) for depth in range(len(shared) + 1)}
    places = {"/".join(parts(name)[:-1]): name for name in listing.tables if parts(name)[-1] == LABELS}
    here = sorted(places.keys() & folders, key=len)
    if here and by == "top":
        try:
            data = read(places[here[0]])
        except LeftOutError as error:
            raise UserError(f"{places[here[0]]} of {source} cannot be read: {error}.") from None
        found = _by_dataset_json(images, here[0], data, source)
        if found is not None:
            listing.take_labels(places[here[0]])
            return found
    return _by_folders(listing, len(shared), by, source)


def _shared_folders(images: Sequence[str]) -> tuple[str, ...]:
    """The folders that hold everything; zips often have one."""
    folders = [parts(name)[:-1] for name in images]
    ends = list(zip(min(folders), max(folders), strict=False))
    shared = next((i for i, (first, last) in enumerate(ends) if first != last), len(ends))
    return folders[0][:shared]


def _by_folders(listing: Listing, shared: int, by: Classes, source: str) -> Labels:
    images = listing.images
    end = shared + 1 if by == "top" else None
    folders = [parts(name)[:-1][shared:end] for name in images]
    if not any(folders):
        return unlabelled(len(images))
    if not all(folders):
        beside = one_line(images[folders.index(())])
        raise UserError(
            f"{source} has images both in sub-folders, which would be the classes, and beside them "
            f"({beside}). Put every image into a sub-folder, or give --classes none."
        )
    numbers = {name: number for number, name in enumerate(sorted(set(folders)))}
    values = np.array([numbers[folder] for folder in folders], np.int64)
    classes = tuple(one_line("/".join(name)) for name in numbers)
    warnings = _about_names(classes, np.bincount(values).tolist())
    others = {folder[shared:end] for folder in _other_folders(listing, parts(images[0])[:shared])}
    lacking = sorted("/".join(name) for name in others - numbers.keys() if name)
    remarks = (f"no class for folders without an image: {some(lacking)}",) if lacking else ()
    return Labels(values, classes, "folders", tuple(warnings), remarks)


def _other_folders(listing: Listing, shared: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Empty folders and those of files that are left out, below the folders that all images share."""
    folders = [*map(parts, listing.empty), *(parts(item.name)[:-1] for item in listing.left_out)]
    for folder in folders:
        if folder[: len(shared)] == shared and not any(p.startswith((".", "__MACOSX")) for p in folder):
            yield folder


def _about_names(classes: tuple[str, ...], counts: list[int]) -> list[str]:
    """Warnings about class names that may not be what they seem."""
    warnings = []
    if all(name.isdecimal() for name in classes) and len(classes) > 1:
        numbers = [int(name) for name in classes]
        consecutive = all(b == a + 1 for a, b in pairwise(sorted(numbers)))
        padded = len({len(name) for name in classes}) == 1 and len(classes[0]) > len(str(max(numbers)))
        equal = len(set(counts[:-1])) == 1 and counts[-1] <= counts[0]
        if consecutive and (padded or equal):
            warnings.append(
                f"the folders {some(classes)} are numbered like parts of one set, but are taken for "
                "classes. If they are none, give --classes none."
            )
        if numbers != sorted(numbers):
            warnings.append(
                "folder names are sorted as text, so class 2 need not be folder 2: index.json lists "
                "the names."
            )
    if len(classes) > 1 and all(name.lower() in _PARTS for name in classes):
        warnings.append(
            f"the folders {some(classes)} look like parts of a data set, but are taken for classes. Prepare "
            "one of them, or give --classes none."
        )
    spellings = Counter(name.lower() for name in classes)
    if alike := [name for name in classes if spellings[name.lower()] > 1]:
        warnings.append(f"{some(alike)} differ in upper and lower case only, and are classes each.")
    return warnings


def _by_dataset_json(images: Sequence[str], folder: str, data: bytes, source: str) -> Labels | None:
    """The labels of a `dataset.json` in `folder`; None if it is not one of StyleGAN's."""
    way_out = f"Mend or remove {LABELS}, or give --classes none."
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{LABELS} of {source} cannot be read ({error}). {way_out}") from None
    if not isinstance(content, dict) or "labels" not in content:
        return None
    if content["labels"] is None:
        return unlabelled(len(images), f"{LABELS} says that there are no labels")
    given = _entries(content["labels"], f"{LABELS} of {source}", way_out)
    above = len(parts(folder))
    values = np.array([given.pop("/".join(parts(name)[above:]), -1) for name in images], np.int64)
    lacking = int((values < 0).sum())
    if lacking == len(images):
        raise UserError(f"{LABELS} of {source} has a label for none of its images. {way_out}")
    warnings, remarks = list[str](), list[str]()
    if lacking:
        first = one_line(images[int(np.flatnonzero(values < 0)[0])])
        warnings.append(f"{counted(lacking, 'image')} without a label in {LABELS}, the first {first}")
    if given:
        are = "is" if len(given) == 1 else "are"
        remarks.append(f"{counted(len(given), 'file')} that {LABELS} lists {are} not among the images")
    found = renumbered(values, (), LABELS)
    return replace(found, warnings=tuple(warnings), remarks=(*remarks, *found.remarks))


def _entries(labels: object, what: str, way_out: str) -> dict[str, int]:
    """Labels by name, -1 for none."""
    pairs = list(labels.items()) if isinstance(labels, dict) else labels
    if not isinstance(pairs, list):
        raise UserError(f"{what}: `labels` is not a list of [name, label]. {way_out}")
    given = dict[str, int]()
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise UserError(f"{what}: `labels` is not a list of [name, label]. {way_out}")
        name, value = pair
        if value is not None and not (type(value) is int and 0 <= value <= LARGEST_LABEL):
            raise UserError(
                f"{what}: the label of {one_line(name)} is no number of a class (0 to {LARGEST_LABEL:,}): "
                f"{repr(value)[:40]}. {way_out}"
            )
        file, label = "/".join(parts(name.replace("\\", "/"))), -1 if value is None else value
        if given.setdefault(file, label) != label:
            raise UserError(f"{what}: {one_line(name)} is there with two labels. {way_out}")
    return given


def renumbered(values: NDArray[np.int64], names: Sequence[str], origin: str) -> Labels:
    """Labels as they are, or renumbered without gaps if most classes would be empty."""
    count = int(values.max(initial=-1)) + 1
    found, places = np.unique(values, return_inverse=True)
    labels = found[found >= 0].tolist()
    if count <= 2 * len(labels):
        return Labels(values, (*names, *map(str, range(len(names), count))), origin)
    classes = tuple(names[label] if label < len(names) else str(label) for label in labels)
    places = places.reshape(values.shape) - int(found[0] < 0)
    remark = (
        f"labels up to {count - 1:,}, but only {len(labels):,} of them occur: renumbered from 0, and "
        "index.json lists the old ones as names"
    )
    return Labels(places.astype(np.int64), classes, origin, remarks=(remark,))


def some(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(map(one_line, names[:_FEW])) + ", …" * (len(names) > _FEW)
