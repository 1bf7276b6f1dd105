"""What `shardgan doctor` is asked about (a job) and what it says (findings)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.config import Config

Verdict = Literal["ok", "warning", "would fail"]


@dataclass(frozen=True)
class Job:
    """A training that is to run on `gpus` processes on each of `nodes` machines."""

    config: Config
    nodes: int
    gpus: int
    strategy: str
    precision: str

    @property
    def world(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Finding:
    """One row of the table: what was looked at, what was found there, and what to do about it."""

    check: str
    verdict: Verdict
    text: str
    remedy: str = ""


def ok(check: str, text: str) -> Finding:
    return Finding(check, "ok", text)


def warning(check: str, text: str, remedy: str) -> Finding:
    return Finding(check, "warning", text, remedy)


def would_fail(check: str, text: str, remedy: str = "") -> Finding:
    """remedy: empty where the text, a message that the run itself would end with, says what to do."""
    return Finding(check, "would fail", text, remedy)


def some(lines: Sequence[str], most: int = 5) -> str:
    """A few of many lines."""
    more = [f"… and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join([*lines[:most], *more])
