"""The only place that writes results: tables for people, JSON for programs, both on stdout; messages on stderr.

What daemons and instances say may hold anything, so control characters are replaced before a terminal sees them.
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
"""Where nobody looks nothing is wrapped or cut: a line stays a line for grep."""

MAX_WORD_CHARS = 24

# Colours, which logs are full of, steer nothing but themselves. All else that is no text might.
_COLOUR_OR_UNPRINTABLE = re.compile(r"\x1b\[[0-9;]{0,32}m|[^\n\t]")
# What JSON lets pass although a terminal may act on it: C1 controls, and marks that turn the direction of writing.
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
    """The text without what could steer a terminal; line ends stay out too, as a cell is one line."""
    return "".join(char if char.isprintable() else "?" for char in text)


def clean_log(data: bytes) -> str:
    """An instance's output for a terminal: lines, tabs and colours stay, other controls become `?` (a title set, an
    answer typed into the shell, a screen wiped of what stood there)."""
    return _COLOUR_OR_UNPRINTABLE.sub(
        lambda found: found[0] if len(found[0]) > 1 or found[0].isprintable() else "?",
        data.decode("utf-8", "replace").replace("\r\n", "\n"),
    )


def _cell(value: str) -> Text:
    from rich.text import Text

    return Text(clean(value), style=STYLES.get(value, ""))


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> None:
    """A table on stdout; columns named in `right` are numbers. Without rows only the head is written."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    cells = [tuple(map(_cell, row)) for row in rows]
    widths = [max(len(name), *(len(row[index]) for row in cells), 0) for index, name in enumerate(columns)]
    for name, width in zip(columns, widths, strict=True):
        justify: Literal["left", "right"] = "right" if name in right else "left"
        # fold: a long word, such as a path, is broken and not cut.
        table.add_column(name, justify=justify, no_wrap=width <= MAX_WORD_CHARS, overflow="fold")
    for row in cells:
        table.add_row(*row)
    _write(table, least=sum(min(width, MAX_WORD_CHARS) + 2 for width in widths))


def show_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values, one a line; empty values are left out."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        if value:
            table.add_row(name, _cell(value))
    _write(table)


def _write(table: Any, least: int = 0) -> None:
    """Sentences are wrapped to the terminal; but a table that needs more columns than it has (`least`) is left to the
    terminal to break, as a cut uid is of no use to anyone."""
    shown = console(sys.stdout)
    if least > shown.width:
        shown.width = PIPE_WIDTH
    with shown.capture() as captured:
        shown.print(table)
    # rich pads the last column; nobody should have to trim.
    show_text("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def show_text(text: str) -> None:
    """Text on stdout as it is."""
    sys.stdout.write(text)


def show_json(document: object) -> None:
    """One JSON document on stdout."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    show_text(_UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def note(text: str) -> None:
    """A message for people, on stderr."""
    click.echo(clean(text), err=True)


def warn(text: str) -> None:
    """Something accepted that may surprise, on stderr."""
    note(f"warning: {text}")
