"""What `shardgan doctor` says of the data: every byte of the shards, how they are split, what is in them."""

from __future__ import annotations

import io
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from launch.doctor.finding import Finding, Job, ok, some, warning, would_fail
from pipeline.config import Config, UserError
from pipeline.data.cache import release, reserve
from pipeline.data.check import SHUFFLE, check_passed_over, odd_labels, refuse_other_kind, unlike
from pipeline.data.decode import FORMATS, dtype_of
from pipeline.data.index import Index, load_index
from pipeline.data.plan import split_of
from pipeline.data.prepare.pictures import is_grey
from pipeline.data.prepare.summary import read_origins
from pipeline.data.prepare.verify import Verified, verify
from pipeline.data.reader import BadSampleError, Reader, Sample, image_of
from pipeline.data.record import REBUILD
from pipeline.data.remote.urls import is_url
from pipeline.data.samples import REPAIR, PassedOver
from pipeline.data.stages import Decode, apply, load_stages
from pipeline.gan.networks import check_reach
from pipeline.run.references import check_held_out, more_held_out
from pipeline.wording import counted, in_bytes, in_kimg

_DECODED = 256  # images, evenly over all of them
_COMPARED = 50_000  # pairs of samples with equal CRC and size that are read and compared
_MOST_SAMPLES = 50_000_000  # among which duplicates are searched: 8 bytes each
_FEW_UPDATES = 20  # per epoch
_NAMED = 3  # pairs of equal images
_REASONS = 3  # named in a finding about samples that are passed over


def examine(
    job: Job, progress: Callable[[int, int], None], read: bool = True
) -> tuple[Index | None, list[Finding]]:
    """The findings, and the index if the data can be trained on. read: every byte of local shards."""
    data = job.config.data
    assert data.train is not None
    verified: Sequence[Verified] = ()
    try:
        if is_url(data.train):
            index = load_index(data.train, remote=data.remote)
            found = list(remote_shards(job, index))
        elif not read:
            index = load_index(data.train)
            found = [ok("shards", f"{counted(len(index.shards), 'shard')} as index.json says; not read")]
        else:
            verified = verify(data.train, progress)
            found = list(shards(verified))
            if any(finding.verdict == "would fail" for finding in found):
                return None, found
            index = load_index(data.train)
    except UserError as error:
        return None, [would_fail("shards", str(error))]
    for check in (passed_over, labels, split, pictures, in_memory, partial(duplicates, verified)):
        try:
            found += check(job, index)
        except UserError as error:
            found.append(would_fail("data", str(error)))
    return index, found


def shards(verified: Sequence[Verified]) -> Iterator[Finding]:
    """Each shard whole, and what index.json and its sidecar say."""
    problems = [problem for shard in verified for problem in shard.problems]
    if problems:
        remedy = f"Fetch the named shards again; if they were changed on purpose, {REBUILD}."
        yield would_fail("shards", some(problems), remedy)
        return
    size, samples = sum(s.filesize for s in verified), sum(s.nsamples for s in verified)
    what = sorted({name for shard in verified for name in shard.against})
    checked = (
        f"sizes, SHA-256 and every CRC agree with {' and '.join(what)}" if what else "whole; now indexed"
    )
    yield ok("shards", f"{counted(len(verified), 'shard')}, {samples:,} images, {in_bytes(size)}: {checked}")


def remote_shards(job: Job, index: Index) -> Iterator[Finding]:
    """One shard fetched and checked, and room for those that are needed at a time."""
    assert index.remote is not None
    one, size = _to_fetch(index), sum(shard.filesize for shard in index.shards)
    os.close(index.open(one))  # checks its SHA-256
    index.table(one)
    window, gb = job.config.data.window, job.config.data.remote.gb
    index.remote.check_room([shard.filesize for shard in index.shards], window)
    text = (
        f"{counted(len(index.shards), 'shard')}, {index.num_samples:,} images, {in_bytes(size)} at "
        f"{index.where}: {index.shards[one].url} fetched and intact; the others are checked when fetched"
    )
    folder = index.remote.cache.folder
    free = shutil.disk_usage(folder).free
    if min(gb * 1e9, size) > free:
        remedy = "Lower data.remote.gb, or set data.remote.folder to a larger disk of the node's own."
        text += f"\n{folder} has {in_bytes(free)} free, data.remote.gb={gb:g}"
        yield warning("shards", text, remedy)
    else:
        yield ok("shards", text)


