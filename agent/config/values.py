"""What the declared type of a key makes of a value, and how a wrong value is explained.

One rule reads every key: text is taken as written (`node_name: 0777`), and a word that YAML takes for a boolean means
that word where it is one of the key's own (`disk_limit: off`). A section or list without content has its defaults.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import inspect

from agent.config.units import DURATION, SIZE, Duration, Size
from agent.config.yaml_file import Scalar, is_integer, is_number

OrOff = Annotated[str, msgspec.Meta(extra={"off": True})]
"""Text for which `off` (also written false or no) has a meaning of its own; the value is then "off"."""

_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_MAX_DIGITS = 40
_SHOWN_CHARS = 60
_Lists = inspect.ListType | inspect.VarTupleType
_Numbers = inspect.IntType | inspect.FloatType


def settle(value: object, shape: inspect.Type) -> object:
    """The value with plain types, each `Scalar` as its declared type wants it; what doesn't suit stays as it is."""
    shape, has_off = _bare(shape)
    match value, shape:
        case Scalar(), _:
            return _settled(value, shape, has_off)
        case Mapping(), inspect.StructType(fields=fields):
            types = {field.encode_name: field for field in fields}
            return {
                key: settle(inner, types[key].type)
                for key, inner in value.items()
                if inner is not None or not _is_empty(types[key])
            }
        case Mapping(), _:
            inner_type = shape.value_type if isinstance(shape, inspect.DictType) else inspect.AnyType()
            return {key: settle(inner, inner_type) for key, inner in value.items()}
        case list(), _:
            item_type = shape.item_type if isinstance(shape, _Lists) else inspect.AnyType()
            return [settle(item, item_type) for item in value]
        case _:
            return value


def _is_empty(field: inspect.Field) -> bool:
    """Whether nothing means the default here: for `runtime:` with all its keys commented out, but not for `port:`."""
    shape, _ = _bare(field.type)
    return not field.required and isinstance(shape, inspect.StructType | inspect.DictType | _Lists)


def _bare(shape: inspect.Type) -> tuple[inspect.Type, bool]:
    """The type without `None` and annotations, and whether it is `OrOff`."""
    if isinstance(shape, inspect.UnionType):
        options = [option for option in shape.types if not isinstance(option, inspect.NoneType)]
        return _bare(options[0]) if len(options) == 1 else (shape, False)
    if isinstance(shape, inspect.Metadata):
        return _bare(shape.type)[0], bool((shape.extra or {}).get("off"))
    return shape, False


def _settled(scalar: Scalar, shape: inspect.Type, has_off: bool) -> object:
    value, written = scalar.value, scalar.written
    match shape:
        case inspect.StrType():
            return "off" if has_off and value is False else written
        case inspect.LiteralType(values=words):
            if isinstance(value, bool) and written not in words:
                return next((word for word in words if _BOOLEANS.get(str(word)) is value), written)
            return written
        case inspect.IntType():
            return int(written) if is_integer(written) and len(written) <= _MAX_DIGITS else written
        case inspect.FloatType():
            return float(written) if is_number(written) and len(written) <= _MAX_DIGITS else written
        case inspect.BoolType():
            return value if isinstance(value, bool) else _BOOLEANS.get(written.lower(), written)
        case inspect.CustomType():
            return written
        case _:
            return value


# --- error messages --------------------------------------------------------------------

_AT = re.compile(r"(?P<what>.*?)(?: - at `(?:key in )?\$(?P<path>[^`]*)`)?", re.DOTALL)
_EXPECTED = re.compile(r"Expected `(?P<expected>[^`]*)`(?P<bound>[^,]*)(?:, got `(?P<got>[^`]*)`)?")
_WORDS = {
    "object": "a mapping",
    "array": "a list",
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "nothing",
}
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+|\.\.\.)\]")


