"""`shardgan push` by huggingface_hub's own client, to a server that answers as the Hub does, and back."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import hub_server
import pytest
import shardgan
import torch
from click.testing import CliRunner

from launch.push import push as command
from pipeline.config import UserError
from pipeline.run.export import export, load_exported
from pipeline.run.generator import load
from pipeline.run.hub import fetch, is_repository, push

ROOT = Path(__file__).parents[2]
TOKEN = "hf_of_nobody"
NAME = "somebody/my-gan"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    with hub_server.running(TOKEN) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield hub


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    export(ROOT / "tests" / "assets" / "run-of-format-2" / "run", out)
    return out


@pytest.fixture
def exported(made, tmp_path):
    return shutil.copytree(made, tmp_path / "exported")


def listed(folder) -> set[str]:
    return set(json.loads((folder / "export.json").read_text())["files"])


def test_an_export_is_published_in_private_and_loads_from_the_hub(hub, exported):
    (exported / "notes.txt").write_text("mine alone")
    shown = CliRunner().invoke(command, [str(exported), NAME], catch_exceptions=False)
    assert shown.output.splitlines()[-1] == f"{hub.url}/{NAME}"
    repository = hub.repositories[NAME]
    assert repository.private and repository.messages == ["format-2 at kimg 0.12"]
    assert repository.files.keys() == listed(exported) | {".gitattributes"}
    assert repository.files["G_ema.safetensors"] == (exported / "G_ema.safetensors").read_bytes()
    G = shardgan.load(NAME)
    z = torch.randn(2, G.z_dim)
    assert torch.equal(G.network(z), load_exported(exported)[0](z)) and G.cur_nimg == 120


def test_a_card_edited_by_its_author_is_published_without_credentials(hub, exported):
    with (exported / "README.md").open("a") as card:
        card.write("Images of <https://me:secret@host/photos?token=secret>\n")
        card.write("as in [a paper](https://host/abs?id=7#results), page 2\n")
    push(exported, NAME, public=True)
    repository = hub.repositories[NAME]
    assert not repository.private and b"<https://host/photos>" in repository.files["README.md"]
    assert b"(https://host/abs?id=7#results), page 2\n" in repository.files["README.md"]
    assert not any(b"secret" in content for content in repository.files.values())


def test_nothing_is_overwritten_unless_it_is_asked_for(hub, exported):
    hub.repositories[NAME] = hub_server.Repository(
        True, [{"README.md": b"theirs", "G_ema.onnx": b"old", "x": b""}]
    )
    with pytest.raises(UserError, match=r"holds files already \(G_ema\.onnx, README\.md, x, …\)\. --replace"):
        push(exported, NAME)
    assert len(hub.repositories[NAME].commits) == 1 and all("GET" in line for line in hub.asked)
    push(exported, NAME, replace=True)
    files = hub.repositories[NAME].files
    assert files.keys() == listed(exported) | {"x"}  # the .onnx was of other weights
    assert files["README.md"] == (exported / "README.md").read_bytes()


def test_a_revision_may_be_pinned(hub, exported):
    push(exported, NAME)
    first = hub.repositories[NAME].sha()
    facts = json.loads((exported / "export.json").read_text())
    (exported / "export.json").write_text(json.dumps(facts | {"cur_nimg": 7}))
    push(exported, NAME, replace=True)
    assert load_exported(fetch(NAME))[2].cur_nimg == 7
    assert shardgan.load(f"{NAME}@{first}").cur_nimg == 120
    with pytest.raises(UserError, match="no such revision on the Hub"):
        fetch(f"{NAME}@never")


@pytest.mark.parametrize("public", [False, True])
def test_a_repository_is_not_made_public_or_private_in_passing(hub, exported, public):
    hub.repositories[NAME] = hub_server.Repository(private=public)
    with pytest.raises(UserError, match="leave out --public" if public else "add --public"):
        push(exported, NAME, public=public)
    assert len(hub.repositories[NAME].commits) == 1


def test_without_a_token_an_export_or_the_client_nothing_is_asked(hub, exported, tmp_path, monkeypatch):
    for name in ("my-gan", "a/b/c", "some body/gan"):
        with pytest.raises(UserError, match="no repository of the Hub"):
            push(exported, name)
    with pytest.raises(UserError, match="is no export"):
        push(tmp_path, NAME)
    incomplete = shutil.copytree(exported, tmp_path / "incomplete")
    (incomplete / "G.safetensors").unlink()
    with pytest.raises(UserError, match=r"no whole export: G\.safetensors is missing"):
        push(incomplete, NAME)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"not logged in.*HF_TOKEN"):
        push(exported, NAME)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
    with pytest.raises(UserError, match=r"needs huggingface_hub\S*: pip install 'shardgan\[hub\]'"):
        push(exported, NAME)
    assert hub.asked == []


def test_a_refusal_of_the_hub_is_one_line(hub, exported, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    for ask in (lambda: push(exported, NAME), lambda: fetch(NAME)):
        with pytest.raises(
            UserError, match=r"^The Hugging Face Hub refuses your token: .*another HF_TOKEN\.$"
        ):
            ask()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match="There is no somebody/my-gan on the Hub"):
        fetch(NAME)


def test_what_is_a_folder_here_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_repository(NAME) and is_repository(f"{NAME}@v1")
    assert not any(map(is_repository, ("runs", "./runs", "../my-gan", "~/my-gan", "/tmp/my-gan", "a/b/c")))
    (tmp_path / "somebody").mkdir()  # as `runs`, in which a run is misspelt
    assert not is_repository(NAME)


def test_a_run_that_is_not_here_is_said_before_what_the_hub_says(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^There is no runs/photos\."):
        load(Path("runs/photos"))
    assert hub.asked == []
    first = "^There is no folder runs/photos here; as a repository: "
    with pytest.raises(UserError, match=f"{first}There is no runs/photos on the Hub"):
        load("runs/photos")
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
    with pytest.raises(UserError, match=f"{first}Loading runs/photos from the Hugging Face Hub needs"):
        load("runs/photos")
