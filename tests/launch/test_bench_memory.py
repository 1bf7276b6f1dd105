"""`shardgan bench memory` and `bench penalty`: what they count, what theory says, and one launch of each."""

from __future__ import annotations

import gc
import json
import subprocess

import pytest
import torch
from click.testing import CliRunner
from torch._subclasses.fake_tensor import FakeTensor

from launch.bench import bench, pair
from launch.bench import memory as bench_memory
from launch.bench.memory import held, in_theory
from launch.bench.meter import living, storages
from launch.bench.penalty import Clocked
from launch.doctor import memory as doctor_memory
from launch.doctor.finding import Job
from launch.doctor.networks import build_players
from pipeline.config import UserError, WeightPenalty, load
from pipeline.gan.frozen import sizes
from pipeline.gan.networks import build_D, build_G
from pipeline.gan.schedules import Rates
from pipeline.parallel import theory
from pipeline.parallel.fragments import Fragment
from pipeline.parallel.weight_penalty import LocalPenalty


def test_a_storage_counts_once_and_a_freed_one_not_at_all():
    whole = torch.zeros(10, 10)
    freed = torch.zeros(5)
    freed.untyped_storage().resize_(0)
    assert sum(storages([whole, whole[2:], whole.t(), freed]).values()) == 400
    assert not storages([torch.zeros(3, device="meta")])


def test_what_the_collector_has_frozen_is_alive_too():
    kept = torch.zeros(12345)
    gc.freeze()
    assert kept.data_ptr() in living()


def test_single_is_launched_once_and_the_others_in_every_world():
    assert pair.launches("single, ddp", [1, 3]) == [("single", 1), ("ddp", 1), ("ddp", 3)]
    with pytest.raises(UserError, match=r"zero4.*zero3"):
        pair.launches("zero4", [2])


def test_a_launch_that_fails_is_reported_by_its_error(monkeypatch):
    """However much launchers say after it."""
    said = "RuntimeError: out of memory\n" + "  at a frame\n" * 40
    ended = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(pair, "launch", lambda *_, **__: ended)
    with pytest.raises(UserError, match=r"^ddp on 2 processes failed \(1\):\nRuntimeError: out of memory$"):
        pair._measured("ddp", 2, ["x"], [])


def test_the_pair_is_as_large_as_asked_for():
    settings = load(None, pair.settings(2e5, 32, batch=6))
    for network in (build_G(settings, 0), build_D(settings, 0)):
        assert 2e5 <= sum(p.numel() for p in network.parameters()) < 1e6
    assert settings.data.batch_size == 6


def test_theory():
    """In units of one number per parameter, for players of equal size."""

    def per_rank(strategy, world, shards=None):
        job = strategy, world, 0.25, 0.25  # one byte each
        return tuple(theory.held(*job, shards=shards).values()), theory.sent(*job, shards=shards)

    assert per_rank("single", 1) == ((2, 4, 1, 1), 0)
    assert theory.held("ddp", 2, 0.25, 0.5, moments=(0, 1))["optimizer"] == 2
    assert per_rank("ddp", 2) == ((2, 4, 1, 2), 2)
    assert per_rank("zero2", 2) == ((3, 2, 0.5, 0.5), 2)
    assert per_rank("zero3", 2) == ((2, 2, 0.5, 1), 5.5)
    assert per_rank("fsdp2", 2) == ((3, 2, 0.5, 0.5), 3)
    assert per_rank("hsdp", 4, shards=2) == ((3, 2, 0.5, 0.5), 3 + 1)  # 2Ψ/2, and half of it twice
    assert per_rank("hsdp", 4, shards=4) == per_rank("fsdp2", 4)
    twice = theory.Update(D_steps=2)
    assert theory.over_copies("hsdp", 16, 0.25, 0.25, twice, shards=8) == 2 * 3 / 8 / 2


def test_theory_of_what_is_sent():
    """In units of one player; D has half as many parameters more that are frozen."""

    def sent(strategy, *settings, rounds=1, frozen=0.0):
        update = theory.update_of(load(None, ["data.train=x", *settings]), rounds, frozen)
        return theory.sent(strategy, 2, 0.5, 0.5, update)

    paired, r2 = "loss.kind=relativistic", "penalty.r2.gamma=1"
    path = ("penalty.path.weight=1", "penalty.path.interval=2")
    assert sent("zero3", r2) == 4 + 4 and sent("zero3", r2, paired) == 4 + 5
    assert sent("zero3", r2, "penalty.r2.interval=4", "penalty.r1.gamma=1") == 4 + 7 - 3 * (1 / 4)
    assert sent("zero3", r2, "penalty.r2.sigma=1", paired) == 4 + 9
    assert sent("zero3", *path) == 4 - 0.5 + 7 and sent("zero3", rounds=2) == 8 + 14
    assert sent("zero3", "loss.D_steps=2") == 5 + 2 * 5 + 2
    assert [sent(s, "loss.D_steps=2") for s in ("ddp", "zero1", "zero2", "fsdp2")] == [6, 6, 6, 4 + 5]
    assert [sent(s, rounds=2) for s in ("ddp", "zero1", "zero2", "fsdp2")] == [4, 4, 6, 6]
    assert [sent(s, frozen=0.25) for s in ("ddp", "zero2", "fsdp2", "zero3")] == [4, 4, 7, 14]


