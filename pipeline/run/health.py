"""Judges a run by the figures of its ticks. They are the same on all ranks, and so is every decision."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping

from pipeline.config import Run
from pipeline.errors import CommonError, RunError, UserError
from pipeline.parallel.ranks import Ranks
from pipeline.run.report import Report, say
from pipeline.run.stats import Reduced
from pipeline.wording import counted, in_kimg, ranks_named

BITS, FORWARD, ORDER = "bits/", "forward", "order/"  # each rank's own figures: see session.of_this_rank
_NAMED = 3  # charts in a message
_PATIENCE = 25  # ticks in a row before a warning …
_SOONEST = 5  # … or a quarter of a short run's, but at least these
_SLOW = 1.5  # times the median rank
_WON = 0.99  # mean sign of D's logits; 1: it is right about every image
_WORSE = 2.0  # times the best score
_REMEDY = (
    "Try a lower optim.{0}.lr or a limit on gradients (optim.{0}.clip); if it is always the same rank, "
    "suspect its device."
)
_NOTICED_S, _WAITING = 1.0, 0.1  # waiting for a disk: seconds, and share of the time


class Health:
    """Warns of what a person should look at; ends a run that cannot continue."""

    def __init__(self, run: Run, ranks: Ranks, report: Report, in_a_row: dict[str, int]) -> None:
        """in_a_row: State.in_a_row, which is kept up to date."""
        self._run, self._ranks, self._report, self._in_a_row = run, ranks, report, in_a_row
        self._patience = max(_SOONEST, min(_PATIENCE, int(run.total_kimg / run.tick_kimg / 4)))

    def check(self, tick: Reduced) -> None:
        """Raises RunError when updates are not finite, or a rank trains something else."""
        self._count_skips(tick)
        self._compare_replicas(tick.each)
        self._compare_orders(tick.each)
        self._suspect(
            "D has won",
            _has_won(tick.values),
            "D has been right about every image for some time, which leaves G little to learn from. Give G a "
            "chance by a smaller or slower D (D.width, optim.D.lr), R1 (penalty.r1.gamma) or a larger "
            "penalty.D.l2.",
            patience=self._patience,
        )
        self._find_stragglers(tick.each.get(FORWARD, []))

    def check_end(self) -> None:
        """Raises RunError when the last updates of a run were skipped."""
        for player in "DG":
            skipped, updates = self._stuck(player)
            if skipped:
                raise RunError(
                    f"{skipped} of the last {counted(updates, 'update')} of {player} were not finite, and "
                    "were skipped: training has diverged, and the run is not finished. "
                    f"{_REMEDY.format(player)}"
                )

    def compare_score(self, name: str, score: float, best: tuple[float, int] | None) -> None:
        """Warn when the score is far worse than the best one, or not a number."""
        self._suspect(
            "Score is no number",
            not math.isfinite(score),
            f"{name} is {score}: the features of generated or held-out images are not finite.",
            patience=1,
        )
        worse = best is not None and best[0] > 0 and score > _WORSE * best[0]
        was = f"{best[0]:.4g} at kimg {in_kimg(best[1] / 1000)}" if best else ""
        self._suspect(
            "Training has got worse",
            worse,
            f"{name} is {score:.4g}, and was {was}: the players may have collapsed. That checkpoint is kept.",
            patience=2,
        )

    def compare_diversity(self, fakes: float, reals: float) -> None:
        """Warn when the images of two sample grids in a row differ far less than real ones do."""
        self._suspect(
            "G has collapsed",
            fakes < 0.25 * reals,
            f"Generated images vary {fakes / max(reals, 1e-9):.0%} as much as real ones do: G may show the "
            "same few images for every z. Look at the newest sample grid in samples/.",
            patience=2,
        )

    def compare_wait(self, waited: float, between: float) -> None:
        """Warn when training waits for storage: for `waited` of the seconds `between` two saves."""
        self._suspect(
            "Storage is slow",
            waited > max(_NOTICED_S, _WAITING * between),
            f"Training waited {waited:.0f} s of the last {between:.0f} s for a checkpoint to be written: "
            f"storage is slower than run.checkpoint_kimg = {in_kimg(self._run.checkpoint_kimg)} asks for. "
            "Save less often, or to a faster disk (run.out).",
            patience=1,
        )

    def _count_skips(self, tick: Reduced) -> None:
        """A few updates may be skipped; a run that skips more ends. A tick may have fewer updates than may be
        skipped, so the counts of successive ticks add up while most updates are skipped."""
        for player in "DG":
            name = f"Gradients/{player}/skipped"
            if name not in tick.values:
                continue
            updates = round(tick.updates[name])
            skipped = round(tick.values[name] * updates)
            when = "since the last tick"
            if 2 * skipped > updates:
                before = self._stuck(player)
                when = "in the last ticks" if before[0] else when
                skipped, updates = before[0] + skipped, before[1] + updates
                self._in_a_row |= {f"skipped/{player}": skipped, f"updates/{player}": updates}
            else:
                self._in_a_row |= {f"skipped/{player}": 0, f"updates/{player}": 0}
            if not skipped:
                continue
            where = _where(tick.broken, self._ranks.world)
            text = (
                f"{skipped} of the {counted(updates, 'update')} of {player} {when} were not finite, and were "
                f"skipped on all ranks{f' ({where})' if where else ''}."
            )
            if skipped > self._run.max_skipped:
                raise RunError(
                    f"{text} More than run.max_skipped = {self._run.max_skipped}: training has diverged. No "
                    f"such update has changed a weight. {_REMEDY.format(player)}"
                )
            self._report.warn("Updates skipped", text)

    def _stuck(self, player: str) -> tuple[int, int]:
        """Skipped and all updates of the newest ticks, as long as most were skipped."""
        return self._in_a_row.get(f"skipped/{player}", 0), self._in_a_row.get(f"updates/{player}", 0)

    def _compare_replicas(self, each: Mapping[str, list[float]]) -> None:
        """All copies of a replicated player must have the same bits; a rank may hold a part of one."""
        shards = self._ranks.shards
        for key in (key for key in each if key.startswith(BITS)):
            bits = each[key]
            usual = [statistics.mode(bits[part::shards]) for part in range(shards)]
            if different := [rank for rank, mine in enumerate(bits) if mine != usual[rank % shards]]:
                name = key.removeprefix(BITS)
                one = different[0]
                two = f"one of the ranks {one % shards} and {one}"  # no third says which is right
                at = ranks_named(different) if len(bits) > 2 * shards else two
                raise RunError(
                    f"The copy of {name} on {at} differs from the others. A device or its memory fails, or "
                    "ranks run on unlike hardware. The same command continues from the newest checkpoint, "
                    "with equal copies; zero1 to zero3 and fsdp2 keep one copy of each weight."
                )

    def _compare_orders(self, each: Mapping[str, list[float]]) -> None:
        """Ranks must gather the same layers at the same time, see pipeline/parallel/order.py."""
        for key in (key for key in each if key.startswith(ORDER)):
            if len(set(each[key])) > 1:
                name = key.removeprefix(ORDER)
                raise RunError(
                    f"Ranks did not run the same layers of {name} in the same order. {self._ranks.strategy} "
                    "gathers weights in that order, so they were mixed up since the last tick. Draw with "
                    "none of torch's random numbers which layers run: they differ between ranks."
                )

    def _find_stragglers(self, seconds: list[float]) -> None:
        """Only where a forward pass waits for no other rank, see pipeline/parallel/forward_timing.py."""
        if self._ranks.strategy in ("ddp", "zero1", "zero2") and len(seconds) > 1 and min(seconds):
            times = max(seconds) / statistics.median_low(seconds)
            self._suspect(
                "A rank is slow",
                times > _SLOW,
                f"rank {seconds.index(max(seconds))} takes {times:.1f} times as long as the others for the "
                "same work, and all wait for it: look at what else runs on its device.",
            )

    def _suspect(self, title: str, now: bool, text: str, patience: int = _PATIENCE) -> None:
        """Warn once, after `patience` ticks in a row; again only after it was not so in between."""
        self._in_a_row[title] = self._in_a_row.get(title, 0) + 1 if now else 0
        if self._in_a_row[title] == patience:
            self._report.warn(title, text)


class BadImages:
    """Training images that cannot be used: each named once, counted over all ranks and restarts of a run.

    Each rank finds those of its part of the data; they are exchanged at ticks and saves.
    """

    def __init__(self, most: int, known: list[str], ranks: Ranks, report: Report) -> None:
        """known: State.bad, which is added to."""
        self._most, self._known, self._ranks, self._report = most, known, ranks, report
        self._found: list[str] = []

    @property
    def found(self) -> int:
        """By this rank, since the last exchange."""
        return len(self._found)

    @property
    def known(self) -> int:
        return len(self._known)

    def add(self, bad: Iterable[str]) -> None:
        """What this rank has just met, perhaps not for the first time. Raises UserError for one too many."""
        for text in bad:
            if text not in self._known and text not in self._found:
                self._found.append(text)
                if len(self._known) + len(self._found) > self._most:
                    raise UserError(self._too_many([*self._known, *self._found]))
                line = f"warning: {text} Another image replaces it (data.max_bad)."
                self._report.say(line) if self._ranks.main else say(line)

    def exchange(self) -> None:
        """Collective."""
        for found in self._ranks.gather_objects(self._found):
            self._known += [text for text in found if text not in self._known]
        self._found = []

    def check(self) -> None:
        """Raises CommonError, on all ranks alike, if there are more than a run may have."""
        if len(self._known) > self._most:
            raise CommonError(self._too_many(self._known))

    def _too_many(self, bad: list[str]) -> str:
        count, most = len(bad), self._most
        return f"{count} images cannot be used, more than data.max_bad={most}. The last one: {bad[-1]}"


def slowest(seconds: list[float]) -> dict[str, float]:
    """Charts of the ranks' seconds in forward passes since the last tick; {} for a single rank."""
    if len(seconds) == 1:
        return {}
    return {
        "Timing/forward_sec_fastest": min(seconds),
        "Timing/forward_sec_median": statistics.median_low(seconds),
        "Timing/forward_sec_slowest": max(seconds),
        "Timing/slowest_rank": float(seconds.index(max(seconds))),
    }


def _where(broken: Mapping[str, list[int]], world: int) -> str:
    """The charts that are not finite, a few of them, by the ranks on which they are not."""
    charts: dict[str, list[str]] = {}
    for chart, ranks in broken.items():
        charts.setdefault("all ranks" if len(ranks) == world else ranks_named(ranks), []).append(chart)
    return "; ".join(
        ", ".join(each[:_NAMED])
        + f" and {len(each) - _NAMED} more" * (len(each) > _NAMED)
        + f" on {ranks}" * (world > 1)
        for ranks, each in charts.items()
    )


def _has_won(values: Mapping[str, float]) -> bool:
    """Whether D is right about every image; of pairs, whose logits mean something only together, about every
    pair."""
    if "Loss/signs/paired" in values:
        return values["Loss/signs/paired"] > _WON
    return values.get("Loss/signs/real", 0) > _WON and values.get("Loss/signs/fake", 0) < -_WON
