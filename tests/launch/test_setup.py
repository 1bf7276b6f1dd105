"""launch/setup.sh up to its first download: which environment it installs into, and that this has a pip."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The files that it looks at, in a folder of their own."""
    folder = tmp_path / "project"
    (folder / "launch").mkdir(parents=True)
    for name in ("pyproject.toml", "launch/setup.sh", "launch/venv.sh", "launch/constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A virtual environment as uv makes it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    return tmp_path / "bare"


def setup(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Its pip finds no packages."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")
    }
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(project), "PIP_CONFIG_FILE": os.devnull}
    return subprocess.run(
        ["bash", str(project / "launch" / "setup.sh")],
        check=False, env=inherited | offline | environment, capture_output=True, text=True,
    )  # fmt: skip


def has_pip(environment: Path) -> bool:
    return not subprocess.run(
        [environment / "bin" / "python", "-m", "pip", "--version"], check=False, capture_output=True
    ).returncode


def test_an_active_environment_without_pip_is_given_one(project: Path, bare: Path) -> None:
    assert not has_pip(bare)
    ended = setup(project, CONDA_PREFIX=str(bare))
    assert (
        has_pip(bare) and ended.stderr.startswith("ERROR: ") and "torch" in ended.stderr
    )  # looked for by pip
    assert not (project / ".venv").exists()


def test_one_that_cannot_be_given_pip_is_refused(project: Path, bare: Path, tmp_path: Path) -> None:
    (tmp_path / "ensurepip.py").write_text("raise SystemExit(1)")
    ended = setup(project, VIRTUAL_ENV=str(bare), PYTHONPATH=str(tmp_path))
    assert ended.returncode == 2 and ended.stderr.startswith(f"error: {bare} has no pip")
    assert "uv pip install --python" in ended.stderr and ended.stderr.count("\n") == 1


def test_an_empty_conda_environment_is_refused(project: Path, tmp_path: Path) -> None:
    ended = setup(project, CONDA_PREFIX=str(tmp_path))
    assert ended.returncode == 2 and "conda install python" in ended.stderr


@pytest.mark.parametrize(
    ("environment", "used"),
    [
        ({}, "HERE/.venv"),
        ({"CONDA_PREFIX": "/opt/conda", "CONDA_DEFAULT_ENV": "base"}, "HERE/.venv"),
        ({"CONDA_PREFIX": "/opt/conda/envs/gan", "CONDA_DEFAULT_ENV": "gan"}, "/opt/conda/envs/gan"),
        ({"CONDA_PREFIX": "/opt/conda/envs/gan", "VIRTUAL_ENV": "/home/me/venv"}, "/home/me/venv"),
    ],
)
def test_the_environment_that_is_used(tmp_path: Path, environment: dict[str, str], used: str) -> None:
    script = f"set -eu; source {ROOT}/launch/venv.sh; echo $venv"
    ended = subprocess.run(
        ["bash", "-c", script], check=True, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.stdout.strip() == used.replace("HERE", str(tmp_path))


def test_all_scripts_use_the_same() -> None:
    for name in ("launch/setup.sh", "launch/quickstart.sh", "tests/run.sh", ".ci/run", "slurm/node.sh"):
        text = (ROOT / name).read_text()
        assert "/venv.sh" in text and "{VIRTUAL_ENV" not in text, name
