"""`slurm/node.sh` on its own: the environment that it makes of what a node is like, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from launching import ROOT

from pipeline.parallel import environment

TELL = "import json, os, sys; print(json.dumps(dict(os.environ) | {'python': sys.executable}))\n"
SOCKET = """
import multiprocessing, tempfile
if __name__ == "__main__":
    process = multiprocessing.get_context("forkserver").Process(target=print, args=(tempfile.gettempdir(),))
    process.start()
    process.join()
    raise SystemExit(process.exitcode)
"""


class Node:
    """A node of a job, as far as node.sh can tell."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        (folder / "tell.py").write_text(TELL)
        (folder / "sockets.py").write_text(SOCKET)

    def command(self, name: str, text: str) -> None:
        (self.bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (self.bin / name).chmod(0o755)

    def run(self, module: str, **environment: str) -> subprocess.CompletedProcess[str]:
        ours = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "SHARDGAN_CODE": str(ROOT),
            "PYTHONPATH": str(self.folder),
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_CPUS_ON_NODE": "2",
            "SLURMD_NODENAME": "n7",
            "TMPDIR": str(self.folder),
            "VIRTUAL_ENV": sys.prefix,
        }
        return subprocess.run(
            ["bash", str(ROOT / "slurm" / "node.sh"), "python", module],
            check=False, cwd=self.folder, env=ours | environment, capture_output=True, text=True,
        )  # fmt: skip

    def variables(self, **environment: str) -> dict[str, str]:
        ended = self.run("tell", **environment)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_a_node_without_gpus_trains_on_cpus(node: Node) -> None:
    found = node.variables()
    assert found["ACCELERATE_USE_CPU"] == "1" and found["DS_ACCELERATOR"] == "cpu"
    assert found["SHARDGAN_PROCS"] == "1" and found["SHARDGAN_CPUS"] == "2"


@pytest.mark.parametrize("how", ["found", "allocated", "asked for"])
def test_gpus_are_used_whether_slurm_gives_them_out_or_not(node: Node, how: str) -> None:
    node.command(
        "nvidia-smi", "echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)'" if how == "found" else "exit 9"
    )
    more = {
        "found": {},
        "allocated": {"SLURM_GPUS_ON_NODE": "2"},
        "asked for": {"ACCELERATE_USE_CPU": "false"},
    }
    found = node.variables(**more[how])
    assert found.get("ACCELERATE_USE_CPU", "false") == "false" and "DS_ACCELERATOR" not in found
    assert found["SHARDGAN_PROCS"] == ("2" if how == "allocated" else "1")


def test_cpus_though_there_are_gpus(node: Node) -> None:
    node.command("nvidia-smi", "echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)'")
    found = node.variables(ACCELERATE_USE_CPU="1", SLURM_GPUS_ON_NODE="2")
    assert found["ACCELERATE_USE_CPU"] == "1" and found["DS_ACCELERATOR"] == "cpu"


def test_the_python_of_an_image_is_used_unless_another_is_named(node: Node) -> None:
    node.command("container", 'echo "in the image: $1" >&2; shift; exec "$REAL" "$@"')
    for more in ({}, {"SHARDGAN_VENV": sys.prefix}):
        ended = node.run("tell", SHARDGAN_CONTAINER="container", REAL=sys.executable, **more)
        assert ended.returncode == 0, ended.stderr
        assert f"in the image: {f'{sys.prefix}/bin/python' if more else 'python3'}\n" in ended.stderr
    node.command("python3", f'echo "as it is found" >&2; exec {sys.executable} "$@"')
    ended = node.run("tell", SHARDGAN_SRUN="--container-image=a --container-mounts=/b")
    assert ended.returncode == 0 and "as it is found" in ended.stderr


def test_an_environment_whose_python_is_not_on_the_node(node: Node) -> None:
    (node.folder / "venv" / "bin").mkdir(parents=True)
    (node.folder / "venv" / "bin" / "python3").symlink_to("/opt/nowhere/python3")
    (node.folder / "venv" / "bin" / "python").symlink_to("python3")
    refused = node.run("tell", SHARDGAN_VENV=f"{node.folder}/venv")
    assert refused.returncode == 2
    assert "venv/bin/python leads to /opt/nowhere/python3, which is not on this node." in refused.stderr


def folder_of(length: int, parent: Path) -> Path:
    parent /= "x" * (length - len(str(parent)) - 1)
    parent.mkdir(parents=True)
    return parent


def test_sockets_fit_into_the_longest_folder(node: Node) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        local = folder_of(69, Path(short))
        ended = node.run("sockets", SHARDGAN_LOCAL=str(local))
    assert ended.returncode == 0 and ended.stdout == f"{local}/tmp\n", ended.stderr


def test_a_folder_too_long_for_sockets(node: Node) -> None:
    long = folder_of(120, node.folder)
    refused = node.run("sockets", SHARDGAN_LOCAL=str(long))
    assert refused.returncode == 2 and refused.stderr.startswith(
        f"error: n7: SHARDGAN_LOCAL={long} is too long"
    )
    found = node.run("sockets", TMPDIR=str(long))
    assert found.returncode == 0 and found.stdout == f"/tmp/shardgan-{os.getuid()}/tmp\n", found.stderr


