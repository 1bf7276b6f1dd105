"""Whether and how to compile: read from the environment that the launcher set up, and checked."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.parallel.environment import flag

REDUCE_OVERHEAD = "reduce-overhead"
_BACKENDS = ("inductor", "aot_eager", "eager")  # the others: to find what one of its stages does wrong
_STAYING = ("single", "ddp", "zero1", "zero2")  # whose weights do not move in memory


@dataclass(frozen=True)
class Compilation:
    """How networks are compiled."""

    backend: str  # torch's name
    graphs: bool = False  # CUDA graphs

    def __str__(self) -> str:
        return f"compiled by {self.backend}{', CUDA graphs' * self.graphs}"


def read_compilation(env: Mapping[str, str]) -> Compilation | None:
    """What `accelerate launch --dynamo_backend` set; None if nothing. Raises UserError for what we lack."""
    backend = env.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    mode = env.get("ACCELERATE_DYNAMO_MODE", "default").lower()
    if backend == "no":
        return None
    if backend not in _BACKENDS:
        raise UserError(f"--dynamo_backend {backend} is not one of no, {', '.join(_BACKENDS)}.")
    if flag(env, "ACCELERATE_DYNAMO_USE_DYNAMIC"):
        raise UserError("--dynamo_use_dynamic: all shapes of a training are fixed. Leave it out.")
    if mode == "max-autotune":
        raise UserError(
            "--dynamo_mode max-autotune chooses kernels by timing them: a resumed run would not end with the "
            f"bits of an unbroken one. Use default or {REDUCE_OVERHEAD}."
        )
    if mode not in ("default", REDUCE_OVERHEAD):
        raise UserError(f"--dynamo_mode {mode} is not one of default, {REDUCE_OVERHEAD}.")
    if mode == REDUCE_OVERHEAD and backend != "inductor":
        raise UserError(f"--dynamo_mode {mode}: CUDA graphs need --dynamo_backend inductor, not {backend}.")
    return Compilation(backend, graphs=mode == REDUCE_OVERHEAD)


def check_compilation(wanted: Compilation | None, strategy: str, rounds: int, on_gpu: bool) -> None:
    """Raises UserError for what cannot be compiled so, or on this machine. rounds: per update."""
    if wanted is None:
        return
    check_compiled(strategy)
    reasons = {
        "need a GPU": not on_gpu,
        f"need weights that stay where they are: {', '.join(_STAYING)}": strategy not in _STAYING,
        "need an update in one round: leave out data.batch_gpu": rounds > 1,
    }
    for reason in (text for text, holds in reasons.items() if wanted.graphs and holds):
        raise UserError(f"--dynamo_mode {REDUCE_OVERHEAD}: CUDA graphs {reason}, or --dynamo_mode default.")
    if wanted.backend == "inductor" and (missing := _missing(on_gpu)):
        raise UserError(f"Compiling needs {missing}. Install it, or train without --compile.")


def check_compiled(strategy: str | None) -> None:
    """Raises UserError for a strategy under which nothing can be compiled."""
    if strategy == "zero3":
        raise UserError(
            "zero3 cannot be compiled: DeepSpeed gathers each layer by itself, and compiled code would end "
            "before every one. Train under fsdp2, zero1 or zero2, or without compiling."
        )


def _missing(on_gpu: bool) -> str | None:
    """What inductor needs and does not find."""
    variable, names = ("CC", ("gcc", "clang")) if on_gpu else ("CXX", ("g++",))
    wanted = [os.environ[variable]] if os.environ.get(variable) else names
    if not any(shutil.which(name) for name in wanted):
        return f"a C{'++' * (not on_gpu)} compiler, and there is no {' or '.join(wanted)} here"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's C headers (Python.h), which are not installed here: often a package python3-dev"
    return None
