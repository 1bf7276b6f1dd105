"""The launches that the tests of this folder share: each strategy and world once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from in_ranks import CONTINUED
from launches import before, run


@pytest.fixture(scope="session")
def launched(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Path]]:
    """ "strategy-world" → the folder that `in_ranks` filled there.

    All launches that the chosen tests need run in turn, two at a time: one alone mostly waits. Each trains
    the cases of the matrix that these tests ask for, and those that a later launch continues.
    """
    chosen = [
        (item.callspec.params, item.path.stem == "test_parity")
        for item in request.session.items
        if isinstance(item, pytest.Function) and "launched" in item.fixturenames
    ]
    launches: dict[str, Future[Path]] = {}
    pool = ThreadPoolExecutor(2)

    def launch(name: str) -> Future[Path]:
        if name not in launches:
            first = before(name)
            earlier = None if first is None else launch(first)  # queued before this one
            asked = {
                params["case"]
                for params, of_matrix in chosen
                if of_matrix
                and (
                    name == params["name"] or (name == before(params["name"]) and params["case"] in CONTINUED)
                )
            }
            cases = sorted(asked)
            launches[name] = pool.submit(_launch, name, tmp_path_factory.mktemp(name), earlier, cases)
        return launches[name]

    for params, _ in chosen:
        launch(params["name"])
    yield lambda name: launch(name).result()
    pool.shutdown(cancel_futures=True)


def _launch(name: str, out: Path, earlier: Future[Path] | None, cases: list[str]) -> Path:
    run(name, ["in_ranks", str(out), "" if earlier is None else str(earlier.result()), *cases])
    return out


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
