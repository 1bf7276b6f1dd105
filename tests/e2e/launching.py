"""Runs as a user starts them, real processes on real images, and what they leave behind seen from outside."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.run.export import export

ROOT = Path(__file__).resolve().parents[2]
FASHION = ROOT / "tests" / "assets" / "fashion-mnist-500"
BIN = Path(sys.executable).parent
DEADLINE = 280.0  # seconds within which anything here ends, also on a busy machine; never waited for

BATCH = 12  # for 1, 2 and 3 ranks
UPDATES = 20
AFTER_20 = UPDATES * BATCH

# 450 of the 500 images are trained on: an epoch is 37.5 updates, so that its end falls inside an update.
COMMON = f"""
data: {{train: {FASHION}, size: 28, channels: 1, batch_size: {BATCH}, workers: 1}}
G: {{width: 8, norm: none, z_dim: 32}}
D: {{width: 8, norm: none}}
penalty: {{G: {{l2: 1.0e-3}}, D: {{l2: 2.0e-3}}}}
augment: {{ops: [flip, shift, scale, rotate, colour, cutout], target: 0.1, speed_kimg: 0.2}}
ema: {{kimg: 0.05}}
track: {{wandb: false}}
"""
ADAM = f"""{COMMON}
run: {{total_kimg: 0.96, tick_kimg: 0.12, checkpoint_kimg: 0.24, eval_kimg: 0.24, keep: 9}}
score: {{images: 24}}
"""
SGD = f"""{COMMON}
run: {{total_kimg: 0.24, tick_kimg: 0.012, checkpoint_kimg: 0.012, keep: 99}}
optim: {{G: {{kind: sgd, lr: 0.01, momentum: 0.5}}, D: {{kind: sgd, lr: 0.01, momentum: 0.5}}}}
score: {{metrics: []}}
"""

Row = dict[str, float]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    status: int
    output: str  # stdout and stderr as they came


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, read as its owner would."""

    path: Path

    @property
    def rows(self) -> list[Row]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @property
    def events(self) -> list[Row]:
        return [json.loads(line) for line in (self.path / "events.jsonl").read_text().splitlines()]

    @property
    def done(self) -> bool:
        return (self.path / "DONE").exists()

    @property
    def stopped_at(self) -> int:
        """cur_nimg at which it was stopped; fails if it was not."""
        return int((self.path / "STOPPED").read_text())

    def exported(self) -> dict[str, Tensors]:
        """Weights of G, D and G_ema, as exported at the end."""
        return {p.stem: load_file(p) for p in sorted((self.path / "export").glob("*.safetensors"))}

    def exported_at(self, cur_nimg: int, scratch: Path) -> dict[str, Tensors]:
        """… as `shardgan export` would have written them when that checkpoint was the newest."""
        return self.rewound(cur_nimg, scratch)._export()

    def rewound(self, cur_nimg: int, scratch: Path) -> RunFolder:
        """A copy of the run as it stood at an earlier checkpoint, under its own name in `scratch`."""
        copy = scratch / self.path.name
        copy.mkdir(parents=True)
        for file in ("config.yaml", "metrics.jsonl"):
            shutil.copy(self.path / file, copy)
        shutil.copytree(self.path / "checkpoints" / str(cur_nimg), copy / "checkpoints" / str(cur_nimg))
        return RunFolder(copy)

    def _export(self) -> dict[str, Tensors]:
        export(self.path, self.path / "export")
        return self.exported()


def accelerate(world: int, *arguments: str, file: str | None = None, precision: str = "no") -> list[str]:
    """The line a person writes out: `accelerate launch … -m pipeline.train CONFIG key=value …`."""
    yaml = ROOT / "launch" / "accelerate" / (file or ("single.yaml" if world == 1 else "ddp.yaml"))
    line = [str(BIN / "accelerate"), "launch", "--config_file", str(yaml), "--num_processes", str(world)]
    if world > 1:  # tests run beside other tests: not everyone can have the default port
        line += ["--main_process_port", str(_free_port())]
    if precision != "no":
        line += ["--mixed_precision", precision]
    return [*line, "-m", "pipeline.train", *arguments]


