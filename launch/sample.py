"""`shardgan sample`: images of a run's G_ema, as one picture, an animation or separate files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launch.checkpoint import checkpoint_option
from launch.paths import UserPath
from pipeline.config import UserError
from pipeline.wording import counted

if TYPE_CHECKING:
    from pipeline.run.sampling import Sampler

_PICTURES, _MOVING = (".png", ".jpg", ".jpeg", ".webp"), (".gif", ".mp4")


@dataclass(frozen=True)
class _Wanted:
    """The options. seeds, classes: none given: empty."""

    count: int | None
    seed: int
    seeds: list[int]
    interpolate: bool
    classes: list[int]
    truncation: float

    @property
    def files(self) -> int:
        """How many separate ones."""
        return len(set(self.seeds)) * max(1, len(self.classes))


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
    "--seeds", metavar="0-31", help="An image for each, also 3,7,10-12: the same image whatever the others."
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    help="Without --seeds, how many images; default: whole rows of at most 64, or 16 that move.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Without --seeds, of all latents; default: 0.")
@click.option(
    "--interpolate",
    is_flag=True,
    help="Rows of images, each from one latent to another; animations do so without it.",
)
@click.option(
    "--classes",
    metavar="0,shirt,…",
    multiple=True,
    help="Only these classes, by number or name, a column each; a name with a comma: --classes again.",
)
@click.option(
    "--truncation",
    metavar="ψ",
    type=click.FloatRange(min=0),
    default=1.0,
    help="Less variety for better images, below 1; for a G with a latent w, such as stylegan2's.",
)
@checkpoint_option
def sample(
    run: Path,
    out: Path | None,
    images: Path | None,
    seeds: str | None,
    count: int | None,
    seed: int | None,
    interpolate: bool,
    classes: tuple[str, ...],
    truncation: float,
    checkpoint: str,
) -> None:
    """Write images from the moving average of G in the run folder RUN.

    With 50,000 separate files other tools can compute their scores:
    `shardgan sample RUN --images DIR --seeds 0-49999`; the same command resumes.
    """
    _refuse_unclear(out, images, seeds, count, seed, interpolate)
    chosen = [] if seeds is None else seeds_of(seeds)
    if out is not None and out.suffix.lower() == ".mp4":
        from pipeline.run.animation import needed

        needed(out)
    from pipeline.run.export import load_generator
    from pipeline.run.sampling import Sampler

    G, config, state = load_generator(run, checkpoint)
    sampler = Sampler(G, config, state.label_frequencies, state.classes)
    names = [name for text in classes for name in ([text] if text in state.classes else text.split(","))]
    numbers = list(dict.fromkeys(sampler.classes(names))) if names else []
    wanted = _Wanted(count, seed or 0, chosen, interpolate, numbers, truncation)
    after = f"after {state.cur_nimg / 1000:g} kimg"
    if images is not None:
        _separate(sampler, wanted, images, f"{config.run.name} {after}")
        click.echo(f"{counted(wanted.files, 'image')} {after}: {images}/")
    elif out is not None:
        try:
            what = _moving(sampler, wanted, out) if _moves(out, interpolate) else _still(sampler, wanted, out)
        except OSError as error:
            raise UserError(f"{out} could not be written: {error}") from None
        click.echo(f"{what} {after}: {out}")


def _moves(out: Path, interpolate: bool) -> bool:
    suffix = out.suffix.lower()
    return suffix in _MOVING or (suffix == ".webp" and interpolate)


def _still(sampler: Sampler, wanted: _Wanted, out: Path) -> str:
    from pipeline.run import layouts
    from pipeline.run.grid import save_grid

    if wanted.interpolate:
        layout = layouts.rows(sampler, wanted.seed, wanted.count, wanted.seeds, wanted.classes)
    elif wanted.seeds:
        layout = layouts.by_seed(sampler, wanted.seeds, wanted.classes)
    else:
        layout = layouts.grid(sampler, wanted.seed, wanted.count, wanted.classes)
    save_grid(layout.images(sampler, wanted.truncation), out, layout.columns, layout.titles)
    return counted(len(layout.z), "image")


def _moving(sampler: Sampler, wanted: _Wanted, out: Path) -> str:
    from pipeline.run import layouts
    from pipeline.run.animation import FPS, save_animation
    from pipeline.run.grid import tile

    layout = layouts.loops(sampler, wanted.seed, wanted.count, wanted.seeds, wanted.classes)
    frames, n, _ = layout.z.shape
    least = max(56, 224 // -(-n // layout.columns))  # a single small image is enlarged more
    images = layout.frames(sampler, wanted.truncation)
    save_animation((tile(one, layout.columns, layout.titles, least) for one in images), out)
    return f"{frames:,} frames ({frames / FPS:g} s) of {counted(n, 'image')}"


def _separate(sampler: Sampler, wanted: _Wanted, folder: Path, run: str) -> None:
    from pipeline.run.image_files import write_images

    with _progress(wanted.files) as done:
        write_images(sampler, wanted.seeds, wanted.classes, folder, wanted.truncation, run, done)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda number: progress.advance(task, number)


def _refuse_unclear(
    out: Path | None,
    images: Path | None,
    seeds: str | None,
    count: int | None,
    seed: int | None,
    interpolate: bool,
) -> None:
    """Raises UserError for options that do not go together."""
    if (out is None) == (images is None):
        raise UserError("Give --out FILE for a picture or an animation, or --images DIR for separate files.")
    if out is not None and out.suffix.lower() not in _PICTURES + _MOVING:
        known = ", ".join(_PICTURES + _MOVING)
        raise UserError(f"--out {out}: not a known format of pictures or animations ({known}).")
    if images is not None and (seeds is None or interpolate):
        raise UserError("--images takes --seeds, as 0-49999, and no --interpolate.")
    if seeds is not None and (seed is not None or count is not None):
        raise UserError("--seeds says which and how many: leave out --seed and --count.")


def seeds_of(text: str) -> list[int]:
    """The seeds of 0-31 or 3,7,10-12. Raises UserError."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(first) <= int(last))):
            raise UserError(f"--seeds {text}: not numbers or ranges such as 0-31 or 3,7,10-12.")
        seeds += range(int(first), int(last if dash else first) + 1)
    return seeds
