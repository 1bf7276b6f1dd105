"""W&B's own variables: used where the config is silent; they never break a run or mix two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from launch.doctor.place import tracker as tracker_findings
from pipeline.config import Config, load
from pipeline.run.tracker import open_tracker
from pipeline.run.wandb_files import Tracked, recall, remember
from pipeline.run.wandb_mode import choose_mode, names
from tests.wandb_offline import offline_runs
from tests.wandb_server import WandbServer, wandb_server

pytestmark = pytest.mark.usefixtures("no_account")
ROOT = Path(__file__).parents[2]
KEY = "fedcba9876543210" * 2 + "fedcba98"
VARIABLES = {"WANDB_PROJECT": "faces", "WANDB_NAME": "nice", "WANDB_TAGS": "a, b", "WANDB_ENTITY": "lab"}


def config(name: str, *settings: str) -> Config:
    return load(None, ["data.train=shards", f"run.name={name}", *settings])


def track(folder: Path, step: int, *settings: str) -> list[str]:
    """One start of a command that tracks one row; returns its output."""
    said: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    tracker = open_tracker(config(folder.name, *settings), folder, None, said.append)
    tracker.log({"Progress/kimg": step / 1000}, step)
    tracker.finish()
    return said


def given(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_variable_counts_where_the_config_says_nothing(tmp_path, monkeypatch):
    given(monkeypatch, **VARIABLES, WANDB_DIR=str(tmp_path / "elsewhere"), WANDB_RESUME="must")
    track(tmp_path / "demo", 1)
    (run,) = offline_runs(tmp_path / "demo")
    assert (run.project, run.name, run.tags) == ("faces", "nice", ["a", "b"])
    assert not (tmp_path / "elsewhere").exists()
    ours = names(config("demo", "track.project=p", "track.entity=e", "track.tags=[t]"))
    assert (ours.project, ours.entity, ours.name, ours.tags) == ("p", "e", "nice", ("t",))
    assert str(names(config("demo"))) == "nice in project lab/faces"


def test_names_are_fitted_to_what_wandb_takes(tmp_path):
    """It refuses the run with others, and nothing of it would be kept."""
    odd = (f"track.project=lab/faces?{'é' * 200}", f"track.tags=[{'b' * 65},' a ','',a]")
    track(tmp_path / "demo", 1, *odd)
    (run,) = offline_runs(tmp_path / "demo")
    assert (run.project, run.tags) == (f"lab-faces-{'é' * 118}", ["b" * 64, "a"])


def test_doctor_shows_what_counts(monkeypatch):
    given(monkeypatch, **VARIABLES)
    (finding,) = tracker_findings(SimpleNamespace(config=config("demo")))  # type: ignore[arg-type]
    assert "nice in project lab/faces" in finding.text


def test_nothing_given_is_our_project_under_the_runs_name(monkeypatch):
    given(monkeypatch, **dict.fromkeys(VARIABLES, ""), WANDB_MODE="")
    assert str(names(config("demo"))) == "demo in project shardgan"
    assert choose_mode()[0] == "offline" and "WANDB_MODE" not in os.environ


REFUSED = {
    "WANDB_PROJECT": ("a/b", "UsageError: Invalid project name 'a/b'"),
    "WANDB_RUN_ID": ("a/b", "Run ID cannot contain"),
    "WANDB_TAGS": ("ok," + "b" * 80, "Tags must be between 1 and 64 characters"),
    "WANDB_MODE": ("bogus", "Input should be 'online', 'offline'"),
    "WANDB_BASE_URL": ("not a url", "should be a valid URL"),
    "WANDB_RESUME_FROM": ("other?_step=3", "mutually exclusive"),
}


def test_what_wandb_refuses_is_told_of_and_the_run_is_offline(tmp_path, monkeypatch):
    """By doctor too, which ends in no traceback."""
    given(monkeypatch, **{name: value for name, (value, _) in REFUSED.items()}, WANDB_API_KEY=f" {KEY}\n")
    (finding,) = tracker_findings(SimpleNamespace(config=config("demo")))  # type: ignore[arg-type]
    given(monkeypatch, **{name: value for name, (value, _) in REFUSED.items()})
    wandb.teardown()  # doctor is a process of its own
    said = track(tmp_path / "demo", 1)
    (run,) = offline_runs(tmp_path / "demo")
    assert run.finished and run.project == "shardgan" and len(said) == 1
    assert (finding.verdict, KEY in finding.text + said[0]) == ("warning", False)
    for name, (_, why) in REFUSED.items():
        assert f"W&B refuses {name}: " in finding.text and why in finding.text
        assert why in said[0] and name in finding.remedy


def test_what_else_wandb_refuses_is_told_of_by_doctor(monkeypatch):
    def broken(_: object) -> None:
        raise OSError(f"no space\nleft, key {KEY}")

    given(monkeypatch, WANDB_API_KEY=KEY)
    monkeypatch.setattr(wandb, "setup", broken)
    (finding,) = tracker_findings(SimpleNamespace(config=config("demo")))  # type: ignore[arg-type]
    assert (finding.verdict, finding.text) == ("warning", "off: OSError: no space left, key …")


@pytest.mark.parametrize("value", ["true", "1"])
def test_disabled_is_disabled(monkeypatch, value):
    given(monkeypatch, WANDB_DISABLED=value)
    assert choose_mode()[0] == "disabled"


def test_a_run_stays_where_it_is_when_the_shell_changes(tmp_path, monkeypatch):
    given(monkeypatch, WANDB_PROJECT="faces", WANDB_RESUME="never")
    track(tmp_path / "demo", 1)
    given(monkeypatch, WANDB_PROJECT="other", WANDB_RUN_ID="abcd")
    said = track(tmp_path / "demo", 2)
    runs = offline_runs(tmp_path / "demo")
    assert {run.project for run in runs} == {"faces"} and len({run.run_id for run in runs}) == 1
    assert sum(len(run.history) for run in runs) == 2
    assert "WANDB_RUN_ID=abcd is another run's" in said[-1]


def test_two_runs_of_one_id_in_the_shell_are_two_runs(tmp_path, monkeypatch):
    given(monkeypatch, WANDB_RUN_ID="abcd")
    track(tmp_path / "first", 1)
    said = track(tmp_path / "second", 1)
    (first,), (second,) = (offline_runs(tmp_path / name) for name in ("first", "second"))
    assert first.run_id == "abcd" != second.run_id and "another run's" in said[-1]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    with wandb_server() as server:
        given(monkeypatch, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
        given(monkeypatch, WANDB__DISABLE_STATS="true", WANDB__GRAPHQL_RETRY_WAIT_MAX_SECONDS="0.2")
        yield server


def test_an_id_that_the_server_knows_from_elsewhere_is_left_alone(tmp_path, monkeypatch, server: WandbServer):
    given(monkeypatch, WANDB_RUN_ID="abcd")
    track(tmp_path / "here" / "demo", 1)
    said = track(tmp_path / "there" / "demo", 1)
    assert [run.steps for run in server.runs.values()] == [[1], [1]] and "abcd" in server.runs
    assert server.url in said[0] and "another run's" in said[1]
    track(tmp_path / "here" / "demo", 2)
    assert server.runs["abcd"].steps == [1, 2]


SWEEP = {"WANDB_SWEEP_ID": "sw", "WANDB_RUN_ID": "trial", "WANDB_PROJECT": "p"}


def test_two_runs_of_one_trial_of_a_sweep_are_two_runs(tmp_path, monkeypatch, server: WandbServer):
    """W&B gives whatever runs in a trial the trial's id. A run that begins there has it, and keeps it."""
    for folder, step in (("first", 1), ("second", 1), ("second", 2), ("first", 2)):
        wandb.teardown()  # each is a process of its own
        given(monkeypatch, **SWEEP)
        said = track(tmp_path / folder, step)
        known = recall(tmp_path / folder)
        assert known is not None and said[0].endswith(f"/p/runs/{known.run_id}")
        if folder == "first":
            assert known.run_id == "trial" and len(said) == 1
        else:
            assert known.run_id != "trial" and "WANDB_RUN_ID=trial is another run's" in said[1]
            assert said[2:] == [f"W&B: run {known.run_id} is no part of sweep sw."]
    assert [run.steps for run in server.runs.values()] == [[1, 2], [1, 2]] and "trial" in server.runs


