"""Compiled players train as plain ones do, under every strategy; what cannot work is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from itertools import repeat
from types import SimpleNamespace

import compiled_pair
import pytest
import torch
import torch.distributed as dist
from launches import run
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile

from launch import selfcheck
from launch.slurm.jobs import Resources
from pipeline.config import UserError, load
from pipeline.data.stream import Batch
from pipeline.gan.networks import FAMILIES
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.compilation import Compilation, check_compilation, read_compilation
from pipeline.parallel.compiled import CompiledBlocks, compiled_parts, computing
from pipeline.parallel.launched import Launch
from pipeline.parallel.ranks import Ranks
from pipeline.players import build
from pipeline.run.stats import Stats
from pipeline.step import train_step

INDUCTOR = Compilation("inductor")
GRAPHS = Compilation("inductor", graphs=True)


@pytest.mark.parametrize("case", compiled_pair.CASES)
@pytest.mark.parametrize("name", compiled_pair.WHERE)
def test_compiled_players_train_as_plain_ones(launched, name, case):
    """aot_eager is all of torch.compile but the code that it writes."""
    _judge(json.loads((launched(name) / "compiled.json").read_text())[case], case)


@pytest.mark.long
@pytest.mark.parametrize("name", ["single-1", "ddp-2", "fsdp2-2", "zero1-2", "zero2-2"])
def test_inductors_code_trains_as_plain_code_does(tmp_path, monkeypatch, name):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    run(name, ["compiled_pair", str(tmp_path / "out.json"), "inductor"])
    for case, found in json.loads((tmp_path / "out.json").read_text()).items():
        _judge(found, case)


def _judge(found: dict, case: str) -> None:
    """Weights are the same but for rounding; parameters have their names; what is differentiated twice is not
    compiled; a compilation is part of no update."""
    assert found["worst"] <= selfcheck.tolerance("parameters")
    assert found["names"] == []
    # Of D's passes: the update, whether it is G's turn, and whether by compiled code.
    twice = {0, 2} if case == "r1-r2" else set()
    assert found["used"] == [
        [u, frozen, frozen or u not in twice] for u in range(3) for frozen in (False, True)
    ]
    assert found["said"] == ["compiling, False"]


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_compiled_without_breaks(family, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    sizes = ["data.size=32", "data.channels=1", "data.batch_size=4", "data.batch_gpu=2", "loss.kind=hinge"]
    keys = [f"{player}.{key}" for player in "GD" for key in (f"kind={family}", "width=8")]
    keys += ["G.outputs=1"] if family == "vit" else []
    config = load(None, ["data.train=none", *sizes, *keys, "penalty.r1.gamma=1", "penalty.r1.interval=2"])
    ranks = Ranks(Launch("single", "no", 0, 1, compilation=INDUCTOR), timedelta(seconds=60))
    gan, stats = build(config, ranks, batch_shape(config.data, 1)), Stats(ranks.device)
    images = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    before = [f.data.clone() for f in gan.D.fragments]
    for number in range(2):  # in the first, D's turn is not compiled
        train_step(gan, repeat(Batch(images, None)), 4 * number, stats)
    assert torch._dynamo.utils.counters["graph_break"] == {}
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 3
    assert all(f.data.isfinite().all() for f in gan.D.fragments)
    assert not all(torch.equal(f.data, b) for f, b in zip(gan.D.fragments, before, strict=True))


class Doubled(nn.Module):
    """A block that says which of its passes are traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.SiLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layers(x) + torch.compiler.is_compiling()


def test_torch_does_not_cut_blocks_where_ddps_messages_end(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    module = nn.Sequential(nn.Sequential(*[nn.Linear(600, 600) for _ in range(4)]))
    blocks = CompiledBlocks(module, Compilation(backend))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(module, bucket_cap_mb=1)  # of 1.4 MB each
        with computing(blocks):
            model(torch.ones(2, 600)).sum().backward()
    finally:
        dist.destroy_process_group()
    assert len(graphs) == 1


def test_a_block_computes_by_compiled_code_in_a_turn_and_only_there():
    module = nn.Sequential()
    module.blocks = nn.Sequential(Doubled(), nn.SiLU())
    names = [name for name, _ in module.named_parameters()]
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    blocks, x = CompiledBlocks(module, Compilation("eager")), torch.ones(3, 2)
    plain = module.blocks[0](x)
    with computing(blocks, None):
        compiled = module.blocks[0](x)
    torch.testing.assert_close(compiled, plain + 1)
    assert torch.equal(module.blocks[0](x), plain)
    assert [name for name, _ in module.named_parameters()] == names
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state.items())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, self.layers(x), x)


