"""Trainings that several tests look at: each is started once, two at a time."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launching import ADAM, SGD, RunFolder, Worlds, accelerate, train


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adam.yaml and sgd.yaml; results go beside them."""
    folder = tmp_path_factory.mktemp("worlds")
    for name, text in (("adam", ADAM), ("sgd", SGD)):
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="session")
def worlds(configs: Path, in_pairs: ThreadPoolExecutor) -> Worlds:
    """Six trainings by the written-out `accelerate launch` line."""

    def start(name: str, world: int) -> RunFolder:
        run_name = f"{name}-{world}"
        line = [str(configs / f"{name}.yaml"), f"run.name={run_name}", f"run.out={configs}"]
        return train(accelerate(world, *line), configs / run_name)

    cases = [(name, world) for world in (3, 2, 1) for name in ("adam", "sgd")]
    runs = dict(zip(cases, in_pairs.map(lambda case: start(*case), cases), strict=True))
    return Worlds(
        {world: runs["adam", world] for world in (1, 2, 3)},
        {world: runs["sgd", world] for world in (1, 2, 3)},
        configs,
    )


@pytest.fixture(scope="session")
def in_pairs():
    """Runs what it is given two at a time: one launch alone leaves half the cores idle while it starts."""
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def scratch(tmp_path: Path) -> Callable[[], Path]:
    """A new empty folder at every call."""
    made = iter(range(1000))
    return lambda: tmp_path / f"scratch-{next(made)}"


@pytest.fixture
def signals_kept():
    """Training in this process leaves its signals as they were."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == handlers
