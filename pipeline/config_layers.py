"""One layer of settings, a YAML file or one `key=value`, as nested dictionaries.

YAML guesses the type of a plain scalar: `007` is 7, `1e3` a number, `on` a boolean, ` #` starts a comment.
Here the type of the setting decides instead: text stays as written, and numbers are read in decimal.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, Union

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from pipeline.credentials import reason, redacted, scrubbed
from pipeline.errors import UserError, expanded
from pipeline.wording import did_you_mean

Layer = dict[str, Any]
_OF_BOTH = ("l2", "l1", "on")  # keys of penalty.G and penalty.D that may be given once, as penalty.l2
_NULL = ("null", "Null", "NULL", "~")


def read_file(path: Path, section: type) -> Layer:
    """The settings in a YAML file. section: the dataclass they belong to. Raises UserError."""
    text = _text_of(path)
    try:
        values, written = _parsed_once(text)
    except (yaml.YAMLError, OmegaConfBaseException, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as YAML: {why_not_yaml(error, text)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a config: it must hold `section: {{key: value}}`.")
    layer: Layer = _typed(section, _string_keys(values), _string_keys(written))
    return layer


def _text_of(path: Path) -> str:
    try:
        return expanded(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"There is no config file {path}.{did_you_mean(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, where a config file (NAME.yaml) is needed.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} cannot be read as YAML: it is not text in UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None


def from_yaml(text: str) -> object:
    """What a file's text holds. Raises as yaml and OmegaConf do, which refuses a key given twice."""
    return _parsed(text)[0]


def _parsed(text: str) -> tuple[object, object]:
    """What it holds, and the same with all scalars as text."""
    written = yaml.load(text, yaml.BaseLoader)  # builds texts, lists and dictionaries, nothing else
    if isinstance(written, str):  # of a number OmegaConf raises AssertionError, and it takes a word for a key
        return written, written
    return OmegaConf.to_container(OmegaConf.create(text)), written


_parsed_once = lru_cache(maxsize=512)(_parsed)  # a selection reads its config for each of its trials


def refuse_resolvers(value: object) -> None:
    """Raises UserError for ${oc.env:NAME} and its like in any text of a layer. They would put what only this
    machine knows, perhaps a key, into config.yaml and all that is made from it."""
    if isinstance(value, str) and _has_resolver(value):
        raise UserError(
            "${…:…}, as in ${oc.env:NAME}, cannot stand in a config: ${section.key}, another setting, can, "
            "and in a path on this machine $NAME, a variable of the environment."
        )
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        refuse_resolvers(part)


def _has_resolver(text: str) -> bool:
    """Whether a colon is within ${…}, however nested: a resolver's name may be another setting's value."""
    depth = 0
    for mark in re.findall(r"\$\{|[}:]", text):
        if mark == ":" and depth:
            return True
        depth = max(0, depth + (mark == "${") - (mark == "}"))
    return False


def why_not_yaml(error: Exception, text: str) -> str:
    """What is wrong with a file's text, and in which line."""
    mark = getattr(error, "problem_mark", None)
    if not isinstance(error, yaml.MarkedYAMLError) or mark is None:
        return scrubbed(" ".join(str(error).split()))
    problem = str(error.problem)
    if text[mark.index : mark.index + 1] == "\t":
        problem = "there is a tab, where YAML takes spaces alone"
    return scrubbed(f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(problem.split())}")


def read_override(text: str, section: type) -> Layer:
    """The setting in `section.key=value`. section: the dataclass it belongs to. Raises UserError."""
    key, equals, value = text.partition("=")
    shown = scrubbed(redacted(text))
    if not equals or not key or key.startswith("-"):
        raise UserError(f"`{shown}` is not a setting: write section.key=value, as in penalty.l2=1e-3.")
    if not value.strip():
        raise UserError(f"`{shown}` has no value. (Is a shell variable unset?)")
    if _is_text(_hint(section, key.split("."))):
        return _nested(key, _unquoted(value.strip()))
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
        written = _nested(key, yaml.load(value, yaml.BaseLoader))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"`{shown}` cannot be read: {reason(error, text)}") from None
    assert isinstance(values, dict)
    layer: Layer = _typed(section, _string_keys(values), _string_keys(written))
    return layer


def as_override(key: str, text: str) -> str:
    """`key=text` that is read back as this text, whatever blanks or quotes it begins and ends with."""
    if _unquoted(text.strip()) == text:
        return f"{key}={text}"
    quoted = text.replace("'", "''")
    return f"{key}='{quoted}'"


def is_setting(key: str, section: type) -> bool:
    """Whether section, a dataclass, has this setting; not so for options of a user's class."""
    return _hint(section, key.split(".")) is not None


def is_whole(key: str, section: type) -> bool:
    """Whether it is a setting whose values are whole numbers, or null."""
    return _kinds(_hint(section, key.split("."))) - {type(None)} == {int}


