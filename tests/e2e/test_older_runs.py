"""A run that an older version began continues as it began, and ends where that version would have.

tests/assets/run-of-format-2 is such a run of ten updates, whose config.yaml has no ema.rampup; `continued`
is what the older version made of it in ten more.
"""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml
from launching import FASHION, ROOT, RunFolder
from safetensors.torch import load_file

from pipeline import config, train
from pipeline.config import UserError
from pipeline.run.checkpoint import saved_by
from pipeline.run.export import export
from pipeline.run.folder import check_same, find_folder

OLD = ROOT / "tests" / "assets" / "run-of-format-2"


@pytest.fixture
def old(tmp_path):
    shutil.copytree(OLD / "run", tmp_path / "format-2")
    return RunFolder(tmp_path / "format-2")


@pytest.fixture
def command(old, tmp_path):
    """The settings that the run was begun with, which say nothing of ema.rampup, and a longer run."""
    values = yaml.safe_load((old.path / "config.yaml").read_text())
    assert "rampup" not in values["ema"]
    (tmp_path / "format-2.yaml").write_text(yaml.safe_dump(values))
    return [
        str(tmp_path / "format-2.yaml"), "run.total_kimg=0.24", f"run.out={tmp_path}", f"data.train={FASHION}"
    ]  # fmt: skip


def test_it_resumes_and_ends_as_the_older_version_would_have(old, command, signals_kept, capsys):
    torch.set_num_threads(1)
    assert train.main(command) == 0
    assert "began without ema.rampup" in capsys.readouterr().out
    assert [row["cur_nimg"] for row in old.rows] == [60, 120, 180, 240]
    assert yaml.safe_load((old.path / "config.yaml").read_text())["ema"] == {"kimg": 0.05, "rampup": 0.0}
    (kept,) = {saved_by(folder).draws for folder in (old.path / "checkpoints").iterdir()}
    assert kept == 1, "it draws as it began, in later starts too"
    exported = old.exported()
    for name in ("G", "D", "G_ema"):
        expected = load_file(OLD / "continued" / f"{name}.safetensors")
        assert exported[name].keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(exported[name][key], tensor, rtol=0, atol=1e-5, msg=f"{name} {key}")
    # The same command again: now config.yaml has the key.
    settings, _ = find_folder(config.load(command[0], command[1:]), print)
    assert settings.ema.rampup == 0.0


def test_an_export_of_it_reproduces_it(old):
    export(old.path, old.path / "export")
    assert config.load(old.path / "export" / "config.yaml").ema.rampup == 0.0


def test_the_ramp_up_cannot_be_switched_on_in_the_middle(old, command):
    asked = config.load(command[0], [*command[1:], "ema.rampup=0.2"])
    with pytest.raises(UserError, match=r"ema\.rampup: 0\.0 → 0\.2"):
        check_same(asked, old.path)


def test_a_run_of_this_version_keeps_its_ramp_up(tmp_path, command):
    began = config.load(command[0], command[1:])
    folder = tmp_path / "newer"
    folder.mkdir()
    (folder / "config.yaml").write_text(config.dump(began))
    check_same(began, folder)
    with pytest.raises(UserError, match=r"ema\.rampup: 0\.05 → 0\.0"):
        check_same(config.load(command[0], [*command[1:], "ema.rampup=0"]), folder)
