"""From the config to the two networks, ours by name or the user's own as `package.module:Class`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Literal

import numpy
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode

from pipeline.config import Config, Discriminator, Generator, UserError
from pipeline.gan import dcgan, r3gan, resnet, stylegan2, vit
from pipeline.gan.compatible import check_layers, check_path
from pipeline.gan.draws import derive_seed
from pipeline.gan.frozen import freeze
from pipeline.gan.images import is_channels_last
from pipeline.gan.penalised import check_penalty, penalised
from pipeline.plugins import import_class, reason

Player = Literal["G", "D"]
_CPU = torch.device("cpu")
# In the errors of kernels, Triton, CUDA extensions and torch where no GPU is.
_OF_GPUS = re.compile(r"cuda|nvidia|triton|\bgpus?\b|'CPU' backend|active drivers", re.IGNORECASE)

FAMILIES: Mapping[str, Mapping[Player, type[nn.Module]]] = MappingProxyType(
    {
        "dcgan": {"G": dcgan.Generator, "D": dcgan.Discriminator},
        "resnet": {"G": resnet.Generator, "D": resnet.Discriminator},
        "r3gan": {"G": r3gan.Generator, "D": r3gan.Discriminator},
        "stylegan2": {"G": stylegan2.Generator, "D": stylegan2.Discriminator},
        "vit": {"G": vit.Generator, "D": vit.Discriminator},
    }
)


def build_G(config: Config, num_classes: int) -> nn.Module:
    """G on the CPU, its weights a function of (run.seed, "G") alone; global random state does not change.

    num_classes: 0 for an unconditional run. A user's class is called with z_dim, size, channels, num_classes
    and G.options. Raises UserError if there is no such network or it cannot be built.
    """
    return _build(config, "G", num_classes)


def build_D(config: Config, num_classes: int) -> nn.Module:
    """D, as `build_G` builds G; a user's class is called with size, channels, num_classes and D.options.

    Its first D.freeze blocks do not train."""
    return _build(config, "D", num_classes)


def check_networks(config: Config, num_classes: int, device: torch.device | None = None) -> None:
    """Refuse networks that do not exist or do not fit the data, cheaply and before any process is spawned.

    Builds G and D without memory or arithmetic (meta device), and passes a batch of two through a user's own
    network, on the CPU if it cannot run on meta, else on `device`, a rank's, as it may have kernels for GPUs
    alone. (Another process leaves such a network to the ranks: where there are GPUs, and where its error
    says that it needs one, as on a cluster's login node.) Raises UserError if a network cannot be built, if
    G's images are not [N, channels, size, size], if D's logits are not [N], or if a weight penalty covers
    nothing.
    """
    data = config.data
    image = (2, data.channels, data.size, data.size)
    _check_shape(config, "G", num_classes, given=(2, config.G.z_dim), due=image, device=device)
    _check_shape(config, "D", num_classes, given=image, due=(2,), device=device)


def check_reach(config: Config, largest: float) -> None:
    """Refuse a G whose images end in tanh for latents with values, up to ±largest, that it cannot give.

    Raises UserError if its class says so: `bounded = True`.
    """
    if largest > 1 and getattr(_class_of(config, "G"), "bounded", False):
        raise UserError(
            f"{_title(config, 'G')} makes values from -1 to 1, and the latents go up to ±{largest:.3g}. "
            "Divide them by a constant when they are written, or choose a G that does not end in tanh."
        )


def _build(config: Config, player: Player, num_classes: int) -> nn.Module:
    network, arguments = _made(config, player), _arguments(config, player, num_classes)
    seed = derive_seed(config.run.seed, "weights", player)
    with torch.device("cpu"), _seeded(seed), _explaining(config, player):
        return network(**arguments)


@contextmanager
def _explaining(config: Config, player: Player) -> Iterator[None]:
    """Around a network's constructor."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{_title(config, player)} cannot be built: {reason(error)}") from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators of torch (on the CPU), NumPy and Python, as a user's network may draw from
    any of them, and restores them."""
    ours, numpys = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
            numpy.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        random.setstate(ours)
        numpy.random.set_state(numpys)


def _made(config: Config, player: Player) -> Callable[..., nn.Module]:
    """Keyword arguments of a network's class → the network as the config trains it."""
    network = _class_of(config, player)

    def make(**arguments: Any) -> nn.Module:
        module = network(**arguments)
        _unfold_buffers(module)
        if lazy := [n for n, p in module.named_parameters() if isinstance(p, UninitializedParameter)]:
            raise UserError(
                f"{_title(config, player)}: its parameter {lazy[0]} has no shape yet (a lazy layer's). Give "
                "the layer the size of its input."
            )
        if player == "D":
            freeze(module, config.D.freeze)
            if not is_channels_last(module):
                module.register_forward_pre_hook(_with_contiguous_images)
        return module

    return make


def _unfold_buffers(module: nn.Module) -> None:
    """Give expanded buffers, whose elements share memory, memory of their own: nothing can be copied into
    them otherwise, by a resumed run or an export."""
    for layer in module.modules():
        for name, buffer in list(layer.named_buffers(recurse=False)):
            if any(step == 0 and size > 1 for step, size in zip(buffer.stride(), buffer.shape, strict=True)):
                setattr(layer, name, buffer.clone())


def _with_contiguous_images(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    images, *others = inputs
    return (images.contiguous(), *others)


def _class_of(config: Config, player: Player) -> type[nn.Module]:
    kind = _section(config, player).kind
    if kind in FAMILIES:
        return FAMILIES[kind][player]
    module_name, colon, class_name = kind.partition(":")
    if not (module_name and colon and class_name):
        near = difflib.get_close_matches(kind, FAMILIES, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"there is {', '.join(FAMILIES)}."
        raise UserError(
            f"{player}.kind={kind}: no such network; {hint} Or your own, as package.module:Class."
        )
    network: type[nn.Module] = import_class(kind, _title(config, player), nn.Module)
    return network


def _arguments(config: Config, player: Player, num_classes: int) -> dict[str, Any]:
    """The keyword arguments of a network's class."""
    section = _section(config, player)
    given: dict[str, Any] = {
        "size": config.data.size,
        "channels": config.data.channels,
        "num_classes": num_classes,
    }
    if section.kind in FAMILIES:
        return given | _keys_of_family(section, player)
    if player == "G":
        given["z_dim"] = config.G.z_dim
    if clash := given.keys() & section.options.keys():
        raise UserError(
            f"{player}.options: {', '.join(sorted(clash))} are set by the rest of the config. Remove them "
            "there."
        )
    return given | section.options


def _keys_of_family(section: Generator | Discriminator, player: Player) -> dict[str, Any]:
    """The keys of a section that its family's class has as parameters. Others must have their default."""
    if section.options:
        raise UserError(
            f"{player}.options: for a class of your own (package.module:Class); {section.kind} is set by the "
            f"other keys of {player}."
        )
    found, default = {}, type(section)()
    of_all = ("kind", "options", "freeze")
    for key in (field.name for field in dataclasses.fields(section) if field.name not in of_all):
        value, families = getattr(section, key), [kind for kind in FAMILIES if key in _named(kind, player)]
        if section.kind in families:
            found[key] = value
        elif value != getattr(default, key):
            having = ", ".join(families) or "no network"
            raise UserError(
                f"{player}.{key}={value}: {section.kind} does not take it, only {having}. Leave it out."
            )
    return found


def _named(kind: str, player: Player) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(FAMILIES[kind][player]).parameters


def _check_shape(
    config: Config,
    player: Player,
    num_classes: int,
    given: tuple[int, ...],
    due: tuple[int, ...],
    device: torch.device | None,
) -> None:
    network, arguments = _made(config, player), _arguments(config, player, num_classes)
    path = player == "G" and config.penalty.path.weight > 0
    if _section(config, player).kind in FAMILIES and not path:  # their constructors refuse what does not fit
        with (
            torch.device("meta"),
            torch.random.fork_rng(devices=[]),
            _Unfilled(),
            _explaining(config, player),
        ):
            module = network(**arguments)
        if player == "D":
            check_layers(config, module)
        return
    for where in dict.fromkeys((torch.device("meta"), _CPU, device or _CPU)):
        try:
            module, out = _forward(network, arguments, given, where, path)
            break
        except UserError:
            raise
        except Exception as error:  # perhaps only because meta has no arithmetic, or a kernel is for GPUs
            problem = error
    else:
        if device is None and (torch.cuda.is_available() or _OF_GPUS.search(str(problem))):
            return
        raise UserError(f"{_title(config, player)} cannot be built and run: {reason(problem)}") from problem
    found = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
    if found != list(due):
        what = "images" if player == "G" else "logits"
        raise UserError(
            f"{_title(config, player)} returns {found} for {list(given)}; {what} must be {list(due)}."
        )
    _check_dtypes(_title(config, player), module)
    penalty = config.penalty.G if player == "G" else config.penalty.D
    check_penalty(player, module, penalty, penalised(module, penalty.on))
    if player == "D":
        check_layers(config, module)
    if path:
        check_path(config, module, out)


def _check_dtypes(title: str, module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise UserError(
                f"{title}: its parameter {name} is {parameter.dtype}; what trains must be torch.float32 (a "
                "complex one: two real ones, and torch.view_as_complex)."
            )


def _forward(
    network: Callable[..., nn.Module],
    arguments: dict[str, Any],
    given: tuple[int, ...],
    device: torch.device,
    gradient: bool,
) -> tuple[nn.Module, Any]:
    drawn_on = [device] if device.type == "cuda" else []
    with torch.device(device), torch.random.fork_rng(devices=drawn_on), torch.set_grad_enabled(gradient):
        labels = torch.zeros(given[0], dtype=torch.int64) if arguments["num_classes"] else None
        module = network(**arguments)
        return module, module(torch.zeros(given), labels)


class _Unfilled(TorchFunctionMode):
    """Skips torch.nn.init: meta has nothing to fill, yet any arithmetic there makes torch load its compiler,
    a second in every process."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def _section(config: Config, player: Player) -> Generator | Discriminator:
    return config.G if player == "G" else config.D


def _title(config: Config, player: Player) -> str:
    return f"{player}.kind={_section(config, player).kind}"
