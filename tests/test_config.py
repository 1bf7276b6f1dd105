"""Settings mean what their type says, however YAML would have read them; paths are treated in one way."""

from __future__ import annotations

import json
from operator import attrgetter

import pytest

from pipeline import config
from pipeline.config import UserError

WORDS = ["007", "20251125", "1e3", "3e12345", "on", "no", "1:30", "0x1f", "2025-11-25", "0.50", "a#b"]


def load(*settings, path=None):
    return config.load(path, ["data.train=shards", *settings])


def written(tmp_path, text):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("word", WORDS)
def test_a_text_stays_as_it_was_written(word, tmp_path):
    given = load(f"run.name={word}", f"track.tags=[{word}]")
    in_file = load(path=written(tmp_path, f"run: {{name: {word}}}\ntrack:\n  tags:\n  - {word}\n"))
    for found in (given, in_file):
        assert (found.run.name, found.track.tags) == (word, (word,))


@pytest.mark.parametrize("word", WORDS)
def test_the_resolved_config_loads_as_itself(word, tmp_path):
    found = load(f"run.name={word}", f"track.tags=[{word}]", "penalty.l2=1e-3", "G.norm=none")
    assert config.load(written(tmp_path, config.dump(found))) == found


@pytest.mark.parametrize(
    ("place", "found"),
    [("/a b/c #d", "/a b/c #d"), ("'/a: b'", "/a: b"), ("x: y", "x: y"), ("[a]", "[a]"), ('"007"', "007")],
)
def test_a_path_may_hold_what_means_something_to_yaml(place, found):
    assert load(f"data.train={place}").data.train == found


@pytest.mark.parametrize(
    ("setting", "found"), [("064", 64), ("1e2", 100), ("0x10", 16), ("+8", 8), ("1_000", 1000)]
)
def test_a_number_is_decimal(setting, found, tmp_path):
    for made in (
        load(f"data.batch_size={setting}"),
        load(path=written(tmp_path, f"data: {{batch_size: {setting}}}")),
    ):
        assert made.data.batch_size == found


def test_lists_of_numbers_and_shorthands_are_decimal_too():
    made = load("optim.G.betas=[0, 0.99]", "penalty.l2=010", "run.total_kimg=1e3")
    assert (made.optim.G.betas, made.penalty.G.l2, made.penalty.D.l2) == ((0.0, 0.99), 10.0, 10.0)
    assert made.run.total_kimg == 1000.0


SCHEDULES = {
    "optim.D.lr=[2e-4,5e-5]": (2e-4, 5e-5),
    "optim.G.betas=[0.0,[0.9,0.99]]": (0.0, (0.9, 0.99)),
    "optim.G.betas=[[0.5,0],0.99]": ((0.5, 0.0), 0.99),
    "penalty.D.l2=[010,0]": (10.0, 0.0),
    "penalty.r1.gamma=[150,15]": (150.0, 15.0),
    "ema.kimg=[0,1e3]": (0.0, 1000.0),
    "penalty.r2.fraction=1/4": 0.25,
    "penalty.r2.fraction=0.333333333333": 1 / 3,
}


def test_texts_among_the_options_of_a_network_stay_texts(tmp_path):
    given = {
        "a": "1e-3",
        "b": "off",
        "c": "007",
        "d": "1:30",
        "e": "1_000",
        "f": "-.5",
        "g": "null",
        "h": "it's",
    }
    settings = [f'G.options.{key}="{text}"' for key, text in given.items()]
    found = load(*settings)
    assert found.G.options == given
    assert config.load(written(tmp_path, config.dump(found))).G.options == given


@pytest.mark.parametrize("setting", SCHEDULES)
def test_schedules_are_read_alike_from_a_file_and_the_command_line(setting, tmp_path):
    key, _, value = setting.partition("=")
    section, _, rest = key.partition(".")
    inner = f"{rest.replace('.', ': {')}: {value}{'}' * rest.count('.')}"
    file = written(tmp_path, f"data: {{train: x}}\nrun: {{burn_in_kimg: 9}}\n{section}: {{{inner}}}\n")
    for found in (load("run.burn_in_kimg=9", setting), config.load(file)):
        assert attrgetter(key)(found) == SCHEDULES[setting]
        assert config.load(written(tmp_path, config.dump(found))) == found


