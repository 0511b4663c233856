"""Decoders that find a body's end: by length, by chunks, or by close.

`feed(data, start, out)` appends the body bytes of `data[start:]` to `out` and returns the position after the last byte
that it used; `done` is True once the body has ended there. Whole reads are passed on without a copy.
"""

from __future__ import annotations

import re

from agent.http.errors import body_too_large, malformed

# At most 8 digits: a chunk is under 4 GiB. Extensions are ignored. "+5", "0x5", " 5" do not match.
_chunk_line = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;[\t\x20-\x7e\x80-\xff]*)?").fullmatch
_trailer_line = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*").fullmatch
_CHUNK_LINE_BYTES = 256
_TRAILER_BYTES = 8192


class LengthBody:
    """A body of exactly `length` bytes (at least one)."""

    __slots__ = ("_left", "done")

    def __init__(self, length: int) -> None:
        self._left = length
        self.done = length == 0

    def feed(self, data: bytes, start: int, out: list[bytes]) -> int:
        available = len(data) - start
        if available > self._left:
            end = start + self._left
            out.append(data[start:end])
            self._left = 0
        else:
            end = len(data)
            if available:
                out.append(data[start:] if start else data)
            self._left -= available
        self.done = self._left == 0
        return end


class CloseBody:
    """The body of a response that ends with its connection."""

    __slots__ = ("done",)

    def __init__(self) -> None:
        self.done = False

    def feed(self, data: bytes, start: int, out: list[bytes]) -> int:
        if start < len(data):
            out.append(data[start:] if start else data)
        return len(data)


class ChunkedBody:
    """A chunked body of at most `limit_bytes` (None: any size). Trailers are checked and dropped.

    `feed` raises HttpError 400 (bad framing) or 413; the decoder cannot be used after that.
    """

    __slots__ = ("_left", "_limit_bytes", "_partial", "_room", "_state", "_trailer_room", "done")

    _SIZE, _DATA, _DATA_END, _TRAILER = range(4)

    def __init__(self, limit_bytes: int | None = None) -> None:
        self._state = self._SIZE
        self._left = 0
        self._partial = b""  # the beginning of a line whose end has not arrived
        self._limit_bytes = limit_bytes
        self._room = limit_bytes if limit_bytes is not None else 1 << 62
        self._trailer_room = _TRAILER_BYTES
        self.done = False

    def feed(self, data: bytes, start: int, out: list[bytes]) -> int:
        if self._partial:
            # Only lines are kept: this joins at most `_TRAILER_BYTES` to one read.
            data_start = start - len(self._partial)
            data = self._partial + data[start:]
            self._partial = b""
            return data_start + self._feed(data, 0, out)
        return self._feed(data, start, out)

    def _feed(self, data: bytes, pos: int, out: list[bytes]) -> int:
        size = len(data)
        while pos < size:
            if self._state == self._DATA:
                end = min(pos + self._left, size)
                out.append(data[pos:end])
                self._left -= end - pos
                pos = end
                if not self._left:
                    self._state = self._DATA_END
                continue
            eol = data.find(b"\r\n", pos, pos + _TRAILER_BYTES)
            if eol < 0:
                self._keep(data[pos:])
                return size
            line = data[pos:eol]
            pos = eol + 2
            if self._state == self._SIZE:
                self._size_line(line)
            elif self._state == self._DATA_END:
                if line:
                    raise malformed("a chunk longer than its size")
                self._state = self._SIZE
            elif line:
                self._trailer_room -= len(line)
                if _trailer_line(line) is None or self._trailer_room < 0:
                    raise malformed("bad trailer")
            else:
                self.done = True
                return pos
        return pos

    def _size_line(self, line: bytes) -> None:
        match = _chunk_line(line)
        if match is None or len(line) > _CHUNK_LINE_BYTES:
            raise malformed("bad chunk size")
        self._left = int(match.group(1), 16)
        self._room -= self._left
        if self._room < 0:
            raise body_too_large(self._limit_bytes or 0)
        self._state = self._DATA if self._left else self._TRAILER

    def _keep(self, partial: bytes) -> None:
        """Keeps the beginning of a line; refuses one as soon as it can no longer become valid."""
        text = partial[:-1] if partial.endswith(b"\r") else partial
        match self._state:
            case self._SIZE:
                good = len(text) <= _CHUNK_LINE_BYTES and (not text or _chunk_line(text) is not None)
            case self._DATA_END:
                good = not text
            case _:
                good = len(text) <= self._trailer_room and b"\n" not in text
        if not good:
            raise malformed("bad chunk")
        self._partial = partial


BodyDecoder = LengthBody | CloseBody | ChunkedBody
