"""The suite for machines with GPUs, on a machine without: what it runs, skips, keeps and prints."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from launch import selfcheck
from launch.selfcheck import parity, plain
from pipeline.config import load
from pipeline.gan.networks import build_D, build_G

GPU = Path(__file__).parents[1] / "gpu"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it would use the GPUs here")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = ["bash", str(GPU / "run.sh"), *arguments]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


def test_what_a_cpu_can_do_is_done_once_and_the_rest_is_named(tmp_path):
    first = run(str(tmp_path), "surroundings", "no-waits")
    assert first.returncode == 0, first.stdout + first.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [(name, result["status"]) for name, result in found.items()] == [
        ("surroundings", "passed"), ("no-waits", "skipped"),
    ]  # fmt: skip
    assert found["surroundings"]["figures"]["torch"] == torch.__version__
    said = (tmp_path / "gpu.md").read_text()
    assert said.startswith("# Measured on no GPU\n")
    assert "| no-waits | skipped |" in said and "needs 1 GPU; this machine has 0" in said


def test_a_part_that_there_is_not(tmp_path):
    ended = run(str(tmp_path), "parity-everything")
    assert ended.returncode == 1
    assert "there is no part parity-everything; there are surroundings," in ended.stderr


@pytest.fixture
def suite(monkeypatch):
    """Of two parts, the first of which hangs, beyond SIGTERM, and has a process that is nobody's child."""
    monkeypatch.syspath_prepend(GPU)
    import suite

    def command(name: str, answer: Path) -> list[str]:
        line = "echo so far; (setsid sleep 600 & echo $!); trap '' TERM; sleep 600"
        works = f"""echo '{{"status": "passed", "figures": {{}}}}' > {answer}"""
        return ["bash", "-c", line if name == "hangs" else works]

    monkeypatch.setattr(suite, "PARTS", {"hangs": None, "works": None})
    monkeypatch.setattr(suite, "_command", command)
    monkeypatch.setattr(suite, "_GRACE_S", 0.5)
    return suite


def check_killed(log: Path) -> None:
    first, pid = log.read_text().splitlines()
    assert first == "so far"
    with suppress(psutil.NoSuchProcess):  # in a container nobody may collect it
        assert psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE


def test_a_part_that_hangs_does_not_cost_the_next(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "_MOST_S", 2.0)
    assert suite.main(tmp_path, []) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["hangs"]["status"] == "failed" and found["hangs"]["why"] == "out of time after 2 s"
    assert found["works"]["status"] == "passed"
    check_killed(tmp_path / "hangs.log")


def test_a_part_that_the_end_cuts_short_is_for_the_next_call(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "MINUTES", 2 / 60)
    monkeypatch.setattr(suite, "_LEAST_S", 0.5)
    assert suite.main(tmp_path, []) == 0
    assert "the same command runs it again" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu.json").read_text()) == {}
    check_killed(tmp_path / "hangs.log")


@pytest.mark.parametrize(
    ("end", "why"),
    [
        ("raise RuntimeError('this is why')", "it failed (1): RuntimeError: this is why"),
        ("import time; time.sleep(600)", "it was out of time after 5 s: word"),
    ],
)
def test_what_a_launch_said_is_in_the_log(monkeypatch, capsys, end, why):
    monkeypatch.syspath_prepend(GPU)
    import starting

    monkeypatch.setattr(starting, "_START", time.monotonic())
    monkeypatch.setattr(starting, "_MOST_S", 5.0)
    with pytest.raises(starting.Failed) as failed:
        starting.run("it", [sys.executable, "-c", f"print('word\\n' * 3000, flush=True); {end}"])
    assert str(failed.value).startswith(why)
    assert capsys.readouterr().err.count("word\n") == 3000


def test_the_worst_case_of_each_column(monkeypatch):
    """By what is allowed to a case, and a line for each case."""
    monkeypatch.syspath_prepend(GPU)
    import exact

    errors = {
        "a": [("EMA", "x", 3e-6), ("EMA", "y", 4e-6), ("loss", "l", 1e-9)],
        "b": [("EMA", "x", 5e-6), ("loss", "l", 0.0)],
        "c": [("EMA", "x", 1e-7), ("loss", "l", float("inf"))],
        "d": [("EMA", "x", 0.0)],
    }
    cases = [SimpleNamespace(name=name, slack=10.0 if name == "b" else 1.0) for name in errors]
    monkeypatch.setattr(parity, "cases", lambda world, strategy: cases)
    monkeypatch.setattr(exact, "CASES", tuple(errors))
    monkeypatch.setattr(exact, "launch", lambda *arguments, **how: "")
    monkeypatch.setattr(selfcheck, "read", lambda folder, name: name)
    monkeypatch.setattr(selfcheck, "expected", lambda case, device: None)
    monkeypatch.setattr(selfcheck, "differences", lambda name, expected: errors[name])
    wrong, figures = exact.parity("single")
    assert wrong == ["c, l: inf", "a, y: 4.0e-06"]
    assert (figures["EMA"], figures["EMA, worst case"]) == (5e-6, "b")
    assert (figures["loss"], figures["loss, worst case"]) == (float("inf"), "c")
    assert figures["resume"] == 0 and "resume, worst case" not in figures and figures["ranks"] == 1


