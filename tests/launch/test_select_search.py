"""`shardgan select --search tpe`: ranges, what is proposed, the same after a kill; on stub trainings."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from selections import CONFIG, finish, selection, table_of

from launch.select import candidates as select_candidates
from launch.select import local as select_local
from launch.select import start as select_start
from launch.select import verdict as select_verdict
from launch.select.candidates import arm_of
from launch.select.choice import SEARCHED
from launch.select.search import search
from launch.select.searched import searched
from launch.select.selection import Selection
from launch.select.trials import LaunchOptions, Trial
from pipeline.config import UserError

RANGE = ("penalty.l2=1e-6..1e-1",)


class Killed(Exception):
    """In the place of SIGKILL: nothing is written after it."""


@pytest.fixture
def searching(tmp_path, monkeypatch) -> Callable[..., Selection]:
    """Searches in tmp_path, whose trainings end at once with a score of their λ; killed after `lives`."""
    (tmp_path / "job.yaml").write_text(CONFIG)
    monkeypatch.setattr(select_start, "check", lambda *_: None)
    monkeypatch.setattr(Selection, "_conclude", lambda self: self._table())

    def run(ranges=RANGE, count=5, jobs=2, lives=99, score=score_of, name="mine", seed=0) -> Selection:
        left = [lives]

        def train(todo, launch, jobs, folder, say, ended):
            for trial in todo:
                if not left[0]:
                    raise Killed
                left[0] -= 1
                finish(trial, score(trial))
                ended(trial, "" if math.isfinite(score(trial)) else "exit status 1")
            return SimpleNamespace(received=None, interrupted=False)

        monkeypatch.setattr(select_local, "train", train)
        given = (str(tmp_path / "job.yaml"), (f"run.out={tmp_path}", f"run.name={name}", f"run.seed={seed}"))
        base, found = search(*given, ranges, count, jobs, 2, 1)
        selection = Selection(base, found.read(), LaunchOptions(), given, lambda _: None, SEARCHED, found)
        selection.train(jobs)
        return selection

    return run


def score_of(trial: Trial) -> float:
    """Best at λ = 1e-3; folds differ."""
    return 1 + (math.log10(trial.config.penalty.G.l2 + 1e-9) + 3) ** 2 + trial.fold


def proposed(selection: Selection) -> list[dict[str, str]]:
    return json.loads((selection.folder / "search.json").read_text())["candidates"]


def table(selection: Selection) -> list[object]:
    rows = json.loads((selection.folder / "table.json").read_text())["rows"]
    return [(row["arm"], row["mean"], row["standard_error"]) for row in rows]


@pytest.mark.parametrize("lives", [0, 3, 8])
def test_killed_and_continued_it_proposes_what_it_would_have(searching, lives):
    """Killed in the first batch, before any training and within; and at the end of the second."""
    whole = searching(name="whole")
    with pytest.raises(Killed):
        searching(lives=lives)
    broken = searching()
    assert proposed(broken) == proposed(whole) and table(broken) == table(whole)
    assert len(proposed(whole)) == 5


def test_a_batch_that_was_not_written_down_is_proposed_again(searching):
    """Killed between the last training of a batch and the next line of search.json."""
    whole = searching(name="whole")
    assert proposed(searching(count=2)) == proposed(whole)[:2]
    assert proposed(searching()) == proposed(whole)  # the scores of the two are all it goes by


def test_another_seed_is_refused(searching):
    """Its trials would be others, and what was proposed went by the scores of the first."""
    searching(count=2)
    with pytest.raises(UserError, match=r"run\.seed: 0 → 1"):
        searching(seed=1)


def test_it_begins_without_penalty_and_comes_near_the_best(searching):
    found = searching(count=18, jobs=1)
    values = [float(candidate["penalty.l2"]) for candidate in proposed(found)]
    assert values[0] == 0 and all(1e-6 <= value <= 1e-1 for value in values[1:])
    best = found._table().choice.arm.number("penalty.l2")
    assert abs(math.log10(best) + 3) < 0.3
    late = [abs(math.log10(value) + 3) for value in values[11:]]
    assert sum(late) / len(late) < 1.2, "1.3 to 1.9 from the ends on, if drawn evenly"


def test_a_batch_is_of_different_candidates_and_stays_as_large(searching):
    found = searching(count=7, jobs=3)
    assert len({candidate["penalty.l2"] for candidate in proposed(found)}) == 7
    before = proposed(found)
    more = searching(count=9, jobs=1)
    assert proposed(more)[:7] == before and len(proposed(more)) == 9 and more.search.batch == 3


def test_failed_candidates_count_as_the_worst(searching):
    """Above 1e-3 all fail: later proposals avoid them, and they are not compared."""

    def fails(trial: Trial) -> float:
        return score_of(trial) if trial.config.penalty.G.l2 < 1e-3 else math.nan

    found = searching(count=14, jobs=1, score=fails)
    now = found._table()
    assert any(row.failures for row in now.rows) and all(not row.failures for row in now.comparable)
    scores = [score for _, score in found.search._scored(now.rows)]
    worst = max(row.mean for row in now.comparable)
    assert scores.count(worst) == sum(1 for row in now.rows if row.failures) < 8
    assert now.choice.arm.number("penalty.l2") < 1e-3


def test_other_keys_are_the_config_s_own_without_penalty(searching):
    ranges = ("penalty.D.l2=1e-6..1e-1", "optim.G.lr=1e-4..1e-2", "D.norm=none,group", "G.width=4..8")
    found = searching(ranges, count=3, jobs=3, score=lambda trial: 1.0)
    first, *rest = proposed(found)
    assert first == {"penalty.D.l2": "0", "optim.G.lr": "0.0002", "D.norm": "none", "G.width": "8"}
    assert all(candidate["G.width"] in "45678" for candidate in rest)
    assert all(1e-4 <= float(candidate["optim.G.lr"]) <= 1e-2 for candidate in rest)


def test_a_setting_that_is_null_is_so_in_the_first_candidate(searching):
    ranges = ("penalty.l2=1e-6..1e-1", "optim.G.clip=0.1..10", "data.batch_gpu=4..16", "D.norm=none,group")
    found = searching(ranges, count=4, jobs=4, score=lambda trial: 1.0)
    first, *rest = proposed(found)
    assert (first["optim.G.clip"], first["data.batch_gpu"]) == ("null", "null")
    config = found.trials[0].config
    assert config.optim.G.clip is None and config.data.batch_gpu is None
    assert all(4 <= int(candidate["data.batch_gpu"]) <= 16 for candidate in rest)
    ticks = searched(found._table()).axes[1].get_xticklabels()
    assert "null" not in [tick.get_text() for tick in ticks], "it makes no names of numbers"


def test_a_schedule_of_the_config_leaves_numbers_in_log(tmp_path, searching):
    """λ = 0 has the config's own rate, which falls; the others have one number."""
    (tmp_path / "job.yaml").write_text(
        f"{CONFIG}optim: {{D: {{lr: [1.0e-3, 1.0e-4]}}}}\n".replace("run: {", "run: {burn_in_kimg: 0.064, ")
    )
    found = searching((*RANGE, "optim.D.lr=1e-5..1e-2"), count=5, jobs=5, score=lambda trial: 1.0)
    assert proposed(found)[0]["optim.D.lr"] == "[0.001, 0.0001]"
    axes = searched(found._table()).axes[1]
    assert axes.get_xlabel() == "optim.D.lr" and axes.get_xscale() == "log"


