"""Writes checkpoints while training continues: a save stops it only for the copy.

Each rank copies its part to host memory and writes it in a thread. The threads' progress travels with the
control flags that ranks exchange in every update, so all ranks decide the same at the same update: once all
parts are written, the main rank adds the manifest and renames the folder; then the checkpoint exists. A save
that fails leaves earlier checkpoints as they are.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from pipeline.durable import save_tensors, sync
from pipeline.gan.draws import VERSION
from pipeline.parallel.ema import Ema
from pipeline.parallel.engine import Engine
from pipeline.parallel.ranks import Ranks
from pipeline.run.checkpoint import FORMAT, describe, exchange, find, replaced
from pipeline.run.markers import SAVED, mark, marked
from pipeline.run.state import State

Tensors = dict[str, torch.Tensor]
Lines = dict[str, Any]  # of the manifest: file name → bytes and SHA-256
Phase = Literal["idle", "writing", "finishing"]
Best = tuple[tuple[float, int] | None, str | None]


class Saver:
    """Writes one rank's part of `folder`/<cur_nimg>. All ranks make the same calls."""

    def __init__(
        self, folder: Path, ranks: Ranks, keep: int, still_ours: Callable[[], None] = lambda: None
    ) -> None:
        """keep: how many of the newest checkpoints to keep besides the best one (State.best).
        still_ours: see Report."""
        self._folder, self._ranks, self._keep, self._still_ours = folder, ranks, keep, still_ours
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._job: Future[Any] | None = None
        self._phase: Phase = "idle"
        self._state, self._rounds, self._draws = State(), 1, VERSION
        self.steps = 0  # grows with every change of phase, on all ranks alike
        self.failures = 0  # in a row
        self.best: Best = None, None  # of the newest checkpoint on disk: its state's best and best_of
        if ranks.main:
            for left in (*folder.glob(".partial-*"), *folder.glob(".removed-*")):  # by a job that was killed
                shutil.rmtree(left, ignore_errors=True)
        ranks.barrier()

    def begin(self, players: Sequence[Engine], G_ema: Ema, state: State, draws: int = VERSION) -> None:
        """Copy everything and start writing it. The previous save must be finished. draws: their version."""
        assert self._phase == "idle"
        self._ranks.confirm()
        self._rounds, self._draws = players[0].batch.rounds, draws
        # Copies, as training adds to these lists.
        self._state = dataclasses.replace(state, bad=[*state.bad], in_a_row={**state.in_a_row})
        contents: dict[str, Tensors] = {}
        for engine in players:
            if engine.in_first_copy:
                averages = G_ema.averages if engine is G_ema.engine else None
                pieces = _pieces(engine, averages)
                copies = {key: _copy(t).reshape(-1) if "@" in key else _copy(t) for key, t in pieces.items()}
                contents[f"{engine.player.name}-{self._ranks.rank:05d}"] = copies
        buffers = {f"{e.player.name}/{name}": _copy(b) for e in players for name, b in e.buffers().items()}
        contents[f"buffers-{self._ranks.rank:05d}"] = buffers
        self._enter("writing")
        self._start(lambda: _write(self._partial, contents, self._still_ours))

    @property
    def cur_nimg(self) -> int:
        """Of the checkpoint that is being written, or was last."""
        return self._state.cur_nimg

    @property
    def flags(self) -> tuple[bool, bool]:
        """This rank's (busy, failed), to be combined over all ranks."""
        job = self._job
        return job is not None and not job.done(), job is not None and job.done() and bool(job.exception())

    def advance(self, busy: bool, failed: bool) -> str | None:
        """Start the next phase unless any rank is busy; returns a complaint if any has failed.

        The flags must be those of this phase: asked when `steps` was what it is now.
        """
        if self._phase == "idle" or busy:
            return None
        job, self._job = self._job, None
        error = job.exception() if job else None
        if failed:
            self._enter("idle")
            return self._give_up(error)
        if self._phase == "finishing":
            self._enter("idle")
            self.failures, self.best = 0, (self._state.best, self._state.best_of)
            return None
        lines = self._ranks.gather_on_main(job.result() if job else {})
        self._enter("finishing")
        if self._ranks.main:
            self._start(lambda: self._finish({k: v for part in lines for k, v in part.items()}))
        return None

    def finish(self) -> list[str]:
        """Wait until the current save is written or has failed; returns the complaints."""
        complaints = []
        while self._phase != "idle":
            if self._job is not None:
                wait([self._job])
            complaint = self.advance(*self._ranks.poll_any(*self.flags)())
            complaints += [complaint] if complaint else []
        return complaints

    # Pieces of the above

    @property
    def _partial(self) -> Path:
        return self._folder / f".partial-{self.cur_nimg}"

    def _enter(self, phase: Phase) -> None:
        self._phase, self.steps = phase, self.steps + 1

    def _start(self, work: Callable[[], Any]) -> None:
        self._job = self._thread.submit(work)

    def _finish(self, files: Lines) -> None:
        """Add state and manifest, rename the folder, and delete checkpoints that are not kept. The run
        folder records that it has saved."""
        partial, final = self._partial, self._folder / str(self._state.cur_nimg)
        self._still_ours()
        (partial / "state.json").write_text(json.dumps(dataclasses.asdict(self._state), indent=1))
        manifest = {
            "format": FORMAT,
            "cur_nimg": self._state.cur_nimg,
            "world": self._ranks.world,
            "strategy": self._ranks.strategy,
            "rounds": self._rounds,
            "draws": self._draws,
            "torch": torch.__version__,
            "files": files | {"state.json": _seal(partial / "state.json")},
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        sync(partial / "manifest.json")
        sync(partial)
        self._still_ours()
        exchange(partial, final)
        sync(self._folder)
        if not marked(self._folder.parent, SAVED):
            with suppress(OSError):  # the next save does it
                mark(self._folder.parent, SAVED, self._state.cur_nimg)
        shutil.rmtree(replaced(final), ignore_errors=True)
        best = self._state.best[1] if self._state.best else None
        upto = [nimg for nimg in find(self._folder) if nimg <= self._state.cur_nimg]
        for old in upto[self._keep :]:
            if old != best:
                _remove(self._folder / str(old))

    def _give_up(self, error: BaseException | None) -> str:
        """Delete the partial checkpoint; returns what failed on which ranks, the same text on all."""
        self.failures += 1
        if error is not None and not isinstance(error, OSError | SafetensorError | NotFiniteError):
            raise error
        reasons = self._ranks.gather_objects(str(error) if error else None)
        if self._ranks.main:
            self._still_ours()
            shutil.rmtree(self._partial, ignore_errors=True)
        world = self._ranks.world
        named = [f"rank {rank}: {text}" if world > 1 else text for rank, text in enumerate(reasons) if text]
        checkpoint = self._folder / str(self._state.cur_nimg)
        return f"Checkpoint {checkpoint} could not be written: {'; '.join(named)}."


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint by one rename first: nobody who reads it finds some of its files and not others."""
    removed = checkpoint.with_name(f".removed-{checkpoint.name}")
    with suppress(OSError):
        checkpoint.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


class NotFiniteError(Exception):
    """The state to be saved holds NaN or infinity: nothing to resume from."""


def _pieces(engine: Engine, averages: list[torch.Tensor] | None) -> Tensors:
    """One rank's part of a player: named tensors in any memory layout, not copied."""
    tensors: Tensors = {f"constant/{name}@0": t for name, t in engine.player.constants.items()}
    states = engine.optimizer_state()
    for place, (fragment, state) in enumerate(zip(engine.fragments, states, strict=True)):
        where = f"{fragment.name}@{fragment.start}"
        tensors[f"weights/{where}"] = fragment.data
        if averages is not None:
            tensors[f"ema/{where}"] = averages[place]
        for kind, value in state.items():
            # Adam's step is one number for the whole parameter.
            tensors[f"{kind}/{fragment.name if value.ndim == 0 else where}"] = value
    return tensors


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in host memory, which later updates do not change. Of kernels that are channels last,
    a GPU has one rearranged copy at a time."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _write(folder: Path, contents: dict[str, Tensors], still_ours: Callable[[], None]) -> Lines:
    """Write and fsync this rank's files; returns their lines of the manifest."""
    still_ours()
    folder.mkdir(parents=True, exist_ok=True)
    lines: Lines = {}
    for name, tensors in contents.items():
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise NotFiniteError(f"{key.partition('@')[0]} in {name} is not finite")
        path = folder / f"{name}.safetensors"
        still_ours()
        save_tensors(tensors, path)
        lines[path.name] = _seal(path)
    return lines


def _seal(path: Path) -> Lines:
    """fsync a file; returns its line of the manifest."""
    sync(path)
    return describe(path)
