"""The environment that our commands start processes with, whatever shell they are called in."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch import launcher, processes
from launch.doctor import surroundings
from launch.doctor.finding import Machine
from launch.processes import check_strategy, environment_of, notes
from launch.select import local as select_local
from launch.select.trials import LaunchOptions
from pipeline import config
from pipeline.config import UserError
from pipeline.folders import cache_folder, provide_home
from pipeline.run import stop

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTHONPATH", "PYTHONSAFEPATH", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delitem(os.environ, name, raising=False)


def test_variables_of_other_launchers_do_not_reach_them(monkeypatch: pytest.MonkeyPatch) -> None:
    others = (
        "RANK",
        "WORLD_SIZE",
        "MASTER_PORT",
        "PET_NNODES",
        "TORCHELASTIC_RUN_ID",
        "OMPI_COMM_WORLD_SIZE",
    )
    others += ("PMI_SIZE", "ACCELERATE_TORCH_DEVICE", "ACCELERATE_USE_FSDP", "FSDP_VERSION")
    for name in others:
        monkeypatch.setenv(name, "4")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    environment = environment_of(2, on_cpu=True)
    assert not set(others) & environment.keys() and environment["NCCL_DEBUG"] == "INFO"
    (note,) = [note for note in notes() if "launcher" in note]
    assert "RANK" in note and "FSDP_VERSION" in note and "PMI_SIZE" not in note


def test_a_process_that_is_alone_does_not_wait_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `shardgan evaluate` is."""
    script = (
        "import datetime; from pipeline.parallel.launched import Launch;"
        "from pipeline.parallel.ranks import Ranks;"
        "print(Ranks(Launch('single', 'no', 0, 1), datetime.timedelta(seconds=5)).world)"
    )
    stale = {
        "RANK": "0",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    stale |= {"OMPI_COMM_WORLD_SIZE": "4", "PMI_SIZE": "4", "ACCELERATE_DEBUG_MODE": "perhaps"}
    ended = subprocess.run(
        [sys.executable, "-c", script], check=True, env=os.environ | stale, capture_output=True, text=True
    )
    assert ended.stdout.strip() == "1"


@pytest.mark.parametrize(("given", "used"), [("", "CORES"), ("4,2", "4"), (" 3 ", "3"), ("2", "2")])
def test_threads_as_openmp_has_them(monkeypatch: pytest.MonkeyPatch, given: str, used: str) -> None:
    monkeypatch.setattr("launch.processes.cores", lambda: 12)
    monkeypatch.setattr(select_local, "cores", lambda: 12)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert environment_of(2, on_cpu=True)["OMP_NUM_THREADS"] == used.replace("CORES", "6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    shares = select_local.shares(LaunchOptions(procs=2), jobs=3)
    assert [share["OMP_NUM_THREADS"] for share in shares] == [used.replace("CORES", "2")] * 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("OMP_NUM_THREADS", value) for value in ("abc", "0", "-1", "1.5", ",2")),
        ("ACCELERATE_USE_CPU", "perhaps"),
        ("GLOO_SOCKET_IFNAME", "nowhere0"),
    ],
)
def test_what_cannot_be_followed_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}={value}"):
        environment_of(2, on_cpu=True)


def test_threads_wait_without_spinning_unless_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment_of(1, on_cpu=True)["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert environment_of(1, on_cpu=True)["OMP_WAIT_POLICY"] == "active"


def test_a_wish_for_cpus_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "yes")
    assert environment_of(1, on_cpu=False)["ACCELERATE_USE_CPU"] == "1"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")
    assert "ACCELERATE_USE_CPU" not in environment_of(1, on_cpu=False)


def test_hidden_gpus_are_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert any(f"CUDA_VISIBLE_DEVICES='{hidden}' hides all GPUs" in note for note in notes())


def test_zero_without_deepspeed_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.processes.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--strategy zero2 needs DeepSpeed, which is not installed"):
        check_strategy("zero2", 2)
    check_strategy("fsdp2", 2)


@pytest.mark.parametrize("variable", ["OMP_PROC_BIND=true", "OMP_PLACES=cores", "GOMP_CPU_AFFINITY=0"])
def test_no_variable_binds_all_processes_to_one_core(tmp_path: Path, variable: str) -> None:
    """As torch would do to this one when it is imported, from which the others are started."""
    name, _, value = variable.partition("=")
    code = "import sys, os, launch.cli; sys.argv = ['shardgan', '--help']\n"
    code += "try: launch.cli.main()\nexcept SystemExit: pass\n"
    code += "cores = os.sched_getaffinity(0); import torch; torch.ones(9).sum()\n"
    code += "print(cores == os.sched_getaffinity(0))"
    environment = os.environ | {name: value, "OMP_NUM_THREADS": "2"}
    ended = subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True
    )
    assert ended.stdout.splitlines()[-1] == "True"


# Homes and accounts


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "USER"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


def no_account(_: int) -> None:
    raise KeyError("getpwuid(): uid not found: 12345")