def _to_fetch(index: Index) -> int:
    return next(i for i, shard in enumerate(index.shards) if shard.nsamples)


def passed_over(job: Job, index: Index) -> Iterator[Finding]:
    """Samples and members that are not used, and why: a finding for each kind."""
    unusable, without = index.passed_over("unusable"), index.passed_over("without_image")
    try:
        check_passed_over(index, job.config.data.max_bad)
    except UserError as error:
        yield would_fail("odd samples", str(error))
        return
    if without.count:
        yield ok("no image", _passed_over(without, "sample"))
    if unusable.count:
        yield warning("odd samples", _passed_over(unusable, "sample"), REPAIR)
    strays = [index.table(i).strays for i in range(0 if index.remote else len(index.shards))]
    if count := sum(found.count for found in strays):
        first = PassedOver(count, tuple(reason for found in strays for reason in found.reasons))
        yield ok("other files", _passed_over(first, "file"))


def _passed_over(what: PassedOver, noun: str) -> str:
    reasons = what.reasons[:_REASONS]
    more = [f"… and {what.count - len(reasons):,} more"] if 0 < len(reasons) < what.count else []
    return "\n".join([f"{counted(what.count, noun)} skipped", *reasons, *more])


def labels(job: Job, index: Index) -> Iterator[Finding]:
    """A label for each image, if they are trained on."""
    counts = Counter[int]()
    for shard in index.shards:
        counts.update(shard.labels)
    labelled = sum(counts.values())
    if not job.config.data.conditional:
        classes = f"of {len(counts):,} class{'es' * (len(counts) != 1)}"
        there = f"{classes}, not trained on" if labelled else "none"
        yield ok("labels", f"{there} (data.conditional=false)")
        return
    try:
        odd = odd_labels(index, job.config.data.max_bad)
    except UserError as error:
        remedy = "Prepare the images again from sub-folders, one per class, or set data.conditional=false."
        yield would_fail("labels", str(error), remedy)
        return
    for text, advice in odd:
        yield warning("labels", text, advice)
    if odd:
        return
    if empty := index.num_classes - len(counts):
        names = (name for label, name in enumerate(index.classes) if label not in counts)
        text = f"{empty:,} of {index.num_classes:,} classes have no image: {', '.join(islice(names, 5))}"
        yield warning("labels", text, "Nothing is learnt of them; number the classes without gaps.")
        return
    low, high = min(counts.values()), max(counts.values())
    sizes = f"{low:,} images each" if low == high else f"{low:,} to {high:,} images"
    yield ok("labels", f"{index.num_classes} classes of {sizes}")


def split(job: Job, index: Index) -> Iterator[Finding]:
    """How many images are trained on and held out, and whether that is enough."""
    config, data = job.config, job.config.data
    try:
        parts = split_of(config, index)
        training, heldout = parts.training().size, parts.heldout().size
    except UserError as error:
        yield would_fail("split", str(error))
        return
    fold = f"fold {data.fold} of {data.folds}" if data.folds else f"data.holdout={data.holdout:g}"
    updates = training / config.images_per_update
    text = (
        f"{training:,} images trained on, {heldout:,} held out ({fold}); an epoch is {updates:,.1f} updates"
    )
    if training < data.batch_size:
        remedy = "Lower data.batch_size, or use more images."
        yield warning("split", f"{text}: a batch shows some images more than once", remedy)
    elif updates < _FEW_UPDATES:
        each = training // job.world
        ways = ", ".join(["use more images", *_to_vary(config), "or a larger λ_D"])
        yield warning("split", f"{text}, {each:,} images per rank", f"D will memorise them: {ways}.")
    else:
        yield ok("split", text)
    if odd := unlike(index, parts):
        yield warning("hold-out", odd, SHUFFLE)
    if config.score.metrics:
        yield from _scored_with(config, heldout)


