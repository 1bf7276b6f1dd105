"""Shared by all tests: the small real data set, private caches, and no chatter from trackers."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

os.environ["ACCELERATE_USE_CPU"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several on busy cores mostly wait for each other

ROOT = Path(__file__).parent.parent
FASHION = ROOT / "tests" / "assets" / "fashion-mnist-500"  # 500 real images, 28x28, ten classes

# Files that share a fixture which takes minutes, for one worker to make it: (folder, a word in the file).
SHARED = (("tests/slurm/", ""), ("tests/e2e/", "worlds"), ("tests/parallel/", "launched"))


@cache
def group_of(file: str) -> str:
    """What one worker does: a file (relative to the project's root), or all files that share a fixture."""
    folders = [folder for folder, _ in SHARED if file.startswith(folder)]
    words = dict(SHARED)
    return next((f for f in folders if re.search(rf"\b{words[f]}\b", (ROOT / file).read_text())), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.partition("::")[0])

    return ByGroup(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is `long` may take an hour. For several workers: what takes longest comes first."""
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.timeout(3600))
    if hasattr(config, "workerinput"):
        order = {folder: place for place, (folder, _) in enumerate(SHARED)}
        items.sort(key=lambda item: order.get(group_of(item.nodeid.partition("::")[0]), len(order)))


@pytest.fixture
def gpus_here(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Called with a number: as if this machine had so many GPUs, which training may use."""

    def pretend(count: int) -> None:
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)

    return pretend


@pytest.fixture(autouse=True)
def _environment_kept() -> Iterator[None]:
    """A training in this process settles what libraries read, for itself and not for later tests."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indexes and reference features of this test run are its own."""
    before = os.environ.get("SHARDGAN_CACHE")
    os.environ["SHARDGAN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["SHARDGAN_CACHE"]
    else:
        os.environ["SHARDGAN_CACHE"] = before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 5 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(place)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
