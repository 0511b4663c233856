"""Reads an s.yaml into plain data with the line of every key, and substitutes its variables.

`${vars.a.b}` is a value of the file's `vars` (which may use others); `${env('NAME')}` and `${env('NAME', 'default')}`
are environment variables. A value that is one expression takes the type of its result; within a text the result becomes
text. `$${` or `\\${` is a literal `${`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from agent.config.yaml_file import MAX_FILE_BYTES, value_of
from agent.core.errors import ConfigError
from agent.core.sizes import size_text

KeyPath = tuple[str | int, ...]

MAX_VALUES = 20_000
"""Limits files whose aliases expand to a huge document."""
MAX_DEPTH = 50
MAX_TEXT_CHARS = 64 * 1024


@dataclass(frozen=True, slots=True)
class Text:
    """A scalar: its YAML value, and its text in the file (a variable `on` must not become `True`)."""

    value: object
    written: str


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file. `name`: for errors. `tree`: dicts, lists, `Text`s. `lines`: line of each key and item, from 1."""

    name: str
    tree: object
    lines: Mapping[KeyPath, int]

    def wrong(self, path: KeyPath, problem: str) -> ConfigError:
        """An error about the value at `path`, with file, line and key path."""
        return ConfigError("S_YAML_INVALID", f"{self.at(path)}: {problem}", file=self.name, key=dotted(path))

    def at(self, path: KeyPath) -> str:
        """`s.yaml:12: resources.a.props.timeout`; the line is that of the nearest existing key."""
        known = path
        while known and known not in self.lines:
            known = known[:-1]
        line = self.lines.get(known, 1)
        return f"{self.name}:{line}: {dotted(path)}" if path else f"{self.name}:{line}"

    def lookup(self, path: KeyPath) -> object:
        """The value at `path`, or None."""
        found = self.tree
        for key in path:
            match found, key:
                case dict(), str() if key in found:
                    found = found[key]
                case list(), int() if key < len(found):
                    found = found[key]
                case _:
                    return None
        return found


def dotted(path: KeyPath) -> str:
    """`resources.a.triggers[0].triggerName`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def plain(tree: object) -> object:
    """The tree with the YAML values of its `Text`s."""
    match tree:
        case Text():
            return tree.value
        case dict():
            return {key: plain(value) for key, value in tree.items()}
        case list():
            return [plain(value) for value in tree]
        case _:
            return tree


def read_document(path: Path, environment: Mapping[str, str] = os.environ) -> Document:
    """Parses the file and substitutes its variables. Raises ConfigError naming file, line and key."""
    name = path.name
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        message = f"{path} can't be read: {error.strerror}; name the file with -t"
        raise ConfigError("S_YAML_UNREADABLE", message, file=str(path)) from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError("S_YAML_INVALID", f"{path} is larger than {size_text(MAX_FILE_BYTES)}; is it the right file?")
    if path.suffix == ".json":
        content = content.replace(b"\t", b"  ")  # YAML accepts JSON except for tabs, which are only layout in JSON
    loader = None
    try:
        loader = yaml.SafeLoader(content)
        root = loader.get_single_node()
        reader = _Reader(name, loader)
        tree = reader.read(root, (), 0) if root is not None else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError("S_YAML_INVALID", f"{name}:{line}: not YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError("S_YAML_INVALID", f"{name}: not YAML: {type(error).__name__}") from error
    finally:
        if loader is not None:
            loader.dispose()
    return _Substitution(Document(name, tree, reader.lines), environment).result()


class _Reader:
    """Converts YAML nodes to `Text`s, lists and dicts, and records their lines."""

    def __init__(self, name: str, loader: yaml.SafeLoader) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._document = Document(name, {}, self.lines)
        self._loader = loader
        self._count = 0

    def read(self, node: yaml.Node, path: KeyPath, depth: int) -> object:
        self.lines.setdefault(path, node.start_mark.line + 1)
        self._count += 1
        if self._count > MAX_VALUES or depth > MAX_DEPTH:
            text = "the file has too many values, or nests them too deeply; is it the right file?"
            raise self._document.wrong(path, text)
        match node:
            case yaml.ScalarNode():
                return Text(value_of(self._loader.construct_object(node), node.value), node.value)
            case yaml.SequenceNode():
                return [self.read(item, (*path, index), depth + 1) for index, item in enumerate(node.value)]
            case yaml.MappingNode():
                return self._mapping(node, path, depth)
            case _:
                raise self._document.wrong(path, "only mappings, lists and plain values are supported")

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, depth: int) -> dict[str, object]:
        self._refuse_repeated(node, path)
        self._loader.flatten_mapping(node)  # merge keys: `<<: *defaults`
        found: dict[str, object] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._document.wrong(path, "a key must be a plain word")
            key = key_node.value
            self.lines[(*path, key)] = key_node.start_mark.line + 1
            found[key] = self.read(value_node, (*path, key), depth + 1)
        return found

    def _refuse_repeated(self, node: yaml.MappingNode, path: KeyPath) -> None:
        """Refuses a repeated key, of which YAML would silently keep the last. Keys of a merge may be overwritten."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    self.lines[(*path, key_node.value)] = key_node.start_mark.line + 1
                    raise self._document.wrong((*path, key_node.value), "is written twice")
                seen.add(key_node.value)


