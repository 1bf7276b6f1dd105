"""Training where the folder, the shell and the machine are full of traps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import COMMON, RunFolder, accelerate, run, shardgan

CONFIG = f"""{COMMON}
run: {{total_kimg: 0.048, tick_kimg: 0.024, name: trained}}
score: {{metrics: []}}
"""
MINE = """
import random
from torch import nn

class Painter(nn.Module):
    def __init__(self, *, z_dim, size, channels, num_classes):
        super().__init__()
        self.linear, self.shape = nn.Linear(z_dim, channels * size * size), (channels, size, size)

    def forward(self, z, c):
        return self.linear(z).view(-1, *self.shape)

def shuffled(samples):
    random.seed(0)
    yield from samples
"""
TRAP = "raise SystemExit('a file of the user was imported')\n"


def test_two_processes_with_networks_and_stages_of_ones_own(tmp_path: Path) -> None:
    """Files that hide modules, variables and defaults of other launchers, a long name for temporary files."""
    traps = ("random.py", "queue.py", "pipeline/__init__.py", "launch/__init__.py", "torch.py", "wandb.py")
    for name in traps:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TRAP)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    (tmp_path / "nets.py").write_text(MINE)
    temporary = tmp_path / ("x" * 120)
    temporary.mkdir()
    (tmp_path / "accelerate").mkdir()
    defaults = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "num_processes": 7}
    (tmp_path / "accelerate" / "default_config.yaml").write_text(json.dumps(defaults))
    shell = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    shell |= {"PET_NNODES": "4", "OMPI_COMM_WORLD_SIZE": "4", "PMI_SIZE": "4", "ACCELERATE_USE_FSDP": "true"}
    shell |= {"OMP_NUM_THREADS": "1,2", "TMPDIR": str(temporary), "HF_HOME": str(tmp_path), "PYTHONPATH": ""}
    own = ("G.kind=nets:Painter", "data.stages=[nets:shuffled]", "penalty.l2=0")
    ended = run(shardgan("train", "mine.yaml", "--procs", "2", *own), tmp_path, **shell)
    assert ended.status == 0, ended.output
    assert "ddp on 2 x cpu" in ended.output and RunFolder(tmp_path / "runs" / "trained").done
    (note,) = [line for line in ended.output.splitlines() if line.startswith("note: another launcher")]
    assert all(name in note for name in ("WORLD_SIZE", "PET_NNODES", "ACCELERATE_USE_FSDP"))
    ended = run(shardgan("evaluate", "runs/trained"), tmp_path, **shell)
    assert ended.status == 0, ended.output


@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_no_variable_is_added_while_a_thread_may_look_one_up(tmp_path: Path, strategy: str) -> None:
    """glibc's getenv crashes if the list of variables moves meanwhile: a rank was ended by SIGSEGV as the
    ranks met."""
    line = accelerate(2, file=f"{strategy}.yaml")[:-2]
    ended = run([*line, str(Path(__file__).with_name("added_variables.py"))], tmp_path)
    assert ended.status == 0, ended.output
    for rank in range(2):
        assert f"rank {rank} added ['SHARDGAN_SEEN']" in ended.output, ended.output
