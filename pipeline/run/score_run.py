"""Scores of a finished or interrupted run, added to its scores.json."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

from torch import nn

from pipeline.config import Config, Score, UserError
from pipeline.data.index import Index, load_index
from pipeline.data.plan import split_of
from pipeline.gan.draws import Draws
from pipeline.parallel.launched import Launch
from pipeline.parallel.ranks import Ranks
from pipeline.run.checkpoint import Wanted
from pipeline.run.evaluate import evaluate_generator
from pipeline.run.evaluations import add
from pipeline.run.export import load_generator
from pipeline.run.features import Extractor, load_features
from pipeline.run.images import images_of, made_at_once
from pipeline.run.metrics import METRICS
from pipeline.run.references import references
from pipeline.run.report import say
from pipeline.run.state import State

Shown = Callable[[Extractor, Score], AbstractContextManager[object]]
"""Around the work: shows how far it is."""

_MOVED = " If the run's data were moved, say where they are: --data SHARDS, or data=SHARDS in Python."


def score_run(
    run: Path,
    metrics: Sequence[str] = ("kid",),
    *,
    features: str | None = None,
    images: int | None = None,
    train_images: int | None = None,
    data: str | None = None,
    checkpoint: Wanted = "newest",
    shown: Shown = lambda _extractor, _score: nullcontext(),
) -> tuple[dict[str, float], int]:
    """Scores of G_ema by chart name, and the cur_nimg they are of; added to scores.json in the run folder.

    Uses the latents and images of training: with the run's own settings a score equals that in metrics.jsonl.

    Args:
        metrics: of `METRICS`.
        features, images, train_images: in place of the run's own `score` settings.
        data: where the run's data are now, if they were moved.
        checkpoint: see `load_run`.

    Raises UserError as `load_run` does, for counts below 2, and if the data are not there or others than
    those of training.
    """
    metrics = [name.strip() for name in metrics]
    if not metrics:
        raise UserError(f"Which metrics? There are {', '.join(METRICS)}.")
    if unknown := [name for name in metrics if name not in METRICS]:
        raise UserError(f"There is no metric {unknown[0]!r}. Known: {', '.join(METRICS)}.")
    _check_counts(images, train_images)
    G, config, state = load_generator(run, checkpoint)
    score = replace(
        config.score,
        metrics=tuple(metrics),  # type: ignore[arg-type]  # known ones
        features=features or config.score.features,
        images=config.score.images if images is None else images,
        train_images=config.score.train_images if train_images is None else train_images,
    )
    config = replace(config, score=score, data=replace(config.data, train=data or config.data.train))
    if config.data.latents and config.data.decoder is None:
        raise UserError(
            f"{run} was trained on latents without data.decoder, and scores compare images: there are none."
        )
    try:
        index = load_index(cast(str, config.data.train), say, config.data.remote)
    except UserError as error:
        raise UserError(f"{error}{'' if data else _MOVED}") from None
    scores, fingerprints = _scores(G, config, state, index, shown)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"cur_nimg": state.cur_nimg, "time": now, **scores, "against": fingerprints}
    add(run, entry, say, _warn)
    return scores, state.cur_nimg


def _check_counts(images: int | None, train_images: int | None) -> None:
    """train_images: 0 means none, as in the config."""
    for name, count in (("images", images), ("train_images", train_images or None)):
        if count is not None and count < 2:
            raise UserError(f"{name}={count}: scores compare at least 2 images. Leave it out for the run's.")


def _scores(
    G: nn.Module, config: Config, state: State, index: Index, shown: Shown
) -> tuple[dict[str, float], dict[str, str]]:
    data, score = config.data, config.score
    extractor = load_features(score.features)
    if (split_of(config, index).training().fingerprint, index.fingerprint) != (state.plan, state.data):
        raise UserError(
            f"{index.where} does not hold what this run was trained on, so images held out now may have been "
            "trained on then. Give the place of the original shards: --data SHARDS, or data=SHARDS in Python."
        )
    ranks = Ranks(Launch("single", "no", 0, 1), timedelta(seconds=config.run.timeout_s))
    images = images_of(data, ranks.device)
    with shown(extractor.to(ranks.device), score):
        real = references(config, extractor, index, ranks, images)
        draws = Draws(config.run.seed, config.G.z_dim, state.label_frequencies)
        scored = G.to(ranks.device), draws, real, extractor, ranks, score.metrics, images
        found = evaluate_generator(*scored, made_at_once(data.size, data.batch_gpu))
        return found, real.fingerprints


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
