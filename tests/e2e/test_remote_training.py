"""Training from a URL: the run is that of the local folder, and what opens the door is nowhere to be seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from faulty_server import serving
from launching import FASHION, SGD, RunFolder, Worlds, identical, run, shardgan, without_clocks

from launch.train import train
from pipeline.config import UserError

SECRETS = ("jane.doe", "hush-hush", "zxzxzx")


def test_two_processes_from_a_url(worlds: Worlds, tmp_path: Path) -> None:
    """As from the folder, although the server is not always in a good mood; each shard comes once."""
    (tmp_path / "remote.yaml").write_text(SGD)
    with serving(FASHION) as server:
        server.login, server.query = "jane.doe:hush-hush", "X-Amz-Signature=zxzxzx"
        host = server.url.removeprefix("http://")
        names = sorted(path.name for path in FASHION.glob("*.tar"))
        server.hurt(names[0], "503")
        server.hurt(names[1], "cut")
        url = f"http://jane.doe:hush-hush@{host}/?X-Amz-Signature=zxzxzx"
        command = shardgan("train", "remote.yaml", "--procs", "2", f"data.train={url}", "track.wandb=true")
        ended = run(command, tmp_path, SHARDGAN_CACHE=str(tmp_path / "cache"))
        asked = {name: server.asked[name] for name in names}
    assert ended.status == 0, ended.output
    assert f"shards from {server.url}/, kept in {tmp_path}/cache/shards (at most 50 GB)" in ended.output
    assert asked == dict.fromkeys(names, 1) | {names[0]: 2, names[1]: 2}
    there, here = RunFolder(tmp_path / "runs" / "remote"), worlds.sgd[2]
    assert [without_clocks(row) for row in there.rows] == [without_clocks(row) for row in here.rows]
    assert identical(there.exported(), here.exported())
    assert f"train: {server.url}/\n" in (there.path / "config.yaml").read_text()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts for path in files)
    for secret in SECRETS:
        assert secret not in ended.output
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_neither_the_dry_run_nor_a_refusal_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDGAN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "remote.yaml").write_text(SGD)
    with serving(FASHION) as server:
        server.login = "jane.doe:hush-hush"
        url = server.url.replace("//", "//jane.doe:zxzxzx@")
        arguments = [str(tmp_path / "remote.yaml"), f"data.train={url}", f"run.out={tmp_path}"]
        shown = CliRunner().invoke(train, [*arguments, "--dry-run"]).output
        refused = CliRunner().invoke(train, arguments).exception
    assert f"data.train={server.url}" in shown and f"train: {server.url}\n" in shown
    assert isinstance(
        refused, UserError
    ) and f"{server.url}/index.json cannot be fetched: not allowed" in str(refused)
    assert not [text for text in SECRETS if text in f"{shown}{refused}"]
