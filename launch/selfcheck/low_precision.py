"""Small trainings in bf16 and fp16, whose only error must be rounding.

`accelerate launch --mixed_precision … -m launch.selfcheck.low_precision OUT` trains the cases below and
writes the results, and what an update that overflows changed. `shardgan selfcheck --mixed_precision` compares
with plain torch in float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from launch.selfcheck import parity
from launch.selfcheck.parity import Case
from pipeline.console import end_process
from pipeline.parallel.loss_scale import START
from pipeline.parallel.ranks import Ranks
from pipeline.run.stats import Stats
from pipeline.step import train_step

OVERFLOW = "overflow.json"
# So large that rounding cannot hide a penalty that is lost or scaled with the loss.
_PENALTIES = ("penalty.G.l2=5e-2", "penalty.D.l2=6e-2", "penalty.l1=1e-3")
_CASES = {
    "momentum": (*parity.SGD, *_PENALTIES),
    "adam-clipped": (*parity.ADAM, *_PENALTIES, *parity.CLIPPED),
    "r1-clipped": (*parity.SGD, *_PENALTIES, *parity.R1, *parity.CLIPPED),
}


def cases(world: int = 1) -> list[Case]:
    """Momentum, Adam and R1, in two rounds of several images each: a single image's gradient may overflow at
    fp16's first loss scale, and its update would be skipped."""
    batch = 4 * parity.shared_batch(world)
    return [Case(name, settings, 2, batch, resumed="adam" in name) for name, settings in _CASES.items()]


def main(out: Path) -> None:
    """Train every case in the launcher's precision, as parity.py does, and write OUT/overflow.json."""
    ranks = parity.join()
    chosen = cases(ranks.world)
    parity.train_all(chosen, ranks, out)
    seen = overflow(chosen[0], ranks)
    if ranks.main:
        (out / OVERFLOW).write_text(json.dumps(seen))
    ranks.leave()


def overflow(case: Case, ranks: Ranks) -> list[dict[str, Any]]:
    """For each of three updates, in the second of which D's gradient is not finite: which weights changed,
    D's loss scale after it, if any, and the charted norm of D's gradient."""
    state, rows = parity.initial_state(case), []
    gan, batches = parity.start(case, state, ranks)
    stats = Stats(ranks.device)
    for update in range(3):
        batch = next(batches)
        if update == 1 and ranks.main:  # all ranks must skip together
            batch = batch._replace(images=torch.full(batch.images.shape, torch.inf))
        before = parity.whole(gan)
        state.cur_nimg = train_step(gan, iter([batch]), state.cur_nimg, stats)
        after = parity.whole(gan)
        changed = {name.partition("/")[0] for name, t in after.items() if not torch.equal(t, before[name])}
        scale = gan.D.optimizer_state()[0].get("loss_scale")
        norm = stats.reduce(ranks, {}).values["Gradients/D/norm"]
        rows.append(
            {"changed": sorted(changed), "scale": None if scale is None else float(scale), "norm": norm}
        )
    return rows


def skipped_alone(rows: list[dict[str, Any]], precision: str) -> bool:
    """Whether, of `overflow`, D's second update alone was skipped, and the loss scale halved for it."""
    everything = ["D", "G", "G_ema"]
    scales = [START, START / 2, START / 2] if precision == "fp16" else [None] * 3
    changed = [row["changed"] for row in rows]
    return changed == [everything, ["G", "G_ema"], everything] and [row["scale"] for row in rows] == scales


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_process(0)