def test_speed_goes_on_after_a_network_that_fails(monkeypatch):
    monkeypatch.syspath_prepend(GPU)
    import updates

    def speed(name: str, kind: str, images: int) -> dict[str, float]:
        if name == "gat-b2":
            raise torch.cuda.OutOfMemoryError("too large\nfor this")
        if name == "r3gan-ffhq64":
            raise ValueError("a wrong shape")
        return {"images/s": 1.0}

    monkeypatch.setattr(updates, "need", lambda gpus: None)
    monkeypatch.setattr(updates, "_speed", speed)
    failures, figures = updates.speed()
    assert failures == [f"r3gan-ffhq64, {k}, 32 images: ValueError: a wrong shape" for k in ("no", "bf16")]
    assert figures["gat-b2, no, 32 images"] == {"images/s": "too large"}
    assert figures["stylegan2-256, bf16, 8 images"] == {"images/s": 1.0} and len(figures) == 8


def test_updates_without_a_gpu(monkeypatch):
    """What measures them, of a small network in whose updates penalties are not always due."""
    monkeypatch.syspath_prepend(GPU)
    import updates

    for name in ("synchronize", "reset_peak_memory_stats", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(updates, "need", lambda gpus: None)
    monkeypatch.setattr(updates, "SIZES", {"stylegan2-small": 2})
    assert [updates._interval(name) for name in ("stylegan2-256", "stylegan2-small", "gat-b2")] == [16, 16, 1]
    shown: list[int] = []

    def watched(name: str, kind: str, images: int):
        update = updates._pair(name, kind, images, None, ("G.width=8", "D.width=8", "G.z_dim=16"))[1]
        return lambda cur_nimg=0: (shown.append(cur_nimg), update(cur_nimg))

    monkeypatch.setattr(updates, "_update", watched)
    failures, figures = updates.speed()
    assert not failures and figures["stylegan2-small, no, 2 images"]["images/s"] > 0
    assert shown == [2 * turn for turn in range(20)] * 2
    shown.clear()
    _, figures = updates.no_waits()
    assert figures["stylegan2-small, fp16, none due"] == "none" and len(figures) == 6
    assert shown == [4 * turn for turn in (0, 1, 16, 17, 32, 33)] * 3


def test_plain_torch_is_compared_with_kernels_in_a_fixed_order(monkeypatch):
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    asked = []
    monkeypatch.setattr(parity, "ieee", lambda: asked.append("ieee"))
    monkeypatch.setattr(
        plain, "train", lambda *_: asked.append((cudnn.deterministic, cudnn.benchmark)) or asked
    )
    monkeypatch.setattr(cudnn, "deterministic", False)
    monkeypatch.setattr(cudnn, "benchmark", True)
    selfcheck.expected.__wrapped__("a case", "cuda")
    assert asked == ["ieee", (True, False)] and (cudnn.deterministic, cudnn.benchmark) == (False, True)
    monkeypatch.undo()
    assert (cudnn.deterministic, cudnn.benchmark) == before


def test_tables(monkeypatch):
    monkeypatch.syspath_prepend(GPU)
    import report

    assert report.table({"a": 1, "b": "two"}) == ["| | |", "|---|---:|", "| a | 1 |", "| b | two |"]
    rows = report.table({"ddp": {"loss": 2e-7, "same": True}, "fsdp2": {"loss": 0.0}})
    assert rows == [
        "| | loss | same |", "|---|---:|---:|", "| ddp | 2.0e-07 | True |", "| fsdp2 | 0.0 |  |",
    ]  # fmt: skip
    found = {"ranks": 1, "EMA": 2e-7, "EMA, worst case": "r1"}
    said = report.markdown({"parity-ddp": {"status": "passed", "seconds": 1, "figures": found}})
    assert "| parity-ddp | passed | 1 | ranks: 1 |" in said and "| EMA, worst case | r1 |" in said
    failed = {"resume": {"status": "failed", "seconds": 1, "why": "x|y\nz"}}
    assert "| resume | failed | 1 | x\\|y z |" in report.markdown(failed)


def test_what_a_part_would_only_miss_on_a_gpu(monkeypatch):
    """The names that parts import when they run, and the settings that they train with."""
    for file in GPU.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("launch", "pipeline")):
                module = importlib.import_module(node.module)
                for name in (alias.name for alias in node.names):
                    assert hasattr(module, name) or importlib.import_module(f"{node.module}.{name}"), file
    monkeypatch.syspath_prepend(GPU)
    import exact
    import updates

    for settings in exact.RESUMED.values():
        config = load(None, (*exact.QUIET, *settings))
        build_G(config, 0), build_D(config, 0)
    for name in updates.SIZES:
        load(str(GPU.parents[1] / "configs" / f"{name}.yaml"), ("data.conditional=false",))
