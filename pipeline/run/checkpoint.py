"""Checkpoints: one portable format, written from fragments (saving.py), whole or not at all.

    checkpoints/<cur_nimg>/
        G-00000.safetensors …  per writing rank: this rank's fragments of G, its optimizer and G_ema
        D-00000.safetensors …  likewise
        buffers-00000.safetensors …  per rank: BatchNorm statistics and the like
        state.json             the rest (State)
        manifest.json          bytes and SHA-256 of every file; written last

A tensor is stored as flat pieces named `kind/parameter@first element`. Any strategy and world can read what
any other wrote: each rank picks the elements it owns. Parameters that D.freeze keeps as they are are stored
too (kind `constant`), as the run may have them from other weights (run.init).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn

from pipeline.config import UserError
from pipeline.parallel.batch_norm import pooled
from pipeline.parallel.ema import Ema
from pipeline.parallel.engine import Engine
from pipeline.parallel.ranks import Ranks
from pipeline.run.state import State
from pipeline.wording import in_kimg

FORMAT = 2
_LACKING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # of a file that should be there
Wanted = str | float
"""Which checkpoint: see `chosen`."""


def find(folder: Path) -> list[int]:
    """cur_nimg of every checkpoint in a run's checkpoint folder, newest first."""
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def replaced(checkpoint: Path) -> Path:
    """Where an older checkpoint of the same cur_nimg is kept while it is being replaced."""
    return checkpoint.with_name(f".replaced-{checkpoint.name}")


def exchange(new: Path, checkpoint: Path) -> None:
    """Make a checkpoint exist by one rename. One that exists (a run that is stopped in its reports saves
    twice at one place) is moved to `replaced`, for the caller to remove."""
    before = replaced(checkpoint)
    if checkpoint.exists():
        checkpoint.rename(before)
    try:
        new.rename(checkpoint)
    except OSError:
        if before.exists():
            before.rename(checkpoint)
        raise


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all intact, and a complaint about each newer one.

    Raises UserError if one cannot be read, which does not mean that it is damaged: a network disk may fail to
    answer for a while.
    """
    while True:
        complaints, kept = list[str](), find(folder)
        for checkpoint in (folder / str(nimg) for nimg in kept):
            problem = _problem(checkpoint)
            if problem is None:
                return checkpoint, complaints
            if os.path.lexists(checkpoint):  # else training has just removed it
                complaints.append(f"checkpoint {checkpoint} is damaged ({problem})")
        if find(folder) == kept:
            return None, complaints


def chosen(folder: Path, wanted: Wanted = "newest") -> Path:
    """The checkpoint that a person asks for: "newest" intact, "best" by the run's score, or a kimg.

    wanted: a number or its text; the whole kimg of one that is kept suffices (150 for cur_nimg 150,016).
    Warns of each newer one that is damaged where the newest is wanted, as an older one is used then. Raises
    UserError if it is not kept, or not intact; the message names those that are there. Training may remove it
    at any time.
    """
    newest, complaints = newest_intact(folder)
    if newest is None:
        raise UserError("\n".join([f"{folder.parent} holds no intact checkpoint yet.", *complaints]))
    if wanted == "newest":
        for complaint in complaints:
            older = f"the older one of kimg {in_kimg(int(newest.name) / 1000)} is used instead"
            print(f"warning: {complaint}; {older}.", file=sys.stderr, flush=True)
        return newest
    kept = find(folder)
    there = f"{folder.parent} keeps kimg {', '.join(in_kimg(nimg / 1000) for nimg in reversed(kept))}"
    if wanted == "best":
        best = read_state(newest).best
        if best is None or not math.isfinite(best[0]):
            raise UserError(
                "checkpoint best: this run has no score (run.eval_kimg, data.holdout, score.metrics). "
                f"{there}."
            )
        matching = [best[1]] if best[1] in kept else []
    else:
        matching = _of_kimg(kept, wanted)
    if len(matching) != 1:
        raise UserError(f"checkpoint {wanted}: {'several fit' if matching else 'none is kept'}. {there}.")
    found = folder / str(matching[0])
    if (problem := _problem(found)) and os.path.lexists(found):
        raise UserError(f"checkpoint {wanted}: {found} is damaged ({problem}). {there}.")
    return found


def _of_kimg(kept: list[int], wanted: str | float) -> list[int]:
    """Those of cur_nimg `kept` that a kimg names: the exact one, else those of this whole kimg."""
    try:
        kimg = float(wanted)
    except ValueError:
        raise UserError(f"checkpoint {wanted}: not `best`, nor a kimg such as 150.") from None
    exact = [nimg for nimg in kept if math.isclose(nimg, 1000 * kimg, abs_tol=1e-6)]
    return exact or [nimg for nimg in kept if nimg // 1000 == kimg]


def recover(folder: Path) -> tuple[Path | None, list[str]]:
    """`newest_intact`, for the one process that may write, of a run that resumes.

    Undoes an `exchange` that a kill interrupted, and renames newer, damaged checkpoints, which are then not
    found again. Raises UserError if that fails.
    """
    try:
        for before in folder.glob(".replaced-*"):
            current = folder / before.name.removeprefix(".replaced-")
            shutil.rmtree(before) if current.exists() else before.rename(current)
        found, complaints = newest_intact(folder)
        for nimg in find(folder):
            if found is not None and nimg > int(found.name):
                aside = folder / f".damaged-{nimg}"
                shutil.rmtree(aside, ignore_errors=True)
                (folder / str(nimg)).rename(aside)
    except OSError as error:
        raise UserError(f"{folder} cannot be read or written: {error}") from None
    return found, complaints


class SavedBy(NamedTuple):
    """What wrote a checkpoint."""

    strategy: str
    world: int
    rounds: int | None  # per update; None: not recorded, by a version that had no sync_batch
    draws: int = 1  # their version (gan/draws.py)


def saved_by(checkpoint: Path) -> SavedBy:
    """What wrote an intact checkpoint."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    return SavedBy(manifest["strategy"], manifest["world"], manifest.get("rounds"), manifest.get("draws", 1))


