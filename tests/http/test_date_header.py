"""The date of answers."""

from __future__ import annotations

from agent.http.date_header import DateHeader


def test_the_line_follows_the_second() -> None:
    seconds = iter([784_111_777, 784_111_777, 784_111_778])
    line = DateHeader(lambda: next(seconds))
    first = line()
    assert first == b"date: Sun, 06 Nov 1994 08:49:37 GMT\r\n"
    assert line() is first
    assert line() == b"date: Sun, 06 Nov 1994 08:49:38 GMT\r\n"