def explain(message: str, document: object, shape: inspect.Type) -> str:
    """msgspec's message reordered: the key path first, then all that is allowed there, and what was found."""
    parts = _AT.fullmatch(message)
    what, path = (parts["what"], (parts["path"] or "").removeprefix(".")) if parts else (message, "")
    if what.startswith("."):  # from bad_key
        return (path + what) if path else what[1:]
    if missing := re.fullmatch(r"Object missing required field `([^`]*)`", what):
        return f"{path + '.' if path else ''}{missing[1]}: required, but not there"
    expected = _EXPECTED.fullmatch(what)
    if expected or what.startswith("Invalid enum value"):
        what = _expected(expected, *_find(path, document, shape))
    return f"{path}: {what}" if path else what


def _find(path: str, document: object, shape: inspect.Type) -> tuple[object, inspect.Type]:
    """The value and its declared type at msgspec's key path; below `[...]`, a key that it does not name, no value."""
    for step in _STEP.finditer(path):
        shape, _ = _bare(shape)
        match shape:
            case inspect.StructType(fields=fields):
                shape = next((field.type for field in fields if field.encode_name == step[1]), inspect.AnyType())
                document = document.get(step[1]) if isinstance(document, Mapping) else None
            case inspect.DictType(value_type=inner):
                shape, document = inner, None
            case inspect.ListType(item_type=inner) | inspect.VarTupleType(item_type=inner):
                shape = inner
                index = int(step[2]) if step[2] and step[2].isdecimal() else -1
                document = document[index] if isinstance(document, list) and 0 <= index < len(document) else None
            case _:
                return None, inspect.AnyType()
    return document, _bare(shape)[0]


def _expected(message: re.Match[str] | None, value: object, shape: inspect.Type) -> str:
    wanted = allowed(shape)
    if message is None or (not message["got"] and isinstance(shape, inspect.LiteralType | _Numbers)):
        shown = f", got {_shown(value)}" if value is not None else ""
        close = _close(value, shape)
        return f"expected {wanted}{shown}{close}"
    if not wanted:
        wanted = " or ".join(_WORDS.get(word, word) for word in message["expected"].split(" | "))
    wanted += message["bound"]
    if not message["got"]:
        return f"expected {wanted}"
    is_named = value is not None and not isinstance(value, Mapping | list) and not isinstance(shape, inspect.StrType)
    got = _shown(value) if is_named else _WORDS.get(message["got"], message["got"])
    return f"expected {wanted}, got {got}"


def allowed(shape: inspect.Type) -> str:
    """What may stand there, in words; "" for a type without any of its own."""
    match shape:
        case inspect.LiteralType(values=words):
            *most, last = map(str, words)
            return f"{', '.join(most)} or {last}" if most else last
        case inspect.IntType() | inspect.FloatType():
            return _number_words(shape)
        case inspect.BoolType():
            return _WORDS["bool"]
        case inspect.StrType():
            return _WORDS["str"]
        case inspect.CustomType(cls=kind):
            return {Duration: DURATION, Size: SIZE}.get(kind, "")
        case _:
            return ""


def _number_words(shape: _Numbers) -> str:
    kind = "a whole number" if isinstance(shape, inspect.IntType) else "a number"
    if shape.multiple_of is not None:
        kind = f"a multiple of {shape.multiple_of}"
    if shape.ge is not None and shape.le is not None:
        return f"{kind} from {shape.ge} to {shape.le}"
    bounds = [
        f"{word} {bound}"
        for word, bound in (("above", shape.gt), ("at least", shape.ge), ("below", shape.lt), ("at most", shape.le))
        if bound is not None
    ]
    return f"{kind} {', '.join(bounds)}" if bounds else kind


def _close(value: object, shape: inspect.Type) -> str:
    if not isinstance(shape, inspect.LiteralType) or not isinstance(value, str):
        return ""
    words = [str(word) for word in shape.values]
    found = difflib.get_close_matches(value.lower(), [word.lower() for word in words], n=1, cutoff=0.7)
    return f"; did you mean {next(word for word in words if word.lower() == found[0])}?" if found else ""


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)[:_SHOWN_CHARS]
