"""Which error reasons and event names the agent's code writes, read from its syntax trees."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from agent.core.types import InstanceState

APART = "agent/emulated/"
"""The emulated driver speaks NVIDIA's words: only what it raises and logs is read."""
REASON = re.compile(r"[A-Z][A-Z0-9]*(_([A-Z0-9]+|<>))*|<>(_[A-Z0-9]+)+")
"""A reason; `<>` stands for what is known only when the code runs."""
EVENT = re.compile(r"[a-z_]+(\.[a-z_]+)+")

_COMPOUND = re.compile(r"[A-Z][A-Z0-9]*(_([A-Z0-9]+|<>))+|<>(_[A-Z0-9]+)+")
_LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
_LOG = re.compile(r"(.*\.)?_?log(ger)?|(.*\.)?get_logger\(\)")
_EVENTS = re.compile(r"(.*\.)?_?events")
_REASON_AT = {"HttpError": 2, "CudaReply": 2, "Refused": 1, "Result": 1, "RejectedWindow": 1, "Verdict": 1, "_fail": 1}
"""Which argument of a call is a reason, where it is not the first."""
_TAKES_REASON = {"refused", "broken", "fail", "RefuseWaiters", "Unplaceable", "_refusal", "_not_begun", *_REASON_AT}
"""Calls that pass a reason on, beside the constructors of errors."""
_STATES = {f"instance.{state.value.lower()}" for state in InstanceState if state is not InstanceState.STARTING}


@dataclass
class Vocabulary:
    """Each name with the first place where it stands; `wrong`: names in a place of theirs that have no such form."""

    reasons: dict[str, str] = field(default_factory=dict)
    events: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def collect(sources: Iterable[tuple[str, str]], kinds: Iterable[str] = ("HibernodeError",)) -> Vocabulary:
    """The vocabulary of modules given as (path, source). `kinds`: known error classes; subclasses are found.

    A string of capitals with `_` is taken for a reason wherever it stands; a single word only where a reason is
    expected. Names that reach a call through a variable are found where the variable is assigned in that module.
    """
    trees = [(path, ast.parse(source)) for path, source in sources]
    errors = _subclasses([tree for _, tree in trees], set(kinds))
    constants = _constants(tree for _, tree in trees)
    found = Vocabulary()
    for path, tree in trees:
        own = constants | _assignments(tree)
        for node in ast.walk(tree):
            place = f"{path}:{getattr(node, 'lineno', 0)}"
            text = _text(node)
            if text is not None and _COMPOUND.fullmatch(text) and not path.startswith(APART):
                found.reasons.setdefault(text, place)
            if isinstance(node, ast.Call):
                reason, is_error = _reason_of(node, errors)
                for name in _values(reason, own):
                    if is_error or REASON.fullmatch(name):
                        _put(found.reasons, found.wrong, REASON, name, place)
                for name in _values(_event_of(node), own):
                    for one in sorted(_STATES) if name == "instance.<>" else [name]:
                        _put(found.events, found.wrong, EVENT, one, place)
    return found


def listed(page: str) -> list[str]:
    """The names that a page of the documentation lists: each row of a table begins with one, as code."""
    return [re.sub(r"<\w+>", "<>", name) for name in re.findall(r"(?m)^\| `([^`]+)` \|", page)]


def _put(names: dict[str, str], wrong: list[str], form: re.Pattern[str], name: str, place: str) -> None:
    if form.fullmatch(name):
        names.setdefault(name, place)
    else:
        wrong.append(f"{place}: {name!r}")


def _reason_of(call: ast.Call, errors: set[str]) -> tuple[ast.expr | None, bool]:
    """The argument that is a reason, and whether the call makes an error."""
    name = ast.unparse(call.func).rpartition(".")[2]
    at = _REASON_AT.get(name, 0)
    takes = name in errors or name in _TAKES_REASON
    return (call.args[at] if takes and len(call.args) > at else None), name in errors


def _event_of(call: ast.Call) -> ast.expr | None:
    if ast.unparse(call.func).rpartition(".")[2] == "Note" and call.args:
        return call.args[0]
    if not isinstance(call.func, ast.Attribute):
        return None
    receiver = ast.unparse(call.func.value)
    if call.func.attr in _LEVELS and (_LOG.fullmatch(receiver) or _EVENTS.fullmatch(receiver)) and call.args:
        return call.args[0]
    if call.func.attr == "add" and _EVENTS.fullmatch(receiver) and len(call.args) > 1:
        return call.args[1]
    return None


def _values(node: ast.expr | None, names: dict[str, set[str]]) -> Iterator[str]:
    """The texts that an expression may have, as far as they stand in the code."""
    match node:
        case ast.IfExp():
            yield from _values(node.body, names)
            yield from _values(node.orelse, names)
        case ast.BoolOp():
            for part in node.values:
                yield from _values(part, names)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            yield from sorted(names.get(name, ()))
        case None:
            pass
        case _:
            text = _text(node)
            if text is not None:
                yield text


def _text(node: ast.AST) -> str | None:
    """A string, with `<>` for each part of an f-string that is computed; of "REASON: message" the reason."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        parts = [node.value]
    elif isinstance(node, ast.JoinedStr):
        parts = [str(part.value) if isinstance(part, ast.Constant) else "<>" for part in node.values]
    else:
        return None
    return "".join(parts).partition(": ")[0]


def _subclasses(trees: list[ast.Module], kinds: set[str]) -> set[str]:
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    while True:
        more = {one.name for one in classes if any(ast.unparse(base).rpartition(".")[2] in kinds for base in one.bases)}
        if more <= kinds:
            return kinds
        kinds |= more


def _constants(trees: Iterable[ast.Module]) -> dict[str, set[str]]:
    """Constants of modules and members of enums, which other modules may use by name."""
    found: dict[str, set[str]] = {}
    for tree in trees:
        for node in ast.walk(tree):
            for name, text in _named_texts(node):
                if name.isupper():
                    found.setdefault(name, set()).add(text)
    return found


def _assignments(tree: ast.Module) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        for name, text in _named_texts(node):
            found.setdefault(name, set()).add(text)
    return found


def _named_texts(node: ast.AST) -> Iterator[tuple[str, str]]:
    """What `name = "text"` and `name = "one" if condition else "other"` give a name to."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        branches = [node.value.body, node.value.orelse] if isinstance(node.value, ast.IfExp) else [node.value]
        for branch in branches:
            text = _text(branch)
            if text is not None:
                yield node.targets[0].id, text
