"""Files of the user's with the names of modules: where they are passed by, and where they are refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.api import shadows
from pipeline.config import UserError
from pipeline.plugins import import_named

ROOT = Path(__file__).parents[2]
SHARDGAN = Path(sys.executable).parent / "shardgan"
TRAP = "raise SystemExit('a file of the user was imported')\n"


def run(folder: Path, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        command, check=False, cwd=folder, env=clean | environment, capture_output=True, text=True
    )


def refused(ended: subprocess.CompletedProcess[str], path: Path) -> None:
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith(f"error: {path}") and ended.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["random.py", "queue.py", "torch.py", "profile.py", "yaml/__init__.py"])
def test_beside_a_bare_launch(tmp_path: Path, name: str) -> None:
    """The folder it is called in comes first: what is in there is named, and not imported."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(TRAP)
    path = tmp_path / name.removesuffix("/__init__.py")
    refused(run(tmp_path, sys.executable, "-m", "pipeline.train", "x.yaml"), path)


def test_a_folder_of_our_name_beside_a_bare_launch(tmp_path: Path) -> None:
    """Without an __init__.py our files are found in it all the same, but not our package."""
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "random.py").write_text(TRAP)
    refused(run(tmp_path, sys.executable, "-m", "pipeline.train", "x.yaml"), tmp_path / "pipeline")


@pytest.mark.parametrize(
    "name", ["pipeline.py", "pipeline/nets.py", "pipeline/__init__.py", "launch/__init__.py", "random.py"]
)
def test_on_PYTHONPATH(tmp_path: Path, name: str) -> None:
    """The command passes it by; what starts without the command names it."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(TRAP)
    ended = run(ROOT.parent, SHARDGAN, "--version", PYTHONPATH=str(tmp_path))
    assert ended.returncode == 0 and ended.stdout.startswith("shardgan, version"), ended.stderr
    if name == "random.py":
        bare = run(ROOT.parent, sys.executable, "-m", "pipeline.train", "x.yaml", PYTHONPATH=str(tmp_path))
        refused(bare, tmp_path / name)


def test_classes_in_a_folder_of_PYTHONPATH_that_hides_a_module(tmp_path: Path) -> None:
    """They are found all the same, after everything else."""
    (tmp_path / "queue.py").write_text(TRAP)
    (tmp_path / "nets_of_mine.py").write_text("import queue\nclass Net: kind = queue.Queue\n")
    code = "from pipeline.plugins import import_named as f; print(f('nets_of_mine:Net', 'G.kind').kind)"
    ended = run(ROOT, sys.executable, "-P", "-c", code, **{shadows.SEARCHED_LAST: str(tmp_path)})
    assert "queue.Queue" in ended.stdout, ended.stderr


def test_where_the_command_is_called_nothing_is_hidden(tmp_path: Path) -> None:
    """Not from a worker of any kind either: helpers of multiprocessing start by `python -c`."""
    for name in ("random.py", "queue.py", "selectors.py", "copy.py", "pipeline.py", "launch.py", "torch.py"):
        (tmp_path / name).write_text(TRAP)
    assert run(tmp_path, SHARDGAN, "train", "x.yaml").stderr == "error: There is no config file x.yaml.\n"
    script = (
        "import launch.cli, os, sys, subprocess, launch.processes;"
        "child = [sys.executable, '-c', 'import random, queue, copy, pipeline.config, launch.cli'];"
        "subprocess.run(child, check=True, env=launch.processes.environment_of(1, True));"
        "launch.cli._call = lambda: subprocess.run(child, check=True); launch.cli.main()"
    )
    ended = run(tmp_path, sys.executable, "-P", "-c", script)
    assert ended.returncode == 0, ended.stderr


def test_the_clone_itself_and_pythons_own_folder_hide_nothing() -> None:
    assert shadows.shadows_in(str(ROOT)) == [] == shadows.shadows_in(str(Path(os.__file__).parent))
    ended = run(
        ROOT, sys.executable, "-m", "launch.cli", "--version", PYTHONPATH=str(Path(os.__file__).parent)
    )
    assert ended.returncode == 0, ended.stderr


def test_what_a_wheel_installs_hides_nothing_either(tmp_path: Path) -> None:
    """There the folder is called shardgan, beside pipeline and launch."""
    shutil.copytree(ROOT / "pipeline" / "api", tmp_path / "shardgan")
    for name in ("pipeline", "launch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    code = f"from shardgan import shadows; print(shadows.shadows_in({str(tmp_path)!r}))"
    ended = run(tmp_path, sys.executable, "-P", "-c", code, PYTHONPATH=str(tmp_path))
    assert ended.stdout == "[]\n", ended.stderr


def test_what_is_no_module_or_hides_none(tmp_path: Path) -> None:
    for name in ("random.txt", "test.py", "this.py", "nets.py", "wandb/run.txt", "random.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert shadows.shadows_in(str(tmp_path)) == []


# A user's own classes


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_they_are_found_in_the_current_folder_last(mine: Path) -> None:
    (mine / "nets_of_mine.py").write_text("import random\nclass Net: shuffle = random.shuffle\n")
    (mine / "random.py").write_text(TRAP)
    assert import_named("nets_of_mine:Net", "G.kind").__name__ == "Net"
    assert sys.path[-1] == str(mine)


@pytest.mark.parametrize("name", ["queue", "pipeline"])
def test_one_in_a_file_with_the_name_of_a_module_is_explained(mine: Path, name: str) -> None:
    (mine / f"{name}.py").write_text("class Net: pass\n")
    with pytest.raises(
        UserError, match=rf"G.kind cannot be imported.*`{name}` is .*give .*{name}.py another name"
    ):
        import_named(f"{name}:Net", "G.kind")


def test_a_class_of_a_notebook_that_is_not_in_this_process_is_explained() -> None:
    with pytest.raises(UserError, match=r"^G.kind: Net is not here, .*give mine:Net\.$"):
        import_named("__main__:Net", "G.kind")


def test_nobody_puts_a_folder_before_pythons_own() -> None:
    files = [path for top in ("pipeline", "launch") for path in (ROOT / top).rglob("*.py")]
    assert files and not [path for path in files if "sys.path.insert" in path.read_text()]
