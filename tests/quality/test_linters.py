"""Each linter is one test case: what scripts/check runs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Lint

PYTHON = sys.executable


def test_code_is_formatted(lint: Lint) -> None:
    lint(PYTHON, "-m", "ruff", "format", "--check", ".", fix="scripts/check --fix")


def test_ruff_has_no_objection(lint: Lint) -> None:
    lint(PYTHON, "-m", "ruff", "check", "--output-format", "concise", ".", fix="scripts/check --fix, then by hand")


@pytest.mark.timeout(300)  # without its cache, beside other work, on two cores
def test_types_hold(lint: Lint) -> None:
    lint(PYTHON, "-m", "mypy", fix="see above; a `type: ignore` needs its code and a reason", timeout=280)


def test_layers_hold(lint: Lint, tool: Callable[[str], str]) -> None:
    lint(tool("lint-imports"), "--no-logo", "--no-cache", fix="agent/ARCHITECTURE.md says who may import whom")


@pytest.mark.parametrize("back", ["import agent.core.one", "if TYPE_CHECKING:\n    import agent.core.one"])
def test_a_circle_between_modules_is_found(back: str, tmp_path: Path, root: Path, tool: Callable[[str], str]) -> None:
    """The project's own contract, on a package with a circle planted in it: also one that only type checkers see."""
    contracts = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (circles,) = [one for one in contracts if one["type"] == "acyclic_siblings"]
    (tmp_path / "pyproject.toml").write_text(
        '[tool.importlinter]\nroot_packages = ["agent"]\n\n[[tool.importlinter.contracts]]\n'
        f'name = "circles"\ntype = "acyclic_siblings"\nancestors = {circles["ancestors"]}\ndepth = {circles["depth"]}\n'
    )
    core = tmp_path / "agent" / "core"
    core.mkdir(parents=True)
    for empty in (core.parent / "__init__.py", core / "__init__.py"):
        empty.write_text("")
    (core / "one.py").write_text("import agent.core.two\n")

    def lint(two: str) -> subprocess.CompletedProcess[str]:
        (core / "two.py").write_text(two)
        command = [tool("lint-imports"), "--no-logo", "--no-cache"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False)

    fine, circle = lint(""), lint(f"from typing import TYPE_CHECKING\n\n{back}\n")
    assert fine.returncode == 0, fine.stdout + fine.stderr
    assert circle.returncode == 1, circle.stdout + circle.stderr
    assert "No cycles are allowed in agent.core" in circle.stdout


def test_protos_follow_the_standard(lint: Lint, tool: Callable[[str], str], root: Path) -> None:
    protos = sorted((root / "protos" / "agent" / "v1").glob("*.proto"))
    assert protos, "protos/agent/v1 holds no proto"
    lint(tool("buf"), "lint", "protos", fix="every rpc and field has a comment; names as buf's STANDARD says")


def test_generated_code_is_what_the_protos_say(lint: Lint, root: Path) -> None:
    script = str(root / "scripts" / "gen-protos")
    lint("env", f"HIBERNODE_PYTHON={PYTHON}", script, "--check", fix="scripts/gen-protos, and commit agent/v1")
