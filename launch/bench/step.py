"""`shardgan bench step`: the whole training step beside its bare maths and the tutorials' loop.

All run by turns, a few updates each, so that whatever else the machine does slows all of them
alike; ratios are of the same turn, then their median, and of everyone's fastest turn, which other processes
disturb least. Images are real images shown to D.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, Protocol

import click
import torch
from rich.console import Console
from rich.table import Table

from launch.bench.rivals import BareMaths, TutorialApart
from pipeline.config import Config, UserError, load
from pipeline.data.plan import split_of
from pipeline.data.prepare.writer import Options, prepare
from pipeline.data.stream import Batch, training_batches
from pipeline.parallel.batch import batch_shape
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

_SUBSET = Path(__file__).parents[2] / "tests" / "assets" / "fashion-mnist-500"
_TURN = 8  # updates of one contestant before the next one's turn
_AHEAD = 4  # batches that a decoding process has ready when its turn comes
_WARM_UP = 2
_ARITHMETIC: dict[str, Literal["no", "bf16"]] = {"fp32": "no", "bf16": "bf16"}

Seconds = dict[str, list[float]]  # contestant → seconds of each of its turns


class Contestant(Protocol):
    def ready(self) -> None:
        """Its turn begins now: what was done ahead of time does not count."""

    def run(self, updates: int) -> None:
        """Train."""


@click.command("step")
@click.option("--size", type=click.Choice(["28", "32", "64", "128"]), default="64", show_default=True)
@click.option("--width", type=click.IntRange(1), default=64, show_default=True, help="Of G and D.")
@click.option("--batch", type=click.IntRange(2), default=64, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=40, show_default=True, help="Updates of each.")
@click.option("--workers", type=click.IntRange(0), default=1, show_default=True, help="Decoding processes.")
@click.option("--threads", type=click.IntRange(1), help="Of torch; default: its own choice.")
@click.option("--precision", type=click.Choice(["fp32", "bf16", "both"]), default="both", show_default=True)
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
    data: str | None,
) -> None:
    """The whole step (shards, statistics, reports, L2) beside its bare maths and the tutorials' DCGAN loop.

    Same networks, same batch, by turns, so that ratios hold even while other things run.
    """
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="shardgan-bench-") as folder:
        train = data or _upscaled(Path(folder), int(size))
        keys = [f"data.train={train}", f"data.size={size}", f"data.batch_size={batch}"]
        keys += [f"data.workers={workers}", f"G.width={width}", f"D.width={width}"]
        settings = load(None, [*keys, "penalty.l2=1e-4", "run.name=bench"])
        wanted = [name for name in _ARITHMETIC if precision in (name, "both")]
        _report(settings, measure(settings, Path(folder), wanted, steps), Console())


def measure(settings: Config, folder: Path, arithmetics: Sequence[str], updates: int) -> Seconds:
    """Let everyone run `updates` updates (at least), by turns."""
    os.environ["WANDB_MODE"] = "offline"  # tracked as a run is, but never sent anywhere
    signals = _unheeded()
    ours = {a: Ours(settings, folder / a, _ARITHMETIC[a], signals) for a in arithmetics}
    device = next(iter(ours.values())).device
    contestants: dict[str, Contestant] = {f"shardgan {a}": contestant for a, contestant in ours.items()}
    contestants |= {f"bare maths {a}": BareMaths(settings, device, a == "bf16") for a in arithmetics}
    images = next(iter(ours.values())).some_images(count=1024)
    tutorial = contestants["tutorial fp32"] = TutorialApart(settings, device, images)
    for contestant in contestants.values():
        contestant.run(_WARM_UP)
    seconds: Seconds = {name: [] for name in contestants}
    for _ in range(-(-updates // _TURN)):
        for name, contestant in contestants.items():
            contestant.ready()
            _synchronise(device)
            start = time.perf_counter()
            contestant.run(_TURN)
            _synchronise(device)
            seconds[name].append(time.perf_counter() - start)
    for a, contestant in ours.items():
        share = contestant.seconds_per_tick() * contestant.ticks_per_update() * _TURN
        seconds[f"shardgan {a}"] = [s + share for s in seconds[f"shardgan {a}"]]
        contestant.close()
    tutorial.close()
    return seconds


class Ours:
    """What `shardgan train` does in its loop, with everything on."""

    def __init__(
        self, settings: Config, folder: Path, precision: Literal["no", "bf16"], signals: StopSignals
    ) -> None:
        folder.mkdir(parents=True)
        data = settings.data
        self._settings = settings
        self._ranks = Ranks(Launch("single", precision, 0, 1), timedelta(seconds=settings.run.timeout_s))
        self._index = checked_index(settings, announce=False)
        split = split_of(settings, self._index)
        self._plan = split.training()
        self._state = State(plan=self._plan.fingerprint)
        self._gan = build(settings, self._ranks, batch_shape(data, 1))
        self._stats = Stats(self.device, reports=self._gan.D.batch.rounds)
        with _no_output():
            tracker = open_tracker(settings, folder, None, lambda _: None)
            self._report = MainReport(folder, tracker, round(settings.run.total_kimg * 1000), 0)
        self._session = Session(
            settings, folder, self._index, split, self._ranks, self._report, signals, self._state
        )
        self._reals = self._session.timed(self._batches(data.workers))

    @property
    def device(self) -> torch.device:
        return self._ranks.device

    def ready(self) -> None:
        for _ in range(_AHEAD * self._settings.data.workers):
            next(self._reals)

    def run(self, updates: int) -> None:
        """As in pipeline/loop.py, ticks apart."""
        for _ in range(updates):
            asked_to_stop = self._session.exchange()
            self._state.cur_nimg = train_step(self._gan, self._reals, self._state.cur_nimg, self._stats)
            asked_to_stop()
            self._session.advance(self._state.cur_nimg)

    def seconds_per_tick(self) -> float:
        """A tick comes every few kimg, too rarely to be met in a short measurement: it is timed apart, and
        every turn is charged its share."""
        taken = []
        for _ in range(3):
            self.run(1)
            _synchronise(self.device)
            start = time.perf_counter()
            with _no_output():
                self._session.tick(self._gan, self._state, self._stats, {})
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def ticks_per_update(self) -> float:
        return self._settings.images_per_update / (1000 * self._settings.run.tick_kimg)

    def some_images(self, count: int) -> torch.Tensor:
        """The first training images, uint8 [at least `count`, C, H, W]."""
        batches = self._batches(workers=0)
        needed = -(-count // self._settings.data.batch_size)
        return torch.cat([next(batches).images for _ in range(needed)])

    def close(self) -> None:
        with _no_output():
            self._report.close()

    def _batches(self, workers: int) -> Iterator[Batch]:
        data = self._settings.data
        return training_batches(self._index, self._plan, replace(data, workers=workers))


def _unheeded() -> StopSignals:
    """What the loop asks after every update, while signals go on to end this process at once."""
    signals = StopSignals()
    signals.close()
    return signals


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _no_output() -> contextlib.redirect_stdout[io.StringIO]:
    return contextlib.redirect_stdout(io.StringIO())


def _upscaled(folder: Path, size: int) -> str:
    """Shards of the few real images that come with the sources, brought to `size`."""
    tars = sorted(_SUBSET.glob("*.tar"))
    if not tars:
        raise UserError("The small image set that comes with the sources is not here: give --data SHARDS.")
    images = folder / "images"
    images.mkdir()
    for tar in tars:
        with tarfile.open(tar) as file:
            for member in file:
                content = file.extractfile(member) if member.name.endswith(".png") else None
                if content is not None:
                    (images / Path(member.name).name).write_bytes(content.read())
    prepare(str(images), str(folder / "shards"), Options(size=size, fit="crop", per_shard=250))
    return str(folder / "shards")


def _report(settings: Config, seconds: Mapping[str, Sequence[float]], console: Console) -> None:
    data, images = settings.data, _TURN * settings.images_per_update
    table = Table(
        title=f"{settings.G.kind}, {data.channels}x{data.size}x{data.size}, batch {data.batch_size}"
    )
    table.add_column()
    for heading in ("images/s", "time beyond its bare maths", "times the tutorial"):
        table.add_column(heading, justify="right")
    for name, taken in seconds.items():
        bare = seconds[f"bare maths {name.split()[-1]}"] if name.startswith("shardgan") else None
        tutorial = seconds["tutorial fp32"] if not name.startswith("tutorial") else None
        table.add_row(
            name,
            f"{images / statistics.median(taken):.1f}",
            "" if bare is None else "{:+.1%} ({:+.1%})".format(*(r - 1 for r in _ratios(taken, bare))),
            "" if tutorial is None else "{:.2f} ({:.2f})".format(*_ratios(tutorial, taken)),
        )
    console.print(table)
    turns, threads = len(seconds["tutorial fp32"]), torch.get_num_threads()
    console.print(
        f"Medians (in brackets: fastest) of {turns} turns of {_TURN} updates; "
        f"{threads} threads, torch {torch.__version__}"
    )


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float]:
    """Median of the turns' ratios, and ratio of the fastest turns."""
    of_turns = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return statistics.median(of_turns), min(numerators) / min(denominators)
