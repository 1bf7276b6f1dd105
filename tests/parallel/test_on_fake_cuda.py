"""What training steps ask of a GPU, seen without one: never to wait, and little besides the maths."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from pipeline.config import Norm

HERE = Path(__file__).parent

# Operations on the device, times those of the bare maths, which have no loss scale. FSDP2's around gathers do
# not count.
BUDGET, BUDGET_FP16 = 1.25, 1.4

# As in on_fake_cuda_cases.py, which can be imported only beside the library.
COMPARED = (
    "fp32, batch norm", "fp32, no norm", "bf16, batch norm", "bf16, no norm",
    "fsdp2, fp32, batch norm", "fsdp2, bf16, no norm", "fp16, no norm", "fp32, R1 and R2", "bf16, R1 and R2",
    "fp32, resnet", "bf16, r3gan, R1 and R2", "fp32, stylegan2", "bf16, vit",
)  # fmt: skip
OTHERS = (
    "fp32, all on", "fp16, all on", "bf16, path length", "fsdp2, bf16, all on",
    "fp32, objective", "bf16, finite difference", "fsdp2, bf16, on a quarter", "fp16, r3gan, schedules",
    "fp16, stylegan2, lengths", "bf16, vit, computed again", "fsdp2, fp16, resnet",
)  # fmt: skip
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler for the pretended GPU"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch"),
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


@pytest.mark.parametrize("case", (*COMPARED, *OTHERS))
def test_no_update_waits_for_the_device_or_mixes_devices(recorded, case):
    """A tensor on another device raises an error, and no case could be recorded."""
    assert recorded[case]["waits"] == []


@pytest.mark.parametrize("case", COMPARED)
def test_an_update_launches_little_besides_the_maths(recorded, case, capsys):
    ours, bare, gathers = (recorded[case][key] for key in ("ours", "bare", "gathers"))
    with capsys.disabled():
        print(f"\n{case}: {ours} operations, {bare} in the bare maths ({ours / bare:.3f}), {gathers} gathers")
    assert bare > 100
    assert ours <= (BUDGET_FP16 if case.startswith("fp16") else BUDGET) * bare
    assert gathers == (0 if "fsdp2" not in case else 20 if "no norm" in case else 43)


@pytest.mark.parametrize("case", (*COMPARED, *OTHERS))
def test_an_update_leaves_no_tensor_to_the_garbage_collector(recorded, case):
    assert recorded[case]["garbage"] == []


def test_a_device_thread_differentiates_in_the_order_of_a_cpu(recorded):
    """Else a parameter's gradient may be complete only after FSDP2 has reduced it (gan/second_order.py)."""
    cpu, device = recorded["order"]["cpu"], recorded["order"]["device's thread"]
    assert device["elsewhere"] and not cpu["elsewhere"]
    assert len(cpu["names"]) > 100 and device["names"] == cpu["names"]


def test_norms_keep_bf16(recorded):
    """Or all features after them would be fp32."""
    assert set(recorded["norms"]) == set(get_args(Norm))
    assert set(recorded["norms"].values()) == {"torch.bfloat16"}


def test_mistakes_are_seen(recorded):
    assert "_local_scalar_dense" in recorded["a value that is read"]["error"]
    assert "same device" in recorded["a tensor on the CPU"]["error"]
    for mistake in ("a copy that blocks", "a copy of what is not pinned"):
        waits = recorded[mistake]["waits"]
        assert len(waits) == 3  # D sees images three times in an update
        assert [re.sub(r":\d+$", "", wait) for wait in waits] == [
            "aten::_to_copy at gradient_penalty.py", "aten::_to_copy at gradient_penalty.py",
            "aten::_to_copy at step.py",
        ]  # fmt: skip
    assert len(recorded["a cycle"]["garbage"]) == 3
    more = recorded["more operations"]
    assert more["waits"] == []
    assert more["ours"] > BUDGET * recorded["fp32, no norm"]["bare"]
