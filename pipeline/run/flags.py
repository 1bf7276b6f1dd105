"""What ranks send each other with every update: who was asked to stop, and how their saves get on."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.parallel.ranks import Ranks
from pipeline.run.saving import Saver
from pipeline.run.stop import StopSignals


class Flags:
    """Heard an update later: a rank that is late by less than an update keeps no other waiting."""

    def __init__(
        self, ranks: Ranks, signals: StopSignals, saver: Saver, heed: Callable[[list[str]], None]
    ) -> None:
        """heed: called with the complaints of a save that failed."""
        self._ranks, self._signals, self._saver, self._heed = ranks, signals, saver, heed
        self._sent: Callable[[], bool] | None = None  # with the update before

    def exchange(self) -> Callable[[], bool]:
        """Send this rank's flags. The result waits for those of all ranks that were sent with the update
        before, moves the save on, and returns whether any rank had been asked to stop."""
        step = self._saver.steps
        answer = self._ranks.poll_any(self._signals.received is not None, *self._saver.flags)

        def stopping() -> bool:
            stop, busy, failed = answer()
            if step == self._saver.steps:  # else the flags are of a phase that has ended since
                complaint = self._saver.advance(busy, failed)
                self._heed([complaint] if complaint else [])
            return stop

        before, self._sent = self._sent, stopping
        return before or (lambda: False)
