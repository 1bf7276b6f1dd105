"""The parts of the GPU suite: each a function that returns what is wrong, in words, and its figures.

Nothing is imported at the top that a part could lack: a part fails by itself.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

Part = Callable[[], tuple[list[str], dict[str, Any]]]

ROOT = Path(__file__).parents[2]
SHARDS = ROOT / "tests" / "assets" / "fashion-mnist-500"
GPUS = torch.cuda.device_count()
WORLD = GPUS or 2
DEVICE = "cuda" if GPUS else "cpu"
# A case of each kind: the whole matrix is for CPUs, where a launch takes a minute and not four.
CASES = (
    "adam-l2-clipped-2", "sgd-l1l2-clipped-2", "r1", "labels", "spectral", "group", "relativistic", "r1-r2",
    "wgan-gp", "fraction", "difference", "path", "schedules", "augmentation", "adaptive", "sync-batch-r1",
    "effective", "freeze", "r3gan", "stylegan2", "vit",
)  # fmt: skip
SIZES = {  # published settings, at so many images per GPU
    "r3gan-cifar10": 64, "r3gan-ffhq64": 32, "r3gan-ffhq256": 8, "stylegan2-256": 8, "gat-b2": 32,
}  # fmt: skip


class Skipped(Exception):
    """Why this machine cannot do a part."""


def need(gpus: int) -> None:
    if gpus > GPUS:
        raise Skipped(f"needs {gpus} GPU{'s' * (gpus > 1)}; this machine has {GPUS}")


def surroundings() -> tuple[list[str], dict[str, Any]]:
    """The machine and the versions; what is older than is supported fails."""
    from packaging.version import Version

    names = ("torch", "accelerate", "deepspeed", "webdataset", "wandb", "numpy", "pillow")
    figures: dict[str, Any] = {name: importlib.metadata.version(name) for name in names}
    figures |= {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()}
    figures |= {"GPUs": GPUS, "CUDA": torch.version.cuda}
    if GPUS:
        memory = torch.cuda.get_device_properties(0).total_memory
        figures |= {"GPU": torch.cuda.get_device_name(), "GPU memory, GiB": round(memory / 2**30, 1)}
        figures |= {"NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
        figures |= {"cuDNN": torch.backends.cudnn.version()}
    old = [f"torch {torch.__version__}"] if Version(torch.__version__) < Version("2.11") else []
    old += [f"Python {platform.python_version()}"] if sys.version_info < (3, 11) else []
    return [f"{what} is too old" for what in old], figures


def parity(strategy: str) -> tuple[list[str], dict[str, Any]]:
    """Weights, charts and a resumed training against plain torch on the same device, in full float32."""
    from launch import processes, selfcheck
    from launch.selfcheck import parity

    world = 1 if strategy == "single" else WORLD
    there = {case.name: case for case in parity.cases(world, strategy)}
    chosen = [name for name in CASES if name in there]
    with tempfile.TemporaryDirectory() as folder:
        ended = processes.launch(
            strategy, world, ["parity_table", "in-rank", folder, *chosen], on_cpu=not GPUS,
            deepspeed=selfcheck.PARTITION_ALL.get(strategy),
        )  # fmt: skip
        if ended.returncode:
            return [(ended.stdout + ended.stderr)[-1500:]], {}
        worst = dict.fromkeys(selfcheck.COLUMNS, 0.0)
        wrong = []
        for name in chosen:
            expected = selfcheck.expected(there[name], DEVICE)
            for column, what, error in selfcheck.differences(selfcheck.read(Path(folder), name), expected):
                worst[column] = max(worst[column], error)
                if error > there[name].slack * selfcheck.tolerance(column):
                    wrong.append(f"{name}, {what}: {error:.1e}")
    return wrong[:5], {"strategy": strategy, "ranks": world, "cases": len(chosen), **worst}


def precision(kind: str) -> tuple[list[str], dict[str, Any]]:
    """bf16 or fp16 against float32, and an update that overflows."""
    from launch import selfcheck

    failures, figures = [], {}
    for strategy in ("single", "ddp", "fsdp2", "zero2", "zero3"):
        world = 1 if strategy == "single" else WORLD
        with tempfile.TemporaryDirectory() as folder:
            errors, failure = selfcheck.train_and_judge(strategy, world, Path(folder), DEVICE, kind)
        failures += [failure] if failure else []
        failures += [
            f"{strategy}, {column}: {error:.1e}"
            for column, error in errors.items()
            if error > selfcheck.tolerance(column, kind)
        ]
        figures[f"{strategy} x{world}"] = errors
    return failures, figures


def resume() -> tuple[list[str], dict[str, Any]]:
    """Trainings from shards, stopped half-way and continued by the same command, to the same bits."""
    pairs = {
        "dcgan": (),
        "r3gan": ("G.kind=r3gan", "D.kind=r3gan", "loss.kind=relativistic", "penalty.r2.gamma=1"),
    }
    failures, figures = [], {}
    with tempfile.TemporaryDirectory() as runs:
        for name, kind in [(n, k) for n in pairs for k in ("no", "bf16")][: None if GPUS else 1]:
            ends = []
            for stops in ((2,), (1, 2)):
                run = f"{name}-{kind}-{len(stops)}"
                for kimg in stops:
                    _train(runs, run, kind, *pairs[name], "penalty.r1.gamma=1", f"run.total_kimg={kimg}")
                ends.append(_tensors(Path(runs) / run / "checkpoints"))
            same = ends[0].keys() == ends[1].keys() and all(
                torch.equal(t, ends[1][k]) for k, t in ends[0].items()
            )
            figures[f"{name}, {kind}"] = "the same bits" if same else "other bits"
            failures += [] if same else [f"{name}, {kind}: a resumed run ends with other bits"]
    return failures, figures


def _train(runs: str, name: str, kind: str, *settings: str, procs: int = 1) -> None:
    small = (
        f"data.train={SHARDS}", "data.size=28", "data.channels=1", "data.batch_size=32", "D.norm=none",
        "G.width=16", "D.width=16", "run.tick_kimg=0.5", "run.eval_kimg=1000", "run.snapshot_kimg=1000",
        "track.wandb=false", f"run.out={runs}", f"run.name={name}",
    )  # fmt: skip
    config = Path(runs) / "none.yaml"
    config.write_text("{}\n")
    line = [sys.executable, "-m", "launch.cli", "train", str(config), *small, *settings]
    line += ["--procs", str(procs), "--mixed_precision", kind]
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError((ended.stdout + ended.stderr)[-1500:])


def _tensors(checkpoints: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    newest = max(checkpoints.iterdir(), key=lambda folder: int(folder.name))
    return {f"{f.name}/{k}": t for f in sorted(newest.glob("*.safetensors")) for k, t in load_file(f).items()}


def no_waits() -> tuple[list[str], dict[str, Any]]:
    """One update of every family in which torch refuses whatever would make the host wait for the device."""
    need(1)
    figures = {}
    for name in SIZES:
        for kind in ("no", "bf16", "fp16"):
            update = _update(name, kind, images=4)
            update()
            update()  # everything is allocated and chosen
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                update()
                figures[f"{name}, {kind}"] = "none"
            except RuntimeError as error:
                figures[f"{name}, {kind}"] = str(error).splitlines()[0]
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return [f"{name}: {said}" for name, said in figures.items() if said != "none"], figures


def _update(name: str, kind: str, images: int) -> Callable[[], object]:
    """An update of a published config on made-up images, in one process."""
    from datetime import timedelta
    from itertools import repeat

    from pipeline.config import load
    from pipeline.data.stream import Batch
    from pipeline.parallel.batch import batch_shape
    from pipeline.parallel.launched import Launch
    from pipeline.parallel.ranks import Ranks
    from pipeline.players import build
    from pipeline.run.stats import Stats
    from pipeline.step import train_step

    sizes = (f"data.batch_size={images}", "data.batch_gpu=null", "data.conditional=false")
    config = load(str(ROOT / "configs" / f"{name}.yaml"), sizes)
    ranks = Ranks(Launch("single", kind, 0, 1), timedelta(seconds=600))  # type: ignore[arg-type]
    gan, stats = build(config, ranks, batch_shape(config.data, 1)), Stats(ranks.device)
    shape = (images, config.data.channels, config.data.size, config.data.size)
    pixels = torch.randn(shape) if config.data.latents else torch.randint(0, 256, shape, dtype=torch.uint8)
    batches = repeat(Batch(pixels.pin_memory() if GPUS else pixels, None))
    return lambda: train_step(gan, batches, 0, stats)


def speed() -> tuple[list[str], dict[str, Any]]:
    """Images per second and the most memory of published settings, beside doctor's forecast."""
    need(1)
    from launch.doctor.memory import activations
    from pipeline.config import load

    figures = {}
    for name, images in SIZES.items():
        for kind in ("no", "bf16"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            update = _update(name, kind, images)
            held = torch.cuda.memory_allocated()
            seconds = _seconds(update, times=5)
            peak = torch.cuda.max_memory_allocated() - held
            config = load(str(ROOT / "configs" / f"{name}.yaml"), ("data.conditional=false",))
            figures[f"{name}, {kind}, {images} images"] = {
                "images/s": round(images / seconds, 1),
                "peak beyond what is held, GiB": round(peak / 2**30, 2),
                "forecast, GiB": round(activations(config, images, kind, 0) / 2**30, 2),
            }
            del update
    return [], figures


def _seconds(update: Callable[[], object], times: int) -> float:
    """The median of so many updates, after three."""
    from launch.bench.meter import clocked

    for _ in range(3):
        update()
    taken: list[float] = []
    for _ in range(times):
        with clocked(taken):
            update()
    return statistics.median(taken)


def memory() -> tuple[list[str], dict[str, Any]]:
    """What ranks hold at a step and send in an update, beside theory."""
    from launch.bench import memory, pair

    chosen = "single,ddp,fsdp2,zero1,zero2,zero3" if GPUS else "single,fsdp2"
    found = pair.measure(
        "launch.bench.memory", strategies=chosen, procs=str(WORLD), params=20e6 if GPUS else 2e6, size="32",
        images=4, config=None,
    )  # fmt: skip
    figures = {}
    for each in found:
        held, (theory, sent) = memory.held(each), memory.in_theory(each)
        figures[f"{each['strategy']} x{each['world']}"] = {
            "held, MiB": round(sum(held.values()) / 2**20, 1),
            "in theory, MiB": round(sum(theory.values()) / 2**20, 1),
            "sent, MiB": round(sum(each["sent"].values()) / 2**20, 1),
            "sent in theory, MiB": round(sent / 2**20, 1),
        }
    return [], figures


def step() -> tuple[list[str], dict[str, Any]]:
    """`shardgan bench step`: ours beside its bare maths and the tutorials' loop, and what penalties cost."""
    from launch.bench import objective
    from launch.bench import step as bench
    from launch.bench.loader import make_shards
    from pipeline.config import load

    size = "64" if GPUS else "28"
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder) / "shards", int(size), 1, "PNG")
        keys = [f"data.train={shards}", f"data.size={size}", "data.batch_size=64", "data.workers=1"]
        config = load(None, [*keys, "G.width=64", "D.width=64", "penalty.l2=1e-4", "run.name=bench"])
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