def test_variables_of_other_launchers_are_cleared(node: Node) -> None:
    """The same as by `shardgan train`."""
    others = {f"{prefix}X" for prefix in ("TORCHELASTIC_", "PET_", "OMPI_", "PMI_", "PMIX_", "MV2_", "FSDP_")}
    others |= {
        *environment.RANK_VARIABLES,
        "ACCELERATE_TORCH_DEVICE",
        "ACCELERATE_MIXED_PRECISION",
        "DS_ACCELERATOR",
    }
    others |= {"MEGATRON_LM_X", "PARALLELISM_CONFIG_X", "ACCELERATE_USE_SAGEMAKER", "MPI_LOCALNRANKS"}
    assert set(environment.left_over(dict.fromkeys(others, "1"))) == others
    found = node.variables(**dict.fromkeys(others, "1"), ACCELERATE_USE_CPU="0", MY_RANK="7")
    assert not others & found.keys() and found["MY_RANK"] == "7" and found["ACCELERATE_USE_CPU"] == "0"


@pytest.mark.parametrize(("given", "used"), [("4,2", "4"), ("", "2"), ("3", "3")])
def test_threads_as_openmp_has_them(node: Node, given: str, used: str) -> None:
    assert node.variables(OMP_NUM_THREADS=given)["OMP_NUM_THREADS"] == used


@pytest.mark.parametrize("given", ["0", "-1", "many", ",2"])
def test_a_number_of_threads_that_is_none(node: Node, given: str) -> None:
    ended = node.run("tell", OMP_NUM_THREADS=given)
    assert ended.returncode == 2 and "is not a number of threads" in ended.stderr


def test_no_file_where_the_job_runs_hides_a_module(node: Node) -> None:
    (node.folder / "random.py").write_text("raise SystemExit('shadowed')")
    script = "launch.launcher"  # of ours, which imports much
    ended = node.run(script, PYTHONPATH="")
    assert "shadowed" not in ended.stdout + ended.stderr


def test_an_active_conda_environment_is_used(node: Node) -> None:
    assert node.variables(VIRTUAL_ENV="", CONDA_PREFIX=sys.prefix)["python"] == sys.executable


def test_a_number_of_processes_that_is_none(node: Node) -> None:
    ended = node.run("tell", SHARDGAN_PROCS="all")
    assert ended.returncode == 2 and "SHARDGAN_PROCS=all is not a number of processes" in ended.stderr


@pytest.mark.parametrize("inside", [True, False])
def test_a_launcher_is_deaf_to_what_is_for_its_processes(tmp_path: Path, inside: bool) -> None:
    """Also if whatever started it, as a container runtime does, undid what node.sh had set."""
    fake = tmp_path / "accelerate" / "commands"
    fake.mkdir(parents=True)
    for folder in (fake.parent, fake):
        (folder / "__init__.py").touch()
    (fake / "launch.py").write_text(
        "import signal\nnames = ('USR1', 'USR2', 'HUP', 'TERM', 'INT')\n"
        "print([signal.getsignal(getattr(signal, f'SIG{name}')) == signal.SIG_IGN for name in names])\n"
    )

    def hearing() -> None:
        """Whatever started the tests (nohup, a shell in the background) may be deaf to some itself."""
        for name in ("USR1", "USR2", "HUP", "TERM", "INT"):
            signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_DFL)

    ended = subprocess.run(
        [sys.executable, "-m", "launch.launcher"], check=True, cwd=ROOT, capture_output=True, text=True,
        preexec_fn=hearing,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"} | ({"SHARDGAN_NODE": "n7"} if inside else {}),
    )  # fmt: skip
    assert json.loads(ended.stdout.lower()) == [inside] * 4 + [False]


@pytest.mark.parametrize(
    ("name", "inside"),
    [("SIGUSR1", False), ("SIGUSR2", False), ("SIGTERM", False), ("SIGINT", False), ("SIGINT", True)],
)
def test_a_launcher_passes_signals_on_to_its_processes(tmp_path: Path, name: str, inside: bool) -> None:
    """And outlives them, also if whatever started it (node.sh, a shell) ignored them, or let them kill it.

    Its exit status tells of a Ctrl-C, but for a node's: srun would end the others, which are still saving."""
    fake = tmp_path / "accelerate" / "commands"
    fake.mkdir(parents=True)
    for folder in (fake.parent, fake):
        (folder / "__init__.py").touch()
    (fake / "launch.py").write_text(LAUNCHES_ONE)

    def ignoring() -> None:
        for each in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGTERM"):
            signal.signal(getattr(signal, each), signal.SIG_IGN)

    ended = subprocess.run(
        [sys.executable, "-m", "launch.launcher", name], check=False, cwd=ROOT, capture_output=True,
        text=True, preexec_fn=ignoring,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"} | ({"SHARDGAN_NODE": "n7"} if inside else {}),
    )  # fmt: skip
    assert ended.stdout == f"{name}\nstill here\n", ended.stderr
    assert ended.returncode == (130 if name == "SIGINT" and not inside else 0)


# Instead of `accelerate launch`: one process, which says what it hears.
LAUNCHES_ONE = """
import os, signal, subprocess, sys
wanted = getattr(signal, sys.argv[1])
says = f"import signal; print(signal.sigwait([{int(wanted)}]).name, flush=True)"
child = subprocess.Popen([sys.executable, "-c", says])
os.kill(os.getpid(), wanted)
child.wait()
print("still here", flush=True)
"""
