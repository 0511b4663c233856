"""Writes all results: tables or JSON on stdout, messages on stderr.

Text from daemons and instances is untrusted: control characters are replaced before a terminal sees them.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

PIPE_WIDTH = 10_000
"""Width without a terminal: lines are neither wrapped nor cut, for grep."""

MAX_WORD_CHARS = 24

# Colours are common in logs and harmless. Other control sequences may control the terminal.
_COLOUR_OR_UNPRINTABLE = re.compile(r"\x1b\[[0-9;]{0,32}m|[^\n\t]")
_LINE_END = re.compile(r" *[\r\n]+ *")
# Characters that JSON does not escape but a terminal may act on: C1 controls and bidirectional marks.
_UNSAFE_IN_JSON = re.compile(r"[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")

STYLES = {
    "RUNNING": "green",
    "READY": "green",
    "OK": "green",
    "FROZEN": "cyan",
    "FREEZING": "blue",
    "RESTORING": "blue",
    "STARTING": "yellow",
    "WAITING_GPU": "yellow",
    "PROVISIONING": "yellow",
    "WARN": "yellow",
    "SUSPECT": "yellow",
    "STOPPING": "dim",
    "STOPPED": "dim",
    "FAILED": "red",
    "DEGRADED": "red",
    "FAIL": "red",
    "LOST": "red",
    "CORDONED": "red",
}


def console(stream: TextIO) -> Console:
    """A rich console on `stream`: colour only on a terminal and never under NO_COLOR."""
    from rich.console import Console

    terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
    return Console(
        file=stream,
        force_terminal=terminal,
        color_system="auto" if terminal and not os.environ.get("NO_COLOR") else None,
        width=None if terminal else PIPE_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
    )


def clean(text: str) -> str:
    """Text for one line, such as a cell: line ends become ` / `, tabs a blank, other control characters `?`."""
    one_line = _LINE_END.sub(" / ", text.strip("\r\n")).replace("\t", " ")
    return "".join(char if char.isprintable() else "?" for char in one_line)


def clean_log(data: bytes) -> str:
    """Output of an instance for a terminal: keeps lines, tabs and colours, and replaces other controls by `?` (they
    could set a title, type into the shell or clear the screen)."""
    return _COLOUR_OR_UNPRINTABLE.sub(
        lambda found: found[0] if len(found[0]) > 1 or found[0].isprintable() else "?",
        data.decode("utf-8", "replace").replace("\r\n", "\n"),
    )


def _cell(value: str) -> Text:
    from rich.text import Text

    return Text(clean(value), style=STYLES.get(value, ""))


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Prints a table on stdout, with the columns named in `right` aligned right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    cells = [tuple(map(_cell, row)) for row in rows]
    widths = [max(len(name), *(len(row[index]) for row in cells), 0) for index, name in enumerate(columns)]
    for name, width in zip(columns, widths, strict=True):
        justify: Literal["left", "right"] = "right" if name in right else "left"
        # fold: breaks a long word, such as a path, instead of cutting it.
        table.add_column(name, justify=justify, no_wrap=width <= MAX_WORD_CHARS, overflow="fold")
    for row in cells:
        table.add_row(*row)
    _write(table, least=sum(min(width, MAX_WORD_CHARS) + 2 for width in widths))


def show_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Prints names and values, one pair per line, without empty values."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        if value:
            table.add_row(name, _cell(value))
    _write(table)


def _write(table: Any, least: int = 0) -> None:
    """Prints the table, wrapped to the terminal's width. If that is less than `least`, it is left to the terminal to
    break lines, which does not cut uids."""
    shown = console(sys.stdout)
    if least > shown.width:
        shown.width = PIPE_WIDTH
    with shown.capture() as captured:
        shown.print(table)
    # rich pads the last column.
    show_text("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def show_text(text: str) -> None:
    """Prints text on stdout unchanged."""
    sys.stdout.write(text)


def show_json(document: object) -> None:
    """Prints one JSON document on stdout."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    show_text(_UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def note(text: str) -> None:
    """Prints a message on stderr; it may have several lines."""
    click.echo("\n".join(map(clean, text.splitlines())), err=True)


def warn(text: str) -> None:
    """Prints a warning on stderr."""
    note(f"warning: {text}")
