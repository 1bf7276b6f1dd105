"""`shardgan train --dry-run` shows what would be done, in full, and does nothing."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace

from click.testing import CliRunner
from launching import ADAM, FASHION, Worlds

from launch.processes import training
from launch.train import train
from pipeline import config
from pipeline.errors import UserError
from pipeline.parallel.compilation import Compilation, read_compilation


def dry(*arguments: str) -> tuple[str, str]:
    """The printed line and the printed config."""
    shown = CliRunner().invoke(train, [*arguments, "--dry-run"], catch_exceptions=False)
    assert shown.exit_code == 0
    line, _, text = shown.output.partition("\n\n# the resolved config\n")
    return line, text


def test_it_prints_the_line_and_starts_nothing(tmp_path, monkeypatch):
    def no_process(*_: object, **__: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "execve", no_process)
    monkeypatch.setattr(subprocess, "Popen", no_process)
    (tmp_path / "adam.yaml").write_text(ADAM)
    line, _ = dry("adam.yaml", "--procs", "3", "--mixed_precision", "bf16", "G.width=16")
    assert line.startswith("ACCELERATE_USE_CPU=1 accelerate launch --config_file ")
    assert "accelerate/ddp.yaml --num_processes 3 --mixed_precision bf16 " in line
    assert line.endswith(" -m pipeline.train adam.yaml G.width=16")
    assert "accelerate/single.yaml --num_processes 1 " in dry("adam.yaml", "--procs", "1")[0]
    assert [p.name for p in tmp_path.iterdir()] == ["adam.yaml"]


def test_compiling_is_accelerates_option_and_a_variable_where_accelerate_drops_it(tmp_path, monkeypatch):
    (tmp_path / "adam.yaml").write_text(ADAM)
    config = str(tmp_path / "adam.yaml")
    monkeypatch.setattr("pipeline.parallel.compilation._missing", lambda on_gpu: None)
    line, _ = dry(config, "--procs", "2", "--compile")
    assert line.startswith("ACCELERATE_USE_CPU=1 accelerate ") and " --dynamo_backend inductor -m " in line
    line, _ = dry(config, "--procs", "2", "--strategy", "zero2", "--compile")
    assert " ACCELERATE_DYNAMO_BACKEND=inductor accelerate launch " in line
    for strategy in ("single", "zero2"):
        _, environment = training(strategy, 1, "no", [config], compiled=True)
        assert read_compilation(environment) == Compilation("inductor")
        assert read_compilation(training(strategy, 1, "no", [config])[1]) is None
    monkeypatch.setattr("pipeline.parallel.compilation._missing", lambda on_gpu: "a thing")
    refused = CliRunner().invoke(train, [config, "--procs", "2", "--compile", "--dry-run"])
    assert isinstance(refused.exception, UserError) and str(refused.exception).startswith(
        "Compiling needs a thing"
    )


def test_the_printed_config_is_the_config(tmp_path):
    (tmp_path / "adam.yaml").write_text(ADAM)
    changes = [
        "penalty.l2=0.25",
        "penalty.G.l1=1e-7",
        "run.seed=7",
        "optim.D.betas=[0.0,0.9]",
        "penalty.on=all",
    ]
    _, text = dry(str(tmp_path / "adam.yaml"), "--procs", "2", *changes)
    (tmp_path / "printed.yaml").write_text(text)
    resolved = config.load(tmp_path / "adam.yaml", changes)
    assert config.load(tmp_path / "printed.yaml") == resolved
    assert resolved.penalty.D.l2 == 0.25 and resolved.optim.D.betas == (0.0, 0.9)
    assert resolved.penalty.G.on == resolved.penalty.D.on == "all" and resolved.run.name == "adam"


def test_a_runs_own_config_is_the_config(worlds: Worlds):
    """The file in the run folder, and the one in its export, which names no folders of this machine."""
    settings = ["run.name=adam-2", f"run.out={worlds.folder}", "penalty.on=weights"]  # what auto became
    resolved = config.load(worlds.folder / "adam.yaml", settings)
    assert config.load(worlds.adam[2].path / "config.yaml") == resolved
    data, run = replace(resolved.data, train=FASHION.name), replace(resolved.run, out=worlds.folder.name)
    public = replace(resolved, data=data, run=run)
    assert config.load(worlds.adam[2].path / "export" / "config.yaml") == public