def test_what_wandb_opened_is_what_a_folder_remembers(tmp_path, monkeypatch):
    """W&B's launcher decides the id."""
    given(monkeypatch, WANDB_LAUNCH="true", WANDB_RUN_ID="theirs")
    (tmp_path / "first" / "wandb").mkdir(parents=True)
    remember(tmp_path / "first", Tracked("other", online=False, has=-1, of="first"))
    track(tmp_path / "first", 1)
    (run,), known = offline_runs(tmp_path / "first"), recall(tmp_path / "first")
    assert known is not None and (run.run_id, known.run_id, known.has) == ("theirs", "theirs", 1)


def test_blanks_around_a_value_are_no_part_of_it(tmp_path, monkeypatch, server: WandbServer):
    """A secret of a container or a cluster often ends in a line end."""
    given(monkeypatch, WANDB_API_KEY=f" {KEY}\n", WANDB_PROJECT="faces \n", WANDB_TAGS=" \n")
    said = track(tmp_path / "demo", 1)
    assert said == [f"W&B: {server.url}/me/faces/runs/{next(iter(server.runs))}"]


@pytest.mark.parametrize("service", ["3-1-unix-/tmp/gone/socket", "garbage"])
def test_a_run_has_a_service_of_its_own(tmp_path, monkeypatch, service):
    """Not that of a notebook or a script that it was started from, which may have ended."""
    given(monkeypatch, WANDB_SERVICE=service)
    said = track(tmp_path / "demo", 1)
    (run,) = offline_runs(tmp_path / "demo")
    assert run.finished and len(said) == 1 and "offline" in said[0]


