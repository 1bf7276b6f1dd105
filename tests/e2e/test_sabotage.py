"""One rank goes wrong: all ranks decide alike, say which it was, and nothing that was good is lost."""

from __future__ import annotations

import os
import re

import pytest
from launching import COMMON, ROOT, RunFolder, accelerate, identical, run, without_clocks
from sabotage import cases
from safetensors.torch import load_file

from pipeline.run.checkpoint import find, newest_intact

# 50 updates of 12 images; 5 to a tick, 10 to a checkpoint, a score in the middle and at the end
CONFIG = f"""{COMMON}
run: {{total_kimg: 0.6, tick_kimg: 0.06, checkpoint_kimg: 0.12, eval_kimg: 0.3, keep: 9, max_skipped: 2}}
score: {{images: 24}}
"""
Ran = dict[str, tuple[int, str, RunFolder]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Case → (exit status, what it said, its folder); one launch of two processes for all of them."""
    folder = tmp_path_factory.mktemp("sabotage")
    (folder / "small.yaml").write_text(CONFIG)
    command = accelerate(2, "small.yaml", str(folder))
    command[command.index("pipeline.train")] = "sabotage"
    ended = run(command, folder, PYTHONPATH=f"{ROOT}:{ROOT / 'tests' / 'e2e'}")
    assert ended.status == 0, ended.output
    told = re.findall(r"=== (\S+)\n(.*?)=== status (\d)\n", ended.output, re.DOTALL)
    found = {name: (int(status), said, RunFolder(folder / name.rstrip("+"))) for name, said, status in told}
    assert found.keys() == cases().keys(), ended.output
    return found


def newest(folder: RunFolder) -> int:
    """cur_nimg of the newest checkpoint, which is sound and finite."""
    path, complaints = newest_intact(folder.path / "checkpoints")
    assert path is not None and complaints == []
    for file in path.glob("*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(file).values())
    return int(path.name)


def test_without_sabotage_all_is_quiet(ran):
    status, said, folder = ran["unbroken"]
    assert status == 0 and folder.done and "warning" not in said
    assert all(row["Gradients/D/skipped"] == row["Gradients/G/skipped"] == 0 for row in folder.rows[1:])


@pytest.mark.parametrize(
    ("case", "player", "where"),
    [
        ("nan-in-D-once", "D", "Loss/D/adversarial on rank 1"),
        ("nan-in-penalty-once", "D", "Loss/D/l2_penalty on rank 1"),
    ],
)
def test_what_is_not_finite_once_costs_one_update_and_a_warning(ran, case, player, where):
    status, said, folder = ran[case]
    assert status == 0 and folder.done
    (warning,) = [line for line in said.splitlines() if line.startswith("warning:")]
    assert f"1 of the 5 updates of {player}" in warning and where in warning
    (row,) = [row for row in folder.rows if row.get(f"Gradients/{player}/skipped")]
    assert row[f"Gradients/{player}/skipped"] == pytest.approx(0.2)
    newest(folder)
    assert not identical(folder.exported(), ran["unbroken"][2].exported())


@pytest.mark.parametrize("player", "DG")
def test_what_stays_not_finite_ends_the_run_with_a_diagnosis(ran, player):
    """From the 31st update on, after the checkpoint at 30; found at the tick's end, before another save."""
    status, said, folder = ran[f"nan-in-{player}"]
    assert status == 1 and not folder.done
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert f"5 of the 5 updates of {player}" in error and f"Loss/{player}/adversarial on rank 1" in error
    assert "run.max_skipped = 2" in error and f"optim.{player}.lr" in error
    assert newest(folder) == 360
    assert folder.rows[-1]["cur_nimg"] == 420


def test_a_replica_that_is_no_longer_the_others_is_caught(ran):
    status, said, folder = ran["flipped-bit"]
    assert status == 1 and not folder.done
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "The copy of D" in error and "newest checkpoint" in error
    assert newest(folder) == 360


def test_told_to_stop_while_scoring_it_scores_when_it_goes_on(ran):
    """Only one rank heard the signal, one of the user's choice; all stop at once, and nothing is missing."""
    status, said, folder = ran["told-to-stop-while-scoring"]
    assert status == 0 and "Stopped at kimg 0.3" in said and "warning" not in said
    rows = [line for line in said.splitlines() if line.startswith("kimg ")]
    assert len(rows) == 5 and "kid_efflite0" not in rows[-1]  # the one that was interrupted
    status, said, folder = ran["told-to-stop-while-scoring+"]
    assert status == 0 and folder.done
    assert_unharmed(folder, ran["unbroken"][2])


@pytest.mark.parametrize("case", ["slow-disk", "slower-disk"])
def test_training_goes_on_while_a_slow_disk_takes_a_checkpoint(ran, case):
    """Three updates pass before it is there; or so many that the next checkpoint has to wait."""
    status, said, folder = ran[case]
    assert status == 0 and folder.done
    warnings = [line for line in said.splitlines() if line.startswith("warning:")]
    if case == "slow-disk":
        assert warnings == []
    else:  # said once, not for every checkpoint
        (warning,) = warnings
        assert "waited" in warning and "run.checkpoint_kimg = 0.12" in warning
    assert find(folder.path / "checkpoints") == find(ran["unbroken"][2].path / "checkpoints")
    assert_unharmed(folder, ran["unbroken"][2])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a folder read-only for root")
def test_a_folder_that_is_read_only_for_a_while_costs_a_checkpoint_and_no_row(ran):
    status, said, folder = ran["read-only-disk"]
    assert status == 0 and folder.done, said
    warnings = [line for line in said.splitlines() if line.startswith("warning:")]
    assert all("Read-only file system" in line for line in warnings)
    for what, times in (("Checkpoint", 1), ("metrics.jsonl", 1), ("fakes000000", 3)):
        assert sum(what in line.partition("could")[0].partition("cannot")[0] for line in warnings) == times
    assert "can be written again, and is complete" in said
    written, before = (find(f.path / "checkpoints") for f in (folder, ran["unbroken"][2]))
    assert set(before) - set(written) == {480}
    assert_unharmed(folder, ran["unbroken"][2])


def assert_unharmed(folder: RunFolder, unbroken: RunFolder) -> None:
    assert identical(folder.exported(), unbroken.exported())
    assert list(map(without_clocks, folder.rows)) == list(map(without_clocks, unbroken.rows))
