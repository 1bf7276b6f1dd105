"""Shared by all tests: the small real data set, private caches, and no chatter from trackers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["ACCELERATE_USE_CPU"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent
FASHION = ROOT / "tests" / "assets" / "fashion-mnist-500"  # 500 real images, 28x28, ten classes

# Fixtures that take minutes and serve several files; in the order in which their tests start.
SHARED = ("cluster", "worlds", "launched")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Groups tests for several workers (`-n 2 --dist loadgroup`): a file's, or those of a shared fixture."""
    if not getattr(config.option, "loadgroup", False):
        return
    groups = {}
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        shared = next((name for name in SHARED if name in fixtures), None)
        groups[item] = shared or item.path.relative_to(ROOT).as_posix()
        item.add_marker(pytest.mark.xdist_group(groups[item]))
    items.sort(key=lambda item: SHARED.index(groups[item]) if groups[item] in SHARED else len(SHARED))


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
