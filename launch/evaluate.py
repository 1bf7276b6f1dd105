"""`shardgan evaluate`: the scores of a finished or interrupted run, from its newest checkpoint."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.config import UserError

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.run.state import State

METRICS = ("kid",)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--metrics", default="kid", show_default=True, help=f"Of {', '.join(METRICS)}, commas between.")
@click.option("--features", metavar="NAME", help="Compared by these features; default: the run's own.")
@click.option("--images", type=click.IntRange(min=2), help="Of each kind; default: as in training.")
@click.option("--data", metavar="SHARDS", help="Where the run's data lie now, if they were moved.")
def evaluate(run: Path, metrics: str, features: str | None, images: int | None, data: str | None) -> None:
    """Score the moving average of G in the run folder RUN against held-out images.

    Same latents, same images as in training: with the run's own settings it gives the number that stands in
    metrics.jsonl. The result is added to scores.json in the run folder.
    """
    from pipeline.run.export import load_run

    if unknown := [name for name in metrics.split(",") if name not in METRICS]:
        raise UserError(f"--metrics: no metric {unknown[0]!r}. Known: {', '.join(METRICS)}.")
    settings, _, state = load_run(run)
    score = replace(
        settings.score, features=features or settings.score.features, images=images or settings.score.images
    )
    settings = replace(settings, score=score, data=replace(settings.data, train=data or settings.data.train))
    scores = _scores(run, settings, state)
    _show(f"{settings.run.name} after {state.cur_nimg / 1000:g} kimg", scores)
    entry = {"cur_nimg": state.cur_nimg, "time": datetime.now(UTC).isoformat(timespec="seconds"), **scores}
    _append(run / "scores.json", entry)


def _scores(run: Path, settings: Config, state: State) -> dict[str, float]:
    from pipeline.data.index import load_index
    from pipeline.data.plan import heldout_plan, training_plan
    from pipeline.gan.draws import Draws
    from pipeline.parallel.ranks import Ranks, read_launch
    from pipeline.run.evaluate import evaluate, fixed_images, heldout_features
    from pipeline.run.export import load_generator
    from pipeline.run.features import load_features

    extractor = load_features(settings.score.features)
    data = settings.data
    assert data.train is not None
    index = load_index(data.train, click.echo, data.remote)
    split = (index.sizes, settings.run.seed, data.window, data.holdout, data.folds, data.fold)
    if training_plan(*split).fingerprint != state.plan:
        raise UserError(
            f"{index.where} does not hold what this run was trained on, so images held out now may have been "
            "trained on then. Give the place of the original shards with --data."
        )
    ranks = Ranks(read_launch(), timedelta(seconds=settings.run.timeout_s))
    real = heldout_features(
        extractor.to(ranks.device), index, heldout_plan(*split), ranks, data, settings.score.images
    )
    G, _ = load_generator(run)
    draws = Draws(settings.run.seed, settings.G.z_dim, state.label_frequencies)
    fakes = fixed_images(G.to(ranks.device), draws, len(real), ranks.device)
    return evaluate(fakes, real, extractor, ranks)


def _show(title: str, scores: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, value in scores.items():
        table.add_row(
            name.removeprefix("Metrics/"), f"{value:,}" if isinstance(value, int) else f"{value:.5f}"
        )
    Console().print(table)


def _append(file: Path, entry: dict[str, object]) -> None:
    """One more line of the JSON list in `file`, which is whole at any moment."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        entries = json.loads(file.read_text()) if file.exists() else []
        if not isinstance(entries, list):
            raise ValueError("not a list")
        partial.write_text(json.dumps([*entries, entry], indent=1) + "\n")
        partial.replace(file)
    except (OSError, ValueError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"The scores could not be added to {file}: {error}") from None
