"""A real training tracked online: the server dies in the middle, and W&B ends up with every row once."""

from __future__ import annotations

import pytest
from launching import ADAM, RunFolder, Started, identical, rows_written, run, shardgan

from tests.wandb_server import wandb_server

KEY = "0a1b2c3d4e5f6789" * 2 + "0a1b2c3d"  # made up: as long as a real one
IMPATIENT = {
    f"WANDB__{name}_RETRY_WAIT_{which}_SECONDS": "0.1"
    for name in ("FILE_STREAM", "GRAPHQL", "FILE_TRANSFER")
    for which in ("MIN", "MAX")
}


@pytest.mark.long  # mostly waits for the server at the end
def test_the_server_dies_in_mid_run(worlds, tmp_path):
    """No step, row or exit status is lost; the same command sends what is missing."""
    (tmp_path / "adam.yaml").write_text(ADAM.replace("wandb: false", "wandb: true"))
    line = shardgan("train", "adam.yaml", "--procs", "1", "run.out=.", "run.name=online")
    folder = RunFolder(tmp_path / "online")
    with wandb_server() as server:
        environment = IMPATIENT | {"WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        started = Started(line, tmp_path, **environment).until(rows_written(folder.path, 2))
        server.die()
        ended = started.wait()
        assert ended.status == 0 and folder.done, ended.output
        assert identical(folder.exported(), worlds.adam[1].exported())
        server.come_back()
        again = run(line, tmp_path, **environment)
        assert again.status == 0 and "Nothing to do" in again.output, again.output
        charted = [row["_step"] for row in server.run.history if "Loss/G/loss" in row]
        assert charted == [row["cur_nimg"] for row in folder.rows if "Loss/G/loss" in row]
        assert server.run.config["data"]["value"]["batch_size"] == 12 and server.run.exit_code == 0
        assert "Samples/fakes" in server.run.history[-1]
        assert KEY.encode() not in b"".join(server.received) and KEY not in ended.output + again.output
    files = [p for p in folder.path.rglob("*") if p.is_file()]
    assert len(files) > 10 and [p for p in files if KEY.encode() in p.read_bytes()] == []
