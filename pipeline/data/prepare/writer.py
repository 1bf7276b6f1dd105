"""Images, or latents, → tar shards, byte for byte the same each time, and their index.

Shards are written by webdataset's own TarWriter, in the folder that staging.py provides. Images are shuffled
once, by a fixed seed, so that every shard is a fair sample of the whole.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import webdataset
from numpy.typing import NDArray

from pipeline.config import UserError, expanded, readable
from pipeline.cores import cores
from pipeline.data import sidecar
from pipeline.data.index import Index, load_index
from pipeline.data.plan import permutation
from pipeline.data.prepare.duplicates import count_copies, first_of_each
from pipeline.data.prepare.earlier import files_of, is_same_place, made_before, refuse_changed, where_from
from pipeline.data.prepare.files import open_source
from pipeline.data.prepare.known import KNOWN
from pipeline.data.prepare.labels import Classes, chosen
from pipeline.data.prepare.listing import LeftOut
from pipeline.data.prepare.made import make, none_can_be_read, resolve
from pipeline.data.prepare.pictures import LeftOutError
from pipeline.data.prepare.source import Options as Options  # is part of this module
from pipeline.data.prepare.source import Resolved, Source
from pipeline.data.prepare.staging import (
    MadeMeanwhileError,
    NotStartedError,
    Skipped,
    Written,
    discard,
    finished,
    publish,
    record,
    recorded,
    staging,
)
from pipeline.data.prepare.summary import Summary, list_left_out, write_origins
from pipeline.data.record import Shard, shard_of, sidecar_path, write_record
from pipeline.data.workers import end_with_parent
from pipeline.interrupts import interrupts_held
from pipeline.wording import counted

_SHUFFLE_SEED = 20140610  # any fixed number; the day the GAN article appeared
_COLOURS = {"white": "#ffffff", "black": "#000000"}

Jobs = list[tuple[int, NDArray[np.int64]]]  # each shard's number and images


def prepare(
    source: str,
    out: str,
    options: Options,
    *,
    workers: int | None = None,
    announce: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    report: Callable[[Summary], None] = lambda _: None,
) -> Index:
    """Write the images of `source` (a folder, a zip, shards, a known data set) as shards into a new folder.

    `progress(done, total)` counts images; `report` is called once, with what became of every file of the
    source. Files that cannot be read are skipped, announced and listed in skipped.txt with all that are no
    images; sources.txt says which file each sample was made of. If `out` was made by the same call before,
    nothing is done; if such a call was killed, this one makes the missing shards. Raises UserError if there
    are no images, they do not fit the options, `out` is in use or was made of files that have changed since
    (leaving nothing behind), or the disk is full.
    """
    options = replace(options, background=_colour(options.background))
    while True:
        with suppress(MadeMeanwhileError):  # then look whether it is what is wanted here
            return _prepare(source, out, options, workers, announce, progress, report)


def _prepare(
    source: str,
    out: str,
    options: Options,
    workers: int | None,
    announce: Callable[[str], None],
    progress: Callable[[int, int], None],
    report: Callable[[Summary], None],
) -> Index:
    with readable(out):
        target = _target(out)
    place = {"source": source} if source in KNOWN else where_from(source)
    recipe = {**place, **asdict(options)}
    with readable(source):
        before = made_before(target, recipe, asdict(Options()))
        gone = source in KNOWN or not expanded(source).exists()
        if before and gone and is_same_place(before, recipe):
            return _is_there(target, announce)
        images = _open(source, options.classes, announce, target)
    fingerprint = images.fingerprint()
    if before:
        refuse_changed(target, source, before, recipe, len(images), fingerprint)
        return _is_there(target, announce)
    for warning in images.labelled.warnings:
        announce(f"warning: {warning}")
    resolved = resolve(images, options)
    extra = {"prepared": recipe, "source": files_of(len(images), fingerprint)}
    with staging(target, json.dumps([recipe, fingerprint]), announce) as folder:
        workers = workers or cores()
        rows, copies = np.arange(len(images)), list[LeftOut]()
        if options.dedupe:
            announce("Looking for copies …")
            rows, copies = first_of_each(images, _digests(images, resolved, folder, workers, progress))
        jobs = _jobs(rows, resolved.per_shard)
        if ready := finished(folder):
            announce(f"{ready} of {len(jobs)} shards are there from an earlier try; making the others.")
        written = _write_all(images, resolved, folder, jobs, workers, progress)
        left_out = _describe_all(folder, images, jobs, written, copies, extra, announce)
        publish(folder, target)
    index = load_index(str(target), announce)
    facts = sum((Counter(result.facts) for result in written), Counter(copies=count_copies(index)))
    report(Summary(index, resolved, images, facts, left_out))
    return index


def _target(out: str) -> Path:
    """Where the shards are to be: a link's target. Raises UserError for what no folder can be renamed to."""
    target = expanded(out).absolute()
    if target.is_symlink():
        target = target.resolve()
    if os.path.ismount(target):
        raise UserError(f"{out} is where a disk is mounted; give a folder in it: {Path(out) / 'NAME'}.")
    return target