def test_theory_builds_no_network_in_memory(monkeypatch):
    built = []

    def build(*arguments):
        built.append(build_D(*arguments))
        return built[-1]

    monkeypatch.setattr(bench_memory, "build_D", build)
    job = {"strategy": "ddp", "world": 2, "shards": None, "parameters_G": 3, "parameters_D": 3}
    in_theory(job | {"settings": [pair.NO_CONFIG, *pair.settings(1e4, 32, batch=2)]})
    assert all(isinstance(p, FakeTensor) for p in built[0].parameters())


def test_a_clocked_penalty_is_the_penalty():
    weights = torch.randn(7, 5)
    fragments = [Fragment("w", 0, weights.shape, weights, penalised=True)]
    plain, clocked = (c.over(fragments, WeightPenalty(l2=0.1)) for c in (LocalPenalty, Clocked))
    gradients = [torch.ones(7, 5)], [torch.ones(7, 5)]
    now = Rates(2e-4, (0.5, 0.999), l2=0.1, l1=0.0)
    plain.add_gradient(gradients[0], now), clocked.add_gradient(gradients[1], now)
    assert torch.equal(gradients[0][0], gradients[1][0]) and plain.sums() == clocked.sums()
    assert len(clocked.seconds) == 2 and min(clocked.seconds) > 0


def run(*arguments: str) -> dict:
    ended = CliRunner().invoke(bench, list(arguments), catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return json.loads(next(line for line in ended.output.splitlines() if line.startswith("{")))


def test_fsdp2_holds_and_sends_what_it_should():
    """With gradient penalties no more than without."""
    penalties = [f"penalty.{name}.{key}=1" for name in ("r1", "r2") for key in ("gamma", "interval")]
    found = run("memory", "--strategies", "fsdp2", "--procs", "2", "--params", "3e5", *penalties)
    assert found["losses"]["Loss/D/r2_penalty"] > 0
    measured, (due, sent) = held(found), in_theory(found)
    for name in ("weights", "optimizer", "G_ema"):
        assert measured[name] == pytest.approx(due[name], rel=0.02), name
    assert sum(found["sent"].values()) == pytest.approx(sent, rel=0.02)
    job = Job(pair.config_of(found["settings"]), nodes=1, gpus=2, strategy="fsdp2", precision="no")
    forecast = doctor_memory.states(job, build_players(job, 0))
    assert forecast == {name: pytest.approx(size, rel=0.02) for name, size in measured.items()}


@pytest.mark.long
def test_frozen_layers_are_held_as_forecast():
    """The main rank, which is measured, has copies of them besides, for checkpoints and never on a GPU."""
    found = run("memory", "--strategies", "fsdp2", "--procs", "2", "--params", "3e5", "D.freeze=3")
    job = Job(pair.config_of(found["settings"]), nodes=1, gpus=2, strategy="fsdp2", precision="no")
    _, D = players = build_players(job, 0)
    forecast, copies = doctor_memory.states(job, players), 4 * sizes(D)[1]
    assert sum(held(found).values()) - copies == pytest.approx(sum(forecast.values()), rel=0.01)


@pytest.mark.long
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_a_hundredth_of_a_large_transformer_is_held_as_forecast(strategy, world, tmp_path):
    """GAT-XL/2's shape at width 240, depth 6: while a player steps, when buckets of stages 1 and 2 and what
    stage 3 had gathered are gone."""
    (tmp_path / "small.yaml").write_text("""
data: {train: none, size: 16, channels: 4, batch_size: 4}
G: {kind: vit, width: 240, depth: 6, heads: 4, patch: 2, outputs: 4}
D: {kind: vit, width: 240, depth: 6, heads: 4, patch: 2}
loss: {kind: relativistic}
penalty: {r1: {gamma: 1, interval: 1}, r2: {gamma: 1}}
score: {metrics: []}
""")
    asked = ("--config", str(tmp_path / "small.yaml"), "--procs", str(world))
    found = run("memory", "--strategies", strategy, *asked)
    job = Job(pair.config_of(found["settings"]), nodes=1, gpus=world, strategy=strategy, precision="no")
    forecast = doctor_memory.states(job, build_players(job, 0))
    passing = ("gathered, at most", *(["buckets"] if strategy in ("zero1", "zero2") else []))
    due = sum(size for name, size in forecast.items() if name not in passing)
    print(strategy, world, due / 2**20, sum(held(found).values()) / 2**20)
    assert sum(held(found).values()) == pytest.approx(due, rel=0.01)


def test_penalty_measures_a_step_and_the_ways_to_the_value():
    found = run("penalty", "--strategies", "single", "--params", "1e4", "--steps", "2", "--images", "2")
    assert found["step_without_s"] > 0 and found["value_ms"] > 0 and found["gathered_autograd_ms"] > 0
    assert 0 < found["share"] < 1
