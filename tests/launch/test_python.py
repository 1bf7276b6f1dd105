"""`import shardgan`: the same as the commands, in a process of someone else's."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shardgan
import torch
from PIL import Image

from launch import processes
from pipeline.api import training
from pipeline.errors import RunError, UserError
from pipeline.run.session import Session

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "data.train": ROOT / "tests" / "assets" / "fashion-mnist-500",
    "run.total_kimg": 0.064,
    "run.tick_kimg": 0.032,
    "run.eval_kimg": 0.064,
    "data.batch_size": 32,
    "data.conditional": True,
    "G.width": 8,
    "D.width": 8,
    "score.images": 20,
    "track.wandb": False,
    "optim.G.betas": [0.0, 0.9],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("python")
    path = folder / "tiny.yaml"
    path.write_text(f"run: {{out: {folder}}}\ndata: {{size: 28, channels: 1, workers: 1}}\n")
    return path


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    """Trained as a notebook might: in a thread, while an event loop runs."""

    async def cell() -> Path:
        return await asyncio.to_thread(shardgan.train, config, SETTINGS)

    return asyncio.run(cell())


def test_train_returns_the_run_folder_of_these_settings(config: Path, run: Path) -> None:
    assert run == config.parent / "tiny" and (run / "DONE").read_text() == "64\n"
    assert shardgan.train(config, SETTINGS) == run  # finished: nothing to do
    with pytest.raises(UserError, match=r"holds a run with other settings:\n  optim.G.betas: \[0.0, 0.9\] →"):
        shardgan.train(config, SETTINGS | {"optim.G.betas": (0.5, 0.9)})


def test_load_gives_the_network_that_training_scored(run: Path) -> None:
    G = shardgan.load(run)
    z, c = torch.randn(3, G.z_dim), torch.tensor([0, 9, 4])
    images = G(z, c)
    assert images.shape == (3, 1, 28, 28) and images.abs().max() <= 1 and not images.requires_grad
    assert torch.equal(images, G.network(z, c).clamp(-1, 1)) and not G.training
    assert (G.cur_nimg, G.classes[9]) == (64, "Ankle boot")
    with pytest.raises(ValueError, match=r"has 10 classes: call it as G\(z, c\)"):
        G(z)
    with pytest.raises(UserError, match="checkpoint"):
        shardgan.load(run, checkpoint=7)


def test_an_export_is_loaded_as_its_run_is(run: Path) -> None:
    G, exported = shardgan.load(run), shardgan.load(run / "export")
    assert (exported.classes, exported.cur_nimg) == (G.classes, G.cur_nimg)
    assert torch.equal(shardgan.sample(exported, range(8)), shardgan.sample(G, range(8)))
    with pytest.raises(UserError, match="is an export, which holds one checkpoint"):
        shardgan.load(run / "export", checkpoint="best")
    with pytest.raises(UserError, match=r"There is no .*nothing"):
        shardgan.load(run.parent / "nothing")


def test_sample_makes_an_image_of_each_seed(run: Path) -> None:
    G = shardgan.load(run, checkpoint="newest")
    images = shardgan.sample(G, range(8), classes="Bag")
    assert images.shape == (8, 1, 28, 28) and images.dtype == torch.uint8
    alone = shardgan.sample(G, [5], classes=8)
    assert (images[5].int() - alone[0].int()).abs().max() <= 1  # rounding
    z = torch.from_numpy(np.random.RandomState(5).randn(G.z_dim)).float()[None]
    mine = ((G(z, torch.tensor([8])) + 1) * 127.5).round().to(torch.uint8)
    assert (mine[0].int() - alone[0].int()).abs().max() <= 1
    with pytest.raises(UserError, match=r"^Truncation needs a G with a latent w"):
        shardgan.sample(G, [5], truncation=0.7)


def test_evaluate_gives_the_score_of_training(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(run.parent))
    environment = dict(os.environ)
    scores = shardgan.evaluate(f"~/{run.name}")
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert scores["kid_efflite0"] == pytest.approx(last["Metrics/kid_efflite0"], rel=1e-6)
    assert scores["efflite0_fake_images"] == 20 and environment == dict(os.environ)
    assert shardgan.evaluate(run, " kid ") == scores
    with pytest.raises(UserError, match="There is no metric 'kit'"):
        shardgan.evaluate(run, ["kit"])
    with pytest.raises(UserError, match=r"Which metrics\? There are kid, "):
        shardgan.evaluate(run, [])
    for name, count in (("images", 1), ("images", 0), ("train_images", 1), ("train_images", -2)):
        with pytest.raises(UserError, match=rf"^{name}={count}: scores compare at least 2 images\."):
            shardgan.evaluate(run, **{name: count})


def test_a_second_training_leaves_this_process_as_it_was(config: Path, run: Path) -> None:
    environment, state = dict(os.environ), torch.get_rng_state()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    same = shardgan.train(config, SETTINGS | {"run.name": "same"})
    assert environment == dict(os.environ) and torch.equal(state, torch.get_rng_state())
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert losses(same) == losses(run) and len(losses(run)) == 2


def test_threads_that_draw_random_numbers_meanwhile_do_not_stop_the_data_workers(config: Path) -> None:
    """As cells of a notebook may: a worker forked while one of them held torch's generator never moved."""
    over = threading.Event()

    def draw() -> None:
        while not over.is_set():
            torch.randn(1_000_000)

    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        run = shardgan.train(config, SETTINGS | {"run.name": "beside"})
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert (run / "DONE").exists() and len(losses(run)) == 2


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["Loss/G/loss"] for row in rows if "Loss/G/loss" in row]


