"""From config to networks: seeds, a user's own classes, and what is refused."""

import random
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from pipeline.config import Config, UserError, load
from pipeline.gan import networks
from pipeline.gan.networks import FAMILIES, build_D, build_G, check_networks, check_reach


def config(*settings: str) -> Config:
    small = ["G.width=4", "D.width=4", "G.z_dim=8"]
    return load(None, ["data.train=x", *small, *settings])


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("options", [[], ["G.norm=none", "G.spectral_norm=true"]])
def test_weights_depend_on_seed_and_player_alone(options):
    first = build_G(config("run.seed=1", *options), 3)
    torch.manual_seed(99)
    assert same(first, build_G(config("run.seed=1", *options), 3))
    assert not same(first, build_G(config("run.seed=2", *options), 3))
    assert not torch.equal(
        next(build_D(config(), 0).parameters()).flatten()[:8], next(first.parameters()).flatten()[:8]
    )


def test_building_leaves_global_randomness_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    build_G(config(), 0), build_D(config(), 0), check_networks(config(), 0)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("num_classes", [0, 4])
@pytest.mark.parametrize("options", [[], ["G.spectral_norm=true", "D.spectral_norm=true", "D.dropout=0.2"]])
def test_ours_pass_the_check(num_classes, options):
    check_networks(config("data.size=28", "data.channels=1", *options), num_classes)


def test_wrong_size_names_the_right_ones():
    with pytest.raises(UserError, match=r"data\.size=48.*28, 32, 64, 128"):
        check_networks(config("data.size=48"), 0)


@pytest.mark.parametrize("kind", ["dcgna", "mypackage.module", ":Class", "unknown"])
def test_unknown_kind(kind):
    with pytest.raises(UserError, match="no such network"):
        check_networks(config(f"G.kind={kind}"), 0)


def test_near_miss_gets_a_hint():
    with pytest.raises(UserError, match="did you mean `dcgan`"):
        check_networks(config("D.kind=dcgna"), 0)


def test_options_belong_to_a_users_class():
    with pytest.raises(UserError, match=r"G\.options"):
        check_networks(config("G.options.depth=3"), 0)


class Plain(nn.Module):
    """A family that has neither `depth` nor `norm`."""

    def __init__(self, *, size, channels, num_classes, width, dropout=0.0, z_dim=None):
        super().__init__()
        self.given = (size, channels, num_classes, width, dropout, z_dim)


@pytest.fixture
def plain_family(monkeypatch):
    monkeypatch.setattr(networks, "FAMILIES", {**FAMILIES, "plain": {"G": Plain, "D": Plain}})


def test_a_family_takes_the_keys_that_its_class_names(plain_family):
    assert build_G(config("G.kind=plain", "G.dropout=0.5"), 7).given == (32, 3, 7, 4, 0.5, 8)
    assert build_D(config("D.kind=plain", "D.norm=batch", "D.depth=1"), 0).given == (32, 3, 0, 4, 0.0, None)


def test_a_key_that_a_family_does_not_name_is_refused_with_those_that_do(plain_family):
    with pytest.raises(UserError, match=r"^D\.norm=none: plain does not take it, only dcgan, resnet\. Leave"):
        build_D(config("D.kind=plain", "D.norm=none"), 0)
    with pytest.raises(UserError, match=r"^G\.depth=2: plain does not take it, only .*resnet.*\. Leave"):
        check_networks(config("G.kind=plain", "G.depth=2"), 0)


