"""A user's own webdataset stages, before decoding and around the plan."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from streams import BATCH, batches, data_of, named, open_all
from tiny_shards import SIZE, MakeShards, png, sample_of

from pipeline.config import Data, UserError
from pipeline.data.index import load_index
from pipeline.data.plan import Split
from pipeline.data.stages import Decode, PlannedSamples, load_stages
from pipeline.data.stream import (
    check_images,
    heldout_batches,
)

ROOT = Path(__file__).parents[2]


def test_a_users_stage_before_decoding(make_shards: MakeShards) -> None:
    index, plan = open_all(make_shards([20, 20], classes=3))
    black = png(np.zeros((SIZE, SIZE), np.uint8))

    def blacken(sample: dict) -> dict:
        assert set(sample) == {"__key__", "__url__", "png", "cls"} and sample["__url__"].startswith("s-000")
        return sample | {"png": black}

    for workers in (0, 1):
        stream = batches(index, plan, stages=named(webdataset.map(blacken)), workers=workers)
        assert not next(stream).images.any()
        stream.close()


STAGES = """
import io
import numpy, webdataset
from PIL import Image

def invert(sample):
    image = Image.fromarray(255 - numpy.asarray(Image.open(io.BytesIO(sample["png"]))))
    file = io.BytesIO()
    image.save(file, "PNG")
    return sample | {"png": file.getvalue()}

inverted = webdataset.map(invert)
few = webdataset.select(lambda sample: sample["__key__"].endswith("3"))
none = webdataset.select(lambda sample: False)

failing = webdataset.map(lambda sample: sample["nothing"])

def shuffled(samples):
    return webdataset.shuffle(5)(samples)

def twice(samples):
    for sample in samples:
        yield sample
        yield sample

def ending(samples):
    yield next(samples)

def named_anew(samples):
    for sample in samples:
        yield sample | {"__key__": "x"}

number = 5
"""


@pytest.fixture
def own_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of a user's, in the folder that a run is started in."""
    (tmp_path / "stages_of_mine.py").write_text(STAGES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stages_of_mine", raising=False)


def test_stages_by_name(own_stages: None, make_shards: MakeShards) -> None:
    """For training, for what is held out, and for the check before a run."""
    root = make_shards([20, 20], classes=3)
    index, plan = open_all(root, holdout=0.3)
    data = Data(str(root), size=SIZE, channels=1, stages=("stages_of_mine:inverted",))
    plain = next(batches(index, plan)).images
    for workers in (0, 2):
        stream = batches(index, plan, stages=data.stages, workers=workers)
        assert (next(stream).images == 255 - plain).all()
        stream.close()
    check_images(index, data)
    held = Split(index.sizes, 1, 2, 0.3).heldout()
    options: dict = {"batch": 4, "conditional": True}
    for (a, valid), (b, _) in zip(
        heldout_batches(index, held, data_of(), **options),
        heldout_batches(index, held, data, **options),
        strict=True,
    ):
        assert (a.labels == b.labels).all() and (a.images == 255 - b.images)[:valid].all()  # type: ignore[union-attr]


def test_a_stage_made_of_a_lambda_reaches_a_worker_that_is_not_forked(own_stages: None) -> None:
    """As they are not beside a GPU: it travels by its name."""
    (stage,) = load_stages(["stages_of_mine:few"])
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(sys.modules["stages_of_mine"].few)
    samples = "[{'__key__': key} for key in ('a2', 'a3')]"
    line = f"import pickle, sys; print(list(pickle.load(sys.stdin.buffer)({samples})))"
    ended = subprocess.run(
        [sys.executable, "-c", line],
        input=pickle.dumps(stage),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        check=True,
    )
    assert ended.stdout == b"[{'__key__': 'a3'}]\n"


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("few", r"^data.stages gave sample '.*3' where '.*' is due. .* as webdataset.map does.$"),
        ("shuffled", r"^data.stages gave sample .* where .* is due"),
        ("twice", r"^data.stages gave sample '(.*)' where None is due"),
        ("ending", r"^data.stages came to an end"),
        ("named_anew", r"^data.stages gave sample 'x'"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_stages_that_change_the_order(
    own_stages: None, make_shards: MakeShards, stage: str, message: str, workers: int
) -> None:
    """One message, and never a batch with the wrong samples."""
    index, plan = open_all(make_shards([20, 20]))
    stream = batches(index, plan, stages=(f"stages_of_mine:{stage}",), workers=workers)
    with pytest.raises(UserError, match=message):
        next(stream)
    check_images(index, Data(size=SIZE, channels=1, stages=("stages_of_mine:ending",)))  # right for one
    with pytest.raises(UserError, match="gave nothing for sample"):
        check_images(index, Data(size=SIZE, channels=1, stages=("stages_of_mine:none",)))


def test_stages_that_are_none(own_stages: None, make_shards: MakeShards) -> None:
    for name, reason in [
        ("stages_of_mine:nothing", "AttributeError: .*nothing"),
        ("nowhere.to.be:found", "ModuleNotFoundError: .*nowhere"),
        ("stages_of_mine", "AttributeError"),
        (":x", "ValueError"),
        ("stages_of_mine:number", "is not a stage"),
    ]:
        with pytest.raises(UserError, match=f"^data.stages: {name} .*{reason}"):
            load_stages([name])
    assert load_stages([]) == ()


def test_a_stage_that_fails_is_named_with_its_line(own_stages: None, make_shards: MakeShards) -> None:
    index = load_index(str(make_shards([4])))
    with pytest.raises(
        UserError, match=r"sample '0-0': KeyError: 'nothing' \(.*stages_of_mine.py, line \d+\)"
    ):
        check_images(index, Data(size=SIZE, channels=1, stages=("stages_of_mine:failing",)))


def test_stages_and_a_cache_do_not_go_together(make_shards: MakeShards) -> None:
    index, _ = open_all(make_shards([20]))
    data = Data(size=SIZE, channels=1, stages=("stages_of_mine:inverted",), cache="ram")
    with pytest.raises(UserError, match="would see each only once"):
        check_images(index, data)


def test_the_plan_in_a_users_own_pipeline(make_shards: MakeShards) -> None:
    index, plan = open_all(make_shards([20, 20], classes=3))
    pipeline = webdataset.DataPipeline(
        PlannedSamples(index, plan, 5, BATCH, 0, 1),
        webdataset.map(lambda sample: sample),
        Decode(data_of()),
        webdataset.batched(6),
    )
    images, labels = next(iter(pipeline))
    expected = [tuple(pair) for pair in plan.samples(5, 6).tolist()]
    assert [sample_of(image) for image in images] == expected
    assert list(labels) == [(shard + row) % 3 for shard, row in expected]
    decoded = webdataset.DataPipeline(PlannedSamples(index, plan, 0, BATCH, 0, 1), webdataset.decode("l8"))
    assert next(iter(decoded))["png"].shape == (SIZE, SIZE)
