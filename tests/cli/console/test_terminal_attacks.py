"""Output of an instance must not control the terminal of the user, who is often root."""

from __future__ import annotations

import json
import os
import pty
import subprocess

import pytest

from agent.cli.console.output import clean, clean_log, show_json

ATTACKS = {
    "title": "\x1b]0;owned\x07",
    "answer typed into the shell": "\x1b[6n\x1b[c\x05",
    "screen wiped": "\x1b[2J\x1b[H",
    "line overwritten": "FAILED\rOK",
    "C1 CSI": "\x9b2J",
    "clipboard": "\x1b]52;c;cm0gLXJmIC8=\x07",
    "colour that is none": "\x1b[31;\x1b]0;x\x07m",
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_log_cannot_control_the_terminal(attack: str) -> None:
    shown = clean_log(f"before {attack} after\n".encode())
    assert shown.startswith("before ")
    assert shown.endswith(" after\n")
    assert not set(shown) & set("\x1b\x07\x05\r\x9b")
    assert not set(clean(attack)) & set("\x1b\x07\x05\r\x9b")


def test_lines_tabs_and_colours_stay() -> None:
    text = "\x1b[1;32mINFO\x1b[0m\tepoch 1\r\n完 \n"
    assert clean_log(text.encode()) == text.replace("\r\n", "\n")
    assert clean_log(b"\xff\x1b[") == "\N{REPLACEMENT CHARACTER}?["


def test_json_escapes_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    attacks = "".join(ATTACKS.values()) + "\u202e\u2066"
    show_json({"message": attacks})
    out = capsys.readouterr().out
    assert json.loads(out) == {"message": attacks}
    assert all(char.isprintable() or char == "\n" for char in out)


def test_logs_are_cleaned_for_a_terminal_only(program: list[str], environment: dict[str, str]) -> None:
    """A terminal gets cleaned text; a pipe gets every byte (see test_node_commands)."""
    ours, theirs = pty.openpty()
    try:
        subprocess.run(
            [*program, "logs", "i-run"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            timeout=30,
            check=True,
        )
        assert os.read(ours, 4096).decode() == "Loading model\r\n\N{REPLACEMENT CHARACTER} not UTF-8\r\n"
    finally:
        os.close(ours)
        os.close(theirs)
