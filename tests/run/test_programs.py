"""G_ema.pt2 and G_ema.onnx of every family, run by an interpreter that cannot import ShardGAN."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from pipeline.config import Config, UserError, load
from pipeline.gan.networks import build_G
from pipeline.run import programs
from pipeline.run.programs import CHECKED, UnfitError, inputs_of, record, write_onnx, write_pt2

ROOT = Path(__file__).parents[2]
SMALL = ["data.train=x", "data.size=32", "G.z_dim=8"]
FAMILIES = {
    "dcgan": ["G.width=8"],
    "resnet": ["G.width=8"],
    "r3gan": ["G.width=8", "G.max_width=16"],
    "stylegan2": ["G.width=8", "G.max_width=16", "G.mapping=2"],
    "vit": ["G.width=32", "G.depth=2", "G.outputs=2", "G.heads=2"],
}
VARIANTS = {
    "dcgan": ["G.norm=instance", "G.spectral_norm=true"],
    "resnet": ["G.norm=sync_batch", "G.spectral_norm=true", "G.dropout=0.5"],
    "r3gan": ["G.checkpoint=true"],
    "stylegan2": ["G.mixing=0.9", "G.checkpoint=true"],
    "vit": ["G.patch=4", "G.checkpoint=true"],
}
# As in a bare environment: no .pth files, so no editable install; torch, numpy and onnxruntime are found.
BARE = f"""
import importlib.util, json, os, sys
sys.path.append({sysconfig.get_paths()["purelib"]!r})
assert not any(importlib.util.find_spec(name) for name in ("pipeline", "launch", "shardgan"))
import numpy as np, torch
found = []
for folder in sys.argv[1:]:
    data = np.load(folder + "/due.npz")
    for n in sorted(int(key[1:]) for key in data if key[0] == "z"):
        given = {{key: data[f"{{key}}{{n}}"] for key in "zc" if f"{{key}}{{n}}" in data}}
        due = data[f"x{{n}}"]
        with torch.no_grad():
            G = torch.export.load(folder + "/G_ema.pt2").module()
            images = [G(*map(torch.from_numpy, given.values())).numpy()]
        if os.path.exists(folder + "/G_ema.onnx"):
            import onnxruntime
            images += onnxruntime.InferenceSession(folder + "/G_ema.onnx").run(None, given)
        assert all(x.shape == due.shape for x in images)
        largest = max(1, abs(due).max())
        found.append([folder, n, [float(abs(x - due).max() / largest) for x in images]])
print(json.dumps(found))
"""


def network(settings: list[str], num_classes: int) -> tuple[Config, nn.Module]:
    """A G with all weights and statistics away from their initial values, some of which are 0."""
    config = load(None, [*SMALL, *settings])
    G = build_G(config, num_classes).requires_grad_(False).eval()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, tensor in G.state_dict().items():
            if tensor.is_floating_point():
                change = 0.05 * torch.randn(tensor.shape)  # with more, tanh amplifies rounding
                tensor.add_(change.abs() if name.endswith("running_var") else change)
    return config, G


def write(folder: Path, settings: list[str], num_classes: int, with_onnx: bool) -> None:
    """Both programs, and what the module makes of their inputs."""
    config, G = network(settings, num_classes)
    folder.mkdir()
    draw = inputs_of(config.G.z_dim, num_classes)
    program = record(G, draw)
    write_pt2(program, G, draw, folder / "G_ema.pt2")
    if with_onnx:
        write_onnx(program, G, draw, folder / "G_ema.onnx")
    arrays = {}
    for n in CHECKED:
        inputs = draw(n)
        arrays |= {f"{key}{n}": t.numpy() for key, t in zip("zc", inputs, strict=False)}
        arrays[f"x{n}"] = G(*inputs).numpy()
    np.savez(folder / "due.npz", **arrays)


def run_bare(*folders: Path) -> dict[tuple[str, int], list[float]]:
    """Differences from the module, in units of its largest value if that exceeds 1, by folder and number of
    images: of the .pt2 and, if it is there, of the .onnx."""
    line = [sys.executable, "-I", "-S", "-c", BARE, *map(str, folders)]
    ended = subprocess.run(line, capture_output=True, text=True, check=True)
    found = json.loads(ended.stdout.splitlines()[-1])
    return {(Path(folder).name, n): differences for folder, n, differences in found}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A conditional G of each family; one of them in ONNX too."""
    folder = tmp_path_factory.mktemp("programs")
    for family, settings in FAMILIES.items():
        write(folder / family, [f"G.kind={family}", *settings], num_classes=3, with_onnx=family == "dcgan")
    return folder