def read_state(checkpoint: Path) -> State:
    """The part of a checkpoint that is not tensors."""
    values = json.loads((checkpoint / "state.json").read_text())
    values["stats"] = [{k: tuple(map(float, v)) for k, v in sums.items()} for sums in values["stats"]]
    values["best"] = values.get("best") and (values["best"][0], int(values["best"][1]))
    return State(**values)


def load(checkpoint: Path, players: list[Engine], G_ema: Ema, ranks: Ranks) -> None:
    """Fill both players, their optimizers and G_ema from a checkpoint of any strategy and world.

    Raises UserError, before anything is overwritten, if it is of other networks.
    """
    parts = [(e, Pieces(checkpoint, e.player.name), _read_buffers(checkpoint, e, ranks)) for e in players]
    for engine, read, _ in parts:
        read.check(engine)
    with torch.no_grad():
        for engine, read, buffers in parts:
            for fragment in engine.fragments:
                piece = read("weights", fragment.name, fragment.start, fragment.data.numel())
                fragment.data.copy_(piece.view(fragment.data.shape))
            load_moments(engine, read)
            engine.masters_changed()
            live = engine.buffers()
            for name in buffers.keys() & live.keys():
                live[name].copy_(buffers[name])
            if engine is G_ema.engine:
                for fragment, average in zip(engine.fragments, G_ema.averages, strict=True):
                    piece = read("ema", fragment.name, fragment.start, average.numel())
                    average.copy_(piece.view(average.shape))


def load_moments(engine: Engine, read: Pieces) -> None:
    """Fill a player's optimizer."""
    engine.load_optimizer_state([read.optimizer(f.name, f.start, f.data.numel()) for f in engine.fragments])


