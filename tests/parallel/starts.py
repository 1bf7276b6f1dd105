"""A run that starts from another one's weights and moments with part of D frozen, in the ranks of a launch;
and the same run resumed when the other one is gone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from launch.selfcheck import parity
from launch.selfcheck.parity import Case
from pipeline.config import dump
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.engine import Engine
from pipeline.parallel.ranks import Ranks
from pipeline.players import Gan, build
from pipeline.run.export import load_network, load_run
from pipeline.run.resume import find_start, resume
from pipeline.run.saving import Saver
from pipeline.run.state import State
from pipeline.run.stats import Stats
from pipeline.step import train_step

_ADAM = tuple(f"optim.{player}.{key}" for player in "GD" for key in ("kind=adam", "lr=1e-3"))
SOURCE = Case("source", (*_ADAM, "penalty.l2=1e-3"))
_STARTED = ("run.init_optimizer=true", "run.seed=1", "D.freeze=1")
Tensors = dict[str, torch.Tensor]


def record(ranks: Ranks, out: Path) -> dict[str, list[str] | float]:
    """What differs between the source and a run that starts from it: names of weights, averages and moments;
    the largest difference of D's logits, at its start, and after it is resumed without the source."""
    source, started = out / "source", out / "started"
    gan, batches = parity.start(SOURCE, State(), ranks)
    cur_nimg = 0
    for _ in range(2):
        cur_nimg = train_step(gan, batches, cur_nimg, Stats(ranks.device))
    _save(gan, cur_nimg, source, ranks)
    if ranks.main:
        (source / "config.yaml").write_text(dump(SOURCE.config(ranks.world)))
    ranks.barrier()
    theirs = parity.whole(gan) | _moments(gan)
    config, found, state = load_run(source)
    D = load_network("D", config, found, state)
    ranks.barrier()  # the source is about to be moved

    case = replace(SOURCE, settings=(*SOURCE.settings, *_STARTED, f"run.init={source}"))
    ours, _ = _begin(case, started, ranks)
    mine = parity.whole(ours) | _moments(ours)
    x = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    at_start = _apart(ours, D, x.to(ranks.device))
    unlike = sorted(name for name in mine if not torch.equal(mine[name], theirs[name]))
    frozen = sorted(theirs.keys() - mine.keys())

    cur_nimg = train_step(ours, parity.start(case, State(), ranks)[1], 0, Stats(ranks.device))
    _save(ours, cur_nimg, started, ranks)
    if ranks.main:
        (started / "config.yaml").write_text(dump(case.config(ranks.world)))
        shutil.rmtree(source)
    ranks.barrier()
    config, found, state = load_run(started)
    D = load_network("D", config, found, state)
    again, place = _begin(case, started, ranks)
    assert place == cur_nimg
    return {
        "unlike": unlike,
        "frozen": frozen,
        "at the start": at_start,
        "resumed": _apart(again, D, x.to(ranks.device)),
    }


def _begin(case: Case, folder: Path, ranks: Ranks) -> tuple[Gan, int]:
    """As train.py does."""
    config = case.config(ranks.world)
    start = find_start(config, folder, State(), ranks)
    gan = build(config, ranks, batch_shape(config.data, ranks.world), None, start.fill)
    state, _ = resume(start, folder, gan, State())
    return gan, state.cur_nimg


def _save(gan: Gan, cur_nimg: int, folder: Path, ranks: Ranks) -> None:
    saver = Saver(folder / "checkpoints", ranks, keep=1)
    saver.begin([gan.G, gan.D], gan.G_ema, State(cur_nimg, stats=[{}]))
    assert saver.finish() == []


def _moments(gan: Gan) -> Tensors:
    return {name: tensor for engine in (gan.G, gan.D) for name, tensor in _of_player(engine).items()}


def _of_player(engine: Engine) -> Tensors:
    found: Tensors = {}
    states = engine.moments()
    for kind in ("exp_avg", "exp_avg_sq"):
        pieces = [state[kind].view(f.data.shape) for f, state in zip(engine.fragments, states, strict=True)]
        found |= {f"{kind}/{engine.player.name}/{n}": t.cpu().clone() for n, t in engine.whole(pieces)}
    return found | {f"step/{engine.player.name}": state["step"].cpu().float() for state in states[:1]}


def _apart(gan: Gan, D: torch.nn.Module, x: torch.Tensor) -> float:
    """Between the logits of the engine's D and those of a whole one."""
    with gan.G.updating(frozen=gan.D), gan.D.unobserved():
        logits = gan.D(x)
    return float((logits - D(x.cpu()).to(logits.device)).abs().max())
