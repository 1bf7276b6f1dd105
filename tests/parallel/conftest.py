"""The launches that the tests of this folder share: each strategy and world once, for all that is asked."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from launches import before, run


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """ "strategy-world" → the folder that `in_ranks` filled there. Launches when first asked."""

    @lru_cache
    def launch(name: str) -> Path:
        earlier = before(name)
        arguments = [] if earlier is None else [str(launch(earlier))]
        out = tmp_path_factory.mktemp(name)
        run(name, ["in_ranks", str(out), *arguments])
        return out

    return launch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
