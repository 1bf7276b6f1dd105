"""Settings are read, checked and written here: defaults < YAML file < `key=value` on the command line.

The settings and their defaults are in `pipeline/settings.py`. A config file holds only what differs from
them. The resolved config is written to `runs/<name>/config.yaml`; loading it reproduces the run. The number
of processes, the strategy and the precision are not settings: they are read from the launcher, so the two
cannot disagree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from copy import deepcopy
from functools import reduce
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from pipeline.config_layers import (
    Layer,
    expand_shorthands,
    explain,
    read_override,
    refuse_resolvers,
)
from pipeline.config_layers import read_file as read_file  # `load` without what is not in the file
from pipeline.credentials import reason, redacted
from pipeline.errors import UserError as UserError  # part of this module, as the settings are
from pipeline.errors import expanded as expanded
from pipeline.errors import readable as readable
from pipeline.setting_types import Norm as Norm
from pipeline.setting_types import PenaltyOn as PenaltyOn
from pipeline.setting_types import Schedulable as Schedulable
from pipeline.settings import R1 as R1
from pipeline.settings import Augment as Augment
from pipeline.settings import Config as Config
from pipeline.settings import Data as Data
from pipeline.settings import Discriminator as Discriminator
from pipeline.settings import Ema as Ema
from pipeline.settings import Generator as Generator
from pipeline.settings import Optimizer as Optimizer
from pipeline.settings import Remote as Remote
from pipeline.settings import Run as Run
from pipeline.settings import Score as Score
from pipeline.settings import WeightPenalty as WeightPenalty


def load(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Defaults < the YAML file (None: none) < overrides of the form `section.key=value`.

    Raises UserError listing every problem at once, each with its path.
    """
    layers = [] if path is None else [read_file(Path(path), Config)]
    layers += [read_override(text, Config) for text in overrides]
    try:
        config = _validated(layers)
    except ValidationError as error:
        in_file = path is not None and _is_invalid(layers[:1])
        blamed = f"{path} is not a valid config:" if in_file else "The given settings are not valid:"
        raise UserError("\n".join([blamed, *explain(error, Config())])) from None
    except OmegaConfBaseException as error:
        source = str(path) if path is not None else "the given settings"
        given = [layer.get("data") for layer in layers] if error.full_key == "data.train" else ()
        raise UserError(
            f"{source}: {error.full_key or 'a value'} cannot be read: {reason(error, str(given))}"
        ) from None
    if config.run.name is None:
        name = Path(path).stem if path is not None else "run"
        try:
            run = dataclasses.replace(config.run, name=name)
        except ValidationError:
            raise UserError(f"{path}: {name!r}, the file's name, cannot be a run's. Set run.name.") from None
        config = dataclasses.replace(config, run=run)
    if config.run.init is not None and config.ema.rampup == Ema().rampup:
        config = without_rampup(config)  # with it the first update would replace the source's G_ema by G
    _check(config)
    return config


def _validated(layers: Iterable[Layer]) -> Config:
    refuse_resolvers(layers := [*layers])
    plain = [expand_shorthands(layer) for layer in layers]
    values: Any = deepcopy(reduce(_replacing, plain, Layer()))  # layers are read once and kept
    if "???" in repr(plain):  # merged by OmegaConf, it would leave what an earlier layer says
        OmegaConf.to_container(OmegaConf.create(values), throw_on_missing=True)
    if "${" in repr(plain):  # else nothing is left to OmegaConf, which is slow
        try:
            merged = OmegaConf.merge(*map(OmegaConf.create, plain))
        except TypeError:
            # A list for a section, or the other way round: the last one counts, and is judged below.
            merged = OmegaConf.create(values)
        values = OmegaConf.to_container(merged, resolve=True)
    return TypeAdapter(Config).validate_python(values)


def _replacing(before: Layer, after: Layer) -> Layer:
    """`after` over `before`, in which only sections are merged."""
    both = {
        key: _replacing(before[key], value)
        for key, value in after.items()
        if isinstance(value, dict) and isinstance(before.get(key), dict)
    }
    return before | after | both


def _is_invalid(layers: Iterable[Layer]) -> bool:
    try:
        _validated(layers)
    except (ValidationError, OmegaConfBaseException):
        return True
    return False


