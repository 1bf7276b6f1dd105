"""`shardgan doctor --live`: real processes that meet, and machines that do not see the same."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from launch.cli import cli
from launch.doctor import live as doctor_live
from launch.doctor import place as doctor_place
from launch.doctor.finding import fails
from launch.processes import free_port, reasons, run
from pipeline.data.index import load_index

ROOT = Path(__file__).parents[2]
FASHION = ROOT / "tests" / "assets" / "fashion-mnist-500"
CONFIG = "data: {train: data, size: 28, channels: 1, batch_size: 20}\nG: {width: 8}\nD: {width: 8}\n"


def test_two_processes_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("train: data", f"train: {FASHION}"))
    arguments = ["doctor", "tiny.yaml", "--gpus", "2", "--live", "score.metrics=[]"]
    result = CliRunner().invoke(cli, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "the processes meet" in result.output
    assert "2 ranks add up 64 MiB in" in result.output
    assert "one rank alone makes an update of 10 images in" in result.output
    assert "% of 2 ranks that send nothing" in result.output and "→ ddp" in result.output


def test_two_machines_that_differ_are_named(tmp_path: Path) -> None:
    """Two ranks, as on two nodes; the second has other code, another W&B and other data."""
    for machine in range(2):
        here = tmp_path / str(machine)
        for package in ("launch", "pipeline"):
            shutil.copytree(ROOT / package, here / package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(FASHION, here / "data", ignore=shutil.ignore_patterns("index.json", ".shardgan"))
    other = tmp_path / "1"
    (other / "launch" / "smooth.py").write_text("# changed\n")
    (other / "wandb-0.1.dist-info").mkdir()
    (other / "wandb-0.1.dist-info" / "METADATA").write_text("Name: wandb\nVersion: 0.1\n")
    (other / "data" / "shard-000004.tar").unlink()
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    port = free_port()
    started = [_machine(rank, port, tmp_path) for rank in range(2)]
    outputs = [machine.communicate(timeout=400) for machine in started]
    assert [machine.returncode for machine in started] == [0, 0], outputs
    ended = subprocess.CompletedProcess([], 0, outputs[0][0], "")
    report = doctor_live.read_found(ended)
    assert report is not None and report["world"] == 2 and min(report["seconds"].values()) > 0
    found = {finding.check: finding for finding in doctor_live.compare(report["nodes"])}
    assert set(found) == {"live: code", "live: versions", "live: data"} and fails(list(found.values()))
    assert all("(machine 1) has" in f.text and "(machine 0)" in f.text and f.remedy for f in found.values())
    assert "wandb 0.1 (not 0.3" in found["live: versions"].text
    assert report["nodes"][0]["data"] == load_index(str(FASHION)).fingerprint


def _machine(rank: int, port: int, folder: Path) -> subprocess.Popen[str]:
    """A rank as a launcher on a machine of its own starts it, without the seconds that takes to load."""
    here = folder / str(rank)
    launched = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    launched |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.doctor.worker", "0", str(folder / "tiny.yaml")],
        cwd=here,
        env=os.environ | launched | {"PYTHONPATH": str(here)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def node(name: str, **differing: object) -> doctor_live.Node:
    same = {"code": "c", "versions": {"torch": "2"}, "config": "f", "data": "d", "device": "CPU"}
    return {"node": name, **same, **differing}


def test_the_odd_one_of_three_is_named() -> None:
    found = list(doctor_live.compare([node("a", code="other"), node("b"), node("c")]))
    assert [f.check for f in found] == ["live: code"] and found[0].text == "a has other code than b"
    (fine,) = doctor_live.compare([node("a"), node("b")])
    assert fine.verdict == "ok" and fine.text.startswith("a, b: code, versions")
    (mixed, _) = doctor_live.compare([node("a", device="H100"), node("b")])
    assert mixed.verdict == "warning" and "a H100; b CPU" in mixed.text


def test_a_node_that_does_not_see_the_data() -> None:
    blind = node("b", problem="There are no shards at data")
    del blind["config"], blind["data"]
    (found,) = doctor_live.compare([node("a"), blind])
    assert found.verdict == "would fail" and found.text == "b: There are no shards at data"


def test_a_failure_is_shown_by_its_errors_once() -> None:
    said = "Traceback (most recent call last):\n  File x\n[rank1]: ValueError: no\nModuleNotFoundError: m\n"
    assert reasons(said * 2 + "torch.ChildFailedError: \n===\n") == [
        "[rank1]: ValueError: no",
        "ModuleNotFoundError: m",
    ]
    assert reasons("it hangs\n\n") == ["it hangs"]


def test_a_launcher_that_lasts_too_long_leaves_nothing_running(tmp_path: Path) -> None:
    script = f"sleep 600 & echo $! > {tmp_path}/pid; wait"
    with pytest.raises(subprocess.TimeoutExpired):
        run(["bash", "-c", script], dict(os.environ), timeout=2.0)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int((tmp_path / "pid").read_text())).wait(timeout=60)


def test_places_are_what_the_nodes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        f'{{"place": "{n}", "node": "n{n}", "gpus": {gpus}, "cores": 8, "port": {n}}}'
        for n, gpus in ((1, 3), (0, 4))
    ]
    ended = subprocess.CompletedProcess([], 0, "\n".join(["srun: queued", *lines]), "")
    places = doctor_live.read_places(ended)
    assert [place["node"] for place in places] == ["n0", "n1"]
    assert doctor_live.fitting(8, places) == (3, False) and doctor_live.fitting(2, places) == (2, False)
    (unlike,) = doctor_live.unlike(places)
    assert unlike.verdict == "warning" and unlike.text == "n0 4 GPUs; n1 3 GPUs"
    none = [place | {"gpus": 0} for place in places]
    assert doctor_live.fitting(16, none) == (8, True) and not list(doctor_live.unlike(none))


def test_cpus_in_a_shell_of_salloc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", "72(x2),36")
    assert doctor_place.allocated_cpus() == 36
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert doctor_place.allocated_cpus() == 8
