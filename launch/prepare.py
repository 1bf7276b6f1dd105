"""`shardgan prepare`: images in, tar shards and their index out."""

from __future__ import annotations

import shlex
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.index import Index
    from pipeline.data.prepare.labels import Classes
    from pipeline.data.prepare.pictures import Fit
    from pipeline.data.prepare.summary import Summary
    from pipeline.data.prepare.writer import Options


@click.command()
@click.argument("source")
@click.argument("out", required=False)
@click.option("--size", type=click.IntRange(1), help="Pixels, height = width. Default: as the images are.")
@click.option(
    "--fit",
    type=click.Choice(["crop", "pad", "stretch"]),
    help="How an image gets to --size: cut to a square and scaled, shrunk if need be and padded, or "
    "distorted. Default: crop for files, pad for known data sets.",
)
@click.option(
    "--background",
    metavar="COLOUR",
    help="The colour under transparency and in padding: white, black or #rrggbb. Default: white under "
    "transparency, black in padding.",
)
@click.option("--channels", type=click.Choice(["1", "3"]), help="Grey or RGB. Default: as each image is.")
@click.option(
    "--per-shard", type=click.IntRange(1), default=1000, show_default=True, help="Images per shard."
)
@click.option(
    "--classes",
    type=click.Choice(["top", "path", "none"]),
    default="top",
    show_default=True,
    help="What names the class of an image: its first folder (or the dataset.json of StyleGAN, if there is "
    "one), all its folders (a/b), or nothing.",
)
@click.option(
    "--dedupe",
    is_flag=True,
    help="Leave out images that are copies of others as they are written; OUT/skipped.txt lists them.",
)
@click.option("--workers", type=click.IntRange(1), help="Processes. Default: one per core.")
@click.option(
    "--index-only",
    is_flag=True,
    help="SOURCE is a folder of shards, here or at a URL: check them, write their index.",
)
def prepare(
    source: str,
    out: str | None,
    size: int | None,
    fit: Fit | None,
    background: str | None,
    channels: str | None,
    per_shard: int,
    classes: Classes,
    dedupe: bool,
    workers: int | None,
    index_only: bool,
) -> None:
    """Make a folder OUT of tar shards from SOURCE.

    SOURCE is a folder of images (its sub-folders, if any, are the classes), a zip of such a folder,
    WebDataset shards (one, or a folder of them, as img2dataset makes it), or one of the known data sets
    fashion-mnist and cifar10, which are downloaded. Latents, .npy of floats [channels, size, size], in place
    of images are written as they are. Images are shuffled once. The same command writes the
    same bytes; after an interruption it makes only what is missing. Files that are not images or cannot
    be read are left out, counted, and listed in OUT/skipped.txt; OUT/sources.txt lists the file of each
    sample.

    With --index-only SOURCE is a folder of shards. At an https://, s3:// or gs:// URL they are fetched once,
    and the index is kept on this machine.
    """
    if "" in (source, out):
        raise UserError(f"{'OUT' if source else 'SOURCE'} is empty. (Is a shell variable unset?)")
    if index_only:
        _index_only(source, out)
        return
    if out is None:
        raise click.UsageError("Where to? Give a folder OUT for the shards of SOURCE.")
    from pipeline.data.prepare.writer import Options
    from pipeline.wording import printable

    grey_or_colour = None if channels is None else int(channels)
    options = Options(size, fit, grey_or_colour, per_shard, classes, background, dedupe)
    if summary := show(source, out, options, workers):
        click.echo(f"  {printable(summary.next_line(out))}")


def show(source: str, out: str, options: Options, workers: int | None = None) -> Summary | None:
    """Prepare, with a bar, and print what was made; returns that, or None if it was there already.

    Raises UserError as `pipeline.data.prepare.writer.prepare`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from pipeline.data.prepare import writer as data
    from pipeline.data.prepare.summary import Summary
    from pipeline.wording import columns, one_line

    console, summaries = Console(stderr=True), list[Summary]()
    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*shown, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("images", total=None)
        index = data.prepare(
            source,
            out,
            options,
            workers=workers,
            announce=lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            report=summaries.append,
        )
    _say(index)
    indented = textwrap.TextWrapper(columns(), "  ", "    ", break_long_words=False, break_on_hyphens=False)
    for line in (line for summary in summaries for line in summary.lines()):
        click.echo(indented.fill(one_line(line)))
    return summaries[0] if summaries else None


def make_again(source: str, out: str, options: Options) -> None:
    """Prepare images for a training, if they are not prepared yet.

    Raises UserError as `show`, if they have changed since, and if other images are where theirs would be.
    """
    from pipeline.data.prepare import writer
    from pipeline.data.prepare.earlier import ChangedSourceError, TakenError
    from pipeline.data.record import INDEX

    if not (Path(out) / INDEX).is_file():
        show(source, out, options)
        return
    try:
        writer.prepare(source, out, options)
    except ChangedSourceError as error:
        raise UserError(
            f"{error.how} when {out} was made of it. To train on the images as they are now, remove {out}, "
            "and give a new run.name if there is a run of this name (or run.new_data=true to continue that "
            f"run with them). To train on those from before: shardgan train {out}, or runs/NAME to resume a "
            "run."
        ) from None
    except TakenError:
        size = f" --size {options.size}" if options.size else ""
        raise UserError(
            f"{out} was made of other images, or in another way. To train on {source}, give its shards "
            f"another folder: shardgan prepare {shlex.quote(source)} OUT{size}, then shardgan train OUT. To "
            f"train on what is there: shardgan train {shlex.quote(out)}."
        ) from None


def _index_only(source: str, out: str | None) -> None:
    if out is not None:
        raise click.UsageError("With --index-only give one folder: the index is written beside its shards.")
    context = click.get_current_context()
    others = [
        option.opts[0]
        for option in context.command.params
        if option.name not in ("source", "out", "index_only")
        and context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
    ]
    if others:
        raise click.UsageError(
            f"--index-only lists shards as they are. Leave {' and '.join(others)} out; to make other shards "
            "of these: shardgan prepare SHARDS OUT."
        )
    from pipeline.data.prepare.reindex import build_index

    index = build_index(source, lambda text: click.echo(text, err=True))
    _say(index)


def _say(index: Index) -> None:
    from pipeline.wording import counted, printable

    labels = f" of {counted(index.num_classes, 'class')}" if index.num_classes else ""
    click.echo(
        f"{counted(index.num_samples, 'image')}{labels} in {counted(len(index.shards), 'shard')}: "
        f"{printable(index.where)}"
    )
