"""Traces: accepted notations, and errors that name file, line and column before the simulation starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.core.errors import InvalidArgumentError
from agent.core.types import MILLISECOND_NS, SECOND_NS
from agent.simulator.trace import MAX_LINE, Call, read_trace

HEAD = "time,function,duration\n"


def trace(folder: Path, text: str | bytes) -> list[Call]:
    path = folder / "access.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return list(read_trace(path))


def test_times_and_durations_in_all_notations(tmp_path: Path) -> None:
    found = trace(
        tmp_path,
        "status,time,duration,function\r\n"
        "200,2026-01-01T00:00:00Z,0.35,ocr\r\n"
        '200,2026-01-01T01:00:00.5+01:00,350ms,"ocr"\r\n'
        "\r\n"
        "500,2026-01-01 00:00:01,2m,chat_1\r\n",
    )
    start = 1_767_225_600 * SECOND_NS
    assert found == [
        Call(start, "ocr", 350 * MILLISECOND_NS),
        Call(start + SECOND_NS // 2, "ocr", 350 * MILLISECOND_NS),
        Call(start + SECOND_NS, "chat_1", 120 * SECOND_NS),
    ]
    assert trace(tmp_path, HEAD + "0,a,1\n0.25,a,0\n")[1] == Call(SECOND_NS // 4, "a", 0)


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("", ":1: ", "is empty"),
        (HEAD, ":1: ", "has no requests"),
        ("time,function\n1,a\n", ":1: column duration ", "is missing"),
        ("time,function,duration,time\n1,a,1,1\n", ":1: column time ", "is there twice"),
        (HEAD + "1,a,1\n2,a\n", ":3: ", "has 2 columns"),
        (HEAD + "1,a,1\n2,a,1,x\n", ":3: ", "has 4 columns"),
        (HEAD + "1,a,-1\n", ":2: column duration ", "not negative, got '-1'"),
        (HEAD + "1,a,nan\n", ":2: column duration ", "got 'nan'"),
        (HEAD + "1,a,inf\n", ":2: column duration ", "got 'inf'"),
        (HEAD + "1,a,1e3\n", ":2: column duration ", "got '1e3'"),
        (HEAD + "1,a,1 day\n", ":2: column duration ", "got '1 day'"),
        (HEAD + "1,a,8000000\n", ":2: column duration ", "more than a week"),
        (HEAD + "nan,a,1\n", ":2: column time ", "got 'nan'"),
        (HEAD + "-1,a,1\n", ":2: column time ", "got '-1'"),
        (HEAD + "99999999999999,a,1\n", ":2: column time ", "out of range"),
        (HEAD + "1e400,a,1\n", ":2: column time ", "1e400"),
        (HEAD + "2026-01-01T00:00:00 Mars/Olympus,a,1\n", ":2: column time ", "Mars"),
        (HEAD + "1969-01-01T00:00:00Z,a,1\n", ":2: column time ", "out of range"),
        (HEAD + "yesterday,a,1\n", ":2: column time ", "yesterday"),
        (HEAD + "2,a,1\n1,a,1\n", ":3: column time ", "earlier than the line before"),
        (HEAD + "1,,1\n", ":2: column function ", "1 to 64 letters"),
        (HEAD + "1,a b,1\n", ":2: column function ", "'a b'"),
        (HEAD + '1,"a,1\n', ":2: ", "is not CSV"),
        (HEAD.encode() + b"1,\xff,1\n", ":2: ", "is not UTF-8"),
        (HEAD + "1,a," + "1" * MAX_LINE + "\n", ":2: ", "is longer than"),
    ],
)
def test_what_is_broken_is_named(tmp_path: Path, text: str | bytes, where: str, what: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        trace(tmp_path, text)
    assert refused.value.reason == "TRACE_INVALID"
    assert refused.value.message.startswith(f"access.csv{where}"), refused.value.message
    assert what in refused.value.message


def test_the_mark_that_spreadsheets_begin_with_is_no_part_of_a_column(tmp_path: Path) -> None:
    assert trace(tmp_path, b"\xef\xbb\xbf" + HEAD.encode() + b"1,a,1\n") == [Call(SECOND_NS, "a", SECOND_NS)]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InvalidArgumentError, match="save what comes from a pipe first") as refused:
        list(read_trace(pipe))
    assert refused.value.reason == "TRACE_UNREADABLE"


def test_what_cannot_be_read_at_all(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.csv"):
        with pytest.raises(InvalidArgumentError, match=str(path)) as refused:
            list(read_trace(path))
        assert refused.value.reason == "TRACE_UNREADABLE"