def test_programs_of_every_family_are_the_module_where_shardgan_is_not_installed(exported):
    found = run_bare(*(exported / family for family in FAMILIES))
    assert found.keys() == {(family, n) for family in FAMILIES for n in (1, 7)}
    for (family, _), differences in found.items():
        assert len(differences) == 1 + (family == "dcgan")
        assert max(differences) < 1e-5, (family, differences)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_of_every_family_with_and_without_classes_and_all_options(tmp_path, family):
    plain = [f"G.kind={family}", *FAMILIES[family]]
    write(tmp_path / "plain", plain, 0, with_onnx=True)
    write(tmp_path / "conditional", plain, 3, with_onnx=True)
    write(tmp_path / "varied", [*plain, *VARIANTS[family]], 0, with_onnx=True)
    found = run_bare(*(tmp_path / name for name in ("plain", "conditional", "varied")))
    assert len(found) == 6
    for differences in found.values():
        assert len(differences) == 2 and max(differences) < 1e-5, found


@pytest.mark.parametrize("family", ["stylegan2", "vit"])
def test_a_program_moves_to_another_device(exported, family):
    """meta stands for a GPU: an operation on tensors of two devices fails there too."""
    G = torch.export.load(exported / family / "G_ema.pt2").module().to("meta")
    z, c = torch.empty(4, 8, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    assert G(z, c).device.type == "meta" and G(z, c).shape == (4, 3, 32, 32)


def test_a_program_computes_no_constants_and_names_no_files_of_this_machine(exported):
    program = torch.export.load(exported / "stylegan2" / "G_ema.pt2")
    assert not any("erfinv" in str(node.target) for node in program.graph.nodes)  # the noise is there already
    for family in FAMILIES:
        with zipfile.ZipFile(exported / family / "G_ema.pt2") as file:
            assert not any(b"pipeline/" in file.read(name) for name in file.namelist())
    written = exported / "dcgan" / "G_ema.onnx"
    assert b"pipeline/" not in written.read_bytes()
    axis = onnx.load(written).graph.input[0].type.tensor_type.shape.dim[0]
    assert axis.dim_param == "batch"


class Mine(nn.Module):
    """A user's G, whose forward requires c."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12)

    def forward(self, z, c):
        return self.linear(z).view(z.shape[0], 3, 2, 2)


class OfOneBatch(Mine):
    def forward(self, z, c):
        return self.linear(z).view(len(z), 3, 2, 2)


class Branching(Mine):
    def forward(self, z, c):
        return super().forward(z if z.sum() > 0 else -z, c)


class Noisy(Mine):
    def forward(self, z, c):
        return super().forward(z + torch.randn_like(z), c)


class WithoutGradients(Mine):
    """torch.export makes a graph of its own of what is in the block."""

    def forward(self, z, c):
        with torch.no_grad():
            z = z * 2
        return super().forward(z, c)


class Counting(Mine):
    """Its images depend on how often it was called."""

    calls = 0

    def forward(self, z, c):
        self.calls += 1
        return super().forward(z, c) + self.calls


DRAW = inputs_of(8, 0)


def mine(of: type[Mine]) -> nn.Module:
    return of().requires_grad_(False).eval()


@pytest.mark.parametrize("of", [Mine, Noisy, WithoutGradients])
def test_a_users_network_is_exported_and_its_file_is_not_named(tmp_path, of):
    G = mine(of)
    write_pt2(record(G, DRAW), G, DRAW, tmp_path / "G.pt2")
    with zipfile.ZipFile(tmp_path / "G.pt2") as file:
        assert not any(b"test_programs.py" in file.read(name) for name in file.namelist())


@pytest.mark.parametrize("of", [OfOneBatch, Branching])
def test_what_cannot_be_recorded_is_one_line(of):
    with pytest.raises(UnfitError, match=r"torch\.export cannot follow it: \w+: ") as caught:
        record(mine(of), DRAW)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("old", "new"), [(None, "ieee"), (False, None), (False, "tf32")])
def test_a_network_is_recorded_however_tf32_is_switched_on_or_off(old, new):
    cudnn = torch.backends.cudnn
    try:
        if old is not None:
            cudnn.allow_tf32 = old
        if new is not None:
            cudnn.conv.fp32_precision = new
        before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
        record(network(["G.kind=dcgan"], 0)[1], DRAW)
        assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == before
    finally:
        cudnn.allow_tf32 = True  # the default of both
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32"


def test_a_program_that_is_not_the_module_is_refused(tmp_path):
    G = mine(Mine)
    program = record(G, DRAW)
    G.linear.weight.add_(1e-4)
    with pytest.raises(UnfitError, match=r"differ from the module's by \S+, for 1 images"):
        write_pt2(program, mine(Mine), DRAW, tmp_path / "G.pt2")
    counting = mine(Counting)
    with pytest.raises(UnfitError, match="differ from the module's"):
        write_pt2(record(counting, DRAW), counting, DRAW, tmp_path / "G.pt2")


def test_a_full_disk_is_an_error_like_others(tmp_path):
    """Not the end of the process, as it is in torch's own writer."""
    G = mine(Mine)
    (tmp_path / "G.pt2").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_pt2(record(G, DRAW), G, DRAW, tmp_path / "G.pt2")


def test_without_the_packages_one_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    G = mine(Mine)
    with pytest.raises(UserError, match=r"--onnx needs onnxruntime: pip install 'shardgan\[onnx\]'"):
        write_onnx(programs.record(G, DRAW), G, DRAW, tmp_path / "G.onnx")
