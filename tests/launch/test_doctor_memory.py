"""The memory that doctor forecasts, against what PyTorch allocates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from doctored import GOOD, PENALISED, VIT, job
from torch.profiler import ProfilerActivity, profile

from launch import presets
from launch.doctor import alone
from launch.doctor import memory as doctor_memory
from launch.doctor import networks as doctor_networks
from launch.doctor.finding import Finding, Job, Machine
from launch.installed import configs
from pipeline import config
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.launched import emulated

SGD = [f"optim.{player}.{key}" for player in "GD" for key in ("kind=sgd", "momentum=0.9", "clip=1")]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        (["G.norm=batch", "G.width=32", "D.width=32"], "no"),
        (["G.kind=resnet", "D.kind=resnet", "penalty.r1.gamma=1", "data.size=32", "G.width=16"], "no"),
        (["G.kind=resnet", "D.kind=resnet", "data.size=32", "data.channels=3", "G.width=16"], "bf16"),
        (["loss.kind=relativistic", *PENALISED, "G.width=32", "D.width=32"], "no"),
        ([*VIT, *PENALISED, "penalty.r2.sigma=0.1"], "no"),
        (["loss.kind=relativistic", *PENALISED, "penalty.r1.fraction=1/4", "penalty.r2.sigma=0.1"], "no"),
        (
            ["data.conditional=true", "D.spectral_norm=true", "penalty.l1=1e-5", *SGD, "loss.D_steps=2"],
            "fp16",
        ),
    ],
)
def test_activations_are_those_measured(settings: list[str], precision: str) -> None:
    """PyTorch's allocator is asked what the same turns take on a CPU: up to 1.6 times as much, as said."""
    asked = job(*settings, precision=precision)
    how = asked.config, 8, precision, 3 * asked.config.data.conditional
    traced = doctor_memory.activations(*how)
    update, _known = alone.second_update(*how)
    measured = allocated(update)
    print(traced, measured)
    # Convolutions in emulated bf16 need more yet, which doctor says apart.
    most = 2.2 if emulated(precision, torch.device("cpu")) else doctor_memory.WORK_SPACE
    assert measured / most < traced < 1.05 * measured


@pytest.mark.parametrize(
    ("name", "size", "gpus", "precision", "most"),
    [
        *((f"r3gan-{of}", None, 8, "bf16", 64) for of in ("imagenet64", "imagenet32", "ffhq256")),
        ("own-gpu", 128, 1, "no", 24),
        ("own-gpu", 256, 1, "no", 24),
    ],
)
def test_a_round_of_what_is_published_fits_its_gpus(
    name: str, size: int | None, gpus: int, precision: str, most: int
) -> None:
    """most: GiB of a GPU. On more ranks a round has no more images."""
    settings = ["data.train=x", *([] if size is None else [f"data.size={size}", *presets.GPU.at(size)])]
    asked = Job(config.load(configs() / f"{name}.yaml", settings), 1, gpus, "ddp", precision)
    num_classes = 1000 * asked.config.data.conditional
    images = batch_shape(asked.config.data, gpus).images
    assert batch_shape(asked.config.data, 8 * gpus).images <= images
    active = doctor_memory.activations(asked.config, images, precision, num_classes)
    held = doctor_memory.states(asked, doctor_networks.build_players(asked, num_classes))
    _, high = doctor_memory.in_all(held, active)
    assert doctor_memory.fits(high, most * 2**30), high / 2**30


def allocated(turn: Callable[[], object]) -> int:
    """The most bytes that PyTorch's CPU allocator has given out and not got back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        turn()
    assert seen.profiler is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_memory_follows_rounds_and_strategy(
    monkeypatch: pytest.MonkeyPatch, gpus_here: Callable[[int], None]
) -> None:
    def found(asked: Job) -> Finding:
        return next(
            doctor_memory.examine(
                asked, doctor_networks.build_players(asked, 0), doctor_memory.traced(asked, 0)
            )
        )

    whole, parts = (found(job(*extra)).text for extra in ([], ["data.batch_gpu=2"]))
    assert "activations of 10 images" in whole and "activations of 2 images" in parts
    players = doctor_networks.build_players(job(), 0)
    held = {s: doctor_memory.states(job(strategy=s, procs=4), players) for s in ("ddp", "zero2", "fsdp2")}
    assert held["ddp"]["optimizer"] == 4 * held["zero2"]["optimizer"] == 4 * held["fsdp2"]["optimizer"]
    sizes = [4 * sum(p.numel() for p in player.parameters()) for player in players]  # a bucket holds either
    assert held["zero2"]["buckets"] == max(sizes)
    hybrid = job(strategy="hsdp", nodes=8, procs=4)  # sharded over the 4 of a node
    assert doctor_memory.states(hybrid, players) == held["fsdp2"]
    assert doctor_memory.states(job(strategy="zero3", procs=4), players)["buckets"] == sum(sizes)
    sgd = ["optim.G.kind=sgd", "optim.D.kind=sgd", "optim.D.momentum=0.9"]
    G, D = (4 * sum(p.numel() for p in player.parameters()) for player in players)
    assert doctor_memory.states(job(*sgd), players)["optimizer"] == D
    assert doctor_memory.states(job(), players)["weights"] == G + D

    frozen = job("D.freeze=1", procs=4)
    players = doctor_networks.build_players(frozen, 0)
    kept = 4 * sum(p.numel() for p in players[1].blocks[0].parameters())  # type: ignore[operator, union-attr]
    assert doctor_memory.states(frozen, players)["frozen weights"] == kept > 0
    of = {s: doctor_memory.states(replace(frozen, strategy=s), players) for s in ("fsdp2", "zero3")}
    assert of["fsdp2"]["frozen weights"] == kept + kept / 4, "gathered, beside the part of a rank"
    assert of["zero3"]["frozen weights"] == kept / 4
    assert of["zero3"]["gathered, at most"] == 4 * sum(p.numel() for of in players for p in of.parameters())

    class Small:
        total_memory = 1 << 16

    gpus_here(1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Small)
    too_much = found(job())
    assert too_much.verdict == "would fail" and "batch_gpu" in too_much.remedy
    assert found(replace(job(), machine=Machine(remote=True))).verdict == "ok"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert found(job()).verdict == "ok", "which would not train on it"


def test_what_is_known_is_compared_where_activations_are_not() -> None:
    """ZeRO 3's gathered weights are the most that it may need, so they decide nothing."""
    players = doctor_networks.build_players(job(), 0)

    def found(strategy: str, memory: float) -> Finding:
        asked = replace(job(strategy=strategy), machine=Machine(gpu_memory=round(memory)))
        return next(doctor_memory.examine(asked, players, "an error"))

    for strategy in ("ddp", "zero3"):
        held = doctor_memory.states(job(strategy=strategy), players)
        least = sum(size for name, size in held.items() if name != "gathered, at most")
        small, enough = found(strategy, 0.9 * least), found(strategy, 1.1 * least)
        assert small.verdict == "would fail" and "narrower" in small.remedy
        assert enough.verdict == "ok" and "in all at least" in enough.text
        assert "cannot be traced (an error); a GPU has" in enough.text
