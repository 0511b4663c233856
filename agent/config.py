"""Reading configuration: YAML to declared types, strictly.

A declared type is a `Section` (agent/settings/ for the daemons; `s.yaml` has types of its own). Unknown keys and wrong
types are refused with key path and fix, all unknown keys in one message. Durations (`10s`) and sizes (`16GiB`) are
written with their unit and read as integers: the key of a field `max_hold_ns: Duration` is `max_hold`, that of
`reserve_bytes: Size` is `reserve`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import TypeVar

import msgspec
import yaml

from agent.core.errors import ConfigError

T = TypeVar("T")

MAX_FILE_BYTES = 1 << 20
"""A larger file is taken for a mistake, such as the path of a log or a model."""


class Duration(int):
    """Integer nanoseconds; written `10s`, `500ms`, `1m30s`, or a bare 0."""

    __slots__ = ()


class Size(int):
    """Integer bytes; written `16GiB`, `8KiB`, `500MB`, or a bare 0."""

    __slots__ = ()


def _key_of(field: str) -> str | None:
    """The key without the field's unit suffix. None keeps the name."""
    for suffix in ("_ns", "_bytes"):
        if field.endswith(suffix):
            return field.removesuffix(suffix)
    return None


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename=_key_of):
    """Base of every declared configuration type. Its `__post_init__` raises `bad_key(...)` for a bad value."""


def bad_key(key: str, problem: str) -> ValueError:
    """The error for a Section's `__post_init__` to raise; `load` puts the section's path before the key."""
    return ValueError(f".{key}: {problem}")


# --- durations and sizes ---------------------------------------------------------------------

_NS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9, "d": 86400 * 10**9}
_BYTES = {"B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}
_PART = re.compile(r"(\d+(?:\.\d+)?)([A-Za-z]+)", re.ASCII)
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ns|us|ms|s|m|h|d))+", re.ASCII)
_SIZE = re.compile(r"\d+(?:\.\d+)?(?:[KMGT]i?)?B", re.ASCII)
_LIMIT = 1 << 63


def parse_duration_ns(text: object) -> int:
    """`10s`, `500ms`, `2m`, `1m30s` or a zero, as integer nanoseconds. Raises ValueError with the fix."""
    return _parse(text, _DURATION, _NS, "a duration with its unit, such as 500ms, 10s, 2m or 1h")


def parse_size_bytes(text: object) -> int:
    """`16GiB` (powers of 1024), `500MB` (powers of 1000), `64B` or a zero, as bytes. Raises ValueError."""
    return _parse(text, _SIZE, _BYTES, "a size with its unit, such as 64KiB, 512MiB, 16GiB or 80GB")


def _parse(text: object, form: re.Pattern[str], units: Mapping[str, int], expected: str) -> int:
    if not isinstance(text, bool) and text in (0, "0"):
        return 0
    shown = repr(text) if isinstance(text, str) else f"{text!r} ({type(text).__name__})"
    if not isinstance(text, str) or len(text) > 64 or not form.fullmatch(text):
        raise ValueError(f"expected {expected}, got {shown[:80]}")
    total = sum((Decimal(number) * units[unit] for number, unit in _PART.findall(text)), start=Decimal(0))
    if total != int(total) or total >= _LIMIT:
        raise ValueError(f"expected {expected}; {shown} is not a whole number of the smallest unit, or too large")
    return int(total)


def _decode(kind: type, value: object) -> object:
    if kind is Duration:
        return Duration(parse_duration_ns(value))
    if kind is Size:
        return Size(parse_size_bytes(value))
    raise NotImplementedError(f"no rule reads a {kind.__name__} from a configuration file")


