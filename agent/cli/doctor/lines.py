"""How `doctor` shows what it checked, with and without a selftest."""

from __future__ import annotations

from collections.abc import Sequence

from agent.cli.console.output import clean, show_table, show_text
from agent.core.snapshots import CapabilityLine


def show_lines(lines: Sequence[CapabilityLine]) -> None:
    """A table, then each fix on a line of its own, what failed first. Not in the table: a command that is wrapped in a
    column can't be copied."""
    show_table(("CHECK", "LEVEL", "FOUND"), ((one.name, one.level, one.reason) for one in lines))
    to_do = sorted((line for line in lines if line.fix), key=lambda line: line.level != "FAIL")
    show_text("".join(["\n", *(f"fix for {line.name}: {clean(line.fix)}\n" for line in to_do)]) if to_do else "")
