"""The networks of the parity matrix: ours with SiLU for their kinked activations.

A unit of a ReLU that lies within rounding of its kink is on in one strategy and off in another, and the two
trainings part by far more than rounding: a true effect, but not one that parity is about.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pipeline.gan import dcgan, resnet


class SmoothGenerator(dcgan.Generator):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        _smooth(self)


class SmoothDiscriminator(dcgan.Discriminator):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        _smooth(self)


class SmoothResidualGenerator(resnet.Generator):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        _smooth(self)


class SmoothResidualDiscriminator(resnet.Discriminator):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        _smooth(self)


class FrozenGenerator(SmoothGenerator):
    """Its first layer stays as it was made."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.project.requires_grad_(False)


class FrozenDiscriminator(SmoothDiscriminator):
    """Its first block stays as it was made."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.blocks[0].requires_grad_(False)


class Threefold(nn.Module):
    """One kernel that serves three times: a layer called twice, and another layer that holds the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.twice = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.again = nn.Conv2d(channels, channels, 3, padding=1)
        self.again.weight = self.twice.weight
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.again(self.activation(self.twice(self.activation(self.twice(x)))))
        return out


class TiedGenerator(SmoothGenerator):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.finish = Threefold(arguments["channels"])

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        out: Tensor = self.finish(super().forward(z, c))
        return out


class TiedDiscriminator(SmoothDiscriminator):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.begin = Threefold(arguments["channels"])

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        return super().forward(self.begin(x), c)


def _smooth(module: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU | nn.LeakyReLU):
                setattr(parent, name, nn.SiLU())
