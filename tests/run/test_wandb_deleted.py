"""A W&B run that somebody deletes in the browser, by the real client: a new one takes its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import wandb

from pipeline.config import load
from pipeline.run import tracker as tracker_module
from pipeline.run.report import MainReport
from pipeline.run.tracker import open_tracker
from tests.wandb_server import WandbServer, wandb_server

pytestmark = pytest.mark.usefixtures("no_account")
CONFIG = load(None, ["data.train=shards", "run.name=demo"])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server, and a client that has a key and uses short waits."""
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "fedcba9876543210" * 2 + "fedcba98")
        monkeypatch.setenv("WANDB__DISABLE_STATS", "true")
        monkeypatch.setenv("WANDB__GRAPHQL_RETRY_WAIT_MIN_SECONDS", "0.1")
        monkeypatch.setenv("WANDB__GRAPHQL_RETRY_WAIT_MAX_SECONDS", "0.2")
        monkeypatch.setattr(tracker_module, "_DELETED_S", 6.0)
        yield server


def train(folder: Path, run_id: str | None, start: int, stop: int) -> tuple[str | None, list[str]]:
    """One start from the checkpoint of `start`, which holds run_id; the id afterwards, and what was said."""
    said: list[str] = []
    tracker = open_tracker(CONFIG, folder, run_id, said.append)
    report = MainReport(folder, [tracker], 1000, start)
    for step in range(start + 1, stop + 1):
        report.row(step, {"a": step / 2})
    report.close()
    return tracker.run_id, said


def test_a_deleted_run_is_replaced_at_once_by_one_that_has_everything(tmp_path, server):
    old, _ = train(tmp_path, None, 0, 3)
    assert old is not None
    server.delete(old)
    with patch.object(wandb, "init", wraps=wandb.init) as begun:
        new, said = train(tmp_path, old, 2, 5)
    assert new != old and list(server.runs) == [new] and server.run.steps == [1, 2, 3, 4, 5]
    assert [row["a"] for row in server.run.history] == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert said == [
        f"W&B: run {old} was deleted there; a new run gets everything.",
        f"W&B: {server.url}/me/shardgan/runs/{new}",
    ]
    waits = [(c.kwargs["resume"], c.kwargs["settings"].init_timeout) for c in begun.call_args_list]
    assert waits == [("must", 45), ("allow", 6), ("never", 45)], "about the deleted run it asks only briefly"


def test_the_new_id_stays_also_for_a_checkpoint_that_has_the_old_one(tmp_path, server, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "first")
    assert train(tmp_path, None, 0, 1)[0] == "first"
    server.delete("first")
    second, _ = train(tmp_path, "first", 1, 2)
    assert train(tmp_path, "first", 1, 3) == (second, [f"W&B: {server.url}/me/shardgan/runs/{second}"])
    assert second is not None and server.run.steps == [1, 2, 3]
    server.delete(second)
    third, _ = train(tmp_path, "first", 1, 4)
    assert json.loads((tmp_path / "wandb" / "run.json").read_text())["replaces"] == ["first", second]
    assert list(server.runs) == [third] and server.run.steps == [1, 2, 3, 4]


def test_a_run_folder_that_forgot_its_deleted_run_gets_a_new_one(tmp_path, server, monkeypatch):
    old, _ = train(tmp_path, None, 0, 1)
    assert old is not None
    server.delete(old)
    (tmp_path / "wandb" / "run.json").unlink()
    monkeypatch.setattr(tracker_module, "_INIT_S", 10.0)
    new, said = train(tmp_path, old, 1, 2)
    assert list(server.runs) == [new] and server.run.steps == [1, 2] and "deleted" in said[0]
