"""Which strategies and worlds the tests of this folder launch, and how."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import processes, selfcheck
from launch.selfcheck.parity import FAMILIES, OBJECTIVE, THOROUGH, Case

HERE = Path(__file__).parent

# "strategy-world", in the order in which they are launched, two at a time; not the longest last.
LAUNCHES = (
    "single-1", "fsdp2-2", "zero3-2", "ddp-2", "hsdp-4", "zero2-2", "zero1-2", "fsdp2-3", "ddp-3",
)  # fmt: skip
LONG = ("zero3-3", "zero2-3", "zero1-3", "ddp-1", "fsdp2-1", "zero1-1", "zero2-1", "zero3-1")
EVERYWHERE = (*((name, ()) for name in LAUNCHES), *((name, (pytest.mark.long,)) for name in LONG))
TWO_BY_TWO = frozenset((  # what four ranks train by default: two copies, each on two of them
    "sgd-l1l2-clipped-2", "adam-l2-clipped-2", "r1-clipped", "spectral", "frozen", "effective", "freeze",
    "sync-batch-r1", "r3gan",
))  # fmt: skip
FEW = ("single-1", "ddp-2", "fsdp2-2", "zero3-2")  # where the objective's and families' cases are trained


def launched_in(*worlds: int, strategies: tuple[str, ...] = processes.STRATEGIES) -> list:
    """The launches of these worlds and strategies, as parameters of a test."""
    chosen = [f"{strategy}-{world}" for strategy in strategies for world in worlds]
    return [pytest.param(name, marks=marks) for name, marks in EVERYWHERE if name in chosen]


LAUNCHED = launched_in(1, 2, 3, 4)
SEVERAL = launched_in(2, 3, 4)


def marks_of(name: str, case: Case) -> tuple[pytest.MarkDecorator, ...]:
    """Of a case of the parity matrix under "strategy-world"."""
    if name == "hsdp-4":
        return () if case.name in TWO_BY_TWO else (pytest.mark.long,)
    long = name in LONG or case.name in THOROUGH or (case.name in OBJECTIVE | FAMILIES and name not in FEW)
    return (pytest.mark.long,) if long else ()


def before(name: str) -> str | None:
    """The launch whose checkpoints this one continues: not the one that it runs beside, but one earlier."""
    order = (*LAUNCHES, *LONG)
    return order[max(0, order.index(name) - 2)] if name != order[0] else None


def run(name: str, module: list[str], deepspeed: Path | None = None) -> None:
    """Run a module of this folder, or one of the package, under "strategy-world"."""
    strategy, world = name.rsplit("-", 1)
    path = f"{HERE.parents[1]}:{HERE.parent}:{HERE}"
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    deepspeed = deepspeed or selfcheck.PARTITION_ALL.get(strategy)
    ended = processes.launch(
        strategy, int(world), module, on_cpu=True, deepspeed=deepspeed, environment=environment
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
