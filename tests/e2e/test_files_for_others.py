"""What a run, an export and prepared data leave is for colleagues as well: modes follow the umask."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
from launching import ADAM, FASHION, ROOT

from pipeline.data.prepare.writer import Options, prepare
from pipeline.run.export import export
from pipeline.train import main


def wrong_modes(folder: Path, umask: int) -> list[str]:
    """Files and folders with another mode than `open` and `mkdir` give them; W&B makes its own."""
    found = [path for path in [folder, *folder.rglob("*")] if "wandb" not in path.relative_to(folder).parts]
    assert len(found) > 2
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in found}
    return [
        f"{path}: {mode:o}"
        for path, mode in modes.items()
        if mode != (0o777 if path.is_dir() else 0o666) & ~umask
    ]


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_follow_the_umask(tmp_path, umask, signals_kept):
    (tmp_path / "adam.yaml").write_text(ADAM)
    prepare(str(FASHION), str(tmp_path / "data"), Options(), workers=1)
    settings = ("run.name=run", "run.total_kimg=0.048", "run.eval_kimg=9")
    places = (f"run.out={tmp_path}/runs", f"data.train={tmp_path}/data")
    assert main([f"{tmp_path}/adam.yaml", *settings, *places]) == 0
    export(tmp_path / "runs" / "run", tmp_path / "exported")
    for made in ("data", "runs", "exported"):
        assert wrong_modes(tmp_path / made, umask) == []
    assert list((tmp_path / "runs").glob("run/checkpoints/*/*.safetensors"))


def test_nothing_that_others_see_is_made_for_its_owner_alone():
    """safetensors' files are, so one place mends them; and tempfile's are, so none is ever renamed."""
    calls = re.compile(r"\bsave_file\(|\b(mkstemp|NamedTemporaryFile)\(")
    files = [path for top in ("pipeline", "launch") for path in (ROOT / top).rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix() for path in files if calls.search(path.read_text())}
    assert found == {"pipeline/durable.py"}