class Pieces:
    """Reads one player's flat pieces from all files of a checkpoint."""

    def __init__(self, checkpoint: Path, player: str) -> None:
        self.checkpoint, self.player = checkpoint, player
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}
        self._scalars: dict[tuple[str, str], Any] = {}
        for path in _written(checkpoint, player):
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118
                kind, _, rest = key.partition("/")
                name, at, start = rest.rpartition("@")
                view = file.get_slice(key)
                if at:
                    count = view.get_shape()[0]
                    self._pieces.setdefault((kind, name), []).append((int(start), count, view))
                else:
                    self._scalars[kind, rest] = file.get_tensor(key)
        self.kinds = {kind for kind, _ in [*self._pieces, *self._scalars]}

    def names(self, kind: str = "weights") -> set[str]:
        return {name for k, name in self._pieces if k == kind}

    def __call__(self, kind: str, name: str, start: int, count: int) -> torch.Tensor:
        """Elements start … start + count of a flattened whole tensor → fp32 [count]."""
        flat = torch.empty(count)
        for first, size, view in self._pieces[kind, name]:
            low, high = max(start, first), min(start + count, first + size)
            if low < high:
                flat[low - start : high - start] = view[low - first : high - first]
        return flat

    def fill(self, kind: str, network: nn.Module) -> None:
        """Copy all that is stored of a kind into a whole network. Raises UserError if it is another one's."""
        named = dict(network.named_parameters())
        for name in self.names(kind):
            count = sum(size for _, size, _ in self._pieces[kind, name])
            if name not in named or named[name].numel() != count:
                raise UserError(
                    f"{self.checkpoint} holds another {self.player} than its config describes (at {name})."
                )
            with torch.no_grad():
                named[name].copy_(self(kind, name, 0, count).view_as(named[name]))

    def optimizer(self, name: str, start: int, count: int) -> dict[str, torch.Tensor]:
        """A fragment's optimizer state: everything stored for it except weights and average."""
        kinds = self.kinds - {"weights", "ema", "constant"}
        state = {k: self(k, name, start, count) for k in sorted(kinds) if (k, name) in self._pieces}
        return state | {k: self._scalars[k, name] for k in sorted(kinds) if (k, name) in self._scalars}

    def check(self, engine: Engine) -> None:
        """Raises UserError if the pieces are of another network."""
        expected = {f.name: f.shape.numel() for f in engine.fragments}
        stored = {name: sum(n for _, n, _ in self._pieces["weights", name]) for name in self.names()}
        wrong = {name for name in expected | stored if expected.get(name) != stored.get(name)}
        if wrong:
            raise UserError(
                f"The checkpoint holds another {engine.player.name} than the config describes "
                f"(at {', '.join(sorted(wrong)[:3])}). Resume with its own config, and a class "
                "of yours as it was, or start over with run.resume=false."
            )


def read_buffers(checkpoint: Path, player: str) -> list[dict[str, torch.Tensor]]:
    """A player's buffers as each rank saved them, by rank."""
    return [_buffers_in(path, player) for path in _written(checkpoint, "buffers")]


def _written(checkpoint: Path, what: str) -> list[Path]:
    """The files of this kind that its manifest lists, by rank: others may have been copied beside them."""
    names = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return [checkpoint / name for name in sorted(names) if re.fullmatch(rf"{what}-\d+\.safetensors", name)]


def _buffers_in(path: Path, player: str) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith(f"{player}/")]  # noqa: SIM118
        return {key.removeprefix(f"{player}/"): file.get_tensor(key) for key in keys}


def _read_buffers(checkpoint: Path, engine: Engine, ranks: Ranks) -> dict[str, torch.Tensor]:
    """This rank's own buffers; if another world saved them, all ranks' pooled."""
    paths, player = _written(checkpoint, "buffers"), engine.player.name
    if len(paths) == ranks.world:
        return _buffers_in(paths[ranks.rank], player)
    return pooled(engine.module, read_buffers(checkpoint, player))


def describe(path: Path) -> dict[str, Any]:
    """A file's line of the manifest."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint on disk, or None."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, not {FORMAT}"
        if not manifest["files"]:
            return "its manifest lists no files"
        for name, line in manifest["files"].items():
            if not re.fullmatch(r"[\w.-]+", name):
                return f"file name {name!r}"
            if describe(checkpoint / name) != line:
                return f"{name} is not what was written"
    except (*_LACKING, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    except OSError as error:
        raise UserError(
            f"checkpoint {checkpoint} cannot be read: {error.strerror or error}. Try again when it can; or "
            "move it out of its folder to use the one before it."
        ) from None
    return None
