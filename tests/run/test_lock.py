"""One process at a time in a folder: real processes, killed, suspended, and as seen from other machines."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from no_flock import ERRORS

from pipeline import holder, lock
from pipeline.config import UserError
from pipeline.errors import StoppedError
from pipeline.lock import LOCK, HeldError, LockLostError, take, turn

FORK = multiprocessing.get_context("fork")
NEVER_S = 1e6  # of heartbeats, where what is tested must not need them
DEADLINE_S = 60.0


class Other:
    """Another process, which takes a lock and then does as it is told."""

    def __init__(self, folder: Path, prepare: Callable[[], None] = lambda: None) -> None:
        self._pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=self._live, args=(folder, prepare, theirs), daemon=True)
        self.process.start()
        assert self.hears() == "held"

    def hears(self) -> str:
        assert self._pipe.poll(DEADLINE_S)
        return self._pipe.recv()

    def asked(self, what: str) -> str:
        self._pipe.send(what)
        return self.hears()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def signal(self, number: int) -> None:
        """Returns when it has come into effect."""
        os.kill(self.process.pid, number)
        if number == signal.SIGSTOP:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    @staticmethod
    def _live(folder: Path, prepare: Callable[[], None], pipe) -> None:
        prepare()
        with take(folder, lambda _: None) as held:
            pipe.send("held")
            while (what := pipe.recv()) != "leave":
                try:
                    getattr(held, what)()
                except LockLostError as error:
                    pipe.send(str(error))
                else:
                    pipe.send("fine")
        pipe.send("left")


@pytest.fixture
def other(tmp_path) -> Iterator[Callable[..., Other]]:
    started: list[Other] = []

    def start(prepare: Callable[[], None] = lambda: None) -> Other:
        started.append(Other(tmp_path / "run", prepare))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture(params=["flock", "no flock"])
def locks(request, monkeypatch) -> None:
    """With `flock`, and on a file system that has none."""
    if request.param == "no flock":
        refuse_flock(monkeypatch, "ENOSYS")


def refuse_flock(monkeypatch, error: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(getattr(errno, error), "no")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def beats_never(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", NEVER_S)


@pytest.fixture
def beats_often(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.5)


def on_another_machine() -> None:
    holder.kernel = lambda: "another"
    holder.socket.gethostname = lambda: "elsewhere"


def in_another_container() -> None:
    holder.pid_namespace = lambda: "pid:[1]"


def silent(text: str) -> None:
    raise AssertionError(f"nobody should have to wait: {text}")


def race(folder: Path, start, results) -> None:
    start.wait()
    try:
        with take(folder, silent) as held:
            start.wait()  # until all others have tried
            held.check()
            results.put("held")
    except HeldError as error:
        start.wait()
        results.put(str(error))


@pytest.mark.parametrize("before", ["nothing", "a dead holder"])
def test_of_three_that_start_together_one_goes_on(tmp_path, locks, before, beats_never, other):
    for n in range(20):
        folder = tmp_path / str(n)
        if before == "a dead holder":
            Other(folder).kill()
        start, results = FORK.Barrier(3), FORK.Queue()
        racers = [FORK.Process(target=race, args=(folder, start, results)) for _ in range(3)]
        for racer in racers:
            racer.start()
        said = sorted(results.get(timeout=DEADLINE_S) for _ in racers)
        for racer in racers:
            racer.join()
        assert said.count("held") == 1
        assert all(f"{folder} is in use by pid " in text for text in said if text != "held")
        assert not list(folder.glob(".*"))


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_the_file_system_answers(tmp_path, error, other, monkeypatch, beats_never):
    refuse_flock(monkeypatch, error)
    one = other()
    with pytest.raises(HeldError):
        take(tmp_path / "run", silent)
    one.kill()
    take(tmp_path / "run", silent).release()


def test_who_is_refused_learns_by_whom_and_changes_nothing(tmp_path, locks, other, beats_never):
    one = other()
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    with pytest.raises(
        HeldError, match=rf"{tmp_path}/run is in use by pid {one.process.pid} \(\w+\) on \S+ since 2"
    ):
        take(tmp_path / "run", silent)
    with pytest.raises(HeldError):
        lock.refuse_held(tmp_path / "run")
    assert before == sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))


def test_a_killed_one_is_followed_at_once(tmp_path, locks, other, beats_never):
    other().kill()
    lock.refuse_held(tmp_path / "run")
    with take(tmp_path / "run", silent) as held:
        held.check()
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_zombie_is_gone_and_so_is_one_whose_pid_is_another_process(
    tmp_path, locks, other, beats_never, monkeypatch
):
    one = other()
    os.kill(one.process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, one.process.pid, os.WEXITED | os.WNOWAIT)  # not reaped
    take(tmp_path / "run", silent).release()
    monkeypatch.setattr(holder, "state_of", lambda _: ("S", "long ago"))
    with take(tmp_path / "run", silent):  # by this very pid
        monkeypatch.undo()
        monkeypatch.setattr(fcntl, "flock", lambda *_: None)
        take(tmp_path / "run", silent).release()


def test_one_in_another_container_is_known_by_its_flock(tmp_path, other, beats_never):
    other(in_another_container).kill()
    take(tmp_path / "run", silent).release()


@pytest.mark.parametrize("where", [in_another_container, on_another_machine])
def test_one_elsewhere_is_known_by_its_heartbeat(tmp_path, other, where, locks, beats_often):
    """Alive it beats; suspended it does not, and when it goes on it finds that it has lost its place."""
    said: list[str] = []
    one = other(where)
    with pytest.raises(HeldError):
        take(tmp_path / "run", said.append)
    one.signal(signal.SIGSTOP)
    with take(tmp_path / "run", said.append) as held:
        assert "waiting for a sign of life" in said[-1]
        one.signal(signal.SIGCONT)
        assert f"was taken over by pid {os.getpid()} " in one.asked("check")
        one.asked("release")
        held.check()
    assert one.asked("check").startswith("The lock of ")


def test_one_that_is_suspended_here_loses_its_place(tmp_path, locks, other, beats_often):
    one = other()
    one.signal(signal.SIGSTOP)
    with take(tmp_path / "run", lambda _: None) as held:
        one.signal(signal.SIGCONT)
        assert "was taken over" in one.asked("check") and one.asked("leave") == "left"
        held.check()


def test_a_copy_of_a_folder_is_not_held_by_who_holds_the_folder(tmp_path, locks, other, beats_often):
    one = other()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    take(tmp_path / "copy", lambda _: None).release()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(HeldError):
        take(tmp_path / "link", silent)
    assert one.asked("check") == "fine"


def test_the_clocks_of_two_machines_are_not_compared(tmp_path, other, beats_often):
    one = other(on_another_machine)
    (file,) = (tmp_path / "run" / LOCK).iterdir()
    os.utime(file, (0, 0))
    with pytest.raises(HeldError):
        take(tmp_path / "run", lambda _: None)
    assert one.asked("check") == "fine"


def requeued(count: int) -> Callable[[], None]:
    return lambda: os.environ.update(SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(count))


def test_an_earlier_attempt_of_the_same_job_is_waited_for(tmp_path, locks, other, monkeypatch, beats_often):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    one, said = other(requeued(1)), []
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(HeldError):  # twice in one job
        take(tmp_path / "run", silent)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")

    def say(text: str) -> None:
        said.append(text)
        one.asked("leave")

    with take(tmp_path / "run", say) as held:
        assert "waiting for its end" in said[0]
        held.check()


def test_ranks_that_are_started_again_wait_for_those_before(tmp_path, other, monkeypatch, beats_never):
    def first() -> None:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"
        os.getppid = lambda: 77

    one = other(first)
    monkeypatch.setattr(os, "getppid", lambda: 77)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    take(tmp_path / "run", lambda _: one.asked("leave") and None).release()


def test_waiting_can_be_given_up(tmp_path, other):
    other()
    with pytest.raises(StoppedError, match=r"Stopped while waiting for .* in use by pid"):
        take(tmp_path / "run", lambda _: None, wait=True, stopped=lambda: True)


def test_who_was_slow_does_not_displace_who_came_meanwhile(tmp_path):
    """It saw lock 1 of one that had gone; since then the folder was free, and is held anew."""
    with take(tmp_path, silent) as held:
        assert lock._create(tmp_path, [7], b"") is None
        assert lock._create(tmp_path, [], b"") is None
        assert lock._create(tmp_path, [1], b"of one that was killed") is None  # numbers come again
        held.check()
        assert [path.name for path in (tmp_path / LOCK).iterdir()] == ["1"]


def test_a_lock_that_a_person_removed_is_lost(tmp_path):
    with take(tmp_path, silent) as held:
        (tmp_path / LOCK / "1").unlink()
        with pytest.raises(LockLostError, match=r"The lock of .* was removed"):
            held.check()


def test_a_folder_that_its_last_holder_removes_at_this_moment_is_made_again(tmp_path, monkeypatch):
    make, removed = os.mkdir, []

    def then_removed(path, *args) -> None:
        if str(path).endswith(LOCK) and not removed:
            removed.append(Path(path).parent.rmdir())
        make(path, *args)

    (tmp_path / "turn").mkdir()
    monkeypatch.setattr(os, "mkdir", then_removed)
    with turn(tmp_path / "turn", silent):
        assert removed and (tmp_path / "turn" / LOCK / "1").exists()
    assert not (tmp_path / "turn").exists()


def test_a_link_that_leads_nowhere_is_refused(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "purged" / "run")
    with pytest.raises(UserError, match="cannot be written to: it is a link that leads nowhere"):
        take(tmp_path / "run", silent, wait=True)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to: Not a directory"):
        take(tmp_path / "file" / "run", silent)
    with pytest.raises(UserError, match="/proc/run cannot be written to: "):
        take(Path("/proc/run"), silent)
