"""Which checkpoint is the best."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

from pipeline.run import scorer
from pipeline.run.scorer import Scorer
from pipeline.run.state import State


def is_best(state: State, metrics: list[str], **scores: float) -> tuple[bool, object]:
    """And what the score was compared with."""
    health = Mock()
    config = SimpleNamespace(score=SimpleNamespace(metrics=metrics))
    judge = Scorer(config, Path(), *[Mock()] * 4, health, Mock())  # type: ignore[arg-type]
    better = judge.is_best(state, {f"Metrics/{name}_efflite0": value for name, value in scores.items()})
    return better, health.compare_score.call_args.args[2]


def test_all_ranks_go_by_the_scores_of_one(monkeypatch, tmp_path):
    """GPUs may differ in the last bits, and what is best is saved by all of them together."""

    def from_main(make: Callable[[], dict[str, float] | None]) -> dict[str, object] | None:
        made = make()
        return made and {"from": "rank 0", **made}

    for name in ("load_features", "references", "keep_to", "made_at_once"):
        monkeypatch.setattr(scorer, name, Mock())
    monkeypatch.setattr(scorer, "evaluate_generator", lambda *_: {"Metrics/kid_efflite0": 0.3})
    ranks = SimpleNamespace(device="cpu", broadcast_from_main=from_main)
    monkeypatch.setattr(scorer, "keep_to", lambda *_: None)
    mine = Scorer(Mock(), tmp_path, Mock(), ranks, *[Mock()] * 4)  # type: ignore[arg-type]
    assert mine.evaluate(Mock()) == {"from": "rank 0", "Metrics/kid_efflite0": 0.3}


def test_scores_of_one_metric_are_compared():
    """score.metrics may change from one start to the next."""
    state = State(cur_nimg=100)
    assert is_best(state, ["kid"], kid=0.3) == (True, None)
    state.cur_nimg = 200
    assert is_best(state, ["kid"], kid=0.4) == (False, (0.3, 100))
    assert is_best(state, ["fd", "kid"], fd=40.0, kid=0.2) == (True, None)
    assert is_best(state, ["fd", "kid"], fd=41.0, kid=0.1) == (False, (40.0, 200))
    assert is_best(state, ["kid"], kid=0.5) == (True, None)
    older = State(cur_nimg=300, best=(0.2, 100))  # which did not note the metric
    assert is_best(older, ["kid"], kid=0.3) == (False, (0.2, 100))
