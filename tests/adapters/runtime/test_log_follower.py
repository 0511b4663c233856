"""Tests following the log of a host process through rotations."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.adapters.runtime.log_files import LogFiles, LogFollower


@pytest.fixture
def logs(tmp_path: Path) -> LogFiles:
    return LogFiles(tmp_path, cap_bytes=100, keep=5)


def say(logs: LogFiles, text: bytes) -> None:
    log_fd = logs.open("ocr-a", None)
    os.write(log_fd, text)
    os.close(log_fd)


def all_of(reader: LogFollower, most_bytes: int = 7) -> bytes:
    return b"".join(iter(lambda: reader.read(most_bytes), b""))


def test_follower_returns_the_tail_then_new_bytes(logs: LogFiles) -> None:
    say(logs, b"one\ntwo\n")
    reader = logs.follow(logs.path("ocr-a"), tail_bytes=4)
    assert all_of(reader) == b"two\n"
    assert reader.read() == b""
    say(logs, b"three\n")
    assert all_of(reader) == b"three\n"
    assert all_of(logs.follow(logs.path("ocr-a"), tail_bytes=0)) == b""
    assert all_of(logs.follow(logs.path("unknown"), tail_bytes=10)) == b""


def test_follower_starts_in_the_rotated_file(logs: LogFiles) -> None:
    path = logs.path("ocr-a")
    say(logs, b"".join(b"line %02d\n" % number for number in range(20)))
    assert logs.trim(path)
    say(logs, b"after\n")
    for tail_bytes in (6, 20, 1000):
        assert all_of(logs.follow(path, tail_bytes)) == logs.read(path, tail_bytes)


def test_follower_continues_after_a_rotation(logs: LogFiles) -> None:
    path = logs.path("ocr-a")
    say(logs, b"x" * 101)
    reader = logs.follow(path, tail_bytes=1000)
    assert len(all_of(reader)) == 101
    assert logs.trim(path)
    say(logs, b"new\n")
    assert all_of(reader) == b"new\n"


def test_follower_reads_no_link(logs: LogFiles, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hunter2")
    say(logs, b"mine\n")
    reader = logs.follow(logs.path("ocr-a"), tail_bytes=1000)
    logs.path("ocr-a").unlink()
    logs.path("ocr-a").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic"):
        reader.read()