def test_compiled_attention_is_that_of_the_turn():
    """Plain products where a penalty differentiates twice, which may be so in the first update alone."""
    torch._dynamo.reset()
    module = nn.Sequential()
    module.blocks = nn.Sequential(Attention(), nn.SiLU(), Attention())
    blocks, x = CompiledBlocks(module, Compilation("aot_eager")), torch.randn(2, 2, 16, 8)

    def operations(twice: bool) -> set[str]:
        attention = sdpa_kernel(SDPBackend.MATH) if twice else nullcontext()
        with torch.no_grad(), attention, computing(blocks, plain_attention=twice):
            module.blocks(x)
            with profile() as seen:
                module.blocks(x)
        return {event.name for event in seen.events() if "flash" in event.name or "softmax" in event.name}

    plain = operations(True)
    assert plain and not any("flash" in name for name in plain)
    fused = operations(False)
    assert fused and all("flash" in name for name in fused)
    assert operations(True) == plain


def test_parts_that_are_compiled():
    """Blocks of several layers; without any, the whole network."""
    network = nn.Module()
    network.first, network.blocks = nn.Linear(2, 2), nn.Sequential(Doubled(), nn.Linear(2, 1), Doubled())
    assert compiled_parts(network) == [network.blocks[0], network.blocks[2]]
    assert compiled_parts(network.first) == [network.first]


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "max-autotune"}, None),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "default"}, INDUCTOR),
        ({"ACCELERATE_DYNAMO_BACKEND": "inductor", "ACCELERATE_DYNAMO_MODE": "reduce-overhead"}, GRAPHS),
    ],
)
def test_compilation_is_the_launchers(environment, found):
    assert read_compilation(environment) == found


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"BACKEND": "TVM"}, "--dynamo_backend tvm is not one of no, inductor"),
        ({"BACKEND": "INDUCTOR", "MODE": "max-autotune"}, "bits of an unbroken one"),
        ({"BACKEND": "INDUCTOR", "MODE": "fast"}, "--dynamo_mode fast is not one of default"),
        ({"BACKEND": "INDUCTOR", "USE_DYNAMIC": "True"}, "all shapes of a training are fixed"),
        ({"BACKEND": "AOT_EAGER", "MODE": "reduce-overhead"}, "CUDA graphs need --dynamo_backend inductor"),
    ],
)
def test_what_we_lack_is_refused(environment, message):
    with pytest.raises(UserError, match=message):
        read_compilation({f"ACCELERATE_DYNAMO_{name}": value for name, value in environment.items()})


@pytest.mark.parametrize(
    ("how", "strategy", "rounds", "gpu", "message"),
    [
        (GRAPHS, "single", 1, False, "need a GPU"),
        (GRAPHS, "fsdp2", 1, True, "weights that stay where they are: single, ddp, zero1, zero2"),
        (GRAPHS, "ddp", 2, True, "one round: leave out data.batch_gpu"),
    ],
)
def test_what_cuda_graphs_cannot_do_is_refused(how, strategy, rounds, gpu, message):
    with pytest.raises(UserError, match=message):
        check_compilation(how, strategy, rounds, gpu)


def test_zero3_is_refused():
    with pytest.raises(UserError, match="zero3 cannot be compiled"):
        check_compilation(INDUCTOR, "zero3", 1, on_gpu=False)
    with pytest.raises(UserError, match="zero3 cannot be compiled"):
        Resources(strategy="zero3", compiled=True)


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    check_compilation(None, "single", 1, on_gpu=False)
    check_compilation(Compilation("aot_eager"), "single", 1, on_gpu=False)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler, and there is no g\+\+ here"):
        check_compilation(INDUCTOR, "single", 1, on_gpu=False)
    with pytest.raises(UserError, match="needs a C compiler, and there is no gcc or clang here"):
        check_compilation(INDUCTOR, "single", 1, on_gpu=True)
    (tmp_path / "g++").touch(0o755)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(UserError, match=r"Python\.h"):
        check_compilation(INDUCTOR, "single", 1, on_gpu=False)


def test_cuda_graphs_begin_anew_with_every_turn(monkeypatch):
    """What they return stays until then, and gradients are cleared before it."""
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    blocks = [SimpleNamespace(used=False, graphs=graphs) for graphs in (True, True, False)]
    with computing(*blocks[:2]), computing(blocks[2]):
        assert [b.used for b in blocks] == [True] * 3 and len(marks) == 1
    assert not any(b.used for b in blocks)
