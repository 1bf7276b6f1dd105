"""Stop signals and the end of a launcher, in processes that do nothing but listen for them."""

from __future__ import annotations

import os
import pty
import queue
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeline.train
from pipeline.run.stop import LAUNCHER, StopSignals

ROOT = Path(__file__).resolve().parents[2]
ALL = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

PAIRS = """
import os, queue, random, signal, sys, time
from pipeline.run.stop import StopSignals

def child(ready, over):
    stop = StopSignals("USR1")
    os.write(ready, b"r")
    while stop.received is None:
        try:
            queue.Queue().get(timeout=0.05)  # as a training process waits for data
        except queue.Empty:
            pass
    os.read(over, 1)  # both signals have been sent
    os._exit(0)

chance = random.Random(1)
signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
for n in range(60):
    (ready, say_ready), (over, say_over) = os.pipe(), os.pipe()
    if (pid := os.fork()) == 0:
        child(say_ready, over)
    os.read(ready, 1)
    first, second = chance.choice(signals), chance.choice(signals)
    os.kill(pid, first)
    until = time.perf_counter() + chance.choice((0, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 5e-3))
    while time.perf_counter() < until:
        pass
    os.kill(pid, second)
    os.write(say_over, b"o")
    print(n, first.name, second.name, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def python(script: str, **how: Any) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.Popen(line, env=environment, text=True, **pipes | how)


def test_sixty_pairs_of_signals_within_milliseconds():
    out, err = python(PAIRS).communicate(timeout=120)
    ended = [line.split() for line in out.splitlines()]
    assert len(ended) == 60 and err == "", err
    assert [line for line in ended if line[3] != "0"] == []


LISTENS = """
    import os, signal, subprocess, sys, time
    from pipeline.run import stop
    stop._APART_S = {apart}
    signals = stop.StopSignals("USR1", on_kill=lambda: print("killing", flush=True))
    print("ready", flush=True)
    for line in sys.stdin:
        while line.startswith("received") and signals.received is None:
            time.sleep(0.01)
        print(eval(line.removeprefix("received")), flush=True)
"""
RECEIVED = "received(signals.received, signals.interrupted)"


class Listening:
    """A process that listens, and evaluates what it is asked."""

    def __init__(self, apart: float = 0.0, **how: Any) -> None:
        """apart: seconds between two Ctrl-C that count as two."""
        self.process = python(LISTENS.format(apart=apart), stdin=subprocess.PIPE, **how)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, question: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{question}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def is_alive_after_all_signals(self) -> bool:
        """`close` comes back when the thread has seen what was sent before."""
        return self.ask("signals.close()") == "None"


@pytest.fixture
def listening() -> Iterator[Callable[..., Listening]]:
    made: list[Listening] = []

    def make(*arguments: float, **how: Any) -> Listening:
        made.append(Listening(*arguments, **how))
        return made[-1]

    yield make
    for each in made:
        each.process.kill()
        each.process.communicate()


@pytest.fixture
def terminal() -> Iterator[int]:
    ours, theirs = pty.openpty()
    yield theirs
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("number", ALL)
def test_the_first_signal_is_the_reason(listening, number):
    process = listening()
    process.process.send_signal(number)
    name = "SIGINT (Ctrl-C)" if number == signal.SIGINT else number.name
    assert process.ask(RECEIVED) == f"('on {name}', {number == signal.SIGINT})"


def test_a_second_ctrl_c_at_a_terminal_ends_at_once(listening, terminal):
    process = listening(0.0, stderr=terminal)
    process.process.send_signal(signal.SIGINT)
    process.ask(RECEIVED)
    process.process.send_signal(signal.SIGINT)
    assert process.process.wait(30) == 130
    assert process.process.stdout.read() == "killing\n"


@pytest.mark.parametrize(
    ("first", "second", "apart", "at_terminal"),
    [
        (signal.SIGINT, signal.SIGINT, 1000.0, True),  # one Ctrl-C in a pipe of processes
        (signal.SIGINT, signal.SIGINT, 0.0, False),
        (signal.SIGTERM, signal.SIGINT, 0.0, True),  # the first Ctrl-C
        (signal.SIGINT, signal.SIGTERM, 0.0, True),
        (signal.SIGTERM, signal.SIGTERM, 0.0, True),
        (signal.SIGHUP, signal.SIGHUP, 0.0, True),
    ],
)
def test_any_other_repeat_is_ignored(listening, terminal, first, second, apart, at_terminal):
    process = listening(apart, stderr=terminal if at_terminal else subprocess.PIPE)
    process.process.send_signal(first)
    before = process.ask(RECEIVED)
    process.process.send_signal(second)
    assert process.is_alive_after_all_signals()
    assert process.ask(RECEIVED) == before


def test_what_nohup_has_set_is_kept(listening):
    process = listening(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.process.send_signal(signal.SIGHUP)
    process.process.send_signal(signal.SIGTERM)
    assert process.ask(RECEIVED) == "('on SIGTERM', False)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_signals_wait_for_a_process_that_is_held(number):
    """As a rank starts: nothing is lost before it listens, nor before it knows run.stop_signal, and nothing
    ends it."""
    held = subprocess.Popen(
        [sys.executable, "-c", HELD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert held.stdout is not None and held.stdout.readline() == "held\n"
    held.send_signal(number)
    assert held.communicate("go on\n", timeout=60)[0] == f"on {number.name}\n"


HELD = """
import time
from pipeline.run import stop
stop.hold()
print("held", flush=True)
input()
signals = stop.StopSignals()
signals.configure("USR2", 90)
while signals.received is None:
    time.sleep(0.01)
