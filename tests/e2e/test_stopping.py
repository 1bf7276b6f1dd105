"""However two stop signals come, a run is saved, says nothing unseemly, and continues to the same bits."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
from launching import (
    ADAM,
    COMMON,
    RunFolder,
    accelerate,
    identical,
    run,
    train,
    without_clocks,
)

STOPPING = Path(__file__).parent / "stopping.py"
CONFIG = f"""{COMMON}
run: {{total_kimg: 0.72, tick_kimg: 0.12, checkpoint_kimg: 0.06, eval_kimg: 0.24}}
score: {{images: 24}}
"""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopping")
    (folder / "pairs.yaml").write_text(CONFIG)
    (folder / "adam.yaml").write_text(ADAM)
    return folder


def same(one: RunFolder, other: RunFolder) -> bool:
    rows = [list(map(without_clocks, each.rows)) for each in (one, other)]
    return identical(one.exported(), other.exported()) and rows[0] == rows[1]


def stop_in_pairs(place: Path, world: int, pairs: int, seed: int) -> None:
    """Every run that was stopped and continued is compared with an unbroken one of the same world."""
    out = place / f"{world}-{seed}"
    out.mkdir()
    ended = run(
        [
            sys.executable,
            str(STOPPING),
            str(place / "pairs.yaml"),
            str(out),
            str(world),
            str(pairs),
            str(seed),
        ],
        place,
    )
    assert ended.status == 0, ended.output
    lines = [json.loads(line) for line in ended.output.splitlines() if line.startswith("{")]
    assert sum(len(line["pairs"]) for line in lines) == pairs
    settings = [f"run.name=whole-{world}-{seed}", f"run.out={out}"]
    whole = train(accelerate(world, str(place / "pairs.yaml"), *settings), out / f"whole-{world}-{seed}")
    assert [line for line in lines if not same(RunFolder(Path(line["folder"])), whole)] == []


@pytest.mark.parametrize(("world", "pairs"), [(1, 12), (2, 8)])
def test_pairs_of_signals(place, world, pairs):
    stop_in_pairs(place, world, pairs, seed=1)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("world", "seed"), [(1, 2), (1, 3), (1, 4), (2, 5), (2, 6), (2, 7)])
def test_many_pairs_of_signals(place, world, seed):
    stop_in_pairs(place, world, 30, seed)
