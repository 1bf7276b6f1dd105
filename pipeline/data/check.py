"""Checks of the data before training: whether it can be trained on, and what is odd in it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Data, UserError
from pipeline.data.decode import BadImageError, WrongSizeError, decode, read_latent
from pipeline.data.index import Index
from pipeline.data.plan import Split
from pipeline.data.reader import BadSampleError, Reader, Sample, image_of
from pipeline.data.record import Shard
from pipeline.data.samples import LABEL, REPAIR, describe, image_extension
from pipeline.data.stages import Decode, apply, load_stages
from pipeline.wording import counted

MOST_EMPTY_CLASSES = 100_000  # without an image; the networks hold parameters for each
_CHECKED_SHARDS = 8
_TRIES = 16  # images of one shard
_COUNTED_SHARDS = 1000  # whose labels are compared
_UNLIKE = 0.2  # of the images would have to be of other classes, besides chance
SHUFFLE = "`shardgan prepare SHARDS OUT` shuffles them."
_NUMBER = "Number the classes from 0 without gaps, as `shardgan prepare SHARDS OUT` does"


def check_images(index: Index, data: Data) -> float:
    """Decode the first image of a few shards (of remote ones only one), and look at what the index says.

    Returns the largest absolute value of the latents among them, 0 for images. Raises UserError for stages
    that cannot be loaded or do not go with a cache, an image of another size than data.size or one that
    cannot be decoded (unless data.max_bad allows for some), a latent where images are due or an image where
    latents are, too many samples that are passed over, labels that are missing or far apart if
    data.conditional, and too little room for remote shards.
    """
    if data.stages and data.cache != "none":
        raise UserError(
            "data.cache=ram keeps decoded images, so data.stages would see each only once. Leave one of them "
            "out."
        )
    if index.remote:
        index.remote.check_room([shard.filesize for shard in index.shards], data.window)
    remarks(index, data)
    return _decode_some(index, data)


def remarks(index: Index, data: Data) -> list[str]:
    """A line for everything odd that training can start with. Raises UserError for the rest."""
    labels = odd_labels(index, data.max_bad) if data.conditional else []
    return [
        *check_passed_over(index, data.max_bad),
        *(f"warning: {text}. {advice}" for text, advice in labels),
    ]


def check_passed_over(index: Index, max_bad: int) -> list[str]:
    """A line for each kind of sample that is not used. Raises UserError if there are too many.

    At most `max_bad` samples may have an image that cannot be used; half of all may have no image.
    """
    unusable, without = index.passed_over("unusable"), index.passed_over("without_image")
    if unusable.count > max_bad:
        raise UserError(
            f"{counted(unusable.count, 'sample')} in {index.where} cannot be used, more than "
            f"data.max_bad={max_bad}.{unusable.first} {REPAIR}"
        )
    if without.count > index.num_samples + unusable.count:
        raise UserError(
            f"{counted(without.count, 'sample')} in {index.where} without an image, and only "
            f"{index.num_samples:,} with one.{without.first} {REPAIR}"
        )
    return describe(without, unusable)


def odd_labels(index: Index, max_bad: int) -> list[tuple[str, str]]:
    """What is odd about the labels, and what to do about it. Raises UserError if there are none, more than
    `max_bad` samples lack one, or too many classes are empty."""
    there = {label for shard in index.shards for label in shard.labels}
    if not there:
        raise UserError(
            f"data.conditional=true, but the shards in {index.where} have no labels. A label is {LABEL}."
        )
    found = []
    missing = {shard.url: shard.nsamples - sum(shard.labels.values()) for shard in index.shards}
    if count := sum(missing.values()):
        where = next(url for url, lacking in missing.items() if lacking)
        have, all_of_them = "has" if count == 1 else "have", counted(index.num_samples, "sample")
        text = f"{count:,} of the {all_of_them} {have} no label, the first in shard {where}"
        if count > max_bad:
            raise UserError(
                f"data.conditional=true, but {text}: more than data.max_bad={max_bad}. A label is {LABEL}."
            )
        found.append((text, f"They are replaced by others. A label is {LABEL}."))
    empty = index.num_classes - len(there)
    text = f"labels go up to {index.num_classes - 1:,}, but only {len(there):,} of these classes have images"
    if empty > MOST_EMPTY_CLASSES:
        raise UserError(
            f"data.conditional=true, but {text}, and G and D would hold parameters for each; at most "
            f"{MOST_EMPTY_CLASSES:,} may be empty. {_NUMBER}, or set data.conditional=false."
        )
    if empty > len(there):
        found.append((text, f"{_NUMBER}: G and D hold parameters for each."))
    return found


def unlike(index: Index, split: Split) -> str | None:
    """What to say where the held-out shards are of other classes than those trained on: scores then compare
    images of all classes with some. None if the shares of the classes differ no more than by chance."""
    if not split.by_shard:
        return None
    shares = [_shares(index.shards, np.flatnonzero((split.held > 0) == held)) for held in (False, True)]
    (trained, _), (held, count) = shares
    classes = trained.keys() | held.keys()
    if not count or not trained:
        return None
    apart = sum(abs(trained.get(c, 0) - held.get(c, 0)) for c in classes) / 2
    by_chance = sum(math.sqrt(trained.get(c, 0) / count) for c in classes) / 2
    if apart < by_chance + _UNLIKE:
        return None
    lacking = len(trained.keys() - held.keys())
    return (
        f"shards are sorted by class: {lacking:,} of {len(classes):,} classes are not held out, and scores "
        "compare with the others alone"
        if lacking
        else "classes have other shares in held-out shards than in those trained on, and scores compare both"
    )


def _shares(shards: Sequence[Shard], chosen: NDArray[np.int64]) -> tuple[dict[int, float], int]:
    """Share of each class in some shards, and how many labels there are. Of many shards some are counted."""
    counts = Counter[int]()
    for i in chosen[:: max(1, len(chosen) // _COUNTED_SHARDS)]:
        counts.update(shards[i].labels)
    total = counts.total()
    return {label: count / total for label, count in counts.items()}, total


def _decode_some(index: Index, data: Data) -> float:
    filled = [i for i, shard in enumerate(index.shards) if shard.nsamples]
    chosen = filled[:1] if index.remote else filled[:: max(1, len(filled) // _CHECKED_SHARDS)]
    num_classes = index.num_classes if data.conditional else None
    reader, decoder = Reader(index, data.window), Decode(data, num_classes)
    stages = load_stages(data.stages)
    bad: list[BadSampleError] = []
    found: list[float] = []
    try:
        for shard in chosen:
            for row in range(min(index.sizes[shard], _TRIES)):
                try:
                    sample = apply(stages, reader.read(shard, row))
                    refuse_other_kind(sample, data)
                    image, _ = decoder.one(sample)
                    found.append(float(np.abs(image).max()) if data.latents else 0.0)
                    break
                except BadSampleError as error:  # one does not speak for the others
                    bad.append(error)
                    if len(bad) > data.max_bad:
                        raise bad[0] from None
    finally:
        reader.close()
    if not found:
        raise bad[0]
    return max(found)


def refuse_other_kind(sample: Sample, data: Data) -> None:
    """Raises UserError for an image where latents are due, or a latent where images are: one speaks for the
    data set."""
    where = f"shard {sample.get('__url__')} sample {sample.get('__key__')}"
    is_array = str(image_extension(sample)).rpartition(".")[2] == "npy"
    if data.latents and not is_array:
        setting = f"data.channels={data.channels}" if data.decoder is None else f"data.decoder={data.decoder}"
        raise UserError(
            f"{where} is an image, and {setting} asks for latents (.npy). A run trains on one or the other; "
            "of a sample that has both, the image is read."
        )
    if data.latents or not is_array:
        return
    try:
        decode(image_of(sample), data.size, data.channels)
    except BadImageError:
        with suppress(BadImageError):
            channels, size, _ = read_latent(image_of(sample)).shape
            raise UserError(
                f"{where} is a latent of {channels} channels, not an image. To train on latents set "
                f"data.size={size}, data.channels={channels} and data.decoder=package.module:Class, your own "
                "nn.Module that makes images of them."
            ) from None
    except WrongSizeError:
        return
