"""A small selection, and trials that look finished without having been trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from launching import FASHION

from launch.select import candidates as select_candidates
from launch.select import trials as select_trials
from launch.select.choice import PAIRED, Outcome, Row, ScoreTable
from launch.select.trials import Trial
from pipeline import config
from pipeline.config import Config

CONFIG = f"""
run: {{total_kimg: 0.064, tick_kimg: 0.016, checkpoint_kimg: 0.016, eval_kimg: 1}}
data: {{train: {FASHION}, size: 28, channels: 1, batch_size: 16, workers: 0}}
G: {{width: 8, norm: none, z_dim: 16}}
D: {{width: 8, norm: none}}
score: {{images: 16}}
track: {{wandb: false}}
"""


def selection(
    folder: Path, *settings: str, grid: Sequence[str] = ("penalty.l2=0,1",), folds: int = 2, seeds: int = 1
) -> tuple[Config, list[Trial]]:
    """Base config and trials of a selection called `mine` in `folder`."""
    (folder / "job.yaml").write_text(CONFIG)
    common = [f"run.out={folder}", "run.name=mine", *settings]
    return select_trials.trials(str(folder / "job.yaml"), common, select_candidates.grid(grid), folds, seeds)


def table_of(
    trials: Sequence[Trial], scores: Sequence[Sequence[float | None]], rule: str = PAIRED
) -> ScoreTable:
    """One list of scores per arm, trial by trial. None: it failed; fewer scores: the rest is to come."""
    rows = []
    for arm, values in zip(dict.fromkeys(t.arm for t in trials), scores, strict=True):
        mine = [t for t in trials if t.arm == arm]
        done = [(t, v) for t, v in zip(mine, values, strict=False)]
        outcomes = [Outcome(t, v, {}, 1.0) for t, v in done if v is not None]
        failures = {t.name: "exit status 1" for t, v in done if v is None}
        rows.append(Row(arm, outcomes, failures, [t.name for t in mine[len(values) :]]))
    return ScoreTable("kid_efflite0", rows, rule)


def finish(trial: Trial, score: float = 1.0, cur_nimg: int = 64, name: str = "kid_efflite0") -> None:
    """What a trial leaves that has ended well."""
    trial.folder.mkdir(parents=True, exist_ok=True)
    (trial.folder / "config.yaml").write_text(config.dump(trial.config))
    (trial.folder / "DONE").write_text(f"{cur_nimg}\n")
    row = {"cur_nimg": cur_nimg, f"Metrics/{name}": score}
    (trial.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")


def refer(trial: Trial, about: Mapping[str, object]) -> None:
    """What its score is against."""
    (trial.folder / "reference.json").write_text(json.dumps({"heldout": about}))


def score_along(trial: Trial, scores: Mapping[int, float], name: str = "kid_efflite0") -> None:
    """Finish a trial with these scores: cur_nimg → score."""
    finish(trial, cur_nimg=max(scores))
    rows = ({"cur_nimg": cur_nimg, f"Metrics/{name}": score} for cur_nimg, score in scores.items())
    (trial.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