def test_a_shorthand_may_be_a_schedule_and_a_later_layer_wins(tmp_path):
    text = "data: {train: x}\nrun: {burn_in_kimg: 9}\npenalty: {l2: [1e-3, 1e-4], r1: {gamma: 2}}\n"
    found = config.load(written(tmp_path, text), ["penalty.D.l2=5e-4", "penalty.r1.gamma=[1,0]"])
    assert (found.penalty.G.l2, found.penalty.D.l2) == ((1e-3, 1e-4), 5e-4)
    assert found.penalty.r1.gamma == (1.0, 0.0)


def test_a_shorthand_beside_a_player_that_is_no_section(tmp_path):
    found = config.load(
        written(tmp_path, 'data: {train: x}\npenalty: {l2: 0.1, G: {l1: 0.2}, D: "${penalty.G}"}\n')
    )
    assert found.penalty.G == found.penalty.D and (found.penalty.D.l2, found.penalty.D.l1) == (0.1, 0.2)
    with pytest.raises(UserError, match=r"penalty.G: is a section"):
        config.load(written(tmp_path, "data: {train: x}\npenalty: {l2: 0.1, G: 0.5}\n"))


@pytest.mark.parametrize(("given", "what"), [("run=[]", "run"), ("G=[]", "G"), ("G.options=[]", "G.options")])
def test_a_list_over_a_section_that_the_file_fills_is_explained(tmp_path, given, what):
    file = written(tmp_path, "data: {train: x}\nrun: {seed: 3}\nG: {options: {depth: 2}}\n")
    with pytest.raises(UserError, match=rf"\n  {what}: "):
        config.load(file, [given])
    found = config.load(file, ["run.seed=5", "G.options.depth={x: 1}", "G.options.more=[1]"])
    assert found.G.options == {"depth": {"x": 1}, "more": [1]} and found.run.seed == 5


def test_a_list_in_a_file_gives_way_to_a_section(tmp_path):
    file = written(tmp_path, "data: {train: x}\nG: {options: {sizes: [1, 2]}}\n")
    assert config.load(file, ["G.options.sizes={x: 1}"]).G.options == {"sizes": {"x": 1}}


@pytest.mark.parametrize(
    "later",
    [
        ["G.options={a: 1}"],
        ["G.options=null"],
        ["G.options.sizes=[3]", "optim.G.betas=[0.5,0.9]"],
        ["penalty.l2=2e-3"],
    ],
)
def test_layers_are_laid_over_one_another_alike_with_and_without_references(tmp_path, later):
    """Without any they are merged here, with one by OmegaConf."""
    plain = (
        "data: {train: x}\npenalty: {l2: 1.0e-3, G: {l1: 0.1}}\nG: {options: {sizes: [1, 2], b: {c: 3}}}\n"
    )
    found = []
    for seed in ("3", '"${run.keep}"'):
        file = written(tmp_path, f"{plain}run: {{keep: 3, seed: {seed}}}\n")
        try:
            found.append(config.load(file, later))
        except UserError as error:
            found.append(str(error))
    assert found[0] == found[1]


def test_two_configs_from_one_file_share_nothing(tmp_path):
    file = written(tmp_path, "data: {train: x}\nG: {options: {sizes: [1, 2]}}\n")
    config.load(file).G.options["sizes"].append(3)
    assert config.load(file).G.options == {"sizes": [1, 2]}


def test_on_is_that_of_both_players_unless_one_has_its_own(tmp_path):
    assert [p.on for p in (load().penalty.G, load().penalty.D)] == ["auto", "auto"]
    text = "data: {train: x}\npenalty: {on: all, G: {on: effective}}\n"
    for settings, both in (([], ("effective", "all")), (["penalty.on=weights"], ("weights", "weights"))):
        found = config.load(written(tmp_path, text), settings)
        assert (found.penalty.G.on, found.penalty.D.on) == both
        assert config.load(written(tmp_path, config.dump(found))) == found


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["optim.D.lr=[2e-4,5e-5]"], "optim.D.lr: [from, to] is a schedule"),
        (["penalty.l2=[1,0]", "ema.kimg=[0,1]"], "ema.kimg, penalty.G.l2, penalty.D.l2: [from, to] are"),
        (["optim.G.betas=[0,[0.9,0.99]]"], "optim.G.betas[1]: [from, to] is a schedule"),
        (["optim.D.lr=[1,2,3]"], "optim.D.lr: must be a number or [from, to] (found [1, 2, 3])"),
        (["optim.D.lr=[1,fast]"], "optim.D.lr: must be a number or [from, to] (found [1, 'fast'])"),
        (["optim.D.lr=[1,0]"], "optim.D.lr: Input should be greater than 0 at both ends (found [1, 0])"),
        (["optim.D.lr=0"], "optim.D.lr: Input should be greater than 0 (found 0)"),
        (["augment.ops=[flip]", "augment.p=[0,2]"], "augment.p: Input should be less than or equal to 1 at"),
        (["augment.ops=[flip]"], "augment.ops: how often? Set augment.p"),
        (["augment.p=0.1"], "augment.p: nothing to apply. Set augment.ops"),
        (["augment.target=0.6"], "augment.target: nothing to apply. Set augment.ops"),
        (["augment.ops=[flip]", "augment.p=0.1", "augment.target=0.6"], "augment.p and augment.target:"),
        (["score.train_images=1"], "score.train_images: must be 0, for none, or at least 2 (found 1)"),
        (["penalty.r1.fraction=0.3"], "penalty.r1.fraction: must be 1, 1/2, 1/3 or another 1/k (found 0.3)"),
    ],
)
def test_schedules_and_augmentation_that_cannot_be_meant(settings, said):
    with pytest.raises(UserError) as refused:
        load(*settings)
    lines = str(refused.value).splitlines()
    assert len(lines) == 2 and lines[1].strip().startswith(said)


