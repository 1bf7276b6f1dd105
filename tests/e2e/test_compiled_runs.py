"""A compiled run: what it says and records, how it ends, and how it is resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from launching import (
    RunFolder,
    Worlds,
    accelerate,
    identical,
    largest_difference,
    run,
    shardgan,
    without_clocks,
)


def compiled_in(found: RunFolder) -> list[str | None]:
    """How each start of a run compiled, by its events."""
    events = [json.loads(line) for line in (found.path / "events.jsonl").read_text().splitlines()]
    return [event["compiled"] for event in events if event["event"] == "start"]


def test_a_run_is_compiled_as_the_launcher_asks_and_may_be_resumed_without(worlds: Worlds, tmp_path: Path):
    """By the backend that writes no code; the run is that of a plain one."""
    shutil.copy(worlds.folder / "sgd.yaml", tmp_path)
    line = accelerate(1, "sgd.yaml", "run.name=c", "run.total_kimg=0.12")
    line[2:2] = ["--dynamo_backend", "aot_eager"]
    first = run(line, tmp_path)
    assert first.status == 0 and "compiled by aot_eager: first updates" in first.output, first.output
    second = run(accelerate(1, "sgd.yaml", "run.name=c"), tmp_path)
    assert second.status == 0 and "compiled" not in second.output, second.output
    found = RunFolder(tmp_path / "runs" / "c")
    assert compiled_in(found) == ["compiled by aot_eager", None]
    assert largest_difference(found.exported(), worlds.sgd[1].exported()) < 1e-6


def test_what_cannot_be_compiled_is_refused_before_anything_is_done(worlds: Worlds, tmp_path: Path):
    shutil.copy(worlds.folder / "sgd.yaml", tmp_path)
    line = accelerate(1, "sgd.yaml", "run.name=c")
    line[2:2] = ["--dynamo_backend", "inductor", "--dynamo_mode", "reduce-overhead"]
    ended = run(line, tmp_path)
    assert "error: --dynamo_mode reduce-overhead: CUDA graphs need a GPU" in ended.output
    assert ended.status != 0 and not (tmp_path / "runs").exists()


@pytest.mark.long
@pytest.mark.parametrize("procs", [1, 2])
def test_a_compiled_run_resumed_compiled_ends_with_the_same_bits(worlds: Worlds, tmp_path: Path, procs: int):
    shutil.copy(worlds.folder / "adam.yaml", tmp_path)
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}

    def train(name: str, *stops: str) -> RunFolder:
        for stop in stops:
            more = (
                "G.norm=batch",
                "run.checkpoint_kimg=0.48",
                f"run.total_kimg={stop}",
                "--procs",
                str(procs),
            )
            ended = run(
                shardgan("train", "adam.yaml", f"run.name={name}", "--compile", *more),
                tmp_path,
                **environment,
            )
            assert ended.status == 0, ended.output
            environment["TORCHINDUCTOR_CACHE_DIR"] += "-again"  # compiled afresh
        return RunFolder(tmp_path / "runs" / name)

    whole, resumed = train("whole", "0.96"), train("resumed", "0.48", "0.96")
    assert compiled_in(resumed) == ["compiled by inductor"] * 2
    assert identical(whole.exported(), resumed.exported())
    assert list(map(without_clocks, whole.rows)) == list(map(without_clocks, resumed.rows))