def expand_shorthands(layer: Layer) -> Layer:
    """penalty.l2 → penalty.G.l2 and penalty.D.l2, in each layer, so that a later layer still wins."""
    penalty = layer.get("penalty")
    if not isinstance(penalty, dict):
        return dict(layer)
    both = {key: penalty[key] for key in _OF_BOTH if key in penalty}
    rest = {key: value for key, value in penalty.items() if key not in both}
    for player in ("G", "D") if both else ():
        own = rest.get(player)
        if own is None or isinstance(own, dict):  # else it is ${penalty.G}, or no section, which is refused
            rest[player] = both | (own or {})
    return {**layer, "penalty": rest}


def explain(error: ValidationError, defaults: object) -> Iterator[str]:
    """A line per problem, with its path. defaults: a config of the class that was validated."""
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        where = ".".join(path)
        if problem["type"] == "unexpected_keyword_argument":
            keys = _keys_of(defaults, path[:-1])
            near = difflib.get_close_matches(path[-1], keys, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else f"; known: {', '.join(keys)}"
            yield scrubbed(f"  {where}: no such key{hint}")
        elif problem["type"] == "dataclass_type":
            known = ", ".join(_keys_of(defaults, path))
            yield scrubbed(f"  {where}: is a section, with the keys {known} ({_found(problem['input'])})")
        else:
            message = (
                problem["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list, [a, b, …]")
            )
            yield scrubbed(f"  {where}: {message} ({_found(problem['input'])})")


def _found(value: object) -> str:
    """What was given, unless it has a URL: of one that is not valid, nobody knows where its password ends."""
    return "not shown, as it may hold a password" if "://" in (text := repr(value)) else f"found {text}"


def _keys_of(defaults: object, path: list[str]) -> list[str]:
    """The keys of the section at `path`."""
    section: Any = defaults
    for part in path:
        section = getattr(section, part, None)
    keys = [field.name for field in dataclasses.fields(section)] if dataclasses.is_dataclass(section) else []
    return [*_OF_BOTH, *keys] if path == ["penalty"] else keys


def _nested(key: str, value: Any) -> Layer:
    for part in reversed(key.split(".")):
        value = {part: value}
    return typing.cast(Layer, value)


def _unquoted(value: str) -> str | None:
    """Text from the command line, without quotes around all of it."""
    if value in _NULL:
        return None
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        try:
            inner = yaml.load(value, yaml.BaseLoader)
        except yaml.YAMLError:
            return value
        return inner if isinstance(inner, str) else value
    return value


def _string_keys(values: Any) -> Any:
    """Keys as written: YAML 1.1 reads the key `on` of `penalty: {on: all}` as True."""
    if not isinstance(values, dict):
        return values
    return {"on" if key is True else str(key): _string_keys(value) for key, value in values.items()}


def _typed(hint: Any, value: Any, written: Any) -> Any:
    """YAML's value, corrected by its type. written: the same value with all scalars as text."""
    if _is_section(hint) and isinstance(value, dict) and isinstance(written, dict):
        hints = _hints(hint)
        return {key: _typed(_shorthand(key, hints), entry, written.get(key)) for key, entry in value.items()}
    if isinstance(value, list) and isinstance(written, list) and len(value) == len(written):
        return [_typed(_item(hint), *pair) for pair in zip(value, written, strict=True)]
    if value is None or isinstance(value, str | list | dict) or not isinstance(written, str):
        return value
    if _is_text(hint):
        return written
    return _number(written, value) if _kinds(hint) & {int, float} else value


def _number(written: str, value: Any) -> Any:
    """Read in decimal: YAML 1.1 takes 010 for 8 and 1:30 for 90."""
    for kind in (int, float):
        try:
            return kind(written)
        except ValueError:
            continue
    plain = written.lstrip("+-")[:2].lower() in ("0x", "0o", "0b", ".i", ".n")
    return value if plain else written


def _hint(section: Any, path: list[str]) -> Any:
    """The type of the setting at `path`; None if there is no such setting."""
    for part in path:
        if not _is_section(section):
            return None
        section = _hints(section).get(part)
    return section


def _is_section(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint)


_hints = cache(typing.get_type_hints)  # a command line has dozens of settings


def _shorthand(key: str, hints: dict[str, Any]) -> Any:
    """The type of a key; for the shorthand `penalty.l2`, that of the players' own keys."""
    return hints.get(key, _hint(hints.get("G"), [key]))


def _item(hint: Any) -> Any:
    """The type of the entries of a list."""
    return next((arg for arg in typing.get_args(hint) if arg is not Ellipsis), None)


def _kinds(hint: Any) -> set[type]:
    """The plain types that a hint admits."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return {kind for arg in typing.get_args(hint) for kind in _kinds(arg)}
    if origin is Literal:
        return {type(arg) for arg in typing.get_args(hint)}
    if origin is typing.Annotated:
        return _kinds(typing.get_args(hint)[0])
    return {hint} if isinstance(hint, type) else set()


def _is_text(hint: Any) -> bool:
    return str in _kinds(hint)
