"""How much of a player one rank has gathered at once, recorded in the ranks of a launch. Or by hand:

    accelerate launch --config_file launch/accelerate/fsdp2.yaml --num_processes 2 tests/parallel/gathered.py

A transformer pair of several equal blocks is trained without gradient penalties; after every operation of an
update the elements of all parameters that are whole on this rank are counted. With `kept` as an argument the
blocks' activations are kept, and not computed again in the backward pass.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from launch.selfcheck import parity
from launch.selfcheck.families import networks
from launch.selfcheck.parity import SGD, Case
from pipeline.console import end_process
from pipeline.parallel.blocks import blocks_of
from pipeline.parallel.engine import Engine
from pipeline.parallel.ranks import Ranks
from pipeline.run.stats import Stats
from pipeline.step import train_step

_UPDATES = 3  # DeepSpeed learns the order of the layers from the first ones


def case(checkpoint: bool) -> Case:
    """checkpoint: whether blocks are computed again in the backward pass."""
    options = f"width: 16, depth: 6, heads: 2, patch: 7, checkpoint: {checkpoint}"
    networks_of = (f"{player}.options={{{options}}}" for player in "GD")
    return Case("gathered", (*SGD, *networks("pipeline.gan.vit"), *networks_of))


def record(ranks: Ranks, keep: bool, checkpoint: bool = True) -> dict[str, dict[str, int]]:
    """Of each player the elements: "all", those "by_block" (what is in no block, and the largest block, rows
    padded to divide equally over the ranks of a copy), and the "most" that were whole at once.

    keep: whether FSDP2 keeps gathered blocks to the end of a turn.
    """
    wanted = case(checkpoint)
    with patch.object(ranks, "keep_gathered", keep):
        gan, batches = parity.start(wanted, parity.initial_state(wanted), ranks)
        engines = {"G": gan.G, "D": gan.D}
        counted = _Most(engines)
        for update in range(_UPDATES):
            with counted if update == _UPDATES - 1 else nullcontext():  # a look after every operation is slow
                train_step(gan, batches, update * wanted.batch, Stats(ranks.device))
    return {
        name: {**_sizes(engine, ranks.shards), "most": counted.most[name]} for name, engine in engines.items()
    }


class _Most(TorchDispatchMode):
    def __init__(self, engines: dict[str, Engine]) -> None:
        super().__init__()
        self._places = {  # FSDP2 puts another tensor there when it gathers one
            name: [m._parameters for m in engine.module.modules() if m._parameters]
            for name, engine in engines.items()
        }
        self.most: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for name, places in self._places.items():
            now = sum(p.untyped_storage().nbytes() // p.element_size() for p in _whole(places))
            self.most[name] = max(self.most.get(name, 0), now)
        return out


def _whole(places: list[dict[str, torch.Tensor | None]]) -> Iterator[torch.Tensor]:
    return (p for place in places for p in place.values() if p is not None and not isinstance(p, DTensor))


def _sizes(engine: Engine, shards: int) -> dict[str, int]:
    def divided(p: Any) -> int:
        """Rows are padded so that every rank has as many."""
        shape = getattr(p, "ds_shape", p.shape)
        return -(-shape[0] // shards) * shards * shape[1:].numel()

    everything = [*engine.module.parameters()]
    blocks = [[*block.parameters()] for block in blocks_of(engine.module)]
    of_blocks = {id(p) for block in blocks for p in block}
    rest = sum(divided(p) for p in everything if id(p) not in of_blocks)
    return {
        "all": sum(map(divided, everything)),
        "by_block": rest + max(sum(map(divided, block)) for block in blocks),
    }


if __name__ == "__main__":
    met = parity.join()
    found = record(met, met.keep_gathered, checkpoint="kept" not in sys.argv)
    if met.main:
        print(json.dumps(found))
    met.leave()
    end_process(0)
