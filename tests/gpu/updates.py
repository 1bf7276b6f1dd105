"""Parts of the GPU suite that measure updates: waiting, speed, memory."""

from __future__ import annotations

import gc
import math
import statistics
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from machine import GPUS, ROOT, WORLD, Outcome, need

if TYPE_CHECKING:
    from pipeline.parallel.compilation import Compilation
    from pipeline.players import Gan

SIZES = {  # published settings, at so many images per GPU
    "r3gan-cifar10": 64, "r3gan-ffhq64": 32, "r3gan-ffhq256": 8, "stylegan2-256": 8, "gat-b2": 32,
}  # fmt: skip
COMPILED = (  # a family each
    {"cifar10": 128, "resnet-64": 64, "stylegan2-256": 8, "gat-b2": 32}
    if GPUS
    else {"fashion-mnist": 16, "vit-small": 8}
)
EXACT = ("cifar10", "stylegan2-small")
_BY_SGD = tuple(  # so that rounding is not enlarged to a step of Adam
    f"optim.{player}.{key}" for player in "GD" for key in ("kind=sgd", "lr=1e-3", "decoupled_decay=0")
)
_WARM_UP = 4  # updates, in which everything is compiled, and recorded as a CUDA graph


def no_waits() -> Outcome:
    """Updates of every family in which torch refuses whatever would make the host wait for the device: where
    penalties are lazy, one in which they are due and one in which they are not."""
    need(1)
    figures = {}
    for name in SIZES:
        n = _interval(name)
        turns = {", penalties due": 2 * n, ", none due": 2 * n + 1} if n > 1 else {"": 3}
        for kind in ("no", "bf16", "fp16"):
            update = _update(name, kind, images=4)
            for turn in (0, 1, n, n + 1):  # everything is allocated and chosen, with penalties and without
                update(turn * 4)
            figures |= {f"{name}, {kind}{due}": _waits(update, turn * 4) for due, turn in turns.items()}
    return [f"{name}: {said}" for name, said in figures.items() if said != "none"], figures


