"""A run's mutable state besides the players: small, JSON, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

PartialSums = dict[str, tuple[float, float, float]]  # chart name → total, weight, weight of an update


@dataclass
class State:
    """Where a run stands. It needs no random state: every draw is a function of cur_nimg."""

    cur_nimg: int = 0  # real images shown to D; also the position in the data
    plan: str = ""  # fingerprint of the order of samples
    data: str = ""  # … and of the shards' contents
    label_frequencies: list[float] | None = None  # of the training images; fake labels follow them
    class_names: list[str] | None = None  # as the index of the data has them; None of older runs too
    wandb_id: str | None = None
    reported: int = 0  # cur_nimg up to which all due ticks, scores and sample grids are done
    ended: int = 0  # cur_nimg when all that ends a run was done last
    best: tuple[float, int] | None = None  # the best score so far and its cur_nimg
    best_of: str | None = None  # the chart of that score; None of older runs
    bad: list[str] = field(default_factory=list)  # unusable training images, on any rank, and why
    in_a_row: dict[str, int] = field(default_factory=dict)  # suspicion → ticks in a row: see Health
    adaptive: dict[str, float] = field(default_factory=dict)  # AdaptiveP.state(), where p is adaptive
    stats: list[PartialSums] = field(default_factory=list)  # per rank, since the last tick

    def moved_to(self, new: State) -> State:
        """The same place, on the data of `new`: without the best score and the bad images of the old data."""
        return replace(
            self,
            plan=new.plan,
            data=new.data,
            label_frequencies=new.label_frequencies,
            class_names=new.class_names,
            best=None,
            bad=[],
        )

    @property
    def num_classes(self) -> int:
        """0 for an unconditional run."""
        return len(self.label_frequencies or ())

    @property
    def classes(self) -> tuple[str, ...]:
        """A name for each class, a number where none is known; () for an unconditional run."""
        return tuple(self.class_names or map(str, range(self.num_classes)))