def without_rampup(config: Config) -> Config:
    return dataclasses.replace(config, ema=dataclasses.replace(config.ema, rampup=0.0))


def dump(config: Config) -> str:
    """The resolved config as YAML; loading it gives the same config, less the credentials in URLs."""
    values: dict[str, Any] = TypeAdapter(Config).dump_python(config, mode="json")
    if config.data.train is not None:
        values["data"]["train"] = redacted(config.data.train)
    return as_yaml(values)


def as_yaml(values: dict[str, Any]) -> str:
    """With quotes where `load` would take a text for something else, as '1e-3', which PyYAML leaves plain."""
    return OmegaConf.to_yaml(OmegaConf.create(values))


def _check(config: Config) -> None:
    """Refuse settings that are valid alone but not together."""
    problems = []
    if config.data.train is None:
        problems.append(
            "data.train: where are the images? Give a folder of shards (`shardgan prepare` makes one)."
        )
    elif "://" in config.data.train and config.data.remote.timeout_s >= config.run.timeout_s:
        problems.append(
            "data.remote.timeout_s must be less than run.timeout_s, or other ranks give up before the "
            "waiting one can name its shard"
        )
    if config.run.init_optimizer and config.run.init is None:
        problems.append("run.init_optimizer: of which run? Set run.init.")
    if config.data.folds is not None and config.data.fold >= config.data.folds:
        problems.append(f"data.fold: {config.data.fold} is not one of the folds 0 to {config.data.folds - 1}")
    for name in ("G", "D"):
        optimizer: Optimizer = getattr(config.optim, name)
        penalty: WeightPenalty = getattr(config.penalty, name)
        if optimizer.decoupled_decay and optimizer.kind != "adamw":
            problems.append(f"optim.{name}.decoupled_decay: only adamw has it, not {optimizer.kind}")
        if optimizer.decoupled_decay and (penalty.l2 or penalty.l1):
            problems.append(
                f"optim.{name}.decoupled_decay together with penalty.{name}: two different regularisers of "
                "the same weights (decoupled decay is not an L2 penalty). Set one of them to 0."
            )
        if optimizer.momentum and optimizer.kind != "sgd":
            problems.append(f"optim.{name}.momentum: only sgd has it; for {optimizer.kind} set betas")
    problems += [*_check_schedules(config), *_check_augmentation(config.augment), *_check_latents(config)]
    if problems:
        raise UserError("\n".join(["The settings do not fit together:", *(f"  {p}" for p in problems)]))


def _check_schedules(config: Config) -> Iterator[str]:
    pairs = [key for key, value in config.schedulable.items() if isinstance(value, tuple)]
    if pairs and not config.run.burn_in_kimg:
        plural = len(pairs) > 1
        yield (
            f"{', '.join(pairs)}: [from, to] {'are schedules' if plural else 'is a schedule'} over the first "
            "run.burn_in_kimg thousand images. Set run.burn_in_kimg, or give one number."
        )


def _check_augmentation(augment: Augment) -> Iterator[str]:
    if augment.p is not None and augment.target is not None:
        yield "augment.p and augment.target: p is either given or adjusted until the target is met. Set one."
    elif augment.ops and augment.p is None and augment.target is None:
        yield "augment.ops: how often? Set augment.p, the probability of each, or augment.target."
    elif not augment.ops and (augment.p, augment.target) != (None, None):
        yield f"augment.{'p' if augment.target is None else 'target'}: nothing to apply. Set augment.ops."


def _check_latents(config: Config) -> Iterator[str]:
    data = config.data
    if not data.latents:
        return
    what = f"data.{'channels' if data.decoder is None else 'decoder'}={data.decoder or data.channels}"
    if data.xflip:
        yield (
            f"data.xflip with {what}: a mirrored latent is not the latent of the mirrored image. Store the "
            "latents of the mirrored images in the shards as well."
        )
    if "colour" in config.augment.ops:
        yield f"augment.ops: colour means nothing on latents ({what}). Leave it out."
    if data.decoder is None and config.score.metrics:
        yield (
            f"score.metrics: scores compare images, and {what} means that the shards hold latents. Set "
            "data.decoder to what makes images of them, or score.metrics=[] for no scores."
        )