print(signals.received)
"""


def test_a_forked_child_keeps_its_signals_to_itself(listening):
    process = listening()
    forked = (
        "(pid := os.fork()) or (os.kill(os.getpid(), signal.SIGTERM), os._exit(0)), os.waitpid(pid, 0)[1]"
    )
    assert process.ask(forked).endswith(", 0)")
    assert process.is_alive_after_all_signals()
    assert process.ask("signals.received") == "None"


def test_grace_runs_out_with_a_word(listening):
    process = listening()
    process.ask('signals.configure("USR2", 0.2)')
    process.process.send_signal(signal.SIGUSR2)
    assert process.process.wait(30) == 1
    assert process.process.stderr.read() == (
        "error: asked to stop (on SIGUSR2), and not done within run.grace = 0.2 s. The same command "
        "continues from the newest checkpoint.\n"
    )


@pytest.mark.parametrize(
    ("alone", "number", "status"),
    [(True, signal.SIGTERM, 0), (True, signal.SIGINT, 130), (False, signal.SIGINT, 0)],
)
def test_a_run_that_is_saved_has_not_failed_because_its_process_takes_longer(
    listening, alone, number, status
):
    process = listening()
    process.ask(f"signals.configure('USR2', 0.2), signals.joining(alone={alone}).__enter__()")
    process.ask("setattr(signals, '_joining', False), signals.concluded()")
    process.process.send_signal(number)
    assert process.process.wait(30) == status and process.process.stderr.read() == ""


def test_a_process_that_is_a_callers_is_not_ended_but_gets_the_signal_again():
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: heard.append(number))
    asked: list[int] = []
    ticks: queue.Queue[bool] = queue.Queue()
    try:
        signals = StopSignals(borrowed=True, on_stop=asked.append, on_tick=lambda: ticks.put(bool(asked)))
        signals.configure("USR2", 0.0)
        os.kill(os.getpid(), signal.SIGUSR2)
        seen = 0
        while seen < 3:  # at the first of them another process would have ended
            seen += ticks.get(timeout=60)
        signals.close()
        assert heard == []
        signals.raise_again()
        assert heard == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_what_joins_others_is_ended_in_the_middle_of_it(listening):
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = listening()
        process.ask('signals.configure("USR1", 90)')
        process.ask("globals().update(joining=signals.joining()) or joining.__enter__()")
        process.process.send_signal(number)
        assert process.process.wait(30) == status


# Launchers


MIDDLE = """
    import os, subprocess, sys
    environment = {**os.environ, **(%(environment)s)}
    subprocess.Popen([sys.executable, "-c", %(script)r], env=environment)
    input()  # and is then gone
