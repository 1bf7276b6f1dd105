"""Whatever becomes of the console, a process says what it has to say, or does not, and goes on."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from pipeline import console

ROOT = Path(__file__).parents[2]
TALK = """
    import logging, multiprocessing, os, sys, traceback, warnings
    handler = logging.StreamHandler()  # as libraries make them when they are imported
    logging.getLogger("library").addHandler(handler)
    from pipeline import console
    console.take()
    console._LAST_LINES_S = 0.1
    def talk():
        for n in range(3000):
            print(f"λ = {n} " + "x" * 60)
            print(f"λ = {n} " + "x" * 60, file=sys.stderr, flush=True)
        logging.getLogger("library").warning("λ")
        warnings.warn("λ")
        traceback.print_exception(ValueError("λ"))
    talk()
    child = multiprocessing.get_context("fork").Process(target=talk)
    child.start()
    child.join()
    os.write(3, b"done" if child.exitcode == 0 else b"failed")
"""


def talk(script: str = TALK, **files: object) -> tuple[bytes, int, subprocess.Popen[bytes]]:
    """What a process that talks for a while tells on a pipe of its own, and its exit status."""
    told, tell = os.pipe()
    line = f"import os; os.dup2({tell}, 3)\n{textwrap.dedent(script)}"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", line], pass_fds=[tell], env=environment, **files)  # type: ignore[call-overload]
    os.close(tell)
    with os.fdopen(told, "rb") as pipe:
        said = pipe.read()
    return said, process.wait(), process


def test_a_full_disk_does_not_matter():
    with Path("/dev/full").open("wb") as full:
        assert talk(stdout=full, stderr=full)[:2] == (b"done", 0)


def test_a_process_that_may_start_no_thread_says_what_it_has_to_say(tmp_path):
    script = """
        import threading
        def refuse(thread):
            raise RuntimeError("can't start new thread")
        threading.Thread.start = refuse
        from pipeline import console
        console.take()
        print("said")
        console.show_error("wrong")
        console.end_process(3)
    """
    with (tmp_path / "said").open("wb") as file:
        assert talk(script, stdout=file, stderr=file)[1] == 3
    assert (tmp_path / "said").read_text() == "said\nerror: wrong\n"


@pytest.mark.parametrize("blocking", [True, False])
def test_a_pipe_that_nobody_reads_does_not_matter(blocking):
    read, write = os.pipe()
    os.set_blocking(write, blocking)
    try:
        assert talk(stdout=write, stderr=write)[:2] == (b"done", 0)
    finally:
        os.close(read)
        os.close(write)


def test_a_reader_that_leaves_does_not_matter_and_nothing_complains_at_the_end():
    read, write = os.pipe()
    os.close(read)
    try:
        said, status, process = talk(stdout=write, stderr=subprocess.PIPE)
    finally:
        os.close(write)
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    assert (said, status) == (b"done", 0) and "Exception ignored" not in errors and "Broken" not in errors


@pytest.mark.parametrize("closed", [[1], [2], [0, 1, 2]])
def test_closed_streams_are_not_the_next_file_that_is_opened(closed, tmp_path):
    script = f"""
        import os, subprocess, sys
        for fd in {closed}:
            os.close(fd)
        script = '''
        import os, sys
        from pipeline import console
        console.take()
        with open("metrics", "w") as file:
            print("said")
            print("said", file=sys.stderr)
            os.write(1, b"said by a library")
            os.write(2, b"said by a library")
            file.write("a row")
        '''
        import textwrap
        status = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], close_fds=False).returncode
        os.write(3, f"{{status}} {{open('metrics').read()}}".encode())
    """
    assert talk(script, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)[0] == b"0 a row"


def test_a_slow_reader_gets_everything_in_order_with_what_its_encoding_lacks_replaced():
    script = """
        import sys
        from pipeline import console
        console.take()
        for n in range(2000):
            print(f"λ = {n}" + " " * 60, file=(sys.stdout, sys.stderr)[n % 2])
        sys.stdout.write("no newline")
    """
    read, write = os.pipe()
    got: list[bytes] = []

    def listen() -> None:
        with os.fdopen(read, "rb") as pipe:
            got.append(pipe.read())

    listener = threading.Thread(target=listen)
    listener.start()
    assert talk(script, stdout=write, stderr=write)[1] == 0
    os.close(write)
    listener.join()
    lines = [line.strip() for line in got[0].decode("ascii").splitlines()]
    assert lines == [*(f"? = {n}" for n in range(2000)), "no newline"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_command_ends_quietly_when_its_reader_has_left(stream):
    read, write = os.pipe()
    os.close(read)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: write}
    arguments = ["--help"] if stream == "stdout" else ["train", "nowhere.yaml", "--procs", "x"]
    ended = subprocess.run([sys.executable, "-m", "launch.cli", *arguments], check=False, cwd=ROOT, **streams)  # type: ignore[call-overload]
    os.close(write)
    assert ended.returncode == (0 if stream == "stdout" else 2)
    assert not (ended.stdout or b"") + (ended.stderr or b"")


def test_streams_of_others_stay(capsys):
    from pipeline import console

    before = sys.stdout
    console.take()
    assert sys.stdout is before


@pytest.mark.parametrize(
    ("at_terminal", "variables", "red"),
    [
        (True, {"TERM": "xterm"}, True),
        (True, {"TERM": "dumb"}, False),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (False, {"TERM": "xterm"}, False),
    ],
)
def test_an_error_is_red_where_a_terminal_has_colours(monkeypatch, at_terminal, variables, red):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    stream.isatty = lambda: at_terminal
    monkeypatch.setattr(sys, "stderr", stream)
    console.show_error("no such file")
    assert stream.getvalue() == ("\x1b[31merror:\x1b[0m" if red else "error:") + " no such file\n"


def test_an_error_does_not_steer_the_terminal(capsys):
    console.show_error("of a\x1b]0;b\x07\x9b2J\r\x7f.tar\n  λ, \xa0 and \U0001f642 stay")
    assert capsys.readouterr().err == (
        "error: of a\\x1b]0;b\\x07\\x9b2J\\x0d\\x7f.tar\n  λ, \xa0 and \U0001f642 stay\n"
    )
