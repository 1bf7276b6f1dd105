"""How jobs end that are not left alone: cancelled, out of time, a node or a process killed; no orphans."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from itertools import product

import pytest
from launching import rows_written
from project import assert_same_run

pytestmark = pytest.mark.long
LONG = "run.total_kimg=24"  # longer than anything here waits for
TICK = 120


class Job:
    """The tiny config on two nodes, watched."""

    def __init__(self, project, name: str, *settings: str, options: tuple[str, ...] = (), **environment: str):
        self.project, self.run = project, project.run(name)
        self._line = ("--nodes=2", *options, "slurm/train.sbatch", "configs/tiny.yaml", f"run.name={name}")
        self._settings, self._environment = settings, environment
        self.submit()

    def submit(self, *settings: str) -> None:
        self.id = self.project.sbatch(*self._line, *self._settings, *settings, **self._environment)

    def at_work(self, rows: int = 2) -> Job:
        self.project.cluster.until(self.id, lambda _: rows_written(self.run.path, rows)())
        return self

    def ended(self) -> dict[str, str]:
        seen = self.project.cluster.ended(self.id)
        assert self.project.left_behind() == []
        return seen

    @property
    def log(self) -> str:
        return self.project.log(self.id)


@pytest.fixture(autouse=True)
def queue_left_empty(project):
    """What a failed test leaves running is not the next one's trouble."""
    yield
    project.cluster.run("scancel", "--user=root")


@pytest.fixture(scope="module")
def whole(project):
    """What all of them come to in the end."""
    return project.locally(2, "ddp", "whole")


def test_scancel_saves_and_the_same_line_continues(project, whole):
    job = Job(project, "cancelled").at_work()
    project.cluster.run("scancel", job.id)
    seen = job.ended()
    assert seen["JobState"] == "CANCELLED" and seen["Restarts"] == "0"
    assert job.run.stopped_at % TICK and "Traceback" not in job.log
    job.submit()
    assert job.ended()["JobState"] == "COMPLETED"
    assert_same_run(job.run, whole)


def test_asked_to_end_it_saves_and_is_not_requeued(project):
    job = Job(project, "asked", LONG).at_work()
    project.cluster.run("scancel", "--batch", "--signal=TERM", job.id)
    seen = job.ended()
    assert seen["JobState"] == "COMPLETED" and seen["Restarts"] == "0" and job.run.stopped_at
    assert "ends as asked" in job.log


def test_pairs_of_signals_to_all_processes_and_to_the_script(project):
    """At once and in any order: to every process of the steps, to the batch script, to both."""
    total = "run.total_kimg=12"
    whole, job = project.locally(2, "ddp", "unbroken", total), Job(project, "pairs", total)
    script, steps = "--batch --signal=TERM", ("--signal=TERM", "--signal=USR1")
    pairs = [*product(steps, steps), *product([script], steps), *product(steps, [script]), (script, script)]
    for pair in pairs:
        job.at_work(1 + (len(job.run.rows) if job.run.path.exists() else 0))
        sent = " & ".join(f"scancel {option} {job.id}" for option in pair)
        project.cluster.run("bash", "-c", f"{sent}; wait")
        seen = job.ended()
        assert seen["JobState"] in ("COMPLETED", "FAILED") and "Traceback" not in job.log, (
            f"{pair}\n{job.log}"
        )
        assert job.run.stopped_at and job.log.count("Stopped at kimg") == 1, f"{pair}\n{job.log}"
        job.submit()
    assert job.ended()["JobState"] == "COMPLETED"
    assert_same_run(job.run, whole)


