"""The rhythm of a run, with updates and reports that take no time."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import loop
from pipeline.run.flags import Flags
from pipeline.run.state import State

BATCH = 32


class Around:
    """A session whose flags are answered as those of a run; `events` is what it did."""

    new_best = False

    def __init__(self, stop_in: int) -> None:
        """stop_in: a signal comes while the network of so many images is scored."""
        self.events: list[str] = []
        self._stop_in, self._signals = stop_in, SimpleNamespace(received=None)
        saver = SimpleNamespace(steps=0, flags=(False, False), advance=lambda busy, failed: None)
        ranks = SimpleNamespace(poll_any=lambda *flags: lambda: list(flags))
        self.exchange = Flags(ranks, self._signals, saver, lambda _: None).exchange  # type: ignore[arg-type]
        self.clock = SimpleNamespace(start=lambda _: None)
        self.updating, self.state = nullcontext, State()

    def begin(self, *_: object, **__: object) -> bool:
        return True

    def timed(self, reals: Any) -> Any:
        return reals

    def evaluate(self, _: object) -> dict[str, float] | None:
        self.events.append(f"score {self.state.cur_nimg}")
        if self.state.cur_nimg == self._stop_in:
            self._signals.received = "on SIGTERM"
        return {} if self._signals.received is None else None

    def save(self, *_: object) -> None:
        self.events.append(f"save {self.state.cur_nimg}")

    def tick(self, *_: object) -> None: ...
    def snapshot(self, *_: object) -> None: ...
    def advance(self, _: object) -> None: ...
    def finish_saves(self) -> None: ...


def trained(
    monkeypatch: pytest.MonkeyPatch, stop_in: int, start: State | None = None
) -> tuple[list[str], bool]:
    """Up to three updates, each of them scored, with a save at the end."""
    monkeypatch.setattr(loop, "train_step", lambda _gan, _reals, before, _stats: before + BATCH)
    every = BATCH / 1000
    kimgs = {"eval_kimg": every, "tick_kimg": every, "snapshot_kimg": every, "checkpoint_kimg": 1000.0}
    run: Any = SimpleNamespace(total_kimg=3 * every, **kimgs)
    around: Any = Around(stop_in)
    around.state = start or around.state
    nothing: Any = None
    return around.events, loop.train(nothing, nothing, around.state, nothing, run, around)


def test_a_run_is_scored_and_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trained(monkeypatch, 0) == (["score 32", "score 64", "score 96", "save 96"], True)


@pytest.mark.parametrize("updates", [2, 3])
def test_a_stop_in_a_score_is_heard_at_once(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    """All ranks know of it by then; to score or save again would take of run.grace."""
    events, completed = trained(monkeypatch, updates * BATCH)
    scores = [f"score {BATCH * update}" for update in range(1, updates + 1)]
    assert (events, completed) == ([*scores, f"save {updates * BATCH}"], False)


def test_a_run_whose_total_was_lowered_ends_as_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stopped where nothing was due, behind what is now its end: one update more, scored and saved."""
    state = State(cur_nimg=10 * BATCH, reported=10 * BATCH)
    assert trained(monkeypatch, 0, state) == ([f"score {11 * BATCH}", f"save {11 * BATCH}"], True)
    assert state.ended == 11 * BATCH
    assert trained(monkeypatch, 0, state) == ([], True), "once"


def test_a_run_may_be_stopped_in_its_last_score(monkeypatch: pytest.MonkeyPatch) -> None:
    state = State()
    assert not trained(monkeypatch, 3 * BATCH, state)[1]
    assert trained(monkeypatch, 0, state) == ([f"score {3 * BATCH}", f"save {3 * BATCH}"], True)
