"""The names that gateway and ingress share are written once, in `hop_headers`."""

from __future__ import annotations

import ast
from pathlib import Path

import agent
from agent.http import header_filter, hop_headers

_ROOT = Path(agent.__file__).parent
_SHARED = (hop_headers.PREFIX.decode(), hop_headers.WAKE_PATH.decode())


def _literals(tree: ast.Module) -> list[ast.Constant]:
    """String and bytes literals, also within f-strings, but no docstrings of modules, functions or attributes."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in prose]


def _spelled_out(source: str) -> list[int]:
    found = []
    for literal in _literals(ast.parse(source)):
        text = literal.value.decode("latin-1") if isinstance(literal.value, bytes) else literal.value
        if isinstance(text, str) and any(name in text.lower() for name in _SHARED):
            found.append(literal.lineno)
    return found


def test_no_other_module_spells_a_hop_header_or_the_wake_path() -> None:
    planted = '"""x-hibernode-token in prose"""\nA = b"x-hibernode-token"\nB = f"{A} /hibernode/wake"\n'
    assert _spelled_out(planted) == [2, 3]
    found = {
        f"{path.relative_to(_ROOT)}:{line}"
        for path in _ROOT.rglob("*.py")
        if path != Path(hop_headers.__file__)
        for line in _spelled_out(path.read_text())
    }
    assert not found


def test_every_hop_header_is_stripped_from_a_clients_request() -> None:
    names = {value for name, value in vars(hop_headers).items() if name.isupper() and value.startswith(b"x-")}
    assert len(names) == 13, "twelve names and the prefix, all different"
    assert not header_filter.request_headers([(name, b"1") for name in names])
