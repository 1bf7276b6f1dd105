"""The networks of the parity matrix: ours with SiLU for their kinked activations.

A unit of a ReLU that lies within rounding of its kink is on in one strategy and off in another, and the two
trainings part by far more than rounding: a true effect, but not one that parity is about.
"""

from __future__ import annotations

from typing import Any

from torch import nn

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


def _smooth(module: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU | nn.LeakyReLU):
                setattr(parent, name, nn.SiLU())
