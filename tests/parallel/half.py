"""fp16 in the ranks of a launch: its loss scale alone, and all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from launch import parity
from pipeline.parallel.ranks import Ranks
from pipeline.run.stats import Stats
from pipeline.step import train_step

CASES = ("adam-l2-clipped-2", "r1-clipped")


def train(ranks: Ranks, out: Path) -> list[dict[str, Any]]:
    """Train some cases with the loss scale over fp32 networks, into OUT/scaled, and in fp16, into OUT/fp16.
    Returns what `overflow` saw."""
    chosen = [case for case in parity.cases(ranks.world) if case.name in CASES]
    for folder in ("scaled", "fp16"):
        (out / folder).mkdir(exist_ok=True)
    with patch.object(ranks, "precision", "fp16"):
        with patch.object(Ranks, "low_precision", None):
            parity.train_all(chosen, ranks, out / "scaled")
            seen = overflow(chosen[0], ranks)
        parity.train_all(chosen, ranks, out / "fp16")
    return seen


def overflow(case: parity.Case, ranks: Ranks) -> list[dict[str, Any]]:
    """For each of three updates, with nothing finite in D's gradient in the second: which weights changed,
    D's loss scale after it, and the charted norm of D's gradient."""
    state, rows = parity.initial_state(case), []
    gan, batches = parity.start(case, state, ranks)
    stats = Stats(ranks.device)
    for update in range(3):
        batch = next(batches)
        if update == 1 and ranks.main:  # one rank's overflow is all ranks'
            batch = batch._replace(images=torch.full(batch.images.shape, torch.inf))
        before = parity.whole(gan)
        state.cur_nimg = train_step(gan, iter([batch]), state.cur_nimg, stats)
        after = parity.whole(gan)
        changed = {name.partition("/")[0] for name, t in after.items() if not torch.equal(t, before[name])}
        scale = float(gan.D.optimizer_state()[0]["loss_scale"])
        norm = stats.reduce(ranks, {}).values["Gradients/D/norm"]
        rows.append({"changed": sorted(changed), "scale": scale, "norm": norm})
    return rows
