"""`shardgan sample`: images of a run's G_ema, as one picture, an animation or separate files."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launch.checkpoint import checkpoint_option
from launch.paths import UserPath
from pipeline.config import UserError
from pipeline.run.saved_grids import MOST_PIXELS
from pipeline.wording import counted, in_kimg, why

if TYPE_CHECKING:
    from pipeline.run.sampling import Sampler

_PICTURES, _MOVING = (".png", ".jpg", ".jpeg", ".webp"), (".gif", ".mp4")
_RANGE = re.compile(r"(\d{1,99})(?:-(\d{1,99}))?")
_MOST_SEEDS = 10_000_000  # in one command: their list alone takes 400 MB


def seeds_of(text: str) -> list[int]:
    """The seeds of 0-31 or 3,7,10-12. Raises UserError."""
    from pipeline.run.sampling import LARGEST_SEED

    ranges = []
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise UserError(f"--seeds {text}: not numbers or ranges such as 0-31 or 3,7,10-12.")
        if last > LARGEST_SEED:
            raise UserError(f"--seeds {text}: seeds are from 0 to {LARGEST_SEED}.")
        ranges.append(range(first, last + 1))
    if (number := sum(map(len, ranges))) > _MOST_SEEDS:  # before they take memory
        raise UserError(
            f"--seeds {text}: {number:,} seeds, more than {_MOST_SEEDS:,}: give them in several commands."
        )
    return [seed for one in ranges for seed in one]


@dataclass(frozen=True)
class _Wanted:
    """The options, by their names."""

    out: Path | None
    images: Path | None
    seeds: list[int] | None
    count: int | None
    seed: int | None
    interpolate: bool
    classes: tuple[str, ...]
    truncation: float

    def refuse_unclear(self) -> None:
        """Raises UserError for options that do not go together."""
        if (self.out is None) == (self.images is None):
            raise UserError(
                "Give --out FILE for a picture or an animation, or --images DIR for separate files."
            )
        if self.out is not None and self.out.suffix.lower() not in _PICTURES + _MOVING:
            known = ", ".join(_PICTURES + _MOVING)
            raise UserError(f"--out {self.out}: not a known format of pictures or animations ({known}).")
        if self.images is not None and (self.seeds is None or self.interpolate):
            raise UserError("--images takes --seeds, as 0-49999, and no --interpolate.")
        if self.seeds is not None and (self.seed is not None or self.count is not None):
            raise UserError("--seeds says which and how many: leave out --seed and --count.")

    def seed_for(self, sampler: Sampler) -> int:
        """Of all latents, where no --seeds name them: by default those of the run's own grids."""
        return sampler.seed if self.seed is None else self.seed

    def numbers(self, sampler: Sampler, known: Sequence[str]) -> list[int]:
        """The classes asked for; none: all. known: the names of all."""
        names = [name for text in self.classes for name in ([text] if text in known else _parts(text))]
        return list(dict.fromkeys(sampler.classes(names))) if names else []

    def refuse_too_many(self, classes: int, size: int) -> None:
        """Raises UserError for more images of size × size than one picture can show, before their latents
        take memory. An animation along seeds shows one image for each class."""
        along = self.out is not None and _moves(self.out, self.interpolate)
        of_seeds = 0 if along else len(self.seeds or ()) * max(1, classes)
        number = self.count or of_seeds
        if self.out is not None and number * size**2 > MOST_PIXELS:
            raise UserError(
                f"{number:,} images of {size} × {size} pixels are too many for one picture, which has at "
                f"most {MOST_PIXELS // size**2:,}. For more, --images DIR with --seeds makes separate files."
            )


def _parts(text: str) -> list[str]:
    """What stands between commas, as people write them, with spaces or without."""
    return [part.strip() for part in text.split(",")]


