"""What a save copies: every tensor once, to host memory, and nothing on the device. And what it deletes."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.gan.draws import VERSION
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.fragments import Fragment
from pipeline.parallel.ranks import Ranks
from pipeline.run import checkpoint, saving
from pipeline.run.checkpoint import find
from pipeline.run.saving import Saver
from pipeline.run.session import Session
from pipeline.run.state import State

RANKS: Any = SimpleNamespace(
    rank=0, world=1, main=True, strategy="single", barrier=lambda: None, confirm=lambda: None,
    gather_on_main=lambda value: [value], gather_objects=lambda value: [value],
    poll_any=lambda *flags: lambda: list(flags),
)  # fmt: skip


class Made(TorchDispatchMode):
    """The bytes of new tensors on each kind of device, views not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in given:
                kind = tensor.device.type
                self.bytes[kind] = self.bytes.get(kind, 0) + tensor.numel() * tensor.element_size()
        return out


def player(device: str) -> Any:
    """A replicated player as ddp.py keeps it, channels last in memory, with Adam's moments."""
    shapes = {"conv.weight": (8, 4, 3, 3), "conv.bias": (8,)}
    data = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    data = {n: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in data.items()}
    moments = [{"step": torch.ones(()), "exp_avg": torch.rand_like(t)} for t in data.values()]
    return SimpleNamespace(
        player=SimpleNamespace(name="G", constants={}),
        in_first_copy=True,
        batch=BatchShape(world=1, rounds=3, images=4),
        fragments=[Fragment(name, 0, t.shape, t, True) for name, t in data.items()],
        optimizer_state=lambda: moments,
        buffers=lambda: {"running_mean": torch.zeros(8, device=device)},
    )


def averages_of(engine: Any) -> Any:
    return SimpleNamespace(engine=engine, averages=[f.data.clone() for f in engine.fragments])


def held(engine: Any, averages: Any) -> int:
    tensors = [f.data for f in engine.fragments] + averages.averages + list(engine.buffers().values())
    tensors += [t for state in engine.optimizer_state() for t in state.values()]
    return sum(t.numel() * t.element_size() for t in tensors)


def begin(saver: Saver, engine: Any, averages: Any) -> Made:
    """Copy the player for a checkpoint; returns the bytes that this allocated."""
    with Made() as made:
        saver.begin([engine], averages, State(cur_nimg=12))
    return made


def test_a_save_makes_nothing_on_the_device_and_one_copy_in_host_memory(tmp_path):
    with FakeTensorMode():
        engine = player("cuda")
        averages, buffers = averages_of(engine), engine.buffers()
        engine.buffers = lambda: buffers
        saver = Saver(tmp_path, RANKS, keep=1)
        saver._start = lambda *_: None  # fake tensors cannot be written
        made = begin(saver, engine, averages)
        assert made.bytes == {"cpu": held(engine, averages)}


def test_a_save_of_ranks_whose_collectives_no_longer_work_begins_nothing(tmp_path):
    aborted: Any = SimpleNamespace(sum=lambda ones: ones * 3, world=2, device=torch.device("cpu"))
    ranks: Any = SimpleNamespace(**{**vars(RANKS), "confirm": lambda: Ranks.confirm(aborted)})
    saver, engine = Saver(tmp_path, ranks, keep=1), player("cpu")
    with pytest.raises(RuntimeError, match="a sum of ones over 2 ranks came out as 3"):
        begin(saver, engine, averages_of(engine))
    assert saver.finish() == [] and not any(tmp_path.iterdir())


def test_on_a_cpu_everything_is_copied_once_and_stored_in_the_order_of_the_whole_tensor(tmp_path):
    torch.manual_seed(0)
    engine = player("cpu")
    averages, buffers = averages_of(engine), engine.buffers()
    engine.buffers = lambda: buffers
    saver = Saver(tmp_path, RANKS, keep=1)
    made = begin(saver, engine, averages)
    expected = held(engine, averages)
    before = [f.data.clone() for f in engine.fragments]
    with torch.no_grad():
        for fragment in engine.fragments:
            fragment.data.zero_()  # the next update
    assert saver.finish() == []
    assert made.bytes == {"cpu": expected}
    assert checkpoint.saved_by(tmp_path / "12") == ("single", 1, 3, VERSION)
    stored = load_file(tmp_path / "12" / "G-00000.safetensors")
    assert stored["weights/conv.weight@0"].tolist() == before[0].contiguous().flatten().tolist()
    assert stored["exp_avg/conv.weight@0"].shape == (8 * 4 * 9,)
    assert stored["step/conv.weight"].shape == ()
    assert load_file(tmp_path / "12" / "buffers-00000.safetensors")["G/running_mean"].shape == (8,)


def test_a_best_checkpoint_that_could_not_be_written_is_not_the_best(tmp_path, monkeypatch):
    """Else the next save would delete the one before, as if a better one were kept."""
    engine, state = player("cpu"), State()
    session: Any = SimpleNamespace(_saver=Saver(tmp_path, RANKS, keep=1), _state=state, _report=Said())
    session._config = SimpleNamespace(run=SimpleNamespace(max_failed_saves=3))

    def save(nimg: int, score: float | None = None) -> list[str]:
        state.cur_nimg = nimg
        if score is not None:
            state.best, state.best_of = (score, nimg), "Metrics/kid"
        session._saver.begin([engine], averages_of(engine), state)
        complaints: list[str] = session._saver.finish()
        Session._heed(session, complaints)
        return complaints

    assert save(100, 0.5) == [] == save(200)
    with monkeypatch.context() as disk:
        disk.setattr(saving, "sync", fails)
        assert "No space left" in save(300, 0.4)[0]
    assert state.best == (0.5, 100)
    assert save(400) == [] and sorted(find(tmp_path)) == [100, 400]
    assert save(500, 0.45) == [] == save(600) and sorted(find(tmp_path)) == [500, 600]


class Said:
    def warn(self, *_: object) -> None:
        """Of a checkpoint that is not written."""


def fails(_: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
