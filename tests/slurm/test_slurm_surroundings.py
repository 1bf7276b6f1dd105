"""Jobs among settings of clusters and users that could lead them astray: each trains a little."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import BIN, FASHION, rows_written

from launch.slurm import jobs as slurm
from launch.slurm.jobs import Resources

pytestmark = pytest.mark.long
SHORT = "run.total_kimg=0.12"

# Its first word goes to a file, python3 is the one of the tests; it forgets which signals were ignored.
IMAGE = """
import os, signal, sys
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
with open(os.environ["RUN_IN_IMAGE"], "a") as file:
    print(sys.argv[1], file=file)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@pytest.fixture(autouse=True)
def queue_left_empty(project) -> Iterator[None]:
    yield
    project.cluster.run("scancel", "--user=root")


@pytest.fixture
def image(project) -> dict[str, str]:
    """A command to put before python, as a container's."""
    (project.path / "image.py").write_text(IMAGE)
    log = project.path / "run-in-image"
    log.unlink(missing_ok=True)
    return {
        "SHARDGAN_CONTAINER": f"{sys.executable} {project.path}/image.py",
        "RUN_IN_IMAGE": str(log),
    }


@pytest.fixture
def remote(project) -> Iterator[str]:
    """Shards without an index, on a web server that the nodes reach."""
    shards = project.path / "shards"
    shards.mkdir()
    for shard in FASHION.glob("*.tar"):
        (shards / shard.name).symlink_to(shard)
    serve = [sys.executable, "-m", "http.server", "8123", "--directory", str(shards)]
    server = subprocess.Popen(
        [*project.cluster.machines["head"].enter(), *serve],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield "http://head:8123/"
    server.kill()
    server.wait()


@pytest.mark.parametrize(
    "options",
    [
        {"SLURM_EXPORT_ENV": "NONE"},  # as after sbatch --export=NONE
        {"SBATCH_EXPORT": "SHARDGAN_VENV,SHARDGAN_LOCAL,ACCELERATE_USE_CPU,OMP_NUM_THREADS"},
        {"SBATCH_CPUS_PER_GPU": "2"},
        {"SBATCH_EXCLUSIVE": "exclusive", "SHARDGAN_PROCS": "1"},  # whole nodes, of 8 CPUs and of 6
    ],
)
def test_whatever_sbatch_passes_on_and_however_cpus_were_asked_for(project, options) -> None:
    name, gpus = next(iter(options)), "--gpus-per-node=1"
    job = project.sbatch(
        "--nodes=2", gpus, "slurm/train.sbatch", "configs/tiny.yaml", f"run.name={name}", SHORT, **options
    )
    assert project.cluster.ended(job)["JobState"] == "COMPLETED", project.log(job)
    assert project.run(name).done


def test_what_a_step_of_another_job_has_left_does_not_count(project) -> None:
    """As in a shell of `srun --pty --cpus-per-task=1`."""
    left = {"SLURM_CPUS_PER_TASK": "1", "SLURM_CPU_BIND": "quiet,mask_cpu:0x2", "SLURM_CPU_BIND_LIST": "0x2"}
    job = project.sbatch(
        *("--nodes=2", "--exclusive", "slurm/train.sbatch", "configs/tiny.yaml", "run.name=within", SHORT),
        **left,
        SHARDGAN_PROCS="1",
    )
    assert project.cluster.ended(job)["JobState"] == "COMPLETED", project.log(job)
    assert "6 CPUs per node" in project.log(job)  # the smaller one's
    assert "lacks support for cpu binding" not in project.log(job), "which srun says of SLURM_CPU_BIND"


def test_options_for_srun_reach_every_step(project) -> None:
    """As a plugin for containers needs them: also the checks before, and the job that collects."""
    mark, marks = project.path / "mark.sh", project.path / "marks"
    mark.write_text(f'#!/bin/sh\necho "$SLURM_JOB_ID $SLURMD_NODENAME" >> {marks}\n')
    mark.chmod(0o755)
    options = {"SHARDGAN_SRUN": f"--task-prolog={mark}"}
    job = project.sbatch(
        "--nodes=2", "slurm/train.sbatch", "configs/tiny.yaml", "run.name=marked", SHORT, **options
    )
    folder = project.path / "collects"
    after = slurm.render("after", folder, ["node.sh", "python", "launch.cli", "--version"], Resources())
    slurm.keep(folder, [])
    (folder / "job.sbatch").write_text(after.text)
    collecting = project.sbatch(f"--dependency=afterok:{job}", str(folder / "job.sbatch"), **options)
    assert project.cluster.ended(job)["JobState"] == "COMPLETED", project.log(job)
    assert project.cluster.ended(collecting)["JobState"] == "COMPLETED", project.log(collecting)
    seen = marks.read_text().splitlines()
    assert sorted(seen[:5]) == [f"{job} n1"] * 3 + [f"{job} n2"] * 2
    assert seen[5:] in ([f"{collecting} n1"], [f"{collecting} n2"])


def test_a_submitted_job_in_an_image_on_shards_that_only_the_login_node_knows(project, image, remote) -> None:
    """The image's own python3, not that of the login node; the index from a cache that only that one has. And
    what was asked for wins over SBATCH_*."""
    alone = f"{project.cluster.local}/home"  # on the disk of the head
    environment = project.environment | image | {"HOME": alone, "PYTHONPATH": str(project.path)}
    del environment["SHARDGAN_VENV"]
    environment |= {"SBATCH_TIMELIMIT": "1", "SBATCH_JOB_NAME": "theirs", "SBATCH_OUTPUT": f"{alone}/log"}

    def shardgan(*arguments: str) -> str:
        line = (str(BIN / "shardgan"), *arguments)
        return project.cluster.run(*line, cwd=project.path, **environment).stdout

    shardgan("prepare", "--index-only", remote)
    name = "from remote shards"
    settings = (f"data.train={remote}", f"run.name={name}", SHORT)
    said = shardgan("submit", "configs/tiny.yaml", "--nodes=2", "--gpus=0", "--time=30", *settings)
    job = said.split()[1].rstrip(":")
    seen = project.cluster.ended(job)
    assert seen["JobState"] == "COMPLETED", project.log(job)
    assert (seen["JobName"], seen["TimeLimit"]) == ("from_remote_shards", "00:30:00")
    assert seen["StdOut"] == str(project.run(name).path / "slurm" / "1" / f"{job}.log")
    assert set(Path(image["RUN_IN_IMAGE"]).read_text().split()) == {"python3"}


def test_a_runtime_that_forgets_which_signals_are_ignored(project, image) -> None:
    """The launcher lives on while its processes save, all the same."""
    line = ("--nodes=2", "slurm/train.sbatch", "configs/tiny.yaml", "run.name=forgetful", "run.total_kimg=24")
    job, run = project.sbatch(*line, **image), project.run("forgetful")
    project.cluster.until(job, lambda _: rows_written(run.path, 2)())
    project.preempt(job)
    project.cluster.until(job, lambda seen: seen["Restarts"] == "1")
    assert run.stopped_at > 0 and "User defined signal" not in project.log(job), "a launcher died of it"


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (("--exclusive", "--nodes=1", "--gpus-per-node=1"), "nodes: 1, processes on each: 4"),
        (("--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=1"), "nodes: 2, processes on each: 2"),
    ],
)
def test_all_gpus_that_a_job_has_of_a_node_are_used(project, options, shape):
    """More than it asked for; its steps have as many."""
    line = ("slurm/train.sbatch", "configs/tiny.yaml", f"run.name=gpus-{options[-1][2:]}", SHORT)
    job = project.sbatch(*options, *line)
    assert project.cluster.ended(job)["JobState"] == "COMPLETED", project.log(job)
    assert shape in project.log(job)
