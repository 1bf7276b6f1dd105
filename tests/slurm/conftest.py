"""One cluster for all tests here, and a copy of the project on it."""

from __future__ import annotations

import compileall
import shutil
from collections.abc import Iterator

import pytest
from cluster import Cluster, missing
from launching import ROOT
from project import TINY, Project


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    cluster = Cluster()
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def project(cluster: Cluster) -> Project:
    path = cluster.folder / "project"
    for name in ("pipeline", "launch", "slurm"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(path, quiet=1)  # once, for the processes of all jobs
    (path / "configs").mkdir()
    (path / "configs" / "tiny.yaml").write_text(TINY)
    return Project(cluster, path)
