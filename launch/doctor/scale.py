"""Where does a weight penalty act on the function, and where only on the size of the steps?

A norm or a demodulation undoes the scale of the kernels before it: the network computes the same with sW as
with W, for every s > 0. There λ‖W‖² only keeps W small, which makes steps of a given size turn it further.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from launch.doctor.finding import Finding, Job, ok, warning
from pipeline.config import WeightPenalty
from pipeline.gan.networks import build_D, build_G
from pipeline.gan.penalised import penalised, resolved
from pipeline.gan.schedules import is_used
from pipeline.wording import in_millions

_LARGEST = 3e7  # parameters, and
_LONGEST = 2e10  # FLOPs of an image, that are tried: a few seconds
_ZERO = 1e-6  # cosine between W and the gradient; rounding gives 1e-12, other kernels 1e-5 and more


def examine(
    job: Job, num_classes: int, players: Sequence[nn.Module], flops: tuple[float, float] | None
) -> Iterator[Finding]:
    """A finding per player with a weight penalty. players: G and D, which need no memory; flops: of an image,
    forward, if they could be counted."""
    for name, player, build, cost in zip("GD", players, (build_G, build_D), flops or (0, 0), strict=True):
        penalty: WeightPenalty = getattr(job.config.penalty, name)
        if not (is_used(penalty.l2) or is_used(penalty.l1)):
            continue
        parameters, on = dict(player.named_parameters()), resolved(player, penalty.on)
        covered = {key for key in penalised(player, on) if parameters[key].requires_grad}
        sizes = {key: parameters[key].numel() for key in covered}
        if cost > _LONGEST or sum(p.numel() for p in parameters.values()) > _LARGEST:
            yield ok("weight penalty", f"λ_{name} on {on}: too large to try here which kernels a norm undoes")
            continue
        try:
            network = build(job.config, num_classes)
            free = undone(network, covered, _inputs(job, name, num_classes))
        except Exception as error:  # a user's network may do anything
            yield ok("weight penalty", f"λ_{name} on {on}: not tried which kernels a norm undoes ({error})")
            continue
        normed = "norm" in inspect.signature(type(network)).parameters
        yield _finding(name, on, sizes, free, normed)


def undone(network: nn.Module, names: Collection[str], inputs: tuple[Tensor | None, ...]) -> list[str]:
    """Those of `names` (parameters) whose scale does not change the output, in the module's order.

    By Euler's theorem: where the output is the same for sW, ⟨W, ∂output/∂W⟩ = 0. In float64; makes the
    network useless, as its parameters that are all 0 become random and norms lose their eps.
    """
    network.double()
    for module in network.modules():
        if isinstance(getattr(module, "eps", None), float):
            module.eps = 1e-12  # type: ignore[assignment]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kernels = {name: p for name, p in network.named_parameters() if name in names}
        with torch.no_grad():
            for kernel in kernels.values():
                if not kernel.any():
                    kernel.normal_(0, 0.1)
        output = network(*inputs)
        (output * torch.randn_like(output)).sum().backward()
    return [name for name, p in kernels.items() if p.grad is not None and _orthogonal(p.detach(), p.grad)]


def _orthogonal(a: Tensor, b: Tensor) -> bool:
    lengths = float(a.norm() * b.norm())
    return lengths > 0 and abs(float((a * b).sum())) < _ZERO * lengths


def _inputs(job: Job, player: str, num_classes: int) -> tuple[Tensor | None, ...]:
    generator, data = torch.Generator().manual_seed(0), job.config.data
    image = (job.config.G.z_dim,) if player == "G" else (data.channels, data.size, data.size)
    c = torch.arange(4) % num_classes if num_classes else None
    return torch.randn(4, *image, generator=generator, dtype=torch.float64), c


def _finding(name: str, on: str, sizes: dict[str, int], free: list[str], normed: bool) -> Finding:
    """normed: whether the network's norms can be chosen."""
    what = "parameters" if on == "all" else "kernels"
    if not free:
        return ok("weight penalty", f"λ_{name} on {on} acts on the function, through all of its {what}")
    size, whole = (in_millions(n) for n in (sum(sizes[key] for key in free), sum(sizes.values())))
    layers = [key.partition(".parametrizations")[0].removesuffix(".weight") for key in free]
    more = f" and {len(free) - 3} more" if len(free) > 3 else ""
    text = (
        f"λ_{name} on {on}: a norm or demodulation undoes the scale of {len(free)} of {len(sizes)} {what}, "
        f"{size} of {whole} numbers ({', '.join(layers[:3])}{more}). There it acts as a larger "
        "learning rate, not as a simpler function"
    )
    remedy = f"If it is to regularise, set {name}.norm=none and {name}.spectral_norm=false."
    return warning("weight penalty", text, remedy if normed else "")
