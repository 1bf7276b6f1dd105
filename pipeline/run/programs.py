"""G as a program that needs none of our code: G_ema.pt2 for torch alone, G_ema.onnx for ONNX runtimes.

Both take any number of images from 1, are compared with the module as they are written, and hold no paths of
this machine.
"""

from __future__ import annotations

import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from pipeline.plugins import require
from pipeline.wording import one_line

CHECKED = (1, 7)  # numbers of images at which a program is compared with the module …
TOLERANCE = 1e-5  # … and the largest difference, in units of the largest value if that exceeds 1
_EXAMPLE = 3  # images in the pass that is recorded
_LARGE = 1 << 30  # bytes of weights that do not go into the .onnx itself, which can hold 2 GiB

Inputs = tuple[Tensor, ...]  # z [N, z_dim], and labels c int64 [N] if there are classes
Draw = Callable[[int], Inputs]  # N → inputs
Images = Callable[[Inputs], Tensor]


class UnfitError(Exception):
    """Why a network cannot be written as a program: one line."""


def inputs_of(z_dim: int, num_classes: int) -> Draw:
    """Fixed inputs of any number of images."""

    def draw(count: int) -> Inputs:
        z = torch.randn(count, z_dim, generator=torch.Generator().manual_seed(count))
        return (z, torch.arange(count) % num_classes) if num_classes else (z,)

    return draw


def record(G: nn.Module, draw: Draw) -> ExportedProgram:
    """A whole G on the CPU, in eval mode, as a graph of torch's own operations (torch.export).

    What G computes of nothing but constants (StyleGAN2's noise, positions of tokens) is computed here: no
    runtime needs it again, nor these operations, and the program can move to any device. Raises UnfitError.
    """
    batch = Dim("batch", min=1)
    inputs = draw(_EXAMPLE)
    shapes = tuple({0: batch} for _ in inputs)
    try:
        with _quiet(), _legible_flags(), torch.no_grad():
            first = torch.export.export(_Called(G), inputs, dynamic_shapes=shapes)
            folded = _folded(first.module(check_guards=False))
            program = torch.export.export(folded, inputs, dynamic_shapes=shapes)
    except Exception as error:  # a network of the user's may do anything
        raise UnfitError(f"torch.export cannot follow it: {_first_line(error)}") from error
    for graph in (m for m in program.graph_module.modules() if isinstance(m, fx.GraphModule)):
        for node in graph.graph.nodes:
            node.meta.pop("stack_trace", None)  # files and lines of this machine
    return program


def write_pt2(program: ExportedProgram, G: nn.Module, draw: Draw, file: Path) -> None:
    """Write the program to `file`, and read it back to compare it with G. Raises UnfitError, OSError."""
    with _quiet():
        written = io.BytesIO()  # on a full disk, torch's own writer ends the process
        torch.export.save(program, written)
        file.write_bytes(written.getbuffer())
        with file.open("rb") as opened:
            read = torch.export.load(opened).module()
    _compare(lambda inputs: read(*inputs), G, draw)


def onnx_runtime() -> Any:
    """The module onnxruntime. Raises UserError without it, or without what writes ONNX."""
    require("onnxscript", "onnx", "--onnx")
    return require("onnxruntime", "onnx", "--onnx")


def write_onnx(program: ExportedProgram, G: nn.Module, draw: Draw, file: Path) -> None:
    """Write the program to `file` (large weights beside it, in FILE.data), and compare it with G.

    Raises UserError without the packages that it needs, UnfitError, OSError.
    """
    runtime = onnx_runtime()
    names = ["z", "c"][: len(draw(1))]
    large = sum(t.nbytes for t in program.state_dict.values()) > _LARGE
    try:
        with _quiet():
            made = torch.onnx.export(
                program, (), input_names=names, output_names=["images"], dynamo=True, verbose=False,
                dynamic_shapes=tuple({0: "batch"} for _ in names),  # for its name, else something like s20
            )  # fmt: skip
            assert made is not None
            made.save(file, external_data=large)
        session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except OSError:
        raise
    except Exception as error:
        raise UnfitError(f"ONNX has no such operations: {_first_line(error)}") from error

    def run(inputs: Inputs) -> Tensor:
        given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    _compare(run, G, draw)


class _Called(nn.Module):
    """G, called with z alone where there are no labels, whatever its forward requires."""

    def __init__(self, G: nn.Module) -> None:
        super().__init__()
        self.G = G

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        images: Tensor = self.G(z, c)
        return images


def _folded(module: fx.GraphModule) -> fx.GraphModule:
    """The module with all that depends on neither inputs nor weights as buffers."""
    known: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        pure = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        if pure and known.keys() >= {*node.all_input_nodes}:
            args = fx.node.map_arg(node.args, known.__getitem__)
            known[node] = node.target(*args, **fx.node.map_arg(node.kwargs, known.__getitem__))
    for node, value in known.items():
        users = [user for user in node.users if user not in known]
        if users and isinstance(value, Tensor):
            name = f"constant_{node.name}"
            module.register_buffer(name, value.clone())
            with module.graph.inserting_after(node):
                constant = module.graph.get_attr(name)
            for user in users:
                user.replace_input_with(node, constant)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


@torch.no_grad()
def _compare(images: Images, G: nn.Module, draw: Draw) -> None:
    """Raise UnfitError unless `images` are those of G."""
    called = _Called(G)
    for count in CHECKED:
        try:
            found, due = (_seeded(of, draw(count)) for of in (images, lambda given: called(*given)))
        except Exception as error:
            raise UnfitError(f"it fails for {count} images: {_first_line(error)}") from error
        if found.shape != due.shape:
            raise UnfitError(f"it gives {list(found.shape)} for {count} images, the module {list(due.shape)}")
        difference = float((found - due).abs().max()) / max(1.0, float(due.abs().max()))
        if not difference <= TOLERANCE:
            raise UnfitError(f"its images differ from the module's by {difference:.2g}, for {count} images")


def _seeded(images: Images, inputs: Inputs) -> Tensor:
    """A network that draws noise of its own draws the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return images(inputs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on its own deprecations, on attributes and on packages that it could use."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def _legible_flags() -> Iterator[None]:
    """torch.export reads TF32's old flag, which raises an error while the new ones contradict it."""
    sides: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn)  # type: ignore[attr-defined]
    before = [side.fp32_precision for side in sides]
    for precision in (None, "tf32", "ieee"):
        for side in sides if precision else ():
            side.fp32_precision = precision
        with suppress(RuntimeError):
            _ = torch.backends.cudnn.allow_tf32
            break
    try:
        yield
    finally:
        for side, precision in zip(sides, before, strict=True):
            side.fp32_precision = precision


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return one_line(f"{type(error).__name__}: {text}")
