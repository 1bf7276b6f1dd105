"""A run is resumed with the settings it was trained with; how long, where and how fast may change."""

from __future__ import annotations

import json

import pytest

from pipeline.config import UserError, dump, load
from pipeline.run import folder
from pipeline.run.folder import check_same, find_folder

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


SCORED = {"heldout": {"features": ["efflite0", "1"], "images": 700}, "train": {"images": 300}}


@pytest.mark.parametrize(
    ("began", "changed", "said"),
    [
        (["score.images=700"], ["score.images=500"], "score.images: 700 → 500"),
        (["score.images=700"], ["score.images=5000"], "score.images: 700 → 5,000"),
        (["score.images=900"], ["score.images=699"], "score.images: 900 → 699"),
        (["score.train_images=300"], ["score.train_images=200"], "score.train_images: 300 → 200"),
        ([], ["score.features=inception:x.pt"], "score.features: efflite0 → inception:x.pt"),
        ([], ["score.features=mine:Own"], "score.features: efflite0 → mine:Own"),
        (["score.images=900"], ["score.images=5000"], None),  # 700 are there
        (["score.images=700"], ["score.images=500", "score.metrics=[]"], None),
        (["score.images=700"], ["score.images=500", "run.new_data=true"], None),  # with scores of its own
        (["score.train_images=300"], ["score.train_images=0"], None),  # not compared with
    ],
)
def test_scores_compare_with_earlier_ones(tmp_path, began, changed, said):
    assert refusal(tmp_path, began, changed) is None  # no score yet
    (tmp_path / "reference.json").write_text(json.dumps(SCORED))
    told = refusal(tmp_path, began, changed)
    assert told is None if said is None else told is not None and f"  {said}\n" in told
    (tmp_path / "reference.json").write_text('{"heldout": {"images": "many", "features": 3}}')
    assert refusal(tmp_path, began, changed) is None, "damaged: the next score refuses it"


@pytest.mark.parametrize("began", [(), SCHEDULED, (*ADAPTIVE[:1], "augment.p=0.2")])
def test_how_long_and_how_often_may_change(tmp_path, began):
    free = [
        "run.tick_kimg=1",
        "run.total_kimg=7",
        "run.keep=9",
        "run.grace=1",
        "data.workers=3",
        "data.remote.gb=7",
        "D.checkpoint=true",
    ]
    assert refusal(tmp_path, began, [*began, *free]) is None


def test_leaving_the_target_out_names_the_target_alone(tmp_path):
    told = refusal(tmp_path, ADAPTIVE, ["augment.ops=[flip]", "augment.p=0.2", "run.tick_kimg=4"])
    assert told is not None and "augment.target: 0.6 → None" in told and "tick_kimg" not in told


def test_auto_goes_on_as_what_it_became(tmp_path):
    """config.yaml says what; an older one has one `on` for both players."""
    began = ["penalty.l2=1e-3", "penalty.G.on=effective", "penalty.D.on=weights"]
    assert refusal(tmp_path, began, began[:1]) is None
    assert refusal(tmp_path, began, ["penalty.l2=1e-3", "penalty.D.on=weights"]) is None
    found, _ = find_folder(
        settings(*began[:1], f"run.out={tmp_path.parent}", f"run.name={tmp_path.name}"), print
    )
    assert (found.penalty.G.on, found.penalty.D.on) == ("effective", "weights")
    told = refusal(tmp_path, began, ["penalty.l2=1e-3", "penalty.on=weights"])
    assert told is not None and "  penalty.G.on: 'effective' → 'weights'\n" in told and told.count("→") == 1


@pytest.mark.parametrize("left", ["", "data: {tra", "of: another"])
def test_a_config_that_no_run_wrote_is_named(tmp_path, left):
    (tmp_path / "config.yaml").write_text(left)
    with pytest.raises(UserError, match=f"^{tmp_path}/config.yaml does not hold the settings of a run: "):
        check_same(settings(), tmp_path)


def test_an_older_run_has_one_on_for_both_players(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {train: x}\npenalty: {on: all, G: {l2: 1.0, l1: 0.0}}\n")
    check_same(settings("penalty.G.l2=1"), tmp_path)
    with pytest.raises(UserError, match=r"penalty\.D\.on: 'all' → 'weights'"):
        check_same(settings("penalty.G.l2=1", "penalty.D.on=weights"), tmp_path)


def test_a_new_run_does_not_go_on_where_another_has_just_ended(tmp_path, monkeypatch):
    """An array of jobs with run.resume=false, one of which fails at once."""
    hold, ended = folder.take, []

    def ended_before(place, *args, **more):
        if not ended:
            ended.append(place)
            place.mkdir(parents=True)
            (place / "config.yaml").write_text(dump(settings()))
        return hold(place, *args, **more)

    monkeypatch.setattr(folder, "take", ended_before)
    asked = settings("run.name=x", f"run.out={tmp_path}", "run.resume=false")
    _, place, lock = folder.claim_folder(asked, lambda _: None, lambda: False)
    assert lock is not None and (ended, place) == ([tmp_path / "x"], tmp_path / "x-2")
    lock.release()


def test_a_selection_is_not_trained_in(tmp_path):
    """Both `select` and `train` call what they make after the config."""
    (tmp_path / "mine" / "trials").mkdir(parents=True)
    with pytest.raises(UserError, match=r"mine is a selection\. Give this run another run\.name\."):
        find_folder(settings(f"run.out={tmp_path}", "run.name=mine"), print)
    found, folder = find_folder(settings(f"run.out={tmp_path}", "run.name=mine", "run.resume=false"), print)
    assert folder.name == found.run.name == "mine-2"