# --- files -----------------------------------------------------------------------------------


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice; YAML would silently use the last one."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[object, object]:
    loader.flatten_mapping(node)
    found: dict[object, object] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
        if key in found:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is written twice", key_node.start_mark)
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path) -> object:
    """The document in a file, with plain types only; an empty file is an empty mapping.

    Raises ConfigError naming the file and the line: not readable, too large, not YAML, a key written twice.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise _error(path, f"can't be read: {why}; check the path and its permissions") from error
    if len(text) > MAX_FILE_BYTES:
        raise _error(path, f"is larger than {MAX_FILE_BYTES} bytes; is this the right file?")
    try:
        document = yaml.load(text, _StrictLoader)  # noqa: S506 - a subclass of SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise _error(path, f"is not valid YAML: {_yaml_problem(error)}") from error
    return {} if document is None else document


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())[:200]


def load(source: Path | str | Mapping[str, object], kind: type[T]) -> T:
    """Read a file (or, for tests and the demo, a mapping) as the declared type `kind`.

    Raises ConfigError (reason CONFIG_INVALID) whose message names the file, the key path and the fix.
    """
    if isinstance(source, Mapping):
        return convert(source, kind, name="configuration")
    path = Path(source)
    return convert(read_yaml(path), kind, name=str(path))


def convert(document: object, kind: type[T], *, name: str) -> T:
    """Convert a parsed document to `kind`; `name` is its source in error messages."""
    if not isinstance(document, Mapping):
        raise _error(name, f"must be a mapping of keys to values, found {_yaml_type(document)}")
    shape = msgspec.inspect.type_info(kind)
    unknown = list(_unknown_keys(document, shape, "", shape))
    if unknown:
        raise _error(name, "; ".join(unknown[:10]))
    try:
        return msgspec.convert(document, kind, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise _error(name, _explain(str(error), document)) from error


def _error(name: Path | str, problem: str) -> ConfigError:
    return ConfigError("CONFIG_INVALID", f"{name}: {problem}", file=str(name))


# --- error messages --------------------------------------------------------------------


def _unknown_keys(value: object, shape: msgspec.inspect.Type, path: str, root: msgspec.inspect.Type) -> Iterator[str]:
    match shape, value:
        case msgspec.inspect.UnionType(types=types), _:
            for option in types:
                yield from _unknown_keys(value, option, path, root)
        case msgspec.inspect.StructType(fields=fields), Mapping():
            known = {field.encode_name: field.type for field in fields}
            for key, inner in value.items():
                here = f"{path}.{key}" if path else str(key)
                if key in known:
                    yield from _unknown_keys(inner, known[key], here, root)
                else:
                    yield f"{here}: unknown key; {_suggest(str(key), path, list(known), root)}"
        case ((msgspec.inspect.ListType(item_type=item) | msgspec.inspect.VarTupleType(item_type=item)), list()):
            for index, inner in enumerate(value):
                yield from _unknown_keys(inner, item, f"{path}[{index}]", root)
        case msgspec.inspect.DictType(value_type=item), Mapping():
            for key, inner in value.items():
                yield from _unknown_keys(inner, item, f"{path}.{key}", root)
        case _:
            pass


def _suggest(key: str, path: str, known: list[str], root: msgspec.inspect.Type) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    if close:
        return f"did you mean {path + '.' if path else ''}{close[0]}?"
    elsewhere = [found for found in key_paths(root) if found.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"known here: {', '.join(known)}"


def key_paths(shape: msgspec.inspect.Type, prefix: str = "") -> Iterator[str]:
    """Every key of a declared type as a dotted path; a section before its keys, list items as `name[]`."""
    match shape:
        case msgspec.inspect.UnionType(types=types):
            for option in types:
                yield from key_paths(option, prefix)
        case msgspec.inspect.StructType(fields=fields):
            for field in fields:
                path = f"{prefix}.{field.encode_name}" if prefix else field.encode_name
                yield path
                yield from key_paths(field.type, path)
        case msgspec.inspect.ListType(item_type=item) | msgspec.inspect.VarTupleType(item_type=item):
            yield from key_paths(item, f"{prefix}[]")
        case _:
            pass


_AT = re.compile(r"(?P<what>.*?)(?: - at `(?:key in )?\$(?P<path>[^`]*)`)?", re.DOTALL)
_EXPECTED = re.compile(r"Expected `(?P<expected>[^`]*)`(?P<bound>[^,]*)(?:, got `(?P<got>[^`]*)`)?")
_WORDS = {"object": "a mapping", "array": "a list", "str": "text", "int": "a whole number", "null": "nothing"}


def _explain(message: str, document: Mapping[object, object]) -> str:
    """msgspec's message reordered: the key path first, then what was expected and what was found."""
    parts = _AT.fullmatch(message)
    what, path = (parts["what"], (parts["path"] or "").removeprefix(".")) if parts else (message, "")
    if what.startswith("."):  # from bad_key
        return (path + what) if path else what[1:]
    if expected := _EXPECTED.fullmatch(what):
        wanted = " or ".join(_WORDS.get(word, word) for word in expected["expected"].split(" | "))
        what = f"expected {wanted}{expected['bound']}"
        if expected["got"]:
            what += f", got {_WORDS.get(expected['got'], expected['got'])}"
    elif missing := re.fullmatch(r"Object missing required field `([^`]*)`", what):
        return f"{path + '.' if path else ''}{missing[1]}: required, but not there"
    return f"{path}: {what}" if path else what


def _yaml_type(value: object) -> str:
    if isinstance(value, list):
        return "a list"
    return "text" if isinstance(value, str) else type(value).__name__
