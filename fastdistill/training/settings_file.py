"""A file of settings, JSON or YAML."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fastdistill.training.config import Config, UsageError, nearest, scalar_type


class _HeldTwiceError(ValueError):
    pass


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """The mapping of these pairs, whose keys must differ: the last would win in silence."""
    mapping = {}
    for key, value in pairs:
        if key in mapping:
            raise _HeldTwiceError(f"holds {key} twice")
        mapping[key] = value
    return mapping


class _Loader(yaml.SafeLoader):
    """PyYAML's loader of plain data, for keys that stand once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _once([(key.value, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)])
        return super().construct_mapping(node, deep)


# PyYAML reads YAML 1.1, in which 1e-3 is text and 1.0e-3 a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once)


def _yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


_LANGUAGES: dict[str, tuple[str, Callable[[str], Any]]] = {
    ".json": ("JSON", _json),
    ".yaml": ("YAML", _yaml),
    ".yml": ("YAML", _yaml),
}

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def read_settings(path: Path, *, called: str) -> dict[str, Any]:
    """The settings in a `.json`, `.yaml` or `.yml` file, each a field of `Config` with a value of its type.

    Raises `UsageError`, which begins with `called`, for a file that cannot be read or is not what its suffix says, for
    a key that is unknown or stands twice, and for a value of another type.
    """
    if path.suffix not in _LANGUAGES:
        raise UsageError(f"{called} must be a .json, .yaml or .yml file, got {path.suffix or 'no suffix'}")
    language, read = _LANGUAGES[path.suffix]
    try:
        settings = read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{called}: {error.strerror}") from error
    except _HeldTwiceError as error:
        raise UsageError(f"{called} {error}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{called} is not {language}: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        got = "nothing" if settings is None else repr(settings)
        raise UsageError(f"{called} must hold settings by name, got {got}")
    hints = typing.get_type_hints(Config)
    for key in settings:
        if key not in hints:
            raise UsageError(f"{called}: unknown key {key!r}{nearest(str(key), list(hints))}")
    return {key: _checked(value, hints[key], f"{called}: {key}") for key, value in settings.items()}


def _checked(value: Any, hint: Any, called: str) -> Any:
    """The value of a setting, a whole number as a float where the setting is one."""
    kind = scalar_type(hint)
    optional = type(None) in typing.get_args(hint)
    if value is None and optional:
        return None
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        quoted = " (in quotes, if it is the text that was meant)" if kind is str else ""
        raise UsageError(f"{called} must be {_KINDS[kind]}{' or null' if optional else ''}, got {value!r}{quoted}")
    return value
