"""Documents: every link, path and section that a text names exists, and the first pages stay short."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from .documents import TEXTS, Tree, anchors_of, read_tree, wrong_in

MAX_LINES = {"README.md": 130, "agent/ARCHITECTURE.md": 170}
TREE = Tree(
    frozenset(
        {
            "README.md",
            "agent/docs/design.md",
            "agent/docs/facts/gpu-checkpoint.md",
            "agent/core/step.py",
            "scripts/test",
        }
    ),
    {
        "README.md": "# Hibernode\n\n## A first function\n",
        "agent/docs/design.md": "# Design\n\n## 9. Central scheduler\n",
        "agent/docs/facts/gpu-checkpoint.md": "# GPUs\n\n## 1. Order\n\n7. A pitfall.\n\n```sh\n# 2. No heading\n```\n",
    },
)


def test_every_reference_leads_somewhere(tracked: list[Path], root: Path) -> None:
    tree = read_tree(root, tracked)
    wrong: list[str] = []
    for path in tracked:
        name = path.relative_to(root).as_posix()
        is_text = path.suffix in TEXTS or path.is_relative_to(root / "scripts") or path.is_relative_to(root / ".ci")
        if is_text and not name.startswith("agent/v1/"):
            wrong += wrong_in(name, path.read_text(encoding="utf-8"), tree)
    assert not wrong, "references that lead nowhere:\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", MAX_LINES)
def test_a_first_page_is_short(name: str, root: Path) -> None:
    lines = len((root / name).read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES[name], f"{name} has {lines} lines; move details to agent/docs"


def test_every_page_is_in_an_index(tracked: list[Path], root: Path) -> None:
    """The nearest README.md above a page links to it."""
    docs = root / "agent" / "docs"
    lost = []
    for page in (path for path in tracked if path.is_relative_to(docs) and path.suffix == ".md"):
        above = page.parents if page.name != "README.md" else page.parent.parents
        folder = next(folder for folder in above if (folder / "README.md").exists())
        if f"]({page.relative_to(folder).as_posix()})" not in (folder / "README.md").read_text(encoding="utf-8"):
            lost.append(str(page.relative_to(root)))
    assert not lost, f"not in the README.md above: {', '.join(lost)}"


# ---- each case is an error planted in a small repository ------------------------------------------------------------

PLANTED = [
    ("README.md", "see [x](agent/docs/none.md)", "agent/docs/none.md"),
    ("README.md", "see [x](agent/docs/design.md#none)", "agent/docs/design.md#none"),
    ("README.md", "see [x](#none)", "#none"),
    ("README.md", "[x]: ../outside.md", "../outside.md"),
    (
        "README.md",
        "[x](agent/docs/facts/gpu-checkpoint.md#2-no-heading)",
        "agent/docs/facts/gpu-checkpoint.md#2-no-heading",
    ),
    ("agent/docs/design.md", "[x](agent/core/step.py)", "agent/core/step.py"),
    ("README.md", "run `scripts/none`", "scripts/none"),
    ("agent/docs/design.md", "in `core/none.py`", "core/none.py"),
    ("agent/docs/design.md", "in agent/core/{step,none}.py", "agent/core/{step,none}.py"),
    ("agent/docs/design.md", "all of tests/*/test_<name>.py", "tests/*/test_<name>.py"),
    ("agent/core/step.py", '"""See docs/none.md."""', "docs/none.md"),
    ("agent/core/step.py", "X = 1  # as core/none.py does", "core/none.py"),
    ("agent/core/step.py", 'X = 1\n"""Rules (DESIGN, section 3)."""', "DESIGN"),
    ("agent/core/step.py", "# A freeze (facts 4)", "facts 4"),
    ("agent/core/step.py", '"""STYL' + 'E, "CLI"."""', "STYL" + "E"),
    ("agent/core/step.py", '"""agent/docs/design.md, section 3."""', "agent/docs/design.md, section 3"),
    (
        "agent/core/step.py",
        "# docs/facts/gpu-checkpoint.md,\n# pitfalls 7 and 8",
        "docs/facts/gpu-checkpoint.md, # pitfalls 7 and 8",
    ),
    ("agent/core/step.py", '"""README, "Nothing"."""', 'README, "Nothing"'),
    ("agent/core/step.py", '"""docs/design.md#none"""', "docs/design.md#none"),
    ("agent/core/step.py", 'raise ValueError("see docs/none.md")', "docs/none.md"),
    ("protos/x.proto", "// see agent/NONE.md", "agent/NONE.md"),
    ("scripts/lib.sh", "# as tests/none does", "tests/none"),
    ("agent/emulated/src/gate.c", "/* as in src/none.h */", "src/none.h"),
]


