"""`shardgan evaluate`: the scores of a finished or interrupted run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from launch.checkpoint import checkpoint_option
from launch.paths import UserPath
from pipeline.config import Config, Score, UserError
from pipeline.data.index import load_index
from pipeline.data.plan import split_of
from pipeline.durable import write
from pipeline.gan.draws import Draws
from pipeline.parallel.launched import Launch
from pipeline.parallel.ranks import Ranks
from pipeline.run.evaluate import evaluate_generator
from pipeline.run.export import load_generator
from pipeline.run.features import Extractor, load_features
from pipeline.run.images import images_of
from pipeline.run.metrics import METRICS
from pipeline.run.references import references, training_images
from pipeline.run.state import State


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
@click.option("--images", type=click.IntRange(min=2), help="Generated and held out; default: as in training.")
@click.option("--train-images", type=click.IntRange(min=2), help="Compare with so many training images too.")
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

    Uses the latents and images of training: with the run's own settings the number equals that in
    metrics.jsonl. The result is added to scores.json in the run folder, with fingerprints of the real images:
    only scores of equal fingerprints can be compared.
    """
    if unknown := [name for name in metrics.split(",") if name not in METRICS]:
        raise UserError(f"--metrics: no metric {unknown[0]!r}. Known: {', '.join(METRICS)}.")
    G, config, state = load_generator(run, checkpoint)
    score = replace(
        config.score,
        metrics=tuple(metrics.split(",")),  # type: ignore[arg-type]  # known ones
        features=features or config.score.features,
        images=images or config.score.images,
        train_images=config.score.train_images if train_images is None else train_images,
    )
    config = replace(config, score=score, data=replace(config.data, train=data or config.data.train))
    if config.data.latents and config.data.decoder is None:
        raise UserError(
            f"{run} was trained on latents without data.decoder, and scores compare images: there are none."
        )
    scores, fingerprints = _scores(G, config, state)
    _show(f"{config.run.name} after {state.cur_nimg / 1000:g} kimg", scores)
    entry = {"cur_nimg": state.cur_nimg, "time": datetime.now(UTC).isoformat(timespec="seconds"), **scores}
    _append(run / "scores.json", entry | {"against": fingerprints})


def _scores(G: nn.Module, config: Config, state: State) -> tuple[dict[str, float], dict[str, str]]:
    data, score = config.data, config.score
    extractor = load_features(score.features)
    assert data.train is not None
    index = load_index(data.train, click.echo, data.remote)
    if (split_of(config, index).training().fingerprint, index.fingerprint) != (state.plan, state.data):
        raise UserError(
            f"{index.where} does not hold what this run was trained on, so images held out now may have been "
            "trained on then. Give the place of the original shards with --data."
        )
    ranks = Ranks(Launch("single", "no", 0, 1), timedelta(seconds=config.run.timeout_s))
    images = images_of(data, ranks.device)
    with _progress(extractor.to(ranks.device), score):
        real = references(config, extractor, index, ranks, images)
        draws = Draws(config.run.seed, config.G.z_dim, state.label_frequencies)
        found = evaluate_generator(G.to(ranks.device), draws, real, extractor, ranks, score.metrics, images)
        return found, real.fingerprints


@contextmanager
def _progress(extractor: Extractor, score: Score) -> Iterator[None]:
    """A bar over the images that may pass through the extractor; cached features need not."""
    columns = (TextColumn("features"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=2 * score.images + training_images(score))
        counting = extractor.register_forward_hook(lambda _m, _i, out: progress.advance(task, len(out)))
        yield
        counting.remove()


def _show(title: str, scores: dict[str, float]) -> None:
    table = Table(title=title)
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, value in scores.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.5f}"
        table.add_row(name.removeprefix("Metrics/"), shown)
    Console().print(table)


def _append(file: Path, entry: dict[str, object]) -> None:
    """Add to the JSON list in `file`, atomically; warn if that fails."""
    try:
        write(file, json.dumps([*_entries(file), entry], indent=1) + "\n")
    except OSError as error:  # another person's run, or one on a read-only disk
        click.echo(f"These scores could not be written to {file}: {error.strerror or error}.", err=True)


def _entries(file: Path) -> list[object]:
    """The list in `file`. A damaged file is kept under another name. Raises OSError."""
    with suppress(ValueError):
        entries = json.loads(file.read_bytes()) if file.exists() else []
        if isinstance(entries, list):
            return entries
    aside = file.with_name(f"{file.stem}.damaged.json")
    file.replace(aside)
    click.echo(f"warning: {file} is damaged. It is kept as {aside}; a new one is written.", err=True)
    return []