USERS = """
import random
import numpy
import torch
from torch import nn

class G(nn.Module):
    def __init__(self, z_dim, size, channels, num_classes, depth=1):
        super().__init__()
        self.shape = (channels, size, size)
        self.embed = nn.Embedding(num_classes, z_dim) if num_classes else None
        self.layers = nn.Sequential(*[nn.Linear(z_dim, z_dim) for _ in range(depth)])
        self.out = nn.Linear(z_dim, channels * size * size)
    def forward(self, z, c):
        z = z if c is None else z + self.embed(c)
        return self.out(self.layers(z)).tanh().view(-1, *self.shape)

class D(nn.Module):
    def __init__(self, size, channels, num_classes):
        super().__init__()
        self.out = nn.Linear(channels * size * size, 1)
    def forward(self, x, c):
        return self.out(x.flatten(1)).flatten()

class NotOnMeta(D):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.scale = float(self.out.weight.abs().max())

class Drawn(D):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.register_buffer("drawn", torch.tensor([numpy.random.rand(), random.random()]))

class OnGPUs(D):
    def forward(self, x, c):
        if x.device.type != "cuda":
            raise RuntimeError("flash attention is for GPUs")
        return super().forward(x, c)

class Fourier(D):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.spectrum = nn.Parameter(torch.ones(3, dtype=torch.complex64))

class TwoAxes(D):
    def forward(self, x, c):
        return self.out(x.flatten(1))

class Tuple(D):
    def forward(self, x, c):
        return super().forward(x, c), None

class Fails(D):
    def forward(self, x, c):
        return self.out(x)

class NoKernel(nn.Module):
    def __init__(self, size, channels, num_classes):
        super().__init__()
        self.w = nn.Parameter(torch.ones(channels))
    def forward(self, x, c):
        return x.mean((2, 3)) @ self.w

class Raises(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        raise RuntimeError("out of\\nluck")

def function(**arguments):
    return None

class Lazy(G):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.linear = nn.LazyLinear(8)
"""


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mynets").mkdir()
    (tmp_path / "mynets" / "nets.py").write_text(USERS)
    (tmp_path / "mynets" / "broken.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "mynets"]:
        del sys.modules[name]


@pytest.mark.parametrize("num_classes", [0, 4])
def test_a_users_class_is_found_beside_the_command(users, num_classes):
    settings = config("G.kind=mynets.nets:G", "G.options.depth=3", "D.kind=mynets.nets:D", "data.size=12")
    check_networks(settings, num_classes)
    G, D = build_G(settings, num_classes), build_D(settings, num_classes)
    assert len(G.layers) == 3 and same(G, build_G(settings, num_classes))
    c = torch.tensor([0, 1]) if num_classes else None
    assert D(G(torch.randn(2, 8), c), c).shape == (2,)


@pytest.mark.parametrize("setting", ["G.z_dim", "D.width"])
def test_what_torch_cannot_build_is_said_of_our_own_networks_too(setting):
    with pytest.raises(
        UserError, match=rf"^{setting[0]}\.kind=dcgan cannot be built: RuntimeError: Storage size"
    ):
        check_networks(config(f"{setting}={10**18}"), 0)


def test_a_class_that_computes_in_its_constructor_is_tried_on_the_cpu(users):
    check_networks(config("D.kind=mynets.nets:NotOnMeta"), 0)


def test_weights_that_a_class_draws_by_numpy_or_python_are_those_of_the_seed_too(users):
    """On each rank, and when a run is resumed."""
    first, second, other = (
        build_D(config("D.kind=mynets.nets:Drawn", f"run.seed={n}"), 0) for n in (1, 1, 2)
    )
    assert same(first, second) and not torch.equal(first.drawn, other.drawn)
    random.seed(5), numpy.random.seed(5)
    expected = random.random(), numpy.random.rand()
    random.seed(5), numpy.random.seed(5)
    build_D(config("D.kind=mynets.nets:Drawn"), 0)
    assert (random.random(), numpy.random.rand()) == expected


def test_a_network_for_gpus_alone_is_left_to_the_ranks_that_have_them(users, monkeypatch):
    settings = config("D.kind=mynets.nets:OnGPUs")
    check_networks(settings, 0)  # of a job, on a login node
    with pytest.raises(UserError, match="cannot be built and run: RuntimeError: flash attention is for GPUs"):
        check_networks(settings, 0, torch.device("cpu"))  # of a rank
    mistaken = config("D.kind=mynets.nets:Fails")
    with pytest.raises(
        UserError, match=r"cannot be built and run: RuntimeError: (addmm: )?mat1 and mat2 shapes"
    ):
        check_networks(mistaken, 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # what would run there is not known here
    check_networks(mistaken, 0)


def test_a_lazy_layer_is_refused(users):
    with pytest.raises(UserError, match=r"linear\.weight has no shape yet \(a lazy layer's\)"):
        check_networks(config("G.kind=mynets.nets:Lazy"), 0)


def test_images_are_contiguous_for_a_class_that_does_not_ask_for_channels_last(users):
    """Ours ask. Many others take images apart with `view`."""
    images, seen = torch.zeros(2, 3, 32, 32).to(memory_format=torch.channels_last), []
    for kind, contiguous in (("mynets.nets:D", True), ("dcgan", False)):
        D = build_D(config(f"D.kind={kind}"), 0)
        D.forward = lambda x, c: seen.append(x.is_contiguous())
        D(images, None)
        assert seen.pop() is contiguous


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mynets.nets:Fourier", r"its parameter spectrum is torch\.complex64"),
        ("mynets.nets:TwoAxes", r"returns \[2, 1\] .* logits must be \[2\]"),
        ("mynets.nets:Tuple", r"returns tuple .* logits must be \[2\]"),
        ("mynets.nets:Fails", r"RuntimeError: .*nets\.py, line 56"),
        ("mynets.nets:Raises", r"RuntimeError: out of luck .*nets\.py, line 68"),
        ("mynets.nets:G", r"TypeError: .*z_dim"),
        ("mynets.nets:Missing", r"AttributeError: .*Missing"),
        ("mynets.missing:D", r"cannot be imported: ModuleNotFoundError: .*mynets\.missing"),
        ("mynets.broken:D", r"cannot be imported: SyntaxError: .*broken\.py, line 1"),
        ("mynets.nets:function", r"not a class derived from torch\.nn\.Module"),
    ],
)
def test_a_users_mistake_is_reported_in_one_line(users, kind, message):
    with pytest.raises(UserError, match=message) as caught:
        check_networks(config(f"D.kind={kind}"), 0)
    assert f"D.kind={kind}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_penalty_that_would_cover_nothing_is_refused_before_anything_is_spawned(users):
    settings = ("D.kind=mynets.nets:NoKernel", "penalty.D.l2=1e-3")
    check_networks(config(*settings, "penalty.on=all"), 0)
    with pytest.raises(UserError, match=r"penalty\.D covers nothing: no kernel of NoKernel"):
        check_networks(config(*settings), 0)