def _waits(update: Callable[..., object], cur_nimg: int) -> str:
    """What torch says if an update makes the host wait for the device, else "none"."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(cur_nimg)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def speed() -> Outcome:
    """Images per second and the most memory of published settings, beside doctor's forecast."""
    need(1)
    failures, figures = [], {}
    for name, images in SIZES.items():
        for kind in ("no", "bf16"):
            gc.collect()  # nothing refers to the last network any more, even if it failed
            torch.cuda.empty_cache()
            what = f"{name}, {kind}, {images} images"
            try:
                figures[what] = _speed(name, kind, images)
            except torch.cuda.OutOfMemoryError as error:
                figures[what] = {"images/s": str(error).splitlines()[0]}
            except Exception as error:
                traceback.print_exc()  # into the log
                failures.append(f"{what}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return failures, figures


def _speed(name: str, kind: str, images: int) -> dict[str, float]:
    """Of one network: its update is referred to here alone, and is freed however this ends."""
    from launch.doctor.memory import activations
    from pipeline.config import load

    interval = _interval(name)
    update = _update(name, kind, images)
    for turn in range(_WARM_UP):  # optimizers make their moments; penalties are due in the first
        update(turn * images)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    # As many turns as make penalties due as often as in a run: the mean over them is a run's.
    turns = math.ceil(5 / interval) * interval
    seconds = _seconds(lambda turn: update((_WARM_UP + turn) * images), turns)
    peak = torch.cuda.max_memory_allocated() - held
    config = load(str(ROOT / "configs" / f"{name}.yaml"), ("data.conditional=false",))
    return {
        "images/s": round(images / seconds, 1),
        "peak beyond what is held, GiB": round(peak / 2**30, 2),
        "forecast, GiB": round(activations(config, images, kind, 0) / 2**30, 2),
    }


def _interval(name: str) -> int:
    """Of how many updates of a published config one has all lazy penalties due; 1 if none is lazy."""
    from pipeline.config import load
    from pipeline.gan.schedules import is_used

    penalty = load(str(ROOT / "configs" / f"{name}.yaml"), ("data.conditional=false",)).penalty
    slopes = [slope for slope in (penalty.r1, penalty.r2) if is_used(slope.gamma)]
    lazy = [*slopes, penalty.path] if penalty.path.weight else slopes
    return math.lcm(*(each.interval for each in lazy))


def memory() -> Outcome:
    """What ranks hold at a step and send in an update, beside theory."""
    from launch.bench import memory, pair

    chosen = "single,ddp,fsdp2,zero1,zero2,zero3" if GPUS else "single,fsdp2"
    chosen += ",hsdp" if GPUS >= 4 and GPUS % 2 == 0 else ""  # two copies of two parts, at least
    found = pair.measure(
        "launch.bench.memory", strategies=chosen, procs=str(WORLD), params=20e6 if GPUS else 2e6, size="32",
        images=4, config=None,
    )  # fmt: skip
    failures, figures = [], {}
    for each in found:
        held, (theory, sent) = memory.held(each), memory.in_theory(each)
        figures[f"{each['strategy']} x{each['world']}"] = {
            "held, MiB": round(sum(held.values()) / 2**20, 1),
            "in theory, MiB": round(sum(theory.values()) / 2**20, 1),
            "sent, MiB": round(sum(each["sent"].values()) / 2**20, 1),
            "sent in theory, MiB": round(sent / 2**20, 1),
        }
        pairs = {"holds": (held, theory), "sends": (each["sent"], {"": sent})}
        if each["world"] > 1 and each["strategy"] != "zero3":  # which leaves small parameters whole
            failures += [
                f"{each['strategy']} {verb} other than in theory"
                for verb, (found_, due) in pairs.items()
                if abs(sum(found_.values()) - sum(due.values())) > 0.05 * sum(due.values())
            ]
    return failures, figures


def step() -> Outcome:
    """`shardgan bench step`: ours beside its bare maths and the tutorials' loop, and what penalties cost."""
    from launch.bench import objective
    from launch.bench import step as bench
    from launch.bench.loader import make_shards

    size = "64" if GPUS else "28"
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder) / "shards", int(size), 1, "PNG")
        config = bench.config_of(shards, int(size))
        seconds = bench.measure(config, Path(folder), ("fp32", "bf16"), 80 if GPUS else 8)
        turns = {kind: objective.measure(config, kind, 20 if GPUS else 3) for kind in ("no", "bf16")}
    images = 8 * config.images_per_update
    figures: dict[str, Any] = {
        f"{name}, images/s": round(images / statistics.median(taken), 1) for name, taken in seconds.items()
    }
    for kind, found in turns.items():
        plain = statistics.median(found["no gradient penalty"])
        figures |= {
            f"D's turn, {kind}: {n}": round(statistics.median(t) / plain, 2) for n, t in found.items()
        }
    return [], figures


def compiled(name: str) -> Outcome:
    """Updates of a config as they are, compiled, and compiled with CUDA graphs, in turns: images per second,
    and times as they are. Lazy penalties, in whose turns nothing is compiled, are due as in a run."""
    from launch.bench.meter import clocked
    from pipeline.parallel.compilation import REDUCE_OVERHEAD, Compilation, check_compilation

    ways = {"as it is": None, "compiled": Compilation("inductor")}
    ways |= {REDUCE_OVERHEAD: Compilation("inductor", graphs=True)} if GPUS else {}
    for way in ways.values():
        check_compilation(way, "single", 1, bool(GPUS))
    kind, turns = ("bf16", 32) if GPUS else ("no", 9)
    images = COMPILED[name]
    failures, updates, taken = [], {}, {way: list[float]() for way in ways}
    for way, how in ways.items():
        try:
            update = _update(name, kind, images, how)
            for turn in range(_WARM_UP):
                with clocked(taken[way]):
                    update(turn * images)
        except RuntimeError as error:
            failures.append(f"{way}: {str(error).splitlines()[0]}")
        else:
            updates[way] = update
    for turn in range(_WARM_UP, _WARM_UP + turns):
        for way, update in updates.items():
            with clocked(taken[way]):
                update(turn * images)
    figures = {}
    for way in updates:
        first, slow, fast = taken[way][0], taken["as it is"][_WARM_UP:], taken[way][_WARM_UP:]
        figures[f"{kind}, {images} images, {way}"] = {
            "images/s": round(images * turns / sum(fast), 1),
            "times as it is": round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 2),
            "first update, s": round(first, 1),
        }
    return failures, figures


