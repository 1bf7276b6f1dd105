"""Doctor's checks of the shell, folder and machine that a training is started in."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launch.doctor.finding import Finding, Job, ok, some, warning, would_fail
from launch.processes import environment_of, notes
from pipeline.api import shadows
from pipeline.config import UserError
from pipeline.folders import socket_folder


def examine(job: Job) -> list[Finding]:
    return [*variables(job), *modules(), *workers(job)]


def variables(job: Job) -> Iterator[Finding]:
    """Of other launchers, or with unusable values."""
    try:
        environment_of(1 if job.machine.remote else job.gpus, on_cpu=False)
    except UserError as error:
        yield would_fail("variables", str(error))
    for note in notes():
        yield warning("variables", note, "Unset them, unless you mean it.")


def modules() -> Iterator[Finding]:
    """Files that `python -m` and `accelerate launch`, called here, would import as modules."""
    here = str(Path.cwd())
    if found := shadows.shadows_in(here):
        text = f"{some(found)}: hides a module of that name from a bare `accelerate launch` in this folder"
        yield warning("modules", text, "Start by `shardgan train`, which does not look there, or rename it.")


def workers(job: Job) -> Iterator[Finding]:
    """Data workers need semaphores, sockets, and a folder for these."""
    if not job.config.data.workers:
        return
    try:
        multiprocessing.get_context("fork").Lock()
        folder = socket_folder()
    except (OSError, ImportError) as error:
        text = f"no semaphores can be made here ({error}), which data workers need"
        yield would_fail(
            "data workers", text, "Mount /dev/shm so that you can write there, or set data.workers=0."
        )
        return
    except UserError as error:
        yield would_fail("data workers", str(error))
        return
    if os.path.realpath(folder) != os.path.realpath(tempfile.gettempdir()):
        text = f"no sockets fit into {tempfile.gettempdir()}: data workers have theirs in {folder}"
        yield ok("data workers", text)
