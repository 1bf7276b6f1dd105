"""A run on a disk that fills up: training goes on for a while, nothing good is lost, and room mends it."""

from __future__ import annotations

import subprocess
import sys

from launching import ADAM, RunFolder, identical, run, without_clocks

from pipeline.run.checkpoint import find, newest_intact


def test_a_full_disk(worlds, small_disk, tmp_path):
    """A checkpoint takes 0.5 MB: about nine fit. Four more fail in a row, and then the run ends."""
    (tmp_path / "adam.yaml").write_text(ADAM)
    often = ["run.checkpoint_kimg=0.012", "run.keep=99", f"run.out={small_disk}", "run.name=run"]
    # `shardgan train` would refuse so small a disk.
    command = [sys.executable, "-m", "pipeline.train", "adam.yaml", *often]
    ended = run(command, tmp_path)
    assert ended.status == 1, ended.output
    folder = RunFolder(small_disk / "run")
    lines = ended.output.splitlines()
    warnings = [line for line in lines if line.startswith("warning: Checkpoint")]
    assert len(warnings) == 4 and all(
        "No space left" in line and "Training continues" in line for line in warnings
    )
    (error,) = [line for line in lines if line.startswith("error:")]
    assert "4 checkpoints in a row" in error and "Make room" in error and "Traceback" not in ended.output
    sound, complaints = newest_intact(folder.path / "checkpoints")
    assert sound is not None and complaints == []
    assert not list((folder.path / "checkpoints").glob(".partial*"))
    written = find(folder.path / "checkpoints")
    assert len(written) > 4 and 0 < int(sound.name) < 960
    assert all(row["cur_nimg"] for row in folder.rows[1:])

    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    mended = run(command, tmp_path)
    assert mended.status == 0 and folder.done, mended.output
    assert identical(folder.exported(), worlds.adam[1].exported())
    assert list(map(without_clocks, folder.rows)) == list(map(without_clocks, worlds.adam[1].rows))
