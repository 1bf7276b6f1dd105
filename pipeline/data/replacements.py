"""Stand-ins for the few images of a large set that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pipeline.data.index import Index
from pipeline.data.plan import Plan
from pipeline.data.reader import BadSampleError, Reader, Sample

_T = TypeVar("_T")
_TRIES = 16  # stand-ins that may be bad themselves


class Replacements:
    """Puts another sample of the plan in the place of a bad one, the same one on every run.

    One per worker, shared by the stages that may find a sample to be bad; what they found is kept until
    `found` is asked for it.
    """

    def __init__(self, index: Index, plan: Plan) -> None:
        self._index, self._plan = index, plan
        self._found: list[str] = []

    def replace(self, position: int, error: BadSampleError, use: Callable[[Sample], _T]) -> _T:
        """`use` of the first stand-in for `position` that can be used. Raises `error` if none can."""
        self._found.append(str(error))
        reader = Reader(self._index, self._plan.window)
        try:
            for attempt in range(_TRIES):
                shard, row = self._plan.replacement(position, attempt)
                try:
                    return use(reader.read(shard, row))
                except BadSampleError as another:
                    self._found.append(str(another))
        finally:
            reader.close()
        raise error

    def found(self) -> tuple[str, ...]:
        """What was wrong with the samples replaced since the last call, each naming shard and sample."""
        found, self._found = tuple(self._found), []
        return found
