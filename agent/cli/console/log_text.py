"""An instance's output on its way to who looks at it, as it comes: every byte to a pipe, text to a terminal."""

from __future__ import annotations

import re
import sys
from typing import TextIO

from agent.cli.console.output import clean_log

# What only the next bytes can tell: half a character, half a colour, a CR that may belong to a line's end.
_UNFINISHED = re.compile(rb"(?:\x1b(?:\[[0-9;]{0,32})?|[\xc2-\xf4][\x80-\xbf]{0,2}|\r)\Z")


class LogText:
    """Cleans output as `clean_log` does, however it was cut into pieces. At most 40 bytes are held back."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> str:
        """The text of all that is certain by now."""
        data = self._held + data
        found = _UNFINISHED.search(data, max(0, len(data) - 40))
        self._held = found[0] if found else b""
        return clean_log(data[: len(data) - len(self._held)])

    def end(self) -> str:
        """What was held back: nothing more comes."""
        held, self._held = self._held, b""
        return clean_log(held)


class OutputWriter:
    """Writes at once, to a terminal (unless `raw`) without what could steer it. Raises BrokenPipeError."""

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
        """Nothing more comes."""
        if self._text is not None:
            self._stream.write(self._text.end())
        self._stream.flush()


def stdout_writer() -> OutputWriter:
    """For output that nobody vouches for."""
    return OutputWriter(sys.stdout)
