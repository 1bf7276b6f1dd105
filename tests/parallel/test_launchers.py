"""What launchers may say: strategies recognised, set-ups refused that would quietly train something else."""

from __future__ import annotations

import json
from types import SimpleNamespace

import mutant
import pytest
from launches import run

from launch import selfcheck
from launch.selfcheck import parity
from pipeline.config import Optimizer, UserError
from pipeline.parallel import environment as joining
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.launched import read_launch
from pipeline.parallel.zero_settings import deepspeed_config

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2", "RANK": "0"}


def with_file(tmp_path, **settings):
    """The environment of a launcher with a DeepSpeed JSON config."""
    settings.setdefault("zero_optimization", {"stage": 2})
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
    return DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "deepspeed.json")}


@pytest.mark.parametrize(
    ("environment", "strategy"),
    [
        ({}, "single"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "ddp"),
        (FSDP2 | {"WORLD_SIZE": "2"}, "fsdp2"),
        (FSDP2 | {"WORLD_SIZE": "2", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "hsdp"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero1"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
        ({"WORLD_SIZE": "", "RANK": "", "LOCAL_WORLD_SIZE": "", "MASTER_PORT": ""}, "single"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "1", "RANK": "0"}, "single"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}, "ddp"),
    ],
)
def test_the_strategy_is_the_launchers(environment, strategy):
    assert read_launch(environment).strategy == strategy


def of_16(per_node, **sizes):
    """The environment of hsdp on 16 processes. sizes: of Accelerate's parallelism settings."""
    given = {f"PARALLELISM_CONFIG_{name}_SIZE": str(size) for name, size in sizes.items()}
    place = {
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": str(per_node),
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    }
    return FSDP2 | place | given


@pytest.mark.parametrize(
    ("environment", "shards"),
    [
        (of_16(8), 8),  # a copy on each node
        (of_16(16), 16),  # one node
        (of_16(8, DP_SHARD=4), 4),
        (of_16(4, DP_SHARD=8, DP_REPLICATE=2), 8),
        (of_16(8, DP_REPLICATE=8), 2),
        (of_16(1, DP_SHARD=4), 4),
    ],
)
def test_a_copy_is_shared_by_a_nodes_ranks_or_as_many_as_accelerate_is_told(environment, shards):
    assert read_launch(environment).shards == shards


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (of_16(8, DP_SHARD=3), "16 processes, 8 on a node, .* parallelism_config_dp_shard_size: 3"),
        (of_16(8, DP_REPLICATE=5), "parallelism_config_dp_replicate_size: 5"),
        (of_16(8, DP_SHARD=4, DP_REPLICATE=2), "dp_shard_size: 4 and .*dp_replicate_size: 2"),
        (of_16(8, DP_SHARD=32), "dp_shard_size: 32"),
        (of_16(7), "16 processes, 7 on a node, cannot be divided by equal nodes"),
        (of_16(1), "one process per node has nothing to share. Use ddp"),
        (of_16(8, DP_REPLICATE=16), "nothing to share"),
        (of_16(8, TP=2), "parallelism_config_tp_size"),
        (of_16(8, CP=2), "parallelism_config_cp_size"),
    ],
)
def test_copies_that_do_not_make_up_the_world_are_refused(environment, message):
    with pytest.raises(UserError, match=message):
        read_launch(environment)