def test_asked_to_make_room_while_it_is_still_starting(project):
    """Before any process listens: they start only after the batch script has passed the signal on."""
    hold, go = project.path / "hold.sh", project.path / "go"
    wait = f"case $* in *launch.launcher*) until [ -e {go} ]; do sleep 0.1; done ;; esac"
    hold.write_text(f'#!/bin/sh\n{wait}\nexec "$@"\n')
    hold.chmod(0o755)
    # As if submitted from within an element of an array, whose variables it inherits.
    inherited = {"SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "1"}
    job = Job(project, "early", LONG, SHARDGAN_CONTAINER=str(hold), **inherited)

    def runs(command: str) -> bool:
        return any(command in line for line in project.left_behind())

    project.cluster.until(job.id, lambda _: runs("launch.launcher"))
    project.preempt(job.id)
    project.cluster.until(job.id, lambda _: runs("sleep 3"))  # between one passing on and the next
    go.touch()
    project.cluster.until(job.id, lambda seen: seen["Restarts"] == "1")
    assert "requeue 1 of at most 100" in job.log and not job.run.done
    project.cluster.run("scancel", job.id)
    job.ended()


def test_the_time_limit_is_not_the_end(project):
    """The signal comes a minute before a limit of two: saved, requeued, gone on with, no tick twice."""
    job = Job(project, "hourly", "run.total_kimg=960", options=("--time=2", "--signal=B:USR1@60"))
    project.cluster.until(job.id, lambda seen: seen["Restarts"] == "1")
    stopped_at, rows = job.run.stopped_at, len(job.run.rows)
    assert stopped_at > 0 and "requeue 1 of at most 100" in job.log
    job.at_work(rows + 2)
    project.cluster.run("scancel", job.id)
    job.ended()
    ticks = [row["cur_nimg"] for row in job.run.rows]
    assert ticks == list(range(TICK, ticks[-1] + 1, TICK)) and ticks[-1] > stopped_at


def test_requeues_are_bounded(project):
    job = Job(project, "bounded", LONG, SHARDGAN_REQUEUES="0").at_work()
    project.preempt(job.id)
    assert job.ended()["JobState"] == "FAILED"
    assert "is not DONE: submit again to resume, or set SHARDGAN_REQUEUES" in job.log


def test_a_node_dies_and_the_job_goes_on_when_it_is_back(project, whole):
    job = Job(project, "bereft").at_work(3)
    project.cluster.machines["n2"].kill()
    project.cluster.until(job.id, lambda seen: seen["Restarts"] == "1")
    assert not job.run.done
    project.cluster.boot("n2")
    project.cluster.until_up()
    assert job.ended()["JobState"] == "COMPLETED", job.log
    assert_same_run(job.run, whole)


@pytest.mark.parametrize("victim", ["-u -m pipeline.train", "launch.launcher"])
def test_a_killed_process_ends_the_job_everywhere(project, victim):
    job = Job(project, f"killed {victim.split('.')[-1]}", LONG).at_work(4)
    lines = [line for line in project.cluster.processes("n2") if victim in line]
    os.kill(int(lines[0].split()[0]), signal.SIGKILL)
    seen = job.ended()
    assert seen["JobState"] == "FAILED" and seen["Restarts"] == "0"
    assert "srun: error: n2: task 1" in job.log
    assert f"before {job.run.path} was DONE; the same submission resumes" in job.log
    continued = Job(project, job.run.path.name, LONG)
    continued.at_work(len(job.run.rows) + 2)
    project.cluster.run("scancel", continued.id)
    continued.ended()


@pytest.mark.parametrize(("strategy", "gpus"), [("zero2", 1), ("ddp", 2), ("fsdp2", 2), ("zero3", 1)])
def test_the_same_as_locally(project, strategy, gpus):
    name = f"{strategy}-{2 * gpus}"
    short = "run.total_kimg=0.24"
    job = Job(project, name, short, options=(f"--gpus-per-node={gpus}",), SHARDGAN_STRATEGY=strategy)
    local = project.locally(2 * gpus, strategy, name, short)
    assert job.ended()["JobState"] == "COMPLETED"
    assert f"{strategy} on {2 * gpus} x cpu" in job.log
    assert_same_run(job.run, local)


def test_a_virtual_environment_in_a_tar_is_unpacked_on_every_node(project):
    """One that only points to the real one, to be small; and a command goes before python."""
    venv = project.path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    packages = next(venv.glob("lib/python*/site-packages"))
    (packages / "real.pth").write_text(f"{next(p for p in sys.path if p.endswith('site-packages'))}\n")
    with tarfile.open(project.path / "venv.tar", "w") as tar:
        tar.add(venv, "venv")
    environment = {"SHARDGAN_VENV": str(project.path / "venv.tar"), "SHARDGAN_CONTAINER": "env MARK=1"}
    job = Job(project, "packed", "run.total_kimg=0.12", **environment).at_work(1)
    assert job.ended()["JobState"] == "COMPLETED"
    for node in ("n1", "n2"):
        assert list((project.cluster.folder / f"local-{node}").glob("venv-*/venv/bin/python"))


def test_what_the_first_node_is_like_is_kept(project):
    found = next(project.path.glob("runs/*/slurm/nodes-*.json"))
    assert json.loads(found.read_text())["node"] == "n1"
