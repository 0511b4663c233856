"""Words: a class name stands for one idea, settings are called settings, and retired words stay retired."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

import agent.settings as settings
from agent.config import Section

APART = ("emulated", "examples")
"""Programs of their own, which import nothing of the agent: their classes may be called as the agent's are."""

RETIRED = {
    "Passage": "ProxiedRequest",
    "Backlog": "RequestQueue",
    "FunctionSlots": "InstanceIndex",
    "GpuDesk": "GpuBroker",
    "MemoryDesk": "MemoryReservations",
    "ExecDesk": "ExecSessions",
    "Ingresses": "IngressPools",
    "Trespass": "GpuIsolation",
    "LateHeaders": "DeferredHeaders",
    "LateRelay": "DelayedHeadRelay",
    "HeldInstances": "FreezerRegistry",
    "GPU book": "GPU allocator",
    "GPU_TRESPASS": "gpu.isolation_violated",
    "ENGINE_DOWN": "engine.down",
    "ENGINE_UP": "engine.up",
    "x-hibernode-any": "x-hibernode-any-instance",
    "x-hibernode-notice": "x-hibernode-started",
    "shunned": "unhealthy",
    "hopeless": "no_capacity_expected",
    "regear": "resize",
    "relist": "reindex",
    "counted_out": "on_lost_node",
    "sent ahead": "dispatched early",
    "reckoned with": "(say what happens)",
    "nobody": "(name the component)",  # in quotes it is an account
    "whoever": "(name the component)",
}
"""Words of earlier versions and what is said now (agent/docs/glossary.md)."""


def classes(source: str) -> list[str]:
    """The public classes that a module defines."""
    return [node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name[0] != "_"]


def repeated(modules: Iterable[tuple[str, str]]) -> list[str]:
    """Public class names that more than one of the modules (name, source) defines."""
    homes: dict[str, list[str]] = defaultdict(list)
    for name, source in modules:
        for one in classes(source):
            homes[one].append(name)
    return [f"{one}: {', '.join(where)}" for one, where in sorted(homes.items()) if len(where) > 1]


def retired_words(text: str) -> list[tuple[int, str]]:
    """Line numbers and words, for all retired words in `text`."""
    pattern = re.compile(r"(?<![\w-])(?:" + "|".join(map(re.escape, RETIRED)) + r")(?![\w-])")
    hits = [hit for hit in pattern.finditer(text) if hit[0] != "nobody" or text[hit.start() - 1] not in '`"']
    return [(text.count("\n", 0, hit.start()) + 1, hit[0]) for hit in hits]


def sources(tracked: list[Path], root: Path) -> list[Path]:
    return [
        one for one in tracked if one.is_relative_to(root / "agent") and not one.is_relative_to(root / "agent" / "v1")
    ]


def test_a_class_name_stands_for_one_idea(tracked: list[Path], root: Path) -> None:
    apart = [root / "agent" / name for name in APART]
    modules = [
        (str(one.relative_to(root)), one.read_text())
        for one in sources(tracked, root)
        if one.suffix == ".py" and not any(one.is_relative_to(folder) for folder in apart)
    ]
    found = repeated(modules)
    assert not found, "name them apart:\n" + "\n".join(found)


def test_the_search_for_repeated_class_names_finds_them() -> None:
    assert repeated([("a", "class Plan: ..."), ("b", "class Plan: ...\nclass _Own: ...")]) == ["Plan: a, b"]


def test_settings_classes_are_called_settings() -> None:
    named = {name: one for name, one in vars(settings).items() if isinstance(one, type) and issubclass(one, Section)}
    assert named, "agent.settings exports the classes of the configuration"
    wrong = [name for name in named if not name.endswith(("Settings", "Config")) and name != "NodeCredential"]
    assert not wrong, f"end in Settings: {', '.join(wrong)}"


def test_retired_words_stay_retired(tracked: list[Path], root: Path) -> None:
    texts = [one for one in sources(tracked, root) if one.suffix in {".py", ".md", ".c", ".h", ".yaml"}]
    texts += [one for one in tracked if one.is_relative_to(root / "protos") or one == root / "README.md"]
    found = [
        f"{one.relative_to(root)}:{line}: {word!r}: say {RETIRED[word]}"
        for one in texts
        if not one.is_relative_to(root / "agent" / "docs" / "facts")
        for line, word in retired_words(one.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("text", ["class Passage:", "# the GPU book", "what was sent ahead", "x nobody waits"])
def test_the_search_for_retired_words_finds_them(text: str) -> None:
    assert retired_words(f"\n{text}\n")[0][0] == 2