SCRIPT = """
import sys
from pathlib import Path
from tests.run.test_wandb_variables import track
print(*track(Path(sys.argv[1]), 1), sep="\\n")
"""


def at_a_terminal(folder: Path) -> tuple[str, str]:
    """A start in a process of its own: its output, and what the terminal shows beside it."""
    terminal, end = os.openpty()
    line = [sys.executable, "-c", SCRIPT, str(folder)]
    pipes: dict[str, Any] = {"stdin": end, "stderr": end, "stdout": subprocess.PIPE, "text": True}
    ended = subprocess.run(line, check=False, cwd=ROOT, timeout=100, **pipes)
    os.set_blocking(terminal, False)
    try:
        shown = os.read(terminal, 10_000).decode()
    except BlockingIOError:
        shown = ""
    os.close(end)
    os.close(terminal)
    assert ended.returncode == 0, shown
    return ended.stdout, shown


def test_nobody_is_asked_for_a_key_at_a_terminal(tmp_path, monkeypatch):
    """Nor where W&B does not look for the key that there is."""
    given(monkeypatch, WANDB_MODE="online", WANDB_RELOGIN="true")
    said, shown = at_a_terminal(tmp_path / "none")
    assert "offline" in said and "no API key is configured" in said and not shown
    (tmp_path / "home" / ".netrc").write_text(f"machine 127.0.0.1:9 login user password {KEY}\n")
    said, shown = at_a_terminal(tmp_path / "elsewhere")
    assert "offline" in said and "API key" in said and not shown
    assert [run.finished for name in ("none", "elsewhere") for run in offline_runs(tmp_path / name)] == [
        True
    ] * 2
