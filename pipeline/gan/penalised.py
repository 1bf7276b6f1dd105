"""Which parameters a weight penalty λ‖W‖² covers, and how it counts them, chosen on the whole module.

A layer that computes with a constant times its stored `weight` (equalised learning rate and learning rate
multiplier: Karras et al. 2018, section 4.1; 2019, app. C) declares that constant c as an attribute
`weight_gain`. `penalty.on=effective` counts the kernel that computes, c·weight: λ(c·w)² and λ|c·w|. Factors
that change (modulation, demodulation, spectral and weight norm) never count.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from numbers import Real

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from pipeline.config import PenaltyOn, UserError, WeightPenalty

KERNEL_LAYERS = (_ConvNd, nn.Linear)  # _ConvNd: transposed convolutions too
GAIN = "weight_gain"

# A layer's kernel, plain or under the older hooks for spectral and weight norm.
_KERNEL_NAMES = ("weight", "weight_orig", "weight_g", "weight_v")
_ATTENTION_NAMES = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_REMEDY = "Or set penalty.on=weights, to penalise kernels as they are stored."


def penalised(module: nn.Module, on: PenaltyOn) -> dict[str, float]:
    """The parameters that a weight penalty covers: name, as in `module.named_parameters()` → the factor c > 0
    that it counts them with.

    "weights": the kernels of convolutions, linear layers and layers with a `weight_gain`, attention's
    projections included; under a parametrization such as spectral norm the stored kernels; no biases, norms
    or embeddings. "effective": the same, each times its layer's `weight_gain`. "all": every parameter.
    "auto": see `resolved`. A tied parameter appears once, under its first name, and is a kernel if any of its
    uses is. Raises UserError for a `weight_gain` that is no positive number or whose layer has no kernel, and
    for a tied kernel with several.
    """
    on = resolved(module, on)
    if on == "all":
        return {name: 1.0 for name, _ in module.named_parameters()}
    found: dict[int, float] = {}
    for name, layer in module.named_modules():
        gain = _gain(name, layer) if on == "effective" else 1.0
        for kernel in _kernels(layer):
            if found.setdefault(id(kernel), gain) != gain:
                raise UserError(
                    f"{name} shares its kernel with a layer of another {GAIN} ({gain:g} and "
                    f"{found[id(kernel)]:g}): the kernel has no one effective size. {_REMEDY}"
                )
    return {name: found[id(p)] for name, p in module.named_parameters() if id(p) in found}


def resolved(module: nn.Module, on: PenaltyOn) -> PenaltyOn:
    """What `penalty.on` says for this player: "auto" is "effective" if any layer has a `weight_gain` other
    than 1, else "weights". Raises UserError as `penalised`."""
    if on != "auto":
        return on
    return "effective" if any(_gain(*named) != 1 for named in module.named_modules()) else "weights"


def check_penalty(player: str, module: nn.Module, penalty: WeightPenalty, names: Collection[str]) -> None:
    """Raise UserError for a weight penalty that covers nothing: none of `names` (from `penalised`) is a
    parameter that trains."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if (penalty.l2 or penalty.l1) and trained.isdisjoint(names):
        raise UserError(
            f"penalty.{player} covers nothing: no kernel of {type(module).__name__} trains, neither of a "
            "convolution nor of a linear layer. Set penalty.on=all to penalise every parameter, or "
            f"penalty.{player}.l2=0 and penalty.{player}.l1=0."
        )


def _gain(name: str, layer: nn.Module) -> float:
    """The constant by which a layer multiplies its stored kernel."""
    gain = getattr(layer, GAIN, 1.0)
    if not isinstance(gain, Real) or not 0 < float(gain) < math.inf:
        raise UserError(
            f"{name}.{GAIN} is {gain!r}; it must be one positive number, by which the layer multiplies its "
            f"weight. {_REMEDY}"
        )
    if hasattr(layer, GAIN) and not any(True for _ in _kernels(layer)):
        raise UserError(
            f"{name} has a {GAIN} but no parameter `weight`. Give it to the layer that has the weight. "
            f"{_REMEDY}"
        )
    return float(gain)


def _kernels(layer: nn.Module) -> Iterator[nn.Parameter]:
    """The kernels of `layer` itself. Does not read `layer.weight`: computing it may change u and v."""
    if isinstance(layer, nn.MultiheadAttention):
        names = _ATTENTION_NAMES
    elif isinstance(layer, KERNEL_LAYERS) or hasattr(layer, GAIN):
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
