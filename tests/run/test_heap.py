"""Freed memory is kept and reused: no page fault when the next step asks for it again. After a training in a
notebook's process it is the system's again."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, sys, torch
from pipeline.borrowed import borrowed
from pipeline.heap import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(10 * 2**20)  # 40 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults())
keep_freed_memory()
for _ in range(8):  # until the heap has come to a size that fits
    faults()
print(faults())
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 2**20
base = resident()
with borrowed():
    keep_freed_memory()
    large, small = torch.ones(50 * 2**20), torch.ones(1)  # 200 MB, and something behind it
    del large
    print(resident() - base)
print(resident() - base)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_reused_without_page_faults():
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    before, after, during, afterwards = map(int, run.stdout.split())
    assert before > 1000 and after < 100, run.stdout
    assert during > 100 and afterwards < 20, run.stdout
