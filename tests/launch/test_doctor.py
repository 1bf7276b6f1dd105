"""`shardgan doctor` as a whole, and its checks of config and place on real mistakes."""

from __future__ import annotations

import http.server
import importlib.metadata
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import wandb
from click.testing import CliRunner, Result
from doctored import GOOD, job

from launch.cli import cli
from launch.doctor import checks
from launch.doctor import networks as doctor_networks
from launch.doctor import place as doctor_place
from launch.doctor.checks import examine, job_of
from launch.doctor.finding import Finding, Machine, fails
from launch.processes import ACCELERATE_FILES, free_port
from pipeline import config
from pipeline.lock import take


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


def test_a_run_without_an_intact_checkpoint_cannot_be_resumed(place: Path) -> None:
    run = place / "runs" / "good"
    (run / "checkpoints" / "400").mkdir(parents=True)
    (run / "config.yaml").write_text(config.dump(config.load("good.yaml", ["run.name=good"])))
    found = call("good.yaml", "--gpus", "1")
    assert found.exit_code == 2, found.output
    assert "holds no intact checkpoint to continue from" in found.output and "is damaged" in found.output
    (run / "checkpoints" / "400").rmdir()
    (run / "STOPPED").write_text("400")
    assert "although the run has saved" in call("good.yaml", "--gpus", "1").output


def test_a_run_that_is_being_trained_is_said_to_be(place: Path) -> None:
    """A job that is submitted now may begin when that training has ended."""
    run = place / "runs" / "good"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(config.dump(config.load("good.yaml", ["run.name=good"])))
    with take(run, print):
        found = call("good.yaml", "--gpus", "1")
    assert found.exit_code == 0 and "would be resumed" not in found.output, found.output
    assert "good is being trained by pid" in found.output and "Until then it would be refused" in found.output
    assert "would be resumed" in call("good.yaml", "--gpus", "1").output


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


def test_more_processes_than_gpus_here(gpus_here: Callable[[int], None]) -> None:
    gpus_here(1)
    (found,) = checks.launcher(job())
    assert found.verdict == "warning" and "2 processes, but this machine has 1 GPU" in found.text


def test_how_hsdp_divides_the_ranks() -> None:
    (found,) = checks.launcher(job(strategy="hsdp", nodes=8, procs=4))
    assert found.verdict == "ok" and found.text.startswith("hsdp of 8 x 4 ranks")
    (found,) = checks.launcher(job(strategy="hsdp", nodes=8, procs=1))
    assert found.verdict == "would fail" and "one process per node has nothing to share" in found.text


def test_a_launcher_file_of_another_strategy(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "ACCELERATE_FILES", place)
    (missing,) = checks.launcher(job())
    shutil.copy(ACCELERATE_FILES / "single.yaml", place / "ddp.yaml")
    (wrong,) = checks.launcher(job())
    assert missing.verdict == wrong.verdict == "would fail"
    assert "ddp.yaml cannot be read" in missing.text and "distributed_type NO" in wrong.text


def test_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing, verdict, text in ((None, "ok", "compiled by inductor"), ("g++", "would fail", "needs g++")):
        monkeypatch.setattr("pipeline.parallel.compilation._missing", lambda on_gpu, m=missing: m)
        (found,) = checks.compilation(replace(job(), compiled=True))
        assert found.verdict == verdict and text in found.text
    assert not list(checks.compilation(job()))


def test_another_run_in_the_folder(place: Path) -> None:
    folder = place / "runs" / "good"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.dump(config.load("good.yaml", ["G.width=16"])))
    found = {f.check: f for f in examine(job())[0]}
    assert found["config"].verdict == "would fail" and "G.width: 16 → 8" in found["config"].text
    (folder / "config.yaml").write_text(config.dump(config.load("good.yaml")))
    (folder / "DONE").write_text("1000000\n")
    found = {f.check: f for f in examine(job(strategy="single"))[0]}
    assert found["config"].verdict == "warning" and "finished" in found["config"].text
    assert found["launcher"].verdict == "would fail" and "one process" in found["launcher"].text
    assert fails(list(found.values()))


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


def test_an_allocation_says_nothing_of_a_job_on_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a job is submitted from within another one."""
    monkeypatch.setattr(doctor_place, "allocated", lambda: ["here"])
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    two = job(nodes=2)
    assert [f.verdict for f in doctor_place.rendezvous(two)] == ["would fail"]
    assert [f.verdict for f in doctor_place.processors(two)] == ["warning"]
    elsewhere = replace(two, machine=Machine(remote=True))
    assert [*doctor_place.rendezvous(elsewhere), *doctor_place.processors(elsewhere)] == []


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
