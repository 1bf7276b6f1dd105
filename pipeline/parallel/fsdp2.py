"""Players sharded by FSDP2 (`fully_shard`): 1/world of parameters, gradients, moments, average on a rank.

Or, by hybrid sharding, 1/shards of them, with a copy of each on every so-many-th rank: gathers stay between
neighbours, and only gradients, of 1/shards of the player, are averaged over copies.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from pipeline.config import UserError
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.blocks import blocks_of
from pipeline.parallel.copying import lay_out
from pipeline.parallel.engine import PlayerSettings
from pipeline.parallel.fragments import Fragment
from pipeline.parallel.masters import MasterEngine
from pipeline.parallel.order import Order
from pipeline.parallel.ranks import Ranks

# The step does nothing in place to what a network returns.
warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")


class Fsdp2Engine(MasterEngine):
    """Each rank owns rows (first axis) of every parameter; blocks are gathered for their passes only.

    D makes three forward and three backward passes per update, and gathering it for each sends its size six
    times. With fsdp_reshard_after_forward: false in the launcher's file, gathered blocks stay gathered to the
    end of the turn, until which no weight changes: twice.

    The optimizer works on the local rows as plain tensors: it needs no DTensor, and a parameter with fewer
    rows than ranks, of which some ranks have none, needs no special case.
    """

    @property
    def copies(self) -> int:
        return self.ranks.world // self.ranks.shards

    def __init__(self, module: nn.Module, player: PlayerSettings, ranks: Ranks, batch: BatchShape) -> None:
        module.to(ranks.device)
        shapes = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
        self._modules = _shard(module, ranks)
        # Later, named_parameters() may return a block's gathered copies instead.
        self._sharded = {name: p for name, p in module.named_parameters() if p.requires_grad}
        masters = {name: nn.Parameter(_local(p)) for name, p in self._sharded.items()}
        fragments = [
            Fragment(
                name,
                _first_element(shape, ranks),
                shape,
                masters[name].detach(),
                player.penalised.get(name, 0.0),
            )
            for name, shape in shapes.items()
        ]
        super().__init__(module, player, ranks, batch, masters, fragments)
        self.order = Order(cast("list[nn.Module]", self._modules))
        self._last_round = True
        for fsdp_module in self._modules if batch.rounds > 1 else ():
            _follow(fsdp_module, partial(self._accumulated, fsdp_module))

    def begin_turn(self) -> None:
        """Blocks stay gathered to the end of the turn if the launcher's file says so, and from their first
        backward on if there is a second."""
        super().begin_turn()
        keep = self.ranks.keep_gathered
        for module in self._modules if keep or self.twice else ():
            module.set_reshard_after_forward(not keep, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)

    def end_turn(self) -> None:
        for module in self._modules:  # not all of these calls are recursive
            module.set_reshard_after_forward(True, recurse=False)
            module.set_reshard_after_backward(True, recurse=False)
            module.reshard()

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """In the last of several rounds, blocks begin to reduce when their gradients are complete. From the
        start they would reduce twice: what earlier rounds left after the first pass, the rest after the
        last."""
        self._last_round = last
        self._reduce(self._modules, last and self.batch.rounds == 1)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        if self._last_round and self.batch.rounds > 1:
            # A block without a gradient in this round reduces those of earlier rounds at the end of the pass,
            # which FSDP2 does itself: its own callback is queued after this one.
            end = partial(self._reduce, self._modules, True)
            loss.register_hook(lambda _: _at_the_end(end))  # type: ignore[no-untyped-call]
        super().backward(loss)

    def _accumulated(self, module: FSDPModule) -> None:
        """Called in a backward pass: a gradient of this block has all that this round adds to it."""
        if self._last_round:
            self._reduce([module], True)

    def _reduce(self, modules: Iterable[FSDPModule], now: bool) -> None:
        for module in modules:
            module.set_requires_gradient_sync(now, recurse=False)

    def collect_gradients(self) -> None:
        if self.twice:
            self._check_reduced()
        for name, parameter in self._sharded.items():
            gradient = parameter.grad
            self._masters[name].grad = (
                torch.zeros_like(self._masters[name]) if gradient is None else _local(gradient)
            )

    def _check_reduced(self) -> None:
        """FSDP2 reduces a block at the end of its forward pass's nodes, and keeps what comes later without a
        word. They are the last ones (gan/second_order.py)."""
        gathered = (one for one in self.module.named_parameters() if not isinstance(one[1], DTensor))
        left = [name for name, parameter in gathered if parameter.grad is not None]
        assert not left, f"FSDP2 has not reduced the gradients of {', '.join(left)}"

    def zero_grad(self) -> None:
        super().zero_grad()
        for parameter in self._sharded.values():
            parameter.grad = None


def _shard(module: nn.Module, ranks: Ranks) -> list[FSDPModule]:
    """Shard block by block, then the rest as the root; returns all FSDP modules.

    Parameters stay fp32 and autocast computes in bf16, as under every other strategy. FSDP2's mixed precision
    would halve what is gathered, but it casts norms too, and BatchNorm refuses bf16 weights with fp32
    statistics.
    """
    refuse_unshardable(module)
    lay_out(module)
    mesh = _mesh(ranks)
    # By default the root stays gathered, and a pass without gradients would leave stale weights in it.
    for part in (*blocks_of(module), module):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def _mesh(ranks: Ranks) -> DeviceMesh:
    """All ranks, or [copies, shards] of them. By default FSDP2 would shard over the kind of device torch was
    built for, present or not, and groups would have a default timeout."""
    world, kind = dist.group.WORLD, ranks.device.type
    assert world is not None
    if ranks.shards == ranks.world:
        return DeviceMesh.from_group(world, kind)
    names, layout = ("copies", "shards"), torch.arange(ranks.world).view(-1, ranks.shards)
    return DeviceMesh.from_group([ranks.over_copies, ranks.within_copy], kind, layout, mesh_dim_names=names)


def _follow(module: Any, accumulated: Callable[[], None]) -> None:
    """Have `accumulated` called as soon as autograd has added up a gradient of this block: once per parameter
    and backward pass, however often the block was run.

    Gradients are those of gathered parameters, which exist from the first forward pass on.
    """

    def before_forward(_module: nn.Module, _inputs: Any) -> None:
        gathered = [p for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        for parameter in gathered:
            parameter.register_post_accumulate_grad_hook(lambda _: accumulated())
        if gathered:
            handle.remove()

    handle = module.register_forward_pre_hook(before_forward)


def _at_the_end(of_pass: Callable[[], None]) -> None:
    """Called in a backward pass: have `of_pass` called at its end."""
    torch.autograd.Variable._execution_engine.queue_callback(of_pass)


def refuse_unshardable(module: nn.Module) -> None:
    """Raise UserError for a parameter without rows, and for one with two names: FSDP2 shards modules, and
    would hold it twice, or gather it in one place and not in the other."""
    first: dict[int, str] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        if p.ndim == 0:
            raise UserError(
                f"The parameter {name} of {type(module).__name__} is a single number, which FSDP2 cannot "
                "shard. Give it the shape [1], or train it under ddp."
            )
        if first.setdefault(id(p), name) != name:
            raise UserError(
                f"{type(module).__name__} ties its parameters {first[id(p)]} and {name}, which FSDP2 cannot "
                "shard as one. Train it under ddp, or under zero1, zero2 or zero3."
            )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a sharded tensor, sharing its memory."""
    assert isinstance(tensor, DTensor)
    local: torch.Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return local


def _first_element(shape: torch.Size, ranks: Ranks) -> int:
    """Index of this rank's first element: torch.chunk, and so FSDP2, deals out rows (first axis), as many to
    each rank of a copy but the last ones, which may get fewer or none."""
    rows = -(-shape[0] // ranks.shards)
    return min(ranks.rank % ranks.shards * rows, shape[0]) * (shape.numel() // shape[0])