def test_a_value_written_otherwise_is_not_tried_again(searching):
    """The config's own is false; and a search of an earlier version may have begun with it so written."""
    ranges = ("G.checkpoint=False,True", "penalty.l2=0,1", "G.width=8..9")
    found = searching(ranges, count=9, jobs=1, score=lambda trial: 1.0)
    assert len(proposed(found)) == 8 and proposed(found)[0]["G.checkpoint"] == "False"
    begun = [{"G.checkpoint": "false", "penalty.l2": "0", "G.width": "8"}]
    (found.folder.parent / "earlier").mkdir()
    content = json.dumps({"at_once": 1, "candidates": begun})
    (found.folder.parent / "earlier" / "search.json").write_text(content)
    earlier = proposed(searching(ranges, count=9, jobs=1, score=lambda trial: 1.0, name="earlier"))
    assert len(earlier) == 8 and {"G.checkpoint": "False", "penalty.l2": "0", "G.width": "8"} not in earlier


def test_a_search_ends_when_there_is_nothing_else(searching):
    found = searching(("G.width=4..5", "D.norm=none,group"), count=9, score=lambda trial: 1.0)
    assert len(proposed(found)) == len({tuple(c.values()) for c in proposed(found)}) == 4


@pytest.mark.parametrize(
    ("ranges", "batches"),
    [
        (("G.width=4..5", "D.norm=none,group"), [1]),
        (("G.width=9..10", "penalty.l2=0,1"), [2]),  # and λ = 0 at the config's own width, 8
        (("penalty.l2=1e-3..1",), [3, 3]),
    ],
)
def test_no_more_is_to_come_than_there_is(tmp_path, ranges, batches):
    """Of each batch that is to come Slurm reserves an array."""
    (tmp_path / "job.yaml").write_text(CONFIG)
    given = (str(tmp_path / "job.yaml"), (f"run.out={tmp_path}", "run.name=mine"))
    _, found = search(*given, ranges, 9, 3, 2, 1)
    found.candidates = [arm_of({})] * 3
    assert found.batches == batches