def test_gloo_is_told_the_way_where_a_name_leads_to_this_machine_alone(monkeypatch):
    """As Debian's /etc/hosts has it, also for the main rank's own."""
    sources = {"10.0.0.1": "10.0.0.5", "main": "127.0.0.1", joining._ELSEWHERE: "10.0.0.5"}
    cards = {"lo": ["127.0.0.1"], "eth0": ["172.17.0.2", "fe80::1%eth0"], "ib0": ["10.0.0.5"]}
    found = {name: [SimpleNamespace(address=a) for a in addresses] for name, addresses in cards.items()}
    own: list[str] = []
    monkeypatch.setattr(joining, "_addresses", lambda _: own)
    monkeypatch.setattr(joining, "_source", sources.get)
    monkeypatch.setattr(joining.psutil, "net_if_addrs", lambda: found)

    def settled(**variables: str) -> str | None:
        joining.settle_gloo(variables)
        return variables.get("GLOO_SOCKET_IFNAME")

    for address in (None, "127.0.1.1", "::1"):
        own += [address] if address else []
        assert settled(MASTER_ADDR="10.0.0.1") == settled(MASTER_ADDR="main") == "ib0"
        assert settled(MASTER_ADDR="main", GLOO_SOCKET_IFNAME="eth0") == "eth0"
    sources.clear()
    assert settled(MASTER_ADDR="main") is None
    sources["main"] = "10.0.0.5"
    own.append("10.0.0.5")
    assert settled(MASTER_ADDR="main") is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MASTER_PORT": "29500"}, "distributed_type: NO"),
        ({"RANK": "abc"}, "RANK=abc is not a whole number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2 is not a whole number"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "first"}, "LOCAL_RANK=first"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 and WORLD_SIZE=2 do not go together"),
        ({"RANK": "1"}, "RANK=1 and WORLD_SIZE=1 do not go together"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "4", "RANK": "0"}, "another launcher"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "perhaps"}, "ACCELERATE_USE_FSDP=perhaps"),
        ({"WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "nowhere0"}, "no such interface, but lo"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "fp8"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 2"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "ddp.yaml"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "offload_optimizer to nvme"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "/nowhere.json"}, "/nowhere.json cannot be read"),
    ],
)
def test_what_would_train_something_else_is_refused(environment, message):
    with pytest.raises(UserError, match=message):
        read_launch(environment)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, "ddp.yaml"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param to cpu"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "optimizer to nvme"),
        ({"optimizer": {"type": "Adam"}}, "optim.G"),
    ],
)
def test_a_deepspeed_file_that_cannot_be_followed_is_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        read_launch(with_file(tmp_path, **settings))


def completed(tmp_path, **settings):
    zero = read_launch(with_file(tmp_path, **settings)).zero
    return deepspeed_config(zero, "no", Optimizer(clip=0.5), BatchShape(world=2, rounds=3, images=4), 1000)


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("train_batch_size", 12, 24),
        ("train_micro_batch_size_per_gpu", 6, 4),
        ("gradient_accumulation_steps", 1, 3),
        ("gradient_clipping", 1.0, 0.5),
        ("bf16", {"enabled": True}, {"enabled": False}),
        ("fp16", {"enabled": True}, {"enabled": False}),
    ],
)
def test_numbers_in_a_deepspeed_file_may_be_ours_or_auto_and_nothing_else(tmp_path, key, wrong, right):
    auto = {"enabled": "auto"} if isinstance(right, dict) else "auto"
    assert completed(tmp_path, **{key: right}) == completed(tmp_path, **{key: auto})
    with pytest.raises(UserError, match=key):
        completed(tmp_path, **{key: wrong})


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.long)])
def test_optimizer_state_on_the_cpu_changes_nothing_and_nothing_is_compiled(tmp_path, monkeypatch, stage):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    file = tmp_path / "offload.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    run(f"zero{stage}-2", ["mutant", str(tmp_path)], deepspeed=file)
    cases = {case.name: case for case in parity.cases()}
    for name in mutant.CASES:
        found = selfcheck.differences(
            selfcheck.read(tmp_path / "none", name), selfcheck.expected(cases[name])
        )
        assert [(what, error) for column, what, error in found if error > selfcheck.tolerance(column)] == []
    # A layer moves in an update that it takes part in, and not in the two after it.
    assert json.loads((tmp_path / "idle.json").read_text()) == [True, False, False]
    assert not (tmp_path / "extensions").exists()
