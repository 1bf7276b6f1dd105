"""The cores that a container allows, as Docker and Kubernetes lay its control groups out."""

from __future__ import annotations

import pytest

from pipeline import cgroups, cores


@pytest.mark.parametrize(
    ("groups", "files", "allowed"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, [2]),  # a container under cgroup v2
        ("0::/\n", {"cpu.max": "max 100000\n"}, []),
        ("0::/\n", {}, []),  # the host's own root
        ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "50000 100000\n"}, [1, 2]),
        ("4:memory:/\n3:cpu,cpuacct:/docker/1\n0::/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
         "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, [4]),  # v1; the path is the host's
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, []),
        ("3:cpuset:/\n", {"cpuset/cpu.cfs_quota_us": "100000\n", "cpuset/cpu.cfs_period_us": "100000\n"}, []),
    ],
)  # fmt: skip
def test_quotas(tmp_path, monkeypatch, groups, files, allowed):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "self").write_text(groups)
    monkeypatch.setattr(cgroups, "_OWN", tmp_path / "self")
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path)
    assert list(cores._quotas()) == allowed


def test_where_there_are_no_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroups, "_OWN", tmp_path / "missing")  # no Linux
    assert list(cores._quotas()) == []


def test_the_least_counts(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "_quotas", lambda: iter(()))
    assert cores.cores() == 8
    monkeypatch.setattr(cores, "_quotas", lambda: iter((3, 5)))
    assert cores.cores() == 3


def test_a_process_bound_to_one_core_is_told(monkeypatch):
    """As by torch in `accelerate launch` where a cluster's modules set the variable."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3}, raising=False)
    said = cores.bound_by({"OMP_PROC_BIND": "true"}, 8)
    assert said is not None and "one core of 8: `unset OMP_PROC_BIND`" in said
    assert cores.bound_by({}, 8) is None  # its own core of a scheduler's
    assert cores.bound_by({"OMP_PROC_BIND": "true"}, 1) is None
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 4}, raising=False)
    assert cores.bound_by({"OMP_PROC_BIND": "false"}, 8) is None
