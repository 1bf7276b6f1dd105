"""What a run says of itself before it trains."""

from __future__ import annotations

import os

from pipeline.config import Config, Data
from pipeline.cores import bound_by
from pipeline.data.check import SHUFFLE, remarks, unlike
from pipeline.data.index import Index
from pipeline.data.plan import Split
from pipeline.gan import compatible
from pipeline.parallel.batch_norm import has_batch_norm
from pipeline.parallel.launched import arithmetic, emulated
from pipeline.parallel.ranks import Ranks
from pipeline.players import Gan
from pipeline.wording import counted, in_millions, in_time


def _of_latents(data: Data) -> list[str]:
    if not data.latents:
        return []
    if data.decoder is None:
        return ["latents, without data.decoder: sample grids show their first channels"]
    return [f"latents, of which {data.decoder} makes images"]


def introduction(config: Config, index: Index, split: Split, gan: Gan, ranks: Ranks) -> str:
    """A few lines: data, networks, penalties, ranks, batch, and what to know about them."""
    data, penalty = config.data, config.penalty
    size = {e.player.name: in_millions(sum(f.shape.numel() for f in e.fragments)) for e in (gan.G, gan.D)}
    lines = [
        f"{config.run.name}: {counted(split.training().size, 'training image')} in "
        f"{counted(len(index.shards), 'shard')}, {split.heldout().size:,} held out; "
        f"{data.channels}x{data.size}x{data.size}",
        f"  G {size['G']} and D {size['D']} parameters; "
        f"λ_G‖W‖² {in_time(penalty.G.l2)} on {penalty.G.on}, "
        f"λ_D‖W‖² {in_time(penalty.D.l2)} on {penalty.D.on}",
        f"  {ranks.strategy} on {ranks.world} x {ranks.device.type}, "
        f"precision {arithmetic(ranks.precision, ranks.device)}; "
        f"a batch of {gan.D.batch}",
        *([f"  note: {slow}"] if (slow := emulated(ranks.precision, ranks.device)) else ()),
        *([f"  warning: {bound}"] if (bound := bound_by(os.environ)) else ()),
        *([f"  {ranks.compilation}: first updates take longer"] if ranks.compilation else ()),
        *(f"  {line}" for line in remarks(index, data)),
        *([f"  warning: {odd}. {SHUFFLE}"] if (odd := unlike(index, split)) else ()),
        *(f"  {line}" for line in _of_latents(data)),
        *(f"  note: {line}" for line in compatible.remarks(config, ranks.precision)),
    ]
    if index.remote:
        lines.append(f"  {index.remote}")
    if has_batch_norm(gan.G.module) or has_batch_norm(gan.D.module):
        lines.append(
            "  note: BatchNorm sees one rank's images of a round, so results depend (a little) on the number "
            "of ranks and rounds"
        )
    return "\n".join(lines)
