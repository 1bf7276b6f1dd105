"""What the network families share: norms, activations, spectral norm, widths, checkpointing, refusals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint as keeping_inputs

from pipeline.config import Norm, UserError
from pipeline.gan.penalised import KERNEL_LAYERS
from pipeline.gan.sync_batch_norm import SyncBatchNorm2d

Activation = Literal["relu", "leaky_relu", "silu"]
SLOPE = 0.2  # of leaky ReLUs (Radford et al. 2016, section 3)


class GroupNorm(nn.GroupNorm):
    """Torch's, with outputs in the dtype of x: under autocast a GPU computes it in fp32, and what follows
    would stay so. Its backward on a CPU (2.13) ends the process by SIGSEGV where its weights need a
    gradient and channels-last features do not: after layers that are frozen."""

    def forward(self, x: Tensor) -> Tensor:
        only_weights = torch.is_grad_enabled() and self.weight.requires_grad and not x.requires_grad
        return super().forward(x.contiguous() if only_weights and x.device.type == "cpu" else x).to(x.dtype)


def norm_layer(kind: Norm, channels: int) -> nn.Module:
    """The norm named `kind` in the config, for features [N, channels, H, W]; "none": the identity."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "sync_batch":
        return SyncBatchNorm2d(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    if kind == "group":
        return GroupNorm(_groups(channels), channels)
    return nn.Identity()


def activation_layer(kind: Activation) -> nn.Module:
    return {"relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(SLOPE), "silu": nn.SiLU()}[kind]


def normalise_kernels(module: nn.Module, *others: type[nn.Module]) -> None:
    """Spectral norm (Miyato et al. 2018) on every convolution and linear layer, and on layers of `others`."""
    for layer in list(module.modules()):
        if isinstance(layer, (*KERNEL_LAYERS, *others)):
            spectral_norm(layer)


def run(block: nn.Module, *inputs: Any, checkpoint: bool) -> Any:
    """block(*inputs). checkpoint: of its activations, keep only the inputs; each backward pass computes the
    rest again (Chen et al. 2016, "Training deep nets with sublinear memory cost").

    Dropout and noise are drawn again as they were. Right for gradient penalties too, but a pass that is
    differentiated twice saves little memory: its first backward keeps what it has computed again.
    """
    if checkpoint and torch.is_grad_enabled():
        return keeping_inputs(block, *inputs, use_reentrant=False)
    return block(*inputs)


def run_all(blocks: Iterable[nn.Module], x: Tensor, *, checkpoint: bool) -> Tensor:
    """x through one block after the other, each as by `run`."""
    for block in blocks:
        x = run(block, x, checkpoint=checkpoint)
    return x


def refuse_checkpoint(norm: Norm, spectral_norm: bool) -> None:
    """Raise UserError for a network that changes each time it is run, as checkpointing runs it again."""
    changing = {"norm=batch": norm == "batch", "norm=sync_batch": norm == "sync_batch"}
    for key in (k for k, on in (changing | {"spectral_norm=true": spectral_norm}).items() if on):
        raise UserError(
            f"checkpoint=true runs blocks a second time, and {key} changes with each: set norm to none, "
            "group or instance and spectral_norm=false, or checkpoint=false."
        )


def start_and_widths(
    family: str, size: int, sizes: tuple[int, ...], width: int, max_width: int
) -> tuple[int, list[int]]:
    """Pixels of the smallest features, 4 (7 for 28 px), and channels at each resolution from the image
    inwards: doubled up to max_width. Raises UserError for a size that is none of `sizes`."""
    refuse_size(family, size, sizes)
    start = 7 if size == 28 else 4
    levels = int(math.log2(size // start))
    return start, [min(width * 2**level, max_width) for level in range(levels + 1)]


def refuse_size(family: str, size: int, sizes: tuple[int, ...]) -> None:
    """Raise UserError if the family has no network for images of this size."""
    if size not in sizes:
        raise UserError(
            f"data.size={size}: {family} has no network for {size} px images, only for "
            f"{', '.join(map(str, sizes))}. Set data.size to one of them (`shardgan prepare --size` resizes "
            "images), or use a network of your own: G.kind and D.kind take package.module:Class."
        )


def _groups(channels: int) -> int:
    """The most equal groups, at most 32 (Wu & He 2018), with at least four channels each."""
    return next(n for n in range(max(1, min(32, channels // 4)), 0, -1) if channels % n == 0)