def _open(source: str, classes: Classes, announce: Callable[[str], None], target: Path) -> Source:
    if source not in KNOWN:
        return open_source(source, classes, announce, without=target)
    images = KNOWN[source](announce)
    images.labelled = chosen(images.labelled, classes, source)
    return images


def _describe_all(
    folder: Path,
    images: Source,
    jobs: Jobs,
    written: list[Written],
    copies: list[LeftOut],
    extra: dict[str, Any],
    announce: Callable[[str], None],
) -> list[LeftOut]:
    """Write index.json, sources.txt and skipped.txt; returns what is in the latter."""
    skipped = [LeftOut(item.name, item.kind, item.reason) for shard in written for item in shard.skipped]
    others = [*copies, *images.left_out]
    shards = [result.shard for result in written if result.shard.nsamples]
    if not shards:
        raise none_can_be_read(images, skipped[0].reason)
    list_left_out(folder, skipped, others, announce)
    write_origins(folder, _origins(images, jobs, written))
    classes = {"classes": list(images.labelled.classes)} if images.labelled.classes else {}
    write_record(folder, images.name, shards, extra | classes)
    return [*skipped, *others]


def _is_there(target: Path, announce: Callable[[str], None]) -> Index:
    announce(f"{target} is there already, made by the same command; remove it to make it again.")
    return load_index(str(target), announce)


def _colour(background: str | None) -> str | None:
    if background is None:
        return None
    colour = _COLOURS.get(background.lower(), background.lower())
    if not re.fullmatch("#[0-9a-f]{6}", colour):
        raise UserError(f"{background!r} is no background: give white, black or #rrggbb.")
    return next((name for name, code in _COLOURS.items() if code == colour), colour)


def _jobs(rows: NDArray[np.int64], per_shard: int) -> Jobs:
    order = rows[permutation(len(rows), _SHUFFLE_SEED)]
    starts = range(0, len(order), per_shard)
    return [(number, order[start : start + per_shard]) for number, start in enumerate(starts)]


def _write_all(
    images: Source,
    options: Resolved,
    folder: Path,
    jobs: Jobs,
    workers: int,
    progress: Callable[[int, int], None],
) -> list[Written]:
    done, total = 0, sum(len(rows) for _, rows in jobs)
    results: dict[int, Written] = {}
    progress(done, total)
    with _pool(images, options, folder, min(workers, len(jobs))) as pool:
        futures = {pool.submit(_write_shard, number, rows): (number, len(rows)) for number, rows in jobs}
        for future in as_completed(futures):
            number, count = futures[future]
            results[number] = future.result()
            done += count
            progress(done, total)
    return [results[number] for number in sorted(results)]


