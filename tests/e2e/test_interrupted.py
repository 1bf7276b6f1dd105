"""Stopped anywhere and continued by the same command, a run ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from launching import (
    ADAM,
    BATCH,
    FASHION,
    UPDATES,
    Ended,
    RunFolder,
    Started,
    accelerate,
    fashion_images,
    identical,
    largest_difference,
    rows_written,
    run,
    shardgan,
    train,
    without_clocks,
)
from PIL import Image
from wandb_offline import OfflineRun, offline_runs

import pipeline.train
from launch.evaluate import evaluate
from launch.export import export
from launch.prepare import prepare
from launch.sample import sample

TICK, EPOCH = 120, 450  # images
KEY = "0123456789abcdef0123456789abcdef01234567"  # made up: as long as a real one
MINE = "networks_of_mine"


@dataclass(frozen=True)
class Interrupted:
    """A run that was stopped once and continued."""

    stopped: Ended
    stopped_at: int
    was_done: bool
    continued: Ended
    run: RunFolder
    command: list[str]


def call(command: click.Command, *arguments: object) -> str:
    """One of our commands, in this process."""
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def latent_of(image: np.ndarray) -> np.ndarray:
    """float16 [4, 14, 14], of which MINE:Decoder makes the image uint8 [28, 28] again."""
    squares = image.reshape(14, 2, 14, 2).transpose(1, 3, 0, 2)
    return (squares.reshape(4, 14, 14) / 127.5 - 1).astype(np.float16)


def interrupt(
    command: list[str], folder: Path, signal: str = "ctrl_c", cwd: Path | None = None, **environment: str
) -> Interrupted:
    """Stop the command as soon as its first row is there (it is then at work on the next), start it again."""
    cwd = cwd or folder.parent
    started = Started(command, cwd, **environment).until(rows_written(folder, 2))
    stopped = getattr(started, signal)()
    found = RunFolder(folder)
    stopped_at, was_done = found.stopped_at, found.done
    return Interrupted(stopped, stopped_at, was_done, run(command, cwd, **environment), found, command)


@pytest.fixture(scope="module")
def of_one(worlds, in_pairs) -> dict[str, Interrupted]:
    """adam.yaml in one process: by Ctrl-C (tracked by W&B, offline), and by SIGTERM."""

    def start(signal: str, *settings: str, **environment: str) -> Interrupted:
        out = worlds.folder / signal
        line = [
            str(worlds.folder / "adam.yaml"),
            "--procs",
            "1",
            f"run.out={out}",
            "run.name=adam-1",
            *settings,
        ]
        return interrupt(shardgan("train", *line), out / "adam-1", signal, **environment)

    jobs = [
        in_pairs.submit(start, "ctrl_c", "track.wandb=true", "track.tags=[e2e]", WANDB_API_KEY=KEY),
        in_pairs.submit(start, "terminate"),
    ]
    return {"ctrl_c": jobs[0].result(), "terminate": jobs[1].result()}


@pytest.fixture(scope="module")
def of_two(worlds) -> Interrupted:
    out = worlds.folder / "two"
    line = [
        str(worlds.folder / "adam.yaml"),
        "--procs",
        "2",
        f"run.out={out}",
        "run.name=adam-2",
        "data.cache=ram",
    ]
    return interrupt(shardgan("train", *line), out / "adam-2")


@pytest.fixture(scope="module")
def of_three(tmp_path_factory, in_pairs) -> tuple[RunFolder, Interrupted]:
    """A user's own networks over three ranks, unbroken and interrupted, on latents that they have decoded."""
    folder = tmp_path_factory.mktemp("three")
    shutil.copy(Path(__file__).parent / f"{MINE}.py", folder)
    for label in range(10):
        (folder / "latents" / str(label)).mkdir(parents=True)
        for number, image in enumerate(fashion_images(label)):
            np.save(folder / "latents" / str(label) / f"{number}.npy", latent_of(image))
    call(prepare, folder / "latents", folder / "shards", "--per-shard", 100, "--workers", 1)
    latents = f"size: 14, channels: 4, decoder: '{MINE}:Decoder'"
    (folder / "mine.yaml").write_text(
        ADAM.replace(
            "{width: 8, norm: none, z_dim: 32}", f"{{kind: '{MINE}:Painter', options: {{width: 512}}}}"
        )
        .replace("{width: 8, norm: none}", f"{{kind: '{MINE}:Scaled', options: {{width: 400}}}}")
        .replace("colour, ", "")
        .replace(f"train: {FASHION}, size: 28, channels: 1", f"train: shards, {latents}")
        .replace("eval_kimg: 0.24", "eval_kimg: 0.6")
    )
    settings = ["run.total_kimg=0.6", "run.name=mine"]
    unbroken = accelerate(3, "mine.yaml", *settings, "run.out=unbroken")
    broken = shardgan("train", "mine.yaml", "--procs", "3", *settings, "run.out=broken")
    whole = in_pairs.submit(train, unbroken, folder / "unbroken" / "mine", folder)
    halves = interrupt(broken, folder / "broken" / "mine", cwd=folder)
    return whole.result(), halves


