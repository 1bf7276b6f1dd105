"""`shardgan bench step`: the whole training step, its bare maths and the tutorials' loop, side by side; then
D's turn with gradient penalties (objective.py).

They take turns of a few updates, so that other load slows all of them alike. Ratios are the median over
turns, and of everyone's fastest turn, which other load disturbs least. Images are real images shown to D.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import click
import torch

from launch.bench import objective, table
from launch.bench.loader import make_shards
from launch.bench.meter import clocked
from launch.bench.rivals import BareMaths, TutorialApart
from pipeline.config import Config, load
from pipeline.data.plan import split_of
from pipeline.data.stream import Batch, training_batches
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.compilation import Compilation, check_compilation
from pipeline.parallel.gpus import on_gpu
from pipeline.parallel.launched import Launch
from pipeline.parallel.ranks import Ranks
from pipeline.players import build
from pipeline.run.reals import checked_index
from pipeline.run.report import MainReport
from pipeline.run.session import Session
from pipeline.run.state import State
from pipeline.run.stats import Stats
from pipeline.run.stop import StopSignals
from pipeline.run.tracker import open_tracker
from pipeline.step import train_step

_TURN = 8  # updates in a contestant's turn
_AHEAD = 4  # batches that a decoding process has ready when its turn comes
_WARM_UP = 2
_COMPILED = "compiled "  # our step, in front of its arithmetic
_ARITHMETIC: dict[str, Literal["no", "bf16"]] = {"fp32": "no", "bf16": "bf16"}

Seconds = dict[str, list[float]]  # contestant → seconds of each of its turns


@click.command("step")
@click.option("--size", type=click.Choice(["28", "32", "64", "128"]), default="64", show_default=True)
@click.option("--width", type=click.IntRange(1), default=64, show_default=True, help="Of G and D.")
@click.option("--batch", type=click.IntRange(2), default=64, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=40, show_default=True, help="Updates of each.")
@click.option("--workers", type=click.IntRange(0), default=1, show_default=True, help="Decoding processes.")
@click.option("--threads", type=click.IntRange(1), help="Of torch; default: its own choice.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "both"]), default="both", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Also the whole step compiled.")
@click.option(
    "--data", metavar="SHARDS", help="Train on these; default: a few real images, scaled to --size."
)
def command(
    size: str,
    width: int,
    batch: int,
    steps: int,
    workers: int,
    threads: int | None,
    precision: str,
    compiled: bool,
    data: str | None,
) -> None:
    """The whole step (shards, statistics, reports, L2) beside its bare maths and the tutorials' DCGAN loop.

    Then D's turn with R1 + R2, exact and estimated, beside a plain one. Same networks and batch, in turns, so
    that ratios hold under other load.
    """
    if threads:
        torch.set_num_threads(threads)
    how = Compilation("inductor") if compiled else None
    check_compilation(how, "single", 1, on_gpu())
    with tempfile.TemporaryDirectory(prefix="shardgan-bench-") as folder:
        train = data or make_shards(Path(folder) / "shards", int(size), 1, "PNG")
        config = config_of(train, int(size), width, batch, workers)
        wanted = [name for name in _ARITHMETIC if precision in (name, "both")]
        _report(config, measure(config, Path(folder), wanted, steps, how))
        penalised = {a: objective.measure(config, _ARITHMETIC[a], steps) for a in wanted}
        objective.report(penalised, batch)


def config_of(train: str | Path, size: int, width: int = 64, batch: int = 64, workers: int = 1) -> Config:
    """What is trained; the keywords are those of the command."""
    keys = [f"data.train={train}", f"data.size={size}", f"data.batch_size={batch}"]
    keys += [f"data.workers={workers}", f"G.width={width}", f"D.width={width}"]
    return load(None, [*keys, "penalty.l2=1e-4", "run.name=bench"])


def measure(
    config: Config, folder: Path, arithmetics: Sequence[str], updates: int, how: Compilation | None = None
) -> Seconds:
    """Let everyone run at least `updates` updates, in turns. how: our step runs compiled, too."""
    os.environ["WANDB_MODE"] = "offline"  # tracked as a run is, but never sent anywhere
    signals = _ignored_signals()
    ours = {f"shardgan {a}": Ours(config, folder / a, _ARITHMETIC[a], signals) for a in arithmetics}
    for a in arithmetics if how else ():
        ours[f"{_COMPILED}{a}"] = Ours(config, folder / f"{a}-c", _ARITHMETIC[a], signals, how)
    first = next(iter(ours.values()))
    tutorial = TutorialApart(config, first.device, first.some_images(count=1024))
    contestants: dict[str, Ours | BareMaths | TutorialApart] = {**ours}
    contestants |= {f"bare maths {a}": BareMaths(config, first.device, a == "bf16") for a in arithmetics}
    contestants["tutorial fp32"] = tutorial
    for contestant in contestants.values():
        contestant.run(_WARM_UP)
    seconds: Seconds = {name: [] for name in contestants}
    for _ in range(-(-updates // _TURN)):
        for name, contestant in contestants.items():
            if isinstance(contestant, Ours):
                contestant.discard_prefetched()
            with clocked(seconds[name]):
                contestant.run(_TURN)
    for name, contestant in ours.items():
        share = contestant.seconds_per_tick() * contestant.ticks_per_update() * _TURN
        seconds[name] = [s + share for s in seconds[name]]
        contestant.close()
    tutorial.close()
    return seconds


class Ours:
    """What `shardgan train` does in its loop, with everything on."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        precision: Literal["no", "bf16"],
        signals: StopSignals,
        how: Compilation | None = None,
    ) -> None:
        folder.mkdir(parents=True)
        self._config = config
        launch = Launch("single", precision, 0, 1, compilation=how)
        self._ranks = Ranks(launch, timedelta(seconds=config.run.timeout_s))
        self._index = checked_index(config, announce=False)
        split = split_of(config, self._index)
        self._plan = split.training()
        self._state = State(plan=self._plan.fingerprint)
        self._gan = build(config, self._ranks, batch_shape(config.data, 1))
        self._stats = Stats(self.device, reports=self._gan.D.batch.rounds)
        with _no_output():
            tracker = open_tracker(config, folder, None, lambda _: None)
            self._report = MainReport(folder, [tracker], round(config.run.total_kimg * 1000), 0)
        self._session = Session(
            config, folder, self._index, split, self._ranks, self._report, signals, self._state
        )
        self._reals = self._session.timed(self._batches(config.data.workers))

    @property
    def device(self) -> torch.device:
        return self._ranks.device

    def discard_prefetched(self) -> None:
        """Batches that were decoded during the others' turns."""
        for _ in range(_AHEAD * self._config.data.workers):
            next(self._reals)

    def run(self, updates: int) -> None:
        """As in pipeline/loop.py, without ticks."""
        for _ in range(updates):
            asked_to_stop = self._session.exchange()
            self._state.cur_nimg = train_step(self._gan, self._reals, self._state.cur_nimg, self._stats)
            asked_to_stop()
            self._session.advance(self._state.cur_nimg)

    def seconds_per_tick(self) -> float:
        """Ticks are too rare for a short measurement: they are timed apart, and every turn is charged its
        share."""
        taken: list[float] = []
        for _ in range(3):
            self.run(1)
            with _no_output(), clocked(taken):
                self._session.tick(self._gan, self._state, self._stats, {})
        return statistics.median(taken)

    def ticks_per_update(self) -> float:
        return self._config.images_per_update / (1000 * self._config.run.tick_kimg)

    def some_images(self, count: int) -> torch.Tensor:
        """The first training images, uint8 [at least `count`, C, H, W]."""
        batches = self._batches(workers=0)
        needed = -(-count // self._config.data.batch_size)
        return torch.cat([next(batches).images for _ in range(needed)])

    def close(self) -> None:
        with _no_output():
            self._report.close()

    def _batches(self, workers: int) -> Iterator[Batch]:
        data, pinned = replace(self._config.data, workers=workers), self.device.type == "cuda"
        return training_batches(self._index, self._plan, data, pinned=pinned)


def _ignored_signals() -> StopSignals:
    """For the loop to poll; signals end this process at once."""
    signals = StopSignals()
    signals.close()
    return signals


def _no_output() -> contextlib.redirect_stdout[io.StringIO]:
    return contextlib.redirect_stdout(io.StringIO())


def _report(config: Config, seconds: Mapping[str, Sequence[float]]) -> None:
    data = config.data
    turns, threads = len(seconds["tutorial fp32"]), torch.get_num_threads()
    of = f"{threads} threads, torch {torch.__version__}"
    notes = [f"Medians (in brackets: fastest) of {turns} turns of {_TURN} updates; {of}"]
    for name in (name for name in seconds if name.startswith(_COMPILED)):
        a = name.removeprefix(_COMPILED)
        times = _shown("{:.2f}", *_ratios(seconds[f"shardgan {a}"], seconds[name]))
        notes.append(f"Compiled, the step is {times} times as fast, in {a}.")
    table.show(
        f"{config.G.kind}, {data.channels}x{data.size}x{data.size}, batch {data.batch_size}",
        ("images/s", "time beyond its bare maths", "times the tutorial"),
        (_row(name, seconds, _TURN * config.images_per_update) for name in seconds),
        "\n".join(notes),
    )


def _row(name: str, seconds: Mapping[str, Sequence[float]], images: int) -> list[str]:
    taken, beyond, times = seconds[name], "", ""
    if name.startswith(("shardgan ", _COMPILED)):
        bare = seconds[f"bare maths {name.split()[-1]}"]
        beyond = _shown("{:+.1%}", *(ratio - 1 for ratio in _ratios(taken, bare)))
    if not name.startswith("tutorial"):
        times = _shown("{:.2f}", *_ratios(seconds["tutorial fp32"], taken))
    return [name, f"{images / statistics.median(taken):.1f}", beyond, times]


def _shown(form: str, median: float, fastest: float) -> str:
    return f"{form.format(median)} ({form.format(fastest)})"


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float]:
    """Median of the turns' ratios, and ratio of the fastest turns."""
    of_turns = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return statistics.median(of_turns), min(numerators) / min(denominators)
