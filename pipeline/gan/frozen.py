"""D.freeze: layers of D that do not train, next to the image, where features are the most general."""

from __future__ import annotations

from itertools import takewhile

from torch import Tensor, nn

from pipeline.config import UserError


def freeze(D: nn.Module, count: int) -> None:
    """Let the first `count` blocks of D, from the image inwards, stay as they are (Mo, Cho & Shin 2020,
    Freeze the Discriminator).

    A block is an entry with parameters of `D.blocks`; with the first goes what the class defines before it,
    such as a layer from pixels. Only parameters are frozen: batch norms still normalise by the images at
    hand, as when the weights were learnt. Raises UserError unless D has more blocks.
    """
    for layer in _layers(D, count):
        layer.requires_grad_(False)


def frozen_names(D: nn.Module, count: int) -> frozenset[str]:
    """Names, as in `D.named_parameters()`, of the parameters that `freeze` does not let train."""
    frozen = {id(parameter) for layer in _layers(D, count) for parameter in layer.parameters()}
    return frozenset(name for name, parameter in D.named_parameters() if id(parameter) in frozen)


def constants_of(D: nn.Module, count: int) -> dict[str, Tensor]:
    """Copies of these parameters."""
    named = dict(D.named_parameters())
    return {name: named[name].detach().clone() for name in sorted(frozen_names(D, count))}


def sizes(player: nn.Module) -> tuple[int, int]:
    """How many of its numbers train, and how many do not."""
    training, frozen = (
        sum(p.numel() for p in player.parameters() if p.requires_grad is t) for t in (True, False)
    )
    return training, frozen


def _layers(D: nn.Module, count: int) -> list[nn.Module]:
    if not count:
        return []
    sequence = getattr(D, "blocks", None)
    if not isinstance(sequence, nn.Sequential | nn.ModuleList):
        raise UserError(
            f"D.freeze={count}: which layers of {type(D).__name__} are next to the image? It needs an "
            "attribute `blocks`, an nn.Sequential or nn.ModuleList from the image inwards. Or set D.freeze=0 "
            "and freeze them in the class (requires_grad=False)."
        )
    blocks = [block for block in sequence if any(True for _ in block.parameters())]
    if count >= len(blocks):
        raise UserError(
            f"D.freeze={count}: this D has {len(blocks)} blocks, of which at most {len(blocks) - 1} can be "
            "frozen."
        )
    before = takewhile(lambda child: child is not sequence, D.children())
    return [*before, *blocks[:count]]
