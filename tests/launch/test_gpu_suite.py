"""The suite for machines with GPUs, on a machine without: what it runs, skips, keeps and prints."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_tables(monkeypatch):
    monkeypatch.syspath_prepend(GPU)
    import report

    assert report.table({"a": 1, "b": "two"}) == ["| | |", "|---|---:|", "| a | 1 |", "| b | two |"]
    rows = report.table({"ddp": {"loss": 2e-7, "same": True}, "fsdp2": {"loss": 0.0}})
    assert rows == [
        "| | loss | same |", "|---|---:|---:|", "| ddp | 2.0e-07 | True |", "| fsdp2 | 0.0 |  |",
    ]  # fmt: skip
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
