"""Going on with a run: from its newest intact checkpoint, on the data that it was trained on."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import CommonError
from pipeline.parallel.ranks import Ranks
from pipeline.players import Gan
from pipeline.run import checkpoint
from pipeline.run.folder import REFERENCE
from pipeline.run.report import say
from pipeline.run.state import State
from pipeline.run.stats import Stats
from pipeline.wording import counted


def resume(folder: Path, gan: Gan, state: State, stats: Stats, ranks: Ranks, new_data: bool) -> State:
    """Continue from the newest intact checkpoint, if there is one; returns where the run stands.

    state: that of a new run. new_data: go on although its data are not those of the checkpoint.
    """
    ranks.progress.doing = "loading a checkpoint"
    found, complaints = ranks.broadcast_from_main(lambda: checkpoint.recover(folder / "checkpoints"))
    for complaint in complaints if found and ranks.main else ():
        say(f"warning: {complaint}; falling back")
    if found is None:
        if complaints:
            raise CommonError(
                "\n".join([f"{folder} holds no intact checkpoint to continue from:", *complaints])
                + "\nBring one back, or start over under a new name with run.resume=false."
            )
        return state
    saved = checkpoint.read_state(found)
    if (saved.plan, saved.data) != (state.plan, state.data):
        if not new_data:
            raise CommonError(
                f"{folder} was trained on other data, or on another split of them: resuming would mix the "
                "two. Point data.train at the same shards, start over with run.resume=false, or, if the data "
                "are to change here, say so with run.new_data=true."
            )
        if saved.num_classes != state.num_classes:
            raise CommonError(
                f"{folder} knows {counted(saved.num_classes, 'class')}, these data {state.num_classes}."
            )
        saved = saved.moved_to(state)
        ranks.broadcast_from_main(lambda: (folder / REFERENCE).unlink(missing_ok=True))
        if ranks.main:
            say("warning: goes on with other data: scores from here on do not compare with those before")
    checkpoint.load(found, [gan.G, gan.D], gan.G_ema, ranks)
    stats.load(ranks, saved.stats)
    if ranks.main:
        strategy, world = checkpoint.saved_by(found)
        other = (strategy, world) != (ranks.strategy, ranks.world)
        by = f", saved by {counted(world, 'process')} under {strategy}" if other else ""
        say(f"Resuming from kimg {saved.cur_nimg / 1000:g} ({found}{by})")
    return saved