@pytest.mark.parametrize(("name", "text", "mention"), PLANTED)
def test_a_planted_error_is_found(name: str, text: str, mention: str) -> None:
    (found,) = wrong_in(name, f"\n{text}\n", TREE)
    assert found.startswith(f"{name}:{2 if chr(10) not in text or '#' in text else 3}: {mention}: ")


RIGHT = [
    ("README.md", "[x](agent/docs/design.md#9-central-scheduler), [y](#a-first-function), [z](https://x.y/none.md)"),
    (
        "README.md",
        "scripts/test, `agent/`, agent/core/step, agent/docs/*.md, agent/core/<name>.py, agent/{core,docs}, agent/...",
    ),
    (
        "README.md",
        "/var/lib/hibernode/agent/instances, https://example.com/agent/none.md, $ROOT/scripts/none.sh, `[x](none)`",
    ),
    ("README.md", "```sh\n[x](none.md)\n```"),
    (
        "agent/docs/design.md",
        "[x](facts/gpu-checkpoint.md), section 1; core/step.py; `facts/gpu-checkpoint.md`, pitfall 7",
    ),
    ("agent/docs/facts/gpu-checkpoint.md", "dask: distributed/worker.py"),
    ("agent/core/step.py", '"""docs/design.md, section 9; design.md#9-central-scheduler."""\nX = "agent/none.py"'),
    ("agent/core/step.py", '"""A design, its style and facts."""  # README, "A first function"'),
]


@pytest.mark.parametrize(("name", "text"), RIGHT)
def test_what_exists_may_be_named(name: str, text: str) -> None:
    assert wrong_in(name, text, TREE) == []


def test_anchors_are_those_of_github() -> None:
    text = '# The `hib` command: A, b\n## Twice\n## Twice\n### [Link](x.md) & more\n<a id="own"></a>\n'
    assert anchors_of(text) == {"the-hib-command-a-b", "twice", "twice-1", "link--more", "own"}


def members(source: str) -> dict[str, set[str]]:
    """The classes of a module, each with the names that it defines or sets."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            names = {one.name for one in ast.walk(node) if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)}
            names |= {one.attr for one in ast.walk(node) if isinstance(one, ast.Attribute)}
            names |= {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
            found.setdefault(node.name, set()).update(names)
    return found


def unknown_members(text: str, classes: dict[str, set[str]]) -> list[str]:
    """Every `Class.member` in backticks whose class exists and lacks the member."""
    named = re.findall(r"`([A-Z]\w*[a-z]\w*)\.(\w+)", text)
    return [f"{name}.{member}" for name, member in named if name in classes and member not in classes[name]]


def test_members_that_documents_name_exist(tracked: list[Path], root: Path) -> None:
    classes: dict[str, set[str]] = {}
    for path in tracked:
        if path.suffix == ".py":
            for name, names in members(path.read_text(encoding="utf-8")).items():
                classes.setdefault(name, set()).update(names)
    pages = [path for path in tracked if path.suffix == ".md" and path.is_relative_to(root / "agent")]
    wrong = [
        f"{path.relative_to(root)}: {one}"
        for path in pages
        for one in unknown_members(path.read_text(encoding="utf-8"), classes)
    ]
    assert not wrong, "named, but not there:\n" + "\n".join(wrong)


def test_a_member_that_is_gone_is_found() -> None:
    classes = members("class Pool:\n    size: int = 0\n    def take(self):\n        self.open = 1\n")
    assert unknown_members("`Pool.take`, `Pool.open`, `Pool.size`, `Tank.level` and `Pool.give()`", classes) == [
        "Pool.give"
    ]