def test_options_cannot_contradict_the_config(users):
    with pytest.raises(UserError, match=r"G\.options: size"):
        check_networks(config("G.kind=mynets.nets:G", "G.options.size=64"), 0)


def test_images_of_the_wrong_size(users):
    (Path("mynets") / "wrong.py").write_text(
        USERS.replace("(channels, size, size)", "(channels, size * size, 1)")
    )
    with pytest.raises(
        UserError, match=r"returns \[2, 3, 1024, 1\] for \[2, 8\]; images must be \[2, 3, 32, 32\]"
    ):
        check_networks(config("G.kind=mynets.wrong:G"), 0)


@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() - {"vit"}))  # which is smooth as it is
def test_smooth_activations_change_nothing_else(kind):
    shared = {"size": 32, "channels": 1, "width": 4}
    for network, arguments in ((FAMILIES[kind]["G"], shared | {"z_dim": 6}), (FAMILIES[kind]["D"], shared)):
        kinked, smooth = (
            (torch.manual_seed(0), network(**arguments, **extra))[1] for extra in ({}, {"activation": "silu"})
        )
        assert all(torch.equal(p, q) for p, q in zip(kinked.parameters(), smooth.parameters(), strict=True))
        layers = {type(layer) for layer in smooth.modules()}
        assert nn.SiLU in layers and not layers & {nn.ReLU, nn.LeakyReLU}


@pytest.mark.parametrize(("kind", "bounded"), [("dcgan", True), ("resnet", True), ("r3gan", False)])
def test_a_g_that_ends_in_tanh_is_refused_for_larger_latents(kind, bounded):
    latents = config(f"G.kind={kind}", "data.channels=4", "score.metrics=[]")
    check_reach(latents, 1.0)
    refused = pytest.raises(UserError, match=rf"G\.kind={kind} makes .* up to ±4\.5\.")
    with refused if bounded else nullcontext():
        check_reach(latents, 4.5)
