"""The flags that travel with every update: answered an update later, and for the phase they were sent in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.run.flags import Flags


class Around:
    """What flags are of and go to; `events` is what is sent, waited for and heard."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.signals: Any = SimpleNamespace(received=None)
        self.saver: Any = SimpleNamespace(steps=0, flags=(True, False), advance=self._advance)
        self._sent = 0
        ranks: Any = SimpleNamespace(poll_any=self._poll)
        self.exchange = Flags(ranks, self.signals, self.saver, self.events.extend).exchange

    def _poll(self, *flags: bool) -> Any:
        self._sent += 1
        number = self._sent
        self.events.append(f"ask {number}")

        def answer() -> list[bool]:
            self.events.append(f"wait {number}")
            return list(flags)

        return answer

    def _advance(self, busy: bool, failed: bool) -> str | None:
        self.events.append(f"busy {busy}")
        if not busy:
            self.saver.steps += 1
        return "disk full" if failed else None


@pytest.fixture
def around() -> Any:
    return Around()


def test_an_answer_is_waited_for_only_after_the_next_update_is_under_way(around):
    stopped = []
    for update in range(1, 4):
        if update == 2:
            around.signals.received = "on SIGTERM"
        asked_to_stop = around.exchange()
        around.events.append(f"update {update}")
        stopped.append(asked_to_stop())
    assert stopped == [False, False, True]  # the signal before the second update ends the third
    assert around.events == [
        *("ask 1", "update 1"),
        *("ask 2", "update 2", "wait 1", "busy True"),
        *("ask 3", "update 3", "wait 2", "busy True"),
    ]


def test_flags_of_a_phase_that_has_ended_decide_nothing(around):
    """Sent while the last save was being written; what is written when they arrive is another."""
    around.saver.flags = (False, False)
    around.exchange()()
    heard = around.exchange()
    around.saver.steps += 1  # as `save` does between two updates
    around.events.clear()
    assert heard() is False
    assert around.events == ["wait 1"]
    around.saver.flags = (False, True)
    around.exchange()()  # hears the second, of the old phase too
    around.events.clear()
    assert around.exchange()() is False
    assert around.events == ["ask 4", "wait 3", "busy False", "disk full"]
