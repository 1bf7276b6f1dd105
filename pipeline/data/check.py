"""What is looked at in the data before training: whether they can be trained on, and what is odd in them."""

from __future__ import annotations

from pipeline.config import Data, UserError
from pipeline.data.index import Index
from pipeline.data.reader import BadSampleError, Reader
from pipeline.data.samples import LABEL, REPAIR, counted, describe
from pipeline.data.stages import Decode, apply, load_stages

MOST_EMPTY_CLASSES = 100_000  # without an image, of which the networks have room for each
_CHECKED_SHARDS = 8
_TRIES = 16  # images of one shard
_NUMBER = "Number the classes from 0 without gaps, as `shardgan prepare SHARDS OUT` does"


def check_images(index: Index, data: Data) -> None:
    """Decode the first image of a few shards, so that what cannot be trained on is said before training.

    Raises UserError for stages that cannot be loaded or do not go with a cache, an image of another size than
    data.size or one that cannot be decoded (unless data.max_bad allows for some), too many samples that are
    passed over, if data.conditional labels that are missing or far apart, and too little room for shards of
    elsewhere, of which only one is fetched for this.
    """
    if data.stages and data.cache != "none":
        raise UserError("data.cache=ram keeps decoded images, so data.stages would see each only once.")
    if index.remote:
        index.remote.check_room([shard.filesize for shard in index.shards], data.window)
    remarks(index, data)
    _decode_some(index, data)


def remarks(index: Index, data: Data) -> list[str]:
    """What is odd in the data, but no reason not to start, a line each. Raises UserError for what is one."""
    labels = odd_labels(index, data.max_bad) if data.conditional else []
    return [
        *check_passed_over(index, data.max_bad),
        *(f"warning: {text}. {advice}" for text, advice in labels),
    ]


def check_passed_over(index: Index, max_bad: int) -> list[str]:
    """A line for each kind of sample that is not used. Raises UserError if they are too many.

    Samples whose image cannot be used are bad images, of which there may be `max_bad`; those without an image
    are no images, and may be half of all.
    """
    unusable, without = index.passed_over("unusable"), index.passed_over("without_image")
    if unusable.count > max_bad:
        raise UserError(
            f"{counted(unusable.count)} in {index.where} cannot be used, more than data.max_bad={max_bad}."
            f"{unusable.first} {REPAIR}"
        )
    if without.count > index.num_samples + unusable.count:
        raise UserError(
            f"{counted(without.count)} in {index.where} without an image, only {index.num_samples:,} with "
            f"one.{without.first} {REPAIR}"
        )
    return describe(without, unusable)


def odd_labels(index: Index, max_bad: int) -> list[tuple[str, str]]:
    """What is odd about the labels, and what to do about it. Raises UserError for what is too odd.

    A sample without a label is a bad one, of which there may be `max_bad`.
    """
    there = {label for shard in index.shards for label in shard.labels}
    if not there:
        raise UserError(f"data.conditional=true, but the shards in {index.where} have no labels (.cls).")
    found = []
    missing = {shard.url: shard.nsamples - sum(shard.labels.values()) for shard in index.shards}
    if count := sum(missing.values()):
        where = next(url for url, lacking in missing.items() if lacking)
        have = "has" if count == 1 else "have"
        text = f"{count:,} of the {counted(index.num_samples)} {have} no label, the first in shard {where}"
        if count > max_bad:
            raise UserError(
                f"data.conditional=true, but {text}: more than data.max_bad={max_bad}. A label is {LABEL}."
            )
        found.append((text, f"Others stand in for them. A label is {LABEL}."))
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


def _decode_some(index: Index, data: Data) -> None:
    filled = [i for i, shard in enumerate(index.shards) if shard.nsamples]
    chosen = filled[:1] if index.remote else filled[:: max(1, len(filled) // _CHECKED_SHARDS)]
    num_classes = index.num_classes if data.conditional else None
    reader, decoder = Reader(index, data.window), Decode(data.size, data.channels, num_classes)
    stages = load_stages(data.stages)
    bad: list[BadSampleError] = []
    good = 0
    try:
        for shard in chosen:
            for row in range(min(index.sizes[shard], _TRIES)):
                try:
                    decoder.one(apply(stages, reader.read(shard, row)))
                    good += 1
                    break
                except BadSampleError as error:  # one does not speak for the others
                    bad.append(error)
                    if len(bad) > data.max_bad:
                        raise bad[0] from None
    finally:
        reader.close()
    if not good:
        raise bad[0]
