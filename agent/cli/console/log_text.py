"""Copies an instance's output as it arrives: unchanged to a pipe, cleaned of control characters to a terminal."""

from __future__ import annotations

import re
import sys
from typing import TextIO

from agent.cli.console.output import clean_log

# An end that needs the next bytes: part of a character, part of a colour, a CR that may be followed by LF.
_UNFINISHED = re.compile(rb"(?:\x1b(?:\[[0-9;]{0,32})?|[\xc2-\xf4][\x80-\xbf]{0,2}|\r)\Z")


class LogText:
    """Applies `clean_log` to output in pieces of any size. Holds back at most 40 bytes."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> str:
        """The text up to the last complete character, colour or line end."""
        data = self._held + data
        found = _UNFINISHED.search(data, max(0, len(data) - 40))
        self._held = found[0] if found else b""
        return clean_log(data[: len(data) - len(self._held)])

    def end(self) -> str:
        """The text held back, at the end of the output."""
        held, self._held = self._held, b""
        return clean_log(held)


class OutputWriter:
    """Writes immediately; to a terminal, unless `raw`, without control sequences. Raises BrokenPipeError."""

    def __init__(self, stream: TextIO, *, raw: bool = False) -> None:
        self._stream = stream
        self._text = None if raw or not stream.isatty() else LogText()

    def write(self, data: bytes) -> None:
        if self._text is None:
            self._stream.buffer.write(data)
        else:
            self._stream.write(self._text.feed(data))
        self._stream.flush()

    def end(self) -> None:
        """Writes what is held back."""
        if self._text is not None:
            self._stream.write(self._text.end())
        self._stream.flush()


def stdout_writer() -> OutputWriter:
    """A writer of untrusted output to stdout."""
    return OutputWriter(sys.stdout)
