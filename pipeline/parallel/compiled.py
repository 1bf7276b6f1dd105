"""torch.compile, block by block, as the launcher's --dynamo_backend asks for.

What is compiled is a block's `forward`. So the hooks by which strategies gather, reshard and average stay
outside, and parameters keep their names. Compiled code cannot be differentiated twice: each block keeps its
plain forward, which computes wherever a gradient penalty differentiates twice, and whatever is outside of
updates: scores, samples, held-out images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from pipeline.gan.sync_batch_norm import SyncBatchNorm2d
from pipeline.parallel.blocks import blocks_of
from pipeline.parallel.compilation import Compilation
from pipeline.parallel.ranks import Ranks

# A block is compiled for each of its shapes and for each use: trained, frozen, without gradients. Blocks of
# one class share torch's limit, beyond which it silently does not compile.
_MOST_VARIANTS = 1024


class CompiledBlocks:
    """The blocks of a player, compiled beside their plain forward; `used` says which of the two computes."""

    def __init__(self, module: nn.Module, how: Compilation) -> None:
        self.used, self.plain_attention, self.graphs = False, False, how.graphs
        _configure()
        # The same kernels whenever it is compiled, and eager code's dropout. Torch takes a mode or options.
        options: dict[str, Any] = {"deterministic": True, "fallback_random": True}
        options["triton.cudagraphs"] = how.graphs
        for layer in module.modules():
            if isinstance(layer, SyncBatchNorm2d):  # collectives stay in their order
                layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign, no-untyped-call]
        for block in compiled_parts(module):
            plain: Callable[..., Any] = block.forward
            fast, other = (
                torch.compile(
                    each,
                    dynamic=False,
                    backend=how.backend,
                    options=options if how.backend == "inductor" else None,
                )
                for each in (plain, _as_another(plain))
            )
            block.forward = self._either(plain, fast, other)

    def _either(
        self, plain: Callable[..., Any], fast: Callable[..., Any], other: Callable[..., Any]
    ) -> Callable[..., Any]:
        """other: compiled where attention is computed by plain products. Compiled code keeps the attention of
        its first call, and torch does not compile again for another."""

        def forward(*inputs: Any) -> Any:
            if not self.used:
                return plain(*inputs)
            return (other if self.plain_attention else fast)(*inputs)

        return forward


def _as_another(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with code of its own, by which torch tells apart what it has compiled."""

    def forward(*inputs: Any) -> Any:
        return function(*inputs)

    return forward


@contextmanager
def computing(*players: CompiledBlocks | None, plain_attention: bool = False) -> Iterator[None]:
    """A turn, in which these players' blocks compute by compiled code."""
    compiled = [player for player in players if player is not None]
    if any(player.graphs for player in compiled):
        # What a CUDA graph returned stays until the next mark: to the end of the turn.
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
    for player in compiled:
        player.used, player.plain_attention = True, plain_attention
    try:
        yield
    finally:
        for player in compiled:
            player.used = False


def compiled_parts(module: nn.Module) -> list[nn.Module]:
    """The blocks of several layers; of a network without any, all of it."""
    return [block for block in blocks_of(module) if any(True for _ in block.children())] or [module]


def _configure() -> None:
    import torch._dynamo
    import torch._functorch.config

    torch._dynamo.config.recompile_limit = _MOST_VARIANTS
    torch._dynamo.config.accumulated_recompile_limit = _MOST_VARIANTS
    # Inside DDP torch would cut each block where DDP's messages end.
    torch._dynamo.config.optimize_ddp = False
    # Backward passes are compiled with their forward pass, by the thread that the watch looks at.
    torch._functorch.config.force_non_lazy_backward_lowering = True


@contextmanager
def during_update(ranks: Ranks, compiling: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """An update of the networks, in which a rank that makes no progress is stuck. While something is compiled
    any work is a sign of life. compiling: entered meanwhile."""
    progress = ranks.progress
    with progress.during("in an update", updating=True):
        if ranks.compilation is None:
            yield
            return
        from torch._dynamo.callback import callback_handler as handler

        meanwhile = ExitStack()

        def start(_: object) -> None:
            progress.moves += 1
            meanwhile.enter_context(progress.during("compiling", updating=False))
            meanwhile.enter_context(compiling())

        def end(_: object) -> None:
            meanwhile.close()

        handler.register_start_callback(start)
        handler.register_end_callback(end)
        try:
            yield
        finally:
            handler.remove_start_callback(start)
            handler.remove_end_callback(end)
