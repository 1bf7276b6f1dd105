"""Trainings in ranks that are forked from a process that has imported everything.

Imports take a rank longer than most trainings here. For runs whose result counts, not how they are started.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launching import DEADLINE, RunFolder, environment_of
from torch.distributed import TCPStore

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch._dynamo", "pipeline.train"])  # the former is what an optimizer imports


def train_forked(
    world: int, arguments: Sequence[str], run_folder: Path, cwd: Path | None = None
) -> RunFolder:
    """What `accelerate launch -m pipeline.train ARGUMENTS` trains, in one process or by DDP, to the end."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    cwd = cwd or run_folder.parent
    cwd.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile() as log:
        common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}  # fmt: skip
        ranks = []
        for rank in range(world):
            place = {"RANK": rank, "LOCAL_RANK": rank, **common} if world > 1 else {}
            variables = environment_of({name: str(value) for name, value in place.items()})
            ranks.append(_FORKS.Process(target=_train, args=(arguments, cwd, log.name, variables)))
            ranks[-1].start()
        for process in ranks:
            process.join(DEADLINE)
        for process in ranks:
            process.kill()
        found = RunFolder(run_folder)
        assert [process.exitcode for process in ranks] == [0] * world and found.done, log.read().decode()
    return found


def _train(arguments: Sequence[str], cwd: Path, log: str, variables: dict[str, str]) -> None:
    """In a rank."""
    file = os.open(log, os.O_APPEND | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    sys.path.insert(0, str(cwd))  # as `python -m` does
    import pipeline.train

    status = pipeline.train.main(list(arguments))
    sys.stdout.flush()
    os._exit(status)
