"""`shardgan doctor` as a whole, and its checks of config, networks and place on real mistakes."""

from __future__ import annotations

import http.server
import importlib.metadata
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import wandb
from click.testing import CliRunner, Result
from torch import nn
from torch.profiler import ProfilerActivity, profile

from launch.cli import cli
from launch.doctor import checks
from launch.doctor import memory as doctor_memory
from launch.doctor import networks as doctor_networks
from launch.doctor import place as doctor_place
from launch.doctor.checks import examine, job_of
from launch.doctor.finding import Finding, Job, fails
from launch.processes import ACCELERATE_FILES, free_port
from pipeline import config

FASHION = Path(__file__).parents[1] / "assets" / "fashion-mnist-500"
SGD = [f"optim.{player}.{key}" for player in "GD" for key in ("kind=sgd", "momentum=0.9", "clip=1")]
PENALISED = ["penalty.r1.gamma=1", "penalty.r1.interval=1", "penalty.r2.gamma=1"]
VIT = [
    f"{player}.{key}"
    for player in "GD"
    for key in ("kind=vit", "norm=batch", "width=32", "depth=4", "patch=4", "checkpoint=true")
]
LATENT = ["G.kind=launch.selfcheck.networks:LatentGenerator", "G.options={width: 8, norm: none}"]
GOOD = f"""
data: {{train: {FASHION}, size: 28, channels: 1, batch_size: 20}}
G: {{width: 8, norm: group}}
D: {{width: 8, norm: none}}
score: {{images: 50}}
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "good.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHARDGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor_place, "_PORT", free_port())
    return tmp_path


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, ["doctor", *arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def job(*settings: str, procs: int = 2, strategy: str = "ddp", precision: str = "no", nodes: int = 1) -> Job:
    return Job(config.load("good.yaml", settings), nodes, procs, strategy, precision)


def networks(asked: Job) -> dict[str, Finding]:
    _, found = doctor_networks.examine(asked, None)
    return {finding.check: finding for finding in found}


# The whole command


def test_a_sound_job(place: Path) -> None:
    result = call("good.yaml", "--nodes", "5", "--gpus", "2", "--strategy", "zero2")
    assert result.exit_code == 0, result.output
    assert "would fail" not in result.output.replace("Nothing found that would fail.", "")
    rows = ("launcher", "batch", "shards", "split", "images", "networks", "memory", "run folder", "versions")
    assert all(any(line.startswith(row) for line in result.output.splitlines()) for row in rows)
    assert "20 = 10 ranks x 1 round x 2 images" in result.output
    assert "node 4: ranks 8 to 9" in result.output
    assert not (place / "runs").exists()


def test_what_would_fail_is_listed_at_once_with_status_2() -> None:
    settings = ["data.batch_size=13", "data.conditional=true", "data.size=48", "score.features=inception"]
    result = call("good.yaml", "--gpus", "2", *settings)
    assert result.exit_code == 2
    for word in (
        "13 cannot be divided",
        "12 or 14",
        "28x28 but data.size=48",
        "dcgan has no network",
        "efflite0",
    ):
        assert word in result.output, word
    assert "This would fail." in result.output


def test_a_bad_config_is_one_row_with_all_its_errors() -> None:
    result = call("good.yaml", "G.widht=8", "run.seed=-1")
    assert result.exit_code == 2 and "did you mean `width`?" in result.output and "run.seed" in result.output


def test_the_defaults_are_those_of_train() -> None:
    settings = config.load("good.yaml")
    assert (
        job_of(settings, gpus=1).strategy == "single" and job_of(settings, nodes=2, gpus=1).strategy == "ddp"
    )
    assert job_of(settings, strategy="single").world == 1


def test_more_processes_than_gpus_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (found,) = checks.launcher(job())
    assert found.verdict == "warning" and "2 processes, but this machine has 1 GPU" in found.text


def test_a_launcher_file_of_another_strategy(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "ACCELERATE_FILES", place)
    (missing,) = checks.launcher(job())
    shutil.copy(ACCELERATE_FILES / "single.yaml", place / "ddp.yaml")
    (wrong,) = checks.launcher(job())
    assert missing.verdict == wrong.verdict == "would fail"
    assert "ddp.yaml cannot be read" in missing.text and "distributed_type NO" in wrong.text


def test_another_run_in_the_folder(place: Path) -> None:
    folder = place / "runs" / "good"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.dump(config.load("good.yaml", ["G.width=16"])))
    found = {f.check: f for f in examine(job())}
    assert found["config"].verdict == "would fail" and "G.width: 16 → 8" in found["config"].text
    (folder / "config.yaml").write_text(config.dump(config.load("good.yaml")))
    (folder / "DONE").write_text("1000000\n")
    found = {f.check: f for f in examine(job(strategy="single"))}
    assert found["config"].verdict == "warning" and "finished" in found["config"].text
    assert found["launcher"].verdict == "would fail" and "one process" in found["launcher"].text
    assert fails(list(found.values()))


# Networks and their traps


class Tied(nn.Module):
    """D with one kernel under two names."""

    def __init__(self, size: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.a = nn.Linear(channels * size * size, 1)
        self.b = nn.Linear(channels * size * size, 1)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        return (self.a(x.flatten(1)) + self.b(x.flatten(1))).flatten()


def test_tied_weights_fail_under_fsdp2_only() -> None:
    kind = f"D.kind={__name__}:Tied"
    assert networks(job(kind, strategy="fsdp2"))["tied weights"].verdict == "would fail"
    assert "tied weights" not in networks(job(kind, strategy="zero2"))


@pytest.mark.parametrize(
    ("settings", "strategy", "check", "words"),
    [
        (["G.norm=batch", "D.norm=batch"], "ddp", "BatchNorm", ["G and D", "over the 10 images"]),
        (["D.norm=batch", "penalty.r1.gamma=1"], "single", "R1", ["depends on the others"]),
        (["penalty.G.l2=1e-4"], "ddp", "weight penalty", ["λ_G on weights", "2 of 3 kernels"]),
        (["D.spectral_norm=true", "penalty.D.l1=1e-4"], "ddp", "weight penalty", ["λ_D on", "3 of 3"]),
        (["run.checkpoint_kimg=500"], "ddp", "checkpoints", ["every 500 of 1000 kimg"]),
        (["run.eval_kimg=0.5"], "ddp", "scores", ["10%"]),
    ],
)  # fmt: skip
def test_traps(settings: list[str], strategy: str, check: str, words: list[str]) -> None:
    found = networks(job(*settings, strategy=strategy, procs=1 if strategy == "single" else 2))[check]
    assert found.verdict == "warning" and found.remedy
    assert all(word in found.text for word in words), found.text


@pytest.mark.parametrize(
    ("settings", "precision", "word"),
    [
        (["penalty.r2.gamma=1"], "fp16", "fp16"),
        (["penalty.r1.gamma=1", "penalty.r1.fraction=1/4"], "no", "4"),
    ],
)
def test_an_objective_that_training_refuses(settings: list[str], precision: str, word: str) -> None:
    found = networks(job(*settings, precision=precision))["objective"]
    assert found.verdict == "would fail" and word in found.text


def test_what_a_run_remarks_on_is_a_warning() -> None:
    found = networks(job("penalty.r1.gamma=1", "loss.kind=relativistic"))["objective"]
    assert found.verdict == "warning" and "interval=16" in found.text


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            ["penalty.r1.gamma=[1,0]", "penalty.r2.gamma=1", "run.burn_in_kimg=1"],
            "r1 and r2: each rank gathers all of D",
        ),
        (["penalty.wgan_gp.weight=1"], "wgan_gp: each rank gathers all of D"),
        ([*LATENT, "penalty.path.weight=1"], "path length: each rank gathers all of G"),
        (["penalty.r1.gamma=1", "penalty.r1.sigma=0.1"], None),
        ([], None),
    ],
)  # fmt: skip
def test_what_is_differentiated_twice_is_gathered_under_zero3(settings: list[str], text: str | None) -> None:
    name = "gradient penalty"
    assert name not in networks(job(*settings, strategy="zero2"))
    found = networks(job(*settings, strategy="zero3"))
    assert (name in found) == (text is not None)
    assert text is None or found[name].text.startswith(text)


def test_norms_over_all_ranks_are_no_trap() -> None:
    found = networks(job("G.norm=sync_batch", "D.norm=sync_batch", procs=2))["BatchNorm"]
    assert found.verdict == "ok" and "over the 20 images of a round" in found.text


@pytest.mark.parametrize(("lr", "said"), [("1.6e-3", False), ("[1.6e-3,1e-4]", False), ("2e-4", True)])
def test_a_transformer_s_learning_rate_falls_with_its_width(lr: str, said: bool) -> None:
    widths = ["G.width=96", "D.width=96"]
    found = networks(
        job(*VIT, *widths, f"optim.D.lr={lr}", "optim.G.lr=1.6e-3", "run.burn_in_kimg=1", procs=1)
    )
    assert found["networks"].verdict == "ok" and ("learning rate" in found) == said
    if said:
        assert "optim.D.lr=0.0002" in found["learning rate"].text
        assert "optim.D.lr=0.0016" in str(found["learning rate"].remedy)


def test_no_trap_without_cause() -> None:
    found = networks(job("penalty.D.l2=1e-4"))
    assert set(found) == {"networks", "weight penalty"} and found["weight penalty"].verdict == "ok"
    assert "through all of its kernels" in found["weight penalty"].text
    assert set(networks(job())) == {"networks"}
    assert "BatchNorm" not in networks(job("G.norm=batch", procs=1))


# Memory


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
    update, _known = doctor_memory.second_update(*how)
    measured = allocated(update)
    print(traced, measured)
    assert measured / doctor_memory.WORK_SPACE < traced < 1.05 * measured


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


def test_memory_follows_rounds_and_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(asked: Job) -> Finding:
        return next(doctor_memory.examine(asked, doctor_networks.build_players(asked, 0), 0))

    whole, parts = (found(job(*extra)).text for extra in ([], ["data.batch_gpu=2"]))
    assert "activations of 10 images" in whole and "activations of 2 images" in parts
    players = doctor_networks.build_players(job(), 0)
    held = {s: doctor_memory.states(job(strategy=s, procs=4), players) for s in ("ddp", "zero2", "fsdp2")}
    assert held["ddp"]["optimizer"] == 4 * held["zero2"]["optimizer"] == 4 * held["fsdp2"]["optimizer"]
    sizes = [4 * sum(p.numel() for p in player.parameters()) for player in players]  # a bucket holds either
    assert held["zero2"]["buckets"] == max(sizes)
    assert doctor_memory.states(job(strategy="zero3", procs=4), players)["buckets"] == sum(sizes)
    sgd = ["optim.G.kind=sgd", "optim.D.kind=sgd", "optim.D.momentum=0.9"]
    G, D = (4 * sum(p.numel() for p in player.parameters()) for player in players)
    assert doctor_memory.states(job(*sgd), players)["optimizer"] == D
    assert doctor_memory.states(job(), players)["weights"] == G + D

    class Small:
        total_memory = 1 << 16

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Small)
    too_much = found(job())
    assert too_much.verdict == "would fail" and "batch_gpu" in too_much.remedy


# Where it runs


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 70 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=70m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_too_small_for_the_checkpoints(small_disk: Path) -> None:
    def space(*settings: str) -> Finding:
        asked = job(f"run.out={small_disk}/runs", *settings)
        return next(doctor_place.space(asked, doctor_networks.build_players(asked, 0), None))

    assert space().verdict == "ok"
    found = space("G.width=64", "D.width=64", "run.keep=9")
    assert (
        found.verdict == "would fail" and str(small_disk) in found.text and "10 are kept" in found.text
    )  # and the best


def test_a_full_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(doctor_place.shutil, "disk_usage", lambda _: usage._replace(free=100))
    (found,) = doctor_place._cache(job(), None)
    assert found.verdict == "warning" and "100 B free" in found.text


def test_versions_of_a_project_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by PYTHONPATH: its own file says what it asks for."""

    def missing(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    expected = list(doctor_place.versions(job()))
    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert list(doctor_place.versions(job())) == expected
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "0.1" if n == "wandb" else real(n))
    (found,) = doctor_place.versions(job())
    assert found.verdict == "would fail" and "wandb 0.1 is not >=" in found.text


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    real, other = importlib.metadata.version, {"deepspeed": "0.17.6"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: other.get(name) or real(name))
    (found,) = doctor_place.versions(job())
    assert found.verdict == "would fail" and "deepspeed 0.17.6 is not" in found.text
    other["deepspeed"] = "0.19.99"
    (found,) = doctor_place.versions(job())
    assert found.verdict == "warning" and "selfcheck" in found.remedy
    assert "deepspeed 0.19.99, tested is 0.19.8" in found.text


def test_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [f.verdict for f in doctor_place.rendezvous(job())] == ["ok"]
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(doctor_place, "_PORT", port)
        (found,) = doctor_place.rendezvous(job())
    assert found.verdict == "warning" and f"port {port} is in use" in found.text
    monkeypatch.setattr(socket, "gethostname", lambda: "nowhere.invalid")
    (found,) = doctor_place.rendezvous(job())
    assert found.verdict == "would fail" and "nowhere.invalid" in found.text


def test_the_tracker_is_asked_without_sending_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, str]]] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.requestline, dict(self.headers)))
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            asked.append((self.requestline, {}))

        def log_message(self, *_: object) -> None: ...

    key = "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    wandb.teardown()  # it caches its settings
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", key)
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        (found,) = doctor_place.tracker(job())
        server.shutdown()
    assert found.text.startswith("online") and [line.split()[0] for line, _ in asked] == ["GET"]
    assert key not in str((found, asked))
    (found,) = doctor_place.tracker(job())  # the server is gone
    wandb.teardown()
    assert found.verdict == "ok" and found.text.startswith("offline") and key not in found.text