@pytest.mark.parametrize(
    ("text", "log", "whole"),
    [
        ("penalty.l2=1e-6..1e-1", True, False),
        ("penalty.l2=1..10", True, False),  # no whole number, however it is written
        ("penalty.l2=0..0.1", False, False),
        ("D.dropout=0.1..0.5", False, False),
        ("G.width=4..64", True, True),
        ("G.width=4..8", False, True),
        ("data.batch_gpu=4..8", False, True),  # null in the config
        ("optim.G.clip=1..8", False, False),
    ],
)
def test_a_range_of_a_decade_is_searched_in_log(tmp_path, text, log, whole):
    (tmp_path / "job.yaml").write_text(CONFIG)
    _, found = search(str(tmp_path / "job.yaml"), [], [text], 2, 1, 2, 1)
    (axis,) = found.axes
    assert (axis.log, axis.whole) == (log, whole)
    assert axis.text == text.replace("1e-6..1e-1", "1e-06..0.1")


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (("penalty.l2=1e-1..1e-6",), "LOW < HIGH"),
        (("penalty.l2=1..1e999",), "LOW < HIGH"),
        (("penalty.l2=0,1",), "--search needs a range"),
        ((*RANGE, "optim.G.betas=[0,0.99],[0.0,0.99]"), r"\[0,0.99\] and \[0.0,0.99\] are the same"),
        ((*RANGE, *RANGE), "each key once"),
        (("penalty.l3=0..1",), "no such key"),
        (("D.dropout=0.5..2",), "D.dropout"),
        (("run.total_kimg=1..9",), "run.total_kimg cannot differ"),
        ((*RANGE, "data.window=1..16"), "data.window cannot differ"),  # not of the first candidate, λ = 0
        # The first counts for nothing.
        (("penalty.G.l2=1..2", "penalty.l2=1..2"), "G.l2=2, penalty.l2=1 are the same settings"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path, ranges, message):
    (tmp_path / "job.yaml").write_text(CONFIG)
    with pytest.raises(UserError, match=message):
        search(str(tmp_path / "job.yaml"), [f"run.out={tmp_path}"], ranges, 3, 1, 2, 1)[1].read()
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]


def test_ends_that_do_not_fit_together_are_refused_before_anything_starts(tmp_path):
    (tmp_path / "job.yaml").write_text(CONFIG)
    given = (str(tmp_path / "job.yaml"), [f"run.out={tmp_path}", "optim.G.kind=adamw"])
    ranges = ("penalty.G.l2=0..1", "optim.G.decoupled_decay=0..0.1")
    with pytest.raises(UserError, match=r"may propose penalty.G.l2=1, .*decay=0.1. .*do not fit together"):
        search(*given, ranges, 3, 1, 2, 1)
    needed = ("penalty.l2=0..1", "augment.p=0.1..0.5", "augment.ops=[flip],[shift]")  # no one without another
    search(*given, needed, 3, 1, 2, 1)


def test_a_proposal_that_the_config_refuses_is_not_written_down(tmp_path):
    (tmp_path / "job.yaml").write_text(CONFIG)
    given = (str(tmp_path / "job.yaml"), [f"run.out={tmp_path}", "run.name=mine"])
    _, found = search(*given, RANGE, 3, 1, 2, 1)
    found.read()

    def refuses(arms):
        raise UserError("no such candidate")

    found.trials_of = refuses
    with pytest.raises(UserError, match="no such candidate"):
        found.propose([])
    assert not (tmp_path / "mine" / "search.json").exists() and len(found.candidates) == 1


def test_without_optuna_one_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"--search tpe needs optuna: pip install 'shardgan\[search\]'"):
        search(str(tmp_path / "job.yaml"), [], RANGE, 3, 1, 2, 1)


