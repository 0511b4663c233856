"""Each linter is one test case: what scripts/check runs."""

from __future__ import annotations

import sys
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


def test_protos_follow_the_standard(lint: Lint, tool: Callable[[str], str], root: Path) -> None:
    protos = sorted((root / "protos" / "agent" / "v1").glob("*.proto"))
    assert protos, "protos/agent/v1 holds no proto"
    lint(tool("buf"), "lint", "protos", fix="every rpc and field has a comment; names as buf's STANDARD says")


def test_generated_code_is_what_the_protos_say(lint: Lint, root: Path) -> None:
    script = str(root / "scripts" / "gen-protos")
    lint("env", f"HIBERNODE_PYTHON={PYTHON}", script, "--check", fix="scripts/gen-protos, and commit agent/v1")
