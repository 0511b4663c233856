"""Text of daemons and instances in tables and messages."""

from __future__ import annotations

import pytest

from agent.cli.console.output import clean, note


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one\ntwo", "one / two"),
        ("the end of its log:\r\n  Traceback\n\n  ValueError\n", "the end of its log: / Traceback / ValueError"),
        ("a\tb", "a b"),
        ("a\x1b[2Jb\x00", "a?[2Jb?"),
    ],
)
def test_lines_of_a_cell_stay_apart_and_controls_are_shown(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_a_message_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    note("it failed:\n\x1b]0;owned\x07\nTry again.")
    assert capsys.readouterr().err == "it failed:\n?]0;owned?\nTry again.\n"