def _scored_with(config: Config, heldout: int) -> Iterator[Finding]:
    """Are `heldout` images enough for scores, and how much of a run goes into these?"""
    wanted, kimg = config.score.images, config.run.eval_kimg
    if heldout:
        try:
            check_held_out(config.data, heldout)
        except UserError as error:
            yield would_fail("hold-out", str(error))
            return
    if heldout < wanted:
        text = (
            f"{heldout:,} images are held out, score.images={wanted:,}"
            if heldout
            else "nothing is held out: there will be no score"
        )
        yield warning("hold-out", text, f"Scores of few images are noisy: {more_held_out(config.data)}.")
    images = min(wanted, heldout)
    if 0 < kimg * 1000 < 20 * images:
        text = (
            f"{images:,} images are generated and compared after every {in_kimg(kimg)} kimg, "
            f"{images / (kimg * 1000):.0%} on top of those trained on"
        )
        yield warning("scores", text, "Raise run.eval_kimg or lower score.images.")


def _to_vary(config: Config) -> list[str]:
    """The setting that makes more of few images, if it is not set: a mirrored latent is no latent."""
    if not (config.data.latents or config.data.xflip):
        return ["data.xflip"]
    return [] if config.augment.ops else ["augment.ops"]


def pictures(job: Job, index: Index) -> Iterator[Finding]:
    """Some images decoded: sizes, modes, damage."""
    data = job.config.data
    modes, bad, wrong = Counter[str](), list[str](), list[str]()
    squares = largest = 0.0
    # Of remote shards only of the one that has been fetched; those before it are empty.
    end = index.sizes[_to_fetch(index)] if index.remote else index.num_samples
    picked = np.unique(np.linspace(0, end - 1, _DECODED).astype(np.int64))
    decoder = Decode(data, index.num_classes if data.conditional else None)
    stages = load_stages(data.stages)
    for sample in _read(job, index, picked):
        modes[_what(sample)] += 1
        try:
            sample = apply(stages, sample)
            refuse_other_kind(sample, data)
            image, _ = decoder.one(sample)
            squares += float(np.square(image, dtype=np.float64).mean())
            largest = max(largest, float(np.abs(image).max()))
        except BadSampleError as error:
            bad.append(str(error))
        except UserError as error:
            wrong.append(str(error))
    text = f"{len(picked)} decoded: {', '.join(f'{n} {what}' for what, n in modes.most_common(4))}"
    if wrong:
        yield would_fail("images", f"{text}\n{len(wrong)} do not fit, the first: {wrong[0]}")
    elif bad:
        expected = len(bad) / len(picked) * index.num_samples
        judge = would_fail if expected > data.max_bad else warning
        remedy = f"Prepare the images again, or raise data.max_bad={data.max_bad}."
        yield judge("images", f"{text}\n{len(bad)} cannot be used: {some(bad, 2)}", remedy)
    elif data.latents:
        check_reach(job.config, largest)
        size = (squares / len(picked)) ** 0.5
        yield ok("images", f"{text}; root mean square {size:.3g}, up to ±{largest:.3g}")
    elif data.channels == 1 and any("grey" not in what for what in modes):
        remedy = "Set data.channels=3 if colour matters."
        yield warning("images", f"{text}; trained in grey (data.channels=1)", remedy)
    elif data.channels == 3 and all("grey" in what for what in modes):
        remedy = "Set data.channels=1: three times fewer pixels for the same images."
        yield warning("images", f"{text}; trained as colour (data.channels=3)", remedy)
    else:
        yield ok("images", text)


