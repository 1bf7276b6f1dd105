"""Training images that cannot be used: each named once, counted over all ranks and restarts of a run."""

from __future__ import annotations

from pipeline.data.stream import too_many_bad
from pipeline.errors import CommonError
from pipeline.parallel.ranks import Ranks
from pipeline.run.report import Report, say


class BadImages:
    """What ranks found so far, each in its own share of the data; they tell each other at ticks and saves."""

    def __init__(self, most: int, known: list[str], ranks: Ranks, report: Report) -> None:
        """known: State.bad, which is added to."""
        self._most, self._known, self._ranks, self._report = most, known, ranks, report
        self._found: list[str] = []

    @property
    def found(self) -> int:
        """By this rank, since the last exchange."""
        return len(self._found)

    @property
    def known(self) -> int:
        return len(self._known)

    def name(self, bad: tuple[str, ...]) -> None:
        """Whatever the rank: each finds its own."""
        for text in bad:
            if text not in self._known:
                self._found.append(text)
                line = f"warning: {text} Another image stands in for it (data.max_bad)."
                self._report.say(line) if self._ranks.main else say(line)

    def exchange(self) -> None:
        """Collective."""
        for found in self._ranks.gather_objects(self._found):
            self._known += [text for text in found if text not in self._known]
        self._found = []

    def check(self) -> None:
        """Raises, on all ranks alike, when there are more than a run may have."""
        if len(self._known) > self._most:
            raise CommonError(str(too_many_bad(len(self._known), self._most, self._known[-1])))