def assert_as_if_nothing_had_happened(unbroken: RunFolder, broken: Interrupted, status: int = 130) -> None:
    """status: of the command that was stopped, by Ctrl-C unless another is given."""
    assert broken.stopped.status == status, broken.stopped.output
    assert f"Resuming from kimg {broken.stopped_at / 1000:g} (" in broken.continued.output
    assert broken.stopped_at % TICK and broken.stopped_at % EPOCH, "not in mid-tick and mid-epoch"
    assert not broken.was_done and "the same command continues" in broken.stopped.output
    assert broken.continued.status == 0, broken.continued.output
    assert broken.run.done and not (broken.run.path / "STOPPED").exists()
    assert identical(broken.run.exported(), unbroken.exported())
    assert list(map(without_clocks, broken.run.rows)) == list(map(without_clocks, unbroken.rows))


@pytest.mark.parametrize(
    ("signal", "status", "name"), [("ctrl_c", 130, "SIGINT (Ctrl-C)"), ("terminate", 0, "SIGTERM")]
)
def test_one_process(worlds, of_one, signal, status, name):
    assert_as_if_nothing_had_happened(worlds.adam[1], of_one[signal], status)
    said = of_one[signal].stopped.output
    assert f" on {name}; the same command continues from there." in said


def test_two_processes(worlds, of_two):
    """Here with decoded images kept in memory, which changes nothing but the time it takes."""
    assert_as_if_nothing_had_happened(worlds.adam[2], of_two)
    line = "data.cache=ram: 500 decoded images, 387 KiB, are kept in memory, once per machine"
    assert of_two.stopped.output.count(line) == of_two.continued.output.count(line) == 1


def test_three_processes_with_several_gradient_buckets(of_three):
    """Over three ranks the order of summation shows, and DDP changes it when it regroups its buckets."""
    assert_as_if_nothing_had_happened(*of_three)


def test_a_users_own_networks_are_trained_and_exported(of_three):
    unbroken, _ = of_three
    exported = unbroken.exported()
    assert exported["G"]["layers.2.weight"].shape == (512, 512)
    assert exported["D"]["layers.1.weight"].shape == (400, 784)
    assert exported["D"]["scale"].shape == () and exported["D"]["scale"] != 1
    assert torch.equal(exported["D"]["ramp"], torch.linspace(0.5, 1.5, 14).expand(14, 14))
    sizes = [t.numel() * 4 for t in exported["G"].values()]
    assert sum(sizes) > 2 << 20 and all(t.isfinite().all() for t in exported["G_ema"].values())
    sys.path.insert(0, str(Path(__file__).parent))
    from networks_of_mine import Painter

    Painter(z_dim=128, size=14, channels=4, num_classes=0, width=512).load_state_dict(exported["G_ema"])


def test_latents_are_decoded_for_samples_and_scores(of_three, monkeypatch, tmp_path):
    """As the run did, `sample` and `evaluate` show and score images, which are twice as large as latents."""
    run = of_three[1].run
    monkeypatch.chdir(run.path.parents[1])
    shown = np.asarray(Image.open(run.path / "samples" / "reals.png"))
    firsts = [shown[2 : 2 + 56 : 2, 2 + 58 * i : 58 + 58 * i : 2] for i in range(8)]  # enlarged twice
    pixels = {image.tobytes() for label in range(10) for image in fashion_images(label)}
    assert all(first.tobytes() in pixels for first in firsts), "held-out latents are decoded to their images"
    assert "4 images after 0.6 kimg" in call(sample, run.path, "--out", tmp_path / "four.png", "--count", 4)
    assert np.asarray(Image.open(tmp_path / "four.png")).shape == (2 + 2 * 58, 2 + 2 * 58)
    call(evaluate, run.path)
    (entry,) = json.loads((run.path / "scores.json").read_text())
    assert entry["Metrics/kid_efflite0"] == pytest.approx(run.rows[-1]["Metrics/kid_efflite0"], abs=1e-5)
    assert json.loads((run.path / "reference.json").read_text())["heldout"]["pixels"].startswith(MINE)
    assert "decoder into images, networks_of_mine:Decoder, is not among these files" in call(
        export, run.path, "--out", tmp_path / "out"
    )


def test_the_comparison_can_fail(worlds, scratch):
    """Between one world and another there is rounding, and `identical` sees it."""
    assert not identical(worlds.adam[1].exported(), worlds.adam[2].exported())


# The commands after the end