def in_memory(job: Job, index: Index) -> Iterator[Finding]:
    """Whether decoded images can be kept, if that is asked for: as judged by this machine."""
    data = job.config.data
    if data.cache == "ram":
        place, text = reserve(index.sizes, data.size, data.channels, dtype_of(data))
        if place is None:
            yield warning("data.cache", text, "Use a machine with more memory, or set data.cache=none.")
        else:
            release(place)
            yield ok("data.cache", text)


def duplicates(verified: Sequence[Verified], job: Job, index: Index) -> Iterator[Finding]:
    """Images that are there more than once, byte for byte, and whether that spoils the held-out ones."""
    if not verified or index.num_samples > _MOST_SAMPLES:
        not_read = "remote shards" if index.remote else "shards that were not read"
        what = f"more than {_MOST_SAMPLES:,} images" if verified else not_read
        yield ok("duplicates", f"not searched for in {what}")
        return
    images = np.concatenate([shard.images for shard in verified])
    order = np.argsort(images, kind="stable")
    alike = np.flatnonzero(images[order][1:] == images[order][:-1])
    pairs = np.stack([order[alike], order[alike + 1]], axis=1)
    pairs_read = pairs[:: max(1, len(pairs) // _COMPARED)]
    bodies = map(image_of, _read(job, index, pairs_read.reshape(-1)))
    equal = np.array([a == b for a, b in zip(bodies, bodies, strict=True)], np.bool_)
    twice = round(len(pairs) * equal.mean()) if len(equal) else 0
    if not twice:
        yield ok("duplicates", "none: no two images are the same bytes")
        return
    plan = split_of(job.config, index).heldout()
    held = np.concatenate([np.isin(np.arange(n), plan.rows(i)) for i, n in enumerate(index.sizes)])
    apart = int((held[pairs_read[equal]].sum(axis=1) == 1).sum())
    text = f"{counted(twice, 'image')} {'is' if twice == 1 else 'are'} there more than once, byte for byte"
    if apart:
        text += f"; {apart:,} of {int(equal.sum()):,} of them are trained on and held out"
    text += "".join(f"\n{line}" for line in _named(index, pairs_read[equal][:_NAMED]))
    if max(twice, apart) > index.num_samples / 1000:
        remedy = "Copies count double, and copies of held-out images flatter the score: remove them."
        yield warning("duplicates", text, remedy)
    else:
        yield ok("duplicates", text)


def _named(index: Index, pairs: NDArray[np.int64]) -> Iterator[str]:
    """What the images of pairs [n, 2] were made of, as far as `shardgan prepare` has recorded it."""
    places = [index.place(number) for number in pairs.reshape(-1).tolist()]
    keys = [index.table(shard).key(row) for shard, row in places]
    origins = read_origins(index.root, set(keys))
    urls = [index.shards[shard].url for shard, _ in places]
    names = [origins.get(key, f"{key} in {url}") for key, url in zip(keys, urls, strict=True)]
    yield from (f"{a} = {b}" for a, b in zip(names[::2], names[1::2], strict=True))


def _read(job: Job, index: Index, samples: NDArray[np.int64]) -> Iterator[Sample]:
    """Samples by number, in the order of shards and rows."""
    reader = Reader(index, job.config.data.window)
    try:
        for number in samples.tolist():
            yield reader.read(*index.place(number))
    finally:
        reader.close()


def _what(sample: Sample) -> str:
    """Size, colours and format of an image, without decoding it."""
    if "npy" in sample:
        return "npy arrays"
    try:
        with Image.open(io.BytesIO(image_of(sample)), formats=FORMATS) as image:
            colours = "grey" if is_grey(image) else image.mode
            return f"{image.width}x{image.height} {colours} {image.format}"
    except (OSError, ValueError, SyntaxError):
        return "not images"
