"""How exact is every case of the objective, everywhere? Worst errors against plain torch, as a table.

    python tests/benchmarks/parity_table.py [CASE …] > parity.md

Each launch, a strategy in a world, trains the named cases (default: `parity.OBJECTIVE` and `THOROUGH`).
A cell has the worst error of any weight of G, D and G_ema after all updates, and of any chart, relative; and
says whether the training resumed in the middle has other bits.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from launch import processes, selfcheck
from launch.selfcheck import parity
from pipeline.console import end_process

SEVERAL = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
LAUNCHES = ("single-1", *(f"{s}-{w}" for w in (1, 2, 3) for s in SEVERAL), "hsdp-4")


def main(chosen: list[str]) -> None:
    cases = {case.name: case for case in parity.cases(thorough=True)}
    chosen = chosen or [name for name in cases if name in parity.OBJECTIVE | parity.THOROUGH]
    cells: dict[str, list[str]] = {name: [] for name in chosen}
    for launch in LAUNCHES:
        of_this = {case.name: case for case in parity.cases(int(launch[-1]), launch[:-2], thorough=True)}
        with tempfile.TemporaryDirectory() as folder:
            _train(launch, Path(folder), chosen)
            for name in chosen:
                if name in of_this:
                    found = selfcheck.read(Path(folder), name), selfcheck.expected(of_this[name])
                    cells[name].append(_cell(*found))
                else:
                    cells[name].append("")
        print(launch, "done", file=sys.stderr, flush=True)
    print("| weights / charts |", " | ".join(LAUNCHES), "|")
    print("|---" * (1 + len(LAUNCHES)) + "|")
    for name, row in cells.items():
        print(f"| {name} |", " | ".join(row), "|")


def _train(launch: str, out: Path, chosen: list[str]) -> None:
    strategy, world = launch.split("-")
    ended = processes.launch(
        strategy,
        int(world),
        ["parity_table", "in-rank", str(out), *chosen],
        on_cpu=True,
        deepspeed=selfcheck.PARTITION_ALL.get(strategy),
        environment={"PYTHONPATH": f"{Path.cwd()}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"},
    )
    if ended.returncode:
        sys.exit(ended.stdout + ended.stderr)


def _cell(trained: selfcheck.Trained, expected: selfcheck.Trained) -> str:
    worst = {"weights": 0.0, "charts": 0.0, "resume": 0.0}
    for column, _, error in selfcheck.differences(trained, expected):
        kind = {"parameters": "weights", "EMA": "weights", "resume": "resume"}.get(column, "charts")
        worst[kind] = max(worst[kind], error)
    same = "" if worst["resume"] == 0 else " **resumed otherwise**"
    return f"{worst['weights']:.0e} / {worst['charts']:.0e}{same}"


def in_rank(out: Path, chosen: list[str]) -> None:
    ranks = parity.join()
    cases = parity.cases(ranks.world, ranks.strategy, thorough=True)
    parity.train_all([case for case in cases if case.name in chosen], ranks, out)
    ranks.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["in-rank"]:
        in_rank(Path(sys.argv[2]), sys.argv[3:])
        end_process(0)
    main(sys.argv[1:])
