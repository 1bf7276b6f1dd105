"""The parts of the GPU suite. Nothing is imported that a part could lack: a part fails by itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from exact import killed_rank, parity, precision, resume, resume_ranks
from files import loader, saves
from machine import Outcome, surroundings
from updates import COMPILED, compiled, compiled_exact, memory, no_waits, speed, step

Part = Callable[[], Outcome]

# In order of importance: what does not fit into the time is left for the next call.
PARTS: dict[str, Part] = {
    "surroundings": surroundings,
    "parity-single": partial(parity, "single"),
    "no-waits": no_waits,
    "resume": resume,
    "step": step,
    "speed": speed,
    "precision-bf16": partial(precision, "bf16"),
    "precision-fp16": partial(precision, "fp16"),
    **{f"parity-{s}": partial(parity, s) for s in ("ddp", "fsdp2", "zero3", "zero2", "zero1", "hsdp")},
    **{f"resume-{s}": partial(resume_ranks, s) for s in ("fsdp2", "zero2")},
    **{f"compiled-{name}": partial(compiled, name) for name in COMPILED},
    "compiled-exact": compiled_exact,
    "killed-rank": killed_rank,
    "memory": memory,
    "saves": saves,
    "loader": loader,
}
