"""What lets someone in is in no message, however a URL or a setting is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.slurm.jobs import refuse_credentials
from pipeline import config
from pipeline.config import UserError
from pipeline.credentials import redacted, scrubbed, shareable
from pipeline.data.prepare.writer import Options, prepare


@pytest.mark.parametrize("password", ["word", "wo'rd", 'wo"rd', "wo<>rd", "wo/rd", "wo'/rd", "wo#?'rd", "'"])
@pytest.mark.parametrize("around", ["{}", "see '{}' there", '"{}",', "data.train={}", "[{0}, {0}]"])
def test_a_url_in_a_message(password: str, around: str) -> None:
    url = f"https://me:{password}@host/d"
    assert redacted(url) == "https://host/d"
    assert scrubbed(around.format(url)) == around.format("https://host/d")
    with pytest.raises(UserError, match="a user, password or signature"):
        refuse_credentials([around.format(url)])


@pytest.mark.parametrize(
    "text",
    [
        "see 'https://host/a' and me@host",
        "'https://host:8080/a','b@c'",
        '{"u": "https://host/a", "v": "s3://bucket/a@b.tar"}',
        "https://host/d is no URL",
    ],
)
def test_a_message_without_credentials_stays(text: str) -> None:
    assert scrubbed(text) == text
    refuse_credentials([text])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see https://a:b@h and https://c:word@h", "see https://h and https://h"),
        ("see https://h/x then https://u:word@h/y", "see https://h/x then https://h/y"),
        ("https://a:b@h and https://c:wo?rd@h", "https://h and https://h"),
        ("{https://u:p@h/a.tar,https://u:word@h/b.tar}", "{https://h/a.tar,https://h/b.tar}"),
        ("https://h/a.tar::https://u:word@h/b.tar", "https://h/a.tar::https://h/b.tar"),
        ("https://u:word with blanks@h/d", "https://h/d"),
        ("x://u:word@h/" * 3000, "x://h/" * 3000),
    ],
)
def test_every_url_of_a_text_is_redacted(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_two_urls_without_a_blank_between() -> None:
    text = '{"u":"https://me:word@h/a","v":"https://me:word@h2/b?sig=1"}'
    assert scrubbed(text) == '{"u":"https://h/a","v":"https://h2/b"}'


@pytest.mark.parametrize(
    "text",
    [
        "[a paper](https://host/abs?id=7&v=2#section-3), and https://host/x?keyword=gan, too",
        '<a href="https://host:8080/a?author=me&amp;design=2#token">it</a> <https://host/a@b>',
        "![a picture](https://host/it's.png?raw=true) [1]: https://host/d?page=2&",
        "(https://host) me@host, [x](s3://bucket/a@b.tar), https://[::1]:80/a@b",
    ],
)
def test_a_link_that_lets_nobody_in_stays_whole(text: str) -> None:
    assert shareable(text) == text


@pytest.mark.parametrize(
    "password", ["word", "wo'rd", "wo)rd", 'wo"rd', "wo<>rd", "wo/rd", "wo@rd", "wo#?'rd"]
)
def test_a_password_in_a_link(password: str) -> None:
    assert shareable(f"[it](https://me:{password}@host:80/d?a=1#b).") == "[it](https://host:80/d?a=1#b)."
    assert (
        shareable(f"<https://me@my.org:{password}@host/d> https://word@host")
        == "<https://host/d> https://host"
    )


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "access_token",
        "key",
        "api-key",
        "apiKey",
        "sig",
        "SIGNATURE",
        "client_secret",
        "password",
        "X-Amz-Credential",
        "x-goog-date",
        "AWSAccessKeyId",
        "Key-Pair-Id",
        "X%2DAmz%2DSignature",
        "auth",
    ],
)
def test_a_secret_in_a_link(name: str) -> None:
    for around in ("[it]({})", "<{}>", "see {}, and", "`{}`", "<a href='{}'>it</a>", "{}"):
        for query, shown in [
            ("?{}=word", ""),
            ("?a=1&{}=wo.rd%2F==&b=2#c", "?a=1&b=2#c"),
            ("?{}=word&amp;b=2", "?b=2"),
            ("?{}=word#c", "#c"),
            ("#{}=word", ""),
            ("?to=s3://b?{}=word", "?to=s3://b"),
        ]:
            link = around.format(f"https://host/d{query.format(name)}")
            assert shareable(link) == around.format(f"https://host/d{shown}")


@pytest.mark.parametrize(
    "setting",
    [
        "--data.train=https://me:secret@h/d",
        "data.train:https://me:secret@h/d",
        "=https://me:secret@h/d",
        "data.train=https://me:secret${@h/d",
        "data.train=https://me:${secret}@h/d",
        "data.train=https://me:secret${oc.env:NOSUCH}@h/d",
        "data.train=[https://me:secret@h/d",
        "data.train='https://me:sec'ret@h/d",
        "data.train={a: https://me:secret@h, b: https://me:secret@h",
        "data.train=%https://me:secret@h/d",
        "data.train=https://me:sec\1ret@h/d",
        "data.train.x=https://me:secret@h/d",
        "data.size=https://me:secret'@h/d",
        "https://me:secret@h/d=3",
    ],
)
def test_a_setting_that_is_none(setting: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("")
    for path in (None, tmp_path / "mine.yaml"):
        with pytest.raises(UserError) as caught:
            config.load(path, [setting])
        assert not [word for word in ("me:", "secret", "sec'ret", "ret@") if word in str(caught.value)], (
            caught
        )
        assert "None:" not in str(caught.value)


def test_a_setting_that_is_no_url_is_shown() -> None:
    with pytest.raises(UserError, match=r"`data.size=\[x` cannot be read: while parsing a flow sequence"):
        config.load(None, ["data.size=[x"])


@pytest.mark.parametrize(
    "setting",
    [
        "data.train=http://host/${oc.env:MY_KEY}/d",
        "track.tags=[a, '${ oc.env:MY_KEY,none}']",
        "track.group=${${track.entity}:MY_KEY}",
        "track.group=${oc.${track.entity}:MY_KEY}",
    ],
)
def test_a_config_reads_no_environment(setting: str, monkeypatch, tmp_path: Path) -> None:
    """It may be someone else's, and what it says ends in config.yaml, in W&B, or at a server."""
    monkeypatch.setenv("MY_KEY", "secret")
    with pytest.raises(UserError, match="cannot stand in a config") as caught:
        config.load(None, [setting])
    assert "secret" not in str(caught.value)
    key, value = setting.split("=", 1)
    section, name = key.split(".")
    (tmp_path / "theirs.yaml").write_text(f"{section}:\n  {name}: {value}")
    with pytest.raises(UserError, match="cannot stand in a config"):
        config.load(tmp_path / "theirs.yaml", ["data.train=none"] if name != "train" else [])
    with pytest.raises(UserError, match=r"run.out.*the variable MY_KEY seems to be a secret"):
        config.load(None, ["data.train=none", "run.out=$MY_KEY/runs"])


def test_prepare_refuses_a_url(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^https://host/d is not on this machine"):
        prepare("https://me:secret@host/d?sig=secret", str(tmp_path / "out"), Options(), workers=1)
