"""Reading configuration: YAML to declared types, strictly.

A declared type is a `Section` (agent/settings/ for the daemons; `s.yaml` has types of its own). Unknown keys and wrong
types are refused with key path and fix, all unknown keys in one message. Durations (`10s`) and sizes (`16GiB`) are
written with their unit and read as integers: the key of a field `max_hold_ns: Duration` is `max_hold`, that of
`reserve_bytes: Size` is `reserve`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from agent.config.units import Duration, Size, parse_duration_ns, parse_size_bytes
from agent.config.values import OrOff, explain, settle
from agent.config.yaml_file import Scalar, file_error, read_scalars, read_yaml

__all__ = [
    "Duration",
    "OrOff",
    "Section",
    "Size",
    "bad_key",
    "convert",
    "key_paths",
    "load",
    "parse_duration_ns",
    "parse_size_bytes",
    "read_yaml",
]

T = TypeVar("T")


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


def _decode(kind: type, value: object) -> object:
    if kind is Duration:
        return Duration(parse_duration_ns(value))
    if kind is Size:
        return Size(parse_size_bytes(value))
    raise NotImplementedError(f"no rule reads a {kind.__name__} from a configuration file")


def load(source: Path | str | Mapping[str, object], kind: type[T]) -> T:
    """Read a file (or, for tests and the demo, a mapping) as the declared type `kind`.

    Raises ConfigError (reason CONFIG_INVALID) whose message names the file, the key path and the fix.
    """
    if isinstance(source, Mapping):
        return convert(source, kind, name="configuration")
    path = Path(source)
    return convert(read_scalars(path), kind, name=str(path))


def convert(document: object, kind: type[T], *, name: str) -> T:
    """Convert a parsed document to `kind`; `name` is its source in error messages. Scalars may be plain values."""
    if not isinstance(document, Mapping):
        raise file_error(name, f"must be a mapping of keys to values, found {_yaml_type(document)}")
    shape = msgspec.inspect.type_info(kind)
    unknown = list(_unknown_keys(document, shape, "", shape))
    if unknown:
        raise file_error(name, "; ".join(unknown[:10]))
    settled = settle(document, shape)
    try:
        return msgspec.convert(settled, kind, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise file_error(name, explain(str(error), settled, shape)) from error


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


def _yaml_type(value: object) -> str:
    value = value.value if isinstance(value, Scalar) else value
    if isinstance(value, list):
        return "a list"
    return "text" if isinstance(value, str) else type(value).__name__
