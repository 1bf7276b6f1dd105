"""`python training_pairs.py COUNT CONFIG [key=value …]`: COUNT times, two trainings of one name at once.

Forked from one process that has imported everything, so that they reach the lock at about the same moment.
Prints a line for each pair, its exit statuses; what they say is in NAME-0.log and NAME-1.log.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch._dynamo  # noqa: F401  # which an optimizer imports

from pipeline import train
from pipeline.console import end_process


def start(name: str, number: int, gate: int, arguments: list[str]) -> int:
    """A child that trains as soon as the pipe `gate` is closed; its pid."""
    if pid := os.fork():
        return pid
    log = os.open(f"{name}-{number}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.read(gate, 1)
    return end_process(train.main([*arguments, f"run.name={name}"]))


def pair(name: str, arguments: list[str]) -> list[int]:
    gate, opener = os.pipe()
    os.set_inheritable(opener, False)
    children = [start(name, number, gate, arguments) for number in range(2)]
    os.write(opener, b"go")
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.close(opener)
    os.close(gate)
    return statuses


if __name__ == "__main__":
    Path("runs").mkdir(exist_ok=True)
    for n in range(int(sys.argv[1])):
        print(*sorted(pair(f"pair-{n}", sys.argv[2:])), flush=True)