"""
CHILD = """
import os, threading
from pipeline.run import stop
parent, looked, ticks = os.getppid(), threading.Event(), []

def tick():
    if os.getppid() != parent:
        ticks.append(1)
        if len(ticks) == 2:
            looked.set()

signals = stop.StopSignals(on_tick=tick)
print("ready", flush=True)
looked.wait(60)
print(str(signals.received).replace(str(parent), "PARENT"), flush=True)
"""


@pytest.mark.parametrize(
    ("started_by", "reason"),
    [
        ("shell", "None"),
        ("ours", "because its launcher (PID PARENT) has ended"),
        ("accelerate", "because its launcher (PID PARENT) has ended"),
    ],
)
def test_only_the_end_of_a_launcher_stops(tmp_path, started_by, reason):
    environment = f"{{{LAUNCHER!r}: str(os.getpid())}}" if started_by == "ours" else "{}"
    script = tmp_path / ("accelerate" if started_by == "accelerate" else "shell")
    script.write_text(textwrap.dedent(MIDDLE % {"environment": environment, "script": CHILD}))
    middle = subprocess.Popen(
        [sys.executable, str(script), "launch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert middle.stdout is not None and middle.stdout.readline() == "ready\n"
    middle.kill()
    assert middle.stdout.readline() == f"{reason}\n"
    middle.communicate()


def test_a_thread_that_ends_stops_nothing():
    """As of a notebook, or of a pool."""
    made: list[subprocess.Popen[str]] = []
    thread = threading.Thread(target=lambda: made.append(python(THREAD, stdin=subprocess.PIPE)))
    thread.start()
    thread.join()
    assert made[0].communicate("", timeout=60)[0] == "None\n"


THREAD = """
    import threading
    from pipeline.run import stop
    looked, ticks = threading.Event(), []
    signals = stop.StopSignals(on_tick=lambda: ticks.append(1) or (len(ticks) == 3 and looked.set()))
    looked.wait(60)
    print(signals.received)
"""


def test_no_process_asks_the_kernel_for_a_signal_at_its_parents_end():
    """It comes when the *thread* ends that started the process, whoever the parent is."""
    sources = [path for top in ("pipeline", "launch") for path in (ROOT / top).rglob("*.py")]
    assert len(sources) > 50
    assert [path for path in sources if "prctl" in path.read_text()] == []


def test_main_may_run_outside_the_main_thread():
    """In a notebook's thread, say, where Python allows no handlers."""
    before = [signal.getsignal(number) for number in ALL]
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(pipeline.train.main(["nowhere.yaml"])))
    thread.start()
    thread.join()
    assert statuses == [2] and [signal.getsignal(number) for number in ALL] == before


def test_handlers_are_as_before_when_it_is_closed():
    before = [signal.getsignal(number) for number in ALL]
    signals = StopSignals("USR1")
    assert [signal.getsignal(number) for number in ALL] != before
    signals.close()
    assert [signal.getsignal(number) for number in ALL] == before


_ENDS = """
import subprocess, sys, threading
from pipeline.run import stop
heard = threading.Event()
stop.StopSignals(on_stop=lambda _: heard.set())
bomb = "import os; us = os.getppid()\\nwhile os.getppid() == us: os.kill(us, 15)"
subprocess.Popen([sys.executable, "-S", "-c", bomb])
heard.wait()
stop.ignore()
sys.exit(7)
"""


def test_signals_do_not_change_the_status_of_a_process_that_is_done():
    line = [sys.executable, "-c", _ENDS]
    assert [subprocess.run(line, check=False, timeout=60).returncode for _ in range(3)] == [7, 7, 7]