def test_a_finished_run_is_left_alone(of_one, signals_kept, capfd):
    """The same command again, without a launcher as it is one process: exit status 0, and nothing changes."""
    folder = of_one["terminate"].run.path
    settings = [f"run.out={folder.parent}", "run.name=adam-1"]
    before = _contents(folder)
    assert pipeline.train.main([str(folder.parents[1] / "adam.yaml"), *settings]) == 0
    assert "Nothing to do; raise run.total_kimg" in capfd.readouterr().out
    assert _contents(folder) == before


def test_starting_over_makes_another_folder_and_leaves_the_first(worlds, signals_kept):
    """run.resume=false: NAME-2, trained from the start; not a byte of NAME changes."""
    first = worlds.sgd[1]
    before = _contents(first.path)
    settings = [f"run.name={first.path.name}", f"run.out={worlds.folder}", "run.resume=false"]
    assert pipeline.train.main([str(worlds.folder / "sgd.yaml"), *settings]) == 0
    second = RunFolder(first.path.with_name(f"{first.path.name}-2"))
    assert second.done and len(second.rows) == UPDATES
    assert largest_difference(second.exported(), first.exported()) <= 1e-6
    assert _contents(first.path) == before


def test_a_finished_run_goes_on_when_more_is_asked_for(worlds, signals_kept):
    """A larger run.total_kimg is a continuation, not another run."""
    copy = worlds.folder / "further"
    shutil.copytree(worlds.sgd[1].path, copy / "sgd-1")
    settings = ["run.name=sgd-1", f"run.out={copy}", "run.total_kimg=0.3"]
    assert pipeline.train.main([str(worlds.folder / "sgd.yaml"), *settings]) == 0
    longer = RunFolder(copy / "sgd-1")
    assert longer.done and len(longer.rows) == UPDATES + 5
    assert longer.rows[:UPDATES] == worlds.sgd[1].rows


def _contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# W&B


@pytest.fixture(scope="module")
def tracked(of_one) -> list[OfflineRun]:
    return offline_runs(of_one["ctrl_c"].run.path)


CHARTS = {
    *(f"Loss/{p}/{part}" for p in "GD" for part in ("loss", "adversarial", "l2_penalty")),
    *(f"{what}/{p}/norm" for p in "GD" for what in ("Weights", "Gradients")),
    *(f"Gradients/{p}/{part}" for p in "GD" for part in ("penalty", "penalty_share")),
    *("Loss/scores/real", "Loss/scores/fake", "Loss/scores/heldout", "Loss/signs/real"),
    *("Progress/kimg", "Progress/epoch", "Resources/peak_mem_gb"),
    *("Timing/sec_per_kimg", "Timing/img_per_sec", "Timing/data_wait_frac"),
}  # fmt: skip


def test_wandb_has_the_config_and_goes_on_as_one_run(tracked):
    first, second = tracked
    assert first.run_id and first.run_id == second.run_id
    assert first.project == "shardgan" and first.name == "adam-1" and first.tags == ["e2e"]
    for part in tracked:
        assert part.finished
        assert part.config["data"]["batch_size"] == BATCH
        assert part.config["penalty"]["D"] == {"l2": 0.002, "l1": 0.0, "on": "weights"}


def test_wandb_has_every_chart_and_picture_and_no_step_twice(tracked, of_one):
    history = [row for part in tracked for row in part.history]
    steps = [row["_step"] for row in history]
    assert steps == sorted(set(steps))
    charted = [{k: v for k, v in row.items() if "/" in k and not isinstance(v, dict)} for row in history]
    of_ticks = {step: row for step, row in zip(steps, charted, strict=True) if "Loss/G/loss" in row}
    written = {row["cur_nimg"]: row for row in of_one["ctrl_c"].run.rows}
    assert sorted(of_ticks) == sorted(nimg for nimg in written if nimg)
    for step, row in of_ticks.items():
        assert row.keys() >= CHARTS
        assert row == pytest.approx({k: v for k, v in written[step].items() if "/" in k})
    assert any("Metrics/kid_efflite0" in row for row in charted)
    pictures = {
        k: v for part in tracked for row in part.history for k, v in row.items() if isinstance(v, dict)
    }
    assert pictures.keys() == {"Samples/fakes", "Samples/reals", "Weights/spectra"}
    for part in tracked:
        for row in part.history:
            for value in (row[key] for key in pictures if key in row):
                assert (part.files / value["path"]).stat().st_size > 100


def test_the_key_of_wandb_is_nowhere(of_one):
    broken = of_one["ctrl_c"]
    assert KEY not in broken.stopped.output + broken.continued.output
    files = [p for p in broken.run.path.rglob("*") if p.is_file()]
    assert len(files) > 10
    assert [p for p in files if KEY.encode() in p.read_bytes()] == []


def test_what_differs_between_ticks_is_carried_over(of_one):
    """The row that spans the interruption is not empty of what came before it: it is the mean of the tick."""
    broken = of_one["ctrl_c"]
    spanning = next(row for row in broken.run.rows if row["cur_nimg"] > broken.stopped_at)
    assert torch.tensor(spanning["Loss/D/loss"]).isfinite()
