"""Every strategy trains what plain torch trains: each case of the parity matrix, in worlds of 1, 2 and 3.

A strategy and world is launched once, for all cases; the reference is computed once per case. The last tests
put known mistakes into the training, to show that the comparison sees them.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import mutant
import pytest
import torch
from safetensors.torch import load_file

from launch import parity, plain

ROOT = Path(__file__).resolve().parents[2]
WORLDS = {"single": (1,), "ddp": (2, 3)}  # a strategy's name is that of its file in launch/accelerate
LAUNCHES = [f"{strategy}-{world}" for strategy, worlds in WORLDS.items() for world in worlds]
NETWORKS = ("G", "D", "G_ema")

Trained = tuple[dict[str, torch.Tensor], list[dict[str, float]]]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Trained]:
    """(launch, case) → what that launch made of the case. Launches when first asked."""

    @lru_cache
    def launched(name: str) -> Path:
        return launch(name, ["launch.parity"], tmp_path_factory.mktemp(name))

    return lambda name, case: read(launched(name), case)


@pytest.fixture(scope="session")
def expected() -> Callable[[str], Trained]:
    """Case → what plain torch makes of it."""
    by_name = {case.name: case for case in parity.cases()}

    @lru_cache
    def train(case: str) -> Trained:
        torch.set_num_threads(1)
        return plain.train(by_name[case])

    return train


def launch(name: str, module: list[str], out: Path) -> Path:
    """Run `module` with OUT as its last argument, under a strategy and in a world; returns OUT."""
    strategy, world = name.rsplit("-", 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--num_processes", world]
    command += ["--config_file", str(ROOT / "launch" / "accelerate" / f"{strategy}.yaml")]
    command += [] if strategy == "single" else ["--main_process_port", str(port)]
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, "-m", *module, str(out)], env=environment, cwd=out, capture_output=True, text=True,
        timeout=400, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return out


def read(folder: Path, case: str) -> Trained:
    return load_file(folder / f"{case}.safetensors"), json.loads((folder / f"{case}.json").read_text())


def differences(trained: Trained, expected: Trained) -> list[str]:
    """Where a training is not the expected one: weights beyond 1e-6, statistics beyond 1e-5 relative."""
    (weights, rows), (expected_weights, expected_rows) = trained, expected
    found = [] if len(rows) == len(expected_rows) == parity.UPDATES else ["another number of updates"]
    for name, tensor in expected_weights.items():
        error = float((weights[name].double() - tensor.double()).abs().max())
        if not error <= 1e-6:
            found.append(f"{name}: off by {error:.1e}")
    for update, (row, expected_row) in enumerate(zip(rows, expected_rows, strict=True)):
        for key, value in expected_row.items():
            if not abs(row[key] - value) <= 1e-6 + 1e-5 * abs(value):
                found.append(f"update {update}, {key}: {row[key]:.8g}, not {value:.8g}")
    return found


@pytest.mark.parametrize("case", [case.name for case in parity.cases()])
@pytest.mark.parametrize("name", LAUNCHES)
def test_it_trains_what_plain_torch_trains(trained, expected, name, case):
    assert differences(trained(name, case), expected(case)) == []


@pytest.mark.parametrize("case", [case.name for case in parity.cases()])
@pytest.mark.parametrize("name", LAUNCHES)
def test_it_trains_every_weight_and_goes_on_from_a_checkpoint_exactly(trained, expected, name, case):
    """Not a weight is missing, and a training from the checkpoint in its middle ends bit for bit the same."""
    weights, _ = trained(name, case)
    unbroken = {key: t for key, t in weights.items() if not key.startswith("resumed/")}
    assert unbroken.keys() == expected(case)[0].keys()
    assert {key.partition("/")[0] for key in unbroken} == set(NETWORKS)
    for key, tensor in unbroken.items():
        assert torch.equal(weights[f"resumed/{key}"], tensor), key


# What the comparison is worth


@pytest.fixture(scope="module")
def with_mistakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, with each mistake in turn."""
    mistakes = ",".join(mutant.MISTAKES)
    return launch("ddp-2", ["mutant", mistakes], tmp_path_factory.mktemp("mistakes"))


@pytest.mark.parametrize("case", mutant.CASES)
@pytest.mark.parametrize("mistake", mutant.MISTAKES)
def test_a_mistake_is_seen(with_mistakes, expected, mistake, case):
    found = differences(read(with_mistakes / mistake, case), expected(case))
    assert bool(found) == (mistake != "none"), found


@pytest.mark.parametrize("mistake", ["none", "doubled-penalty", "gradients-left-in-D"])
def test_a_mistake_is_seen_in_one_process(tmp_path, expected, mistake):
    mutant.main([mistake], tmp_path)
    for case in mutant.CASES:
        found = differences(read(tmp_path / mistake, case), expected(case))
        assert bool(found) == (mistake != "none"), found