_EXPRESSION = re.compile(r"(?P<escaped>(?:\$|\\)\$\{)|\$\{(?P<inner>[^{}]*)\}|(?P<open>\$\{)")
_VARS = re.compile(r"vars((?:\.[A-Za-z0-9_-]+)+)", re.ASCII)
_ENV = re.compile(
    r"""env\(\s*(?P<q>['"]?)(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P=q)\s*"""
    r"""(?:,\s*(?P<r>['"]?)(?P<default>[^'"]*)(?P=r)\s*)?\)""",
    re.ASCII,
)


class _Substitution:
    """Substitutes the expressions of a document."""

    def __init__(self, document: Document, environment: Mapping[str, str]) -> None:
        self._document = document
        self._environment = environment
        self._count = 0

    def result(self) -> Document:
        return Document(self._document.name, self._fill(self._document.tree, (), ()), self._document.lines)

    def _fill(self, tree: object, path: KeyPath, within: tuple[KeyPath, ...]) -> object:
        """`path`: for errors. `within`: the variables being substituted, to detect a cycle."""
        self._count += 1
        if self._count > MAX_VALUES:
            raise self._document.wrong(path, "the variables expand to too many values; is it the right file?")
        match tree:
            case Text(value=str()):
                return self._text(tree, path, within)
            case dict():
                return {key: self._fill(value, (*path, key), within) for key, value in tree.items()}
            case list():
                return [self._fill(value, (*path, index), within) for index, value in enumerate(tree)]
            case _:
                return tree

    def _text(self, text: Text, path: KeyPath, within: tuple[KeyPath, ...]) -> object:
        whole = _EXPRESSION.fullmatch(text.written)
        if whole and whole["inner"] is not None:
            return self._value(whole["inner"].strip(), path, within)

        def part(found: re.Match[str]) -> str:
            if found["escaped"]:
                return "${"
            if found["open"]:
                raise self._document.wrong(path, "`${` has no `}`; write `$${` for a literal `${`")
            value = self._value(found["inner"].strip(), path, within)
            if not isinstance(value, Text):
                text = f"${{{found['inner']}}} is a list or a mapping and can't be part of a text"
                raise self._document.wrong(path, text)
            return value.written

        filled = _EXPRESSION.sub(part, text.written)
        if len(filled) > MAX_TEXT_CHARS:
            raise self._document.wrong(path, f"is longer than {MAX_TEXT_CHARS} characters after substitution")
        return Text(filled, filled)

    def _value(self, expression: str, path: KeyPath, within: tuple[KeyPath, ...]) -> object:
        if variable := _VARS.fullmatch(expression):
            return self._variable(("vars", *variable[1].removeprefix(".").split(".")), path, within)
        if env := _ENV.fullmatch(expression):
            found = self._environment.get(env["name"], env["default"])
            if found is None:
                raise self._document.wrong(path, f"the environment has no variable {env['name']}; export it")
            return Text(found, found)
        supported = "use ${vars.NAME} or ${env('NAME')}, or `$${` for a literal `${`"
        raise self._document.wrong(path, f"unknown expression ${{{expression[:60]}}}; {supported}")

    def _variable(self, variable: KeyPath, path: KeyPath, within: tuple[KeyPath, ...]) -> object:
        if variable in within:
            raise self._document.wrong(path, f"{dotted(variable)} refers to itself")
        found = self._document.lookup(variable)
        if found is None:
            known = self._document.lookup(("vars",))
            names = ", ".join(f"vars.{key}" for key in known) if isinstance(known, dict) and known else "none"
            raise self._document.wrong(path, f"unknown variable ${{{dotted(variable)}}}; defined: {names}")
        return self._fill(found, path, (*within, variable))
