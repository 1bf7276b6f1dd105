"""All mutable state of a run besides the players': small, JSON, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

PartialSums = dict[str, tuple[float, float, float]]  # chart name → total, weight, weight of an update


@dataclass
class State:
    """Where a run stands. Random state is not here: every draw is a function of cur_nimg."""

    cur_nimg: int = 0  # real images shown to D; also the position in the data
    plan: str = ""  # fingerprint of which sample comes when
    data: str = ""  # … and of the shards' contents
    label_frequencies: list[float] | None = None  # of the training images, which fake labels follow
    wandb_id: str | None = None
    reported: int = 0  # cur_nimg up to which all ticks, scores and sheets that were due are done
    best: tuple[float, int] | None = None  # the best score so far and its cur_nimg
    bad: list[str] = field(default_factory=list)  # what is wrong with which training images, on any rank
    in_a_row: dict[str, int] = field(default_factory=dict)  # for how many ticks what has been suspected
    stats: list[PartialSums] = field(default_factory=list)  # per rank, since the last tick

    def moved_to(self, new: State) -> State:
        """The same place in a training that goes on with the data of `new`: other images, other scores."""
        return replace(
            self, plan=new.plan, data=new.data, label_frequencies=new.label_frequencies, best=None, bad=[]
        )

    @property
    def num_classes(self) -> int:
        """0 for an unconditional run."""
        return len(self.label_frequencies or ())
