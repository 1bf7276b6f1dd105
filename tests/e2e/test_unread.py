"""Runs to which nobody listens, and one in which nothing moves."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from launching import ADAM, DEADLINE, RunFolder, environment_of, run, shardgan

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SHORT = ["--procs", "1", "score.metrics=[]", "run.total_kimg=0.06", "run.tick_kimg=0.03"]


def test_a_run_whose_output_nobody_takes_is_finished(tmp_path):
    """A pipe that is full from the start, a full disk, and a locale without λ."""
    (tmp_path / "adam.yaml").write_text(ADAM)
    read, write = os.pipe()
    os.set_blocking(write, False)
    while True:
        try:
            os.write(write, bytes(4096))
        except BlockingIOError:
            break
    os.set_blocking(write, True)
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            shardgan("train", "adam.yaml", *SHORT),
            check=False, cwd=tmp_path, env=environment_of(ASCII),
            stdout=write, stderr=full, timeout=DEADLINE,
        )  # fmt: skip
    os.close(read)
    os.close(write)
    folder = RunFolder(tmp_path / "runs" / "adam")
    assert ended.returncode == 0 and folder.done and len(folder.rows) == 2
    assert "λ" in (folder.path / "export" / "README.md").read_text("utf-8")


def test_a_run_in_which_nothing_moves_is_not_finished(tmp_path):
    """Fewer updates in all than may be skipped."""
    (tmp_path / "adam.yaml").write_text(ADAM)
    ended = run(shardgan("train", "adam.yaml", *SHORT, "optim.G.lr=1e30", "optim.D.lr=1e30"), tmp_path)
    assert ended.status == 1 and "Traceback" not in ended.output
    (error,) = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert "training has diverged, and the run is not finished" in error and "optim.D.lr" in error
    assert "Finished" not in ended.output and not RunFolder(tmp_path / "runs" / "adam").done