def test_a_signal_is_raised_again_once_the_run_is_saved(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tick = Session.tick

    def interrupted(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        tick(*arguments)

    monkeypatch.setattr(Session, "tick", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shardgan.train(config, SETTINGS | {"run.name": "stopped", "run.total_kimg": 1000})
    stopped = config.parent / "stopped"
    assert (stopped / "STOPPED").exists() and list((stopped / "checkpoints").glob("[0-9]*"))
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    monkeypatch.setattr(Session, "tick", lambda *of: (signal.raise_signal(signal.SIGTERM), tick(*of)))
    try:
        shardgan.train(config, SETTINGS | {"run.name": "ended", "run.total_kimg": 1000})
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM] and (config.parent / "ended" / "STOPPED").exists()


def test_several_processes_print_here(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shardgan.train(config, SETTINGS | {"run.name": "two", "run.resume": False}, procs=2)
    out = capsys.readouterr().out
    assert run == config.parent / "two" and (run / "DONE").exists()
    assert "ddp on 2 x cpu" in out and f"Finished at kimg 0.064: {run}" in out


@pytest.mark.parametrize("procs", [1, 2])
def test_errors_are_raised_not_shown(config: Path, procs: int, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"data.batch_size: Input should be greater than"):
        shardgan.train(config, {"data.batch_size": -1}, procs=procs)
    assert capfd.readouterr() == ("", "")


def test_settings_may_be_numbers_of_other_libraries(config: Path) -> None:
    wrong = {"data.batch_size": np.int64(-1), "penalty.l2": np.float32(0.5), "run.name": torch.tensor(7)}
    with pytest.raises(UserError, match=r"data.batch_size: Input should be greater than"):
        shardgan.train(config, wrong)
    with pytest.raises(UserError, match=r"array\(\[1, 2\]\) cannot be a setting"):
        shardgan.train(config, {"penalty.l2": np.array([1, 2])})


def test_texts_stay_texts_as_options_of_a_network(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose types nothing else tells; other settings are as they are."""

    def shown(_: str, overrides: list[str], **__: object) -> None:
        raise UserError(" ".join(overrides))

    monkeypatch.setattr(training, "training_of", shown)
    given = {"G.options.mode": "off", "G.options.n": 7, "D.options.p": Path("a"), "run.name": "007"}
    given |= {"G.options.low": -math.inf, "G.options.high": math.inf, "G.options.x": math.nan}
    shown_as = (
        'G.options.mode="off" G.options.n=7 D.options.p="a" run.name=007 G.options.low=-.inf '
        "G.options.high=.inf G.options.x=.nan"
    )
    with pytest.raises(UserError, match=f"^{re.escape(shown_as)}$"):
        training.train(config, given, 1, None, "no")


def test_features_that_there_are_not_are_refused_before_training(config: Path) -> None:
    settings = SETTINGS | {"run.name": "none", "score.features": "nowhere:Nope", "score.metrics": ["kid"]}
    with pytest.raises(UserError, match="features=nowhere:Nope cannot be imported"):
        shardgan.train(config, settings)
    assert not (config.parent / "none").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"procs": 0}, "procs=0: give a whole number, 1 or more"),
        ({"procs": 1.5}, "procs=1.5: give a whole number, 1 or more"),
        ({"settings": "penalty.l2=1"}, "settings='penalty.l2=1': give a dictionary"),
        ({"strategy": "zero4"}, "strategy=zero4: choose one of single, ddp, "),
        ({"mixed_precision": "fp8", "procs": 2}, "mixed_precision=fp8: choose one of no, bf16, fp16"),
    ],
)
def test_options_that_there_are_not_are_refused_in_words(config: Path, options: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        shardgan.train(config, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fit": "tile"}, "fit='tile': choose one of None, crop, pad, stretch."),
        ({"channels": 2}, "channels=2: choose one of None, 1, 3."),
        ({"classes": "x"}, "classes='x': choose one of top, path, none."),
        *(
            ({name: value}, f"{name}={value!r}: give a whole number from 1.")
            for name in ("size", "per_shard", "workers")
            for value in (0, -1, "28", 1.5)
        ),
    ],
)
def test_prepare_refuses_what_there_is_not_in_words(tmp_path: Path, options: Any, said: str) -> None:
    (tmp_path / "in").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "in" / "a.png")
    with pytest.raises(UserError) as refused:
        shardgan.prepare(tmp_path / "in", tmp_path / "out", **options)
    assert str(refused.value) == said and not (tmp_path / "out").exists()


def test_prepare_returns_where_the_shards_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "in").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "in" / "a.png")
    assert shardgan.prepare("~/in", "~/out") == tmp_path / "out" and (tmp_path / "out/index.json").exists()


def test_sample_wants_what_load_returns() -> None:
    with pytest.raises(TypeError, match=r"takes a G that shardgan\.load has loaded, not 'runs/photos'"):
        shardgan.sample("runs/photos", range(3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "raised"), [(2, UserError), (1, RunError), (130, KeyboardInterrupt), (0, None)]
)
def test_how_started_processes_end(
    status: int,
    raised: type[BaseException] | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = f"import sys; print('step'); print('error: a\\n  b', file=sys.stderr); sys.exit({status})"
    started = partial(processes.start, [sys.executable, "-uc", code])
    monkeypatch.setattr(
        processes, "start", lambda _command, *environment, **pipes: started(*environment, **pipes)
    )
    with pytest.raises(raised) if raised else nullcontext() as caught:
        training._command(["train"], 2)
    assert capsys.readouterr().out == "step\n"
    assert not issubclass(raised or int, UserError) or str(caught.value) == "a\n  b"


def test_ctrl_c_reaches_started_processes_which_save_first(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, lambda *_: (print('saved'), sys.exit(130)))\n"
        "print('begun')\n"
        "signal.pause()"
    )
    start, shown = processes.start, list[str]()
    child = [sys.executable, "-uc", code]
    monkeypatch.setattr(processes, "start", lambda _, *how, **pipes: start(child, *how, **pipes))

    def show(line: str, **_: object) -> None:
        shown.append(line)
        if line == "begun\n":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training, "print", show, raising=False)
    with pytest.raises(KeyboardInterrupt):
        training._command(["train"], 2)
    assert shown == ["begun\n", "saved\n"]


@pytest.mark.parametrize("name", ["pipeline", "pipeline.py", "random.py"])
def test_files_that_hide_ours_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("") if name.endswith(".py") else (tmp_path / name).mkdir()
    code = "import sys, shardgan\nassert 'torch' not in sys.modules\nshardgan.train('x.yaml')"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: {tmp_path / name} hides the module `{name.removesuffix('.py')}`")