@pytest.mark.parametrize("home", [None, "", "/nowhere/at/all"])
def test_a_home_where_there_is_none(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    monkeypatch.setattr("pwd.getpwuid", no_account)
    monkeypatch.setenv("HOME", home or "")
    if home is None:
        monkeypatch.delenv("HOME")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # of a notebook
    provide_home()
    assert "MPLBACKEND" not in os.environ
    assert Path("~").expanduser() == temporary / f"shardgan-{os.getuid()}" and os.environ["USER"]
    assert Path("~").expanduser().stat().st_mode & 0o777 == 0o700


def test_the_home_of_the_account_is_there_for_programs_that_ask_the_variable_alone(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As W&B's service."""
    monkeypatch.setattr("pwd.getpwuid", lambda _: SimpleNamespace(pw_dir=str(temporary)))
    monkeypatch.delenv("HOME")
    provide_home()
    assert os.environ["HOME"] == str(temporary)


def test_a_home_that_cannot_be_written_is_left_where_it_is(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = temporary / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not str(path).startswith(str(home)) and real(path, mode)
    )
    provide_home()
    ours = str(temporary / f"shardgan-{os.getuid()}")
    assert (os.environ["HOME"], os.environ["XDG_CACHE_HOME"], os.environ["MPLCONFIGDIR"]) == (
        str(home),
        ours,
        ours,
    )


def test_a_usable_home_changes_nothing(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(temporary))
    before = dict(os.environ)
    provide_home()
    assert dict(os.environ) == before and not list(temporary.iterdir())


def test_the_cache_may_be_named_from_the_home(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As quotation marks in a job script leave it."""
    monkeypatch.setenv("HOME", str(temporary))
    monkeypatch.setenv("SHARDGAN_CACHE", "~/cache")
    assert cache_folder() == temporary / "cache"
    monkeypatch.setenv("SHARDGAN_CACHE", "~nobody-here/cache")
    with pytest.raises(UserError, match="there is no such home folder"):
        cache_folder()


# What doctor says of it


def test_doctor_sees_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long_folder: Path) -> None:
    monkeypatch.chdir(tmp_path)
    job = surroundings.Job(config.load(None, ["data.train=x", "run.name=x"]), 1, 2, "ddp", "no")
    assert surroundings.examine(job) == []
    (tmp_path / "random.py").touch()
    (tmp_path / "pipeline").mkdir()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "abc")
    monkeypatch.setattr("tempfile.tempdir", str(long_folder))
    found = {(finding.check, finding.verdict): finding.text for finding in surroundings.examine(job)}
    assert "OMP_NUM_THREADS=abc" in found["variables", "would fail"]
    assert "WORLD_SIZE" in found["variables", "warning"]
    assert all(str(tmp_path / name) in found["modules", "warning"] for name in ("random.py", "pipeline"))
    assert "no sockets fit" in found["data workers", "ok"]


def test_a_job_on_other_machines_is_not_judged_by_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """`submit` on a login node: the variable is meant for the nodes."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    here = surroundings.Job(config.load(None, ["data.train=x", "data.workers=0"]), 2, 2, "ddp", "no")
    (found,) = surroundings.examine(here)
    assert found.verdict == "would fail" and "GLOO_SOCKET_IFNAME=ib7" in found.text
    assert surroundings.examine(replace(here, machine=Machine(remote=True))) == []


@pytest.mark.parametrize(
    ("gpus", "cpus", "batch", "expected"),
    [
        (8, 2, 256, 8),
        (6, 2, 256, 4),
        (7, 2, 63, 7),
        (3, 2, 64, 2),
        (0, 3, 64, 2),
        (0, 64, 64, 4),
        (0, 1, 64, 1),
    ],
)
def test_a_batch_is_divided_over_as_many_processes_as_it_can(
    monkeypatch, gpus_here, gpus, cpus, batch, expected
):
    gpus_here(gpus)
    monkeypatch.setattr(processes, "cores", lambda: cpus)
    assert processes.default_procs(None, batch) == processes.default_procs("fsdp2", batch) == expected
    assert processes.default_procs("single", batch) == 1
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert processes.default_procs(None, 64) == {1: 1, 2: 2, 3: 2, 64: 4}[cpus]


@pytest.fixture
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long") / ("x" * 120)
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGUSR1, stop.TERMINATED), (signal.SIGINT, stop.INTERRUPTED)]
)
def test_a_signal_that_waited_for_the_launcher_ends_it(monkeypatch, number, status):
    """The listening thread may be faster than the constructor that starts it."""

    def listening(
        *_: str, on_stop: Callable[[int], None], on_tick: Callable[[], None], **_more: object
    ) -> None:
        on_stop(number)
        on_tick()

    children = SimpleNamespace(children=list)
    monkeypatch.setattr(stop, "StopSignals", listening)
    monkeypatch.setattr(launcher.psutil, "Process", lambda: children)
    monkeypatch.setattr(launcher.os, "times", lambda: SimpleNamespace(children_user=0.0))
    monkeypatch.setattr(stop, "hold", lambda: None)
    with pytest.raises(SystemExit) as ended:
        launcher._Launcher(end=sys.exit)
    assert ended.value.code == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_a_command_started_ends_with_it(tmp_path: Path, number: signal.Signals) -> None:
    """As of `selfcheck`, which starts launchers, if it is asked to end meanwhile."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    child = (
        f"import time; pipe = open({str(pipe)!r}, 'w'); print('here', file=pipe, flush=True); time.sleep(600)"
    )
    script = (
        "import os, sys; from launch import processes; "
        f"processes.run([sys.executable, '-c', {child!r}], dict(os.environ), 600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=Path(launcher.__file__).parents[1]) as parent:
        with pipe.open() as there:
            assert there.readline() == "here\n"
            parent.send_signal(number)
            assert there.read() == ""  # until the child has ended
        assert parent.wait() == 128 + number


def test_a_launcher_lets_its_ranks_hold_many_connections():
    """Under a soft limit as shells have it, and never above the hard one."""
    script = (
        "import resource as r; from launch.launcher import allow_connections; allow_connections(); "
        "print(*r.getrlimit(r.RLIMIT_NOFILE))"
    )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    for soft in (256, most):
        shell = f"ulimit -Sn {soft}; ulimit -Hn {most}; exec {sys.executable} -c '{script}'"
        found = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=ROOT, check=True)
        assert found.stdout.split() == [str(most), str(most)]
