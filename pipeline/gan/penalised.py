"""Which parameters a weight penalty λ‖W‖² covers: names, chosen on the whole, unsharded module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from pipeline.config import UserError, WeightPenalty

KERNEL_LAYERS = (_ConvNd, nn.Linear)  # _ConvNd: transposed convolutions too

# A layer's kernel, plain or under the older hooks for spectral and weight norm.
_KERNEL_NAMES = ("weight", "weight_orig", "weight_g", "weight_v")
_ATTENTION_NAMES = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def penalised_names(module: nn.Module, on: Literal["weights", "all"]) -> frozenset[str]:
    """Names, as in `module.named_parameters()`, of the parameters that a weight penalty covers.

    "weights": the kernels of convolutions and linear layers, attention's projections included; under a
    parametrization such as spectral norm the stored kernels; no biases, norms or embeddings. "all": every
    parameter. A tied parameter appears once, under its first name, and is a kernel if any of its uses is.
    """
    if on == "all":
        return frozenset(name for name, _ in module.named_parameters())
    kernels = {id(parameter) for layer in module.modules() for parameter in _kernels(layer)}
    return frozenset(name for name, parameter in module.named_parameters() if id(parameter) in kernels)


def check_penalty(player: str, module: nn.Module, penalty: WeightPenalty, names: frozenset[str]) -> None:
    """Raise UserError for a weight penalty that covers nothing: none of `names` (from `penalised_names`) is a
    parameter that trains."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if (penalty.l2 or penalty.l1) and not names & trained:
        raise UserError(
            f"penalty.{player} covers nothing: no kernel of {type(module).__name__} trains, neither of a "
            "convolution nor of a linear layer. Set penalty.on=all to penalise every parameter, or "
            f"penalty.{player}.l2=0 and penalty.{player}.l1=0."
        )


def _kernels(layer: nn.Module) -> Iterator[nn.Parameter]:
    """The kernels of `layer` itself. Does not read `layer.weight`: computing it may change u and v."""
    if isinstance(layer, nn.MultiheadAttention):
        names = _ATTENTION_NAMES
    elif isinstance(layer, KERNEL_LAYERS):
        names = _KERNEL_NAMES
    else:
        return
    for name, parameter in layer.named_parameters(recurse=False):
        if name in names:
            yield parameter
    if is_parametrized(layer):
        assert isinstance(layer.parametrizations, nn.ModuleDict)
        for name in layer.parametrizations.keys() & set(names):
            yield from layer.parametrizations[name].parameters(recurse=False)