@click.command()
@click.argument("run", type=UserPath())
@click.option(
    "--out",
    type=UserPath(),
    help="The picture to write (.png, .jpg, .webp), or an animation that repeats without a jump (.gif, .mp4; "
    ".webp with --interpolate).",
)
@click.option("--images", type=UserPath(), help="Or a folder for separate files, seed00000.png …")
@click.option(
    "--seeds",
    metavar="0-31",
    callback=lambda _context, _option, text: None if text is None else seeds_of(text),
    help="One image per seed, as in 0-31 or 3,7,10-12; an image does not depend on the other seeds.",
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    help="Without --seeds, how many images; default: whole rows of at most 64, or 16 for an animation.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    help="Without --seeds, the seed of the latents; default: run.seed, as in the run's own grids.",
)
@click.option(
    "--interpolate",
    is_flag=True,
    help="Rows of images, each row moving from one latent to another; animations always interpolate.",
)
@click.option(
    "--classes",
    metavar="0,shirt,…",
    multiple=True,
    help="Only these classes, by number or name, a column each; repeat it for a name with a comma.",
)
@click.option(
    "--truncation",
    metavar="ψ",
    type=click.FloatRange(min=0),
    default=1.0,
    help="Below 1, better images with less variety; needs a G with a latent w, such as stylegan2's.",
)
@checkpoint_option
def sample(run: Path, checkpoint: str, **options: Any) -> None:
    """Write images from the moving average of G in the run folder RUN.

    With 50,000 separate files other tools can compute their scores:
    `shardgan sample RUN --images DIR --seeds 0-49999`; the same command resumes.
    """
    wanted = _Wanted(**options)
    wanted.refuse_unclear()
    if wanted.out is not None and wanted.out.suffix.lower() == ".mp4":
        from pipeline.run.animation import needed

        needed(wanted.out)
    from pipeline.run.export import load_generator
    from pipeline.run.sampling import Sampler

    G, config, state = load_generator(run, checkpoint)
    sampler = Sampler(G, config, state.label_frequencies, state.classes)
    classes, after = wanted.numbers(sampler, state.classes), f"after {in_kimg(state.cur_nimg / 1000)} kimg"
    wanted.refuse_too_many(len(classes), config.data.size)
    if wanted.images is not None:
        files = _separate(sampler, wanted, classes, wanted.images, f"{config.run.name} {after}")
        click.echo(f"{counted(files, 'image')} {after}: {wanted.images}/")
    elif wanted.out is not None:
        make = _moving if _moves(wanted.out, wanted.interpolate) else _still
        try:
            what = make(sampler, wanted, classes, wanted.out)
        except OSError as error:
            raise UserError(f"{wanted.out} could not be written: {why(error)}") from None
        click.echo(f"{what} {after}: {wanted.out}")


def _moves(out: Path, interpolate: bool) -> bool:
    suffix = out.suffix.lower()
    return suffix in _MOVING or (suffix == ".webp" and interpolate)


def _still(sampler: Sampler, wanted: _Wanted, classes: list[int], out: Path) -> str:
    from pipeline.run import layouts
    from pipeline.run.grid import save_grid

    seed, seeds = wanted.seed_for(sampler), wanted.seeds or []
    if wanted.interpolate:
        layout = layouts.rows(sampler, seed, wanted.count, seeds, classes)
    elif seeds:
        layout = layouts.by_seed(sampler, seeds, classes)
    else:
        layout = layouts.grid(sampler, seed, wanted.count, classes)
    save_grid(layout.images(sampler, wanted.truncation), out, layout.columns, layout.titles)
    made = len(layout.z)
    if wanted.interpolate and wanted.count is not None and made != wanted.count:
        rows = f"{counted(made // layout.columns, 'row')} of {layout.columns}"
        return (
            f"{made} ({rows}) of {wanted.count} images" if made < wanted.count else f"{made} images ({rows})"
        )
    return counted(made, "image")


def _moving(sampler: Sampler, wanted: _Wanted, classes: list[int], out: Path) -> str:
    from pipeline.run import layouts
    from pipeline.run.animation import FPS, save_animation
    from pipeline.run.grid import fitting, tile

    seed, seeds = wanted.seed_for(sampler), wanted.seeds or []
    layout = layouts.loops(sampler, seed, wanted.count, seeds, classes)
    frames, n, _ = layout.z.shape
    least = max(56, 224 // -(-n // layout.columns))  # a single small image is enlarged more
    images = layout.frames(sampler, wanted.truncation)
    pictures = (tile(one, layout.columns, layout.titles, least) for one in images)
    save_animation((fitting(picture, out) for picture in pictures), out)
    return f"{frames:,} frames ({frames / FPS:g} s) of {counted(n, 'image')}"


def _separate(sampler: Sampler, wanted: _Wanted, classes: list[int], folder: Path, run: str) -> int:
    """Returns how many files are there."""
    from pipeline.run.image_files import write_images

    seeds = list(dict.fromkeys(wanted.seeds or []))
    files = len(seeds) * max(1, len(classes))
    with _progress(files) as done:
        write_images(sampler, seeds, classes, folder, wanted.truncation, run, done)
    return files


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns, shown = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()), sys.stdout.isatty()
    with Progress(*columns, transient=True, disable=not shown) as progress:
        task = progress.add_task("", total=total)
        yield lambda number: progress.advance(task, number)
