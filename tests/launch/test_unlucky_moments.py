"""Two commands at once: what the other does between a look and what follows from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launch.doctor import place
from launch.select import local, queue, start, table
from launch.select.candidates import grid
from launch.select.selection import Selection
from launch.select.trials import LaunchOptions, trials
from launch.slurm import index_copies, jobs, submit
from launch.slurm.jobs import Resources
from pipeline import durable
from pipeline.config import UserError, load
from pipeline.run import image_files

ASSETS = Path(__file__).parents[1] / "assets"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Takes every job and ends none. Returns their names, in the order in which they are submitted."""
    taken: list[str] = []

    def sbatch(*options: str, **_: object) -> str:
        if "--test-only" not in options:
            taken.append(next(o.partition("=")[2] for o in options if o.startswith("--job-name")))
        return str(100 + len(taken))

    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(f"data: {{train: {ASSETS}/fashion-mnist-500, size: 28, channels: 1}}")
    monkeypatch.setattr(jobs.shutil, "which", lambda _: "/usr/bin/true")
    monkeypatch.setattr(jobs, "_sbatch", sbatch)
    monkeypatch.setattr(jobs, "state", lambda _: "PENDING")
    monkeypatch.setattr(jobs, "keep", lambda *_: None)
    return taken


def submitted(*settings: str) -> None:
    submit.submit.main(["c.yaml", "run.name=x", *settings, "--nodes=1", "--gpus=0"], standalone_mode=False)


def test_submit_beside_another_that_was_faster(cluster, monkeypatch):
    """Both have their name, and found no job, before minutes of checks."""
    others = [("run.resume=false", "run.seed=2")]
    monkeypatch.setattr(submit, "_examine", lambda *_, **__: others and submitted(*others.pop()))
    submitted("run.resume=false", "run.seed=1")
    configs = sorted(Path("runs").glob("*/slurm/*/config.yaml"))
    assert [(c.parts[1], load(c).run.seed) for c in configs] == [("x", 2), ("x-2", 1)]
    assert [(Path("runs") / name / "slurm" / "job").read_text() for name in ("x", "x-2")] == [
        "101\n",
        "102\n",
    ]
    others.append(("run.seed=3",))
    shutil.rmtree("runs")
    with pytest.raises(UserError, match="PENDING"):
        submitted("run.seed=4")
    assert [load(c).run.seed for c in Path("runs").glob("*/slurm/*/config.yaml")] == [3]
    assert sorted(p.name for p in Path("runs").iterdir()) == ["x"]


@pytest.mark.parametrize("here", [False, True])
def test_select_beside_another_that_was_faster(cluster, monkeypatch, here):
    """Of two that submit, or one that submits and one that trains here, one is refused."""
    base, found = trials("c.yaml", ("run.name=chosen",), grid(["penalty.l2=0,1"]), 2, 1)

    def selection() -> Selection:
        return Selection(base, found, LaunchOptions(), ("c.yaml", ()), lambda _: None, "paired")

    def submits() -> None:
        selection().submit(Resources(), 2, {})

    others = [submits]
    monkeypatch.setattr(start, "check", lambda *_: others and others.pop()())
    monkeypatch.setattr(table, "check_scored", lambda *_: None)
    monkeypatch.setattr(local, "train", lambda *_: pytest.fail("trains what is in the queue"))
    monkeypatch.setattr(queue.slurm, "check", lambda _: None)
    monkeypatch.setattr("sys.argv", ["shardgan", "select", "c.yaml"])
    with pytest.raises(UserError, match="Job 101 of this selection is PENDING"):
        selection().train(1) if here else submits()
    assert len(cluster) == 2, "its trials, and the job that collects them"


def test_sample_into_a_folder_that_another_task_has_just_begun(tmp_path, monkeypatch):
    out, read = tmp_path / "images", Path.read_text

    def begun_after(path: Path, *args: str) -> str:
        try:
            return read(path, *args)
        finally:
            if path == out / image_files.MADE_BY and not path.exists():
                path.write_text('{"truncation": 1.0, "run": "run"}')
                (out / "seed00000.png").touch()

    monkeypatch.setattr(Path, "read_text", begun_after)
    image_files._claim(out, {"truncation": 1.0}, "run")
    assert (out / "seed00000.png").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds other files"):
        image_files._claim(tmp_path / "mine", {"truncation": 1.0}, "run")


def test_the_index_is_copied_without_what_is_being_written(tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "index.json").write_text("{}")
    with durable.whole(tmp_path / "from" / "index.json") as partial:
        partial.write_text("half")
        index_copies._copy(tmp_path / "from", tmp_path / "to", "")
        partial.write_text("whole")
    assert [p.name for p in (tmp_path / "to").iterdir()] == ["index.json"]


def test_room_is_counted_while_training_removes_a_checkpoint(tmp_path, monkeypatch):
    for nimg in (120, 240):
        shutil.copytree(ASSETS / "run-of-format-2" / "run" / "checkpoints" / "120", tmp_path / str(nimg))
    size = place._bytes_in(tmp_path / "240")
    stat = Path.stat

    def removed_before(path: Path, **more: bool):
        shutil.rmtree(tmp_path / "120", ignore_errors=True)
        return stat(path, **more)

    monkeypatch.setattr(Path, "stat", removed_before)
    assert size > 10_000 and place._bytes_in(tmp_path) == size
