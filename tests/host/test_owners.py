"""Only `Actor` changes its instance: no other module of agent/host assigns to an attribute of an actor."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from agent.host.instance import actor as actor_module
from agent.host.instance.actor import InstanceFigures

HOST = Path(actor_module.__file__).parents[1]


def assigned(tree: ast.AST) -> Iterator[ast.Attribute]:
    """Every attribute that is assigned, changed in place or deleted, also inside tuples."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            yield node


def attributes_of_actors() -> set[str]:
    tree = ast.parse(Path(actor_module.__file__).read_text())
    own = {node.attr for node in assigned(tree) if ast.unparse(node.value) == "self"}
    assert {"instance", "pool", "gpu_uuids", "handle_of_container"} <= own
    return own | {field.name for field in fields(InstanceFigures)}


def foreign_writes(source: str) -> list[str]:
    """Assignments to attributes with an actor's names on anything but `self`."""
    names = attributes_of_actors()
    return [
        ast.unparse(node)
        for node in assigned(ast.parse(source))
        if node.attr in names and ast.unparse(node.value) != "self"
    ]


@pytest.mark.parametrize("path", sorted(HOST.rglob("*.py")), ids=lambda path: str(path.relative_to(HOST)))
def test_no_other_module_writes_to_an_actor(path: Path) -> None:
    if path != Path(actor_module.__file__):
        assert foreign_writes(path.read_text()) == []


@pytest.mark.parametrize(
    "planted",
    [
        "self._actor.pool = None",
        "actor.figures.wakes += 1",
        "figures = actor.figures\nfigures.image_bytes = 0",
        "actor.gpu_uuids, other = new, old",
        "actor.instance: object = replace(actor.instance, busy=True)",
        "del owner.healthy",
    ],
)
def test_a_planted_write_is_found(planted: str) -> None:
    assert len(foreign_writes(planted)) == 1