@pytest.mark.parametrize("setting", ["run.name=null", "data.folds=null", "optim.D.clip=~"])
def test_null_is_no_value_where_there_may_be_none(setting):
    assert load(setting) == load()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("run.name=", "`run.name=` has no value"),
        ("run.name= ", "has no value"),
        ("data.train=", "has no value"),
        ("penalty.l2=", "has no value"),
        ("run.name=''", "must be a plain folder name"),
        ("run.name='  '", "must be a plain folder name"),
        ("run.name=a/b", "must be a plain folder name"),
        (f"run.name={'λ' * 128}", "must be shorter: file names have at most 255 bytes"),
        ("penalty.l2=on", "(found 'on')"),  # which YAML takes for True, and that is 1
        ("run.seed=true", "Input should be a valid integer"),
        ("penalty.r1.fraction=1e-320", "another 1/k"),
        ("run.name=a\nb", "cannot be printed"),
        ("run.name=\udcce\udca9", "cannot be printed"),
        ("run.name=\ud800", "cannot be printed"),
        ("run.timeout_s=1:30", "should be a valid number"),
        ("data.batch_size=6 4", "should be a valid integer"),
        ("G.norm=off", "(found 'off')"),
        ("run.out=$NOT_SET_ANYWHERE/runs", "the variable $NOT_SET_ANYWHERE is not set"),
        ("run.out=~nobody-of-that-name/runs", "no such home folder"),
        ("penalty.l3=1", "penalty.l3: no such key; known: l2, l1, on, G, D, r1"),
        ("penalty.onn=all", "penalty.onn: no such key; did you mean `on`?"),
        ("penalty.G=1e-3", "penalty.G: is a section, with the keys l2, l1, on (found 0.001)"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(setting, said):
    with pytest.raises(UserError) as refused:
        load(setting)
    assert said in str(refused.value)
    assert "Value error" not in str(refused.value)


def test_names_that_are_not_utf8_are_refused_in_one_line():
    for setting in ("data.train=caf\udce9/faces", "run.out=caf\udce9"):
        with pytest.raises(UserError, match="is not text in UTF-8") as refused:
            load(setting)
        str(refused.value).encode()  # can be shown
    assert load("data.train=café/faces").data.train == "café/faces"


@pytest.mark.parametrize(
    "setting",
    [
        "data.train=https://user:S3 CRET@host/faces",
        "run.out=https://user:S3 CRET@host/faces",
        "data.train=pipe:curl -H 'Authorization: Bearer S3 CRET' https://host/faces",
    ],
)
def test_a_password_with_a_blank_is_not_shown(setting):
    with pytest.raises(UserError, match="may hold a password") as refused:
        load(setting)
    assert "CRET" not in str(refused.value) and "S3" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("ops=[flip]", "augment.ops: how often? Set augment.p"),
        ("p=0.5", "augment.p: nothing to apply. Set augment.ops."),
        ("target=0.6", "augment.target: nothing to apply. Set augment.ops."),
        ("ops=[flip] p=0.5 target=0.6", "augment.p and augment.target: p is either given or adjusted"),
        ("ops=[flip] target=60", "augment.target: Input should be less than 1 (found 60)"),
        ("ops=[flip] p=50", "augment.p: Input should be less than or equal to 1"),
        ("ops=[flip] p=[0,0.5]", "augment.p: [from, to] is a schedule over the first run.burn_in_kimg"),
        ("ops=flip p=0.5", "augment.ops: Input should be a list, [a, b, …] (found 'flip')"),
        ("ops=[color] p=0.5", "'colour' or 'cutout' (found 'color')"),
    ],
)
def test_augmentation_that_cannot_be_meant_is_refused(given, said):
    with pytest.raises(UserError) as refused:
        load("data.train=x", *(f"augment.{setting}" for setting in given.split()))
    assert said in str(refused.value)