def loader() -> tuple[list[str], dict[str, Any]]:
    """`shardgan bench loader`, in images per CPU-second."""
    from launch.bench import loader

    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (size, channels, kind) in loader._KINDS.items():
            shards = loader.make_shards(Path(folder) / name.replace(" ", "-"), size, channels, kind)
            speeds = loader._measure(
                loader._contestants(str(shards), size, channels), 3, max(50, 28 * 250 // size // 50 * 50)
            )
            figures[name] = {who: round(statistics.median(found)) for who, found in speeds.items()}
    return [], figures


def saves() -> tuple[list[str], dict[str, Any]]:
    """How long a save keeps training waiting: tests/benchmarks/save.py."""
    from launch import processes

    figures = {}
    for strategy in ("ddp", "fsdp2", "zero3"):
        ended = processes.launch(strategy, WORLD, ["save", "20e6" if GPUS else "2e6"], on_cpu=not GPUS)
        if ended.returncode:
            return [f"{strategy}: {(ended.stdout + ended.stderr)[-800:]}"], figures
        figures[f"{strategy} x{WORLD}"] = ended.stdout.strip().splitlines()[-1].partition(": ")[2]
    return [], figures


def killed_rank() -> tuple[list[str], dict[str, Any]]:
    """A rank is killed in mid-training: all end, the right one is named, and no process is left."""
    import psutil

    if GPUS == 1:
        need(2)
    with tempfile.TemporaryDirectory() as runs, (Path(runs) / "log").open("w") as log:
        config = Path(runs) / "none.yaml"
        config.write_text("{}\n")
        settings = [
            "data.size=28",
            "data.channels=1",
            "run.total_kimg=10000",
            "run.tick_kimg=0.5",
            "run.eval_kimg=1e6",
        ]
        line = [sys.executable, "-m", "launch.cli", "train", str(config), f"data.train={SHARDS}", *settings]
        line += [f"run.out={runs}", "run.name=killed", "track.wandb=false", "--procs", str(WORLD)]
        job = subprocess.Popen(line, stdout=log, stderr=log)
        rows = Path(runs) / "killed" / "metrics.jsonl"
        end = time.monotonic() + 120
        while not (rows.exists() and rows.stat().st_size) and time.monotonic() < end and job.poll() is None:
            time.sleep(0.2)
        everyone = psutil.Process(job.pid).children(recursive=True)
        ranks = sorted(
            (p for p in everyone if p.environ().get("RANK") == "1" and "pipeline.train" in p.cmdline()),
            key=lambda p: p.pid,
        )
        if not ranks:
            job.kill()
            return [f"rank 1 never trained: {Path(log.name).read_text()[-800:]}"], {}
        start = time.monotonic()
        ranks[0].kill()
        status = job.wait(120)
        seconds = round(time.monotonic() - start, 1)
        left = [p.pid for p in everyone if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        said = Path(log.name).read_text()
    named = re.search(r"rank 1 \([^)]*\) is gone: killed", said)
    failures = [] if named else [f"rank 1 is not named: {said[-500:]}"]
    failures += ["exit status 0"] if status == 0 else []
    failures += [f"processes left: {left}"] if left else []
    return failures, {"ranks": WORLD, "seconds until all ended": seconds, "said": named[0] if named else ""}


# In order of importance: what does not fit into the time is left for the next call.
PARTS: dict[str, Part] = {
    "surroundings": surroundings,
    "parity-single": partial(parity, "single"),
    "no-waits": no_waits,
    "resume": resume,
    "step": step,
    "speed": speed,
    "precision-bf16": partial(precision, "bf16"),
    "precision-fp16": partial(precision, "fp16"),
    **{f"parity-{s}": partial(parity, s) for s in ("ddp", "fsdp2", "zero3", "zero2", "zero1")},
    "killed-rank": killed_rank,
    "memory": memory,
    "saves": saves,
    "loader": loader,
}