def test_a_range_needs_a_search():
    with pytest.raises(UserError, match="add --search tpe"):
        select_candidates.grid(RANGE)


def test_a_search_is_not_continued_in_other_ranges(searching):
    searching(count=2)
    with pytest.raises(UserError, match=r"made in another way.*1e-06..0.1.*→.*1e-06..1"):
        searching(("penalty.l2=1e-6..1",), count=2)


def test_the_best_mean_is_chosen_and_compared_with_none(tmp_path):
    """By the paired rule the largest λ within one error would be; what is not done is not compared."""
    _, trials = selection(tmp_path, grid=["penalty.l2=0,0.01,0.1,1"])
    found = table_of(trials, [[3.0, 4.0], [1.0, 2.0], [1.1, 1.95], [0.5]], SEARCHED)
    assert found.choice.arm.label == "0.01" and [row.arm.label for row in found.comparable] == [
        "0",
        "0.01",
        "0.1",
    ]
    said = select_verdict.sentences(found)
    assert said[1:3] == [
        "penalty.l2=0.01 minus penalty.l2=0, in pairs: -2.000 ± 0.000.",
        "Within one standard error of it, in pairs: penalty.l2=0.1.",
    ]
    assert "As the lowest of 3 " in select_verdict.markdown(found, trials)


# On Slurm: batches wait as arrays of jobs, whose trials are listed by the job before


def collect(folder: Path, monkeypatch: pytest.MonkeyPatch, job: str) -> Selection:
    """What this job does for a search of three candidates, one after the other."""
    monkeypatch.setenv("SLURM_JOB_ID", job)
    given = (str(folder.parent / "job.yaml"), (f"run.out={folder.parent}", "run.name=mine"))
    base, found = search(*given, RANGE, 3, 1, 2, 1)
    mine = Selection(base, found.read(), LaunchOptions(), given, lambda _: None, SEARCHED, found)
    mine.collect()
    return mine


@pytest.fixture
def submitted(tmp_path, searching) -> Path:
    """The folder of such a search, whose first two trials are listed for job 11."""
    with pytest.raises(Killed):
        searching(count=3, jobs=1, lives=0)
    folder = tmp_path / "mine"
    (folder / "slurm").mkdir()
    (folder / "slurm" / "job").write_text("11 12 13 14 15 16\n")
    _, found = search(str(tmp_path / "job.yaml"), (f"run.out={tmp_path}", "run.name=mine"), RANGE, 3, 1, 2, 1)
    lines = [f"job.yaml run.name='{trial.name}'\n" for trial in found.read()]
    (folder / "slurm" / "runs.txt").write_text("".join(lines))
    return folder


def test_the_job_before_an_array_lists_its_trials(submitted, searching, monkeypatch):
    def listed(job: str) -> list[str]:
        nonlocal last
        last = collect(submitted, monkeypatch, job)
        return sorted(path.name for path in (submitted / "slurm").glob("runs-*.txt"))

    def end(file: str) -> None:
        for trial in last.trials:
            if trial.name in (submitted / "slurm" / file).read_text():
                finish(trial, score_of(trial))

    last = collect(submitted, monkeypatch, "99")
    end("runs.txt")
    assert listed("99") == [], "someone who looks on a login node"
    assert listed("12") == ["runs-2.txt"] and len(proposed_in(submitted)) == 2
    assert listed("12") == ["runs-2.txt"] and len(proposed_in(submitted)) == 2, (
        "requeued, it proposes no more"
    )
    end("runs-2.txt")
    assert listed("14") == ["runs-2.txt", "runs-3.txt"]
    end("runs-3.txt")
    assert listed("16") == ["runs-2.txt", "runs-3.txt"]
    assert proposed_in(submitted) == proposed(searching(count=3, jobs=1, name="whole"))


def test_a_task_that_was_cancelled_does_not_end_a_search(submitted, monkeypatch):
    """Nor does it count for or against its candidate; the same command trains it later."""
    first = collect(submitted, monkeypatch, "99").trials
    finish(first[0], score_of(first[0]))
    for _ in range(2):  # also requeued
        assert not collect(submitted, monkeypatch, "12").failures and len(proposed_in(submitted)) == 2
        listed = (submitted / "slurm" / "runs-2.txt").read_text().splitlines()
        assert len(listed) == 2 and not any(trial.name in line for line in listed for trial in first)


def proposed_in(folder: Path) -> list[dict[str, str]]:
    return json.loads((folder / "search.json").read_text())["candidates"]
