"""What a training step asks of a GPU, seen without one: never to wait, and little besides the maths."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
LAUNCHES = 1.4  # times those of the bare maths, at most: data, L2, clipping, skipping, statistics

# As in on_fake_cuda.py, which can be imported only beside the stand-in.
COMPARED = ("fp32, batch norm", "fp32, no norm", "bf16, batch norm", "bf16, no norm")
CASES = (*COMPARED, "fp32, all on", "bf16, all on")
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler for the stand-in of a GPU"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has its own idea of a GPU"),
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder, installed = tmp_path_factory.mktemp("fake-cuda"), Path(torch.__file__).parent
    library, lib = folder / "fake_cuda.so", installed / "lib"
    compiler = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{installed / 'include'}", "-o", str(library)]
    libraries = [f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
    subprocess.run([*compiler, str(HERE / "fake_cuda.cpp"), *libraries], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": f"{HERE.parents[1]}:{HERE}"}
    command = [sys.executable, "-m", "on_fake_cuda", str(folder / "out.json")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_no_update_waits_for_the_device(recorded, case):
    assert recorded[case]["waits"] == []
    assert recorded["control"]["waits"] == ["aten::_to_copy", "aten::_to_copy", "aten::copy_"]


@pytest.mark.parametrize("case", COMPARED)
def test_an_update_launches_little_besides_the_maths(recorded, case, capsys):
    ours, bare = (sum(recorded[case][whose].values()) for whose in ("ours", "bare"))
    with capsys.disabled():
        print(
            f"\n{case}: {ours} operations on the device, {bare} in the bare maths ({ours / bare:.2f} times)"
        )
    assert bare > 100
    assert ours <= LAUNCHES * bare
