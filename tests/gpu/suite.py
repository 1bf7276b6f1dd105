"""Runs the parts of the GPU suite one after another, each in a process of its own, and writes what came out.

    python tests/gpu/suite.py [OUT] [PART …]      # as tests/gpu/run.sh calls it

A part that has a result in OUT is not run again, unless it is named. No part begins after `MINUTES`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import report
from machine import Skipped
from parts import PARTS

MINUTES = 9.0  # for all parts of one call
_LEAST_S = 20.0  # with less time left, no part begins

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
        if (result := _run(name, out, left)) is None:
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


def _run(name: str, out: Path, timeout: float) -> Result | None:
    """A part in a process of its own, whose whole session ends with it. None if it could have done it in the
    time of a whole call."""
    from launch import processes

    start, answer = time.monotonic(), out / f"{name}.answer.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-u", __file__, "--part", name, str(answer)]
    environment = processes.environment_of(1, on_cpu=False) | {"SHARDGAN_GPU_OUT": str(out)}
    environment.pop("OMP_NUM_THREADS", None)
    try:
        ended = processes.run(command, environment, timeout)
    except subprocess.TimeoutExpired:
        if timeout < 60 * MINUTES - _LEAST_S:
            return None
        return {"status": "failed", "seconds": timeout, "why": "not done in the time that was left"}
    (out / f"{name}.log").write_text(ended.stdout + ended.stderr)
    result: Result = {"status": "failed", "why": _last_line(ended.stderr or ended.stdout)}
    if answer.exists():
        result = json.loads(answer.read_text())
        answer.unlink()
    return result | {"seconds": round(time.monotonic() - start, 1)}


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it ended without a word"


def part(name: str, answer: Path) -> None:
    """In the process of a part: run it and write its result. What it raises is its failure."""
    try:
        failures, figures = PARTS[name]()
        result: Result = {"status": "failed" if failures else "passed", "figures": figures}
        if failures:
            result["why"] = "; ".join(failures)
    except Skipped as reason:
        result = {"status": "skipped", "why": str(reason)}
    answer.write_text(json.dumps(result))


if __name__ == "__main__":
    # Asked to end, or a part that is out of time: what was started ends too (launch/processes.py).
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if sys.argv[1:2] == ["--part"]:
        part(sys.argv[2], Path(sys.argv[3]))
    else:
        sys.exit(main(Path(sys.argv[1] if sys.argv[1:] else "gpu-results").absolute(), sys.argv[2:]))