def compiled_exact() -> Outcome:
    """Compiled networks, and CUDA graphs of them, move as plain ones do, in full float32: the largest
    difference, as a share of how far four updates move a player."""
    from launch.selfcheck import parity
    from pipeline.parallel.compilation import Compilation

    parity.ieee()
    ways = {"compiled": Compilation("inductor")}
    ways |= {"CUDA graphs": Compilation("inductor", graphs=True)} if GPUS else {}
    failures, figures = [], {}
    for name in EXACT if GPUS else ("fashion-mnist",):
        plain = _moves(name, None)
        for way, how in ways.items():
            found = _moves(name, how)
            errors = {p: float((found[p] - move).norm() / move.norm()) for p, move in plain.items()}
            figures[f"{name}, {way}"] = errors
            failures += [
                f"{name}, {way}: {p} moves otherwise, by {e:.0e}" for p, e in errors.items() if not e <= 0.01
            ]
    return failures, figures


def _moves(name: str, how: Compilation | None) -> dict[str, torch.Tensor]:
    """What four updates by SGD add to the weights of each player."""
    gan, update = _pair(name, "no", 4, how, _BY_SGD)
    engines = {"G": gan.G, "D": gan.D}
    before = {player: [f.data.clone() for f in engine.fragments] for player, engine in engines.items()}
    for turn in range(4):
        update(turn * 4)
    return {
        player: torch.cat(
            [(f.data - b).flatten() for f, b in zip(engine.fragments, before[player], strict=True)]
        )
        for player, engine in engines.items()
    }


def _update(name: str, kind: str, images: int, how: Compilation | None = None) -> Callable[..., object]:
    """An update of a published config on made-up images, in one process; given cur_nimg, or 0."""
    return _pair(name, kind, images, how)[1]


def _pair(
    name: str, kind: str, images: int, how: Compilation | None = None, settings: tuple[str, ...] = ()
) -> tuple[Gan, Callable[..., object]]:
    """The players of `_update`, and it."""
    from pipeline.config import load
    from pipeline.data.stream import Batch
    from pipeline.parallel.batch import batch_shape
    from pipeline.parallel.launched import Launch
    from pipeline.parallel.ranks import Ranks
    from pipeline.players import build
    from pipeline.run.stats import Stats
    from pipeline.step import train_step

    sizes = (f"data.batch_size={images}", "data.batch_gpu=null", "data.conditional=false")
    config = load(str(ROOT / "configs" / f"{name}.yaml"), (*sizes, *settings))
    launch = Launch("single", kind, 0, 1, compilation=how)  # type: ignore[arg-type]
    ranks = Ranks(launch, timedelta(seconds=600))
    gan, stats = build(config, ranks, batch_shape(config.data, 1)), Stats(ranks.device)
    shape = (images, config.data.channels, config.data.size, config.data.size)
    same = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=same)
    if config.data.latents:
        pixels = torch.randn(shape, generator=same)
    batches = repeat(Batch(pixels.pin_memory() if GPUS else pixels, None))
    return gan, lambda cur_nimg=0: train_step(gan, batches, cur_nimg, stats)


def _seconds(update: Callable[[int], object], times: int) -> float:
    """The mean of so many updates, each given its number."""
    from launch.bench.meter import clocked

    taken: list[float] = []
    for turn in range(times):
        with clocked(taken):
            update(turn)
    return statistics.mean(taken)
