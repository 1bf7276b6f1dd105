"""A training as its processes get it: a config file, and settings on top of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pipeline.data.prepare.source import Options


@dataclass(frozen=True)
class Preparation:
    """Images that have to become shards before a training."""

    source: str
    out: str
    options: Options


@dataclass(frozen=True)
class Training:
    """A config file and the settings on top of it. notes: what was chosen and why, a line each."""

    config: str
    settings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    preparation: Preparation | None = None

    def explain(self) -> None:
        """Print the notes, beside what a program may read."""
        for note in self.notes:
            click.echo(note, err=True)

    @property
    def prepared(self) -> bool:
        """Whether the shards that it is to make of images are there."""
        from pipeline.data.record import INDEX

        return self.preparation is None or (Path(self.preparation.out) / INDEX).is_file()

    def prepare(self) -> None:
        """Make the shards of its images, if they are not there. Raises UserError, also for changed images."""
        if self.preparation is None:
            return
        from launch.prepare import make_again

        made = self.preparation
        make_again(made.source, made.out, made.options)


def of_run(path: Path, settings: Sequence[str], notes: Sequence[str] = ()) -> Training:
    """To resume the run in a folder, as its config.yaml says wherever it was moved to."""
    from pipeline.config_layers import as_override

    path = path if path.name else path.absolute()
    # A run that once moved to other data must not move again by itself.
    named = as_override("run.out", str(path.parent)), as_override("run.name", path.name)
    where = (*named, "run.new_data=false")
    return Training(str(path / "config.yaml"), (*where, *settings), tuple(notes))
