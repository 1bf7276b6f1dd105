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
