"""Runs the parts of the GPU suite one after another, each in a process of its own, and writes what came out.

    python tests/gpu/suite.py [OUT] [PART …]      # as tests/gpu/run.sh calls it

A part that has a result in OUT is not run again, unless it is named. No part begins after `MINUTES`, and one
that takes longer than its share of them has failed: a part that hangs does not cost the later ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import report
from machine import Skipped
from parts import PARTS
from starting import SECONDS, Failed

MINUTES = 9.0  # for all parts of one call
MOST_S = {"resume": 180.0, "speed": 180.0, "precision-bf16": 180.0, "precision-fp16": 180.0}  # for a part
_MOST_S = 120.0  # for any other
_LEAST_S = 20.0  # with less time left, no part begins
_GRACE_S = 10.0  # for a part that is asked to end
_MARK = "SHARDGAN_GPU_PART"  # in the environment of all processes of a part

Result = dict[str, Any]  # status, seconds, and why (if not passed) or figures


def main(out: Path, named: list[str]) -> int:
    """Run what is missing; returns the exit status: 1 if any part failed."""
    end = time.monotonic() + 60 * MINUTES
    (out / "parts").mkdir(parents=True, exist_ok=True)
    if unknown := [name for name in named if name not in PARTS]:
        sys.exit(f"error: there is no part {unknown[0]}; there are {', '.join(PARTS)}.")
    for name in named:
        (out / "parts" / f"{name}.json").unlink(missing_ok=True)
    for name in named or PARTS:
        file = out / "parts" / f"{name}.json"
        if file.exists():
            continue
        left = end - time.monotonic()
        if left < _LEAST_S:
            print(f"{MINUTES:g} minutes are over; the same command does what is missing.")
            break
        print(f"{name} …", flush=True)
        if (result := _run(name, out, min(left, _most(name)))) is None:
            print("  had too little time left; the same command runs it again.")
            break
        file.write_text(json.dumps(result, indent=1))
        print(f"  {result['status']} in {result['seconds']:.0f} s {result.get('why', '')}", flush=True)
    found = read(out)
    (out / "gpu.json").write_text(json.dumps(found, indent=1))
    (out / "gpu.md").write_text(report.markdown(found))
    print(f"{out}/gpu.json, {out}/gpu.md")
    return int(any(result["status"] == "failed" for result in found.values()))


def read(out: Path) -> dict[str, Result]:
    """The results that there are, in the order of the parts."""
    files = {name: out / "parts" / f"{name}.json" for name in PARTS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def _most(name: str) -> float:
    return MOST_S.get(name, _MOST_S)


def _run(name: str, out: Path, timeout: float) -> Result | None:
    """A part in a process of its own; OUT/{name}.log has all that it prints. None if it was out of time, but
    another call gives it more."""
    from launch import processes

    start, answer, log = time.monotonic(), out / f"{name}.answer.json", out / f"{name}.log"
    answer.unlink(missing_ok=True)
    variables = {"SHARDGAN_GPU_OUT": str(out), SECONDS: str(_most(name))}
    status = run(_command(name, answer), log, timeout, variables)
    if status is None and timeout < _most(name):
        return None
    said = log.read_text(errors="replace")
    why = processes.reasons(said) or [f"it ended without a word, with exit status {status}"]
    result: Result = {"status": "failed", "why": "; ".join(why)}
    if answer.exists():
        result = json.loads(answer.read_text())
        answer.unlink()
    if status is None:  # even if it has an answer: then it hangs in its end
        result |= {"status": "failed", "why": f"out of time after {timeout:.0f} s"}
    return result | {"seconds": round(time.monotonic() - start, 1)}


def _command(name: str, answer: Path) -> list[str]:
    return [sys.executable, "-u", __file__, "--part", name, str(answer)]


def run(command: list[str], log: Path, timeout: float, variables: dict[str, str]) -> int | None:
    """The exit status of a command; None if it was out of time. However it ends, nothing of it is left."""
    from launch import processes

    mark = f"{os.getpid()}-{time.time_ns()}"
    environment = processes.environment_of(1, on_cpu=False) | variables | {_MARK: mark}
    environment.pop("OMP_NUM_THREADS", None)
    # What it prints goes into a file, where it is also if the command is killed.
    with log.open("w") as file:
        pipes: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT}
        started = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        try:
            return started.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            try:
                _ask_to_end(started)
            finally:
                processes.kill(started)
                _kill_marked(mark)
                started.poll()  # so that it does not stay as a zombie


def _ask_to_end(started: subprocess.Popen[bytes]) -> None:
    """Let it end what it started, and remove its temporary files."""
    if started.poll() is None:
        started.terminate()
        with suppress(subprocess.TimeoutExpired):
            started.wait(_GRACE_S)


def _kill_marked(mark: str) -> None:
    """Kill what has the mark: also ranks whose launcher is gone, which are nobody's descendants any more."""
    for _ in range(10):  # one may just have started another
        left = [process for process in psutil.process_iter() if _has(process, mark)]
        if not left:
            return
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=1)


def _has(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(_MARK) == mark
    except (psutil.Error, OSError):  # another user's, or it has ended
        return False


def part(name: str, answer: Path) -> None:
    """In the process of a part: run it and write its result. What it raises is its failure."""
    try:
        failures, figures = PARTS[name]()
        result: Result = {"status": "failed" if failures else "passed", "figures": figures}
        if failures:
            result["why"] = "; ".join(failures)
    except Skipped as reason:
        result = {"status": "skipped", "why": str(reason)}
    except Failed as reason:
        result = {"status": "failed", "why": str(reason)}
    unfinished = answer.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result))
    unfinished.replace(answer)  # whole, or not there: this process can be killed at any time


if __name__ == "__main__":
    # Asked to end, or a part that is out of time: what was started ends too (launch/processes.py).
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if sys.argv[1:2] == ["--part"]:
        part(sys.argv[2], Path(sys.argv[3]))
    else:
        sys.exit(main(Path(sys.argv[1] if sys.argv[1:] else "gpu-results").absolute(), sys.argv[2:]))
