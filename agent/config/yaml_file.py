"""Reading a YAML file without the surprises of YAML 1.1.

YAML 1.1 takes `off` for a boolean, `0777` for 511, `12:30` for 750 and `2026-01-01` for a date. What a value means is
decided by the declared type of its key (values.py), so a file is read as `Scalar`s, which keep their text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from agent.core.errors import ConfigError
from agent.core.sizes import size_text

MAX_FILE_BYTES = 1 << 20
"""A larger file is taken for a mistake, such as the path of a log or a model."""

_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)", re.ASCII)
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Scalar:
    """A value that is neither a list nor a mapping: what it is by `value_of`, and its text in the file."""

    value: object
    written: str


def is_integer(text: str) -> bool:
    """Whether this is a whole number in decimal, without leading zeros."""
    return _INTEGER.fullmatch(text) is not None


def is_number(text: str) -> bool:
    """Whether this is a decimal number, with or without a fraction and an exponent."""
    return _NUMBER.fullmatch(text) is not None


def value_of(parsed: object, written: str) -> object:
    """PyYAML's value of a scalar, or its text where PyYAML takes it for something that was hardly meant: numbers that
    are not decimal, and dates."""
    if parsed is None or isinstance(parsed, bool):
        return parsed
    if isinstance(parsed, int) and is_integer(written):
        return parsed
    if isinstance(parsed, float) and is_number(written):
        return parsed
    return written


class _ScalarLoader(yaml.SafeLoader):
    """A SafeLoader that makes `Scalar`s, except of nothing, and takes keys as written. It refuses a key written twice,
    of which YAML would silently use the last one; a key of a merge (`<<`) may be written again."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        parsed: object = super().construct_object(node, deep)
        if not isinstance(node, yaml.ScalarNode) or parsed is None:
            return parsed
        return self.scalar(value_of(parsed, node.value), node.value)

    def scalar(self, value: object, written: str) -> object:
        return Scalar(value, written)

    def mapping(self, node: yaml.MappingNode) -> dict[str, object]:
        own = [_key(key_node) for key_node, _ in node.value]
        for index, key in enumerate(own):
            if key in own[:index]:
                mark = node.value[index][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is written twice", mark)
        self.flatten_mapping(node)
        return {_key(key_node): self.construct_object(value, deep=True) for key_node, value in node.value}


class _ValueLoader(_ScalarLoader):
    """The same with plain values instead of `Scalar`s."""

    def scalar(self, value: object, written: str) -> object:
        return value


def _key(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", node.start_mark)
    written: str = node.value
    return written


_ScalarLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _ScalarLoader.mapping)


def read_scalars(path: Path) -> object:
    """The document in a file as lists, mappings and `Scalar`s; an empty file is an empty mapping.

    Raises ConfigError naming the file and the line: not readable, too large, not YAML, a key written twice.
    """
    return _read(path, _ScalarLoader)


def read_yaml(path: Path) -> object:
    """The document in a file with plain values, for what has no declared type. Raises as `read_scalars` does."""
    return _read(path, _ValueLoader)


def _read(path: Path, loader: type[Any]) -> object:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise file_error(path, f"can't be read: {why}; check the path and its permissions") from error
    if len(text) > MAX_FILE_BYTES:
        raise file_error(path, f"is larger than {size_text(MAX_FILE_BYTES)}; is this the right file?")
    try:
        document = yaml.load(text, loader)  # noqa: S506 - a subclass of SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise file_error(path, f"is not valid YAML: {_problem(error)}") from error
    return {} if document is None else document


def _problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())[:200]


def file_error(name: Path | str, problem: str) -> ConfigError:
    """The error for a problem in a configuration file."""
    return ConfigError("CONFIG_INVALID", f"{name}: {problem}", file=str(name))
