"""`shardgan evaluate`: the scores of a finished or interrupted run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from launch.checkpoint import checkpoint_option
from launch.paths import UserPath
from pipeline.config import Score
from pipeline.run.evaluate import FULL
from pipeline.run.features import Extractor
from pipeline.run.metrics import METRICS
from pipeline.run.references import training_images
from pipeline.run.score_run import score_run
from pipeline.wording import in_kimg


@click.command()
@click.argument("run", type=UserPath())
@click.option(
    "--metrics",
    default="kid",
    show_default=True,
    help=f"Separated by commas, of: {'; '.join(f'{name}, {m.help}' for name, m in METRICS.items())}.",
)
@click.option(
    "--features", metavar="NAME", help="efflite0, inception:PATH, module:Class; default: the run's."
)
@click.option(
    "--images",
    type=click.IntRange(min=2),
    help="The number of images, generated and held out alike. Default: score.images.",
)
@click.option(
    "--train-images", type=click.IntRange(min=2), help="Compare with this many training images too."
)
@click.option("--data", metavar="SHARDS", help="Where the run's data are now, if they were moved.")
@checkpoint_option
def evaluate(
    run: Path,
    metrics: str,
    features: str | None,
    images: int | None,
    train_images: int | None,
    data: str | None,
    checkpoint: str,
) -> None:
    """Score the moving average of G in the run folder RUN against held-out (and training) images.

    Uses the same latents and images as scores during training: with the run's own settings the result
    equals that in metrics.jsonl. It is added to scores.json in the run folder, with fingerprints of the
    real images: only scores with equal fingerprints can be compared.
    """
    scores, cur_nimg = score_run(
        run,
        metrics.split(","),
        features=features,
        images=images,
        train_images=train_images,
        data=data,
        checkpoint=checkpoint,
        shown=_progress,
    )
    _show(f"{run.absolute().name} after {in_kimg(cur_nimg / 1000)} kimg", scores)


@contextmanager
def _progress(extractor: Extractor, score: Score) -> Iterator[None]:
    """A bar over the images that may pass through the extractor; cached features need not.

    Whether fid50k_full follows is known only once all others have passed.
    """
    columns = (TextColumn("features"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("", total=2 * score.images + training_images(score))

        def count(_module: object, _inputs: object, features: Tensor) -> None:
            progress.advance(task, len(features))
            if progress.tasks[task].completed > (total := progress.tasks[task].total or 0):
                progress.update(task, total=total + FULL)

        counting = extractor.register_forward_hook(count)
        yield
        counting.remove()


def _show(title: str, scores: dict[str, float]) -> None:
    table = Table(title=Text(title))
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, value in scores.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.5f}"
        table.add_row(name.removeprefix("Metrics/"), shown)
    Console().print(table)
