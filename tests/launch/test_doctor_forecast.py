"""What doctor forecasts of time and scaling, and the strategy that it chooses."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from doctored import GOOD, job
from rich.console import Console
from torch import nn

from launch.doctor import forecast, live, memory, networks
from launch.doctor.finding import Job, Machine
from launch.doctor.flops import Flops, of_training
from launch.doctor.forecast import Costs, Forecast
from pipeline.parallel import theory

FAST = Machine(flops=1e12, bandwidth=2e9, network=1e9, gpu_memory=2**34)


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)


def costs(asked: Job) -> Costs:
    return Costs(networks.build_players(asked, 0), Flops(3e9, 1e9), 2**20)


def found_of(asked: Job) -> dict[str, Forecast]:
    return {found.strategy: found for found in forecast.forecasts(asked, costs(asked))}


def text_of(asked: Job) -> str:
    (finding,) = forecast.examine(asked, forecast.forecasts(asked, costs(asked)))
    return finding.text


def test_an_update_is_its_compute_and_its_traffic_over_the_slowest_link() -> None:
    asked = replace(job("loss.D_steps=2", nodes=2), machine=FAST)
    G, D = (sum(p.numel() for p in player.parameters()) for player in costs(asked).players)
    compute = 10 * of_training(asked.config, 3e9, 1e9) / 1e12  # 2 turns x 20 images over 4 ranks
    update = theory.update_of(asked.config, 1)
    for strategy, found in found_of(asked).items():
        assert found.compute == pytest.approx(compute)
        sent = theory.sent(strategy, 4, G, D, update, 2 if strategy == "hsdp" else 4)
        over = theory.over_copies(strategy, 4, G, D, update, 2)  # from both ranks of a node
        within = (sent - over) / (2e9 if strategy == "hsdp" else 1e9)
        assert found.network == pytest.approx(within + 2 * over / 1e9)
        assert found.efficiency == pytest.approx(found.compute / (found.compute + found.network))
    here = found_of(replace(asked, nodes=1))["ddp"]
    assert here.network == pytest.approx(theory.sent("ddp", 2, G, D, update) / 2e9)
    assert 40 / float(here.seconds or 0) == pytest.approx(
        float(text_of(replace(asked, nodes=1)).split(";")[1].split()[0].replace(",", "")), rel=0.01
    )


def test_the_fastest_that_fits_is_chosen() -> None:
    """ddp, zero1 and zero2 send as much; sharded ones hold less."""
    asked = replace(job(procs=4), machine=FAST)
    found = found_of(asked)
    assert text_of(asked).startswith("ddp needs up to ") and "none that fits is faster" in text_of(asked)
    most = {name: each.held[1] for name, each in found.items() if each.held}
    assert most["zero2"] < most["ddp"]
    small = replace(asked, machine=replace(FAST, gpu_memory=round(most["zero2"] / 0.9)))
    assert text_of(small).startswith("zero1") and "ddp would take" not in text_of(small)
    slow = replace(small, strategy="fsdp2", machine=replace(small.machine, flops=1e18))
    assert text_of(slow).endswith("; fsdp2 would take 1.50 times as long")
    nowhere = replace(asked, machine=replace(FAST, gpu_memory=2**20))
    (finding,) = forecast.examine(nowhere, list(found.values()))
    assert finding.verdict == "warning" and "none is sure to fit into 1 MiB" in finding.text


def test_without_speeds_it_sends_least_and_options_are_named() -> None:
    asked = job(nodes=2)
    assert "none sends less" in text_of(asked)
    assert text_of(asked).endswith("For times: --tflops, --bandwidth, --network, or --live")
    assert all(each.seconds is None for each in found_of(asked).values())
    untraced = forecast.forecasts(asked, replace(costs(asked), activations=None))
    assert next(forecast.examine(asked, untraced)).text.startswith("ddp, if it fits: none sends less")
    within = replace(job(), machine=Machine(flops=1e12))
    assert text_of(within).endswith("For times: --bandwidth, or --live")
    one_each = replace(job(nodes=2, procs=1), machine=Machine(flops=1e12))
    assert text_of(one_each).endswith("For times: --network, or --live")
    assert "images/s" in text_of(replace(one_each, machine=Machine(flops=1e12, network=1e9)))
    alone = job(procs=1, strategy="single")
    assert not list(forecast.examine(alone, forecast.forecasts(alone, costs(alone))))
    assert "images/s: an update in" in text_of(replace(alone, machine=FAST))
    assert not forecast.forecasts(job(procs=3), costs(job(procs=3)))  # 20 images


def test_without_activations_a_strategy_whose_states_do_not_fit_is_left_out() -> None:
    asked = replace(job(procs=4), machine=FAST)
    untraced = replace(costs(asked), activations=None)
    least = {
        strategy: memory.at_least(memory.states(replace(asked, strategy=strategy), untraced.players))
        for strategy in ("ddp", "zero1")
    }
    small = replace(asked, machine=replace(FAST, gpu_memory=sum(least.values()) // 2))
    found = forecast.forecasts(small, untraced)
    assert [each.strategy for each in found if not each.possible] == ["ddp"]
    assert next(forecast.examine(small, found)).text.startswith("zero1, if it fits: none is faster")
    nowhere = replace(asked, machine=replace(FAST, gpu_memory=2**10))
    (finding,) = forecast.examine(nowhere, forecast.forecasts(nowhere, untraced))
    assert finding.verdict == "warning" and "none is sure to fit" in finding.text


def test_why_times_are_not_known_is_said_where_no_option_helps() -> None:
    for asked in (job(), replace(job(), machine=FAST)):
        found = forecast.forecasts(asked, replace(costs(asked), flops=None))
        (finding,) = forecast.examine(asked, found)
        assert finding.text.endswith(
            ". Times are not known, as the FLOPs of these networks cannot be counted"
        )


def test_hsdp_is_forecast_where_it_has_several_copies_to_share() -> None:
    assert "hsdp" in found_of(job(nodes=2)) and "hsdp" not in found_of(job(procs=4))
    assert "hsdp" not in found_of(job(nodes=4, procs=1))


def test_fsdp2_is_left_out_where_it_cannot_shard() -> None:
    G, D = networks.build_players(job(), 0)
    D.tied = nn.Module()
    D.tied.weight = next(D.parameters())
    found = forecast.forecasts(job(), Costs((G, D), None, None))
    assert [each.strategy for each in found if not each.possible] == ["fsdp2"]


def test_the_table_fits_a_narrow_terminal() -> None:
    asked = replace(job(nodes=2, procs=5), machine=FAST)
    table = forecast.table(asked, forecast.forecasts(asked, costs(asked)))
    assert table is not None
    console = Console(width=60, file=StringIO())
    console.print(table)
    lines = console.file.getvalue().splitlines()
    rows = [line for line in lines if line.split()[-1:] and line.split()[-1].endswith("%")]
    assert len(rows) == 6 and rows[0].startswith("→ ddp")
    assert all(len(line.rstrip()) <= 60 for line in lines)


def test_what_was_given_counts_and_the_rest_is_measured() -> None:
    said = {"world": 2, "seconds": {"4": 1e-4, "1000": 1e-6}}  # each sends 1000 bytes
    assert live.completed(Machine(), said, 5.0, several=True) == Machine(5.0, 1e9, 1e9)
    assert live.completed(Machine(), said, None, several=False) == Machine(None, pytest.approx(1e9), None)
    assert live.completed(FAST, said, 5.0, several=True) == FAST
    assert live.completed(Machine(), said | {"world": 1}, 5.0, several=False) == Machine(5.0)


def test_a_measured_step_has_all_lazy_penalties() -> None:
    asked = job("penalty.r1.gamma=1", "loss.D_steps=3")
    due = job("penalty.r1.gamma=1", "penalty.r1.interval=1").config
    said = {"images": 10, "step": 0.5}
    (finding,), rate = live.step(asked, Flops(3e9, 1e9), said)
    assert rate == pytest.approx(10 * of_training(due, 3e9, 1e9) / 0.5)
    assert "10 images in 500 ms" in finding.text
    (failed,), none = live.step(asked, Flops(3e9, 1e9), said | {"step": "out of memory"})
    assert none is None and "out of memory" in failed.text
    assert live.step(asked, Flops(3e9, 1e9), said | {"images": 0}) == ([], None)
    long = 1e12 / (10 * of_training(due, 1, 0)) * 1.1  # FLOPs of G
    assert [live._images(asked, Flops(G, 0), on_cpu=True) for G in (1.0, long)] == [10, 0]
    assert live._images(asked, Flops(long, 0), on_cpu=False) == 10 and live._images(asked, None, False) == 0
