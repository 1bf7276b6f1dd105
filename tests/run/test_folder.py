"""A run is resumed with the settings it was trained with; how long, where and how fast may change."""

from __future__ import annotations

import pytest

from pipeline.config import UserError, dump, load
from pipeline.run.folder import check_same

SCHEDULED = ("run.burn_in_kimg=40", "optim.D.lr=[2e-4,5e-5]")
ADAPTIVE = ("augment.ops=[flip]", "augment.target=0.6")


def settings(*given):
    return load(None, ["data.train=x", *given])


def refusal(folder, began, asked):
    (folder / "config.yaml").write_text(dump(settings(*began)))
    try:
        check_same(settings(*asked), folder)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("began", "changed", "said"),
    [
        (SCHEDULED, ["run.burn_in_kimg=50"], "run.burn_in_kimg: 40.0 → 50.0"),
        ((), ["run.burn_in_kimg=50"], "run.burn_in_kimg: 0.0 → 50.0"),
        (SCHEDULED, ["optim.D.lr=2e-4"], "optim.D.lr: [0.0002, 5e-05] → 0.0002"),
        (ADAPTIVE, ["augment.speed_kimg=100"], "augment.speed_kimg: 500.0 → 100.0"),
        (ADAPTIVE, ["run.tick_kimg=1"], "run.tick_kimg: 4.0 → 1.0"),
        ((), ["augment.ops=[flip]", "augment.p=0.1"], "augment.ops: [] → ['flip']"),
        ((), ["penalty.r2.gamma=1"], "penalty.r2.gamma: 0.0 → 1.0"),
    ],
)
def test_what_is_trained_stays(tmp_path, began, changed, said):
    told = refusal(tmp_path, began, [*began, *changed])
    assert told is not None and f"  {said}\n" in told
    assert told.count("→") == 1 + (changed[0] == "augment.ops=[flip]")
    assert "another run.name" in told and "run.resume=false" in told


@pytest.mark.parametrize("began", [(), SCHEDULED, (*ADAPTIVE[:1], "augment.p=0.2")])
def test_how_long_and_how_often_may_change(tmp_path, began):
    free = [
        "run.tick_kimg=1",
        "run.total_kimg=7",
        "run.keep=9",
        "run.grace=1",
        "data.workers=3",
        "D.checkpoint=true",
    ]
    assert refusal(tmp_path, began, [*began, *free]) is None


def test_leaving_the_target_out_names_the_target_alone(tmp_path):
    told = refusal(tmp_path, ADAPTIVE, ["augment.ops=[flip]", "augment.p=0.2", "run.tick_kimg=4"])
    assert told is not None and "augment.target: 0.6 → None" in told and "tick_kimg" not in told
