"""What training under each strategy takes: memory, traffic, time, and so the scaling to expect.

    update = compute + network
    compute = FLOPs of a rank's images / FLOPs per second
    network = bytes that a rank sends / bytes per second

Nothing is taken to overlap, so an update may be as fast as the larger of the two. The sums are in
launch/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.table import Table

from launch.doctor import memory
from launch.doctor.finding import Finding, Job, ok, warning
from launch.doctor.flops import Flops, of_training
from launch.doctor.networks import Players, tied
from launch.processes import STRATEGIES
from pipeline.config import UserError
from pipeline.gan.frozen import sizes
from pipeline.parallel import theory
from pipeline.parallel.batch import batch_shape
from pipeline.wording import counted, in_bytes


@dataclass(frozen=True)
class Costs:
    """Of a job's training, where they can be known."""

    players: Players
    flops: Flops | None
    activations: int | None  # bytes on a rank


@dataclass(frozen=True)
class Forecast:
    """Of one strategy, per rank and update. None: not known."""

    strategy: str
    held: tuple[int, int] | None  # bytes, from and to
    sent: float  # bytes
    compute: float | None  # seconds
    network: float | None  # seconds
    possible: bool = True  # whether the strategy can train these networks
    countable: bool = True  # whether their FLOPs are known

    @property
    def seconds(self) -> float | None:
        """None unless both are known."""
        return None if self.compute is None or self.network is None else self.compute + self.network

    @property
    def efficiency(self) -> float | None:
        """Images per second and rank, against one rank alone with as many images."""
        return self.compute / self.seconds if self.compute and self.seconds else None


def forecasts(job: Job, costs: Costs) -> list[Forecast]:
    """Of every strategy for several ranks; of one process, of `single`. None where the batch cannot be
    divided."""
    try:
        rounds = batch_shape(job.config.data, job.world).rounds
    except UserError:
        return []
    (G, _), (D, frozen) = map(sizes, costs.players)
    update, compute = theory.update_of(job.config, rounds, frozen), _compute(job, costs)
    there = memory.of_gpu(job)
    found = []
    for strategy in STRATEGIES[1:] if job.world > 1 else STRATEGIES[:1]:
        of_it = replace(job, strategy=strategy)
        if (shards := _shards(of_it)) is None:
            continue
        held, active = memory.states(of_it, costs.players), costs.activations
        sent = theory.sent(strategy, job.world, G, D, update, shards)
        over = theory.over_copies(strategy, job.world, G, D, update, shards)
        too_large = active is None and there is not None and memory.at_least(held) > there
        found.append(
            Forecast(
                strategy,
                held=None if active is None else memory.in_all(held, active),
                sent=sent,
                compute=compute,
                network=_network(of_it, shards, sent - over, over),
                possible=not too_large and not any(tied(of_it, *costs.players)),
                countable=costs.flops is not None,
            )
        )
    return found


def _compute(job: Job, costs: Costs) -> float | None:
    """Seconds of an update's arithmetic."""
    if costs.flops is None or not job.machine.flops:
        return None
    images = job.config.images_per_update / job.world
    return images * of_training(job.config, *costs.flops) / job.machine.flops


def _shards(job: Job) -> int | None:
    """How many ranks share one copy; None where hsdp cannot divide the ranks, or has one copy, as fsdp2."""
    try:
        return None if job.strategy == "hsdp" and job.shards == job.world else job.shards
    except UserError:
        return None


def _network(job: Job, shards: int, within: float, over: float) -> float | None:
    """Seconds of an update's traffic: bytes that a rank sends in rings of `shards` ranks next to each other,
    and over copies.

    A ring of ranks of several nodes leaves and enters each node once. Over copies there are as many rings as
    ranks share a copy, and all of them that a node is in leave it.
    """
    if not within + over:
        return 0.0
    network = job.machine.network
    bandwidth = job.machine.bandwidth if _has_neighbours(job) else network
    if not bandwidth or (job.nodes > 1 and not network):
        return None
    slowest = min(bandwidth, network or bandwidth) if job.nodes > 1 else bandwidth
    inside = bandwidth if shards <= job.gpus else slowest
    rings = min(shards, job.gpus)
    outside = slowest if job.nodes == 1 else (network or slowest) / rings
    return within / inside + over / outside


def _has_neighbours(job: Job) -> bool:
    """Does a rank send anything within its node?"""
    return job.gpus > 1 or job.nodes == 1


def choose(found: Sequence[Forecast], there: int | None) -> Forecast | None:
    """The fastest that fits into `there` bytes, if these are known; None if none does.

    Without times, the one that sends least; of equal ones the first, which is the simplest.
    """
    fitting = [f for f in found if f.possible and _fits(f, there)]
    return min(fitting, key=lambda f: f.sent if f.network is None else f.network, default=None)


