"""Event files, read back by TensorBoard's own reader."""

from __future__ import annotations

import io
import json
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from pipeline.config import Config, UserError, load
from pipeline.run import resume
from pipeline.run.grid import save_grid
from pipeline.run.report import MainReport
from pipeline.run.tensorboard import TensorBoard, check_tensorboard, record
from pipeline.run.tracker import Tracker


class Noting(Tracker):
    """Remembers what it is given."""

    tracks = True

    def __init__(self) -> None:
        super().__init__("abc")
        self.calls: list[object] = []

    def log(self, values, step, at=None):
        self.calls.append(step)

    def image(self, key, path, step, caption):
        self.calls.append(key)

    def finish(self, failed=False):
        self.calls.append("finish")


def start(folder: Path, cur_nimg: int, said: list[str], *others: Tracker) -> MainReport:
    return MainReport(folder, [*others, TensorBoard(folder, said.append)], 8000, cur_nimg)


def grid(folder: Path, report: MainReport, cur_nimg: int) -> bytes:
    path = folder / "samples" / f"fakes{cur_nimg // 1000:06d}.png"
    notes = {"chart": "Samples/fakes", "cur_nimg": str(cur_nimg)}
    save_grid(torch.full((4, 3, 8, 8), cur_nimg % 256, dtype=torch.uint8), path, 2, notes=notes)
    report.image("Samples/fakes", path, cur_nimg)
    return path.read_bytes()


def shown(folder: Path) -> EventAccumulator:
    """What TensorBoard shows of a run, all of it."""
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def test_every_step_is_there_once_after_a_kill(tmp_path):
    """Training continues from cur_nimg 2000 and repeats 3000, with other numbers to tell them apart."""
    said: list[str] = []
    killed = start(tmp_path, 0, said)  # never closed
    for nimg in (1000, 2000, 3000):
        killed.row(nimg, {"Loss/D/loss": nimg / 1e3})
        grid(tmp_path, killed, nimg)
    open_one = shown(tmp_path)
    assert [point.step for point in open_one.Scalars("Loss/D/loss")] == [1000, 2000, 3000]
    resumed = start(tmp_path, 2000, said)
    resumed.row(3000, {"Loss/D/loss": 7.0})
    content = grid(tmp_path, resumed, 3000)
    resumed.row(4000, {"Loss/D/loss": 8.0})
    resumed.close()
    after = shown(tmp_path)
    points = after.Scalars("Loss/D/loss")
    assert [(point.step, point.value) for point in points] == [(1000, 1), (2000, 2), (3000, 7), (4000, 8)]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [point.wall_time for point in points][:2] == [row["time"] for row in rows][:2], (
        "when it was trained"
    )
    pictures = after.Images("Samples/fakes")
    assert [picture.step for picture in pictures] == [1000, 2000, 3000]
    assert pictures[-1].encoded_image_string == content and pictures[-1].width == 118
    assert said == [f"TensorBoard: tensorboard --logdir {tmp_path}"] * 2
    open_one.Reload()  # a TensorBoard that was open all the time
    assert [(p.step, p.value) for p in open_one.Scalars("Loss/D/loss")] == [(p.step, p.value) for p in points]
    start(tmp_path, 4000, said).close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2, "files do not pile up"


@pytest.mark.parametrize("size", [0, 1, 12, 100_000])
def test_records_are_those_that_tensorboard_writes(size):
    data, theirs = torch.randint(256, (size,), dtype=torch.uint8).numpy().tobytes(), io.BytesIO()
    RecordWriter(theirs).write(data)
    assert b"".join(record(data)) == theirs.getvalue()


def test_it_is_complete_if_switched_on_late_and_w_and_b_gets_everything(tmp_path):
    early = MainReport(tmp_path, [], 8000, 0)
    early.row(1000, {"Loss/D/loss": 1.0})
    early.close()
    other = Noting()
    report = start(tmp_path, 1000, [], other)
    report.row(2000, {"Loss/D/loss": 2.0})
    grid(tmp_path, report, 2000)
    report.close()
    assert [point.step for point in shown(tmp_path).Scalars("Loss/D/loss")] == [1000, 2000]
    assert other.calls == [1000, 2000, "Samples/fakes", "finish"]


def test_a_finished_run_gets_its_file_too(tmp_path, monkeypatch, capsys):
    finished = MainReport(tmp_path, [], 8000, 0)
    finished.row(8000, {"Loss/D/loss": 1.0})
    grid(tmp_path, finished, 8000)
    finished.close()
    monkeypatch.setattr(resume, "finished", lambda *_: True)
    ranks = SimpleNamespace(broadcast_from_main=lambda call: call())
    for _ in range(2):  # the same command again
        config = load(None, ["data.train=x", "track.wandb=false", "track.tensorboard=true"])
        assert resume.is_finished(config, tmp_path, ranks)
        after = shown(tmp_path)
        assert [point.step for point in after.Scalars("Loss/D/loss")] == [8000]
        assert [picture.step for picture in after.Images("Samples/fakes")] == [8000]
    assert f"tensorboard --logdir {tmp_path}" in capsys.readouterr().out


def test_what_is_drawn_for_trackers_is_drawn_for_it_alone(tmp_path):
    (tmp_path / "samples").mkdir()
    drawn: list[Path] = []

    def draw() -> Path:
        drawn.append(tmp_path / "samples" / "spectra.png")
        save_grid(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), drawn[-1], 2)
        return drawn[-1]

    for report in (MainReport(tmp_path, [Tracker()], 8000, 0), start(tmp_path, 0, [], Tracker())):
        assert not drawn, "nothing is tracked"
        report.picture("Weights/spectra", draw, 1000)
        report.close()
    assert len(drawn) == 1 and [image.step for image in shown(tmp_path).Images("Weights/spectra")] == [1000]


def test_a_full_disk_ends_only_the_event_file(tmp_path, capsys):
    """With capsys, what is printed goes to memory, which the limit leaves alone."""
    said: list[str] = []
    other = Noting()
    report = start(tmp_path, 0, said, other)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        for step in range(200):
            report.row(step, {"Loss/D/loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    report.close()
    assert other.calls == [*range(200), "finish"]
    assert len(said) == 2 and "training continues without it: OSError" in said[1]
    assert 10 < len(shown(tmp_path).Scalars("Loss/D/loss")) < 200


def test_where_nothing_can_be_written_training_continues(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    said: list[str] = []
    tracker = TensorBoard(tmp_path, said.append)
    tracker.log({"a": 1.0}, 1)
    tracker.finish()
    assert len(said) == 1 and "FileExistsError" in said[0]


def test_without_the_package_it_is_refused_in_one_line(monkeypatch):
    check_tensorboard(load(None, ["data.train=x", "track.tensorboard=true"]))

    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(UserError, match=r"^track.tensorboard needs tensorboard: pip install 'shardgan\[tens"):
        check_tensorboard(load(None, ["data.train=x", "track.tensorboard=true"]))
    check_tensorboard(Config())
