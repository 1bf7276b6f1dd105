"""What `shardgan doctor` checks, a job, and what it prints, findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.processes import shards
from pipeline.config import Config
from pipeline.wording import counted

Verdict = Literal["ok", "warning", "would fail"]


@dataclass(frozen=True)
class Machine:
    """What is known of the nodes and GPUs of a job; None: not said, and not measured."""

    flops: float | None = None  # per second and GPU, as training reaches them
    bandwidth: float | None = None  # bytes per second that a GPU sends to others of its node
    network: float | None = None  # bytes per second that a node sends to others
    gpu_memory: int | None = None  # bytes
    remote: bool = False  # this machine is none of them


@dataclass(frozen=True)
class Job:
    """A training on `gpus` processes on each of `nodes` machines."""

    config: Config
    nodes: int
    gpus: int
    strategy: str
    precision: str
    machine: Machine = Machine()
    compiled: bool = False

    @property
    def world(self) -> int:
        return self.nodes * self.gpus

    @property
    def shards(self) -> int:
        """Ranks that share one copy of a sharded player. Raises UserError if hsdp cannot divide the world."""
        return shards(self.strategy, self.world, self.gpus) or self.world


@dataclass(frozen=True)
class Finding:
    """One row of the table: what was checked, what was found, and what to do about it."""

    check: str
    verdict: Verdict
    text: str
    remedy: str = ""


def ok(check: str, text: str) -> Finding:
    return Finding(check, "ok", text)


def warning(check: str, text: str, remedy: str = "") -> Finding:
    """remedy: empty if the text says what to do."""
    return Finding(check, "warning", text, remedy)


def would_fail(check: str, text: str, remedy: str = "") -> Finding:
    """remedy: empty if the text, which the run itself would end with, says what to do."""
    return Finding(check, "would fail", text, remedy)


def some(lines: Sequence[str], most: int = 5) -> str:
    more = [f"… and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join([*lines[:most], *more])


def fails(found: Sequence[Finding]) -> bool:
    return any(finding.verdict == "would fail" for finding in found)


def show(found: Sequence[Finding], console: Console, more: Table | None = None) -> None:
    """Print the findings as a table, then another, and how many of the findings matter."""
    styles = {"ok": "green", "warning": "yellow", "would fail": "bold red"}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("found, and → what to do", overflow="fold")
    for finding in found:
        text = Text(finding.text)
        if finding.remedy:
            text.append(f"\n→ {finding.remedy}", "bold")
        table.add_row(finding.check, Text(finding.verdict, styles[finding.verdict]), text)
    console.print(table)
    if more is not None:
        console.print()
        console.print(more)
    outcome = "This would fail." if fails(found) else "Nothing found that would fail."
    if warnings := sum(finding.verdict == "warning" for finding in found):
        outcome += f" {counted(warnings, 'warning')}."
    console.print(f"\n{outcome}", markup=False, highlight=False)
