"""What is in a person's own data: shards or images, how many, of which sizes, colours and classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from launch import presets
from pipeline.config import UserError
from pipeline.data.prepare.files import open_source
from pipeline.data.prepare.listing import ARRAY, list_folder
from pipeline.data.prepare.pictures import Latent, LeftOutError, Look
from pipeline.data.prepare.source import Stored
from pipeline.data.prepare.summary import between

_LOOKED_AT = 256  # images, evenly spread: enough for a median


@dataclass(frozen=True)
class Contents:
    """What a look at some of the images shows.

    sides: their shorter sides, sorted; size: that of all, if they are square and equal; channels: 1 if all
    are grey, else 3. classes, labelled: how many classes there are, and images that have one.
    """

    images: int
    classes: int
    labelled: int
    sides: tuple[int, ...]
    size: int | None
    channels: int

    @property
    def median(self) -> int:
        return self.sides[len(self.sides) // 2]

    @property
    def conditional(self) -> bool:
        """Whether the classes are worth training on."""
        full = self.labelled == self.images >= presets.PER_CLASS * self.classes
        return self.classes > 1 and full

    @property
    def pixels(self) -> str:
        if self.size is not None:
            return f"{self.size}x{self.size}"
        return f"of shorter sides {between(self.sides[0], self.sides[-1], self.median)}"


def open_own(argument: str, path: Path) -> Stored:
    """Raises UserError for a folder that holds nothing to train on, or shards and images side by side."""
    if path.is_dir():
        shards = sorted(p.name for p in path.iterdir() if p.suffix.lower() == ".tar")
        images = list_folder(path.absolute()).images if shards else []
        if shards and images and not images[0].endswith(ARRAY):
            raise UserError(
                f"{argument} holds both shards ({shards[0]}) and images ({images[0]}). Put them into folders "
                "of their own, and give the one to train on."
            )
    try:
        return open_source(argument, "top", lambda text: click.echo(text, err=True))
    except UserError as error:
        if "--" not in str(error) or "shardgan " in str(error):  # the latter says what to type already
            raise
        raise UserError(
            f"{error}\nThat is an option of shardgan prepare {argument} OUT, after which: shardgan train OUT"
        ) from None


def look_at(source: Stored, name: str) -> Contents:
    """Sizes and colours, by the headers of some images.

    Raises UserError if none of them can be read, and for latents.
    """
    looks, reason = list[Look](), ""
    for number in _spread(len(source)):
        try:
            found = source.look(number)
        except LeftOutError as error:
            reason = str(error)
            continue
        if isinstance(found, Latent):
            raise UserError(
                f"{name} holds latents ({ARRAY}), and there is no preset for those. Give a config: shardgan "
                "train CONFIG data.train=SHARDS data.size=N data.channels=C data.decoder=package.module:Class"
            )
        looks.append(found)
    if not looks:
        raise UserError(f"None of the images in {name} that were looked at can be read: {reason}")
    shapes = {(look.width, look.height) for look in looks}
    width, height = next(iter(shapes))
    sides = tuple(sorted(min(look.width, look.height) for look in looks))
    labels = source.labelled.values
    return Contents(
        images=len(source),
        classes=len(source.labelled.classes),
        labelled=int((labels >= 0).sum()),
        sides=sides,
        size=width if len(shapes) == 1 and width == height else None,
        channels=1 if all(look.grey for look in looks) else 3,
    )


def _spread(count: int) -> list[int]:
    """Up to _LOOKED_AT numbers below `count`, evenly spread."""
    found: list[int] = np.unique(np.linspace(0, count - 1, _LOOKED_AT, dtype=np.int64)).tolist()
    return found