def _digests(
    images: Source, options: Resolved, folder: Path, workers: int, progress: Callable[[int, int], None]
) -> Iterator[tuple[int, bytes | None]]:
    """The digest of each image as it would be written, in order; None for one that cannot be read."""
    total = len(images)
    with _pool(images, options, folder, workers) as pool:
        for number, digest in enumerate(pool.map(_digest, range(total), chunksize=64)):
            yield number, digest
            progress(number + 1, total)


@contextmanager
def _pool(images: Source, options: Resolved, folder: Path, workers: int) -> Iterator[ProcessPoolExecutor]:
    """Forked processes, which have the source's arrays without a copy. Raises NotStartedError."""
    context = multiprocessing.get_context("fork")
    with _starting(workers):
        pool = ProcessPoolExecutor(workers, context, _adopt, (images, options, folder))
    try:
        with _starting(workers), interrupts_held():
            pool.submit(int)  # starts all of them
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _starting(workers: int) -> Iterator[None]:
    """Raises NotStartedError if processes, or what they need, cannot be made; ends those that were."""
    others = multiprocessing.active_children()
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: no thread
        for child in multiprocessing.active_children():  # those that were started would wait for work
            if child not in others:
                child.kill()
        raise NotStartedError(
            f"{counted(workers, 'process')} cannot be started here ({error}). Run the same command "
            "again with fewer --workers: it makes only what is missing."
        ) from None


_job: tuple[Source, Resolved, Path]  # of a worker process


def _adopt(images: Source, options: Resolved, folder: Path) -> None:
    global _job
    _job = (images, options, folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends the pool
    end_with_parent()  # a killed parent ends nothing, and the folder would stay locked


def _digest(number: int) -> bytes | None:
    images, options, _ = _job
    try:
        return hashlib.blake2b(make(images, number, options).data, digest_size=16).digest()
    except LeftOutError:
        return None


def _write_shard(number: int, rows: NDArray[np.int64]) -> Written:
    folder = _job[2]
    if (earlier := recorded(folder, number)) is not None:
        return earlier
    path = folder / f"shard-{number:06d}.tar"
    try:
        written = _write_tar(path, number, rows)
        record(folder, number, written)
    except BaseException:
        discard(path)
        raise
    return written


def _write_tar(path: Path, number: int, rows: NDArray[np.int64]) -> Written:
    images, options, folder = _job
    skipped, facts = list[Skipped](), Counter[str]()
    labels = images.labelled.values
    with path.open("wb") as file, tar_writer(file) as tar:
        for place, row in enumerate(rows.tolist()):
            try:
                made = make(images, row, options)
            except LeftOutError as error:
                skipped.append(Skipped(place, images.describe(row), error.kind, str(error)))
                continue
            sample = {"__key__": _key(number, place), made.extension: made.data}
            if labels[row] >= 0:
                sample["cls"] = b"%d" % labels[row]
            tar.write(sample)
            facts.update(made.facts)
    if len(skipped) == len(rows):
        path.unlink()
        return Written(Shard(path.name, 0, 0, "", {}), tuple(skipped), {})
    table = sidecar.scan(path, path.name)
    beside = sidecar_path(folder, path.name)
    beside.parent.mkdir(exist_ok=True)  # unless another process has removed `folder`
    sidecar.save(table, beside, make_folder=False)
    return Written(shard_of(path.name, table), tuple(skipped), dict(facts))


def _key(number: int, place: int) -> str:
    return f"{number:06d}-{place:06d}"


def tar_writer(file: BinaryIO) -> Any:
    """webdataset's writer, set to write the same bytes for the same samples: no times, no names."""
    return webdataset.TarWriter(file, user="", group="", mode=0o644, mtime=0, compress=False, encoder=False)


def _origins(images: Source, jobs: Jobs, written: list[Written]) -> Iterator[tuple[str, str]]:
    for (number, rows), result in zip(jobs, written, strict=True):
        absent = {item.place for item in result.skipped}
        for place, row in enumerate(rows.tolist()):
            if place not in absent:
                yield _key(number, place), images.path(row)