def hybrid(*arguments: str, precision: str = "no") -> list[str]:
    """hsdp by four processes as on two nodes: two copies, each on two ranks."""
    line = accelerate(4, *arguments, file="hsdp.yaml", precision=precision)
    at = line.index("-m")
    halves = ["--parallelism_config_dp_shard_size", "2"]
    return [sys.executable, "-m", "launch.launcher", *line[2:at], *halves, *line[at:]]


def shardgan(*arguments: str) -> list[str]:
    """The installed command."""
    return [str(BIN / "shardgan"), *arguments]


@dataclass(frozen=True)
class Worlds:
    """The same config trained by 1, 2 and 3 processes."""

    adam: dict[int, RunFolder]  # 80 updates; a tick every 10, a checkpoint and a score every 20
    sgd: dict[int, RunFolder]  # 20 updates; a tick and a checkpoint after each
    folder: Path  # where adam.yaml and sgd.yaml are

    def all(self) -> list[RunFolder]:
        return [*self.adam.values(), *self.sgd.values()]


class Started:
    """A process on its way, in a session (and process group) of its own, as one started in a terminal."""

    def __init__(self, command: Sequence[str], folder: Path, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / f"{time.monotonic_ns()}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment_of(environment), stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self, deadline: float = DEADLINE) -> Ended:
        try:
            status = self.process.wait(deadline)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"still running after {deadline:g} s:\n{self.output}") from None
        return Ended(status, self.output)

    def until(self, happened: Callable[[], bool]) -> Started:
        """Come back as soon as something can be seen to have happened."""
        deadline = time.monotonic() + DEADLINE
        while not happened():
            assert self.process.poll() is None, f"ended too early:\n{self.output}"
            assert time.monotonic() < deadline, f"not within {DEADLINE:g} s:\n{self.output}"
            time.sleep(0.002)
        return self

    def ctrl_c(self) -> Ended:
        """What the terminal does at Ctrl-C: SIGINT to the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.wait()

    def terminate(self) -> Ended:
        """What `kill` and batch systems do: SIGTERM to the process that was started."""
        self.process.terminate()
        return self.wait()


def run(command: Sequence[str], folder: Path, **environment: str) -> Ended:
    """Start a command in a folder, and wait for its end."""
    return Started(command, folder, **environment).wait()


def train(command: Sequence[str], run_folder: Path, cwd: Path | None = None) -> RunFolder:
    """A command that is to train to the end, leaving its results in `run_folder`."""
    ended = run(command, cwd or run_folder.parent)
    assert ended.status == 0, ended.output
    found = RunFolder(run_folder)
    assert found.done, ended.output
    return found


def rows_written(folder: Path, count: int) -> Callable[[], bool]:
    """Whether metrics.jsonl has (at least) so many whole lines."""
    metrics = folder / "metrics.jsonl"
    return lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= count


def fashion_images(label: int) -> list[np.ndarray]:
    """The real images of one class, uint8 [28, 28], read without any of our code."""
    images = []
    for path in sorted(FASHION.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        names = [n for n in files if n.endswith(".png") and int(files[n[:-3] + "cls"]) == label]
        images += [np.asarray(Image.open(io.BytesIO(files[name]))) for name in names]
    return images


def without_clocks(row: Row) -> Row:
    """What must be the same whenever and wherever a run is repeated."""
    return {k: v for k, v in row.items() if k != "time" and not k.startswith(("Timing/", "Resources/"))}


def largest_difference(a: dict[str, Tensors], b: dict[str, Tensors]) -> float:
    """Largest absolute difference of any weight of any network."""
    assert a.keys() == b.keys() and all(a[n].keys() == b[n].keys() for n in a)
    return max(float((a[n][k].double() - b[n][k].double()).abs().max()) for n in a for k in a[n])


def identical(a: dict[str, Tensors], b: dict[str, Tensors]) -> bool:
    """Every weight of every network the same, bit for bit."""
    return a.keys() == b.keys() and all(
        a[n].keys() == b[n].keys() and all(torch.equal(a[n][k], b[n][k]) for k in a[n]) for n in a
    )


def environment_of(extra: dict[str, str]) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "ACCELERATE_", "FSDP_"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        inherited.pop(name, None)
    ours = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    return inherited | ours | {"WANDB_MODE": "offline"} | extra


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