def _fits(found: Forecast, there: int | None) -> bool:
    return there is None or found.held is None or memory.fits(found.held[1], there)


def examine(job: Job, found: Sequence[Forecast]) -> Iterator[Finding]:
    """How fast training would be, and under which strategy."""
    if not found:
        return
    there = memory.of_gpu(job)
    chosen = choose(found, there)
    if chosen is None:
        text = f"none is sure to fit into {in_bytes(there or 0)} per GPU"
        remedy = "Lower data.batch_gpu (more rounds of fewer images), use more GPUs, or narrower networks."
        yield warning("strategy", text, remedy)
        return
    if job.world == 1:
        if chosen.seconds is not None:
            yield ok("speed", f"{_rate(job, chosen)} images/s: an update in {chosen.seconds:.3g} s")
        return
    best = "sends less" if chosen.network is None else "is faster"
    if chosen.held is None:
        text = f"{chosen.strategy}, if it fits: none {best}"
    elif there is None:
        text = f"{chosen.strategy}, if a rank has room for {in_bytes(chosen.held[1])}: none {best}"
    else:
        need = f"up to {in_bytes(chosen.held[1])} of {in_bytes(there)} per GPU"
        text = f"{chosen.strategy} needs {need}, and none that fits {best}"
    if chosen.efficiency is not None:
        share = f"{chosen.efficiency:.0%} of {job.world} ranks that send nothing"
        text += f"; {_rate(job, chosen)} images/s, {share}{_asked(job, chosen, found)}"
    else:
        text += f". {_missing(job, chosen)}"
    yield ok("strategy", text)


def _rate(job: Job, found: Forecast) -> str:
    """Images per second, of all ranks."""
    return _short(job.config.images_per_update / (found.seconds or 1.0))


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _asked(job: Job, chosen: Forecast, found: Sequence[Forecast]) -> str:
    """How much slower the job's own strategy is, if it is."""
    own = next((f.seconds for f in found if f.strategy == job.strategy), None)
    if own is None or chosen.seconds is None or own < 1.005 * chosen.seconds:
        return ""
    return f"; {job.strategy} would take {own / chosen.seconds:.2f} times as long"


def _missing(job: Job, chosen: Forecast) -> str:
    """The options that would make times known, or why none does."""
    if not chosen.countable:
        return "Times are not known, as the FLOPs of these networks cannot be counted"
    given = {"--tflops": job.machine.flops}
    given |= {"--bandwidth": job.machine.bandwidth} if _has_neighbours(job) else {}
    given |= {"--network": job.machine.network} if job.nodes > 1 else {}
    return f"For times: {', '.join(name for name, value in given.items() if not value)}, or --live"


def table(job: Job, found: Sequence[Forecast]) -> Table | None:
    """Strategy by strategy, in at most 60 columns; None for one process. Marks the one to choose."""
    found = [f for f in found if f.possible]
    if job.world == 1 or not found:
        return None
    chosen, compute = choose(found, memory.of_gpu(job)), found[0].compute
    of_memory, memory_unit = _scale([f.held[1] for f in found if f.held])
    of_sent, sent_unit = _scale([f.sent for f in found])
    title = f"{counted(job.nodes, 'node')} x {counted(job.gpus, 'rank')}, precision {job.precision}"
    note = "Per rank and update, nothing overlapping."
    note += f" Compute takes {_short(1000 * compute)} ms." if compute else ""
    shown = Table(title=title, caption=note, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    shown.title_justify = shown.caption_justify = "left"
    shown.add_column("strategy")
    for heading in (
        f"memory\n{memory_unit}",
        f"sent\n{sent_unit}",
        "network\nms",
        "images/s",
        "effi-\nciency",
    ):
        shown.add_column(heading, justify="right")
    for each in found:
        cells = [
            "–" if each.held is None else "–".join(f"{size / of_memory:.3g}" for size in each.held),
            f"{each.sent / of_sent:.3g}",
            "–" if each.network is None else _short(1000 * each.network),
            "–" if each.seconds is None else _rate(job, each),
            "–" if each.efficiency is None else f"{each.efficiency:.0%}",
        ]
        mark, style = ("→ ", "bold green") if each == chosen else ("  ", "")
        shown.add_row(f"{mark}{each.strategy}", *cells, style=style)
    return shown


def _scale(sizes: Sequence[float]) -> tuple[float, str]:
    """A unit in which the largest has few digits."""
    units = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))
    return next((unit for unit in units if max(sizes, default=0) >= unit[0]), units[-1])
