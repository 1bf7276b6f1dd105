"""Training images that cannot be used: each named once, counted over all ranks and restarts of a run."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.errors import CommonError, UserError
from pipeline.parallel.ranks import Ranks
from pipeline.run.report import Report, say


class BadImages:
    """Those that ranks found so far, each in its part of the data; exchanged at ticks and saves."""

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

    def add(self, bad: Iterable[str]) -> None:
        """What this rank has just met, perhaps not for the first time. Raises UserError for one too many."""
        for text in bad:
            if text not in self._known and text not in self._found:
                self._found.append(text)
                if len(self._known) + len(self._found) > self._most:
                    raise UserError(self._too_many([*self._known, *self._found]))
                line = f"warning: {text} Another image replaces it (data.max_bad)."
                self._report.say(line) if self._ranks.main else say(line)

    def exchange(self) -> None:
        """Collective."""
        for found in self._ranks.gather_objects(self._found):
            self._known += [text for text in found if text not in self._known]
        self._found = []

    def check(self) -> None:
        """Raises CommonError, on all ranks alike, if there are more than a run may have."""
        if len(self._known) > self._most:
            raise CommonError(self._too_many(self._known))

    def _too_many(self, bad: list[str]) -> str:
        count, most = len(bad), self._most
        return f"{count} images cannot be used, more than data.max_bad={most}. The last one: {bad[-1]}"
