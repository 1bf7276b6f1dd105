"""The index of the data in ranks that believe themselves on several machines, two on each."""

from __future__ import annotations

import copy
import io
import tarfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from pipeline import config
from pipeline.errors import CommonError, UserError
from pipeline.parallel import ranks as meeting
from pipeline.parallel.ranks import Ranks
from pipeline.run import reals

PER_MACHINE, SIZE = 2, 28


def record(ranks: Ranks, out: Path) -> dict[str, Any]:
    """Which ranks looked at the shards, and how many samples each knows of; what every rank says where the
    last machine has other shards, and where it has none; and what ranks say of errors that some have."""
    ours, other = out / "shards", out / "other"
    if ranks.main:
        write(ours, 3), write(other, 4)
    ranks.barrier()
    spread = copy.copy(ranks)
    spread.__dict__.pop("_machine", None)
    machine, last = ranks.rank // PER_MACHINE, (ranks.world - 1) // PER_MACHINE
    looked: list[str] = []
    inner = reals.checked_index

    def counted(*given: Any, **named: Any) -> Any:
        looked.append("looked")
        return inner(*given, **named)

    def samples(folder: Path) -> int | str:
        keys = [f"data.train={folder}", f"data.size={SIZE}", "data.channels=1", "data.batch_size=12"]
        keys += ["score.metrics=[]"]  # one image is held out
        try:
            index, _ = reals.agreed_data(config.load(None, keys), spread)
        except CommonError as error:
            return str(error).replace(str(out), "OUT")
        return index.num_samples

    with mock.patch.object(meeting, "kernel", lambda: f"machine {machine}"):
        with mock.patch.object(reals, "checked_index", counted):
            same = samples(ours)
        moved = {"other": other, "absent": out / "absent"}
        found = {name: samples(folder if machine == last else ours) for name, folder in moved.items()}
    mine = {"looked": len(looked), "same": same, "failed": _failed(ranks), **found}
    return {name: [each[name] for each in ranks.gather_objects(mine)] for name in mine}


def _failed(ranks: Ranks) -> str:
    try:
        with ranks.raise_together():
            if ranks.rank:
                raise UserError("no disk")
    except CommonError as error:
        return str(error)
    return ""


def write(folder: Path, rows: int) -> None:
    folder.mkdir()
    with tarfile.open(folder / "000000.tar", "w") as tar:
        for row in range(rows):
            Image.fromarray(np.full((SIZE, SIZE), row, np.uint8)).save(file := io.BytesIO(), "PNG")
            info = tarfile.TarInfo(f"{row}.png")
            info.size = len(file.getvalue())
            tar.addfile(info, io.BytesIO(file.getvalue()))
