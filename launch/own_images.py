"""`shardgan train FOLDER`: which preset fits a person's own images, where their shards and their run are."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from launch import presets
from launch.contents import Contents, look_at, open_own
from launch.installed import configs
from launch.presets import Preset
from launch.training import Preparation, Training, of_run
from pipeline.config import Config, Data, Run, UserError, load
from pipeline.config_layers import as_override
from pipeline.data.prepare.earlier import where_from
from pipeline.data.prepare.known import KNOWN
from pipeline.data.prepare.shards import Shards
from pipeline.data.prepare.source import Options, Stored
from pipeline.data.record import INDEX, read_record
from pipeline.errors import expanded
from pipeline.run import checkpoint
from pipeline.wording import counted


def of_data(argument: str, path: Path, settings: Sequence[str], gpu: bool) -> Training:
    """A training on a folder or zip of images, or on shards. Raises UserError, having changed nothing."""
    _refuse_given("data.train", settings, f"the data are {argument} already; leave it out")
    if "$" in argument:
        raise UserError(
            f"{argument}: in settings $ begins the name of a variable. Give the data another name."
        )
    if not path.absolute().name:
        raise UserError(f"{argument} is a whole file system. Give the folder that the images are in.")
    source = open_own(argument, path)
    run, data = _wanted(path, settings)
    folder = Path(run.out) / str(run.name)
    begun = load(folder / "config.yaml") if run.resume and (folder / "config.yaml").is_file() else None
    if begun is not None and not run.new_data:
        return _resumed(argument, source, folder, begun, settings)
    if not isinstance(source, Shards):
        _refuse_inside(path, folder)
    seen = look_at(source, argument)
    preset = presets.GPU if gpu else presets.CPU
    if _gives("data.size", settings):
        size = data.size
    else:
        size = _size(argument, source, seen, preset) if begun is None else begun.data.size
    preparation, train = None, argument
    if not isinstance(source, Shards):
        preparation = _preparation(argument, _beside(argument, path, size), _options(argument, path, size))
        train = preparation.out
    if begun is not None:
        training = of_run(folder, [as_override("data.train", train), *settings])
        return dataclasses.replace(training, preparation=preparation)
    file = str(configs() / preset.config)
    named = as_override("run.name", str(run.name)), as_override("data.train", train)
    chosen = (*named, *_choose(preset, seen, size), *settings)
    notes = _notes(argument, seen, preset, load(file, chosen).data, preparation, settings)
    return Training(file, chosen, tuple(notes), preparation)


def _refuse_inside(path: Path, run: Path) -> None:
    """Raises UserError for a run in its own folder of images: the next call would take its grids for some."""
    images = Path(os.path.realpath(path))
    if Path(os.path.realpath(run)).is_relative_to(images):
        raise UserError(
            f"The run would be in {run}, which is in the folder of images itself. Call it from outside (cd "
            f"{shlex.quote(str(images.parent))}; shardgan train {shlex.quote(images.name)}), or set run.out."
        )


def _wanted(path: Path, settings: Sequence[str]) -> tuple[Run, Data]:
    """What the settings say of run and data; a run without a name has that of its data."""
    name = path.absolute().name if path.is_dir() else path.stem
    named = [] if _gives("run.name", settings) else [as_override("run.name", name)]
    # those of score too, as some data are refused without score.metrics=[]
    ours = [text for text in settings if text.startswith(("run.", "data.", "score."))]
    config = load(None, [*named, "data.train=.", *ours])
    return config.run, config.data


def _resumed(argument: str, source: Stored, folder: Path, begun: Config, settings: Sequence[str]) -> Training:
    """Raises UserError unless the run was trained on these images."""
    notes = [f"{argument}: resuming {folder}, with the settings in its config.yaml"]
    train = str(begun.data.train)
    other = UserError(
        f"{folder} was trained on other data ({train}). To train on {argument}, give a new name: "
        f"run.name=NAME. To resume that run: shardgan train {folder}. To continue it on {argument}: "
        "run.new_data=true."
    )
    if isinstance(source, Shards):
        if not _same_place(train, argument) and source.fingerprint() != _data_of(folder):
            raise other
        return of_run(folder, [as_override("data.train", argument), *settings], notes)
    record = _record(train)
    same_files = (record.get("source") or {}).get("fingerprint") == source.fingerprint()
    path = expanded(argument)
    # Shards that were removed are made again, where they were.
    removed = not record and _same_place(train, _beside(argument, path, begun.data.size))
    if not (_made_of(record, argument) or same_files or removed):
        raise other
    options = _recorded(record) or Options(size=begun.data.size)
    training = of_run(folder, settings, notes)
    return dataclasses.replace(training, preparation=_preparation(argument, train, options))


def _preparation(argument: str, out: str, options: Options) -> Preparation:
    """Of a folder also where its name is that of a known data set."""
    return Preparation(f"./{argument}" if argument in KNOWN else argument, out, options)


def _size(argument: str, source: Stored, seen: Contents, preset: Preset) -> int:
    """The size to train at. Raises UserError for shards, which are not resized, of another."""
    if not isinstance(source, Shards):
        return preset.size_for(seen.median)
    if seen.size is not None and seen.size in preset.sizes:
        return seen.size
    size = preset.size_for(seen.median)
    out = f"{argument.rstrip('/').removesuffix('.tar')}-{size}px"
    raise UserError(
        f"The images in the shards {argument} are {seen.pixels}. Shards are trained on as they are, and "
        f"{preset.about} makes {', '.join(map(str, preset.sizes))} pixels. Resize them: shardgan prepare "
        f"{argument} {out} --size {size}, then shardgan train {out}. Or give a config."
    )


def _choose(preset: Preset, seen: Contents, size: int) -> Iterator[str]:
    yield f"data.size={size}"
    yield f"data.channels={seen.channels}"
    if preset.conditional and seen.conditional:
        yield "data.conditional=true"
    yield from preset.at(size)
    if seen.images < presets.FEW:
        yield from preset.few


def _notes(
    argument: str,
    seen: Contents,
    preset: Preset,
    data: Data,
    preparation: Preparation | None,
    settings: Sequence[str],
) -> Iterator[str]:
    classes = f" of {counted(seen.classes, 'class')}" if seen.classes > 1 else ""
    colour = "grey" if seen.channels == 1 else "in colour"
    text = f"{argument}: {counted(seen.images, 'image')}{classes}, {colour}, {seen.pixels}"
    if preparation:
        there = "are" if (Path(preparation.out) / INDEX).is_file() else "will be"
        text += f"; their shards, at {data.size}x{data.size}, {there} in {preparation.out}"
    yield text
    given = _gives("data.size", settings)
    more = "; larger: data.size=N" if not given and data.size == preset.largest < seen.median else ""
    one = " conditional on the class," if data.conditional else ""
    yield f"preset: {preset.about} ({preset.config}),{one} at {data.size}x{data.size}{more}"
    if seen.classes > 1 and not _gives("data.conditional", settings) and not data.conditional:
        why = "not all are labelled" if seen.labelled < seen.images else "so few images each"
        why = preset.why_not_conditional if seen.conditional else why
        yield f"classes are ignored ({why}): data.conditional=true uses them anyway"
    if _gives("augment.", settings):
        return
    if seen.images < presets.FEW:
        yield (
            f"augmentation is on ({preset.few_about}): D soon memorises a data set of fewer than "
            f"{presets.FEW:,} images"
        )
    elif preset.many_about:
        yield f"augmentation is on ({preset.many_about})"


def _options(argument: str, path: Path, size: int) -> Options:
    """Those by which the shards were made, if they are there."""
    record = _record(_beside(argument, path, size))
    return (_recorded(record) if _made_of(record, argument) else None) or Options(size=size)


def _recorded(record: dict[str, Any]) -> Options | None:
    prepared = record.get("prepared")
    if not isinstance(prepared, dict):
        return None
    known = {field.name for field in dataclasses.fields(Options)}
    return Options(**{key: value for key, value in prepared.items() if key in known})


def _made_of(record: dict[str, Any], argument: str) -> bool:
    prepared = record.get("prepared")
    return isinstance(prepared, dict) and prepared.get("path") == where_from(argument)["path"]


def _record(train: str) -> dict[str, Any]:
    return read_record(expanded(train)) if expanded(train).is_dir() else {}


def _beside(argument: str, path: Path, size: int) -> str:
    """Where the shards of images are: photos-64px beside photos, or photos.zip."""
    name = path.absolute().name if path.is_dir() else path.stem
    parent = expanded(argument).parent if path.name else path.absolute().parent
    return str(parent / f"{name}-{size}px")


def _data_of(folder: Path) -> str | None:
    """The fingerprint of the data that a run was trained on, from its newest checkpoint."""
    for cur_nimg in checkpoint.find(folder / "checkpoints"):
        try:
            state = json.loads((folder / "checkpoints" / str(cur_nimg) / "state.json").read_bytes())
            return str(state["data"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _same_place(one: str, other: str) -> bool:
    return os.path.realpath(expanded(one)) == os.path.realpath(expanded(other))


def _gives(key: str, settings: Iterable[str]) -> bool:
    return any(text.startswith(key if key.endswith(".") else f"{key}=") for text in settings)


def _refuse_given(key: str, settings: Iterable[str], why: str) -> None:
    if _gives(key, settings):
        raise UserError(f"{key}: {why}.")