@pytest.mark.parametrize("name", [".hidden.yaml", ".yaml"])
def test_a_config_file_that_gives_no_name_is_refused(name, tmp_path):
    file = tmp_path / name
    file.write_text("data: {train: shards}\n")
    with pytest.raises(UserError, match=r"Set run\.name"):
        config.load(file)


@pytest.mark.parametrize("key", ["run.out", "data.train"])
@pytest.mark.parametrize(("text", "path"), [("~/x", "/home/ann/x"), ("$SCRATCH/x", "/scratch/ann/x")])
def test_paths_are_expanded_alike(key, text, path, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("SCRATCH", "/scratch/ann")
    section, name = key.split(".")
    values = {"data": {"train": "x"}} | {section: {name: text}}
    in_file = config.load(written(tmp_path, json.dumps(values)))
    for found in (load(f"{key}={text}"), in_file):
        assert getattr(getattr(found, section), name) == path


def test_a_url_is_no_path():
    assert load("data.train=s3://bucket/$x/~y").data.train == "s3://bucket/$x/~y"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run:\n\ttotal_kimg: 3\n", "line 2, column 1: there is a tab, where YAML takes spaces alone"),
        ("G:\n  kind: dcgan\n\twidth: 8\n", "line 3, column 1: there is a tab"),
        ("run: {}\nrun: {}\n", "line 2, column 1: found duplicate key run"),
        ("a: b: c\n", "line 1, column 5: mapping values are not allowed"),
        (b"\xff\xfe", "it is not text in UTF-8"),
    ],
)
def test_a_file_that_is_not_yaml_is_refused_by_its_line(text, said, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as refused:
        config.load(file)
    assert f"settings.yaml cannot be read as YAML: {said}" in str(refused.value)


@pytest.mark.parametrize("text", ["320\n", "true\n", "hello\n", "- a\n"])
def test_a_file_without_sections_is_no_config(text, tmp_path):
    with pytest.raises(UserError, match="is not a config: it must hold"):
        config.load(written(tmp_path, text))


def test_a_reference_to_nothing_is_named():
    with pytest.raises(UserError, match=r"G\.width cannot be read: \$\{no\.such\} is none of the settings"):
        load("G.width=${no.such}")


@pytest.mark.parametrize(
    ("settings", "key", "missing"),
    [
        (["G.width=???"], r"G\.width", "width"),
        (["G=???"], "G", "G"),
        (["G.width=${D.width}", "D.width=???"], r"D\.width", "width"),
        (["G.width=8", "G.width=???"], r"G\.width", "width"),  # not what was given before
    ],
)
def test_a_value_that_is_yet_to_be_given_is_no_default(settings, key, missing):
    with pytest.raises(
        UserError, match=rf"{key} cannot be read: \?\?\? stands for .* \({missing}\)\. Give one"
    ):
        load(*settings)


@pytest.mark.parametrize("key", ["total", "burn_in", "tick", "snapshot", "checkpoint", "eval"])
def test_a_length_is_a_number_of_images_that_can_be_counted(key):
    with pytest.raises(UserError, match=rf"run\.{key}_kimg: Input should be less than or equal to"):
        load(f"run.{key}_kimg=1e306")


@pytest.mark.parametrize("key", ["total", "tick", "snapshot", "checkpoint", "eval"])
def test_a_length_is_an_image_or_more(key):
    with pytest.raises(UserError, match=rf"run\.{key}_kimg: Input should be greater than or equal to 0\.001"):
        load(f"run.{key}_kimg=5e-324")


def test_a_folder_is_no_config_file(tmp_path):
    with pytest.raises(UserError, match="is a folder, where a config file"):
        config.load(tmp_path)


def test_the_file_is_blamed_for_its_own_errors_alone(tmp_path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("G: {width: 8}\n")
    bad.write_text("G: {width: -8}\n")
    for file, blamed in ((good, "The given settings are not valid:"), (bad, f"{bad} is not a valid config:")):
        with pytest.raises(UserError) as refused:
            load("penalty.l2=-1", path=file)
        assert str(refused.value).splitlines()[0] == blamed
    with pytest.raises(UserError, match="The given settings are not valid:"):
        load("penalty.l2=-1")
